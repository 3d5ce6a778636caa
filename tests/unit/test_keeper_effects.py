"""What a keeper does before it takes the right to lead from another node."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from common.config import Node, NodeConfig
from common.errors import NoSpaceError
from common.fencing import Verdict
from common.model import WorkloadSpec
from common.role_events import (
    AddVip,
    CheckHealth,
    DropVip,
    Event,
    FenceResult,
    PersistTerm,
    RunFence,
    StepDone,
    StepFailed,
    TermPersisted,
)
from common.roles import TermRecord
from common.terms_file import TermFiles
from outlive import keeper_effects
from outlive.keeper_effects import Effects, RealHands

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",))
FENCE = RunFence(node="a", attempt=3, term=1, up_to=1)


class _Hands(RealHands):
    """Counts fences, and confirms each."""

    def __init__(self) -> None:
        super().__init__(NodeConfig(node=Node(name="b", address="127.0.0.1")))
        self.fenced: list[str] = []

    async def fence(self, asked: RunFence, workload: str) -> Verdict:
        self.fenced.append(asked.node)
        return Verdict(outcome="confirmed", reason="off")


async def told(files: TermFiles, hands: _Hands, *, pending: bool = True, attempts: int = 1) -> list[Event]:
    """Have a node fenced; return what the role machine is told, within three seconds."""
    events: list[Event] = []
    async with asyncio.TaskGroup() as tasks:
        effects = Effects(hands, files, events.append, tasks, is_pending=lambda _: pending)
        for _ in range(attempts):
            effects.perform(FENCE, SPEC)
        for _ in range(300):
            await asyncio.sleep(0.01)
            if len(events) == attempts or not pending:
                break
        await asyncio.sleep(0.1)
        effects.close()
    return events


async def test_a_node_is_fenced_by_one_that_can_record_the_next_term(tmp_path: Path) -> None:
    hands = _Hands()
    (result,) = await told(TermFiles(tmp_path, "b"), hands)
    assert isinstance(result, FenceResult)
    assert (result.outcome, result.attempt, hands.fenced) == ("confirmed", 3, ["a"])
    assert TermFiles(tmp_path, "b").load("w").term == 0, "what was tried is no term"


async def test_nobody_is_fenced_by_a_node_whose_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not lead afterwards, and nobody would."""

    def full(self: TermFiles, workload: str) -> None:
        raise NoSpaceError("term.try: no space left on device")

    monkeypatch.setattr(TermFiles, "try_to_write", full)
    hands = _Hands()
    (result,) = await told(TermFiles(tmp_path, "b"), hands)
    assert isinstance(result, FenceResult)
    assert (result.outcome, hands.fenced) == ("unknown", [])
    assert "could not record the next term: term.try: no space left" in result.reason


async def test_nobody_is_fenced_by_a_node_whose_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def hang(self: TermFiles, workload: str) -> None:
        tried.append(workload)
        time.sleep(1.0)

    monkeypatch.setattr(TermFiles, "try_to_write", hang)
    monkeypatch.setattr(keeper_effects, "_TRY_TO_WRITE_S", 0.1)
    hands = _Hands()
    began_s = time.monotonic()
    results = await told(TermFiles(tmp_path, "b"), hands, attempts=3)
    assert len(results) == 3
    for result in results:
        assert isinstance(result, FenceResult)
        assert (result.outcome, hands.fenced) == ("unknown", [])
        assert "its disk took over 0.1 s" in result.reason
    assert time.monotonic() - began_s < 3
    assert tried == ["w"], "who waits for it already is waited for"


async def test_an_attempt_for_which_nobody_waits_any_more_fences_nobody(tmp_path: Path) -> None:
    hands = _Hands()
    assert await told(TermFiles(tmp_path, "b"), hands, pending=False) == []
    assert hands.fenced == []


