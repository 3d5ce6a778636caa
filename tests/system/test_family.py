"""Trees of processes, captured by the fast backend: page for page what stock CRIU dumps at that instant."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.container import workload_pids
from common.errors import CaptureError
from common.model import EpochId
from primary import userfault
from tests.campaigns import family
from tests.campaigns.twins import NAME, Replica, Subject, restored_elsewhere, running_subject

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(bool(userfault.problem()), reason="userfaultfd cannot track writes here"),
]


def family_of(kind: str, processes: int, threads: int):
    def command(directory: Path) -> tuple[str, ...]:
        program = shutil.copy(family.__file__, directory)
        return (sys.base_prefix + "/bin/python3", str(program), kind, str(processes), str(threads))

    return command


async def grown(subject: Subject, processes: int) -> None:
    until_s = time.monotonic() + 30
    while len(workload_pids(subject.config, NAME)) < processes:
        assert time.monotonic() < until_s, workload_pids(subject.config, NAME)
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # threads, and processes that their parents make


def epochs() -> Iterator[EpochId]:
    number = 0
    while True:
        yield EpochId(1, number := number + 1)


@pytest.mark.parametrize(("processes", "threads"), [(64, 2), (2, 500)])
async def test_many_processes_and_many_threads_are_captured_and_come_to_life(
    processes: int, threads: int
) -> None:
    numbers = epochs()
    async with running_subject(family_of("steady", processes, threads)) as subject:
        await grown(subject, processes)
        replica = Replica(subject.directory / "store", subject.config, subject.spec)
        for turn in range(6):
            if turn % 2:
                captured, wrong, pages = await subject.compare(next(numbers), replica.holds)
                assert not wrong
                assert pages > processes * 256
            else:
                captured = await subject.fast.capture(next(numbers), replica.holds)
            assert len([s for s in captured.spaces if s.key.kind == "task"]) == processes
            await asyncio.to_thread(replica.take, captured)
            captured.release()
        newest = replica.store.records()[-1]
        assert not await restored_elsewhere(subject, newest.path, newest.id, processes=processes)
        replica.store.close()


async def test_processes_that_come_and_go_are_captured_as_they_are() -> None:
    taken = refused = compared = 0
    async with running_subject(family_of("restless", 6, 4)) as subject:
        await grown(subject, 6)
        for epoch in epochs():
            try:
                if epoch.epoch % 2:
                    captured, wrong, _ = await subject.compare(epoch, None)
                    assert not wrong
                    compared += 1
                else:
                    captured = await subject.fast.capture(epoch, None)
            except CaptureError:  # a vfork that has not executed anything yet, for one
                refused += 1
                assert refused < 60, f"{taken} taken"
                continue
            captured.release()
            taken += 1
            if taken == 40:
                break
    assert compared > 5
