"""The doctor and the readiness checks on real containers: what they say against what criu does."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.bundle import WorkloadPaths, bind_mounts
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
from common.errors import CaptureError, RestoreError
from common.model import EpochId, FilePath, WorkloadSpec
from common.origin import ORIGIN_FILE, encode_origin, read_origin
from outlive.doctor import run_doctor
from replica.readiness import Readiness, ReadinessVerdict

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

READY = "open('/srv/local/ready', 'w').close()\nwhile True: time.sleep(1)\n"
PREAMBLE = "import ctypes, fcntl, mmap, os, socket, time\nlibc = ctypes.CDLL(None)\n"


class Workload:
    """A Python program as a workload of this node, with one shared and one local directory."""

    def __init__(self, config: NodeConfig, directory: Path) -> None:
        self.directory = directory
        self.replicated = True
        """Whether the local directory is one of its files; else it counts as shared, too."""
        self._base = config
        self.shared, self.local = directory / "shared", directory / "local"
        for storage in (self.shared, self.local):
            storage.mkdir()
        self.config, self.spec = config, self._declare("")

    def _declare(self, code: str) -> WorkloadSpec:
        return WorkloadSpec(
            name="subject",
            nodes=("doctor",),
            command=("/usr/bin/python3", "-c", PREAMBLE + code + "\n" + READY),
            files=(
                FilePath(path="/srv/shared", source=str(self.shared), shared=True),
                FilePath(path="/srv/local", source=str(self.local), shared=not self.replicated),
            ),
        )

    async def start(self, code: str) -> None:
        self.spec = self._declare(code)
        self.config = NodeConfig(node=self._base.node, workloads=(self.spec,))
        await start_workload(self.config, self.spec)
        async with asyncio.timeout(10):
            while not (self.local / "ready").exists():
                assert running_init_pid(self.config, "subject"), WorkloadPaths(
                    self.config, "subject"
                ).log.read_text()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await kill_workload(self.config, "subject")

    async def failures(self) -> set[str]:
        report = await run_doctor(self.config, "subject")
        return {check.name for check in report.checks if check.area == "subject" and check.status == "fail"}

    async def dump(self) -> Path:
        images = self.directory / "images"
        images.mkdir()
        pid = running_init_pid(self.config, "subject")
        assert pid is not None
        paths = WorkloadPaths(self.config, "subject")
        streams = standard_streams(pid)
        (images / "descriptors.json").write_text(str(streams).replace("'", '"'))
        options = DumpOptions(
            pid=pid,
            images_dir=images,
            root=paths.rootfs,
            external=tuple(mount.external for mount in bind_mounts(self.spec, paths)),
        )
        swrk = await spawn(locate_criu(None))
        await swrk.dump(options, _agree)
        version = await (await spawn(locate_criu(None))).version()
        (images / ORIGIN_FILE).write_bytes(encode_origin(read_origin(str(version))))
        return images

    async def judge(self, images: Path) -> ReadinessVerdict:
        return await Readiness(self.config).check(self.spec, images, 1 << 20)

    async def restore(self, images: Path) -> None:
        await restore_workload(self.config, self.spec, images, EpochId(1, 1), locate_criu(None))


async def _agree(hook: str, pid: int | None) -> bool:
    return True


@pytest.fixture
async def workload(tmp_path: Path) -> AsyncIterator[Workload]:
    node = Node(
        name="doctor",
        address="127.0.0.1",
        state_dir=str(tmp_path / "state"),
        run_dir=str(tmp_path / "run"),
        cgroup_parent=f"/outlive/doctor-test-{os.getpid()}",
    )
    subject = Workload(NodeConfig(node=node), tmp_path)
    try:
        yield subject
    finally:
        await subject.stop()
        for directory in cgroup_directories(node.cgroup_parent):
            for group in (*directory.glob("*/"), directory):
                group.rmdir()


async def test_a_workload_of_many_harmless_things_is_fit_and_restorable(workload: Workload) -> None:
    await workload.start(
        "s = socket.create_server(('127.0.0.1', 0)); u = socket.socket(socket.AF_UNIX)\n"
        "g = open('/srv/local/g', 'w+'); os.unlink(g.name); n = open('/dev/null', 'w')\n"
        "os.mkdir('/srv/local/d'); os.chdir('/srv/local/d'); u.bind('/srv/local/d/s'); u.listen()\n"
        "libc.inotify_add_watch(libc.inotify_init(), b'/srv/local/d', 0xfff); m = os.memfd_create('m')\n"
        "a = socket.socket(socket.AF_UNIX); a.bind('\\0outlive-doctor-test'); r, w = os.pipe()\n"
        "b = mmap.mmap(-1, 8192); p = open('/proc/self/stat'); left, right = socket.socketpair()\n"
        "os.mkfifo('/srv/shared/q'); q = os.open('/srv/shared/q', os.O_RDWR); c = open('/srv/shared/c', 'w')"
    )
    assert await workload.failures() == set()
    images = await workload.dump()
    await workload.stop()
    assert await workload.judge(images) == ReadinessVerdict(True, ())
    await workload.restore(images)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("b = ctypes.create_string_buffer(248); assert libc.syscall(425, 4, b) > 0", "io_uring"),
        ("assert libc.syscall(323, 1) > 0", "userfaultfd"),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)", "sockets"),
        (
            "f = open('/srv/local/f', 'wb'); f.write(bytes(2 << 20)); f.flush(); os.unlink(f.name)",
            "deleted files",
        ),
        (
            "f = open('/srv/shared/f', 'w'); os.link(f.name, '/srv/shared/g'); os.unlink(f.name)",
            "deleted files",
        ),
        ("d = os.open('/dev/loop-control', os.O_RDWR)", "devices"),
    ],
)
async def test_what_the_doctor_refuses_criu_cannot_dump(workload: Workload, code: str, name: str) -> None:
    await _is_refused(workload, code, name)


async def test_locks_are_dumped_only_where_files_are_replicated(workload: Workload) -> None:
    code = "f = open('/srv/shared/f', 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    await workload.start(code)
    assert await workload.failures() == set()
    await workload.stop()
    workload.replicated = False
    await _is_refused(workload, code, "file locks")


async def _is_refused(workload: Workload, code: str, name: str) -> None:
    try:
        await workload.start(code)
    except AssertionError as error:
        pytest.skip(f"not possible here: {error}")
    assert await workload.failures() == {name}
    with pytest.raises(CaptureError):
        await workload.dump()
    assert running_init_pid(workload.config, "subject")


@pytest.mark.parametrize(
    ("code", "damage", "words"),
    [
        ("f = open('/srv/shared/f', 'w')", lambda w: (w.shared / "f").unlink(), "missing"),
        ("f = open('/srv/shared/f', 'w')", lambda w: (w.shared / "f").chmod(0o600), "mode"),
        ("f = open('/srv/shared/f', 'w')", lambda w: (w.shared / "f").write_text("more"), "4 bytes"),
        ("os.mkdir('/srv/local/d'); os.chdir('/srv/local/d')", lambda w: (w.local / "d").rmdir(), "missing"),
        (
            "os.mkdir('/srv/local/d'); os.chdir('/srv/local/d')",
            lambda w: (w.local / "d").chmod(0o700),
            "mode",
        ),
        (
            "os.mkdir('/srv/local/d'); s = socket.socket(socket.AF_UNIX)"
            "\ns.bind('/srv/local/d/s'); s.listen()",
            lambda w: shutil.rmtree(w.local / "d"),
            "missing",
        ),
        (
            "os.mkdir('/srv/local/d'); libc.inotify_add_watch(libc.inotify_init(), b'/srv/local/d', 0xfff)",
            lambda w: (w.local / "d").rmdir(),
            "missing",
        ),
    ],
)
async def test_what_is_judged_not_restorable_criu_cannot_restore(
    workload: Workload, code: str, damage: Callable[[Workload], object], words: str
) -> None:
    await workload.start(code)
    images = await workload.dump()
    await workload.stop()
    assert await workload.judge(images) == ReadinessVerdict(True, ())
    damage(workload)
    (reason,) = (await workload.judge(images)).reasons
    assert words in reason
    with pytest.raises(RestoreError):
        await workload.restore(images)


async def test_an_append_only_log_on_shared_storage_may_grow(workload: Workload) -> None:
    await workload.start("f = open('/srv/shared/f', 'a')")
    images = await workload.dump()
    await workload.stop()
    (workload.shared / "f").write_text("written later")
    assert (await workload.judge(images)).restorable
    await workload.restore(images)


async def test_a_taken_port_and_an_address_of_the_old_node_are_found(workload: Workload) -> None:
    await workload.start(
        "s = socket.create_server(('127.0.0.1', 0)); open('/srv/local/p', 'w').write(str(s.getsockname()[1]))"
    )
    images = await workload.dump()
    await workload.stop()
    port = int((workload.local / "p").read_text())
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    async with server:
        (reason,) = (await workload.judge(images)).reasons
        assert f"127.0.0.1:{port} is taken" in reason
        with pytest.raises(RestoreError):
            await workload.restore(images)
    assert (await workload.judge(images)).restorable
    await workload.restore(images)


async def test_local_files_are_named_alike_by_the_doctor_and_at_every_epoch(workload: Workload) -> None:
    elsewhere = workload.local / "f"  # the same directory, but not as it is declared
    await workload.start(f"f = open('{elsewhere}', 'w')")
    assert await workload.failures() == {"local files"}
    verdict = await workload.judge(await workload.dump())
    assert any(reason.startswith(f"{elsewhere} is open for writing") for reason in verdict.reasons)


async def test_files_in_declared_directories_are_no_trouble(workload: Workload) -> None:
    await workload.start("f = open('/srv/local/f', 'w')")
    assert await workload.failures() == set()
