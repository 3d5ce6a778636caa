"""Stores that are kept in order beside one another: none waits for another one's fold."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.errors import NoSpaceError
from common.events import Event, EventLog, read_events
from common.model import WorkloadSpec
from outlive import store_upkeep
from outlive.store_upkeep import StoreUpkeep


@dataclass
class StoreInMemory:
    """As much of a store as is asked for here; its fold waits until it may end."""

    may_end: threading.Event = field(default_factory=threading.Event)
    folds: int = 0
    space_warning: bool = False
    full: bool = False

    def fold_due(self) -> bool:
        return True

    def fold(self) -> None:
        self.folds += 1
        if self.full:
            raise NoSpaceError("fold: no space left on device")
        assert self.may_end.wait(30)


@dataclass
class Held:
    spec: WorkloadSpec
    store: StoreInMemory


def held(name: str) -> Held:
    return Held(WorkloadSpec(name=name, nodes=("a", "b"), command=("x",)), StoreInMemory())


async def test_a_fold_that_takes_long_keeps_no_other_store_waiting_and_is_not_begun_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_upkeep, "_EVERY_S", 0.01)
    slow, quick, full = held("slow"), held("quick"), held("full")
    quick.store.may_end.set()
    full.store.full = full.store.space_warning = True
    log = EventLog(tmp_path / "events.jsonl", "agent")
    upkeep = StoreUpkeep(lambda: (slow, full, quick), tmp_path, log)  # type: ignore[arg-type, return-value]
    running = asyncio.create_task(upkeep.run())
    try:
        async with asyncio.timeout(20):
            while min(quick.store.folds, full.store.folds) < 5:  # noqa: ASYNC110 - other threads
                await asyncio.sleep(0.01)
        assert slow.store.folds == 1
        assert not running.done()
    finally:
        slow.store.may_end.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    log.close()
    told = [(each.workload, each.event) for each in read_events(tmp_path / "events.jsonl")]
    assert told == [("full", Event.STORE_LOW_SPACE)], "once"
