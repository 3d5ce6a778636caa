"""Follows a role machine until it has come to rest: live on stderr, and as a value for the answer.

In: a workload, the state that is wanted, and when it was asked for. Out: the `Outcome`, or the error that
says why it rests elsewhere. The keeper is polled; its timeline tells each step since then.
"""

from __future__ import annotations

import time
from typing import Literal

import msgspec

from common.config import NodeConfig
from common.control import AskHistory, AskStatus, History, NodeStatus, TimelineEntry, WorkloadStatus
from common.errors import NoRightToLeadError, OutliveError, RestoreError, WorkloadError
from common.succession import replacement_hint
from outlive.cli.call import Call

Goal = Literal["leading", "stopped", "yielded"]

POLL_S = 0.1
SETTLED_S = 2.0
"""A state in which nothing is under way must last as long before it counts as the end."""

UNDER_WAY = frozenset(
    {
        "starting",
        "launching",
        "acquiring",
        "taking_over",
        "handing_over",
        "handed_over",
        "yielding",
        "suspecting",
        "deposed",
    }
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
    """What happened since it was asked for; the term may have begun long before."""


def follow_role(
    call: Call,
    config: NodeConfig,
    name: str,
    *,
    goal: Goal,
    since_term: int,
    asked_wall_s: float,
    timeout_s: float,
) -> Outcome:
    """Poll until the goal is reached in `since_term` or a newer term; talk about every step meanwhile.

    `asked_wall_s` is this host's clock before the keeper was asked: earlier steps are not told.

    Raises RestoreError (the takeover failed), NoRightToLeadError (it was not allowed), WorkloadError
    (otherwise not reached, or not within `timeout_s`), UnreachableError (the keeper stopped answering).
    """
    began_s = rests_since_s = time.monotonic()
    told = 0
    while True:
        status = call.ask(config.keeper_endpoint, AskStatus(), NodeStatus)
        workload = _named(status, name)
        timeline = timeline_since(call, config, name, since_term, asked_wall_s)
        for step in timeline[told:]:
            after_ms = (step.wall_s - asked_wall_s) * 1000
            call.talk(f"{after_ms:10.1f} ms  {step.event:<20}  {step.reason}")
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
            raise _unreached(config, status, name, goal, now_s - began_s)
        time.sleep(POLL_S)


def find_workload(call: Call, config: NodeConfig, name: str) -> WorkloadStatus | None:
    """Return how the keeper sees a workload; None if it knows none of that name."""
    return _named(call.ask(config.keeper_endpoint, AskStatus(), NodeStatus), name)


def _named(status: NodeStatus, name: str) -> WorkloadStatus | None:
    return next((workload for workload in status.workloads if workload.name == name), None)


def timeline_since(
    call: Call, config: NodeConfig, name: str, since_term: int, asked_wall_s: float
) -> tuple[TimelineEntry, ...]:
    """Return what happened since then in the newest term, if that is `since_term` or a newer one."""
    try:
        terms = call.ask(config.keeper_endpoint, AskHistory(workload=name), History).terms
    except WorkloadError:
        return ()  # not known yet
    if not terms or terms[-1].term < max(since_term, 1):
        return ()
    return tuple(step for step in terms[-1].timeline if step.wall_s >= asked_wall_s)


def _still_ends(workload: WorkloadStatus, goal: Goal) -> bool:
    """Whether it was told to end and takes its time."""
    return goal == "stopped" and workload.state == "stopped" and workload.running


def _reached(workload: WorkloadStatus, goal: Goal, since_term: int) -> bool:
    if goal == "stopped":
        return workload.state == "stopped" and not workload.running
    there = workload.state == goal and workload.term >= since_term
    return there and (workload.running or goal == "yielded")


def _unreached(config: NodeConfig, status: NodeStatus, name: str, goal: Goal, after_s: float) -> OutliveError:
    """Return the error for a machine that rests elsewhere, or takes too long."""
    workload = _named(status, name)
    if workload is None:
        return WorkloadError(f"the keeper does not know {name}", hint="outlive status")
    message = f"{name} is {workload.state}, not {goal}, after {after_s:.0f} s: {workload.reason}"
    history = f"outlive history {name}"
    if goal != "stopped" and workload.state in {"waiting", "following"}:
        if not (leader := workload.leader):
            return NoRightToLeadError(message, hint="outlive status on the other nodes")
        heard = workload.state == "following" or _is_heard(config, status, leader)
        return NoRightToLeadError(message, hint=replacement_hint(name, leader, heard=heard))
    if workload.state == "failed" and workload.stored is not None:
        return RestoreError(message, hint=history)
    return WorkloadError(message, hint=history)


def _is_heard(config: NodeConfig, status: NodeStatus, node: str) -> bool:
    limit_ms = config.heartbeat.suspect_after_ms
    return any(
        silence_ms is not None and silence_ms <= limit_ms
        for peer in status.peers
        if peer.node == node
        for silence_ms in (peer.keeper_silence_ms, peer.agent_silence_ms)
    )
