"""When a transition of the role machine happens: each guard returns the reason in a sentence, or nothing.

Guards are pure functions of the role (which has learned from the event already), the event and the moment.
`common.role_table` says which guard leads from where to where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.role_actions import mark_of, what_is_ceded
from common.role_events import (
    AgentReport,
    Event,
    FenceResult,
    Heard,
    KeeperStarted,
    OperatorStart,
    StepDone,
    StepFailed,
    TermPersisted,
    WorkloadEnded,
)
from common.role_steps import following_step, how_it_ended, unanswered
from common.roles import RUNS, Instant, PeerView, Role, StateName
from common.succession import (
    agent_alive,
    by_lease,
    contender,
    disowned,
    fenced_by,
    has_heir,
    has_listened,
    holder,
    is_silent,
    keeper_speaks,
    keeps_frozen,
    leads_nothing_newer,
    obstacle,
    paused,
    planned,
    right_stands,
    silence_s,
    successor,
    supersedes,
    too_far_behind,
    unvouched,
)

Guard = Callable[[Role, Any, Instant], str]

# --- at the keeper's start --------------------------------------------------------------------------


def _own(role: Role) -> bool:
    return role.record.term > 0 and role.record.leader == role.me


def _leader(role: Role) -> str:
    return role.record.leader or "another node"


def found(mark: str) -> Guard:
    """Return a guard: this node led, was that far, and (unless it had ended that) its right still stands."""

    def guard(role: Role, event: KeeperStarted, now: Instant) -> str:
        record = role.record
        if not _own(role) or record.mark != mark:
            return ""
        if mark not in ("stopped", "yielded") and not right_stands(role):
            return ""
        runs = "the workload runs on" if role.alive else "the workload does not run"
        return f"this node led term {record.term} ({mark.replace('_', ' ')}), {runs}: {record.cause}"

    return guard


def found_in_doubt(role: Role, event: KeeperStarted, now: Instant) -> str:
    """This node led, and has booted or was fenced since."""
    if not _own(role):
        return ""
    return f"{_doubted(role)} since it led term {role.record.term}: others may lead by now, listening"


def _doubted(role: Role) -> str:
    """Say why this node's own term counts no more."""
    fencer = fenced_by(role)
    return f"{fencer} fenced this node" if fencer else "this host booted anew"


def found_elsewhere(role: Role, event: KeeperStarted, now: Instant) -> str:
    """Another node led."""
    return f"{_leader(role)} leads term {role.record.term}" if role.record.term and not _own(role) else ""


def found_running_elsewhere(role: Role, event: KeeperStarted, now: Instant) -> str:
    """Another node led, but the workload runs here."""
    reason = found_elsewhere(role, event, now)
    return f"it runs here, but {reason}" if reason and role.alive else ""


def never_started(role: Role, event: KeeperStarted, now: Instant) -> str:
    """No term is recorded."""
    return f"never started: outlive start {role.spec.name} on {role.spec.nodes[0]}"


# --- others lead ------------------------------------------------------------------------------------


def newer(role: Role, event: Heard, now: Instant) -> str:
    """A newer term is known by a peer."""
    if not supersedes(role, event):
        return ""
    if event.leader:
        return f"{event.node} says that {event.leader} led term {event.term}"
    return f"{event.node} says {event.claim} in term {event.term}; this node knew term {role.newest.term}"


def newer_while_alive(role: Role, event: Heard, now: Instant) -> str:
    """A newer term is known by a peer, and the workload runs here."""
    return newer(role, event, now) if role.alive else ""


def leader_moved_on(role: Role, event: Heard, now: Instant) -> str:
    """The leader has stopped, begun again, or given up its term; worth recording, once."""
    record = role.record
    same = event.node == record.leader and event.term == record.term and role.wanted is None
    if not same or record.mark == "yielded" or event.claim not in (*RUNS, "stopped", "yielded"):
        return ""
    if (mark := mark_of(event)) == record.mark:
        return ""
    done = {"leads": "leads again", "stopped": "has stopped it", "yielded": "has given it up"}[mark]
    to = f", to {event.heir}" if event.heir else ""
    return f"{event.node} {done} in term {event.term}{to}"


def runs_without_right(role: Role, event: Event, now: Instant) -> str:
    """The workload runs here, and another node leads."""
    wrong = role.alive and not keeps_frozen(role)
    return f"it runs here, but {_leader(role)} leads term {role.record.term}" if wrong else ""


