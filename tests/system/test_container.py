"""One container on this machine: what a workload sees, what outlives whom, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from common.bringing_up import bringing_up
from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig
from common.container import (
    bring_inside,
    cgroup_directories,
    cgroup_frozen,
    exit_code,
    frozen_by,
    incarnation,
    kill_workload,
    refuse_unknown,
    restore_workload,
    running_init_pid,
    start_workload,
    thaw_cgroup,
    workload_pids,
)
from common.criu.locate import locate_criu
from common.errors import RestoreError, WorkloadError
from common.gate import close_gate, gate_of, is_closed
from common.identity import PageHasher
from common.model import EpochId, FilePath, WorkloadSpec
from primary.dumping import Dumper
from primary.stock import StockBackend

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

NAME = "subject"
REPOSITORY = Path(__file__).parents[2]

_LOOK = """
import json, os, resource
print("SEEN " + json.dumps({
    "greeting": os.environ.get("GREETING"), "environment": sorted(os.environ), "cwd": os.getcwd(),
    "uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid(),
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "pid_namespace": os.readlink("/proc/self/ns/pid"), "ipc_namespace": os.readlink("/proc/self/ns/ipc"),
    "mount_namespace": os.readlink("/proc/self/ns/mnt"),
    "filesystems": {line.split()[1]: line.split()[2] for line in open("/proc/mounts")},
}), flush=True)
"""

_MEMORY_FILES = ("memory.limit_in_bytes", "memory.max")

_COUNTER = """
import os, sys, threading, time
beats = [0] * 3
def beat(number):
    while True:
        beats[number] += 1
        time.sleep(0.01)
for number in range(3):
    threading.Thread(target=beat, args=(number,), daemon=True).start()
if os.fork() == 0:
    count = 0
    while True:
        count += 1
        print(f"child {os.getpid()} {count}", flush=True)
        time.sleep(0.02)
count = 0
while True:
    count += 1
    print(f"parent {os.getpid()} {count} {min(beats)}", flush=True)
    time.sleep(0.02)
