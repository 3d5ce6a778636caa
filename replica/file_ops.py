"""What is done to files, one operation each, relative to descriptors of directories.

In: a directory's descriptor and one name in it. Out: files of every kind, made, moved, removed and given what
an inode says. No name is ever more than one component, no symbolic link is followed, and no mount point is
crossed: what is done stays in the directory, however deep that lies and whatever is in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from common.errors import NoSpaceError, StoreError
from common.file_records import OTHERWISE_TOLD, Inode
from common.model import PAGE_BYTES
from replica.file_model import Attributes, readable

Step = Callable[[str], None]
"""Is told of each operation that changes something, before it happens; may raise, so that it does not."""

_SYS_OPENAT2: Final = 437
_RESOLVE_NO_XDEV: Final = 0x01
_PUNCH_HOLE_KEEP_SIZE: Final = 0x03
_NO_SUCH: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
_ZEROS: Final = bytes(1 << 18)

HOST_ATTRIBUTES: Final = frozenset({b"security.selinux"})
"""What a host gives to files by itself: not removed where an epoch has none."""

_MOUNTED_HINT: Final = "is something mounted there? Unmount it: a tree is on one file system"
_DISK_HINT: Final = "see what the kernel's log says about this disk"
_HINTS: Final = {
    errno.EXDEV: _MOUNTED_HINT,
    errno.EBUSY: _MOUNTED_HINT,
    errno.EIO: _DISK_HINT,
    errno.EROFS: _DISK_HINT,
    errno.EOPNOTSUPP: "keep the directory on a file system that can store it, as ext4 and XFS can",
}
_TAMPERED_HINT: Final = "nobody else may change these directories; the next attempt looks at all of them"

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """`struct open_how` of <linux/openat2.h>."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in(directory: int, name: bytes, flags: int) -> int:
    """Open what has that name itself, be it a link; raises OSError, EXDEV if something is mounted there."""
    how = _OpenHow(flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_XDEV)
    while True:
        descriptor: int = _libc.syscall(
            _SYS_OPENAT2, directory, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
        if descriptor >= 0:
            return descriptor
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def reopened(descriptor: int, flags: int) -> Iterator[int]:
    """Open a file, which is open in any way, for something else. Raises OSError."""
    other = os.open(_path(descriptor), flags | os.O_CLOEXEC)
    try:
        yield other
    finally:
        os.close(other)


def attributes_of(descriptor: int) -> dict[bytes, bytes]:
    """Return the extended attributes; none where the file system has no such. Raises OSError."""
    path = _path(descriptor)
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in _NO_SUCH:
            return {}
        raise
    # XFS lists access control lists once more, under names of its own.
    own = [name for name in map(os.fsencode, names) if not name.startswith(OTHERWISE_TOLD)]
    return {name: os.getxattr(path, name) for name in own}


def check_kind(status: os.stat_result, inode: Inode) -> None:
    """Raise OSError if a file is not of the kind that an inode is."""
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(inode.mode):
        raise OSError(errno.ESTALE, "somebody has put something else there")


MISSING: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""There is nothing of that name, or on the way to it something that is no directory."""


@contextlib.contextmanager
def explained(what: str, path: Callable[[], str]) -> Iterator[None]:
    """Turn the operating system's errors into ours: what was to be done, to which file, and why it failed."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{what}: no room for {path()}: {reason}", hint="free some space on this file system"
            ) from error
        hint = _HINTS.get(error.errno or 0, _TAMPERED_HINT)
        raise StoreError(f"{what}: {path()}: {reason}", hint=hint) from error


