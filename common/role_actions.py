"""What the transitions of the role machine do: from a `Role` to the next one, and the effects on the way.

Every action here is a pure function of the role, the event and the moment. When a transition happens, and
where it leads, stands in `common.role_table`.
"""

from __future__ import annotations

from msgspec.structs import replace

from common.control import Done, Refused, TermHistory, TimelineEntry
from common.role_events import (
    Answer,
    ClaimTerm,
    DropVip,
    Effect,
    Event,
    FenceResult,
    Heard,
    KillWorkload,
    LiftHold,
    OperatorFailover,
    OperatorStart,
    PersistTerm,
    RunFence,
    SaveHistory,
    SaveSpec,
    StepFailed,
    TermPersisted,
)
from common.roles import OWNING, Clean, Instant, Mark, PeerView, Role, TermRecord
from common.succession import (
    all_accounted,
    by_lease,
    contender,
    how_to_replace,
    is_silent,
    kept_by_giver,
    last_heard_s,
    leads_nothing_newer,
    line_moves,
    planned,
    right_stands,
    unvouched,
)

Acted = tuple[Role, tuple[Effect, ...]]

TERM_LEAP = 100
"""More terms than are led unheard while a node is off."""

_TERM_LINE = 10
"""Distance of the terms to which two nodes leap that do not hear of each other."""

_TIMELINE_ENTRIES = 100
"""A workload that keeps ending and starting in one term writes no endless story."""

HANDOVER = "switchover"
"""With this entry begins a timeline that tells how a term was handed over, or not."""

_VIP_STEPS = ("hold", "add_vip", "lift", "announce")


# --- building blocks --------------------------------------------------------------------------------


def nothing(role: Role, event: Event, now: Instant) -> Acted:
    """Change nothing but the state."""
    return role, ()


def noted(role: Role, now: Instant, event: str, reason: str) -> Role:
    """Add an entry to the timeline; the first one begins it."""
    if not role.timeline_from_s:
        role = replace(role, timeline_from_s=now.monotonic_s)
    at_ms = (now.monotonic_s - role.timeline_from_s) * 1000
    entry = TimelineEntry(at_ms=round(at_ms, 3), wall_s=now.wall_s, event=event, reason=reason)
    return replace(role, timeline=(*role.timeline[-_TIMELINE_ENTRIES + 1 :], entry))


def persist(role: Role, record: TermRecord) -> Acted:
    """Send a record to the disk; nothing is done because of it before it is there."""
    return replace(role, wanted=record, retry_at_s=0.0), (PersistTerm(record),)


def remark(role: Role, mark: Mark, *, heir: str = "", nothing_kept: bool = False) -> Acted:
    """Record how far the leader of this term is; if it gave that up, to whom, and whether it keeps nothing.

    What another node said counts as heard under this boot. This node's own term stays bound to the boot in
    which it began: after another boot others may lead, and no mark of ours can change that.
    """
    boot_id = role.newest.boot_id if role.newest.leader == role.me else role.boot_id
    return persist(
        role, replace(role.newest, mark=mark, boot_id=boot_id, heir=heir, nothing_kept=nothing_kept)
    )


def next_term(
    role: Role, mark: Mark, cause: str, now: Instant, *, leap: bool = False, given: int = 0, heir: str = ""
) -> Acted:
    """Send a new term, led by this node, to the disk.

    Whoever holds the right, or took it from its holder by a fence, is the only one to create the next term.
    An operator's word is not as good: a node that is off may have led terms that nobody heard of. So a term
    that rests on it leaps over them, to the next hundred, and ten further for each place in the succession.
    (Operators who vouch on several nodes, each time without the others, can still go astray.)
    `given` is a term that etcd gave this node: that one, for nobody else has it. `heir` is to whom a term
    that is yielded at once is given.
    """
    term = given or _next_number(role, leap=leap)
    record = TermRecord(
        term=term,
        leader=role.me,
        mark=mark,
        boot_id=role.boot_id,
        cause=cause,
        began_wall_s=now.wall_s,
        heir=heir,
        handed_by=_handed_by(role, now),
    )
    return persist(role, record)


