"""Runs inside the guest: `python -m tests.kernels.inside PLAN`, as root. Prints one JSON object.

In: a `Plan` as base64 of JSON, because it comes on a kernel's command line. Out: a `Report`: which tracker
is chosen here and why, whether the tests of the page reader pass, and what the memory oracle found, which
compares what the fast backend captured with a dump of stock CRIU at the same instant.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from common.criu.rpc import DumpOptions
from outlive.cli.running import configure_logs
from primary import dumping
from primary.tracking import choose
from tests.campaigns.oracle import Run, run_seed
from tests.campaigns.oracle_planted import BUGS, Found, hunt

_TESTS = (
    "tests/unit/test_soft_dirty_scan.py",
    "tests/unit/test_shim_channel.py",
    "tests/unit/test_tracking.py",
    "tests/system/test_soft_dirty.py",
)
_SLOWER = ("--memory-mib", "16", "--rate", "300")
"""An emulated processor is some 20 times slower."""


def patient(**fields: Any) -> DumpOptions:
    """Give criu, and our hooks, as much more time as they need here."""
    return DumpOptions(**(fields | {"deadline_s": 120.0, "answer_timeout_s": 60.0}))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do."""

    seed: int
    epochs: int
    every: int
    """One epoch of so many is compared."""
    check_every: int
    """After so many the program is asked whether it is intact, and so is what is restored beside it."""
    seeds: int = 1
    bugs: bool = True
    tests: bool = True

    def encode(self) -> str:
        """Return it as one word."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode()


class Tests(msgspec.Struct, frozen=True, kw_only=True):
    """What pytest said."""

    passed: int
    failed: int
    skipped: int
    said: str = ""
    """The end of its output, if something failed."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one guest."""

    kernel: str
    huge_pages: str
    tracker: str
    reason: str
    tests: Tests | None
    oracle: tuple[Run, ...]
    """Of every two runs, the second has no files open for direct I/O, and so is stopped ahead of freezes."""
    bugs: tuple[Found, ...]
    seconds: float
    broken: str = ""
    """What ended it before its end."""

    @property
    def passed(self) -> bool:
        """Whether all was done and nothing was wrong."""
        return (
            not self.broken
            and self.tracker == "soft-dirty"
            and (self.tests is None or (self.tests.passed > 0 and not self.tests.failed))
            and bool(self.oracle)
            and not any(run.wrong or not run.compared or not run.restored for run in self.oracle)
            and (len(self.oracle) < 2 or self.oracle[1].stops > 0)
            and all(bug.found for bug in self.bugs)
        )


def run_tests() -> Tests:
    """Run the tests that this kernel is here for."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], file=sys.stderr)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    failed = counts.get("failed", 0) + counts.get("error", 0)
    wrong = done.returncode != 0
    return Tests(
        passed=counts.get("passed", 0),
        failed=max(failed, int(wrong)),
        skipped=counts.get("skipped", 0),
        said=(done.stdout + done.stderr)[-6000:] if wrong else "",
    )


def main() -> int:
    """Do what the plan says."""
    plan = msgspec.json.decode(base64.urlsafe_b64decode(sys.argv[1]), type=Plan)
    configure_logs("warning")
    dumping.DumpOptions = patient  # type: ignore[assignment,misc]
    started_s = time.monotonic()
    choice = choose("auto")
    tests: Tests | None = None
    runs: list[Run] = []
    bugs: list[Found] = []
    broken = ""
    try:
        if plan.tests:
            tests = run_tests()
        for each in range(plan.seeds):
            options = (*_SLOWER, "--without", "direct_read") if each % 2 else _SLOWER
            run = run_seed(
                plan.seed + each,
                plan.epochs,
                plan.every,
                options=options,
                restores=True,
                tracker=choice.name,
                check_every=plan.check_every,
                talk=True,
                on_disk=True,
            )
            runs.append(asyncio.run(run))
        if plan.bugs:
            for name, bug in BUGS.items():
                if bug.tracker == choice.name:
                    bugs.append(asyncio.run(hunt(name, plan.seed, plan.epochs, options=_SLOWER)))
                    print(bugs[-1], file=sys.stderr)
    except Exception:  # what was found until then is told
        broken = traceback.format_exc()
    report = Report(
        kernel=os.uname().release,
        huge_pages=_huge_pages(),
        tracker=choice.name or "",
        reason=choice.reason,
        tests=tests,
        oracle=tuple(runs),
        bugs=tuple(bugs),
        seconds=round(time.monotonic() - started_s, 1),
        broken=broken,
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


def _huge_pages() -> str:
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return text.partition("[")[2].partition("]")[0]


if __name__ == "__main__":
    sys.exit(main())
