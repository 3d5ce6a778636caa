"""The workloads of one agent, by name: opened once, kept while somebody wants them, then let go.

A workload is taken up because the keeper orders it, or because a leader greeted with it (*learned*: the
keeper hears of it by the next report). One that is neither ordered nor learned is dropped; what is stored
of it stays on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import structlog

from common.config import NodeConfig
from common.errors import OutliveError, WorkloadError
from common.model import WorkloadSpec
from outlive.workload_agent import WorkloadAgent
from replica.ceiling import Ceiling
from replica.store import EpochStore

log = structlog.get_logger(__name__)

_LET_GO_WITHIN_S = 1.0

_JUDGED_WITHIN_S = 1.0
"""Whether what is stored could be restored is known by then, or later: storage that hangs for one workload is
no reason to keep the others, and their orders, waiting."""

MakeWorkload = Callable[[WorkloadSpec, EpochStore], WorkloadAgent]


class HeldWorkloads:
    """Changes only in the event loop: whoever iterates, iterates over a copy."""

    def __init__(self, config: NodeConfig, make: MakeWorkload) -> None:
        self._config = config
        self._make = make
        self._held: dict[str, WorkloadAgent] = {}
        self._opening = asyncio.Lock()
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._judging: set[asyncio.Future[tuple[bool, tuple[str, ...]]]] = set()
        self._ceiling = Ceiling(config.store_dir, config.store.max_bytes)

    def __getitem__(self, name: str) -> WorkloadAgent:
        """Return a workload that is held. Raises WorkloadError if it was let go; sessions may outlive it."""
        held = self._held.get(name)
        if held is None:
            raise WorkloadError(f"{name} is not held here any more")
        return held

    def get(self, name: str) -> WorkloadAgent | None:
        """Return a workload that is held."""
        return self._held.get(name)

    def all(self) -> tuple[WorkloadAgent, ...]:
        """Return all that are held now."""
        return tuple(self._held.values())

    async def take_up(self, spec: WorkloadSpec, *, learned: bool = False) -> WorkloadAgent:
        """Return the workload, opening its store if it is not held yet.

        Raises StoreError, NoSpaceError; WorkloadError while it is still being let go.
        """
        async with self._opening:
            if (leaving := self._leaving.get(spec.name)) is not None:
                await asyncio.wait({leaving}, timeout=_LET_GO_WITHIN_S)
                if not leaving.done():
                    raise WorkloadError(f"{spec.name} is still being let go here", hint="ask again")
            held = self._held.get(spec.name)
            if held is None:
                store = await asyncio.to_thread(self._open, spec.name)
                held = self._held[spec.name] = self._make(spec, store)
                held.learned = learned
                newest = store.newest
                if newest is not None and held.follows:
                    judging = asyncio.ensure_future(held.judge(newest))
                    self._judging.add(judging)
                    judging.add_done_callback(self._judging.discard)
                    await asyncio.wait({judging}, timeout=_JUDGED_WITHIN_S)
            return held

    def drop_unwanted(self, ordered: Collection[str]) -> None:
        """Let go of what the keeper does not name and nobody has sent since; that may take a while."""
        for name, workload in list(self._held.items()):
            if name not in ordered and not workload.learned:
                del self._held[name]
                leaving = self._leaving[name] = asyncio.ensure_future(self._let_go(name, workload))
                leaving.add_done_callback(lambda _, name=name: self._leaving.pop(name))  # type: ignore[misc]

    async def _let_go(self, name: str, workload: WorkloadAgent) -> None:
        try:
            await workload.close()
        except OutliveError as error:
            log.error("workload.not-closed", workload=name, error=str(error))
        log.info("workload.dropped", workload=name)

    async def close(self) -> None:
        """Let go of everything; workloads run on."""
        await asyncio.gather(*(workload.close() for workload in self.all()), *self._leaving.values())

    def _open(self, name: str) -> EpochStore:
        return EpochStore.open(
            self._config.store_dir,
            name,
            min_free_bytes=self._config.store.min_free_bytes,
            max_levels=self._config.store.max_levels,
            ceiling=self._ceiling,
            fold_bytes_per_s=self._config.store.fold_mib_per_s * (1 << 20),
        )
