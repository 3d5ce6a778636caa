"""The injector on real processes: what they yield, and that nothing of it can be seen in them afterwards.

The targets check themselves: tests/campaigns/injection_victim.c. OUTLIVE_INJECTIONS sets how many injections
in a row each of them gets (the numbers that are printed, with `pytest -s`, are of these).
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.criu.locate import locate_criu
from common.criu.rpc import DumpOptions, RestoreOptions, spawn
from common.errors import UnsupportedError
from primary.injection import (
    Injection,
    InjectionError,
    Stage,
    Status,
    inject,
    program,
    take_userfaultfd,
)
from tests.campaigns.injection_kills import Injector, Programs, Victim, Way, run_series

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="ptrace of other processes needs root"),
    pytest.mark.timeout(300),
]

ROUNDS = int(os.environ.get("OUTLIVE_INJECTIONS", "200"))
Start = Callable[..., Victim]

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_PAGEMAP_SCAN = 0xC0606610
_FEATURES = 1 << 15 | 1 << 13 | 1 << 12  # WP_ASYNC, WP_UNPOPULATED, WP_HUGETLBFS_SHMEM
_WRITTEN = 2
_PRESENT_OR_SWAPPED = 8 | 16

_WRITER = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 16 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(16): memory[page * 4096] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    memory[int(line) * 4096] = 2
    print(line, end="", flush=True)
"""

_JAVA = """
public class Counts {
    public static void main(String[] words) throws Exception {
        for (int i = 0; i < 4; i++) {
            Thread thread = new Thread(() -> {
                for (long n = 0; ; n++) {
                    byte[] garbage = new byte[(int) (n % 5000) + 1];
                    garbage[garbage.length - 1] = 1;
                    if (n % 20000 == 0) synchronized (Counts.class) { Counts.class.notifyAll(); }
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        for (long n = 0; ; n++) { System.out.println(n); Thread.sleep(5); }
    }
}
"""


_EXECUTES = {
    "itself": 'exec sh -c "$0" "$0"',
    "children": "while :; do (exec true) || echo killed $?; done",
}
_EXECUTIONS = 150


def _newest_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[-1]) if children else 4_000_000


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("injection"))


@pytest.fixture
def start(programs: Programs) -> Iterator[Start]:
    with contextlib.ExitStack() as ends:

        def started(mode: str, *, call: int = 0) -> Victim:
            victim = Victim(programs, mode, call=call)
            ends.callback(victim.end)
            return victim

        yield started


async def take_and_close(pid: int) -> Injection:
    injection = await take_userfaultfd(pid)
    assert os.readlink(f"/proc/self/fd/{injection.descriptor}") == "anon_inode:[userfaultfd]"
    os.close(injection.descriptor)
    return injection


