"""Handing a workload over to a named node without loss, and taking it back: guards and actions. Pure.

    leading ─▶ handing_over ─▶ handed_over ─▶ deposed        it runs there
                    │                │
                    └─▶ leading      └─▶ acquiring ─▶ …      it could not be brought up there

The workload stands still from its last epoch on. The leader first has that epoch committed by the heir, then
drops the address, then records, durably, that the term is handed over, and only then says so. Before that
record is written it can take the workload back by itself; after it, only when the heir gives the right back,
or is confirmed off. What keeps two from running it: a workload that was handed over is thawed in a newer
term of this node's own, and in no other case; and until it is ended here, it does not run.

The right is the heir's: it creates the next term as anybody does to whom a term was yielded. If it cannot
bring the workload up, it gives its term back to the node that keeps the workload, as that one gave it.
"""

from __future__ import annotations

from msgspec.structs import replace

from common.control import Done, Refused, WorkloadReport
from common.role_actions import (
    HANDOVER,
    Acted,
    adopt,
    answered,
    both,
    history,
    next_term,
    noted,
    persist,
    remark,
    undo,
)
from common.role_events import (
    AddVip,
    AgentReport,
    Announce,
    Event,
    FenceResult,
    Heard,
    KeeperStarted,
    LiftHold,
    OperatorSwitchover,
    StepFailed,
    TermPersisted,
    ThawWorkload,
)
from common.role_guards import not_confirmed
from common.roles import LEADING, Instant, PeerView, Role
from common.succession import (
    agent_alive,
    by_lease,
    contender,
    gave_up,
    holder,
    is_silent,
    keeper_speaks,
    keeps_frozen,
    kept_by_giver,
    obstacle,
    ready,
    replaceable,
    right_stands,
    successor,
    supersedes,
)

# --- may it be handed over --------------------------------------------------------------------------


def switchover_refusal(role: Role, event: OperatorSwitchover, now: Instant) -> Refused | None:
    """Return why the workload cannot be handed over to that node now; None if it can."""
    name, leader, to = role.spec.name, role.record.leader, event.to
    if to not in role.spec.nodes:
        return _refused(f"{to} is not one of the nodes of {name}", f"one of: {', '.join(role.spec.nodes)}")
    if role.name in ("handing_over", "handed_over"):
        return _refused(f"it is being handed over: {role.reason}", "outlive status")
    if role.name not in LEADING:
        other = leader if leader not in ("", role.me) else ""
        where = f"on {leader}: outlive switchover {name} --to {to}" if other else "outlive status"
        return _refused(f"{other or 'nobody known here'} leads it", where)
    if to == role.me:
        return _refused(f"{to} leads it already")
    if successor(role.spec, to) != role.me:
        # Either would fence what is silent there: the one that keeps the workload, and the successor.
        return _refused(
            f"{successor(role.spec, to)} is the successor of {to}, not {role.me}: both could replace it",
            f"put {role.me} first or second in the `nodes` of {name}",
        )
    if (heir := successor(role.spec, role.me)) != to:
        # It may take over from this node at any time; it need not have heard that the right is another's.
        return _refused(
            f"{heir} is the successor of {role.me}, and only it can be handed the right to lead",
            f"outlive switchover {name} --to {heir}, or put {to} before {heir} in its `nodes`",
        )
    if role.name != "leading" or role.request is not None or role.wanted is not None:
        return _refused("another change of role is under way", "ask again in a moment")
    if role.in_doubt:
        return _refused(f"it is frozen here: {role.in_doubt}", "outlive status")
    if not role.alive:
        return _refused(f"{name} does not run at the moment", "ask again in a moment")
    if not agent_alive(role, now):
        return _refused("this node's agent is silent: it would have to capture the last epoch")
    if not keeper_speaks(role, to, now):
        return _refused(f"the keeper of {to} is not heard", f"systemctl status outlive-keeper on {to}")
    replicas = role.report.replicas if role.report is not None else ()
    replica = next((each for each in replicas if each.node == to), None)
    if replica is None or not ready(role, replica):
        why = "; ".join(replica.reasons) if replica is not None else ""
        return _refused(f"{to} could not restore it now{f': {why}' if why else ''}", "outlive status")
    return None


