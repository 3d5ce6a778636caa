"""`outlive status`: how things stand, as the keeper knows it, in small fixed words.

In: the keeper's `NodeStatus`. Out: a line for the node, a table of its peers, a table of its workloads, and
below it, in sentences, why things are as they are. `docs/reference/status.md` says what each word means.
"""

from __future__ import annotations

import time

import click

from common.config import NodeConfig
from common.control import (
    AgentMetrics,
    AskStatus,
    LeaseStatus,
    NodeStatus,
    PeerStatus,
    PlannedSwitchover,
    ReplicaProgress,
    SendingProgress,
    VerificationProgress,
    WorkloadStatus,
)
from common.errors import ObjectiveMissedError, OutliveError, UnprotectedError, UnreachableError
from common.model import EpochId
from common.pauses import told
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows, duration, wall_time, yes_no

REFRESH_S = 1.0
_SENDING_TOLD_S = 3.0
_NOTHING = "-"
NEVER_HEARD = "never heard"
REFUSED = "refused"
ALL = "all"

COLUMNS = ("WORKLOAD", "ROLE", "STATE", "TERM", "EPOCH", "RESTORABLE", "DATA AT RISK", "RPO", "REPLICAS")


DOWN = frozenset({"waiting", "failed"})
"""States of the role machine in which a workload that is to run runs nowhere as far as this node knows."""


class StatusAnswer(Answer, frozen=True, kw_only=True):
    """The keeper's answer, and the workloads that are down, or of which too much would be lost."""

    node: str
    boot_id: str
    agent: str
    peers: tuple[PeerStatus, ...]
    workloads: tuple[WorkloadStatus, ...]
    unprotected: tuple[str, ...]
    rpo_missed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive status",
        "outlive status --watch",
        "outlive status --output json | jq '.workloads[].data_at_risk_s'",
    ),
)
@click.option("--watch", is_flag=True, help="Show it again every second, until interrupted.")
@click.pass_context
def status(context: click.Context, watch: bool) -> None:
    """Show this node, its peers and its workloads.

    DATA AT RISK is what would be lost if the primary failed now: the age of the newest epoch that could be
    restored elsewhere. Exits with 16 if a workload of this node is waiting or failed, or could not be
    restored (one led here: anywhere else; another's: here), with 17 if all could be but more of one is at
    risk than its rpo_ms allows, with 4 if this node's keeper does not answer.
    """
    call = context.ensure_object(Call)
    config = call.config()
    if watch:
        _watch(call, config)
    answer = status_answer(ask_status(call, config))
    call.show(answer, *status_view(answer))
    if answer.unprotected:
        context.exit(UnprotectedError.exit_code)
    if answer.rpo_missed:
        context.exit(ObjectiveMissedError.exit_code)


def ask_status(call: Call, config: NodeConfig) -> NodeStatus:
    """Ask the keeper. Raises UnreachableError, which tells whether at least the agent answers."""
    try:
        return call.ask(config.keeper_endpoint, AskStatus(), NodeStatus)
    except UnreachableError as error:
        try:
            call.ask(config.agent_endpoint, AskStatus(), AgentMetrics, deadline_s=1.0)
        except UnreachableError:
            raise UnreachableError(
                f"neither keeper nor agent of node {config.node.name} answers: {error.message}",
                hint="systemctl start outlive-keeper outlive-agent",
            ) from error
        raise UnreachableError(
            f"the agent of node {config.node.name} answers, its keeper does not: "
            f"nobody watches the peers, and no role can change here ({error.message})",
            hint="systemctl restart outlive-keeper, which harms no workload",
        ) from error


def status_answer(found: NodeStatus) -> StatusAnswer:
    """Return what is shown of the keeper's answer."""
    return StatusAnswer(
        node=found.node,
        boot_id=found.boot_id,
        agent=found.agent,
        peers=found.peers,
        workloads=found.workloads,
        unprotected=tuple(
            workload.name
            for workload in found.workloads
            if not workload.stopped
            and (
                workload.state in DOWN
                or (workload.lease is not None and workload.lease.frozen)
                or (workload.role != "none" and not (workload.restorable and found.agent == "alive"))
            )
        ),
        rpo_missed=tuple(workload.name for workload in found.workloads if workload.rpo == "missed"),
        warnings=found.warnings,
    )


