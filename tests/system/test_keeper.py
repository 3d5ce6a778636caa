"""Two real keepers on loopback, with agents that only speak the control protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio
from msgspec.structs import replace

from common.config import Fence, Heartbeat, Node, NodeConfig, Peer
from common.container import workload_pids
from common.control import (
    AnnounceFreeze,
    AskExplanation,
    AskHistory,
    AskStatus,
    CancelSwitchover,
    Done,
    EndFreeze,
    Explanation,
    Failover,
    History,
    KeeperAnswer,
    KeeperRequest,
    NodeStatus,
    Order,
    Orders,
    PauseTakeover,
    PlanSwitchover,
    Refused,
    ReplicaProgress,
    Report,
    ResumeTakeover,
    StartWorkload,
    StopWorkload,
    WorkloadReport,
    WorkloadStatus,
)
from common.control_channel import ask
from common.gate import gate_of
from common.heartbeat import AgentBeater
from common.keyring import read_keyring
from common.keys import KeyPair, generate
from common.model import EpochId, WorkloadSpec

pytestmark = pytest.mark.system
# ruff: noqa: ASYNC220, ASYNC221 - starting a small process takes no time that a test would notice

SPEC = WorkloadSpec(
    name="w", nodes=("a", "b"), command=("sleep", "1000"), right_to_lead="fence", on_exit="restart"
)
RUN_KEEPER = """
import sys
from outlive.cli import _NOT_FOR_THE_KEEPER
sys.modules.update(dict.fromkeys(_NOT_FOR_THE_KEEPER))
import asyncio
from pathlib import Path
import msgspec
from common.config import NodeConfig
from outlive.keeper import run_keeper
from outlive.keeper_effects import RealHands
from outlive.set_aside import AGAIN_S

