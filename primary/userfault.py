"""A userfaultfd that tells which pages of a process are written (Linux 6.12.11 and newer).

In: the descriptor, taken out of a process (`primary.injection`), and the process's mappings. Out: which of
those are not tracked. The kernel lets every write through and remembers it; `primary.pages` asks which pages
were written. When the descriptor closes, with the agent or before, everything reads as written.

What must hold: where tracking begins, every page counts as written. The kernel does not see to that: a
mapping may come with pages that are protected already, and pass for unwritten whatever is written to them.
Where mremap(2) makes one mapping of what it moves and of a neighbour, Linux (6.18, for one) ends the tracking
of both, and lifts the protection of what it moves only. So `cover` is followed by `lift`, always.
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
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import CaptureError
from primary.pages import OWNED, count_pages, lift, untracked

_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_FEATURES: Final = 1 << 15 | 1 << 13 | 1 << 12
"""WP_ASYNC, WP_UNPOPULATED, WP_HUGETLBFS_SHMEM (<linux/userfaultfd.h>)."""
_MODE_WRITE_PROTECT: Final = 2
_USER_MODE_ONLY: Final = 1
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282}
_OLD_S: Final = 1.0

_Range = tuple[int, int]
"""First address of a mapping, and its end."""


def most_mappings() -> int:
    """Return how many mappings a process may have here; with more, it can map and allocate nothing."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


class Userfault:
    """A userfaultfd that was taken out of a process; tracks until `close`."""

    def __init__(self, descriptor: int) -> None:
        """Own the descriptor. Raises CaptureError if the kernel lacks the asynchronous mode."""
        self._descriptor = descriptor
        self._since: dict[_Range, float] = {}
        self._refused: set[_Range] = set()
        self._unlifted: list[_Range] = []
        request = array.array("Q", [_UFFD_API, _FEATURES, 0])
        try:
            fcntl.ioctl(descriptor, _UFFDIO_API, request)
        except OSError as error:
            os.close(descriptor)
            raise CaptureError(f"writes cannot be tracked by userfaultfd here: {error.strerror}") from error

    def fresh(self, pagemap: int, vmas: NDArray[np.void]) -> NDArray[np.void]:
        """Return the owned mappings that are not tracked; `pagemap` is /proc/PID/pagemap, open."""
        fresh = untracked(pagemap, vmas[(vmas["flags"] & OWNED) != 0])
        now_s = time.monotonic()
        self._since = {each: self._since.get(each, now_s) for each in _ranges(fresh)}
        self._refused &= self._since.keys()
        return fresh

    def gain(self, pagemap: int, fresh: NDArray[np.void], tracked: NDArray[np.void], most: int) -> int:
        """Return how many pages tracking `fresh` mappings would spare the next freezes: `most` at most.

        It is `most`, too, if one of them lies beside one of those that are `tracked`. What the process knows
        as one mapping may be both, and mremap(2) of both fails, or stops half-way: as soon as can be, they
        must be alike. Likewise after a second, wherever it lies. What the kernel refused does not count.
        """
        open_ones = fresh[[each not in self._refused for each in _ranges(fresh)]]
        beside = np.isin(open_ones["start"], tracked["end"]) | np.isin(open_ones["end"], tracked["start"])
        old_s = time.monotonic() - _OLD_S
        if beside.any() or any(self._since[each] < old_s for each in _ranges(open_ones)):
            return most
        return count_pages(pagemap, open_ones, most)

    def cover(self, pagemap: int, vmas: NDArray[np.void], until_s: float) -> None:
        """Track all owned mappings that can be, in a process that stands still since `vmas` was read.

        Else one that grew meanwhile would be tracked in part: the kernel makes two of it, and mremap(2) of
        what the process knows as one fails, or stops half-way. So all of what lies side by side is tracked,
        or none, but for what the kernel refuses; the rest is left for another time at `until_s` (monotonic).
        """
        before = 0
        for start, end in _ranges(untracked(pagemap, vmas[(vmas["flags"] & OWNED) != 0])):
            if before and start != before and time.monotonic() > until_s:
                return
            before = end
            if self._register(start, end):
                self._unlifted.append((start, end))
            else:
                self._refused.add((start, end))

    def _register(self, start: int, end: int) -> bool:
        request = bytearray(struct.pack("<QQQQ", start, end - start, _MODE_WRITE_PROTECT, 0))
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_REGISTER, request)
        except OSError:
            return False  # another userfaultfd's, a device's, or gone since: it stays untracked, so dirty
        return True

    @property
    def covered(self) -> tuple[_Range, ...]:
        """What is tracked since the last `lift`: of its pages, nothing is known."""
        return tuple(self._unlifted)

    def lift(self, pagemap: int) -> bool:
        """Have every page that `cover` tracks count as written.

        False if what is mapped there changes too fast: nothing is to be believed then.
        """
        self._unlifted = [each for each in self._unlifted if not lift(self._descriptor, pagemap, *each)]
        return self.is_sound

    @property
    def is_sound(self) -> bool:
        """Whether a page that counts as unwritten is: nothing is left to `lift`."""
        return not self._unlifted

    def close(self) -> None:
        """Stop tracking. Takes about 15 ms for each GiB that is tracked. Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _ranges(vmas: NDArray[np.void]) -> list[_Range]:
    ranges: list[_Range] = vmas[["start", "end"]].tolist()
    return ranges


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
