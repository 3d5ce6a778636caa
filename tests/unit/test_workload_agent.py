"""How an agent carries out its keeper's orders for one workload: once, one at a time, no more than told.

The container, the store and the capture loop are stand-ins that note what is done to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from common.config import Node, NodeConfig, Store
from common.container import Incarnation
from common.control import CaptureStatus, Order
from common.errors import ConfigError, ProtocolError, RestoreError, StaleTermError, WorkloadError
from common.events import Event, EventLog, read_events
from common.messages import PROTOCOL, Doubt, Hello, Nack
from common.model import EpochId, FilePath, WorkloadSpec
from common.scheduling import CpuShare
from outlive import unacknowledged, workload_agent
from outlive.aside import Aside, kept_aside
from outlive.workload_agent import WorkloadAgent
from primary.backlog import SharedEpoch
from primary.outgoing import Held
from primary.stream import Unacknowledged
from replica.readiness import ReadinessVerdict
from replica.store_reader import EpochRecord
from tests.unit.wire_fakes import TASK, captured, page, until

SPEC = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",))


def record(number: int) -> EpochRecord:
    return EpochRecord(
        id=EpochId(1, number),
        base=None,
        incarnation="old",
        frozen_wall_s=1.0,
        committed_wall_s=2.0,
        bytes_on_disk=1,
        pages=1,
        pages_present=1,
        levels=1,
        folded=False,
        path=Path(f"/epochs/{number}"),
    )


class Containers:
    """Takes the place of `common.container`: one container that runs or not, and what was done, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.pid: int | None = None
        self.run: Incarnation | None = None
        self.code: int | None = None
        self.unrestorable: set[EpochId] = set()
        self.unstartable = ""
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    def running_init_pid(self, config: NodeConfig, name: str) -> int | None:
        return self.pid

    def incarnation(self, config: NodeConfig, name: str) -> Incarnation | None:
        return self.run

    def exit_code(self, config: NodeConfig, name: str) -> int | None:
        return self.code

    async def start_workload(self, config: NodeConfig, spec: WorkloadSpec, *, order: int = 0) -> int:
        self.done.append("start")
        await self.may_go_on.wait()
        if self.unstartable:
            raise WorkloadError(self.unstartable)
        self.run = Incarnation(id=f"run {len(self.done)}", order=order, came_up=True)
        self.pid = 1000 + len(self.done)
        return self.pid

    async def restore_workload(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        images: Path,
        epoch: EpochId,
        criu: Path,
        *,
        order: int = 0,
    ) -> int:
        self.done.append(f"restore {epoch} of {images}")
        await self.may_go_on.wait()
        if epoch in self.unrestorable:
            raise RestoreError(f"criu cannot restore {epoch}")
        self.run = Incarnation(id=f"run {len(self.done)}", restored=epoch, order=order, came_up=True)
        self.pid = 1000 + len(self.done)
        return self.pid

    async def kill_workload(self, config: NodeConfig, name: str) -> None:
        self.done.append("kill")
        await self.may_go_on.wait()
        self.pid = None

    async def stop_workload(self, config: NodeConfig, name: str, grace_s: float) -> None:
        self.done.append("stop")
        await self.may_go_on.wait()
        self.pid = None

    def mark_up(self, config: NodeConfig, name: str) -> None:
        if self.run is not None:
            self.run = msgspec.structs.replace(self.run, came_up=True)

    def end_by_itself(self, code: int) -> None:
        self.pid, self.code = None, code


class StoreOfRecords:
    """A store that holds what it is given."""

    volatile = True

    def __init__(self) -> None:
        self.held: list[EpochRecord] = []
        self.doubts: dict[EpochId, str] = {}
        self.holders = 0
        self.closed = False

    @property
    def newest(self) -> EpochRecord | None:
        return self.held[-1] if self.held else None

    def records(self) -> list[EpochRecord]:
        return list(self.held)

    def doubt_about(self, epoch: EpochId) -> str:
        return self.doubts.get(epoch, "")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.holders += 1
        yield
        self.holders -= 1

    def close(self) -> None:
        self.closed = True


