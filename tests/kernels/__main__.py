"""The soft-dirty tracker on a kernel that has it, under qemu: prints one JSON object.

    python -m tests.kernels [--epochs 24] [--every 2] [--seeds 2] [--seed 1] [--huge-pages never,always]

In: this checkout. Out: for each setting of transparent huge pages one boot of the guest
(`tests.kernels.guest`) and what was found in it (`tests.kernels.inside`). Exits with 1 if anything was wrong
or was not done.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time

import msgspec

from tests.kernels.guest import DIRECTORY, ROOT, GuestError, boot, prepare, say
from tests.kernels.inside import Plan, Report


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """All boots."""

    schema_version: int
    commit: str
    seconds: float
    passed: bool
    guests: tuple[Report, ...]
    failures: tuple[str, ...]
    """Of guests that ended without a report, or could not be made."""


def main() -> int:
    """Read the command line, boot, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24, help="of each seed")
    parser.add_argument("--every", type=int, default=2, help="one epoch of so many is compared")
    parser.add_argument("--check-every", type=int, default=12, help="restored and asked after so many")
    parser.add_argument("--seeds", type=int, default=2, help="every other one without direct I/O")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--huge-pages", default="never,always", help="one boot for each")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="for each boot")
    parser.add_argument("--no-bugs", action="store_true", help="plant no bugs")
    parser.add_argument("--no-tests", action="store_true", help="the oracle only")
    options = parser.parse_args()
    started_s, commit = time.monotonic(), _commit()
    say(f"seed {options.seed}")
    reports: list[Report] = []
    failures: list[str] = []
    settings = options.huge_pages.split(",")
    for huge_pages in settings:
        plan = Plan(
            seed=options.seed,
            seeds=options.seeds,
            epochs=options.epochs,
            every=options.every,
            check_every=options.check_every,
            bugs=huge_pages == settings[0] and not options.no_bugs,
            tests=not options.no_tests,
        )
        log = DIRECTORY / f"console-{huge_pages}.log"
        try:
            guest = prepare()
            say(f"huge pages {huge_pages}: booting; the console goes to {log}")
            text = boot(guest, plan.encode(), huge_pages=huge_pages, limit_s=options.limit_s, log=log)
            reports.append(msgspec.json.decode(text, type=Report))
        except GuestError as error:
            say(f"error: {error}")
            failures.append(f"huge pages {huge_pages}: {error}")
    passed = not failures and all(report.passed for report in reports)
    found = Kernels(
        schema_version=1,
        commit=commit,
        seconds=round(time.monotonic() - started_s, 1),
        passed=passed,
        guests=tuple(reports),
        failures=tuple(failures),
    )
    print(msgspec.json.format(msgspec.json.encode(found)).decode())
    return 0 if passed else 1


def _commit() -> str:
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
