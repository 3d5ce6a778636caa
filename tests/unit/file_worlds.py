"""Files as values, for tests: described, changed at random, told as an epoch's pages, and found on a disk."""

from __future__ import annotations

import copy
import os
import random
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.errors import StoreError
from common.file_records import (
    CONTENTS,
    MOST_RECORD_BYTES,
    NOWHERE,
    RECORDS,
    ROOTS,
    Entry,
    Inode,
    pack_extra,
    pack_page,
    pack_record,
)
from common.model import PAGE_BYTES, EpochId

REG, DIR, LNK, FIFO, SOCK, CHR, BLK = (
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
    stat.S_IFCHR,
    stat.S_IFBLK,
)
ZEROS = bytes(PAGE_BYTES)
RECORDS_PER_PAGE = 3

Found = dict[tuple[bytes, ...], tuple[Any, ...]]
"""All that a tree is, by path: kind and mode, owner, time, attributes, content, and which paths are one."""
Numbers = NDArray[np.uint64]


def acl(tag: int) -> bytes:
    """Return an access control list as the kernel stores it: user 1234 may read; `tag` varies it."""
    entries = [(1, 6, -1), (2, 4 + tag % 2, 1234), (4, 4, -1), (16, 6, -1), (32, 4, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


@dataclass
class Thing:
    """One inode."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_700_000_000_123_456_789
    device: int = 0
    target: bytes = b""
    attributes: dict[bytes, bytes] = field(default_factory=dict)
    size: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)
    """Pages of the content; others are holes that the epoch does not even have."""
    place: int = NOWHERE

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def content(self) -> bytes:
        count = -(-self.size // PAGE_BYTES)
        return b"".join(self.pages.get(page, ZEROS) for page in range(count))[: self.size]

    def hold(self, content: bytes, *, sparse: bool = False) -> None:
        """Have that content; `sparse`: pages of zeros are not there."""
        self.size = len(content)
        pages = {
            at // PAGE_BYTES: content[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
            for at in range(0, len(content), PAGE_BYTES)
        }
        self.pages = {at: page for at, page in pages.items() if not sparse or page != ZEROS}


class World:
    """A workload's files. Number 1 is the declared directory, `/data`."""

    def __init__(self, roots: tuple[bytes, ...] = (b"/data",)) -> None:
        self.things: dict[int, Thing] = {}
        self.entries: dict[tuple[int, bytes], int] = {}
        self.last = 0
        self.next_place = 7
        self.extras: dict[int, int] = {}
        for root in roots:
            self.entries[ROOTS, root] = self.add(Thing(DIR | 0o755))

    def add(self, thing: Thing) -> int:
        self.last += 1
        self.things[self.last] = thing
        return self.last

    def make(self, parent: int, name: bytes, mode: int, content: bytes = b"", **options: Any) -> int:
        thing = Thing(mode, **options)
        thing.hold(content, sparse=True)
        number = self.entries[parent, name] = self.add(thing)
        return number

    def remove(self, parent: int, name: bytes) -> None:
        """Take a name away, and all that nothing leads to any more."""
        del self.entries[parent, name]
        while True:
            led_to = set(self.entries.values())
            gone = self.things.keys() - led_to
            if not gone:
                return
            for number in gone:
                del self.things[number]
            for key in [key for key in self.entries if key[0] in gone]:
                del self.entries[key]

    def copy(self) -> World:
        return copy.deepcopy(self)

    # --- as pages ---------------------------------------------------------------------------------

    def contents(self) -> dict[int, bytes]:
        """Give each content a place that stays while it fits, and return the pages."""
        pages: dict[int, bytes] = {}
        for number, thing in self.things.items():
            count = -(-thing.size // PAGE_BYTES)
            if not count:
                thing.place = NOWHERE
            elif thing.place == NOWHERE:
                thing.place, self.next_place = self.next_place, self.next_place + 64 * -(-count // 64)
            pages |= {thing.place + at: page for at, page in thing.pages.items()}
            if extra := self._extra(thing):
                if number not in self.extras:
                    self.extras[number], self.next_place = self.next_place, self.next_place + 64
                padded = extra.ljust(-(-len(extra) // PAGE_BYTES) * PAGE_BYTES, b"\0")
                for at in range(0, len(padded), PAGE_BYTES):
                    pages[self.extras[number] + at // PAGE_BYTES] = padded[at : at + PAGE_BYTES]
        return pages

    def records(self) -> list[Inode | Entry]:
        """Return all records; after `contents`."""
        found: list[Inode | Entry] = [Entry(*key, number) for key, number in self.entries.items()]
        return found + [self._inode(number) for number in self.things]

    def _inode(self, number: int) -> Inode:
        thing = self.things[number]
        plain = Inode(
            number=number,
            mode=thing.mode,
            uid=thing.uid,
            gid=thing.gid,
            mtime_ns=thing.mtime_ns,
            size=thing.size,
            device=thing.device,
            place=thing.place,
            target=thing.target,
            attributes=tuple(sorted(thing.attributes.items())),
        )
        if extra := self._extra(thing):
            changes: dict[str, Any] = {
                "target": b"",
                "attributes": (),
                "extra": (self.extras[number], len(extra)),
            }
            return Inode(**{name: getattr(plain, name) for name in Inode.__struct_fields__} | changes)
        return plain

    @staticmethod
    def _extra(thing: Thing) -> bytes:
        attributes = tuple(sorted(thing.attributes.items()))
        size = len(thing.target) + sum(len(name) + len(value) for name, value in attributes)
        return pack_extra(thing.target, attributes) if size > MOST_RECORD_BYTES // 2 else b""

    # --- as a tree ----------------------------------------------------------------------------------

    def found(self) -> Found:
        """Return what `walk` finds once the tree is that."""
        paths: dict[int, list[tuple[bytes, ...]]] = {}
        left: list[tuple[tuple[bytes, ...], int]] = [
            ((name,), number) for (parent, name), number in self.entries.items() if parent == ROOTS
        ]
        below: dict[int, list[tuple[bytes, int]]] = {}
        for (parent, name), number in self.entries.items():
            below.setdefault(parent, []).append((name, number))
        while left:
            path, number = left.pop()
            paths.setdefault(number, []).append(path)
            left += [((*path, name), child) for name, child in below.get(number, ())]
        tree: Found = {}
        for number, names in paths.items():
            thing = self.things[number]
            mode = thing.mode | (0o777 if thing.kind == LNK else 0)
            what = thing.target if thing.kind == LNK else thing.content
            filled = {at for at, page in thing.pages.items() if any(page)}
            for path in names:
                tree[path] = (
                    oct(mode), thing.uid, thing.gid, thing.mtime_ns, thing.device,
                    tuple(sorted(thing.attributes.items())), what, filled, sorted(names),
                )  # fmt: skip
        return tree


def walk(roots: Mapping[bytes, os.PathLike[str]], *, holes: bool = True) -> Found:
    """Look at trees, with nothing of what made them; paths may be of any length."""
    tree: Found = {}
    same: dict[tuple[int, int], list[tuple[bytes, ...]]] = {}

    def look(directory: int, name: bytes, path: tuple[bytes, ...]) -> None:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        what, filled = b"", set[int]()
        try:
            link = f"/proc/self/fd/{descriptor}"
            attributes = sorted((os.fsencode(each), os.getxattr(link, each)) for each in os.listxattr(link))
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(name, dir_fd=directory)
            elif stat.S_ISREG(status.st_mode):
                what, filled = _content(link)
            elif stat.S_ISDIR(status.st_mode):
                for each in os.listdir(os.fsencode(link)):
                    look(descriptor, each, (*path, each))
        finally:
            os.close(descriptor)
        same.setdefault((status.st_dev, status.st_ino), []).append(path)
        device = status.st_rdev if stat.S_IFMT(status.st_mode) in (CHR, BLK) else 0
        tree[path] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, device,
            tuple(attributes), what, filled if holes else set(), None,
        )  # fmt: skip

    for declared, root in roots.items():
        above = os.open(os.path.dirname(root), os.O_PATH)
        look(above, os.fsencode(os.path.basename(root)), (declared,))
        os.close(above)
    for names in same.values():
        for path in names:
            tree[path] = (*tree[path][:-1], sorted(names))
    return tree


def without_holes(tree: Found) -> Found:
    """Leave out which pages are holes."""
    return {path: (*what[:-2], set(), what[-1]) for path, what in tree.items()}


def _content(path: str) -> tuple[bytes, set[int]]:
    """Return a file's content, and which of its pages are no holes."""
    filled: set[int] = set()
    with open(path, "rb") as file:
        content = file.read()
        at = 0
        while at < len(content):
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            filled |= set(range(at // PAGE_BYTES, -(-end // PAGE_BYTES)))
            at = end
    return content, filled


class Epochs:
    """Epochs in memory, each told from a world as a store would."""

    def __init__(self) -> None:
        self.pages: dict[EpochId, dict[SpaceKey, dict[int, bytes]]] = {}
        self._where: dict[Any, int] = {}
        self._places = 0

    def tell(self, world: World) -> FakeFiles:
        """Add an epoch with these files."""
        contents = world.contents()
        on_page: dict[int, list[bytes]] = {}
        for record in world.records():
            key = (record.parent, record.name) if isinstance(record, Entry) else record.number
            if key not in self._where:
                self._where[key] = self._places // RECORDS_PER_PAGE
                self._places += 1
            on_page.setdefault(self._where[key], []).append(pack_record(record))
        return self.add({at: pack_page(page) for at, page in on_page.items()}, contents)

    def add(self, records: dict[int, bytes], contents: dict[int, bytes]) -> FakeFiles:
        epoch = EpochId(1, 1 + len(self.pages))
        self.pages[epoch] = {RECORDS: records, CONTENTS: contents}
        return FakeFiles(self, epoch)


class FakeFiles:
    """One of `Epochs`; counts what is read."""

    def __init__(self, epochs: Epochs, epoch: EpochId) -> None:
        self.epoch = epoch
        self.read_pages: list[tuple[SpaceKey, int]] = []
        self.unreadable: set[tuple[SpaceKey, int]] = set()
        self.block_pages = 3
        self._epochs = epochs

    def pages(self, key: SpaceKey) -> Numbers:
        return np.array(sorted(self._epochs.pages[self.epoch][key]), dtype=np.uint64)

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        held, wanted = self._epochs.pages[self.epoch][key], numbers.tolist()
        if missing := [number for number in wanted if number not in held]:
            raise StoreError(f"{len(missing)} pages are not held")
        return self._blocks(key, held, wanted)

    def _blocks(self, key: SpaceKey, held: dict[int, bytes], wanted: list[int]) -> Iterator[memoryview]:
        buffer = bytearray(self.block_pages * PAGE_BYTES)
        for at in range(0, len(wanted), self.block_pages):
            part = wanted[at : at + self.block_pages]
            for number in part:
                if (key, number) in self.unreadable:
                    raise StoreError("a page cannot be read")
                self.read_pages.append((key, number))
            buffer[: len(part) * PAGE_BYTES] = b"".join(held[number] for number in part)
            yield memoryview(buffer)[: len(part) * PAGE_BYTES]

    def changed_since(self, epoch: EpochId) -> dict[SpaceKey, Numbers] | None:
        old = self._epochs.pages.get(epoch)
        if old is None:
            return None
        new = self._epochs.pages[self.epoch]
        return {
            key: np.array(
                sorted(at for at, page in new[key].items() if old[key].get(at) != page), dtype=np.uint64
            )
            for key in (RECORDS, CONTENTS)
        }


class Chance:
    """Changes a world at random."""

    def __init__(self, world: World, seed: int, attributes: tuple[bytes, ...]) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.attributes = attributes
        """What attributes the file system of the test can store."""

    def some(self, most: int) -> None:
        for _ in range(self.random.randrange(1, most + 1)):
            self.random.choice(
                [self._make, self._make, self._make, self._write, self._write, self._move, self._move,
                 self._swap, self._link, self._remove, self._describe, self._replace]
            )()  # fmt: skip

    def _directories(self) -> list[int]:
        return [number for number, thing in self.world.things.items() if thing.kind == DIR]

    def _names(self, *kinds: int) -> list[tuple[int, bytes]]:
        return [
            key
            for key, number in self.world.entries.items()
            if key[0] != ROOTS and (not kinds or self.world.things[number].kind in kinds)
        ]

    def _new_name(self) -> tuple[int, bytes] | None:
        name = self.random.choice([b"a", b"b", b"c\n", b"\xff\xfe", b"n%d" % self.random.randrange(20)])
        key = self.random.choice(self._directories()), name
        return None if key in self.world.entries else key

    def _content(self) -> bytes:
        pages = [
            self.random.choice([ZEROS, self.random.randbytes(PAGE_BYTES)])
            for _ in range(self.random.randrange(6))
        ]
        return b"".join(pages) + self.random.randbytes(self.random.choice([0, 0, 1, 100]))

    def _make(self) -> None:
        key = self._new_name()
        if key is None:
            return
        kind = self.random.choice([REG, REG, REG, DIR, DIR, DIR, LNK, FIFO, SOCK, CHR, BLK])
        mode = kind | (
            0o777 if kind == LNK else self.random.choice([0o644, 0o755, 0o4711, 0o2750, 0o1777, 0])
        )
        number = self.world.make(*key, mode)
        thing = self.world.things[number]
        if kind == LNK:
            thing.target = self.random.choice([b"/etc", b"..", b"x" * 1500, b"\xff"])
        elif kind in (CHR, BLK):
            thing.device = os.makedev(self.random.choice([1, 7]), self.random.randrange(300))
        elif kind == REG:
            thing.hold(self._content(), sparse=self.random.random() < 0.5)
        self._describe(number)

    def _describe(self, number: int | None = None) -> None:
        number = number or self.random.choice(list(self.world.things))
        thing = self.world.things[number]
        thing.mtime_ns = self.random.randrange(1 << 60)
        thing.uid, thing.gid = self.random.choice([(0, 0), (1, 2), (70000, 5)])
        if thing.kind != LNK:
            thing.mode = thing.kind | self.random.choice([0o644, 0o4755, 0o6711, 0o2770, 0o1777])
        thing.attributes = {}
        for name in self.attributes:
            if self.random.random() < 0.3 and _can_have(thing.kind, name):
                thing.attributes[name] = self._value(name)
        if b"system.posix_acl_access" in thing.attributes:
            thing.mode = thing.mode & ~0o777 | 0o664  # as the list says, whose mask is the group's mode

    def _value(self, name: bytes) -> bytes:
        if name == b"security.capability":
            return CAPABILITY
        if name.startswith(b"system."):
            return acl(self.random.randrange(2))
        return self.random.randbytes(self.random.choice([0, 3, 900]))

    def _write(self) -> None:
        files = [thing for thing in self.world.things.values() if thing.kind == REG]
        if not files:
            return
        thing = self.random.choice(files)
        what, content = self.random.randrange(5), bytearray(thing.content)
        sparse = self.random.random() < 0.5
        if what == 0:
            thing.hold(self._content(), sparse=sparse)
        elif what == 1:
            del content[self.random.randrange(len(content) + 1) :]
        elif what == 2:
            content += bytes(self.random.choice([1, 5000, 9000]))
        elif content:
            at = self.random.randrange(len(content))
            content[at : at + 3000] = (
                self.random.randbytes(len(content[at : at + 3000]))
                if what > 3
                else bytes(len(content[at : at + 3000]))
            )
        if what:
            thing.hold(bytes(content), sparse=sparse)
        if self.random.random() < 0.2:
            thing.place = NOWHERE

    def _is_below(self, number: int, above: int) -> bool:
        parents = {child: parent for (parent, _), child in self.world.entries.items()}
        while number != ROOTS:
            if number == above:
                return True
            number = parents[number]
        return False

    def _move(self) -> None:
        key, names = self._new_name(), self._names()
        if key is None or not names:
            return
        old = self.random.choice(names)
        if not self._is_below(key[0], self.world.entries[old]):
            self.world.entries[key] = self.world.entries.pop(old)

    def _swap(self) -> None:
        names = self._names()
        if len(names) < 2:
            return
        one, two = self.random.sample(names, 2)
        first, second = self.world.entries[one], self.world.entries[two]
        if not self._is_below(one[0], second) and not self._is_below(two[0], first):
            self.world.entries[one], self.world.entries[two] = second, first

    def _link(self) -> None:
        key, names = self._new_name(), self._names(REG, LNK, FIFO, SOCK, CHR, BLK)
        if key is not None and names:
            self.world.entries[key] = self.world.entries[self.random.choice(names)]

    def _remove(self) -> None:
        if names := self._names():
            self.world.remove(*self.random.choice(names))

    def _replace(self) -> None:
        """Put another file in the place of one, under its name and even its number."""
        if names := self._names(REG, LNK, FIFO):
            number = self.world.entries[self.random.choice(names)]
            kind = self.random.choice([REG, LNK, FIFO, DIR])
            if kind == DIR and list(self.world.entries.values()).count(number) > 1:
                return
            self.world.things[number] = Thing(kind | (0o777 if kind == LNK else 0o600))
            if kind == LNK:
                self.world.things[number].target = b"other"


def _can_have(kind: int, name: bytes) -> bool:
    if name.startswith(b"user."):
        return kind in (REG, DIR)
    if name == b"system.posix_acl_default":
        return kind == DIR
    if name == b"system.posix_acl_access":
        return kind in (REG, DIR)
    return name != b"security.capability" or kind == REG
