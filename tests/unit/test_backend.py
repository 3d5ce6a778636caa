"""Which backend captures: the fast one, until it fails three times in a row; a minute later, a new one."""

from __future__ import annotations

import asyncio

import pytest

from common.config import Capture
from common.control import CaptureStatus
from common.criu.rpc import CriuVersion
from common.errors import CaptureError, NoSpaceError, UnsupportedError
from common.model import EpochId
from primary import backend as backend_module
from primary.backend import BackendChoice, ChosenBackend, choose_backend
from primary.capture import CapturedEpoch
from primary.shim import KNOWN_VERSIONS
from primary.tracking import TrackerChoice
from tests.unit.wire_fakes import captured


class BackendInMemory:
    """Captures nothing, quickly; or raises what it is told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[tuple[EpochId, EpochId | None]] = []
        self.outcomes: list[BaseException | None] = []
        self.closed = 0

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        assert not self.closed
        self.asked.append((epoch, since))
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        return captured(epoch.epoch, {}, incarnation=self.name)

    async def close(self) -> None:
        self.closed += 1


class Scene:
    """A chosen backend, the fast ones that it made, and a clock that is moved by hand."""

    def __init__(self, *, can_be_fast: bool = True) -> None:
        self.made: list[BackendInMemory] = []
        self.stock = BackendInMemory("stock")
        self.told: list[tuple[str, str]] = []
        self.now_s = 1000.0
        self.outcomes: list[BaseException | None] = []
        """What the next fast backend will do."""
        self.backend = ChosenBackend(
            self._make if can_be_fast else None,
            self.stock,
            BackendChoice("soft-dirty", "as it should be")
            if can_be_fast
            else BackendChoice(None, "this kernel is old"),
            on_change=lambda name, reason: self.told.append((name, reason)),
            clock=lambda: self.now_s,
        )
        self._next = 0

    def _make(self) -> BackendInMemory:
        fast = BackendInMemory("fast")
        fast.outcomes, self.outcomes = self.outcomes, []
        self.made.append(fast)
        return fast

    async def by(self) -> str:
        """Capture an epoch; by whom that was done."""
        self._next += 1
        return (await self.backend.capture(EpochId(1, self._next), EpochId(1, 0))).incarnation

    async def fails(self, times: int) -> None:
        for _ in range(times):
            with pytest.raises(CaptureError):
                await self.by()

    async def given_up(self) -> None:
        """Have the fast backend fail for the third time in a row."""
        failures: list[BaseException | None] = [CaptureError(f"failure {number}") for number in (1, 2, 3)]
        if self.made and not self.made[-1].closed:
            self.made[-1].outcomes = failures
        else:
            self.outcomes = failures
        await self.fails(2)
        assert await self.by() == "stock"


@pytest.fixture
def scene() -> Scene:
    return Scene()


class TestWhereItCanBeFast:
    async def test_the_fast_one_captures_and_is_told_what_replicas_hold(self, scene: Scene) -> None:
        assert [await scene.by() for _ in range(3)] == ["fast"] * 3
        (fast,) = scene.made
        assert fast.asked == [(EpochId(1, number), EpochId(1, 0)) for number in (1, 2, 3)]
        assert scene.stock.asked == []
        assert (scene.backend.name, scene.backend.reason) == ("fast", "as it should be")

    async def test_it_is_made_at_the_first_capture(self, scene: Scene) -> None:
        assert scene.made == []
        await scene.by()
        assert len(scene.made) == 1

    async def test_a_failure_is_passed_on_and_the_next_capture_is_fast_again(self, scene: Scene) -> None:
        scene.outcomes = [CaptureError("once"), CaptureError("twice")]
        await scene.fails(2)
        assert await scene.by() == "fast"
        assert scene.stock.asked == []
        assert len(scene.made) == 1

    async def test_failures_that_are_not_in_a_row_do_not_add_up(self, scene: Scene) -> None:
        no = CaptureError("no")
        scene.outcomes = [no, no, None, no, no, None, no, no, None]
        for _ in range(3):
            await scene.fails(2)
            assert await scene.by() == "fast"
        assert scene.stock.asked == []

    async def test_the_third_failure_in_a_row_is_made_good_by_the_stock_one(self, scene: Scene) -> None:
        await scene.given_up()
        assert scene.stock.asked == [(EpochId(1, 3), EpochId(1, 0))], "the very epoch that failed"
        assert scene.made[0].closed == 1
        assert scene.backend.name == "stock"
        assert scene.backend.reason == "the fast backend failed 3 times: failure 3"

    async def test_a_lack_of_room_is_no_reason_to_give_up_since_the_stock_one_needs_more(
        self, scene: Scene
    ) -> None:
        scene.outcomes = [NoSpaceError("full")] * 5
        for _ in range(5):
            with pytest.raises(NoSpaceError):
                await scene.by()
        assert await scene.by() == "fast"
        assert scene.stock.asked == []

    async def test_the_stock_one_goes_on_for_a_minute(self, scene: Scene) -> None:
        await scene.given_up()
        for _ in range(5):
            scene.now_s += 11.99
            assert await scene.by() == "stock"
        assert len(scene.made) == 1

    async def test_after_a_minute_a_new_fast_one_captures(self, scene: Scene) -> None:
        await scene.given_up()
        scene.now_s += 60
        assert await scene.by() == "fast"
        old, new = scene.made
        assert new is not old
        assert (old.closed, new.closed) == (1, 0)
        assert (scene.backend.name, scene.backend.reason) == ("fast", "it works again")

    async def test_each_change_is_told_once(self, scene: Scene) -> None:
        for _ in range(2):
            assert await scene.by() == "fast"
        await scene.given_up()
        for _ in range(3):
            await scene.by()
        scene.now_s += 61
        for _ in range(3):
            await scene.by()
        assert scene.told == [
            ("fast", "tracker soft-dirty: as it should be"),
            ("stock", "the fast backend failed 3 times: failure 3"),
            ("fast", "it works again"),
        ]

    async def test_what_comes_back_and_works_gets_three_tries_again(self, scene: Scene) -> None:
        await scene.given_up()
        scene.now_s += 60
        assert await scene.by() == "fast"
        await scene.given_up()
        assert [each.closed for each in scene.made] == [1, 1]
        assert [name for name, _ in scene.told] == ["fast", "stock", "fast", "stock"]

    async def test_what_comes_back_and_fails_at_once_costs_no_epoch(self, scene: Scene) -> None:
        await scene.given_up()
        for _ in range(3):
            scene.now_s += 60
            scene.outcomes = [CaptureError("still no")]
            assert await scene.by() == "stock"
            assert await scene.by() == "stock"
            assert scene.made[-1].closed == 1
        assert [name for name, _ in scene.told] == ["fast", "stock"], "nothing changed since"

    async def test_a_failure_of_the_stock_one_is_passed_on(self, scene: Scene) -> None:
        scene.stock.outcomes = [CaptureError("stock fails too")]
        scene.outcomes = [CaptureError("no")] * 3
        await scene.fails(2)
        with pytest.raises(CaptureError, match="stock fails too"):
            await scene.by()
        assert await scene.by() == "stock"

    async def test_a_capture_that_is_cancelled_is_no_failure(self, scene: Scene) -> None:
        scene.outcomes = [asyncio.CancelledError()] * 5
        for _ in range(5):
            with pytest.raises(asyncio.CancelledError):
                await scene.by()
        assert await scene.by() == "fast"

    async def test_closing_closes_both_and_may_be_repeated(self, scene: Scene) -> None:
        await scene.by()
        await scene.backend.close()
        await scene.backend.close()
        assert scene.made[0].closed == 1
        assert scene.stock.closed >= 1

    async def test_closing_before_any_capture_makes_no_fast_one(self, scene: Scene) -> None:
        await scene.backend.close()
        assert scene.made == []
        assert scene.stock.closed == 1


class TestWhereItCannotBeFast:
    async def test_the_stock_one_captures_and_the_reason_is_told(self) -> None:
        scene = Scene(can_be_fast=False)
        assert [await scene.by() for _ in range(2)] == ["stock"] * 2
        assert scene.told == [("stock", "this kernel is old")]
        assert (scene.backend.name, scene.backend.reason) == scene.told[0]

    async def test_its_failures_are_passed_on(self) -> None:
        scene = Scene(can_be_fast=False)
        scene.stock.outcomes = [CaptureError("no")] * 4
        await scene.fails(4)
        assert await scene.by() == "stock"

    async def test_time_changes_nothing(self) -> None:
        scene = Scene(can_be_fast=False)
        scene.now_s += 3600
        assert await scene.by() == "stock"


class TestWhatIsTold:
    async def test_of_the_fast_one_with_its_tracker(self, scene: Scene) -> None:
        wanted = CaptureStatus(backend="fast", tracker="soft-dirty", reason="as it should be")
        assert scene.backend.status() == wanted

    async def test_of_the_stock_one_when_it_has_stepped_in(self, scene: Scene) -> None:
        await scene.given_up()
        wanted = CaptureStatus(
            backend="stock", tracker="", reason="the fast backend failed 3 times: failure 3"
        )
        assert scene.backend.status() == wanted


class TestWhichOneIsChosen:
    @pytest.fixture(autouse=True)
    def node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A node on which everything is as it should be."""
        monkeypatch.setattr(backend_module, "built", lambda name: name)
        monkeypatch.setattr(backend_module, "program", lambda: "outlive-inject")
        monkeypatch.setattr(backend_module.pages, "load", lambda: None)
        self.trackers(monkeypatch, TrackerChoice("userfaultfd", "this kernel has userfaultfd"))

    VERSION = CriuVersion(*KNOWN_VERSIONS[0], 1)
    AUTO = Capture(backend="auto")

    @staticmethod
    def trackers(monkeypatch: pytest.MonkeyPatch, choice: TrackerChoice) -> None:
        monkeypatch.setattr(backend_module, "choose", lambda wanted: choice)

    def test_the_fast_one_where_it_can(self) -> None:
        choice = choose_backend(self.AUTO, self.VERSION)
        assert choice == BackendChoice("userfaultfd", "this kernel has userfaultfd")
        assert choice.sentence == "fast backend, tracker userfaultfd: this kernel has userfaultfd"

    def test_the_stock_one_where_the_configuration_says_so(self) -> None:
        choice = choose_backend(Capture(backend="stock"), self.VERSION)
        assert choice.tracker is None
        assert choice.sentence == 'stock backend: the configuration says capture.backend = "stock"'

    def test_the_stock_one_with_a_criu_that_the_shim_does_not_know(self) -> None:
        choice = choose_backend(self.AUTO, CriuVersion(3, 17, 1))
        assert choice.tracker is None
        assert "CRIU 3.17" in choice.reason

    @pytest.mark.parametrize("part", ["built", "program"])
    def test_the_stock_one_if_a_part_was_not_built(self, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        self.lacks(monkeypatch, part)
        choice = choose_backend(self.AUTO, self.VERSION)
        assert choice.tracker is None
        assert f"{part} was not built" in choice.reason

    def test_soft_dirty_needs_no_injector(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lacks(monkeypatch, "program")
        self.trackers(monkeypatch, TrackerChoice("soft-dirty", "it is there"))
        assert choose_backend(self.AUTO, self.VERSION) == BackendChoice("soft-dirty", "it is there")

    def test_the_stock_one_if_a_library_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong() -> None:
            raise OSError("wrong ELF class")

        monkeypatch.setattr(backend_module.pages, "load", wrong)
        assert choose_backend(self.AUTO, self.VERSION) == BackendChoice(None, "wrong ELF class")

    def test_the_stock_one_if_the_kernel_tracks_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trackers(monkeypatch, TrackerChoice(None, "userfaultfd: Function not implemented"))
        choice = choose_backend(self.AUTO, self.VERSION)
        assert choice == BackendChoice(None, "userfaultfd: Function not implemented")

    @staticmethod
    def lacks(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        def missing(*_: object) -> str:
            raise UnsupportedError(f"{part} was not built")

        monkeypatch.setattr(backend_module, part, missing)
