"""Changes a large file in every way that there is, at random; the same for the same seed and file system."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_FICLONERANGE: Final = 0x4020940D
_MOST: Final = 6 << 20
_BLOCK: Final = 4096
_CANNOT: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
"""Some file systems have no such thing, or not for such a range."""


class Writer:
    """One file, open as a program has it, also mapped; and another one to take content from."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.done: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._other = os.open(path.with_name("other"), os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self._fd, self._random.randbytes(4 << 20), 0)
        os.pwrite(self._other, self._random.randbytes(1 << 20), 0)
        os.fsync(self._other)
        self._map: mmap.mmap | None = None
        self._ways = {name[5:]: getattr(self, name) for name in dir(self) if name.startswith("_way_")}

    @property
    def ways(self) -> set[str]:
        """What can be done to it."""
        return set(self._ways)

    def some(self, most: int) -> None:
        """Do a few things."""
        for _ in range(self._random.randint(0, most)):
            name = self._random.choice(sorted(self._ways))
            try:
                self._ways[name]()
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
            else:
                self.done[name] += 1

    def close(self) -> None:
        """Let go of it."""
        self._unmap()
        os.close(self._fd)
        os.close(self._other)

    @property
    def size(self) -> int:
        """Its size now."""
        return os.fstat(self._fd).st_size

    def _range(self, align: int = 1, most: int = 1 << 16) -> tuple[int, int]:
        """Somewhere within it: start and size."""
        size = self._random.choice((1, 100, _BLOCK, most) if align == 1 else (align, most))
        end = max(self.size - size, 1)
        return self._random.randrange(end) // align * align, size

    def _data(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def _way_write(self) -> None:
        start, size = self._range()
        os.pwrite(self._fd, self._data(size), start)

    def _way_write_much(self) -> None:
        start, size = self._range(most=1 << 19)
        os.pwrite(self._fd, self._data(size), start)

    def _way_append(self) -> None:
        if self.size < _MOST:
            os.pwrite(self._fd, self._data(self._random.randint(1, 20_000)), self.size)

    def _way_write_behind_the_end(self) -> None:
        if self.size < _MOST:  # which leaves a hole
            os.pwrite(self._fd, self._data(5000), self.size + self._random.randint(1, 200_000))

    def _way_map(self) -> None:
        self._unmap()
        self._map = mmap.mmap(self._fd, self.size)

    def _way_unmap(self) -> None:
        self._unmap()

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _way_store(self) -> None:
        if self._map is None:
            self._way_map()
        start, size = self._range()
        if self._map is not None and start + size <= min(len(self._map), self.size):
            self._map[start : start + size] = self._data(size)

    def _way_read_into_the_map(self) -> None:
        """The kernel stores, on a program's behalf."""
        if self._map is None:
            self._way_map()
        start, size = self._range(most=10_000)
        if self._map is not None and start + size <= min(len(self._map), self.size):
            os.preadv(self._other, [memoryview(self._map)[start : start + size]], 77)

    def _way_direct(self) -> None:
        start, size = self._range(align=_BLOCK)
        with mmap.mmap(-1, size) as buffer:
            buffer[:] = self._data(size)
            fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
            try:
                os.pwritev(fd, [buffer], start)
            finally:
                os.close(fd)

    def _way_direct_read(self) -> None:
        with mmap.mmap(-1, _BLOCK) as buffer:
            fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
            try:
                os.preadv(fd, [buffer], 0)
            finally:
                os.close(fd)

    def _way_truncate(self) -> None:
        least = self._random.choice((2 << 20, 2 << 20, 1 << 17)) + 5
        os.ftruncate(self._fd, max(min(least, self.size), self._random.randrange(self.size)))

    def _way_cut_and_grow(self) -> None:
        size = self.size
        os.ftruncate(self._fd, self._random.randrange(size // 2, size))
        os.ftruncate(self._fd, size)

    def _way_grow(self) -> None:
        if self.size < _MOST:
            os.ftruncate(self._fd, self.size + self._random.randint(1, 300_000))

    def _fallocate(self, mode: int, align: int) -> None:
        start, size = self._range(align=align)
        if _LIBC.fallocate(self._fd, mode, start, size):
            raise OSError(ctypes.get_errno(), "fallocate")

    def _way_allocate(self) -> None:
        self._fallocate(0, 1)

    def _way_punch(self) -> None:
        self._fallocate(3, 1)

    def _way_zero(self) -> None:
        self._fallocate(16, 1)

    def _way_collapse(self) -> None:
        if self.size > 3 << 20:
            self._fallocate(8, _BLOCK)

    def _way_insert(self) -> None:
        if self.size < _MOST:
            self._fallocate(32, _BLOCK)

    def _way_reflink(self) -> None:
        start, size = self._range(align=_BLOCK)
        fcntl.ioctl(self._fd, _FICLONERANGE, struct.pack("=qQQQ", self._other, 0, size, start))

    def _way_reflink_itself(self) -> None:
        start, size = self._range(align=_BLOCK)
        if size <= start:
            fcntl.ioctl(self._fd, _FICLONERANGE, struct.pack("=qQQQ", self._fd, 0, size, start))

    def _way_copy(self) -> None:
        start, size = self._range()
        os.copy_file_range(self._other, self._fd, size, self._random.randrange(1 << 19), start)

    def _way_splice(self) -> None:
        start, size = self._range(most=30_000)
        out, into = os.pipe()
        try:
            os.write(into, self._data(size))
            os.splice(out, self._fd, size, offset_dst=start)
        finally:
            os.close(out)
            os.close(into)

    def _way_flush(self) -> None:
        os.fsync(self._fd)

    def _way_flush_the_map(self) -> None:
        if self._map is not None:
            self._map.flush()

    def _way_forget_cached(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _way_flush_and_forget(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(self._fd, 1 << 20, 0)

    def _way_by_another_process(self) -> None:
        start, size = self._range()
        data = self._data(size)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                fd = os.open(self.path, os.O_WRONLY)
                os.pwrite(fd, data, start)
            os._exit(0)
        os.waitpid(child, 0)

    def _way_store_by_another_process(self) -> None:
        start, size = self._range(most=9000)
        data = self._data(size)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                fd = os.open(self.path, os.O_RDWR)
                mmap.mmap(fd, self.size)[start : start + size] = data
            os._exit(0)
        os.waitpid(child, 0)
