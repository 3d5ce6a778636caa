"""Receives epochs from whoever leads, for all workloads that this node follows.

In: messages of authenticated peers. Out: committed epochs in the stores, and what their senders are told.
Every connection has a session with a task of its own; its messages are taken in by one thread at a time, in
order, and paid back in credit when they are done with, so that a session never has more than its window in
memory. What a peer may say when is `replica.assembly`'s business, what a message is `common.messages`'.

    Hello ──▶ right key? right term? does the agent follow? ──▶ Welcome, Readiness ──▶ epochs … ──▶ Ack/Nack
                 └── no: Refused, the connection counts no more

Keeps this: a workload has one active session, of the newest term; `Ack` is sent after the store's commit and
never before; a peer that talks nonsense loses its session and costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
import zmq.asyncio

from common.clock import Clock, SystemClock
from common.config import NodeConfig
from common.errors import OutliveError, ProtocolError, StaleTermError
from common.keyring import Keyring
from common.messages import (
    BULK_BYTES,
    MIN_CREDIT_BYTES,
    SPOKEN,
    Ack,
    Buffer,
    Credit,
    Doubt,
    Hello,
    Message,
    Nack,
    Readiness,
    RefusalCode,
    Refused,
    VersionError,
    Versions,
    Welcome,
    decode,
    encode,
    version_of,
)
from common.model import WorkloadSpec
from common.terms import TermGuard
from common.threads import in_thread
from common.transport import DEFAULT_TIMING, Incoming, LinkTiming, Server
from replica.assembly import Assembly, Committed, Doubted, Outcome, Told
from replica.levels import CRIU_RESTORE
from replica.store import EpochRecord, EpochStore

log = structlog.get_logger(__name__)

StoreOf = Callable[[str], EpochStore]
"""The store of a workload; may block (it is called in a thread) and raise StoreError."""

Accept = Callable[[Hello], Awaitable[None]]
"""Returns if this node follows that leader; else raises StaleTermError or another OutliveError."""

Check = Callable[[str, EpochRecord], Awaitable[tuple[bool, tuple[str, ...]]]]
"""Whether a workload's epoch could be restored here, and why not."""

_LOG_INTERVAL_S: Final = 60.0
_MOST_REFUSALS: Final = 32
"""How often a connection is refused before it is cut off: a sound sender ends it after the first time."""
_TIMES_GRANTED: Final = 4
"""How many times what was granted is read before the connection is cut off: it was told after the first."""
_CONNECTIONS_KNOWN: Final = 1024


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    """How much and how long a session may take."""

    credit_bytes: int = max(4 << 20, MIN_CREDIT_BYTES)
    """Most bytes of messages under way to this node in one session, in its memory or on the wire."""
    silence_s: float = 30.0
    """Longest pause within an epoch; then it is given up with its session."""
    least_bytes_per_s: float = 16 << 10
    """Slowest that an epoch may come, ..."""
    patience_s: float = 60.0
    """... but for as long as this, all pauses taken together: what only trickles in is given up too."""
    memory_bytes: int = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    """Largest memory of an epoch: the tables of its pages take a hundredth of it here, while it comes."""
    readiness_s: float = 30.0
    """Longest check for readiness; an epoch that was not checked in time counts as not restorable."""
    sessions_per_node: int = 256


