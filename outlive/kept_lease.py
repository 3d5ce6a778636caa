"""One workload's lease as its keeper handles it: `common.lease`, and what it needs of the world around it.

In: the role, whenever something has happened; the passing of time. Out: questions to etcd, the gate closed
and opened, the record for the guard, events for the role machine. Nothing here waits for etcd but the task
that asks: a member that hangs never holds up the keeper.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from common.control import LeaseStatus
from common.etcd import EtcdClient
from common.gate import close_gate, is_closed, open_gate
from common.lease import (
    Answered,
    Ask,
    Drop,
    Effect,
    Event,
    Freeze,
    Keep,
    LeaseTerms,
    Passed,
    Tell,
    Thaw,
    Wanted,
    advance,
    found,
    may_run,
    need_of,
    unrecorded,
)
from common.lease_calls import Answer, LeaseKeys, Question, Unanswered
from common.role_events import ClaimTerm, FenceResult
from common.role_events import Event as RoleEvent
from common.roles import Role
from common.succession import by_lease
from outlive.keeper_effects import Hands
from outlive.lease_records import LeaseRecords

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
"""How often the gate itself is looked at."""


def boottime_s() -> float:
    """Read the clock of leases: it goes on while the host is suspended, as etcd's does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class KeptLease:
    """One workload's; all methods belong to the event loop's thread."""

    def __init__(
        self,
        role: Callable[[], Role],
        *,
        feed: Callable[[RoleEvent], None],
        terms: LeaseTerms,
        etcd: EtcdClient,
        hands: Hands,
        records: LeaseRecords,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """Find what an earlier keeper left; nothing is done before `begin`."""
        self._role = role
        self._feed = feed
        self._etcd = etcd
        self._hands = hands
        self._records = records
        self._tasks = tasks
        name = role().spec.name
        self._gate = hands.gate(name)
        self._keys = LeaseKeys(
            name, node=role().me, boot_id=role().boot_id, ttl_s=terms.ttl_s, clock=boottime_s
        )
        self._terms = terms
        self._lease = found(terms, records.left(name))
        self._in_use = False
        """The right to lead came from etcd when something happened last."""
        self._on_record = True
        """The guard knows until when the lease counts; else the gate stays closed."""
        self._gate_problem = ""
        """Why the gate could not be set at the last look; logged once."""
        self._watching: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Take over the gate, and watch over the lease from now on."""
        self._in_use = True  # perhaps it was, with the keeper before this one
        self.advance(Passed())
        self._watching = self._tasks.create_task(self._watch())

    def close(self) -> None:
        """Let go of it; the guard goes on."""
        for task in (self._watching, *self._asking):
            if task is not None:
                task.cancel()

    def claim(self, claim: ClaimTerm) -> None:
        """Ask etcd for a term; the answer goes to the role machine."""
        self.advance(Wanted(claim))

    def advance(self, event: Event) -> None:
        """Let the machine take an event in, and do what it wants."""
        if not by_lease(self._role()):
            self._end()
            return
        self._in_use = True
        self._lease, effects = advance(self._lease, need_of(self._role()), event, boottime_s())
        for effect in effects:
            self._perform(effect)

    def _end(self) -> None:
        """Another right to lead is declared: forget the lease, and open the gate.

        Not for what another node leads now: that is being killed. The record goes first, or the guard would
        close the gate again.
        """
        role = self._role()
        if self._in_use:
            self._in_use = False
            claim, asked = self._lease.claim, self._lease.asked
            self._records.drop(role.spec.name)
            self._lease = replace(found(self._terms, None), asked=asked)
            if claim is not None:
                reason = "the right to lead does not come from etcd any more"
                self._feed(FenceResult(node="etcd", attempt=claim.attempt, outcome="unknown", reason=reason))
        if is_closed(self._gate) and (role.record.leader == role.me or not role.alive):
            self._set_gate(closed=False)

    @property
    def etcd_answers(self) -> bool:
        """Tell whether etcd answered the last question."""
        return not self._lease.unanswered

    def status(self) -> LeaseStatus | None:
        """Return how it stands; None if no lease gives the right to lead."""
        role, lease, now_s = self._role(), self._lease, boottime_s()
        if not by_lease(role):
            return None
        leader = lease.standing.leader
        held = lease.held is not None
        return LeaseStatus(
            holder=role.me if held else leader.node if leader is not None else "",
            term=lease.held.term if lease.held is not None else leader.term if leader is not None else 0,
            good_for_s=round(lease.until_s - now_s, 3) if may_run(lease, now_s) else None,
            ttl_s=lease.terms.ttl_s,
            frozen=lease.doubt,
            problem=lease.problem or self._gate_problem,
            etcd_silence_s=round(now_s - lease.seen_at_s, 3) if lease.seen_at_s is not None else None,
        )

    def _perform(self, effect: Effect) -> None:
        role = self._role()
        match effect:
            case Ask(number=number, question=question):
                task = self._tasks.create_task(self._ask(number, question))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            case Freeze() | Thaw():
                self._set_as_wanted()
            case Keep(record=record):
                try:
                    self._records.keep(role.spec.name, record, self._gate, role.spec.vip)
                    self._on_record = True
                except OSError as error:
                    self._on_record = False
                    self._lease = unrecorded(self._lease, str(error))
                    log.error("lease.not-on-record workload=%s reason=%r", role.spec.name, str(error))
            case Drop():
                self._records.drop(role.spec.name)
            case Tell(event=event):
                self._feed(event)

    def _set_as_wanted(self) -> None:
        """Have the gate as the machine wants it."""
        self._set_gate(closed=self._lease.closed is not False or not self._on_record)

    def _set_gate(self, *, closed: bool) -> None:
        """Close or open the gate; tried again at the next look if that fails."""
        if closed == is_closed(self._gate):
            self._gate_problem = ""
            return
        try:
            (close_gate if closed else open_gate)(self._gate)
        except OSError as error:
            problem = f"the gate cannot be {'closed' if closed else 'opened'}: {error}"
            if problem != self._gate_problem:
                log.error("lease.gate workload=%s reason=%r", self._role().spec.name, problem)
            self._gate_problem = problem

    async def _ask(self, number: int, question: Question) -> None:
        answer: Answer
        try:
            answer = await self._etcd.ask(self._keys, question)
        except Exception as error:  # whatever it is, the keeper lives on for other workloads
            log.exception("lease.ask-failed workload=%s", self._role().spec.name)
            answer = Unanswered(reason=f"{type(error).__name__}: {error}")
        if isinstance(answer, Unanswered):
            log.info("lease.unanswered workload=%s reason=%r", self._role().spec.name, answer.reason)
        self.advance(Answered(number, answer))

    async def _watch(self) -> None:
        while True:
            self.advance(Passed())
            if by_lease(self._role()):
                self._set_as_wanted()
            left_s = self._lease.until_s - boottime_s()
            await asyncio.sleep(left_s if 0 < left_s < _LOOK_EVERY_S else _LOOK_EVERY_S)