def status_view(answer: StatusAnswer) -> list[Rows | str]:
    """Return the tables and sentences for people."""
    view: list[Rows | str] = [f"node {answer.node}   keeper alive   agent {answer.agent}"]
    if answer.peers:
        view += ["", Rows(("PEER", "KEEPER", "AGENT"), [_peer_row(peer) for peer in answer.peers])]
    view.append("")
    if answer.workloads:
        rows = [_workload_row(workload) for workload in answer.workloads]
        view.append(Rows(COLUMNS, rows, right=frozenset({"TERM", "DATA AT RISK"})))
    else:
        view.append("no workload is known here; declare one: outlive protect --help")
    sentences = [f"the keeper: {warning}" for warning in answer.warnings]
    if answer.workloads and answer.agent != "alive":
        sentences.append(f"the agent is {answer.agent}: workloads run on, but no epochs are captured")
    sentences += [f"peer {peer.node}: {peer.refused}" for peer in answer.peers if peer.refused]
    sentences += [line for workload in answer.workloads for line in _sentences(workload)]
    return [*view, "", *sentences] if sentences else view


def _peer_row(peer: PeerStatus) -> tuple[str, str, str]:
    keeper = REFUSED if peer.refused else _silence(peer.keeper_silence_ms)
    return peer.node, keeper, _silence(peer.agent_silence_ms)


def _silence(silence_ms: int | None) -> str:
    if silence_ms is None:
        return NEVER_HEARD
    return f"{silence_ms} ms ago" if silence_ms < 1000 else f"{duration(silence_ms / 1000)} ago"


def _workload_row(workload: WorkloadStatus) -> tuple[str, ...]:
    epoch = workload.captured if workload.role == "primary" else workload.stored
    ready = sum(replica.restorable for replica in workload.replicas)
    known = len(workload.replicas)
    return (
        workload.name,
        workload.role,
        workload.state,
        str(workload.term),
        _epoch(epoch),
        yes_no(workload.restorable) if _matters(workload) else _NOTHING,
        _at_risk(workload),
        _NOTHING if workload.rpo == "none" else workload.rpo,
        f"{ready} of {known}" if known else _NOTHING,
    )


def _epoch(epoch: EpochId | None) -> str:
    return _NOTHING if epoch is None else str(epoch)


def _matters(workload: WorkloadStatus) -> bool:
    """Whether it can be asked if it could be restored: what was stopped here is run by nobody else."""
    return workload.role == "replica" or (workload.role == "primary" and not workload.stopped)


def _at_risk(workload: WorkloadStatus) -> str:
    if workload.role == "none" or workload.stopped:
        return _NOTHING
    return ALL if workload.data_at_risk_s is None else duration(workload.data_at_risk_s)


def _sentences(workload: WorkloadStatus) -> list[str]:
    """Return why this workload is as it is, one sentence a line, each naming it."""
    name = workload.name
    lines = [f"{name}: {workload.reason}"] if workload.reason else []
    if _matters(workload) and not workload.restorable:
        lines += [f"{name}: not restorable: {reason}" for reason in workload.reasons or ("no epoch yet",)]
    else:  # what stands against single replicas is among the reasons otherwise
        lines += [f"{name}: {reason}" for reason in workload.reasons]
        lines += [line for replica in workload.replicas for line in _replica_sentences(name, replica)]
    lines += pause_sentences(workload)
    if workload.planned is not None:
        lines.append(planned_sentence(name, workload.planned))
    if workload.lease is not None:
        lines.append(f"{name}: {lease_told(workload.lease)}")
    if workload.rpo == "missed":
        lines.append(
            f"{name}: more is, or was a moment ago, at risk than rpo_ms allows ({workload.rpo_ms / 1000:g} s)"
        )
    lines += [f"{name}: verification of {_verification(each)}" for each in workload.verification]
    if workload.capture is not None:
        tracker = f", tracker {workload.capture.tracker}" if workload.capture.tracker else ""
        lines.append(
            f"{name}: captured by the {workload.capture.backend} backend{tracker}: {workload.capture.reason}"
        )
        if workload.capture.files_scanned:
            lines.append(f"{name}: all its files are looked through: {workload.capture.files_scanned} so far")
    if workload.exit_code is not None:
        lines.append(f"{name}: its last run here ended with exit code {workload.exit_code}")
    if workload.volatile:
        lines.append(f"{name}: volatile: the store here is in memory and does not survive power loss")
    lines += [f"{name}: an epoch that nobody acknowledged is kept in {path}" for path in workload.aside]
    return lines


