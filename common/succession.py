"""Who may lead: the questions that the role machine asks before every transition. Pure judgments.

In: a `Role` and the moment. Out: yes or no, or the sentence that says why not. Nothing is decided by what
was heard of a peer long ago; where a peer's silence matters, it counts from this keeper's own start.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.control import Refused, ReplicaProgress
from common.model import WorkloadSpec
from common.pauses import in_force, told
from common.role_events import Heard, OperatorFailover, OperatorStart
from common.roles import LEADING, OWNING, PURSUING, RUNS, Instant, PeerView, Role, claim_of

_UNHEARD = PeerView()


def successor(spec: WorkloadSpec, leader: str) -> str:
    """Return the first node of `nodes` that isn't the leader; empty if there is none."""
    return next((node for node in spec.nodes if node != leader), "")


def holder(role: Role) -> str:
    """Return whose right it is to create the next term; empty if that isn't known."""
    if role.record.mark == "yielded":
        return role.record.heir or successor(role.spec, role.record.leader)
    return role.record.leader


def fenced_by(role: Role) -> str:
    """Return who fenced this node in the recorded term or a later one; empty if nobody did."""
    refusal = role.refusal
    return refusal.by if refusal is not None and role.record.term <= refusal.term else ""


def right_stands(role: Role) -> bool:
    """Tell whether what this node recorded of its right to lead is beyond doubt: nobody can have fenced it.

    Invariant: a node that was fenced leads nothing under a term up to the fenced one, also after a restart
    of its keeper under the same boot. Whoever asks whether this node's own right still counts asks here.
    """
    return role.record.boot_id == role.boot_id and not fenced_by(role)


def planned(role: Role) -> bool:
    """Tell whether the term was handed over to this node by name: what it leads to was decided there."""
    return role.record.mark == "yielded" and role.record.heir == role.me


def kept_by_giver(role: Role) -> str:
    """Return the node that handed this term over by name and may still have the workload, frozen; else empty.

    Its own word that nothing of it is there stands for as long as the term does: what has ended does not come
    back in it. So it is with a node that was fenced, and gave its term to the one that had fenced it.
    """
    if not planned(role) or role.record.nothing_kept:
        return ""
    view = role.peers.get(role.record.leader, _UNHEARD)
    ended = view.claim == "yielded" and view.term == role.record.term and not view.alive
    return "" if ended else role.record.leader


def keeps_frozen(role: Role) -> bool:
    """Tell whether this node handed a term over, or was given it back, and has the workload, frozen."""
    record = role.record
    mine = bool(record.heir) and role.me in (record.leader, record.heir)
    return record.mark == "yielded" and mine and role.alive


def gave_up(role: Role) -> bool:
    """Tell whether this node gave its term up to another one, and keeps nothing but its epochs."""
    record = role.record
    return (
        record.mark == "yielded" and record.leader == role.me and holder(role) != role.me and not role.alive
    )


def let_go(role: Role) -> bool:
    """Tell whether it did so, and named the other one: who that is does not follow from the line."""
    return gave_up(role) and bool(role.record.heir)


def by_lease(role: Role) -> bool:
    """Tell whether etcd gives the right to lead: nobody has to be confirmed off, nor vouched for."""
    return role.spec.right_to_lead == "etcd"


def replaceable(role: Role, node: str) -> bool:
    """Tell whether anything but an operator's word can give this node the right of that one."""
    return by_lease(role) or node in role.fenceable


def leads_nothing_newer(role: Role, now: Instant) -> tuple[str, ...]:
    """Return the nodes that say, now, that the very term that is the newest known here is theirs too.

    What they may have claimed of a later one came to nothing, or cannot be recorded: who leads a term has it
    on disk, and says so. Who is about to record it has the key in etcd, which gives it to nobody else then.
    So it does not matter what they are in that term: to lead it, or to have given it up, is nothing newer.
    """
    return tuple(
        node
        for node, view in role.peers.items()
        if view.claim not in (None, "starting")
        and view.term == role.record.term
        and keeper_speaks(role, node, now)
    )


