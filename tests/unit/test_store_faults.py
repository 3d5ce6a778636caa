"""The store when the machine or the disk fails: at each single file operation of commits, folds, recovery."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path

import pytest

from common.errors import NoSpaceError, StoreError
from tests.unit.store_disks import STOP, Content, FaultyDisk, PowerLossError, UnsyncedDisk
from tests.unit.store_histories import (
    OTHER,
    SEGMENT,
    TASK,
    Run,
    Send,
    Step,
    check_records,
    check_recovered,
    check_unopened,
    opened,
    operations,
)

CONTENTS: list[Content] = [
    {TASK: {n: n for n in range(1, 9)}, SEGMENT: {0: 1, 1: 2}},
    {TASK: {**{n: n for n in range(1, 9)}, 3: 33}, SEGMENT: {0: 1, 1: 2}},
    {TASK: {**{n: n for n in range(1, 9)}, 3: 33, 4: 0}, SEGMENT: {0: 1, 1: 2}, OTHER: {5: 5}},
    {TASK: {**{n: n for n in range(2, 9)}, 3: 34}, OTHER: {5: 5, 6: 0}},
    {TASK: {n: n + 100 for n in range(1, 9)}, OTHER: {5: 5, 6: 6}},
    {TASK: {n: n + 100 for n in range(1, 12)}, OTHER: {6: 6}},
]


# A fold after each, where it is due.
HISTORY: list[Step] = [step for content in CONTENTS for step in (Send(content), "fold")]
OPERATIONS = operations(HISTORY)


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
        directory = tmp_path / f"{place}-{op}"
        disk = FaultyDisk({place: STOP})
        run = Run(HISTORY)
        with pytest.raises(PowerLossError):
            run.go(directory, disk)
        if loss != "nothing":
            disk.lose_power(random.Random(place) if loss == "by chance" else None)
        check_unopened(directory, run)
        check_recovered(directory, run)


def test_after_a_stop_at_any_operation_of_recovery_the_next_recovery_succeeds(tmp_path: Path) -> None:
    for place in range(10_000):
        directory = tmp_path / str(place)
        # In the middle of a fold: its level is named, its view still the old one.
        first = FaultyDisk({OPERATIONS.index("fold.view"): STOP})
        run = Run(HISTORY)
        with pytest.raises(PowerLossError):
            run.go(directory, first)
        (directory / "web" / "incoming" / "t9-e9-torn").mkdir()
        (directory / "web" / "views" / ".new-t9-e9").symlink_to("nowhere")
        second = FaultyDisk({place: STOP})
        try:
            opened(directory, second).close()
        except PowerLossError:
            second.lose_power()
        check_recovered(directory, run)
        if len(second.ops) <= place:
            return
    pytest.fail("recovery did not end")


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=os.strerror)
def test_a_failed_operation_costs_at_most_the_epoch_that_it_belongs_to(tmp_path: Path, fault: int) -> None:
    for place, op in PLACES:
        directory = tmp_path / f"{place}-{op}"
        run = Run(HISTORY)
        run.go(directory, FaultyDisk({place: fault}))
        assert run.newest is not None
        assert run.newest in sorted(run.contents)[-2:], (place, op)
        check_recovered(directory, run)


def test_what_a_fold_leaves_without_a_use_loses_its_view_only_when_that_of_the_fold_is_durable(
    tmp_path: Path,
) -> None:
    """Two epochs on the same one are both folded: a power loss may keep any removal, and nothing else."""
    one, two, three, four = CONTENTS[:4]
    steps: list[Step] = [Send(one), Send(two), Send(three), "fold", Send(four, base=2), "fold"]
    removed = operations(steps)
    stop = max(place for place, op in enumerate(removed) if op == "collect.sync-views")
    assert "collect.view" in removed[stop - 3 : stop]
    for seed in range(20):
        directory = tmp_path / str(seed)
        disk, run = FaultyDisk({stop: STOP}), Run(steps)
        with pytest.raises(PowerLossError):
            run.go(directory, disk)
        disk.lose_power(random.Random(seed))
        check_unopened(directory, run)
        check_recovered(directory, run)


def test_what_failed_when_a_store_was_made_is_made_good_by_the_next_attempt(tmp_path: Path) -> None:
    first_open = OPERATIONS.index("commit.make")
    for failed in range(first_open):
        for stop in {failed + first_open // 2, first_open + 8, len(OPERATIONS) - 1}:
            directory = tmp_path / f"{failed}-{stop}" / "there"
            directory.mkdir(parents=True)
            disk, run = FaultyDisk({failed: errno.EIO, stop: STOP}), Run(HISTORY)
            with contextlib.suppress(PowerLossError):
                run.go(directory, disk)
            disk.lose_power()
            check_recovered(directory, run)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=os.strerror)
def test_a_failed_operation_of_recovery_loses_nothing(tmp_path: Path, fault: int) -> None:
    directory = tmp_path / "store"
    run = Run(HISTORY)
    run.go(directory, UnsyncedDisk())
    for place in range(10_000):
        disk = FaultyDisk({place: fault})
        # It may fail to open, but it never opens with less than was acknowledged.
        with contextlib.suppress(StoreError, NoSpaceError), opened(directory, disk) as store:
            check_records(store, run, verify=False)
        with opened(directory, UnsyncedDisk()) as store:
            check_records(store, run)
            assert not list((directory / "web" / "damaged").iterdir()), disk.ops[place]
        if len(disk.ops) <= place:
            return
    pytest.fail("recovery did not end")


def test_what_the_disk_never_reads_again_is_set_aside_and_the_store_opens(tmp_path: Path) -> None:
    run = Run(HISTORY)
    run.go(tmp_path, UnsyncedDisk())
    newest = (tmp_path / "web" / "views" / str(run.newest)).resolve()

    class Scratched(UnsyncedDisk):
        def read_file(self, path: Path, *, op: str) -> bytes:
            if path.parent == newest:
                raise StoreError(f"{op}: {path}: bad sector") from OSError(errno.EIO, "bad sector")
            return super().read_file(path, op=op)

    with opened(tmp_path, Scratched()) as store:
        assert store.newest
        assert [store.newest.id] == run.held[:1]
    (aside,) = (tmp_path / "web" / "damaged").iterdir()
    assert "bad sector, 3 times" in (aside / "REASON").read_text()