class FileOps:
    """Changes files. Raises OSError."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.written_bytes = 0
        """Of contents, so far."""

    def make(self, directory: int, name: bytes, inode: Inode, target: bytes) -> None:
        """Make what an inode says, but for its content and what `settle` gives it."""
        self._step("make")
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            os.symlink(target, name, dir_fd=directory)
        else:
            os.mknod(name, kind | 0o600, inode.device, dir_fd=directory)

    def make_directory(self, directory: int, name: bytes) -> None:
        """Make a directory that nobody else may enter."""
        self._step("make-directory")
        os.mkdir(name, 0o700, dir_fd=directory)

    def move(self, source: int, name: bytes, target: int, new_name: bytes) -> None:
        """Give a file another name."""
        self._step("move")
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)

    def link(self, source: int, name: bytes, target: int, new_name: bytes) -> None:
        """Give a file one more name."""
        self._step("link")
        os.link(name, new_name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def remove(self, directory: int, name: bytes) -> None:
        """Take a name from what is no directory."""
        self._step("remove")
        os.unlink(name, dir_fd=directory)

    def remove_directory(self, directory: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._step("remove-directory")
        os.rmdir(name, dir_fd=directory)

    def resize(self, descriptor: int, size: int) -> None:
        """Cut a file, or extend it by a hole, if it is not of that size."""
        if os.fstat(descriptor).st_size != size:
            self._step("resize")
            os.ftruncate(descriptor, size)

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write all of it."""
        while data:
            self._step("write")
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
            self.written_bytes += written

    def clear(self, descriptor: int, start: int, end: int) -> None:
        """Make zeros of the pages between two offsets: a hole, where there can be such.

        The last page is cleared wholly, even if the file ends within: of a part of it no hole can be made.
        """
        for at, stop in data_between(descriptor, start, end):
            self._step("clear")
            if not _punch(descriptor, at, -(-stop // PAGE_BYTES) * PAGE_BYTES - at):
                for piece in range(at, stop, len(_ZEROS)):
                    self.write(descriptor, memoryview(_ZEROS)[: stop - piece], piece)

    def settle(self, descriptor: int, inode: Inode, attributes: Attributes) -> None:
        """Give a file, open in any way, the owner, attributes, mode and modification time of an inode.

        In this order: a new owner takes capabilities and set-user-ID away, an access control list changes the
        mode. A content that is written takes capabilities away too, so it comes before.
        """
        status, path, changed = os.fstat(descriptor), _path(descriptor), False
        check_kind(status, inode)
        if (status.st_uid, status.st_gid) != (inode.uid, inode.gid):
            self._step("chown")
            os.chown(path, inode.uid, inode.gid)
            changed = True
        changed |= self._settle_attributes(descriptor, attributes)
        mode = stat.S_IMODE(inode.mode)
        if not stat.S_ISLNK(inode.mode) and (changed or stat.S_IMODE(status.st_mode) != mode):
            self._step("chmod")
            os.chmod(path, mode)
        if status.st_mtime_ns != inode.mtime_ns:
            self._step("utime")
            os.utime(path, ns=(status.st_atime_ns, inode.mtime_ns))

    def _settle_attributes(self, descriptor: int, attributes: Attributes) -> bool:
        """Set and remove extended attributes; returns whether something had to be changed."""
        path, wanted, have = _path(descriptor), dict(attributes), attributes_of(descriptor)
        surplus = have.keys() - wanted.keys() - HOST_ATTRIBUTES
        for name in sorted(surplus):
            self._step("remove-attribute")
            os.removexattr(path, name)
        missing = [(name, value) for name, value in attributes if have.get(name) != value]
        for name, value in missing:
            self._step("set-attribute")
            try:
                os.setxattr(path, name, value)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"its attribute {readable(name)} of {len(value)} bytes: {error.strerror}",
                ) from error
        return bool(surplus or missing)


def _path(descriptor: int) -> str:
    """Name an open file, so that it can be changed whatever it was opened for, and whatever kind it is."""
    return f"/proc/self/fd/{descriptor}"


def data_between(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts that are no holes, up to the end of the file."""
    while start < end:
        try:
            at = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if at >= end:
            return
        start = min(os.lseek(descriptor, at, os.SEEK_HOLE), end)
        yield at, start


def _punch(descriptor: int, offset: int, size: int) -> bool:
    """Make a hole; False if the file system has no such."""
    where = ctypes.c_int64(offset), ctypes.c_int64(size)
    while _libc.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, *where):
        number = ctypes.get_errno()
        if number in _NO_SUCH:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
