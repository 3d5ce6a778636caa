"""`outlive demo` and `outlive lab`: a cluster of test hosts on this machine, shown, listed, removed."""

from __future__ import annotations

import asyncio
import shlex
import sys
from typing import TYPE_CHECKING

import click
import msgspec

from outlive.cli.call import Call, Verb, Verbs, examples
from outlive.cli.output import Answer, Rows, plain, print_json, print_view, yes_no
from outlive.cli.running import configure_logs

if TYPE_CHECKING:  # loads the lab and the store: only when it runs
    from outlive.demo import DemoReport


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
        "outlive demo --workload 'python3 -m http.server' --keep",
    ),
)
@click.option("--workload", default="", metavar="CMD", help="Protect this command instead of redis.")
@click.option("--size-mib", default=256, show_default=True, help="How full redis is.")
@click.option("--epochs", default=20, show_default=True, help="Committed epochs before the power goes.")
@click.option("--interval-ms", default=1000, show_default=True, help="Time between epochs.")
@click.option("--keep", is_flag=True, help="Leave the lab up; remove it with `outlive lab down`.")
@click.pass_context
def demo(
    context: click.Context, workload: str, size_mib: int, epochs: int, interval_ms: int, keep: bool
) -> None:
    """See a redis outlive its host: two hosts, a client, and a power cut, all on this machine.

    Needs root. Nothing is left behind. Exits with 0 only if the workload survived.
    """
    from outlive.demo import DemoOptions, run_demo

    configure_logs("warning")
    call = context.ensure_object(Call)
    options = DemoOptions(
        command=tuple(shlex.split(workload)),
        fill_mib=size_mib,
        epochs=epochs,
        interval_ms=interval_ms,
        keep=keep,
    )
    report = asyncio.run(run_demo(options, StepScreen(call.json)))
    if not report.survived:
        context.exit(1)


class StepScreen:
    """Tells steps on stderr as they come, and the report on stdout."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._live = sys.stderr.isatty()
        self._line_is_open = False

    def step(self, text: str) -> None:
        """Begin a line of its own."""
        self._end_line()
        print(f"== {text}", file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """Replace the line of progress; without a terminal there is none."""
        if self._live:
            print(f"\r\x1b[K   {text}", end="", file=sys.stderr, flush=True)
            self._line_is_open = True

    def report(self, report: DemoReport) -> None:
        """Print the end of the story."""
        self._end_line()
        if self._json:
            print_json(plain(report))
        else:
            print_view(*_story(report))

    def _end_line(self) -> None:
        if self._line_is_open:
            print(file=sys.stderr)
        self._line_is_open = False


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
    idle = [state.name for state in lab_state.list_labs() if not state.owner_lives or state.kept]
    chosen = (name,) if name else tuple(idle)
    for each in chosen:
        asyncio.run(lab_reaper.tear_down(lab_state.check_lab_name(each)))
    call.show(LabDownAnswer(removed=chosen), f"removed: {', '.join(chosen) or 'nothing'}")


def _story(report: DemoReport) -> list[Rows | str]:
    """Return the timeline, the figures and the verdict."""
    steps = [(f"{step.at_ms:.0f}", step.event, step.reason) for step in report.timeline]
    freeze, interval = report.freeze_ms, report.epoch_interval_ms
    share = report.bytes.sent / max(report.bytes.full_equivalent, 1)
    figures = [
        ("memory protected", f"{report.rss_bytes / (1 << 20):.0f} MiB"),
        ("epochs committed", f"{report.epochs_committed}, one every {interval.p50:.0f} ms (p50)"),
        ("frozen for an epoch", f"{freeze.p50:.0f} ms p50, {freeze.p99:.0f} ms p99"),
        ("sent", f"{report.bytes.sent / (1 << 20):.0f} MiB, {share:.1%} of sending every epoch whole"),
    ]
    if report.restored is not None:
        figures.append(("restored", f"epoch t{report.restored.term}-e{report.restored.epoch}"))
    if report.outage_ms is not None:
        figures.append(("the client was without", f"{report.outage_ms:.0f} ms"))
    if (writes := report.writes) is not None:
        kept = f"{writes.present} of {writes.acknowledged}"
        figures.append(("confirmed writes still there", f"{kept}, {writes.lost} lost"))
        figures.append(("time whose writes are lost", f"{writes.lost_window_ms:.0f} ms"))
    verdict = "IT OUTLIVED ITS MACHINE" if report.survived else "IT DID NOT SURVIVE"
    return [
        "",
        Rows(("AT MS", "STEP", "REASON"), steps, frozenset({"AT MS"})),
        "",
        Rows(("WHAT", "HOW MUCH"), figures),
        "",
        f"{verdict}: {report.reason}",
    ]
