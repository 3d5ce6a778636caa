"""What is known of the files of a workload: inodes, names, and what regular files hold, page by page.

In: what was seen of files, in any order, while the workload ran or stood still. Out: the two spaces of pages
that an epoch has of them (`common.file_records`). Files are told apart as the file system does, by device and
inode; our own numbers stay with an inode for as long as it has a name in one of the directories.

Nothing here opens a file: `primary.file_reader` does. Used by one thread at a time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import CaptureError
from common.file_records import (
    CONTENTS,
    MOST_RECORD_BYTES,
    NOWHERE,
    RECORDS,
    ROOTS,
    Entry,
    Inode,
    Record,
    pack_extra,
    pack_record,
)
from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.book import PageBook
from primary.capture import SpacePages
from primary.file_look import Status
from primary.file_places import Places, RecordPages
from primary.page_set import NO_PAGES, PageSet

Attributes = tuple[tuple[bytes, bytes], ...]
FileId = tuple[int, int]
"""Device and inode number."""

_DOUBTFUL_NS: Final = 20_000_000
"""Two ticks of the slowest kernels: what was changed so shortly before it was looked at may be changed again
without its times moving."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One inode as it was found."""

    status: os.stat_result | Status
    target: bytes = b""
    attributes: Attributes = ()

    @property
    def id(self) -> FileId:
        """Which one it is."""
        return self.status.st_dev, self.status.st_ino

    @property
    def is_directory(self) -> bool:
        """Whether it has entries."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_regular(self) -> bool:
        """Whether it has contents."""
        return stat.S_ISREG(self.status.st_mode)


NO_CHILDREN: Final[dict[bytes, int]] = {}
"""That of all files: one of its own takes 64 bytes."""


@dataclass(eq=False, slots=True)
class Node:
    """One inode that is known."""

    inode: Inode
    id: FileId
    key: bytes = b""
    """How `primary.file_watch` calls it; empty if nothing is watched."""
    names: tuple[tuple[int, bytes], ...] = ()
    """Directory (our number) and name of each entry."""
    children: dict[bytes, int] = field(default_factory=lambda: NO_CHILDREN)
    """Of a directory: our number of what each name leads to; of all else, always empty."""
    whole: bool = False
    """Of a directory: all that it has was looked at once, and since then what was reported."""
    times: tuple[int, int, int] | None = None
    """Change time, modification time and size when its content was read; None: it has to be read again."""
    still: bool = False
    """Whether it was read while all stood still. If not, a store through a mapping may have come later, and
    moved no time because an earlier one had; until it is closed by who has it open, which is reported."""
    followed: bool = False
    """Whether all of it is known but for what `primary.file_writes` holds for doubtful."""

    @property
    def number(self) -> int:
        """Our number of it."""
        return self.inode.number

    @property
    def is_directory(self) -> bool:
        """Whether it has entries."""
        return stat.S_ISDIR(self.inode.mode)

    def looks_same(self, status: os.stat_result | Status) -> bool:
        """Tell whether its content is what was read, as far as its times can tell."""
        return self.times == _times(status)


class FileBook:
    """All files of the declared directories, as far as they were seen."""

    def __init__(self, hasher: PageHasher) -> None:
        self._hasher = hasher
        self._nodes: dict[int, Node] = {}
        self._by_id: dict[FileId, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._by_place: dict[int, int] = {}
        self._roots: dict[bytes, int] = {}
        self._last = 0
        self._places = Places()
        self._records = RecordPages()
        self._contents, self._record_book = PageBook(CONTENTS), PageBook(RECORDS)
        self._shrunk: dict[int, int] = {}
        """How many pages stood at a place when the last epoch was sealed, of places with fewer since then."""
        self._freed: list[int] = []
        """Places that somebody else may have after the next epoch: until then their pages are known."""
        self._unread: set[int] = set()
        self._unsettled: set[int] = set()
        self._linked: dict[int, int] = {}
        """How many links there are of files with several."""
        self._extras: dict[int, bytes] = {}
        self._promised: dict[tuple[int, bytes], Inode] = {}
        """What names led to in an epoch of another process, until all files were looked at."""
        self._orphans: set[int] = set()
        self._moved: set[int] = set()
        """Directories that came into another one with all that is known to be in them."""

    # --- looking ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def nodes(self) -> Iterator[Node]:
        """All that are known."""
        return iter(list(self._nodes.values()))

    def node(self, number: int) -> Node | None:
        """Return the one with that number."""
        return self._nodes.get(number)

    def find(self, file: FileId) -> Node | None:
        """Return the one that the file system calls so."""
        number = self._by_id.get(file)
        return None if number is None else self._nodes[number]

    def by_key(self, key: bytes) -> Node | None:
        """Return the one that the watch calls so."""
        number = self._by_key.get(key)
        return None if number is None else self._nodes[number]

    def knows_file(self, key: bytes) -> bool:
        """Tell whether the watch's key is that of a file (no directory) with a name."""
        number = self._by_key.get(key)
        if number is None:
            return False
        node = self._nodes[number]
        return bool(node.names) and not node.is_directory

    def leads_only_to(self, directory: bytes, name: bytes, file: bytes) -> bool:
        """Tell whether a name leads to that file, which has no other one; by the watch's keys.

        Then whatever happened to the file, it is found by looking at what was reported of names.
        """
        number = self._by_key.get(file)
        if number is None:
            return False
        names, parent = self._nodes[number].names, self._by_key.get(directory)
        return len(names) == 1 and (parent, name) in names

    def holder(self, page: int) -> tuple[Node, int] | None:
        """Return whose content a page is, and which page of it; None: of no file's at present."""
        place = Places.start_of(page)
        number = self._by_place.get(place)
        return None if number is None else (self._nodes[number], page - place)

    @property
    def contents(self) -> PageSet:
        """All pages of contents."""
        return self._contents.pages

    @property
    def linked_elsewhere(self) -> list[Node]:
        """Regular files that have names outside of the directories."""
        return [
            node
            for number, links in self._linked.items()
            if (node := self._nodes[number]) and len(node.names) < links
        ]

    def take_unsettled(self) -> list[Node]:
        """Return, once, the files that were read so soon after a change that times may not tell the next."""
        taken, self._unsettled = self._unsettled, set()
        return [self._nodes[number] for number in taken if number in self._nodes]

    def path_of(self, number: int) -> list[bytes] | None:
        """Return the names that lead to it: a declared directory, then entries. None: none do.

        Directories that were seen before and after they were moved may be known to be in each other.
        """
        parts: list[bytes] = []
        passed: set[int] = set()
        while number != ROOTS:
            node = self._nodes.get(number)
            if node is None or not node.names or number in passed:
                return None
            passed.add(number)
            number, name = node.names[-1]  # found last: what was found before may be gone
            parts.append(name)
        return parts[::-1]

    def paths_of(self, node: Node) -> list[list[bytes]]:
        """Return, for each name of a file, the names that lead to it."""
        found = []
        for parent, name in node.names:
            above = [] if parent == ROOTS else self.path_of(parent)
            if above is not None:
                found.append([*above, name])
        return found

    # --- taking note --------------------------------------------------------------------------------

    def adopt(self, records: Iterable[Record]) -> None:
        """Give what is seen first the numbers and places that an epoch of another process gave it.

        So that a replica that has that epoch, or one after it, has their contents where they will be. To be
        called before anything is seen; `adopted` ends it.
        """
        inodes: dict[int, Inode] = {}
        entries: list[Entry] = []
        for record in records:
            if isinstance(record, Inode):
                inodes[record.number] = record
            else:
                entries.append(record)
        self._promised = {
            (each.parent, each.name): inodes[each.inode] for each in entries if each.inode in inodes
        }
        self._last = max(inodes, default=0)
        self._places.resume(place for inode in inodes.values() for place in _places_of(inode))

    def adopted(self) -> None:
        """All files were looked at: the places of those that are not there any more are free."""
        unclaimed = {inode.number: inode for inode in self._promised.values()}
        for number in unclaimed.keys() - self._nodes.keys():
            self._freed += _places_of(unclaimed[number])
        self._promised.clear()

    def see(self, seen: Seen, key: bytes, at: tuple[int, bytes]) -> Node:
        """Take note of an inode as it is, under the number that it has or a new one.

        `at` is where it was found: directory and name.
        """
        node = self.find(seen.id)
        if node is not None and stat.S_IFMT(node.inode.mode) != stat.S_IFMT(seen.status.st_mode):
            self._forget(node)  # another one with the same number
            node = None
        if node is None:
            node = Node(self._promised_inode(seen, at) or self._new_inode(), seen.id)
            if seen.is_directory:
                node.children = {}
            self._nodes[node.number] = node
            if node.inode.pages:
                self._unread.add(node.number)
            for place in _places_of(node.inode):
                self._by_place[place] = node.number
            self._by_id[node.id] = node.number
            self._orphans.add(node.number)
        if node.key != key:
            self._by_key.pop(node.key, None)
            node.key, node.whole = key, False
        if key:
            self._by_key[key] = node.number
        self._become(node, self._inode_of(node, seen))
        if seen.is_regular and seen.status.st_nlink > 1:
            self._linked[node.number] = seen.status.st_nlink
        else:
            self._linked.pop(node.number, None)
        return node

    def link(self, parent: int, name: bytes, node: Node) -> None:
        """Take note that a name leads to it, and to nothing else any more."""
        children = self._roots if parent == ROOTS else self._nodes[parent].children
        if children.get(name) == node.number:
            return
        self.unlink(parent, name)
        children[name] = node.number
        if node.children:
            self._moved.add(node.number)
        entry = parent, name
        node.names += (entry,)
        self._orphans.discard(node.number)
        self._records.put(entry, pack_record(Entry(parent, name, node.number)))

    def unlink(self, parent: int, name: bytes) -> None:
        """Take note that a name leads to nothing. What has no name any more goes with the next epoch."""
        directory = None if parent == ROOTS else self._nodes.get(parent)
        children = self._roots if directory is None else directory.children
        number = children.pop(name, None)
        if number is None:
            return
        self._records.remove((parent, name))
        node = self._nodes[number]
        node.names = tuple(entry for entry in node.names if entry != (parent, name))
        if not node.names:
            self._orphans.add(number)

    def put_content(
        self,
        parts: Sequence[tuple[Node, NDArray[np.uint64], NDArray[np.uint64], PageSet | None]],
    ) -> list[NDArray[np.bool_]]:
        """Take note of what files hold; return for each part which of its pages are new or changed.

        A part is a file, its pages that are not zeros (ascending, from 0), their identities, and of which
        pages that is said (None: of all); parts in the order of their places, no file twice.
        """
        if not parts:
            return []
        self._dig([(node, pages, within) for node, pages, _, within in parts])
        numbers = np.concatenate([pages + np.uint64(node.inode.place) for node, pages, _, _ in parts])
        identity = np.concatenate([each for _, _, each, _ in parts])
        changed = self._contents.differs(numbers, identity)
        self._contents.put(numbers, identity)
        ends = np.cumsum([len(pages) for _, pages, _, _ in parts])
        return np.split(changed, ends[:-1])

    def _dig(self, parts: list[tuple[Node, NDArray[np.uint64], PageSet | None]]) -> None:
        """Forget what was known of pages that are zeros now."""
        whole = [node.inode for node, _, within in parts if within is None]
        starts = np.array([inode.place for inode in whole], dtype=np.uint64)
        counts = np.array([inode.pages for inode in whole], dtype=np.uint64)
        some = [
            PageSet(within.bounds + np.uint64(node.inode.place))
            for node, _, within in parts
            if within is not None
        ]
        all_pages = PageSet.union([PageSet.spanning(starts, starts + counts), *some])
        held = PageSet.union([PageSet.of(pages + np.uint64(node.inode.place)) for node, pages, _ in parts])
        holes = (self._contents.pages & all_pages) - held
        if len(holes):
            self._contents.restrict(self._contents.pages - holes)

    def differs(
        self, node: Node, pages: NDArray[np.uint64], identity: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Mark those pages of a file (ascending, from 0) that are not known to hold that; shape (n,)."""
        if node.inode.place == NOWHERE:
            return np.ones(len(pages), dtype=np.bool_)
        return self._contents.differs(pages + np.uint64(node.inode.place), identity)

    def unlike(
        self, node: Node, pages: NDArray[np.uint64], identity: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Mark those pages of a file (ascending, from 0) that are not known to hold that; shape (n,).

        Unlike `differs`, it takes a page of zeros for what it is: not known to hold anything.
        """
        numbers = pages + np.uint64(node.inode.place)
        known, zero = self._contents.pages.has(numbers), ~identity.any(axis=1)
        marks: NDArray[np.bool_] = np.where(zero, known, True)
        rest = np.flatnonzero(~zero)
        marks[rest] = self._contents.differs(numbers[rest], identity[rest])
        return marks

    def read(self, node: Node, status: os.stat_result | Status, now_ns: int, *, still: bool = False) -> None:
        """Take note that the content was read after `status` was taken, which was at `now_ns`.

        `still`: nobody could change it meanwhile.
        """
        node.still = still
        doubtful = max(status.st_ctime_ns, status.st_mtime_ns) > now_ns - _DOUBTFUL_NS
        node.times = None if doubtful else _times(status)
        if doubtful:
            self._unsettled.add(node.number)
        self._unread.discard(node.number)

    def doubt(self, node: Node) -> None:
        """Take note that its content has to be read again before there is an epoch."""
        node.times, node.followed = None, False
        if node.inode.pages:
            self._unread.add(node.number)

    # --- an epoch -----------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget what no name leads to any more, directories that are only in each other as well."""
        for number in self._moved & self._nodes.keys():
            for parent, name in self._nodes[number].names:
                if parent != ROOTS and self.path_of(parent) is None:
                    self.unlink(parent, name)
        self._moved.clear()
        while self._orphans:
            node = self._nodes.get(self._orphans.pop())
            if node is None or node.names:
                continue
            for name in list(node.children):
                self.unlink(node.number, name)
            self._forget(node)

    def seal(self) -> tuple[tuple[SpacePages, SpacePages], Mapping[int, bytes], Mapping[int, bytes]]:
        """Return the spaces of an epoch as things stand, and what pages of records and of attributes hold.

        Raises CaptureError if there is a file whose content was not read.
        """
        self.sweep()
        if self._unread:
            path = self.path_of(min(self._unread)) or []
            raise CaptureError(
                f"{os.fsdecode(b'/'.join(path))} could not be read: the next epoch tries again"
            )
        self._let_go()
        changed = self._records.changes()
        if changed:
            numbers = np.fromiter(changed, dtype=np.uint64)
            self._record_book.put(numbers, self._hasher.identify(memoryview(b"".join(changed.values()))))
        spaces = self._record_book.table(NO_PAGES), self._contents.table(NO_PAGES)
        return spaces, self._records.snapshot(), dict(self._extras)

    # --- within -------------------------------------------------------------------------------------

    def _new_inode(self) -> Inode:
        self._last += 1
        return Inode(self._last, 0, 0, 0, 0, 0)

    def _promised_inode(self, seen: Seen, at: tuple[int, bytes]) -> Inode | None:
        inode = self._promised.get(at)
        if inode is None or inode.number in self._nodes:
            return None
        return inode if stat.S_IFMT(inode.mode) == stat.S_IFMT(seen.status.st_mode) else None

    def _let_go(self) -> None:
        """Forget the pages that no file has any more, and give their places away."""
        gone = []
        for place, pages in self._shrunk.items():
            number = self._by_place.get(place)
            node = None if number is None else self._nodes[number]
            kept = 0 if node is None else _pages_at(node.inode, place)
            if kept < pages:
                gone.append(PageSet(np.array([place + kept, place + pages], dtype=np.uint64)))
        if gone:
            self._contents.restrict(self._contents.pages - PageSet.union(gone))
        self._shrunk.clear()
        for place in self._freed:
            self._places.give_back(place)
        self._freed.clear()

    def _shrink(self, place: int, pages: int) -> None:
        """Take note that of so many pages at a place not all may be needed any more."""
        self._shrunk[place] = max(pages, self._shrunk.get(place, 0))

    def _inode_of(self, node: Node, seen: Seen) -> Inode:
        status, before = seen.status, node.inode
        size = status.st_size if seen.is_regular else 0
        pages = -(-size // PAGE_BYTES)
        made = Inode(
            number=node.number,
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            size=size,
            device=status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
            place=self._place(node, before.place, before.pages, pages),
            target=seen.target,
            attributes=seen.attributes,
        )
        if len(pack_record(made)) <= MOST_RECORD_BYTES:
            self._drop_extra(before)
            return made
        return self._with_extra(node, before, made)

    def _place(self, node: Node, place: int, before: int, pages: int) -> int:
        """Return where its content stands from now on, of so many pages; `before` there were at `place`."""
        stays = place != NOWHERE and pages > 0 and Places.fits(place, pages)
        made = NOWHERE if stays or not pages else self._places.take(pages)  # first: it may be too large
        if pages < before or not stays:
            self._leave(place, before, stays=stays)
        if not stays:
            node.followed = False
        if not pages:
            self._unread.discard(node.number)
            return NOWHERE
        if pages != before or not stays:
            node.times = None
            self._unread.add(node.number)
        if stays:
            return place
        self._by_place[made] = node.number
        return made

    def _leave(self, place: int, pages: int, *, stays: bool = False) -> None:
        """Take note that pages at a place, or all of them, are not needed any more."""
        if place != NOWHERE:
            self._shrink(place, pages)
            if not stays:
                del self._by_place[place]
                self._freed.append(place)

    def _with_extra(self, node: Node, before: Inode, made: Inode) -> Inode:
        """Have its target and attributes stand in pages of their own."""
        content = pack_extra(made.target, made.attributes)
        pages = -(-len(content) // PAGE_BYTES)
        place, held = NOWHERE, 0
        if before.extra is not None:
            place, held = before.extra[0], -(-before.extra[1] // PAGE_BYTES)
        if place == NOWHERE or not Places.fits(place, pages):
            self._drop_extra(before)
            place = self._places.take(pages)
            self._by_place[place] = node.number
        elif held > pages:
            self._leave(place, held, stays=True)
        padded = content.ljust(pages * PAGE_BYTES, b"\0")
        numbers = np.arange(place, place + pages, dtype=np.uint64)
        self._contents.put(numbers, self._hasher.identify(memoryview(padded)))
        for page in range(pages):
            self._extras[place + page] = padded[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
        return msgspec.structs.replace(made, target=b"", attributes=(), extra=(place, len(content)))

    def _drop_extra(self, inode: Inode) -> None:
        if inode.extra is not None:
            place, size = inode.extra
            pages = -(-size // PAGE_BYTES)
            self._leave(place, pages)
            for page in range(place, place + pages):
                self._extras.pop(page, None)

    def _become(self, node: Node, inode: Inode) -> None:
        if inode != node.inode or node.number not in self._records:
            node.inode = inode
            self._records.put(node.number, pack_record(inode))

    def _forget(self, node: Node) -> None:
        for parent, name in list(node.names):
            self.unlink(parent, name)
        for name in list(node.children):
            self.unlink(node.number, name)
        self._place(node, node.inode.place, node.inode.pages, 0)
        self._drop_extra(node.inode)
        self._records.remove(node.number)
        self._linked.pop(node.number, None)
        self._unread.discard(node.number)
        del self._nodes[node.number]
        del self._by_id[node.id]
        if self._by_key.get(node.key) == node.number:
            del self._by_key[node.key]


def _places_of(inode: Inode) -> list[int]:
    """Return where something of an inode stands: its content, and what is too large for its record."""
    places = [] if inode.place == NOWHERE else [inode.place]
    return places if inode.extra is None else [*places, inode.extra[0]]


def _pages_at(inode: Inode, place: int) -> int:
    """Return how many pages of an inode stand at one of its places."""
    if inode.place == place:
        return inode.pages
    return -(-inode.extra[1] // PAGE_BYTES) if inode.extra is not None else 0


def _times(status: os.stat_result | Status) -> tuple[int, int, int]:
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size