class Hands(RealHands):
    '''The process that the fake agent started stands for the container.'''

    def init_pid(self, name):
        if name != "w":
            return None
        try:
            pid = int((Path(self._config.node.run_dir) / "fake-pid").read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return pid if state != "Z" else None

    async def kill(self, spec):
        import os, signal
        pid = self.init_pid(spec.name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=NodeConfig)
asyncio.run(run_keeper(config, Hands(config)))
"""


def ignore_alarm() -> None:
    """Be a criu that does not listen to its own time-out."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


class FakeAgent:
    """Reports, obeys with a `sleep` for a container, and beats, as an agent would."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None
        self.stored: EpochId | None = None
        self.replicas: tuple[ReplicaProgress, ...] = ()
        self.done = 0
        self.orders: list[Order] = []
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *, beats: bool = True) -> None:
        self._tasks = [asyncio.create_task(self._report())]
        if beats:
            keys = read_keyring(self.config)
            self._tasks.append(asyncio.create_task(AgentBeater(self.config, keys, self._context).run()))

    def start_only_beats(self) -> None:
        keys = read_keyring(self.config)
        self._tasks = [asyncio.create_task(AgentBeater(self.config, keys, self._context).run())]

    async def die(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def close(self) -> None:
        await self.die()
        self.end_workload()
        self._context.destroy(linger=0)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end_workload(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def _report(self) -> None:
        while True:
            report = WorkloadReport(
                name="w",
                spec=SPEC,
                learned=True,  # as if its leader had greeted just now
                running=self.running,
                init_pid=self.process.pid if self.process is not None and self.running else 0,
                exit_code=None if self.running or self.process is None else 137,
                stored=self.stored,
                restorable=self.stored is not None,
                replicas=self.replicas,
                order_done=self.done,
                order_detail="as ordered",
            )
            answer = await ask(
                self.config.keeper_endpoint,
                Report(agent_pid=os.getpid(), workloads=(report,)),
                2.0,
                context=self._context,
            )
            assert isinstance(answer, Orders)
            for order in answer.orders:
                self._obey(order)
            await asyncio.sleep(0.03)

    def _obey(self, order: Order) -> None:
        if order.number <= self.done:
            return
        self.orders.append(order)
        if order.role != "lead":
            self.end_workload()
        elif order.action != "none" and not self.running:
            self.process = subprocess.Popen(["sleep", "1000"])
            (Path(self.config.node.run_dir) / "fake-pid").write_text(str(self.process.pid))
        self.done = order.number


class NodeUnderTest:
    """One node: its configuration, its keeper process, its fake agent."""

    def __init__(self, directory: Path, config: NodeConfig) -> None:
        self.directory = directory
        self.config = config
        self.agent = FakeAgent(config)
        self.keeper: subprocess.Popen[bytes] | None = None
        self.log = directory / "keeper.log"

    async def start_keeper(self) -> None:
        file = self.directory / "config.json"
        file.write_bytes(msgspec.json.encode(self.config))
        with self.log.open("ab") as log:
            self.keeper = subprocess.Popen(
                [sys.executable, "-c", RUN_KEEPER, str(file)],
                stderr=log,
                cwd=Path(__file__).parents[2],
                # Its memory is measured here, and a tracer's is not its own; the lab's keepers are traced.
                env={key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")},
            )
        await until(self._answers, "the keeper answers")

    async def _answers(self) -> bool:
        assert self.keeper is not None
        assert self.keeper.poll() is None, self.log.read_text()
        try:
            await self.ask(AskStatus())
        except Exception:
            return False
        return True

    async def ask(self, request: KeeperRequest) -> KeeperAnswer:
        return await ask(self.config.keeper_endpoint, request, 10.0)

    async def status(self) -> WorkloadStatus:
        answer = await self.ask(AskStatus())
        assert isinstance(answer, NodeStatus)
        return next(each for each in answer.workloads if each.name == "w")

    async def is_in(self, state: str, timeout_s: float = 10.0) -> WorkloadStatus:
        async def there() -> bool:
            return (await self.status()).state == state

        try:
            await until(there, f"{self.config.node.name} is {state}", timeout_s)
        except TimeoutError:
            raise AssertionError(f"not {state}: {await self.status()}\n{self.log.read_text()}") from None
        return await self.status()

    def kill_keeper(self, number: int = signal.SIGKILL) -> int:
        assert self.keeper is not None
        self.keeper.send_signal(number)
        return self.keeper.wait(timeout=10)


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(what)
        await asyncio.sleep(0.01)


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def config_of(
    name: str, other: str, directory: Path, ports: dict[str, int], keys: dict[str, KeyPair]
) -> NodeConfig:
    home = directory / name
    fence = directory / f"fence-{other}"
    if not fence.exists():
        fence.write_text("#!/bin/sh\nexit 2\n")
        fence.chmod(0o700)
    (home / "boot_id").write_text(f"boot-of-{name}\n")
    return NodeConfig(
        node=Node(
            name=name,
            address="127.0.0.1",
            keeper_port=ports[name],
            key_file=str(home / "node.key"),
            state_dir=str(home / "state"),
            run_dir=str(home / "run"),
            boot_id_file=str(home / "boot_id"),
        ),
        heartbeat=Heartbeat(interval_ms=50, suspect_after_ms=300),
        peers=(
            Peer(name=other, address="127.0.0.1", public_key=keys[other].public, keeper_port=ports[other]),
        ),
        fences=(Fence(node=other, command=(str(fence),)),),
        workloads=(SPEC,) if name == "a" else (),
    )


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[NodeUnderTest, NodeUnderTest]]:
    """Two nodes whose keepers and agents run; unix socket paths are short, hence not pytest's directory."""
    with tempfile.TemporaryDirectory(prefix="ok-") as name:
        directory = Path(name)
        for node in ("a", "b"):
            (directory / node / "state").mkdir(mode=0o700, parents=True)
            (directory / node / "run").mkdir(mode=0o700)
        keys = {node: generate(directory / node / "node.key") for node in ("a", "b")}
        ports = dict(zip(("a", "b"), free_ports(2), strict=True))
        a = NodeUnderTest(directory / "a", config_of("a", "b", directory, ports, keys))
        b = NodeUnderTest(directory / "b", config_of("b", "a", directory, ports, keys))
        try:
            for node in (a, b):
                await node.start_keeper()
                node.agent.start()
            yield a, b
        finally:
            for node in (a, b):
                await node.agent.close()
                if node.keeper is not None and node.keeper.poll() is None:
                    node.kill_keeper()


async def protect(a: NodeUnderTest, b: NodeUnderTest) -> None:
    """Start the workload on `a` and pretend that `b` has an epoch of it."""
    answer = await a.ask(StartWorkload(spec=SPEC))
    assert isinstance(answer, Done), answer
    await a.is_in("leading")
    await b.is_in("following")
    b.agent.stored = EpochId(1, 7)
    a.agent.replicas = (
        ReplicaProgress(node="b", connected=True, acknowledged=EpochId(1, 7), restorable=True),
    )

    async def protected() -> bool:
        return (await a.status()).restorable

    await until(protected, "b could restore it")


def let_fence_of(a: NodeUnderTest, answer: str) -> None:
    (a.directory.parent / f"fence-{a.config.node.name}").write_text(f"#!/bin/sh\n{answer}\n")


async def lose(node: NodeUnderTest) -> None:
    """Everything on the node is gone at once, as with its power."""
    node.kill_keeper()
    await node.agent.die()
    node.agent.end_workload()


async def test_the_first_start_leads_term_1_and_the_replica_follows() -> None:
    async with pair() as (a, b):
        refused = await b.ask(StartWorkload(spec=SPEC))
        assert isinstance(refused, Refused)
        assert refused.error == "NoRightToLeadError"
        await protect(a, b)
        status = await a.status()
        assert (status.term, status.leader, status.running, status.role) == (1, "a", True, "primary")
        assert status.reason.startswith("protected by b")
        assert (await b.status()).role == "replica"
        assert b.agent.orders[-1].role == "follow"


async def test_a_lost_host_is_fenced_and_taken_over_with_a_timeline() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "echo the power is off; exit 0")
        lost_s = time.monotonic()
        await lose(a)
        await b.is_in("leading")
        took_ms = (time.monotonic() - lost_s) * 1000
        history = await b.ask(AskHistory(workload="w"))
        assert isinstance(history, History)
        story = history.terms[-1]
        print(f"\ntaken over in {took_ms:.0f} ms")
        for entry in story.timeline:
            print(f"{entry.at_ms:8.1f} ms  {entry.event:16} {entry.reason}")
        events = [entry.event for entry in story.timeline]
        assert events == [
            "last heard",
            "suspected",
            "fence asked",
            "right acquired",
            "term recorded",
            "ordered",
            "running",
            "leading",
        ]
        suspected = story.timeline[1]
        assert 300 <= suspected.at_ms < 600
        assert "the power is off" in story.timeline[3].reason
        assert (story.term, story.leader) == (2, "b")
        # How many orders without an action follow depends on when the agent asks between two steps.
        assert [order.action for order in b.agent.orders if order.action != "none"] == ["restore"]
        assert took_ms < 3000


