"""Looks at files: what an entry of a directory leads to, with attributes and content.

In: directories that are known (`primary.file_book`), and names in them. Out: `Found`, in an order in which a
directory comes before what is in it. Nothing is changed, no time stamp either, and the book is only asked: so
it may be called while the workload stands still, and what it found is taken in afterwards.

A directory that is not known is looked through; one that is, only when everything is scanned. Mount points
below the declared directories are passed over: what is mounted there is not theirs.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import CaptureError
from common.excludes import NOTHING, Excludes
from common.file_records import NOWHERE, OTHERWISE_TOLD
from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.file_book import Attributes, FileBook, FileId, Node, Seen
from primary.file_places import Places
from primary.file_writes import LARGE_BYTES, FileWrites
from primary.page_set import PageSet

log = structlog.get_logger(__name__)

_BLOCK_BYTES: Final = 1 << 20
_MOST_KEPT_BYTES: Final = 64 << 20
"""Of the new content of one file, while it is read: a file may be larger than the memory there is."""
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE)
"""It is not there any more, or became something else since a moment ago: that is reported too."""
_BEYOND: Final = 1 << 52
"""Behind the last page of any file."""
_PATH_BYTES: Final = 2048
"""How much of a path is opened at once: paths may be longer than the kernel takes."""


@dataclass(slots=True)
class Content:
    """What a regular file holds: as it is, or identified, with what differs from what is known."""

    raw: bytearray | memoryview | None = None
    """All of it (or of `rows`), filled up with zeros to whole pages; None: `identified` is there instead."""
    rows: PageSet | None = None
    """Which pages (from 0) `raw` has, if not all."""
    identified: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] | None = None
    """Pages (from 0) and their identities; shapes (n,) and (n, 2). All others are zeros."""
    kept: list[tuple[NDArray[np.uint64], bytes]] | None = None
    """Pages (from 0) with their content: those that are not as they are known, as far as there is room."""
    kept_bytes: int = 0
    within: PageSet | None = None
    """Only these pages (from 0) were read, the others are as they were known; None: all were."""
    place: int = NOWHERE
    """Where they were known, if only some were read."""
    followed: bool = False
    """Whether what is written to it is followed from this reading on."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an entry led to when it was looked at."""

    parent: FileId | None
    """The directory; None: this is a declared directory, and `name` its path."""
    name: bytes
    seen: Seen | None
    """None: there is no such entry (any more)."""
    key: bytes = b""
    content: Content | None = None
    """None: it is no regular file, or is known to hold what it held."""
    at_ns: int = 0
    """When it was looked at, by the clock of time stamps."""
    whole: bool = False
    """It is about no entry: all that `parent` has was looked at."""
    itself: bool = False
    """It is about no entry, but about a directory or file that is known, wherever it is by now."""
    still: bool = False
    """All stood still then."""


class Handles(Protocol):
    """How files are called that are watched; see `primary.file_capture.Watch`."""

    def key_of(self, descriptor: int) -> bytes:
        """Tell how an open file is called."""
        ...

    def open(self, key: bytes, flags: int) -> int | None:
        """Open what is called so; None: it is gone."""
        ...


class FilesError(CaptureError):
    """Files could not be captured; memory could, as far as is known."""


class UnreadableError(FilesError):
    """A file cannot be looked at; it counts as changed."""


@dataclass(slots=True)
class How:
    """How closely to look."""

    raw_bytes: int
    """Files up to that size are kept as they are and identified later; 0: none are."""
    keep: bool = True
    """Whether content that is not known is kept."""
    still: bool = False
    """All stands still: what cannot be opened by what is known of it is gone, and not only moved."""
    everything: bool = False
    """Look through directories that are known as well."""
    always: frozenset[FileId] = frozenset()
    """Whose content may have changed without its times."""
    timeless: frozenset[int] = frozenset()
    """Devices on which that is so of every file."""
    room: Callable[[int], None] = lambda size: None
    """Called with the bytes about to be read; may raise."""


