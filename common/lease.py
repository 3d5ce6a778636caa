"""A leader's lease in etcd: when it counts, when the workload has to stand still, what is asked next. Pure.

In: what the role machine needs, the passing of time, answers of etcd (`common.lease_calls`). Out: a `Lease`
and effects, to be carried out in their order. Beside the role machine, and as pure: time is handed in.

Invariants:

- The workload runs only until `until_s`, which lies before the moment at which the lease can be over at etcd:
  it counts from before the grant or renewal was sent, and is less than the time to live by what this node's
  clock may be slow and by the margin in which everything has to have come to a stop.
- A switch of its own, which nobody else opens, keeps frozen whatever is in the workload's cgroup while there
  is no such lease: also what an agent brings up too late. It is opened only while this node leads and its
  lease counts: once etcd has said that lease and key are still those, or that no other node has claimed a
  term since.
- `until_s` is on record before the workload is let go: the guard (`outlive.lease_guard`) freezes it at that
  moment if this keeper does not.

Time is `CLOCK_BOOTTIME`: a host that was suspended has not stopped the clock of etcd.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from common.config import Etcd
from common.fence_request import Outcome
from common.lease_calls import (
    Answer,
    Claim,
    Denied,
    Granted,
    Held,
    Look,
    Question,
    Reclaim,
    Renew,
    Revoke,
    Seen,
    Standing,
    Unanswered,
)
from common.role_events import ClaimTerm, FenceResult, LeaseInDoubt, LeaseStands
from common.roles import LEADING, Role
from common.succession import keeps_frozen

_LOOK_EVERY_S = 2.0
"""How often a node that does not lead asks etcd how things stand, for people to see."""
_RENEWALS = 4
"""In each time to live; and an answer may take as long as lies between two of them."""
_CLAIM_WAITS_S = 1.0
"""How long a claim may wait for earlier questions: what it says of this node must not be old news."""


class LeaseTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What was agreed on about time."""

    ttl_s: int
    margin_s: float
    drift: float
    """How much slower than etcd's this node's clock may run, as a fraction."""

    @property
    def renew_every_s(self) -> float:
        """Between two renewals; also how long a call may take."""
        return self.ttl_s / _RENEWALS

    @property
    def good_for_s(self) -> float:
        """How long after its grant or renewal was sent a lease counts."""
        return self.ttl_s * (1 - self.drift) - self.margin_s


def lease_terms(etcd: Etcd) -> LeaseTerms:
    """Return what the configuration says of time."""
    return LeaseTerms(ttl_s=etcd.ttl_s, margin_s=etcd.margin_ms / 1000, drift=etcd.clock_drift_ppm / 1e6)


class Need(NamedTuple):
    """What the role machine needs of its lease."""

    held: bool
    """The lease is to be had, and kept."""
    guarded: bool
    """Something may run because of it, and must stand still without."""
    term: int
    """The term that this node leads by its record; 0: none."""
    serves: bool = True
    """It runs, or is to: whoever looks on wants to know if it stands still."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """All that a node knows of its right to lead one workload. Changed by `advance` only."""

    terms: LeaseTerms
    held: Held | None = None
    until_s: float = 0.0
    """The workload is frozen at this moment."""
    recorded: Literal["no", "held", "over"] = "no"
    """What is on record, or was to be."""
    closed: bool | None = None
    """The switch keeps the workload frozen; None: how an earlier keeper left it is not known."""
    doubt: str = ""
    """Why what this node leads is frozen for the lack of a lease; empty: it isn't."""
    asked: int = 0
    """Number of the question that is being asked, or was last."""
    question: Question | None = None
    """It has not been answered yet."""
    claim: ClaimTerm | None = None
    """What the role machine asked for, and has no answer to."""
    claimed_at_s: float = 0.0
    leftover: int = 0
    """A lease that is still to be ended."""
    next_at_s: float = 0.0
    problem: str = ""
    """Why the last question has no good answer."""
    unanswered: bool = False
    """The last question had no answer at all."""
    standing: Standing = Standing()
    seen_at_s: float | None = None
    """When etcd answered last."""


# --- what happens, and what is to be done about it ---------------------------------------------------


class Passed(msgspec.Struct, frozen=True):
    """Time has passed, or the role has changed."""


class Wanted(msgspec.Struct, frozen=True):
    """The role machine asks for a term."""

    claim: ClaimTerm


class Answered(msgspec.Struct, frozen=True):
    """What came of the question of that number."""

    number: int
    answer: Answer


class Ask(msgspec.Struct, frozen=True):
    """Put a question to etcd, then say `Answered` with its number, whatever happens."""

    number: int
    question: Question


class Freeze(msgspec.Struct, frozen=True):
    """Close the switch: the whole workload stands still, at once."""


class Thaw(msgspec.Struct, frozen=True):
    """Open the switch, and nothing else."""


class Keep(msgspec.Struct, frozen=True):
    """Put the lease on record, where the guard and the next keeper find it."""

    record: LeaseRecord


class Drop(msgspec.Struct, frozen=True):
    """Nothing is led here because of a lease: take it off the record."""


