"""Histories that a store goes through, and what must be true of it however they end.

A `Run` sends epochs, folds, discards, opens again, and keeps what was acknowledged. `check_unopened` and
`check_recovered` then say whether the store kept it too.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.criu.images import SpaceKey
from common.durable import Disk, cause_of
from common.errors import NoSpaceError, StoreError
from common.model import EpochId
from replica.store import EpochStore
from tests.unit.store_disks import Content, FaultyDisk, UnsyncedDisk, commit, composed

WORKLOAD = "web"
MAX_LEVELS = 5
TASK, OTHER, SEGMENT = SpaceKey("task", 1), SpaceKey("task", 7), SpaceKey("shmem", 3)
FAILURES = (StoreError, NoSpaceError)


class WrongCommitError(AssertionError):
    """The store holds something else than what it acknowledged, or took what it must refuse."""


class UnopenedError(AssertionError):
    """The store does not open, though nothing fails any more."""


@dataclass(frozen=True)
class Send:
    """An epoch comes: full, or as what changed since the newest (base 1) or the one before (base 2)."""

    content: Any
    base: Literal[0, 1, 2] = 1
    how: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of `commit`."""


@dataclass(frozen=True)
class Unfit:
    """An epoch comes that must be refused: pages miss, or stay unchanged that its base does not have."""

    content: Any


Step = Send | Unfit | Literal["fold", "discard", "reopen"]
Commit = Callable[..., object]