async def test_without_a_confirmed_fence_the_replica_waits_and_says_why() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        await lose(a)
        status = await b.is_in("waiting")
        assert "the fence is unknown" in status.reason
        refused = await b.ask(Failover(workload="w", accept_data_loss=True))
        assert isinstance(refused, Refused)
        assert refused.error == "NoRightToLeadError"
        answer = await b.ask(Failover(workload="w", accept_data_loss=True, old_primary_is_off="a"))
        assert isinstance(answer, Done), answer
        assert (await b.is_in("leading")).term > 1


async def test_paused_nobody_takes_over_whatever_restarts_until_it_is_resumed() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "echo the power is off; exit 0")

        async def both_would() -> bool:
            said = [await node.ask(AskExplanation(workload="w")) for node in (a, b)]
            return all(isinstance(each, Explanation) and each.would_fail_over for each in said)

        await until(both_would, "b would take over, and a knows that from it")
        answer = await a.ask(PauseTakeover(workload="w", by="root"))
        assert isinstance(answer, Done), answer
        assert (a.directory / "state/terms/w/pauses.json").exists(), "on disk before it is acknowledged"

        async def confirmed() -> bool:
            return not (await a.status()).pauses_unconfirmed_by

        await until(confirmed, "b echoes the pause")
        assert (b.directory / "state/terms/w/pauses.json").exists(), "on disk before it is echoed"
        for node in (a, b):
            node.kill_keeper()
            await node.agent.die()
            await node.start_keeper()
            node.agent.start()
        await a.is_in("leading")
        await b.is_in("following")

        async def both_would_not() -> bool:
            said = [await node.ask(AskExplanation(workload="w")) for node in (a, b)]
            missing = [each.missing for each in said if isinstance(each, Explanation)]
            return all(reasons and "paused by root on a" in reasons[0] for reasons in missing)

        await until(both_would_not, "b names the pause, and a knows that from it")
        await lose(a)
        status = await b.is_in("waiting")
        assert "takeover is paused by root on a" in status.reason
        assert [pause.node for pause in status.pauses] == ["a"]
        await asyncio.sleep(1.0)
        assert (await b.status()).state == "waiting"
        events = (b.directory / "state/events.jsonl").read_text()
        assert '"takeover.paused"' in events
        assert '"fence.asked"' not in events
        assert isinstance(await b.ask(ResumeTakeover(workload="w", by="root")), Done)
        status = await b.is_in("leading")
        assert status.pauses == ()
        assert status.pauses_unconfirmed_by == ("a",)
        assert '"takeover.resumed"' in (b.directory / "state/events.jsonl").read_text()


