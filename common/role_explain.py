"""What would happen now if something failed: asked of the role machine itself, with a failure made up for it.

In: a `Role`, the moment, and in which failures of which node a fence can confirm. Out: an `Explanation`.
Nothing is decided here and no rule stands here twice: a copy of the role is given the silence, or the end,
that the failure would bring, goes through `common.role_table.step`, and what it came to is told. What another
node would do is that node's own answer, from its heartbeats. Pure; nothing is performed.

Not guaranteed: what a fence answers. It is taken to confirm in the failures that its `covers` names, unless
it was asked during the present silence and did not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from common.control import Explanation, Prospect, ReplicaProgress, TakeoverOutcome
from common.role_events import ClaimTerm, FenceResult, RunFence, TermPersisted, Tick, WorkloadEnded
from common.role_guards import leader_audible
from common.role_table import step
from common.roles import LEADING, PURSUING, SILENCES, Instant, PeerView, Role, Silence, Takeover
from common.succession import by_lease, holder, keeper_speaks, obstacles, paused, ready, successor

Covers = Mapping[str, frozenset[str]]
"""For each node: the failures in which a fence method can confirm that it is off."""

ETCD = ""
"""In `Covers` a name that no node has: the failures in which etcd gives this node a lease. Not there: all."""


def replaces(role: Role) -> bool:
    """Tell whether there is a leader that this node might replace: not if, as is on disk, it was stopped."""
    follows = role.name in (*PURSUING, "deposed") and role.record.leader != role.me
    return follows and role.record.mark != "stopped"


def takeovers(role: Role, now: Instant, covers: Covers) -> tuple[Takeover, ...]:
    """Return what this node would do if its leader fell silent now; empty if there is none to replace."""
    if not replaces(role):
        return ()
    if role.name == "deposed":
        return tuple(Takeover(silence=why, missing=(role.reason,)) for why in SILENCES)
    return tuple(Takeover(silence=why, missing=_missing(role, now, why, covers)) for why in SILENCES)


def explain(role: Role, now: Instant, covers: Covers) -> Explanation:
    """Return what would follow from each failure, by what this node knows."""
    leader = role.record.leader or role.me
    heir = holder(role) if role.record.mark == "yielded" else successor(role.spec, leader)
    by_silence = _decided_by(role, heir, now, covers)
    held = _held_by(role, heir)
    cases = [
        Prospect(
            failure=takeover.silence,
            outcome="failover" if not takeover.missing else "no failover",
            node=heir if not takeover.missing else "",
            reason="; ".join(takeover.missing) or _how(role, heir, leader),
        )
        for takeover in by_silence
    ]
    missing = next(each.missing for each in by_silence if each.silence == "host loss")
    return Explanation(
        workload=role.spec.name,
        node=role.me,
        term=role.record.term,
        leader=role.record.leader,
        stopped=role.record.mark == "stopped",
        would_fail_over=not missing,
        successor=heir,
        epoch=held.acknowledged if held is not None else None,
        loss_s=_age_s(held, now),
        missing=missing,
        cases=(*cases, _agent_dead(role, leader, now), _workload_ended(role, leader, heir, now)),
    )


def _how(role: Role, heir: str, leader: str) -> str:
    if by_lease(role):
        return f"{heir} takes over, once the lease of {leader} in etcd is over"
    return f"{heir} takes over, once a fence confirms that {leader} is off"


# --- the leader falls silent -------------------------------------------------------------------------


def _decided_by(role: Role, heir: str, now: Instant, covers: Covers) -> tuple[Takeover, ...]:
    """Return what the successor would do: this node's own machine, or that node's last word."""
    own = takeovers(role, now, covers) if heir == role.me else ()
    view = role.peers.get(heir, PeerView())
    current = keeper_speaks(role, heir, now) and view.term == role.record.term
    return own or (view.takeovers if current else ()) or _undecided(role, heir, now)


def _undecided(role: Role, heir: str, now: Instant) -> tuple[Takeover, ...]:
    """Return why nobody says that he would take over."""

    def reasons() -> Iterator[str]:
        if role.record.mark == "stopped" or not role.record.term:
            yield f"it is to run nowhere: {role.reason}"
        elif not heir:
            yield f"{role.record.leader} is the only node that may run it"
        elif heir == role.me:
            yield f"this node is {role.name}: {role.reason}"
        elif not keeper_speaks(role, heir, now):
            yield f"the keeper of {heir} is not heard: whether it would take over is not known here"
        else:
            yield f"{heir} does not say that it follows term {role.record.term}"
        if pause := paused(role):
            yield pause

    return tuple(Takeover(silence=why, missing=tuple(reasons())) for why in SILENCES)


def _missing(role: Role, now: Instant, why: Silence, covers: Covers) -> tuple[str, ...]:
    """Return what stands against a takeover by this node if the leader is silent from now on."""
    if role.name == "waiting" and role.retries > 0:
        return (role.reason,)  # the fence was asked during this silence, and did not confirm
    if role.name == "acquiring" and role.wanted is not None:
        return ()
    role, effects = step(_silenced(role, now), Tick(), now)
    for claim in (effect for effect in effects if isinstance(effect, ClaimTerm)):
        answers = why in covers.get(ETCD, frozenset(SILENCES))
        given = FenceResult(
            node="etcd",
            attempt=claim.attempt,
            outcome="confirmed" if answers else "unknown",
            reason="as it answers" if answers else "it does not answer this node",
            term=claim.term if answers else 0,
        )
        role, _ = step(role, given, now)
    for fence in (effect for effect in effects if isinstance(effect, RunFence)):
        covered = why in covers.get(fence.node, frozenset())
        answer = FenceResult(
            node=fence.node,
            attempt=fence.attempt,
            outcome="confirmed" if covered else "unknown",
            reason="as its covers says" if covered else f"no fence method for {fence.node} covers {why}",
        )
        role, _ = step(role, answer, now)
    if role.name == "acquiring" and role.wanted is not None:
        return ()
    return tuple(obstacles(role, now)) or (leader_audible(role, Tick(), now) or role.reason,)


def _silenced(role: Role, now: Instant) -> Role:
    """Return the role as it is once the leader was silent long enough, and nothing else has changed."""
    if role.wanted is not None:
        role, _ = step(role, TermPersisted(role.wanted), now)
    if role.name == "acquiring":
        role = replace(role, name="suspecting")
    long_ago_s = now.monotonic_s - 2 * role.timing.suspect_after_s
    view = role.peers.get(role.record.leader, PeerView())
    silent = replace(view, keeper_at_s=long_ago_s, agent_at_s=long_ago_s)
    return replace(
        role,
        peers={**role.peers, role.record.leader: silent},
        listening_since_s=now.monotonic_s - 2 * role.timing.listen_s - 2 * role.timing.suspect_after_s,
        ticked_at_s=now.monotonic_s,
        retry_at_s=0.0,
        request=None,
        by_operator=False,
    )


# --- what the leader outlives, or decides itself ---------------------------------------------------------


def _agent_dead(role: Role, leader: str, now: Instant) -> Prospect:
    """Ask this node's machine: with its own agent dead if it leads, else with the leader's."""
    long_ago_s = now.monotonic_s - 2 * (role.timing.agent_silent_after_s + role.timing.suspect_after_s)
    if role.name in LEADING:
        role = replace(role, agent_at_s=long_ago_s)
    elif leader in role.peers:
        view = replace(role.peers[leader], agent_at_s=long_ago_s, keeper_at_s=now.monotonic_s)
        role = replace(role, peers={**role.peers, leader: view})
    after, _ = step(replace(role, ticked_at_s=now.monotonic_s), Tick(), now)
    outcome: TakeoverOutcome = "failover" if after.name in ("acquiring", "yielding") else "runs on"
    if role.record.mark in ("stopped", "failed"):
        outcome = "stays down"
    reason = "a dead agent is no reason to take over: unprotected until it is back"
    return Prospect(
        failure="agent dead",
        outcome=outcome,
        node=leader if outcome == "runs on" else "",
        reason=reason if outcome == "runs on" else after.reason,
    )


def _workload_ended(role: Role, leader: str, heir: str, now: Instant) -> Prospect:
    """Ask this node's machine if it leads; the leader decides this alone."""
    if role.name != "leading":
        reason = (
            f"on_exit is {role.spec.on_exit}, {leader} decides: outlive explain {role.spec.name} on {leader}"
            if role.record.term and role.record.mark == "leads" and leader != role.me
            else f"it does not run: {role.reason}"
        )
        return Prospect(failure="workload ended", outcome="not known here", node="", reason=reason)
    listened_s = now.monotonic_s - role.timing.listen_s  # whoever can go on with it has said so by then
    began_s = min(role.listening_since_s, listened_s)
    role = replace(role, ticked_at_s=now.monotonic_s, listening_since_s=began_s)
    ended, _ = step(role, WorkloadEnded(), now)
    after, _ = step(ended, Tick(), now)
    if after.name == "yielding":
        return Prospect(failure="workload ended", outcome="failover", node=heir, reason=after.reason)
    restarts = after.newest.mark == "launching"
    return Prospect(
        failure="workload ended",
        outcome="restart" if restarts else "stays down",
        node=leader if restarts else "",
        reason=after.reason,
    )


# --- what would be lost ------------------------------------------------------------------------------


def _held_by(role: Role, heir: str) -> ReplicaProgress | None:
    """Return what the successor could restore, as this node knows; None if nothing, or if it is not known."""
    report = role.report
    if report is None or not heir:
        return None
    if heir == role.me:
        if not report.restorable or report.doubt or report.stored is None:
            return None
        return ReplicaProgress(
            node=heir,
            connected=True,
            acknowledged=report.stored,
            acknowledged_wall_s=report.stored_wall_s,
            restorable=True,
        )
    return next((each for each in report.replicas if each.node == heir and ready(role, each)), None)


def _age_s(held: ReplicaProgress | None, now: Instant) -> float | None:
    if held is None or held.acknowledged_wall_s is None:
        return None
    return max(0.0, now.wall_s - held.acknowledged_wall_s)