class _Session:
    """One connection: the messages that came and were not taken in yet."""

    def __init__(self, greeting: Incoming, hello: Hello, window_bytes: int) -> None:
        self.connection = greeting.connection
        self.node = greeting.node
        self.key = greeting.key
        self.hello = hello
        self.version = version_of(greeting.frames)
        """Of the wire format, as both speak it."""
        self.window_bytes = window_bytes
        self.waiting: list[Incoming] = []
        self.unpaid_bytes = 0
        """Bytes that came and were not paid back in credit yet; more than the window is an offence."""
        self.over = ""
        """Why it ends, once it does."""
        self.refusal: RefusalCode | None = None
        """What its peer is told then; None: nothing, because it is gone or speaks elsewhere."""
        self.welcomed = False
        """Until then nothing is granted, so that only the active session of a workload takes memory."""
        self._changed = asyncio.Event()

    def put(self, incoming: Incoming) -> None:
        """Queue a message. Past its window the session is over."""
        self.unpaid_bytes += incoming.cost_bytes
        if self.over:
            return
        if self.unpaid_bytes > self.window_bytes:
            self.waiting.clear()
            self.end("more was sent than was granted", "nonsense")
            return
        if not self.welcomed:
            self.end("it went on before it was welcomed", "nonsense")
            return
        self.waiting.append(incoming)
        self._changed.set()

    def end(self, why: str, refusal: RefusalCode | None = None) -> None:
        """Let the session end as soon as the message that is being taken in is done with."""
        if not self.over:
            self.over, self.refusal = why, refusal
        self._changed.set()

    async def next(self) -> list[Incoming]:
        """Wait for messages: about a block's worth, in order; none when the session is over."""
        while not self.waiting and not self.over:
            self._changed.clear()
            await self._changed.wait()
        if self.over:
            return []
        cost_bytes, count = 0, 0
        while count < len(self.waiting) and cost_bytes < BULK_BYTES // 2:
            cost_bytes += self.waiting[count].cost_bytes
            count += 1
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        return batch


