"""File operations that survive a power loss, or say what failed, where and why."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.durable import RealDisk, atomic_write
from common.errors import NoSpaceError, StoreError

DISK = RealDisk()


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0o777)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    os.umask(0)
    DISK.make_dir(tmp_path / "open", op="t")
    DISK.write_file(tmp_path / "open" / "file", b"", op="t")
    os.umask(0o777)
    DISK.make_dir(tmp_path / "shut", op="t")
    DISK.create(tmp_path / "shut" / "file", op="t").close()
    for name in ("open", "shut"):
        assert mode(tmp_path / name) == 0o700
        assert mode(tmp_path / name / "file") == 0o600


def test_a_file_holds_what_was_written_with_zeros_where_was_skipped(tmp_path: Path) -> None:
    writer = DISK.create(tmp_path / "file", op="t")
    writer.write(b"ab")
    writer.skip(3)
    writer.write(memoryview(b"cd"))
    writer.skip(2)
    writer.close()
    writer.close()
    assert (tmp_path / "file").read_bytes() == b"ab\0\0\0cd\0\0"


def test_atomic_write_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "term", b"a longer first one", op="t")
    atomic_write(tmp_path / "term", b"second", op="t")
    assert (tmp_path / "term").read_bytes() == b"second"
    assert mode(tmp_path / "term") == 0o600
    assert os.listdir(tmp_path) == ["term"]


def test_a_failed_atomic_write_leaves_the_old_content_and_no_leftover(tmp_path: Path) -> None:
    class NoRename(RealDisk):
        def rename(self, source: Path, target: Path, *, op: str) -> None:
            raise StoreError(op)

    atomic_write(tmp_path / "term", b"old", op="t")
    with pytest.raises(StoreError):
        atomic_write(tmp_path / "term", b"new", op="t", disk=NoRename())
    assert (tmp_path / "term").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["term"]


def test_atomic_write_syncs_the_file_before_its_name_and_the_directory_after(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recording(RealDisk):
        def __getattribute__(self, name: str) -> object:
            calls.append(name)
            return super().__getattribute__(name)

    atomic_write(tmp_path / "term", b"x", op="t", disk=Recording())
    assert calls == ["write_file", "sync_files", "rename", "sync_dir"]


def test_point_makes_and_moves_a_link(tmp_path: Path) -> None:
    DISK.point(tmp_path / "link", "one", op="t")
    DISK.point(tmp_path / "link", "two", op="t")
    assert os.readlink(tmp_path / "link") == "two"
    assert os.listdir(tmp_path) == ["link"]


def test_many_files_are_synced_and_a_missing_one_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(9)]
    for path in paths:
        DISK.write_file(path, b"x", op="t")
    DISK.sync_files(paths, op="t")
    paths[5].unlink()
    with pytest.raises(StoreError, match=str(paths[5])):
        DISK.sync_files(paths, op="t")


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    DISK.unlink(tmp_path / "none", op="t")
    DISK.remove_tree(tmp_path / "none", op="t")


def test_an_error_names_operation_path_and_cause(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as raised:
        DISK.sync_dir(tmp_path / "none", op="commit.sync")
    assert raised.value.message == f"commit.sync: {tmp_path / 'none'}: No such file or directory"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_from_other_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    writer = DISK.create(tmp_path / "file", op="t")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError, match=str(tmp_path / "file")):
        writer.write(b"x")


def test_a_file_that_is_there_is_not_created_again(tmp_path: Path) -> None:
    DISK.create(tmp_path / "file", op="t").close()
    with pytest.raises(StoreError, match="File exists"):
        DISK.create(tmp_path / "file", op="t")


def test_memory_is_told_from_a_disk(tmp_path: Path) -> None:
    types = {
        fields[4]: fields[fields.index("-") + 1]
        for fields in (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    }
    for path in ("/dev/shm", "/proc"):
        if path in types:
            assert DISK.is_volatile(Path(path)) == (types[path] == "tmpfs")


def test_it_stays_light_enough_for_the_keeper() -> None:
    code = "import sys, common.durable; print([m for m in ('numpy', 'msgspec', 'zmq') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