"""


def python(code: str) -> tuple[str, ...]:
    return ("/usr/bin/python3", "-c", code)


class Place:
    """A node as far as containers go: directories and a cgroup of its own."""

    def __init__(self, directory: Path, number: int) -> None:
        self.config = NodeConfig(
            node=Node(
                name=f"n{number}",
                address="127.0.0.1",
                state_dir=str(directory / f"n{number}/state"),
                run_dir=str(directory / f"n{number}/run"),
                image_dir=str(directory / f"n{number}/images"),
                cgroup_parent=f"/outlive/container-test-{os.getpid()}-{number}",
            )
        )
        self.paths = WorkloadPaths(self.config, NAME)

    async def start(self, command: tuple[str, ...], **fields: object) -> WorkloadSpec:
        spec = WorkloadSpec(name=NAME, nodes=("n0",), command=command, **fields)  # type: ignore[arg-type]
        await start_workload(self.config, spec)
        return spec

    @property
    def pid(self) -> int | None:
        return running_init_pid(self.config, NAME)

    def output(self) -> list[str]:
        """What the workload printed: the log's lines without time, stream and tag."""
        lines = self.paths.log.read_text().splitlines() if self.paths.log.exists() else []
        return [line.split(" ", 3)[3] for line in lines if line.count(" ") >= 3]

    async def says(self, beginning: str, since: int = 0) -> str:
        """Wait for a line of output that begins so."""
        found: list[str] = []

        def said() -> bool:
            found[:] = [line for line in self.output()[since:] if line.startswith(beginning)]
            return bool(found)

        await soon(said, f"it says {beginning!r}; it said {self.output()[-5:]}")
        return found[0]

    async def ended(self) -> int:
        await soon(lambda: exit_code(self.config, NAME) is not None, "it has ended")
        code = exit_code(self.config, NAME)
        assert code is not None
        return code

    def remains(self) -> list[str]:
        """Whatever there is of a container after its end."""
        bundle = str(self.paths.bundle)
        listed = subprocess.run(
            ["runc", "--root", str(self.config.runc_root), "list", "--format", "json"],
            capture_output=True,
            text=True,
            check=True,
        )
        shims = [
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if bundle.encode() in _content(path)
        ]
        return [
            *(f"runc: {each['id']}" for each in json.loads(listed.stdout) or []),
            *(f"process {pid}" for pid in workload_pids(self.config, NAME)),
            *(f"shim {pid}" for pid in shims),
            *(
                line
                for line in Path("/proc/mounts").read_text().splitlines()
                if str(self.paths.bundle) in line
            ),
        ]

    async def nothing_remains(self) -> None:
        await soon(lambda: not self.remains(), f"nothing remains: {self.remains()}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has just ended


async def soon(condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
async def places(tmp_path: Path) -> AsyncIterator[list[Place]]:
    """Two nodes' worth of directories; whatever runs there in the end is killed, cgroups and all."""
    made = [Place(tmp_path, number) for number in range(2)]
    try:
        yield made
    finally:
        for place in made:
            await kill_workload(place.config, NAME)
            await place.nothing_remains()
            for directory in cgroup_directories(place.config.node.cgroup_parent):
                for group in (*directory.glob("*/"), directory):
                    group.rmdir()


@pytest.fixture
def place(places: list[Place]) -> Place:
    return places[0]


async def test_a_workload_sees_what_is_declared_and_nothing_of_the_nodes_other_processes(
    place: Place,
) -> None:
    soft, _ = __import__("resource").getrlimit(7)
    limit = min(soft, 4096) // 2
    await place.start(
        python(_LOOK),
        environment={"GREETING": "good day = yes"},
        user="1234:4321",
        working_directory="/usr/share",
        open_files_limit=limit,
        files=(FilePath(path="/srv"),),
    )
    seen = json.loads((await place.says("SEEN ")).removeprefix("SEEN "))
    assert await place.ended() == 0
    assert seen["greeting"] == "good day = yes"
    assert set(seen["environment"]) <= {"GREETING", "PATH", "HOME", "LC_CTYPE"}  # none of this process
    assert seen["cwd"] == "/usr/share"
    assert (seen["uid"], seen["gid"]) == (1234, 4321)
    assert seen["pid"] == 1
    assert seen["open_files"] == [limit, limit]
    for kind in ("pid", "ipc"):
        assert seen[f"{kind}_namespace"] != os.readlink(f"/proc/self/ns/{kind}")
    assert seen["mount_namespace"] != os.readlink("/proc/self/ns/mnt")
    assert {"/", "/proc", "/dev", "/srv"} <= seen["filesystems"].keys()


async def test_ipc_is_shared_with_the_node_where_that_is_switched_off(place: Place) -> None:
    await place.start(python(_LOOK), private_ipc=False)
    seen = json.loads((await place.says("SEEN ")).removeprefix("SEEN "))
    assert seen["ipc_namespace"] == os.readlink("/proc/self/ns/ipc")
    assert seen["pid_namespace"] != os.readlink("/proc/self/ns/pid")


async def test_declared_directories_are_binds_of_their_own_and_none_shows_on_the_node(
    place: Place, tmp_path: Path
) -> None:
    before = Path("/proc/mounts").read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    await place.start(
        ("/bin/sh", "-c", "echo own >/srv/kept; echo given >/mnt/kept; cat /proc/mounts; exec sleep 1000"),
        files=(FilePath(path="/srv"), FilePath(path="/mnt", source=str(elsewhere))),
    )
    own = place.paths.state / "files" / "0" / "kept"
    await soon(lambda: (elsewhere / "kept").exists() and own.exists(), "both are written")
    await place.says("proc /proc ")
    await soon(lambda: any(" /mnt " in line for line in place.output()), "the mounts are listed")
    assert own.read_text() == "own\n"
    assert (elsewhere / "kept").read_text() == "given\n"
    assert not Path("/srv/kept").exists()
    assert not Path("/mnt/kept").exists()
    points = [line.split()[1] for line in place.output() if len(line.split()) == 6]
    assert points.count("/srv") == points.count("/mnt") == 1
    assert Path("/proc/mounts").read_text() == before


async def test_a_given_root_is_what_the_workload_sees_as_its_own(place: Place, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("dev", "proc", "only-here"):
        (root / name).mkdir(parents=True)
    for name in ("usr", "etc"):
        (root / name).symlink_to(f"/{name}")  # leads nowhere in there: nothing of the node's is seen
    programs = ["/bin/sh", "/bin/ls"]
    libraries = await asyncio.to_thread(_libraries, programs)
    for program in [*programs, *libraries]:
        target = root / program.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(program).read_bytes())
        target.chmod(0o755)
    await place.start(("/bin/sh", "-c", "/bin/ls -d /only-here && exec /bin/ls /home"), root=str(root))
    assert await place.ended() == 2  # there is no /home in it
    assert "/only-here" in place.output()


def _libraries(programs: list[str]) -> set[str]:
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    return {word for word in listed.split() if word.startswith("/") and not word.endswith(":")}


async def test_limits_stand_in_the_workloads_cgroup(place: Place) -> None:
    await place.start(("/bin/sleep", "1000"), memory_limit_bytes=64 << 20, cpu_limit=0.5)
    groups = cgroup_directories(place.paths.cgroup)
    memory = [_content(group / name).strip() for group in groups for name in _MEMORY_FILES]
    assert str(64 << 20).encode() in memory
    cpu = [_content(group / name).strip() for group in groups for name in ("cpu.cfs_quota_us", "cpu.max")]
    assert {b"50000", b"50000 100000"} & set(cpu)


_STARTER = """
import asyncio, sys, msgspec
from common.config import NodeConfig
from common.container import start_workload
from common.model import WorkloadSpec
config = msgspec.json.decode(sys.argv[1], type=NodeConfig)
spec = msgspec.json.decode(sys.argv[2], type=WorkloadSpec)
print(asyncio.run(start_workload(config, spec)))
"""


async def started_by_another(config: NodeConfig, spec: WorkloadSpec) -> asyncio.subprocess.Process:
    """Have a process of its own start the workload; it prints the PID."""
    arguments = [msgspec.json.encode(value).decode() for value in (config, spec)]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _STARTER, *arguments), stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
    )


