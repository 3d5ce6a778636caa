"""Whether a switchover that was planned is to begin now. Pure.

In: the plan, the role, the moment. Out: to wait, to ask the role machine for it, or to forget it, and why.

A plan is for the term in which it was made: whoever leads after a takeover, or comes back after one, was
not meant. It goes by the wall clock, because people do; a clock that is set moves it along. Late, because the
keeper did not run, it is still carried out for `LATE_S`; so long it is also tried again if it is refused.
After that nobody expects it any more.
"""

from __future__ import annotations

from typing import Literal

from common.control import PlannedSwitchover
from common.roles import Instant, Role

LATE_S = 60.0


def due(plan: PlannedSwitchover, role: Role, now: Instant) -> tuple[Literal["wait", "begin", "forget"], str]:
    """Return what is to be done about a plan, and why it is to be forgotten."""
    if role.record.term != plan.term or role.record.leader != role.me:
        return "forget", f"it was planned for term {plan.term}, which is over"
    late_s = now.wall_s - plan.at_wall_s
    if late_s < 0:
        return "wait", ""
    if late_s > LATE_S:
        return "forget", f"it was due {late_s:.0f} s ago, and more than {LATE_S:g} s are too late"
    return "begin", ""
