"""`outlive events` and `outlive history`: what happened here, and how each term of a workload began."""

from __future__ import annotations

import click

from common.control import AskHistory, History, TermHistory
from common.errors import WorkloadError
from common.events import EventRecord, event_file, follow_events, read_events
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows, wall_time
from outlive.cli.status import ask_status


class EventsAnswer(Answer, frozen=True, kw_only=True):
    """The kept events, oldest first."""

    events: tuple[EventRecord, ...]


class EventAnswer(Answer, frozen=True, kw_only=True):
    """One event, as `--follow` prints it: one object a line."""

    event: EventRecord


class HistoryAnswer(Answer, frozen=True, kw_only=True):
    """The kept terms of a workload, or of all that this node knows, each oldest first."""

    workload: str | None
    terms: tuple[TermHistory, ...]


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive events",
        "outlive events --workload redis --last 0",
        "outlive events --follow --output json | jq .event.reason",
    ),
)
@click.option("--follow", is_flag=True, help="Then go on with what happens, until interrupted.")
@click.option("--workload", metavar="NAME", help="Only what is about this workload.")
@click.option("--last", default=50, show_default=True, help="How many to show at most; 0 for all.")
@click.pass_obj
def events(call: Call, follow: bool, workload: str | None, last: int) -> None:
    """Show what happened on this node.

    Works whether agent and keeper run or not. With --follow and --output json, only new events are
    printed, one object a line. docs/reference/events.md says what each event means.
    """
    path = event_file(call.config())
    if not (follow and call.json):
        kept = tuple(e for e in read_events(path) if workload in (None, e.workload))[-last:]
        if not kept:
            call.talk("no events yet" if workload is None else f"no events of {workload} yet")
        call.show(EventsAnswer(events=kept), *(_event_line(event) for event in kept))
    if not follow:
        return
    for event in follow_events(path):
        if workload in (None, event.workload):
            call.show(EventAnswer(event=event), _event_line(event), one_line=True)


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive history",
        "outlive history redis",
        "outlive history redis --output json | jq '.terms[-1]'",
    ),
)
@click.argument("workload", required=False)
@click.pass_obj
def history(call: Call, workload: str | None) -> None:
    """Show the terms of a workload: who led, why each began, and how long every step took.

    Without a name: those of all workloads that this node knows.
    """
    if workload is None:
        names = [each.name for each in ask_status(call, call.config()).workloads]
    else:
        names = [workload]
    terms = tuple(term for name in names for term in ask_history(call, name))
    if workload is None and not terms:
        call.talk("no terms yet")
    elif not terms:
        raise WorkloadError(f"no term of a workload {workload!r} is known here", hint="outlive status")
    call.show(HistoryAnswer(workload=workload, terms=terms), *_history_view(terms))


def ask_history(call: Call, workload: str) -> tuple[TermHistory, ...]:
    """Ask the keeper for the kept terms, oldest first. Raises UnreachableError or what it refuses with."""
    return call.ask(call.config().keeper_endpoint, AskHistory(workload=workload), History).terms


def _event_line(event: EventRecord) -> str:
    """Return one event on one line: the columns that have fixed words first."""
    about = event.workload or "-"
    particulars = " ".join(f"{key}={value}" for key, value in event.fields.items())
    said = "   ".join(part for part in (event.reason, particulars) if part)
    return f"{wall_time(event.wall_s)}  {event.source:<6}  {event.event:<24}  {about:<12}  {said}".rstrip()


def _history_view(terms: tuple[TermHistory, ...]) -> list[Rows | str]:
    view: list[Rows | str] = []
    for term in terms:
        restored = f", restored {term.restored}" if term.restored else ""
        began = wall_time(term.began_wall_s)
        view.append(f"{term.workload}, term {term.term}: {term.leader} led from {began}{restored}")
        view.append(f"  {term.cause}")
        for timeline in filter(None, (term.timeline, term.handover)):
            rows = [(f"{step.at_ms:.1f}", step.event, step.reason) for step in timeline]
            view.append(Rows(("AT MS", "EVENT", "REASON"), rows, right=frozenset({"AT MS"})))
        view.append("")
    return view[:-1]
