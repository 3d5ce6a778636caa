"""A workload on huge pages (hugetlb), private and shared ones, lives on with what it had in them."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.bundle import WorkloadPaths
from common.criu.images import MAP_HUGETLB, PE_PARENT, expand, page_images, read_memory_map, read_pagemap
from common.errors import StoreError
from common.model import PAGE_BYTES, WorkloadSpec
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Lab
from replica.store_reader import StoreReader

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

NAME = "huge"
HUGE_BYTES = 2 << 20
SHM_HUGETLB = 0o4000
POOL = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_BYTES >> 10}kB")
MAPPED = 6
"""Huge pages of the workload; as many again must be free for the standby to be ready."""

# Changes some pages of each mapping, zeroes one, and checks every byte against what ordinary memory has.
_WORKLOAD = f"""
import ctypes, mmap, time
flags = mmap.MAP_ANONYMOUS | {MAP_HUGETLB}
size = {MAPPED // 3 * HUGE_BYTES}
huge = [mmap.mmap(-1, size, kind | flags) for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, size, 0o1600 | {SHM_HUGETLB:#x})
huge.append(memoryview((ctypes.c_char * size).from_address(libc.shmat(segment, None, 0))).cast("B"))
known = [bytearray(size) for _ in huge]
turn = 0
for memory in (*huge, *known):
    for page in range(512): memory[page * 4096] = 1 + page % 250
while True:
    turn += 1
    for memory in (*huge, *known):
        memory[turn * 37 % 512 * 4096 + 5] = turn % 256
        memory[turn % 512 * 4096 : (turn % 512 + 1) * 4096] = bytes(4096)
    same = all(mine[:] == other for mine, other in zip(huge, known))
    print("good" if same else "BAD", turn, flush=True)
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def huge_pages() -> Iterator[None]:
    """Reserve what two copies of the workload map, beside what is in use; give it back afterwards."""
    count = POOL / "nr_hugepages"
    try:
        before = int(count.read_text())
        count.write_text(str(before + 2 * MAPPED))
    except OSError as error:
        pytest.skip(f"no huge pages can be reserved here: {error}")
    try:
        if int((POOL / "free_hugepages").read_text()) < 2 * MAPPED:
            pytest.skip("the kernel finds no memory in one piece for huge pages")
        yield
    finally:
        count.write_text(str(before))


@asynccontextmanager
async def protected() -> AsyncIterator[tuple[Lab, Node, Node]]:
    """The workload on host a, restorable on b from an epoch that stands on others."""
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=NAME,
            nodes=("a", "b"),
            command=(sys.executable, "-c", _WORKLOAD),
            right_to_lead="fence",
            epoch_interval_ms=200,
        )
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec])
        first, second = nodes["a"], nodes["b"]
        await start_all(nodes)
        await first.cli("start", NAME)

        async def grown() -> bool:
            try:
                newest = StoreReader.inspect(second.config.store_dir, NAME).newest
            except StoreError:  # it is not made yet
                return False
            return newest is not None and newest.levels >= 3

        await eventually(grown, what="an epoch stands on others")
        await second.wait_for(NAME, lambda w: w.restorable, what="restorable")
        yield lab, first, second


async def goes_on(output: Path) -> None:
    """Wait for several turns after a restore, all of them good and none of them the first."""

    def turns() -> list[tuple[str, str]]:
        text = output.read_text() if output.exists() else ""
        return re.findall(r"(good|BAD) (\d+)$", text, re.MULTILINE)

    async def enough() -> bool:
        return len(turns()) >= 5

    await eventually(enough, what=f"the workload goes on: {output}")
    assert {verdict for verdict, _ in turns()} == {"good"}
    assert int(turns()[0][1]) > 1


async def test_the_standby_takes_over_what_was_in_huge_pages() -> None:
    async with protected() as (lab, _, second):
        await lab.power_off("a")
        await second.wait_for(NAME, lambda w: w.state == "leading" and w.running, what="taken over")
        await goes_on(WorkloadPaths(second.config, NAME).log)


async def test_stock_criu_alone_restores_huge_pages_from_an_epoch_that_stands_on_others() -> None:
    async with protected() as (lab, _, second):
        await second.stop("keeper")
        await second.stop("agent")
        await lab.power_off("a")
        newest = StoreReader.inspect(second.config.store_dir, NAME).newest
        assert newest is not None
        lent_pages = 0
        for image in page_images(newest.path):
            numbers, flags = expand(read_pagemap(newest.path / image.key.pagemap_name).entries)
            lent = (flags & PE_PARENT) != 0
            if name := image.key.memory_map_name:
                own = read_memory_map(newest.path / name).without_parent(numbers)
                assert own.sum() * PAGE_BYTES == MAPPED // 3 * HUGE_BYTES
                assert not lent[own].any()
            lent_pages += int(lent.sum())
        assert lent_pages > 512  # ordinary memory, and shared huge pages
        script = f"cd {second.host.dir} && sh {newest.path}/RESTORE </dev/null >restore.out 2>&1"
        await second.host.run(["sh", "-c", script], timeout_s=30.0)
        await goes_on(second.host.dir / "restore.out")
