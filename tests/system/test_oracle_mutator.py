"""The memory oracle itself: it takes every path, finds what is planted, comes out of a real CRIU whole."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

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
from common.criu.images import SpaceKey, expand, page_images, read_pagemap
from common.criu.locate import locate_criu
from common.criu.rpc import DumpOptions, spawn
from common.errors import CaptureError
from common.model import PAGE_BYTES, EpochId, FilePath, WorkloadSpec
from tests.oracle.build import ask, build

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="it is to be dumped by criu, which needs root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the oracle is a C program"),
]

NAME = "oracle"
ANONYMOUS = 1
"""Kind of a region in the oracle's own map; see `enum region_kind`."""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("oracle"))


class Standalone:
    """The oracle as a plain process, and its memory from outside."""

    def __init__(self, program: Path, directory: Path, *options: str) -> None:
        self.scratch = directory / "scratch"
        self.scratch.mkdir(exist_ok=True)
        status = directory / "status"
        paths = ("--scratch", str(self.scratch), "--status", str(status))
        command = [str(program), *paths, "--bind", "127.0.0.1", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        until_s = time.monotonic() + 20
        while not status.exists():
            assert self.process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.02)
        self.port: int = json.loads(status.read_text())["port"]
        self._memory = os.open(f"/proc/{self.process.pid}/mem", os.O_RDWR)

    def ask(self, word: str) -> dict[str, Any]:
        return ask(self.port, word)

    def read(self, address: int, size: int = PAGE_BYTES) -> bytes:
        return os.pread(self._memory, size, address)

    def write(self, address: int, content: bytes) -> None:
        assert os.pwrite(self._memory, content, address) == len(content)

    def finds(self, address: int, content: bytes) -> str:
        """Plant something while all are parked, and take it away again; return what `check` said of it."""
        right = self.read(address, len(content))
        self.write(address, content)
        answer = self.ask("check")
        self.write(address, right)
        assert self.ask("check")["ok"], "and is content when it is gone"
        return "" if answer["ok"] else str(answer["error"])

    def end(self) -> None:
        os.close(self._memory)
        self.process.terminate()  # it removes its System V segment, which would outlive a kill
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def standalone(program: Path, tmp_path: Path) -> Iterator[Callable[..., Standalone]]:
    started: list[Standalone] = []

    def start(*options: str) -> Standalone:
        started.append(Standalone(program, tmp_path, *options))
        return started[-1]

    yield start
    for each in started:
        each.end()


def test_within_seconds_every_path_was_taken_and_all_is_well(standalone: Callable[..., Standalone]) -> None:
    oracle = standalone("--seed", "1")
    until_s = time.monotonic() + 60
    while (answer := oracle.ask("check"))["missing"]:
        assert answer["ok"], str(answer)
        assert time.monotonic() < until_s, answer["missing"]
        time.sleep(0.5)
    assert answer["ok"], answer
    assert not answer["restored"]
    assert answer["checked_pages"] > 8_000
    assert sum(answer["counters"].values()) == answer["steps"] > 1000
    assert answer["counters"]["idle"] < answer["steps"] / 5
    assert set(answer["unavailable"]) <= {"pageout"}  # there is no swap
    assert len(Path(f"/proc/{oracle.process.pid}/maps").read_text().splitlines()) < 500
    assert oracle.ask("stop")["ok"]
    assert oracle.process.wait(10) == 0


def test_one_wrong_byte_anywhere_is_found(standalone: Callable[..., Standalone]) -> None:
    oracle = standalone("--seed", "2", "--memory-mib", "16")
    time.sleep(1)
    assert oracle.ask("pause")["ok"]
    places = oracle.ask("map")
    region = next(each for each in places["regions"] if each["kind"] == ANONYMOUS and not each["prot_count"])
    thread = places["threads"][1]
    for address, words in (
        (region["addr"] + 1234, r"region \d+ .* page 0 .* 1 words wrong"),
        (region["addr"] + region["pages"] * PAGE_BYTES - 1, "1 words wrong"),
        (places["ledger"][0][0] + region["slot"] * 4096 * 64, "ledger"),
        (places["ledger"][1][0] + region["slot"] * 4096 * 64 + 8, "ledger"),
        (places["ledger"][4][0] + region["slot"] * 128 + 8, "copies of its record differ"),
        (thread["log"] + 40, "log entry"),
        (thread["worker"], "counters tell"),
        (thread["stack_ring"] + 800, "stack ring"),
        (thread["tls_ring"] + 800, "thread-local ring"),
        (thread["heap_ring"] + 800, "heap ring"),
        (thread["static_ring"] + 800, "static ring"),
    ):
        (byte,) = oracle.read(address, 1)
        assert re.search(words, oracle.finds(address, bytes([byte ^ 0x10])))