def contender(role: Role, now: Instant) -> str:
    """Return the node that has to be off before this one may lead; empty if none has to.

    The holder's own right is beyond doubt under the boot in which it was recorded. After another boot,
    others may have been told that this node is off; the one that yielded has to repeat it. After a fence
    by SSH, who fenced is known, and may lead. If it is the one that yielded, it too has to repeat that, once
    this keeper has listened for long enough not to take an old word for a new one.
    """
    owner = holder(role)
    if owner != role.me:
        return owner
    if right_stands(role):
        return ""
    fencer, listened_s = fenced_by(role), now.monotonic_s - role.listening_since_s
    if fencer and (fencer != role.record.leader or listened_s < role.timing.listen_s):
        return fencer
    leader = role.record.leader
    view = role.peers.get(leader, _UNHEARD)
    says_so = view.claim == "yielded" and view.term == role.record.term
    return "" if says_so and keeper_speaks(role, leader, now) else leader


def last_heard_s(role: Role, node: str) -> float | None:
    """Return when the node's keeper or agent was heard last; None if never."""
    view = role.peers.get(node, _UNHEARD)
    heard = [at for at in (view.keeper_at_s, view.agent_at_s) if at is not None]
    return max(heard, default=None)


def silence_s(role: Role, node: str, now: Instant) -> float:
    """Return for how long neither keeper nor agent of the node was heard, while this keeper listened."""
    at = last_heard_s(role, node)
    since = role.listening_since_s if at is None else max(at, role.listening_since_s)
    return now.monotonic_s - since


def is_silent(role: Role, node: str, now: Instant) -> bool:
    """Tell whether the node's silence is long enough to suspect it.

    A leader that says itself that its lease is in doubt, and that it has frozen the workload, is no better.
    """
    if by_lease(role) and node == role.record.leader and role.peers.get(node, _UNHEARD).in_doubt:
        return True
    never = last_heard_s(role, node) is None
    limit_s = role.timing.listen_s if never else role.timing.suspect_after_s
    return silence_s(role, node, now) > limit_s


def unheard_leader(role: Role, now: Instant) -> str:
    """Return whom this node follows without hearing it; empty if there is none.

    Invariant: of a leader that gave its term up, nobody says that it leads: another one has the right by now.
    """
    record = role.record
    if claim_of(role) != "following" or record.mark not in ("leads", "stopped"):
        return ""
    away = record.leader not in ("", role.me) and is_silent(role, record.leader, now)
    return record.leader if away else ""


def keeper_speaks(role: Role, node: str, now: Instant) -> bool:
    """Tell whether the node's keeper was heard within the suspicion time."""
    at = role.peers.get(node, _UNHEARD).keeper_at_s
    return at is not None and now.monotonic_s - at <= role.timing.suspect_after_s


def has_listened(role: Role, now: Instant) -> bool:
    """Tell whether every other node of the workload was heard, or had the time to be."""
    if now.monotonic_s - role.listening_since_s >= role.timing.listen_s:
        return True
    return all(keeper_speaks(role, node, now) for node in role.spec.nodes if node != role.me)


def agent_alive(role: Role, now: Instant) -> bool:
    """Tell whether this node's agent reported lately."""
    at = role.agent_at_s
    return at is not None and now.monotonic_s - at <= role.timing.agent_silent_after_s


def supersedes(role: Role, event: Heard) -> bool:
    """Tell whether the sender knows a newer term, or leads the same one with the better claim.

    A term has two leaders only if operators used their powers on two nodes at once. Then the first by name
    stays, so that one of them gives way and never both. Who leads a term of which only the number is known,
    any node may say that followed it; but nobody is told so that he leads.
    """
    newest = role.newest
    if event.term != newest.term:
        return event.term > newest.term
    if event.term == 0 or event.node == newest.leader:
        return False
    if event.claim not in OWNING:
        return newest.leader == "" and event.leader not in ("", role.me)
    return newest.leader == "" or event.node < newest.leader


def disowned(role: Role, now: Instant) -> bool:
    """Tell whether the leader is heard, runs nothing and does not claim its term: it lost its state.

    A leader that is about to follow a newer term looks like that too, for as long as recording it takes.
    """
    leader = role.record.leader
    view = role.peers.get(leader, _UNHEARD)
    if role.record.mark in ("stopped", "failed", "yielded") or not keeper_speaks(role, leader, now):
        return False
    return view.claim in (None, "following") and view.term <= role.record.term and not view.alive