def _refused(message: str, hint: str = "") -> Refused:
    return Refused(error="NoRightToLeadError", message=message, hint=hint)


# --- handing over -----------------------------------------------------------------------------------


def begin_handover(role: Role, event: OperatorSwitchover, now: Instant) -> Acted:
    """Have the agent freeze it and get its last epoch to the heir."""
    role = replace(
        role,
        heir=event.to,
        request=event.request,
        step="order",
        launched_at_s=now.monotonic_s,
        timeline=(),
        timeline_from_s=now.monotonic_s,
    )
    role = noted(role, now, HANDOVER, f"to {event.to}, asked for by an operator")
    return answered(role, Done(detail=f"{role.spec.name} is being handed over to {event.to}"))


def committed(role: Role, event: AgentReport, now: Instant) -> str:
    """The heir has the last epoch, and the workload stands still since it was taken."""
    report = event.report
    if role.step != "order" or report.order_done < role.order.number or report.handed_over is None:
        return ""
    return f"{role.heir} has the last epoch, {report.handed_over}"


def drop_address(role: Role, event: AgentReport, now: Instant) -> Acted:
    """Take the address from this host before anybody else may have it."""
    role = noted(role, now, "last epoch committed", event.report.order_detail)
    return undo(replace(role, step=None), "drop_vip")


def address_dropped(role: Role, event: Event, now: Instant) -> str:
    """Nothing of the workload is left here but the frozen processes."""
    if role.step is not None or role.undo or role.wanted is not None:
        return ""
    return f"{role.heir} has the last epoch, and the address is dropped here"


def hand_over(role: Role, event: Event, now: Instant) -> Acted:
    """Record that the term is the heir's to follow."""
    return remark(role, "yielded", heir=role.heir)


def tell_handed_over(role: Role, event: TermPersisted, now: Instant) -> Acted:
    """Keep the story of the term that is over."""
    role = noted(role, now, "handed over", f"the right to lead is {role.record.heir}'s")
    return role, (history(role),)


def has_to_stand_still(role: Role, report: WorkloadReport) -> bool:
    """Tell whether the workload must not have run since the last epoch that is handed over with it.

    The agent says so until it has a newer order; from then on, until that is recorded, this node knows it.
    """
    return report.handed_over is not None or (role.name == "handing_over" and role.step is None)


def as_thawed(role: Role, report: WorkloadReport) -> WorkloadReport:
    """Return the report of a workload that had to stand still and does not: it is not handed over."""
    return replace(
        report,
        handed_over=None,
        order_failed=role.order.number if role.name == "handing_over" else report.order_done,
        order_detail="it was thawed after its last epoch was taken",
    )


# --- taking back, before it was said ----------------------------------------------------------------


def on_its_way_to_disk(role: Role, event: Heard, now: Instant) -> str:
    """That the term is the heir's is being recorded, and a newer one is known in which it does not run yet.

    It stands still, and is kept as by one who has recorded that: whoever leads that term may fail. With
    leases only: it stays frozen for the lack of one if that cannot be recorded, and it is taken back.
    """
    given = role.wanted is not None and role.wanted.mark == "yielded" and by_lease(role)
    return role.reason if given and supersedes(role, event) and not runs_there(role, event, now) else ""


def could_not(role: Role, event: AgentReport, now: Instant) -> str:
    """The agent could not get the last epoch to the heir; or it was thawed before that was recorded."""
    asked = role.step in ("order", None) and role.wanted is None
    if not asked or event.report.order_failed < role.order.number:
        return ""
    return _stays(role, event.report.order_detail)


