"""Tracking of writes by userfaultfd, in asynchronous write-protect mode.

In: the processes of a workload. Out: copies of what they wrote, made while they ran. One userfaultfd for each
process, taken out of it; `primary.userfault` says what it tells, and of what.

    survey   running: which mappings are not tracked; about how much was written in the others
    protect  it pays: what was written there, which is protected again
    stop     the cgroup stands still, and what was not tracked is from now on
    copy     running again: what was protected before the stop

It does not pay for few pages: CRIU takes as long to dump everything else, and they are copied beside it. Nor
for a hot set, pages that are written again as fast as they are copied: what is copied ahead is copied once
more in the freeze, each stop costs the workload as much as a short freeze, and each protected page a fault.

What must hold:
- A mapping that was not tracked a moment ago has pages of which nothing is known, whatever stood at its place
  before (munmap and mmap, mremap, exec, fork): what is fresh is forgotten.
- Mappings are tracked whole, and all of them in a stop.
- A page is read only after everybody came out of the system call that they were in when it was protected. Who
  writes into memory by a system call (process_vm_writev, `/proc/PID/mem`, O_DIRECT) looks a page up, and
  writes to it later; if it was protected in between, without a trace. A task that stands still is in no such
  call.
- A process has room for mappings of its own. The kernel joins no two mappings that were both written to, so
  what is tracked stays apart from what comes beside it later: who grows has one more with each stop.
- A process with files open for direct I/O is protected within freezes only, when no read is in flight: what a
  device writes into a page that was protected after it was given the page, shows nowhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import CaptureError, OutliveError
from common.identity import PageHasher
from common.model import PAGE_BYTES
from common.threads import in_thread
from primary.freezer import StandStill
from primary.injection import take_userfaultfd
from primary.layers import LayerWriter
from primary.page_set import NO_PAGES, PageSet
from primary.pages import EXECUTABLE, OWNED, VMA, Space, count_written, pages_in, reads_directly, untracked
from primary.process import TrackedProcess, open_of, resident_pages
from primary.userfault import Userfault, most_mappings

log = structlog.get_logger(__name__)

_TRACK_AGAIN_S: Final = 5.0
_TRACK_CROWDED_AGAIN_S: Final = 60.0
_SMALL_PAGES: Final = 1024
"""A process of fewer pages is captured whole at its first freeze (3 ms at most), and tracked from then on."""
_ROUNDS: Final = 4
_FEW_PAGES: Final = 1536
"""No pre-copy for so few: copying them takes about 4 ms, and CRIU longer than that for the rest.

Well under what there is always room for in a freeze: until then, more is written.
"""
_MOST_HOT_PAGES: Final = 6144
"""A hot set that is larger is copied ahead all the same: within the freeze it would take more than 16 ms.

