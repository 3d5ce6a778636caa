"""A real criu dumps a real process: its images against our codec, and what failures do to the process."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.criu import rpc
from common.criu.images import (
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    ImageKind,
    SpaceKey,
    compress,
    expand,
    page_images,
    parse_image,
    read_memory_map,
    read_open_files,
    read_pagemap,
    serialize_image,
    serialize_pagemap,
)
from common.criu.locate import locate_criu
from common.criu.rpc import DumpOptions, RestoreOptions, Swrk, spawn
from common.errors import CaptureError, RestoreError, StoreError

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="criu needs root"),
]

# Counts in a shared mapping, so that we see from outside whether it runs. The rest is there to be found in
# the images: a shared segment, a listening socket, unix sockets, an open file, memory in scattered pages.
_TARGET = """
import mmap, os, socket, sys, time
ticks = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
shared = mmap.mmap(-1, 1 << 20, mmap.MAP_SHARED); shared[0] = 1; shared[4096 * 7] = 1
private = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE)
for page in range(0, 256, 3): private[page * 4096] = 1
listener = socket.create_server(("127.0.0.1", 0))
left, right = socket.socketpair()
log = open(sys.argv[2], "w"); log.write("hello"); log.flush()
count = 0
while True:
    count += 1
    ticks[0:8] = count.to_bytes(8, "little")
    time.sleep(0.001)