async def test_a_workload_and_its_log_outlive_the_process_that_started_it(place: Place) -> None:
    spec = WorkloadSpec(name=NAME, nodes=("n0",), command=python(_COUNTER))
    starter = await started_by_another(place.config, spec)
    output, _ = await starter.communicate()
    assert starter.returncode == 0
    assert place.pid == int(output)
    count = len(place.output())
    assert await place.says("parent 1 ", since=count + 10)
    with pytest.raises(WorkloadError, match="runs already"):
        await start_workload(place.config, spec)
    assert place.pid == int(output)


async def test_how_a_workload_ended_is_recorded_and_it_can_be_started_again(place: Place) -> None:
    await place.start(("/bin/sh", "-c", "exit 7"))
    assert await place.ended() == 7
    first = incarnation(place.config, NAME)
    await place.start(("/bin/sh", "-c", "echo up; exec sleep 1000"))
    await place.says("up")
    assert exit_code(place.config, NAME) is None
    second = incarnation(place.config, NAME)
    assert first is not None
    assert second is not None
    assert first.id != second.id
    pid = place.pid
    assert pid is not None
    os.kill(pid, 9)
    assert await place.ended() == 128 + 9


_STUBBORN = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
for depth in range(4):
    if os.fork() == 0:
        os.setsid()
        continue
if os.getpid() == 1: print("up", flush=True)
while True:
    if os.getpid() != 1 and os.fork() == 0:
        time.sleep(0.02)
        os._exit(0)
    time.sleep(0.01)
    while os.getpid() != 1:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0: break
        except ChildProcessError:
            break