class LeadingInMemory:
    """A capture loop that waits for its end."""

    captured = EpochId(1, 9)
    failures = 0

    def __init__(self, spec: WorkloadSpec, term: int, incarnation: str) -> None:
        self.spec = spec
        self.term = term
        self.incarnation = incarnation
        self.state = "made"
        self.left: dict[str, Unacknowledged] = {}
        self.failure: BaseException | None = None
        self.fail = asyncio.Event()

    async def run(self) -> None:
        self.state = "running"
        try:
            await self.fail.wait()
            assert self.failure is not None
            raise self.failure
        finally:
            self.state = "ended"

    def take_unacknowledged(self) -> dict[str, Unacknowledged]:
        left, self.left = self.left, {}
        return left

    def progress(self) -> tuple[()]:
        return ()

    def verification(self) -> tuple[()]:
        return ()

    def metrics(self) -> None:
        return None

    def capture_status(self) -> CaptureStatus:
        return CaptureStatus(backend="stock", tracker="", reason="it is in memory")


class Verdicts:
    """A readiness check that says what it is told to."""

    verdict = ReadinessVerdict(True, ())

    async def check(self, spec: WorkloadSpec, images: Path, memory_bytes: int) -> ReadinessVerdict:
        return self.verdict

    def forget(self, workload: str) -> None:
        pass


class Scene:
    """The agent of node a with one workload; `restart_agent` gives it a new one over the same container."""

    def __init__(self, directory: Path, containers: Containers) -> None:
        self.containers = containers
        self.store = StoreOfRecords()
        self.readiness = Verdicts()
        self.ended_sessions: list[str] = []
        self.leadings: list[LeadingInMemory] = []
        self.unmakeable: ConfigError | None = None
        self.file = directory / "events.jsonl"
        self.log = EventLog(self.file, "agent")
        room = Store(directory=str(directory), min_free_bytes=0)
        self.aside = Aside(
            NodeConfig(node=Node(name="a", address="127.0.0.1"), store=room),
            restore_command=lambda spec: ("criu", "restore"),
        )
        self.restart_agent()

    def restart_agent(self) -> None:
        self.agent = WorkloadAgent(
            NodeConfig(node=Node(name="a", address="127.0.0.1")),
            SPEC,
            criu=Path("/criu"),
            store=self.store,  # type: ignore[arg-type]
            readiness=self.readiness,  # type: ignore[arg-type]
            make_leading=self._make_leading,  # type: ignore[arg-type]
            share=CpuShare(None),
            end_session=lambda workload, why: self.ended_sessions.append(why),
            events=self.log,
            aside=self.aside,
        )

    def _make_leading(self, agent: WorkloadAgent, term: int, pid: int) -> LeadingInMemory:
        if self.unmakeable is not None:
            raise self.unmakeable
        assert self.containers.run is not None
        self.leadings.append(LeadingInMemory(agent.spec, term, self.containers.run.id))
        return self.leadings[-1]

    async def obeyed(self, order: Order) -> None:
        """Repeat the order, as every report's answer does, until it is carried out or has failed."""
        async with asyncio.timeout(5):
            while order.number not in (self.agent.report().order_done, self.agent.report().order_failed):
                self.agent.obey(order)
                await asyncio.sleep(0.002)

    async def repeat(self, order: Order, times: int = 10) -> None:
        for _ in range(times):
            self.agent.obey(order)
            await asyncio.sleep(0.002)

    def events(self) -> list[tuple[str, str]]:
        self.log.close()
        return [(each.event, each.reason) for each in read_events(self.file)]


def order(number: int, role: str, action: str = "none", term: int = 1, **fields: object) -> Order:
    return Order(workload="redis", number=number, role=role, term=term, action=action, **fields)  # type: ignore[arg-type]


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    containers = Containers()
    for name in (
        "running_init_pid",
        "incarnation",
        "exit_code",
        "start_workload",
        "restore_workload",
        "kill_workload",
        "stop_workload",
        "mark_up",
    ):
        monkeypatch.setattr(workload_agent, name, getattr(containers, name))
    made = Scene(tmp_path, containers)
    try:
        yield made
    finally:
        containers.may_go_on.set()
        await made.agent.close()
        made.log.close()


# --- whose declaration counts -------------------------------------------------------------------------


async def test_an_order_to_follow_does_not_replace_what_the_leader_has_sent(scene: Scene) -> None:
    """It may be older: epochs that came by a new line of succession would stand beside the old one."""
    newer = msgspec.structs.replace(SPEC, nodes=("b", "c", "a"))
    await scene.obeyed(order(1, "follow", spec=SPEC))
    scene.agent.accept(hello(spec=newer))
    await scene.obeyed(order(2, "follow", term=2, spec=SPEC))
    assert scene.agent.spec == newer
    await scene.obeyed(order(3, "lead", "start", term=3, spec=SPEC))
    assert scene.agent.spec == SPEC
    await scene.obeyed(order(4, "follow", term=4, spec=newer))
    assert scene.agent.spec == newer, "nobody has greeted it since"


# --- orders to lead ---------------------------------------------------------------------------------