def runs_though_it_must_not(role: Role, event: Event, now: Instant) -> str:
    """The workload runs in a state in which nothing may run, and is not being killed yet."""
    return "it runs here and must not: killed" if role.alive and "kill" not in role.undo else ""


def undone(role: Role, event: Event, now: Instant) -> str:
    """Nothing of a lost leadership is left."""
    return "" if role.undo or role.alive else f"{_leader(role)} leads term {role.newest.term}"


# --- from silence to the right to lead ----------------------------------------------------------------


def leader_silent(role: Role, event: Event, now: Instant) -> str:
    """Keeper and agent of a leader that should run the workload are silent."""
    leader = role.record.leader
    if role.wanted is not None or role.record.mark in ("stopped", "failed", "yielded"):
        return ""
    if not leader or leader == role.me or not is_silent(role, leader, now):
        return ""
    if role.peers.get(leader, PeerView()).in_doubt:
        return f"{leader} has frozen it: its lease in etcd may be over"
    return (
        f"neither {leader}'s keeper nor its agent was heard for {silence_s(role, leader, now) * 1000:.0f} ms"
    )


def leader_audible(role: Role, event: Event, now: Instant) -> str:
    """There is no reason to suspect the leader any more."""
    leader, mark = role.record.leader, role.record.mark
    if role.wanted is not None or mark == "yielded":
        return ""
    if mark in ("stopped", "failed"):
        return f"{leader} said that it was stopped"
    if not leader or leader == role.me or is_silent(role, leader, now) or disowned(role, now):
        return ""
    return f"{leader} is heard again"


def may_not_lead(role: Role, event: Event, now: Instant) -> str:
    """There is an obstacle, and it is not shown yet."""
    unfollowed = _heir_of_yield(role) or disowned(role, now)
    if role.wanted is not None or (role.name == "following" and not unfollowed):
        return ""
    reason = obstacle(role, now)
    return "" if role.name == "waiting" and reason == role.reason else reason


def may_go_for_lead(role: Role, event: Event, now: Instant) -> str:
    """There is no obstacle, and a failed attempt is long enough ago."""
    if role.wanted is not None or now.monotonic_s < role.retry_at_s:
        return ""
    if (role.name == "following" and not _heir_of_yield(role)) or obstacle(role, now):
        return ""
    if by_lease(role):
        return f"etcd has to give this node the lease of {role.record.leader}"
    if not contender(role, now):
        return f"{role.record.leader} has given up term {role.record.term} in favour of this node"
    return f"{role.record.leader} has to be confirmed off before this node may lead"


def _heir_of_yield(role: Role) -> bool:
    return role.record.mark == "yielded" and holder(role) == role.me


def _answers_attempt(role: Role, event: FenceResult) -> bool:
    return role.wanted is None and event.attempt == role.fence_attempt


def right_confirmed(role: Role, event: FenceResult, now: Instant) -> str:
    """The fence confirmed, or an operator vouches for what it could not confirm."""
    if not _answers_attempt(role, event):
        return ""
    if by_lease(role):
        return event.reason if event.outcome == "confirmed" else ""
    if event.outcome == "confirmed":
        return f"{event.node} is off: {event.reason}"
    if role.vouched and unvouched(role, role.vouched, now) is None:
        return f"the operator vouches that {event.node} is off; its fence: {event.outcome}: {event.reason}"
    return ""


def unwanted_meanwhile(role: Role, event: FenceResult, now: Instant) -> str:
    """The leader is off, but nobody asked for this takeover, and by what was heard meanwhile none is wanted.

    Automatic ones were paused; or the leader led for longer than was known: what is here is too far behind.
    """
    leads = by_lease(role) and role.record.leader == role.me  # it runs here, frozen: no takeover
    decided = role.by_operator or planned(role) or keeps_frozen(role) or leads
    confirmed = "" if decided else right_confirmed(role, event, now)
    why = paused(role) or too_far_behind(role)
    return f"{confirmed}; but {why}" if confirmed and why else ""


def not_confirmed_and_audible(role: Role, event: FenceResult, now: Instant) -> str:
    """The fence did not confirm, and the leader speaks again."""
    if not _answers_attempt(role, event) or not (heard := leader_audible(role, event, now)):
        return ""
    return f"{heard}; {_asked_whom(role)}: {event.outcome}: {event.reason}"


def not_confirmed(role: Role, event: FenceResult, now: Instant) -> str:
    """The fence did not confirm."""
    if not _answers_attempt(role, event):
        return ""
    if by_lease(role):
        return f"etcd does not give the lease: {event.outcome}: {event.reason}"
    return f"{event.node} may still run it: the fence is {event.outcome}: {event.reason}"


