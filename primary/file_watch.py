"""Hints about which files changed: what fanotify(7) reports of whole file systems (Linux 5.9 and newer).

In: the directories whose files matter. Out: keys of directories, names in them, and keys of what changed; or
that something was lost, and everything has to be looked at. A hint says where to look, not what happened:
there may be nothing new. Everything on those file systems is reported, whoever changed it, through whichever
mount or name.

What is promised: by the time a system call that changed a file returns to its program, its event is queued.
So once all tasks of a workload stand still, `drain` tells of all that they have done, but for what is listed
here. Of tasks that run on meanwhile, a change may be seen earlier than its hint.

What is reported, and how (found by experiment on Linux 6.18: ext4, XFS, btrfs, tmpfs, and overlayfs that was
mounted with nfs_export=on; tests/unit/test_file_watch.py has most of it; older kernels may report less):

    change                                        hint
    ------                                        ----
    write, pwritev, truncate, fallocate of any    directory, name, object
      mode, copy_file_range, sendfile, splice,
      FICLONE, O_TRUNC, mode, owner, times,
      extended attributes, access control lists
    create, mknod, bind, mkdir, symlink, rename,  directory, name, object: of each name
      exchange, unlink, rmdir
    link, and linkat of an O_TMPFILE              the new name, and the object alone
    unlink, or rename over a name                 that name, and the loser as an object alone
    a change to a file of several names           by the name that it was opened by, and the object:
                                                    the other names are not told
    a change to a file whose name is gone, or     by a name that is gone or another file's now, or
      that had none (O_TMPFILE), but that has       was never there: only the object tells which
      one by now
    a change by a handle (open_by_handle_at)      the object, often alone
    a change of a directory's own attributes      directory, "."
    stores to a shared mapping, also by read(2),  none, until that opening of the file is closed and
      process_vm_writev or ptrace into it; msync    unmapped everywhere: then as above
    writes by AIO (io_submit)                     none, until that opening is closed: then as above
    direct writes by io_uring, on a ring with     none, until the program asks what is complete: then
      IORING_SETUP_DEFER_TASKRUN                    as above; the data may be there long before
    other writes by io_uring                      as by write
    flags (lsattr(1)), project IDs                none
    what a loop device writes to its file         none
    what other hosts write, on a network's files  none
    read, fsync, deduplication, a mere open       none: nothing changes

So besides following hints, look by other means at files that are mapped shared and writable, or open for AIO
or for direct writes. Closing what was open for writing leads to a hint, whether anything was written or not.

What comes with a directory, from elsewhere or as it is made, need not be told one by one: whoever meets a new
directory looks at all of it. Mounts and btrfs subvolumes below a root are other file systems (see `key_of`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from common.errors import UnsupportedError

_FORM: Final = 0x0E00
"""REPORT_FID, REPORT_DIR_FID, REPORT_NAME of <linux/fanotify.h>, as are all that follow."""
_REPORT_TARGET_FID: Final = 0x1000
"""Since Linux 5.17: what a name led to is told as well when it comes or goes."""
_UNLIMITED_QUEUE: Final = 0x10
_CLOEXEC_NONBLOCK: Final = 0x3

_MARK_ADD: Final = 0x1
_MARK_REMOVE: Final = 0x2
_MARK_FILESYSTEM: Final = 0x100

_CHANGES: Final = 0x400003CE
"""MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, of directories too (ONDIR).

Not DELETE_SELF: it comes when the last who had a file open closes it, long after its name went.
"""
_CONTENT: Final = 0xE
"""Of those, the ones that say nothing of names: MODIFY, ATTRIB, CLOSE_WRITE."""
_OPENED_DIRECTORY: Final = 0x40000020
"""OPEN, ONDIR."""
_QUEUE_OVERFLOW: Final = 0x4000

_VERSION: Final = 3
_EVENT: Final = struct.Struct("=IBxHQ8x")
"""`struct fanotify_event_metadata`: length, version, length of this head, mask; then what we do not use."""
_RECORD: Final = struct.Struct("=BxH8xI4x")
"""`struct fanotify_event_info_fid`: type, length; file system; bytes of the handle, its type; the handle."""
_KEY_AT: Final = 4
"""Where in a record the key begins: file system ID and `struct file_handle`."""
_OBJECT: Final = 1
_NAMED: Final = 2
"""Types of records: FID, DFID_NAME."""

_BUFFER_BYTES: Final = 256 * 1024
_MOST_BYTES: Final = 16 * 1024 * 1024
"""Of one `drain`, some 170,000 events and 0.3 s: so it ends, however fast others go on."""

_MARK_ARGUMENTS: Final = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)

_EMPTY_PATH: Final = 0x1000
_HANDLE_BYTES: Final = 128
"""AT_EMPTY_PATH and MAX_HANDLE_SZ of <fcntl.h>."""
_HANDLE: Final = struct.Struct("=I4x")
"""`struct file_handle` up to the handle: its bytes, its type."""

SYSTEM_BYTES: Final = 8
"""What a key begins with: the file system's ID, as fanotify reports it. A `struct file_handle` follows."""

