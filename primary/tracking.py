"""How the writes of a workload are found: what all trackers have in common, and which one is used, and why.

    userfaultfd   writes are let through and remembered, page by page; asked and begun anew while it runs
    soft-dirty    the same bit in page tables; begun anew for a whole process, and only while it stands still
    none          nothing is remembered: every page counts as written, and is copied within the freeze

In: what the configuration wants, and what this kernel has, found out by trying it on this process. Out: a
`Tracker` for each backend. What each costs stands in docs/concepts/capture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from common.errors import UnsupportedError
from common.identity import PageHasher
from primary import userfault
from primary.frames import Frames
from primary.freezer import StandStill
from primary.layers import LayerWriter
from primary.pagemap import pagemap_problem, soft_dirty_problem, zero_frame
from primary.pages import Space
from primary.process import TrackedProcess
from primary.soft_dirty import SoftDirtyTracker
from primary.userfault_tracker import UserfaultTracker

TrackerName = Literal["userfaultfd", "soft-dirty", "none"]


class Tracker(Protocol):
    """Finds what the processes of one workload write; used by one task at a time.

    What must hold: a page whose content was read, and of which the book of its process was not told since
    that it was written or is in doubt, still holds that content, until the next freeze reports it dirty.
    """

    @property
    def name(self) -> TrackerName:
        """What the configuration calls it."""
        ...

    copies_ahead: bool
    """Whether copying while it runs leaves less for the freeze."""

    def space(self, pid: int) -> Space:
        """Make what a process is scanned with at a freeze."""
        ...

    async def take_up(self, process: TrackedProcess) -> None:
        """See that its writes are watched, where that can be; else it is captured whole.

        Raises CaptureError if it has ended.
        """
        ...

    async def copy_ahead(
        self,
        processes: Iterable[TrackedProcess],
        hasher: PageHasher,
        writer: LayerWriter,
        *,
        again: bool = False,
    ) -> None:
        """Copy what was written, while it runs; `again`: the last freeze found too much for that.

        Processes that end meanwhile are passed over. Raises CaptureError.
        """
        ...

    def begins_anew_frozen(self, process: TrackedProcess) -> bool:
        """Whether its writes can be found, and watched for anew, in the midst of a freeze."""
        ...

    def let_go(self, process: TrackedProcess) -> None:
        """Stop watching a process. Harmless when repeated."""
        ...


@dataclass(frozen=True, slots=True)
class TrackerChoice:
    """Which tracker, and why; or why none of those that are wanted works here."""

    name: TrackerName | None
    reason: str


class NoTracker:
    """Watches nothing."""

    name: TrackerName = "none"
    copies_ahead = False

    def __init__(self) -> None:
        self._zero_frame = zero_frame()

    def space(self, pid: int) -> Space:
        """See `Tracker.space`."""
        return Space(pid, Frames(self._zero_frame, tracks=False))

    async def take_up(self, process: TrackedProcess) -> None:
        """Do nothing."""

    async def copy_ahead(
        self,
        processes: Iterable[TrackedProcess],
        hasher: PageHasher,
        writer: LayerWriter,
        *,
        again: bool = False,
    ) -> None:
        """Copy nothing: it would have to be copied again."""

    def begins_anew_frozen(self, process: TrackedProcess) -> bool:
        """See `Tracker.begins_anew_frozen`."""
        return False

    def let_go(self, process: TrackedProcess) -> None:
        """Do nothing."""


_PROBLEMS: Final[Mapping[TrackerName, Callable[[], str]]] = {
    "userfaultfd": userfault.problem,
    "soft-dirty": soft_dirty_problem,
    "none": pagemap_problem,
}


def choose(
    wanted: Literal["auto"] | TrackerName,
    *,
    problems: Mapping[TrackerName, Callable[[], str]] = _PROBLEMS,
) -> TrackerChoice:
    """Choose by what works here; `problems` say why something does not, empty if it does."""
    if wanted != "auto":
        problem = problems[wanted]()
        if problem:
            return TrackerChoice(
                None, f'capture.tracker = "{wanted}" cannot be done here: {_tell(wanted, problem)}'
            )
        return TrackerChoice(wanted, f'the configuration says capture.tracker = "{wanted}"')
    found: list[str] = []
    # Not `none`: with everything copied within the freeze, the stock backend does as well.
    for name in ("userfaultfd", "soft-dirty"):
        problem = problems[name]()
        if not problem:
            return TrackerChoice(name, "; ".join((*found, f"this kernel has {name}")))
        found.append(_tell(name, problem))
    return TrackerChoice(None, f"writes cannot be tracked on this kernel: {'; '.join(found)}")


def make(name: TrackerName | None, stand_still: StandStill) -> Tracker:
    """Make the tracker of a backend; without a name the best that works here. Raises UnsupportedError."""
    if name is None:
        choice = choose("auto")
        if choice.name is None:
            raise UnsupportedError(choice.reason)
        name = choice.name
    if name == "userfaultfd":
        return UserfaultTracker(stand_still)
    if name == "soft-dirty":
        return SoftDirtyTracker(stand_still)
    return NoTracker()


def _tell(name: TrackerName, problem: str) -> str:
    return problem if problem.startswith(name) else f"{name}: {problem}"
