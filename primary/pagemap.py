"""What this kernel tells in /proc/PID/pagemap, found out by trying it on this process.

In: pages of our own, which are read, written, and looked up. Out: the frame of the kernel's page of zeros,
and whether soft-dirty bits work; or why not.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Final

from common.errors import UnsupportedError
from common.model import PAGE_BYTES

_ENTRY_BYTES: Final = 8
_FRAME: Final = (1 << 55) - 1
_SOFT_DIRTY: Final = 1 << 55
_PRESENT: Final = 1 << 63
"""Of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst)."""


def zero_frame() -> int:
    """Find the frame of the kernel's page of zeros, which is no content, by reading memory of our own.

    Raises UnsupportedError if the kernel hides frames.
    """
    with _Pages() as pages:
        entries = [pages.entry_after_read(number) for number in range(2)]
    frames = {entry & _FRAME for entry in entries if entry & _PRESENT}
    if len(frames) != 1 or 0 in frames:
        raise UnsupportedError(
            "/proc/PID/pagemap does not tell frames, and so not the kernel's page of zeros",
            hint="the agent needs CAP_SYS_ADMIN",
        )
    return frames.pop()


def pagemap_problem() -> str:
    """Say why memory cannot be scanned through /proc/PID/pagemap here; empty if it can."""
    try:
        zero_frame()
    except UnsupportedError as error:
        return error.message
    except OSError as error:
        return f"/proc/PID/pagemap: {error.strerror}"
    return ""


def soft_dirty_problem() -> str:
    """Say why writes cannot be tracked by soft-dirty bits here; empty if they can.

    Tries it on this process, whose own bits are cleared by that.
    """
    if found := pagemap_problem():
        return found
    try:
        with _Pages() as pages:
            pages.write(0)
            Path("/proc/self/clear_refs").write_text("4")
            cleared = not pages.entry(0) & _SOFT_DIRTY
            pages.write(0)
            told = bool(pages.entry(0) & _SOFT_DIRTY)
    except OSError as error:
        return f"soft-dirty: {error.strerror}"
    if not told:
        return "soft-dirty: this kernel does not tell what is written (CONFIG_MEM_SOFT_DIRTY)"
    return "" if cleared else "soft-dirty: bits cannot be cleared"


class _Pages:
    """Two pages of our own that are not there until they are touched, and what our pagemap says of them."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # without huge pages there is nothing to forbid
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.close()

    def write(self, number: int) -> None:
        self._memory[number * PAGE_BYTES] = 1

    def entry_after_read(self, number: int) -> int:
        if self._memory[number * PAGE_BYTES]:
            raise OSError(0, "fresh memory is not zeros")
        return self.entry(number)

    def entry(self, number: int) -> int:
        anchor = ctypes.c_char.from_buffer(self._memory)
        page = ctypes.addressof(anchor) // PAGE_BYTES + number
        del anchor
        file = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int.from_bytes(os.pread(file, _ENTRY_BYTES, page * _ENTRY_BYTES), sys.byteorder)
        finally:
            os.close(file)