async def test_an_order_to_start_is_carried_out_once_however_often_it_comes(scene: Scene) -> None:
    start = order(1, "lead", "start")
    await scene.obeyed(start)
    await scene.repeat(start)
    assert scene.containers.done == ["start"]
    report = scene.agent.report()
    assert report.running
    assert report.init_pid == scene.containers.pid
    assert report.order_done == 1
    assert report.order_failed == 0
    assert [name for name, _ in scene.events()] == [Event.WORKLOAD_STARTED]


async def test_a_workload_that_has_ended_is_not_started_again_by_the_same_order(scene: Scene) -> None:
    start = order(1, "lead", "start")
    await scene.obeyed(start)
    scene.containers.end_by_itself(3)
    await scene.repeat(start)
    assert scene.containers.done == ["start"]
    assert scene.agent.report().exit_code == 3
    assert not scene.agent.report().running


async def test_nor_is_it_after_a_restart_of_the_agent(scene: Scene) -> None:
    start = order(1, "lead", "start")
    await scene.obeyed(start)
    scene.containers.end_by_itself(3)
    await scene.agent.close()
    scene.restart_agent()
    await scene.obeyed(start)
    assert scene.containers.done == ["start"]
    assert scene.agent.report().order_done == 1


@pytest.mark.parametrize("action", ["start", "restore"])
async def test_what_a_dying_agent_left_unfinished_is_done_again(scene: Scene, action: str) -> None:
    scene.store.held = [record(1)]
    scene.containers.run = Incarnation(id="half", order=1)  # written before the container was made
    await scene.obeyed(order(1, "lead", action))
    assert [word.split()[0] for word in scene.containers.done] == [action]


async def test_a_restore_that_ended_well_without_its_agent_is_taken_over(scene: Scene) -> None:
    scene.store.held = [record(1)]
    scene.containers.run, scene.containers.pid = Incarnation(id="whole", order=1), 77
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.containers.done == []
    assert scene.containers.run.came_up


async def test_a_container_that_was_made_but_perhaps_not_started_is_made_again(scene: Scene) -> None:
    scene.containers.run, scene.containers.pid = Incarnation(id="made", order=1), 77
    await scene.obeyed(order(1, "lead", "start"))
    assert scene.containers.done == ["kill", "start"]


async def test_a_container_that_was_made_is_made_again_though_its_keeper_died_too(scene: Scene) -> None:
    """A keeper that is started again counts anew, and has its agent hold the packets first."""
    scene.containers.run, scene.containers.pid = Incarnation(id="made", order=1), 77
    await scene.obeyed(order(1_000_001, "lead", "none"))
    assert not scene.containers.run.came_up
    await scene.obeyed(order(1_000_002, "lead", "start"))
    assert scene.containers.done == ["kill", "start"]


async def test_a_defect_is_told_to_the_keeper_like_any_failure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workload_agent, "start_workload", fail)
    await scene.obeyed(order(1, "lead", "start"))
    report = scene.agent.report()
    assert report.order_failed == 1
    assert "No space left" in report.order_detail


