"""Whether a workload's recovery point objective is met: how old what others could restore may be. Pure.

In: a `Role` and the moment, at every tick. Out: the next `Objective`. How old an epoch is, is asked of the
wall clock once, when the leader's agent first reports it: agent and keeper of one node share that clock. From
then on the monotonic clock counts, so that a clock that is set makes nothing look older or younger for long.
"""

from __future__ import annotations

import msgspec

from common.control import ReplicaProgress, Verdict
from common.model import EpochId
from common.roles import LEADING, Instant, Role
from common.succession import of_this_term, successor


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """How one workload stands with its objective. Made and changed by `judged` only."""

    verdict: Verdict = "none"
    epoch: EpochId | None = None
    """The newest epoch that another node could restore, when one could last."""
    frozen_at_s: float = 0.0
    """When that epoch froze the workload; before there is one: when this node began to lead. Monotonic."""
    exceeded_at_s: float = 0.0
    """When it was too old last. Monotonic."""

    def age_s(self, now: Instant) -> float:
        """Return how much of the workload's past no other node could bring back."""
        return now.monotonic_s - self.frozen_at_s


def newest_elsewhere(role: Role) -> ReplicaProgress | None:
    """Return the replica with the newest epoch that could be restored there, connected now or not."""
    replicas = role.report.replicas if role.report is not None and role.name in LEADING else ()
    able = [replica for replica in replicas if replica.restorable and of_this_term(role, replica)]
    return max(able, key=lambda replica: replica.acknowledged_wall_s or 0.0, default=None)


def judged(old: Objective, role: Role, now: Instant) -> Objective:
    """Return how the objective stands now.

    Missed as soon as the newest epoch is too old; met again when none was for as long as one may be old. So
    epochs that come a little too late each time are one miss, not one each.
    """
    if role.name != "leading" or not successor(role.spec, role.me):
        return Objective()
    limit_s = role.spec.objective_ms / 1000
    current = old if old.verdict != "none" else Objective(verdict="met", frozen_at_s=now.monotonic_s)
    newest = newest_elsewhere(role)
    if newest is not None and newest.acknowledged != current.epoch and newest.acknowledged_wall_s is not None:
        age_s = max(0.0, now.wall_s - newest.acknowledged_wall_s)
        current = msgspec.structs.replace(
            current, epoch=newest.acknowledged, frozen_at_s=now.monotonic_s - age_s
        )
    if current.age_s(now) > limit_s:
        return msgspec.structs.replace(current, verdict="missed", exceeded_at_s=now.monotonic_s)
    if current.verdict == "missed" and now.monotonic_s - current.exceeded_at_s >= limit_s:
        return msgspec.structs.replace(current, verdict="met")
    return current
