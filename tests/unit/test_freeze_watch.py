"""The thaw deadline, against processes called criu."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import WorkloadError
from outlive.freeze_watch import FreezeWatch, is_criu


class World:
    """What was thawed and told."""

    def __init__(self) -> None:
        self.thawed: list[str] = []
        self.told: list[str] = []
        self.watch = FreezeWatch(
            thaw=self.thawed.append, released=lambda name, reason: self.told.append(reason)
        )


@pytest.fixture
def criu(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = tmp_path / "criu"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "1000"], preexec_fn=_ignore_alarm)
    yield process
    process.kill()
    process.wait()


def _ignore_alarm() -> None:
    """Be a criu that does not give up when it is asked to."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def test_criu_is_continued_at_the_freeze_deadline_and_killed_at_the_thaw_deadline(
    criu: subprocess.Popen[bytes],
) -> None:
    world = World()
    began_s = time.monotonic()
    world.watch.announce("w", criu.pid, 1200)
    criu.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.1)
    assert is_stopped(criu.pid)
    await asyncio.sleep(0.3)
    assert not is_stopped(criu.pid)
    assert world.thawed == []
    assert await asyncio.to_thread(criu.wait, 5) == -signal.SIGKILL
    assert 1.1 < time.monotonic() - began_s < 1.6
    await asyncio.sleep(0.4)
    assert set(world.thawed) == {"w"}
    assert len(world.told) == 1
    assert world.watch.watched == 0


async def test_the_end_of_the_freeze_ends_the_watch(criu: subprocess.Popen[bytes]) -> None:
    world = World()
    world.watch.announce("w", criu.pid, 100)
    world.watch.end("w", criu.pid)
    await asyncio.sleep(0.3)
    assert criu.poll() is None
    assert world.thawed == []
    assert world.watch.watched == 0


async def test_a_criu_that_ended_without_a_word_still_thaws_the_workload(
    criu: subprocess.Popen[bytes],
) -> None:
    world = World()
    world.watch.announce("w", criu.pid, 100)
    criu.kill()
    criu.wait()
    await asyncio.sleep(0.5)
    assert set(world.thawed) == {"w"}
    assert "had ended" in world.told[0]


async def test_nothing_but_criu_is_watched() -> None:
    world = World()
    with pytest.raises(WorkloadError):
        world.watch.announce("w", os.getpid(), 1000)
    with pytest.raises(WorkloadError):
        world.watch.announce("w", 2**22 - 1, 1000)


async def test_a_keeper_that_stops_waits_for_the_freezes_under_way(criu: subprocess.Popen[bytes]) -> None:
    world = World()
    world.watch.announce("w", criu.pid, 5000)
    draining = asyncio.create_task(world.watch.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    with pytest.raises(WorkloadError):
        world.watch.announce("w", criu.pid, 5000)
    world.watch.end("w", criu.pid)
    await asyncio.wait_for(draining, 1)
    assert criu.poll() is None


def test_criu_is_recognised_through_a_script_that_becomes_it(tmp_path: Path) -> None:
    script = tmp_path / "criu"
    script.write_text("#!/bin/sh\nsleep 1000 & wait\n")
    script.chmod(0o700)
    process = subprocess.Popen([str(script), "swrk", "3"], start_new_session=True)
    try:
        time.sleep(0.1)
        assert is_criu(process.pid)
        assert not is_criu(os.getpid())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def test_criu_is_asked_to_give_up_before_it_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "1000"])  # noqa: ASYNC220 - this one does listen
    world = World()
    began_s = time.monotonic()
    world.watch.announce("w", process.pid, 1200)
    assert await asyncio.to_thread(process.wait, 5) == -signal.SIGALRM
    assert 0.6 < time.monotonic() - began_s < 1.1
    await asyncio.sleep(0.9)
    assert set(world.thawed) == {"w"}
