"""Many small files at once, within a freeze: what `native/files.c` finds, and what it left.

In: open directories and names in them. Out, at once: which of them have to be looked at by other means; and
afterwards, when the workload runs again: what was found of all others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.model import PAGE_BYTES
from primary.native import built

_READ: Final = 1
_GONE: Final = 2
_LEFT: Final = 3
_MOST_BYTES: Final = 1 << 20
_FIRST_PAGES: Final = 1024
_MOST_PAGES: Final = 8192

LOOK: Final = np.dtype(
    [
        ("directory", np.int32),
        ("name", np.uint32),
        ("outcome", np.uint32),
        ("handle_bytes", np.uint32),
        ("content", np.uint64),
        ("st_dev", np.uint64),
        ("st_ino", np.uint64),
        ("st_nlink", np.uint64),
        ("st_size", np.uint64),
        ("st_rdev", np.uint64),
        ("st_mtime_ns", np.int64),
        ("st_ctime_ns", np.int64),
        ("st_mode", np.uint32),
        ("st_uid", np.uint32),
        ("st_gid", np.uint32),
        ("unused", np.uint32),
        ("handle", np.uint8, 8 + 128),
    ]
)
"""`struct look` of native/files.c."""


DIRECTORY: Final = np.dtype(
    [
        ("mount", np.int32),
        ("fd", np.int32),
        ("st_dev", np.uint64),
        ("st_ino", np.uint64),
        ("st_mtime_ns", np.int64),
        ("handle", np.uint8, 8 + 128),
    ]
)
"""`struct directory` of native/files.c."""


class Status(NamedTuple):
    """What is taken of a file's `stat`, under its names."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_rdev: int
    st_mtime_ns: int
    st_ctime_ns: int


class Place(NamedTuple):
    """An entry that is to be looked at."""

    directory: int
    """Open."""
    name: bytes


class Directory(NamedTuple):
    """A directory that is open."""

    fd: int
    """-1: it could not be opened."""
    id: tuple[int, int]
    """Device and inode number."""
    mtime_ns: int


class Look(NamedTuple):
    """What an entry led to."""

    at: int
    """Which of the entries it is: its row."""
    status: Status | None
    """None: there is no such entry."""
    handle: bytes
    content: memoryview
    """Filled up with zeros to whole pages; good until `QuickLook.begin`."""


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built("outlive-files.so")))
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    library.outlive_files_look.argtypes = [pointer, u64, ctypes.c_char_p, pointer, u64, u64, ctypes.c_int]
    library.outlive_files_look.restype = u64
    library.outlive_files_open.argtypes = library.outlive_files_close.argtypes = [pointer, u64]
    library.outlive_files_open.restype = library.outlive_files_close.restype = None
    return library


@contextmanager
def opened(handles: Sequence[tuple[int, bytes]]) -> Iterator[list[Directory]]:
    """Open directories by their handles, each with anything open on its file system; in the same order."""
    directories = np.zeros(len(handles), dtype=DIRECTORY)
    directories["fd"] = -1
    directories["mount"] = [mount for mount, _ in handles]
    directories["handle"] = _padded([handle for _, handle in handles])
    _library().outlive_files_open(directories.ctypes.data, len(directories))
    try:
        fields = directories[["fd", "st_dev", "st_ino", "st_mtime_ns"]].tolist()
        yield [Directory(fd, (device, inode), mtime_ns) for fd, device, inode, mtime_ns in fields]
    finally:
        _library().outlive_files_close(directories.ctypes.data, len(directories))


class QuickLook:
    """Room for the contents of one freeze's small files; it is kept for the next one."""

    def __init__(self, *, handles: bool) -> None:
        """With `handles`, each file's is taken too. Raises UnsupportedError if it was not built."""
        _library()
        self._handles = handles
        self._used = self._wanted = 0
        self._buffer = _touched(_FIRST_PAGES)

    def begin(self) -> None:
        """Give up what was found; make room for twice as much as was needed."""
        pages = len(self._buffer) // PAGE_BYTES
        if self._wanted * 2 > pages and pages < _MOST_PAGES:
            self._buffer = _touched(min(_MOST_PAGES, self._wanted * 2))
        self._used = self._wanted = 0

    def look(self, places: Sequence[Place]) -> tuple[NDArray[np.void], list[int]]:
        """Look at entries; return what was found (see `found`), and the rows of those that were left."""
        looks = np.zeros(len(places), dtype=LOOK)
        names, at = bytearray(), []
        for place in places:
            at.append(len(names))
            names += place.name + b"\0"
        looks["directory"] = [place.directory for place in places]
        looks["name"] = at
        return self._look(looks, bytes(names))

    def look_by_handle(self, handles: Sequence[tuple[int, bytes]]) -> tuple[NDArray[np.void], list[int]]:
        """Look at files wherever they are, each by its handle and anything open on its file system."""
        looks = np.zeros(len(handles), dtype=LOOK)
        looks["directory"] = [mount for mount, _ in handles]
        looks["handle"] = _padded([handle for _, handle in handles])
        return self._look(looks, None)

    def _look(self, looks: NDArray[np.void], names: bytes | None) -> tuple[NDArray[np.void], list[int]]:
        room = len(self._buffer) // PAGE_BYTES - self._used
        into = self._buffer.ctypes.data + self._used * PAGE_BYTES
        used = _library().outlive_files_look(
            looks.ctypes.data, len(looks), names, into, room, _MOST_BYTES, self._handles
        )
        looks["content"] += np.uint64(self._used)
        self._used += used
        left = np.flatnonzero(looks["outcome"] == _LEFT).tolist()
        self._wanted += int((-(-looks["st_size"].astype(np.int64) // PAGE_BYTES)).sum()) + len(left)
        return looks, left

    def found(self, looks: NDArray[np.void]) -> Iterator[Look]:
        """Yield what was found at once; nothing of those that were left."""
        content = self._buffer.data
        fields = ["outcome", "content", "handle_bytes", *Status._fields]
        for row, (outcome, first, size, *status) in enumerate(looks[fields].tolist()):
            if outcome == _GONE:
                yield Look(row, None, b"", content[:0])
            elif outcome == _READ:
                seen = Status(*status)
                pages = -(-seen.st_size // PAGE_BYTES)
                part = content[first * PAGE_BYTES : (first + pages) * PAGE_BYTES]
                yield Look(row, seen, looks["handle"][row, :size].tobytes(), part)


def _padded(handles: Sequence[bytes]) -> NDArray[np.uint8]:
    room = LOOK["handle"].itemsize
    joined = b"".join([handle.ljust(room, b"\0") for handle in handles])
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, room)


def _touched(pages: int) -> NDArray[np.uint8]:
    """Memory that is there, not only promised."""
    room = np.empty(pages * PAGE_BYTES, dtype=np.uint8)
    room.fill(0)
    return room
