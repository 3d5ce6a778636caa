"""The file operations that durability hangs on, behind one small interface.

In: paths and bytes. Out: files, directories and links that are there after a power loss once the matching
`sync_*` call returned, and what recovery reads of them. Every call carries an `op`, a short label such as
`commit.rename`: it stands in the error, and a test's disk can fail or stop at exactly one of them.

All files are 0600 and all directories 0700, whatever the umask. A full disk (ENOSPC, EDQUOT) raises
NoSpaceError, every other failure StoreError with operation, path and cause.

Nothing heavy is imported: the keeper writes its term file through this module too.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Protocol

from common.errors import NoSpaceError, StoreError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
TEMPORARY_PREFIX = ".new-"
"""How the names of half-made files and links begin; recovery removes what is left of them."""

_SYNC_THREADS = 4
_VOLATILE_FILESYSTEMS = frozenset({"tmpfs", "ramfs"})


class Writer(Protocol):
    """A new file that is written from its start to its end."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`."""
        ...

    def skip(self, size_bytes: int) -> None:
        """Append zeros without storing them: a hole where the file system has such."""
        ...

    def close(self) -> None:
        """Give the file its length and close it; not synced. Harmless when repeated."""
        ...


class Disk(Protocol):
    """What commits, folds, recovery and term files ask of a file system."""

    def make_dir(self, path: Path, *, op: str) -> None:
        """Make one directory below an existing one; it is an error if it is there already."""
        ...

    def write_file(self, path: Path, data: bytes, *, op: str) -> None:
        """Write a whole file, replacing what it held; neither atomic nor synced."""
        ...

    def create(self, path: Path, *, op: str) -> Writer:
        """Open a new file for writing; it is an error if it is there already."""
        ...

    def sync_files(self, paths: Iterable[Path], *, op: str) -> None:
        """Return when the content of these files would survive a power loss."""
        ...

    def sync_dir(self, path: Path, *, op: str) -> None:
        """Return when the names in this directory would survive a power loss."""
        ...

    def rename(self, source: Path, target: Path, *, op: str) -> None:
        """Give a file or directory another name on the same file system, atomically."""
        ...

    def point(self, link: Path, target: str, *, op: str) -> None:
        """Make the symlink `link` say `target`, atomically, whether it was there or not."""
        ...

    def link(self, source: Path, target: Path, *, op: str) -> None:
        """Give a file a second name (a hard link)."""
        ...

    def unlink(self, path: Path, *, op: str) -> None:
        """Remove a file or symlink; fine if it is not there."""
        ...

    def remove_tree(self, path: Path, *, op: str) -> None:
        """Remove a directory with all below it; fine if it is not there. Links are not followed."""
        ...

    def read_file(self, path: Path, *, op: str) -> bytes:
        """Read a whole file; of a symlink, the one that it leads to."""
        ...

    def open_file(self, path: Path, *, op: str) -> int:
        """Open a file for reading and return its descriptor, which the caller closes."""
        ...

    def size_bytes(self, path: Path, *, op: str) -> int:
        """Length of a file. A symlink is not followed."""
        ...

    def names(self, path: Path, *, op: str) -> list[str]:
        """Names in a directory, sorted."""
        ...

    def read_link(self, path: Path, *, op: str) -> str | None:
        """What a symlink says; None if there is none of this name."""
        ...

    def free_bytes(self, path: Path) -> int:
        """Bytes that can still be written to the file system of `path`."""
        ...

    def is_volatile(self, path: Path) -> bool:
        """Whether `path` lies in memory (tmpfs, ramfs) and is gone after a power loss.

        Looks at the topmost file system only: an overlay whose upper layer is a tmpfs passes for a disk.
        """
        ...


