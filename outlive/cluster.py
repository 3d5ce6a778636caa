"""A cluster in the lab: on every host a keeper and an agent, with keys, a configuration, and a fence.

In: a lab, host names. Out: nodes whose processes can be started, stopped and asked. Demo, system tests
and benchmarks build on this, so that all of them drive the product exactly as an operator does: by its
commands, its file, its sockets.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from common.config import NodeConfig, load_config
from common.control import AgentMetrics, AskHistory, AskStatus, History, NodeStatus, WorkloadStatus
from common.control_channel import ask
from common.errors import LabError, OutliveError
from common.keys import generate
from common.model import WorkloadSpec
from outlive.declare import toml_value, workload_block
from outlive.lab import Host, Lab

_ASK_DEADLINE_S = 2.0
_POLL_S = 0.02
_STOP_TIMEOUT_S = 15.0


class Node:
    """One host with the product on it. Processes end with the lab, at the latest."""

    def __init__(self, host: Host, config_path: Path) -> None:
        self.host = host
        self.config_path = config_path
        self.config: NodeConfig = load_config(config_path)
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def name(self) -> str:
        """The node's name, which is the host's."""
        return self.host.name

    async def start(self, *roles: str) -> None:
        """Start `keeper` and `agent` (or those named) and wait until each answers."""
        for role in roles or ("keeper", "agent"):
            self.processes[role] = await self.host.spawn(
                [sys.executable, "-m", "outlive.cli", "--config", str(self.config_path), role],
                log=self.host.log_dir / f"{role}.log",
                env=dict(os.environ),
            )
            endpoint = self.config.keeper_endpoint if role == "keeper" else self.config.agent_endpoint
            await self._wait_for_answer(role, endpoint)

    async def stop(self, role: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to one of the node's processes and wait for its end."""
        process = self.processes.pop(role)
        process.send_signal(number)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            raise LabError(f"the {role} of {self.name} did not end within {_STOP_TIMEOUT_S:.0f} s") from None

    async def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `outlive WORDS…` on this host."""
        command = [sys.executable, "-m", "outlive.cli", "--config", str(self.config_path), *words]
        return await self.host.run(command, check=check, timeout_s=60.0)

    async def status(self) -> NodeStatus:
        """Ask the keeper. Raises UnreachableError."""
        answer = await ask(self.config.keeper_endpoint, AskStatus(), _ASK_DEADLINE_S)
        if not isinstance(answer, NodeStatus):
            raise LabError(f"the keeper of {self.name} answered {answer}")
        return answer

    async def workload(self, name: str) -> WorkloadStatus | None:
        """Return how the keeper sees one workload; None if it knows none of that name."""
        return next((each for each in (await self.status()).workloads if each.name == name), None)

    async def history(self, name: str) -> History:
        """Return the terms of a workload that this node's keeper kept."""
        answer = await ask(self.config.keeper_endpoint, AskHistory(workload=name), _ASK_DEADLINE_S)
        if not isinstance(answer, History):
            raise LabError(f"the keeper of {self.name} answered {answer}")
        return answer

    async def metrics(self) -> AgentMetrics:
        """Ask the agent. Raises UnreachableError."""
        answer = await ask(self.config.agent_endpoint, AskStatus(), _ASK_DEADLINE_S)
        if not isinstance(answer, AgentMetrics):
            raise LabError(f"the agent of {self.name} answered {answer}")
        return answer

    async def wait_for(
        self,
        name: str,
        condition: Callable[[WorkloadStatus], bool],
        *,
        what: str,
        timeout_s: float = 60.0,
    ) -> WorkloadStatus:
        """Poll the keeper until a workload fulfils `condition`. Raises LabError with its last status."""
        last: WorkloadStatus | None = None
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                last = await self.workload(name)
            except OutliveError as error:
                if error.retryable:
                    await asyncio.sleep(_POLL_S)
                    continue
                raise
            if last is not None and condition(last):
                return last
            await asyncio.sleep(_POLL_S)
        raise LabError(
            f"{name} on {self.name}: not {what} after {timeout_s:.0f} s; last seen: {last}",
            hint=f"the logs are in {self.host.log_dir}",
        )

    async def _wait_for_answer(self, role: str, endpoint: str) -> None:
        deadline_s = time.monotonic() + 20.0
        while True:
            if self.processes[role].returncode is not None:
                tail = (self.host.log_dir / f"{role}.log").read_text(errors="replace")[-2000:]
                raise LabError(f"the {role} of {self.name} ended at once: {tail}")
            try:
                await ask(endpoint, AskStatus(), 1.0)
            except OutliveError:
                if time.monotonic() > deadline_s:
                    raise LabError(f"the {role} of {self.name} does not answer") from None
                await asyncio.sleep(_POLL_S)
            else:
                return


async def build_cluster(
    lab: Lab,
    names: Sequence[str],
    *,
    workloads: Sequence[WorkloadSpec] = (),
    settings: dict[str, dict[str, Any]] | None = None,
    fenced: bool = True,
) -> dict[str, Node]:
    """Add hosts to a lab and put keys and configurations on them; nothing is started yet.

    `settings` are further tables of every node's file (`{"heartbeat": {"interval_ms": 20}}`). The first
    of each workload's nodes declares it. With `fenced`, each node may turn every other one off.
    """
    hosts = {name: await lab.add_host(name) for name in names}
    keys = {name: generate(host.etc_dir / "node.key") for name, host in hosts.items()}
    nodes: dict[str, Node] = {}
    for name, host in hosts.items():
        tables: dict[str, dict[str, Any]] = {
            "node": {
                "name": name,
                "address": str(host.address.ip),
                "key_file": str(host.etc_dir / "node.key"),
                "state_dir": str(host.state_dir),
                "run_dir": str(host.run_dir / "outlive"),
                "image_dir": str(host.run_dir / "images"),
                "vip_interface": host.interface,
                "cgroup_parent": host.cgroup_parent,
                "boot_id_file": str(host.boot_id_file),
            }
        }
        for table, values in (settings or {}).items():
            tables[table] = tables.get(table, {}) | values
        lines = [line for table, values in tables.items() for line in _table(f"[{table}]", values)]
        for other, peer in hosts.items():
            if other == name:
                continue
            lines += _table(
                "[[peers]]",
                {"name": other, "address": str(peer.address.ip), "public_key": keys[other].public},
            )
            if fenced:
                lines += _table(
                    "[[fences]]",
                    {"node": other, "name": "power switch", "command": list(peer.fence_command)},
                )
        text = "\n".join(lines) + "\n"
        text += "\n".join(workload_block(spec) for spec in workloads if spec.nodes[0] == name)
        path = host.etc_dir / "node.toml"
        path.write_text(text)
        nodes[name] = Node(host, path)
    return nodes


async def start_all(nodes: dict[str, Node]) -> None:
    """Start keeper and agent on every node, side by side."""
    await asyncio.gather(*(node.start() for node in nodes.values()))


async def eventually(
    condition: Callable[[], Awaitable[bool]], *, what: str, timeout_s: float = 30.0
) -> float:
    """Poll until `condition` holds; return how long that took in seconds. Raises LabError."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < timeout_s:
        if await condition():
            return time.monotonic() - started_s
        await asyncio.sleep(_POLL_S)
    raise LabError(f"not within {timeout_s:.0f} s: {what}")


def _table(header: str, values: dict[str, Any]) -> list[str]:
    return [header, *(f"{key} = {toml_value(value)}" for key, value in values.items()), ""]
