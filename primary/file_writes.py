"""Which parts of large files may have changed, without reading them (Linux 6.6 and newer: ext4, XFS, btrfs).

In: open files that are to be followed. Out: pages of them that may not hold any more what was read; and those
pages, read. What is promised of all others:

    A page still holds what was read if the file's blocks are where they were, no direct write has ended in
    it, and in the page cache it has not become dirty since it was clean.

It becomes dirty by every write(2) and every store through a shared mapping, whoever does it; that is told by
a tracepoint (`native/writes.bpf.c`), before the system call returns or the store goes on, but not again while
it is dirty. So a page that was dirty when it was read stays in doubt, and is read again until it was clean
once. Truncation, holes, preallocation, reflinks and defragmentation move blocks: FIEMAP(2) tells; and where
there are none, or none that were written, is looked each time. A store that needs neither, a device writing
into memory that is mapped from the file, is told when the device is done.

Dirty are folios, which may have as many as 512 pages. XFS tells which part of a folio a write is for, and
whether it is one; elsewhere all of it is in doubt.

What is in the way of that promise is not followed: files in DAX or with journalled data (`data=journal`,
chattr +j), other file systems (overlayfs: its files have another inode below). Reports may be lost: then all
is in doubt, and nothing is missed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import UnsupportedError
from common.model import PAGE_BYTES
from primary.file_book import FileId
from primary.native import built
from primary.page_set import NO_PAGES, PageSet

log = structlog.get_logger(__name__)

LARGE_BYTES: Final = 1 << 20
"""Files up to that size are read as a whole: it takes a third of a millisecond."""
_MOST_FILES: Final = 65_536
_RING_BYTES: Final = 8 << 20
"""Both as in native/writes.bpf.c."""
_UNHEARD_BYTES: Final = _RING_BYTES // 4
_WRITTEN: Final = np.dtype([("inode", np.uint64), ("first", np.uint64), ("end", np.uint64)])
_EXTENT: Final = np.dtype(
    [("start", np.uint64), ("end", np.uint64), ("shift", np.uint64), ("flags", np.uint64)]
)
"""`struct written` and `struct extent` of native/writes.c."""
_RECORDS_AT_ONCE: Final = 1 << 16
_MOST_EXTENTS: Final = 1 << 20
_BEYOND: Final = 1 << 52
"""Behind the last page of any file."""
_LARGEST_FOLIO: Final = 1 << 11
_NOT_WRITTEN: Final = 0x806
"""FIEMAP_EXTENT_UNKNOWN, DELALLOC, UNWRITTEN of <linux/fiemap.h>."""
_MOVES: Final = np.uint64(1 << 63)
"""As in native/writes.bpf.c."""
_SYSTEMS: Final = {0xEF53: b"outlive_ext4_", 0x58465342: b"outlive_xfs_"}
"""By type of file system (statfs(2)): how programs are called that want its kernel module to be there."""
_FLUSHED_PAGES: Final = 1024
"""From so many on, pages in doubt are written back before a freeze, so that they need not be read in it."""


@dataclass(eq=False, slots=True)
class _Followed:
    doubtful: PageSet
    extents: NDArray[np.void] = field(default_factory=lambda: np.empty(0, dtype=_EXTENT))
    size: int | None = None
    """How many bytes it had when all that was in doubt was read; None: it never was."""
    moved: PageSet = field(default_factory=lambda: NO_PAGES)
    """Pages whose blocks were reported to move since `extents` were asked for, or just before."""


class FileWrites:
    """Follows large files. One thread at a time; `close` when done."""

    def __init__(self) -> None:
        self._tracing: _Tracing | None = None
        self._refused = False
        self._files: dict[FileId, _Followed] = {}
        self._told: set[FileId] = set()
        """Files of which something was reported since they were read."""
        self._by_inode: dict[int, set[FileId]] = {}

    def close(self) -> None:
        """Follow nothing any more. Idempotent."""
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None
        self._files.clear()
        self._by_inode.clear()

    def __contains__(self, file: FileId) -> bool:
        return file in self._files

    def in_doubt(self, most: int = 0) -> list[FileId]:
        """Return the followed files that were read of which more pages than `most` have to be read again."""
        self.hear()
        return [
            file
            for file, each in self._files.items()
            if each.size is not None and (len(each.doubtful) > most or each.moved)
        ]

    def pages_in_doubt(self, file: FileId) -> PageSet:
        """Return which pages of a followed file may not be what was read, as far as was reported."""
        self.hear()
        return self._files[file].doubtful

    def told(self) -> list[FileId]:
        """Return the followed files of which something was reported since they were read."""
        self.hear()
        return list(self._told)

    @property
    def followed(self) -> list[FileId]:
        """All that are followed."""
        return list(self._files)

    def forget(self, file: FileId) -> None:
        """Do not follow it any more. Harmless if it was not."""
        self._told.discard(file)
        if self._files.pop(file, None) is not None:
            same = self._by_inode[file[1]]
            same.discard(file)
            if not same:
                del self._by_inode[file[1]]
                if self._tracing is not None:
                    self._tracing.ignore(file[1])

    def follow(self, fd: int) -> bool:
        """Begin to follow an open file, of which everything is in doubt; False: it cannot be followed."""
        status = os.fstat(fd)
        file = status.st_dev, status.st_ino
        self.forget(file)
        system = _system_of(fd)
        if not system or not self._is_ready() or _is_journalled(status.st_dev):
            return False
        if self._tracing is None or system in self._tracing.untold or len(self._files) >= _MOST_FILES:
            return False
        self._tracing.watch(file[1])
        self._files[file] = _Followed(_all_pages())
        self._by_inode.setdefault(file[1], set()).add(file)
        return True

    def _is_ready(self) -> bool:
        """Have the kernel report, from the first large file on; False: it cannot."""
        if self._tracing is None and not self._refused:
            try:
                self._tracing = _Tracing()
            except UnsupportedError as error:
                self._refused = True
                log.warning("capture.writes_not_told", reason=error.message, hint=error.hint)
        return self._tracing is not None

    def doubt(self, file: FileId, first: int = 0) -> None:
        """Hold everything from a page on for doubtful."""
        if file in self._files:
            self._files[file].doubtful |= PageSet(np.array([first, _BEYOND], dtype=np.uint64))

    def hear(self) -> None:
        """Take note of what was reported."""
        if self._tracing is None:
            return
        written, complete = self._tracing.drain()
        if not complete:
            log.warning("capture.writes_lost", what="all large files are read again")
            for file in self._files:
                self.doubt(file)
        if not len(written):
            return
        first, end, moves = written["first"], written["end"] & ~_MOVES, written["end"] & _MOVES != 0
        unknown = end == 0  # the end of a folio: it begins at a multiple of its size
        most = np.where(first == 0, _LARGEST_FOLIO, first & (~first + np.uint64(1)))
        end = np.where(unknown, first + np.minimum(most, _LARGEST_FOLIO).astype(np.uint64), end)
        for inode in np.unique(written["inode"]).tolist():
            own = written["inode"] == inode
            pages = PageSet.spanning(first[own], end[own])
            moved = PageSet.spanning(first[own & moves], end[own & moves])
            for file in self._by_inode.get(inode, ()):
                self._files[file].doubtful |= pages
                self._files[file].moved |= moved
                self._told.add(file)

    def doubtful(self, file: FileId, fd: int, size: int, *, touched: bool) -> PageSet | None:
        """Return which pages of a followed file of `size` bytes have to be read. `fd`: that file, open.

        `touched`: its times are not what they were when it was read. None: it cannot be followed any more.
        """
        self.hear()
        followed = self._files[file]
        if followed.size not in (size, None):  # what came or went in between is not told
            self.doubt(file, min(size, followed.size or 0) // PAGE_BYTES)
        if touched or followed.size != size or len(followed.moved):
            if not _system_of(fd):  # chattr(1)
                self.forget(file)
                return None
            followed.doubtful |= followed.moved  # again, if it was read in between
            followed.moved = NO_PAGES
            extents = _extents(fd)
            if extents is None:
                followed.doubtful = _all_pages()
            else:
                followed.doubtful |= _moved(followed.extents, extents, size)
                followed.extents = extents
            self.hear()
        return followed.doubtful & _first_pages(-(-size // PAGE_BYTES))

    def flush(self, file: FileId, fd: int) -> None:
        """Have pages in doubt written back, if they are many; that is begun, and not waited for."""
        doubtful = self._files[file].doubtful & _first_pages(-(-os.fstat(fd).st_size // PAGE_BYTES))
        if len(doubtful) > _FLUSHED_PAGES:
            bounds = doubtful.bounds
            _library().outlive_writes_flush(fd, bounds.ctypes.data, len(bounds) // 2)

    def read(self, file: FileId, fd: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Read pages (ascending) that `doubtful` told; what was clean is not in doubt any more.

        Returns them one after the other. Raises OSError; what was not read stays in doubt.
        """
        if self._tracing is not None and self._tracing.unheard_bytes > _UNHEARD_BYTES:
            self.hear()  # while a large file is read, more is reported than there is room for
        part = PageSet.of(numbers)
        content = np.empty(len(numbers) * PAGE_BYTES, dtype=np.uint8)
        dirty = np.empty(len(numbers), dtype=np.uint8)
        bounds = part.bounds
        if _library().outlive_writes_read(
            fd, bounds.ctypes.data, len(bounds) // 2, content.ctypes.data, dirty.ctypes.data
        ):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        followed = self._files[file]
        followed.doubtful = (followed.doubtful - part) | PageSet.of(numbers[dirty != 0])
        return content

    def pass_over(self, file: FileId, pages: PageSet) -> None:
        """Take note that pages that `doubtful` told were found to be holes since."""
        followed = self._files[file]
        followed.doubtful -= pages

    def all_read(self, file: FileId, size: int) -> None:
        """Take note that all that `doubtful` told of that many bytes was read.

        What is behind them is not in doubt: when the size is another one, it is.
        """
        followed = self._files[file]
        followed.size = size
        self._told.discard(file)
        followed.doubtful &= _first_pages(-(-size // PAGE_BYTES))


class _Tracing:
    """The programs in the kernel, and the ring that they report into. They end with this process."""

    def __init__(self) -> None:
        bpf = _bpf()
        program = str(built("outlive-writes.bpf.o"))
        _library()
        self._object: int | None = None
        self._links: list[int] = []
        self._programs: list[int] = []
        self.untold: frozenset[int] = frozenset()
        """Types of file systems of which not all is told: no such one was there when this began."""
        try:
            self._load(program)
            each = None
            while each := bpf.bpf_object__next_program(self._object, each):
                if not bpf.bpf_program__autoload(each):
                    continue
                if not (link := bpf.bpf_program__attach(each)):
                    raise _unsupported("attach", program)
                self._links.append(link)
                self._programs.append(bpf.bpf_program__fd(each))
            self._files = self._map("files")
            ring = self._map("ring")
            page = mmap.PAGESIZE
            self._consumer = mmap.mmap(ring, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._ring = mmap.mmap(ring, page + 2 * _RING_BYTES, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
            self._lost_map = mmap.mmap(self._map("lost"), page, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            self.close()
            raise
        self._consumed = np.frombuffer(self._consumer, dtype=np.uint8).ctypes.data
        self._produced = np.frombuffer(self._ring, dtype=np.uint8).ctypes.data
        self._lost = self._missed = 0
        self._records = np.zeros(_RECORDS_AT_ONCE, dtype=_WRITTEN)

    def _load(self, program: str) -> None:
        """Load all programs, or else those of file systems that are there. Raises UnsupportedError."""
        bpf = _bpf()
        for count in range(len(_SYSTEMS) + 1):
            for untold in combinations(_SYSTEMS, count):
                self._object = bpf.bpf_object__open_file(program.encode(), None)
                if not self._object:
                    raise _unsupported("open", program)
                each = None
                while each := bpf.bpf_object__next_program(self._object, each):
                    if bpf.bpf_program__name(each).startswith(tuple(map(_SYSTEMS.__getitem__, untold))):
                        bpf.bpf_program__set_autoload(each, False)
                if not bpf.bpf_object__load(self._object):
                    self.untold = frozenset(untold)
                    return
                error = _unsupported("load", program)
                bpf.bpf_object__close(self._object)
                self._object = None
        raise error

    def _map(self, name: str) -> int:
        bpf = _bpf()
        fd: int = bpf.bpf_map__fd(bpf.bpf_object__find_map_by_name(self._object, name.encode()))
        return fd

    def watch(self, inode: int) -> None:
        """Report what is written to files with that inode number, on whatever file system."""
        key, value = ctypes.c_uint64(inode), ctypes.c_uint8(1)
        if _bpf().bpf_map_update_elem(self._files, ctypes.byref(key), ctypes.byref(value), 0):
            raise OSError(ctypes.get_errno(), "a large file cannot be followed")

    def ignore(self, inode: int) -> None:
        """Report nothing of them any more."""
        _bpf().bpf_map_delete_elem(self._files, ctypes.byref(ctypes.c_uint64(inode)))

    @property
    def unheard_bytes(self) -> int:
        """How much of the ring's room is taken."""
        produced, consumed = (struct.unpack_from("=Q", each)[0] for each in (self._ring, self._consumer))
        return int(produced - consumed)

    def drain(self) -> tuple[NDArray[np.void], bool]:
        """Return what was reported since the last call, and whether that is all that happened."""
        parts = []
        while True:
            count = _library().outlive_writes_drain(
                self._consumed,
                self._produced,
                self._produced + mmap.PAGESIZE,
                _RING_BYTES,
                self._records.ctypes.data,
                len(self._records),
            )
            if count > 0:
                parts.append(self._records[:count].copy())
            if count < len(self._records):
                break
        lost = struct.unpack_from("=Q", self._lost_map)[0]
        missed = sum(_library().outlive_writes_missed(program) for program in self._programs)
        complete = count >= 0 and (lost, missed) == (self._lost, self._missed)
        self._lost, self._missed = lost, missed
        return np.concatenate(parts) if parts else np.empty(0, dtype=_WRITTEN), complete

    def close(self) -> None:
        """Take the programs out of the kernel. Idempotent."""
        for link in self._links:
            _bpf().bpf_link__destroy(link)
        self._links.clear()
        if self._object:
            _bpf().bpf_object__close(self._object)
            self._object = None


def check_support() -> None:
    """Raise UnsupportedError where this kernel, or this installation, cannot tell what is written."""
    _Tracing().close()


def _all_pages() -> PageSet:
    return _first_pages(_BEYOND)


def _first_pages(pages: int) -> PageSet:
    return PageSet(np.array([0, pages], dtype=np.uint64)) if pages else NO_PAGES


def _system_of(fd: int) -> int:
    """Return the type of an open file's file system (statfs(2)) if what is promised above holds for it; or 0.

    As far as its mount has no say in it.
    """
    system: int = _library().outlive_writes_fit(fd)
    return system


def _is_journalled(device: int) -> bool:
    """Tell whether an ext4 there journals what is in files: then a write makes no page dirty."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.split()
            major, _, minor = fields[2].partition(b":")
            if os.makedev(int(major), int(minor)) == device and b"data=journal" in fields[-1].split(b","):
                return True
    return False


def _extents(fd: int) -> NDArray[np.void] | None:
    """Return where an open file's blocks are; None if they are too many, or that cannot be told."""
    room = 1024
    while room <= _MOST_EXTENTS:
        found = np.empty(room, dtype=_EXTENT)
        count = _library().outlive_writes_extents(fd, found.ctypes.data, room)
        if count < 0:
            log.info("capture.extents_not_told", reason=os.strerror(ctypes.get_errno()))
            return None
        if count <= room:
            return found[:count].copy()
        room *= 8
    return None


def _moved(before: NDArray[np.void], after: NDArray[np.void], size: int) -> PageSet:
    """Return those of the first bytes' pages whose blocks are not where they were.

    Extents ascend, and do not overlap. Pages without blocks, or with some that were never written, count as
    moved: others may have been there.
    """
    edges = [each[side] for each in (before, after) for side in ("start", "end")]
    points = np.unique(np.concatenate([*edges, np.array([0, size], dtype=np.uint64)]))
    points = points[points <= -(-size // PAGE_BYTES) * PAGE_BYTES]
    first, end = points[:-1], points[1:]
    there, here = _at(before, first), _at(after, first)
    moved = (there != here) | ~here["present"] | (here["flags"] & np.uint64(_NOT_WRITTEN) != 0)
    page = np.uint64(PAGE_BYTES)
    return PageSet.spanning(first[moved] // page, (end[moved] + page - np.uint64(1)) // page)


def _at(extents: NDArray[np.void], points: NDArray[np.uint64]) -> NDArray[np.void]:
    """Return, for each point, what lies there: present, shift and flags."""
    found = np.zeros(len(points), dtype=[("present", np.bool_), ("shift", np.uint64), ("flags", np.uint64)])
    if len(extents):
        row = np.searchsorted(extents["start"], points, side="right") - 1
        here = (row >= 0) & (points < extents["end"][row])
        found["present"] = here
        for name in ("shift", "flags"):
            found[name][here] = extents[name][row[here]]
    return found


def _unsupported(verb: str, program: str) -> UnsupportedError:
    reason = os.strerror(ctypes.get_errno())
    return UnsupportedError(
        f"cannot {verb} {os.path.basename(program)}: {reason}",
        hint="large files are read as a whole; to avoid it: Linux 6.6 with BTF, libbpf, clang for setup",
    )


@cache
def _bpf() -> ctypes.CDLL:
    """libbpf, which finds the kernel's types and loads programs. Raises UnsupportedError."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise UnsupportedError(f"libbpf is missing: {error}", hint="run `make setup`") from error
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, arguments, result in (
        ("bpf_object__open_file", [text, pointer], pointer),
        ("bpf_object__load", [pointer], number),
        ("bpf_object__close", [pointer], None),
        ("bpf_object__next_program", [pointer, pointer], pointer),
        ("bpf_program__attach", [pointer], pointer),
        ("bpf_program__autoload", [pointer], ctypes.c_bool),
        ("bpf_program__name", [pointer], text),
        ("bpf_program__set_autoload", [pointer, ctypes.c_bool], number),
        ("bpf_program__fd", [pointer], number),
        ("bpf_link__destroy", [pointer], number),
        ("bpf_object__find_map_by_name", [pointer, text], pointer),
        ("bpf_map__fd", [pointer], number),
        ("bpf_map_update_elem", [number, pointer, pointer, ctypes.c_uint64], number),
        ("bpf_map_delete_elem", [number, pointer], number),
        ("libbpf_set_print", [pointer], pointer),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    library.libbpf_set_print(None)  # what it says of errors is for developers
    return library


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built("outlive-files.so")), use_errno=True)
    u64, pointer, number = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
    library.outlive_writes_drain.argtypes = [pointer, pointer, pointer, u64, pointer, u64]
    library.outlive_writes_drain.restype = ctypes.c_int64
    library.outlive_writes_extents.argtypes = [number, pointer, u64]
    library.outlive_writes_extents.restype = ctypes.c_int64
    library.outlive_writes_read.argtypes = [number, pointer, u64, pointer, pointer]
    library.outlive_writes_read.restype = number
    library.outlive_writes_missed.argtypes = [number]
    library.outlive_writes_missed.restype = u64
    library.outlive_writes_fit.argtypes = [number]
    library.outlive_writes_fit.restype = u64
    library.outlive_writes_flush.argtypes = [number, pointer, u64]
    library.outlive_writes_flush.restype = None
    return library
