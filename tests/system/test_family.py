"""Trees of processes, captured by the fast backend: page for page what stock CRIU dumps at that instant."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.container import workload_pids
from common.errors import CaptureError
from common.model import EpochId
from primary import userfault
from primary.fast import FastBackend
from tests.campaigns import family
from tests.campaigns.oracle_planted import altered
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


async def test_what_cannot_be_copied_early_is_copied_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    def failing(backend: FastBackend) -> None:
        nonlocal tried
        tried += 1
        raise MemoryError("no memory")

    monkeypatch.setattr(FastBackend, "_take_early", failing)
    numbers = epochs()
    async with running_subject(family_of("steady", 4, 4)) as subject:
        await grown(subject, 4)
        for _ in range(3):
            captured, wrong, _ = await subject.compare(next(numbers), None)
            assert not wrong
            captured.release()
    assert tried >= 3


@dataclass
class Restless:
    """What became of epochs of a family that comes and goes."""

    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


async def restless(wanted: int) -> Restless:
    found, taken = Restless(), 0
    async with running_subject(family_of("restless", 6, 4)) as subject:
        await grown(subject, 6)
        numbers = epochs()
        while taken < wanted and len(found.refused) < 60 and not found.wrong:
            epoch = next(numbers)
            try:
                if epoch.epoch % 2:
                    captured, found.wrong, _ = await subject.compare(epoch, None)
                    found.compared += 1
                else:
                    captured = await subject.fast.capture(epoch, None)
            except CaptureError as error:  # a vfork that has not executed anything yet, for one
                found.refused.append(error.message)
                continue
            captured.release()
            taken += 1
    return found


async def test_processes_that_come_and_go_are_captured_as_they_are() -> None:
    found = await restless(40)
    assert not found.wrong
    assert found.compared > 5
    assert len(found.refused) < 60, found


async def test_a_pagemap_kept_open_over_exec_takes_no_epoch_for_a_whole_one() -> None:
    """A planted bug: the address space that it is of is gone, of which newer kernels tell."""
    with altered(
        (
            "pages.c",
            "\treturn open(path, flags | O_CLOEXEC);",
            "\tstatic int kept[1 << 16];\n"
            '\tconst bool one = !strcmp(name, "pagemap") && pid < 1 << 16;\n'
            "\tif (one && !kept[pid])\n"
            "\t\tkept[pid] = open(path, O_RDWR | O_CLOEXEC);\n"
            "\treturn one ? dup(kept[pid]) : open(path, flags | O_CLOEXEC);",
        )
    ):
        found = await restless(1000)
    assert found.wrong or sum("No such process" in each for each in found.refused) > 30, found
