"""The store on a simulated disk: stops, errors and both, at every operation of random histories.

Each history is run once for each of its operations and each way to fail there. After that the store must
open, hold what it acknowledged (or what was in flight), whole, and go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.durable import Disk
from tests.campaigns.torture.cases import Case, Part, Scale, chance_of, rows
from tests.unit.store_disks import STOP, FaultyDisk, PowerLossError, UnsyncedDisk, composed
from tests.unit.store_histories import (
    FAILURES,
    WORKLOAD,
    Run,
    Step,
    UnopenedError,
    WrongCommitError,
    check_records,
    check_recovered,
    check_unopened,
    opened,
    operations,
    random_steps,
)

ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE)


def crashes(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    return rows(cases(seed, scale), parallel=True)


def cases(seed: int, scale: Scale) -> Iterator[Case]:
    """Make the cases of all histories."""
    for number in range(scale.of(1, 1, 2)):
        yield from _cases_of(f"{seed}-{number}", scale)


def stops(seed: int, scale: Scale) -> Iterator[Case]:
    """Make only stops that lose by chance, at each operation: what finds an operation in the wrong place."""
    for number in range(3):
        history = f"{seed}-{number}"
        steps = random_steps(chance_of(history), epochs=scale.of(6, 7, 8))
        for n, op in enumerate(operations(steps)):
            at = f"history {history}, operation {n} ({op})"
            yield Case("stop, lost and torn by chance", at, _stop(steps, n, chance=f"{history}-{n}"))


def _cases_of(history: str, scale: Scale) -> Iterator[Case]:
    steps = random_steps(chance_of(history), epochs=scale.of(5, 7, 8))
    ops = operations(steps)
    every = range(0, len(ops), scale.of(23, 1, 1))
    for n in every:
        at = f"history {history}, operation {n} ({ops[n]})"
        yield Case("stop, all unsynced lost", at, _stop(steps, n))
        yield Case("stop, nothing lost", at, _stop(steps, n, lose=False))
        for times in range(scale.of(2, 3, 4)):
            chance = f"{history}-{n}-{times}"
            yield Case("stop, lost and torn by chance", f"{at}, {times}", _stop(steps, n, chance=chance))
        chance = f"{history}-{n}"
        for fault in ERRORS:
            name = errno.errorcode[fault]
            yield Case(name, at, _error(steps, n, fault))
            yield Case(f"{name} in recovery", at, _error_in_recovery(steps, n, fault, chance))
        for times in range(scale.of(1, 2, 2)):
            label, chance = f"{at}, {times}", f"{history}-{n}-{times}"
            yield Case("stop in recovery from a stop", label, _stop_in_recovery(steps, n, chance))
            yield Case("error, then stop", label, _error_then_stop(steps, n, len(ops), chance))
    for times in range(scale.of(30, 200, 500)):
        label = f"history {history}, damage {times}"
        yield Case("files damaged while off", label, _damage(steps, f"{history}-{times}"))


def _stop(steps: list[Step], n: int, *, lose: bool = True, chance: str = "") -> Any:
    def run(directory: Path) -> None:
        stopped = _stopped(steps, directory, {n: STOP}, lose, chance_of(chance) if chance else None)
        check_unopened(directory, stopped)
        check_recovered(directory, stopped)

    return run


def _stopped(
    steps: list[Step],
    directory: Path,
    faults: dict[int, int],
    lose: bool = True,
    chance: random.Random | None = None,
) -> Run:
    disk, run = FaultyDisk(faults), Run(steps)
    with contextlib.suppress(PowerLossError):
        run.go(directory, disk)
    if lose:
        disk.lose_power(chance)
    return run


def _error(steps: list[Step], n: int, fault: int) -> Any:
    def run(directory: Path) -> None:
        survivor = Run(steps)
        survivor.go(directory, FaultyDisk({n: fault}))
        check_unopened(directory, survivor)
        check_recovered(directory, survivor)

    return run


def _error_then_stop(steps: list[Step], n: int, operations: int, seed: str) -> Any:
    def run(directory: Path) -> None:
        chance = chance_of("error", seed)
        # Often soon after, where the error is being dealt with.
        stop = n + 1 + (chance.randrange(12) if chance.random() < 0.6 else chance.randrange(operations))
        stopped = _stopped(steps, directory, {n: chance.choice(ERRORS), stop: STOP}, chance=chance)
        check_recovered(directory, stopped)

    return run


def _recovery_operations(directory: Path) -> int:
    """Count what it takes to open a copy of the store."""
    copy = directory.with_name(f"{directory.name}-copy")
    shutil.copytree(directory, copy, symlinks=True)
    try:
        disk = FaultyDisk()
        _open(copy, disk)
        return len(disk.ops)
    finally:
        shutil.rmtree(copy)


def _open(directory: Path, disk: Disk) -> None:
    try:
        opened(directory, disk).close()
    except FAILURES as error:
        raise UnopenedError(error.message) from error


def _stop_in_recovery(steps: list[Step], n: int, seed: str) -> Any:
    def run(directory: Path) -> None:
        chance = chance_of("recovery", seed)
        stopped = _stopped(steps, directory, {n: STOP}, chance=chance)
        disk = FaultyDisk({chance.randrange(_recovery_operations(directory)): STOP})
        with contextlib.suppress(PowerLossError):
            _open(directory, disk)
        disk.lose_power(chance if chance.random() < 0.7 else None)
        check_unopened(directory, stopped)
        check_recovered(directory, stopped)

    return run


def _error_in_recovery(steps: list[Step], n: int, fault: int, seed: str) -> Any:
    def run(directory: Path) -> None:
        chance = chance_of("error in recovery", fault, seed)
        stopped = _stopped(steps, directory, {n: STOP}, chance=chance)
        disk = FaultyDisk({chance.randrange(_recovery_operations(directory)): fault})
        # It may fail to open, but it never opens with less than was acknowledged.
        with contextlib.suppress(*FAILURES), opened(directory, disk) as store:
            check_records(store, stopped, verify=False)
        check_recovered(directory, stopped)

    return run


def _damage(steps: list[Step], seed: str) -> Any:
    def run(directory: Path) -> None:
        chance = chance_of("damage", seed)
        whole = Run(steps)
        whole.go(directory, UnsyncedDisk())
        root = directory / WORKLOAD
        levels = [*(root / "epochs").iterdir(), *(root / "folds").iterdir()]
        file = chance.choice(
            sorted(path for level in levels for path in level.iterdir() if not path.is_symlink())
        )
        shown = _damaged(file, chance)
        with _opened_damaged(directory) as store:
            for record in store.records():
                if store.verify(record.id):
                    if shown:
                        raise WrongCommitError(f"{record.id} is held, but {file.name} is not whole")
                elif composed(record.path) != whole.contents[record.id]:
                    raise WrongCommitError(f"{record.id} is taken for good, without {file.name}")
            with contextlib.suppress(*FAILURES):  # a fold refuses what is damaged
                store.fold()
            for record in store.records():
                if not store.verify(record.id) and composed(record.path) != whole.contents[record.id]:
                    raise WrongCommitError(f"folding hid that {file.name} is damaged")
        aside = {path.name.rpartition("-")[0] for path in (root / "damaged").iterdir()}
        if shown and file.parent.name not in aside:
            raise WrongCommitError(f"{file.parent.name} was not kept for somebody to look at")

    return run


def _opened_damaged(directory: Path) -> Any:
    try:
        return opened(directory, UnsyncedDisk())
    except FAILURES as error:
        raise UnopenedError(error.message) from error


def _damaged(file: Path, chance: random.Random) -> bool:
    """Damage a file; returns whether names and sizes show it."""
    size_bytes = file.stat().st_size
    what = chance.randrange(3)
    if what == 0:
        file.unlink()
        return True
    # A manifest has no hash of its own: what is altered in it shows only if it makes no sense.
    if what == 1 or not size_bytes or file.name == "manifest.json":
        os.truncate(file, chance.randrange(size_bytes) if size_bytes else 1)
        return True
    with file.open("r+b") as opened_file:
        opened_file.seek(chance.randrange(size_bytes))
        byte = opened_file.read(1)[0]
        opened_file.seek(-1, os.SEEK_CUR)
        opened_file.write(bytes([byte ^ (1 << chance.randrange(8))]))
    return False