class Receiver:
    """Listens for leaders while `run()` runs. One a ZeroMQ context."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        config: NodeConfig,
        keys: Keyring,
        *,
        stores: StoreOf,
        guard: TermGuard,
        accept: Accept,
        readiness: Check,
        restore_command: Callable[[WorkloadSpec], Sequence[str]] = lambda spec: CRIU_RESTORE,
        limits: ReceiverLimits = ReceiverLimits(),
        link_timing: LinkTiming = DEFAULT_TIMING,
        clock: Clock | None = None,
        versions: Versions = SPOKEN,
        on_refused: Callable[[str, str], None] = lambda address, reason: None,
        on_not_committed: Callable[[str, Nack], None] = lambda workload, nack: None,
        on_doubt: Callable[[str, Doubt], None] = lambda workload, doubt: None,
    ) -> None:
        """`on_refused` is told of connections with a key that is no peer's.

        `on_not_committed` is told of epochs that this node did not keep, with the workload and the answer.
        `on_doubt` is told when a leader found that what is stored of a workload is not what it captured.

        `restore_command` says how stock CRIU restores a workload; what the images need is added to it.
        """
        self._context = context
        self._config = config
        self._keys = keys
        self._stores = stores
        self._guard = guard
        self._accept = accept
        self._readiness = readiness
        self._restore_command = restore_command
        self._limits = limits
        self._on_refused = on_refused
        self._on_not_committed = on_not_committed
        self._on_doubt = on_doubt
        self._link_timing = link_timing
        self._versions = versions
        self._clock = clock or SystemClock()
        self._sessions: dict[bytes, _Session] = {}
        self._active: dict[str, _Session] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._refused_of: Counter[bytes] = Counter()
        self._logged_s: dict[tuple[str, str], float] = {}
        self.listening = asyncio.Event()
        """Set while peers can connect."""
        self.port = config.node.agent_port
        """The port listened on."""
        self.refusals: Counter[str] = Counter()
        """How often a session was refused, by code."""

    async def run(self) -> None:
        """Receive until cancelled. Raises ConfigError if the node's address cannot be listened on."""
        server = Server(
            self._context,
            address=self._config.node.address,
            port=self._config.node.agent_port,
            keys=self._keys,
            timing=self._link_timing,
            most_per_s=0,  # credit bounds them
            on_refused=self._on_refused,
        )
        self._server = server
        self.port = server.port
        try:
            with self._keys.watched(self._end_revoked):
                await self._serve(server)
        finally:
            self.listening.clear()
            server.close()

    async def _serve(self, server: Server) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve())
            self.listening.set()
            while True:
                await self._route(tasks, await server.receive())

    def _end_revoked(self) -> None:
        for session in self._sessions.values():
            if self._keys.node_of(session.key) != session.node:
                session.end(f"the key that {session.node} greeted with was revoked")

    async def readiness_changed(self, workload: str, restorable: bool, reasons: tuple[str, ...]) -> None:
        """Tell a workload's leader, if it is connected, that the answer for the newest epoch changed."""
        session = self._active.get(workload)
        if session is not None:
            await self._tell(session, Readiness(restorable=restorable, reasons=reasons))

    @property
    def receiving(self) -> frozenset[str]:
        """Workloads of which a leader is connected and sends epochs."""
        return frozenset(self._active)

    def end_session(self, workload: str, why: str) -> None:
        """Receive no more of a workload in the session there is, e.g. because it is to be restored here.

        An epoch under way is given up; one that is being committed is. The leader may greet again.
        """
        if session := self._active.get(workload):
            session.end(why, "no-session")

    async def _route(self, tasks: asyncio.TaskGroup, incoming: Incoming) -> None:
        """Give a message to its session; a greeting makes a new one."""
        session = self._sessions.get(incoming.connection)
        if session is not None:
            session.put(incoming)
            if session.unpaid_bytes > _TIMES_GRANTED * session.window_bytes:
                self._server.cut(session.connection)
            return
        try:
            hello, _ = decode(incoming.frames, self._versions)
        except VersionError as error:
            await self._refuse_version(incoming, error)
            return
        except ProtocolError as error:
            await self._refuse(incoming, "nonsense", error.message)
            return
        if not isinstance(hello, Hello):
            await self._refuse(incoming, "no-session", "greet first")
        elif hello.node != incoming.node:
            await self._refuse(incoming, "identity", f"this key is {incoming.node}'s, not {hello.node}'s")
        elif hello.spec.name != hello.workload:
            await self._refuse(incoming, "nonsense", f"{hello.workload} comes with the spec of another")
        elif sum(s.node == incoming.node for s in self._sessions.values()) >= self._limits.sessions_per_node:
            await self._refuse(incoming, "busy", f"{incoming.node} has too many sessions")
        else:
            session = _Session(incoming, hello, self._limits.credit_bytes)
            self._sessions[incoming.connection] = session
            tasks.create_task(self._work(session), name=f"session {incoming.node} {hello.workload}")

    async def _refuse_version(self, to: Incoming, error: VersionError) -> None:
        """Say in which version this node can be spoken to: the newest one, as which a refusal is sent."""
        if error.theirs.oldest <= self._versions.newest < error.theirs.newest:
            await self._say_no(to, Refused(code="version", reason=f"greet in {self._versions}"))
        else:
            await self._refuse(to, "version", f"{error.message}: {error.hint}")

    async def _work(self, session: _Session) -> None:
        """One session from its greeting to its end; all that is wrong with a peer ends here."""
        hello = session.hello
        try:
            self._guard.check(hello.workload, hello.term, session.node)
            await self._accept(hello)
            if not session.over:  # else, with its key revoked meanwhile, it must not end the active one
                self._replace(session)
                async with self._turns.setdefault(hello.workload, asyncio.Lock()):
                    await self._converse(session)
            if session.refusal:
                await self._refuse(session, session.refusal, session.over)
        except StaleTermError as error:
            known = self._guard.newest(hello.workload)
            await self._refuse(session, "stale-term", error.message, known.term if known else 0)
        except ProtocolError as error:
            await self._refuse(session, _code_of(error, "nonsense"), error.message)
        except OutliveError as error:
            await self._refuse(session, "not-followed", str(error))
        finally:
            del self._sessions[session.connection]
            if self._active.get(hello.workload) is session:
                del self._active[hello.workload]

    def _replace(self, session: _Session) -> None:
        """Make the session its workload's active one; raises StaleTermError if another leader's is newer."""
        hello = session.hello
        old = self._active.get(hello.workload)
        if old is not None:
            if old.hello.term > hello.term or (old.hello.term == hello.term and old.node != session.node):
                raise StaleTermError(
                    f"{session.node} speaks for {hello.workload} in term {hello.term}, but {old.node} does "
                    f"in term {old.hello.term}"
                )
            old.end(f"{session.node} greeted again for {hello.workload}")
        self._active[hello.workload] = session

    async def _converse(self, session: _Session) -> None:
        """Welcome the leader and take in its epochs until the session is over."""
        hello = session.hello
        if session.over:
            return
        store = await in_thread(self._stores, hello.workload)
        newest, seed = await in_thread(lambda: (store.newest, store.seed))
        # What is in doubt is nothing to stand on: who knows of none sends everything.
        ground = newest if newest is not None and not store.doubt_about(newest.id) else None
        session.welcomed = True
        await self._tell(
            session,
            Welcome(
                protocol=session.version,
                node=self._config.node.name,
                newest=ground.id if ground else None,
                newest_frozen_wall_s=ground.frozen_wall_s if ground else None,
                seed=seed,
                credit_bytes=session.window_bytes,
            ),
        )
        if self._to_be_logged(session.node, f"greeted {hello.workload}"):
            log.info("receive.greeted", workload=hello.workload, leader=session.node, term=hello.term)
        if newest is not None:
            restorable, reasons = await self._check(hello.workload, newest)
            await self._tell(session, Readiness(restorable=restorable, reasons=reasons))
        assembly = Assembly(
            hello.workload,
            session.node,
            hello.term,
            store,
            self._guard,
            self._restore_command(hello.spec),
            most_memory_bytes=self._limits.memory_bytes,
        )
        try:
            await self._take_in(session, assembly, store)
        finally:
            await in_thread(assembly.abort)

    async def _take_in(self, session: _Session, assembly: Assembly, store: EpochStore) -> None:
        done_bytes = 0
        while not session.over:
            if not assembly.under_way:
                patience_s = self._limits.patience_s
            batch, waited_s = await self._wait(session, patience_s if assembly.under_way else None)
            came_s = sum(incoming.cost_bytes for incoming in batch) / self._limits.least_bytes_per_s
            patience_s = min(self._limits.patience_s, patience_s - waited_s + came_s)
            while batch and not session.over:
                taken, outcome = await in_thread(_take_batch, assembly, batch, session.version)
                done_bytes += sum(incoming.cost_bytes for incoming in batch[:taken])
                batch = batch[taken:]
                # Paid back in portions, small enough that what is held back never stops the sender.
                if outcome or done_bytes >= BULK_BYTES:
                    session.unpaid_bytes -= done_bytes
                    await self._tell(session, Credit(bytes=done_bytes))
                    done_bytes = 0
                if isinstance(outcome, Told):
                    await self._tell(session, outcome.message, [outcome.bulk])
                elif isinstance(outcome, Doubted):
                    await self._take_doubt(session, outcome.doubt, store)
                elif outcome:
                    await self._tell(session, await self._answer(session, outcome, store))

    async def _take_doubt(self, session: _Session, doubt: Doubt, store: EpochStore) -> None:
        """Let this node know, and the leader, that nobody may go for the lead with what is stored."""
        workload = session.hello.workload
        if self._to_be_logged(workload, "doubt"):
            log.warning("receive.doubt", workload=workload, epoch=str(doubt.epoch), reason=doubt.reason)
        self._on_doubt(workload, doubt)
        if (newest := await in_thread(lambda: store.newest)) is not None:
            restorable, reasons = await self._check(workload, newest)
            await self._tell(session, Readiness(restorable=restorable, reasons=reasons))

    async def _wait(self, session: _Session, patience_s: float | None) -> tuple[list[Incoming], float]:
        """Wait for messages, and say how long that took; within an epoch neither for ever nor too often."""
        if patience_s is None:
            return await session.next(), 0.0
        silence_s = self._limits.silence_s
        began_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(min(silence_s, patience_s)):
                return await session.next(), self._clock.monotonic_s() - began_s
        except TimeoutError:
            why = f"nothing came for {silence_s:g} s in the middle of an epoch"
            if patience_s < silence_s:
                why = f"an epoch came more slowly than {self._limits.least_bytes_per_s / 1024:g} KiB/s"
            session.end(why, "no-session")
            return [], 0.0

    async def _answer(self, session: _Session, outcome: Committed | Nack, store: EpochStore) -> Ack | Nack:
        workload = session.hello.workload
        if isinstance(outcome, Nack):
            if self._to_be_logged(workload, outcome.code):
                log.warning(
                    "receive.not_committed",
                    workload=workload,
                    epoch=str(outcome.epoch),
                    reason=outcome.reason,
                )
            self._on_not_committed(workload, outcome)
            return outcome
        record = outcome.record
        restorable, reasons = await self._check(workload, record)
        log.debug("receive.committed", workload=workload, epoch=str(record.id), restorable=restorable)
        return Ack(
            epoch=record.id,
            restorable=restorable,
            reasons=reasons,
            volatile=store.volatile,
            committed_wall_s=record.committed_wall_s,
        )

    async def _check(self, workload: str, record: EpochRecord) -> tuple[bool, tuple[str, ...]]:
        """Ask whether an epoch could be restored; what cannot be found out counts as no."""
        try:
            async with asyncio.timeout(self._limits.readiness_s):
                return await self._readiness(workload, record)
        except TimeoutError:
            return False, (f"the check for readiness took more than {self._limits.readiness_s:g} s",)
        except OutliveError as error:
            return False, (f"the check for readiness failed: {error}",)

    async def _tell(self, session: _Session, message: Message, bulk: Sequence[Buffer] = ()) -> None:
        """Send to a session's peer; if it is gone the session is over."""
        if not await self._server.send(session.connection, encode(message, bulk, version=session.version)):
            session.end(f"{session.node} is gone")

    async def _refuse(self, to: _Session | Incoming, code: RefusalCode, reason: str, term: int = 0) -> None:
        """Say no, count it, and log it once in a while for each node and reason."""
        self.refusals[code] += 1
        if self._to_be_logged(to.node, code):
            log.warning("receive.refused", node=to.node, code=code, reason=reason)
        await self._say_no(to, Refused(code=code, reason=reason[:4096], term=term))

    async def _say_no(self, to: _Session | Incoming, refused: Refused) -> None:
        """Send it in the newest version spoken here, which says which that is; who goes on and on is cut."""
        if len(self._refused_of) >= _CONNECTIONS_KNOWN:
            self._refused_of.clear()
        self._refused_of[to.connection] += 1
        if self._refused_of[to.connection] > _MOST_REFUSALS:
            self._server.cut(to.connection)
            return
        await self._server.send(to.connection, encode(refused, version=self._versions.newest))

    def _to_be_logged(self, who: str, what: str) -> bool:
        """Whether this is to be logged now; else it was a moment ago. Nobody fills the log by repetition."""
        now_s = self._clock.monotonic_s()
        last_s = self._logged_s.get((who, what))
        if last_s is not None and now_s - last_s < _LOG_INTERVAL_S:
            return False
        self._logged_s[(who, what)] = now_s
        return True


def _take_batch(assembly: Assembly, batch: Sequence[Incoming], version: int) -> tuple[int, Outcome | None]:
    """Take in messages in order, up to the first that has an outcome: how many, and which. In a thread.

    Outcomes go out before the next message is looked at: a short question can have a long answer.
    """
    for taken, incoming in enumerate(batch, start=1):
        message, bulk = decode(incoming.frames, Versions(version, version))
        outcome = assembly.take(message, bulk, incoming.frames)
        if outcome is not None:
            return taken, outcome
    return len(batch), None


def _code_of(error: ProtocolError, otherwise: RefusalCode) -> RefusalCode:
    return "version" if isinstance(error, VersionError) else otherwise
