"""Looks at all files again, some at each epoch, for changes that nobody reported.

In: what is known of files (`primary.file_book`), and the file system. Out: what is not as it is known, to be
taken in like anything that was found; and which of that was not reported either in the minute that followed.
All that is watched is trusted to be reported: if something was not, a kernel or a file system does not do
what this counts on, and everything is looked at again.

Names, kinds, sizes, owners, modes and times are compared, of large files that are followed contents too: a
round takes 500 epochs, one of contents as long as it takes at 1 MiB an epoch.
"""

from __future__ import annotations

import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.file_book import FileBook, FileId, Node
from primary.file_reader import GONE, FileReader, Found, How, UnreadableError
from primary.file_writes import FileWrites
from primary.page_set import PageSet

log = structlog.get_logger(__name__)

_ROUND_EPOCHS: Final = 500
_LEAST_ENTRIES: Final = 50
_CONTENT_PAGES: Final = 256
_REPORTED_WITHIN_S: Final = 60.0
"""A system call that takes long is reported at its end, and what it does can be seen before."""


@dataclass(frozen=True, slots=True)
class Unlike:
    """Something that is not as it is known."""

    found: Found
    directory: bytes
    """The watch's key of the directory that it is in, or is."""
    what: str
    """In a sentence; empty: an epoch would have it as it is known, it was only looked at once more."""


class Suspicions:
    """What was found changed, and not reported so far."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[bytes, bytes], tuple[str, float]] = {}
        """By directory and name (empty: the directory): what it is, and since when."""
        self._by_file: defaultdict[bytes, set[tuple[bytes, bytes]]] = defaultdict(set)
        """A file may have several names, and is told of by one."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, unlike: Unlike) -> None:
        """Expect a report of it."""
        key = unlike.directory, unlike.found.name
        self._waiting.setdefault(key, (unlike.what, time.monotonic()))
        if unlike.found.key:
            self._by_file[unlike.found.key].add(key)

    def told(self, directory: bytes, name: bytes, file: bytes) -> None:
        """Take note of a report; what it does not say is empty."""
        self._waiting.pop((directory, name), None)
        self._waiting.pop((directory, b""), None)  # names in it came and went
        for changed in (directory, file):
            for key in self._by_file.pop(changed, ()):
                self._waiting.pop(key, None)

    def clear(self) -> None:
        """Expect nothing any more: reports were lost, which is known."""
        self._waiting.clear()
        self._by_file.clear()

    def overdue(self) -> list[str]:
        """Return, once, what was not reported in time."""
        until_s = time.monotonic() - _REPORTED_WITHIN_S
        keys = [key for key, (_, since_s) in self._waiting.items() if since_s <= until_s]
        found = [self._waiting.pop(key)[0] for key in keys]
        if not self._waiting:
            self._by_file.clear()
        return found


