"""Trees of files for tests: changed at random, walked independently, and rebuilt from an epoch's pages."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from common.criu.images import SpaceKey
from common.file_records import CONTENTS, RECORDS, ROOTS, Entry, Inode, unpack_extra, unpack_page
from common.model import PAGE_BYTES
from primary.capture import PageReader, SpacePages

Tree = dict[bytes, tuple[Any, ...]]
"""What each path is: mode, owner, group, modification time, attributes, and what it holds or leads to."""


_LARGE_BYTES = 16 << 20


def _content(path: bytes) -> bytes:
    """Return a digest of a large file, which may have large holes: of what is not zeros, and of its size."""
    digest = blake3()
    with open(path, "rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                page = os.pread(file.fileno(), PAGE_BYTES, at)
                if any(page):
                    digest.update(at.to_bytes(8, "little") + page)
                at += PAGE_BYTES
    digest.update(size.to_bytes(8, "little"))
    return digest.digest()


def walk(root: Path, name: bytes = b"/data") -> Tree:
    """Look at a tree as `ls` and `cat` would; hard links by which paths are one."""
    tree: Tree = {}
    names: dict[int, list[bytes]] = {}

    def look(path: bytes, at: bytes) -> None:
        status = os.lstat(path)
        attributes = tuple(
            (each, os.getxattr(path, each, follow_symlinks=False))
            for each in sorted(map(os.fsencode, os.listxattr(path, follow_symlinks=False)))
        )
        what: bytes | int = b""
        if stat.S_ISREG(status.st_mode):
            what = _content(path) if status.st_size > _LARGE_BYTES else Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            what = status.st_rdev
        tree[at] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, attributes, what)
        if stat.S_ISDIR(status.st_mode):
            for each in sorted(os.listdir(path)):
                look(path + b"/" + each, at + b"/" + each)
        else:
            names.setdefault(status.st_ino, []).append(at)

    look(os.fsencode(root), name)
    for same in names.values():
        for path in same:
            tree[path] += (tuple(sorted(same)),)
    return tree


def rebuild(spaces: Iterable[SpacePages], reader: PageReader) -> Tree:
    """Return what an epoch's pages say, and see that they say no more than that."""
    by_key = {space.key: space for space in spaces}

    def pages(key: SpaceKey, first: int, count: int) -> bytes:
        numbers = np.arange(first, first + count, dtype=np.uint64)
        here = np.flatnonzero(by_key[key].pages.has(numbers))
        read = bytearray(len(here) * PAGE_BYTES)
        reader.read(key, by_key[key].pages.rank(numbers[here]), memoryview(read))
        content = np.zeros((count, PAGE_BYTES), dtype=np.uint8)
        content[here] = np.frombuffer(read, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        return content.tobytes()

    inodes: dict[int, Inode] = {}
    entries: dict[int, list[Entry]] = {}
    for number in by_key[RECORDS].numbers.tolist():
        for record in unpack_page(pages(RECORDS, number, 1)):
            if isinstance(record, Inode):
                assert record.number not in inodes
                inodes[record.number] = record
            else:
                entries.setdefault(record.parent, []).append(record)
    # A page that is not there is a hole.
    extras = sum(-(-each.extra[1] // PAGE_BYTES) for each in inodes.values() if each.extra)
    assert sum(each.pages for each in inodes.values()) + extras >= len(by_key[CONTENTS].pages)
    tree: Tree = {}
    names: dict[int, list[bytes]] = {}

    def look(entry: Entry, at: bytes) -> None:
        inode = inodes[entry.inode]
        target, attributes = inode.target, inode.attributes
        if inode.extra is not None:
            place, size = inode.extra
            target, attributes = unpack_extra(pages(CONTENTS, place, -(-size // PAGE_BYTES))[:size])
        what: bytes | int = target
        if stat.S_ISREG(inode.mode) and inode.pages:
            what = pages(CONTENTS, inode.place, inode.pages)[: inode.size]
        elif inode.device:
            what = inode.device
        tree[at] = (inode.mode, inode.uid, inode.gid, inode.mtime_ns, attributes, what)
        if stat.S_ISDIR(inode.mode):
            for each in entries.get(entry.inode, []):
                look(each, at + b"/" + each.name)
        else:
            names.setdefault(entry.inode, []).append(at)

    for entry in entries[ROOTS]:
        look(entry, entry.name)
    assert len(tree) == sum(len(each) for each in entries.values())
    for same in names.values():
        for path in same:
            tree[path] += (tuple(sorted(same)),)
    return tree


class Changes:
    """Changes a tree at random."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = os.fsencode(root)
        self.random = random.Random(seed)

    def some(self, most: int) -> None:
        """Do up to so many things."""
        for _ in range(self.random.randrange(most + 1)):
            with contextlib.suppress(OSError):
                self._one()

    def _write(self, path: bytes, flags: int, size: int, at: int = 0) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags, 0o644)  # a FIFO has no reader
        try:
            os.pwrite(descriptor, self.random.randbytes(size), at)
        finally:
            os.close(descriptor)

    def _one(self) -> None:
        choose = self.random
        directories = [self.root]
        files: list[bytes] = []
        for here, below, names in os.walk(self.root):
            directories += [os.path.join(here, name) for name in below]
            files += [os.path.join(here, name) for name in names]
        new = os.path.join(choose.choice(directories), b"n%d\xff\n" % choose.randrange(30))
        file = choose.choice(files) if files else new
        what = choose.randrange(16)
        if what < 4:
            self._write(new, os.O_CREAT | os.O_APPEND, choose.choice([0, 5, 4096, 9000, 100_000]))
        elif what == 4:
            os.unlink(file)
        elif what == 5:
            os.mkdir(new)
        elif what == 6:
            os.rename(file, new)
        elif what == 7:
            os.rename(choose.choice(directories[1:] or [new]), new)
        elif what == 8:
            os.link(file, new)
        elif what == 9:
            os.truncate(file, choose.randrange(30_000))
        elif what == 10:
            os.symlink(b"x" * choose.choice([3, 2000]), new)
        elif what == 11:
            os.chmod(choose.choice([file, *directories]), choose.randrange(0o7777))
        elif what == 12:
            os.setxattr(file, b"user.a", choose.randbytes(choose.choice([1, 900, 3000])))
        elif what == 13:
            self._write(file, 0, 3000, choose.randrange(50_000))
        elif what == 14:
            os.mknod(
                new, choose.choice([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR]) | 0o600, os.makedev(1, 3)
            )
        else:
            times = (choose.randrange(1 << 60), choose.randrange(1 << 60))
            os.utime(choose.choice([file, *directories]), ns=times, follow_symlinks=False)
            os.chown(file, choose.randrange(1000), choose.randrange(1000), follow_symlinks=False)
