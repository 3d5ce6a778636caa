"""Which files processes have open or mapped, and on what a store through a mapping leaves no trace.

In: process IDs, directories. Out: files by device and inode. Nothing is opened, and who has ended has none.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from primary.file_book import FileId

_SHARED: Final = re.compile(rb"^(\S+) ...s \S+ \S+ [1-9]", re.MULTILINE)
"""A line of /proc/PID/maps: a shared mapping of something with an inode."""


def mapped_by(pid: int) -> set[FileId]:
    """Return the files that a process has mapped shared."""
    found: set[FileId] = set()
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return found  # it has ended
    for area in _SHARED.findall(maps):
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{pid}/map_files/{area.decode()}")
            if stat.S_ISREG(status.st_mode):
                found.add((status.st_dev, status.st_ino))
    return found


def opened_by(pid: int) -> Iterator[tuple[os.stat_result, str]]:
    """Yield the regular files that a process has open, and by which descriptors; see `is_writable`."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return  # it has ended
    for name in names:
        with contextlib.suppress(OSError):
            status = os.stat(path := f"{directory}/{name}")
            if stat.S_ISREG(status.st_mode):
                yield status, path


def is_writable(descriptor: str) -> bool:
    """Tell whether something is open there for writing; not if it is closed by now."""
    try:
        return bool(os.lstat(descriptor).st_mode & stat.S_IWUSR)
    except OSError:
        return False


def timeless(roots: Iterable[Path]) -> frozenset[int]:
    """Return which devices of the directories are such that a store through a mapping moves no time."""
    memory: set[int] = set()
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(b" - ")
            if rest.split()[0] in (b"tmpfs", b"ramfs"):
                major, _, minor = fields.split()[2].partition(b":")
                memory.add(os.makedev(int(major), int(minor)))
    return frozenset(os.stat(root).st_dev for root in roots) & memory
