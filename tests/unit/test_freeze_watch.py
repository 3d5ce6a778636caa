"""The thaw deadline, against processes called criu."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from common.errors import WorkloadError
from outlive.freeze_records import FreezeRecord, FreezeRecords
from outlive.freeze_watch import FreezeWatch, is_criu


class World:
    """A keeper's watch, what was thawed and told; another one over the same directory is the next keeper."""

    def __init__(self, run_dir: Path, boot_id: str = "boot") -> None:
        self.thawed: list[str] = []
        self.told: list[str] = []
        self.records = run_dir / "freezes"
        self.watch = FreezeWatch(
            thaw=self.thawed.append,
            released=lambda name, reason: self.told.append(reason),
            records=FreezeRecords(run_dir, boot_id),
        )

    async def killed(self) -> None:
        """Lose the watches as SIGKILL loses them: without a word, and with the records left."""
        for task in self.watch._watches.values():
            task.cancel()
        await asyncio.sleep(0)

    def on_record(self) -> list[str]:
        return [path.name for path in self.records.iterdir()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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
    world: World, criu: subprocess.Popen[bytes]
) -> None:
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


async def test_the_end_of_the_freeze_ends_the_watch(world: World, criu: subprocess.Popen[bytes]) -> None:
    world.watch.announce("w", criu.pid, 100)
    world.watch.end("w", criu.pid)
    await asyncio.sleep(0.3)
    assert criu.poll() is None
    assert world.thawed == []
    assert world.watch.watched == 0


async def test_a_criu_that_ended_without_a_word_still_thaws_the_workload(
    world: World, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 100)
    criu.kill()
    criu.wait()
    await asyncio.sleep(0.5)
    assert set(world.thawed) == {"w"}
    assert "had ended" in world.told[0]


async def test_nothing_but_criu_is_watched(world: World) -> None:
    with pytest.raises(WorkloadError):
        world.watch.announce("w", os.getpid(), 1000)
    with pytest.raises(WorkloadError):
        world.watch.announce("w", 2**22 - 1, 1000)


async def test_a_keeper_that_stops_waits_for_the_freezes_under_way(
    world: World, criu: subprocess.Popen[bytes]
) -> None:
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


async def test_criu_is_asked_to_give_up_before_it_is_killed(world: World, tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "1000"])  # noqa: ASYNC220 - this one does listen
    began_s = time.monotonic()
    world.watch.announce("w", process.pid, 1200)
    assert await asyncio.to_thread(process.wait, 5) == -signal.SIGALRM
    assert 0.6 < time.monotonic() - began_s < 1.1
    await asyncio.sleep(0.9)
    assert set(world.thawed) == {"w"}


# --- a keeper that was killed in the middle of a freeze ----------------------------------------------


async def test_the_next_keeper_releases_what_a_criu_past_its_time_holds(
    world: World, tmp_path: Path, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 100)
    await world.killed()
    criu.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.3)
    again = World(tmp_path)
    began_s = time.monotonic()
    again.watch.resume()
    assert again.watch.watched == 1
    await asyncio.sleep(0.2)
    assert not is_stopped(criu.pid), "it is continued, and asked, before it is killed"
    assert await asyncio.to_thread(criu.wait, 5) == -signal.SIGKILL
    assert 0.9 < time.monotonic() - began_s < 1.5
    await asyncio.sleep(0.4)
    assert set(again.thawed) == {"w"}
    assert len(again.told) == 1
    assert again.on_record() == []


async def test_the_next_keeper_leaves_a_freeze_the_time_it_was_given(
    world: World, tmp_path: Path, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 1800)
    await world.killed()
    again = World(tmp_path)
    began_s = time.monotonic()
    again.watch.resume()
    assert await asyncio.to_thread(criu.wait, 5) == -signal.SIGKILL
    assert 1.6 < time.monotonic() - began_s < 2.2


async def test_a_freeze_that_ends_under_the_next_keeper_is_left_alone(
    world: World, tmp_path: Path, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 100)
    await world.killed()
    again = World(tmp_path)
    again.watch.resume()
    again.watch.end("w", criu.pid)
    await asyncio.sleep(1.2)
    assert criu.poll() is None
    assert again.thawed == []
    assert again.on_record() == []


async def test_what_a_criu_that_ended_meanwhile_left_is_thawed_at_once(
    world: World, tmp_path: Path, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 100)
    await world.killed()
    criu.kill()
    criu.wait()
    again = World(tmp_path)
    again.watch.resume()
    assert again.thawed == ["w"]
    assert again.told == [], "nothing was forced"
    assert again.watch.watched == 0
    assert again.on_record() == []


@pytest.mark.parametrize("what", ["another start", "another boot", "half written"])
async def test_no_process_is_signalled_for_a_record_that_is_not_its_own(
    world: World, tmp_path: Path, criu: subprocess.Popen[bytes], what: str
) -> None:
    world.watch.announce("w", criu.pid, 100)
    await world.killed()
    file = world.records / f"{criu.pid}.json"
    record = msgspec.json.decode(file.read_bytes(), type=FreezeRecord)
    if what == "another start":
        other = msgspec.structs.replace(record, started_ticks=record.started_ticks - 1)
        file.write_bytes(msgspec.json.encode(other))
    elif what == "half written":
        file.write_bytes(b"")
    again = World(tmp_path, "next boot" if what == "another boot" else "boot")
    again.watch.resume()
    assert again.watch.watched == 0
    await asyncio.sleep(1.2)
    assert criu.poll() is None
    assert again.on_record() == []


async def test_a_freeze_is_on_record_from_its_announcement_to_its_end(
    world: World, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 5000)
    assert world.on_record() == [f"{criu.pid}.json"]
    world.watch.end("w", criu.pid)
    assert world.on_record() == []


async def test_nothing_is_frozen_that_cannot_be_put_on_record(
    world: World, criu: subprocess.Popen[bytes]
) -> None:
    world.records.rmdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorkloadError, match="cannot be written"):
        world.watch.announce("w", criu.pid, 5000)
    assert world.watch.watched == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_watch_that_is_forgotten_does_nothing_and_is_on_record_no_more(
    world: World, criu: subprocess.Popen[bytes]
) -> None:
    world.watch.announce("w", criu.pid, 1200)
    assert world.watch.watches("w")
    assert not world.watch.watches("other")
    world.watch.forget("other")
    assert world.watch.watches("w")
    world.watch.forget("w")
    assert not world.watch.watches("w")
    assert world.on_record() == []
    await asyncio.sleep(1.4)
    assert world.thawed == []
    assert criu.poll() is None