_WHY: Final = {
    errno.EPERM: "that takes CAP_SYS_ADMIN",
    errno.ENOSYS: "this kernel has no fanotify",
    errno.EINVAL: "this kernel does not report names: Linux 5.9 and newer do",
    errno.EMFILE: "too many watch already: raise fs.fanotify.max_user_groups",
    errno.ENOSPC: "too much is watched already: raise fs.fanotify.max_user_marks",
    errno.EXDEV: "it lies in a subvolume",
    errno.ENODEV: "its file system has no ID",
    errno.EOPNOTSUPP: "its file system has no lasting file handles",
}
"""What the kernel means (fanotify_init(2), fanotify_mark(2))."""


class Hint(msgspec.Struct, frozen=True, gc=False):
    """One thing that may have changed. Keys are those of `FileWatch.key_of`."""

    handle: bytes
    """Key of a directory; empty where the object alone is told."""
    name: bytes
    """Of the entry in it, "." for the directory itself; empty where the object alone is told."""
    object: bytes
    """Key of what changed. Empty for "."; before Linux 5.17 also where a name comes or goes."""
    content: bool = False
    """What changed is content or attributes; that a name comes or goes is told apart."""


class Hints(msgspec.Struct, frozen=True):
    """What a `FileWatch` has heard of since it was last asked."""

    changed: list[Hint]
    """Each once."""
    overflowed: bool
    """Something was lost: anything may have changed."""


class FileWatch:
    """Hears of every change on the file systems of some directories, until `close`.

    Must be drained often: what waits takes memory of ours, some 200 bytes for each changed file, without a
    limit, since a limit would lose some. Each change costs whoever makes it about a microsecond more.
    """

    def __init__(self, roots: Sequence[Path], *, unlimited: bool = True) -> None:
        """Begin; roots may share a file system. With `unlimited` false, what is too much is lost, and told.

        Raises UnsupportedError where this kernel or one of the file systems cannot do it or we may not, and
        OSError for a root that is no directory.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fanotify_mark.argtypes = _MARK_ARGUMENTS
        self._buffer = bytearray(_BUFFER_BYTES)
        self._systems: set[int] = set()
        self._mounts: dict[bytes, int] = {}
        """A root of each file system, by the first bytes of its keys."""
        self._descriptor = self._begin(_CLOEXEC_NONBLOCK | _UNLIMITED_QUEUE * unlimited)
        try:
            for root in roots:
                self._watch(root)
        except BaseException:
            self.close()
            raise

    def _begin(self, flags: int) -> int:
        descriptor: int = -1
        for form in (_FORM | _REPORT_TARGET_FID, _FORM):
            descriptor = self._libc.fanotify_init(flags | form, 0)
            if descriptor >= 0 or ctypes.get_errno() != errno.EINVAL:
                break
        if descriptor < 0:
            raise UnsupportedError(f"changes of files cannot be watched: {_why()}")
        return descriptor

    def _watch(self, root: Path) -> None:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._mark(_MARK_ADD | _MARK_FILESYSTEM, _CHANGES, descriptor):
                raise UnsupportedError(f"changes of files in {root} cannot be watched: {_why()}")
            self._systems.add(os.fstatvfs(descriptor).f_fsid)
            if not self._reports(descriptor):
                raise UnsupportedError(f"changes of files in {root} are reported by keys that are not theirs")
            self._mounts.setdefault(self.key_of(descriptor)[:SYSTEM_BYTES], os.dup(descriptor))
        finally:
            os.close(descriptor)

    def _reports(self, directory: int) -> bool:
        """Whether what is reported of an open directory has its key: else hints would go by unnoticed."""
        self._mark(_MARK_ADD, _OPENED_DIRECTORY, directory)
        os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory))
        self._mark(_MARK_REMOVE, _OPENED_DIRECTORY, directory)
        key = self.key_of(directory)
        return any((hint.handle, hint.name) == (key, b".") for hint in self.drain().changed)

    def _mark(self, flags: int, mask: int, directory: int) -> bool:
        done: int = self._libc.fanotify_mark(self._descriptor, flags, mask, directory, None)
        return done == 0

    def drain(self) -> Hints:
        """Return what was reported since the last time; never waits. For one thread at a time.

        Takes 2 µs if nothing was, else 2 µs for each event; what others did on the file system counts. So
        whoever freezes something drains right before that, too, and adds what both have told.
        """
        infos: dict[bytes, int] = {}
        overflowed = False
        taken_bytes = 0
        while taken_bytes < _MOST_BYTES and (events := self._read()):
            taken_bytes += len(events)
            overflowed |= not _collect(events, infos)
        changed, unclear = _understand(infos)
        return Hints(changed, overflowed or unclear or taken_bytes >= _MOST_BYTES)

    def _read(self) -> bytes:
        try:
            length = os.readv(self._descriptor, [self._buffer])
        except BlockingIOError:
            return b""
        return bytes(memoryview(self._buffer)[:length])

    def key_of(self, descriptor: int) -> bytes:
        """Return the key of what is open there: of a directory, or of a file as an object; O_PATH will do.

        It is the same as long as the file exists, by all its names, and never another file's. Takes 4 µs.
        Raises UnsupportedError for what lies on a file system that is not watched: what is mounted below a
        root, or a subvolume; but not for a copy of a watched file system, with the same ID (`st_dev` tells).
        Raises OSError for what has no handle.
        """
        system = os.fstatvfs(descriptor).f_fsid
        if system not in self._systems:
            where = os.readlink(f"/proc/self/fd/{descriptor}")
            raise UnsupportedError(f"{where} is not on a file system of the directories that are watched")
        handle = ctypes.create_string_buffer(_HANDLE.pack(_HANDLE_BYTES), _HANDLE.size + _HANDLE_BYTES)
        mount = ctypes.byref(ctypes.c_int())
        if self._libc.name_to_handle_at(descriptor, b"", handle, mount, _EMPTY_PATH) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        (length,) = _HANDLE.unpack_from(handle)
        return struct.pack("=II", system & 0xFFFFFFFF, system >> 32) + handle.raw[: _HANDLE.size + length]

    def open(self, key: bytes, flags: int) -> int | None:
        """Open what has that key, wherever it is by now; None if it is gone. Raises OSError.

        Takes CAP_DAC_READ_SEARCH (open_by_handle_at(2)).
        """
        mount = self._mounts.get(key[:SYSTEM_BYTES])
        if mount is None:
            return None
        descriptor: int = self._libc.open_by_handle_at(mount, key[SYSTEM_BYTES:], flags | os.O_CLOEXEC)
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number == errno.ESTALE:
            return None
        raise OSError(number, os.strerror(number))

    def handle_of(self, key: bytes) -> tuple[int, bytes]:
        """Return what a key is made of, as open_by_handle_at(2) takes it: a mount, and the handle.

        The mount is -1 if that file system is not watched.
        """
        return self._mounts.get(key[:SYSTEM_BYTES], -1), key[SYSTEM_BYTES:]

    def close(self) -> None:
        """Hear of nothing any more. Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        while self._mounts:
            os.close(self._mounts.popitem()[1])


