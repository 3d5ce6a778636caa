"""A real process' epochs in a store that is cut off: the newest comes to life by the command beside it.

The history is recorded once: a process that changes its memory is dumped, again and again, and asked for a
digest of what it holds. For each place to cut, a child writes the dumps into a store and ends there. The
store is opened again, and stock `criu restore` runs with the command of the newest epoch, nothing of ours in
between; the process that comes up is asked for its digest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from common.criu.locate import locate_criu
from common.durable import RealDisk
from common.errors import OutliveError
from common.model import EpochId
from replica.store import EpochStore
from tests.campaigns.torture.cases import Case, Part, Scale, chance_of, rows, skipped
from tests.campaigns.torture.disks import (
    FILE_SYSTEMS,
    CannotMountError,
    Killed,
    Place,
    cut_off,
    mounted,
)
from tests.campaigns.torture.own_mounts import with_own_mounts
from tests.system.store_target import Target, commit_dump, pages_of, restore, running_target
from tests.unit.store_disks import FaultyDisk
from tests.unit.store_histories import (
    FAILURES,
    WORKLOAD,
    Run,
    Send,
    Step,
    UnopenedError,
    WrongCommitError,
    opened,
)

_DUMPS = 7


class Recorded:
    """The dumps of one process, and how they go into a store."""

    def __init__(self, target: Target, directory: Path) -> None:
        self.target = target
        self.answers: list[list[str]] = []
        self._dumps: list[Path] = []
        for number in range(_DUMPS):
            self.answers.append(target.ask())
            self._dumps.append(directory / f"dump-{number}")
            target.dump(self._dumps[-1])
            target.step()
        target.kill()
        self._pages = [pages_of(dump) for dump in self._dumps]
        # One more full epoch in the middle, and a fold wherever one is due.
        self._steps: list[Step] = []
        for number in range(_DUMPS):
            self._steps += [Send(number, 0 if number == _DUMPS // 2 + 2 else 1), "fold"]

    def run(self) -> Run:
        return Run(self._steps, self._commit)

    def _commit(
        self, store: EpochStore, epoch: EpochId, number: int, base: EpochId | None, held: int | None
    ) -> None:
        before = None if held is None else self._pages[held]
        commit_dump(store, WORKLOAD, epoch, self._dumps[number], base, before)

    def places(self, how_many: int, seed: str, directory: Path) -> list[int]:
        """Choose operations behind the first commit: before it there is nothing to restore."""
        disk = FaultyDisk()
        self.run().go(directory, disk)
        first = disk.ops.index("commit.sync-epochs") + 1
        return sorted(chance_of("restores", seed).sample(range(first, len(disk.ops)), how_many))


@with_own_mounts
def restores(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    name = "restored by CRIU after SIGKILL"
    if os.geteuid() != 0:
        return [skipped(name, "criu needs root")]
    try:
        locate_criu(None)
    except OutliveError as error:
        return [skipped(name, error.message)]
    parts: list[Part] = []
    with ExitStack() as after:
        room = Path(after.enter_context(tempfile.TemporaryDirectory(prefix="outlive-torture-")))
        recorded = Recorded(after.enter_context(running_target(room)), room)
        parts += rows(_cases(recorded, scale, name, seed, room, Killed(room)))
        for kind in FILE_SYSTEMS:
            name = f"restored by CRIU after power loss on {kind}"
            try:
                with mounted(kind) as place:
                    parts += rows(_cases(recorded, scale, name, seed, room, place))
            except CannotMountError as error:
                parts.append(skipped(name, str(error)))
    return parts


def _cases(
    recorded: Recorded, scale: Scale, name: str, seed: int, room: Path, place: Place
) -> Iterator[Case]:
    try:
        places = recorded.places(scale.of(2, 10, 24), f"{seed}-{name}", room / "undisturbed")
    finally:
        shutil.rmtree(room / "undisturbed")
    for n in places:
        yield Case(name, f"operation {n}", _case(recorded, place, n))


def _case(recorded: Recorded, place: Place, n: int) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        try:
            _check(recorded, cut_off(place, recorded.run(), n), place, directory / "work")
        finally:
            recorded.target.kill()
            place.clear()

    return run


def _check(recorded: Recorded, run: Run, place: Place, work: Path) -> None:
    """Restore the newest epoch; the process must have the memory that was dumped."""
    try:
        store = opened(place.directory, RealDisk())
    except FAILURES as error:
        raise UnopenedError(error.message) from error
    with store:
        newest = store.newest
        if newest is None or (newest.id != run.newest and newest.id not in run.possible):
            raise WrongCommitError(f"the newest is {newest}, not {run.newest}")
        if problems := store.verify():
            raise WrongCommitError(f"verify says: {problems}")
        restore(newest, work)
        if recorded.target.ask() != recorded.answers[run.contents[newest.id]]:
            raise WrongCommitError(f"{newest.id} came up with other memory than was dumped")
