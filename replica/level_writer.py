"""Writes one level: files go in as they come, are hashed on the way, and are durable at the end.

In: metadata files, and for each address space which pages it has and then their bytes in ascending order,
in any chunking. Out: a directory with a manifest, synced, ready to be renamed. Both a received epoch and a
fold are written by this; neither keeps a copy of the pages in memory, and no file is read again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, get_args

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey, serialize_pages
from common.durable import Disk, Writer
from common.errors import StoreError
from common.model import PAGE_BYTES, SpaceKind
from replica.levels import (
    MANIFEST_NAME,
    PARENT_NAME,
    REASON_NAME,
    RESTORE_NAME,
    BaseError,
    EpochHeader,
    FileEntry,
    Flags,
    Layout,
    Level,
    Manifest,
    Numbers,
    SpaceEntry,
    encode_manifest,
    rows_in,
)

ZERO = 0x80
"""Our own page flag: the page changed and is all zeros now, so that its content is not sent."""

COPIED = 0x40
"""Our own page flag: the page's bytes are taken from what is held already, so that they are not sent."""

REPEATED = 0x20
"""Our own page flag: the page holds what an earlier one of its space does, or one of the base."""

IN_BASE = np.uint64(1 << 63)
"""Added to the number of the page that a repeated one is like: it is the base's."""

MAX_PAGE_NUMBER = 1 << 52
_OURS = ZERO | COPIED | REPEATED
_KNOWN_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT | _OURS
_ZEROS = bytes(256 * 1024)
_METADATA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_RESERVED_NAME = re.compile(r"pages-.*|pagemap-.*")
_RESERVED_NAMES = frozenset({MANIFEST_NAME, PARENT_NAME, RESTORE_NAME, REASON_NAME})


class _HashedFile:
    """A file in the making with the hash of what went into it."""

    def __init__(self, disk: Disk, path: Path, op: str) -> None:
        self.name = path.name
        self.size_bytes = 0
        self._hash = blake3()
        self._writer: Writer = disk.create(path, op=op)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._writer.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    def skip(self, size_bytes: int) -> None:
        """Append zeros as a hole."""
        self._writer.skip(size_bytes)
        self.size_bytes += size_bytes
        while size_bytes:
            part = min(size_bytes, len(_ZEROS))
            self._hash.update(_ZEROS if part == len(_ZEROS) else _ZEROS[:part])
            size_bytes -= part

    def finish(self) -> FileEntry:
        self._writer.close()
        return FileEntry(self.name, self.size_bytes, self._hash.hexdigest())

    def close(self) -> None:
        self._writer.close()


