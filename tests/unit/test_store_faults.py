"""The store when the machine or the disk fails: at each single file operation of commits, folds, recovery."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import tempfile
from pathlib import Path

import pytest
from store_disks import STOP, Content, FaultyDisk, PowerLossError, UnsyncedDisk, commit, composed

from common.criu.images import SpaceKey
from common.durable import Disk
from common.errors import NoSpaceError, StoreError
from common.model import EpochId
from replica.store import EpochStore

TASK, OTHER, SEGMENT = SpaceKey("task", 1), SpaceKey("task", 7), SpaceKey("shmem", 3)

HISTORY: list[Content] = [
    {TASK: {n: n for n in range(1, 9)}, SEGMENT: {0: 1, 1: 2}},
    {TASK: {**{n: n for n in range(1, 9)}, 3: 33}, SEGMENT: {0: 1, 1: 2}},
    {TASK: {**{n: n for n in range(1, 9)}, 3: 33, 4: 0}, SEGMENT: {0: 1, 1: 2}, OTHER: {5: 5}},
    {TASK: {**{n: n for n in range(2, 9)}, 3: 34}, OTHER: {5: 5, 6: 0}},
    {TASK: {n: n + 100 for n in range(1, 9)}, OTHER: {5: 5, 6: 6}},
    {TASK: {n: n + 100 for n in range(1, 12)}, OTHER: {6: 6}},
]


def opened(directory: Path, disk: Disk) -> EpochStore:
    return EpochStore.open(directory, "web", min_free_bytes=0, max_levels=5, disk=disk)


class Run:
    """A primary that sends HISTORY, with folds between, and knows what was acknowledged."""

    def __init__(self) -> None:
        self.acknowledged: EpochId | None = None
        self.sending: EpochId | None = None

    def go(self, directory: Path, disk: Disk) -> None:
        store = opened(directory, disk)
        try:
            self.send_all(store)
        finally:
            store.close()

    def send_all(self, store: EpochStore) -> None:
        for number, content in enumerate(HISTORY, start=1):
            base = self.acknowledged
            self.sending = EpochId(1, number)
            with contextlib.suppress(StoreError, NoSpaceError):
                commit(store, self.sending, content, base, content_of(base))
                self.acknowledged = self.sending
            with contextlib.suppress(StoreError, NoSpaceError):
                store.fold()
            newest = store.newest
            assert (newest.id if newest else None) == self.acknowledged


def content_of(epoch: EpochId | None) -> Content | None:
    return HISTORY[epoch.epoch - 1] if epoch else None


def check_whole(store: EpochStore) -> None:
    for record in store.records():
        assert composed(record.path) == content_of(record.id)
        assert store.verify(record.id) == []


def check_goes_on(store: EpochStore) -> None:
    """A delta on what was recovered, and a fold, must work."""
    newest = store.newest
    content: Content = {TASK: {n: 200 for n in range(1, 6)}}
    record = commit(
        store, EpochId(2, 99), content, newest.id if newest else None, content_of(newest and newest.id)
    )
    assert record
    store.fold()
    assert composed(record.path) == content


def operations() -> list[str]:
    """Label every operation of an undisturbed run, in order."""
    disk = FaultyDisk()
    with tempfile.TemporaryDirectory() as directory:
        Run().go(Path(directory) / "store", disk)
    return disk.ops


OPERATIONS = operations()


def places(operations: list[str]) -> list[int]:
    """Where each operation comes first, in its middle and last; `make torture` takes them all."""
    chosen = set()
    for op in set(operations):
        at = [place for place, other in enumerate(operations) if other == op]
        chosen |= {at[0], at[len(at) // 2], at[-1]}
    return sorted(chosen)


PLACES = [(place, OPERATIONS[place]) for place in places(OPERATIONS)]


def test_the_run_commits_folds_and_collects() -> None:
    assert {"commit.rename", "fold.view", "fold.link", "collect.rename", "open.format"} <= set(OPERATIONS)


@pytest.mark.parametrize("loss", ["all that was not synced", "nothing", "by chance"])
def test_after_a_stop_at_any_operation_the_newest_epoch_is_the_old_or_the_new_one_and_whole(
    tmp_path: Path, loss: str
) -> None:
    for place, op in PLACES:
        directory = tmp_path / str(place)
        disk = FaultyDisk(place, STOP)
        run = Run()
        with pytest.raises(PowerLossError):
            run.go(directory, disk)
        if loss != "nothing":
            disk.lose_power(random.Random(place) if loss == "by chance" else None)
        if run.acknowledged:
            # Without any recovery: CRIU alone could restore it.
            view = directory / "web" / "views" / str(run.acknowledged)
            assert composed(view) == content_of(run.acknowledged), (place, op)

        with opened(directory, UnsyncedDisk()) as store:
            newest = store.newest
            assert (newest.id if newest else None) in (run.acknowledged, run.sending), (place, op)
            assert not list((directory / "web" / "damaged").iterdir()), (place, op)
            check_whole(store)
            check_goes_on(store)


def test_after_a_stop_at_any_operation_of_recovery_the_next_recovery_succeeds(tmp_path: Path) -> None:
    for place in range(10_000):
        directory = tmp_path / str(place)
        # In the middle of a fold: its level is named, its view still the old one.
        first = FaultyDisk(OPERATIONS.index("fold.view"), STOP)
        run = Run()
        with pytest.raises(PowerLossError):
            run.go(directory, first)
        (directory / "web" / "incoming" / "t9-e9-torn").mkdir()
        (directory / "web" / "epochs" / "t9-e9").mkdir()
        second = FaultyDisk(place, STOP)
        try:
            opened(directory, second).close()
        except PowerLossError:
            second.lose_power()
        with opened(directory, UnsyncedDisk()) as store:
            newest = store.newest
            assert newest
            assert newest.id == run.acknowledged
            check_whole(store)
        if len(second.ops) <= place:
            return
    pytest.fail("recovery did not end")


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=os.strerror)
def test_a_failed_operation_costs_at_most_the_epoch_that_it_belongs_to(tmp_path: Path, fault: int) -> None:
    for place, op in PLACES:
        directory = tmp_path / str(place)
        run = Run()
        try:
            run.go(directory, FaultyDisk(place, fault))
        except (StoreError, NoSpaceError):
            assert op.startswith(("open.", "recover.", "sweep."))
            continue
        assert run.acknowledged is not None
        assert run.acknowledged >= EpochId(1, len(HISTORY) - 1), (place, op)
        with opened(directory, UnsyncedDisk()) as store:
            newest = store.newest
            assert newest
            # An epoch whose commit failed after its rename may be found again, whole.
            assert newest.id in (run.acknowledged, EpochId(1, len(HISTORY)))
            check_whole(store)
            check_goes_on(store)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=os.strerror)
def test_a_failed_operation_of_recovery_loses_nothing(tmp_path: Path, fault: int) -> None:
    directory = tmp_path / "store"
    run = Run()
    run.go(directory, UnsyncedDisk())
    for place in range(10_000):
        disk = FaultyDisk(place, fault)
        # It may fail to open, but it never opens with less than was acknowledged.
        with contextlib.suppress(StoreError, NoSpaceError), opened(directory, disk) as store:
            newest = store.newest
            assert newest
            assert newest.id == run.acknowledged, disk.ops[place]
        with opened(directory, UnsyncedDisk()) as store:
            newest = store.newest
            assert newest
            assert newest.id == run.acknowledged, disk.ops[place]
            assert not list((directory / "web" / "damaged").iterdir()), disk.ops[place]
            check_whole(store)
        if len(disk.ops) <= place:
            return
    pytest.fail("recovery did not end")


def test_what_the_disk_never_reads_again_is_set_aside_and_the_store_opens(tmp_path: Path) -> None:
    Run().go(tmp_path, UnsyncedDisk())
    newest = (tmp_path / "web" / "views" / f"t1-e{len(HISTORY)}").resolve()

    class Scratched(UnsyncedDisk):
        def read_file(self, path: Path, *, op: str) -> bytes:
            if path.parent == newest:
                raise StoreError(f"{op}: {path}: bad sector") from OSError(errno.EIO, "bad sector")
            return super().read_file(path, op=op)

    with opened(tmp_path, Scratched()) as store:
        assert [record.id for record in store.records()] == [EpochId(1, 4), EpochId(1, 5)]
    (aside,) = (tmp_path / "web" / "damaged").iterdir()
    assert "bad sector, 3 times" in (aside / "REASON").read_text()