def _why() -> str:
    number = ctypes.get_errno()
    return _WHY.get(number, os.strerror(number))


def _collect(events: bytes, infos: dict[bytes, int]) -> bool:
    """Add what is said about each event, and of which kinds it was. False if some are lost."""
    complete = True
    at, end = 0, len(events)
    while at + _EVENT.size <= end:
        event_bytes, version, head_bytes, mask = _EVENT.unpack_from(events, at)
        if version != _VERSION or not _EVENT.size <= head_bytes <= event_bytes:
            return False
        if mask & _QUEUE_OVERFLOW:
            complete = False
        else:
            info = events[at + head_bytes : at + event_bytes]
            infos[info] = infos.get(info, 0) | mask
        at += event_bytes
    return complete and at == end


def _understand(infos: dict[bytes, int]) -> tuple[list[Hint], bool]:
    """Return the hints, and whether there were some that make no sense here."""
    changed: list[Hint] = []
    unclear = False
    for info, mask in infos.items():
        try:
            changed.append(_hint(info, content=not mask & ~_CONTENT))
        except (ValueError, struct.error):
            unclear = True
    return changed, unclear


def _hint(info: bytes, *, content: bool) -> Hint:
    """Return what the records of one event say; ValueError or struct.error if that is not understood.

    Nor is it if the kernel had no memory for a handle: then that is empty (fanotify(7)).
    """
    directory = name = changed = b""
    at, end = 0, len(info)
    while at < end:
        kind, record_bytes, handle_bytes = _RECORD.unpack_from(info, at)
        key_end, record_end = at + _RECORD.size + handle_bytes, at + record_bytes
        if not handle_bytes or not key_end <= record_end <= end:
            raise ValueError("a record without a handle, or cut off")
        key = info[at + _KEY_AT : key_end]
        if kind == _NAMED:
            directory, name = key, info[key_end:record_end].partition(b"\0")[0]
        elif kind == _OBJECT:
            changed = key
        else:
            raise ValueError(f"a record of the unknown type {kind}")
        at = record_end
    if not directory and not changed:
        raise ValueError("an event about nothing")
    return Hint(directory, name, changed, content)