def _asked_whom(role: Role) -> str:
    return "etcd" if by_lease(role) else "its fence"


def own_not_confirmed(mark: str) -> Guard:
    """Return a guard: etcd did not give the next term to the leader of this one, which is that far."""

    def guard(role: Role, event: FenceResult, now: Instant) -> str:
        own = role.record.leader == role.me and role.record.mark == mark
        return not_confirmed(role, event, now) if own and by_lease(role) else ""

    return guard


def may_claim_anew(role: Role, event: Event, now: Instant) -> str:
    """The node that claimed a newer term while the lease was in doubt is heard, and does not lead it.

    It lost its keeper, or its lease, before it had recorded that term: nothing was done in it. So did this
    node itself, if etcd's answer to its own claim was lost.
    """
    if not role.lost_to or role.wanted is not None or not role.alive or now.monotonic_s < role.retry_at_s:
        return ""
    if role.lost_to != role.me and role.lost_to not in leads_nothing_newer(role, now):
        return ""
    return f"{role.lost_to} has claimed the next term, and does not lead it: etcd has to give another one"


def starts_by_lease(role: Role, event: OperatorStart, now: Instant) -> str:
    """An operator asked for a start, and etcd has to give the term for it."""
    return asked(role, event, now) if event.spec.right_to_lead == "etcd" else ""


def start_confirmed(role: Role, event: FenceResult, now: Instant) -> str:
    """Etcd has given the term for a start."""
    return right_confirmed(role, event, now) if role.starts_from is not None else ""


def start_not_confirmed(state: StateName) -> Guard:
    """Return a guard: etcd has not given the term for a start that was asked for in that state."""

    def guard(role: Role, event: FenceResult, now: Instant) -> str:
        return not_confirmed(role, event, now) if role.starts_from == state else ""

    return guard


def asked(role: Role, event: Event, now: Instant) -> str:
    """An operator asked for it; what must be refused was refused before."""
    return "asked for by an operator"


# --- recorded, or not -------------------------------------------------------------------------------


def recorded(mark: str) -> Guard:
    """Return a guard: this node's record with that mark is on disk now."""

    def guard(role: Role, event: TermPersisted, now: Instant) -> str:
        record = role.record
        if event.record != record or record.leader != role.me or record.mark != mark or role.wanted:
            return ""
        return (
            f"term {record.term}: {record.cause}"
            if mark != "yielded"
            else f"term {record.term} is given up: outlive status on {holder(role)}"
        )

    return guard


def ceded(role: Role, event: TermPersisted, now: Instant) -> str:
    """The term that this node took for another one, and gave up to it, is on disk.

    What the other node has is older than that term, so it does nothing before it is asked.
    """
    return what_is_ceded(role) if recorded("yielded")(role, event, now) else ""


def stop_recorded(role: Role, event: TermPersisted, now: Instant) -> str:
    """That the workload is not to run is on disk now."""
    if not recorded("stopped")(role, event, now):
        return ""
    if role.request is None and not role.alive:
        return role.reason if role.name == "starting" else f"{how_it_ended(role)}: {_policy(role)}"
    return "stopped by an operator"


def asked_but_unrecorded(role: Role, event: StepFailed, now: Instant) -> str:
    """An operator waits for a record that cannot be written yet; it is tried again."""
    if event.step != "persist" or role.request is None or role.wanted is None:
        return ""
    return f"this cannot be recorded yet: {event.reason}"


# --- bringing the workload up -----------------------------------------------------------------------


def _current_step(role: Role, event: StepDone | StepFailed) -> bool:
    return role.step is not None and role.step != "order" and event.step == role.step


def more_steps(role: Role, event: StepDone | StepFailed, now: Instant) -> str:
    """The current step is over, and there is another."""
    return role.reason if _current_step(role, event) and following_step(role) else ""


def last_step(role: Role, event: StepDone | StepFailed, now: Instant) -> str:
    """The last step is over."""
    return _leads(role) if _current_step(role, event) and not following_step(role) else ""


def _order_executed(role: Role) -> bool:
    report = role.report
    if report is None or role.step != "order" or not role.alive:
        return False
    return report.order_done >= role.order.number and report.running


def up_more_steps(role: Role, event: AgentReport, now: Instant) -> str:
    """The agent has carried its order out, and there is another step."""
    return role.reason if _order_executed(role) and following_step(role) else ""


