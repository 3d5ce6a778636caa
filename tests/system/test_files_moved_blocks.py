"""Blocks of a large file that move away and back while it is read: where they are is no sign of it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from common.errors import UnsupportedError
from common.model import PAGE_BYTES
from primary.file_writes import check_support
from primary.page_set import NO_PAGES
from tests.campaigns.file_oracle import mounted
from tests.unit.test_file_writes import Known

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_COLLAPSE, _INSERT = 0x08, 0x20
_FICLONERANGE = 0x4020940D
_AT, _SIZE = 100 * PAGE_BYTES, 4 * PAGE_BYTES


def shift(fd: int, mode: int) -> None:
    if _LIBC.fallocate(fd, mode, _AT, _SIZE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def clone(fd: int, source: int) -> None:
    fcntl.ioctl(fd, _FICLONERANGE, struct.pack("=qQQQ", source, 0, _SIZE, _AT))


@pytest.fixture(params=["ext4", "xfs"])
def system(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    try:
        check_support()
    except UnsupportedError as error:
        pytest.skip(error.message)
    with mounted(request.param) as point:
        yield request.param, point


Way = tuple[Callable[[], None], Callable[[], None]]


def ways(kind: str, fd: int, point: Path) -> Iterator[Way]:
    """Yield what changes a range, and what takes that back."""
    yield lambda: shift(fd, _INSERT), lambda: shift(fd, _COLLAPSE)
    if kind == "xfs":
        was, other = (os.open(point / name, os.O_RDWR | os.O_CREAT) for name in ("was", "other"))
        os.pwrite(other, os.urandom(_SIZE), 0)
        fcntl.ioctl(was, _FICLONERANGE, struct.pack("=qQQQ", fd, _AT, _SIZE, 0))
        yield lambda: clone(fd, other), lambda: clone(fd, was)


def test_what_was_read_in_between_is_read_again(system: tuple[str, Path]) -> None:
    kind, point = system
    path = point / "large"
    path.write_bytes(os.urandom(2 << 20))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    known = Known(path)
    assert known.writes.follow(known.fd)
    try:
        for (away, back), began in product(ways(kind, fd, point), (False, True)):
            os.pwrite(fd, path.read_bytes()[_AT : _AT + _SIZE], _AT)  # in doubt, and soon clean
            os.fsync(fd)
            size = os.fstat(fd).st_size
            doubtful = known.writes.doubtful(known.file, known.fd, size, touched=True)
            assert doubtful is not None
            away()
            for numbers in doubtful.pieces(100):
                read = known.writes.read(known.file, known.fd, numbers).reshape(-1, PAGE_BYTES)
                for number, page in zip(numbers.tolist(), read, strict=True):
                    known.content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page.tobytes()
            known.writes.all_read(known.file, size)
            back()
            if began:  # as if that had been reported, and not been done, when the pages were read
                known.writes.hear()
                known.writes._files[known.file].doubtful = NO_PAGES
            os.fsync(fd)
            assert bytes(known.content) != path.read_bytes(), "something else was read in between"
            known.look()
            assert bytes(known.content) == path.read_bytes()
            assert not known.look()
    finally:
        known.close()
        os.close(fd)
