"""Takes in what was found of files: the book says it from then on, and new content is kept for the replicas.

In: `Found`, in the order in which it was found. Out: epochs as the book has them, with the content that
changed lately in layers. Content that did not is nowhere but in its file.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import NoSpaceError
from common.file_records import CONTENTS, ROOTS
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from primary.file_book import FileBook, Node
from primary.file_reader import Content, FileReader, Found
from primary.file_writes import FileWrites
from primary.layers import LayerChain, LayeredPages, LayerWriter
from primary.page_set import PageSet

_KEPT_AT_ONCE: Final = 256
_MOST_KEPT: Final = 16
"""So many times that is kept for an epoch, after one that could not be sent: 16 MiB."""
_BEYOND: Final = 1 << 52
"""Behind the last page number."""
_BATCH_PAGES: Final = 1 << 16


class FileIntake:
    """The book of one capture, and the layers beside it. Others may call `read_now` and `want` meanwhile."""

    def __init__(
        self, book: FileBook, reader: FileReader, writes: FileWrites, hasher: PageHasher, layers: Path
    ) -> None:
        """`layers` is the directory where contents are kept for a while."""
        self.book = book
        self.lock = threading.Lock()
        """Held while the book is changed, and where senders look something up in it."""
        self._reader = reader
        self._writes = writes
        self._hasher = hasher
        self._layers = layers
        self._chain = LayerChain(layers)
        self._writer: LayerWriter | None = None
        self._wanted: int | None = None
        """From which page on content could not be sent, because it had changed since."""

    def prune(self, since: EpochId | None) -> None:
        """Let go of content that all replicas have, which hold `since`, or that is no file's any more."""
        if since is not None:
            self._chain.drop_through(since)
        self._chain.merge({CONTENTS: self.book.contents})

    def want(self, page: int) -> None:
        """Keep content from that page on for the next epoch: it changes before it can be sent."""
        self._wanted = page

    def keep_wanted(self) -> None:
        """Keep content that is in its file alone. What changes after this is found, and kept as it is then.

        So an epoch can be sent to who has nothing, however fast files change: each one brings some more.
        """
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        behind = PageSet(np.array([wanted, _BEYOND], dtype=np.uint64))
        alone = (self.book.contents & behind) - self._chain.of(CONTENTS)
        for kept, numbers in enumerate(alone.pieces(_KEPT_AT_ONCE)):
            pages = [self.read_now(number) for number in numbers.tolist()]
            rows = np.flatnonzero([page is not None for page in pages])
            block = b"".join(page or bytes(PAGE_BYTES) for page in pages)
            self._writer_of().add(CONTENTS, numbers[rows], memoryview(block), rows)
            if kept == _MOST_KEPT:
                break

    def read_now(self, page: int) -> bytes | None:
        """Return what a page of the contents is now, filled up with zeros; None: it is no file's any more."""
        with self.lock:
            held = self.book.holder(page)
            fd = self._reader.open_regular(held[0]) if held is not None else None
        if held is None or fd is None:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            return os.pread(fd, PAGE_BYTES, held[1] * PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
        finally:
            os.close(fd)

    def identify(self, content: memoryview) -> NDArray[np.uint64]:
        """Identify whole pages; shape (pages, 2)."""
        return self._hasher.identify(content)

    def seal(self, epoch: EpochId) -> LayeredPages:
        """Return the content that was kept, that for an epoch included."""
        self._chain.append(self._writer_of().seal(epoch))
        self._writer = None
        return LayeredPages(self._chain.layers, {})

    def close(self) -> None:
        """Remove what was kept. Idempotent."""
        self._drop()
        self._chain.close()

    def take_in(self, all_found: Iterable[Found]) -> None:
        """Have the book say what was found; the content of what is new is kept for the replicas."""
        batch: dict[Node, Found] = {}
        pages = 0
        try:
            for found in all_found:
                with self.lock:
                    if found.seen is not None and self.book.find(found.seen.id) in batch:
                        self._take_content(batch)  # before what was found of it later
                        pages = 0
                    node = self._take_entry(found)
                    if found.content is None:
                        continue
                    if node is None:
                        if found.seen is not None:
                            self._writes.doubt(found.seen.id)
                        continue
                    batch[node] = found
                    pages += node.inode.pages
                    if pages >= _BATCH_PAGES:
                        self._take_content(batch)
                        pages = 0
        finally:  # what was found before an error is not looked at again
            with self.lock:
                self._take_content(batch)

    def _take_entry(self, found: Found) -> Node | None:
        parent = ROOTS
        if found.itself and found.seen is not None:
            known = self.book.find(found.seen.id)
            if known is not None and known.key == found.key:
                return self.book.see(found.seen, found.key, (ROOTS, b""))
            return None
        if found.parent is not None:
            directory = self.book.find(found.parent)
            if directory is None or not directory.is_directory:
                return None  # it is gone, with all that was in it; its number may be a file's by now
            parent = directory.number
            if found.whole:
                directory.whole = True
                return None
        if found.seen is None:
            self.book.unlink(parent, found.name)
            return None
        node = self.book.see(found.seen, found.key, (parent, found.name))
        self.book.link(parent, found.name, node)
        return node

    def _take_content(self, batch: dict[Node, Found]) -> None:
        parts = []
        for node, found in batch.items():
            content, seen, pages = found.content, found.seen, node.inode.pages
            if content is None or seen is None or self.book.node(node.number) is not node:
                continue  # it is gone since
            moved = content.within is not None and content.place != node.inode.place
            if moved or seen.status.st_size != node.inode.size:
                self._writes.doubt(node.id)
                self.book.doubt(node)
                continue  # it was seen again since, with another size
            if pages:
                parts.append((node, *self._identified(content), content.within))
            self.book.read(node, seen.status, found.at_ns, still=found.still)
            node.followed = content.followed
        parts.sort(key=lambda part: part[0].inode.place)
        changed = self.book.put_content(parts)
        contents = [batch[node].content for node, _, _, _ in parts]
        batch.clear()
        try:
            for (node, numbers, _, _), content, marks in zip(parts, contents, changed, strict=True):
                self._keep(node, content, numbers[marks])
        except NoSpaceError:  # what was kept so far is in the files as well
            self._drop()
            raise

    def _identified(self, content: Content) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the pages of a file that are not zeros, and their identities."""
        if content.raw is not None:
            identity = self._hasher.identify(memoryview(content.raw))
            rows = np.flatnonzero(identity.any(axis=1))
            pages = rows.astype(np.uint64) if content.rows is None else content.rows.at(rows)
            return pages, identity[rows]
        parts = content.identified or []
        numbers = [np.empty(0, dtype=np.uint64), *(each for each, _ in parts)]
        return np.concatenate(numbers), np.concatenate(
            [np.empty((0, 2), dtype=np.uint64), *(each for _, each in parts)]
        )

    def _keep(self, node: Node, content: Content | None, pages: NDArray[np.uint64]) -> None:
        """Write the content of changed pages to the layer, as far as it is here."""
        if content is None:
            return
        if content.raw is not None:
            numbers = pages + np.uint64(node.inode.place)
            rows = pages.astype(np.intp) if content.rows is None else content.rows.rank(pages)
            self._writer_of().add(CONTENTS, numbers, memoryview(content.raw), rows)
        for pages, data in content.kept or ():
            numbers = pages + np.uint64(node.inode.place)
            self._writer_of().add(CONTENTS, numbers, memoryview(data), np.arange(len(pages)))

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.drop()
            self._writer = None

    def _writer_of(self) -> LayerWriter:
        if self._writer is None:
            self._writer = LayerWriter(self._layers)
        return self._writer