async def test_a_node_is_fenced_for_few_workloads_at_a_time_and_for_none_that_has_given_up(
    tmp_path: Path,
) -> None:
    begun, answers, events = list[str](), asyncio.Event(), list[Event]()

    class Slow(_Hands):
        async def fence(self, asked: RunFence, workload: str) -> Verdict:
            begun.append(asked.node)
            await answers.wait()
            return await super().fence(asked, workload)

    async def until(count: int, what: list[str] | list[Event]) -> None:
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(what) == count:
                break
        await asyncio.sleep(0.2)
        assert len(what) == count

    hands, files, pending = Slow(), TermFiles(tmp_path, "b"), True
    async with asyncio.TaskGroup() as tasks:
        every = [Effects(hands, files, events.append, tasks, is_pending=lambda _: pending) for _ in range(12)]
        for effects in every:
            effects.perform(FENCE, SPEC)
        every[0].perform(replace(FENCE, node="c"), SPEC)
        await until(5, begun)
        assert sorted(begun) == ["a", "a", "a", "a", "c"]
        pending = False
        answers.set()
        await until(5, events)
        for effects in every:
            effects.close()
    assert len(begun) == 5


class _SlowHands(_Hands):
    """Takes a moment for everything, and keeps the order in which it was done."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    async def drop_vip(self, spec: WorkloadSpec) -> None:
        await asyncio.sleep(0.02)
        self.done.append("drop_vip")

    async def add_vip(self, spec: WorkloadSpec) -> None:
        await asyncio.sleep(0.02)
        self.done.append("add_vip")


async def test_what_came_of_an_earlier_step_is_not_told_for_a_later_one_of_that_kind(tmp_path: Path) -> None:
    hands, told = _SlowHands(), list[tuple[Event, int]]()
    async with asyncio.TaskGroup() as tasks:
        effects = Effects(
            hands, TermFiles(tmp_path, "a"), lambda event: told.append((event, len(hands.done))), tasks
        )
        for effect in (DropVip(), AddVip(), DropVip()):
            effects.perform(effect, SPEC)
        await asyncio.sleep(0.2)
        effects.close()
    assert hands.done == ["drop_vip", "add_vip", "drop_vip"]
    assert told == [(StepDone(step="add_vip"), 2), (StepDone(step="drop_vip"), 3)]


async def test_a_record_that_failed_while_a_later_one_waits_is_not_told_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True, False, True]
    record = TermFiles.record

    def once_full(self: TermFiles, workload: str, what: TermRecord) -> None:
        if full.pop(0):
            raise NoSpaceError("term.record: no space left on device")
        record(self, workload, what)

    monkeypatch.setattr(TermFiles, "record", once_full)
    first, second, third = (TermRecord(term=term, leader="b", mark="leads") for term in (1, 2, 3))
    events: list[Event] = []
    async with asyncio.TaskGroup() as tasks:
        effects = Effects(_Hands(), TermFiles(tmp_path, "b"), events.append, tasks)
        effects.perform(PersistTerm(first), SPEC)
        effects.perform(PersistTerm(second), SPEC)
        for _ in range(300):
            await asyncio.sleep(0.01)
            if TermPersisted(second) in events and len(full) == 1:
                effects.perform(PersistTerm(third), SPEC)
            if len(events) > 1:
                break
        effects.close()
    assert events == [
        TermPersisted(second),
        StepFailed(step="persist", reason="term.record: no space left on device"),
    ]


class _BrokenHands(_Hands):
    """Nothing that it does ends as anybody foresaw."""

    async def drop_vip(self, spec: WorkloadSpec) -> None:
        raise RuntimeError("can't start new thread")

    async def fence(self, asked: RunFence, workload: str) -> Verdict:
        raise RuntimeError("can't start new thread")

    async def health(self, spec: WorkloadSpec) -> str:
        raise OverflowError("port must be 0-65535")


async def test_what_nobody_foresaw_is_a_failure_of_one_workload_and_not_of_its_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(self: TermFiles, workload: str, what: TermRecord) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(TermFiles, "record", record)
    events: list[Event] = []
    async with asyncio.TaskGroup() as tasks:
        effects = Effects(_BrokenHands(), TermFiles(tmp_path, "b"), events.append, tasks)
        for effect in (DropVip(), PersistTerm(TermRecord(term=1)), CheckHealth(), FENCE):
            effects.perform(effect, SPEC)
        for _ in range(300):
            await asyncio.sleep(0.01)
            if len(events) == 4:
                break
        effects.close()
    failed = {each.step: each.reason for each in events if isinstance(each, StepFailed)}
    assert failed.keys() == {"drop_vip", "persist", "health"}
    assert all(why.startswith("a defect in Outlive, or its host") for why in failed.values())
    (verdict,) = [each for each in events if isinstance(each, FenceResult)]
    assert verdict.outcome == "unknown"