def test_a_page_that_is_older_than_the_rest_is_found_even_with_an_equally_old_ledger(
    standalone: Callable[..., Standalone],
) -> None:
    # Pages that were given free may be zeros, and then zeros are not wrong.
    oracle = standalone("--seed", "3", "--memory-mib", "16", "--without", "free")
    time.sleep(1)
    choice = random.Random(3)

    def snapshot() -> tuple[dict[int, bytes], dict[int, bytes]]:
        assert oracle.ask("pause")["ok"]
        places = oracle.ask("map")
        regions = [each for each in places["regions"] if each["kind"] == ANONYMOUS]
        pages = {
            address: oracle.read(address)
            for region in regions
            for address in range(region["addr"], region["addr"] + region["pages"] * PAGE_BYTES, PAGE_BYTES)
        }
        ledger = {
            start + (region["slot"] * 4096 + page) * 64
            for start, _ in places["ledger"][:2]
            for region in regions
            for page in range(0, region["pages"], 64)
        }
        return pages, {address: oracle.read(address) for address in ledger}

    before, ledger_before = snapshot()
    oracle.ask("resume")
    time.sleep(0.3)
    after, ledger_after = snapshot()
    changed = [each for each in after if before.get(each, after[each]) != after[each]]
    assert len(changed) > 20
    for address in choice.sample(changed, 20):
        assert re.search(r"words wrong", oracle.finds(address, before[address]))
    for address in choice.sample([each for each in changed if any(after[each])], 5):
        assert re.search(r"got words zeros", oracle.finds(address, bytes(PAGE_BYTES)))
    older = [each for each in ledger_before if ledger_before[each] != ledger_after.get(each, b"")]
    older = [each for each in older if each in ledger_after]
    assert len(older) > 5
    for address in choice.sample(older, 5):
        assert oracle.finds(address, ledger_before[address])
    # All of memory and all of the ledger as of before: they agree with each other. The registers do not.
    for address in older:
        oracle.write(address, ledger_before[address])
    for address in changed:
        oracle.write(address, before[address])
    assert not oracle.ask("check")["ok"]


def test_without_file_changes_the_scratch_files_are_the_seeds_and_stay(
    program: Path, tmp_path: Path, standalone: Callable[..., Standalone]
) -> None:
    def digests(directory: Path) -> dict[str, str]:
        return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in directory.iterdir()}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([program, "--prepare", "--seed", "4", "--scratch", elsewhere], check=True)
    oracle = standalone("--seed", "4", "--no-file-changes", "--only", "file_cow,file_dontneed,direct_read")
    time.sleep(0.5)
    answer = oracle.ask("check")
    assert answer["ok"], answer
    counted = {path for path, count in answer["counters"].items() if count and path.startswith("file")}
    assert counted == {"file_cow", "file_dontneed"}
    assert answer["missing"] == []
    assert digests(oracle.scratch) == digests(elsewhere) != {}


class Contained:
    """The oracle in a container, dumped and restored from container to container."""

    def __init__(self, directory: Path, number: int, program: Path, *options: str) -> None:
        self._directory = directory
        self.configs = [
            NodeConfig(
                node=Node(
                    name=f"n{each}",
                    address="127.0.0.1",
                    state_dir=str(directory / f"n{each}/state"),
                    run_dir=str(directory / f"n{each}/run"),
                    image_dir=str(directory / f"n{each}/images"),
                    cgroup_parent=f"/outlive/oracle-{os.getpid()}-{each}",
                )
            )
            for each in range(2)
        ]
        self.config = self.configs[0]
        self.dumps = 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        scratch = directory / "scratch"
        scratch.mkdir()
        words = (
            "--seed",
            str(number),
            "--scratch",
            "/scratch",
            "--port",
            str(self.port),
            "--memory-mib",
            "32",
        )
        self.spec = WorkloadSpec(
            name=NAME,
            nodes=("n0",),
            command=(str(program), *words, *options),
            files=(FilePath(path="/scratch", source=str(scratch)),),
        )

    async def start(self) -> None:
        await start_workload(self.config, self.spec)
        for _ in range(200):
            try:
                await self.ask("counters")
                return
            except OSError:
                await asyncio.sleep(0.05)
        raise AssertionError("the oracle does not listen")

    async def ask(self, word: str) -> dict[str, Any]:
        return await asyncio.to_thread(ask, self.port, word)

    async def dump(self) -> Path:
        """Dump it as the agent does; it runs on. A dump into a vfork may fail, so there are two tries."""
        pid, paths = running_init_pid(self.config, NAME), WorkloadPaths(self.config, NAME)
        assert pid is not None

        async def agree(hook: str, pid: int | None) -> bool:
            return True

        for tries_left in (1, 0):
            self.dumps += 1
            images = self._directory / f"images-{self.dumps}"
            images.mkdir()
            (images / "descriptors.json").write_text(json.dumps(standard_streams(pid)))
            external = tuple(mount.external for mount in bind_mounts(self.spec, paths))
            options = DumpOptions(
                pid=pid, images_dir=images, work_dir=paths.bundle, root=paths.rootfs, external=external
            )
            try:
                await (await spawn(locate_criu(None))).dump(options, agree)
            except CaptureError:
                if not tries_left:
                    raise
                continue
            return images
        raise AssertionError("not reached")

    async def restore(self, images: Path) -> None:
        """Kill it and bring it back from the images, in the other of two containers."""
        await kill_workload(self.config, NAME)
        self.config = self.configs[1] if self.config is self.configs[0] else self.configs[0]
        await restore_workload(self.config, self.spec, images, EpochId(1, self.dumps), locate_criu(None))

    async def end(self) -> None:
        for config in self.configs:
            await kill_workload(config, NAME)
            for directory in cgroup_directories(config.node.cgroup_parent):
                for group in (*directory.glob("*/"), directory):
                    group.rmdir()


