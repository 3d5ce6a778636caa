"""What the keeper does in the world for its role machines: address, processes, fence, health, disk.

In: effects of `common.role_events`. Out: the events that say what came of them. Everything is behind `Hands`,
so that tests and the simulator put others in its place. Effects of one workload that change the host are done
one after the other, as are those that change the disk; a fence and a health check run beside them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from common.addresses import Vip, add_vip, announce, drop_vip, hold, holds_vip, is_local, lift
from common.config import NodeConfig
from common.container import (
    cgroup_frozen,
    exit_code,
    incarnation,
    kill_workload,
    running_init_pid,
    thaw_cgroup,
)
from common.errors import OutliveError, WorkloadError
from common.fence_request import FenceRequest
from common.fencing import Verdict, fence_node
from common.gate import Gate, gate_of
from common.health import health_address, wait_healthy
from common.model import WorkloadSpec
from common.role_events import (
    AddVip,
    Announce,
    CheckHealth,
    DropVip,
    Effect,
    Event,
    FenceResult,
    ForgetFiles,
    HoldVip,
    KillWorkload,
    LiftHold,
    PausesPersisted,
    PersistPauses,
    PersistTerm,
    RunFence,
    SaveHistory,
    SaveSpec,
    StepDone,
    StepFailed,
    TermPersisted,
    ThawWorkload,
)
from common.roles import Clean, Step
from common.terms_file import TermFiles
from common.threads import in_thread

log = logging.getLogger(__name__)

Feed = Callable[[Event], None]


_FENCES_AT_ONCE = 4
"""Of one node, for so many workloads: an sshd lets ten log in at a time (`MaxStartups`, sshd_config(5)), and
a node that takes over dozens has better things to do than to start programs."""


class Hands(Protocol):
    """How a keeper acts on its host. Every method raises OutliveError if it did not succeed."""

    async def hold(self, spec: WorkloadSpec) -> None:
        """Drop the packets of the workload's address."""
        ...

    async def add_vip(self, spec: WorkloadSpec) -> None:
        """Give this host the workload's address."""
        ...

    async def drop_vip(self, spec: WorkloadSpec) -> None:
        """Take the workload's address from this host."""
        ...

    async def lift(self, spec: WorkloadSpec) -> None:
        """Let the packets of the workload's address pass."""
        ...

    async def announce(self, spec: WorkloadSpec) -> None:
        """Tell the neighbours where the address is."""
        ...

    async def kill(self, spec: WorkloadSpec) -> None:
        """Kill every process of the workload; return when none is left."""
        ...

    async def thaw(self, spec: WorkloadSpec) -> None:
        """Let the workload run that stands still to be handed over. Harmless if it does not."""
        ...

    def turn_to_fence(self, node: str) -> AbstractAsyncContextManager[None]:
        """Wait until few enough workloads have that node fenced."""
        ...

    async def fence(self, asked: RunFence, workload: str) -> Verdict:
        """Ask the fence methods of a node, which is to lead that workload no more."""
        ...

    async def health(self, spec: WorkloadSpec) -> str:
        """Wait until the workload is healthy (empty) or its grace is over (what is wrong)."""
        ...

    def init_pid(self, name: str) -> int | None:
        """Return the host PID of the workload's first process if it runs here. Does not raise."""
        ...

    def came_of(self, name: str) -> int | None:
        """Return the number of the order by which what is here was brought up; None if that is not known."""
        ...

    def gate(self, name: str) -> Gate:
        """Return what holds the workload while it has no lease."""
        ...

    def frozen(self, name: str) -> bool:
        """Tell whether the whole workload stands still. Does not raise."""
        ...

    def has_address(self, address: str) -> bool | None:
        """Tell whether this host has an address; None if that cannot be told. Does not raise."""
        ...

    async def holds_vip(self, spec: WorkloadSpec) -> bool:
        """Tell whether the workload's address is on its interface here."""
        ...

    def exit_code(self, name: str) -> int | None:
        """Return how the workload ended; None while that isn't known. Does not raise."""
        ...


