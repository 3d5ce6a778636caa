"""Torture of stores and the wire: `python -m tests.campaigns.torture [--scale short] [--only PART] …`.

Prints a table (or, with `--output json`, one JSON object); progress goes to stderr. Exits with 1 if a store
held something else than it acknowledged or did not open, or if a planted bug was not found.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys
import time
from collections.abc import Callable

import msgspec
import structlog
from rich.console import Console
from rich.table import Table

from tests.campaigns.torture.cases import Part, Scale, say
from tests.campaigns.torture.crashes import crashes
from tests.campaigns.torture.disks import disks
from tests.campaigns.torture.planted import planted
from tests.campaigns.torture.replicas import replicas
from tests.campaigns.torture.restores import restores
from tests.campaigns.torture.wire import planted_wire, wire

PARTS: dict[str, Callable[[int, Scale], list[Part]]] = {
    "crashes": crashes,
    "disks": disks,
    "restores": restores,
    "planted": planted,
    "replicas": replicas,
    "wire": wire,
    "planted-wire": planted_wire,
}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole campaign."""

    schema_version: int
    seed: int
    scale: Scale
    seconds: float
    passed: bool
    parts: tuple[Part, ...]


def run(seed: int, scale: Scale, names: tuple[str, ...] = tuple(PARTS)) -> Report:
    """Run parts of the campaign by their names."""
    began_s = time.monotonic()
    parts: list[Part] = []
    for name in names:
        say(f"{name}: seed {seed}, scale {scale}")
        parts += PARTS[name](seed, scale)
    return Report(
        schema_version=1,
        seed=seed,
        scale=scale,
        seconds=round(time.monotonic() - began_s, 1),
        passed=all(part.passed for part in parts),
        parts=tuple(parts),
    )


def _show(report: Report) -> None:
    table = Table(title=f"seed {report.seed}, scale {report.scale}, {report.seconds:g} s")
    table.add_column("part")
    for name in ("cases", "wrong commits", "unopened"):
        table.add_column(name, justify="right")
    table.add_column("notes", overflow="fold")
    for part in report.parts:
        counts = (str(part.cases), str(part.wrong_commits), str(part.unopened))
        style = "" if part.passed else "bold red"
        table.add_row(part.name, *counts, "\n".join(part.notes), style=style)
    console = Console()
    console.print(table)
    console.print("passed" if report.passed else "FAILED")


def main() -> int:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--scale", type=Scale, choices=list(Scale), default=Scale.FULL)
    parser.add_argument("--only", choices=list(PARTS), action="append", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    # What the store warns of is what is being done to it.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is mounted is unmounted
    print(f"seed {options.seed}", file=sys.stderr)
    report = run(options.seed, options.scale, tuple(options.only or PARTS))
    if options.output == "json":
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        _show(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
