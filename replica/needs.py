"""What an epoch needs of the node that restores it, read from its images. Pure but for the reading.

In: the epoch's directory. Out: `Needs`, in the workload's own words: paths as it sees them. What no node can
give is a problem already here, in a sentence. Whether *this* node has the rest is for `replica.readiness`.
"""

from __future__ import annotations

import hashlib
import mmap
import stat
from collections.abc import Iterator
from pathlib import Path
from socket import IPPROTO_TCP, SOCK_DGRAM
from typing import Literal

import msgspec

from common.criu.images import (
    LOCKS_NAME,
    PE_PARENT,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    InetSocket,
    MemoryMap,
    OpenFiles,
    RegularFile,
    UnixSocket,
    page_images,
    read_descriptors,
    read_memory_map,
    read_open_files,
    read_posix_locks,
    read_remaps,
    read_runs,
)
from common.origin import ORIGIN_FILE, Origin, decode_origin

_MAP_NORESERVE = 0x4000
_ESTABLISHED = 1


class NeededFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory that must be there; None and an empty build-id are not compared.

    `written` tells how the workload can write to it: it has it open, or mapped as shared memory.
    """

    path: str
    size: int | None = None
    mode: int | None = None
    build_id: bytes = b""
    written: Literal["", "open", "mapped"] = ""

    @property
    def is_data(self) -> bool:
        """Whether it is a regular file (as far as the image says): what is written stays in it."""
        return self.mode is None or stat.S_ISREG(self.mode)


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """All that an epoch needs of a node."""

    origin: Origin
    files: tuple[NeededFile, ...]
    sockets: tuple[InetSocket, ...]
    """To be bound, listening or (UDP) connected again. Connections are closed, and need nothing."""
    abstract_names: tuple[bytes, ...]
    """Unix sockets' names outside the filesystem, which all of a node shares."""
    committed_bytes: int
    """Memory that strict overcommit accounting would count."""
    hugetlb_bytes: int
    problems: tuple[str, ...]
    """Why no node can restore it faithfully."""


