"""What the tests of whole clusters share: a protected redis, and ways to look at it from a client's host."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from common.control import WorkloadStatus
from common.model import HealthCheck, WorkloadSpec
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Host, Lab

PORT = 6379
NAME = "redis"
REDIS = ("redis-server", "--port", str(PORT), "--protected-mode", "no", "--save", "")


@dataclass
class Protected:
    """A redis that leads on the first node, restorable on the second."""

    lab: Lab
    nodes: dict[str, Node]
    client: Host
    spec: WorkloadSpec

    def probe(self, *words: str) -> list[str]:
        address = str(self.lab.vip().ip)
        return [sys.executable, "-m", "outlive.probe", address, str(PORT), *words]

    async def redis(self, *words: str, check: bool = True) -> str:
        """Run redis-cli from the client's host, through the service address."""
        command = ["timeout", "3", "redis-cli", "-h", str(self.lab.vip().ip), "-p", str(PORT), *words]
        answer = await self.client.run(command, check=check, timeout_s=15.0)
        return answer.stdout.strip()

    async def answers(self) -> bool:
        return await self.redis("ping", check=False) == "PONG"

    async def present(self, newest: int) -> set[int]:
        answer = await self.client.run(self.probe("present", "--newest", str(newest)), timeout_s=60.0)
        return set(json.loads(answer.stdout))

    async def epochs(self, node: str = "a") -> int:
        """Return how many epochs the node's agent has had acknowledged since it began to lead."""
        metrics = (await self.nodes[node].metrics()).workloads
        return metrics[0].epochs_acknowledged if metrics else 0

    async def wait_for_epochs(self, more: int, node: str = "a", timeout_s: float = 60.0) -> None:
        """Wait for that many more acknowledged ones.

        Three may have been frozen before now: one in flight, one waiting, one being hashed. The fourth holds
        whatever was written until now.
        """
        start = await self.epochs(node)

        async def enough() -> bool:
            return await self.epochs(node) >= start + more

        await eventually(enough, what=f"{more} more epochs of {node}", timeout_s=timeout_s)

    async def wait_until_protected(self, leader: str, replica: str) -> WorkloadStatus:
        await self.nodes[leader].wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led")
        return await self.nodes[replica].wait_for(
            NAME, lambda w: w.role == "replica" and w.restorable, what="restorable"
        )


@asynccontextmanager
async def protected_redis(
    names: Sequence[str] = ("a", "b"),
    *,
    fill_mib: int = 0,
    settings: dict[str, dict[str, Any]] | None = None,
    fenced: bool = True,
    without_agent: Sequence[str] = (),
    **fields: Any,
) -> AsyncIterator[Protected]:
    """Build a lab with a redis on the first of `names`, wait until it is protected by the second.

    On the nodes in `without_agent` only the keeper is started.
    """
    async with Lab() as lab:
        spec = WorkloadSpec(
            **(
                {
                    "name": NAME,
                    "nodes": tuple(names),
                    "command": REDIS,
                    "vip": str(lab.vip()),
                    "health": HealthCheck(tcp=PORT),
                    "right_to_lead": "fence",
                    "epoch_interval_ms": 200,
                }
                | fields
            )
        )
        nodes = await build_cluster(lab, names, workloads=[spec], settings=settings, fenced=fenced)
        cluster = Protected(lab, nodes, await lab.add_host("client"), spec)
        await start_all({name: node for name, node in nodes.items() if name not in without_agent})
        for name in without_agent:
            await nodes[name].start("keeper")
        await nodes[names[0]].cli("start", NAME)
        await eventually(cluster.answers, what="redis answers")
        if fill_mib:
            await cluster.client.run(cluster.probe("fill", "--bytes", str(fill_mib << 20)), timeout_s=120.0)
        if len(names) > 1:
            await cluster.wait_until_protected(names[0], names[1])
        yield cluster
