"""Disks that fail, and a reader that follows `parent` as CRIU does; shared by the store's tests."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey, expand, page_images, read_pagemap
from common.durable import Disk, RealDisk, Writer
from common.errors import NoSpaceError, StoreError
from common.model import EpochId
from replica.store import ZERO, EpochHeader, EpochRecord, EpochStore

STOP = 0
"""The fault that ends the machine; every other one is an error number."""

Content = dict[SpaceKey, dict[int, int]]
"""What an epoch holds: for each page of each space, the byte that fills it."""


class PowerLossError(Exception):
    """The machine stops here: nothing that the program does any more has an effect."""


class UnsyncedDisk(RealDisk):
    """A disk whose syncs take no time; for tests in which the machine lives on."""

    def sync_files(self, paths: Iterable[Path], *, op: str) -> None:
        pass

    def sync_dir(self, path: Path, *, op: str) -> None:
        pass


@dataclass
class _Name:
    """A name that came, went or changed, and is not synced; `path` moves with the directories above it."""

    path: Path
    undo: Callable[[Path, random.Random | None], None]
    came_from: Path | None = None

    def synced_by(self, directory: Path) -> bool:
        return directory in (self.path.parent, self.came_from and self.came_from.parent)

    def moved(self, source: Path, target: Path) -> None:
        self.path = _moved(self.path, source, target)


class FaultyDisk:
    """Counts operations, fails some of them, and knows what a power loss would take back.

    `faults` says what happens at the n-th operation: an error number fails it once, `STOP` ends the machine.
    A rename is durable when one of the two directories was synced, any other name when its directory was,
    and a file's content when the file was. On a `real` disk that syncs, `stop` is what ends the machine;
    it must not return.
    """

    def __init__(
        self,
        faults: Mapping[int, int] | None = None,
        *,
        real: Disk | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        self.ops: list[str] = []
        self.failed = 0
        """How many operations were made to fail."""
        self._real = real or UnsyncedDisk()
        self._faults = faults or {}
        self._stop = stop
        self._stopped = False
        self._unsynced_files: set[Path] = set()
        self._unsynced_names: list[_Name] = []

    def lose_power(self, chance: random.Random | None = None) -> None:
        """Take back what was not synced, the latest first: all of it, or what `chance` says.

        By chance the survivors are in no order, and what is left of a file is torn: cut short anywhere, or
        with sectors that were never written.
        """
        for path in sorted(self._unsynced_files):
            if path.exists():
                _tear(path, chance) if chance else os.truncate(path, 0)
        for place, name in reversed(list(enumerate(self._unsynced_names))):
            if not name.path.parent.exists() or (chance and chance.random() < 0.5):
                continue
            name.undo(name.path, chance)
            if name.came_from:
                for earlier in self._unsynced_names[:place]:
                    earlier.moved(name.path, name.came_from)

    def make_dir(self, path: Path, *, op: str) -> None:
        self._count(op)
        self._real.make_dir(path, op=op)
        self._named(path, lambda path, _: RealDisk().remove_tree(path, op=op))

    def write_file(self, path: Path, data: bytes, *, op: str) -> None:
        self._count(op)
        self._real.write_file(path, data, op=op)
        self._created(path)

    def create(self, path: Path, *, op: str) -> Writer:
        self._count(op)
        self._created(path)
        return _CountingWriter(self._real.create(path, op=op), lambda: self._count(op))

    def sync_files(self, paths: Iterable[Path], *, op: str) -> None:
        for path in paths:
            self._count(op)
            self._real.sync_files([path], op=op)
            self._unsynced_files.discard(path)

    def sync_dir(self, path: Path, *, op: str) -> None:
        self._count(op)
        self._real.sync_dir(path, op=op)
        self._unsynced_names = [name for name in self._unsynced_names if not name.synced_by(path)]

    def rename(self, source: Path, target: Path, *, op: str) -> None:
        self._count(op)
        self._real.rename(source, target, op=op)
        self._unsynced_files = {_moved(path, source, target) for path in self._unsynced_files}
        for name in self._unsynced_names:
            name.moved(source, target)

        def undo(path: Path, chance: random.Random | None) -> None:
            if path.exists():
                path.rename(source)

        self._unsynced_names.append(_Name(target, undo, came_from=source))

    def point(self, link: Path, target: str, *, op: str) -> None:
        self._count(op)
        before = os.readlink(link) if link.is_symlink() else None
        self._real.point(link, target, op=op)

        def undo(path: Path, chance: random.Random | None) -> None:
            path.unlink(missing_ok=True)
            if before is not None:
                path.symlink_to(before)

        self._named(link, undo)

    def link(self, source: Path, target: Path, *, op: str) -> None:
        self._count(op)
        self._real.link(source, target, op=op)
        self._named(target, lambda path, _: path.unlink(missing_ok=True))

    def unlink(self, path: Path, *, op: str) -> None:
        self._count(op)
        before = os.readlink(path) if path.is_symlink() else None
        self._real.unlink(path, op=op)
        if before is not None:
            self._named(path, lambda path, _: path.symlink_to(before))

    def remove_tree(self, path: Path, *, op: str) -> None:
        self._count(op)
        before = _files_below(path)
        self._real.remove_tree(path, op=op)
        if before:
            # A disk may have got the end of some files in it, and not the end of the others.
            self._named(path, lambda path, chance: _come_back(path, before, chance))

    def read_file(self, path: Path, *, op: str) -> bytes:
        self._count(op)
        return self._real.read_file(path, op=op)

    def open_file(self, path: Path, *, op: str) -> int:
        self._count(op)
        return self._real.open_file(path, op=op)

    def size_bytes(self, path: Path, *, op: str) -> int:
        self._count(op)
        return self._real.size_bytes(path, op=op)

    def names(self, path: Path, *, op: str) -> list[str]:
        self._count(op)
        return self._real.names(path, op=op)

    def read_link(self, path: Path, *, op: str) -> str | None:
        self._count(op)
        return self._real.read_link(path, op=op)

    def free_bytes(self, path: Path) -> int:
        return 1 << 40

    def is_volatile(self, path: Path) -> bool:
        return False

    def _count(self, op: str) -> None:
        if self._stopped:
            raise PowerLossError
        self.ops.append(op)
        fault = self._faults.get(len(self.ops) - 1)
        if fault == STOP:
            self._stopped = True
            if self._stop:
                self._stop()
            raise PowerLossError
        if fault is not None:
            self.failed += 1
            cause = OSError(fault, os.strerror(fault))
            kind = NoSpaceError if fault == errno.ENOSPC else StoreError
            raise kind(f"{op}: {cause.strerror}") from cause

    def _created(self, path: Path) -> None:
        self._unsynced_files.add(path)
        self._named(path, lambda path, _: path.unlink(missing_ok=True))

    def _named(self, path: Path, undo: Callable[[Path, random.Random | None], None]) -> None:
        self._unsynced_names.append(_Name(path, undo))


def _files_below(path: Path) -> dict[str, bytes | str]:
    """Return what lies in a tree: of each file its content, of each link what it says."""
    found: dict[str, bytes | str] = {}
    for below in path.rglob("*"):
        if below.is_symlink():
            found[str(below.relative_to(path))] = os.readlink(below)
        elif below.is_file():
            found[str(below.relative_to(path))] = below.read_bytes()
    return found


def _come_back(path: Path, files: Mapping[str, bytes | str], chance: random.Random | None) -> None:
    """Put back a removed tree: all of it, or what `chance` says."""
    for name, content in files.items():
        if chance and chance.random() < 0.5:
            continue
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.symlink_to(content)
        else:
            file.write_bytes(content)


def _tear(path: Path, chance: random.Random) -> None:
    """Leave of an unsynced file what a disk may have got: all, a part of its length, or with gaps."""
    size_bytes = path.stat().st_size
    what = chance.randrange(3)
    if what == 1:
        os.truncate(path, chance.randrange(size_bytes + 1))
    elif what == 2:
        with path.open("r+b") as file:
            for sector in range(0, size_bytes, 512):
                if chance.random() < 0.5:
                    file.seek(sector)
                    file.write(bytes(min(512, size_bytes - sector)))


class _CountingWriter:
    def __init__(self, real: Writer, count: Callable[[], None]) -> None:
        self._real = real
        self._count = count

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._count()
        self._real.write(data)

    def skip(self, size_bytes: int) -> None:
        self._real.skip(size_bytes)

    def close(self) -> None:
        self._real.close()


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def header(epoch: EpochId, base: EpochId | None) -> EpochHeader:
    return EpochHeader(workload="web", id=epoch, base=base, incarnation="one", frozen_wall_s=epoch.epoch)


def commit(
    store: EpochStore,
    epoch: EpochId,
    content: Content,
    base: EpochId | None = None,
    held: Content | None = None,
    *,
    chunk_bytes: int = 10_000,
    lazy: bool = False,
    resend: int = 0,
    finish: bool = True,
    missing_bytes: int = 0,
) -> EpochRecord | None:
    """Send `content` as a primary does that knows that the store holds `held` as `base`.

    `resend` > 0: every page whose number it divides is sent though it is unchanged. Without `finish` the
    epoch is left as it is after its last page. The last `missing_bytes` of each space do not come.
    """
    arriving = store.begin(header(epoch, base))
    try:
        arriving.metadata("inventory.img", f"inventory of {epoch}".encode(), more=True)
        arriving.metadata("inventory.img", b", whole")
        for key, pages in content.items():
            before = (held or {}).get(key, {})
            flags, sent = [], bytearray()
            for number, fill in sorted(pages.items()):
                if before.get(number) == fill and not (resend and number % resend == 0):
                    flag = PE_PARENT
                elif fill:
                    flag = PE_PRESENT
                    sent += bytes([fill]) * 4096
                else:
                    flag = ZERO
                flags.append(flag | (PE_LAZY if lazy else 0))
            arriving.space(key, np.array(sorted(pages), dtype=np.uint64), np.array(flags, dtype=np.uint8))
            del sent[max(0, len(sent) - missing_bytes) :]
            for start in range(0, len(sent), chunk_bytes):
                arriving.pages(key, memoryview(sent)[start : start + chunk_bytes])
        return arriving.commit() if finish else None
    except (StoreError, NoSpaceError):
        arriving.abort()
        raise


def composed(directory: Path) -> Content:
    """Read an epoch as CRIU does: each page from the first level on the way down that has its bytes."""
    read = cache(_read_level)  # each level once for all its pages
    return {
        image.key: {
            number: _fill_of(read, directory, image.key, number) for number in read(directory, image.key)[0]
        }
        for image in page_images(directory)
    }


_ReadLevel = Callable[[Path, SpaceKey], tuple[dict[int, tuple[int, int]], bytes]]


def _read_level(directory: Path, key: SpaceKey) -> tuple[dict[int, tuple[int, int]], bytes]:
    """Give the flags of each page and its place in the file of pages, and that file's content."""
    pagemap = read_pagemap(directory / key.pagemap_name)
    numbers, flags = expand(pagemap.entries)
    place = np.cumsum((flags & PE_PRESENT) != 0) - 1
    file = directory / f"pages-{pagemap.pages_id}.img"
    return (
        {int(n): (int(f), int(p)) for n, f, p in zip(numbers, flags, place, strict=True)},
        file.read_bytes() if file.exists() else b"",
    )


def _fill_of(read: _ReadLevel, directory: Path, key: SpaceKey, number: int) -> int:
    pages, content = read(directory, key)
    flags, place = pages[number]
    if flags & PE_PARENT:
        return _fill_of(read, directory / "parent", key, number)
    data = content[place * 4096 : (place + 1) * 4096]
    assert len(data) == 4096
    assert data == data[:1] * 4096
    return data[0]