def not_recorded(role: Role, event: StepFailed, now: Instant) -> str:
    """That it is handed over could not be recorded; perhaps the disk has it all the same."""
    return _stays(role, f"it cannot be recorded: {event.reason}") if event.step == "persist" else ""


def hindered(role: Role, event: Event, now: Instant) -> str:
    """Somebody who is needed for it is gone, or it takes too long."""
    if not role.alive:
        return _stays(role, "it ended")
    if not agent_alive(role, now):
        return _stays(role, "this node's agent is silent")
    if is_silent(role, role.heir, now):
        return _stays(role, f"{role.heir} has fallen silent")
    if now.monotonic_s - role.launched_at_s > role.timing.handover_s:
        return _stays(role, f"it took longer than {role.timing.handover_s:g} s")
    return ""


def _stays(role: Role, why: str) -> str:
    return f"not handed over to {role.heir}: {why}"


def take_back(role: Role, event: Event, now: Instant) -> Acted:
    """Let it run on here, with its address.

    If the record that it is handed over is on its way to the disk, another one follows it. A keeper that dies
    between the two finds the workload running, and not frozen: it ends it, for the heir may lead then.
    """
    recording = role.wanted is not None
    role = replace(role, step=None, undo=frozenset(), heir="")
    role = noted(role, now, "taken back", "it runs on here")
    effects = (ThawWorkload(), *((AddVip(), LiftHold(), Announce()) if role.spec.vip is not None else ()))
    acted: Acted = (role, effects)
    return both(acted, remark(role, "leads")) if recording else acted


# --- kept until it runs there -----------------------------------------------------------------------


def found_handed_over(role: Role, event: KeeperStarted, now: Instant) -> str:
    """It was handed over before this keeper began, and stands still ever since."""
    record = role.record
    if not keeps_frozen(role) or not event.frozen or not right_stands(role):
        return ""
    if record.heir == role.me:
        return f"{record.leader} gave term {record.term} back"
    return f"term {record.term} is handed over to {record.heir}; it is kept here, frozen, until it runs there"


def may_have_fenced(role: Role, event: KeeperStarted, now: Instant) -> Acted:
    """Count with a fence of the heir that the keeper before this one asked for: its program runs on."""
    if by_lease(role) or not replaceable(role, holder(role)):
        return role, ()
    return replace(role, fencing_until_s=now.monotonic_s + role.timing.fence_s), ()


def runs_there(role: Role, event: Heard, now: Instant) -> str:
    """A newer term is known in which nobody gives it back any more."""
    if not supersedes(role, event) or _may_be_ended_late(role, event, now):
        return ""
    runs = event.claim == "leading" and event.alive
    elsewhere = event.claim == "yielded" and event.heir != role.me
    if not (runs or elsewhere or event.claim == "stopped"):
        return ""
    return f"{event.node} says {event.claim} in term {event.term}: it is not needed here any more"


def _may_be_ended_late(role: Role, event: Heard, now: Instant) -> bool:
    """Tell whether this node has just asked for the heir's fence, and cannot tell what came of it.

    What is heard to run there may be ended by that in the next moment; then this is the last copy.
    """
    asked = role.retries > 0 and now.monotonic_s < role.retry_at_s
    asked = asked or now.monotonic_s < role.fencing_until_s
    return asked and _a_fence_ends(role, event)


def _a_fence_ends(role: Role, event: Heard) -> bool:
    """Tell whether a fence of the heir that this node asks for would end what is heard to run."""
    return not by_lease(role) and event.node == holder(role) and event.claim != "stopped"


def given_back(role: Role, event: Heard, now: Instant) -> str:
    """The heir could not bring it up, and has recorded that the right to lead is this node's again."""
    if not supersedes(role, event) or event.claim != "yielded" or event.heir != role.me:
        return ""
    return f"{event.node} could not bring it up, and gives term {event.term} back"