def up_last_step(role: Role, event: AgentReport, now: Instant) -> str:
    """The agent has carried its order out, and that was all."""
    return _leads(role) if _order_executed(role) and not following_step(role) else ""


def _leads(role: Role) -> str:
    return role.unhealthy or role.vip_problem or f"leads term {role.record.term}: {role.record.cause}"


def _runs_unreported(role: Role, now: Instant) -> bool:
    """It was kept here, and runs again; the agent that would report that is dead."""
    return role.step == "order" and role.alive and not agent_alive(role, now)


def unreported_more_steps(role: Role, event: Event, now: Instant) -> str:
    """It runs, though nobody reports it, and there is another step."""
    return role.reason if _runs_unreported(role, now) and following_step(role) else ""


def unreported_last_step(role: Role, event: Event, now: Instant) -> str:
    """It runs, though nobody reports it, and that was all."""
    return _leads(role) if _runs_unreported(role, now) and not following_step(role) else ""


def order_failed(role: Role, event: AgentReport, now: Instant) -> str:
    """The agent could not carry its order out."""
    report = event.report
    if role.step != "order" or report.order_failed < role.order.number:
        return ""
    return f"the agent could not bring it up: {report.order_detail}"


def order_overdue(role: Role, event: Event, now: Instant) -> str:
    """The agent has not answered its order for too long, and nothing runs.

    What runs is left to an agent that is started again: a silent agent never costs a workload its life.
    """
    late = now.monotonic_s - role.launched_at_s > role.timing.order_s
    if role.record.handed_by and not agent_alive(role, now):  # somebody else has it
        late = late or now.monotonic_s - role.launched_at_s > role.timing.agent_silent_after_s
    if role.step != "order" or role.alive or role.wanted is not None or not late:
        return ""
    again = "start" if role.name == "launching" else "failover"
    options = "" if again == "start" else " --accept-data-loss"
    return (
        f"{unanswered(role)}: systemctl status outlive-agent; then: outlive {again} {role.spec.name}{options}"
    )


def restart_failed(role: Role, event: AgentReport, now: Instant) -> str:
    """A restart after an end could not be carried out, and there are more to try."""
    reason = order_failed(role, event, now)
    return reason if reason and role.restarts > 0 and _restarts_left(role, now) else ""


# --- the end of a workload --------------------------------------------------------------------------


def _ended(role: Role) -> bool:
    stopping = role.wanted is not None and role.wanted.mark == "stopped"
    return not role.alive and not stopping


def _restarts_left(role: Role, now: Instant) -> bool:
    lasted = now.monotonic_s - role.launched_at_s > role.timing.restart_window_s
    return lasted or role.restarts < role.timing.restarts


def _policy(role: Role) -> str:
    if role.spec.on_exit == "stop":
        return "on_exit is stop"
    return f"it was restarted {role.restarts} times in a row and ended each time"


def ended_yield(role: Role, event: Event, now: Instant) -> str:
    """It ended by itself, and the successor is to run it."""
    if not _ended(role) or role.spec.on_exit != "failover" or paused(role) or not has_heir(role, now):
        return ""
    return f"{how_it_ended(role)}: on_exit is failover, {successor(role.spec, role.me)} can restore it"


def ended_restart(role: Role, event: Event, now: Instant) -> str:
    """It ended by itself, and is to be started again here."""
    if not _ended(role) or role.spec.on_exit == "stop" or not _restarts_left(role, now):
        return ""
    if _heir_may_speak(role, now):
        return ""
    why = "on_exit is restart" if role.spec.on_exit == "restart" else "no other node could restore it"
    if role.spec.on_exit == "failover" and (pause := paused(role)):
        why = f"restarted here, {pause}"
    return f"{how_it_ended(role)}: {why}"


def ended_stop(role: Role, event: Event, now: Instant) -> str:
    """It ended by itself and stays so."""
    return f"{how_it_ended(role)}: {_policy(role)}" if _ended(role) and not _heir_may_speak(role, now) else ""


def _heir_may_speak(role: Role, now: Instant) -> bool:
    """Tell whether this keeper has just begun, and has not heard the successor, which may have its memory."""
    return role.spec.on_exit == "failover" and not paused(role) and not has_listened(role, now)


def briefly(guard: Guard) -> Guard:
    """Return that guard for a workload that the agent started, and that ended before anybody saw it run."""

    def began_and_ended(role: Role, event: AgentReport, now: Instant) -> str:
        report = event.report
        executed = role.step == "order" and report.order_done >= role.order.number
        return guard(role, event, now) if executed and not report.running and not role.alive else ""

    return began_and_ended