def unready(role: Role, now: Instant) -> str:
    """Return why nothing could be restored here; empty if something could."""
    if not agent_alive(role, now):
        return "this node's agent is silent: nobody could restore here"
    report = role.report
    if report is None or report.stored is None:
        return "no epoch is stored here"
    if not report.restorable:
        return f"{report.stored} is stored here but could not be restored: {'; '.join(report.reasons)}"
    return ""


def paused(role: Role) -> str:
    """Return why nobody may take over by itself; empty if it isn't paused.

    A pause counts as soon as it is known, a resume once it is recorded here.
    """
    pauses = in_force(role.pauses) or in_force(role.pauses_wanted or ())
    return f"takeover is {told(pauses)}" if pauses else ""


def obstacle(role: Role, now: Instant) -> str:
    """Return why this node may not go for the lead by itself; empty if it may, after a fence if needed."""
    return next(obstacles(role, now), "")


def obstacles(role: Role, now: Instant) -> Iterator[str]:
    """Yield everything that stands against it, the most telling first. Any of them is enough."""
    record, name = role.record, role.spec.name
    failover = f"outlive failover {name} --accept-data-loss"
    if not record.leader:
        yield f"nobody here knows who led term {record.term}: outlive status on the other nodes"
        return
    if record.mark == "yielded" and record.heir not in ("", role.me):
        yield f"{record.leader} has handed it over to {record.heir}, or takes it back: {failover}"
        return
    if not planned(role) and successor(role.spec, record.leader) != role.me:
        yield f"{successor(role.spec, record.leader)} is the successor of {record.leader}, not this node"
        return
    if not planned(role) and (pause := paused(role)):
        yield f"{pause}: outlive resume {name}, or {failover}"
    rival = contender(role, now)
    problem = unready(role, now)
    if problem:
        yield f"{problem}{_empty_start(role, rival, now)}"
    report = role.report
    if report is not None and report.doubt:
        yield f"{report.doubt}: {failover}"
    if report is not None and report.stored is not None and report.stored.term < record.term:
        yield f"the newest epoch here, {report.stored}, is older than term {record.term}: {failover}"
    yield from _no_right(role, rival, now)
    if not problem and not planned(role) and (behind := too_far_behind(role)):
        yield behind


def _no_right(role: Role, rival: str, now: Instant) -> Iterator[str]:
    """Yield why this node may not lead whatever is stored here."""
    failover = f"outlive failover {role.spec.name} --accept-data-loss"
    if disowned(role, now):
        if not replaceable(role, rival):
            failover = (
                f"systemctl stop outlive-keeper outlive-agent on {rival}, "
                f"then: {failover} --old-primary-is-off {rival}"
            )
        yield (
            f"{rival} is heard, but does not know that it leads term {role.record.term}, "
            f"and runs nothing: {failover}"
        )
        return
    given = role.spec.on_exit == "failover" or planned(role)
    if role.spec.right_to_lead == "manual" and (rival or not given):
        yield f"right_to_lead is manual: {failover}"
    if rival and not is_silent(role, rival, now):
        yield f"{rival} is heard, and does not say that it has given up term {role.record.term}"
    elif rival and not replaceable(role, rival):
        yield f"no fence method is configured for {rival}: {failover} --old-primary-is-off {rival}"


def _empty_start(role: Role, rival: str, now: Instant) -> str:
    """Say how to begin with empty memory, if nothing at all is stored here."""
    if not agent_alive(role, now) or (role.report is not None and role.report.stored is not None):
        return ""
    where = ""
    if rival:
        where = f" --off {rival}" if is_silent(role, rival, now) else f" on {rival}"
    return f": outlive start {role.spec.name}{where} (memory content is lost)"


def lag_s(role: Role) -> float | None:
    """Return how far the newest epoch here lies behind the last sign that its leader led.

    Both instants are the leader's own: it stamped the epoch and the heartbeat by one clock, before it fell
    silent. No clock of this node has a part in it, nor has the time that has passed since. None: the leader
    was not heard to lead this term since this keeper began. Not guaranteed: that a leader whose clock was
    set back between the two has a lag that is not too small by as much.
    """
    view = role.peers.get(role.record.leader, _UNHEARD)
    stored_wall_s = role.report.stored_wall_s if role.report is not None else None
    if view.led_wall_s is None or view.term != role.record.term or stored_wall_s is None:
        return None
    return max(0.0, view.led_wall_s - stored_wall_s)