async def test_a_newer_order_starts_it_again(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    scene.containers.end_by_itself(0)
    await scene.obeyed(order(2, "lead", "start"))
    assert scene.containers.done == ["start", "start"]


async def test_what_runs_already_is_neither_started_nor_restored(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    await scene.agent.close()
    scene.restart_agent()
    scene.store.held = [record(1)]
    for number, action in ((2, "start"), (3, "restore"), (4, "none")):
        await scene.obeyed(order(number, "lead", action))
    assert scene.containers.done == ["start"]


async def test_an_order_without_an_action_starts_nothing(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "none"))
    assert scene.containers.done == []
    assert scene.agent.report().order_done == 1


async def test_what_has_ended_when_it_is_to_be_handed_over_is_not_started_afresh(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    scene.containers.end_by_itself(1)  # and the successor may take over because of that
    await scene.obeyed(order(2, "lead", "hand_over", heir="b"))
    assert scene.containers.done == ["start"]
    report = scene.agent.report()
    assert (report.order_done, report.order_failed, report.running) == (1, 2, False)
    assert "nothing of it can be handed over" in report.order_detail


async def test_a_restarted_agent_tells_once_that_it_found_the_workload_running(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    await scene.agent.close()
    scene.restart_agent()
    for number in (1, 2, 3):
        await scene.obeyed(order(number, "lead", "none", term=number))
    assert [name for name, _ in scene.events()] == [Event.WORKLOAD_STARTED, Event.WORKLOAD_FOUND]


@pytest.mark.parametrize("action", ["start", "restore"])
async def test_what_could_not_be_brought_up_is_an_event_with_its_reason(scene: Scene, action: str) -> None:
    scene.containers.unstartable = "no such program"
    await scene.obeyed(order(1, "lead", action))  # there is no epoch to restore either
    assert [name for name, _ in scene.events()] == [Event.WORKLOAD_FAILED]
    assert scene.events()[0][1] == scene.agent.report().order_detail


async def test_a_start_that_fails_is_told_and_not_repeated(scene: Scene) -> None:
    scene.containers.unstartable = "runc cannot run redis: no such program"
    start = order(1, "lead", "start")
    await scene.obeyed(start)
    await scene.repeat(start)
    assert scene.containers.done == ["start"]
    report = scene.agent.report()
    assert (report.order_done, report.order_failed) == (0, 1)
    assert "no such program" in report.order_detail


async def test_who_leads_ends_what_another_leader_is_sending(scene: Scene) -> None:
    await scene.obeyed(order(5, "lead", "start", term=2))
    (why,) = scene.ended_sessions
    assert "term 2" in why


async def test_orders_bring_the_newest_declaration(scene: Scene) -> None:
    newer = WorkloadSpec(name="redis", nodes=("b", "a"), command=("redis-server", "--port", "1"))
    await scene.obeyed(order(1, "lead", "start", spec=newer))
    assert scene.agent.report().spec == newer


# --- restoring --------------------------------------------------------------------------------------


async def test_the_newest_epoch_is_restored_and_named(scene: Scene) -> None:
    scene.store.held = [record(1), record(2), record(3)]
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.containers.done == ["restore t1-e3 of /epochs/3"]
    report = scene.agent.report()
    assert report.restored == EpochId(1, 3)
    assert "t1-e3" in report.order_detail
    assert [name for name, _ in scene.events()] == [Event.WORKLOAD_RESTORED]
    assert scene.store.holders == 0


async def test_nothing_is_folded_away_while_an_epoch_is_being_restored(scene: Scene) -> None:
    scene.store.held = [record(1)]
    scene.containers.may_go_on.clear()
    scene.agent.obey(order(1, "lead", "restore"))
    await until(lambda: scene.containers.done)
    assert scene.store.holders == 1


async def test_if_the_newest_cannot_be_restored_the_one_before_is_and_that_is_said(scene: Scene) -> None:
    scene.store.held = [record(1), record(2), record(3)]
    scene.containers.unrestorable = {EpochId(1, 3)}
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.containers.done == ["restore t1-e3 of /epochs/3", "restore t1-e2 of /epochs/2"]
    report = scene.agent.report()
    assert report.restored == EpochId(1, 2)
    assert report.order_done == 1
    assert "t1-e2" in report.order_detail
    assert "criu cannot restore t1-e3" in report.order_detail
    ((_, reason),) = scene.events()
    assert "older" in reason


async def test_a_restore_that_its_keeper_has_killed_does_not_go_on_with_the_epoch_before(
    scene: Scene,
) -> None:
    """What the keeper wants by now is the next order, which waits until this one has ended."""
    scene.store.held = [record(1), record(2)]
    scene.containers.unrestorable = {EpochId(1, 2)}
    scene.agent.obey(order(1, "lead", "restore"))
    await until(lambda: scene.containers.done)
    await scene.obeyed(order(2, "follow", term=2))
    assert scene.containers.done == ["restore t1-e2 of /epochs/2", "kill"]
    assert scene.containers.pid is None


async def test_what_was_handed_over_is_restored_from_that_very_epoch_or_not_at_all(scene: Scene) -> None:
    lost = replace(record(1), last=False)
    scene.store.held = [replace(record(0), last=True), lost]
    await scene.obeyed(order(1, "lead", "restore", newest_only=True))
    assert scene.containers.done == []
    assert "handed over is not stored here any more: the newest is t1-e1" in scene.agent.report().order_detail
    scene.store.held = [lost, replace(record(2), last=True)]
    await scene.obeyed(order(2, "lead", "restore", newest_only=True))
    assert scene.containers.done == ["restore t1-e2 of /epochs/2"]


@pytest.mark.parametrize("last", [None, False])
async def test_an_older_leader_does_not_say_which_epoch_that_is_and_a_takeover_does_not_ask(
    scene: Scene, last: bool | None
) -> None:
    scene.store.held = [replace(record(1), last=last)]
    await scene.obeyed(order(1, "lead", "restore", newest_only=last is None))
    assert scene.containers.done == ["restore t1-e1 of /epochs/1"]


async def test_why_a_restore_failed_is_told_to_whoever_leads_then_for_a_while(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.store.held = [record(1)]
    scene.containers.unrestorable = {EpochId(1, 1)}
    await scene.obeyed(order(1, "lead", "restore", newest_only=True))
    restorable, reasons = await scene.agent.judge(record(2))
    assert restorable, "what failed once is no reason against another attempt"
    assert reasons == ("a restore failed here: criu cannot restore t1-e1",)
    assert scene.agent.report().reasons == ()
    later_s = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    assert await scene.agent.judge(record(3)) == (True, ())


async def test_if_neither_can_be_restored_the_order_has_failed_and_says_why(scene: Scene) -> None:
    scene.store.held = [record(1), record(2), record(3)]
    scene.containers.unrestorable = {EpochId(1, 2), EpochId(1, 3)}
    restore = order(1, "lead", "restore")
    await scene.obeyed(restore)
    await scene.repeat(restore)
    assert len(scene.containers.done) == 2
    report = scene.agent.report()
    assert (report.order_done, report.order_failed) == (0, 1)
    assert "criu cannot restore" in report.order_detail


async def test_without_an_epoch_a_restore_fails_clearly(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.agent.report().order_failed == 1
    assert "no committed epoch" in scene.agent.report().order_detail


# --- orders not to run ------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["follow", "idle"])
async def test_who_does_not_lead_kills_what_runs_and_stops_capturing_first(scene: Scene, role: str) -> None:
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    (leading,) = scene.leadings
    assert leading.state == "running"
    await scene.obeyed(order(2, role, term=2))
    assert leading.state == "ended"
    assert scene.containers.done == ["start", "stop" if role == "idle" else "kill"]
    assert not scene.agent.report().running
    assert scene.agent.metrics() is None
    assert scene.events()[-1][0] == Event.WORKLOAD_KILLED


@pytest.mark.parametrize("role", ["follow", "idle"])
async def test_who_does_not_lead_ends_what_may_be_on_its_way_where_nothing_runs(
    scene: Scene, role: str
) -> None:
    """An agent that died may have left a restore at work, of which nothing is to be seen yet."""
    await scene.obeyed(order(1, role))
    assert scene.containers.done == ["kill"]
    assert scene.agent.report().order_done == 1
    assert Event.WORKLOAD_KILLED not in [each[0] for each in scene.events()]


async def test_a_restarted_agent_kills_what_it_finds_running_if_it_is_to_follow(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    await scene.agent.close()
    scene.restart_agent()
    await scene.obeyed(order(2, "follow", term=2))
    assert scene.containers.done == ["start", "kill"]


# --- what nobody acknowledged -----------------------------------------------------------------------


async def superseded(
    scene: Scene, *orders: Order, stands_on: EpochId | None = None, base: Held | None = None
) -> SharedEpoch:
    """Lead term 1 with an epoch that nobody acknowledged, then obey these orders."""
    await scene.obeyed(order(1, "lead", "start"))
    await scene.repeat(order(1, "lead", "start"))
    shared = SharedEpoch(captured(42, {TASK: {1: page(1)}}, stands_on=stands_on))
    scene.leadings[-1].left = {"b": Unacknowledged(shared, base)}
    for each in orders:
        await scene.obeyed(each)
    return shared


def released(shared: SharedEpoch) -> int:
    return shared.epoch.pages.released  # type: ignore[attr-defined,no-any-return]


async def test_what_nobody_acknowledged_is_set_aside_when_another_node_leads_a_newer_term(
    scene: Scene,
) -> None:
    shared = await superseded(scene, order(2, "idle", term=1), order(3, "follow", term=2, leader="b"))
    await until(lambda: released(shared))
    (kept,) = kept_aside(scene.aside.directory)
    assert (kept.workload, kept.epoch) == ("redis", EpochId(1, 42))
    await scene.agent.look_aside()
    assert scene.agent.report().aside == (str(kept.path),)
    name, reason = scene.events()[-1]
    assert name == Event.EPOCH_SET_ASIDE
    assert str(kept.path) in reason
    assert "b leads term 2" in reason


async def test_what_cannot_be_set_aside_is_told_and_hinders_nothing(scene: Scene) -> None:
    shared = await superseded(scene, order(2, "follow", term=2, leader="b"), stands_on=EpochId(1, 41))
    await until(lambda: released(shared))
    assert kept_aside(scene.aside.directory) == []
    assert scene.agent.report().order_done == 2
    name, reason = scene.events()[-1]
    assert name == Event.EPOCH_NOT_SET_ASIDE
    assert "t1-e41" in reason


async def test_nothing_is_set_aside_by_a_leader_of_the_same_term_or_one_that_leads_on(scene: Scene) -> None:
    shared = await superseded(
        scene, order(2, "follow", term=1, leader="b"), order(3, "lead", "start", term=3)
    )
    await scene.repeat(order(3, "lead", "start", term=3))
    assert len(scene.leadings) == 2
    assert released(shared) == 1
    assert kept_aside(scene.aside.directory) == []


async def test_what_nobody_acknowledged_is_not_held_for_ever(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unacknowledged, "HELD_S", 0.01)
    shared = await superseded(scene, order(2, "idle", term=1))
    await until(lambda: released(shared))
    await scene.obeyed(order(3, "follow", term=2, leader="b"))
    assert kept_aside(scene.aside.directory) == []


# --- one at a time ----------------------------------------------------------------------------------


async def test_orders_are_carried_out_one_at_a_time_and_the_newest_comes_next(scene: Scene) -> None:
    scene.containers.may_go_on.clear()
    scene.agent.obey(order(1, "lead", "start"))
    await until(lambda: scene.containers.done)
    for _ in range(5):
        scene.agent.obey(order(2, "follow", term=2))
        scene.agent.obey(order(3, "idle", term=3))
        await asyncio.sleep(0.002)
    assert scene.containers.done == ["start"]
    assert scene.agent.report().order_done == 0
    scene.containers.may_go_on.set()
    await until(lambda: scene.agent.report().order_done == 1)
    await scene.obeyed(order(3, "idle", term=3))
    assert scene.containers.done == ["start", "stop"]


async def test_the_end_of_the_agent_waits_for_what_is_under_way_and_leaves_the_workload(scene: Scene) -> None:
    scene.containers.may_go_on.clear()
    scene.agent.obey(order(1, "lead", "start"))
    await until(lambda: scene.containers.done)
    closing = asyncio.create_task(scene.agent.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    scene.containers.may_go_on.set()
    await closing
    assert scene.containers.pid is not None
    assert scene.containers.done == ["start"]
    assert scene.store.closed


# --- the capture loop -------------------------------------------------------------------------------


async def test_it_is_captured_exactly_while_it_runs_here_and_this_node_leads(scene: Scene) -> None:
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    (leading,) = scene.leadings
    assert (leading.state, leading.term) == ("running", 1)
    assert scene.agent.report().captured == leading.captured
    assert scene.agent.report().capture == leading.capture_status()
    scene.containers.end_by_itself(0)
    await scene.repeat(lead)
    assert leading.state == "ended"
    assert len(scene.leadings) == 1
    assert scene.agent.report().captured is None


async def test_a_new_incarnation_term_or_declaration_is_captured_by_a_new_loop(scene: Scene) -> None:
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    scene.containers.run = Incarnation(id="another", order=1)
    await scene.repeat(lead)
    await scene.repeat(order(2, "lead", term=2))
    newer = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",), epoch_interval_ms=50)
    await scene.repeat(order(2, "lead", term=2, spec=newer))
    assert [each.state for each in scene.leadings] == ["ended", "ended", "ended", "running"]
    assert [each.term for each in scene.leadings] == [1, 1, 2, 2]
    assert scene.leadings[-1].spec == newer
    assert scene.containers.done == ["start"]


async def test_a_capture_loop_that_breaks_is_begun_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_agent, "_AGAIN_S", 0.02)
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    # A task group's failures come as a group.
    scene.leadings[0].failure = ExceptionGroup("unhandled", [ConfigError("a peer is gone")])
    scene.leadings[0].fail.set()
    await scene.repeat(lead, times=40)
    assert len(scene.leadings) == 2
    assert scene.leadings[1].state == "running"
    assert scene.agent.report().running


async def test_a_capture_loop_that_broke_does_not_keep_an_order_from_being_carried_out(scene: Scene) -> None:
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    scene.leadings[0].failure = ExceptionGroup("unhandled", [RuntimeError("a mistake of ours")])
    scene.leadings[0].fail.set()
    await scene.obeyed(order(2, "follow", term=2))
    assert scene.containers.done == ["start", "kill"]


async def test_a_capture_loop_that_cannot_be_made_harms_neither_agent_nor_workload(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_agent, "_AGAIN_S", 0.02)
    scene.unmakeable = ConfigError("redis names the node c, which is no peer of a")
    lead = order(1, "lead", "start")
    await scene.obeyed(lead)
    await scene.repeat(lead)
    assert scene.agent.report().running
    assert scene.leadings == []
    scene.unmakeable = None
    await scene.repeat(lead, times=40)
    assert [each.state for each in scene.leadings] == ["running"]


# --- what another node may send ---------------------------------------------------------------------


def hello(node: str = "b", spec: WorkloadSpec = SPEC) -> Hello:
    return Hello(
        protocol=PROTOCOL, software="x", node=node, workload="redis", term=2, incarnation="old", spec=spec
    )


async def test_a_leader_may_send_what_this_node_follows_and_its_declaration_counts(scene: Scene) -> None:
    newer = WorkloadSpec(name="redis", nodes=("b", "a"), command=("redis-server",), epoch_interval_ms=50)
    scene.agent.accept(hello(spec=newer))
    assert scene.agent.report().spec == newer
    assert scene.agent.follows


async def test_nothing_is_accepted_while_this_node_leads(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "none"))
    assert not scene.agent.follows
    with pytest.raises(StaleTermError, match="leads redis itself"):
        scene.agent.accept(hello())


async def test_nothing_is_accepted_while_the_workload_still_runs_here(scene: Scene) -> None:
    await scene.obeyed(order(1, "lead", "start"))
    await scene.agent.close()
    scene.restart_agent()
    assert not scene.agent.follows
    with pytest.raises(StaleTermError, match="still runs"):
        scene.agent.accept(hello())
    await scene.obeyed(order(2, "follow", term=2))
    scene.agent.accept(hello())


async def test_nothing_is_accepted_that_is_not_declared_for_both_nodes(scene: Scene) -> None:
    with pytest.raises(ProtocolError):
        scene.agent.accept(hello(node="c"))
    elsewhere = WorkloadSpec(name="redis", nodes=("b", "c"), command=("redis-server",))
    with pytest.raises(ProtocolError):
        scene.agent.accept(hello(spec=elsewhere))
    assert scene.agent.report().spec == SPEC


async def test_a_full_store_shows_on_its_own_node_until_it_takes_an_epoch_again(scene: Scene) -> None:
    scene.store.held = [record(1)]
    await scene.agent.judge(record(1))
    refused = Nack(epoch=EpochId(1, 2), reason="the disk is full", code="no-space", retry_with_base=False)
    scene.agent.not_committed(refused)
    await scene.agent.judge(record(1))  # as it is asked again every few seconds
    report = scene.agent.report()
    assert report.restorable, "what is stored could be restored all the same"
    assert report.reasons == ("epoch t1-e2 could not be stored here: the disk is full",)
    scene.store.held.append(record(3))
    await scene.agent.judge(record(3))
    assert scene.agent.report().reasons == ()


async def test_an_epoch_that_is_asked_for_whole_is_no_trouble(scene: Scene) -> None:
    scene.store.held = [record(1)]
    await scene.agent.judge(record(1))
    scene.agent.not_committed(
        Nack(epoch=EpochId(1, 2), reason="t1-e1 is not held", code="base", retry_with_base=True)
    )
    assert scene.agent.report().reasons == ()


async def test_what_stands_against_a_restore_is_reported_and_told_once(scene: Scene) -> None:
    assert not scene.agent.report().restorable
    scene.store.held = [record(1)]
    assert await scene.agent.judge(record(1)) == (True, ())
    assert scene.agent.report().restorable
    await scene.agent.judge(record(1))
    scene.readiness.verdict = ReadinessVerdict(False, ("port 6379 is taken",))
    await scene.agent.judge(record(1))
    await scene.agent.judge(record(1))
    report = scene.agent.report()
    assert not report.restorable
    assert report.reasons == ("port 6379 is taken",)
    assert report.stored == EpochId(1, 1)
    assert report.volatile
    told = scene.events()
    assert [name for name, _ in told] == [Event.REPLICA_RESTORABLE, Event.REPLICA_NOT_RESTORABLE]
    assert "port 6379 is taken" in told[1][1]


async def test_what_is_in_doubt_is_told_reported_and_over_with_the_next_whole_epoch(scene: Scene) -> None:
    scene.store.held = [record(1)]
    await scene.agent.judge(record(1))
    scene.store.doubts[EpochId(1, 1)] = "1 page is another"
    scene.agent.doubted(Doubt(epoch=EpochId(1, 1), reason="1 page is another"))
    scene.agent.doubted(Doubt(epoch=EpochId(1, 1), reason="1 page is another"))  # told once
    assert await scene.agent.judge(record(1)) == (False, ("t1-e1 is in doubt: 1 page is another",))
    report = scene.agent.report()
    assert report.restorable, "an operator could restore it"
    assert report.doubt == "t1-e1 is in doubt: 1 page is another"
    scene.store.held.append(record(2))
    assert await scene.agent.judge(record(2)) == (True, ())
    assert scene.agent.report().doubt == ""
    await scene.agent.judge(record(2))
    told = [name for name, _ in scene.events()]
    assert told == [Event.REPLICA_RESTORABLE, Event.VERIFY_DOUBTED, Event.VERIFY_MENDED]


async def test_an_epoch_in_doubt_does_not_take_the_place_of_a_sound_one(scene: Scene) -> None:
    scene.store.held = [record(8), record(9)]
    scene.store.doubts[EpochId(1, 8)] = "of it"
    scene.containers.unrestorable = {EpochId(1, 9)}
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.containers.done == ["restore t1-e9 of /epochs/9"]
    assert scene.agent.report().order_failed == 1


async def test_an_operator_gets_what_is_in_doubt_if_there_is_nothing_else(scene: Scene) -> None:
    scene.store.held = [record(9)]
    scene.store.doubts[EpochId(1, 9)] = "of it"
    await scene.obeyed(order(1, "lead", "restore"))
    assert scene.agent.report().order_done == 1


async def test_only_who_leads_verifies(scene: Scene) -> None:
    assert scene.agent.verify() is None


# --- files ----------------------------------------------------------------------------------------------


class FilesInMemory:
    """Takes the place of `FollowedFiles`, and writes down among what was done what it was told."""

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.laid_out: EpochId | None = None
        self.problem = ""
        self.unmakeable: set[EpochId] = set()
        self.followed: list[EpochId] = []

    def follow(self, epoch: EpochId) -> None:
        self.followed.append(epoch)

    async def bring_to(self, epoch: EpochId) -> None:
        self.done.append(f"files of {epoch}")
        if epoch in self.unmakeable:
            raise RestoreError(f"the files of {epoch} could not be laid out")

    async def begin(self) -> None:
        self.done.append("files begin")

    async def leave(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def files(scene: Scene) -> FilesInMemory:
    made = FilesInMemory(scene.containers.done)
    scene.agent._files = made  # type: ignore[assignment]
    scene.agent.spec = msgspec.structs.replace(SPEC, files=(FilePath(path="/data"),))
    return made


def with_files(number: int, incarnation: str = "old") -> EpochRecord:
    return dataclasses.replace(record(number), file_pages=3, incarnation=incarnation)


async def test_files_are_laid_out_before_a_restore_and_those_of_the_epoch_that_is_restored(
    scene: Scene, files: FilesInMemory
) -> None:
    scene.store.held = [with_files(7), with_files(8)]
    scene.containers.unrestorable = {EpochId(1, 8)}
    await scene.obeyed(order(1, "lead", "restore", term=2))
    told = [each.partition(" of /")[0] for each in scene.containers.done]
    assert told == ["files of t1-e8", "restore t1-e8", "files of t1-e7", "restore t1-e7"]


async def test_what_has_no_files_that_could_be_laid_out_is_not_restored(
    scene: Scene, files: FilesInMemory
) -> None:
    scene.store.held = [with_files(8)]
    files.unmakeable = {EpochId(1, 8)}
    await scene.obeyed(order(1, "lead", "restore", term=2))
    assert scene.containers.done == ["files of t1-e8"]
    assert "could not be laid out" in scene.agent.report().order_detail


async def test_a_start_makes_its_files_no_epoch_s_first(scene: Scene, files: FilesInMemory) -> None:
    await scene.obeyed(order(1, "lead", "start", spec=scene.agent.spec))
    assert scene.containers.done == ["files begin", "start"]


async def test_only_epochs_of_the_present_leader_s_run_are_laid_out(
    scene: Scene, files: FilesInMemory
) -> None:
    """What is stored when a leader comes back is older than its files: it would undo the last of them."""
    await scene.obeyed(order(1, "follow"))
    await scene.agent.judge(with_files(8))
    assert files.followed == []
    greeting = hello(spec=scene.agent.spec)
    scene.agent.accept(msgspec.structs.replace(greeting, incarnation="new"))
    await scene.agent.judge(with_files(8))
    assert files.followed == []
    restorable, reasons = await scene.agent.judge(with_files(9, "new"))
    assert files.followed == [EpochId(1, 9)]
    assert not restorable
    assert "being laid out" in reasons[0]
    files.laid_out = EpochId(1, 9)
    assert (await scene.agent.judge(with_files(9, "new")))[0]
    files.problem = "no space left"
    restorable, reasons = await scene.agent.judge(with_files(9, "new"))
    assert not restorable
    assert "no space left" in reasons[0]
