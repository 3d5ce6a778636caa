"""Fencing by a real sshd: who was fenced leads no more, whatever hung, starts again, or was half-way up."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.container import running_init_pid, workload_pids
from common.model import HealthCheck, WorkloadSpec
from common.processes import holders, matching
from common.terms_file import TermFiles
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Lab
from tests.system.clusters import NAME, PORT, REDIS, Protected
from tests.system.ssh_hosts import SshHost, fence_block, privilege_separation

_SLOW_S = 2.0

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@dataclass
class Pair:
    """A redis that leads on a and is restorable on b; each may fence the other by SSH."""

    cluster: Protected
    sshds: dict[str, SshHost]
    states_before: int = 0
    """How many changes of role a had told before anything was done to it."""

    @property
    def a(self) -> Node:
        return self.cluster.nodes["a"]

    @property
    def b(self) -> Node:
        return self.cluster.nodes["b"]

    async def taken_over(self) -> None:
        await self.b.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="taken over")
        await eventually(self.cluster.answers, what="redis answers")

    def runs_on_a(self) -> bool:
        return bool(workload_pids(self.a.config, NAME))

    async def address_on_a(self) -> bool:
        shown = await self.a.host.run(["ip", "-j", "address", "show"])
        return str(self.cluster.lab.vip().ip) in shown.stdout

    def send(self, role: str, number: signal.Signals) -> None:
        self.a.processes[role].send_signal(number)

    async def follows(self) -> None:
        """Start keeper and agent of a again, in the same boot; it must follow and never have led."""
        await self.a.start()
        await self.a.wait_for(NAME, lambda w: w.role == "replica" and w.leader == "b", what="a replica of b")
        assert not self.runs_on_a()
        states = [event["fields"].get("state") for event in self.events("role.changed")]
        assert "leading" not in states[self.states_before :], states

    def events(self, kind: str) -> list[dict[str, object]]:
        lines = Path(self.a.config.node.state_dir, "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]  # type: ignore[misc]


@asynccontextmanager
async def ssh_pair(*, forced: bool = False, slow_runc: bool = False, **fields: object) -> AsyncIterator[Pair]:
    async with privilege_separation(), Lab() as lab:
        spec = WorkloadSpec(
            **{  # type: ignore[arg-type]
                "name": NAME,
                "nodes": ("a", "b"),
                "command": REDIS,
                "vip": str(lab.vip()),
                "health": HealthCheck(tcp=PORT),
                "right_to_lead": "fence",
                "epoch_interval_ms": 200,
                **fields,
            }
        )
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec], fenced=False)
        sshds = {name: SshHost(node, forced=forced) for name, node in nodes.items()}
        for name, node in nodes.items():
            other = nodes["b" if name == "a" else "a"]
            with node.config_path.open("a") as file:
                file.write(fence_block(other, forced=forced))
            nodes[name] = Node(node.host, node.config_path)
        for sshd in sshds.values():
            await sshd.start()
        if slow_runc:
            nodes["a"] = _with_slow_runc(nodes["a"])
        cluster = Protected(lab, nodes, await lab.add_host("client"), spec)
        await start_all(nodes)
        await nodes["a"].cli("start", NAME)
        await eventually(cluster.answers, what="redis answers")
        await cluster.wait_until_protected("a", "b")
        pair = Pair(cluster, sshds)
        pair.states_before = len(pair.events("role.changed"))
        yield pair


def _with_slow_runc(node: Node) -> Node:
    """Have runc begin late while there is a file `slow`."""
    wrapper = node.host.state_dir / "runc"
    wrapper.write_text(f'#!/bin/sh\n[ ! -e {node.host.state_dir}/slow ] || sleep {_SLOW_S}\nexec runc "$@"\n')
    wrapper.chmod(0o755)
    text = node.config_path.read_text().replace("[node]\n", f'[node]\nrunc = "{wrapper}"\n')
    node.config_path.write_text(text)
    return Node(node.host, node.config_path)


@pytest.mark.parametrize("forced", [False, True], ids=["a key for all", "a forced command"])
async def test_a_dead_keeper_and_agent_are_replaced_while_the_workload_runs_on(forced: bool) -> None:
    async with ssh_pair(forced=forced) as pair:
        await pair.cluster.redis("set", "kept", "yes")
        await pair.cluster.wait_for_epochs(4)
        assert pair.runs_on_a()
        for role in ("keeper", "agent"):
            await pair.a.stop(role, signal.SIGKILL)
        await pair.taken_over()
        assert not pair.runs_on_a()
        assert not await pair.address_on_a()
        assert await pair.cluster.redis("get", "kept") == "yes"
        refusal = TermFiles(Path(pair.a.config.node.state_dir), "a").load_refusal(NAME)
        assert refusal is not None
        assert (refusal.term, refusal.by) == (1, "b")
        assert len(pair.events("workload.fenced")) == 1
        await pair.follows()
        await pair.cluster.wait_until_protected("b", "a")


async def test_a_keeper_and_an_agent_that_hang_are_ended_and_never_go_on() -> None:
    async with ssh_pair() as pair:
        keeper, agent = pair.a.processes["keeper"], pair.a.processes["agent"]
        for role in ("keeper", "agent"):
            pair.send(role, signal.SIGSTOP)
        await pair.taken_over()
        for role in ("keeper", "agent"):
            with suppress(ProcessLookupError):
                pair.send(role, signal.SIGCONT)
        await asyncio.sleep(1.0)
        assert (await keeper.wait(), await agent.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
        assert not pair.runs_on_a()
        assert not await pair.address_on_a()
        await pair.follows()


async def test_without_an_answer_nobody_takes_over_and_the_workload_lives() -> None:
    async with ssh_pair() as pair:
        await pair.sshds["a"].stop()
        for role in ("keeper", "agent"):
            await pair.a.stop(role, signal.SIGKILL)
        waiting = await pair.b.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        assert "unknown" in waiting.reason
        await asyncio.sleep(3.0)  # it is asked again meanwhile
        assert pair.runs_on_a()
        assert running_init_pid(pair.b.config, NAME) is None
        assert await pair.cluster.answers()
        await pair.sshds["a"].start()
        await pair.taken_over()
        assert not pair.runs_on_a()


async def test_a_node_that_could_not_take_over_is_yielded_to_by_the_fenced_one() -> None:
    """The answer was lost on its way: the fence is done, and who fenced does not know."""
    async with ssh_pair(right_to_lead="manual") as pair:
        done = await pair.b.cli("fence", "a", "--yes", "--output", "json")
        answer = json.loads(done.stdout)
        assert (answer["outcome"], answer["terms"]) == ("confirmed", {NAME: 1})
        assert not pair.runs_on_a()
        assert not await pair.address_on_a()
        assert holders(pair.a.config.keeper_endpoint.removeprefix("ipc://")) == []
        await pair.a.start()
        yielded = await pair.a.wait_for(NAME, lambda w: w.state == "yielded", what="yielded")
        assert not yielded.running
        await pair.b.cli("failover", NAME, "--accept-data-loss")
        await pair.taken_over()


async def test_operators_see_what_each_method_says_and_a_fence_of_the_past_is_refused() -> None:
    async with ssh_pair() as pair:
        unsure = await pair.b.cli("fence", "a", check=False)
        assert (unsure.returncode, "--yes" in unsure.stderr) == (3, True)
        looked = json.loads((await pair.b.cli("doctor", "--output", "json", check=False)).stdout)
        (check,) = [each for each in looked["checks"] if each["name"].startswith("fence ")]
        assert (check["status"], "would be carried out" in check["detail"]) == ("ok", True), check
        assert pair.runs_on_a()

        past = ["accept-fence", "--node", "a", "--by", "b", "--workload", f"{NAME}=0", "--output", "json"]
        refused = await pair.a.cli(*past, check=False)
        assert (refused.returncode, json.loads(refused.stdout)["outcome"]) == (22, "refused")
        wrong = [word if word != "a" else "c" for word in past]
        refused = await pair.a.cli(*wrong, check=False)
        assert (refused.returncode, "this is a, not c" in refused.stdout) == (22, True)
        assert pair.runs_on_a()
        assert await pair.cluster.answers()

        await pair.sshds["a"].stop()
        unknown = await pair.b.cli("fence", "a", "--yes", check=False)
        assert (unknown.returncode, "unknown" in unknown.stdout) == (23, True)
        looked = json.loads((await pair.b.cli("doctor", "--output", "json", check=False)).stdout)
        (check,) = [each for each in looked["checks"] if each["name"].startswith("fence ")]
        assert check["status"] == "warn"


async def test_a_forced_command_does_nothing_but_be_fenced() -> None:
    async with ssh_pair(forced=True) as pair:
        etc = pair.a.host.etc_dir
        known = pair.b.host.etc_dir / "known"
        known.write_text(f"{pair.a.host.address.ip} {(etc / 'ssh_host.pub').read_text()}")
        ssh = ["ssh", "-F", "none", "-i", str(etc / "ssh_client"), "-o", "BatchMode=yes"]
        ssh += ["-o", f"UserKnownHostsFile={known}", f"root@{pair.a.host.address.ip}"]
        mark = pair.a.host.state_dir / "mark"
        for words in (f"touch {mark}", f"outlive accept-fence --node a; touch {mark}", ""):
            done = await pair.b.host.run([*ssh, words] if words else ssh, check=False)
            assert done.returncode not in (0, 255), done
        assert not mark.exists()
        assert pair.runs_on_a()


async def test_what_is_half_way_up_when_the_fence_comes_does_not_come_up() -> None:
    """The worst moment: an agent that hangs, and conmon and runc at work for it, with nothing running yet."""
    async with ssh_pair(slow_runc=True) as pair:
        await pair.a.cli("stop", NAME)
        slow = pair.a.host.state_dir / "slow"
        slow.touch()
        starting = asyncio.create_task(pair.a.cli("start", NAME, check=False))

        async def at_work() -> bool:
            return bool(matching(lambda words: str(slow.parent / "runc") in words and "create" in words))

        await eventually(at_work, what="runc is at work")
        pair.send("agent", signal.SIGSTOP)
        assert not pair.runs_on_a()
        words = ["accept-fence", "--node", "a", "--by", "b", "--workload", f"{NAME}=1", "--output", "json"]
        fenced = await pair.a.cli(*words)
        assert json.loads(fenced.stdout)["outcome"] == "confirmed"
        with suppress(ProcessLookupError):
            pair.send("agent", signal.SIGCONT)
        await starting
        await asyncio.sleep(_SLOW_S)
        assert not pair.runs_on_a()