class RealDisk:
    """The machine's own file systems."""

    def make_dir(self, path: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, path):
            path.mkdir(DIRECTORY_MODE)
            path.chmod(DIRECTORY_MODE)

    def write_file(self, path: Path, data: bytes, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, path):
            writer = _RealWriter(path, os.O_TRUNC, op)
        try:
            writer.write(data)
        finally:
            writer.close()

    def create(self, path: Path, *, op: str) -> Writer:
        """See `Disk`."""
        with _naming(op, path):
            return _RealWriter(path, os.O_EXCL, op)

    def sync_files(self, paths: Iterable[Path], *, op: str) -> None:
        """See `Disk`."""
        # Four at a time take two thirds of the time of one after the other for an epoch's files; syncfs is
        # faster still, but waits for other programs' data too (docs/store.md has the numbers).
        waiting = list(paths)
        if len(waiting) < _SYNC_THREADS:
            for path in waiting:
                _sync_file(path, op)
            return
        with ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync") as threads:
            for _ in threads.map(_sync_file, waiting, repeat(op)):
                pass

    def sync_dir(self, path: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, path):
            _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, target):
            source.rename(target)

    def point(self, link: Path, target: str, *, op: str) -> None:
        """See `Disk`."""
        temporary = temporary_name(link)
        with _naming(op, link):
            temporary.symlink_to(target)
            try:
                temporary.rename(link)
            except OSError:
                temporary.unlink()
                raise

    def link(self, source: Path, target: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, target):
            os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, path):
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path, *, op: str) -> None:
        """See `Disk`."""
        with _naming(op, path):
            if path.is_symlink() or path.exists():
                shutil.rmtree(path)

    def read_file(self, path: Path, *, op: str) -> bytes:
        """See `Disk`."""
        with _naming(op, path):
            return path.read_bytes()

    def open_file(self, path: Path, *, op: str) -> int:
        """See `Disk`."""
        with _naming(op, path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size_bytes(self, path: Path, *, op: str) -> int:
        """See `Disk`."""
        with _naming(op, path):
            return path.lstat().st_size

    def names(self, path: Path, *, op: str) -> list[str]:
        """See `Disk`."""
        with _naming(op, path):
            return sorted(os.listdir(path))

    def read_link(self, path: Path, *, op: str) -> str | None:
        """See `Disk`."""
        try:
            with _naming(op, path):
                return os.readlink(path)
        except StoreError as error:
            if cause_of(error) in (errno.ENOENT, errno.EINVAL):  # nothing there, or no link
                return None
            raise

    def free_bytes(self, path: Path) -> int:
        """See `Disk`."""
        with _naming("free space", path):
            status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def is_volatile(self, path: Path) -> bool:
        """See `Disk`."""
        with _naming("file system type", path):
            device = path.stat().st_dev
            wanted = f"{os.major(device)}:{os.minor(device)}"
            # proc(5): ID, parent, major:minor, root, mount point, options, optional fields, "-", type, …
            for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
                fields = line.split(" ")
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1] in _VOLATILE_FILESYSTEMS
        return False


class _RealWriter:
    """A file descriptor and how far it has been written."""

    def __init__(self, path: Path, flags: int, op: str) -> None:
        self._path = path
        self._op = op
        self._end = 0
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | flags, FILE_MODE)
        os.fchmod(self._fd, FILE_MODE)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        with _naming(self._op, self._path):
            while view:
                written = os.pwrite(self._fd, view, self._end)
                self._end += written
                view = view[written:]

    def skip(self, size_bytes: int) -> None:
        self._end += size_bytes

    def close(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with _naming(self._op, self._path):
            try:
                os.ftruncate(fd, self._end)
            finally:
                os.close(fd)


def atomic_write(path: Path, data: bytes, *, op: str, disk: Disk | None = None) -> None:
    """Replace the file at `path` by one that holds `data`, durably: the old content or the new, never less.

    When this returns, the new content survives a power loss. When it raises, either may be there.
    """
    disk = disk or RealDisk()
    temporary = temporary_name(path)
    try:
        disk.write_file(temporary, data, op=op)
        disk.sync_files([temporary], op=op)
        disk.rename(temporary, path, op=op)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    disk.sync_dir(path.parent, op=op)


def cause_of(error: StoreError | NoSpaceError) -> int | None:
    """Return the operating system's number for what went wrong in a `Disk`; None if it was something else."""
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def temporary_name(path: Path) -> Path:
    """Name a sibling of `path` that nobody else uses, by which a leftover can be told."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")


def _sync_file(path: Path, op: str) -> None:
    with _naming(op, path):
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _naming(op: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours, with operation, path and cause."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{op}: no room for {path}: {reason}", hint="free some space on this file system"
            ) from error
        raise StoreError(f"{op}: {path}: {reason}") from error
