"""What an epoch says of a workload's files, checked and kept: inodes, names, and where contents stand.

In: pages of records (`common.file_records`), all of them or those that changed. Out: `FileModel`, and what
became different. Whatever a page says, what is kept makes sense: every inode has a name, directories have one
and form trees below the declared ones, names are such as a directory can have, contents do not overlap. What
does not is refused with a StoreError.

It takes about 800 bytes for each file (two records, and four places in dictionaries), and 8 for each page of
contents.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.errors import ProtocolError, StoreError
from common.file_records import (
    CONTENTS,
    MOST_PAGES,
    RECORDS,
    ROOTS,
    Entry,
    Inode,
    Record,
    unpack_extra,
    unpack_page,
)
from common.model import PAGE_BYTES
from replica.folding import DAMAGE_HINT
from replica.level_writer import MAX_PAGE_NUMBER
from replica.levels import Numbers, rows_in
from replica.stored_files import NO_NUMBERS, EpochFiles

Attributes = tuple[tuple[bytes, bytes], ...]

_KINDS: Final = frozenset(
    {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
)
_MOST_NAME_BYTES: Final = 255
_MOST_TARGET_BYTES: Final = 4095
_MOST_VALUE_BYTES: Final = 65536
"""Of an extended attribute: XATTR_SIZE_MAX of <linux/limits.h>."""
_MOST_EXTRA_BYTES: Final = 16 << 20
"""Far more than a file system keeps beside a file: a damaged length must not exhaust memory."""
_MOST_ID: Final = (1 << 32) - 2
_TIMES_NS: Final = range(-(1 << 63), 1 << 63)


@dataclass(slots=True)
class Difference:
    """What became different in a model. An inode that changed is in both `before` and `after`."""

    before: dict[int, Inode] = field(default_factory=dict)
    after: dict[int, Inode] = field(default_factory=dict)
    lost: list[Entry] = field(default_factory=list)
    won: list[Entry] = field(default_factory=list)


class FileModel:
    """The files of one epoch. Not for several threads at once."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[int, tuple[Entry, ...]] = {}
        """The entries that lead to each inode."""
        self.children: dict[int, dict[bytes, Entry]] = {}
        """The entries of each directory that has some, and of `ROOTS`."""
        self.places = PlaceTable()
        self.contents: Numbers = NO_NUMBERS
        """All pages of `CONTENTS` that the epoch has, ascending; others are holes."""
        self._pages: dict[int, tuple[Record, ...]] = {}

    def become(self, files: EpochFiles, changed: Mapping[SpaceKey, Numbers] | None = None) -> Difference:
        """Become what another epoch says, of which the pages of records that did not change are not read.

        `changed` None: all are. Raises StoreError for what cannot be; the model is of no use then.
        """
        present = files.pages(RECORDS)
        read = present if changed is None else changed[RECORDS]
        known = np.fromiter(self._pages, dtype=np.uint64, count=len(self._pages))
        gone = np.setdiff1d(known, present)
        before = [record for page in chain(read, gone) for record in self._pages.pop(int(page), ())]
        after: list[Record] = []
        for page, records in _records(files, read):
            self._pages[page] = records
            after += records
        if before:
            before, after = _without_common(before, after)
        difference = self._replace(before, after)
        self._check(difference)
        self.places.replace(
            chain.from_iterable(map(_places_of, difference.before.values())),
            chain.from_iterable(map(_places_of, difference.after.values())),
        )
        self.contents = files.pages(CONTENTS)
        return difference

    def is_directory(self, number: int) -> bool:
        """Whether there is a directory of this number."""
        inode = self.inodes.get(number)
        return inode is not None and stat.S_ISDIR(inode.mode)

    def present(self, first: int, end: int) -> Numbers:
        """Return the pages of contents between two page numbers (`end` exclusive) that are no holes."""
        low, high = np.searchsorted(self.contents, np.array([first, end], dtype=np.uint64))
        return self.contents[low:high]

    def _replace(self, before: Iterable[Record], after: Iterable[Record]) -> Difference:
        difference = Difference()
        for record in before:
            if isinstance(record, Inode):
                difference.before[record.number] = record
                del self.inodes[record.number]
            else:
                difference.lost.append(record)
                self._forget(record)
        for record in after:
            if isinstance(record, Inode):
                if record.number in self.inodes:
                    _refuse(f"there are two inodes {record.number}")
                difference.after[record.number] = self.inodes[record.number] = record
            else:
                difference.won.append(record)
                self._add(record)
        return difference

    def _add(self, entry: Entry) -> None:
        siblings = self.children.setdefault(entry.parent, {})
        if entry.name in siblings:
            _refuse(f"{readable(entry.name)} is twice in directory {entry.parent}")
        siblings[entry.name] = entry
        self.names[entry.inode] = (*self.names.get(entry.inode, ()), entry)

    def _forget(self, entry: Entry) -> None:
        siblings = self.children[entry.parent]
        del siblings[entry.name]
        if not siblings:
            del self.children[entry.parent]
        left = tuple(name for name in self.names[entry.inode] if name != entry)
        if left:
            self.names[entry.inode] = left
        else:
            del self.names[entry.inode]

    def _check(self, difference: Difference) -> None:
        for number, inode in difference.after.items():
            if what := _wrong_with(inode):
                _refuse(f"inode {number} {what}")
        for entry in difference.won:
            if entry.parent != ROOTS and not self.is_directory(entry.parent):
                _refuse(f"{readable(entry.name)} is in {entry.parent}, which is no directory")
            if entry.parent != ROOTS and not _is_name(entry.name):
                _refuse(f"no file can have the name {readable(entry.name)!r}")
        touched = difference.before.keys() | difference.after.keys()
        touched |= {entry.inode for entry in chain(difference.lost, difference.won)}
        for number in touched:
            self._check_names(number)
        self._check_trees(difference.won)

    def _check_names(self, number: int) -> None:
        names, inode = self.names.get(number, ()), self.inodes.get(number)
        if inode is None:
            if names or number in self.children:
                _refuse(f"there is no inode {number}, which {len(names)} names lead to")
            return
        if not names:
            _refuse(f"no name leads to inode {number}")
        if not stat.S_ISDIR(inode.mode):
            if number in self.children:
                _refuse(f"inode {number} has entries, and is no directory")
            if any(name.parent == ROOTS for name in names):
                _refuse(f"{readable(names[0].name)} is no directory")
        elif len(names) > 1:
            _refuse(f"directory {number} has {len(names)} names")

    def _check_trees(self, won: Iterable[Entry]) -> None:
        """Refuse directories that are below themselves: only a new name can have brought that about."""
        sound = {ROOTS}
        for entry in won:
            way: dict[int, None] = {}
            number = entry.parent
            while number not in sound:
                if number in way:
                    _refuse(f"directory {number} is below itself")
                way[number] = None
                number = self.names[number][0].parent
            sound.update(way)


