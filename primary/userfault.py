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
from bisect import bisect_left
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import CaptureError, OutliveError
from common.identity import PageHasher
from common.threads import in_thread
from primary.freezer import StandStill
from primary.injection import take_userfaultfd
from primary.layers import LayerWriter
from primary.pages import OWNED, VMA, Space, expand_runs, is_tracked, reads_directly
from primary.process import TrackedProcess, open_of, resident_pages

log = structlog.get_logger(__name__)

_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_FEATURES: Final = 1 << 15 | 1 << 13 | 1 << 12
"""WP_ASYNC, WP_UNPOPULATED, WP_HUGETLBFS_SHMEM (<linux/userfaultfd.h>)."""
_MODE_WRITE_PROTECT: Final = 2
_USER_MODE_ONLY: Final = 1
_USER_SPACE_END: Final = 1 << 63
"""What is above, [vsyscall], is the kernel's own."""
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282}

_TRACK_AGAIN_S: Final = 5.0
_SMALL_PAGES: Final = 1024
"""A process of fewer pages is captured whole at its first freeze (3 ms at most), and tracked from then on."""
_ROUNDS: Final = 3
_FEW_PAGES: Final = 512
"""No pre-copy for so few: copying them beside CRIU takes less than 2 ms."""

_Protected = tuple[NDArray[np.uint64], NDArray[np.void]]
"""Page numbers that are to be copied, and the mappings (`VMA`) that are ours."""


class Userfault:
    """A userfaultfd that was taken out of a process; tracks until `close`."""

    def __init__(self, descriptor: int) -> None:
        """Own the descriptor. Raises CaptureError if the kernel lacks the asynchronous mode."""
        self._descriptor = descriptor
        self._refused: set[tuple[int, int]] = set()
        request = array.array("Q", [_UFFD_API, _FEATURES, 0])
        try:
            fcntl.ioctl(descriptor, _UFFDIO_API, request)
        except OSError as error:
            os.close(descriptor)
            raise CaptureError(f"writes cannot be tracked by userfaultfd here: {error.strerror}") from error

    def cover(self, pagemap: int, vmas: NDArray[np.void]) -> tuple[list[tuple[int, int]], bool]:
        """Track all owned mappings that can be; `pagemap` is /proc/PID/pagemap, open.

        Returns the ranges that were not tracked before, tracked now or not, and whether any is tracked now.
        If none is, the descriptor is another address space's: the process has executed a program.

        No mapping is ever tracked in part, not even one that grew since `vmas` was read: the kernel would
        make two of it, and mremap(2) of what the process knows as one would fail, or stop half-way.
        """
        owned = [(start, end) for start, end, flags, _ in vmas.tolist() if flags & OWNED]
        fresh = [(start, end) for start, end in owned if not is_tracked(pagemap, start)]
        self._refused &= set(fresh)
        starts = [start for start, _ in fresh]
        for first, last in _rooms(vmas, self._refused):
            within = fresh[bisect_left(starts, first) : bisect_left(starts, last)]
            if within and not self._register(first, last):
                # One among them cannot be (MAP_DROPPABLE, for one): it bounds the rooms from now on.
                self._refused |= {each for each in within if not self._register(*each)}
        tracked = len(owned) > len(fresh) or any(is_tracked(pagemap, start) for start, _ in fresh)
        return fresh, tracked

    def _register(self, start: int, end: int) -> bool:
        request = bytearray(struct.pack("<QQQQ", start, end - start, _MODE_WRITE_PROTECT, 0))
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_REGISTER, request)
        except OSError:
            return False  # another userfaultfd's, a device's, or gone since: it stays untracked, so dirty
        return True

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


