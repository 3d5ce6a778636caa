"""What regular files hold: brought from an epoch's pages into files in place, and compared with them.

In: for each file which of its pages are to be brought, or may differ. Out: the file as the epoch has it, its
size and its holes included. Files are taken in the order in which their contents stand in the epoch, many in
one reading, and never more than a block of pages is held.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from common.durable import cause_of
from common.errors import StoreError
from common.file_records import CONTENTS, Inode
from common.model import PAGE_BYTES
from replica.file_model import Difference, FileModel
from replica.file_ops import MISSING, FileOps, check_kind, data_between, explained, reopened
from replica.file_site import Site
from replica.folding import DAMAGE_HINT
from replica.levels import Numbers, rows_in
from replica.stored_files import NO_NUMBERS, EpochFiles

_BATCH_FILES: Final = 1024
_BATCH_PAGES: Final = 1 << 16
_BLOCK_PAGES: Final = 256
_WORDS: Final = PAGE_BYTES // 8

Pages = NDArray[np.uint64]
"""Contents of pages; shape (n, 512)."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Pages of one file, by their numbers in `CONTENTS`."""

    inode: Inode
    numbers: Numbers
    """Those whose bytes the epoch has, ascending."""
    holes: tuple[tuple[int, int], ...]
    """Those that are holes: each time first and end."""
    file: Literal["empty", "older", "unknown"]
    """What the file holds: nothing, something else in all these pages, or whatever it be."""


def changed_portions(model: FileModel, difference: Difference, dirty: dict[int, Numbers]) -> list[Portion]:
    """Say what to bring into files that were what the model was before the difference.

    `dirty`: pages that may have changed, by the place of the file that they belong to now.
    """
    portions = []
    for number, inode in difference.after.items():
        if not stat.S_ISREG(inode.mode):
            continue
        old = difference.before.get(number)
        if old is None or not stat.S_ISREG(old.mode):
            portion = whole_portion(model, inode, "empty")
        elif inode.pages and old.pages and inode.place != old.place:
            portion = whole_portion(model, inode, "unknown")
        else:
            portion = _changed_portion(model, inode, old, dirty.get(inode.place, NO_NUMBERS))
        if portion.numbers.size or portion.holes or inode.size != (old.size if old else 0):
            portions.append(portion)
    return sorted(portions, key=lambda portion: portion.inode.place)


def all_portions(model: FileModel, fresh: Set[int] = frozenset()) -> Iterator[Portion]:
    """Yield the whole content of every file; `fresh` are known to be empty."""
    for inode in model.inodes.values():
        if stat.S_ISREG(inode.mode) and not inode.pages and inode.number not in fresh:
            yield whole_portion(model, inode, "unknown")
    for first, number in model.places.all():
        inode = model.inodes[number]
        if inode.pages and inode.place == first:
            yield whole_portion(model, inode, "empty" if number in fresh else "unknown")


def whole_portion(model: FileModel, inode: Inode, file: Literal["empty", "unknown"]) -> Portion:
    """Return all pages of a file."""
    if not inode.pages:
        return Portion(inode, NO_NUMBERS, (), file)
    first, end = inode.place, inode.place + inode.pages
    numbers = model.present(first, end)
    return Portion(inode, numbers, _gaps(numbers, first, end) if file != "empty" else (), file)


