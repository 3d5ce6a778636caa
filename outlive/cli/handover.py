"""`outlive switchover` and `outlive drain`: workloads move to another node on purpose, and nothing is lost.

In: names, and where to. Out: for each workload where it runs now and how that came. The keeper of the node
that leads does it; it is followed until the workload runs there, or runs on here.
"""

from __future__ import annotations

import datetime
import time

import click
import msgspec

from common.config import NodeConfig
from common.control import (
    CancelSwitchover,
    Done,
    PlannedSwitchover,
    PlanSwitchover,
    Switchover,
    TimelineEntry,
    WorkloadStatus,
)
from common.errors import ConfigError, HandoverError, OutliveError, UnsettledError, WorkloadError
from outlive.cli.call import Call, Verb, examples
from outlive.cli.follow import POLL_S, find_workload, timeline_since
from outlive.cli.output import Answer, Rows, wall_time
from outlive.cli.pause import user
from outlive.cli.status import ask_status

_TIMEOUT = click.option(
    "--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds to follow each workload."
)
_REASON_S = 5.0
"""How long to wait for the other node's reason: its agent is greeted anew, and takes an epoch, first."""
_DAY_S = 86_400


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A workload that runs elsewhere now."""

    workload: str
    node: str
    """Where it runs."""
    term: int
    took_s: float
    timeline: tuple[TimelineEntry, ...]
    """What happened here."""


class PlannedAnswer(Answer, frozen=True, kw_only=True):
    """What is planned for one workload now; null: nothing."""

    workload: str
    planned: PlannedSwitchover | None


class MovedAnswer(Answer, frozen=True, kw_only=True):
    """All that were moved; what could not be is told on stderr and by the exit code."""

    moved: tuple[Moved, ...]
    stayed: dict[str, str] = msgspec.field(default_factory=dict)
    """Why each other workload was not moved."""


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive switchover redis --to b",
        "outlive switchover redis --to b --at 03:30",
        "outlive switchover redis --cancel",
        "outlive switchover redis --to a         on b, to bring it back",
    ),
)
@click.argument("name")
@click.option("--to", metavar="NODE", help="Where it is to run.")
@click.option(
    "--at",
    metavar="TIME",
    help="Not now, but then: HH:MM[:SS] (today, or tomorrow if that is past) or YYYY-MM-DDTHH:MM[:SS].",
)
@click.option("--cancel", is_flag=True, help="Forget the one that is planned.")
@_TIMEOUT
@click.pass_obj
def switchover(call: Call, name: str, to: str | None, at: str | None, cancel: bool, timeout_s: float) -> None:
    """Move a workload from this node to another one, without loss.

    It stands still, its last epoch is committed there, its address leaves this host, it is restored there
    and served. Until it runs there it is kept here, frozen: if the other node cannot bring it up, it runs on
    here, from the very same instant. Connections are closed, as at a failover. Pauses of automatic takeover
    do not matter.

    Exits with 21 if it runs on here after all, with 19 if that is not settled within --timeout, with 10 if it
    cannot be begun.

    With --at, this node's keeper has it on disk when this verb ends, and begins it then, by this node's
    clock; it is refused now if it could not begin now. It is carried out up to a minute late, and given up
    if this node does not lead that term any more, or refuses it for that long: `outlive history` says so.
    `outlive status` shows what is planned. One at a time: another one takes its place.
    """
    config = call.config()
    if cancel == (to is not None) or (cancel and at is not None):
        raise click.UsageError("give either --to NODE, with or without --at, or --cancel alone")
    if to is None:
        call.ask(config.keeper_endpoint, CancelSwitchover(workload=name, by=user()), Done)
        call.show(PlannedAnswer(workload=name, planned=None), f"{name}: nothing is planned any more")
        return
    if at is not None:
        _plan(call, config, name, to, at)
        return
    moved = _move(call, config, name, to, timeout_s)
    call.show(MovedAnswer(moved=(moved,)), _rows((moved,)))


@click.command(cls=Verb, epilog=examples("outlive drain", "outlive drain --to b"))
@click.option("--to", metavar="NODE", help="Where all are to run. Default: for each, its successor.")
@_TIMEOUT
@click.pass_context
def drain(context: click.Context, to: str | None, timeout_s: float) -> None:
    """Move every workload that this node leads to other nodes, one after the other, without loss.

    Each as `outlive switchover` does. This node stays their replica, so it takes them over if the other one
    fails: `outlive pause` prevents that while you work on it. Goes on after one that cannot be moved, and
    exits with the code of the first of those.
    """
    call = context.ensure_object(Call)
    config = call.config()
    led = [each for each in ask_status(call, config).workloads if each.role == "primary" and each.running]
    moved: list[Moved] = []
    stayed: dict[str, str] = {}
    failed: list[OutliveError] = []
    for workload in led:
        try:
            moved.append(_move(call, config, workload.name, to or _successor(workload), timeout_s))
        except OutliveError as error:
            call.talk(f"outlive: {workload.name}: {error}")
            stayed[workload.name] = str(error)
            failed.append(error)
    nothing = () if led else ("nothing is led here", "")
    call.show(MovedAnswer(moved=tuple(moved), stayed=stayed), *nothing, _rows(tuple(moved)))
    if failed:
        context.exit(failed[0].exit_code)


def _successor(workload: WorkloadStatus) -> str:
    """Return the first of its other nodes: only that one can be handed the right to lead."""
    if not workload.replicas:
        raise HandoverError(f"no other node may run {workload.name}", hint="outlive status")
    return workload.replicas[0].node


def _move(call: Call, config: NodeConfig, name: str, to: str, timeout_s: float) -> Moved:
    """Hand it over and follow that. Raises HandoverError, UnsettledError, and what the keeper refuses."""
    asked_wall_s, began_s = time.time(), time.monotonic()
    before = find_workload(call, config, name)
    if before is None:
        raise WorkloadError(f"this node knows no workload {name!r}", hint="outlive status")
    call.ask(config.keeper_endpoint, Switchover(workload=name, to=to), Done)
    told: tuple[TimelineEntry, ...] = ()
    while True:
        now = find_workload(call, config, name) or before
        steps = timeline_since(call, config, name, before.term, asked_wall_s)
        for step in steps[len(told) :]:
            call.talk(f"{(step.wall_s - asked_wall_s) * 1000:10.1f} ms  {step.event:<20}  {step.reason}")
        told = max(told, steps, key=len)
        if now.term > before.term and now.leader != config.node.name and now.state == "following":
            took_s = round(time.monotonic() - began_s, 3)
            return Moved(workload=name, node=now.leader, term=now.term, took_s=took_s, timeline=told)
        if now.state == "leading":
            raise HandoverError(
                f"{name} runs on here: {now.reason}{_said_by(call, config, name, to)}",
                hint=f"outlive history {name}, here and on {to}",
            )
        if time.monotonic() - began_s > timeout_s:
            raise UnsettledError(
                f"{name} is {now.state} after {timeout_s:g} s: {now.reason}", hint="outlive status"
            )
        time.sleep(POLL_S)


def _said_by(call: Call, config: NodeConfig, name: str, to: str) -> str:
    """Return what the other node has against it, once its agent is connected; nothing if it does not say."""
    until_s = time.monotonic() + _REASON_S
    while time.monotonic() < until_s:
        now = find_workload(call, config, name)
        replicas = now.replicas if now is not None else ()
        replica = next((each for each in replicas if each.node == to), None)
        if replica is not None and replica.connected and replica.acknowledged is not None:
            return f"; {to} says: {'; '.join(replica.reasons)}" if replica.reasons else ""
        time.sleep(POLL_S)
    return ""


def _rows(moved: tuple[Moved, ...]) -> Rows:
    rows = [(each.workload, each.node, str(each.term), f"{each.took_s:.1f} s") for each in moved]
    return Rows(("WORKLOAD", "RUNS ON", "TERM", "TOOK"), rows, frozenset({"TERM", "TOOK"}))


def _plan(call: Call, config: NodeConfig, name: str, to: str, text: str) -> None:
    """Have the keeper plan it. Raises ConfigError for a time that is none, or past; what it refuses."""
    now = datetime.datetime.now().astimezone()
    at_wall_s = now.timestamp() + seconds_until(text, now)
    asked = PlanSwitchover(workload=name, to=to, at_wall_s=at_wall_s, by=user())
    answer = call.ask(config.keeper_endpoint, asked, Done)
    found = find_workload(call, config, name)
    planned = found.planned if found is not None else None
    call.show(
        PlannedAnswer(workload=name, planned=planned),
        f"{name}: planned to move to {to} at {wall_time(at_wall_s)}, by this node's clock",
        *([answer.detail] if answer.detail else []),
    )


def seconds_until(text: str, now: datetime.datetime) -> float:
    """Return how far ahead of `now` (with its zone) a time of day or a date with a time is.

    Raises ConfigError if it is neither, or a date with a time that is past.
    """
    hint = "e.g. --at 03:30, or --at 2027-01-31T03:30"
    try:
        if "T" in text or "-" in text:
            when = datetime.datetime.fromisoformat(text)
            at = when if when.tzinfo is not None else when.replace(tzinfo=now.tzinfo)
        else:
            at = datetime.datetime.combine(now.date(), datetime.time.fromisoformat(text), now.tzinfo)
    except ValueError as error:
        raise ConfigError(f"--at {text!r} is no time: {error}", hint=hint) from error
    ahead_s = (at - now).total_seconds()
    if ahead_s < 0 and "-" in text:
        raise ConfigError(f"--at {text} is past", hint=hint)
    return ahead_s % _DAY_S if "-" not in text else ahead_s