def too_far_behind(role: Role) -> str:
    """Return why what is stored here is too old for a takeover that nobody asked for; empty if it isn't."""
    limit_s = role.spec.max_takeover_lag_ms / 1000
    behind_s = lag_s(role)
    if not limit_s or (behind_s is not None and behind_s <= limit_s):
        return ""
    leader = role.record.leader
    how_far = (
        f"the newest epoch here was {behind_s:.1f} s behind when {leader} was last heard to lead"
        if behind_s is not None
        else f"how far the newest epoch here is behind is not known: {leader} was not heard to lead "
        f"term {role.record.term} since this keeper began"
    )
    return (
        f"{how_far}; max_takeover_lag_ms allows {limit_s:g} s: "
        f"outlive failover {role.spec.name} --accept-data-loss"
    )


def has_heir(role: Role, now: Instant) -> bool:
    """Tell whether the successor could restore what ran here: as the agent reports, or that node itself says.

    An agent whose workload has ended reports of no replica any more: what it said just before counts.
    """
    if reports_heir(role) or now.monotonic_s - role.heir_ready_at_s <= role.timing.agent_silent_after_s:
        return True
    heir = successor(role.spec, role.me)
    view = role.peers.get(heir, _UNHEARD)
    would = any(not takeover.missing for takeover in view.takeovers)
    return would and view.term == role.record.term and keeper_speaks(role, heir, now)


def reports_heir(role: Role) -> bool:
    """Tell whether, by the agent's last report, the successor could restore the workload."""
    heir = successor(role.spec, role.me)
    replicas = role.report.replicas if role.report is not None else ()
    return any(replica.node == heir and ready(role, replica) for replica in replicas)


def of_this_term(role: Role, replica: ReplicaProgress) -> bool:
    """Tell whether what the replica acknowledged is of this term: older epochs are of an earlier run."""
    return replica.acknowledged is not None and replica.acknowledged.term == role.record.term


def ready(role: Role, replica: ReplicaProgress) -> bool:
    """Tell whether, by the agent's last report, the replica could restore what runs here."""
    return replica.connected and replica.restorable and of_this_term(role, replica)


def failover_refusal(role: Role, event: OperatorFailover, now: Instant) -> Refused | None:
    """Return why the operator's failover cannot even begin."""
    record, spec = role.record, role.spec
    if event.to not in ("", role.me):
        return _cede_refusal(role, event, now)
    if role.name in LEADING and not (role.name == "leading" and role.in_doubt):
        return _refused("this node leads it already")
    if role.request is not None or role.wanted is not None or role.name == "acquiring":
        return _refused("another change of role is under way", "ask again in a moment")
    if role.name == "yielded" and let_go(role):
        if not is_silent(role, record.heir, now):
            return _refused(f"{record.heir} has the right to lead it, and is heard", "outlive status there")
    elif role.name not in (*PURSUING, "failed", "handed_over", "leading"):
        if record.term == 0:
            return _refused("it was never started anywhere", f"outlive start {spec.name} on {spec.nodes[0]}")
        return _refused(f"this node is {role.name}: {role.reason}", f"outlive start {spec.name}")
    if role.me not in spec.nodes:
        return _refused(f"{role.me} is not one of its nodes ({', '.join(spec.nodes)})")
    if refusal := _stranger(spec.nodes, spec.name, event.old_primary_is_off, *event.others_are_off):
        return refusal
    if not event.accept_data_loss:
        return _refused("what was not committed here would be lost", "say so: --accept-data-loss")
    if record.mark == "yielded" and record.heir and role.me not in (record.leader, record.heir):
        return _refused(
            f"{record.leader} has handed it over to {record.heir}, and either of them may lead it",
            f"run it on {record.leader}, which keeps it; if both are off: outlive start {spec.name} "
            f"--off {record.leader} --off {record.heir} (memory content is lost)",
        )
    here = keeps_frozen(role) or role.name == "leading"
    if not here and (problem := unready(role, now)):
        return Refused(error="RestoreError", message=problem)
    if not record.leader:
        return _refused(f"nobody here knows who led term {record.term}", "outlive status on the other nodes")
    rival = contender(role, now)
    vouched = (event.old_primary_is_off, *event.others_are_off)
    if refusal := _third_unheard(role, vouched, rival, now):
        return refusal
    if not rival:
        return None
    by_name = keeps_frozen(role) or planned(role) or let_go(role)
    heir = role.me if by_name else successor(spec, rival)
    cede = f"run it on {heir}, or if nothing is stored there, with: --to {role.me}"
    if heir != role.me and spec.right_to_lead == "fence":
        return _refused(f"{heir} may take over by itself at any time", cede)
    if heir != role.me and not by_lease(role) and keeper_speaks(role, heir, now):
        return _refused(f"{heir} is first in the line of succession and alive", cede)
    if not replaceable(role, rival):
        return unvouched(role, event.old_primary_is_off, now)
    return None