class PlaceTable:
    """Whose content or extra stands where in `CONTENTS`: ranges of pages that do not overlap."""

    def __init__(self) -> None:
        self._table = np.empty((0, 3), dtype=np.int64)
        """First page, end, number of the inode; ascending."""

    def replace(self, gone: Iterable[tuple[int, int, int]], come: Iterable[tuple[int, int, int]]) -> None:
        """Take ranges out, and put others in. Raises StoreError if some overlap then."""
        old, new = _table_of(gone), _table_of(come)
        if np.array_equal(old, new):
            return
        kept = np.delete(self._table, np.searchsorted(self._table[:, 0], old[:, 0]), axis=0)
        table = np.insert(kept, np.searchsorted(kept[:, 0], new[:, 0]), new, axis=0)
        clash = np.flatnonzero(table[1:, 0] < table[:-1, 1])
        if clash.size:
            _refuse(f"two files stand at page {int(table[clash[0] + 1, 0])} of the contents")
        self._table = table

    def touched(self, numbers: Numbers) -> Iterator[tuple[int, int, Numbers]]:
        """Yield first page and inode of each range that has some of these pages (ascending), and those."""
        if not len(self._table):
            return
        rows = np.searchsorted(self._table[:, 0], numbers.astype(np.int64), side="right") - 1
        inside = (rows >= 0) & (numbers < self._table[rows, 1].astype(np.uint64))
        rows, numbers = rows[inside], numbers[inside]
        starts = np.flatnonzero(np.diff(rows, prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(rows)]):
            row = rows[start]
            yield int(self._table[row, 0]), int(self._table[row, 2]), numbers[start:end]

    def all(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Yield first page and inode of each range that does not end before a page, ascending."""
        for row in range(int(np.searchsorted(self._table[:, 1], first, side="right")), len(self._table)):
            yield int(self._table[row, 0]), int(self._table[row, 2])


def traits_of(inode: Inode, files: EpochFiles) -> tuple[bytes, Attributes]:
    """Return target and extended attributes of an inode, wherever they stand. Raises StoreError."""
    if inode.extra is None:
        return inode.target, inode.attributes
    first, size = inode.extra
    numbers = np.arange(first, first + _pages_for(size), dtype=np.uint64)
    try:
        content = b"".join(map(bytes, files.read(CONTENTS, numbers)))
        target, attributes = unpack_extra(content[:size])
    except ProtocolError as error:
        raise StoreError(f"inode {inode.number}: {error.message}", hint=DAMAGE_HINT) from error
    if what := _wrong_with_traits(inode.mode, target, attributes):
        _refuse(f"inode {inode.number} {what}")
    return target, attributes


def gone_from(old: Numbers, new: Numbers) -> Numbers:
    """Return those of the ascending `old` that are not in `new`."""
    return NO_NUMBERS if np.array_equal(old, new) else old[rows_in(new, old) < 0]


def readable(name: bytes) -> str:
    """Return a name or path for people: on one line, whatever it is."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _records(files: EpochFiles, numbers: Numbers) -> Iterator[tuple[int, tuple[Record, ...]]]:
    """Yield each page of records with what is on it."""
    left = iter(numbers.tolist())
    for block in files.read(RECORDS, numbers):
        for start in range(0, len(block), PAGE_BYTES):
            page = next(left)
            try:
                yield page, tuple(unpack_page(block[start : start + PAGE_BYTES]))
            except ProtocolError as error:
                raise StoreError(f"page {page}: {error.message}", hint=DAMAGE_HINT) from error


def _without_common(before: Sequence[Record], after: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Leave out what is in both: a record that only changed its page, or stands beside one that changed."""
    old, new = set(before), set(after)
    if len(new) != len(after):
        _refuse("a record is there twice")
    return [record for record in before if record not in new], [
        record for record in after if record not in old
    ]


def _places_of(inode: Inode) -> Iterator[tuple[int, int, int]]:
    """Yield the ranges of `CONTENTS` that an inode has, with its number."""
    if inode.pages:
        yield inode.place, inode.place + inode.pages, inode.number
    if inode.extra is not None:
        first, size = inode.extra
        yield first, first + _pages_for(size), inode.number


def _table_of(ranges: Iterable[tuple[int, int, int]]) -> NDArray[np.int64]:
    table = np.fromiter(chain.from_iterable(ranges), dtype=np.int64).reshape(-1, 3)
    return table[np.argsort(table[:, 0], kind="stable")]


def _pages_for(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES)


def _is_name(name: bytes) -> bool:
    plain = b"/" not in name and b"\0" not in name and name not in (b"", b".", b"..")
    return plain and len(name) <= _MOST_NAME_BYTES


def _wrong_with(inode: Inode) -> str:
    """Say what an inode cannot be; empty if it is sound."""
    if not 0 < inode.number < 1 << 62:
        return "has a number that no inode can have"
    if not 0 <= inode.mode < 1 << 16 or stat.S_IFMT(inode.mode) not in _KINDS:
        return f"has the mode {inode.mode:#o}"
    kind = stat.S_IFMT(inode.mode)
    if not (0 <= inode.uid <= _MOST_ID and 0 <= inode.gid <= _MOST_ID and inode.mtime_ns in _TIMES_NS):
        return f"has the owner {inode.uid}:{inode.gid} and the time {inode.mtime_ns}"
    if not 0 <= inode.device < 1 << 64 or (inode.device and kind not in (stat.S_IFCHR, stat.S_IFBLK)):
        return f"is the device {inode.device}"
    if not 0 <= inode.size <= (MOST_PAGES * PAGE_BYTES if kind == stat.S_IFREG else 0):
        return f"has {inode.size} bytes"
    if inode.pages and not 0 <= inode.place <= MAX_PAGE_NUMBER - inode.pages:
        return f"stands at page {inode.place}"
    if inode.extra is None:
        return _wrong_with_traits(inode.mode, inode.target, inode.attributes)
    first, size = inode.extra
    if not (0 < size <= _MOST_EXTRA_BYTES and 0 <= first <= MAX_PAGE_NUMBER - _pages_for(size)):
        return f"has {size} bytes of attributes at page {first}"
    return "has attributes twice" if inode.target or inode.attributes else ""


def _wrong_with_traits(mode: int, target: bytes, attributes: Attributes) -> str:
    if bool(target) != stat.S_ISLNK(mode) or b"\0" in target or len(target) > _MOST_TARGET_BYTES:
        return f"is of mode {mode:#o} and leads to {readable(target)!r}"
    names = [name for name, _ in attributes]
    if names != sorted(set(names)):
        return "has an attribute twice, or not in order"
    for name, value in attributes:
        if not 0 < len(name) <= _MOST_NAME_BYTES or b"\0" in name or len(value) > _MOST_VALUE_BYTES:
            return f"has the attribute {readable(name)!r} of {len(value)} bytes"
    return ""


def _refuse(what: str) -> NoReturn:
    raise StoreError(f"the epoch's files make no sense: {what}", hint=DAMAGE_HINT)
