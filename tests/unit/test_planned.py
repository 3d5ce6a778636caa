"""A switchover that is planned: on disk before it is promised, begun when it is due, or forgotten and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from common.control import Done, PlannedSwitchover, Refused, TermHistory
from common.errors import StoreError
from common.events import EventLog, read_events
from common.model import WorkloadSpec
from common.role_plan import LATE_S, due
from common.roles import Instant, Role, TermRecord, Timing, new_role
from common.terms_file import TermFiles
from outlive.planned import Planned
from tests.unit.wire_fakes import until

AT_S = 5000.0
PLAN = PlannedSwitchover(to="b", at_wall_s=AT_S, by="root", term=3)
SPEC = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",))
LEADING = replace(
    new_role(
        me="a",
        boot_id="boot",
        spec=SPEC,
        timing=Timing(),
        fenceable=frozenset(),
        record=TermRecord(term=3, leader="a", mark="leads"),
        first_order=1,
        now=Instant(0, 0),
    ),
    name="leading",
)
REFUSED = Refused(error="NoRightToLeadError", message="the keeper of b is not heard")


def at(wall_s: float) -> Instant:
    return Instant(wall_s, wall_s)


@pytest.mark.parametrize(("late_s", "what"), [(-0.1, "wait"), (0, "begin"), (LATE_S, "begin")])
def test_it_is_due_from_its_time_on_and_for_a_minute(late_s: float, what: str) -> None:
    assert due(PLAN, LEADING, at(AT_S + late_s)) == (what, "")


def test_what_is_too_late_is_forgotten() -> None:
    what, why = due(PLAN, LEADING, at(AT_S + LATE_S + 1))
    assert what == "forget"
    assert "due 61 s ago" in why


@pytest.mark.parametrize("record", [TermRecord(term=4, leader="a"), TermRecord(term=3, leader="b")])
def test_with_its_term_it_is_over_at_once(record: TermRecord) -> None:
    what, why = due(PLAN, replace(LEADING, record=record), at(AT_S - 1000))
    assert what == "forget"
    assert "term 3, which is over" in why


class Scene:
    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.file = directory / "events.jsonl"
        self.log = EventLog(self.file, "keeper")
        self.files = TermFiles(directory / "state", "a")
        self.answer: Done | Refused = Done()
        self.asked: list[str] = []
        self.remembered: list[str] = []
        self.tasks = tasks
        self.restart()

    def restart(self) -> None:
        self.planned = Planned(
            "redis",
            self.files,
            self.log,
            self.tasks,
            plan=self.files.load_plan("redis"),
            ask=self._ask,
            remember=self._remember,
        )

    async def _ask(self, plan: PlannedSwitchover) -> Done | Refused:
        self.asked.append(plan.to)
        return self.answer

    async def _remember(self, plan: PlannedSwitchover, reason: str) -> None:
        self.remembered.append(reason)

    async def ticked(self, wall_s: float, condition: Callable[[], object], role: Role = LEADING) -> None:
        self.planned.tick(role, at(wall_s))
        await until(condition)

    def events(self) -> list[str]:
        self.log.close()
        return [each.event for each in read_events(self.file)]


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with _scene(tmp_path) as made:
        yield made


@asynccontextmanager
async def _scene(directory: Path) -> AsyncIterator[Scene]:
    async with asyncio.TaskGroup() as tasks:
        made = Scene(directory, tasks)
        yield made
        made.log.close()


async def test_it_outlives_the_keeper_and_is_begun_once(scene: Scene) -> None:
    await scene.planned.make(PLAN)
    scene.planned.tick(LEADING, at(AT_S - 1))
    scene.restart()
    assert scene.planned.plan == PLAN
    await scene.ticked(AT_S, lambda: scene.planned.plan is None)
    scene.planned.tick(LEADING, at(AT_S + 1))
    scene.restart()
    scene.planned.tick(LEADING, at(AT_S + 2))
    await asyncio.sleep(0)
    assert scene.asked == ["b"]
    assert scene.remembered == ["to b, planned by root: it is due, and begins"]
    assert scene.events() == ["switchover.planned", "switchover.begun"]


async def test_what_is_refused_is_tried_again_for_a_minute_and_then_given_up_with_the_reason(
    scene: Scene,
) -> None:
    scene.answer = REFUSED
    await scene.planned.make(PLAN)
    await scene.ticked(AT_S, lambda: len(scene.asked) == 1)
    await asyncio.sleep(0)
    scene.planned.tick(LEADING, at(AT_S + 0.5))
    await asyncio.sleep(0.01)
    assert len(scene.asked) == 1, "not at every tick"
    await scene.ticked(AT_S + 1.5, lambda: len(scene.asked) == 2)
    await asyncio.sleep(0)
    await scene.ticked(AT_S + LATE_S + 5, lambda: scene.planned.plan is None)
    assert scene.files.load_plan("redis") is None
    assert "it was refused: the keeper of b is not heard" in scene.remembered[0]
    assert scene.events()[-1] == "switchover.dropped"


async def test_a_takeover_meanwhile_ends_it(scene: Scene) -> None:
    await scene.planned.make(PLAN)
    elsewhere = replace(LEADING, record=TermRecord(term=4, leader="b"), name="following")
    await scene.ticked(AT_S - 100, lambda: scene.planned.plan is None, elsewhere)
    assert scene.asked == []
    assert scene.files.load_plan("redis") is None


async def test_another_one_takes_its_place_and_can_be_cancelled(scene: Scene) -> None:
    assert not await scene.planned.cancel("root")
    await scene.planned.make(PLAN)
    await scene.planned.make(replace(PLAN, at_wall_s=AT_S + 500))
    scene.planned.tick(LEADING, at(AT_S))
    assert await scene.planned.cancel("eve")
    assert scene.files.load_plan("redis") is None
    assert scene.asked == []
    assert scene.remembered == ["to b: cancelled by eve"]


async def test_what_cannot_be_removed_from_disk_is_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise StoreError("bad sector")

    await scene.planned.make(PLAN)
    with monkeypatch.context() as patch:
        patch.setattr(scene.files, "forget_plan", broken)
        await scene.ticked(AT_S + LATE_S + 1, lambda: scene.planned._carrying is not None)
        await asyncio.sleep(0.05)
        assert scene.planned.plan == PLAN
    await scene.ticked(AT_S + LATE_S + 3, lambda: scene.planned.plan is None)


def test_a_line_is_added_to_the_story_of_a_term_that_is_over(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    story = TermHistory(workload="redis", term=3, leader="a", cause="started", began_wall_s=100.0)
    files.save_history(story)
    files.save_history(replace(story, term=4))
    files.add_to_history("redis", 3, "planned switchover", "it is over", 101.5)
    files.add_to_history("redis", 9, "planned switchover", "nobody knows that term", 101.5)
    third, fourth = files.history("redis")
    assert [(each.at_ms, each.event) for each in third.timeline] == [(1500.0, "planned switchover")]
    assert fourth.timeline == ()


def test_what_is_planned_goes_with_the_declaration(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.record_plan("redis", PLAN)
    files.forget_spec("redis")
    assert files.load_plan("redis") is None