async def test_a_dead_keeper_is_no_reason_to_take_over_and_leads_again_when_it_is_back() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "exit 0")
        a.kill_keeper()
        await a.agent.die()  # its reports fail without a keeper; it goes on beating
        a.agent.start_only_beats()
        await asyncio.sleep(1.2)
        assert (await b.status()).state == "following"
        assert a.agent.running
        await a.start_keeper()
        status = await a.is_in("leading")
        assert (status.term, status.running) == (1, True)


async def test_a_dead_agent_means_unprotected_and_no_takeover() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "exit 0")
        await a.agent.die()

        async def unprotected() -> bool:
            return (await a.status()).reason.startswith("unprotected: this node's agent is silent")

        await until(unprotected, "the silent agent is told")
        status = await a.status()
        assert (status.state, status.running, status.restorable) == ("leading", True, False)
        assert (await b.status()).state == "following"


async def test_the_keeper_sees_the_workload_end_without_its_agent() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        await a.agent.die()
        a.agent.end_workload()

        async def ended() -> bool:
            return not (await a.status()).running

        await until(ended, "the end is seen", 1.0)


async def test_a_damaged_term_file_costs_one_workload_its_keeper_and_no_other() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        a.kill_keeper()
        file = Path(a.config.node.state_dir) / "terms/w/term.json"
        whole = file.read_bytes()
        file.write_bytes(b"{")
        other = msgspec.structs.replace(SPEC, name="other")
        a.config = msgspec.structs.replace(a.config, workloads=(SPEC, other))
        await a.start_keeper()
        status = await a.status()
        assert (status.state, status.role, status.term, status.running) == ("failed", "none", 0, True)
        assert "term.json cannot be read" in status.reason
        assert "it is looked at again every" in status.reason
        for request in (
            StartWorkload(spec=SPEC),
            StopWorkload(workload="w"),
            Failover(workload="w", accept_data_loss=True),
        ):
            refused = await a.ask(request)
            assert isinstance(refused, Refused)
            assert "cannot be known" in refused.message
        assert isinstance(await a.ask(StartWorkload(spec=other)), Done), "the other one is kept"
        await asyncio.sleep(0.5)  # reports that name it, and heartbeats
        assert a.agent.running, "what runs, runs on"
        assert (await b.status()).state == "following", "a is heard: no reason to take over"
        assert file.read_bytes() == b"{"
        file.write_bytes(whole)
        status = await a.is_in("leading", timeout_s=30.0)
        assert (status.term, status.running) == (1, True), "it is taken back, and no keeper was restarted"