class ContentWriter:
    """Brings contents into the files of a tree. Raises StoreError, NoSpaceError."""

    def __init__(self, site: Site, model: FileModel, files: EpochFiles, ops: FileOps) -> None:
        self._site = site
        self._model = model
        self._files = files
        self._ops = ops

    def bring(self, portions: Iterable[Portion]) -> None:
        """Make the files hold that. They must be there."""
        for portion, stream in _streamed(portions, self._files):
            entry = self._model.names[portion.inode.number][0]
            with (
                explained("write", lambda: self._site.path(entry)),  # noqa: B023
                self._site.opened(entry) as found,
            ):
                check_kind(os.fstat(found), portion.inode)
                with reopened(found, os.O_RDWR) as descriptor:
                    self._bring(descriptor, portion, stream)

    def _bring(self, descriptor: int, portion: Portion, stream: _Stream) -> None:
        inode = portion.inode
        self._ops.resize(descriptor, inode.size)
        for first, end in portion.holes:
            self._clear(descriptor, first - inode.place, end - inode.place)
        for numbers, block in stream.take(portion.numbers):
            self._place(descriptor, portion, numbers.astype(np.int64) - inode.place, block)

    def _place(self, descriptor: int, portion: Portion, rows: NDArray[np.int64], block: memoryview) -> None:
        """Write what differs of some pages of a file; pages of zeros become holes."""
        pages = _as_pages(block)
        zero = ~_unlike(pages, np.uint64(0))
        wanted = np.ones(len(rows), dtype=np.bool_)
        if portion.file == "empty":
            wanted = ~zero
        elif portion.file == "unknown":
            wanted = zero | _unlike(_read(descriptor, rows), pages)  # zeros may be no hole yet
        for first, end in _stretches(rows, zero.astype(np.int8) + 2 * wanted.astype(np.int8)):
            row, past = int(rows[first]), int(rows[end - 1]) + 1
            if wanted[first] and zero[first]:
                self._clear(descriptor, row, past)
            elif wanted[first]:
                start = row * PAGE_BYTES
                size = min(past * PAGE_BYTES, portion.inode.size) - start
                self._ops.write(descriptor, block[first * PAGE_BYTES :][:size], start)

    def _clear(self, descriptor: int, row: int, past: int) -> None:
        self._ops.clear(descriptor, row * PAGE_BYTES, past * PAGE_BYTES)


def portions_from(model: FileModel, page: int, most_pages: int) -> tuple[list[Portion], int | None]:
    """Return what stands in the contents from a page on, about so many pages, and where the rest begins.

    None: there is no more. A large file is cut.
    """
    portions: list[Portion] = []
    left = most_pages
    for first, number in model.places.all(page):
        inode = model.inodes[number]
        if inode.place != first:
            continue  # attributes
        start, end = max(first, page), first + inode.pages
        if left <= 0:
            return portions, start
        numbers = model.present(start, end)
        if len(numbers) > left:
            end, numbers = int(numbers[left]), numbers[:left]
        portions.append(Portion(inode, numbers, _gaps(numbers, start, end), "unknown"))
        left -= len(numbers) + 1
        if end < first + inode.pages:
            return portions, end
    return portions, None


def differing(
    site: Site, model: FileModel, files: EpochFiles, portions: Iterable[Portion]
) -> Iterator[Inode]:
    """Yield the files of those portions that are not what the epoch has there; not those that are missing.

    Raises StoreError if something cannot be read.
    """
    for portion, stream in _streamed(portions, files):
        entry = model.names[portion.inode.number][0]
        blocks = stream.take(portion.numbers)
        differs = False
        try:
            with explained("read", lambda: site.path(entry)), site.opened(entry) as found:  # noqa: B023
                if stat.S_ISREG(os.fstat(found).st_mode):
                    with reopened(found, os.O_RDONLY) as descriptor:
                        differs = _differs(descriptor, portion, blocks)
        except StoreError as error:
            if cause_of(error) not in MISSING:
                raise
        for _ in blocks:
            pass  # the next file's pages come behind
        if differs:
            yield portion.inode