class UserfaultTracker:
    """A `primary.tracking.Tracker`: one userfaultfd for each process, taken out of it."""

    name: Literal["userfaultfd"] = "userfaultfd"
    copies_ahead = True

    def __init__(self, stand_still: StandStill | None = None) -> None:
        """Without `stand_still`, what is tracked is written to by stores only, by no system call."""
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
        """See `primary.tracking.Tracker.copy_ahead`: protect, be sure that nobody writes past that, copy."""
        todo = dict.fromkeys(processes, 0)
        for _ in range(_ROUNDS):
            protected = await in_thread(self._protect_all, list(todo))
            pages = sum(len(wanted) for wanted, _ in protected.values())
            if not pages:
                return
            if self._stand_still is not None and not await _all_came_by(self._stand_still, pages):
                return
            await in_thread(self._copy_all, protected, hasher, writer)
            todo = {
                process: len(wanted)
                for process, (wanted, _) in protected.items()
                if len(wanted) > _FEW_PAGES and (not todo[process] or len(wanted) <= todo[process] // 2)
            }

    def _protect_all(self, processes: list[TrackedProcess]) -> dict[TrackedProcess, _Protected]:
        found = {}
        for process in processes:
            try:
                found[process] = self._protect(process)
            except CaptureError as error:
                if process.has_memory:
                    raise
                log.debug("capture.process_ended", pid=process.pid, error=str(error))
        return found

    def _copy_all(
        self, protected: dict[TrackedProcess, _Protected], hasher: PageHasher, writer: LayerWriter
    ) -> None:
        for process, (wanted, owned) in protected.items():
            try:
                process.copy(hasher, writer, wanted, owned)
            except CaptureError as error:
                if process.has_memory:
                    raise
                log.debug("capture.process_ended", pid=process.pid, error=str(error))

    def _protect(self, process: TrackedProcess) -> _Protected:
        """Find what was written, and protect it; return what is to be copied, and its mappings."""
        watched = self._watched.get(process)
        nothing = np.empty(0, dtype=np.uint64), np.empty(0, dtype=VMA)
        space, book = process.space, process.book
        if watched is None or watched.userfault is None:
            return nothing
        vmas = space.mappings()
        with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
            fresh, tracked = watched.userfault.cover(pagemap, vmas)
            for start, end in fresh:
                book.forget_range(start, end)
            if not tracked:  # it has executed another program since
                watched.userfault.close()
                watched.userfault = None
                book.forget_all()
                return nothing
            space.protects = watched.reads_directly(process.pid)
            owned = vmas[(vmas["flags"] & OWNED) != 0]
            wanted = book.numbers[~book.known]
            if not space.protects:
                try:
                    runs = space.written(pagemap, owned)
                except BaseException:  # some may be protected now that nobody was told of
                    book.forget_all()
                    raise
                written = np.unique(expand_runs(runs))
                book.expect(written)
                book.forget(written)
                wanted = np.union1d(wanted, written)
                if watched.reads_directly(process.pid):  # since when is not known: nothing of this round is
                    space.protects = True
                    book.forget_all()
                    return nothing
            with open_of(process.pid, "mem", os.O_RDONLY) as memory:
                space.settle(pagemap, memory, owned)
        return wanted, owned


async def _all_came_by(stand_still: StandStill, pages: int) -> bool:
    """Have the workload stand still for a moment, so that what was under way at the protection is over.

    Who writes into memory by a system call (process_vm_writev, `/proc/PID/mem`, O_DIRECT) looks a page up,
    and writes to it later; if the page was protected in between, without a trace. A task that stands still is
    in no such call. False if this was not done: what is read then might be written to unseen.
    """
    if pages <= _FEW_PAGES:
        return False
    try:
        await stand_still(_nothing)
    except CaptureError as error:
        log.info("tracking.no_stop", reason=error.message)
        return False
    return True


def _nothing() -> None:
    """Do nothing: to stand still is all that is wanted."""


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


def _rooms(vmas: NDArray[np.void], refused: Set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges that hold owned mappings and no others, each from one of the others to the next.

    What the kernel `refused` to track is one of the others.
    """
    rooms: list[tuple[int, int]] = []
    before = first = last = 0
    for start, end, flags, _ in vmas.tolist():
        if flags & OWNED and (start, end) not in refused:
            first = first or before or start
            last = end
        elif start < _USER_SPACE_END:
            if first:
                rooms.append((first, start))
            before, first = end, 0
    if first:
        rooms.append((first, last))
    return rooms


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
