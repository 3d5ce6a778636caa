"""Writes one level: files go in as they come, are hashed on the way, and are durable at the end.

In: metadata files, and for each address space which pages it has and then their bytes in ascending order,
in any chunking. Out: a directory with a manifest, synced, ready to be renamed. Both a received epoch and a
fold are written by this; neither keeps a copy of the pages in memory, and no file is read again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap, SpaceKey, compress, serialize_pagemap
from common.durable import Disk, Writer
from common.errors import StoreError
from common.model import PAGE_BYTES
from replica.levels import (
    MANIFEST_NAME,
    PARENT_NAME,
    REASON_NAME,
    RESTORE_NAME,
    EpochHeader,
    FileEntry,
    Flags,
    Layout,
    Level,
    Manifest,
    Numbers,
    SpaceEntry,
    encode_manifest,
)

ZERO = 0x80
"""Our own page flag: the page changed and is all zeros now, so that its content is not sent."""

MAX_PAGE_NUMBER = 1 << 52
_KNOWN_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT | ZERO
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
    """The pages' bytes of one space, of which those of zero pages are holes that nobody sends."""

    def __init__(self, disk: Disk, directory: Path, pages_id: int, content: Flags, op: str) -> None:
        """`content` has a row for each present page: 1 where bytes come, 0 for a page of zeros."""
        self._disk = disk
        self._path = directory / f"pages-{pages_id}.img"
        self._op = op
        self._file: _HashedFile | None = None
        self.expected_bytes = int(np.count_nonzero(content)) * PAGE_BYTES
        self._left_bytes = self.expected_bytes
        # Runs of alternating kind, the first one of zeros (perhaps of none), from the last to the first.
        breaks = np.flatnonzero(np.diff(content, prepend=np.uint8(0))).tolist()
        bounds = [0, *breaks, len(content)]
        self._runs = [
            ((end - start) * PAGE_BYTES, bool(place % 2))
            for place, (start, end) in enumerate(pairwise(bounds))
        ][::-1]
        self._has_pages = len(content) > 0

    @property
    def missing_bytes(self) -> int:
        return self._left_bytes

    def write(self, data: memoryview) -> None:
        self._left_bytes -= len(data)
        while data:
            self._skip_zeros()
            run_bytes, _ = self._runs.pop()
            part = data[:run_bytes]
            self._open().write(part)
            data = data[len(part) :]
            if len(part) < run_bytes:
                self._runs.append((run_bytes - len(part), True))

    def finish(self) -> FileEntry | None:
        """Return the file's entry; None if no page is present: then there is no file, as with CRIU."""
        self._skip_zeros()
        return self._open().finish() if self._has_pages else None

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _skip_zeros(self) -> None:
        while self._runs and not self._runs[-1][1]:
            zeros_bytes, _ = self._runs.pop()
            if zeros_bytes:
                self._open().skip(zeros_bytes)

    def _open(self) -> _HashedFile:
        if self._file is None:
            self._file = _HashedFile(self._disk, self._path, self._op)
        return self._file


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

    def space(self, key: SpaceKey, numbers: Numbers, flags: Flags) -> None:
        """Announce a space: its pages, ascending, and their flags (CRIU's, and `ZERO`); shape (n,).

        The bytes of all pages that are present and not `ZERO` must follow. Raises StoreError for what
        cannot be, and when the space before is not complete.
        """
        self._finish_pages()
        check_space(key, numbers, flags)
        if key in self._spaces:
            raise StoreError(f"{key.pagemap_name} came twice in one epoch")
        zero = (flags & ZERO) != 0
        stored = np.where(zero, (flags & PE_LAZY) | PE_PRESENT, flags).astype(np.uint8)
        present = (stored & PE_PRESENT) != 0
        pages_id = len(self._spaces) + 1
        pagemap = _HashedFile(self._disk, self.directory / key.pagemap_name, f"{self._op}.pagemap")
        try:
            pagemap.write(serialize_pagemap(Pagemap(pages_id, compress(numbers, stored))))
        finally:
            self._files[key.pagemap_name] = pagemap.finish()
        self._spaces[key] = SpaceEntry(key, pages_id, len(numbers), int(np.count_nonzero(present)))
        content = (~zero[present]).astype(np.uint8)
        self._open_pages = (
            key,
            _PagesFile(self._disk, self.directory, pages_id, content, f"{self._op}.pages"),
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

    def close(self) -> None:
        """Close what is open; the directory stays. Harmless when repeated."""
        if self._open_metadata:
            self._open_metadata.close()
        if self._open_pages:
            self._open_pages[1].close()

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
    if key.kind not in ("task", "shmem") or type(key.ident) is not int or key.ident < 0:
        raise StoreError(f"{key!r} names no address space")
    if numbers.dtype != np.uint64 or flags.dtype != np.uint8 or numbers.ndim != 1:
        raise StoreError(f"{name}: page numbers must be 64-bit and flags one byte each")
    if numbers.shape != flags.shape:
        raise StoreError(f"{name}: {len(numbers)} pages and {len(flags)} flags came")
    if numbers.size and (int(numbers[-1]) >= MAX_PAGE_NUMBER or not np.all(numbers[1:] > numbers[:-1])):
        raise StoreError(f"{name}: page numbers are not ascending or too large")
    in_base = (flags & PE_PARENT) != 0
    in_level = (flags & (PE_PRESENT | ZERO)) != 0
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
