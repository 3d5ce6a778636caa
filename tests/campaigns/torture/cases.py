"""What the parts of the campaign are made of: cases that pass or not, counted into rows.

A case gets an empty directory and raises `WrongCommitError` or `UnopenedError`; any other exception counts
as a wrong commit too, since nothing was shown to be right. A part is `Callable[[int, Scale], list[Part]]`:
seed and scale in, rows out. The same seed makes the same cases.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.unit.store_histories import UnopenedError

T = TypeVar("T")

_NOTED_FAILURES = 3
_PROGRESS_S = 1.0


class Scale(StrEnum):
    """How long the campaign runs."""

    SHORT = "short"
    """Seconds: a sample of each part, for CI."""
    MIDDLE = "middle"
    FULL = "full"

    def of(self, short: T, middle: T, full: T) -> T:
        """Choose what belongs to this scale."""
        return {Scale.SHORT: short, Scale.MIDDLE: middle, Scale.FULL: full}[self]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the summary."""

    name: str
    cases: int
    wrong_commits: int = 0
    """Cases after which the store held something else than it had acknowledged."""
    unopened: int = 0
    """Cases after which the store did not open."""
    missed: int = 0
    """Planted bugs that no case found."""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong. A part that was skipped says so in its notes."""
        return not (self.wrong_commits or self.unopened or self.missed)


@dataclass(frozen=True)
class Case:
    """One thing to try."""

    part: str
    label: str
    run: Callable[[Path], None]


class Outcome(msgspec.Struct, frozen=True):
    """What became of a case."""

    part: str
    unopened: bool = False
    wrong: str = ""


def skipped(name: str, reason: str) -> Part:
    """Return the row of a part that cannot run here."""
    return Part(name=name, cases=0, notes=(f"skipped: {reason}",))


def run_case(case: Case) -> Outcome:
    """Run one case in a directory of its own."""
    with scratch() as directory:
        try:
            case.run(directory)
        except UnopenedError as error:
            return Outcome(case.part, unopened=True, wrong=f"{case.label}: {error}")
        except Exception as error:
            return Outcome(case.part, wrong=f"{case.label}: {type(error).__name__}: {error}")
    return Outcome(case.part)


def rows(cases: Iterable[Case], *, parallel: bool = False) -> list[Part]:
    """Run all cases, in turn or on all processors, and count them by part."""
    listed = list(cases)
    outcomes: dict[str, list[Outcome]] = {}
    said_s = time.monotonic()
    for done, outcome in enumerate(_outcomes(listed, parallel), start=1):
        outcomes.setdefault(outcome.part, []).append(outcome)
        if outcome.wrong:
            say(f"WRONG {outcome.part}: {outcome.wrong}")
        if time.monotonic() - said_s > _PROGRESS_S or done == len(listed):
            said_s = time.monotonic()
            say(f"{done}/{len(listed)} {outcome.part}")
    return [_row(part, of_part) for part, of_part in outcomes.items()]


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a directory that is gone afterwards; in memory where that can be had."""
    memory = Path("/dev/shm")
    directory = Path(
        tempfile.mkdtemp(prefix="outlive-torture-", dir=memory if os.access(memory, os.W_OK) else None)
    )
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def chance_of(*seeds: object) -> random.Random:
    """Make the dice of one case; equal seeds, equal dice."""
    return random.Random("-".join(map(str, seeds)))


_listed: list[Case] = []
"""What the worker processes inherit: cases cannot be sent to them."""


def _outcomes(cases: list[Case], parallel: bool) -> Iterator[Outcome]:
    if not parallel or len(cases) < 100:
        yield from map(run_case, cases)
        return
    _listed[:] = cases
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as workers:
        yield from workers.map(_run_listed, range(len(cases)), chunksize=20)


def _run_listed(place: int) -> Outcome:
    return run_case(_listed[place])


def _row(part: str, outcomes: list[Outcome]) -> Part:
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    unopened = sum(outcome.unopened for outcome in wrong)
    return Part(
        name=part,
        cases=len(outcomes),
        wrong_commits=len(wrong) - unopened,
        unopened=unopened,
        notes=tuple(outcome.wrong for outcome in wrong[:_NOTED_FAILURES]),
    )
