"""Room for a scan by soft-dirty bits: `struct soft_dirty` of native/soft_dirty.h.

In: how many pages a process has. Out: memory, laid out before a freeze, in which the scan notes the mappings
and the frame of each page; what it noted is what the next scan compares with, if the bits were cleared after
it.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
from numpy.typing import NDArray

_TRACKS: Final = 1
_RECORDS: Final = 2
_FIRST_PAGES: Final = 4096
_FIRST_RANGES: Final = 256
_FIRST_MAPPINGS: Final = 1024


class _Frames(ctypes.Structure):
    """`struct frames`."""

    _fields_ = (
        ("bounds", ctypes.c_void_p),
        ("frames", ctypes.c_void_p),
        ("mappings", ctypes.c_void_p),
        ("ranges_room", ctypes.c_uint64),
        ("pages_room", ctypes.c_uint64),
        ("mappings_room", ctypes.c_uint64),
        ("ranges", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("mapped", ctypes.c_uint64),
    )


class SoftDirtyStruct(ctypes.Structure):
    """`struct soft_dirty`."""

    _fields_ = (
        ("options", ctypes.c_uint64),
        ("zero_frame", ctypes.c_uint64),
        ("before", _Frames),
        ("now", _Frames),
        ("range_at", ctypes.c_uint64),
        ("page_at", ctypes.c_uint64),
        ("mapping_at", ctypes.c_uint64),
    )


class _Room:
    """What one scan noted: 8 bytes a page, 16 a range of neighbours, 16 a mapping."""

    def __init__(self, pages: int, ranges: int, mappings: int) -> None:
        self.bounds: NDArray[np.uint64] = np.zeros(2 * ranges, dtype=np.uint64)
        self.frames: NDArray[np.uint64] = np.zeros(pages, dtype=np.uint64)
        self.mappings: NDArray[np.uint64] = np.zeros(2 * mappings, dtype=np.uint64)
        self.bounds.fill(1)  # its memory is there from now on, not only promised
        self.frames.fill(1)
        self.mappings.fill(1)
        self.ranges = self.pages = self.mapped = 0

    def native(self) -> _Frames:
        return _Frames(
            self.bounds.ctypes.data,
            self.frames.ctypes.data,
            self.mappings.ctypes.data,
            len(self.bounds) // 2,
            len(self.frames),
            len(self.mappings) // 2,
            self.ranges,
            self.pages,
            self.mapped,
        )


class Frames:
    """What is compared and noted of one process; used by one thread at a time."""

    def __init__(self, zero_frame: int, *, tracks: bool = True) -> None:
        """`zero_frame` is that of the kernel's page of zeros. Without `tracks`, every page is written."""
        self._zero_frame = zero_frame
        self._tracks = tracks
        first = (_FIRST_PAGES, _FIRST_RANGES, _FIRST_MAPPINGS) if tracks else (0, 0, 0)
        self._before, self._now = _Room(*first), _Room(*first)
        self._native = SoftDirtyStruct()

    def prepared(self, *, clears: bool) -> int:
        """Lay out what the library is given, for a scan that a clear follows or not; return its address."""
        options = (_TRACKS | (_RECORDS if clears else 0)) if self._tracks else 0
        self._native = SoftDirtyStruct(
            options, self._zero_frame, self._before.native(), self._now.native(), 0, 0, 0
        )
        return ctypes.addressof(self._native)

    def cleared(self) -> None:
        """Take what the last scan noted for what is so at a clear."""
        noted = self._native.now
        self._now.ranges, self._now.pages = int(noted.ranges), int(noted.pages)
        self._now.mapped = int(noted.mapped)
        self._before, self._now = self._now, self._before

    def forget(self) -> None:
        """Hold what the last clear noted for doubtful: everything counts as written, until the next one."""
        self._before.ranges = self._before.pages = self._before.mapped = 0

    def make_room(self, pages: int, ranges: int, mappings: int = 0) -> None:
        """Have room for at least that many. Never within a freeze: it takes memory."""
        has = (len(self._now.frames), len(self._now.bounds) // 2, len(self._now.mappings) // 2)
        wanted = tuple(map(max, (pages, ranges, mappings), has))
        if self._tracks and wanted != has:
            self._now = _Room(*wanted)

    def grow(self) -> None:
        """Have room for twice as much."""
        self.make_room(2 * len(self._now.frames), len(self._now.bounds), len(self._now.mappings))
