"""A real process, dumped again and again into a store: each epoch comes to life by the command beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.model import EpochId
from replica.store import EpochRecord, EpochStore
from tests.system.store_target import Pages, Target, commit_dump, pages_of, restore, running_target

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="criu needs root"),
]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with running_target(tmp_path) as target:
        yield target


def test_every_epoch_is_restored_by_stock_criu_before_and_after_folding(
    tmp_path: Path, target: Target
) -> None:
    with EpochStore.open(tmp_path / "store", "target", min_free_bytes=0, max_levels=6) as store:
        expected: dict[EpochId, list[str]] = {}
        held: Pages | None = None
        tries = 0

        def check(record: EpochRecord) -> None:
            nonlocal tries
            tries += 1
            assert store.verify(record.id) == []
            target.kill()
            restore(record, tmp_path / f"restore-{tries}")
            assert target.ask() == expected[record.id], record

        for number in range(1, 5):
            expected[EpochId(1, number)] = target.ask()
            dump = tmp_path / f"dump-{number}"
            target.dump(dump)
            base = EpochId(1, number - 1) if held else None
            commit_dump(store, "target", EpochId(1, number), dump, base, held)
            held = pages_of(dump)
            if number != 2:
                target.step()
        full, *deltas = store.records()
        assert [delta.levels for delta in deltas] == [2, 3, 4]
        assert all(0 < delta.pages_present < full.pages_present / 2 for delta in deltas)
        # Nothing changed in the shared segment: CRIU must take a level without a file of its pages.
        segment = next(space for space in store.show(EpochId(1, 3)).spaces if space.key.kind == "shmem")
        assert segment.present == 0
        for record in store.records():
            check(record)

        report = store.fold()
        assert report
        assert report.levels_after < report.levels_before
        for record in store.records():
            check(record)

        # On top of the folded one, from a process that was itself restored.
        target.step()
        expected[EpochId(1, 5)] = target.ask()
        target.dump(tmp_path / "dump-5")
        record = commit_dump(store, "target", EpochId(1, 5), tmp_path / "dump-5", EpochId(1, 4), held)
        assert record.levels == report.levels_after + 1
        check(record)