def _line_may_have_moved(role: Role) -> bool:
    """Tell whether a start may have changed who takes over, or how, and this node not know of that yet.

    Such a start follows a stop, and the new declaration comes with the first epoch of the new term. And what
    this node gave up may have been led, and taken over, since.
    """
    record, report = role.record, role.report
    if record.mark == "stopped" or gave_up(role):
        return True
    if planned(role) or keeps_frozen(role) or record.leader == role.me:
        return False
    return report is None or report.stored is None or report.stored.term < record.term


def _third_unheard(role: Role, vouched: tuple[str, ...], rival: str, now: Instant) -> Refused | None:
    """Return which node but `rival` may lead, or take over, by a newer declaration; None if none may.

    Where etcd gives the right, it knows who leads, unless a start has taken that from it: then it gives no
    term after one that it did not give, but after a stop, or if an operator vouches for a node.
    """
    etcd_knows = by_lease(role) and role.record.mark != "stopped" and not any(vouched)
    if etcd_knows or not _line_may_have_moved(role):
        return None
    asked_for = (role.me,) if by_lease(role) else (role.me, rival or role.record.leader)
    for node in role.spec.nodes:
        if node in asked_for or (node in vouched and is_silent(role, node, now)):
            continue
        if not keeper_speaks(role, node, now):
            return _refused(
                f"{node} is not heard, and may lead by a start of which this node has not heard",
                f"start {node}'s keeper; or make sure that it is off, and say --off {node}",
            )
        if any(not takeover.missing for takeover in role.peers[node].takeovers):
            return _refused(
                f"{node} may take over by itself at any time: what is stored here is of an earlier term, and "
                "the line of succession may have been another one since",
                f"outlive status on {node}",
            )
    return None


def _cede_refusal(role: Role, event: OperatorFailover, now: Instant) -> Refused | None:
    """Return why this node cannot take the right to lead for another one, and give it up to that at once.

    Only the successor of a leader that is lost can, for nobody else takes over unasked; and whoever gave the
    term up, once the node that it gave it to is lost. What a leader handed over, and may keep, is given to no
    third node.
    """
    record, spec, to = role.record, role.spec, event.to
    if to not in spec.nodes or to == holder(role):
        others = [node for node in spec.nodes if node not in (role.me, holder(role))]
        return _refused(f"{to} cannot take it over from {holder(role)}", f"one of: {', '.join(others)}")
    if by_lease(role):
        return _refused(
            "with leases any node may ask for it",
            f"on {to}: outlive failover {spec.name} --accept-data-loss",
        )
    if role.request is not None or role.wanted is not None or role.name == "acquiring":
        return _refused("another change of role is under way", "ask again in a moment")
    again = role.name == "yielded" and gave_up(role) and is_silent(role, holder(role), now)
    if again and "kill" in role.undo:
        return _refused("what ran here before is still being ended", "ask again in a moment")
    if not again and (role.name not in PURSUING or record.mark == "yielded"):
        return _refused(f"this node is {role.name}: {role.reason}", "outlive status on the other nodes")
    if not record.leader:
        return _refused(f"nobody here knows who led term {record.term}", "outlive status on the other nodes")
    if not again and (heir := successor(spec, record.leader)) != role.me:
        return _refused(f"{heir} is the successor of {record.leader}, not {role.me}", f"run it on {heir}")
    if not keeper_speaks(role, to, now):
        return _refused(f"{to} is not heard: it could not take it", f"start {to}'s keeper")
    if not event.accept_data_loss:
        return _refused(f"what was not committed on {to} would be lost", "say so: --accept-data-loss")
    rival = contender(role, now)
    vouched = (event.old_primary_is_off, *event.others_are_off)
    if refusal := _third_unheard(role, vouched, rival, now):
        return refusal
    return None if replaceable(role, rival) else unvouched(role, event.old_primary_is_off, now)