"""


async def test_a_kill_leaves_nothing_of_a_tree_that_forks_and_ignores_signals(place: Place) -> None:
    await place.start(python(_STUBBORN))
    await place.says("up")
    await soon(lambda: len(workload_pids(place.config, NAME)) >= 8, "a tree of processes")
    await kill_workload(place.config, NAME)
    assert workload_pids(place.config, NAME) == []
    assert place.pid is None
    await place.nothing_remains()
    await kill_workload(place.config, NAME)  # harmless when repeated


async def test_a_kill_ends_what_is_being_brought_up_though_nothing_is_in_the_cgroup_yet(
    place: Place, tmp_path: Path
) -> None:
    """Its starter is dead, and the disk with runc on it is slow: nobody else would end it any more."""
    slow = tmp_path / "runc"
    slow.write_text('#!/bin/sh\nsleep 1\nexec runc "$@"\n')
    slow.chmod(0o755)
    config = msgspec.structs.replace(
        place.config, node=msgspec.structs.replace(place.config.node, runc=str(slow))
    )
    starter = await started_by_another(
        config, WorkloadSpec(name=NAME, nodes=("n0",), command=python(_COUNTER))
    )
    await soon(place.paths.shim_pid_file.exists, "conmon is at work")
    starter.kill()
    await starter.wait()
    assert workload_pids(place.config, NAME) == []
    await kill_workload(place.config, NAME)
    assert bringing_up(place.config, NAME) == []
    await asyncio.sleep(1.5)
    assert (workload_pids(place.config, NAME), place.pid) == ([], None)


async def test_a_start_harms_no_other_workload_whose_shim_has_got_the_number_of_an_earlier_one(
    places: list[Place],
) -> None:
    await places[0].start(("/bin/sleep", "1000"))
    shim = places[0].paths.shim_pid_file.read_text()
    places[1].paths.bundle.mkdir(parents=True)
    places[1].paths.shim_pid_file.write_text(shim)
    await places[1].start(("/bin/sleep", "1000"))
    assert places[0].pid is not None
    assert places[1].pid is not None
    assert int(shim) in bringing_up(places[0].config, NAME)


async def test_what_runs_without_its_bundle_is_taken_for_nothing(place: Place) -> None:
    """Its first process is not known any more: it would count as ended, and be ended by the next start."""
    await place.start(("/bin/sleep", "1000"))
    refuse_unknown(place.config, NAME)
    aside = place.paths.bundle.rename(place.paths.bundle.with_name("aside"))
    with pytest.raises(WorkloadError, match="is gone, and processes run in the cgroup"):
        refuse_unknown(place.config, NAME)
    aside.rename(place.paths.bundle)
    await kill_workload(place.config, NAME)
    refuse_unknown(place.config, NAME)


async def test_a_kill_ends_a_frozen_workload_too(place: Place) -> None:
    await place.start(("/bin/sleep", "1000"))
    freezers = [g / "freezer.state" for g in cgroup_directories(place.paths.cgroup)]
    freezers = [path for path in freezers if path.exists()]
    if not freezers:
        pytest.skip("no freezer of version 1 here")
    freezers[0].write_text("FROZEN")
    await kill_workload(place.config, NAME)
    await place.nothing_remains()


async def test_a_command_that_cannot_run_is_one_clear_error_and_leaves_nothing(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "plain").write_text("not a program")
    for command, fields, words in (
        (("/no/such/program",), {}, "its program /no/such/program is no executable file"),
        (("/etc/passwd",), {}, "its program /etc/passwd is no executable file"),
        # Below another root it is runc that finds out.
        (("no-such",), {"root": str(tmp_path)}, "its program no-such is no executable file"),
        (("/no/such",), {"root": str(tmp_path)}, "its program /no/such is no executable file"),
        (("/plain",), {"root": str(tmp_path)}, "its program /plain is no executable file"),
        (("/bin/sleep", "9"), {"root": "/no/such/root"}, "subject"),
    ):
        began_s = time.monotonic()
        with pytest.raises(WorkloadError) as raised:
            await place.start(command, **fields)
        assert time.monotonic() - began_s < 10  # not by a time-out
        assert words in raised.value.message
        assert "\n" not in raised.value.message
        assert place.pid is None
        await place.nothing_remains()


class _Unwatched:
    """Nobody has to watch the freezes of a test."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        return

    async def end(self, criu_pid: int) -> None:
        return


