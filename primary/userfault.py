"""Tracking of writes by userfaultfd, in asynchronous write-protect mode (Linux 6.12.11 and newer).

In: a userfaultfd of a process's address space (`primary.injection`), and the process's mappings. Out: which
mappings are tracked, and which of them only since now. The kernel lets every write through and remembers it;
`primary.pages` asks which pages were written.

What must hold: a mapping that was not tracked a moment ago has pages of which nothing is known, whatever
stood at its place before (munmap and mmap, mremap, exec, fork). `cover` returns those mappings; its caller
forgets their pages. When the descriptor closes, with the agent or before, everything reads as written.

A process with files open for direct I/O is protected within freezes only, when no read is in flight: what a
device writes into a page that was protected after it was given the page, shows nowhere.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import platform
import re
import struct
import time
from collections.abc import Callable, Iterable, Mapping
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
from primary.book import PageBook
from primary.freezer import StandStill
from primary.injection import take_userfaultfd
from primary.layers import LayerWriter
from primary.page_set import NO_PAGES, PageSet
from primary.pages import OWNED, VMA, Space, is_tracked, pages_in, reads_directly
from primary.process import TrackedProcess, open_of, resident_pages

log = structlog.get_logger(__name__)

_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_FEATURES: Final = 1 << 15 | 1 << 13 | 1 << 12
"""WP_ASYNC, WP_UNPOPULATED, WP_HUGETLBFS_SHMEM (<linux/userfaultfd.h>)."""
_MODE_WRITE_PROTECT: Final = 2
_USER_MODE_ONLY: Final = 1
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282}

_TRACK_AGAIN_S: Final = 5.0
_SMALL_PAGES: Final = 1024
"""A process of fewer pages is captured whole at its first freeze (3 ms at most), and tracked from then on."""
_LIFT_TRIES: Final = 4
_ROUNDS: Final = 4
_FEW_PAGES: Final = 512
"""No pre-copy for so few: copying them beside CRIU takes less than 2 ms."""

_T = TypeVar("_T")
_Range = tuple[int, int]
"""First address of a mapping, and its end."""


class Userfault:
    """A userfaultfd that was taken out of a process; tracks until `close`."""

    def __init__(self, descriptor: int) -> None:
        """Own the descriptor. Raises CaptureError if the kernel lacks the asynchronous mode."""
        self._descriptor = descriptor
        self._refused: set[_Range] = set()
        self._unlifted: list[_Range] = []
        request = array.array("Q", [_UFFD_API, _FEATURES, 0])
        try:
            fcntl.ioctl(descriptor, _UFFDIO_API, request)
        except OSError as error:
            os.close(descriptor)
            raise CaptureError(f"writes cannot be tracked by userfaultfd here: {error.strerror}") from error

    def fresh(self, pagemap: int, vmas: NDArray[np.void]) -> list[_Range]:
        """Return the owned mappings that are not tracked; `pagemap` is /proc/PID/pagemap, open."""
        owned = vmas[(vmas["flags"] & OWNED) != 0][["start", "end"]].tolist()
        fresh = [(start, end) for start, end in owned if not is_tracked(pagemap, start)]
        self._refused &= set(fresh)
        return fresh

    def coverable(self, fresh: Iterable[_Range]) -> int:
        """Return how many pages there may be in those of the mappings that the kernel did not refuse."""
        return sum((end - start) // PAGE_BYTES for start, end in fresh if (start, end) not in self._refused)

    def cover(self, pagemap: int, vmas: NDArray[np.void]) -> tuple[list[_Range], bool]:
        """Track all owned mappings that can be. `lift` comes next, before anything is read.

        Returns those that were not tracked before, tracked now or not, and whether any is tracked now. If
        none is, the descriptor is another address space's: the process has executed a program.

        The process stands still since `vmas` was read. Else a mapping that grew meanwhile would be tracked in
        part: the kernel makes two of it, and mremap(2) of what the process knows as one fails, or stops
        half-way.
        """
        fresh = self.fresh(pagemap, vmas)
        for each in fresh:
            if self._register(*each):
                self._unlifted.append(each)
            else:
                self._refused.add(each)
        owned = int(((vmas["flags"] & OWNED) != 0).sum())
        return fresh, owned > len(fresh) or any(is_tracked(pagemap, start) for start, _ in fresh)

    def _register(self, start: int, end: int) -> bool:
        request = bytearray(struct.pack("<QQQQ", start, end - start, _MODE_WRITE_PROTECT, 0))
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_REGISTER, request)
        except OSError:
            return False  # another userfaultfd's, a device's, or gone since: it stays untracked, so dirty
        return True

    def lift(self, pagemap: int, space: Space) -> bool:
        """Lift what protection there was where tracking began: every page there counts as written.

        A mapping that is not tracked may have protected pages all the same, which pass for unwritten whatever
        is written to them: where mremap(2) makes one mapping of what it moves and of a neighbour, the kernel
        (6.18, for one) ends the tracking of both, and lifts the protection of what it moves only.

        What is not tracked any more needs nothing. False if the rest changes too fast: close, and begin anew.
        """
        for _ in range(_LIFT_TRIES):
            self._unlifted = [each for each in self._unlifted if not self._is_lifted(*each)]
            if not self._unlifted:
                return True
            tracked = [
                (start, end)
                for start, end in space.mappings()[["start", "end"]].tolist()
                if is_tracked(pagemap, start)
            ]
            self._unlifted = [
                (max(start, first), min(end, last))
                for start, end in tracked
                for first, last in self._unlifted
                if start < last and first < end
            ]
        return not self._unlifted

    def _is_lifted(self, start: int, end: int) -> bool:
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_WRITEPROTECT, struct.pack("<QQQ", start, end - start, 0))
        except OSError:
            return False  # not all that is mapped there is tracked
        return True

    @property
    def is_sound(self) -> bool:
        """Whether a page that counts as unwritten is: nothing is left to `lift`."""
        return not self._unlifted

    def close(self) -> None:
        """Stop tracking. Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


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

    def reads_directly(self, pid: int) -> bool:
        """Whether devices may write into its memory past the tracking.

        Who opens such a file for a moment does so again, and perhaps between two looks.
        """
        self.direct = self.direct or reads_directly(pid)
        return self.direct

    def give_up(self, process: TrackedProcess) -> None:
        """Stop tracking it, and believe nothing; it is taken up anew."""
        if self.userfault is not None:
            self.userfault.close()
            self.userfault = None
        process.forget_all()


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What is to be copied of one process, after it was protected."""

    wanted: PageSet
    tracked: NDArray[np.void]
    """The mappings (`VMA`) that they are in."""
    fresh_pages: int
    """How many there may be in mappings that are not tracked yet."""

    def shrinks(self, before: int) -> bool:
        """Whether another round pays: it is the first (0 `before`), or there was much less to copy."""
        return len(self.wanted) > _FEW_PAGES and (not before or len(self.wanted) <= before // 2)


class UserfaultTracker:
    """A `primary.tracking.Tracker`: one userfaultfd for each process, taken out of it."""

    name: Literal["userfaultfd"] = "userfaultfd"
    copies_ahead = True

    def __init__(self, stand_still: StandStill) -> None:
        self._stand_still = stand_still
        self._watched: dict[TrackedProcess, _Watched] = {}

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
        self, processes: Iterable[TrackedProcess], hasher: PageHasher, writer: LayerWriter
    ) -> None:
        """See `primary.tracking.Tracker.copy_ahead`: protect, be sure that nobody writes past that, copy.

        What is not tracked yet is from here on, and protected in the next round.
        """
        todo = dict.fromkeys(processes, 0)
        try:
            for _ in range(_ROUNDS):
                found = await in_thread(self._each, self._protect, list(todo))
                fresh = [process for process, ahead in found.items() if ahead.fresh_pages]
                if sum(len(ahead.wanted) + ahead.fresh_pages for ahead in found.values()) <= _FEW_PAGES:
                    return
                still = await self._cover_standing(fresh)
                if not still:
                    return
                await in_thread(self._each, self._lift, fresh)
                copy = partial(self._copy, found, hasher, writer)
                await in_thread(self._each, copy, [process for process in found if process.pid in still])
                todo = {
                    process: 0 if ahead.fresh_pages else len(ahead.wanted)
                    for process, ahead in found.items()
                    if process.pid in still and (ahead.fresh_pages or ahead.shrinks(todo[process]))
                }
        finally:
            for process, watched in self._watched.items():
                if watched.userfault is not None and not watched.userfault.is_sound:
                    watched.give_up(process)

    async def _cover_standing(self, fresh: Iterable[TrackedProcess]) -> frozenset[int]:
        """Track all of the processes' memory while they stand still; return who stood still (PIDs).

        What was under way before is over then. Who writes into memory by a system call (process_vm_writev,
        `/proc/PID/mem`, O_DIRECT) looks a page up, and writes to it later; if the page was protected in
        between, without a trace. A task that stands still is in no such call. What is read of others might be
        written to unseen.
        """
        still: frozenset[int] = frozenset()

        def cover(pids: frozenset[int]) -> None:
            nonlocal still
            self._each(self._cover, [process for process in fresh if process.pid in pids])
            still = pids

        try:
            await self._stand_still(cover)
        except CaptureError as error:  # it may not have stood still: what was begun is given up
            log.info("tracking.no_stop", reason=error.message)
            return frozenset()
        return still

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

    def _protect(self, process: TrackedProcess) -> _Ahead:
        """Find what was written where writes are tracked, and protect it."""
        watched = self._watched.get(process)
        ahead = _Ahead(NO_PAGES, np.empty(0, dtype=VMA), 0)
        space, book = process.space, process.book
        if watched is None or watched.userfault is None:
            return ahead
        vmas = space.mappings()
        with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
            fresh = watched.userfault.fresh(pagemap, vmas)
            _forget(book, fresh)
            fresh_pages = watched.userfault.coverable(fresh)
            space.protects = watched.reads_directly(process.pid)
            tracked = vmas[((vmas["flags"] & OWNED) != 0) & ~np.isin(vmas["start"], [at for at, _ in fresh])]
            wanted = book.unknown
            if not space.protects:
                try:
                    runs = space.written(pagemap, tracked)
                except BaseException:  # some may be protected now that nobody was told of
                    book.forget_all()
                    raise
                written = pages_in(runs)
                book.expect(written)
                book.forget(written)
                wanted |= written
                if watched.reads_directly(process.pid):  # since when is not known: nothing of this round is
                    space.protects = True
                    book.forget_all()
                    return ahead
            with open_of(process.pid, "mem", os.O_RDONLY) as memory:
                space.settle(pagemap, memory, tracked)
        return _Ahead(wanted & pages_in(tracked), tracked, fresh_pages)

    def _cover(self, process: TrackedProcess) -> None:
        """Track what is not; it stands still meanwhile."""
        watched = self._watched[process]
        if watched.userfault is None:
            return
        with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
            fresh, tracked = watched.userfault.cover(pagemap, process.space.mappings())
            _forget(process.book, fresh)
            if not tracked:  # it has executed another program since
                watched.give_up(process)

    def _lift(self, process: TrackedProcess) -> None:
        """Make every page count as written of what is tracked only now."""
        watched = self._watched[process]
        if watched.userfault is None:
            return
        with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
            if not watched.userfault.lift(pagemap, process.space):
                watched.give_up(process)

    def _copy(
        self,
        found: Mapping[TrackedProcess, _Ahead],
        hasher: PageHasher,
        writer: LayerWriter,
        process: TrackedProcess,
    ) -> None:
        process.copy(hasher, writer, found[process].wanted, found[process].tracked)


def _forget(book: PageBook, ranges: Iterable[_Range]) -> None:
    for start, end in ranges:
        book.forget_range(start, end)


def _flaw(release: str) -> str:
    """Say what is wrong with the tracking of a Linux of that release; empty: nothing that is known.

    Before 6.9 the scan for what is written took some written pages that were swapped out for protected ones
    (2c7ad9a590d1), and closing a userfaultfd left pages protected (c88033efe9a3); before 6.12.11 and 6.13, so
    did moving them (0cef0bb836e3). Such a page would count as clean for ever. Distributors may have mended
    it earlier: that is not told.
    """
    numbers = [int(number) for number in re.findall(r"\d+", release.partition("-")[0])[:3]]
    if [*numbers, 0, 0, 0][:3] >= [6, 12, 11]:
        return ""
    return f"Linux {release} loses track of pages that move or are swapped out: 6.12.11 and newer do not"


def problem() -> str:
    """Say why writes cannot be tracked by userfaultfd on this kernel; empty if they can."""
    if flaw := _flaw(platform.release()):
        return flaw
    number = _SYSCALL.get(platform.machine())
    if number is None:
        return f"userfaultfd on {platform.machine()} is not known here"
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(
        number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
    )
    if descriptor < 0:
        return f"userfaultfd: {os.strerror(ctypes.get_errno())}"
    try:
        Userfault(descriptor).close()
    except CaptureError as error:
        return error.message
    return ""