class Run:
    """Takes a store through a history. `commit` puts content into it, as `store_disks.commit` does."""

    def __init__(self, steps: Sequence[Step], commit: Commit = commit) -> None:
        self.contents: dict[EpochId, Any] = {}
        self.held: list[EpochId] = []
        """The newest two that were acknowledged, oldest first: both must be there whatever happens."""
        self.possible: set[EpochId] = set()
        """May be there or not: on its way in or out at the end, or failed since the last success."""
        self.gone: set[EpochId] = set()
        """Discarded, or on its way to that."""
        self._steps = steps
        self._commit = commit

    @property
    def newest(self) -> EpochId | None:
        return self.held[-1] if self.held else None

    def content_of(self, epoch: EpochId | None) -> Any:
        return self.contents[epoch] if epoch else None

    def go(self, directory: Path, disk: Disk) -> None:
        store = self._opened(directory, disk)
        try:
            for number, step in enumerate(self._steps, start=1):
                if step == "reopen":
                    store.close()
                    store = self._opened(directory, disk)
                    self._recovered(store)
                    continue
                failed_before = _failed(disk)
                try:
                    self._do(step, store, EpochId(1 + number // 5, number))
                except FAILURES as error:
                    if _failed(disk) == failed_before:
                        raise WrongCommitError(f"step {number} failed on a good disk: {error}") from error
                found = store.newest.id if store.newest else None
                if found != self.newest:
                    raise WrongCommitError(f"the newest is {found}, not {self.newest}")
        finally:
            store.close()

    def _opened(self, directory: Path, disk: Disk) -> EpochStore:
        try:
            return opened(directory, disk)
        except FAILURES as error:
            if not _failed(disk):
                raise UnopenedError(error.message) from error
            return opened(directory, disk)  # an agent is started again

    def _recovered(self, store: EpochStore) -> None:
        """Take note of what a new agent finds, which may be more than was acknowledged."""
        check_records(store, self, verify=False)
        self.held = [record.id for record in store.records()][-2:]
        self.possible = set()

    def _do(self, step: Step, store: EpochStore, epoch: EpochId) -> None:
        if isinstance(step, Send):
            base = self.held[-step.base] if 0 < step.base <= len(self.held) else None
            self.contents[epoch] = step.content
            self.possible.add(epoch)
            self._commit(store, epoch, step.content, base, self.content_of(base), **step.how)
            self.held = [*self.held, epoch][-2:]
            self.possible = set()
        elif isinstance(step, Unfit):
            self._refused(store, epoch, step.content)
        elif step == "fold":
            store.fold()
        elif len(self.held) == 2:
            doomed = self.held.pop()
            self.possible.add(doomed)
            self.gone.add(doomed)
            store.discard(doomed, "found wanting")
            self.possible.discard(doomed)

    def _refused(self, store: EpochStore, epoch: EpochId, content: Content) -> None:
        self.contents[epoch] = content  # what it would be if a disk's fault were taken for a success
        attempts: list[tuple[EpochId | None, Content, Content | None, int]] = [(None, content, None, 100)]
        if self.held:
            invented = {TASK: {900: 9}}
            attempts.append((self.held[-1], invented, invented, 0))
        if len(self.held) == 2:
            older, newest = (self.contents[held] for held in self.held)
            if _has_more(newest, older):
                attempts.append((self.held[0], newest, newest, 0))
        for base, what, claimed, missing_bytes in attempts:
            try:
                self._commit(store, epoch, what, base, claimed, missing_bytes=missing_bytes)
            except FAILURES as error:
                if cause_of(error) is not None:
                    raise
            else:
                raise WrongCommitError(f"{epoch} lacks pages and was committed")


def _has_more(one: Content, other: Content) -> bool:
    """Tell whether `one` has a page, other than of zeros, where `other` has none."""
    return any(
        page and number not in other.get(key, {})
        for key, pages in one.items()
        for number, page in pages.items()
    )


def _failed(disk: Disk) -> int:
    return disk.failed if isinstance(disk, FaultyDisk) else 0


def opened(directory: Path, disk: Disk) -> EpochStore:
    return EpochStore.open(directory, WORKLOAD, min_free_bytes=0, max_levels=MAX_LEVELS, disk=disk)


def random_steps(chance: random.Random, epochs: int) -> list[Step]:
    """Make a history of `epochs` epochs, with all that may happen between them."""
    content: Content = {
        TASK: {n: chance.randrange(256) for n in range(1, 9)} | {40: 7},
        SEGMENT: {0: 1, 1: 2},
    }
    steps: list[Step] = []
    for number in range(epochs):
        # Each has a page that the one before does not have, and the other way round.
        content[TASK][100 + number] = 1 + number
        content[TASK].pop(99 + number, None)
        how = {"chunk_bytes": chance.choice((3_000, 10_000)), "lazy": chance.random() < 0.2}
        if chance.random() < 0.2:
            how["resend"] = 3
        base = chance.choices((0, 1, 2), (1, 8, 2))[0] if steps else 0
        steps.append(Send(content, base, how))
        between: list[Step] = ["fold", "discard", "reopen", Unfit(content)]
        picked = chance.choices(range(5), (3, 6, 1, 1, 1))[0]
        if picked:
            steps.append(between[picked - 1])
        content = _changed(content, chance)
    # Each kind at least once, wherever.
    for step in ("fold", "discard", "reopen", Unfit(content)):
        steps.insert(chance.randrange(3, len(steps) + 1), step)
    steps[1:1] = [Send(_changed(content, chance)), Unfit(content)]
    return steps


def _changed(content: Content, chance: random.Random) -> Content:
    after = {key: dict(pages) for key, pages in content.items()}
    for _ in range(chance.randrange(1, 5)):
        after[TASK][chance.randrange(1, 16)] = chance.choice((0, chance.randrange(1, 256)))
    if chance.random() < 0.3:
        after[TASK].pop(chance.randrange(1, 16), None)
    if chance.random() < 0.3:
        if OTHER in after:
            del after[OTHER]
        else:
            after[OTHER] = {5: 5, 6: chance.randrange(256)}
    if chance.random() < 0.3:
        after[SEGMENT] = {**after[SEGMENT], chance.randrange(6): chance.randrange(256)}
    return after


def operations(steps: Sequence[Step]) -> list[str]:
    """Label every operation of an undisturbed run, in order."""
    disk = FaultyDisk()
    with tempfile.TemporaryDirectory() as directory:
        Run(steps).go(Path(directory) / "store", disk)
    return disk.ops


def check_unopened(directory: Path, run: Run, read: Callable[[Path], Any] = composed) -> None:
    """What was acknowledged can be restored by CRIU alone, before anything of ours was started."""
    for epoch in run.held:
        view = directory / WORKLOAD / "views" / str(epoch)
        try:
            found = read(view)
        except Exception as error:
            raise WrongCommitError(f"{epoch} cannot be read before recovery: {error!r}") from error
        if found != run.contents[epoch]:
            raise WrongCommitError(f"{epoch} has another content before recovery")


def check_records(
    store: EpochStore, run: Run, read: Callable[[Path], Any] = composed, *, verify: bool = True
) -> None:
    """All that is held is whole, and nothing that was acknowledged is missing.

    Without `verify` while the store's disk may still fail: it would say that.
    """
    newest = store.newest.id if store.newest else None
    if newest != run.newest and newest not in run.possible:
        raise WrongCommitError(f"the newest is {newest}, not {run.newest} or one of {run.possible}")
    held = [record.id for record in store.records()]
    for epoch in run.held:
        if epoch not in held:
            raise WrongCommitError(f"{epoch} is gone, which is one of the newest two")
    for record in store.records():
        if read(record.path) != run.contents[record.id]:
            raise WrongCommitError(f"{record.id} has another content")
        if verify and (problems := store.verify(record.id)):
            raise WrongCommitError(f"verify says: {problems}")


def check_recovered(directory: Path, run: Run, disk: Disk | None = None) -> None:
    """Open what is left: it is whole, nothing was damaged, and it goes on."""
    try:
        store = opened(directory, disk or UnsyncedDisk())
    except FAILURES as error:
        raise UnopenedError(error.message) from error
    with store:
        check_records(store, run)
        may_be_aside = {str(epoch) for epoch in run.gone}
        for aside in (directory / WORKLOAD / "damaged").iterdir():
            if aside.name.rpartition("-")[0] not in may_be_aside:
                raise WrongCommitError(f"{aside.name} was set aside: {(aside / 'REASON').read_text()}")
        check_goes_on(store, run)


def check_goes_on(store: EpochStore, run: Run) -> None:
    """A delta on what was recovered, and a fold, must work."""
    base = store.newest.id if store.newest else None
    content: Content = {TASK: {n: 200 for n in range(1, 6)}}
    try:
        record = commit(store, EpochId(99, 99), content, base, run.content_of(base))
        store.fold()
    except FAILURES as error:
        raise WrongCommitError(f"it does not go on: {error.message}") from error
    assert record
    if composed(record.path) != content:
        raise WrongCommitError("what came after recovery has another content")
