"""What keeps the stores of one agent in order while epochs arrive: folds, and the end of what is damaged.

In: the workloads that are held. Out: short chains, and events. Each workload has a task of its own: a base of
many GiB takes minutes to fold, and a store whose fold is due for too long takes no epochs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from common.errors import NoSpaceError, OutliveError, StoreError
from common.events import Event, EventLog
from common.model import EpochId, WorkloadSpec
from common.threads import in_daemon_thread, in_thread
from replica.store import EpochStore

log = structlog.get_logger(__name__)

_EVERY_S = 1.0


class Stored(Protocol):
    """As much of a workload as is asked for here."""

    spec: WorkloadSpec
    store: EpochStore


class StoreUpkeep:
    """Runs until it is cancelled; one workload's trouble is logged, and stops no other's."""

    def __init__(self, held: Callable[[], tuple[Stored, ...]], store_dir: Path, events: EventLog) -> None:
        self._held = held
        self._store_dir = store_dir
        self._events = events
        self._low: set[str] = set()
        self._at_work: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look after every store once a second, unless an earlier look at it is still at work."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(_EVERY_S)
                self._at_work = {name: task for name, task in self._at_work.items() if not task.done()}
                for workload in self._held():
                    name = workload.spec.name
                    if name not in self._at_work:
                        self._at_work[name] = tasks.create_task(self._look_after(name, workload.store))

    async def _look_after(self, name: str, store: EpochStore) -> None:
        try:
            self._warn(name, store)
            if await in_thread(store.fold_due):
                await self._fold(name, store)
        except (OutliveError, OSError) as error:
            log.error("fold.failed", workload=name, error=str(error))

    def _warn(self, name: str, store: EpochStore) -> None:
        if not store.space_warning:
            self._low.discard(name)
        elif name not in self._low:
            self._low.add(name)
            reason = f"{self._store_dir} has less than twice store.min_free_bytes free"
            self._events.append(Event.STORE_LOW_SPACE, workload=name, reason=reason)

    async def _fold(self, name: str, store: EpochStore) -> None:
        try:
            await in_daemon_thread(store.fold)  # it may take minutes: no thread of the pool that all wait for
        except NoSpaceError as error:
            log.warning("fold.postponed", workload=name, reason=str(error))
        except StoreError as error:
            if all(each.store is not store for each in self._held()):
                return  # it was let go of meanwhile
            # Restoring damaged memory would be worse than restoring none: the leader sends it all anew.
            for epoch in await in_thread(_set_damaged_aside, store):
                reason = f"epoch {epoch} was damaged on disk and set aside: {error.message}"
                self._events.append(Event.STORE_RECOVERED, workload=name, reason=reason)


def _set_damaged_aside(store: EpochStore) -> list[EpochId]:
    """Read the whole store; set aside what is damaged and all that stands on it. Blocking, slow."""
    damaged = sorted({problem.epoch for problem in store.verify()})
    for epoch in damaged:
        if any(record.id == epoch for record in store.records()):
            store.discard(epoch, "its content is not what was committed")
    return damaged
