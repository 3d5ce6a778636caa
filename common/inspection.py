"""What a live process tree uses, from /proc: descriptors, mappings, sockets, locks, namespaces, tracers.

In: PIDs. Out: values that say what is there, not whether it is good: `outlive.doctor` judges. Looking
disturbs nothing and stops nobody, so it is a picture of many moments: what comes and goes is missed.
Paths are as the processes see them. Needs CAP_SYS_PTRACE for processes of other users.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

FileKind = Literal["regular", "directory", "character", "block", "fifo", "socket", "anonymous", "other"]

_ANONYMOUS = "anon_inode:"
_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ (\d+)\s*(.*)")
_SS_DEADLINE_S = 5.0
_PEERS = re.compile(r"^\s*u_\S+\s+\S+\s+\d+\s+\d+\s+(?:.*?)\s(\d+)\s+(?:.*?)\s(\d+)(?:\s|$)")


class OpenDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """One open file of a process."""

    number: int
    kind: FileKind
    name: str
    """What the link says without `(deleted)`; for an anonymous inode its type: `[io_uring]`, `inotify`."""
    flags: int
    """As open(2) takes them."""
    inode: int
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device file."""
    size_bytes: int = 0
    links: int = 1
    """Names that the file still has; 0 for a deleted one."""
    deleted: bool = False
    """The name that it was opened by is gone."""
    protocol: str = ""
    """Of a socket, as the kernel names it: TCP, UNIX-STREAM, SCTP, …; empty if it does not say."""
    locks: tuple[str, ...] = ()
    """Lines of /proc/locks' format: POSIX and BSD locks, leases."""
    watched_devices: frozenset[tuple[int, int]] = frozenset()
    """Of inotify: on which filesystems it watches something."""

    @property
    def writable(self) -> bool:
        """Whether it is open for writing."""
        return bool(self.flags & os.O_ACCMODE)

    @property
    def direct(self) -> bool:
        """Whether it bypasses the page cache."""
        return bool(self.flags & os.O_DIRECT)


class MappedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One mapping with a name: a file, or what the kernel names like one (`/[aio]`, `/SYSV00000000`)."""

    name: str
    shared: bool
    writable: bool
    deleted: bool
    inode: int
    bytes: int


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one process uses."""

    pid: int
    """As this node sees it."""
    name: str
    root: str
    descriptors: tuple[OpenDescriptor, ...]
    mappings: tuple[MappedFile, ...]
    """Each file once for each way in which it is mapped."""
    namespaces: Mapping[str, str]
    """Kind to identity (`mnt` to `mnt:[4026531841]`)."""
    tracer_pid: int = 0
    seccomp_mode: int = 0
    """0: none, 1: strict, 2: filters."""
    overlay_devices: frozenset[tuple[int, int]] = frozenset()
    """Which of the filesystems that it sees are overlayfs."""


class TreeUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a process tree uses. `outside_peers`: inodes of unix sockets whose other end is not in it."""

    processes: tuple[ProcessUse, ...]
    outside_peers: frozenset[int] = frozenset()


def inspect_tree(pids: Iterable[int]) -> TreeUse:
    """Look at every process; those that end meanwhile are left out. Takes about 1 ms for 20 descriptors.

    Raises PermissionError if a process may not be looked at. Blocking: call it in a thread.
    """
    processes = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            processes.append(inspect_process(pid))
    return TreeUse(processes=tuple(processes), outside_peers=_outside_peers(processes))


def inspect_process(pid: int) -> ProcessUse:
    """Look at one process. Raises ProcessLookupError or FileNotFoundError if it ends, PermissionError."""
    base = Path(f"/proc/{pid}")
    status = dict(
        line.split(":\t", 1) for line in (base / "status").read_text().splitlines() if ":\t" in line
    )
    return ProcessUse(
        pid=pid,
        name=status["Name"],
        root=os.readlink(base / "root"),
        descriptors=tuple(_descriptors(base)),
        mappings=tuple(_mappings(base)),
        namespaces={entry.name: os.readlink(entry) for entry in (base / "ns").iterdir()},
        tracer_pid=int(status.get("TracerPid", "0")),
        seccomp_mode=int(status.get("Seccomp", "0")),
        overlay_devices=frozenset(_overlay_devices(base)),
    )


def _descriptors(base: Path) -> Iterator[OpenDescriptor]:
    for entry in sorted((base / "fd").iterdir(), key=lambda path: int(path.name)):
        with contextlib.suppress(FileNotFoundError):  # closed in between
            yield _descriptor(base, entry)


def _descriptor(base: Path, entry: Path) -> OpenDescriptor:
    link = os.readlink(entry)
    found = entry.stat()
    info = (base / "fdinfo" / entry.name).read_text()
    anonymous = link.startswith(_ANONYMOUS)
    deleted = link.endswith(" (deleted)")
    flags = re.search(r"^flags:\s+([0-7]+)", info, re.MULTILINE)
    return OpenDescriptor(
        number=int(entry.name),
        kind="anonymous" if anonymous else _kind(found.st_mode),
        name=link.removeprefix(_ANONYMOUS).removesuffix(" (deleted)"),
        flags=int(flags[1], 8) if flags else 0,
        inode=found.st_ino,
        device=(os.major(found.st_rdev), os.minor(found.st_rdev)),
        size_bytes=found.st_size,
        links=found.st_nlink,
        deleted=deleted,
        protocol=_protocol(entry) if stat.S_ISSOCK(found.st_mode) else "",
        locks=tuple(re.findall(r"^lock:\s+(.*)$", info, re.MULTILINE)),
        watched_devices=frozenset(
            # The kernel prints its own dev_t here: 12 bits major, 20 bits minor.
            (int(device, 16) >> 20, int(device, 16) & 0xFFFFF)
            for device in re.findall(r"^inotify wd:.* sdev:([0-9a-f]+)", info, re.MULTILINE)
        ),
    )


def _kind(mode: int) -> FileKind:
    kinds: dict[int, FileKind] = {
        stat.S_IFREG: "regular",
        stat.S_IFDIR: "directory",
        stat.S_IFCHR: "character",
        stat.S_IFBLK: "block",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "other")


def _protocol(entry: Path) -> str:
    """Ask the socket's own filesystem (xattr(7): `system.sockprotoname`), as lsof does."""
    try:
        return os.getxattr(entry, "system.sockprotoname").rstrip(b"\0").decode()
    except OSError:
        return ""


def _mappings(base: Path) -> Iterator[MappedFile]:
    sizes: dict[MappedFile, int] = {}
    for line in (base / "maps").read_text().splitlines():
        match = _MAPS_LINE.match(line)
        if match is None or not match[5].startswith("/"):
            continue
        mapping = MappedFile(
            name=match[5].removesuffix(" (deleted)"),
            shared=match[3][3] == "s",
            writable=match[3][1] == "w",
            deleted=match[5].endswith(" (deleted)"),
            inode=int(match[4]),
            bytes=0,
        )
        sizes[mapping] = sizes.get(mapping, 0) + int(match[2], 16) - int(match[1], 16)
    for mapping, size in sizes.items():
        yield msgspec.structs.replace(mapping, bytes=size)


def _overlay_devices(base: Path) -> Iterator[tuple[int, int]]:
    for line in (base / "mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("overlay "):
            major, minor = fields.split()[2].split(":")
            yield int(major), int(minor)


def _outside_peers(processes: list[ProcessUse]) -> frozenset[int]:
    """Ask `ss`, in the tree's own network namespace, who is connected with whom; empty without `ss`."""
    own = {
        descriptor.inode
        for process in processes
        for descriptor in process.descriptors
        if descriptor.protocol.startswith("UNIX")
    }
    if not own:
        return frozenset()
    try:
        listed = subprocess.run(
            ["nsenter", f"--net=/proc/{processes[0].pid}/ns/net", "ss", "-xanH"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SS_DEADLINE_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return outside_peers(listed, own)


def outside_peers(listed: str, own: set[int]) -> frozenset[int]:
    """Find in what `ss -xan` prints the sockets of `own` whose peer is not in `own` (0: not connected)."""
    pairs = (_PEERS.match(line) for line in listed.splitlines())
    return frozenset(
        int(pair[1]) for pair in pairs if pair and int(pair[1]) in own and int(pair[2]) not in {0, *own}
    )