async def test_a_keeper_that_begins_on_a_full_disk_leads_on() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        await a.agent.die()
        a.kill_keeper()
        state = Path(a.config.node.state_dir)
        kept = state.with_name("kept")
        state.rename(kept)
        state.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "full", state], check=True)
        try:
            shutil.copytree(kept, state, dirs_exist_ok=True)
            with contextlib.suppress(OSError), (state / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            # what counts by now is to be kept, and cannot be
            changed = msgspec.structs.replace(SPEC, epoch_interval_ms=300)
            a.config = msgspec.structs.replace(a.config, workloads=(changed,))
            before = a.agent.done
            await a.start_keeper()
            a.agent.start()
            status = await a.is_in("leading")
            assert (status.term, status.running) == (1, True)
            assert isinstance(await a.ask(StopWorkload(workload="w")), Refused), "no stop can be recorded"

            async def obeyed() -> bool:
                return a.agent.done > before

            await until(obeyed, "the agent has an order of a higher number")
        finally:
            a.kill_keeper()
            subprocess.run(["umount", "-l", state], check=True)


async def test_a_stop_is_kept_over_a_restart_and_is_no_reason_to_take_over() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "exit 0")
        assert isinstance(await a.ask(StopWorkload(workload="w")), Done)
        await a.is_in("stopped")
        await asyncio.sleep(0.3)
        assert not a.agent.running
        await a.agent.die()
        a.kill_keeper()
        await asyncio.sleep(1.0)
        assert (await b.status()).state == "following"
        await a.start_keeper()
        assert (await a.status()).state == "stopped"
        a.agent.start()
        assert isinstance(await a.ask(StartWorkload(spec=SPEC)), Done)
        assert (await a.is_in("leading")).term == 1


async def test_the_old_primary_follows_when_it_is_back() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        let_fence_of(a, "exit 0")
        await lose(a)
        await b.is_in("leading")
        (a.directory / "boot_id").write_text("another-boot\n")
        await a.start_keeper()
        status = await a.is_in("following")
        assert (status.term, status.leader) == (2, "b")
        refused = await a.ask(StartWorkload(spec=SPEC))
        assert isinstance(refused, Refused)
        assert refused.error == "NoRightToLeadError"


async def test_sigterm_ends_the_keeper_cleanly_and_leaves_the_workload() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        began_s = time.monotonic()
        assert a.kill_keeper(signal.SIGTERM) == 0, a.log.read_text()
        assert time.monotonic() - began_s < 2.0
        assert a.agent.running
        assert "Traceback" not in a.log.read_text()


async def test_a_planned_switchover_outlives_the_keeper_and_begins_when_it_is_due() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        at_wall_s = time.time() + 3.0
        plan = PlanSwitchover(workload="w", to="b", at_wall_s=at_wall_s, by="root")
        assert await b.ask(plan) == Refused(
            error="NoRightToLeadError", message="a leads it", hint="on a: outlive switchover w --to b"
        )
        assert isinstance(await a.ask(replace(plan, at_wall_s=1.0)), Refused)
        answer = await a.ask(plan)
        assert isinstance(answer, Done), answer
        a.kill_keeper()
        await a.agent.die()
        await a.start_keeper()
        a.agent.start()
        status = await a.is_in("leading")
        assert status.planned is not None
        assert status.planned.to == "b"
        await a.is_in("handing_over")
        assert time.time() >= at_wall_s
        assert (await a.status()).planned is None
        history = await a.ask(AskHistory(workload="w"))
        assert isinstance(history, History)
        steps = (*history.terms[-1].timeline, *history.terms[-1].handover)
        told = [each.reason for each in steps if each.event == "planned switchover"]
        assert told == ["to b, planned by root: it is due, and begins"]


async def test_a_planned_switchover_can_be_cancelled_and_ends_with_its_term() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        plan = PlanSwitchover(workload="w", to="b", at_wall_s=time.time() + 1000, by="root")
        assert isinstance(await a.ask(plan), Done)
        assert isinstance(await a.ask(CancelSwitchover(workload="w", by="root")), Done)
        assert isinstance(await a.ask(CancelSwitchover(workload="w", by="root")), Refused)
        assert isinstance(await a.ask(plan), Done)
        let_fence_of(a, "exit 0")
        await lose(a)
        await b.is_in("leading")
        await a.start_keeper()
        a.agent.start()
        status = await a.is_in("following")

        async def forgotten() -> bool:
            return (await a.status()).planned is None

        async def told() -> bool:  # it is written after the plan is gone
            history = await a.ask(AskHistory(workload="w"))
            assert isinstance(history, History)
            first = next(each for each in history.terms if each.term < status.term)
            return "term 1, which is over" in first.timeline[-1].reason

        await until(forgotten, "the plan is forgotten")
        await until(told, "why is kept in its term's history")


