"""What a directory of CRIU images says, as values: address spaces, memory maps, open files, statistics.

In: the files that one dump left. Out: frozen values, and the names by which the files are found. Pagemaps
have a module of their own (`pagemap`), frames too (`framing`); their names are offered here as well, so that
one import serves who works with images.
"""

from __future__ import annotations

import mmap
import re
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.criu.framing import (
    DAMAGED_HINT,
    Image,
    ImageKind,
    parse_image,
    read_image,
    serialize_image,
    write_image,
)
from common.criu.pagemap import (
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    PagemapEntry,
    PageRuns,
    compress,
    expand,
    parse_pagemap,
    parse_runs,
    read_pagemap,
    read_runs,
    serialize_pagemap,
    serialize_pages,
    write_pagemap,
)
from common.criu.proto import (
    core_pb2,
    fdinfo_pb2,
    file_lock_pb2,
    mm_pb2,
    remap_file_path_pb2,
    sk_inet_pb2,
    stats_pb2,
)
from common.errors import StoreError
from common.model import SpaceKind

__all__ = [
    "MAP_HUGETLB",
    "PAGE_SIZE",
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "DumpStats",
    "Image",
    "ImageKind",
    "InetSocket",
    "MemoryMap",
    "OpenFiles",
    "OtherFile",
    "PageImage",
    "PageRuns",
    "Pagemap",
    "PagemapEntry",
    "RegularFile",
    "Remap",
    "SpaceKey",
    "UnixSocket",
    "Vma",
    "compress",
    "expand",
    "page_images",
    "parse_image",
    "parse_pagemap",
    "parse_runs",
    "read_dump_stats",
    "read_image",
    "read_memory_map",
    "read_open_files",
    "read_pagemap",
    "read_remaps",
    "read_runs",
    "serialize_image",
    "serialize_pagemap",
    "serialize_pages",
    "write_image",
    "write_pagemap",
]

VMA_FILE_PRIVATE = 1 << 6
VMA_FILE_SHARED = 1 << 7
VMA_ANON_SHARED = 1 << 8
VMA_ANON_PRIVATE = 1 << 9
VMA_AREA_SYSVIPC = 1 << 10
"""Bits of `Vma.status` (CRIU 4.2, `criu/include/image.h`): what kind of mapping it is."""

LOCKS_NAME = "filelocks.img"
_FL_POSIX = 1
"""A bit of `file_lock_entry.flag` (CRIU 4.2, `criu/include/file-lock.h`)."""

MAP_HUGETLB = 0x40000
"""Bit of `Vma.flags`: a mapping of huge pages (not of transparent ones); as in <linux/mman.h>."""

_PAGEMAP_NAME = re.compile(r"pagemap-(shmem-)?([0-9]+)\.img")


class SpaceKey(msgspec.Struct, frozen=True, order=True):
    """Names a space of pages of a checkpoint: a task by its PID in its namespace, or a shared segment.

    Or the workload's own files (`common.file_records`), of which CRIU knows nothing.
    """

    kind: SpaceKind
    ident: int

    @property
    def pagemap_name(self) -> str:
        """The file name of its pagemap."""
        return f"pagemap-{'' if self.kind == 'task' else f'{self.kind}-'}{self.ident}.img"

    @property
    def memory_map_name(self) -> str | None:
        """The file name of its memory map; None for a shared segment, which has none of its own."""
        return f"mm-{self.ident}.img" if self.kind == "task" else None


class PageImage(msgspec.Struct, frozen=True):
    """An address space's two files: its pagemap, and `pages_name` with the pages' bytes."""

    key: SpaceKey
    pages_id: int

    @property
    def pages_name(self) -> str:
        """The file name of the pages' bytes. CRIU leaves it away if there are none."""
        return f"pages-{self.pages_id}.img"


class Vma(msgspec.Struct, frozen=True):
    """One mapping: bytes from `start` to `end` (exclusive); `prot` and `flags` as mmap(2) takes them."""

    start: int
    end: int
    prot: int
    flags: int
    status: int
    shmid: int
    """For shared mappings, the identifier of the segment; for files, that of the file in files.img."""
    open_flags: int = 0
    """For files, how the mapped file was open, as open(2) takes it."""