def died_after_restore(role: Role, event: Event, now: Instant) -> str:
    """It was restored and ended before it served; what comes of an order the agent's report tells."""
    if isinstance(event, WorkloadEnded) and role.step in ("hold", "add_vip", "order"):
        return ""
    again = f"outlive failover {role.spec.name} --accept-data-loss restores it again"
    return f"{how_it_ended(role)} right after it was restored: {again}"


def restart_due(role: Role, event: Event, now: Instant) -> str:
    """The pause before a restart is over."""
    if role.step is not None or now.monotonic_s < role.restart_at_s or role.wanted is not None:
        return ""
    return f"restart {role.restarts} of at most {role.timing.restarts}"


def repair_due(role: Role, event: Event, now: Instant) -> str:
    """Something that did not succeed when the workload came up may be tried again."""
    faulty = role.unhealthy or role.vip_problem
    faulty = "" if role.in_doubt else faulty
    return role.reason if faulty and now.monotonic_s >= role.retry_at_s and role.wanted is None else ""


def cleaned_up(role: Role, event: Event, now: Instant) -> str:
    """Nothing of the workload is left here; that it is given up or stopped is not on its way to disk.

    While the lease is in doubt its packets stay held, which is lifted once this node leads no more.
    """
    decided = role.wanted is not None and role.wanted.mark in ("yielded", "stopped")
    left = role.undo - {"lift"} if role.in_doubt else role.undo
    return "" if left or role.alive or decided else role.reason


def overdue(role: Role, event: Event, now: Instant) -> str:
    """The agent had the time to end it."""
    late = role.alive and now.monotonic_s >= role.stop_deadline_s and "kill" not in role.undo
    return "the agent has not ended it in time: killed" if late else ""


# --- after a boot or a fence: the term may be another's by now -------------------------------------


def alone_after_boot(role: Role, event: Event, now: Instant) -> str:
    """No other node may run the workload at all."""
    if role.wanted is not None or successor(role.spec, role.me):
        return ""
    return f"{_doubted(role)}: outlive start {role.spec.name} (memory content is lost)"


def _unheard(role: Role, now: Instant) -> str:
    """Name a node that could lead it unheard: unless `manual`, only the successor could have taken over."""
    keeper = role.record.handed_by
    if keeper and not keeper_speaks(role, keeper, now):
        return keeper  # it may keep the workload still
    heir = successor(role.spec, role.me)
    others = (heir,) if role.spec.right_to_lead != "manual" else role.spec.nodes
    for node in others:
        view = role.peers.get(node)
        follows = (
            view is not None and view.term == role.record.term and view.claim in ("following", "acquiring")
        )
        if node != role.me and not (follows and keeper_speaks(role, node, now)):
            return node
    return ""


def heir_heard_after_boot(role: Role, event: Event, now: Instant) -> str:
    """Nobody has taken over, and the successor has what was committed."""
    if role.wanted is not None or not has_listened(role, now) or _unheard(role, now):
        return ""
    heir = successor(role.spec, role.me)
    return f"{_doubted(role)} and what ran here is gone: {heir} has what was committed"


def heir_not_heard(role: Role, event: Event, now: Instant) -> str:
    """Somebody could have taken over; not shown yet."""
    node = _unheard(role, now)
    if role.wanted is not None or not has_listened(role, now) or not node:
        return ""
    start = f"outlive start {role.spec.name}"
    if keeper_speaks(role, node, now) and role.peers[node].claim is None:
        reason = (
            f"{_doubted(role)}, and {node} knows nothing of it: declare it in {node}'s file and restart "
            f"{node}'s keeper, which restores what is stored there; or: {start} (memory content is lost)"
        )
    elif keeper_speaks(role, node, now) and role.peers[node].claim == "yielded" and role.peers[node].alive:
        reason = (
            f"{_doubted(role)}, and {node} keeps it, frozen, as it was in term {role.peers[node].term}: "
            f"outlive failover {role.spec.name} --accept-data-loss there lets it run "
            f"(with no fence for {role.me}: once its keeper is stopped, and --old-primary-is-off {role.me})"
        )
    else:
        reason = (
            f"{_doubted(role)}, and {node} does not say that it follows: it may lead by now; "
            f"if it is off: {start} --off {node} (memory content is lost)"
        )
    return "" if reason == role.reason else reason
