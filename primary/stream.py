"""Sends a workload's epochs to one replica, for as long as the agent leads; one `ReplicaStream` each.

In: captured epochs, offered and never waited for. Out: messages to the replica's receiver; what it has
acknowledged; and how far it is. What the replica holds is remembered as a table of page identities: only an
acknowledgement replaces it. A replica whose newest epoch is not the remembered one is asked what it holds, of
that epoch and of one that was interrupted, and gets what differs; one that holds nothing gets everything. The
other streams go on meanwhile.

    connect, greet ──▶ take the newest offer ──▶ ask, if need be ──▶ send under credit ──▶ wait for Ack ──┐
        ▲                      ▲                                                 │ Nack                   │
        └── lost, refused ─────┴─────────────────────────────────────────────────┴──── remember ◀─────────┘

Keeps this: at most one epoch in flight and one waiting; never more bytes under way than the receiver granted;
an epoch counts as held only when the receiver said that it is committed. What it holds is compared, slice by
slice, with what was captured (`primary.store_verifier`); where it differs, everything is sent anew.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec
import structlog
import zmq
import zmq.asyncio

from common.clock import Clock, SystemClock
from common.config import Peer
from common.control import ReplicaProgress, SendingProgress
from common.errors import CaptureError, OutliveError, ProtocolError, UnreachableError
from common.keyring import Keyring
from common.messages import (
    BULK_BYTES,
    SPOKEN,
    Ack,
    Hello,
    Message,
    Nack,
    Readiness,
    Refused,
    Versions,
    Welcome,
    decode,
    encode,
    version_of,
)
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.rate import RateLimit
from common.threads import in_thread
from common.transport import DEFAULT_TIMING, Link, LinkTiming, open_link
from primary.backlog import Backlog, Offer, SharedEpoch
from primary.capture import CapturedEpoch
from primary.inquiry import ask_held
from primary.outgoing import Frames, Held, Passage, Seed, epoch_messages, full_bytes
from primary.session import DEFAULT_STREAM_TIMING, RefusedError, Session, StreamTiming
from primary.store_verifier import StoreVerifier
from primary.verification import Verification

log = structlog.get_logger(__name__)

LATENCIES_KEPT = 1000


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """What a stream has done since it was made."""

    bytes_sent: int
    """All frames of epochs, those of unfinished ones included."""
    full_equivalent_bytes: int
    """What the acknowledged epochs would have cost whole and uncompressed."""
    epochs_acknowledged: int
    commit_latency_ms: tuple[float, ...]
    """From the offer of an epoch to its acknowledgement; the newest `LATENCIES_KEPT`."""


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """The newest epoch that a replica was to get and is not known to have. Whoever is given it holds it."""

    shared: SharedEpoch
    base: Held | None
    """What the replica is known to have: its pages need not be kept. None: nothing that is known."""


class ReplicaStream:
    """Streams one workload to one replica in one term. `run()` in a task group; cancel it to end.

    Not guaranteed: that an offered epoch is sent (a newer one may take its place).
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        *,
        node: str,
        keys: Keyring,
        peer: Peer,
        spec: WorkloadSpec,
        term: int,
        incarnation: str,
        secret: int = 0,
        on_acknowledged: Callable[[EpochId], None] = lambda epoch: None,
        on_refused: Callable[[Refused], None] = lambda refusal: None,
        on_left: Callable[[Unacknowledged], None] | None = None,
        verification: Verification | None = None,
        software: str = "outlive",
        timing: StreamTiming = DEFAULT_STREAM_TIMING,
        link_timing: LinkTiming = DEFAULT_TIMING,
        clock: Clock | None = None,
        versions: Versions = SPOKEN,
    ) -> None:
        """`secret` is that under which the epochs' pages are identified.

        `verification` decides which pages of an acknowledged epoch are compared with what is stored of it
        (None: none are). `on_left` gets what is not acknowledged when this ends; None: that is given back.
        Callbacks must not block.
        """
        self._context = context
        self._node = node
        self._keys = keys
        self._peer = peer
        self._hello = Hello(
            protocol=versions.newest,
            software=software,
            node=node,
            workload=spec.name,
            term=term,
            incarnation=incarnation,
            spec=spec,
            oldest=versions.oldest,
        )
        self._versions = versions
        self._secret = secret
        self._on_acknowledged = on_acknowledged
        self._on_refused = on_refused
        self._on_left = on_left
        self._verifier = StoreVerifier(peer.name, secret, verification or Verification(0))
        self._timing = timing
        self._link_timing = link_timing
        self._clock = clock or SystemClock()
        self._log = log.bind(workload=spec.name, replica=peer.name)
        self._backlog = Backlog()
        self._buffer = bytearray()
        self._rate = RateLimit(peer.max_mib_per_s * (1 << 20))
        self._held: Held | None = None
        self._newest: EpochId | None = None
        self._base: EpochId | None = None
        self._seed = 0
        self._resync: Literal["", "ask", "full"] = ""
        self._unconfirmed: tuple[Held, float] | None = None
        self._sending: tuple[CapturedEpoch, Passage, float] | None = None
        """The epoch on its way, and since when."""
        self._connected = False
        self._acknowledged: EpochId | None = None
        self._acknowledged_wall_s: float | None = None
        self._restorable = False
        self._reasons: tuple[str, ...] = ()
        self._failures = 0
        self._bytes_sent = 0
        self._full_equivalent_bytes = 0
        self._epochs_acknowledged = 0
        self._latencies_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.problem = ""
        """Why the last connection or epoch failed, in a sentence; empty while all is well."""

    def offer(self, shared: SharedEpoch) -> None:
        """Take note of a new epoch and hold it until it is acknowledged or replaced. Never waits."""
        self._backlog.put(shared, self._clock.monotonic_s())

    def resync(self, *, full: bool) -> None:
        """Take nothing for granted of what the replica holds: ask, or (`full`) send everything anew.

        Holds from the next epoch on; one in flight is not disturbed.
        """
        if self._resync != "full":
            self._resync = "full" if full else "ask"

    @property
    def wants_epoch(self) -> bool:
        """Whether the replica is there and nothing waits for it: an offer now would not replace another."""
        return self._connected and self._backlog.empty

    @property
    def held(self) -> EpochId | None:
        """The epoch that the replica is known to stand on; None: it has none, or must be asked."""
        return self._held.id if self._held is not None and self._resync != "full" else None

    @property
    def progress(self) -> ReplicaProgress:
        """How far the replica is."""
        return ReplicaProgress(
            node=self._peer.name,
            connected=self._connected,
            acknowledged=self._acknowledged,
            acknowledged_wall_s=self._acknowledged_wall_s,
            restorable=self._restorable,
            reasons=self._reasons,
            sending=self._sending_progress(),
        )

    def _sending_progress(self) -> SendingProgress | None:
        if self._sending is None:
            return None
        epoch, passage, since_s = self._sending
        return SendingProgress(
            epoch=epoch.id,
            for_s=self._clock.monotonic_s() - since_s,
            done_bytes=passage.done_bytes,
            due_bytes=epoch.memory_bytes + epoch.file_bytes,
        )

    @property
    def counters(self) -> StreamCounters:
        """What was sent and acknowledged so far."""
        return StreamCounters(
            self._bytes_sent,
            self._full_equivalent_bytes,
            self._epochs_acknowledged,
            tuple(self._latencies_ms),
        )

    async def run(self) -> None:
        """Stream until cancelled; failures are remembered in `problem`, logged once each, and retried."""
        try:
            while True:
                await self._connect_once()
                self._connected = False
                await asyncio.sleep(self._pause_s())
        finally:
            self._connected = False
            self._leave()

    def _leave(self) -> None:
        """Hand over what was not acknowledged."""
        offer = self._backlog.close()
        if offer is None:
            return
        acknowledged = self._acknowledged is not None and offer.epoch.id <= self._acknowledged
        if acknowledged or self._on_left is None:
            offer.shared.drop()
        else:
            self._on_left(Unacknowledged(offer.shared, self._held))

    async def _connect_once(self) -> None:
        failure: BaseException | None = None
        try:
            with open_link(
                self._context,
                peer=self._peer,
                port=self._peer.agent_port,
                keys=self._keys,
                timing=self._link_timing,
            ) as link:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(link))
                    session = await self._greet(link)
                    tasks.create_task(session.listen())
                    await self._send_all(session)
        except* (OutliveError, zmq.ZMQError) as group:
            failure = _first(group)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # Python 3.11's task group forgets a cancellation that comes together with a failure.
            raise asyncio.CancelledError
        self._failures += 1
        if isinstance(failure, RefusedError):
            self._on_refused(failure.refusal)
        self._note_problem("stream.interrupted", str(failure))

    async def _watch(self, link: Link) -> None:
        raise UnreachableError(await link.lost())

    async def _greet(self, link: Link) -> Session:
        """Greet in the newest version, and once more in the replica's own if that is older."""
        answer, version = await self._say_hello(link, self._versions.newest)
        if isinstance(answer, Refused) and answer.code == "version":
            if not self._versions.oldest <= version < self._versions.newest:
                raise RefusedError(self._peer.name, self._too_far(answer, version))
            answer, version = await self._say_hello(link, version)
        if isinstance(answer, Refused):
            raise RefusedError(self._peer.name, answer)
        if not isinstance(answer, Welcome) or answer.node != self._peer.name:
            raise ProtocolError(f"{self._peer.name} did not answer the greeting but said {answer}")
        self._recall(answer)
        self._connected = True
        self._note_progress()
        self._log.info("stream.connected", newest=str(answer.newest), base=self._held is not None)
        return Session(
            self._peer.name,
            link,
            answer.credit_bytes,
            self._timing,
            self._rate,
            version=version,
            on_sent=self._note_sent,
            on_readiness=self._note_readiness,
        )

    async def _say_hello(self, link: Link, version: int) -> tuple[Message, int]:
        """Greet in a version of the wire format; return the answer, and in which version that is."""
        hello = msgspec.structs.replace(self._hello, protocol=version)
        try:
            async with asyncio.timeout(self._timing.greeting_s):
                await link.send(encode(hello, version=version))
                frames = await link.receive()
                answer, _ = decode(frames, self._versions)
        except TimeoutError:
            raise UnreachableError(
                f"{self._peer.name} did not answer within {self._timing.greeting_s:g} s",
                hint=f"is its agent running and {self._peer.address} port {self._peer.agent_port} open?",
            ) from None
        return answer, version_of(frames)

    def _too_far(self, refusal: Refused, theirs: int) -> Refused:
        """Say of a refusal for the version what it means, and what to do."""
        node, peer, ours = self._hello.node, self._peer.name, self._versions
        older = peer if theirs < ours.oldest else node
        reason = (
            f"{peer} speaks version {theirs} of the wire format, {node} {ours}: "
            f"upgrade {older}, one version at a time"
        )
        return msgspec.structs.replace(refusal, reason=reason)

    def _recall(self, welcome: Welcome) -> None:
        """Find out what the replica stands on: only an epoch whose table is known can be a base.

        An epoch that was in flight when the connection broke may have been committed after all.
        """
        newest = self._newest = welcome.newest
        self._base, self._seed = None, welcome.seed
        unconfirmed, self._unconfirmed = self._unconfirmed, None
        if unconfirmed is not None and unconfirmed[0].id == newest:
            self._remember(*unconfirmed)
        elif self._held is None or self._held.id != newest:
            self._held = None
            self._base = newest
            ours = newest is not None and newest.term == self._hello.term
            self._acknowledged = newest if ours else None
            self._acknowledged_wall_s = welcome.newest_frozen_wall_s if ours else None

    def _remember(self, held: Held, frozen_wall_s: float) -> None:
        self._held = held
        self._acknowledged = self._newest = held.id
        self._acknowledged_wall_s = frozen_wall_s
        self._epochs_acknowledged += 1
        self._on_acknowledged(held.id)

    async def _send_all(self, session: Session) -> None:
        """Send what is offered, one epoch after the other."""
        while True:
            offer = await self._backlog.take()
            try:
                again = await self._send_one(session, offer)
            except BaseException:
                self._backlog.put_back(offer)
                raise
            if again:
                self._backlog.put_back(offer)
                await asyncio.sleep(self._pause_s())
            else:
                offer.shared.drop()

    async def _send_one(self, session: Session, offer: Offer) -> bool:
        """Send an epoch and wait for what comes of it; True if it should be tried once more."""
        epoch = offer.epoch
        if self._acknowledged is not None and epoch.id <= self._acknowledged:
            return False
        self._forget_if_told()
        base = self._held
        if epoch.stands_on is not None and (base is None or base.id < epoch.stands_on):
            # The next captures take in what is missing: `held` tells them that it is wanted.
            self._log.info("stream.needs_full", epoch=str(epoch.id), stands_on=str(epoch.stands_on))
            if base is not None:
                self._held, self._base = None, base.id
            return False
        if base is None and self._base is not None:
            base = self._held = Held(
                self._base, await ask_held(session, epoch, self._secret, held=self._base)
            )
        self._base = None
        seed = None
        if self._seed:
            seed = Seed(self._seed, await ask_held(session, epoch, self._secret, seed=self._seed))
        # Not to be used twice: what the replica keeps of this epoch may take the seed's place.
        self._seed = 0
        if not self._buffer:
            self._buffer = bytearray(BULK_BYTES)
        session.begin(epoch.id, lent_bytes=seed.table.pages * PAGE_BYTES if seed else 0)
        self._unconfirmed = Held.of(epoch), epoch.frozen_wall_s
        passage = Passage(on_copies=session.copies)
        self._sending = epoch, passage, self._clock.monotonic_s()
        try:
            await self._send_messages(
                session,
                epoch_messages(
                    epoch,
                    self._hello.term,
                    base,
                    seed,
                    self._buffer,
                    session.version,
                    passage,
                ),
            )
            outcome = await session.acknowledged()
        except CaptureError as error:
            self._unconfirmed = None
            # The receiver drops what it has of it as soon as the next epoch begins.
            self._note_problem("stream.epoch_unreadable", error.message)
            if (held := self._held) is not None:  # with all content at hand, what it lacks can be sent
                self._held, self._base = None, held.id
            return False
        finally:
            self._sending = None
            session.end()
        self._unconfirmed = None
        if isinstance(outcome, Ack):
            self._acknowledge(offer, outcome, session.version)
            if base is None and self._resync == "full":
                self._resync = ""
            if doubt := await self._verifier.compare(session, epoch):
                # First of all here, so that it holds whether the replica hears of it or not.
                self.resync(full=True)
                await session.send(encode(doubt, version=session.version))
            return False
        return self._not_acknowledged(outcome, whole=base is None)

    def _forget_if_told(self) -> None:
        """Carry out `resync`; a full one holds until an epoch without a base is acknowledged."""
        if self._resync == "full":
            self._held, self._base, self._seed = None, None, 0
        elif self._resync:
            self._base = self._held.id if self._held else self._base
            self._held = None
            self._resync = ""

    async def _send_messages(self, session: Session, messages: Iterator[Frames]) -> None:
        """Send as credit allows, drawing about a block at a time in a thread; a `Nack` ends it early."""
        while batch := await in_thread(_draw, messages):
            for frames in batch:
                await session.send(frames)
                if session.outcome is not None:
                    return

    def _acknowledge(self, offer: Offer, ack: Ack, version: int) -> None:
        epoch = offer.epoch
        latency_ms = (self._clock.monotonic_s() - offer.offered_s) * 1000
        self._latencies_ms.append(latency_ms)
        self._full_equivalent_bytes += full_bytes(epoch)
        self._restorable, self._reasons = ack.restorable, ack.reasons
        self._remember(Held.of(epoch), epoch.frozen_wall_s)
        self._note_progress()
        self._log.debug("stream.acknowledged", epoch=str(epoch.id), latency_ms=round(latency_ms, 1))

    def _not_acknowledged(self, nack: Nack, *, whole: bool) -> bool:
        """Take in a `Nack`; True if the epoch is worth sending again."""
        self._failures += 1
        self._note_problem("stream.not_acknowledged", nack.reason, epoch=str(nack.epoch), code=nack.code)
        if nack.retry_with_base:
            self._held = None
        if nack.code == "no-space" and whole:
            # There may be room for what differs, whatever was the matter with the base.
            self._base, self._resync = self._newest, ""
        return nack.code != "not-newer"

    def _note_sent(self, size_bytes: int) -> None:
        self._bytes_sent += size_bytes

    def _note_readiness(self, readiness: Readiness) -> None:
        self._restorable, self._reasons = readiness.restorable, readiness.reasons

    def _note_problem(self, event: str, problem: str, **values: str) -> None:
        """Log what went wrong, unless it is what went wrong before."""
        if problem != self.problem:
            self._log.warning(event, reason=problem, **values)
        self.problem = problem

    def _note_progress(self) -> None:
        self._failures = 0
        self.problem = ""

    def _pause_s(self) -> float:
        pause_s: float = min(self._timing.retry_s * 2 ** min(self._failures, 16), self._timing.retry_max_s)
        return pause_s * (1 + random.random() / 2)  # noqa: S311 - so that streams don't retry in step


def _draw(messages: Iterator[Frames]) -> list[Frames]:
    """Take the next messages, about as many as make one block: a thread each would cost more than most."""
    batch: list[Frames] = []
    size_bytes = 0
    while size_bytes < BULK_BYTES // 4:
        frames = next(messages, None)
        if frames is None:
            break
        batch.append(frames)
        size_bytes += sum(len(frame) for frame in frames)
    return batch


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the exception that came first; the others followed from it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