def unvouched(role: Role, vouched: str, now: Instant) -> Refused | None:
    """Return why an operator's word is not enough to take the lead from its holder; None if it is."""
    rival = contender(role, now)
    if not rival:
        return None
    hint = how_to_replace(role, rival, now)
    if not is_silent(role, rival, now):
        if last_heard_s(role, rival) is None:
            return _refused(f"{rival} may still run it: this keeper has just begun to listen", "ask again")
        silence_ms = silence_s(role, rival, now) * 1000
        return _refused(f"{rival} is not off: it was heard {silence_ms:.0f} ms ago", hint)
    if vouched != rival:
        return _refused(f"{rival} may still run it: no fence confirmed that it is off", hint)
    return None


def how_to_replace(role: Role, rival: str, now: Instant) -> str:
    """Return what an operator can do so that this node may lead instead of `rival`."""
    return replacement_hint(role.spec.name, rival, heard=not is_silent(role, rival, now))


def replacement_hint(name: str, rival: str, *, heard: bool) -> str:
    """Return the hint; nobody is asked to vouch for a node that is heard."""
    if not heard:
        return f"make sure that {rival} is off, then: --old-primary-is-off {rival}"
    return (
        f"to end it: outlive stop {name} on {rival}; "
        f"to move it here: a fence that turns {rival} off, or power {rival} off yourself first"
    )


def _stranger(nodes: tuple[str, ...], name: str, *vouched: str) -> Refused | None:
    """Return why an operator's word is about a node that has no part in this workload."""
    for node in vouched:
        if node and node not in nodes:
            among = ", ".join(dict.fromkeys(nodes))
            return _refused(f"{node} is not one of the nodes of {name}", f"one of: {among}")
    return None


def start_refusal(role: Role, event: OperatorStart, now: Instant) -> Refused | None:
    """Return why a fresh start here could make two primaries, or cannot be; None if it is safe."""
    record, spec, me = role.record, event.spec, role.me
    if me not in spec.nodes:
        return _refused(f"{me} is not one of its nodes ({', '.join(spec.nodes)})")
    if refusal := _stranger((*spec.nodes, *role.spec.nodes), spec.name, *event.peers_are_off):
        return refusal
    if role.request is not None or role.wanted is not None or role.name in ("acquiring", "deposed"):
        return _refused("another change of role is under way", "ask again in a moment")
    if keeps_frozen(role):
        hint = f"outlive failover {spec.name} --accept-data-loss"
        return _refused(f"it is kept here, frozen, until it runs on {record.heir}", hint)
    for node, view in role.peers.items():
        kept = view.claim in ("yielded", "acquiring") and view.alive
        if kept and keeper_speaks(role, node, now):
            return _refused(f"{node} keeps it, frozen, until it runs here", "outlive status on both nodes")
    if role.alive or "kill" in role.undo:
        return _refused("what ran here before is still being ended", "ask again in a moment")
    for node, view in role.peers.items():
        if view.claim == "starting" and view.term == 0 and keeper_speaks(role, node, now):
            return _refused(f"{node} does not know whether it leads it", f"outlive status on {node}")
        # Also in an older term: it may not hear this node, and go on by what an operator said of it.
        if view.claim in (*RUNS, "acquiring") and keeper_speaks(role, node, now):
            return _refused(f"{node} leads it or is about to, in term {view.term}")
    if record.term == 0:
        if me != spec.nodes[0]:
            return _refused(
                "it was never started, and the first start is for the first of its nodes",
                f"outlive start {spec.name} on {spec.nodes[0]}",
            )
        if not has_listened(role, now):
            return _refused("peers were not heard yet", "ask again")
        if spec.right_to_lead == "etcd":
            return None
        return _unaccounted(role, event, "", now)  # this node may have lost its state, and a peer may lead
    owner = holder(role)
    if owner and (refusal := _passed_over(role, event, owner, now)):
        return refusal
    if owner == me and right_stands(role):
        return None if record.leader == me else _third_unheard(role, event.peers_are_off, "", now)
    if owner != me and successor(spec, owner) != me and not let_go(role):
        return _refused(
            f"the right to start it is {owner or 'unknown'}'s", f"run it on {owner or 'the leader'}"
        )
    if owner != me and (refusal := _third_unheard(role, event.peers_are_off, owner, now)):
        return refusal
    etcd_decides = by_lease(role) and spec.right_to_lead == "etcd"
    return None if etcd_decides else _unaccounted(role, event, owner, now)