def accept_back(role: Role, event: Heard, now: Instant) -> Acted:
    """Record the term that was given back; the next one is this node's."""
    return adopt(noted(role, now, "given back", f"by {event.node}"), event, now)


def may_take_back(role: Role, event: Event, now: Instant) -> str:
    """The right is this node's, or its holder has to be, and can be, confirmed off."""
    if role.wanted is not None or not role.alive or now.monotonic_s < role.retry_at_s:
        return ""
    rival = holder(role)
    if rival == role.me:
        return f"{role.record.leader} gave term {role.record.term} back"
    if by_lease(role) and _known_for_s(role, now) > 2 * role.timing.handover_s:
        return f"{rival}, to which it was handed over, does not run it: etcd has to give the next term"
    if not is_silent(role, rival, now) or _not_by_itself(role):
        return ""
    return f"{rival}, to which it was handed over, is silent: it has to be confirmed off"


def _known_for_s(role: Role, now: Instant) -> float:
    """Return for how long this keeper has known that it is handed over."""
    return now.monotonic_s - role.launched_at_s


def waits_for_heir(role: Role, event: Event, now: Instant) -> str:
    """Nothing has come of it yet, and that is not shown."""
    rival = holder(role)
    told = role.retries and (by_lease(role) or is_silent(role, rival, now))  # why it cannot be taken back
    if role.wanted is not None or rival == role.me or told:
        return ""
    reason = f"handed over to {rival}; it is kept here, frozen, until it runs there"
    view = role.peers.get(rival, PeerView())
    if is_silent(role, rival, now):
        reason = f"handed over to {rival}, which is silent; {_not_by_itself(role)}"
    elif view.claim == "starting" and view.term > role.record.term:
        reason = (
            f"{rival} led term {view.term} after it was handed over, and has lost what ran there; "
            f"what is kept here, frozen, is older: outlive failover {role.spec.name} --accept-data-loss"
        )
    return "" if reason == role.reason else reason


def _not_by_itself(role: Role) -> str:
    """Return why this node does not take it back unasked from an heir that is silent; empty if it does."""
    rival, name = holder(role), role.spec.name
    failover = f"outlive failover {name} --accept-data-loss --old-primary-is-off {rival} thaws it here"
    if role.spec.right_to_lead == "manual":
        return f"right_to_lead is manual: {failover}"
    return "" if replaceable(role, rival) else f"no fence method is configured for {rival}: {failover}"


def kept_not_confirmed(role: Role, event: FenceResult, now: Instant) -> str:
    """The fence of the heir did not confirm, or etcd does not give the next term."""
    why = not_confirmed(role, event, now) if keeps_frozen(role) else ""
    return f"{why}; it is kept here, frozen" if why and by_lease(role) else why


def heir_not_confirmed(role: Role, event: FenceResult, now: Instant) -> str:
    """The fence of the one to which this node gave its term did not confirm."""
    return not_confirmed(role, event, now) if gave_up(role) else ""


def kept_undecided(role: Role, event: Heard, now: Instant) -> str:
    """The heir is heard again while it is being fenced, in its term, but does not run it yet.

    Etcd, where it gives the right, is asked by nobody to turn the heir off. And who has just booted does not
    run it: an operator who accepts the loss of what it did in that term is not told to wait.
    """
    if by_lease(role) or not kept_hearsay(role, event, now) or event.node != holder(role):
        return ""
    if runs_there(role, event, now) or (role.by_operator and event.claim == "starting"):
        return ""
    return f"{event.node} says {event.claim} in term {event.term}"


def wait_again(role: Role, event: Heard, now: Instant) -> Acted:
    """Forget the attempt, and whatever an operator said for it; the fence may do its work all the same."""
    message = f"{event.node} is not off: it says {event.claim} in term {event.term}"
    refusal = Refused(error="NoRightToLeadError", message=message, hint="outlive status")
    role = replace(
        role,
        by_operator=False,
        vouched="",
        retries=max(1, role.retries),
        retry_at_s=now.monotonic_s + role.timing.fence_s,
        fence_attempt=role.fence_attempt + 1,
    )
    return answered(role, refusal)