class Tell(msgspec.Struct, frozen=True):
    """Feed the role machine."""

    event: FenceResult | LeaseInDoubt | LeaseStands


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as it is on record; by the clock of this boot."""

    boot_id: str = ""
    held: Held | None = None
    """None: it is over, and only the guard has something to do with it yet."""
    until_s: float


Event = Passed | Wanted | Answered
Effect = Ask | Freeze | Thaw | Keep | Drop | Tell
Advanced = tuple[Lease, tuple[Effect, ...]]


def need_of(role: Role) -> Need:
    """Return what a role needs of its lease.

    One that acquires a term has nothing to run yet. What runs though the node leads no more is being killed,
    or is kept frozen until another node runs it: nothing is done about a freeze of it.
    """
    if role.spec.right_to_lead != "etcd":
        return Need(held=False, guarded=False, term=0)
    ours = role.record.leader == role.me
    ending = ours and not keeps_frozen(role) and (role.alive or bool(role.undo & {"kill", "drop_vip"}))
    guarded = role.name in LEADING or (ending and role.name != "acquiring")
    return Need(
        held=guarded or role.name == "acquiring",
        guarded=guarded,
        term=role.record.term if ours and role.record.boot_id == role.boot_id else 0,
        serves=role.alive or role.name in LEADING,
    )


def found(terms: LeaseTerms, record: LeaseRecord | None) -> Lease:
    """Return the lease as a keeper finds it when it begins."""
    if record is None:
        return Lease(terms=terms)
    if record.held is None:
        return Lease(terms=terms, recorded="over")
    return Lease(terms=terms, held=record.held, until_s=record.until_s, recorded="held")


def advance(lease: Lease, need: Need, event: Event, now_s: float) -> Advanced:
    """Take in one event."""
    effects: list[Effect] = []
    if isinstance(event, Wanted):
        lease = replace(lease, claim=event.claim, claimed_at_s=now_s)
    elif isinstance(event, Answered) and event.number == lease.asked and lease.question is not None:
        question, lease = lease.question, replace(lease, question=None)
        lease = _taken_in(lease, question, event.answer, now_s, effects)
    lease = _given_up(lease, now_s, effects)
    lease = _released(lease, need)
    lease = _staked(lease, need, now_s)
    lease = _switched(lease, need, now_s, effects)
    lease = _off_record(lease, need, now_s, effects)
    return _asked_next(lease, need, now_s, effects), tuple(effects)


def _taken_in(lease: Lease, question: Question, answer: Answer, now_s: float, effects: list[Effect]) -> Lease:
    """Learn from an answer."""
    lease = replace(lease, problem="", unanswered=isinstance(answer, Unanswered))
    if isinstance(answer, Unanswered):
        lease = replace(lease, problem=f"etcd does not answer: {answer.reason}")
    else:
        lease = replace(lease, seen_at_s=now_s)
    if isinstance(question, Claim):
        return _claimed(lease, question, answer, now_s, effects)
    if isinstance(question, Look):
        looked = isinstance(answer, Seen)
        lease = replace(lease, standing=answer.standing if isinstance(answer, Seen) else lease.standing)
        return replace(lease, next_at_s=now_s + (_LOOK_EVERY_S if looked else lease.terms.renew_every_s))
    if isinstance(question, Revoke):
        return replace(lease, next_at_s=now_s)
    if isinstance(question, Renew) and question.held != lease.held:  # let go of meanwhile: it is to be ended
        return replace(lease, next_at_s=now_s)
    if isinstance(answer, Granted):
        return _renewed(lease, answer, effects)
    if isinstance(answer, Denied):
        reason = f"the lease is lost: {answer.reason}"
        if answer.claimed_by and lease.doubt:
            effects.append(Tell(LeaseInDoubt(reason, answer.claimed_by)))
        lease = replace(lease, held=None, until_s=0.0, problem=reason)
        again_s = 0.0 if isinstance(question, Renew) else lease.terms.renew_every_s
        return replace(lease, next_at_s=now_s + again_s)
    return replace(lease, next_at_s=now_s + lease.terms.renew_every_s / 4)


def _claimed(lease: Lease, question: Claim, answer: Answer, now_s: float, effects: list[Effect]) -> Lease:
    """Tell the role machine what came of its claim."""
    claim = lease.claim
    lease = replace(lease, next_at_s=now_s)
    if claim is None or _question_of(claim) != question:  # it has asked for another one meanwhile
        return replace(lease, leftover=answer.held.lease_id) if isinstance(answer, Granted) else lease
    lease = replace(lease, claim=None)
    outcome: Outcome = "refused" if isinstance(answer, Denied) else "unknown"
    reason, term = "" if isinstance(answer, Granted | Seen) else answer.reason, 0
    if isinstance(answer, Granted) and now_s < counts_until_s(lease.terms, answer):
        lease = _renewed(lease, answer, effects)
        outcome, term = "confirmed", answer.held.term
        reason = f"etcd has given this node the lease of term {term}"
    elif isinstance(answer, Granted):
        lease = replace(lease, leftover=answer.held.lease_id)
        reason = "etcd was too slow: the lease that it gave counts no more"
    told = FenceResult(node="etcd", attempt=claim.attempt, outcome=outcome, reason=reason, term=term)
    effects.append(Tell(told))
    return lease


def _given_up(lease: Lease, now_s: float, effects: list[Effect]) -> Lease:
    """Do not ask for a claim any more that earlier questions have held up."""
    claim = lease.claim
    if claim is None or lease.question == _question_of(claim) or now_s < lease.claimed_at_s + _CLAIM_WAITS_S:
        return lease
    reason = "etcd is slow: the claim was not asked for, because an earlier question has no answer yet"
    told = FenceResult(node="etcd", attempt=claim.attempt, outcome="unknown", reason=reason)
    effects.append(Tell(told))
    return replace(lease, claim=None)


def _question_of(claim: ClaimTerm) -> Claim:
    return Claim(term=claim.term, known=claim.known, unused=claim.unused, over=claim.over, blank=claim.blank)


def _renewed(lease: Lease, answer: Granted, effects: list[Effect]) -> Lease:
    """Count the lease from before it was asked for."""
    until_s = counts_until_s(lease.terms, answer)
    next_at_s = answer.sent_s + lease.terms.renew_every_s
    lease = replace(lease, held=answer.held, until_s=until_s, recorded="held", next_at_s=next_at_s)
    effects.append(Keep(LeaseRecord(held=answer.held, until_s=until_s)))
    return lease


def counts_until_s(terms: LeaseTerms, answer: Granted) -> float:
    """Return until when what was granted counts."""
    return answer.sent_s + min(terms.ttl_s, answer.ttl_s) * (1 - terms.drift) - terms.margin_s


def _released(lease: Lease, need: Need) -> Lease:
    """Let go of a lease that nobody needs: of a term, too, that this node claimed and never recorded."""
    held = lease.held
    strange = need.guarded and need.term > 0 and held is not None and held.term != need.term
    if not strange and (need.held or lease.claim is not None):
        return lease
    if held is None:
        return lease
    return replace(lease, held=None, until_s=0.0, leftover=held.lease_id, next_at_s=0.0)


def _staked(lease: Lease, need: Need, now_s: float) -> Lease:
    """Let go of a lease that the claim which is asked for next will revoke, whatever comes of that.

    Invariant: nothing runs on a lease that this node may have asked to be ended. If the key still stands,
    `Reclaim` finds it, and binds it to another one.
    """
    claims = lease.question is None and isinstance(_question(lease, need, now_s), Claim)
    return replace(lease, held=None, until_s=0.0) if claims else lease


def unrecorded(lease: Lease, reason: str) -> Lease:
    """Return a lease that does not count, because it could not be put on record."""
    return replace(lease, until_s=0.0, problem=f"the lease cannot be put on record: {reason}")


def _switched(lease: Lease, need: Need, now_s: float, effects: list[Effect]) -> Lease:
    """Freeze what has no lease, and let go what this node leads by one; tell the role which of both."""
    good = may_run(lease, now_s)
    closed = not (need.guarded and good)
    if closed != lease.closed:
        effects.append(Freeze() if closed else Thaw())
        lease = replace(lease, closed=closed)
    if need.guarded and need.serves and not good and not lease.doubt:
        reason = lease.problem or "the lease was not renewed in time"
        effects.append(Tell(LeaseInDoubt(reason)))
        return replace(lease, doubt=reason)
    if lease.doubt and (good or not need.held):
        effects.append(Tell(LeaseStands()))
        return replace(lease, doubt="")
    return lease


def _off_record(lease: Lease, need: Need, now_s: float, effects: list[Effect]) -> Lease:
    """Take off the record what does not count any more, so that no keeper that begins goes on with it.

    While something may run here because of it, the guard has to be told that it is over: should this keeper
    fail to close the switch, or die before the address is gone, the guard sees to both.
    """
    if lease.held is not None or lease.recorded == "no":
        return lease
    if not need.guarded:
        effects.append(Drop())
        return replace(lease, recorded="no")
    if lease.recorded == "held":
        effects.append(Keep(LeaseRecord(until_s=now_s)))
    return replace(lease, recorded="over")


def may_run(lease: Lease, now_s: float) -> bool:
    """Tell whether the lease counts at this moment."""
    return lease.held is not None and now_s < lease.until_s


def _asked_next(lease: Lease, need: Need, now_s: float, effects: list[Effect]) -> Lease:
    """Ask the next question, one at a time."""
    if lease.question is not None:
        return lease
    question = _question(lease, need, now_s)
    if question is None:
        return lease
    number = lease.asked + 1
    effects.append(Ask(number, question))
    if isinstance(question, Revoke):
        lease = replace(lease, leftover=0)
    return replace(lease, asked=number, question=question)


def _question(lease: Lease, need: Need, now_s: float) -> Question | None:
    if lease.leftover:
        return Revoke(lease_id=lease.leftover)
    if (claim := lease.claim) is not None:
        return _question_of(claim)
    if now_s < lease.next_at_s:
        return None
    if lease.held is not None and need.held:
        return Renew(held=lease.held)
    if need.guarded and need.term:
        return Reclaim(term=need.term)
    return None if need.held else Look()
