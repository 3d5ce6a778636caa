"""Commands around freezes: in which order, and what becomes of the epoch when one of them fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.config import FreezeHook
from common.errors import CaptureError
from common.model import EpochId
from primary.capture import CapturedEpoch
from primary.freeze_hooks import WithHooks
from tests.unit.wire_fakes import TASK, captured, page


class Memory:
    """A backend that writes down when it captures."""

    name = "fast"

    def __init__(self, log: Path) -> None:
        self.log = log
        self.fails: Exception | None = None
        self.takes_s = 0.0
        self.begun = asyncio.Event()
        self.closed = False
        self.last: CapturedEpoch | None = None

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        with self.log.open("a") as log:
            log.write("capture\n")
        self.begun.set()
        await asyncio.sleep(self.takes_s)
        if self.fails is not None:
            raise self.fails
        self.last = captured(epoch.epoch, {TASK: {16: page(1)}})
        return self.last

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "log")


def _hook(memory: Memory, before: str, after: str, timeout_ms: int = 5000) -> FreezeHook:
    def command(text: str) -> tuple[str, ...]:
        return ("/bin/sh", "-c", text.replace("LOG", str(memory.log))) if text else ()

    return FreezeHook(workload="redis", before=command(before), after=command(after), timeout_ms=timeout_ms)


async def test_they_run_around_the_epoch_and_are_told_which_it_is(memory: Memory) -> None:
    said = "echo WHEN $OUTLIVE_WORKLOAD $OUTLIVE_EPOCH >> LOG"
    backend = WithHooks(memory, _hook(memory, said.replace("WHEN", "before"), said.replace("WHEN", "after")))
    epoch = await backend.capture(EpochId(2, 7))
    assert memory.log.read_text().splitlines() == ["before redis t2-e7", "capture", "after redis t2-e7"]
    assert backend.name == "fast"
    epoch.release()
    await backend.close()
    assert memory.closed


@pytest.mark.parametrize(
    ("before", "words"),
    [("exit 3", "exited with 3"), ("sleep 60", "took longer than 200 ms")],
)
async def test_what_fails_before_costs_the_epoch_and_is_undone(
    memory: Memory, before: str, words: str
) -> None:
    backend = WithHooks(memory, _hook(memory, before, "echo after >> LOG", timeout_ms=200))
    with pytest.raises(CaptureError, match=words):
        await backend.capture(EpochId(1, 1))
    assert memory.log.read_text() == "after\n"


async def test_what_cannot_be_started_says_so(memory: Memory) -> None:
    backend = WithHooks(memory, FreezeHook(workload="redis", before=("/nowhere/at/all",)))
    with pytest.raises(CaptureError, match="cannot be started: No such file"):
        await backend.capture(EpochId(1, 1))


async def test_a_failing_epoch_is_undone_and_keeps_its_own_reason(memory: Memory) -> None:
    memory.fails = CaptureError("criu says no")
    backend = WithHooks(memory, _hook(memory, "", "echo after >> LOG; exit 1"))
    with pytest.raises(CaptureError, match="criu says no"):
        await backend.capture(EpochId(1, 1))
    assert memory.log.read_text() == "capture\nafter\n"


async def test_what_fails_afterwards_costs_the_epoch_too(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = []
    monkeypatch.setattr(CapturedEpoch, "release", lambda epoch: released.append(epoch))
    backend = WithHooks(memory, _hook(memory, "", "exit 9"))
    with pytest.raises(CaptureError, match=r"freeze_hooks\.after: .* exited with 9"):
        await backend.capture(EpochId(1, 1))
    assert released == [memory.last]


async def test_a_capture_that_is_cancelled_is_undone(memory: Memory) -> None:
    memory.takes_s = 60
    backend = WithHooks(memory, _hook(memory, "", "echo after >> LOG"))
    task = asyncio.create_task(backend.capture(EpochId(1, 1)))
    await memory.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert memory.log.read_text() == "capture\nafter\n"