async def test_a_captured_tree_goes_on_elsewhere_with_its_threads_its_child_and_its_output(
    places: list[Place],
) -> None:
    first, second = places
    spec = await first.start(python(_COUNTER), environment={"KEY": "value"}, files=(FilePath(path="/srv"),))
    await first.says("parent 1 10 ")
    await first.says("child ")
    run = incarnation(first.config, NAME)
    assert run is not None
    assert first.pid is not None
    backend = StockBackend(
        Dumper(first.config, spec, init_pid=first.pid, criu=locate_criu(None), guard=_Unwatched()),
        workload=NAME,
        incarnation=run.id,
        hasher=PageHasher(),
    )
    epoch = await backend.capture(EpochId(1, 1))
    try:
        at_capture = len(first.output())
        assert epoch.incarnation == run.id
        assert epoch.memory_bytes > 1 << 20
        await first.says("parent ", since=at_capture + 5)  # it runs on
        images = epoch.metadata[0].path.parent
        await kill_workload(first.config, NAME)
        counts = {who: _last(first.output(), who) for who in ("parent", "child")}
        before = len(first.output())
        await restore_workload(second.config, spec, images, epoch.id, locate_criu(None), order=5)
        await second.says("parent ")
        await second.says("child ", since=10)
        resumed = {who: next(line for line in second.output() if line.startswith(who)) for who in counts}
        for who, last in counts.items():
            assert 10 <= int(resumed[who].split()[2]) <= last
            assert resumed[who].split()[1] == next(
                line.split()[1] for line in first.output() if line.startswith(who)
            )
        threads = int(resumed["parent"].split()[3])
        await soon(lambda: _threads(second.output()) > threads + 5, "all threads go on")
        assert len(first.output()) == before
        restored = incarnation(second.config, NAME)
        assert restored is not None
        assert (restored.restored, restored.order) == (epoch.id, 5)
        assert restored.id != run.id
        pid = second.pid
        assert pid is not None
        assert second.paths.cgroup in Path(f"/proc/{pid}/cgroup").read_text()
        assert len(workload_pids(second.config, NAME)) == 2
        os.kill(pid, 9)
        assert await second.ended() == 128 + 9
        (images / "inventory.img").write_bytes(b"damaged")
        with pytest.raises(RestoreError, match="t1-e1"):
            await restore_workload(second.config, spec, images, epoch.id, locate_criu(None))
        await second.nothing_remains()
    finally:
        epoch.release()
        await backend.close()
    await soon(lambda: not images.exists(), "the images are given back")


def _last(lines: list[str], who: str) -> int:
    return int([line for line in lines if line.startswith(who)][-1].split()[2])


def _threads(lines: list[str]) -> int:
    return int([line for line in lines if line.startswith("parent")][-1].split()[3])


@pytest.mark.parametrize("frozen", [False, True])
async def test_what_a_version_before_gates_started_is_brought_inside_as_it_is(
    places: list[Place], frozen: bool
) -> None:
    place = places[0]
    await place.start(python(_COUNTER))
    await place.says("child")
    pid, pids = place.pid, workload_pids(place.config, NAME)
    for directory in cgroup_directories(place.paths.cgroup):
        for each in (directory / "cgroup.procs").read_text().split():
            (directory.parent / "cgroup.procs").write_text(each)
        directory.rmdir()
    assert place.pid is None
    if frozen:
        close_gate(gate_of(place.config, NAME))
        await soon(lambda: frozen_by(gate_of(place.config, NAME).file), "it is frozen")
    bring_inside(place.config, NAME)
    assert (place.pid, workload_pids(place.config, NAME)) == (pid, pids)
    assert not is_closed(gate_of(place.config, NAME))
    assert cgroup_frozen(place.config, NAME) is frozen
    thaw_cgroup(place.config, NAME)
    await place.says("parent", since=len(place.output()))
