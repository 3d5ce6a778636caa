"""`outlive demo` and `outlive lab`: a cluster of test hosts on this machine, shown, listed, removed."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import closing

import click
import msgspec

from common.errors import LabError
from outlive.cli.call import Call, Verb, Verbs, examples
from outlive.cli.output import Answer, Rows, plain, print_json, yes_no
from outlive.cli.running import configure_logs


class ShownLab(msgspec.Struct, frozen=True, kw_only=True):
    """One lab of this machine."""

    name: str
    owner_pid: int
    owner_lives: bool
    kept: bool
    hosts: tuple[str, ...]


class LabListAnswer(Answer, frozen=True, kw_only=True):
    """All labs: in use, kept, or left behind."""

    labs: tuple[ShownLab, ...]


class LabDownAnswer(Answer, frozen=True, kw_only=True):
    """The labs that were taken apart."""

    removed: tuple[str, ...]


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive demo",
        "outlive demo --output json | jq .outage_ms",
        "outlive demo --workload sqlite",
        "outlive demo --workload 'python3 -m http.server' --keep",
    ),
)
@click.option(
    "--workload",
    default="redis",
    show_default=True,
    metavar="CMD",
    help="`redis`, `sqlite`, or a command of yours.",
)
@click.option(
    "--size-mib",
    type=click.IntRange(1, 16384),
    default=256,
    show_default=True,
    help="How full redis or SQLite is.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 100_000),
    default=20,
    show_default=True,
    help="Committed epochs before the power goes.",
)
@click.option(
    "--interval-ms",
    type=click.IntRange(20, 3_600_000),
    default=1000,
    show_default=True,
    help="Time between epochs.",
)
@click.option("--keep", is_flag=True, help="Leave the lab up; remove it with `outlive lab down`.")
@click.pass_context
def demo(
    context: click.Context, workload: str, size_mib: int, epochs: int, interval_ms: int, keep: bool
) -> None:
    """See a server and its files outlive their host: two hosts, a client, a power cut, on this machine.

    Needs root. Nothing is left behind. Exits with 0 only if the workload survived.
    """
    from rich.console import Console

    from outlive.demo import SERVERS, DemoOptions, run_demo
    from outlive.demo_screen import DemoScreen

    configure_logs("warning")
    call = context.ensure_object(Call)
    options = DemoOptions(
        command=() if workload in SERVERS else _words(workload),
        server=workload if workload in SERVERS else "redis",
        fill_mib=size_mib,
        epochs=epochs,
        interval_ms=interval_ms,
        keep=keep,
    )
    with closing(DemoScreen(Console(stderr=True), None if call.json else Console())) as screen:
        report = asyncio.run(run_demo(options, screen))
    if call.json:
        print_json(plain(report))
    if not report.survived:
        context.exit(1)


def _words(command: str) -> tuple[str, ...]:
    """Split a command as a shell does."""
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise click.BadParameter(f"{command!r} cannot be read: {error}", param_hint="--workload") from error


@click.group(cls=Verbs, epilog=examples("outlive lab list", "outlive lab down"))
def lab() -> None:
    """List or remove labs of test hosts; `outlive demo --keep` leaves one up."""


@lab.command("list", epilog=examples("outlive lab list"))
@click.pass_obj
def list_labs(call: Call) -> None:
    """List the labs of this machine."""
    from outlive import lab_state

    labs = tuple(
        ShownLab(
            name=state.name,
            owner_pid=state.owner_pid,
            owner_lives=state.owner_lives,
            kept=state.kept,
            hosts=tuple(sorted(lab_state.host_names(state.name))),
        )
        for state in lab_state.list_labs()
    )
    rows = [
        (each.name, yes_no(each.owner_lives), yes_no(each.kept), " ".join(each.hosts) or "-") for each in labs
    ]
    view = Rows(("LAB", "IN USE", "KEPT", "HOSTS"), rows) if rows else "there is no lab on this machine"
    call.show(LabListAnswer(labs=labs), view)


@lab.command(epilog=examples("outlive lab down", "outlive lab down l3f2a"))
@click.argument("name", required=False)
@click.pass_obj
def down(call: Call, name: str | None) -> None:
    """Take a lab apart; without a name, every lab that nobody uses any more, kept ones included."""
    from outlive import lab_reaper, lab_state

    configure_logs("warning")
    if name and name not in {state.name for state in lab_state.list_labs()}:
        raise LabError(f"there is no lab {name}", hint="outlive lab list")
    idle = [state.name for state in lab_state.list_labs() if not state.owner_lives or state.kept]
    chosen = (name,) if name else tuple(idle)
    for each in chosen:
        asyncio.run(lab_reaper.tear_down(lab_state.check_lab_name(each)))
    call.show(LabDownAnswer(removed=chosen), f"removed: {', '.join(chosen) or 'nothing'}")