def fingerprint(images: Path) -> bytes:
    """Identify all that `read_needs` reads: the same value, the same needs. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _sources(images):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.digest()


def read_needs(images: Path) -> Needs:
    """Read what the epoch in `images` needs. Raises `StoreError` for damaged images, OSError for missing."""
    files = read_open_files(images / "files.img")
    remaps = read_remaps(images)
    maps = [read_memory_map(path) for path in sorted(images.glob("mm-*.img"))]
    # Deleted files travel in the images, files of ended processes are made by CRIU. One that has another name
    # got a further one from CRIU, for a moment: that is a file of the epoch too, and is needed as any other.
    carried = {remap.original_id for remap in remaps}
    needed = [_needed(file, _mapped_for_writing(maps)) for file in files.regular if file.id not in carried]
    needed += [NeededFile(path=path) for path in _directories_of_sockets(files)]
    needed += [NeededFile(path=path) for other in files.other for path in other.watched if path]
    vmas = [vma for memory_map in maps for vma in memory_map.vmas]
    return Needs(
        origin=decode_origin((images / ORIGIN_FILE).read_bytes()),
        files=_without_repetition(needed),
        sockets=tuple(dict.fromkeys(socket for socket in files.inet if _is_bound(socket))),
        abstract_names=tuple(
            dict.fromkeys(socket.name for socket in files.unix if _has_abstract_name(socket))
        ),
        committed_bytes=sum(
            vma.end - vma.start
            for vma in vmas
            if vma.prot & mmap.PROT_WRITE and vma.flags & mmap.MAP_PRIVATE and not vma.flags & _MAP_NORESERVE
        ),
        hugetlb_bytes=sum(memory_map.hugetlb_bytes for memory_map in maps),
        problems=(*_problems(files, maps), *_lost_locks(images, files)),
    )


def borrowed_huge_pages(images: Path) -> Iterator[str]:
    """Say so if private huge pages of the epoch are to be found in its parent, where CRIU does not look.

    Not one of `Needs`' problems: pagemaps differ in every epoch. Raises `StoreError`, OSError.
    """
    for image in page_images(images):
        if name := image.key.memory_map_name:
            numbers, flags = read_runs(images / image.key.pagemap_name).expand()
            if (flags[read_memory_map(images / name).without_parent(numbers)] & PE_PARENT).any():
                yield (
                    "private huge pages (hugetlb) of the workload were not sent with this epoch, and CRIU "
                    "restores them from nowhere else: upgrade Outlive on the primary"
                )
                return


def _problems(files: OpenFiles, maps: list[MemoryMap]) -> Iterator[str]:
    """Say what rules out a faithful restore anywhere."""
    for file in files.regular:
        if file.external:
            yield f"{file.path} was handed to criu as an external file, which a replica does not have"
    if any("" in other.watched for other in files.other):
        yield (
            "a watch (inotify or fanotify) is on a file that CRIU knows no path of, so another node cannot "
            "find it: end what watches, or let it watch a plain directory"
        )
    if any(memory_map.aio_rings for memory_map in maps):
        yield (
            "the workload uses kernel AIO (io_setup), and a request in flight at a capture would never "
            "complete after a restore: switch it to another way of doing I/O"
        )


def _lost_locks(images: Path, files: OpenFiles) -> Iterator[str]:
    """Say which locks between processes a restore would lose.

    CRIU 4.2 sets fcntl locks before it maps files, and then closes what it opened for that: which gives up
    all such locks that the process has on the same file. Who has the file for himself does not miss them.
    """
    locks = read_posix_locks(images)
    if not locks:
        return
    paths = {file.id: file.path for file in files.regular}
    opened = read_descriptors(images)
    mapped = {
        int(path.stem.removeprefix("mm-")): {
            paths[vma.shmid]
            for vma in read_memory_map(path).vmas
            if vma.status & (VMA_FILE_SHARED | VMA_FILE_PRIVATE) and vma.shmid in paths
        }
        for path in images.glob("mm-*.img")
    }
    users = {
        pid: mapped.get(pid, set()) | {paths[each] for each in opened.get(pid, {}).values() if each in paths}
        for pid in mapped.keys() | opened.keys()
    }
    held = {(pid, paths.get(opened.get(pid, {}).get(descriptor, 0), "")) for pid, descriptor in locks}
    lost = {path for pid, path in held if path in mapped.get(pid, ())}
    for path in sorted(lost):
        if sum(path in using for using in users.values()) > 1:
            yield (
                f"{path} is used by several processes, and one has it locked (fcntl) and mapped: criu loses "
                "such locks at a restore, and two would write at once: let one process use it (SQLite: or do "
                "without WAL and mmap_size)"
            )


def _sources(images: Path) -> list[Path]:
    optional = [images / "remap-fpath.img", images / LOCKS_NAME]
    if optional[1].exists():
        optional += [path for kind in ("ids", "fdinfo") for path in sorted(images.glob(f"{kind}-*.img"))]
    return [
        images / "files.img",
        images / ORIGIN_FILE,
        *sorted(images.glob("mm-*.img")),
        *(path for path in optional if path.exists()),
    ]


def _mapped_for_writing(maps: list[MemoryMap]) -> frozenset[int]:
    """Return the ids of files that are mapped as shared and were writable, whatever is allowed now."""
    return frozenset(
        vma.shmid
        for memory_map in maps
        for vma in memory_map.vmas
        if vma.status & VMA_FILE_SHARED and (vma.open_flags & 0o3 or vma.prot & mmap.PROT_WRITE)
    )


def _needed(file: RegularFile, mapped: frozenset[int]) -> NeededFile:
    written: Literal["", "open", "mapped"] = (
        "mapped" if file.id in mapped else "open" if file.writable else ""
    )
    return NeededFile(path=file.path, size=file.size, mode=file.mode, build_id=file.build_id, written=written)


def _without_repetition(files: list[NeededFile]) -> tuple[NeededFile, ...]:
    """Keep one of equal ones, and of those for the same path the written one if it says the same."""
    written = {(file.path, file.size, file.mode) for file in files if file.written}
    kept = (file for file in files if file.written or (file.path, file.size, file.mode) not in written)
    return tuple(dict.fromkeys(kept))


def _directories_of_sockets(files: OpenFiles) -> list[str]:
    names = (socket.name.rstrip(b"\0").decode(errors="surrogateescape") for socket in files.unix)
    return sorted({str(Path(name).parent) for name in names if name.startswith("/")})


def _is_bound(socket: InetSocket) -> bool:
    """Tell whether CRIU binds it again: not if it was connected, for connections come back closed."""
    return bool(socket.source_port) and not (socket.protocol == IPPROTO_TCP and socket.destination_port)


def _has_abstract_name(socket: UnixSocket) -> bool:
    """Tell whether CRIU binds it to an abstract name; what `accept` gave has its listener's name only."""
    accepted = socket.type != SOCK_DGRAM and socket.state == _ESTABLISHED
    return len(socket.name) > 1 and socket.name.startswith(b"\0") and not accepted
