"""The role machine: one table of transitions, and `step`, which applies it. Pure.

In: a `Role`, an `Event`, an `Instant`. Out: the next `Role` and `Effect`s, to be carried out in their order.
A row applies if its guard returns a sentence; the first row that applies is taken, and its sentence becomes
the reason that is logged, kept and shown. After a transition the rows for `Tick` are asked again, so that a
node never stays where it has nothing to wait for. `docs/concepts/roles.md` is drawn from this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from common.control import Done, Order, Refused
from common.role_actions import (
    Acted,
    answered,
    ask_failover,
    ask_lease_to_start,
    ask_start,
    depose,
    fenced,
    give_way,
    give_way_quietly,
    halt,
    history,
    kill,
    not_recorded,
    noted,
    nothing,
    pursue,
    record_mark,
    start_by_lease,
    start_denied,
    suspect,
    tell_ceded,
    undoing,
    unfenced,
)
from common.role_events import (
    AddressLost,
    AgentReport,
    Answer,
    DropVip,
    Effect,
    Event,
    FenceResult,
    Forget,
    Heard,
    KeeperStarted,
    LeaseInDoubt,
    LeaseStands,
    Note,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    OperatorStart,
    OperatorStop,
    OperatorSwitchover,
    OrderAgent,
    PausesPersisted,
    PersistTerm,
    SaveSpec,
    StepDone,
    StepFailed,
    TermPersisted,
    Tick,
    Told,
    WorkloadEnded,
)
from common.role_guards import (
    Guard,
    alone_after_boot,
    asked,
    asked_but_unrecorded,
    briefly,
    ceded,
    cleaned_up,
    died_after_restore,
    ended_restart,
    ended_stop,
    ended_yield,
    found,
    found_elsewhere,
    found_in_doubt,
    found_running_elsewhere,
    heir_heard_after_boot,
    heir_not_heard,
    last_step,
    leader_audible,
    leader_moved_on,
    leader_silent,
    may_claim_anew,
    may_go_for_lead,
    may_not_lead,
    more_steps,
    never_started,
    newer,
    newer_while_alive,
    not_confirmed,
    not_confirmed_and_audible,
    order_failed,
    order_overdue,
    overdue,
    own_not_confirmed,
    recorded,
    repair_due,
    restart_due,
    restart_failed,
    right_confirmed,
    runs_though_it_must_not,
    runs_without_right,
    start_confirmed,
    start_not_confirmed,
    starts_by_lease,
    stop_recorded,
    undone,
    unreported_last_step,
    unreported_more_steps,
    unwanted_meanwhile,
    up_last_step,
    up_more_steps,
)
from common.role_handover import (
    accept_back,
    address_dropped,
    begin_handover,
    committed,
    could_not,
    drop_address,
    found_handed_over,
    give_back,
    given_back,
    given_back_ended,
    gives_back,
    hand_over,
    heir_cannot,
    heir_not_confirmed,
    hindered,
    kept_ended,
    kept_hearsay,
    kept_no_more,
    kept_not_confirmed,
    kept_undecided,
    may_have_fenced,
    may_take_back,
    need_no_keeper,
    on_its_way_to_disk,
    record_failure,
    runs_there,
    switchover_refusal,
    take_back,
    tell_handed_over,
    wait_again,
    waits_for_heir,
)
from common.role_handover import (
    not_recorded as handover_not_recorded,
)
from common.role_pauses import (
    ask_pause,
    ask_resume,
    hear_pauses,
    pauses_due,
    pauses_not_recorded,
    pauses_recorded,
)
from common.role_steps import (
    advance,
    begin,
    begin_start,
    clean_up,
    fail,
    forget,
    give_up,
    lead,
    lead_again,
    relaunch,
    repair,
    restart,
    resume,
    stop,
    stopped,
)
from common.roles import LEADING, PURSUING, RUNS, Instant, PeerView, Role, StateName
from common.succession import by_lease, failover_refusal, keeps_frozen, reports_heir, start_refusal

Action = Callable[[Role, Any, Instant], Acted]

_UNDO_AGAIN_S = 1.0
_CHAIN = 8
"""More transitions than this at one moment would be a circle in the table."""


@dataclass(frozen=True, slots=True)
class Row:
    """In one of `sources`, at `event`, if `guard` returns a reason: do `action` and go to `target`.

    `target` None: stay. `label` names the condition in the diagram.
    """

    sources: tuple[StateName, ...]
    event: type
    label: str
    guard: Guard
    target: StateName | None
    action: Action


def step(role: Role, event: Event, now: Instant) -> tuple[Role, tuple[Effect, ...]]:
    """Take in one event. Never raises for what peers, agents or operators say."""
    role, event, effects = _given_in_vain(role, event)
    role, first = _learn(role, event, now)
    effects += first
    current: Event = event
    if not _refused(role, event, now, effects):
        for _ in range(_CHAIN):
            found = _row_for(role, current, now)
            if found is None:
                break
            row, reason = found
            role, more = _apply(role, row, reason, current, now)
            effects += more
            current = Tick()
    role, last = _reorder(role)
    return role, (*effects, *last)


def _given_in_vain(role: Role, event: Event) -> tuple[Role, Event, list[Effect]]:
    """Take a term that etcd gave, and the disk did not take, for one that was not given.

    Invariant: a term whose lease was let go before it was recorded is never begun. It is let go now; others
    may lead the next term then, and give it back only to a node that has begun none beside it.
    """
    wanted = role.wanted
    claimed = role.name == "acquiring" and by_lease(role) and wanted is not None and wanted.leader == role.me
    if not (claimed and isinstance(event, StepFailed) and event.step == "persist"):
        return role, event, []
    reason = f"it gave the term, which cannot be recorded here: {event.reason}"
    refusal = Refused(error="StoreError", message=f"etcd: {reason}", hint="make room, then ask for it again")
    role, effects = answered(replace(role, wanted=None), refusal)
    vain = FenceResult(node="etcd", attempt=role.fence_attempt, outcome="unknown", reason=reason)
    return role, vain, [*effects]


def _row_for(role: Role, event: Event, now: Instant) -> tuple[Row, str] | None:
    """Return the first row that applies, and its reason; none that would go on with what is being stopped."""
    if _is_being_stopped(role, event):
        return None
    for row in _INDEX.get((role.name, type(event)), ()):
        if reason := row.guard(role, event, now):
            return row, reason
    return None


def _is_being_stopped(role: Role, event: Event) -> bool:
    """Tell whether a stop is on its way to the disk, and the event only about how the workload does.

    Invariant: a stop is not overwritten, by a step that is over in the same moment or anything like it.
    """
    wanted = role.wanted
    stopping = wanted is not None and wanted.mark == "stopped" and wanted.leader == role.me
    if not stopping or role.name not in _LEADING:
        return False
    about = isinstance(event, Tick | AgentReport | StepDone | WorkloadEnded)
    return about or (isinstance(event, StepFailed) and event.step != "persist")


def _apply(role: Role, row: Row, reason: str, event: Event, now: Instant) -> Acted:
    moved = row.target is not None and row.target != role.name
    role, effects = row.action(role, event, now)
    role = replace(role, name=row.target or role.name, reason=reason)
    note = Note(state=role.name, event=row.label, reason=reason)
    return role, (*effects, note) if moved or effects else effects


def _refused(role: Role, event: Event, now: Instant, effects: list[Effect]) -> bool:
    """Answer what an operator may not do; append the answer and return True if so."""
    answer: Done | Refused | None = None
    if isinstance(event, OperatorFailover):
        answer = failover_refusal(role, event, now)
    elif isinstance(event, OperatorSwitchover):
        answer = switchover_refusal(role, event, now)
    elif isinstance(event, OperatorStart):
        answer = (
            Done(detail=f"it is led here already: {role.reason}")
            if role.name in LEADING
            else start_refusal(role, event, now)
        )
    elif isinstance(event, OperatorStop):
        answer = _stop_refusal(role)
    elif isinstance(event, Forget) and (role.alive or role.name in LEADING or role.name == "acquiring"):
        answer = Refused(error="WorkloadError", message="it runs here", hint=f"outlive stop {role.spec.name}")
    if answer is None:
        return False
    assert isinstance(  # noqa: S101
        event, OperatorFailover | OperatorSwitchover | OperatorStart | OperatorStop | Forget
    )
    effects.append(Answer(request=event.request, answer=answer))
    return True


def _stop_refusal(role: Role) -> Done | Refused | None:
    if role.name in ("stopped", "yielded"):
        return Done(detail=f"it does not run here: {role.reason}")
    if role.name in ("handing_over", "handed_over"):
        back = f"outlive failover {role.spec.name} --accept-data-loss has it run here again"
        hint = f"{back}; then stop it" if role.name == "handed_over" else "ask again"
        return Refused(error="WorkloadError", message=f"it is being handed over: {role.reason}", hint=hint)
    if role.request is not None:
        return Refused(
            error="WorkloadError", message="another request is being carried out", hint="ask again"
        )
    if role.name in (*LEADING, "starting", "failed"):
        return None
    leader = role.record.leader
    return Refused(
        error="WorkloadError", message=f"{leader or 'another node'} leads it", hint=f"stop it on {leader}"
    )


# --- what is learned whatever the state -------------------------------------------------------------


def _learn(role: Role, event: Event, now: Instant) -> Acted:
    match event:
        case Heard():
            return hear_pauses(_learn_peer(role, event, now), event.pauses)
        case OperatorPause():
            return ask_pause(role, event, now)
        case OperatorResume():
            return ask_resume(role, event, now)
        case PausesPersisted():
            return pauses_recorded(role, event, now)
        case StepFailed(step="pauses"):
            return pauses_not_recorded(role, event, now)
        case AgentReport(report):
            known = replace(
                role, report=report, agent_at_s=now.monotonic_s, alive=role.alive or report.running
            )
            if report.running and reports_heir(known):
                known = replace(known, heir_ready_at_s=now.monotonic_s)
            if report.exit_code is not None and not report.running:
                known = replace(known, exit_code=report.exit_code)
            declared = role.newest.leader == role.me or role.starts_from is not None
            if report.spec != role.spec and role.name in PURSUING and not declared:
                return replace(known, spec=report.spec), (SaveSpec(report.spec),)
            return known, ()
        case Told(event=what, reason=why):
            told = noted(role, now, what, why)
            return told, (history(told),)
        case WorkloadEnded(exit_code):
            return replace(role, alive=False, exit_code=exit_code), ()
        case KeeperStarted(running):
            return replace(role, alive=running, launched_at_s=now.monotonic_s), ()
        case TermPersisted(record) if record == role.wanted:
            return replace(role, record=record, wanted=None, retry_at_s=0.0), ()
        case StepDone(step=done):
            alive = role.alive and done != "kill"
            healthy = "" if done == "health" else role.unhealthy
            return replace(role, undo=role.undo - {done}, alive=alive, unhealthy=healthy), ()
        case StepFailed(step=failed) if failed in role.undo:
            return replace(role, undo_at_s=now.monotonic_s + _UNDO_AGAIN_S), ()
        case StepFailed(step="health", reason=reason) if role.name == "leading":
            return replace(role, unhealthy=f"not healthy: {reason}"), ()
        case StepFailed(step=failed, reason=reason) if role.name == "leading" and failed not in (
            "persist",
            "history",
        ):
            return replace(role, vip_problem=f"{failed}: {reason}"), ()
        case AddressLost(reason=reason) if role.name == "leading":
            return replace(role, vip_problem=reason, retry_at_s=now.monotonic_s), ()
        case LeaseInDoubt():
            return _learn_doubt(role, event, now)
        case LeaseStands():
            return _learn_lease(role, now)
        case StepFailed(step="persist") if role.wanted is not None:
            return replace(role, retry_at_s=now.monotonic_s + role.timing.retry_first_s), ()
        case Tick():
            return _learn_time(role, now)
    return role, ()


def _learn_peer(role: Role, event: Heard, now: Instant) -> Role:
    """Keep what a peer says; the states decide what follows from it."""
    view = role.peers.get(event.node, PeerView())
    if event.origin == "agent":
        leads = (
            view.claim in RUNS and not view.in_doubt and view.boot_id == event.boot_id
        )  # by its keeper's last word
        led_wall_s = event.wall_s if leads else view.led_wall_s
        view = replace(view, agent_at_s=now.monotonic_s, led_wall_s=led_wall_s)
    else:
        led_wall_s = view.led_wall_s if event.term == view.term else None
        view = replace(
            view,
            keeper_at_s=now.monotonic_s,
            boot_id=event.boot_id,
            term=event.term,
            claim=event.claim,
            heir=event.heir,
            alive=event.alive,
            pauses=event.pauses,
            takeovers=event.takeovers,
            in_doubt=event.in_doubt,
            led_wall_s=event.wall_s if event.claim in RUNS and not event.in_doubt else led_wall_s,
        )
    return replace(role, peers={**role.peers, event.node: view})


def _learn_doubt(role: Role, event: LeaseInDoubt, now: Instant) -> Acted:
    """The workload was frozen: take the address from this host, for another one may soon need it."""
    known = bool(role.in_doubt) and role.lost_to == event.claimed_by
    role = replace(role, in_doubt=event.reason, lost_to=event.claimed_by)
    if known:
        return role, ()
    role = noted(role, now, "frozen: lease in doubt", event.reason)
    note = Note(state=role.name, event="lease in doubt", reason=f"frozen: {event.reason}")
    return role, (*((DropVip(),) if role.spec.vip is not None else ()), note)


def _learn_lease(role: Role, now: Instant) -> Acted:
    """The lease stands, or nothing needs it any more; who leads brings the address back at the next tick."""
    if not role.in_doubt:
        return role, ()
    role = replace(role, in_doubt="", lost_to="")
    if role.name in LEADING and role.spec.vip is not None:
        role = replace(role, vip_problem="the address was dropped while the lease was in doubt")
    if role.name == "leading":
        role = replace(role, retry_at_s=now.monotonic_s)
    role = noted(role, now, "lease stands", "the workload runs on")
    return role, (Note(state=role.name, event="lease stands", reason="the workload is not frozen any more"),)


def _learn_time(role: Role, now: Instant) -> Acted:
    """Notice that this process did not run, and try again what failed."""
    role, effects = pauses_due(role, now)
    if now.monotonic_s - role.ticked_at_s > role.timing.suspect_after_s / 2:
        role = replace(role, listening_since_s=now.monotonic_s)
    if role.undo and 0 < role.undo_at_s <= now.monotonic_s:
        role, effects = replace(role, undo_at_s=0.0), (*effects, *undoing(role.undo))
    if (wanted := role.wanted) is not None and 0 < role.retry_at_s <= now.monotonic_s:
        role, effects = replace(role, retry_at_s=0.0), (*effects, PersistTerm(wanted))
    return replace(role, ticked_at_s=now.monotonic_s), effects


def _reorder(role: Role) -> Acted:
    """Give the agent a new order if it is to do something else from now on."""
    old = role.order
    if role.name == "taking_over" and role.step in ("hold", "add_vip") and old.role in ("follow", "keep"):
        return role, ()  # what is still on its way from the old leader may be committed until the restore
    order = Order(
        workload=role.spec.name,
        number=old.number,
        role=_order_role(role),
        term=role.record.term,
        action=_order_action(role),
        newest_only=role.name == "taking_over" and bool(role.record.handed_by),
        heir=role.heir,
        leader=role.record.leader,
        spec=role.spec,
    )
    if order == old:
        return role, ()
    order = replace(order, number=old.number + 1)
    return replace(role, order=order), (OrderAgent(order),)


def _order_role(role: Role) -> Any:
    if role.name in ("launching", "leading", "taking_over"):
        return "lead"
    if role.name == "handing_over":
        return "lead" if role.step == "order" else "keep"
    if keeps_frozen(role) and role.name in ("handed_over", "acquiring"):
        return "keep"
    own = role.record.leader == role.me and role.record.mark == "leads"
    if role.name == "acquiring" and role.alive and own:
        return "keep"  # frozen for the lack of a lease, and etcd is asked for the next term: the last copy
    return "follow" if role.name in (*PURSUING, "deposed") and role.record.leader != role.me else "idle"


def _order_action(role: Role) -> Any:
    if role.name in ("launching", "taking_over") and role.step not in ("hold", "add_vip", None):
        return "start" if role.name == "launching" else "restore"
    return "hand_over" if role.name == "handing_over" and role.step == "order" else "none"


# --- the table --------------------------------------------------------------------------------------

_BRINGING_UP: tuple[StateName, ...] = ("launching", "taking_over")
_AT_REST: tuple[StateName, ...] = ("starting", "stopped", "yielded", "failed")
_WATCHING: tuple[StateName, ...] = ("following", "suspecting", "waiting")
_LEADING: tuple[StateName, ...] = ("launching", "leading", "taking_over", "yielding")

TABLE: tuple[Row, ...] = (
    Row(("starting",), KeeperStarted, "led, right stands", found("leads"), "leading", lead_again),
    Row(("starting",), KeeperStarted, "was launching", found("launching"), "launching", resume),
    Row(("starting",), KeeperStarted, "was taking over", found("taking_over"), "taking_over", resume),
    Row(("starting",), KeeperStarted, "had handed over", found_handed_over, "handed_over", may_have_fenced),
    Row(("starting",), KeeperStarted, "was stopped", found("stopped"), "stopped", stopped),
    Row(("starting",), KeeperStarted, "had failed", found("failed"), "failed", kill),
    Row(("starting",), KeeperStarted, "had yielded", found("yielded"), "yielded", kill),
    Row(("starting",), KeeperStarted, "led, in doubt", found_in_doubt, None, kill),
    Row(("starting",), KeeperStarted, "runs, others lead", found_running_elsewhere, "deposed", kill),
    Row(("starting",), KeeperStarted, "others lead", found_elsewhere, "following", give_way_quietly),
    Row(("starting",), KeeperStarted, "never started", never_started, "stopped", stopped),
    # A newer term is known: whatever this node did, it follows.
    Row(("handing_over",), Heard, "newer term, not there yet", on_its_way_to_disk, None, nothing),
    Row((*_LEADING, "handing_over", "deposed"), Heard, "newer term", newer, "deposed", depose),
    Row(("acquiring",), Heard, "newer term, not there yet", kept_undecided, "handed_over", wait_again),
    Row(("acquiring",), Heard, "newer term, hearsay", kept_hearsay, None, nothing),
    Row((*_AT_REST, *_WATCHING, "acquiring"), Heard, "newer term", newer_while_alive, "deposed", depose),
    Row((*_AT_REST, *_WATCHING, "acquiring"), Heard, "newer term", newer, "following", give_way),
    Row(_WATCHING, Heard, "leader's mark", leader_moved_on, None, record_mark),
    Row(_WATCHING, Tick, "runs", runs_without_right, "deposed", kill),
    Row(("deposed",), Tick, "killed", undone, "following", nothing),
    Row(("deposed", "failed", "yielded", "starting"), Tick, "runs", runs_though_it_must_not, None, kill),
    # Handing over to a named node, and taking back.
    Row(("leading",), OperatorSwitchover, "switchover", asked, "handing_over", begin_handover),
    Row(("handing_over",), AgentReport, "last epoch committed", committed, None, drop_address),
    Row(("handing_over",), AgentReport, "could not", could_not, "leading", take_back),
    Row(("handing_over",), StepFailed, "not recorded", handover_not_recorded, "leading", take_back),
    Row(("handing_over",), Tick, "hindered", hindered, "leading", take_back),
    Row(("handing_over",), Tick, "address dropped", address_dropped, None, hand_over),
    Row(("handing_over",), TermPersisted, "recorded", recorded("yielded"), "handed_over", tell_handed_over),
    Row(("handed_over",), Heard, "runs there", runs_there, "deposed", depose),
    Row(("handed_over",), Heard, "given back", given_back, None, accept_back),
    Row(("handed_over",), Tick, "ended", kept_ended, "yielded", nothing),
    Row(("handed_over",), Tick, "ended, given back", given_back_ended, "following", nothing),
    Row(("handed_over",), Tick, "may take back", may_take_back, "acquiring", pursue),
    Row(("handed_over",), Tick, "waits", waits_for_heir, None, nothing),
    Row(("handed_over",), OperatorFailover, "failover", asked, "acquiring", ask_failover),
    Row(("leading", "failed"), Heard, "kept no more", kept_no_more, None, need_no_keeper),
    Row(("waiting",), Tick, "cannot take over", heir_cannot, None, record_failure),
    Row(("waiting",), TermPersisted, "failure recorded", recorded("failed"), "failed", kill),
    Row(("failed",), Tick, "given back", gives_back, "yielding", give_back),
    Row(("starting",), Tick, "given back", gives_back, None, give_back),
    # From silence to the right to lead.
    Row(("suspecting", "waiting"), Heard, "heard again", leader_audible, "following", nothing),
    Row(("suspecting", "waiting"), Tick, "heard again", leader_audible, "following", nothing),
    Row(("following",), Tick, "silence", leader_silent, "suspecting", suspect),
    Row(_WATCHING, Tick, "may not lead", may_not_lead, "waiting", nothing),
    Row(_WATCHING, Tick, "may lead", may_go_for_lead, "acquiring", pursue),
    Row(("acquiring",), FenceResult, "right acquired", start_confirmed, None, start_by_lease),
    *(
        Row(("acquiring",), FenceResult, "start refused", start_not_confirmed(state), state, start_denied)
        for state in (*_AT_REST, *_WATCHING)
    ),
    Row(("acquiring",), FenceResult, "leader is off, unwanted", unwanted_meanwhile, "waiting", halt),
    Row(("acquiring",), FenceResult, "leader is off", right_confirmed, None, fenced),
    Row(("acquiring",), FenceResult, "not confirmed, kept", kept_not_confirmed, "handed_over", unfenced),
    Row(("acquiring",), FenceResult, "not confirmed, given up", heir_not_confirmed, "yielded", unfenced),
    Row(("acquiring",), FenceResult, "no lease", own_not_confirmed("failed"), "failed", unfenced),
    Row(("acquiring",), FenceResult, "no lease", own_not_confirmed("leads"), "leading", unfenced),
    Row(
        ("acquiring",), FenceResult, "not confirmed, heard", not_confirmed_and_audible, "following", unfenced
    ),
    Row(("acquiring",), FenceResult, "not confirmed", not_confirmed, "waiting", unfenced),
    Row(("acquiring",), TermPersisted, "term recorded", recorded("taking_over"), "taking_over", begin),
    Row(("acquiring",), TermPersisted, "start recorded", recorded("launching"), "launching", begin_start),
    Row(("acquiring",), TermPersisted, "ceded", ceded, "yielded", tell_ceded),
    # Operators; what they may not do was refused before.
    Row((*_AT_REST, *_WATCHING), OperatorStart, "start", starts_by_lease, "acquiring", ask_lease_to_start),
    Row(("leading",), Tick, "claim came to nothing", may_claim_anew, "acquiring", pursue),
    Row(("leading",), OperatorFailover, "failover, lease in doubt", asked, "acquiring", ask_failover),
    Row((*_AT_REST, *_WATCHING), OperatorStart, "start", asked, "acquiring", ask_start),
    Row((*_WATCHING, "failed", "yielded"), OperatorFailover, "failover", asked, "acquiring", ask_failover),
    Row((*_LEADING, "starting", "failed"), OperatorStop, "stop", asked, None, stop),
    Row((*_AT_REST, *_WATCHING, "deposed"), Forget, "forget", asked, None, forget),
    Row((*_LEADING, "acquiring"), StepFailed, "not recorded", asked_but_unrecorded, None, not_recorded),
    # Bringing the workload up, step by step. A step that fails (but the order) does not stop it: a workload
    # that serves badly, and says so, is better than none.
    Row(_BRINGING_UP, StepDone, "last step", last_step, "leading", lead),
    Row(_BRINGING_UP, StepDone, "next step", more_steps, None, advance),
    Row(_BRINGING_UP, StepFailed, "last step", last_step, "leading", lead),
    Row(_BRINGING_UP, StepFailed, "next step", more_steps, None, advance),
    Row(("launching",), AgentReport, "could not restart", restart_failed, None, restart),
    Row(_BRINGING_UP, AgentReport, "could not", order_failed, "failed", fail),
    Row(_BRINGING_UP, Tick, "order unanswered", order_overdue, "failed", fail),
    Row(_BRINGING_UP, AgentReport, "runs, last step", up_last_step, "leading", lead),
    Row(_BRINGING_UP, AgentReport, "runs", up_more_steps, None, advance),
    Row(("taking_over",), Tick, "runs unreported, last step", unreported_last_step, "leading", lead),
    Row(("taking_over",), Tick, "runs unreported", unreported_more_steps, None, advance),
    Row(("launching",), AgentReport, "ended: failover", briefly(ended_yield), "yielding", clean_up),
    Row(("launching",), AgentReport, "ended: restart", briefly(ended_restart), None, restart),
    Row(("launching",), AgentReport, "ended: stop", briefly(ended_stop), None, stop),
    Row(("taking_over",), AgentReport, "ended", briefly(died_after_restore), "failed", fail),
    Row(("launching",), Tick, "restart due", restart_due, None, relaunch),
    Row(("taking_over",), WorkloadEnded, "ended", died_after_restore, "failed", fail),
    # Leading, and its end.
    Row(("leading",), Tick, "ended: failover", ended_yield, "yielding", clean_up),
    Row(("leading",), Tick, "ended: restart", ended_restart, "launching", restart),
    Row(("leading",), Tick, "ended: stop", ended_stop, None, stop),
    Row(("launching",), WorkloadEnded, "ended: failover", ended_yield, "yielding", clean_up),
    Row(("launching",), WorkloadEnded, "ended: restart", ended_restart, None, restart),
    Row(("launching",), WorkloadEnded, "ended: stop", ended_stop, None, stop),
    Row(("leading",), Tick, "repair", repair_due, None, repair),
    Row((*_LEADING, "starting", "failed"), TermPersisted, "stop recorded", stop_recorded, "stopped", stopped),
    Row(("yielding",), Tick, "cleaned up", cleaned_up, None, give_up),
    Row(("yielding", "starting"), TermPersisted, "yield recorded", recorded("yielded"), "yielded", nothing),
    Row(("stopped",), Tick, "not ended in time", overdue, None, kill),
    # After a boot or a fence: the term may be another's by now.
    Row(("starting",), Tick, "nobody else", alone_after_boot, None, stop),
    Row(("starting",), Tick, "successor heard", heir_heard_after_boot, None, give_up),
    Row(("starting",), Tick, "successor not heard", heir_not_heard, None, nothing),
)
"""Every transition there is. Earlier rows win."""


def _index() -> dict[tuple[StateName, type], tuple[Row, ...]]:
    index: dict[tuple[StateName, type], tuple[Row, ...]] = {}
    for row in TABLE:
        for source in row.sources:
            index[(source, row.event)] = (*index.get((source, row.event), ()), row)
    return index


_INDEX = _index()
