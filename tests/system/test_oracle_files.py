"""The file oracle itself: it takes every path, finds what is tampered with, and may be frozen at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common import container
from common.bundle import CRIU_RESTORE_SETTINGS, WorkloadPaths, bind_mounts
from common.config import Node, NodeConfig
from common.container import (
    cgroup_directories,
    kill_workload,
    restore_workload,
    running_init_pid,
    standard_streams,
    start_workload,
)
from common.criu.locate import locate_criu
from common.criu.rpc import DumpOptions, spawn
from common.model import EpochId, FilePath, WorkloadSpec
from tests.oracle.build import ask, build_files
from tests.oracle.files import MAY_BE_UNAVAILABLE, FileOracle, Judge

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="it makes devices and changes owners, which needs root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the oracle is a C program"),
]

_FAST = ("--rate", "1000000")
_SMALL = (*_FAST, "--most-files", "60", "--most-mib", "4")

Start = Callable[..., FileOracle]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_files(tmp_path_factory.mktemp("files-oracle"))


@pytest.fixture
def in_memory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="outlive-files-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, in_memory: Path) -> Path:
    """Where files are: two file systems that differ in what they can and when they do it."""
    return tmp_path if request.param == "disk" else in_memory


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[FileOracle] = []

    def run(place: Path, *options: str) -> FileOracle:
        directory = place / f"files-{len(started)}"
        directory.mkdir()
        started.append(FileOracle(program, directory, tmp_path / f"status-{len(started)}", *options))
        return started[-1]

    yield run
    for each in started:
        each.end()


def _until(true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_after_some_steps_every_path_was_taken_and_all_is_well(place: Path, start: Start) -> None:
    steps = 15_000
    oracle = start(place, "--seed", "1", "--steps", str(steps), *_FAST)
    _until(lambda: oracle.ask("counters")["parked"])
    answer = oracle.ask("check")
    assert answer["ok"], answer["errors"]
    assert answer["missing"] == []
    assert set(answer["unavailable"]) <= MAY_BE_UNAVAILABLE
    assert not answer["restored"]
    assert steps <= answer["steps"] == sum(answer["counters"].values()) < steps + 10
    assert all(answer["steps_of_workers"])
    assert answer["counters"]["idle"] < steps / 3
    assert answer["checked_handles"] > answer["handles"] > 5
    assert 200 < answer["files"] <= 310
    assert answer["bytes"] <= 32 << 20
    assert oracle.ask("resume")["ok"]
    _until(lambda: oracle.ask("counters")["steps"] > answer["steps"] + 100)
    assert oracle.ask("check")["ok"]
    assert oracle.ask("stop")["ok"]
    assert oracle.process.wait(10) == 0


# What is done to its files behind its back. Each says to whom, what must be said of it, and sets all back.

Tampering = Callable[[Path], contextlib.AbstractContextManager[tuple[Path, str]]]


def _plain(directory: Path, wanted: Callable[[Path, os.stat_result], object]) -> Path:
    """Return one whose name is shown as it is, however odd those of directories are. Raises LookupError."""
    found = sorted(
        each
        for each in directory.rglob("*")
        if re.fullmatch(r"[a-z0-9]+", each.name) and wanted(each, each.lstat())
    )
    if not found:
        raise LookupError("there is no such file")
    return found[len(found) // 2]


def _single(kind: Callable[[int], bool]) -> Callable[[Path, os.stat_result], bool]:
    return lambda path, status: kind(status.st_mode) and status.st_nlink == 1


def _regular(directory: Path) -> Path:
    return _plain(
        directory,
        lambda path, status: (
            stat.S_ISREG(status.st_mode)
            and status.st_size > 0
            and status.st_nlink == 1
            and "security.capability" not in os.listxattr(path)  # it is lost when the file is written to
        ),
    )


@contextlib.contextmanager
def _times_kept(*paths: Path) -> Iterator[None]:
    """Set the times back, now and when it is left: what was tampered with must be found without them."""
    times = [(path, path.lstat().st_atime_ns, path.lstat().st_mtime_ns) for path in paths]

    def set_back() -> None:
        for path, atime_ns, mtime_ns in times:
            os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)

    try:
        yield
    finally:
        set_back()


def _data(path: Path) -> int:
    """Return where a file has data."""
    with path.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_DATA)


@contextlib.contextmanager
def _byte(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(
        directory, lambda path, status: stat.S_ISREG(status.st_mode) and status.st_blocks and _has_data(path)
    )

    def flip() -> None:
        with _times_kept(path), path.open("r+b", buffering=0) as file:
            at = _data(path) + 8
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 0x40]), at)

    flip()
    yield path, rf"byte {_data(path) + 8} \(block \d+\) has something else, and must have"
    flip()


def _has_data(path: Path) -> bool:
    """Whether it has one name, begins with data, and loses nothing when it is written to."""
    if path.stat().st_nlink > 1:
        return False
    if "security.capability" in os.listxattr(path):  # it is lost when the file is written to
        return False
    with path.open("rb") as file:
        content = file.read(64)
    return any(content[8:16]) and len(content) >= 32 and _data(path) == 0


@contextlib.contextmanager
def _truncated(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _regular(directory)
    size = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        last = os.pread(file.fileno(), 1, size - 1)
        with _times_kept(path):
            os.truncate(path, size - 1)
        yield path, rf"its size is {size - 1}, and must be {size}"
        with _times_kept(path):
            os.pwrite(file.fileno(), last, size - 1)


@contextlib.contextmanager
def _zeroed(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(directory, lambda path, status: stat.S_ISREG(status.st_mode) and _has_data(path))
    with path.open("r+b", buffering=0) as file:
        before = os.pread(file.fileno(), 4096, 0)
        with _times_kept(path):
            os.pwrite(file.fileno(), bytes(len(before)), 0)
        yield path, r"byte \d+ \(block 0\) has zeros, and must have what step \d+ wrote"
        with _times_kept(path):
            os.pwrite(file.fileno(), before, 0)


@contextlib.contextmanager
def _removed(directory: Path) -> Iterator[tuple[Path, str]]:
    path, kept = _regular(directory), directory.with_name("kept")
    with _times_kept(path.parent):
        path.rename(kept)
    yield path, rf"{path.name} in .*: it is missing"
    with _times_kept(path.parent):
        kept.rename(path)


@contextlib.contextmanager
def _added(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(directory, lambda path, status: stat.S_ISDIR(status.st_mode)) / "new"
    with _times_kept(path.parent):
        path.touch()
    yield path, "it is there, and must not be"
    with _times_kept(path.parent):
        path.unlink()


@contextlib.contextmanager
def _renamed(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _regular(directory)
    other = path.with_name("other")
    with _times_kept(path.parent):
        path.rename(other)
    yield other, "it is there, and must not be"
    with _times_kept(path.parent):
        other.rename(path)


@contextlib.contextmanager
def _mode(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _regular(directory)
    mode = path.stat().st_mode
    path.chmod(mode ^ 0o001)
    yield path, f"its mode is {stat.S_IMODE(mode ^ 0o001):o}, and must be {stat.S_IMODE(mode):o}"
    path.chmod(mode)


@contextlib.contextmanager
def _mode_of_a_directory(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(directory, lambda path, status: stat.S_ISDIR(status.st_mode))
    mode = path.stat().st_mode
    path.chmod(mode ^ 0o1000)
    yield path, f"its mode is {stat.S_IMODE(mode ^ 0o1000):o}, and must be {stat.S_IMODE(mode):o}"
    path.chmod(mode)


@contextlib.contextmanager
def _owner(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(directory, _single(stat.S_ISLNK))
    was = path.lstat()
    os.lchown(path, was.st_uid, was.st_gid ^ 1)
    yield path, rf"its owner is {was.st_uid}:{was.st_gid ^ 1}, and must be {was.st_uid}:{was.st_gid}"
    os.lchown(path, was.st_uid, was.st_gid)


@contextlib.contextmanager
def _mtime(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _regular(directory)
    with _times_kept(path):
        os.utime(path, ns=(0, path.stat().st_mtime_ns ^ 1))
        yield path, r"its mtime is \S+, and must be "


@contextlib.contextmanager
def _mtime_of_a_directory(directory: Path) -> Iterator[tuple[Path, str]]:
    with _times_kept(directory):
        os.utime(directory, ns=(0, directory.stat().st_mtime_ns ^ 1))
        yield directory, r"^\.: its mtime is \S+, and must be "


@contextlib.contextmanager
def _xattr_changed(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(
        directory,
        lambda path, status: _single(stat.S_ISREG)(path, status) and "user.one" in os.listxattr(path),
    )
    value = os.getxattr(path, "user.one")
    os.setxattr(path, "user.one", value + b"!")
    yield path, f"its attribute user.one has {len(value) + 1} bytes that are not the {len(value)} that"
    os.setxattr(path, "user.one", value)


@contextlib.contextmanager
def _xattr_added(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _regular(directory)
    os.setxattr(path, "user.new", b"")
    yield path, "it has an attribute user.new, and must not"
    os.removexattr(path, "user.new")


@contextlib.contextmanager
def _access_list_removed(directory: Path) -> Iterator[tuple[Path, str]]:
    name = "system.posix_acl_access"
    path = _plain(
        directory, lambda path, status: _single(stat.S_ISREG)(path, status) and name in os.listxattr(path)
    )
    value, mode = os.getxattr(path, name), path.stat().st_mode
    os.removexattr(path, name)
    path.chmod(mode)
    yield path, f"its attribute {name} cannot be read"
    os.setxattr(path, name, value)


@contextlib.contextmanager
def _link_broken(directory: Path) -> Iterator[tuple[Path, str]]:
    path = _plain(directory, lambda path, status: stat.S_ISREG(status.st_mode) and status.st_nlink > 1)
    kept = directory.with_name("kept")
    with _times_kept(path.parent):
        path.rename(kept)
        subprocess.run(["cp", "-a", kept, path], check=True)
    yield path, r"it is another file than|it has 1 links, and must have \d"
    with _times_kept(path.parent):
        kept.rename(path)


@contextlib.contextmanager
def _target(directory: Path) -> Iterator[tuple[Path, str]]:
    path, kept = (
        _plain(directory, _single(stat.S_ISLNK)),
        directory.with_name("kept"),
    )
    was = path.lstat()
    with _times_kept(path.parent):
        path.rename(kept)
        path.symlink_to("elsewhere")
        os.lchown(path, was.st_uid, was.st_gid)
    yield path, "its target is elsewhere"
    with _times_kept(path.parent):
        kept.rename(path)


@contextlib.contextmanager
def _kind(directory: Path) -> Iterator[tuple[Path, str]]:
    path, kept = (
        _plain(directory, _single(stat.S_ISFIFO)),
        directory.with_name("kept"),
    )
    with _times_kept(path.parent):
        path.rename(kept)
        path.touch()
    yield path, "its kind is 100000, and must be 10000"
    with _times_kept(path.parent):
        kept.rename(path)


@contextlib.contextmanager
def _device(directory: Path) -> Iterator[tuple[Path, str]]:
    path, kept = (
        _plain(directory, _single(stat.S_ISBLK)),
        directory.with_name("kept"),
    )
    was = path.lstat()
    with _times_kept(path.parent):
        path.rename(kept)
        os.mknod(path, was.st_mode, was.st_rdev + 1)
        os.chown(path, was.st_uid, was.st_gid)
        path.chmod(was.st_mode)
    yield path, "its device is "
    with _times_kept(path.parent):
        kept.rename(path)


TAMPERINGS: tuple[Tampering, ...] = (
    _byte,
    _truncated,
    _zeroed,
    _removed,
    _added,
    _renamed,
    _mode,
    _mode_of_a_directory,
    _owner,
    _mtime,
    _mtime_of_a_directory,
    _xattr_changed,
    _xattr_added,
    _access_list_removed,
    _link_broken,
    _target,
    _kind,
    _device,
)


def test_whatever_is_tampered_with_is_found_and_named(place: Path, start: Start) -> None:
    # Without these there is no time of change that nobody can know.
    without = "unlink_open,unlink_remap,mapped_only_store"
    oracle = start(place, "--seed", "2", "--without", without, *_FAST)
    _until(lambda: oracle.ask("counters")["steps"] > 10_000)
    assert oracle.ask("pause")["ok"]
    assert oracle.ask("check")["ok"]
    for tampering in TAMPERINGS:
        for _ in range(100):
            try:
                with tampering(oracle.directory) as (path, words):
                    answer = oracle.ask("check")
                break
            except LookupError:  # there is nobody to do it to, but soon there is
                oracle.ask("resume")
                time.sleep(0.05)
                oracle.ask("pause")
        else:
            pytest.fail(f"{tampering.__name__} finds no file")
        assert not answer["ok"], tampering.__name__
        named = [each for each in answer["errors"] if re.search(words, each)]
        assert named, (tampering.__name__, words, answer["errors"])
        assert path == oracle.directory or path.name in named[0], (path, named)
        after = oracle.ask("check")
        assert after["ok"], (tampering.__name__, "and is content when it is gone", after["errors"])


def test_a_byte_of_a_file_that_has_no_name_is_found(in_memory: Path, start: Start) -> None:
    oracle = start(in_memory, "--seed", "3", *_FAST)
    found = None
    for _ in range(20):
        time.sleep(0.1)
        assert oracle.ask("pause")["ok"]
        if found := _unlinked(oracle):
            break
        assert oracle.ask("resume")["ok"]
    assert found, "no file without a name"
    for wrong in (True, False):
        with found.open("r+b", buffering=0) as file:
            (byte,) = os.pread(file.fileno(), 1, 0)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), 0)
        answer = oracle.ask("check")
        assert answer["ok"] != wrong
        if wrong:
            assert re.search(r"handle \d+ on unlinked .* byte 0 is not what it must be", answer["error"])


def _unlinked(oracle: FileOracle) -> Path | None:
    """Return a descriptor of one, if there is one that has content and can be read."""
    parent = oracle.process.pid
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        for each in Path(f"/proc/{pid}/fd").iterdir():
            status = each.stat()
            flags = int(
                re.findall(r"flags:\s+0(\d+)", Path(f"/proc/{pid}/fdinfo/{each.name}").read_text())[0], 8
            )
            readable = flags & os.O_ACCMODE != os.O_WRONLY
            inside = os.readlink(each).startswith(str(oracle.directory))
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_nlink == 0
                and status.st_size
                and readable
                and inside
            ):
                return each
    return None


def test_a_copy_is_as_good_until_a_step_later(
    place: Path, tmp_path: Path, program: Path, start: Start
) -> None:
    oracle = start(place, "--seed", "4", *_SMALL, "--sparse-mib", "64")
    choice = random.Random(4)
    for number in range(4):
        time.sleep(choice.uniform(0.05, 0.15))
        copy, model = place / f"copy-{number}", tmp_path / f"model-{number}"
        with oracle.stopped():
            shutil.copyfile(oracle.model, model)
            subprocess.run(["cp", "-a", "--sparse=always", oracle.directory, copy], check=True)
        with Judge(program, model, copy, dead=True) as judge:
            verdict = judge.verdict()
        assert verdict["ok"], verdict["errors"]
        before = oracle.ask("counters")["steps"]
        _until(lambda before=before: oracle.ask("counters")["steps"] > before + 500)  # type: ignore[misc]
        with oracle.stopped(), Judge(program, oracle.model, copy, dead=True) as judge:
            assert not judge.verdict()["ok"]
        shutil.rmtree(copy)
        model.unlink()


def test_stopped_at_any_moment_it_is_judged_rightly(place: Path, program: Path, start: Start) -> None:
    oracle = start(place, "--seed", "5", *_SMALL)
    choice = random.Random(5)
    in_flight = found = 0
    with Judge(program, oracle.model, oracle.directory) as judge:
        for number in range(200):
            time.sleep(choice.uniform(0.0, 0.004))
            with oracle.stopped():
                verdict = judge.verdict()
                assert verdict["ok"], verdict["errors"]
                in_flight += verdict["in_flight"]
                if number % 10 == 0:
                    found += _a_flipped_byte_is_found(oracle.directory, judge, choice)
    assert in_flight > 30
    assert found > 10
    answer = oracle.ask("check")
    assert answer["ok"], answer["errors"]
    assert answer["missing"] == []


def _a_flipped_byte_is_found(directory: Path, judge: Judge, choice: random.Random) -> bool:
    """Flip one in any file, be it under way or not; return whether there was one with content."""
    files = [
        os.path.join(above, name)
        for above, _, names in os.walk(os.fsencode(directory))
        for name in names
        if stat.S_ISREG((status := os.lstat(os.path.join(above, name))).st_mode)
        and status.st_blocks
        and "security.capability" not in os.listxattr(os.path.join(above, name))
    ]
    if not files:
        return False
    path = choice.choice(files)
    status = os.stat(path)
    descriptor = os.open(path, os.O_RDWR)
    try:
        at = os.lseek(descriptor, 0, os.SEEK_DATA)
        (byte,) = os.pread(descriptor, 1, at)
        for flipped in (byte ^ 0x40, byte):
            os.pwrite(descriptor, bytes([flipped]), at)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            verdict = judge.verdict()
            assert verdict["ok"] == (flipped == byte), (path, at, verdict["errors"])
    except OSError:  # it is all a hole
        return False
    finally:
        os.close(descriptor)
    return True


class Contained:
    """The oracle in a container, whose end is its dump: memory and files are of one instant."""

    def __init__(self, directory: Path, program: Path, *options: str) -> None:
        self._directory = directory
        self.configs = [
            NodeConfig(
                node=Node(
                    name=f"n{each}",
                    address="127.0.0.1",
                    state_dir=str(directory / f"n{each}/state"),
                    run_dir=str(directory / f"n{each}/run"),
                    image_dir=str(directory / f"n{each}/images"),
                    cgroup_parent=f"/outlive/files-{os.getpid()}-{each}",
                )
            )
            for each in range(2)
        ]
        self.config = self.configs[0]
        self.dumps = 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        files = directory / "files"
        files.mkdir()
        words = ("--directory", "/files", "--port", str(self.port), "--bind", "127.0.0.1")
        self.spec = WorkloadSpec(
            name="files",
            nodes=("n0",),
            command=(str(program), *words, *options),
            files=(FilePath(path="/files", source=str(files)),),
        )

    async def ask(self, word: str) -> dict[str, Any]:
        return await asyncio.to_thread(ask, self.port, word)

    async def start(self) -> None:
        await start_workload(self.config, self.spec)
        for _ in range(200):
            try:
                await self.ask("counters")
                return
            except OSError:
                await asyncio.sleep(0.05)
        raise AssertionError("the oracle does not listen")

    async def go_on_elsewhere(self) -> None:
        """Dump it wherever it is, which ends it, and bring it back in the other of two containers."""
        pid, paths = running_init_pid(self.config, "files"), WorkloadPaths(self.config, "files")
        assert pid is not None

        async def agree(hook: str, pid: int | None) -> bool:
            return True

        self.dumps += 1
        images = self._directory / f"images-{self.dumps}"
        images.mkdir()
        (images / "descriptors.json").write_text(json.dumps(standard_streams(pid)))
        options = DumpOptions(
            pid=pid,
            images_dir=images,
            work_dir=paths.bundle,
            root=paths.rootfs,
            external=tuple(mount.external for mount in bind_mounts(self.spec, paths)),
            leave_running=False,
            file_locks=True,
            link_remap=True,
        )
        await (await spawn(locate_criu(None))).dump(options, agree)
        await kill_workload(self.config, "files")
        self.config = self.configs[self.dumps % 2]
        settings = CRIU_RESTORE_SETTINGS + "file-locks\n"
        with patch.object(container, "CRIU_RESTORE_SETTINGS", settings):
            await restore_workload(self.config, self.spec, images, EpochId(1, self.dumps), locate_criu(None))

    async def end(self) -> None:
        for config in self.configs:
            await kill_workload(config, "files")
            for directory in cgroup_directories(config.node.cgroup_parent):
                for group in (*directory.glob("*/"), directory):
                    group.rmdir()


@pytest.fixture
async def contained(program: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Contained]]:
    made: list[Contained] = []

    def make(*options: str) -> Contained:
        made.append(Contained(tmp_path, program, *options))
        return made[-1]

    yield make
    for each in made:
        await each.end()


async def test_dumped_at_any_moment_and_restored_it_is_whole_and_goes_on(
    contained: Callable[..., Contained],
) -> None:
    oracle = contained("--seed", "6", "--rate", "20000")
    await oracle.start()
    choice = random.Random(6)
    for _ in range(3):
        await asyncio.sleep(choice.uniform(0.1, 0.4))
        await oracle.go_on_elsewhere()
        first = await oracle.ask("counters")
        await asyncio.sleep(0.1)
        answer = await oracle.ask("check")
        assert answer["ok"], answer["errors"]
        assert answer["restored"]
        assert answer["checked_handles"] > 5
        # It waits to be checked; only the steps that were under way were finished.
        assert answer["steps"] - first["steps"] <= 4
        await asyncio.sleep(0.1)
        later = await oracle.ask("check")
        assert later["ok"], later["errors"]
        assert not later["restored"]
        assert later["steps"] > answer["steps"] + 100