async def test_a_keeper_that_finds_what_a_newer_version_wrote_ends_with_one_error() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        a.kill_keeper(signal.SIGTERM)
        await a.agent.die()
        state = Path(a.config.node.state_dir)
        (state / "format").write_text("outlive state 2\n")
        before = {path: path.read_bytes() for path in (state / "terms").rglob("*") if path.is_file()}
        with pytest.raises(AssertionError, match="outlive state 2"):
            await a.start_keeper()
        assert {path: path.read_bytes() for path in (state / "terms").rglob("*") if path.is_file()} == before
        assert a.agent.running, "the workload is left alone"


async def test_the_keeper_fits_into_32_mib() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        await asyncio.sleep(1.0)
        assert a.keeper is not None
        status = Path(f"/proc/{a.keeper.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        rss_kib, locked_kib = (int(fields[key].split()[0]) for key in ("VmRSS", "VmLck"))
        print(f"\nkeeper: RSS {rss_kib / 1024:.1f} MiB, locked {locked_kib / 1024:.1f} MiB (on fault)")
        assert rss_kib <= 32 * 1024


async def test_what_a_stopped_criu_holds_is_released_at_the_thaw_deadline_without_the_agent() -> None:
    async with pair() as (a, _):
        with tempfile.TemporaryDirectory() as directory:
            fake = Path(directory) / "criu"
            fake.symlink_to("/bin/sleep")
            criu = subprocess.Popen([str(fake), "1000"], preexec_fn=ignore_alarm)
            other = subprocess.Popen(["sleep", "1000"])
            try:
                announcement = AnnounceFreeze(workload="w", criu_pid=criu.pid, deadline_ms=1300)
                assert isinstance(await a.ask(announcement), Done)
                refused = await a.ask(AnnounceFreeze(workload="w", criu_pid=other.pid, deadline_ms=1300))
                assert isinstance(refused, Refused)
                await a.agent.die()
                criu.send_signal(signal.SIGSTOP)
                began_s = time.monotonic()
                code = await asyncio.to_thread(criu.wait, 5)
                assert code == -signal.SIGKILL
                assert 1.0 < time.monotonic() - began_s < 1.6
            finally:
                for process in (criu, other):
                    process.kill()
                    process.wait()


async def test_a_keeper_that_was_killed_in_a_freeze_releases_it_when_it_is_back() -> None:
    async with pair() as (a, _):
        with tempfile.TemporaryDirectory() as directory:
            fake = Path(directory) / "criu"
            fake.symlink_to("/bin/sleep")
            criu = subprocess.Popen([str(fake), "1000"], preexec_fn=ignore_alarm)
            try:
                await a.agent.die()
                announcement = AnnounceFreeze(workload="w", criu_pid=criu.pid, deadline_ms=200)
                assert isinstance(await a.ask(announcement), Done)
                a.kill_keeper()
                criu.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.5)
                assert criu.poll() is None
                await a.start_keeper()
                assert await asyncio.to_thread(criu.wait, 5) == -signal.SIGKILL
            finally:
                criu.kill()
                criu.wait()


async def test_a_freeze_that_ends_in_time_is_left_alone() -> None:
    async with pair() as (a, _):
        with tempfile.TemporaryDirectory() as directory:
            fake = Path(directory) / "criu"
            fake.symlink_to("/bin/sleep")
            criu = subprocess.Popen([str(fake), "1000"], preexec_fn=ignore_alarm)
            try:
                await a.ask(AnnounceFreeze(workload="w", criu_pid=criu.pid, deadline_ms=200))
                await a.ask(EndFreeze(workload="w", criu_pid=criu.pid))
                await asyncio.sleep(0.5)
                assert criu.poll() is None
            finally:
                criu.kill()
                criu.wait()


async def test_what_an_earlier_version_started_is_found_by_the_keeper_of_this_one() -> None:
    async with pair() as (a, b):
        await protect(a, b)
        a.kill_keeper(signal.SIGTERM)
        outside = gate_of(a.config, "w").file.parent
        outside.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(["sleep", "100"]) as workload:
            try:
                (outside / "cgroup.procs").write_text(str(workload.pid))
                await a.start_keeper()
                assert workload_pids(a.config, "w") == [workload.pid]
            finally:
                workload.kill()
                workload.wait()
                for group in (outside / "run", outside, outside.parent):
                    with contextlib.suppress(OSError):  # it was not made, or another test is in there
                        group.rmdir()
