"""While this node leads a workload: capture it at its interval, offer every epoch to every replica.

In: the workload's declaration, the term, the incarnation that runs. Out: epochs to the streams, numbers
for status and benchmarks, events. The workload never waits for any of it: a replica that is slow gets
the newest epoch when it is ready for one, a capture that fails is tried again, more and more slowly.

The loop takes no epoch that nobody could use: none is taken while no replica is connected, or while
every replica has one waiting already.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import msgspec
import structlog

from common.config import NodeConfig, Peer
from common.control import (
    CaptureStatus,
    ReplicaProgress,
    StreamMetrics,
    VerificationProgress,
    WorkloadMetrics,
)
from common.errors import CaptureError, OutliveError
from common.events import Event, EventLog
from common.model import NAME_PATTERN, EpochId, WorkloadSpec
from common.threads import in_thread
from outlive.verifying import Verifier
from primary.backlog import SharedEpoch
from primary.capture import CaptureBackend, CapturedEpoch
from primary.freezer import Freezer
from primary.numbering import EpochNumbers
from primary.stream import ReplicaStream, Unacknowledged

log = structlog.get_logger(__name__)

SERIES = 1000
"""How many of the newest measurements are kept of each kind."""
_IDLE_S = 0.02
"""How often to look whether a replica wants an epoch, while none does."""
_TELL_EVERY_S = 0.2
_KEEP_WITHIN_S = 1.0
"""How long a cgroup may take to come to rest for its last epoch."""
_COMMIT_S, _COMMIT_POLL_S = 20.0, 0.002
"""How long the heir may take to commit that: the workload stands still meanwhile."""
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
_ALARM_AFTER = 3
"""Failed captures in a row that make an event of their own."""


MakeStream = Callable[[Peer, Callable[[EpochId], None], Callable[[Unacknowledged], None]], ReplicaStream]
"""Makes the stream to a peer; told of what is acknowledged, and of what is not when it ends."""


class Leading:
    """Captures and streams one incarnation of one workload in one term; made by the agent, run once."""

    def __init__(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        *,
        term: int,
        incarnation: str,
        backend: CaptureBackend,
        numbers: EpochNumbers,
        make_stream: MakeStream,
        events: EventLog,
        verifier: Verifier,
        freezer: Freezer,
        capture_status: Callable[[], CaptureStatus | None] = lambda: None,
        abandoned_ms: Collection[float] = (),
    ) -> None:
        """`freezer` is the one that the backend leaves alone what it keeps frozen of.

        `abandoned_ms` is how long freezes lasted that came to nothing, up to now, whenever it is read.
        """
        self.capture_status = capture_status
        """What captures now."""
        self.spec = spec
        self.term = term
        self.incarnation = incarnation
        self.captured: EpochId | None = None
        self.failures = 0
        self.handed_over = False
        """Its last epoch is taken: nothing is captured any more, and it stands still."""
        self._config = config
        self._backend = backend
        self._numbers = numbers
        self._events = events
        self._verifier = verifier
        self._freezer = freezer
        self._turn = asyncio.Lock()
        """Held for a capture, and for ever once the last one is taken."""
        others = {node: config.peer(node) for node in spec.nodes if node != config.node.name}
        self._left: dict[str, Unacknowledged] = {}
        self._strangers = tuple(node for node, peer in others.items() if peer is None)
        self._streams: Mapping[str, ReplicaStream] = {
            node: make_stream(peer, self._acknowledged, partial(self._left.__setitem__, node))
            for node, peer in others.items()
            if peer is not None
        }
        self._connected: dict[str, bool] = {}
        self._frozen_at: dict[int, float] = {}
        self._freeze_ms: deque[float] = deque(maxlen=SERIES)
        self._abandoned_ms = abandoned_ms
        self._epoch_ms: deque[float] = deque(maxlen=SERIES)
        self._interval_ms: deque[float] = deque(maxlen=SERIES)
        self._epochs_captured = 0
        self._epochs_acknowledged = 0
        self._newest_acknowledged: EpochId | None = None
        self._memory_bytes = 0

    async def run(self) -> None:
        """Capture and stream until cancelled. The workload is left running, thawed and untouched."""
        try:
            async with asyncio.TaskGroup() as group:
                for stream in self._streams.values():
                    group.create_task(stream.run())
                group.create_task(self._capture_for_ever())
                group.create_task(self._tell_connections())
        finally:
            self._freezer.leave()
            await self._backend.close()

    def take_unacknowledged(self) -> dict[str, Unacknowledged]:
        """Return, once it has ended, the newest epoch of each replica that nobody is known to have.

        The caller holds them from then on.
        """
        newest = self._newest_acknowledged
        unknown: dict[str, Unacknowledged] = {}
        for node, each in self._left.items():
            if newest is None or each.shared.epoch.id > newest:
                unknown[node] = each
            else:
                each.shared.drop()
        self._left.clear()
        return unknown

    async def hand_over(self, heir: str) -> EpochId:
        """Have it stand still, and return its last epoch once `heir` has committed that and could restore it.

        It stands still from then on, and nothing is captured any more. Raises CaptureError or another
        OutliveError if that did not come about: then, and if this is cancelled, it runs on and is captured.
        """
        await self._turn.acquire()
        try:
            if (stream := self._streams.get(heir)) is None:
                raise CaptureError(f"{heir} is no replica of {self.spec.name}")
            # Nothing is copied ahead of the last one, while it stands still: so that there is little to copy.
            await self._committed_by(stream, await self._capture_one())
            try:
                await in_thread(self._freezer.keep, _KEEP_WITHIN_S)
                epoch = await self._capture_one(last=True)
                await self._committed_by(stream, epoch)
                if not self._freezer.is_kept:
                    raise CaptureError("it was thawed before its last epoch was committed")
            except BaseException:
                self._freezer.thaw()
                raise
        except BaseException:
            self._turn.release()
            raise
        self.handed_over = True
        return epoch

    async def _committed_by(self, stream: ReplicaStream, epoch: EpochId) -> None:
        """Wait until the replica has the epoch, and says that it could restore it. Raises CaptureError."""
        heir, until_s = stream.progress.node, time.monotonic() + _COMMIT_S
        while (progress := stream.progress).acknowledged != epoch:
            if not progress.connected:
                raise CaptureError(f"{heir} was disconnected: {stream.problem}")
            if time.monotonic() > until_s:
                why = f": {stream.problem}" if stream.problem else ""
                raise CaptureError(f"{heir} did not commit {epoch} within {_COMMIT_S:g} s{why}")
            await asyncio.sleep(_COMMIT_POLL_S)
        if not progress.restorable:
            raise CaptureError(f"{heir} has {epoch}, and could not restore it: {'; '.join(progress.reasons)}")

    def progress(self) -> tuple[ReplicaProgress, ...]:
        """Return how far each replica is, with why its stream does not get on, if it does not."""
        known = tuple(
            msgspec.structs.replace(
                stream.progress,
                reasons=(*stream.progress.reasons, *([stream.problem] if stream.problem else [])),
            )
            for stream in self._streams.values()
        )
        here = self._config.node.name
        return known + tuple(
            ReplicaProgress(
                node=node, connected=False, reasons=(f"it is no peer of {here}: add a [[peers]] block there",)
            )
            for node in self._strangers
        )

    def resync(self, node: str, *, full: bool) -> bool:
        """See `ReplicaStream.resync`; False if `node` is no connected replica of this workload."""
        stream = self._streams.get(node)
        if stream is None or not stream.progress.connected:
            return False
        stream.resync(full=full)
        how = "everything is sent anew" if full else "it says what it holds, and gets what differs"
        reason = f"an operator asked for it: {how}"
        self._events.append(Event.RESYNC_STARTED, workload=self.spec.name, reason=reason, peer=node)
        return True

    def verify(self) -> tuple[VerificationProgress, ...]:
        """Compare everything over the next epochs; return how things stood before, of all that can be."""
        away = {node for node, stream in self._streams.items() if not stream.progress.connected}
        if len(away) == len(self._streams):
            return ()  # no epoch is captured
        self._verifier.hurry()
        return tuple(each for each in self.verification() if each.replica not in away)

    def verification(self) -> tuple[VerificationProgress, ...]:
        """Return how far memory and each replica's store are compared."""
        return self._verifier.progress(with_memory=self._backend.name == "fast")

    def metrics(self) -> WorkloadMetrics:
        """Return what was measured since this began."""
        streams = [
            StreamMetrics(
                node=node,
                epochs_acknowledged=counters.epochs_acknowledged,
                commit_ms=counters.commit_latency_ms,
                bytes_sent=counters.bytes_sent,
                bytes_full=counters.full_equivalent_bytes,
            )
            for node, counters in ((node, stream.counters) for node, stream in self._streams.items())
        ]
        return WorkloadMetrics(
            name=self.spec.name,
            backend=self._backend.name,
            epochs_captured=self._epochs_captured,
            epochs_acknowledged=self._epochs_acknowledged,
            freeze_ms=tuple(self._freeze_ms),
            abandoned_ms=tuple(self._abandoned_ms),
            epoch_ms=tuple(self._epoch_ms),
            interval_ms=tuple(self._interval_ms),
            memory_bytes=self._memory_bytes,
            streams=tuple(streams),
            verification=self.verification(),
        )

    def _acknowledged(self, epoch: EpochId) -> None:
        """Take note that a replica has committed `epoch`; called by the streams."""
        if self._newest_acknowledged is not None and epoch <= self._newest_acknowledged:
            return
        before = self._newest_acknowledged
        self._newest_acknowledged = epoch
        self._epochs_acknowledged += 1
        if before is not None and before.epoch in self._frozen_at and epoch.epoch in self._frozen_at:
            gap_s = self._frozen_at[epoch.epoch] - self._frozen_at[before.epoch]
            self._interval_ms.append(gap_s * 1000)
        self._frozen_at = {number: at for number, at in self._frozen_at.items() if number >= epoch.epoch}

    async def _tell_connections(self) -> None:
        """Write an event when a replica comes or goes, and around its first epoch of this run."""
        begun: set[str] = set()
        based: set[str] = set()
        while True:
            for node, stream in self._streams.items():
                progress, name = stream.progress, self.spec.name
                if progress.connected != self._connected.get(node, False):
                    self._connected[node] = progress.connected
                    event = Event.REPLICA_CONNECTED if progress.connected else Event.REPLICA_DISCONNECTED
                    reason = stream.problem or f"{node} receives epochs of {name}"
                    self._events.append(event, workload=name, reason=reason, peer=node)
                counters = stream.counters
                if counters.bytes_sent and node not in begun:
                    begun.add(node)
                    reason = (
                        f"{node} has nothing of this run yet and is sent all that it does not hold already"
                    )
                    self._events.append(Event.BASE_STARTED, workload=name, reason=reason, peer=node)
                if counters.epochs_acknowledged and node not in based:
                    based.add(node)
                    reason = f"{node} holds {progress.acknowledged}; what changes is sent from now on"
                    self._events.append(Event.BASE_FINISHED, workload=name, reason=reason, peer=node)
            await asyncio.sleep(_TELL_EVERY_S)

    async def _capture_for_ever(self) -> None:
        due_s = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            while not any(stream.wants_epoch for stream in self._streams.values()):  # noqa: ASYNC110 - polled state
                await asyncio.sleep(_IDLE_S)
            interval_ms = self.spec.interval_ms(fast=self._backend.name == "fast")
            due_s = max(due_s + interval_ms / 1000, time.monotonic())
            try:
                async with self._turn:
                    await self._capture_one()
            except OutliveError as error:
                self._note_failure(error)
                due_s = time.monotonic() + self._backoff_s()
            else:
                self._note_success()

    async def _capture_one(self, *, last: bool = False) -> EpochId:
        started_s = time.monotonic()
        number = await asyncio.to_thread(self._numbers.next)
        epoch: CapturedEpoch = await self._backend.capture(EpochId(self.term, number), self._held_by_all())
        epoch.last = last
        self._frozen_at[number] = started_s
        while len(self._frozen_at) > SERIES:  # nobody acknowledges any
            del self._frozen_at[next(iter(self._frozen_at))]
        self.captured = epoch.id
        self._epochs_captured += 1
        self._memory_bytes = epoch.memory_bytes
        self._freeze_ms.append(epoch.freeze.total_ms)
        self._epoch_ms.append((time.monotonic() - started_s) * 1000)
        shared = SharedEpoch(epoch)
        try:
            for stream in self._streams.values():
                stream.offer(shared)
        finally:
            shared.drop()
        return epoch.id

    def _held_by_all(self) -> EpochId | None:
        """Return the oldest epoch that a connected replica stands on; None if of one that is not known."""
        held = [stream.held for stream in self._streams.values() if stream.progress.connected]
        known = [each for each in held if each is not None]
        return min(known) if known and len(known) == len(held) else None

    def _note_failure(self, error: OutliveError) -> None:
        self.failures += 1
        log.warning("capture.failed", workload=self.spec.name, in_a_row=self.failures, error=str(error))
        if self.failures == _ALARM_AFTER:
            self._events.append(
                Event.CAPTURE_FAILED,
                workload=self.spec.name,
                reason=f"{self.failures} captures in a row failed, the last one: {error}",
            )

    def _note_success(self) -> None:
        if self.failures >= _ALARM_AFTER:
            self._events.append(
                Event.CAPTURE_RECOVERED,
                workload=self.spec.name,
                reason=f"an epoch was captured after {self.failures} failures",
            )
        self.failures = 0

    def _backoff_s(self) -> float:
        return min(_FIRST_BACKOFF_S * 2.0 ** (self.failures - 1), _LONGEST_BACKOFF_S)


def clear_images(directory: Path) -> None:
    """Remove what an earlier agent captured and nobody can send any more. Touches nothing else."""
    for workload in directory.iterdir():
        if not (NAME_PATTERN.match(workload.name) and workload.is_dir()):
            continue
        for epoch in workload.iterdir():
            with contextlib.suppress(ValueError):
                EpochId.parse(epoch.name)
                shutil.rmtree(epoch, ignore_errors=True)