def _next_number(role: Role, *, leap: bool) -> int:
    known = max(role.newest.term, role.refusal.term if role.refusal is not None else 0)
    if not leap:
        return known + 1
    place = role.spec.nodes.index(role.me) if role.me in role.spec.nodes else len(role.spec.nodes)
    return (known // TERM_LEAP + 1) * TERM_LEAP + place * _TERM_LINE


def _handed_by(role: Role, now: Instant) -> str:
    """Return who keeps the workload frozen until it runs here; empty: nobody does, or this node itself.

    Nobody does if an operator says that the node is off: then any epoch may be restored here.
    """
    if planned(role):
        return "" if role.alive else kept_by_giver(role)
    giver = role.record.handed_by
    if role.by_operator and role.vouched == giver and is_silent(role, giver, now):
        return ""
    return role.record.handed_by if role.record.leader == role.me and role.record.mark == "failed" else ""


def history(role: Role) -> SaveHistory:
    """Return this term's story as it is now. Of what is not in it (any more), the one on disk stays."""
    story = _heading(role, role.record)
    if story.leader != role.me:
        return SaveHistory(story)
    handover = bool(role.timeline) and role.timeline[0].event == HANDOVER
    story = replace(story, restored=role.report.restored if role.report is not None else None)
    return SaveHistory(replace(story, **{"handover" if handover else "timeline": role.timeline}))


def _heading(role: Role, record: TermRecord) -> TermHistory:
    return TermHistory(
        workload=role.spec.name,
        term=record.term,
        leader=record.leader,
        cause=record.cause,
        began_wall_s=record.began_wall_s,
    )


def undo(role: Role, *steps: Clean) -> Acted:
    """Begin to undo what a node that may not lead must not have; goes on until it succeeds.

    What has failed before is tried again when it would have been.
    """
    wanted = frozenset(step for step in steps if step == "kill" or role.spec.vip is not None)
    again_s = role.undo_at_s if role.undo else 0.0
    return replace(role, undo=role.undo | wanted, undo_at_s=again_s), undoing(wanted)


def undoing(steps: frozenset[Clean]) -> tuple[Effect, ...]:
    """Return the effects that undo these steps: first the address, at once; killing may take long."""
    effects: list[Effect] = []
    if "drop_vip" in steps:
        effects.append(DropVip())
    if "kill" in steps:
        effects.append(KillWorkload())
    if "lift" in steps:
        effects.append(LiftHold())
    return tuple(effects)


def answered(role: Role, answer: Done | Refused) -> Acted:
    """Answer the operator's pending request, if there is one."""
    if role.request is None:
        return role, ()
    return replace(role, request=None, vouched=""), (Answer(request=role.request, answer=answer),)


def both(first: Acted, second: Acted) -> Acted:
    """Join two actions, the second of which began where the first ended."""
    return second[0], (*first[1], *second[1])


# --- hearing of others ------------------------------------------------------------------------------


def adopt(role: Role, event: Heard, now: Instant) -> Acted:
    """Record the newer term that was heard of."""
    owns = event.claim in OWNING
    hearsay = event.leader if event.leader != role.me else ""
    record = TermRecord(
        term=event.term,
        leader=event.node if owns else hearsay,
        mark=mark_of(event),
        boot_id=role.boot_id,
        cause=f"heard from {event.node}",
        began_wall_s=now.wall_s,
        heir=event.heir,
        nothing_kept=_keeps_nothing(event),
    )
    refusal = Refused(error="NoRightToLeadError", message=f"{event.node} knows the newer term {event.term}")
    cleared = replace(
        role,
        fence_attempt=role.fence_attempt + 1,
        retries=0,
        by_operator=False,
        step=None,
        heir="",
        starts_from=None,
        spec=role.spec_before or role.spec,
        spec_before=None,
        launched_at_s=now.monotonic_s,
    )
    told = answered(cleared, refusal)
    known = (SaveHistory(_heading(role, record)),) if record.leader else ()
    followed, effects = both(told, persist(told[0], record))
    return followed, (*effects, SaveSpec(followed.spec), *known)


def depose(role: Role, event: Heard, now: Instant) -> Acted:
    """Kill what runs here, drop the address, record the newer term."""
    killing = undo(role, "kill", "drop_vip", "lift")
    return both(killing, adopt(killing[0], event, now))


def give_way(role: Role, event: Heard, now: Instant) -> Acted:
    """Follow the newer term with nothing of the old one left here."""
    cleaning = undo(role, "drop_vip", "lift")
    return both(cleaning, adopt(cleaning[0], event, now))


def record_mark(role: Role, event: Heard, now: Instant) -> Acted:
    """Record how far the leader is now."""
    role = replace(role, launched_at_s=now.monotonic_s)
    return remark(role, mark_of(event), heir=event.heir, nothing_kept=_keeps_nothing(event))


def _keeps_nothing(event: Heard) -> bool:
    """Tell whether who gives a term up by name has nothing of the workload: what has ended stays so in it."""
    return event.claim == "yielded" and bool(event.heir) and not event.alive


def mark_of(event: Heard) -> Mark:
    """Return how far a leader is by what it says, or another node that does not hear it any more."""
    if event.leader and not event.takeovers:
        return "stopped"
    return event.claim if event.claim in ("stopped", "yielded") else "leads"


def give_way_quietly(role: Role, event: Event, now: Instant) -> Acted:
    """Leave nothing of an earlier leadership here; an earlier keeper may have died before it had done so.

    With leases, that may be half brought up, and wait for a gate to open.
    """
    return undo(role, *(("kill",) if by_lease(role) else ()), "drop_vip", "lift")


def kill(role: Role, event: Event, now: Instant) -> Acted:
    """Kill what runs here without a right."""
    return undo(role, "kill", "drop_vip", "lift")


# --- going for the lead -----------------------------------------------------------------------------


def suspect(role: Role, event: Event, now: Instant) -> Acted:
    """Begin the timeline at the leader's last sign of life."""
    at = last_heard_s(role, role.record.leader)
    began_s = role.listening_since_s if at is None else at
    what = "last heard" if at is not None else "listening"
    who = role.record.leader
    reason = f"the last heartbeat of {who}" if at is not None else f"{who} has not been heard since"
    ago_s = now.monotonic_s - began_s
    role = replace(role, timeline=(), timeline_from_s=began_s, retries=0, retry_at_s=0.0)
    role = noted(role, Instant(began_s, now.wall_s - ago_s), what, reason)
    limit_ms = role.timing.suspect_after_s * 1000
    why = f"silent for {ago_s * 1000:.0f} ms; at most {limit_ms:.0f} allowed"
    if role.peers.get(who, PeerView()).in_doubt:
        why = f"{who} says that its lease may be over"
    return noted(role, now, "suspected", why), ()


def pursue(role: Role, event: Event, now: Instant) -> Acted:
    """Fence whoever may lead, or record the new term at once if nobody may."""
    if by_lease(role):
        return claim(role, now, blank=_may_be_blank(role, now))
    rival = contender(role, now)
    if not rival:
        own = role.record.leader == role.me
        given = "this node holds" if own else f"{role.record.leader} has given up"
        return acquired(role, now, f"{given} term {role.record.term}", leap=own)
    if rival not in role.fenceable:  # refused before, unless an operator vouches
        return acquired(role, now, f"the operator vouches that {rival} is off", leap=True)
    role = noted(role, now, "fence asked", f"attempt {role.retries + 1}: {rival} has to be confirmed off")
    role = replace(role, fence_attempt=role.fence_attempt + 1)
    up_to = _next_number(role, leap=_next_may_have_begun(role)) - 1
    return role, (RunFence(rival, role.fence_attempt, role.record.term, up_to),)


def _may_be_blank(role: Role, now: Instant) -> bool:
    """Tell whether an operator has this node lead though etcd may have forgotten who led last."""
    leads = role.record.leader == role.me and role.record.mark == "leads"
    vouched = bool(role.vouched) and unvouched(role, role.vouched, now) is None
    return role.by_operator and (leads or vouched)


def claim(role: Role, now: Instant, *, blank: bool) -> Acted:
    """Ask etcd for the next term."""
    role = noted(role, now, "lease asked", f"attempt {role.retries + 1}: etcd has to give the next term")
    role = replace(role, fence_attempt=role.fence_attempt + 1)
    over = role.by_operator or role.starts_from is not None
    return role, (
        ClaimTerm(
            attempt=role.fence_attempt,
            term=_next_number(role, leap=False),
            known=role.record.term,
            unused=leads_nothing_newer(role, now),
            over=over,
            blank=blank,
        ),
    )


def _next_may_have_begun(role: Role) -> bool:
    """Tell whether the next term may be led: this one was given up, or only a word says who is off."""
    return role.record.mark == "yielded" or (role.by_operator and bool(role.others_off))


def acquired(role: Role, now: Instant, reason: str, *, leap: bool = False, given: int = 0) -> Acted:
    """The right to lead is there: record the new term before anything else."""
    role = noted(role, now, "right acquired", reason)
    if role.by_operator and role.cedes_to:
        return next_term(role, "yielded", _cause(role, reason), now, leap=leap, heir=role.cedes_to)
    return next_term(role, "taking_over", _cause(role, reason), now, leap=leap, given=given)


def what_is_ceded(role: Role) -> str:
    """Say to whom this node has given up the term that it took for another one, and how that goes on."""
    heir, there = role.record.heir, f"outlive failover {role.spec.name} --accept-data-loss"
    return f"the right to lead it, with term {role.record.term}, is {heir}'s; on {heir}: {there}"


def tell_ceded(role: Role, event: TermPersisted, now: Instant) -> Acted:
    """Keep the story of the term, and tell the operator where to go on."""
    what = what_is_ceded(role)
    role = noted(replace(role, by_operator=False, retries=0), now, "ceded", what)
    return both((role, (history(role),)), answered(role, Done(detail=what)))


def fenced(role: Role, event: FenceResult, now: Instant) -> Acted:
    """Go on with what the fence confirmed, or else with the operator's word."""
    if event.term:
        return acquired(role, now, event.reason, given=event.term)
    if event.outcome == "confirmed":
        return acquired(role, now, event.reason, leap=_next_may_have_begun(role))
    vouched = f"{event.reason}; the operator vouches that {event.node} is off"
    return acquired(role, now, vouched, leap=True)


def unfenced(role: Role, event: FenceResult, now: Instant) -> Acted:
    """Wait and try again later, less and less often."""
    delay_s = min(role.timing.retry_first_s * 2**role.retries, role.timing.retry_most_s)
    message = f"the fence of {event.node}: {event.outcome}: {event.reason}"
    hint = how_to_replace(role, event.node, now)
    if by_lease(role):
        delay_s, message, hint = (
            role.timing.claim_again_s,
            f"etcd: {event.outcome}: {event.reason}",
            _NO_LEASE,
        )
    role = replace(role, retries=role.retries + 1, retry_at_s=now.monotonic_s + delay_s, by_operator=False)
    refusal = Refused(
        error="NoRightToLeadError",
        message=message,
        hint=hint,
    )
    return answered(noted(role, now, "not fenced", event.reason), refusal)


_NO_LEASE = "only etcd gives the right to lead it: docs/concepts/leases.md says what to do when it is gone"


def halt(role: Role, event: FenceResult, now: Instant) -> Acted:
    """Go no further, though the leader is off; its fence could not be taken back."""
    return noted(role, now, "paused", event.reason), ()


def ask_failover(role: Role, event: OperatorFailover, now: Instant) -> Acted:
    """Go for the lead on an operator's word."""
    if role.name in ("following", "failed", "yielded"):
        role = replace(role, timeline=(), timeline_from_s=now.monotonic_s, retries=0)
    role = replace(
        role,
        request=event.request,
        vouched=event.old_primary_is_off,
        by_operator=True,
        others_off=event.others_are_off,
        cedes_to=event.to if event.to != role.me else "",
    )
    return pursue(noted(role, now, "failover", "asked for by an operator"), event, now)


def ask_start(role: Role, event: OperatorStart, now: Instant) -> Acted:
    """Record a fresh start: in the same term if this node leads it, else in a new one.

    Another line of succession begins a new term: who knows only the old one has no epoch of it.
    """
    record = role.record
    same = record.leader == role.me and record.mark != "yielded" and right_stands(role)
    moved = record.term > 0 and line_moves(role, event.spec, role.me)
    same = same and not moved and not event.peers_are_off
    role = replace(role, spec=event.spec, spec_before=role.spec, request=event.request)
    if not same:
        role = replace(role, timeline=(), timeline_from_s=now.monotonic_s)
    lost = _lost(role)
    role = noted(role, now, "start", f"asked for by an operator{lost}")
    if same:
        return remark(role, "launching")
    # Who lost the right by a boot or a fence is not the only one to create the next term; nor is the leader,
    # if an operator takes it over where only the old line is known.
    leap = moved or bool(event.peers_are_off) or (record.term > 0 and not right_stands(role))
    return next_term(role, "launching", f"started by an operator{lost}", now, leap=leap)


def ask_lease_to_start(role: Role, event: OperatorStart, now: Instant) -> Acted:
    """Ask etcd for the term of a fresh start."""
    blank = all_accounted(role, event, now)  # by what counted until now: it names whom the start takes off
    role = replace(
        role,
        spec=event.spec,
        spec_before=role.spec,
        request=event.request,
        starts_from=role.name,
        timeline=(),
        timeline_from_s=now.monotonic_s,
        retries=0,
    )
    role = noted(role, now, "start", f"asked for by an operator{_lost(role)}")
    return claim(role, now, blank=blank)


def start_by_lease(role: Role, event: FenceResult, now: Instant) -> Acted:
    """Record the fresh start in the term that etcd gave."""
    role = noted(role, now, "right acquired", event.reason)
    return next_term(role, "launching", f"started by an operator{_lost(role)}", now, given=event.term)


def start_denied(role: Role, event: FenceResult, now: Instant) -> Acted:
    """Tell the operator; everything stays as it was."""
    role = replace(role, starts_from=None, spec=role.spec_before or role.spec, spec_before=None)
    message = f"etcd: {event.outcome}: {event.reason}"
    return answered(role, Refused(error="NoRightToLeadError", message=message, hint=_NO_LEASE))


def not_recorded(role: Role, event: StepFailed, now: Instant) -> Acted:
    """Tell the operator; it is tried again, for nobody knows whether the disk holds it after all."""
    message = f"this could not be recorded and is tried again: {event.reason}"
    return answered(role, Refused(error="StoreError", message=message))


def _lost(role: Role) -> str:
    return " (memory content of earlier terms is not restored)" if role.record.term else ""


def _cause(role: Role, reason: str) -> str:
    if role.by_operator:
        return f"failover by an operator: {reason}"
    if planned(role):
        return f"switchover: {reason}"
    return f"takeover from {role.record.leader}: {reason}"
