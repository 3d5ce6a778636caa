"""`outlive pause` and `outlive resume`: no node takes a workload over by itself during maintenance.

In: a name, or none for all. Out: for each workload whether takeover is paused, and where that isn't known.
This node's keeper has it on disk before it answers; the other nodes echo in their heartbeats what they have
on theirs, and that is waited for.
"""

from __future__ import annotations

import getpass
import os
import time

import click
import msgspec

from common.config import NodeConfig
from common.control import AskStatus, Done, NodeStatus, PauseTakeover, ResumeTakeover, WorkloadStatus
from common.errors import OutliveError, UnsettledError, WorkloadError
from common.pauses import Pause, told
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows
from outlive.cli.status import ask_status, unaware

POLL_S = 0.1
_NOTHING = "-"

_TIMEOUT = click.option(
    "--timeout",
    "timeout_s",
    default=5.0,
    show_default=True,
    help="Seconds to wait until the other nodes know.",
)


class PausedWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with one workload."""

    workload: str
    paused: bool
    pauses: tuple[Pause, ...]
    """Those in force, by what this node has on its disk."""
    not_known_to: tuple[str, ...]
    """Nodes of the workload that were not heard to have the same on theirs."""
    unaware: str
    """What may come of that, in a sentence; empty: nothing."""
    detail: str


class PauseAnswer(Answer, frozen=True, kw_only=True):
    """All workloads that were asked for."""

    workloads: tuple[PausedWorkload, ...]
    settled: bool
    """All are as asked for, on all of their nodes."""


@click.command(
    cls=Verb, epilog=examples("outlive pause redis", "outlive pause", "outlive pause redis --timeout 30")
)
@click.argument("workload", required=False)
@_TIMEOUT
@click.pass_context
def pause(context: click.Context, workload: str | None, timeout_s: float) -> None:
    """Pause automatic takeover, for maintenance.

    Until `outlive resume` no node takes the workload over by itself.
    Without a name: that of every workload this node knows. Epochs are captured and replicated as before,
    `outlive failover` works, and a workload that ends by itself is restarted where it ran unless on_exit is
    stop. The pause outlasts restarts of agents, keepers and hosts, and changes of the primary.

    It is on this node's disk when this verb ends. Exits with 19 if another node did not confirm it within
    --timeout: that node may take the workload over until it hears of it, which needs no second call.
    """
    _settle(context, workload, timeout_s, pausing=True)


@click.command(cls=Verb, epilog=examples("outlive resume redis", "outlive resume"))
@click.argument("workload", required=False)
@_TIMEOUT
@click.pass_context
def resume(context: click.Context, workload: str | None, timeout_s: float) -> None:
    """Allow automatic takeover again.

    Ends every pause of the workload that this node knows, whoever paused, on any node of it. Without a name:
    those of every workload this node knows.

    Exits with 19 if another node did not confirm it within --timeout: it is paused there until it hears of
    it; or if a pause turned up that was asked for elsewhere meanwhile: that one stays in force.
    """
    _settle(context, workload, timeout_s, pausing=False)


def _settle(context: click.Context, workload: str | None, timeout_s: float, *, pausing: bool) -> None:
    """Ask for every workload, wait for the other nodes, show how it came out; the worst exit code counts."""
    call = context.ensure_object(Call)
    config = call.config()
    names = [workload] if workload is not None else [each.name for each in ask_status(call, config).workloads]
    if not names:
        raise WorkloadError("no workload is known here", hint="outlive protect --help")
    details: dict[str, str] = {}
    failed: list[OutliveError] = []
    request = PauseTakeover if pausing else ResumeTakeover
    for name in names:
        try:
            details[name] = call.ask(config.keeper_endpoint, request(workload=name, by=user()), Done).detail
        except OutliveError as error:
            if workload is not None:
                raise
            call.talk(f"outlive: {name}: {error}")
            failed.append(error)
    found = _await(call, config, tuple(details), timeout_s, pausing=pausing)
    told_of = tuple(_paused(each, details[each.name]) for each in found)
    open_cases = [line for each in told_of for line in _unsettled(each, pausing=pausing)]
    call.show(PauseAnswer(workloads=told_of, settled=not open_cases and not failed), _rows(told_of))
    for line in open_cases:
        call.talk(f"outlive: {line}")
    if open_cases or failed:
        context.exit(UnsettledError.exit_code if open_cases else failed[0].exit_code)


def _await(
    call: Call, config: NodeConfig, names: tuple[str, ...], timeout_s: float, *, pausing: bool
) -> tuple[WorkloadStatus, ...]:
    """Poll the keeper until all nodes agree, or the time is over; return how it stands then."""
    end_s = time.monotonic() + timeout_s
    while True:
        status = call.ask(config.keeper_endpoint, AskStatus(), NodeStatus)
        found = tuple(each for each in status.workloads if each.name in names)
        if all(bool(each.pauses) == pausing and not each.pauses_unconfirmed_by for each in found):
            return found
        if time.monotonic() >= end_s:
            return found
        time.sleep(POLL_S)


def _paused(status: WorkloadStatus, detail: str) -> PausedWorkload:
    return PausedWorkload(
        workload=status.name,
        paused=bool(status.pauses),
        pauses=status.pauses,
        not_known_to=status.pauses_unconfirmed_by,
        unaware=unaware(status),
        detail=detail,
    )


def _unsettled(found: PausedWorkload, *, pausing: bool) -> list[str]:
    """Return what is not as it was asked for, in sentences."""
    name, missing = found.workload, ", ".join(found.not_known_to)
    if pausing and not found.paused:
        return [f"{name} is not paused: it was resumed elsewhere meanwhile; pause it again"]
    if not pausing and found.paused:
        return [f"{name} is still {told(found.pauses)}, which was not known here: outlive resume {name}"]
    if missing and pausing:
        return [f"{name} is paused here, but {found.unaware}"]
    if missing:
        return [f"{name} is resumed here, but {missing} did not confirm it: it may be paused there still"]
    return []


def _rows(found: tuple[PausedWorkload, ...]) -> Rows:
    rows = [
        (
            each.workload,
            "paused" if each.paused else "automatic",
            ", ".join(each.not_known_to) or _NOTHING,
            told(each.pauses) or each.detail,
        )
        for each in found
    ]
    return Rows(("WORKLOAD", "TAKEOVER", "NOT KNOWN TO", "REASON"), rows)


def user() -> str:
    """Return who asks: the user behind sudo, else the one of this process."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):  # no such user, as in a container
        return f"UID {os.getuid()}"