@pytest.fixture
async def contained(program: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Contained]]:
    made: list[Contained] = []

    def make(seed: int, *options: str) -> Contained:
        made.append(Contained(tmp_path, seed, program, *options))
        return made[-1]

    yield make
    for each in made:
        await each.end()


async def test_dumped_at_any_moment_and_restored_later_it_is_whole_and_goes_on(
    contained: Callable[..., Contained],
) -> None:
    oracle = contained(5, "--no-file-changes")
    await oracle.start()
    choice = random.Random(5)
    children = 0
    for _ in range(4):
        await asyncio.sleep(choice.uniform(0.3, 1.0))
        images = await oracle.dump()
        await asyncio.sleep(choice.uniform(0.0, 0.5))
        at_the_end = (await oracle.ask("counters"))["steps"]
        await oracle.restore(images)
        first = await oracle.ask("counters")
        await asyncio.sleep(0.3)
        answer = await oracle.ask("check")
        assert answer["ok"], str(answer)
        assert answer["restored"]
        # It waits to be checked; only the steps that were under way were finished.
        assert first["steps"] <= answer["steps"] < at_the_end
        assert answer["steps"] - first["steps"] <= 8
        children += answer["checked_children"]
        await asyncio.sleep(0.3)
        later = await oracle.ask("check")
        assert later["ok"], str(later)
        assert not later["restored"]
        assert later["steps"] > answer["steps"] + 100
    assert children > 0


async def test_paused_it_may_change_its_files_as_well(contained: Callable[..., Contained]) -> None:
    oracle = contained(6)
    await oracle.start()
    await asyncio.sleep(2)
    assert (await oracle.ask("pause"))["ok"]
    images = await oracle.dump()
    await oracle.restore(images)
    answer = await oracle.ask("check")
    assert answer["ok"], answer
    assert answer["counters"]["file_truncate"] > 0
    await oracle.ask("resume")
    await asyncio.sleep(0.3)
    assert (await oracle.ask("check"))["steps"] > answer["steps"]


async def test_a_page_of_an_older_image_in_a_newer_one_is_found(contained: Callable[..., Contained]) -> None:
    oracle = contained(7)
    await oracle.start()
    await asyncio.sleep(1)
    older = await oracle.dump()
    await asyncio.sleep(0.2)
    assert (await oracle.ask("pause"))["ok"]
    newer = await oracle.dump()
    regions = [each for each in (await oracle.ask("map"))["regions"] if each["kind"] == ANONYMOUS]
    data = {
        region["addr"] // PAGE_BYTES + page
        for region in regions
        for page in range(region["pages"])
        if page < region["prot_first"] or page >= region["prot_first"] + region["prot_count"]
    }
    (name, old), (_, new) = _pages(older), _pages(newer)
    changed = [each for each in new if each in data and each in old and old[each] != new[each]]
    assert len(changed) > 20
    page = random.Random(7).choice(changed)
    with (newer / name).open("r+b") as file:
        file.seek(list(new).index(page) * PAGE_BYTES)
        file.write(old[page])
    await oracle.restore(newer)
    answer = await oracle.ask("check")
    assert not answer["ok"]
    assert f"at {page * PAGE_BYTES:#x}: " in answer["error"]


def _pages(images: Path) -> tuple[str, dict[int, bytes]]:
    """Return the name of the file with the main process's pages, and each by its number, in file order."""
    image = next(each for each in page_images(images) if each.key == SpaceKey("task", 1))
    numbers, _ = expand(read_pagemap(images / image.key.pagemap_name).entries)
    content = (images / image.pages_name).read_bytes()
    return image.pages_name, {
        int(number): content[row * PAGE_BYTES : (row + 1) * PAGE_BYTES] for row, number in enumerate(numbers)
    }