def line_moves(role: Role, spec: WorkloadSpec, leader: str) -> bool:
    """Tell whether by that declaration another node takes over from the leader, or by another right to lead.

    With leases before and after it does not matter who: etcd decides.
    """
    if by_lease(role) and spec.right_to_lead == "etcd":
        return False
    return spec.right_to_lead != role.spec.right_to_lead or (
        successor(role.spec, leader) != successor(spec, leader)
    )


def _passed_over(role: Role, event: OperatorStart, owner: str, now: Instant) -> Refused | None:
    """Return which node could still take over from `owner` by the old line, for what it has heard.

    Invariant: one node at most takes over from a leader. So if this start changes who that is, the successor
    until now has to have recorded that the workload was stopped, or not to know it, or to be off; and all
    have, if it changes how the right is had. The start begins a new term, and who hears of that takes nothing
    over before it has an epoch of it, with which the new declaration comes. Not guaranteed: that a node which
    an operator said to be off, and which comes back while nobody else is heard, does not follow the old line.
    """
    if not line_moves(role, event.spec, owner):
        return None
    same_right = role.spec.right_to_lead == event.spec.right_to_lead
    for node in (successor(role.spec, owner),) if same_right else role.spec.nodes:
        vouched = node in event.peers_are_off and is_silent(role, node, now)
        if node not in ("", role.me) and not vouched and not _knows_of_stop(role, node, now):
            return _refused(
                f"{node} could take over until now, and does not say that it knows that it was stopped",
                f"outlive stop {role.spec.name} on {owner} while {node} is heard; "
                f"or power {node} off, remove its state, and say --off {node}",
            )
    return None


def _knows_of_stop(role: Role, node: str, now: Instant) -> bool:
    """Tell whether the node says that by what it has on disk there is nothing to take over."""
    view = role.peers.get(node, _UNHEARD)
    follows_none = view.claim == "following" and not view.takeovers and not view.alive
    rests = follows_none or view.claim in ("stopped", "yielded")
    rests = view.claim is None or (rests and view.term == role.record.term)
    return rests and keeper_speaks(role, node, now)


def all_accounted(role: Role, event: OperatorStart, now: Instant) -> bool:
    """Tell whether a start would be safe if nobody remembered who led: every other node spoke, or is off."""
    owner = holder(role)
    if role.record.term > 0 and owner == role.me and right_stands(role):
        return True
    return _unaccounted(role, event, owner if role.record.term else "", now) is None


def _unaccounted(role: Role, event: OperatorStart, owner: str, now: Instant) -> Refused | None:
    """Return which node could lead it unheard; None if all spoke or are vouched for.

    The holder itself, if that is another node, cannot speak itself out of the lead: it must be off. If it is
    not known who leads the newest term, a word of an older one says nothing: whoever said it may lead by now.
    Whom this start takes off the list is asked like all others.
    """
    for node in dict.fromkeys((*event.spec.nodes, *role.spec.nodes)):
        if node == role.me:
            continue
        vouched = node in event.peers_are_off and is_silent(role, node, now)
        spoke = node != owner and has_listened(role, now) and keeper_speaks(role, node, now)
        view = role.peers.get(node, _UNHEARD)
        knows_nothing = view.claim is None and not view.alive
        current = bool(owner) or knows_nothing or view.term >= role.newest.term
        if not (vouched or (spoke and current)):
            if spoke and not owner:
                return _refused(f"{node} does not say yet who leads term {role.newest.term}", "ask again")
            if not owner:
                return _refused(
                    f"{node} was not heard and may lead it: this node knows of no term, or lost its state",
                    f"start {node}'s keeper (outlive status says whether keys match); "
                    f"if {node} is off: outlive start {event.spec.name} --off {node}",
                )
            why = "holds the right to it" if node == owner else "was not heard and may lead it by now"
            return _refused(
                f"{node} {why}",
                f"outlive start {event.spec.name} on {node}, or power it off and say --off {node}",
            )
    return None


def _refused(message: str, hint: str = "") -> Refused:
    return Refused(error="NoRightToLeadError", message=message, hint=hint)
