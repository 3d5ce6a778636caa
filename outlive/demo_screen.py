"""What a person sees of the demonstration: steps with a live line while they go on, then the story's end.

In: steps, progress, the report. Out: the steps on one console, the report on another: stderr and stdout,
because the steps are talk.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from outlive import demo_sqlite
from outlive.demo_report import DemoReport

PLAIN_PROGRESS_S = 5.0
"""A plain line says how a step goes at most this often."""


class DemoScreen:
    """Steps with a tick and their time and, on a terminal, a spinner in between; plain lines elsewhere."""

    def __init__(self, talk: Console, out: Console | None) -> None:
        """`talk` gets the steps; `out` the story's end, None if the report is printed by somebody else."""
        self._talk = talk
        self._out = out
        self._status: Status | None = None
        self._step = ""
        self._last_progress = ""
        self._began_s = 0.0
        self._started_s = time.monotonic()
        self._said_s = 0.0

    def step(self, text: str) -> None:
        """See `outlive.demo.Screen`."""
        self._finish()
        self._step = text
        self._began_s = time.monotonic()
        if self._talk.is_terminal:
            self._status = self._talk.status(Text(text))
            self._status.start()
        else:
            self._line(text)

    def progress(self, text: str) -> None:
        """See `outlive.demo.Screen`."""
        self._last_progress = text
        if self._status is not None:
            self._status.update(Text(f"{self._step}: {text}"))
        elif time.monotonic() - self._said_s >= PLAIN_PROGRESS_S:
            self._line(f"  {text}")
            self._last_progress = ""

    def note(self, text: str) -> None:
        """See `outlive.demo.Screen`."""
        self._talk.print(Text(text), soft_wrap=True)

    def report(self, report: DemoReport) -> None:
        """See `outlive.demo.Screen`."""
        self._finish()
        if self._out is None:
            return
        self._out.print()
        for part in (_timeline(report), _figures(report), _verdict(report)):
            self._out.print(part)

    def close(self) -> None:
        """Stop the spinner, if the demonstration ended before its report."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _finish(self) -> None:
        """Tick off the step before."""
        if not self._step:
            return
        if self._talk.is_terminal:
            self.close()
            line = Text("✓ ", style="green").append(self._step, style="default")
            line.append(f"  {time.monotonic() - self._began_s:.1f} s", style="dim")
            self._talk.print(line)
            if self._last_progress:
                self._talk.print(Text(f"  {self._last_progress}", style="dim"))
        elif self._last_progress:
            self._line(f"  {self._last_progress}")
        self._step = self._last_progress = ""

    def _line(self, text: str) -> None:
        """Print a plain line with the seconds since the demonstration began."""
        self._said_s = time.monotonic()
        self._talk.print(Text(f"{self._said_s - self._started_s:6.1f} s  {text}"), soft_wrap=True)


def _timeline(report: DemoReport) -> Table:
    table = Table(title="How B took over", title_justify="left", box=None, pad_edge=False)
    table.add_column("ms", justify="right", style="cyan")
    table.add_column("what", style="bold")
    table.add_column("why")
    for entry in report.timeline:
        table.add_row(f"{entry.at_ms:.0f}", entry.event, entry.reason)
    return table


def _figures(report: DemoReport) -> Table:
    table = Table(title="\nIn figures", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    interval, freeze = report.epoch_interval_ms, report.freeze_ms
    saved = (
        100 * (1 - report.bytes.sent / report.bytes.full_equivalent) if report.bytes.full_equivalent else 0
    )
    table.add_row("memory", f"{report.rss_bytes / (1 << 20):.0f} MiB")
    table.add_row("epochs committed", str(report.epochs_committed))
    table.add_row(
        "one every", f"{interval.p50:.0f} ms (wanted {interval.configured:.0f}, longest {interval.max:.0f})"
    )
    table.add_row("frozen for", f"{freeze.p50:.0f} ms (p99 {freeze.p99:.0f}, longest {freeze.max:.0f})")
    table.add_row(
        "sent",
        f"{report.bytes.sent / 1e6:.0f} MB; whole checkpoints would have been "
        f"{report.bytes.full_equivalent / 1e6:.0f} MB ({saved:.0f} % saved)",
    )
    if report.writes is not None:
        writes = report.writes
        table.add_row(
            "writes",
            f"{writes.acknowledged} acknowledged before the loss, {writes.present} still there, "
            f"{writes.lost} lost (the last {writes.lost_window_ms:.0f} ms)",
        )
    if report.outage_ms is not None:
        table.add_row("clients waited", f"{report.outage_ms:.0f} ms")
    return table


def _verdict(report: DemoReport) -> Panel:
    if not report.survived:
        return Panel(Text(f"It did not survive: {report.reason}", style="bold red"), border_style="red")
    name = "SQLite" if demo_sqlite.__name__ in report.workload else report.workload[0]
    text = Text(f"{name} outlived its machine.", style="bold green")
    text.append(f"\nHost A is gone. {name} runs on host B behind the same address.", style="default")
    for verdict, observations in (("Checked", report.checked), ("Not checked", report.not_checked)):
        for observation in observations:
            text.append(f"\n{verdict}: ", style="dim").append(observation, style="default")
    if report.writes is not None and report.writes.lost:
        text.append(
            f"\nWhat clients were told in the last {report.writes.lost_window_ms:.0f} ms is lost: "
            "replication is asynchronous, the newest epoch had not arrived. A shorter interval loses less.",
            style="default",
        )
    return Panel(text, border_style="green")