class _PagesFile:
    """The pages' bytes of one space: those that come, holes for pages of zeros, copies of others."""

    def __init__(
        self,
        disk: Disk,
        path: Path,
        key: SpaceKey,
        numbers: Numbers,
        kinds: Flags,
        held: Held | None,
        repeats: Repeats | None,
        *,
        op: str,
    ) -> None:
        """`kinds` has for each present page 0 where its bytes come, else where it is taken from.

        `COPIED` from `held`; `REPEATED`: what `repeats` says, in the order of pages.
        """
        self._key = key
        self._disk = disk
        self._path = path
        self._op = op
        self._file: _HashedFile | None = None
        self._numbers = numbers
        self._kinds = kinds
        self._held = held
        self._repeats = repeats
        self._repeated = 0
        """How many of these there are so far."""
        self._left_bytes = self.expected_bytes = int(np.count_nonzero(kinds == 0)) * PAGE_BYTES
        # Rows at which runs of one kind end, from the last to the first.
        self._ends = [len(kinds), *(np.flatnonzero(np.diff(kinds)) + 1).tolist()[::-1]] if len(kinds) else []
        self._at_bytes = 0

    @property
    def missing_bytes(self) -> int:
        return self._left_bytes

    @property
    def whole_pages(self) -> int:
        """How many of the space's present pages, from the first on, are in the file."""
        return self._at_bytes // PAGE_BYTES

    def write(self, data: memoryview) -> None:
        self._left_bytes -= len(data)
        while data:
            self._fill()
            part = data[: self._ends[-1] * PAGE_BYTES - self._at_bytes]
            self._copy(part)
            data = data[len(part) :]

    def finish(self) -> FileEntry | None:
        """Return the file's entry; None if no page is present: then there is no file, as with CRIU."""
        self._fill()
        return self.end()

    def end(self) -> FileEntry | None:
        """Let the file end where it is; see `finish`."""
        return self._open().finish() if len(self._kinds) else None

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _fill(self) -> None:
        """Go on to the next page whose bytes have to come."""
        while self._ends and (kind := self._kinds[self._at_bytes // PAGE_BYTES]):
            end = self._ends[-1]
            if kind == ZERO:
                size_bytes = end * PAGE_BYTES - self._at_bytes
                self._open().skip(size_bytes)
                self._go_on(size_bytes)
            elif kind == REPEATED:
                self._repeat(end)
            elif self._held is None:
                raise BaseError("pages are said to be held already, but nothing is")
            else:
                for block in self._held.read(self._key, self._numbers[self._at_bytes // PAGE_BYTES : end]):
                    self._copy(block)

    def _repeat(self, end: int) -> None:
        """Go on to the page in row `end` with what others hold."""
        count = end - self.whole_pages
        if self._repeats is None:
            raise StoreError(f"{self._key.pagemap_name}: it was not said what repeated pages are like")
        sources = self._repeats.sources[self._repeated : self._repeated + count]
        self._repeated += count
        in_base = sources >= IN_BASE
        rows = rows_in(self._numbers, sources)
        if (~in_base & ((rows < 0) | (rows >= np.arange(self.whole_pages, end)))).any():
            raise StoreError(f"{self._key.pagemap_name}: a page repeats one that is not before it")
        base = iter(self._repeats.base(self._key, sources[in_base] - IN_BASE) if in_base.any() else ())
        block = memoryview(b"")
        turns = [0, *(np.flatnonzero(np.diff(in_base)) + 1).tolist(), count]
        for first, stop in pairwise(turns):
            if not in_base[first]:
                for page in self._again(rows[first:stop]):
                    self._copy(page)
                continue
            left_bytes = (stop - first) * PAGE_BYTES
            while left_bytes:
                block = block or next(base)
                part, block = block[:left_bytes], block[left_bytes:]
                self._copy(part)
                left_bytes -= len(part)

    def _copy(self, data: memoryview) -> None:
        self._open().write(data)
        self._go_on(len(data))

    def _again(self, rows: NDArray[np.intp]) -> Iterator[memoryview]:
        """Read pages of this file that were written before."""
        buffer = memoryview(bytearray(PAGE_BYTES))
        fd = self._disk.open_file(self._path, op=f"{self._op}-again")
        try:
            for row in rows.tolist():
                if os.preadv(fd, [buffer], row * PAGE_BYTES) != PAGE_BYTES:
                    raise StoreError(f"{self._path} cannot be read back")
                yield buffer
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read back: {error.strerror}") from error
        finally:
            os.close(fd)

    def _go_on(self, size_bytes: int) -> None:
        self._at_bytes += size_bytes
        if self._at_bytes == self._ends[-1] * PAGE_BYTES:
            self._ends.pop()

    def _open(self) -> _HashedFile:
        if self._file is None:
            self._file = _HashedFile(self._disk, self._path, self._op)
        return self._file


class Held(Protocol):
    """Where the bytes of `COPIED` pages come from."""

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """Yield the bytes of these pages, in blocks of whole pages that are valid until the next one."""
        ...


@dataclass(frozen=True, slots=True)
class Repeats:
    """What the `REPEATED` pages of a space are like."""

    sources: Numbers
    """For each of them an earlier page, which is not of zeros, or a page of the base (`IN_BASE`)."""
    base: Callable[[SpaceKey, Numbers], Iterator[memoryview]]
    """Reads pages of the base, in blocks that are valid until the next one. Raises BaseError."""


class LevelWriter:
    """Makes one level below `incoming`. Not for several threads at once.

    Keeps this: a manifest is written only when every announced page has its bytes, and what it names is
    synced before the directory may be renamed.
    """

    def __init__(self, disk: Disk, directory: Path, *, op: str) -> None:
        """Make `directory`; `op` is the first word of the operations' labels. Raises as `Disk` does."""
        self.directory = directory
        self._disk = disk
        self._op = op
        self._files: dict[str, FileEntry] = {}
        self._spaces: dict[SpaceKey, SpaceEntry] = {}
        self._open_metadata: _HashedFile | None = None
        self._open_pages: tuple[SpaceKey, _PagesFile] | None = None
        self._open_numbers: Numbers = np.empty(0, dtype=np.uint64)
        disk.make_dir(directory, op=f"{op}.make")

    def metadata(self, name: str, data: bytes | memoryview, *, more: bool = False) -> None:
        """Append to the metadata file `name`; with `more`, the rest comes in the next call.

        Raises StoreError for a name that could leave the directory or that the store gives itself, for one
        that was finished before, and while another metadata file is not complete.
        """
        file = self._open_metadata
        if file is None:
            check_metadata_name(name)
            if name in self._files:
                raise StoreError(f"{name} came twice in one epoch")
            file = _HashedFile(self._disk, self.directory / name, f"{self._op}.metadata")
            self._open_metadata = file
        elif file.name != name:
            raise StoreError(f"{name} began before {file.name} was complete")
        file.write(data)
        if not more:
            self._files[name] = file.finish()
            self._open_metadata = None

    def link(self, entry: FileEntry, source: Path) -> None:
        """Take over a file of another level that is the same; no byte is copied."""
        self._disk.link(source, self.directory / entry.name, op=f"{self._op}.link")
        self._files[entry.name] = entry

    def space(
        self,
        key: SpaceKey,
        numbers: Numbers,
        flags: Flags,
        held: Held | None = None,
        repeats: Repeats | None = None,
    ) -> None:
        """Announce a space: its pages, ascending, and their flags (CRIU's and ours); shape (n,).

        The bytes of all pages that are present, with none of our flags, must follow. Those that are `COPIED`
        are taken from `held`, those that are `REPEATED` from where `repeats` says, in their turn. Raises
        StoreError for what cannot be, and when the space before is not complete.
        """
        self._finish_pages()
        check_space(key, numbers, flags)
        if key in self._spaces:
            raise StoreError(f"{key.pagemap_name} came twice in one epoch")
        ours = flags & np.uint8(_OURS)
        repeated = int(np.count_nonzero(ours & REPEATED))
        if repeated != (0 if repeats is None else len(repeats.sources)):
            raise StoreError(f"{key.pagemap_name}: it is not said what {repeated} repeated pages are like")
        stored = np.where(ours != 0, (flags & PE_LAZY) | PE_PRESENT, flags).astype(np.uint8)
        present = (stored & PE_PRESENT) != 0
        pages_id = len(self._spaces) + 1
        self._write_pagemap(key, pages_id, numbers, stored)
        self._spaces[key] = SpaceEntry(key, pages_id, len(numbers), int(np.count_nonzero(present)))
        path = self.directory / self._spaces[key].pages_name
        self._open_numbers = numbers[present]
        self._open_pages = (
            key,
            _PagesFile(
                self._disk,
                path,
                key,
                self._open_numbers,
                ours[present],
                held,
                repeats,
                op=f"{self._op}.pages",
            ),
        )

    def pages(self, key: SpaceKey, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the space announced last. Raises StoreError for any other space, or too many."""
        if self._open_pages is None or self._open_pages[0] != key:
            raise StoreError(f"pages for {key.pagemap_name} came, which was not announced last")
        view = memoryview(data).cast("B")
        file = self._open_pages[1]
        if len(view) > file.missing_bytes:
            raise StoreError(
                f"{len(view) - file.missing_bytes} bytes more than the pages of {key.pagemap_name} came"
            )
        file.write(view)

    def finish(
        self, layout: Layout, header: EpochHeader, committed_wall_s: float, restore_text: bytes
    ) -> Level:
        """Write parent link, command and manifest, and sync everything. Raises StoreError if pages miss."""
        if self._open_metadata:
            raise StoreError(f"{self._open_metadata.name} is not complete")
        self._finish_pages()
        if header.base is not None:
            self._disk.point(
                self.directory / PARENT_NAME, layout.parent_target(header.base), op=f"{self._op}.parent"
            )
        command = _HashedFile(self._disk, self.directory / RESTORE_NAME, f"{self._op}.command")
        try:
            command.write(restore_text)
        finally:
            self._files[RESTORE_NAME] = command.finish()
        manifest = Manifest(
            header=header,
            committed_wall_s=committed_wall_s,
            spaces=tuple(self._spaces.values()),
            files=tuple(self._files.values()),
        )
        self._disk.write_file(
            self.directory / MANIFEST_NAME, encode_manifest(manifest), op=f"{self._op}.manifest"
        )
        names = [*self._files, MANIFEST_NAME]
        self._disk.sync_files([self.directory / name for name in names], op=f"{self._op}.sync")
        self._disk.sync_dir(self.directory, op=f"{self._op}.sync-level")
        return Level(self.directory, manifest)

    def finish_seed(self, header: EpochHeader) -> Level:
        """End early, with the pages that are here, as a level that only lends them; not synced.

        Not synced because nobody relies on it: pages are compared with what was told of them when they are
        taken (`holdings.Lender`).
        """
        if self._open_pages:
            key, file = self._open_pages
            pages = file.whole_pages
            entry = self._spaces[key]
            self._write_pagemap(
                key, entry.pages_id, self._open_numbers[:pages], np.full(pages, PE_PRESENT, dtype=np.uint8)
            )
            self._spaces[key] = SpaceEntry(key, entry.pages_id, pages, pages)
            if pages and (ended := file.end()):
                self._files[ended.name] = ended
        self.close()
        names = {
            name for space in self._spaces.values() for name in (space.key.pagemap_name, space.pages_name)
        }
        manifest = Manifest(
            header=header,
            committed_wall_s=0.0,
            spaces=tuple(self._spaces.values()),
            files=tuple(entry for entry in self._files.values() if entry.name in names),
        )
        self._disk.write_file(
            self.directory / MANIFEST_NAME, encode_manifest(manifest), op=f"{self._op}.manifest"
        )
        return Level(self.directory, manifest)

    def close(self) -> None:
        """Close what is open; the directory stays. Harmless when repeated."""
        try:
            if self._open_metadata:
                self._open_metadata.close()
        finally:
            if self._open_pages:
                self._open_pages[1].close()

    def _write_pagemap(self, key: SpaceKey, pages_id: int, numbers: Numbers, stored: Flags) -> None:
        path = self.directory / key.pagemap_name
        if key in self._spaces:
            self._disk.unlink(path, op=f"{self._op}.pagemap-again")
        pagemap = _HashedFile(self._disk, path, f"{self._op}.pagemap")
        try:
            pagemap.write(serialize_pages(pages_id, numbers, stored))
        finally:
            self._files[key.pagemap_name] = pagemap.finish()

    def _finish_pages(self) -> None:
        if self._open_pages is None:
            return
        key, file = self._open_pages
        if file.missing_bytes:
            raise StoreError(
                f"{file.missing_bytes} of {file.expected_bytes} bytes of {key.pagemap_name} did not come"
            )
        entry = file.finish()
        if entry is not None:
            self._files[entry.name] = entry
        self._open_pages = None


def check_metadata_name(name: str) -> None:
    """Raise StoreError unless `name` is a plain file name that the store does not use itself."""
    if (
        not _METADATA_NAME.fullmatch(name)
        or _RESERVED_NAME.fullmatch(name)
        or name in _RESERVED_NAMES
        or os.path.basename(name) != name
    ):
        raise StoreError(f"{name!r} is no name for a metadata file")


def check_space(key: SpaceKey, numbers: Numbers, flags: Flags) -> None:
    """Raise StoreError unless key, page numbers and flags can be those of an address space."""
    name = key.pagemap_name
    if key.kind not in get_args(SpaceKind) or type(key.ident) is not int or key.ident < 0:
        raise StoreError(f"{key!r} names no address space")
    if numbers.dtype != np.uint64 or flags.dtype != np.uint8 or numbers.ndim != 1:
        raise StoreError(f"{name}: page numbers must be 64-bit and flags one byte each")
    if numbers.shape != flags.shape:
        raise StoreError(f"{name}: {len(numbers)} pages and {len(flags)} flags came")
    if numbers.size and (int(numbers[-1]) >= MAX_PAGE_NUMBER or not np.all(numbers[1:] > numbers[:-1])):
        raise StoreError(f"{name}: page numbers are not ascending or too large")
    in_base = (flags & PE_PARENT) != 0
    in_level = (flags & (PE_PRESENT | _OURS)) != 0
    if (flags & ~np.uint8(_KNOWN_FLAGS)).any() or not (in_base ^ in_level).all():
        raise StoreError(f"{name}: a page must be either in the base or in the epoch, and have known flags")


def restore_text(view: Path, command: Sequence[str], descriptors: bytes | None) -> bytes:
    """Write the command with which stock CRIU restores what lies behind `view`.

    `command` ends in criu's `restore` and what the kind of workload needs. `descriptors` is the content of
    `descriptors.json` if the epoch has one: the pipes that the workload had as its standard descriptors
    are replaced by those of whoever runs the command.
    """
    inherited: list[str] = []
    try:
        names = msgspec.json.decode(descriptors or b"[]", type=list[str])
    except msgspec.MsgspecError as error:
        raise StoreError(f"descriptors.json makes no sense: {error}") from error
    for number, name in enumerate(names):
        if name.startswith("pipe:"):
            inherited += ["--inherit-fd", f"fd[{number}]:{name}"]
    # The work directory is where CRIU writes its log: not into the images.
    arguments = ["--images-dir", str(view), "--work-dir", ".", "--restore-detached", *inherited]
    return (
        "# Restores this epoch with stock CRIU, without Outlive. Stop the agent first: it removes epochs\n"
        "# that newer ones replace. What the workload had bind-mounted must be there as at the dump.\n"
        f"{shlex.join([*command, *arguments])}\n"
    ).encode()
