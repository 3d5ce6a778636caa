"""Which tracker is chosen, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.errors import CaptureError, UnsupportedError
from primary import tracking, userfault
from primary.freezer import NotFrozenError, StandStill, Work
from primary.soft_dirty import Look, SoftDirtyTracker
from primary.tracking import TrackerChoice, TrackerName, choose, make


def kernel(**problems: str) -> dict[TrackerName, Callable[[], str]]:
    """A kernel that can do everything but what has a problem."""
    names: tuple[TrackerName, ...] = ("userfaultfd", "soft-dirty", "none")
    return {name: lambda name=name: problems.get(name.replace("-", "_"), "") for name in names}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("release", "is_sound"),
    [
        ("6.1.0-50-amd64", False),
        ("6.7.12", False),
        ("6.12.9+deb13-amd64", False),
        ("6.12.11", True),
        ("6.12.43+deb13-amd64", True),
        ("6.13-rc1", True),
        ("6.18.44-fc-v769", True),
        ("7.0", True),
        ("10.1.2", True),
    ],
)
def test_kernels_that_lose_track_of_pages_are_told(release: str, is_sound: bool) -> None:
    assert (userfault._flaw(release) == "") is is_sound


class TestAuto:
    def test_is_userfaultfd_where_the_kernel_has_it(self) -> None:
        choice = choose("auto", problems=kernel())
        assert choice == TrackerChoice("userfaultfd", "this kernel has userfaultfd")

    def test_is_soft_dirty_where_it_has_not_and_says_why(self) -> None:
        choice = choose("auto", problems=kernel(userfaultfd="userfaultfd: Invalid argument"))
        assert choice == TrackerChoice(
            "soft-dirty", "userfaultfd: Invalid argument; this kernel has soft-dirty"
        )

    def test_is_nothing_where_there_is_neither_and_says_why(self) -> None:
        choice = choose("auto", problems=kernel(userfaultfd="too old", soft_dirty="soft-dirty: not built in"))
        assert choice.name is None, "copying all within the freeze is no better than the stock backend"
        assert "userfaultfd: too old; soft-dirty: not built in" in choice.reason

    def test_tries_no_further_than_it_has_to(self) -> None:
        problems = kernel()

        def tried() -> str:
            raise AssertionError("soft-dirty bits were cleared for nothing")

        problems["soft-dirty"] = tried
        assert choose("auto", problems=problems).name == "userfaultfd"


class TestNamed:
    @pytest.mark.parametrize("name", ["userfaultfd", "soft-dirty", "none"])
    def test_is_used_where_it_works(self, name: TrackerName) -> None:
        choice = choose(name, problems=kernel())
        assert choice == TrackerChoice(name, f'the configuration says capture.tracker = "{name}"')

    @pytest.mark.parametrize("name", ["userfaultfd", "soft-dirty", "none"])
    def test_is_never_replaced_by_another_where_it_does_not(self, name: TrackerName) -> None:
        choice = choose(name, problems=kernel(**{name.replace("-", "_"): "it is broken"}))
        assert choice.name is None
        assert "it is broken" in choice.reason
        assert name in choice.reason


class TestMade:
    def test_by_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracking, "zero_frame", lambda: 1)
        monkeypatch.setattr("primary.soft_dirty.zero_frame", lambda: 1)
        assert [make(name, _stand_still).name for name in ("userfaultfd", "soft-dirty", "none")] == [
            "userfaultfd",
            "soft-dirty",
            "none",
        ]

    def test_without_a_name_is_the_best_that_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracking, "choose", lambda wanted: TrackerChoice("userfaultfd", "it is there"))
        assert make(None, _stand_still).name == "userfaultfd"

    def test_without_a_name_is_none_where_none_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracking, "choose", lambda wanted: TrackerChoice(None, "nothing works"))
        with pytest.raises(UnsupportedError, match="nothing works"):
            make(None, _stand_still)


async def _stand_still(work: object) -> None:
    raise AssertionError("nothing is to be stopped")


class TestAnotherStop:
    @pytest.mark.parametrize(
        ("look", "worth"),
        [
            (Look(written=0, present=1000, direct=False), False),
            (Look(written=500, present=1000, direct=False), False),
            (Look(written=1000, present=1000, direct=False), True),
            (Look(written=5000, present=524_288, direct=False), False),
            (Look(written=20_000, present=524_288, direct=False), True),
            (Look(written=20_000, present=524_288, direct=True), False),
        ],
    )
    def test_pays_where_much_is_written_of_what_there_is(self, look: Look, worth: bool) -> None:
        assert look.is_worth_a_stop is worth


class Process:
    """A process of which much is written."""

    def __init__(self) -> None:
        self.pid = 7
        self.space: Any = None
        self.noted = self.forgotten = 0

    def prepare(self) -> None:
        """Have no need to."""

    def not_taken(self) -> None:
        self.noted += 1

    def forget_all(self) -> None:
        self.forgotten += 1


class Call:
    """Clears nothing."""

    def run(self, spaces: object) -> int:
        return 0


class TestAStop:
    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch) -> Process:
        monkeypatch.setattr("primary.soft_dirty.zero_frame", lambda: 1)
        return Process()

    async def stop(self, process: Process, stand_still: Any) -> None:
        tracker = SoftDirtyTracker(stand_still)
        tracker._call = Call()  # type: ignore[assignment]
        await tracker._stop([process])  # type: ignore[list-item]

    def at_rest(self, pids: set[int]) -> StandStill:
        async def still(work: Work) -> None:
            work(frozenset(pids))

        return still

    async def test_that_was_one_notes_what_was_cleared(self, process: Process) -> None:
        await self.stop(process, self.at_rest({7}))
        assert (process.noted, process.forgotten) == (1, 0)

    async def test_of_others_leaves_it_alone(self, process: Process) -> None:
        await self.stop(process, self.at_rest({8}))
        assert (process.noted, process.forgotten) == (0, 0)

    async def test_in_which_not_all_stood_still_forgets_everything(self, process: Process) -> None:
        async def thawed(work: object) -> None:
            raise CaptureError("it was thawed by somebody else")

        with pytest.raises(CaptureError):
            await self.stop(process, thawed)
        assert (process.noted, process.forgotten) == (0, 1)

    async def test_that_did_not_come_about_forgets_nothing(self, process: Process) -> None:
        async def not_frozen(work: object) -> None:
            raise NotFrozenError("one of its tasks waits for a disk")

        with pytest.raises(NotFrozenError):
            await self.stop(process, not_frozen)
        assert (process.noted, process.forgotten) == (0, 0)