Likewise: three quarters of what there may be room for.
"""
_HOT_EPOCHS: Final = 32
"""After so many, whether pre-copy pays is found out again."""
_CROWDED, _FULL = 1 / 4, 1 / 2
"""Shares of the mappings that a process may have. From the first on, only what makes up a sixteenth of what
is tracked, or more than is few, is tracked as well; beyond the second, nothing of that process any more."""
_COVER_S: Final = 0.02
"""Mappings are tracked for so long in one stop, 5 µs each; the others in the next one."""

_CLOSER = ThreadPoolExecutor(1, "userfaultfd")
_T = TypeVar("_T")


@dataclass(slots=True)
class _Watched:
    """What is known of the tracking of one process."""

    userfault: Userfault | None = None
    seen: bool = False
    again_s: float = 0.0
    problem: str = ""
    """Why its writes are not tracked; empty if they are."""
    direct: bool = False
    """It has, or had, a file open with O_DIRECT."""
    closing: Future[None] | None = None
    """Its last userfaultfd may not be closed yet: until it is, what is written may look unwritten."""
    runs_on: bool = False
    """It did not stand still in the last stop: it is in another cgroup."""

    def reads_directly(self, pid: int) -> bool:
        """Whether devices may write into its memory past the tracking.

        Who opens such a file for a moment does so again, and perhaps between two looks.
        """
        self.direct = self.direct or reads_directly(pid)
        return self.direct

    def give_up(self, process: TrackedProcess) -> None:
        """Stop tracking it, and believe nothing."""
        if self.userfault is not None:
            self.closing = _CLOSER.submit(self.userfault.close)
            self.userfault = None
        process.forget_all()

    def await_closed(self, process: TrackedProcess) -> None:
        """Believe nothing before its last userfaultfd is closed, nor what was found until then."""
        if self.closing is not None:
            closed = self.closing.done()
            process.forget_all()
            if closed:
                self.closing = None


@dataclass(frozen=True, slots=True)
class _Survey:
    """What there is to one process, before anything is done about it."""

    tracked: NDArray[np.void]
    """The mappings (`VMA`) that are tracked."""
    fresh: NDArray[np.void]
    """Those that are not."""
    gain: int
    """How many pages it would spare the freeze to track those; see `Userfault.gain`."""
    dirty: int
    """How many pages of the tracked ones would have to be copied now; perhaps fewer."""


def _bytes_of(vmas: NDArray[np.void]) -> int:
    return int((vmas["end"] - vmas["start"]).sum())


def _shrinks(before: int, wanted: int) -> bool:
    """Tell whether another round pays: it is the first (0 `before`), or there was much less to copy."""
    return wanted > _FEW_PAGES and (not before or wanted <= before // 2)


class _HotSet:
    """Pages that are written as fast as they are copied: how many, as pre-copy has shown."""

    def __init__(self) -> None:
        self._pages = 0
        self._barred = False
        self._epochs_left = 0

    def next_epoch(self) -> None:
        """Forget it after a while: what is hot changes."""
        self._epochs_left -= 1
        if self._epochs_left <= 0:
            self._pages, self._barred = 0, False

    def found(self, before: int, after: int) -> None:
        """Take note of a round: how many pages were copied in it, and how many of all were written again."""
        if after > before // 2 and not self._barred:
            self._pages, self._epochs_left = max(before, after), _HOT_EPOCHS

    def was_too_much(self) -> None:
        """Leave nothing to freezes for a while: one found more than it had room for."""
        if self._pages:
            self._pages, self._barred, self._epochs_left = 0, True, _HOT_EPOCHS

    @property
    def bound(self) -> int:
        """How many pages are left to the freeze: what was hot, and a quarter more; few in any case."""
        return max(_FEW_PAGES, min(self._pages * 5 // 4, _MOST_HOT_PAGES))


class UserfaultTracker:
    """A `primary.tracking.Tracker`."""

    name: Literal["userfaultfd"] = "userfaultfd"
    copies_ahead = True

    def __init__(self, stand_still: StandStill) -> None:
        self._stand_still = stand_still
        self._watched: dict[TrackedProcess, _Watched] = {}
        self._hot = _HotSet()
        self._most_mappings = most_mappings()

    def space(self, pid: int) -> Space:
        """See `primary.tracking.Tracker.space`."""
        return Space(pid)

    async def take_up(self, process: TrackedProcess) -> None:
        """Take a userfaultfd out of it, unless there is one. A failure is remembered, not raised."""
        watched = self._watched.setdefault(process, _Watched())
        if process.borrows or watched.userfault is not None or time.monotonic() < watched.again_s:
            return
        if not watched.seen and resident_pages(process.pid) < _SMALL_PAGES:
            watched.seen = True  # most small processes end before the next epoch
            return
        try:
            watched.userfault = Userfault((await take_userfaultfd(process.pid)).descriptor)
            watched.problem = ""
        except OutliveError as error:
            watched.again_s = time.monotonic() + _TRACK_AGAIN_S
            if watched.problem != error.message:
                log.info("tracking.not_begun", pid=process.pid, reason=error.message)
            watched.problem = error.message

    def begins_anew_frozen(self, process: TrackedProcess) -> bool:
        """See `primary.tracking.Tracker.begins_anew_frozen`."""
        watched = self._watched.get(process)
        return watched is not None and watched.userfault is not None and not watched.direct

    def let_go(self, process: TrackedProcess) -> None:
        """See `primary.tracking.Tracker.let_go`."""
        watched = self._watched.pop(process, None)
        if watched is not None and watched.userfault is not None:
            watched.userfault.close()

    async def copy_ahead(
        self,
        processes: Iterable[TrackedProcess],
        hasher: PageHasher,
        writer: LayerWriter,
        *,
        again: bool = False,
    ) -> None:
        """See `primary.tracking.Tracker.copy_ahead`. What a stop has tracked is copied in the next round."""
        todo = dict.fromkeys(processes, 0)
        self._hot.next_epoch()
        if again:
            self._hot.was_too_much()
        try:
            for each in range(_ROUNDS):
                surveys = await in_thread(self._each, self._survey, list(todo))
                dirty = sum(survey.dirty for survey in surveys.values())
                if each and all(todo.values()):
                    self._hot.found(sum(todo.values()), dirty)
                # What came since the first round is no reason for another stop.
                gains = 0 if each else sum(survey.gain for survey in surveys.values())
                if dirty + gains <= (_FEW_PAGES if again else self._hot.bound):
                    return
                found = await in_thread(self._each, partial(self._protect, surveys), list(surveys))
                fresh = {process: survey for process, survey in surveys.items() if survey.gain}
                still = await self._stop(fresh)
                if not still:
                    return
                await in_thread(self._lift_all, fresh)
                copy = partial(self._copy, surveys, found, hasher, writer)
                await in_thread(self._each, copy, [process for process in found if process.pid in still])
                todo = {
                    process: 0 if process in fresh else len(wanted)
                    for process, wanted in found.items()
                    if process.pid in still and (process in fresh or _shrinks(todo[process], len(wanted)))
                }
        finally:
            for process, watched in self._watched.items():
                if watched.userfault is not None and not watched.userfault.is_sound:
                    watched.again_s = time.monotonic() + _TRACK_AGAIN_S
                    watched.give_up(process)

    async def _stop(self, fresh: Mapping[TrackedProcess, _Survey]) -> frozenset[int]:
        """Track what is fresh while all stands still; return who stood still (PIDs)."""
        still: frozenset[int] = frozenset()

        def cover(pids: frozenset[int]) -> None:
            nonlocal still
            until_s = time.monotonic() + _COVER_S
            for process in fresh:
                if process.pid in pids:
                    self._cover(process, until_s)
            still = pids

        try:
            await self._stand_still(cover)
        except CaptureError as error:  # it may not have stood still: what was begun is given up
            log.info("tracking.no_stop", reason=error.message)
            return frozenset()
        for process, watched in self._watched.items():
            if process.pid not in still and not watched.runs_on:
                log.info("tracking.runs_on", pid=process.pid)
            watched.runs_on = process.pid not in still
        return still

    # --- in threads ---------------------------------------------------------------------------------

    def _each(
        self, work: Callable[[TrackedProcess], _T], processes: Iterable[TrackedProcess]
    ) -> dict[TrackedProcess, _T]:
        """Do `work` with each of them; leave out those that end meanwhile."""
        done = {}
        for process in processes:
            try:
                done[process] = work(process)
            except CaptureError as error:
                if process.has_memory:
                    raise
                log.debug("capture.process_ended", pid=process.pid, error=str(error))
        return done

    def _survey(self, process: TrackedProcess) -> _Survey:
        """Find out what is tracked, and how much was written there; forget all else."""
        watched = self._watched.get(process)
        nothing = np.empty(0, dtype=VMA)
        space, book = process.space, process.book
        if watched is not None:
            watched.await_closed(process)
        if watched is None or watched.userfault is None:
            return _Survey(nothing, nothing, 0, 0)
        vmas = space.mappings()
        crowd = len(vmas) / self._most_mappings
        if crowd > _FULL:
            self._make_room(watched, process, len(vmas))
            return _Survey(nothing, nothing, 0, 0)
        with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
            fresh = watched.userfault.fresh(pagemap, vmas)
            for start, end in fresh[["start", "end"]].tolist():
                book.forget_range(start, end)
            tracked = vmas[((vmas["flags"] & OWNED) != 0) & ~np.isin(vmas["start"], fresh["start"])]
            most = _MOST_HOT_PAGES + 1
            least = min(_bytes_of(tracked) // 16, _FEW_PAGES * PAGE_BYTES)
            small = crowd > _CROWDED and _bytes_of(fresh) < least
            held_back = watched.runs_on or small
            gain = 0 if held_back else watched.userfault.gain(pagemap, fresh, tracked, most)
            space.protects = watched.reads_directly(process.pid)
            if not space.protects:  # where CRIU may write, nothing is protected beside it
                self._protect_written(process, pagemap, tracked[(tracked["flags"] & EXECUTABLE) != 0])
            dirty = len(book.unknown & pages_in(tracked))
            if not space.protects and dirty < most:
                dirty += count_written(pagemap, tracked, most)
            with open_of(process.pid, "mem", os.O_RDONLY) as memory:
                space.settle(pagemap, memory, tracked)
        return _Survey(tracked, fresh, gain, dirty)

    def _make_room(self, watched: _Watched, process: TrackedProcess, mappings: int) -> None:
        """Track it no more, before it can map nothing more for all the mappings that tracking made."""
        watched.give_up(process)
        watched.again_s = time.monotonic() + _TRACK_CROWDED_AGAIN_S
        watched.problem = f"it has {mappings} of at most {self._most_mappings} mappings (vm.max_map_count)"
        log.warning("tracking.too_many_mappings", pid=process.pid, reason=watched.problem)

    def _protect(self, surveys: Mapping[TrackedProcess, _Survey], process: TrackedProcess) -> PageSet:
        """Protect what was written where writes are tracked; return what is to be copied."""
        watched, tracked = self._watched.get(process), surveys[process].tracked
        space, book = process.space, process.book
        if watched is None or watched.userfault is None:
            return NO_PAGES
        space.protects = watched.reads_directly(process.pid)
        if not space.protects:
            with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
                self._protect_written(process, pagemap, tracked)
            if watched.reads_directly(process.pid):  # since when is not known: nothing of this round is
                space.protects = True
                book.forget_all()
                return NO_PAGES
        return book.unknown & pages_in(tracked)

    def _protect_written(self, process: TrackedProcess, pagemap: int, vmas: NDArray[np.void]) -> None:
        """Protect what was written in tracked mappings, and forget what is known of it."""
        book = process.book
        try:
            written = pages_in(process.space.written(pagemap, vmas))
            book.expect(written)
            book.forget(written)
        except BaseException:  # some may be protected now that nobody was told of
            book.forget_all()
            raise

    def _cover(self, process: TrackedProcess, until_s: float) -> None:
        """Track what is not; it stands still meanwhile."""
        userfault = self._watched[process].userfault
        try:
            with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
                if userfault is not None:
                    userfault.cover(pagemap, process.space.mappings(), until_s)
        except CaptureError as error:  # it is ending, or stays fresh
            log.debug("tracking.not_covered", pid=process.pid, error=str(error))

    def _lift_all(self, fresh: Mapping[TrackedProcess, _Survey]) -> None:
        """Have every page count as written of what is tracked only now; or track none of that process."""
        for process, ahead in fresh.items():
            watched = self._watched[process]
            if watched.userfault is None:
                continue
            try:
                for start, end in watched.userfault.covered:
                    process.book.forget_range(start, end)
                with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
                    if not watched.userfault.lift(pagemap):
                        continue
                    if not len(ahead.tracked) and len(untracked(pagemap, ahead.fresh)) == len(ahead.fresh):
                        watched.give_up(process)  # it is of another address space: a program was executed
            except CaptureError as error:
                log.debug("tracking.not_lifted", pid=process.pid, error=str(error))

    def _copy(
        self,
        surveys: Mapping[TrackedProcess, _Survey],
        wanted: Mapping[TrackedProcess, PageSet],
        hasher: PageHasher,
        writer: LayerWriter,
        process: TrackedProcess,
    ) -> None:
        process.copy(hasher, writer, wanted[process], surveys[process].tracked)
