"""How a role looks to a person: from a `Role` to a `WorkloadStatus`. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace

from common.control import LeaseStatus, ReplicaProgress, Verdict, WorkloadStatus
from common.objective import newest_elsewhere
from common.pauses import in_force
from common.role_pauses import unconfirmed_by
from common.roles import LEADING, Instant, Role
from common.succession import agent_alive, of_this_term, ready


def workload_status(
    role: Role, now: Instant, objective: Verdict = "none", lease: LeaseStatus | None = None
) -> WorkloadStatus:
    """Return what `status` shows of the workload on this node; the rest is kept beside the role."""
    report = role.report
    record = role.newest if role.name in ("following", "deposed") else role.record
    primary = record.term > 0 and record.leader == role.me
    replicas = report.replicas if report is not None and role.name in LEADING else ()
    restorable, reasons = _restorable(role, replicas, now)
    return WorkloadStatus(
        name=role.spec.name,
        role=_role(role, primary),
        state=role.name,
        reason=_reason(role, now),
        term=record.term,
        leader=record.leader,
        running=role.alive,
        stopped=record.mark == "stopped",
        restorable=restorable,
        reasons=reasons,
        data_at_risk_s=None if record.mark == "stopped" else _data_at_risk_s(role, now),
        rpo=objective,
        rpo_ms=role.spec.objective_ms,
        capture=report.capture if report is not None else None,
        captured=report.captured if report is not None else None,
        stored=report.stored if report is not None else None,
        replicas=tuple(_judged(role, replica) for replica in replicas),
        verification=report.verification if report is not None and role.name in LEADING else (),
        exit_code=None if role.alive else role.exit_code,
        volatile=report.volatile if report is not None else False,
        aside=report.aside if report is not None else (),
        pauses=in_force(role.pauses),
        pauses_unconfirmed_by=unconfirmed_by(role),
        lease=lease,
    )


def _role(role: Role, primary: bool) -> Literal["primary", "replica", "none"]:
    if primary:
        return "replica" if role.name in ("yielded", "deposed", "handed_over") else "primary"
    return "replica" if role.record.term > 0 and role.me in role.spec.nodes else "none"


def _judged(role: Role, replica: ReplicaProgress) -> ReplicaProgress:
    """Call a replica restorable only if it counts for the workload: it is at hand, and of this term."""
    if not replica.restorable or ready(role, replica):
        return replica
    old = () if of_this_term(role, replica) else (f"{replica.acknowledged} is of an earlier term",)
    return replace(replica, restorable=False, reasons=(*replica.reasons, *old))


def _restorable(
    role: Role, replicas: tuple[ReplicaProgress, ...], now: Instant
) -> tuple[bool, tuple[str, ...]]:
    """Primary: could another node restore it. Replica: could this one. What was stopped here needs nobody."""
    if role.record.mark == "stopped" and role.record.leader in ("", role.me):
        return False, ()
    silent = () if agent_alive(role, now) else ("this node's agent is silent",)
    if role.record.leader == role.me or role.report is None:
        if any(ready(role, replica) for replica in replicas) and not silent:
            return True, ()
        failing = role.report.capture_failures if role.report is not None else 0
        if failing:
            silent = (*silent, f"the last {failing} captures failed: outlive events")
        judged = [_judged(role, replica) for replica in replicas]
        said = tuple(f"{replica.node}: {reason}" for replica in judged for reason in replica.reasons)
        away = tuple(f"{replica.node} is not connected" for replica in replicas if not replica.connected)
        return False, (*silent, *away, *said) or ("no replica is known yet",)
    doubt = (role.report.doubt,) if role.report.doubt else ()
    return role.report.restorable and not silent and not doubt, (*silent, *role.report.reasons, *doubt)


def _data_at_risk_s(role: Role, now: Instant) -> float | None:
    """Age of the newest epoch that could be restored: elsewhere for the leader, here for a replica."""
    report = role.report
    if role.record.leader != role.me and report is not None:
        usable = report.restorable and report.stored_wall_s is not None and not report.doubt
        return max(0.0, now.wall_s - (report.stored_wall_s or 0.0)) if usable else None
    newest = newest_elsewhere(role)
    if newest is None or newest.acknowledged_wall_s is None:
        return None
    return max(0.0, now.wall_s - newest.acknowledged_wall_s)


def _reason(role: Role, now: Instant) -> str:
    """The machine's reason; of a leader first of all whether the workload is protected."""
    if role.name != "leading":
        return role.reason
    replicas = role.report.replicas if role.report is not None else ()
    able = [replica.node for replica in replicas if ready(role, replica)]
    syncing = [replica.node for replica in replicas if replica.connected and not ready(role, replica)]
    if not agent_alive(role, now):
        protection = "unprotected: this node's agent is silent; the workload runs on, uncaptured"
    elif able:
        protection = f"protected by {', '.join(able)}"
    elif syncing:
        protection = f"unprotected: {', '.join(syncing)} is being synchronised"
    else:
        protection = "unprotected: no replica is connected"
    frozen = f"frozen, nothing of it runs: {role.in_doubt}" if role.in_doubt else ""
    parts = (frozen, role.unhealthy, role.vip_problem, protection, role.reason)
    return "; ".join(dict.fromkeys(part for part in parts if part))