def lease_told(lease: LeaseStatus) -> str:
    """Say in a sentence how the lease stands, as this node knows it."""
    holder = (
        f"{lease.holder} holds the lease of term {lease.term}" if lease.holder else "nobody holds the lease"
    )
    parts = [f"lease: {holder} in etcd"]
    if lease.good_for_s is not None:
        parts.append(f"good for {lease.good_for_s:.1f} s, renewed for {lease.ttl_s} s at a time")
    if lease.frozen:
        parts.append("the workload is frozen until etcd says that nobody else leads")
    if lease.problem:
        parts.append(lease.problem)
    elif lease.etcd_silence_s is None:
        parts.append("etcd has not answered yet")
    return "; ".join(parts)


def pause_sentences(workload: WorkloadStatus) -> list[str]:
    """Return what is to be known of pauses, one sentence a line."""
    name, missing = workload.name, ", ".join(workload.pauses_unconfirmed_by)
    if workload.pauses:
        lines = [f"{name}: takeover is {told(workload.pauses)}: outlive resume {name}"]
        return [*lines, f"{name}: paused here, but {unaware(workload)}"] if missing else lines
    return [f"{name}: resumed here; {missing} was not heard to know that"] if missing else []


def planned_sentence(name: str, planned: PlannedSwitchover) -> str:
    """Return what is to be known of a planned switchover."""
    when = wall_time(planned.at_wall_s)
    return (
        f"{name}: {planned.by} has planned its switchover to {planned.to} at {when}:"
        f" outlive switchover {name} --cancel"
    )


def unaware(workload: WorkloadStatus) -> str:
    """Return which nodes did not confirm a pause, and what they may do; empty if all did."""
    able = [node for node in workload.pauses_unconfirmed_by if node != workload.leader]
    led = [node for node in workload.pauses_unconfirmed_by if node == workload.leader]
    parts = [f"{', '.join(able)} did not confirm it and may still take it over"] if able else []
    return " and ".join([*parts, *(f"{node}, which leads it, did not confirm it" for node in led)])


def _verification(progress: VerificationProgress) -> str:
    """Return how far one comparison is, as the rest of a sentence."""
    what = f"replica {progress.replica}" if progress.replica else "memory"
    parts = []
    if progress.pages_due:
        parts.append(f"{100 * progress.pages_done // progress.pages_due} % of a round")
    if progress.ended_wall_s is not None:
        parts.append(f"the last whole one ended {wall_time(progress.ended_wall_s)}")
    if progress.pages_different:
        parts.append(f"{progress.pages_different} pages were different: outlive events")
    if progress.problem:
        parts.append(f"cannot go on: {progress.problem}")
    return f"{what}: {', '.join(parts) or 'not begun'}"


def _replica_sentences(name: str, replica: ReplicaProgress) -> list[str]:
    if not replica.connected:
        return [f"{name}: replica {replica.node} is not connected"]
    lines = []
    if replica.sending is not None and replica.sending.for_s >= _SENDING_TOLD_S:
        lines.append(f"{name}: {_sending(replica.node, replica.sending)}")
    if replica.restorable:
        return lines
    return lines + [f"{name}: replica {replica.node} could not restore it: {why}" for why in replica.reasons]


def _sending(node: str, progress: SendingProgress) -> str:
    done, due = progress.done_bytes / (1 << 20), progress.due_bytes / (1 << 20)
    share = 100 * progress.done_bytes // max(progress.due_bytes, 1)
    how_far = f"{done:.0f} of {due:.0f} MiB ({share} %) are there"
    return f"{progress.epoch} is on its way to {node} since {duration(progress.for_s)}: {how_far}"


def _watch(call: Call, config: NodeConfig) -> None:
    """Show it for ever. A keeper that does not answer is shown too: it may come back."""
    while True:
        try:
            answer = status_answer(ask_status(call, config))
        except OutliveError as error:
            click.clear()
            call.talk(f"outlive: {error.message}")
        else:
            if not call.json:
                click.clear()
            call.show(answer, *status_view(answer), one_line=True)
        time.sleep(REFRESH_S)