class FileReader:
    """Looks at the files that a book knows. One thread at a time."""

    def __init__(
        self,
        book: FileBook,
        roots: Mapping[bytes, Path],
        hasher: PageHasher,
        handles: Handles | None = None,
        writes: FileWrites | None = None,
        excludes: Excludes = NOTHING,
    ) -> None:
        """`roots`: where the declared directories are. `handles`: None if nothing is watched.

        `writes` follows large files; without it they are read as a whole. What `excludes` has is not seen.
        """
        self._book = book
        self._roots = roots
        self._hasher = hasher
        self._handles = handles
        self._writes = writes or FileWrites()
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))
        self._read: set[FileId] = set()
        self._excludes = excludes
        self._declared = {os.fsencode(directory): path for path, directory in roots.items()}
        self._root_ids: dict[FileId, bytes] = {}
        """Which declared directory it is."""

    def begin(self) -> None:
        """Begin a round: in each, the content of an inode is read once."""
        self._read.clear()

    def path_of(self, node: Node) -> list[bytes] | None:
        """Return the path of a declared directory, and the names below it that lead to a file."""
        path = self._book.path_of(node.number)
        return None if path is None else [os.fsencode(self._roots[path[0]]), *path[1:]]

    def open_directory(self, node: Node) -> int | None:
        """Open a known directory, wherever it is by now; None if it is gone. Raises UnreadableError.

        While it is being moved or removed, Linux may say that there is no memory.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME
        try:
            fd = None if self._handles is None else self._handles.open(node.key, flags)
        except OSError as error:
            raise UnreadableError(f"a directory cannot be opened: {error.strerror}") from error
        if fd is None and (path := self.path_of(node)) is not None:
            fd = open_path(path, flags)
        if fd is not None:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == node.id:
                return fd
            os.close(fd)
        return None

    def open_regular(self, node: Node) -> int | None:
        """Open a known file for reading, wherever it is by now; None if it is gone, or cannot be opened."""
        if not stat.S_ISREG(node.inode.mode):  # to open a device or a FIFO would be noticed
            return None
        try:
            return self._open(node)
        except (OSError, UnreadableError) as error:
            log.warning("capture.file_not_read", reason=str(error))
            return None

    def _open(self, node: Node) -> int | None:
        flags = os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK
        if self._handles is not None:
            return self._handles.open(node.key, flags)
        for path in self._book.paths_of(node):
            fd = open_path([os.fsencode(self._roots[path[0]]), *path[1:]], flags)
            if fd is not None:
                if _id(os.fstat(fd)) == node.id:
                    return fd
                os.close(fd)
        return None

    def is_excluded(self, parent: FileId, name: bytes) -> bool:
        """Tell whether an entry of a directory is left out."""
        return self._excludes.has(name, self._root_ids.get(parent))

    def itself(self, fd: int) -> Found:
        """Tell of an open directory alone."""
        seen = Seen(os.fstat(fd), attributes=attributes_of(fd))
        return Found(None, b"", seen, self._key(fd), at_ns=time.time_ns(), itself=True)

    def look(self, parent: FileId | None, directory: int | None, name: bytes, how: How) -> Iterator[Found]:
        """Look at an entry, and through it if it is a directory that is to be looked through.

        `directory` is open; None: `name` is a path. Raises UnreadableError.
        """
        if parent is not None and self.is_excluded(parent, name):
            return
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno not in GONE:
                raise UnreadableError(f"{os.fsdecode(name)}: {error.strerror}") from error
            yield Found(parent, name, None)
            return
        if directory is not None and parent is not None and status.st_dev != parent[0]:
            return  # another file system is mounted there
        try:
            if stat.S_ISREG(status.st_mode):
                yield self._regular(parent, directory, name, how)
            elif stat.S_ISDIR(status.st_mode):
                yield from self._directory(parent, directory, name, how)
            else:
                yield self._other(parent, directory, name)
        except OSError as error:
            if error.errno not in GONE:
                raise UnreadableError(f"{os.fsdecode(name)}: {error.strerror}") from error
            yield Found(parent, name, None)

    def file(self, node: Node, how: How) -> Found | None:
        """Look at a regular file that is known, whatever its names are by now; None: it is gone."""
        try:
            fd = self._open(node)
        except OSError as error:
            raise UnreadableError(f"a file cannot be opened: {error.strerror}") from error
        try:
            return None if fd is None else self._opened(fd, None, b"", how, itself=True)
        except OSError as error:
            if error.errno not in GONE:
                raise UnreadableError(f"a file cannot be read: {error.strerror}") from error
            return None

    def _regular(self, parent: FileId | None, directory: int | None, name: bytes, how: How) -> Found:
        fd = os.open(name, _OPEN | os.O_NOATIME, dir_fd=directory)
        return self._opened(fd, parent, name, how)

    def _opened(
        self, fd: int, parent: FileId | None, name: bytes, how: How, *, itself: bool = False
    ) -> Found:
        """Tell of a regular file that is open, and close it."""
        try:
            at_ns = time.time_ns()
            status = os.fstat(fd)
            seen, key = Seen(status, attributes=attributes_of(fd)), self._key(fd)
            node = self._book.find(seen.id)
            content = None
            doubtful = seen.id in how.always or status.st_dev in how.timeless
            same = not doubtful and node is not None and node.looks_same(status)
            if seen.id not in self._read:
                if node is not None and node.followed and seen.id in self._writes:
                    self._read.add(seen.id)
                    content = self._written(fd, status, node, how)
                elif not same:
                    self._read.add(seen.id)
                    content = self._whole(fd, status, node, how)
            return Found(parent, name, seen, key, content, at_ns, itself=itself, still=how.still)
        finally:
            os.close(fd)

    def _other(self, parent: FileId | None, directory: int | None, name: bytes) -> Found:
        """Tell of a symbolic link, a device, a FIFO or a socket."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            status = os.fstat(fd)
            target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else b""
            path = name if directory is None else b"/proc/self/fd/%d/%s" % (directory, name)
            return Found(parent, name, Seen(status, target, attributes_of(path)), self._key(fd))
        finally:
            os.close(fd)

    def _key(self, fd: int) -> bytes:
        return self._handles.key_of(fd) if self._handles is not None else b""

    def _directory(
        self, parent: FileId | None, directory: int | None, name: bytes, how: How
    ) -> Iterator[Found]:
        """Tell of a directory, and of all below it if it is to be looked through. A descriptor a level."""
        levels: list[tuple[int, FileId, Iterator[bytes]]] = []
        try:
            fd = os.open(name, _OPEN | os.O_DIRECTORY | os.O_NOATIME, dir_fd=directory)
            if parent is None:
                self._root_ids[_id(os.fstat(fd))] = self._declared[name]
            found, names = self._enter(parent, name, fd, how)
            levels.append((fd, _id(os.fstat(fd)), iter(names)))
            yield found
            while levels:
                fd, here, left = levels[-1]
                entry = next(left, None)
                if entry is None:
                    os.close(levels.pop()[0])
                    yield Found(here, b"", None, whole=True)
                    continue
                below = self._subdirectory(fd, here, entry)
                if below is None:
                    yield from self.look(here, fd, entry, how)
                    continue
                found, names = self._enter(here, entry, below, how)
                levels.append((below, _id(os.fstat(below)), iter(names)))
                yield found
        finally:
            for fd, _, _ in levels:
                os.close(fd)

    def _subdirectory(self, fd: int, here: FileId, name: bytes) -> int | None:
        """Open an entry if it is a directory of the same file system."""
        try:
            below = os.open(name, _OPEN | os.O_DIRECTORY | os.O_NOATIME, dir_fd=fd)
        except OSError:
            return None
        if os.fstat(below).st_dev != here[0]:
            os.close(below)
            return None
        return below

    def _enter(self, parent: FileId | None, name: bytes, fd: int, how: How) -> tuple[Found, list[bytes]]:
        """Tell of an open directory, and which of its names are to be looked at."""
        at_ns, status = time.time_ns(), os.fstat(fd)
        key = self._key(fd)
        found = Found(parent, name, Seen(status, attributes=attributes_of(fd)), key, at_ns=at_ns)
        node = self._book.find(_id(status))
        if node is not None and node.key == key and node.whole and not how.everything:
            return found, []
        return found, self._names_in(node, fd, _id(status))

    def names_in(self, node: Node, fd: int) -> list[bytes]:
        """Return the names in a known directory that is open, and those that are known and not there."""
        return self._names_in(node, fd, node.id)

    def _names_in(self, node: Node | None, fd: int, here: FileId) -> list[bytes]:
        names = [os.fsencode(each) for each in os.listdir(fd)]
        if self._excludes:
            names = [each for each in names if not self.is_excluded(here, each)]
        known = node.children.keys() if node is not None else ()
        return [*names, *(known - set(names) if known else ())]

    def _whole(self, fd: int, status: os.stat_result, node: Node | None, how: How) -> Content:
        """Read all of a file; have what is written to a large one followed, if that is read while it runs."""
        if not how.still and status.st_size > LARGE_BYTES and self._writes.follow(fd):
            doubtful = self._writes.doubtful(_id(status), fd, status.st_size, touched=True)
            if doubtful is not None:
                content = self._pieces(fd, status, doubtful, node, how)
                content.followed = True
                return content
        how.room(min(status.st_size, status.st_blocks * 512))
        return self._content(fd, status.st_size, node, how)

    def _written(self, fd: int, status: os.stat_result, node: Node, how: How) -> Content | None:
        """Read what may have changed of a file that is followed; None: nothing has."""
        file, place = _id(status), node.inode.place
        stays = place != NOWHERE and Places.fits(place, -(-status.st_size // PAGE_BYTES))
        if not stays:
            self._writes.doubt(file)
        doubtful = self._writes.doubtful(file, fd, status.st_size, touched=not node.looks_same(status))
        if doubtful is None:
            how.room(min(status.st_size, status.st_blocks * 512))
            return self._content(fd, status.st_size, node, how)
        if not len(doubtful) and node.looks_same(status):
            return None
        if not how.still:
            self._writes.flush(file, fd)
        content = self._pieces(fd, status, doubtful, node, how)
        content.followed = True
        if stays:
            content.within, content.place = doubtful, place
        return content

    def _pieces(
        self, fd: int, status: os.stat_result, doubtful: PageSet, node: Node | None, how: How
    ) -> Content:
        """Read those pages of a file that is followed, at once if they are few in a freeze."""
        file = _id(status)
        runs = doubtful.bounds.reshape(-1, 2).tolist()
        bounds = np.array([*chain.from_iterable(_data_in(fd, runs))], dtype=np.uint64)
        data = PageSet.spanning(bounds[0::2], bounds[1::2]) & doubtful
        how.room(len(data) * PAGE_BYTES)
        self._writes.pass_over(file, doubtful - data)
        try:
            if how.raw_bytes and len(data) * PAGE_BYTES <= how.raw_bytes:
                raw = self._writes.read(file, fd, data.numbers).data if len(data) else bytearray()
                found = Content(raw, rows=data)
            else:
                found = Content(identified=[], kept=[])
                for numbers in data.pieces(_BLOCK_BYTES // PAGE_BYTES):
                    block = self._writes.read(file, fd, numbers)
                    self._take_block(found, node, numbers, block.data, how)
        except BaseException:
            self._writes.doubt(file)  # what was read of it is lost
            raise
        self._writes.all_read(file, status.st_size)
        return found

    def _content(self, fd: int, size: int, node: Node | None, how: How) -> Content:
        pages = -(-size // PAGE_BYTES)
        if size <= how.raw_bytes:
            raw = bytearray(pages * PAGE_BYTES)
            _fill(fd, memoryview(raw)[:size], 0)
            return Content(raw)
        found = Content(identified=[], kept=[])
        for first, end in _data(fd, pages):
            for start in range(first, end, _BLOCK_BYTES // PAGE_BYTES):
                stop = min(end, start + _BLOCK_BYTES // PAGE_BYTES)
                block = self._buffer[: (stop - start) * PAGE_BYTES]
                _fill(fd, block, start * PAGE_BYTES)
                self._take_block(found, node, np.arange(start, stop, dtype=np.uint64), block, how)
        return found

    def _take_block(
        self, found: Content, node: Node | None, pages: NDArray[np.uint64], block: memoryview, how: How
    ) -> None:
        """Identify pages (ascending), and keep those of which other content is known."""
        identity = self._hasher.identify(block)
        marks = identity.any(axis=1)
        if found.identified is not None:
            found.identified.append((pages[marks], identity[marks]))
        if not how.keep or found.kept is None or found.kept_bytes >= _MOST_KEPT_BYTES:
            return  # it is in the file
        if node is not None:
            marks &= self._book.differs(node, pages, identity)
        for run in _runs(np.flatnonzero(marks)):
            found.kept.append((pages[run], bytes(block[run[0] * PAGE_BYTES : (run[-1] + 1) * PAGE_BYTES])))
            found.kept_bytes += len(run) * PAGE_BYTES


def open_path(path: list[bytes], flags: int) -> int | None:
    """Open what a declared directory's path and names below it lead to; None if nothing is there (any more).

    Raises UnreadableError.
    """
    fd: int | None = None
    try:
        names = list(path)
        while names:
            piece = names.pop(0)
            while names and len(piece) + len(names[0]) < _PATH_BYTES:
                piece += b"/" + names.pop(0)
            mode = os.O_PATH | os.O_DIRECTORY if names else flags
            below = os.open(piece, mode | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            if fd is not None:
                os.close(fd)
            fd = below
    except OSError as error:
        if fd is not None:
            os.close(fd)
        if error.errno not in GONE:
            raise UnreadableError(f"{os.fsdecode(b'/'.join(path))}: {error.strerror}") from error
        return None
    return fd


def attributes_of(file: int | bytes) -> Attributes:
    """Return all extended attributes of an open file, or of what a path names, ascending."""
    try:
        names = os.listxattr(file) if isinstance(file, int) else os.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return ()
        raise
    found = []
    for name in sorted(map(os.fsencode, names)):
        if name.startswith(OTHERWISE_TOLD):
            continue
        try:
            value = (
                os.getxattr(file, name)
                if isinstance(file, int)
                else os.getxattr(file, name, follow_symlinks=False)
            )
        except OSError as error:
            if error.errno == errno.ENODATA:
                continue  # removed since
            raise
        found.append((name, value))
    return tuple(found)


def _id(status: os.stat_result) -> FileId:
    return status.st_dev, status.st_ino


def _fill(fd: int, into: memoryview, at: int) -> None:
    """Read all of it; what is behind the end of the file is zeros."""
    done = 0
    while done < len(into):
        got = os.preadv(fd, [into[done:]], at + done)
        if not got:
            into[done:] = bytes(len(into) - done)
            return
        done += got


def _data(fd: int, pages: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the ranges of pages, from one to an end, that are no holes."""
    end = first
    while end < pages:
        try:
            start = os.lseek(fd, end * PAGE_BYTES, os.SEEK_DATA) // PAGE_BYTES
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield end, pages  # this file system does not tell
            return
        if start >= pages:
            return
        hole = os.lseek(fd, start * PAGE_BYTES, os.SEEK_HOLE)
        first, end = max(start, end), min(pages, max(start + 1, -(-hole // PAGE_BYTES)))
        yield first, end


def _data_in(fd: int, runs: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield what of ascending runs of pages is no hole.

    Where data ends is asked once for all runs that lie in it: btrfs goes through all extents up to there.
    """
    first = end = 0
    for start, stop in runs:
        at = start
        while at < stop:
            if end <= at:
                found = next(_data(fd, _BEYOND, at), None)
                if found is None:
                    return
                first, end = found
            if first >= stop:
                break
            yield max(at, first), min(stop, end)
            at = end


def _runs(rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