def _differs(descriptor: int, portion: Portion, blocks: Iterator[tuple[Numbers, memoryview]]) -> bool:
    inode = portion.inode
    for numbers, block in blocks:
        if _unlike(_read(descriptor, numbers.astype(np.int64) - inode.place), _as_pages(block)).any():
            return True
    for first, end in portion.holes:
        bounds = (first - inode.place) * PAGE_BYTES, (end - inode.place) * PAGE_BYTES
        for at, past in data_between(descriptor, *bounds):
            last = -(-past // PAGE_BYTES)
            for start in range(at // PAGE_BYTES, last, _BLOCK_PAGES):
                if _read(descriptor, np.arange(start, min(start + _BLOCK_PAGES, last))).any():
                    return True
    return False


class _Stream:
    """Pages of contents one after the other, handed out in portions."""

    def __init__(self, blocks: Iterator[memoryview]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def take(self, numbers: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        """Yield the next pages, whose numbers these are, in blocks that are valid until the next."""
        while numbers.size:
            if not self._rest:
                self._rest = next(self._blocks, self._rest)
                if not self._rest:
                    raise StoreError("pages of contents are missing", hint=DAMAGE_HINT)
            block = self._rest[: len(numbers) * PAGE_BYTES]
            self._rest = self._rest[len(block) :]
            pages = len(block) // PAGE_BYTES
            yield numbers[:pages], block
            numbers = numbers[pages:]


def _streamed(portions: Iterable[Portion], files: EpochFiles) -> Iterator[tuple[Portion, _Stream]]:
    """Yield each portion with a stream that is just before its pages."""
    for batch in _batches(portions):
        numbers = np.concatenate([portion.numbers for portion in batch])
        stream = _Stream(files.read(CONTENTS, numbers))
        for portion in batch:
            yield portion, stream


def _batches(portions: Iterable[Portion]) -> Iterator[list[Portion]]:
    batch: list[Portion] = []
    pages = 0
    for portion in portions:
        batch.append(portion)
        pages += len(portion.numbers)
        if len(batch) == _BATCH_FILES or pages >= _BATCH_PAGES:
            yield batch
            batch, pages = [], 0
    if batch:
        yield batch


def _changed_portion(model: FileModel, inode: Inode, old: Inode, dirty: Numbers) -> Portion:
    """Return the pages that changed, and those by which a file has grown. What it grew by holes is none."""
    if not inode.pages:
        return Portion(inode, NO_NUMBERS, (), "older")
    kept = inode.place + min(old.pages, inode.pages)
    dirty = dirty[dirty < kept]
    here = rows_in(model.contents, dirty) >= 0
    numbers = np.concatenate([dirty[here], model.present(kept, inode.place + inode.pages)])
    return Portion(inode, numbers, _runs(dirty[~here]), "older")


def _runs(numbers: Numbers) -> tuple[tuple[int, int], ...]:
    """Return first and end of each run of ascending numbers."""
    if not numbers.size:
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], breaks + 1))]
    lasts = numbers[np.concatenate((breaks, [len(numbers) - 1]))]
    return tuple(zip(firsts.tolist(), (lasts + np.uint64(1)).tolist(), strict=True))


def _gaps(numbers: Numbers, first: int, end: int) -> tuple[tuple[int, int], ...]:
    """Return first and end of what is between ascending numbers, from `first` to `end`."""
    runs = _runs(numbers)
    starts = [first, *(stop for _, stop in runs)]
    stops = [*(start for start, _ in runs), end]
    return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def _stretches(rows: NDArray[np.int64], kind: NDArray[np.int8] | None = None) -> Iterator[tuple[int, int]]:
    """Yield first and end of each stretch of neighbouring rows, of one kind."""
    breaks = rows[1:] != rows[:-1] + 1
    if kind is not None:
        breaks |= kind[1:] != kind[:-1]
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(rows)]
    yield from pairwise(bounds)


def _unlike(pages: Pages, others: Pages | np.uint64) -> NDArray[np.bool_]:
    """Mark the pages that are not the same."""
    marks: NDArray[np.bool_] = np.any(pages != others, axis=1)
    return marks


def _as_pages(block: memoryview) -> Pages:
    return np.frombuffer(block, dtype=np.uint64).reshape(-1, _WORDS)


def _read(descriptor: int, rows: NDArray[np.int64]) -> Pages:
    """Read pages of a file; what is behind its end is zeros."""
    room = memoryview(bytearray(len(rows) * PAGE_BYTES))
    for first, end in _stretches(rows):
        part, offset = room[first * PAGE_BYTES : end * PAGE_BYTES], int(rows[first]) * PAGE_BYTES
        while part and (count := os.preadv(descriptor, [part], offset)):
            part, offset = part[count:], offset + count
    return _as_pages(room)