class FileScrub:
    """The rounds over the files of one book. One thread at a time, while nobody else changes the book."""

    def __init__(self, book: FileBook, reader: FileReader, writes: FileWrites, hasher: PageHasher) -> None:
        self._book = book
        self._reader = reader
        self._writes = writes
        self._hasher = hasher
        self._directories: list[int] = []
        """Those of the round that are still due."""
        self._directory = 0
        """The one that is under way, and ..."""
        self._names: list[bytes] = []
        """... what is due in it."""
        self._files: list[FileId] = []
        """Followed files of the round of contents that are still due, and ..."""
        self._page = 0
        """... from which page of the last one on."""
        self._suspected: list[tuple[FileId, PageSet, float]] = []
        """Pages that hold something else, of which no write was told, and since when."""

    # --- names --------------------------------------------------------------------------------------

    def some(self, how: How, is_due: Callable[[bytes, bytes, bytes], bool]) -> Iterator[Unlike]:
        """Look at the next entries, and tell what is not as it is known.

        `is_due` tells of which it was reported that they changed: by directory, name, and the file's own key.
        """
        left = max(_LEAST_ENTRIES, len(self._book) // _ROUND_EPOCHS)
        if not self._names and not self._directories:
            self._directories = [node.number for node in self._book.nodes if node.is_directory]
        while left > 0 and (self._names or self._directories):
            fresh = not self._names
            if fresh:
                self._directory = self._directories.pop()
            left -= 1
            node = self._book.node(self._directory)
            fd = self._open(node) if node is not None else None
            if node is None or fd is None:
                self._names = []
                continue
            try:
                if fresh:
                    if not is_due(node.key, b"", b""):
                        yield from self._itself(node, fd)
                    self._names = self._reader.names_in(node, fd)
                names, self._names = self._names[:left], self._names[left:]
                left -= len(names)
                for name in names:
                    known = self._book.node(node.children.get(name, 0))
                    if not is_due(node.key, name, known.key if known is not None else b""):
                        yield from self._entry(node, fd, name, known, how)
            except OSError as error:  # it counts as it is known; the next round looks again
                log.info("capture.not_looked_at_again", directory=node.number, reason=error.strerror)
                self._names = []
            finally:
                os.close(fd)

    def _open(self, node: Node) -> int | None:
        try:
            return self._reader.open_directory(node)
        except UnreadableError:
            return None  # it is being moved; the next round has it

    def _itself(self, node: Node, fd: int) -> Iterator[Unlike]:
        if what := _unlike(node, os.fstat(fd)):
            yield self._told(node, self._reader.itself(fd), what)

    def _entry(self, directory: Node, fd: int, name: bytes, known: Node | None, how: How) -> Iterator[Unlike]:
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if known is not None and error.errno in GONE:  # else it counts as it is known
                yield self._told(directory, Found(directory.id, name, None), "is gone")
            return
        if status.st_dev != directory.id[0]:
            return  # another file system is mounted there
        if known is None or known.id != (status.st_dev, status.st_ino):
            what = "is not known"
        elif not (what := _unlike(known, status)) and (known.times is None or known.looks_same(status)):
            return
        try:
            for found in self._reader.look(directory.id, fd, name, how):
                yield self._told(directory, found, what)
                what = ""  # what is below a new directory is not reported one by one
        except UnreadableError:
            return  # the next round looks again

    def _told(self, directory: Node, found: Found, what: str) -> Unlike:
        if not what:
            return Unlike(found, directory.key, "")
        path = self._reader.path_of(directory) or [b"?"]
        shown = os.fsdecode(b"/".join([*path, found.name] if found.name else path))
        return Unlike(found, directory.key, f"{shown} {what}")

    # --- contents -----------------------------------------------------------------------------------

    def some_content(self) -> str:
        """Compare the next pages of large files that are followed; tell of some that hold something else.

        All of that file is in doubt then. Empty: there are none of which no write was told for a minute.
        """
        if self._suspected and self._suspected[0][2] <= time.monotonic() - _REPORTED_WITHIN_S:
            file, pages, _ = self._suspected.pop(0)
            return self._missed(file, pages)
        if not self._files:
            self._files, self._page = self._writes.followed, 0
        if self._files:
            file, first = self._files[-1], self._page
            node = self._book.find(file)
            end = min(first + _CONTENT_PAGES, node.inode.pages) if node is not None else 0
            if first < end:
                pages = self._unlike_pages(file, PageSet(np.array([first, end], dtype=np.uint64)))
                if len(pages):
                    self._suspected.append((file, pages, time.monotonic()))
            self._page = end
            if node is None or end >= node.inode.pages:
                self._files.pop()
                self._page = 0
        return ""

    def _missed(self, file: FileId, pages: PageSet) -> str:
        missed, node = self._unlike_pages(file, pages), self._book.find(file)
        if not len(missed) or node is None:
            return ""
        self._writes.doubt(file)
        path = os.fsdecode(b"/".join(self._reader.path_of(node) or [b"?"]))
        return f"{len(missed)} pages of {path} hold something else, from page {missed.bounds[0]} on"

    def _unlike_pages(self, file: FileId, pages: PageSet) -> PageSet:
        """Return those of a file's pages (from 0) that are not as they are known, nor in doubt."""
        node = self._book.find(file)
        if node is None or file not in self._writes or (fd := self._reader.open_regular(node)) is None:
            return PageSet.union([])
        try:
            pages &= PageSet(np.array([0, max(node.inode.pages, 1)], dtype=np.uint64))
            numbers = pages.numbers
            content = bytearray(len(numbers) * PAGE_BYTES)
            at = 0
            for first, end in pages.bounds.reshape(-1, 2).tolist():
                part = memoryview(content)[at : at + (end - first) * PAGE_BYTES]
                os.preadv(fd, [part], first * PAGE_BYTES)
                at += len(part)
            status = os.fstat(fd)
            if not node.followed or not node.looks_same(status):  # blocks may have moved
                return PageSet.union([])
            unlike = self._book.unlike(node, numbers, self._hasher.identify(memoryview(content)))
            return PageSet.of(numbers[unlike]) - self._writes.pages_in_doubt(file)
        except OSError:
            return PageSet.union([])
        finally:
            os.close(fd)


def _unlike(node: Node, status: os.stat_result) -> str:
    """Say in what an epoch would have a file otherwise than it is; empty: in nothing that times can tell."""
    inode = node.inode
    if stat.S_IFMT(inode.mode) != stat.S_IFMT(status.st_mode):
        return "is of another kind"
    if (inode.mode, inode.uid, inode.gid) != (status.st_mode, status.st_uid, status.st_gid):
        return "has another mode or owner"
    if inode.mtime_ns != status.st_mtime_ns:
        return "was modified"
    if stat.S_ISREG(inode.mode) and inode.size != status.st_size:
        return "has another size"
    return ""