def kept_hearsay(role: Role, event: Heard, now: Instant) -> str:
    """A newer term is known, and whether it runs there is not, or not for long: its fence is asked for.

    Invariant: what is kept is not ended while a fence that this node has asked for may end the other copy.
    """
    if not keeps_frozen(role) or not supersedes(role, event):
        return ""
    undecided = _a_fence_ends(role, event) or not runs_there(role, event, now)
    return role.reason if undecided else ""


def kept_ended(role: Role, event: Event, now: Instant) -> str:
    """What was kept is gone."""
    if role.alive or role.record.leader != role.me:
        return ""
    return f"what was kept here has ended; the right to lead is {holder(role)}'s"


def given_back_ended(role: Role, event: Event, now: Instant) -> str:
    """What was kept is gone, and the right to lead had been given back."""
    if role.alive or role.record.leader == role.me or role.wanted is not None:
        return ""
    return "what was kept here has ended"


# --- the heir's side --------------------------------------------------------------------------------


def heir_cannot(role: Role, event: Event, now: Instant) -> str:
    """The right is this node's, it could not use it for long, and who handed it over may still have it.

    Who has nothing of it any more needs nothing back, and cannot: this node waits until it can.

    Beyond doubt: who begins a term without the right, even one in which nothing runs, has the right in it.
    """
    if by_lease(role) or not kept_by_giver(role):
        return ""  # with leases, the node that keeps it takes it back by itself
    if role.wanted is not None or _known_for_s(role, now) < role.timing.handover_s:
        return ""
    return "" if contender(role, now) else obstacle(role, now)


def record_failure(role: Role, event: Event, now: Instant) -> Acted:
    """Begin the term in which the workload does not come up here, so that it can be given back."""
    return next_term(role, "failed", f"switchover: not possible here: {role.reason}", now)


def kept_no_more(role: Role, event: Heard, now: Instant) -> str:
    """The node that handed it over knows this term, and so has nothing of it any more."""
    record = role.record
    if event.node != record.handed_by or event.term < record.term or role.wanted is not None:
        return ""
    return role.reason


def need_no_keeper(role: Role, event: Heard, now: Instant) -> Acted:
    """Record that nobody else has the workload any more."""
    return persist(role, replace(role.record, handed_by=""))


def gives_back(role: Role, event: Event, now: Instant) -> str:
    """It cannot run here, and who handed it over still keeps it."""
    record = role.record
    if record.leader != role.me or not record.handed_by or role.wanted is not None or role.alive or role.undo:
        return ""
    view = role.peers.get(record.handed_by, PeerView())
    keeps = view.claim in ("yielded", "acquiring") and view.alive and view.term < record.term
    if record.mark == "leads" and _followed(role):
        return ""  # it has served since, and what it did then is stored there
    if not keeps or not keeper_speaks(role, record.handed_by, now) or not _agent_at_rest(role, now):
        return ""
    return f"{record.handed_by} keeps it, and can let it run on: {role.reason}"


def _followed(role: Role) -> bool:
    """Tell whether another node says that it follows this term: it may have epochs of it."""
    return any(view.claim == "following" and view.term == role.record.term for view in role.peers.values())


def _agent_at_rest(role: Role, now: Instant) -> bool:
    """Tell whether the agent has said that nothing runs here: it may have been half-way through a restore."""
    report = role.report
    rests = report is not None and not report.running and report.order_done >= role.order.number
    return rests and agent_alive(role, now)


def give_back(role: Role, event: Event, now: Instant) -> Acted:
    """Record that the right to lead is with the node again that handed the term over."""
    return remark(noted(role, now, "given back", role.reason), "yielded", heir=role.record.handed_by)