"""


class Target:
    """A process to dump, and whether it runs."""

    def __init__(self, directory: Path) -> None:
        self._ticks = directory / "ticks"
        self._ticks.write_bytes(bytes(4096))
        self.log = directory / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TARGET, str(self._ticks), str(self.log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        assert self.runs_within(10)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ticks(self) -> int:
        return int.from_bytes(self._ticks.read_bytes()[:8], "little")

    def runs_within(self, seconds: float) -> bool:
        before, until = self.ticks, time.monotonic() + seconds
        while time.monotonic() < until:
            if self.ticks > before + 2:
                return True
            time.sleep(0.002)
        return False

    def stands_still(self) -> bool:
        before = self.ticks
        time.sleep(0.05)
        return self.ticks == before

    def is_traced(self) -> bool:
        return "TracerPid:\t0\n" not in Path(f"/proc/{self.pid}/status").read_text()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    target = Target(tmp_path)
    try:
        yield target
    finally:
        with contextlib.suppress(ProcessLookupError):
            target.process.send_signal(signal.SIGCONT)
        target.process.kill()
        target.process.wait()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


@pytest.fixture
async def swrk() -> Swrk:
    return await spawn(locate_criu(None))


async def agree(hook: str, pid: int | None) -> bool:
    return True


def runs_untraced(target: Target) -> bool:
    return target.process.poll() is None and target.runs_within(2) and not target.is_traced()


class TestDump:
    async def test_leaves_the_process_running_and_calls_the_hooks_in_order(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        seen: list[tuple[str, bool]] = []

        async def hook(name: str, pid: int | None) -> bool:
            seen.append((name, target.stands_still()))
            return True

        result = await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook)

        assert seen == [("pre-dump", False), ("query-ext-files", True), ("post-dump", True)]
        assert result.hooks == tuple(name for name, _ in seen)
        assert result.stats.pages_written > 300
        assert 50_000 < result.stats.frozen_us < 2_000_000
        assert runs_untraced(target)
        assert not Path(f"/proc/{swrk.pid}").exists()

    async def test_each_image_kind_round_trips_byte_for_byte(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        await swrk.dump(DumpOptions(pid=target.pid, images_dir=images, cpu_cap=0), agree)

        kinds = set()
        for path in sorted(images.iterdir()):
            data = path.read_bytes()
            with contextlib.suppress(StoreError):
                image = parse_image(data, path.name)
                assert serialize_image(image) == data, path.name
                kinds.add(image.kind)
        assert kinds >= {
            ImageKind.INVENTORY,
            ImageKind.PSTREE,
            ImageKind.PAGEMAP,
            ImageKind.MM,
            ImageKind.FILES,
            ImageKind.FDINFO,
            ImageKind.CPUINFO,
            ImageKind.STATS,
        }

    async def test_pagemaps_round_trip_and_name_every_page(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        result = await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), agree)

        spaces = page_images(images)
        assert SpaceKey("task", target.pid) in [space.key for space in spaces]
        assert [space.key.kind for space in spaces].count("shmem") == 1
        for space in spaces:
            path = images / space.key.pagemap_name
            pagemap = read_pagemap(path)
            assert serialize_pagemap(pagemap) == path.read_bytes()
            assert pagemap.count(PE_PRESENT) * 4096 == (images / space.pages_name).stat().st_size
            page_numbers, flags = expand(pagemap.entries)
            assert expand(compress(page_numbers, flags))[0].tolist() == page_numbers.tolist()
        written = sum(read_pagemap(images / space.key.pagemap_name).count(PE_PRESENT) for space in spaces)
        assert written == result.stats.pages_written + result.stats.shared_pages_written

    async def test_images_say_what_the_process_has_open_and_mapped(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), agree)

        files = read_open_files(images / "files.img")
        log = next(file for file in files.regular if file.path == str(target.log))
        assert (log.size, log.pos, log.writable) == (5, 5, True)
        interpreter = next(f for f in files.regular if f.path == os.path.realpath(sys.executable))
        assert interpreter.mode == os.stat(sys.executable).st_mode
        assert not interpreter.writable
        listening = [(s.source, s.state) for s in files.inet if s.source_port]
        assert listening == [("127.0.0.1", 10)]
        assert len(files.unix) == 2
        assert {files.unix[0].peer, files.unix[1].peer} == {socket.inode for socket in files.unix}

        memory = read_memory_map(images / f"mm-{target.pid}.img")
        maps = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
        starts = {int(line.split("-")[0], 16) for line in maps if "vsyscall" not in line}
        assert {vma.start for vma in memory.vmas} <= starts | {0xFFFFFFFFFF600000}
        assert sum(1 for vma in memory.vmas if vma.status & VMA_ANON_PRIVATE) > 3


class TestRestore:
    async def test_brings_the_process_back_with_its_pid_and_memory(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        options = DumpOptions(pid=target.pid, images_dir=images, leave_running=False)
        await swrk.dump(options, agree)
        target.process.wait()
        ticks = target.ticks

        restore = await spawn(locate_criu(None))
        pid = await restore.restore(RestoreOptions(images_dir=images), agree)
        try:
            assert pid == target.pid
            assert target.runs_within(2)
            assert ticks < target.ticks < ticks + 10_000
        finally:
            os.kill(pid, signal.SIGKILL)

    async def test_of_nothing_says_why(self, images: Path, swrk: Swrk) -> None:
        with pytest.raises(RestoreError, match="Unexpected EOF"):
            await swrk.restore(RestoreOptions(images_dir=images), agree)


class TestFailingDump:
    async def test_of_a_process_that_is_not_there_names_the_log(self, images: Path, swrk: Swrk) -> None:
        with pytest.raises(CaptureError, match="criu could not dump process 999999") as caught:
            await swrk.dump(DumpOptions(pid=999999, images_dir=images), agree)
        assert "No such process" in caught.value.message
        assert str(images / "dump.log") in caught.value.hint

    @pytest.mark.parametrize("refused", ["pre-dump", "query-ext-files", "post-dump"])
    async def test_a_hook_that_is_answered_no_lets_the_process_run(
        self, target: Target, images: Path, swrk: Swrk, refused: str
    ) -> None:
        async def hook(name: str, pid: int | None) -> bool:
            return name != refused

        with pytest.raises(CaptureError, match=f"{refused} was answered no"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook)
        assert runs_untraced(target)

    async def test_what_a_hook_raises_comes_out_after_criu_has_ended(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                raise LookupError("the disk is full")
            return True

        with pytest.raises(LookupError, match="the disk is full"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook)
        assert not Path(f"/proc/{swrk.pid}").exists()
        assert runs_untraced(target)

    async def test_criu_thaws_by_itself_if_we_hang_in_a_hook(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        thawed_after_s: list[float] = []

        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                assert target.stands_still()
                started = time.monotonic()
                # Blocks the event loop, as a hung or stopped agent would be.
                assert target.runs_within(5)
                thawed_after_s.append(time.monotonic() - started)
            return True

        with pytest.raises(CaptureError, match="Resource temporarily unavailable"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images, answer_timeout_s=0.5), hook)
        print(f"thawed {thawed_after_s[0]:.3f} s after the hook began")
        assert 0.3 < thawed_after_s[0] < 2
        assert runs_untraced(target)

    async def test_past_the_deadline_a_slow_hook_is_cut_off_and_the_process_runs(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                await asyncio.sleep(60)
            return True

        started = time.monotonic()
        with pytest.raises(CaptureError, match=r"longer than 0\.3 s and ended after a no"):
            await swrk.dump(
                DumpOptions(pid=target.pid, images_dir=images, deadline_s=0.3, answer_timeout_s=30), hook
            )
        assert time.monotonic() - started < 2
        assert runs_untraced(target)

    async def test_cancelling_the_dump_ends_criu_and_lets_the_process_run(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        frozen = asyncio.Event()

        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                frozen.set()
                await asyncio.sleep(60)
            return True

        dump = asyncio.create_task(swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook))
        await frozen.wait()
        dump.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dump
        assert not Path(f"/proc/{swrk.pid}").exists()
        assert runs_untraced(target)

    async def test_criu_killed_while_frozen_lets_the_process_run(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                os.kill(swrk.pid, signal.SIGKILL)
            return True

        with pytest.raises(CaptureError, match="killed by signal 9"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook)
        assert runs_untraced(target)

    async def test_criu_stopped_and_continued_while_it_waits_for_us_fails_and_thaws(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        # A receive with a time limit is not restarted after a stop (signal(7)), so criu sees an error.
        async def hook(name: str, pid: int | None) -> bool:
            if name == "post-dump":
                await asyncio.sleep(0.1)  # until it is inside the receive
                os.kill(swrk.pid, signal.SIGSTOP)
                await asyncio.sleep(0.1)
                os.kill(swrk.pid, signal.SIGCONT)
                await asyncio.sleep(0.1)
            return True

        with pytest.raises(CaptureError, match="Interrupted system call"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images), hook)
        assert runs_untraced(target)

    async def test_a_criu_that_stays_stopped_is_continued_and_ended(
        self, target: Target, images: Path, swrk: Swrk
    ) -> None:
        async def hook(name: str, pid: int | None) -> bool:
            if name == "query-ext-files":
                os.kill(swrk.pid, signal.SIGSTOP)
            return True

        with pytest.raises(CaptureError, match=r"longer than 0\.3 s and ended after a"):
            await swrk.dump(DumpOptions(pid=target.pid, images_dir=images, deadline_s=0.3), hook)
        assert runs_untraced(target)


class TestSwrk:
    async def test_abandoned_unused_ends_by_itself(self, swrk: Swrk) -> None:
        assert await swrk.abandon() == "by itself"
        assert not Path(f"/proc/{swrk.pid}").exists()

    async def test_tells_its_version_and_features(self) -> None:
        criu = locate_criu(None)
        assert (await (await spawn(criu)).version()).major >= 4
        features = await (await spawn(criu)).features()
        assert isinstance(features, rpc.Features)

    async def test_cpu_that_was_recorded_here_is_good_here(self, images: Path) -> None:
        criu = locate_criu(None)
        await (await spawn(criu)).cpuinfo_dump(images)
        await (await spawn(criu)).cpuinfo_check(images)
