"""Hints about changed files: each way to change one is told. On the disk of the tests and on tmpfs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UnsupportedError
from primary import file_watch
from primary.file_watch import FileWatch, Hint

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root watches file systems")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_PAGES = 16384
_EXCHANGE = 2
_FOLLOW = 0x400
_FICLONE = 0x40049409
_ACCESS_LIST = struct.pack(
    "<I" + "HHI" * 5,
    2,
    *(1, 6, 2**32 - 1),
    *(2, 6, 1000),
    *(4, 4, 2**32 - 1),
    *(16, 6, 2**32 - 1),
    *(32, 4, 2**32 - 1),
)
"""user::rw-, user:1000:rw-, group::r--, mask::rw-, other::r-- (<linux/posix_acl_xattr.h>)."""


class Place:
    """A directory with files `a` and `b` and directories `one` and `two`, and a watch on its file system."""

    def __init__(self, root: Path, **how: Any) -> None:
        self.root = root
        for name in ("a", "b"):
            (root / name).write_bytes(b"x" * _PAGES)
        for name in ("one", "two"):
            (root / name).mkdir()
        self.a = os.open(root / "a", os.O_RDWR)
        self.b = os.open(root / "b", os.O_RDWR)
        self.watch = FileWatch([root], **how)
        self.directories = {self.key(each): each for each in ("", "one", "two")}
        self._files = {self.key(each) for each in ("a", "b")}
        self.watch.drain()

    def close(self) -> None:
        self.watch.close()
        os.close(self.a)
        os.close(self.b)

    def key(self, name: str) -> bytes:
        descriptor = os.open(self.root / name, os.O_PATH | os.O_NOFOLLOW)
        try:
            return self.watch.key_of(descriptor)
        finally:
            os.close(descriptor)

    def heard(self) -> set[Hint]:
        """What was told about what was here to begin with: others use the file system, too."""
        hints = self.watch.drain()
        assert not hints.overflowed
        return {
            Hint(each.handle, each.name, each.object)
            for each in hints.changed
            if each.handle in self.directories or (not each.handle and each.object in self._files)
        }

    def names(self) -> set[str]:
        """The names that were told, as paths below the root."""
        return {
            os.path.join(self.directories[each.handle], each.name.decode())
            for each in self.heard()
            if each.handle
        }


@pytest.fixture(params=["disk", "tmpfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="outlive-test-") as directory:
        yield Path(directory)


@pytest.fixture
def place(root: Path) -> Iterator[Place]:
    try:
        place = Place(root)
    except UnsupportedError as error:
        pytest.skip(error.message)
    yield place
    place.close()


def _checked(result: int) -> None:
    number = ctypes.get_errno()
    if result < 0:
        if number == errno.EOPNOTSUPP:
            pytest.skip("this file system has no such call")
        raise OSError(number, os.strerror(number))


def _allocate(mode: int) -> Callable[[Place], None]:
    return lambda place: _checked(_LIBC.fallocate(place.a, mode, 4096, 4096))


def _splice(place: Place) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"spliced")
    os.splice(reader, place.a, 7)
    os.close(reader)
    os.close(writer)


def _clone(place: Place) -> None:
    try:
        fcntl.ioctl(place.a, _FICLONE, place.b)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system clones no files")


CONTENTS: dict[str, Callable[[Place], object]] = {
    "write": lambda place: os.write(place.a, b"new"),
    "pwrite": lambda place: os.pwrite(place.a, b"new", 100),
    "writev": lambda place: os.writev(place.a, [b"n", b"ew"]),
    "pwritev": lambda place: os.pwritev(place.a, [b"new"], 100),
    "write by name": lambda place: (place.root / "a").write_bytes(b"new"),
    "truncate": lambda place: os.truncate(place.root / "a", 5),
    "ftruncate": lambda place: os.ftruncate(place.a, 2 * _PAGES),
    "open with O_TRUNC": lambda place: os.close(os.open(place.root / "a", os.O_WRONLY | os.O_TRUNC)),
    "allocate": _allocate(0),
    "allocate beyond the end": _allocate(1),
    "punch a hole": _allocate(3),
    "collapse a range": _allocate(8),
    "zero a range": _allocate(16),
    "insert a range": _allocate(32),
    "copy_file_range": lambda place: os.copy_file_range(place.b, place.a, 100, 0, 0),
    "sendfile": lambda place: os.sendfile(place.a, place.b, 0, 100),
    "splice": _splice,
    "clone": _clone,
    "chmod": lambda place: os.chmod(place.root / "a", 0o700),
    "fchmod": lambda place: os.fchmod(place.a, 0o700),
    "chown": lambda place: os.chown(place.root / "a", 1, 1),
    "utimensat": lambda place: os.utime(place.root / "a", (1, 1)),
    "futimens": lambda place: os.utime(place.a, (1, 1)),
    "set an attribute": lambda place: os.setxattr(place.a, "trusted.test", b"1"),
    "set an access control list": lambda place: os.setxattr(place.a, "system.posix_acl_access", _ACCESS_LIST),
}


@pytest.mark.parametrize("change", CONTENTS)
def test_a_changed_file_is_told_by_name_and_as_an_object(place: Place, change: str) -> None:
    """By what was opened before the watch began, too."""
    CONTENTS[change](place)
    assert Hint(place.key(""), b"a", place.key("a")) in place.heard()


def _bind(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.root / "one" / "socket"))


def _exchange(place: Place) -> None:
    first, second = os.fsencode(place.root / "a"), os.fsencode(place.root / "one")
    _checked(_LIBC.renameat2(-100, first, -100, second, _EXCHANGE))


def _nameless(place: Place) -> int:
    return os.open(place.root, os.O_TMPFILE | os.O_RDWR, 0o600)


def _name(descriptor: int, path: Path) -> None:
    _checked(_LIBC.linkat(-100, f"/proc/self/fd/{descriptor}".encode(), -100, os.fsencode(path), _FOLLOW))


def _name_a_nameless(place: Place) -> None:
    descriptor = _nameless(place)
    _name(descriptor, place.root / "one" / "new")
    os.close(descriptor)


NAMES: dict[str, tuple[Callable[[Place], object], set[str]]] = {
    "create": (lambda place: (place.root / "new").touch(), {"new"}),
    "make a pipe": (lambda place: os.mkfifo(place.root / "new"), {"new"}),
    "make a device": (lambda place: os.mknod(place.root / "new", stat.S_IFCHR, os.makedev(1, 3)), {"new"}),
    "bind a socket": (_bind, {"one/socket"}),
    "make a directory": (lambda place: (place.root / "one" / "new").mkdir(), {"one/new"}),
    "make a symbolic link": (lambda place: (place.root / "new").symlink_to("a"), {"new"}),
    "unlink": (lambda place: (place.root / "a").unlink(), {"a"}),
    "remove a directory": (lambda place: (place.root / "one").rmdir(), {"one"}),
    "rename": (lambda place: (place.root / "a").rename(place.root / "new"), {"a", "new"}),
    "rename over another": (lambda place: (place.root / "a").rename(place.root / "b"), {"a", "b"}),
    "move": (lambda place: (place.root / "a").rename(place.root / "one" / "a"), {"a", "one/a"}),
    "move a directory": (
        lambda place: (place.root / "one").rename(place.root / "two" / "new"),
        {"one", "two/new"},
    ),
    "exchange": (_exchange, {"a", "one"}),
    "link": (lambda place: os.link(place.root / "a", place.root / "one" / "new"), {"one/new"}),
    "name what had no name": (_name_a_nameless, {"one/new"}),
    "a directory's mode": (lambda place: (place.root / "one").chmod(0o700), {"one/."}),
    "the root's owner": (lambda place: os.chown(place.root, 1, 1), {"."}),
    "a directory's attribute": (
        lambda place: os.setxattr(place.root / "one", "trusted.test", b"1"),
        {"one/."},
    ),
}


@pytest.mark.parametrize("change", NAMES)
def test_a_changed_name_is_told(place: Place, change: str) -> None:
    make, names = NAMES[change]
    make(place)
    assert names <= place.names()


def test_what_a_name_leads_to_is_told_when_it_comes(place: Place) -> None:
    (place.root / "new").touch()
    assert Hint(place.key(""), b"new", place.key("new")) in place.heard()


def test_reading_is_not_told(place: Place) -> None:
    (place.root / "a").read_bytes()
    os.pread(place.a, 10, 0)
    os.listdir(place.root)
    os.stat(place.root / "b")
    os.fsync(place.a)
    os.listxattr(place.a)
    assert place.names() == set()


def test_a_file_of_several_names_is_told_by_the_one_that_was_used_and_as_an_object(place: Place) -> None:
    os.link(place.root / "a", place.root / "one" / "other")
    place.heard()
    (place.root / "one" / "other").write_bytes(b"new")
    assert place.heard() == {Hint(place.key("one"), b"other", place.key("a"))}


def test_a_name_that_is_gone_is_told_with_the_object_that_has_others(place: Place) -> None:
    os.link(place.root / "a", place.root / "one" / "other")
    (place.root / "a").unlink()
    place.heard()
    os.write(place.a, b"new")
    assert {each.object for each in place.heard()} == {place.key("one/other")}


def test_what_had_no_name_when_it_was_opened_is_told_as_an_object(place: Place) -> None:
    descriptor = _nameless(place)
    _name(descriptor, place.root / "new")
    place.heard()
    os.write(descriptor, b"new")
    assert {each.object for each in place.heard()} == {place.key("new")}
    os.close(descriptor)


def test_stores_are_told_as_late_as_the_file_is_closed_and_unmapped(place: Place) -> None:
    descriptor = os.open(place.root / "a", os.O_RDWR)
    mapping = mmap.mmap(descriptor, _PAGES)  # has a descriptor of its own
    os.close(descriptor)
    place.heard()
    mapping[:3] = b"new"
    mapping.close()
    assert Hint(place.key(""), b"a", place.key("a")) in place.heard()


def test_what_leaves_names_as_they_were_is_told_from_what_does_not(place: Place) -> None:
    os.pwrite(place.a, b"new", 0)
    os.fchmod(place.b, 0o640)
    assert {each.content for each in place.watch.drain().changed if each.object == place.key("b")} == {True}
    os.pwrite(place.a, b"newer", 0)
    os.rename(place.root / "a", place.root / "one" / "a")
    told = [each for each in place.watch.drain().changed if each.object == place.key("one/a")]
    assert {each.handle for each in told if not each.content} == {place.key(""), place.key("one")}


def test_each_change_is_told_once(place: Place) -> None:
    for _ in range(100):
        os.write(place.a, b"new")
    assert place.heard() == {Hint(place.key(""), b"a", place.key("a"))}
    assert place.names() == set()


def test_more_than_a_buffer_full_is_told(place: Place) -> None:
    names = {f"{number:05d}".ljust(200, "x") for number in range(2000)}
    for name in names:
        (place.root / name).touch()
    assert place.names() == names


def test_a_key_is_that_of_the_file_whatever_its_name(place: Place) -> None:
    before = place.key("one")
    (place.root / "one").rename(place.root / "new")
    assert place.key("new") == before
    assert len({place.key(each) for each in ("", "a", "b", "two", "new")}) == 5
    assert place.watch.key_of(place.a) == place.key("a")


def test_what_is_not_watched_has_no_key(place: Place) -> None:
    with contextlib.closing(FileWatch([place.root])) as watch:
        descriptor = os.open("/proc", os.O_PATH)
        with pytest.raises(UnsupportedError, match="/proc is not on a file system"):
            watch.key_of(descriptor)
        os.close(descriptor)


def test_roots_may_share_a_file_system_or_not(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="outlive-test-") as directory:
        roots = [tmp_path / "one", tmp_path / "two", Path(directory)]
        for root in roots[:2]:
            root.mkdir()
        with contextlib.closing(FileWatch(roots)) as watch:
            for root in roots:
                (root / "new").touch()
            heard = {each.handle for each in watch.drain().changed if each.name == b"new"}
            for root in roots:
                descriptor = os.open(root, os.O_RDONLY)
                assert watch.key_of(descriptor) in heard
                os.close(descriptor)


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="outlive-test-") as directory:
        yield Path(directory)


def test_a_queue_that_is_full_is_told(memory: Path) -> None:
    most = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"the queue has room for {most} events here")
    with contextlib.closing(Place(memory, unlimited=False)) as place:
        for number in range(most + 10):
            os.mknod(memory / str(number))
        assert place.watch.drain().overflowed
        os.write(place.a, b"new")
        assert place.names() == {"a"}


def test_more_than_one_drain_takes_is_told_and_the_rest_comes_next(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Place(memory)) as place:
        monkeypatch.setattr(file_watch, "_MOST_BYTES", 1)
        for number in range(5000):
            os.mknod(memory / str(number))
        hints = place.watch.drain()
        assert hints.overflowed
        assert 0 < len(hints.changed) < 5000
        monkeypatch.undo()
        rest = place.watch.drain()
        assert not rest.overflowed
        assert len({*hints.changed, *rest.changed}) >= 5000


_FID = struct.pack("=BxHQIi", 1, 28, 7, 8, 1) + b"12345678"
_NAMED = struct.pack("=BxHQIi", 2, 32, 7, 8, 1) + b"87654321" + b"abc\0"


def _event(info: bytes, *, version: int = 3, head_bytes: int = 24, less_bytes: int = 0) -> bytes:
    length = 24 + len(info) - less_bytes
    return struct.pack("=IBBHQii", length, version, 0, head_bytes, 2, -1, 1) + info


@pytest.mark.parametrize(
    ("event", "understood"),
    [
        (_event(_NAMED + _FID), True),
        (_event(_FID), True),
        (_event(b""), False),
        (_event(_NAMED + _FID[:-4]), False),
        (_event(_NAMED + _FID)[:-4], False),
        (_event(_NAMED[:10]), False),
        (_event(b"\x09" + _FID[1:]), False),
        (_event(struct.pack("=BxHQIi", 1, 20, 7, 0, 255)), False),
        (_event(_FID, version=4), False),
        (_event(_FID, head_bytes=8), False),
        (_event(_FID, less_bytes=30), False),
    ],
    ids=[
        "named",
        "an object alone",
        "about nothing",
        "a record cut off",
        "an event cut off",
        "a head cut off",
        "of an unknown type",
        "without a handle",
        "of another version",
        "with too short a head",
        "shorter than its head",
    ],
)
def test_what_is_not_understood_counts_as_lost(
    memory: Path, monkeypatch: pytest.MonkeyPatch, event: bytes, understood: bool
) -> None:
    with contextlib.closing(Place(memory)) as place:
        queue = [event]

        def read(descriptor: int, buffers: list[bytearray]) -> int:
            if not queue:
                raise BlockingIOError
            buffers[0][: len(queue[0])] = queue[0]
            return len(queue.pop())

        monkeypatch.setattr(os, "readv", read)
        assert place.watch.drain().overflowed is not understood


def test_a_kernel_that_does_not_tell_what_names_lead_to_will_do(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_watch, "_REPORT_TARGET_FID", 1 << 30)
    with contextlib.closing(Place(memory)) as place:
        (memory / "new").mkdir()
        assert place.heard() == {Hint(place.key(""), b"new", b"")}
        os.write(place.a, b"new")
        assert place.heard() == {Hint(place.key(""), b"a", place.key("a"))}


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_system_that_cannot_be_watched_is_refused(memory: Path) -> None:
    before = _descriptors()
    with pytest.raises(UnsupportedError, match="in /proc cannot be watched: its file system has no"):
        FileWatch([memory, Path("/proc")])
    assert _descriptors() == before


def test_keys_that_are_not_what_is_reported_are_refused(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileWatch, "key_of", lambda watch, descriptor: b"another")
    with pytest.raises(UnsupportedError, match="keys that are not theirs"):
        FileWatch([memory])


def test_a_root_that_is_none_is_an_error(memory: Path) -> None:
    before = _descriptors()
    with pytest.raises(FileNotFoundError):
        FileWatch([memory / "none"])
    assert _descriptors() == before


def test_without_the_right_it_is_refused(memory: Path) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(UnsupportedError, match="CAP_SYS_ADMIN"):
            FileWatch([memory])
    finally:
        os.seteuid(0)


def test_closing_twice_does_no_harm(memory: Path) -> None:
    before = _descriptors()
    watch = FileWatch([memory])
    watch.close()
    watch.close()
    assert _descriptors() == before
