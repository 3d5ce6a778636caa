"""Tracking of writes by userfaultfd, in asynchronous write-protect mode (Linux 6.7 and newer).

In: a userfaultfd of a process's address space (`primary.injection`), and the process's mappings. Out: which
mappings are tracked, and which of them only since now. The kernel lets every write through and remembers it;
`primary.pages` asks which pages were written.

What must hold: a mapping that was not tracked a moment ago has pages of which nothing is known, whatever
stood at its place before (munmap and mmap, mremap, exec, fork). `cover` returns those mappings; its caller
forgets their pages. When the descriptor closes, with the agent or before, everything reads as written.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import platform
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import CaptureError
from primary.pages import OWNED, is_tracked

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


class Userfault:
    """A userfaultfd that was taken out of a process; tracks until `close`."""

    def __init__(self, descriptor: int) -> None:
        """Own the descriptor. Raises CaptureError if the kernel lacks the asynchronous mode."""
        self._descriptor = descriptor
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
        for first, last in _rooms(vmas):
            within = [(start, end) for start, end in fresh if first <= start < last]
            if within and not self._register(first, last):
                for start, end in within:
                    self._register(start, end)
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


def _rooms(vmas: NDArray[np.void]) -> list[tuple[int, int]]:
    """Return the ranges that hold owned mappings and no others, each from one of the others to the next."""
    rooms: list[tuple[int, int]] = []
    before = first = last = 0
    for start, end, flags, _ in vmas.tolist():
        if flags & OWNED:
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
