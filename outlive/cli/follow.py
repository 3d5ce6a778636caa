"""Follows a role machine until it has come to rest: live on stderr, and as a value for the answer.

In: a workload and the state that is wanted. Out: the `Outcome`, or the error that says why it rests
elsewhere. The keeper is polled; its timeline tells each step with the time that it took.
"""

from __future__ import annotations

import time
from typing import Literal

import msgspec

from common.config import NodeConfig
from common.control import AskHistory, AskStatus, History, NodeStatus, TimelineEntry, WorkloadStatus
from common.errors import NoRightToLeadError, OutliveError, RestoreError, WorkloadError
from outlive.cli.call import Call

Goal = Literal["leading", "stopped"]

POLL_S = 0.1
SETTLED_S = 2.0
"""A state in which nothing is under way must last as long before it counts as the end."""

UNDER_WAY = frozenset(
    {"starting", "launching", "acquiring", "taking_over", "yielding", "suspecting", "deposed"}
)
"""States of the role machine (`common.roles.MEANING`) that lead on to another one by themselves."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a role machine came to rest."""

    role: str
    state: str
    reason: str
    term: int
    took_s: float
    timeline: tuple[TimelineEntry, ...]


def follow_role(
    call: Call, config: NodeConfig, name: str, *, goal: Goal, since_term: int, timeout_s: float
) -> Outcome:
    """Poll until the goal is reached in `since_term` or a newer term; talk about every step meanwhile.

    Raises RestoreError (the takeover failed), NoRightToLeadError (it was not allowed), WorkloadError
    (otherwise not reached, or not within `timeout_s`), UnreachableError (the keeper stopped answering).
    """
    began_s = rests_since_s = time.monotonic()
    told = 0
    while True:
        workload = _ask(call, config, name)
        timeline = _timeline(call, config, name, since_term)
        for step in timeline[told:]:
            call.talk(f"{step.at_ms:10.1f} ms  {step.event:<20}  {step.reason}")
        told = max(told, len(timeline))
        now_s = time.monotonic()
        if workload is not None and _reached(workload, goal, since_term):
            return Outcome(
                role=workload.role,
                state=workload.state,
                reason=workload.reason,
                term=workload.term,
                took_s=round(now_s - began_s, 3),
                timeline=timeline,
            )
        if workload is not None and (workload.state in UNDER_WAY or _still_ends(workload, goal)):
            rests_since_s = now_s
        if now_s - rests_since_s > SETTLED_S or now_s - began_s > timeout_s:
            raise _unreached(name, workload, goal, now_s - began_s)
        time.sleep(POLL_S)


def newest_term(call: Call, config: NodeConfig, name: str) -> int:
    """Return the newest term of a workload that the keeper knows; 0 if it knows none."""
    workload = _ask(call, config, name)
    return workload.term if workload is not None else 0


def _ask(call: Call, config: NodeConfig, name: str) -> WorkloadStatus | None:
    answer = call.ask(config.keeper_endpoint, AskStatus(), NodeStatus)
    return next((workload for workload in answer.workloads if workload.name == name), None)


def _timeline(call: Call, config: NodeConfig, name: str, since_term: int) -> tuple[TimelineEntry, ...]:
    try:
        terms = call.ask(config.keeper_endpoint, AskHistory(workload=name), History).terms
    except WorkloadError:
        return ()  # not known yet
    return terms[-1].timeline if terms and terms[-1].term >= max(since_term, 1) else ()


def _still_ends(workload: WorkloadStatus, goal: Goal) -> bool:
    """Whether it was told to end and takes its time."""
    return goal == "stopped" and workload.state == "stopped" and workload.running


def _reached(workload: WorkloadStatus, goal: Goal, since_term: int) -> bool:
    if goal == "stopped":
        return workload.state == "stopped" and not workload.running
    return workload.state == "leading" and workload.running and workload.term >= since_term


def _unreached(name: str, workload: WorkloadStatus | None, goal: Goal, after_s: float) -> OutliveError:
    """Return the error for a machine that rests elsewhere, or takes too long."""
    if workload is None:
        return WorkloadError(f"the keeper does not know {name}", hint="outlive status")
    message = f"{name} is {workload.state}, not {goal}, after {after_s:.0f} s: {workload.reason}"
    history = f"outlive history {name}"
    if goal == "leading" and workload.state in {"waiting", "following"}:
        return NoRightToLeadError(
            message, hint="make sure that the old primary is off, then add --old-primary-is-off NODE"
        )
    if workload.state == "failed" and workload.stored is not None:
        return RestoreError(message, hint=history)
    return WorkloadError(message, hint=history)