def told(what: str, injections: list[Injection]) -> None:
    stops = sorted(each.stopped_us for each in injections)
    p99 = stops[len(stops) * 99 // 100]
    borrowed = statistics.median(each.borrowed_us for each in injections)
    print(
        f"{what}: {len(stops)} stops, median {statistics.median(stops):.0f}, p99 {p99}, max {stops[-1]} us;"
        f" on borrowed registers {borrowed:.0f} us"
    )


def written(pagemap: int, start: int, end: int, *, protect: bool) -> set[int]:
    """Return the pages that PAGEMAP_SCAN reports as written, by index; protect them again if asked to."""
    regions = (ctypes.c_uint64 * (3 * 64))()
    argument = bytearray(
        struct.pack(
            "=12Q",
            96,
            2 if protect else 0,  # PM_SCAN_CHECK_WPASYNC; and PM_SCAN_WP_MATCHING below
            start,
            end,
            0,
            ctypes.addressof(regions),
            64,
            0,
            0,
            _WRITTEN,
            _PRESENT_OR_SWAPPED,
            _WRITTEN,
        )
    )
    if protect:
        argument[8:16] = struct.pack("=Q", 1 | 2)
    count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
    found: set[int] = set()
    for index in range(count):
        first, past, _ = regions[3 * index : 3 * index + 3]
        found.update(range((first - start) // 4096, (past - start) // 4096))
    return found


class TestDescriptor:
    async def test_tracks_what_the_process_writes(self) -> None:
        pipe = subprocess.PIPE
        with launch(sys.executable, "-c", _WRITER, stdin=pipe, stdout=pipe, text=True) as target:
            assert target.stdin
            assert target.stdout
            begin = int(target.stdout.readline())
            injection = await take_userfaultfd(target.pid)
            pagemap = os.open(f"/proc/{target.pid}/pagemap", os.O_RDWR)
            try:
                api = bytearray(struct.pack("=3Q", 0xAA, _FEATURES, 0))
                fcntl.ioctl(injection.descriptor, _UFFDIO_API, api)
                assert struct.unpack("=3Q", api)[1] & _FEATURES == _FEATURES
                register = bytearray(struct.pack("=4Q", begin, 16 * 4096, 2, 0))
                fcntl.ioctl(injection.descriptor, _UFFDIO_REGISTER, register)
                end = begin + 16 * 4096
                assert written(pagemap, begin, end, protect=True) == set(range(16))
                assert written(pagemap, begin, end, protect=False) == set()
                for page in (3, 4, 11):
                    target.stdin.write(f"{page}\n")
                    target.stdin.flush()
                    assert target.stdout.readline() == f"{page}\n"
                assert written(pagemap, begin, end, protect=False) == {3, 4, 11}
            finally:
                os.close(pagemap)
                os.close(injection.descriptor)
                target.stdin.close()

    async def test_is_close_on_exec_and_non_blocking(self, start: Start) -> None:
        injection = await take_userfaultfd(start("sleep").pid)
        assert not os.get_inheritable(injection.descriptor)
        assert not os.get_blocking(injection.descriptor)
        assert injection.user_mode_only
        os.close(injection.descriptor)

    async def test_of_a_cancelled_caller_is_closed(self, start: Start) -> None:
        victim = start("sleep")
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(20):
            work = asyncio.create_task(take_userfaultfd(victim.pid))
            await asyncio.sleep(random.uniform(0, 0.002))
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                os.close((await work).descriptor)
            await asyncio.sleep(0.05)  # the injector is at work until then, and would refuse another
        await asyncio.sleep(0.2)
        assert set(os.listdir("/proc/self/fd")) == before
        assert not victim.trouble()


class TestTheTargetRunsOn:
    @pytest.mark.parametrize(
        "mode",
        ["sleep", "futex", "read", "poll", "epoll", "compute", "threads", "seccomp", "python", "leaderless"],
    )
    async def test_after_many_injections_in_a_row(self, start: Start, mode: str) -> None:
        victim = start(mode)
        taken = [await take_and_close(victim.pid) for _ in range(1000 if mode == "compute" else ROUNDS)]
        told(mode, taken)
        assert not victim.trouble() or mode == "leaderless"
        assert victim.runs_within(2)
        assert all(each.healed_if_killed for each in taken)

    async def test_with_its_restartable_sequences_started_again(self, start: Start) -> None:
        victim = start("sequence")
        for _ in range(20):
            before = victim.word(3)
            await take_and_close(victim.pid)
            for _ in range(500):  # it has to get a processor first
                if victim.word(3) > before:
                    break
                await asyncio.sleep(0.01)
            assert victim.word(3) > before
        assert not victim.trouble()

    @pytest.mark.parametrize("mode", ["compute", "sleep", "threads"])
    async def test_and_every_signal_that_it_gets_meanwhile_is_handled(self, start: Start, mode: str) -> None:
        victim = start(mode)
        over = threading.Event()
        sent = 0

        def send() -> None:
            nonlocal sent
            while not over.is_set():
                os.kill(victim.pid, signal.SIGUSR1)
                sent += 1
                until_s = time.monotonic() + 2
                while victim.word(4) < sent and time.monotonic() < until_s:
                    time.sleep(0.00005)
                assert victim.word(4) == sent

        sending = asyncio.create_task(asyncio.to_thread(send))
        for _ in range(200):
            await take_and_close(victim.pid)
        over.set()
        await sending
        assert sent > 200
        # A handler without SA_RESTART may cut its sleeps short, so only compute's own checks count.
        assert not victim.trouble() or mode == "sleep"
        assert victim.runs_within(2)

    @pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK")
    async def test_a_jvm(self, tmp_path: Path) -> None:
        (tmp_path / "Counts.java").write_text(_JAVA)
        assert launch("javac", "-d", tmp_path, tmp_path / "Counts.java").wait() == 0
        with (tmp_path / "out").open("wb") as out:
            target = launch("java", "-Xmx128m", "-cp", tmp_path, "Counts", stdout=out)
        try:

            def lines() -> int:
                return (tmp_path / "out").read_bytes().count(b"\n")

            await until(lambda: lines() > 0)
            told("jvm", [await take_and_close(target.pid) for _ in range(ROUNDS)])
            before = lines()
            await asyncio.sleep(0.3)
            assert lines() > before
            assert target.poll() is None
        finally:
            target.kill()
            target.wait()

    @pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis")
    async def test_a_redis_under_load(self, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        target = launch("redis-server", "--port", "0", "--unixsocket", path, "--save", "", cwd=tmp_path)
        try:
            await until(lambda: os.path.exists(path))
            load = launch("redis-benchmark", "-s", path, "-t", "set,get", "-n", "100000", "-c", "8", "-q")
            told("redis", [await take_and_close(target.pid) for _ in range(ROUNDS)])
            assert await asyncio.to_thread(load.wait) == 0
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(b"PING\r\n")
                assert client.recv(100) == b"+PONG\r\n"
        finally:
            target.kill()
            target.wait()


READ, POLL, PPOLL, PAUSE, SIGSUSPEND, FUTEX, ACCEPT = range(7)


class TestABlockedCall:
    @pytest.mark.parametrize("call", [READ, POLL, PPOLL, PAUSE, SIGSUSPEND, FUTEX, ACCEPT])
    async def test_stays_blocked_and_ends_as_it_would_have(self, start: Start, call: int) -> None:
        victim = start("forever", call=call)
        await asyncio.sleep(0.05)
        for _ in range(20):
            await take_and_close(victim.pid)
        await asyncio.sleep(0.02)
        assert victim.word(0) == 1, "it returned"
        wake(victim, call)
        await until(lambda: victim.word(0) == 2)
        by_signal = call in (PAUSE, SIGSUSPEND, FUTEX)
        assert (victim.word(8), victim.word(9)) == ((-1, errno.EINTR) if by_signal else (1, 0))
        assert victim.word(4) == by_signal

    @pytest.mark.parametrize("call", [PAUSE, SIGSUSPEND, PPOLL, POLL, FUTEX])
    async def test_is_ended_by_a_signal_that_comes_during_an_injection(self, start: Start, call: int) -> None:
        moments = random.Random(call)
        for _ in range(25):
            victim = start("forever", call=call)
            await asyncio.sleep(0.01)
            work = asyncio.create_task(take_and_close(victim.pid))
            await asyncio.sleep(moments.uniform(0, 0.003))
            os.kill(victim.pid, signal.SIGUSR1)
            await work
            await until(lambda v=victim: v.word(0) == 2)
            assert (victim.word(8), victim.word(9), victim.word(4)) == (-1, errno.EINTR, 1)
            victim.end()

    @pytest.mark.parametrize("stage", [Stage.BORROWED, Stage.OPENED, Stage.CLOSED])
    @pytest.mark.parametrize("call", [PAUSE, SIGSUSPEND, PPOLL])
    async def test_is_ended_by_a_signal_that_comes_on_borrowed_registers(
        self, programs: Programs, start: Start, call: int, stage: Stage
    ) -> None:
        victim = start("forever", call=call)
        await asyncio.sleep(0.02)
        with held(programs, victim, stage):
            os.kill(victim.pid, signal.SIGUSR1)
            await asyncio.sleep(0.01)
            assert victim.word(4) == 0
        await until(lambda: victim.word(0) == 2)
        assert (victim.word(8), victim.word(9), victim.word(4)) == (-1, errno.EINTR, 1)


class TestAStoppedTarget:
    async def test_stays_stopped(self, start: Start) -> None:
        victim = start("compute")
        victim.process.send_signal(signal.SIGSTOP)
        await until(lambda: victim.status("State").startswith("T"))
        for _ in range(20):
            await take_and_close(victim.pid)
            await until(lambda: victim.status("State").startswith("T (stopped)"))
        ticks = victim.word(0)
        await asyncio.sleep(0.05)
        assert victim.word(0) == ticks
        victim.process.send_signal(signal.SIGCONT)
        assert not victim.trouble()

    @pytest.mark.parametrize("mode", ["compute", "sleep", "threads"])
    @pytest.mark.parametrize("stage", [Stage.STOPPED, Stage.MASKED, Stage.AIMED, Stage.TAKEN, Stage.CLOSED])
    async def test_that_was_stopped_during_the_injection_is_so_afterwards(
        self, programs: Programs, start: Start, mode: str, stage: Stage
    ) -> None:
        victim = start(mode)
        with held(programs, victim, stage):
            victim.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.01)
        await until(lambda: victim.status("State").startswith("T (stopped)"))
        ticks = victim.word(0)
        await asyncio.sleep(0.05)
        assert victim.word(0) == ticks
        victim.process.send_signal(signal.SIGCONT)
        assert not victim.trouble()

    async def test_that_is_continued_during_the_injection_runs_afterwards(
        self, programs: Programs, start: Start
    ) -> None:
        victim = start("compute")
        victim.process.send_signal(signal.SIGSTOP)
        await until(lambda: victim.status("State").startswith("T"))
        with held(programs, victim, Stage.OPENED):
            victim.process.send_signal(signal.SIGCONT)
        assert not victim.trouble()


class TestRefusal:
    async def test_of_a_process_that_is_not_there(self) -> None:
        with pytest.raises(InjectionError, match="has ended") as caught:
            await take_userfaultfd(4_000_000)
        assert caught.value.status is Status.GONE

    async def test_of_a_zombie(self) -> None:
        with launch("true") as target:
            await until(lambda: " Z " in Path(f"/proc/{target.pid}/stat").read_text())
            with pytest.raises(InjectionError, match="has ended"):
                await take_userfaultfd(target.pid)

    @pytest.mark.parametrize("how", list(_EXECUTES))
    async def test_of_what_executes_another_program_meanwhile_leaves_that_whole(self, how: str) -> None:
        """What was looked up of the one is not there in the other: it would be sent into nowhere, and die."""
        code, harm = _EXECUTES[how], {Status.STUCK, Status.NOT_RETURNED, Status.LEFT_OPEN}
        with launch("sh", "-c", code, code, stdout=subprocess.PIPE) as target:
            assert target.stdout is not None
            harmful = 0
            try:
                for _ in range(_EXECUTIONS):
                    pid = target.pid if how == "itself" else _newest_child(target.pid)
                    try:
                        await take_and_close(pid)
                    except InjectionError as error:
                        harmful += error.status in harm
                assert target.poll() is None, "it died"
            finally:
                target.kill()
            assert not harmful
            assert target.stdout.read() == b"", "children died"

    async def test_of_a_kernel_thread(self) -> None:
        with pytest.raises(InjectionError):
            await take_userfaultfd(2)

    async def test_of_a_process_that_is_being_traced(self, programs: Programs, start: Start) -> None:
        victim = start("compute")
        with (
            held(programs, victim, Stage.STOPPED),
            pytest.raises(InjectionError, match="traces it") as caught,
        ):
            await take_userfaultfd(victim.pid)
        assert caught.value.status is Status.TRACED
        assert not victim.trouble()

    async def test_of_a_process_at_its_limit_of_descriptors(self, start: Start) -> None:
        victim = start("limited")
        with pytest.raises(InjectionError, match="Too many open files") as caught:
            await take_userfaultfd(victim.pid)
        assert caught.value.status is Status.CALL_FAILED
        assert not victim.trouble()

    async def test_of_a_process_whose_system_calls_are_redirected(self, start: Start) -> None:
        victim = start("dispatch")
        with pytest.raises(UnsupportedError, match="redirected"):
            await take_userfaultfd(victim.pid)
        assert not victim.trouble()

    @pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv to drop a capability with")
    async def test_of_a_seccomp_filter_that_may_not_be_suspended(self, start: Start, tmp_path: Path) -> None:
        path = tmp_path / "injector"
        drop = f"{shutil.which('setpriv')} --bounding-set=-sys_admin --inh-caps=-sys_admin"
        path.write_text(f"#!/bin/sh\nexec {drop} {program()} $1\n")
        path.chmod(0o755)
        filtered, free = start("seccomp"), start("compute")
        with pytest.raises(UnsupportedError, match="seccomp filter could not be suspended"):
            await asyncio.to_thread(inject, path, filtered.pid)
        os.close((await asyncio.to_thread(inject, path, free.pid)).descriptor)
        assert not filtered.trouble()
        assert not free.trouble()

    async def test_of_a_process_that_waits_for_its_vfork(self, start: Start) -> None:
        victim = start("vfork")
        with pytest.raises(InjectionError, match="did not stop in time") as caught:
            await take_userfaultfd(victim.pid)
        assert caught.value.status is Status.NOT_STOPPED
        victim.set(5, 1)  # the child ends, and the parent goes on
        assert victim.runs_within(2)
        assert victim.status("TracerPid") == "0"
        await take_and_close(victim.pid)

    async def test_of_32_bit_code(self, tmp_path: Path) -> None:
        program = tmp_path / "compat"
        source = 'void _start(void) { for (;;) __asm__ volatile("int $0x80" :: "a"(29)); }'
        (tmp_path / "compat.c").write_text(source)
        options = ("-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pic")
        if launch("cc", *options, "-o", program, tmp_path / "compat.c").wait():
            pytest.skip("cc cannot build 32-bit code")
        target = launch(program)
        try:
            await asyncio.sleep(0.05)
            with pytest.raises(UnsupportedError, match="32-bit"):
                await take_userfaultfd(target.pid)
            assert target.poll() is None
            assert "TracerPid:\t0\n" in Path(f"/proc/{target.pid}/status").read_text()
        finally:
            target.kill()
            target.wait()

    async def test_of_a_frozen_cgroup_leaves_the_target_whole(self, start: Start) -> None:
        root = next((Path(each) for each in _cgroup2_mounts()), None)
        if root is None:
            pytest.skip("no cgroup2 is mounted")
        group = root / f"outlive-injection-{os.getpid()}"
        group.mkdir()
        victim = start("compute")
        try:
            (group / "cgroup.procs").write_text(str(victim.pid))
            (group / "cgroup.freeze").write_text("1")
            await until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
            with pytest.raises(InjectionError) as caught:
                await take_userfaultfd(victim.pid)
            assert caught.value.status in (Status.STUCK, Status.NOT_STOPPED)
            (group / "cgroup.freeze").write_text("0")
            assert not victim.trouble()
            await take_and_close(victim.pid)
        finally:
            (group / "cgroup.freeze").write_text("0")
            victim.end()
            group.rmdir()


class TestTheTargetsEnd:
    @pytest.mark.parametrize("stage", [Stage.SEIZED, Stage.STOPPED, Stage.MASKED, Stage.OPENED, Stage.CLOSED])
    async def test_in_the_middle_is_told(self, programs: Programs, start: Start, stage: Stage) -> None:
        victim = start("threads")
        injector = Injector(programs.by_way["healing"], victim.pid, stop_at=stage)
        injector.wait_until_stopped()
        victim.process.kill()
        await asyncio.sleep(0.01)
        injector.send(signal.SIGCONT)
        answer = injector.end()
        injector.close()
        assert answer
        assert answer.status is Status.GONE


class TestTheInjectorsDeath:
    @pytest.mark.parametrize("mode", ["compute", "sleep", "futex", "read", "threads", "seccomp", "python"])
    async def test_at_any_stage_costs_the_target_nothing(
        self, programs: Programs, start: Start, mode: str
    ) -> None:
        victim = start(mode)
        for index, stage in enumerate(list(Stage)[1:]):
            if mode == "seccomp" and stage is Stage.AIMED:
                continue  # documented: its filter is in force again, and judges the call
            if index % 5 == 4:  # each death leaves a slot behind, and there are about seven
                victim = start(mode)
            kill_at(programs, "healing", victim, stage)
            assert not victim.trouble(), stage
            assert (await take_and_close(victim.pid)).healed_if_killed
            assert not victim.trouble()

    @pytest.mark.parametrize("stage", [Stage.MASKED, Stage.OPENED, Stage.CLOSED])
    @pytest.mark.parametrize("call", [READ, PPOLL, PAUSE, SIGSUSPEND, ACCEPT])
    async def test_leaves_a_blocked_call_blocked(
        self, programs: Programs, start: Start, call: int, stage: Stage
    ) -> None:
        victim = start("forever", call=call)
        await asyncio.sleep(0.02)
        kill_at(programs, "healing", victim, stage)
        await asyncio.sleep(0.05)
        assert victim.word(0) == 1
        wake(victim, call)
        await until(lambda: victim.word(0) == 2)
        assert victim.word(8) == (-1 if call in (PAUSE, SIGSUSPEND) else 1)

    async def test_with_a_signal_pending_lets_the_handler_run_and_return(
        self, programs: Programs, start: Start
    ) -> None:
        for stage in (Stage.BORROWED, Stage.MASKED, Stage.OPENED, Stage.CLOSED, Stage.UNMASKED):
            victim = start("compute")
            injector = Injector(programs.by_way["healing"], victim.pid, stop_at=stage)
            injector.wait_until_stopped()
            os.kill(victim.pid, signal.SIGUSR1)
            injector.send(signal.SIGKILL)
            injector.end()
            injector.close()
            await until(lambda v=victim: v.word(4) == 1)
            assert not victim.trouble(), stage

    async def test_of_the_plain_way_is_a_crash_and_no_wrong_data(
        self, programs: Programs, start: Start
    ) -> None:
        for stage in list(Stage)[1:]:
            if stage is Stage.AIMED:
                continue  # the plain way aims at once
            victim = start("compute")
            kill_at(programs, "plain", victim, stage)
            if Stage.BORROWED <= stage < Stage.RETURNED:
                assert victim.process.wait(2) in (-signal.SIGSEGV, -signal.SIGBUS)
                assert not victim.word(1)
            else:
                assert not victim.trouble(), stage

    async def test_uses_up_slots_until_only_the_plain_way_is_left(
        self, programs: Programs, start: Start
    ) -> None:
        victim = start("sleep")
        for _ in range(30):
            if not (await take_and_close(victim.pid)).healed_if_killed:
                break
            kill_at(programs, "healing", victim, Stage.OPENED)
        else:
            pytest.fail("slots never ran out")
        assert not victim.trouble()

    async def test_at_random_moments(self) -> None:
        seed = random.SystemRandom().randrange(1 << 32)
        report = await asyncio.to_thread(run_series, 32, seed)
        assert report.passed, report

    async def test_before_a_slot_is_entered_costs_no_slot(self, programs: Programs, start: Start) -> None:
        victim = start("sleep")
        for _ in range(20):
            kill_at(programs, "healing", victim, Stage.STOPPED)
        assert (await take_and_close(victim.pid)).healed_if_killed


class TestCriu:
    @pytest.mark.parametrize("killed_at", [None, Stage.OPENED])
    async def test_dumps_and_restores_the_target_afterwards(
        self, programs: Programs, tmp_path: Path, killed_at: Stage | None
    ) -> None:
        page = tmp_path / "page"
        page.write_bytes(bytes(4096))
        target = launch(programs.victim, "compute", page, start_new_session=True, cwd="/")
        images = tmp_path / "images"
        images.mkdir()
        try:
            await until(lambda: page.read_bytes()[0] > 1)
            if killed_at:
                injector = Injector(programs.by_way["healing"], target.pid, stop_at=killed_at)
                injector.wait_until_stopped()
                injector.send(signal.SIGKILL)
                injector.end()
                injector.close()
            await take_and_close(target.pid)

            async def agree(name: str, pid: int | None) -> bool:
                return True

            swrk = await spawn(locate_criu(None))
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), agree)
        finally:
            target.kill()
            target.wait()
        ticks = page.read_bytes()[:8]
        swrk = await spawn(locate_criu(None))
        pid = await swrk.restore(RestoreOptions(images_dir=images), agree)
        try:
            await until(lambda: page.read_bytes()[:8] != ticks)
            await take_and_close(pid)
            ticks = page.read_bytes()[:8]
            await until(lambda: page.read_bytes()[:8] != ticks)
            assert page.read_bytes()[8:16] == bytes(8)
        finally:
            os.kill(pid, signal.SIGKILL)


def launch(*command: str | Path, **options: Any) -> subprocess.Popen[Any]:
    """Start a process without an event loop's watching it; silent unless told otherwise."""
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(command, **(silent | options))


@contextlib.contextmanager
def held(programs: Programs, victim: Victim, stage: Stage) -> Iterator[None]:
    """Hold an injector of the victim at a stage meanwhile; it must succeed afterwards."""
    injector = Injector(programs.by_way["healing"], victim.pid, stop_at=stage)
    injector.wait_until_stopped()
    try:
        yield
    finally:
        injector.send(signal.SIGCONT)
        answer = injector.end()
        injector.close()
    assert answer
    assert answer.status is Status.OK, answer


def kill_at(programs: Programs, way: Way, victim: Victim, stage: Stage) -> None:
    injector = Injector(programs.by_way[way], victim.pid, stop_at=stage)
    injector.wait_until_stopped()
    assert injector.stage == stage
    injector.send(signal.SIGKILL)
    injector.end()
    injector.close()


def wake(victim: Victim, call: int) -> None:
    """End a victim's blocked call the way that it is meant to end."""
    if call in (PAUSE, SIGSUSPEND, FUTEX):
        os.kill(victim.pid, signal.SIGUSR1)
    elif call == ACCEPT:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0outlive-victim-{victim.pid}")
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(victim.pid)
        descriptor = libc.syscall(438, pidfd, victim.word(7), 0)
        os.write(descriptor, b"x")
        os.close(descriptor)
        os.close(pidfd)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def _cgroup2_mounts() -> list[str]:
    return [
        fields[1]
        for fields in map(str.split, Path("/proc/mounts").read_text().splitlines())
        if fields[2] == "cgroup2" and os.access(fields[1], os.W_OK)
    ]
