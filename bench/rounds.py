"""A workload in the lab whose protection is switched on and off, and what happened between two instants.

In: a workload's declaration. Out: `Switched`: with the replica's agent stopped nobody is connected, so the
primary's agent takes no epoch; started again, epochs go on. `Window` is the difference of two looks at it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from bench.processes import cpu_parts_s, cpu_s, idle_s, kernel_s
from common.container import running_init_pid
from common.control import WorkloadMetrics
from common.errors import LabError
from common.model import WorkloadSpec
from outlive.cluster import Node, build_cluster, start_all
from outlive.lab import Lab

WORKLOAD = "bench"
_SETTLE_EPOCHS = 10
_QUIET_S = 3.0
_DEADLINE_S = 120.0


class CpuParts(msgspec.Struct, frozen=True, kw_only=True):
    """CPU seconds by part."""

    criu: float
    agent: float
    kernel: float
    """Of these two, within system calls and page faults."""
    workload: float
    keeper: float
    replica_agent: float

    def each(self, epochs: int) -> CpuParts:
        """Divide by a number of epochs; zeros if there were none."""
        parts = msgspec.structs.asdict(self)
        return CpuParts(
            **{name: round(value / epochs, 5) if epochs else 0.0 for name, value in parts.items()}
        )

    def plus(self, other: CpuParts, sign: int = 1) -> CpuParts:
        """Add part by part; subtract with `sign` -1."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return CpuParts(**{name: mine[name] + sign * theirs[name] for name in mine})


NO_CPU = CpuParts(criu=0.0, agent=0.0, kernel=0.0, workload=0.0, keeper=0.0, replica_agent=0.0)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two instants."""

    seconds: float
    epochs: int
    freeze_ms: tuple[float, ...]
    abandoned_ms: tuple[float, ...]
    """Of freezes that came to nothing."""
    cpu: CpuParts
    idle_s: float
    """Of all processors together."""


class Switched:
    """The workload leads on `a`; `b` is its replica, or not."""

    def __init__(self, lab: Lab, nodes: dict[str, Node]) -> None:
        self.lab = lab
        self.first = nodes["a"]
        self.second = nodes["b"]

    @property
    def pid(self) -> int:
        """The workload's first process. Raises LabError if it has ended."""
        pid = running_init_pid(self.first.config, WORKLOAD)
        if pid is None:
            raise LabError("the workload has ended")
        return pid

    async def metrics(self) -> WorkloadMetrics:
        """What the primary's agent measured."""
        return next(each for each in (await self.first.metrics()).workloads if each.name == WORKLOAD)

    async def protect(self, protected: bool) -> None:
        """Switch it on or off, and wait until that shows and has settled. Raises LabError."""
        if protected != ("agent" in self.second.processes):
            if protected:
                await self.second.start("agent")
            else:
                await self.second.stop("agent")
        deadline_s = time.monotonic() + _DEADLINE_S
        start = (await self.metrics()).epochs_acknowledged
        while time.monotonic() < deadline_s:
            before = (await self.metrics()).epochs_captured
            await asyncio.sleep(0.1 if protected else _QUIET_S)
            after = await self.metrics()
            if (
                after.epochs_acknowledged >= start + _SETTLE_EPOCHS
                if protected
                else after.epochs_captured == before
            ):
                return
        raise LabError(f"epochs {'are not' if protected else 'are still'} taken after {_DEADLINE_S:.0f} s")

    @asynccontextmanager
    async def watched(self, into: list[Window], *, protected: bool) -> AsyncIterator[None]:
        """Append the window of what is done within. Raises LabError if it was not as `protected` says."""
        old, cpu, begun_s, idle_before_s = await self.metrics(), self._cpu(), time.monotonic(), idle_s()
        yield
        seconds, idle = time.monotonic() - begun_s, idle_s() - idle_before_s
        used, new = self._cpu().plus(cpu, -1), await self.metrics()
        epochs = new.epochs_captured - old.epochs_captured
        if bool(epochs) != protected:
            raise LabError(f"{epochs} epochs were taken within {seconds:.1f} s, {protected=}")
        frozen_ms, abandoned_ms = new.freeze_ms[-epochs:], new.abandoned_ms[len(old.abandoned_ms) :]
        into.append(Window(seconds, epochs, frozen_ms if epochs else (), abandoned_ms, used, idle))

    def _cpu(self) -> CpuParts:
        agent, criu = cpu_parts_s(self.first.processes["agent"].pid)
        replica = self.second.processes.get("agent")
        return CpuParts(
            criu=criu,
            agent=agent,
            kernel=kernel_s(self.first.processes["agent"].pid),
            workload=cpu_parts_s(self.pid)[0],
            keeper=cpu_s(self.first.processes["keeper"].pid),
            replica_agent=cpu_s(replica.pid) if replica else 0.0,
        )


@asynccontextmanager
async def switched(spec: WorkloadSpec, lab: Lab) -> AsyncIterator[Switched]:
    """Start a workload on `a` of two nodes with `capture.backend = "auto"`; it leads, unprotected or not."""
    nodes = await build_cluster(lab, ("a", "b"), workloads=[spec], settings={"capture": {"backend": "auto"}})
    await start_all(nodes)
    await nodes["a"].cli("start", WORKLOAD)
    await nodes["b"].wait_for(WORKLOAD, lambda w: w.restorable, what="restorable", timeout_s=_DEADLINE_S)
    yield Switched(lab, nodes)
