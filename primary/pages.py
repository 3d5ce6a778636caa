"""The pages of running and frozen processes: what is there, what was written, and copies of it.

In: PIDs, and which pages' content is known already. Out: runs of pages, and their bytes. All of it is done
by `native/pages.c` (`native/scan.c` has the rules on what counts as dirty); this module lays out memory for
it ahead of time, so that inside a freeze it is a single call that allocates nothing.

    running: `Space.mappings`, `Space.written` (finds and protects), `read_running`
    frozen:  `FrozenCall`, of all processes at once: `run_early` while CRIU is at work, then `run`
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import CaptureError
from common.model import PAGE_BYTES
from primary.frames import Frames
from primary.native import built
from primary.page_set import PageSet

OWNED: Final = 1
FILE: Final = 2
READABLE: Final = 4
EXECUTABLE: Final = 8
"""Flags of a mapping, as `native/maps.h` has them."""

DIRTY: Final = 1
UNREADABLE: Final = 2
WRITTEN: Final = 4
"""Flags of a run, as `native/space.h` has them; the last one is told by scans with `Frames` only."""

RUN: Final = np.dtype([("start", "<u8"), ("end", "<u8"), ("flags", "<u4"), ("unused", "<u4")])
"""Neighbouring pages that are treated alike: bytes from `start` to `end` (exclusive)."""
VMA: Final = RUN

_PROTECT: Final = 1
_STALE: Final = 2
_FIRST_TEXT_BYTES: Final = 64 << 10
_FIRST_VMAS: Final = 1024
_USUAL_LINE_BYTES: Final = 100
_TORN_READS: Final = 5
_FIRST_RUNS: Final = 4096


class _Space(ctypes.Structure):
    """`struct space` of native/space.h."""

    _fields_ = (
        ("pid", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("options", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("known", ctypes.c_void_p),
        ("known_pairs", ctypes.c_uint64),
        ("runs", ctypes.c_void_p),
        ("runs_room", ctypes.c_uint64),
        ("runs_count", ctypes.c_uint64),
        ("dirty_pages", ctypes.c_uint64),
        ("present_pages", ctypes.c_uint64),
        ("content_at", ctypes.c_uint64),
        ("text", ctypes.c_void_p),
        ("text_room", ctypes.c_uint64),
        ("vmas", ctypes.c_void_p),
        ("vmas_room", ctypes.c_uint64),
        ("vmas_count", ctypes.c_uint64),
        ("early", ctypes.c_void_p),
        ("soft", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built("outlive-pages.so")), use_errno=True)
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    library.outlive_capture.argtypes = [pointer, u64, pointer, u64]
    library.outlive_capture.restype = ctypes.c_int64
    library.outlive_early.argtypes = [pointer, u64, pointer, u64]
    library.outlive_early.restype = ctypes.c_int64
    library.outlive_maps.argtypes = [pointer]
    library.outlive_maps.restype = ctypes.c_int64
    library.outlive_protect.argtypes = [
        ctypes.c_int,
        u64,
        u64,
        ctypes.c_int,
        ctypes.c_uint32,
        pointer,
        u64,
        pointer,
        pointer,
    ]
    library.outlive_untracked.argtypes = [ctypes.c_int, pointer, u64, pointer]
    library.outlive_untracked.restype = None
    library.outlive_count.argtypes = [ctypes.c_int, pointer, u64, u64]
    library.outlive_count.restype = ctypes.c_int64
    library.outlive_written.argtypes = [ctypes.c_int, pointer, u64, u64, ctypes.c_int]
    library.outlive_written.restype = ctypes.c_int64
    library.outlive_lift.argtypes = [ctypes.c_int, ctypes.c_int, u64, u64]
    library.outlive_read.argtypes = [ctypes.c_int, pointer, u64, pointer, pointer]
    library.outlive_read.restype = ctypes.c_int64
    library.outlive_settle.argtypes = [ctypes.c_int, ctypes.c_int, u64, u64]
    library.outlive_reads_directly.argtypes = [ctypes.c_int]
    library.outlive_learn(1)
    return library


def load() -> None:
    """Load the library now, not inside a freeze. Raises UnsupportedError if it was not built."""
    _library()


def learn(*, trust: bool) -> bool:
    """Find out again what scans may rely on in this kernel, or rely on as little as in any.

    Returns whether it reports what has no page table. Loading the library finds out by itself.
    """
    return bool(_library().outlive_learn(trust))


class Space:
    """Room for what is found out about one process; used by one thread at a time."""

    def __init__(self, pid: int, frames: Frames | None = None) -> None:
        """With `frames`, it is scanned by soft-dirty bits, else by PAGEMAP_SCAN."""
        self.pid = pid
        self.frames = frames
        self.protects = False
        """Protect what is written within the freeze: for processes that devices may write into.

        With `frames`: clear the soft-dirty bits after the scan. The process must stand still then, and there
        must be room for its frames.
        """
        self._known = np.empty(0, dtype=np.uint64)
        self._text = _touched(_FIRST_TEXT_BYTES, np.uint8)
        self._vmas = _touched(_FIRST_VMAS, VMA)
        self._runs = _touched(_FIRST_RUNS, RUN)
        self._native = _Space()
        self._base = 0
        self.early: Early | None = None
        """What the first call of a freeze finds, if it may be about this process."""

    def knows(self, pairs: NDArray[np.uint64]) -> None:
        """Say of which pages the content is known: first byte and end of each range; shape (2n,)."""
        self._known = np.ascontiguousarray(pairs, dtype=np.uint64)

    def mappings(self) -> NDArray[np.void]:
        """Read the process's mappings: `VMA`, in order of address. Raises CaptureError if it is gone."""
        tries_left = _TORN_READS
        while True:
            count = _library().outlive_maps(ctypes.addressof(self.prepared()))
            if count >= 0:
                found: NDArray[np.void] = self._vmas[:count].copy()
                if 2 * count > len(self._vmas):  # so that a freeze finds enough
                    self.grow(errno.EMLINK)
                if 2 * count * _USUAL_LINE_BYTES > len(self._text):
                    self.grow(errno.E2BIG)
                return found
            if count == -errno.EBADMSG and tries_left:  # they changed meanwhile
                tries_left -= 1
            elif not self.grow(-count):
                raise CaptureError(
                    f"the mappings of process {self.pid} cannot be read: {os.strerror(-count)}"
                )

    def grow(self, error: int) -> bool:
        """Take twice the room of what was too little; False if `error` is of another kind. Never frozen."""
        if error == errno.E2BIG:
            self._text = _touched(len(self._text) * 2, np.uint8)
        elif error == errno.EMLINK:
            self._vmas = _touched(len(self._vmas) * 2, VMA)
        elif error == errno.ENOBUFS:
            self._runs = _touched(len(self._runs) * 2, RUN)
        elif error == errno.ENOSPC and self.frames is not None:
            self.frames.grow()
        else:
            return False
        return True

    def written(self, pagemap: int, vmas: NDArray[np.void]) -> NDArray[np.void]:
        """Find the pages written since they were last protected in `vmas`, and protect them in the same step.

        `pagemap` is /proc/PID/pagemap, open. What is not tracked is passed over. Raises CaptureError.
        """
        found: list[NDArray[np.void]] = []
        runs = np.empty(4096, dtype=RUN)
        count, reached = ctypes.c_uint64(0), ctypes.c_uint64(0)
        for start, end, flags, _ in vmas.tolist():
            at, run_flags = start, 0 if flags & READABLE else UNREADABLE
            while at < end:
                failure = _library().outlive_protect(
                    pagemap,
                    at,
                    end,
                    flags & FILE,
                    run_flags,
                    runs.ctypes.data,
                    len(runs),
                    ctypes.addressof(count),
                    ctypes.addressof(reached),
                )
                if failure == errno.ENOBUFS:
                    found.append(runs[: count.value].copy())
                    count.value = 0
                elif failure:
                    raise CaptureError(
                        f"writes of process {self.pid} cannot be tracked: {os.strerror(failure)}"
                    )
                at = reached.value
        found.append(runs[: count.value].copy())
        return np.concatenate(found)

    def settle(self, pagemap: int, memory: int, vmas: NDArray[np.void]) -> None:
        """Touch what tracking left of dropped pages in file mappings; both files of /proc/PID are open."""
        for start, end, flags, _ in vmas.tolist():
            if flags & FILE:
                _library().outlive_settle(pagemap, memory, start, end)

    def prepared(self, base: int = 0) -> _Space:
        """Lay out what the library is given; `base` is the page where the rest of the buffer begins."""
        native, self._base = self._native, base
        native.pid = self.pid
        native.options = _PROTECT if self.protects else 0
        native.known, native.known_pairs = self._known.ctypes.data, len(self._known) // 2
        native.runs, native.runs_room = self._runs.ctypes.data, len(self._runs)
        native.text, native.text_room = self._text.ctypes.data, len(self._text)
        native.vmas, native.vmas_room = self._vmas.ctypes.data, len(self._vmas)
        native.early = None
        native.soft = self.frames.prepared(clears=self.protects) if self.frames is not None else None
        if self.early is not None:
            self.early.leads_to(native)
        return native

    def took(self, native: _Space) -> None:
        """Remember what the library found."""
        self._native = native
        if self.frames is not None and self.protects:
            if native.error:  # the bits may be cleared all the same
                self.frames.forget()
            else:
                self.frames.cleared()

    @property
    def error(self) -> int:
        """What the last freeze's capture of this process failed with; 0 if it did not."""
        return int(self._native.error)

    @property
    def runs(self) -> NDArray[np.void]:
        """All present pages at the last freeze: `RUN`, ascending. A view, until the next freeze."""
        return self._runs[: self._native.runs_count]

    @property
    def dirty_pages(self) -> int:
        """How many of them are dirty."""
        return int(self._native.dirty_pages)

    @property
    def present_pages(self) -> int:
        """How many pages it has, dirty or not."""
        return int(self._native.present_pages)

    @property
    def content_at(self) -> int:
        """Number of the first one in the buffer."""
        return self._base + int(self._native.content_at)

    def prepared_early(self) -> _Space:
        """Lay out what the library is given for the first of both calls of a freeze."""
        if self.early is None:
            raise RuntimeError(f"nothing is laid out for process {self.pid}")
        return self.early.prepared(self.prepared())

    def make_room(self, runs: int, *, early: bool = False) -> None:
        """Be ready for a freeze, with room for that many runs, and a quarter more than the last one found.

        With `early`, its first call may be about this process.
        """
        wanted = max(runs, int(self._native.runs_count) * 5 // 4, _FIRST_RUNS)
        if wanted > len(self._runs) or (2 * wanted < len(self._runs) and not self.error):
            self._runs = _touched(wanted * 5 // 4, RUN)
        found, self.early = self.early, None
        if early:
            found = found or Early()
            found.make_room(self.prepared())
            self.early = found
        if self.frames is not None:
            self.frames.make_room(self.present_pages * 5 // 4 + 1024, len(self._runs) // 2, len(self._vmas))


class Early:
    """What was found and copied of one process while CRIU was at work, and room for it."""

    def __init__(self) -> None:
        self._native = _Space()
        self._ran = False
        self._vmas, self._runs = np.empty(0, dtype=VMA), np.empty(0, dtype=RUN)

    def make_room(self, native: _Space) -> None:
        """Be ready for a freeze, with as much room as `native` has; forget what was found."""
        self._native, self._ran = _Space(), False
        if native.vmas_room > len(self._vmas):
            self._vmas = _touched(native.vmas_room, VMA)
        if native.runs_room != len(self._runs):
            self._runs = _touched(native.runs_room, RUN)

    def prepared(self, native: _Space) -> _Space:
        """Lay out what the library is given: `native`, with room of our own.

        Until `took`, all that is protected counts as lost.
        """
        own = _Space.from_buffer_copy(native)
        own.options, own.early, own.soft = 0, None, None
        own.runs, own.runs_room = self._runs.ctypes.data, len(self._runs)
        own.vmas, own.vmas_room = self._vmas.ctypes.data, len(self._vmas)
        self._native, self._ran = _Space(error=errno.EIO, options=_STALE), True
        return own

    def took(self, native: _Space) -> None:
        """Remember what the library found."""
        self._native = native

    def leads_to(self, native: _Space) -> None:
        """Tell the call at the end what was found."""
        if self.is_lost:
            native.known_pairs = 0
        elif self._ran and not self._native.error:
            native.early = ctypes.addressof(self._native)

    @property
    def is_lost(self) -> bool:
        """Whether pages were protected of which it is not known what they hold."""
        return self._ran and bool(self._native.error) and bool(self._native.options & _STALE)

    @property
    def copied(self) -> NDArray[np.void]:
        """What was dirty, and copied: `RUN`, ascending. A view, until the next freeze."""
        runs: NDArray[np.void] = self._runs[: self._native.runs_count if not self._native.error else 0]
        dirty: NDArray[np.void] = runs[(runs["flags"] & DIRTY) != 0]
        return dirty

    @property
    def content_at(self) -> int:
        """Number of the first one in the buffer."""
        return int(self._native.content_at)


class FrozenBuffer:
    """Where dirty pages are copied to within a freeze: touched beforehand, used again and again."""

    def __init__(self, pages: int) -> None:
        self.resize(pages)

    def resize(self, pages: int) -> None:
        """Have room for that many pages; what is in it is lost."""
        self._memory = mmap.mmap(
            -1, max(pages, 1) * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        )
        self.pages = pages

    def content(self, start: int, pages: int) -> memoryview:
        """View pages of it."""
        return memoryview(self._memory)[start * PAGE_BYTES : (start + pages) * PAGE_BYTES]

    @property
    def address(self) -> int:
        """Where it is."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class FrozenCall:
    """The prepared calls for all processes of a tree; nothing else is done inside a freeze."""

    def __init__(self, buffer: FrozenBuffer) -> None:
        self._buffer = buffer
        self.copied_early = 0
        """How many pages `run_early` has copied."""

    def run_early(self, spaces: Sequence[Space], room: int) -> None:
        """Protect and copy what is dirty in memory that CRIU leaves alone, `room` pages at most.

        All of the processes must be tracked by userfaultfd, and planned for it. For any thread; before `run`.
        """
        natives = (_Space * len(spaces))(*(space.prepared_early() for space in spaces))
        self.copied_early = int(
            _library().outlive_early(ctypes.addressof(natives), len(spaces), self._buffer.address, room)
        )
        for space, native in zip(spaces, natives, strict=True):
            if space.early is not None:
                space.early.took(native)

    def run(self, spaces: Sequence[Space], room: int | None = None) -> int:
        """Capture the frozen processes; return how many dirty pages they have, without what was copied early.

        They stand in the buffer, unless they and those are more than `room` (without it: the whole buffer);
        then nothing was copied now.
        """
        room = self._buffer.pages if room is None else min(room, self._buffer.pages)
        natives = (_Space * len(spaces))(*(space.prepared(self.copied_early) for space in spaces))
        dirty = int(
            _library().outlive_capture(
                ctypes.addressof(natives),
                len(spaces),
                self._buffer.address + self.copied_early * PAGE_BYTES,
                room - self.copied_early,
            )
        )
        for space, native in zip(spaces, natives, strict=True):
            space.took(native)
        return dirty

    def begin(self) -> None:
        """Begin a freeze: the buffer is used anew."""
        self.copied_early = 0


def read_running(pid: int, runs: NDArray[np.void], into: memoryview) -> NDArray[np.bool_]:
    """Copy the pages of `runs` of a running process into `into`, one after the other.

    Returns for each page whether it could be read: some vanish meanwhile. Raises CaptureError if the process
    is gone.
    """
    pages = int(((runs["end"] - runs["start"]) // PAGE_BYTES).sum())
    good = np.zeros(pages, dtype=np.uint8)
    runs = np.ascontiguousarray(runs)
    target = (ctypes.c_char * (pages * PAGE_BYTES)).from_buffer(into)
    got = _library().outlive_read(
        pid, runs.ctypes.data, len(runs), ctypes.addressof(target), good.ctypes.data
    )
    if got < 0:
        raise CaptureError(f"process {pid} cannot be read: {os.strerror(-got)}")
    return good.astype(np.bool_)


def untracked(pagemap: int, vmas: NDArray[np.void]) -> NDArray[np.void]:
    """Return those of the mappings that are not tracked; `pagemap` is /proc/PID/pagemap, open.

    What cannot be asked is among them; what is gone is not.
    """
    vmas = np.ascontiguousarray(vmas)
    marks = np.empty(len(vmas), dtype=np.bool_)
    _library().outlive_untracked(pagemap, vmas.ctypes.data, len(vmas), marks.ctypes.data)
    left: NDArray[np.void] = vmas[marks]
    return left


def count_pages(pagemap: int, vmas: NDArray[np.void], most: int) -> int:
    """Return how many pages with content there are in the mappings, or `most`. Raises CaptureError."""
    vmas = np.ascontiguousarray(vmas)
    count = int(_library().outlive_count(pagemap, vmas.ctypes.data, len(vmas), most))
    if count < 0:
        raise CaptureError(f"pages cannot be counted: {os.strerror(-count)}")
    return count


def count_written(pagemap: int, vmas: NDArray[np.void], most: int) -> int:
    """Return how many pages were written in tracked mappings since they were protected, or `most`.

    Nothing is protected. Raises CaptureError.
    """
    vmas = np.ascontiguousarray(vmas)
    for exact in (False, True):  # the first count is never too small, and enough if it is small
        count = int(_library().outlive_written(pagemap, vmas.ctypes.data, len(vmas), most, exact))
        if count < 0:
            raise CaptureError(f"written pages cannot be counted: {os.strerror(-count)}")
        if count < most:
            break
    return count


def lift(userfault: int, pagemap: int, start: int, end: int) -> bool:
    """Have every page of what is tracked between two addresses count as written; False if that failed."""
    return bool(_library().outlive_lift(userfault, pagemap, start, end) == 0)


def reads_directly(pid: int) -> bool:
    """Tell whether a process has files open with O_DIRECT. Raises CaptureError if it is gone."""
    found = _library().outlive_reads_directly(pid)
    if found < 0:
        raise CaptureError(f"the open files of process {pid} cannot be read: {os.strerror(-found)}")
    return bool(found)


def pages_in(runs: NDArray[np.void]) -> PageSet:
    """Return the pages of runs or mappings."""
    return PageSet.spanning(runs["start"] // np.uint64(PAGE_BYTES), runs["end"] // np.uint64(PAGE_BYTES))


def runs_of(numbers: NDArray[np.uint64], flags: int = 0) -> NDArray[np.void]:
    """Return pages (ascending) as runs."""
    bounds = PageSet.of(numbers).byte_bounds
    runs = np.zeros(len(bounds) // 2, dtype=RUN)
    runs["start"], runs["end"], runs["flags"] = bounds[0::2], bounds[1::2], flags
    return runs


def _touched(count: int, dtype: object) -> NDArray[np.void]:
    """Make room whose memory is there, not only promised."""
    room: NDArray[np.void] = np.empty(count, dtype=dtype)  # type: ignore[call-overload]
    room.view(np.uint8).reshape(-1)[::PAGE_BYTES] = 0
    return room