class MemoryMap(msgspec.Struct, frozen=True):
    """What `mm-PID.img` says: the mappings in order of address, and whether the task has AIO rings."""

    vmas: tuple[Vma, ...]
    aio_rings: int

    @property
    def hugetlb_bytes(self) -> int:
        """Size of all mappings of huge pages."""
        return sum(vma.end - vma.start for vma in self.vmas if vma.flags & MAP_HUGETLB)

    @property
    def parentless(self) -> tuple[Vma, ...]:
        """The mappings whose pages CRIU never looks for in the parent checkpoint.

        Those of private huge pages: CRIU 4.2 has the restored task itself read them, from the newest
        checkpoint's pages image whatever their flags say; if they say PE_PARENT, that was seen never to end.
        Shared ones are filled by criu, which follows the flags.
        """
        return tuple(vma for vma in self.vmas if vma.flags & MAP_HUGETLB and vma.flags & mmap.MAP_PRIVATE)

    def without_parent(self, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark the pages (address / 4096, ascending) that are in `parentless` mappings."""
        marks = np.zeros(numbers.shape, dtype=np.bool_)
        for vma in self.parentless:
            bounds = np.array([vma.start, vma.end], dtype=np.uint64) // np.uint64(PAGE_SIZE)
            first, last = np.searchsorted(numbers, bounds)
            marks[first:last] = True
        return marks


class RegularFile(msgspec.Struct, frozen=True):
    """An open or mapped file. At restore it must be there with this size, mode and build-id.

    `size` and `mode` are None where CRIU recorded none. `build_id` is the content of the ELF note, padded
    with zeros to a multiple of four bytes (empty if the file has none).
    """

    id: int
    path: str
    size: int | None
    mode: int | None
    flags: int
    pos: int
    build_id: bytes
    external: bool

    @property
    def writable(self) -> bool:
        """Whether it is open for writing."""
        return bool(self.flags & 0o3)


class InetSocket(msgspec.Struct, frozen=True):
    """An IPv4 or IPv6 socket; numbers as in <sys/socket.h>, `state` as in <netinet/tcp.h> (10 listens)."""

    id: int
    family: int
    type: int
    protocol: int
    state: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    v6only: bool = False


class UnixSocket(msgspec.Struct, frozen=True):
    """A unix socket; `name` as bind(2) took it (a zero byte first if abstract), `peer` an inode or 0."""

    id: int
    inode: int
    type: int
    state: int
    peer: int
    name: bytes


class OtherFile(msgspec.Struct, frozen=True):
    """Any other open file, by the name that CRIU gives its type, in lower case (pipe, eventpoll, tty, …).

    `watched` are the paths that it watches (inotify, fanotify); empty for one that CRIU found no path of.
    """

    id: int
    type_name: str
    watched: tuple[str, ...] = ()


class OpenFiles(msgspec.Struct, frozen=True):
    """What `files.img` says, in its order. Mapped files are in it too."""

    regular: tuple[RegularFile, ...]
    inet: tuple[InetSocket, ...]
    unix: tuple[UnixSocket, ...]
    other: tuple[OtherFile, ...]


class Remap(msgspec.Struct, frozen=True):
    """A file that had no name any more: `how` is linked, ghost or procfs; the ids are those of files.img."""

    original_id: int
    remap_id: int
    how: str


class DumpStats(msgspec.Struct, frozen=True):
    """What CRIU measured: times in microseconds, counts in pages. `frozen_us` includes the hooks' time."""

    freezing_us: int
    frozen_us: int
    memdump_us: int
    memwrite_us: int
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int
    pages_lazy: int
    shared_pages_scanned: int
    shared_pages_written: int


def page_images(directory: Path) -> list[PageImage]:
    """List the address spaces of a checkpoint, sorted; raises `StoreError` for a damaged or doubled one."""
    found: dict[int, PageImage] = {}
    for path in sorted(directory.iterdir()):
        if match := _PAGEMAP_NAME.fullmatch(path.name):
            key = SpaceKey("shmem" if match[1] else "task", int(match[2]))
            pages_id = read_pagemap(path).pages_id
            if pages_id in found:
                raise StoreError(
                    f"{path.name} and {found[pages_id].key.pagemap_name} both name pages-{pages_id}.img",
                    hint=DAMAGED_HINT,
                )
            found[pages_id] = PageImage(key, pages_id)
    return sorted(found.values(), key=lambda image: image.key)


def read_memory_map(path: Path) -> MemoryMap:
    """Read an `mm-PID.img`; raises `StoreError`."""
    (mm,) = cast("tuple[mm_pb2.mm_entry]", read_image(path, ImageKind.MM).messages)
    return MemoryMap(
        tuple(Vma(v.start, v.end, v.prot, v.flags, v.status, v.shmid, v.fdflags) for v in mm.vmas),
        len(mm.aios),
    )


def read_open_files(path: Path) -> OpenFiles:
    """Read a `files.img`; raises `StoreError`, also for a path that is not UTF-8 or an impossible address."""
    regular: list[RegularFile] = []
    inet: list[InetSocket] = []
    unix: list[UnixSocket] = []
    other: list[OtherFile] = []
    for file in cast("tuple[fdinfo_pb2.file_entry, ...]", read_image(path, ImageKind.FILES).messages):
        try:
            if file.HasField("reg"):
                regular.append(_regular_file(file))
            elif file.HasField("isk"):
                inet.append(_inet_socket(file.isk))
            elif file.HasField("usk"):
                unix.append(
                    UnixSocket(
                        file.id, file.usk.ino, file.usk.type, file.usk.state, file.usk.peer, file.usk.name
                    )
                )
            else:
                type_name = fdinfo_pb2.fd_types.Name(file.type).lower()
                other.append(OtherFile(file.id, type_name, tuple(_watched(file))))
        except (ValueError, OSError) as error:
            raise StoreError(
                f"{path.name}: file {file.id:#x} makes no sense: {error}", hint=DAMAGED_HINT
            ) from error
    return OpenFiles(tuple(regular), tuple(inet), tuple(unix), tuple(other))


def read_remaps(directory: Path) -> tuple[Remap, ...]:
    """Read which open files had been removed (none if there is no such image); raises `StoreError`."""
    path = directory / "remap-fpath.img"
    if not path.exists():
        return ()
    entries = cast(
        "tuple[remap_file_path_pb2.remap_file_path_entry, ...]",
        read_image(path, ImageKind.REMAP_PATHS).messages,
    )
    return tuple(
        Remap(e.orig_id, e.remap_id, remap_file_path_pb2.remap_type.Name(e.remap_type).lower())
        for e in entries
    )


def read_descriptors(directory: Path) -> dict[int, dict[int, int]]:
    """Read what each process has open: by PID (in its namespace) and descriptor, the id of the file.

    Raises `StoreError`.
    """
    found: dict[int, dict[int, int]] = {}
    for path in directory.glob("ids-*.img"):
        (ids,) = cast("tuple[core_pb2.task_kobj_ids_entry]", read_image(path, ImageKind.IDS).messages)
        table = directory / f"fdinfo-{ids.files_id}.img"
        if table.exists():
            image = read_image(table, ImageKind.FDINFO)
            entries = cast("tuple[fdinfo_pb2.fdinfo_entry, ...]", image.messages)
            found[int(path.stem.removeprefix("ids-"))] = {entry.fd: entry.id for entry in entries}
    return found


def read_posix_locks(directory: Path) -> set[tuple[int, int]]:
    """Read who holds fcntl (POSIX) locks: PID and descriptor of each. Raises `StoreError`."""
    path = directory / LOCKS_NAME
    if not path.exists():
        return set()
    locks = cast("tuple[file_lock_pb2.file_lock_entry, ...]", read_image(path, ImageKind.FILE_LOCKS).messages)
    return {(lock.pid, lock.fd) for lock in locks if lock.flag & _FL_POSIX}


def read_dump_stats(directory: Path) -> DumpStats:
    """Read `stats-dump` from CRIU's work directory; raises `StoreError`."""
    path = directory / "stats-dump"
    (stats,) = cast("tuple[stats_pb2.stats_entry]", read_image(path, ImageKind.STATS).messages)
    if not stats.HasField("dump"):
        raise StoreError(f"{path} holds no statistics of a dump", hint=DAMAGED_HINT)
    dump = stats.dump
    return DumpStats(
        freezing_us=dump.freezing_time,
        frozen_us=dump.frozen_time,
        memdump_us=dump.memdump_time,
        memwrite_us=dump.memwrite_time,
        pages_scanned=dump.pages_scanned,
        pages_skipped_parent=dump.pages_skipped_parent,
        pages_written=dump.pages_written,
        pages_lazy=dump.pages_lazy,
        shared_pages_scanned=dump.shpages_scanned,
        shared_pages_written=dump.shpages_written,
    )


def _regular_file(file: fdinfo_pb2.file_entry) -> RegularFile:
    reg = file.reg
    return RegularFile(
        id=file.id,
        path=reg.name,
        size=reg.size if reg.HasField("size") else None,
        mode=reg.mode if reg.HasField("mode") else None,
        flags=reg.flags,
        pos=reg.pos,
        build_id=struct.pack(f"<{len(reg.build_id)}I", *reg.build_id),
        external=reg.ext,
    )


def _inet_socket(sk: sk_inet_pb2.inet_sk_entry) -> InetSocket:
    return InetSocket(
        id=sk.id,
        family=sk.family,
        type=sk.type,
        protocol=sk.proto,
        state=sk.state,
        source=_address(sk.family, sk.src_addr),
        source_port=sk.src_port,
        destination=_address(sk.family, sk.dst_addr),
        destination_port=sk.dst_port,
        v6only=sk.v6only,
    )


def _watched(file: fdinfo_pb2.file_entry) -> Iterable[str]:
    yield from (watch.f_handle.path for watch in file.ify.wd)
    for mark in file.ffy.mark:
        yield mark.ie.f_handle.path if mark.HasField("ie") else mark.me.path


def _address(family: int, words: Iterable[int]) -> str:
    """Write an address as text: the image holds the bytes that go on the wire, as words of this machine."""
    packed = b"".join(struct.pack("<I", word) for word in words)
    if not packed:
        return ""
    return socket.inet_ntop(family, packed)