class RealHands:
    """The host itself."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._fencing: dict[str, asyncio.Semaphore] = {}

    async def hold(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await hold(self._vip(spec), spec.name)

    async def add_vip(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await add_vip(self._vip(spec))

    async def drop_vip(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await drop_vip(self._vip(spec))

    async def lift(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await lift(self._vip(spec), spec.name)

    async def announce(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await announce(self._vip(spec))

    async def kill(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        await kill_workload(self._config, spec.name)

    async def thaw(self, spec: WorkloadSpec) -> None:
        """See `Hands`."""
        thaw_cgroup(self._config, spec.name)

    def turn_to_fence(self, node: str) -> AbstractAsyncContextManager[None]:
        """See `Hands`."""
        return self._fencing.setdefault(node, asyncio.Semaphore(_FENCES_AT_ONCE))

    async def fence(self, asked: RunFence, workload: str) -> Verdict:
        """See `Hands`."""
        request = FenceRequest(
            node=asked.node,
            by=self._config.node.name,
            terms={workload: asked.term},
            up_to=asked.up_to,
        )
        return await fence_node(request, self._config.fences)

    async def health(self, spec: WorkloadSpec) -> str:
        """See `Hands`."""
        return await wait_healthy(spec.health, health_address(spec)) if spec.health is not None else ""

    def init_pid(self, name: str) -> int | None:
        """See `Hands`."""
        return running_init_pid(self._config, name)

    def came_of(self, name: str) -> int | None:
        """See `Hands`."""
        run = incarnation(self._config, name)
        return run.order if run is not None else None

    def gate(self, name: str) -> Gate:
        """See `Hands`."""
        return gate_of(self._config, name)

    def frozen(self, name: str) -> bool:
        """See `Hands`."""
        return cgroup_frozen(self._config, name)

    def has_address(self, address: str) -> bool | None:
        """See `Hands`."""
        return is_local(address)

    async def holds_vip(self, spec: WorkloadSpec) -> bool:
        """See `Hands`."""
        return await holds_vip(self._vip(spec))

    def exit_code(self, name: str) -> int | None:
        """See `Hands`."""
        return exit_code(self._config, name)

    def _vip(self, spec: WorkloadSpec) -> Vip:
        return Vip.parse(spec.vip or "", self._config.node.vip_interface)


_HostStep = Step | Clean | Literal["thaw"]

_HOST: dict[type[Effect], _HostStep] = {
    HoldVip: "hold",
    AddVip: "add_vip",
    DropVip: "drop_vip",
    LiftHold: "lift",
    Announce: "announce",
    KillWorkload: "kill",
    ThawWorkload: "thaw",
}


_SERVES: frozenset[_HostStep] = frozenset({"add_vip", "lift", "announce"})

_DISK: dict[type[Effect], Literal["persist", "pauses"]] = {PersistTerm: "persist", PersistPauses: "pauses"}


_TRY_TO_WRITE_S = 2.0
_WRITE_AGAIN_S = 2.0


def _told(error: Exception) -> str:
    """Return what went wrong, for a person; what nobody foresaw goes to the log with its traceback."""
    if isinstance(error, OutliveError | OSError | ValueError):
        return str(error)
    log.exception("effect.failed")
    return f"a defect in Outlive, or its host: {error!r}"


class Effects:
    """Carries out one workload's effects; what came of them goes to `feed`, in the event loop."""

    def __init__(
        self,
        hands: Hands,
        files: TermFiles,
        feed: Feed,
        tasks: asyncio.TaskGroup,
        *,
        no_address: Callable[[], str] = lambda: "",
        is_pending: Callable[[int], bool] = lambda attempt: True,
    ) -> None:
        """`no_address` returns why this host may not serve the address at present; empty: it may.

        `is_pending` tells whether anybody still waits for an attempt to lead.
        """
        self._is_pending = is_pending
        self._no_address = no_address
        self._hands = hands
        self._files = files
        self._feed = feed
        self._tasks = tasks
        self._host: asyncio.Queue[tuple[_HostStep, WorkloadSpec]] = asyncio.Queue()
        self._queued: Counter[_HostStep] = Counter()
        self._disk: asyncio.Queue[tuple[Effect, WorkloadSpec]] = asyncio.Queue()
        self._records_queued = 0
        self._trying: asyncio.Task[str] | None = None
        self._declared: Effect | None = None
        """The newest declaration that was to be kept, or its removal."""
        self._workers = [tasks.create_task(self._work_on_host()), tasks.create_task(self._work_on_disk())]

    def perform(self, effect: Effect, spec: WorkloadSpec) -> None:
        """Begin to carry out an effect; returns at once."""
        match effect:
            case HoldVip() | AddVip() | DropVip() | LiftHold() | Announce() | KillWorkload() | ThawWorkload():
                self._queued[_HOST[type(effect)]] += 1
                self._host.put_nowait((_HOST[type(effect)], spec))
            case PersistTerm() | PersistPauses() | SaveSpec() | SaveHistory() | ForgetFiles():
                self._disk.put_nowait((effect, spec))
                self._records_queued += isinstance(effect, PersistTerm)
                if isinstance(effect, SaveSpec | ForgetFiles):
                    self._declared = effect
            case RunFence():
                self._begin(self._fence(effect, spec))
            case CheckHealth():
                self._begin(self._check_health(spec))
            case _:
                raise TypeError(f"{effect!r} is not for the world")

    def close(self) -> None:
        """Do nothing more; what is being done is cut off."""
        for worker in self._workers:
            worker.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._workers = [worker for worker in self._workers if not worker.done()]
        self._workers.append(self._tasks.create_task(work))

    async def _work_on_host(self) -> None:
        acts: dict[_HostStep, Callable[[WorkloadSpec], Awaitable[None]]] = {
            "hold": self._hands.hold,
            "add_vip": self._hands.add_vip,
            "drop_vip": self._hands.drop_vip,
            "lift": self._hands.lift,
            "announce": self._hands.announce,
            "kill": self._hands.kill,
            "thaw": self._hands.thaw,
        }
        while True:
            step, spec = await self._host.get()
            try:
                if step in _SERVES and (reason := self._no_address()):
                    raise WorkloadError(f"not while the lease is in doubt: {reason}")
                await acts[step](spec)
                came_of_it: StepDone | StepFailed = StepDone(step=step)
            except Exception as error:  # whatever it is: other workloads have this keeper too
                came_of_it = StepFailed(step=step, reason=_told(error))
            self._queued[step] -= 1
            if not self._queued[step]:  # else it would be taken for what came of the later one
                self._feed(came_of_it)

    async def _work_on_disk(self) -> None:
        while True:
            effect, spec = await self._disk.get()
            try:
                await in_thread(self._write, effect, spec)
            except Exception as error:
                self._records_queued -= isinstance(effect, PersistTerm)
                if not (isinstance(effect, PersistTerm) and self._records_queued):  # as with the host's steps
                    self._feed(StepFailed(step=_DISK.get(type(effect), "history"), reason=_told(error)))
                if effect is self._declared:
                    self._begin(self._write_again(effect, spec))
            else:
                if isinstance(effect, PersistTerm):
                    self._records_queued -= 1
                    self._feed(TermPersisted(effect.record))
                elif isinstance(effect, PersistPauses):
                    self._feed(PausesPersisted(effect.pauses))

    async def _write_again(self, effect: Effect, spec: WorkloadSpec) -> None:
        """Have the newest declaration on disk in the end: by it succession goes on after a restart."""
        await asyncio.sleep(_WRITE_AGAIN_S)
        if effect is self._declared:
            self._disk.put_nowait((effect, spec))

    def _write(self, effect: Effect, spec: WorkloadSpec) -> None:
        match effect:
            case PersistTerm(record):
                self._files.record(spec.name, record)
            case PersistPauses(pauses):
                self._files.record_pauses(spec.name, pauses)
            case SaveSpec(declared):
                self._files.save_spec(declared)
            case SaveHistory(story):
                self._files.save_history(story)
            case ForgetFiles():
                self._files.forget_spec(spec.name)

    async def cannot_record(self, spec: WorkloadSpec) -> str:
        """Return why this node could not record a new term now; empty if it could.

        Whoever takes the right to lead from another one without that leaves the workload to nobody.
        """
        if self._trying is None or self._trying.done():  # else the disk has not come back from an earlier one
            self._trying = self._tasks.create_task(self._try_to_write(spec.name))
        writing = self._trying  # goes on if nobody waits any more
        done, _ = await asyncio.wait({writing}, timeout=_TRY_TO_WRITE_S)
        problem = writing.result() if done else f"its disk took over {_TRY_TO_WRITE_S:g} s"
        return f"this node could not record the next term: {problem}" if problem else ""

    async def _try_to_write(self, name: str) -> str:
        try:
            await in_thread(self._files.try_to_write, name)
        except Exception as error:
            return _told(error)
        return ""

    async def _fence(self, asked: RunFence, spec: WorkloadSpec) -> None:
        if reason := await self.cannot_record(spec):
            verdict = Verdict(outcome="unknown", reason=f"not asked: {reason}")
        else:
            async with self._hands.turn_to_fence(asked.node):
                if not self._is_pending(asked.attempt):
                    return
                try:
                    verdict = await self._hands.fence(asked, spec.name)
                except Exception as error:
                    verdict = Verdict(outcome="unknown", reason=_told(error))
        self._feed(
            FenceResult(
                node=asked.node, attempt=asked.attempt, outcome=verdict.outcome, reason=verdict.reason
            )
        )

    async def _check_health(self, spec: WorkloadSpec) -> None:
        try:
            wrong = await self._hands.health(spec)
        except Exception as error:
            wrong = _told(error)
        self._feed(StepFailed(step="health", reason=wrong) if wrong else StepDone(step="health"))
