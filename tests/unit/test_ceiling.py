"""What all stores of a node may take together: what counts, when it is looked at, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from store_disks import UnsyncedDisk, header

from common.clock import ManualClock
from common.errors import NoSpaceError, StoreError
from common.model import EpochId
from replica.ceiling import Ceiling, used_bytes
from replica.store import EpochStore

MIB = 1 << 20


def write(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size_bytes))


def opened(directory: Path, workload: str, ceiling: Ceiling) -> EpochStore:
    return EpochStore.open(
        directory, workload, min_free_bytes=0, max_levels=8, ceiling=ceiling, disk=UnsyncedDisk()
    )


def begin(store: EpochStore, workload: str, number: int, expected_bytes: int) -> None:
    arriving = replace(header(EpochId(1, number), None), workload=workload)
    store.begin(arriving, expected_bytes=expected_bytes).abort()


def test_every_file_counts_once_by_what_it_takes_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "a/epochs/one", MIB)
    os.link(tmp_path / "a/epochs/one", tmp_path / "a/epochs/again")
    (tmp_path / "link").symlink_to("a/epochs/one")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(100 * MIB)
    assert MIB <= used_bytes(tmp_path) < 1.2 * MIB
    assert used_bytes(tmp_path / "nowhere") == 0


def test_without_a_ceiling_nothing_is_measured(tmp_path: Path) -> None:
    assert Ceiling(tmp_path / "nowhere", 0).admits(1 << 60)


def test_what_was_admitted_counts_until_the_next_look(tmp_path: Path) -> None:
    clock = ManualClock()
    ceiling = Ceiling(tmp_path, 10 * MIB, clock=clock)
    assert ceiling.admits(6 * MIB)
    assert not ceiling.admits(5 * MIB)
    clock.advance(1.0)
    assert ceiling.admits(5 * MIB)


def test_a_full_store_refuses_epochs_of_every_workload_and_says_what_to_do(tmp_path: Path) -> None:
    clock = ManualClock()
    ceiling = Ceiling(tmp_path, 10 * MIB, clock=clock)
    with opened(tmp_path, "web", ceiling) as web, opened(tmp_path, "db", ceiling) as db:
        begin(web, "web", 1, 4 * MIB)
        write(tmp_path / "web/damaged/x", 9 * MIB)
        clock.advance(60.0)
        for store, name in ((web, "web"), (db, "db")):
            with pytest.raises(NoSpaceError, match=f"take more than {10 * MIB} bytes") as raised:
                begin(store, name, 2, 4 * MIB)
            assert "store.max_bytes" in raised.value.hint
        (tmp_path / "web/damaged/x").unlink()
        begin(db, "db", 2, 4 * MIB)


def test_what_nobody_needs_is_removed_first(tmp_path: Path) -> None:
    clock = ManualClock()
    ceiling = Ceiling(tmp_path, 10 * MIB, clock=clock)
    with opened(tmp_path, "web", ceiling) as store:
        for number in (1, 2, 3):
            store.begin(header(EpochId(1, number), None)).commit()
        write(tmp_path / "web/epochs/t1-e1/left", 9 * MIB)
        clock.advance(60.0)
        begin(store, "web", 4, 4 * MIB)
        assert [record.id.epoch for record in store.records()] == [2, 3]


def test_a_disk_that_cannot_be_looked_at_admits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(StoreError, match="cannot be measured"):
        Ceiling(tmp_path, MIB).admits(1)
