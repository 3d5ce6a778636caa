"""What the store accepts, refuses, keeps and tells."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_disks import Content, UnsyncedDisk, commit, composed, header

from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey, read_pagemap
from common.errors import NoSpaceError, StoreError
from common.file_records import CONTENTS, RECORDS
from common.model import PAGE_BYTES, EpochId
from replica import store as store_module
from replica.folding import fold_due, plan_fold
from replica.store import ZERO, EpochStore, IncomingEpoch, StoreReader, stored_workloads

TASK = SpaceKey("task", 1)
FIRST, SECOND, THIRD = EpochId(1, 1), EpochId(1, 2), EpochId(2, 3)
BEFORE: Content = {TASK: {1: 1, 2: 2, 3: 3}}
AFTER: Content = {TASK: {1: 1, 2: 0, 3: 33}}


def opened(directory: Path, **options: int) -> EpochStore:
    return EpochStore.open(
        directory, "web", **({"min_free_bytes": 0, "max_levels": 8} | options), disk=UnsyncedDisk()
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EpochStore]:
    with opened(tmp_path) as store:
        yield store


@pytest.fixture
def arriving(store: EpochStore) -> IncomingEpoch:
    commit(store, FIRST, BEFORE)
    return store.begin(header(SECOND, FIRST))


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


# What is refused


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "parent", "../x", "a/b", "/etc/x", "pages-1.img", "pagemap-1.img", "pagemap-shmem-1.img",
     "manifest.json", "RESTORE", "REASON", ".hidden", "a\0b", "a\nb", "x" * 300],
)  # fmt: skip
def test_metadata_cannot_leave_its_directory_or_pass_for_something_else(
    arriving: IncomingEpoch, name: str
) -> None:
    with pytest.raises(StoreError):
        arriving.metadata(name, b"x")


@pytest.mark.parametrize(
    ("pages", "page_flags"),
    [
        (numbers(2, 1), flags(4, 4)),
        (numbers(1, 1), flags(4, 4)),
        (numbers(1), flags(4, 4)),
        (numbers(1), flags(0)),
        (numbers(1), flags(PE_LAZY)),
        (numbers(1), flags(PE_PARENT | PE_PRESENT)),
        (numbers(1), flags(PE_PARENT | ZERO)),
        (numbers(1), flags(PE_PRESENT | 8)),
        (numbers(1 << 52), flags(PE_PRESENT)),
        (np.array([1], dtype=np.int64), flags(PE_PRESENT)),
    ],
)
def test_spaces_that_cannot_be_are_refused(
    arriving: IncomingEpoch, pages: np.ndarray, page_flags: np.ndarray
) -> None:
    with pytest.raises(StoreError):
        arriving.space(TASK, pages, page_flags)


def test_an_unchanged_page_that_the_base_does_not_have_is_refused(arriving: IncomingEpoch) -> None:
    with pytest.raises(StoreError, match="unchanged"):
        arriving.space(TASK, numbers(1, 4), flags(PE_PARENT, PE_PARENT))


def test_an_unchanged_page_of_an_unknown_space_is_refused(arriving: IncomingEpoch) -> None:
    with pytest.raises(StoreError, match="unchanged"):
        arriving.space(SpaceKey("task", 2), numbers(1), flags(PE_PARENT))


def test_a_full_epoch_has_no_unchanged_pages(store: EpochStore) -> None:
    with pytest.raises(StoreError, match="unchanged"):
        store.begin(header(FIRST, None)).space(TASK, numbers(1), flags(PE_PARENT))


def test_an_unchanged_page_is_checked_after_a_restart_too(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, FIRST, BEFORE)
    with opened(tmp_path) as store, pytest.raises(StoreError, match="unchanged"):
        store.begin(header(SECOND, FIRST)).space(TASK, numbers(1, 4), flags(PE_PARENT, PE_PARENT))


def test_pages_of_another_space_or_too_many_are_refused(arriving: IncomingEpoch) -> None:
    arriving.space(TASK, numbers(1), flags(PE_PRESENT))
    with pytest.raises(StoreError, match="not announced last"):
        arriving.pages(SpaceKey("task", 2), bytes(4096))


def test_more_bytes_than_announced_are_refused(arriving: IncomingEpoch) -> None:
    arriving.space(TASK, numbers(1), flags(PE_PRESENT))
    with pytest.raises(StoreError, match="1 bytes more"):
        arriving.pages(TASK, bytes(4097))


@pytest.mark.parametrize(
    "next_step",
    [
        lambda epoch: epoch.commit(),
        lambda epoch: epoch.space(SpaceKey("task", 2), numbers(), flags()),
    ],
    ids=["commit", "next space"],
)
def test_missing_bytes_are_noticed(
    store: EpochStore, arriving: IncomingEpoch, next_step: Callable[[IncomingEpoch], object]
) -> None:
    arriving.space(TASK, numbers(1), flags(PE_PRESENT))
    arriving.pages(TASK, bytes(4095))
    with pytest.raises(StoreError, match="1 of 4096 bytes"):
        next_step(arriving)
    assert store.newest
    assert store.newest.id == FIRST


def test_after_an_error_an_epoch_can_only_be_aborted(arriving: IncomingEpoch) -> None:
    with pytest.raises(StoreError):
        arriving.metadata("..", b"")
    with pytest.raises(StoreError, match="failed before"):
        arriving.commit()
    arriving.abort()


def test_metadata_that_is_not_complete_is_noticed(arriving: IncomingEpoch) -> None:
    arriving.metadata("core-1.img", b"x", more=True)
    with pytest.raises(StoreError, match=r"core-1\.img is not complete"):
        arriving.commit()


@pytest.mark.parametrize(
    ("epoch", "base"),
    [(FIRST, None), (EpochId(0, 9), None), (THIRD, SECOND), (THIRD, EpochId(1, 0))],
)
def test_an_epoch_that_is_old_or_stands_on_nothing_is_refused(
    store: EpochStore, epoch: EpochId, base: EpochId | None
) -> None:
    commit(store, FIRST, BEFORE)
    with pytest.raises(StoreError):
        store.begin(header(epoch, base))


def test_of_two_arriving_epochs_the_older_cannot_follow_the_newer(store: EpochStore) -> None:
    older, newer = store.begin(header(FIRST, None)), store.begin(header(SECOND, None))
    newer.commit()
    with pytest.raises(StoreError, match="not newer"):
        older.commit()


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path, store: EpochStore) -> None:
    commit(store, FIRST, BEFORE)
    with pytest.raises(StoreError, match="somebody else"):
        opened(tmp_path)
    reader = StoreReader.inspect(tmp_path, "web")
    assert reader.records() == store.records()
    assert reader.verify() == []
    assert stored_workloads(tmp_path) == ["web"]


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "web" / "format").write_text("outlive epoch store 2\n")
    for look in (opened, lambda directory: StoreReader.inspect(directory, "web")):
        with pytest.raises(StoreError, match="another version"):
            look(tmp_path)


def test_there_is_nothing_to_inspect_where_no_store_is(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no epoch store"):
        StoreReader.inspect(tmp_path, "web")


# Room


class NearlyFull(UnsyncedDisk):
    free = 1000

    def free_bytes(self, path: Path) -> int:
        return self.free


def test_low_space_warns_first_and_then_refuses_epochs(tmp_path: Path) -> None:
    disk = NearlyFull()
    with EpochStore.open(tmp_path, "web", min_free_bytes=600, max_levels=8, disk=disk) as store:
        assert store.space_warning
        store.begin(header(FIRST, None), expected_bytes=400).commit()
        with pytest.raises(NoSpaceError):
            store.begin(header(SECOND, None), expected_bytes=401)
        disk.free = 1200
        assert not store.space_warning


def test_low_space_makes_it_remove_what_is_not_needed(tmp_path: Path) -> None:
    class FreedByRemoval(UnsyncedDisk):
        def free_bytes(self, path: Path) -> int:
            return 1000 - 300 * len(list((tmp_path / "web" / "epochs").iterdir()))

    with EpochStore.open(tmp_path, "web", min_free_bytes=300, max_levels=8, disk=FreedByRemoval()) as store:
        for number in (1, 2, 3):
            store.begin(header(EpochId(1, number), None)).commit()
        store.begin(header(EpochId(1, 4), None)).commit()
        assert [record.id.epoch for record in store.records()] == [2, 3, 4]


def test_a_chain_that_nobody_folds_is_not_prolonged_for_ever(tmp_path: Path) -> None:
    with opened(tmp_path, max_levels=2) as store:
        commit(store, FIRST, BEFORE)
        for number in (2, 3, 4):
            commit(store, EpochId(1, number), BEFORE, EpochId(1, number - 1), BEFORE)
        with pytest.raises(NoSpaceError, match="folding is behind"):
            store.begin(header(EpochId(1, 5), EpochId(1, 4)))
        store.fold()
        commit(store, EpochId(1, 5), BEFORE, EpochId(1, 4), BEFORE)


# What is kept


def test_files_and_directories_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(tmp_path / "store") as store:
            commit(store, FIRST, BEFORE)
            commit(store, SECOND, AFTER, FIRST, BEFORE)
    finally:
        os.umask(before)
    for directory, _, files in os.walk(tmp_path / "store"):
        assert os.stat(directory).st_mode & 0o7777 == 0o700
        for name in files:
            assert os.lstat(os.path.join(directory, name)).st_mode & 0o7777 == 0o600, name


def test_pagemaps_carry_the_flags_that_criu_needs(store: EpochStore) -> None:
    commit(store, FIRST, BEFORE, lazy=True)
    record = commit(store, SECOND, AFTER, FIRST, BEFORE, lazy=True)
    assert record
    entries = read_pagemap(record.path / TASK.pagemap_name).entries
    assert [(entry.vaddr // 4096, entry.nr_pages, entry.flags) for entry in entries] == [
        (1, 1, PE_PARENT | PE_LAZY),
        (2, 2, PE_PRESENT | PE_LAZY),
    ]
    assert (record.pages, record.pages_present, record.levels) == (3, 2, 2)


def test_the_command_names_the_view_the_options_and_the_pipes(store: EpochStore) -> None:
    with store.begin(
        header(FIRST, None), restore_command=("criu", "restore", "--external", "mnt[/dev]:/dev")
    ) as epoch:
        epoch.metadata("descriptors.json", b'["/dev/null","pipe:[17]",', more=True)
        epoch.metadata("descriptors.json", b'"pipe:[18]"]')
        record = epoch.commit()
    assert store.show(FIRST).command == (
        f"criu restore --external 'mnt[/dev]:/dev' --images-dir {record.path} --work-dir . --restore-detached"
        " --inherit-fd 'fd[1]:pipe:[17]' --inherit-fd 'fd[2]:pipe:[18]'"
    )


def test_the_file_with_the_command_is_a_shell_script(store: EpochStore) -> None:
    record = commit(store, FIRST, BEFORE)
    assert record
    subprocess.run(["sh", "-n", str(record.path / "RESTORE")], check=True)


def test_an_aborted_epoch_leaves_nothing(tmp_path: Path, store: EpochStore) -> None:
    commit(store, FIRST, BEFORE)
    commit(store, SECOND, AFTER, FIRST, BEFORE, finish=False)
    with store.begin(header(SECOND, None)) as epoch:
        epoch.metadata("inventory.img", b"x", more=True)
    assert len(list((tmp_path / "web" / "incoming").iterdir())) == 1  # the first one, never aborted
    assert [record.id for record in store.records()] == [FIRST]


def test_what_an_arriving_epoch_stands_on_is_not_removed(store: EpochStore) -> None:
    commit(store, FIRST, BEFORE)
    arriving = store.begin(header(EpochId(9, 9), FIRST))
    for number in (2, 3, 4):
        commit(store, EpochId(1, number), AFTER)
    store.fold()
    arriving.space(TASK, numbers(1, 2), flags(PE_PARENT, PE_PARENT))
    assert composed(arriving.commit().path) == {TASK: {1: 1, 2: 2}}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_found_in_every_level_that_a_restore_reads(store: EpochStore) -> None:
    base = commit(store, FIRST, BEFORE)
    commit(store, SECOND, AFTER, FIRST, BEFORE)
    assert base
    assert store.verify() == []
    damage(base.path / "pages-1.img")
    assert [(problem.epoch, problem.path.name) for problem in store.verify()] == [(FIRST, "pages-1.img")]


@pytest.mark.parametrize("name", ["manifest.json", "pages-1.img"])
def test_an_epoch_that_lost_a_file_is_set_aside_with_what_stands_on_it(tmp_path: Path, name: str) -> None:
    with opened(tmp_path) as store:
        commit(store, FIRST, BEFORE)
        commit(store, SECOND, AFTER, FIRST, BEFORE)
        commit(store, THIRD, BEFORE, SECOND, AFTER)
    (tmp_path / "web" / "epochs" / str(SECOND) / name).unlink()
    with opened(tmp_path) as store:
        assert [record.id for record in store.records()] == [FIRST]
    reasons = {
        path.parent.name[:5]: path.read_text() for path in (tmp_path / "web" / "damaged").glob("*/REASON")
    }
    assert set(reasons) == {str(SECOND), str(THIRD)}
    assert name.split(".")[0] in reasons[str(SECOND)]
    assert "stands on" in reasons[str(THIRD)]


def test_a_discarded_epoch_goes_with_what_stands_on_it(store: EpochStore) -> None:
    commit(store, FIRST, BEFORE)
    commit(store, SECOND, AFTER, FIRST, BEFORE)
    commit(store, THIRD, BEFORE, SECOND, AFTER)
    store.discard(SECOND, "criu would not have it")
    assert [record.id for record in store.records()] == [FIRST]
    with pytest.raises(StoreError, match="not here"):
        store.begin(header(EpochId(3, 4), THIRD))


def test_a_discarded_epoch_does_not_come_back_from_what_a_fold_has_replaced(tmp_path: Path) -> None:
    class Failing(UnsyncedDisk):
        def remove_tree(self, path: Path, *, op: str) -> None:
            if op == "fold.remove":
                raise StoreError("the disk fails")
            super().remove_tree(path, op=op)

    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=8, disk=Failing()) as store:
        newest = long_chain(store, 6)
        with pytest.raises(StoreError, match="the disk fails"):
            store.fold()
        assert store.newest
        assert store.newest.levels < 6, "it was folded all the same"
        store.discard(newest, "found wanting")
        left = [record.id for record in store.records()]
        assert newest not in left
    with opened(tmp_path) as store:
        assert [record.id for record in store.records()] == left


def test_a_destroyed_store_is_gone(tmp_path: Path, store: EpochStore) -> None:
    commit(store, FIRST, BEFORE)
    store.destroy()
    assert list(tmp_path.iterdir()) == []


# Folding


def long_chain(store: EpochStore, count: int) -> EpochId:
    commit(store, EpochId(1, 1), BEFORE)
    for number in range(2, count + 1):
        commit(store, EpochId(1, number), BEFORE, EpochId(1, number - 1), BEFORE, resend=2)
    return EpochId(1, count)


def test_epochs_commit_while_a_fold_goes_on_and_stand_on_the_folded_one(
    store: EpochStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = long_chain(store, 6)
    real, started, go_on = store_module.fold_into, threading.Event(), threading.Event()

    def slow(*args: object, **options: object) -> None:
        started.set()
        assert go_on.wait(10)
        real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "fold_into", slow)
    fold = threading.Thread(target=store.fold)
    fold.start()
    assert started.wait(10)
    commit(store, EpochId(1, 7), AFTER, newest, BEFORE)
    go_on.set()
    fold.join()
    record = store.newest
    assert record
    assert record.id == EpochId(1, 7)
    assert record.levels <= 5
    assert composed(record.path) == AFTER
    assert store.verify() == []


def test_a_fold_does_not_end_while_the_store_is_held(
    store: EpochStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_chain(store, 6)
    before = store.records()
    real = store_module.fold_into
    with contextlib.ExitStack() as held:

        def held_meanwhile(*args: object, **options: object) -> None:
            real(*args, **options)  # type: ignore[arg-type]
            held.enter_context(store.hold())

        monkeypatch.setattr(store_module, "fold_into", held_meanwhile)
        assert store.fold() is None
        assert store.records() == before
    monkeypatch.undo()
    assert store.fold() is not None


def test_files_stay_readable_while_folds_take_their_levels_place(store: EpochStore) -> None:
    content: Content = {RECORDS: {0: 1}, CONTENTS: {7: 1, 8: 2}}
    commit(store, EpochId(1, 1), content)
    for number in range(2, 7):
        commit(store, EpochId(1, number), content, EpochId(1, number - 1), content, resend=2)
    wanted = np.array([7, 8], dtype=np.uint64)
    with store.files_of(EpochId(1, 6)) as files:
        before = {link.path for link in files._chain}
        assert store.fold() is not None, "reading holds up no fold"
        for number in (7, 8):
            commit(store, EpochId(1, number), content, EpochId(1, number - 1), content)
        assert store.fold() is None
        assert {record.id.epoch for record in store.records()} == {6, 7, 8}
        assert all(path.is_dir() for path in before)
        assert not store.fold_due(), "there is nothing to do for it meanwhile"
        assert [block[0] for block in files.read(CONTENTS, wanted)] == [1]
    assert store.fold_due()
    assert store.fold() is None
    assert not any(path.exists() for path in before), "a fold leaves nothing behind"
    assert b"".join(map(bytes, store.read_base(EpochId(1, 6), CONTENTS, wanted)))[::PAGE_BYTES] == b"\1\2"


def test_a_doubt_lasts_as_long_as_somebody_reads_what_is_in_doubt(store: EpochStore, tmp_path: Path) -> None:
    content: Content = {RECORDS: {0: 1}, CONTENTS: {7: 1}}
    commit(store, EpochId(1, 1), content)
    commit(store, EpochId(1, 2), content, EpochId(1, 1), content)
    store.doubt("of it")
    with store.files_of(EpochId(1, 2)) as files:
        commit(store, EpochId(1, 3), content)
        store.fold()
        assert {record.id.epoch for record in store.records()} == {3}
        assert [block[0] for block in files.read(CONTENTS, np.array([7], dtype=np.uint64))] == [1]
        store.close()  # as a crash would leave it: what is read is on the disk
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=8, disk=UnsyncedDisk()) as again:
        there = [record.id for record in again.records() if record.id.epoch < 3]
        assert there
        assert all(map(again.doubt_about, there))
        assert not again.doubt_about(EpochId(1, 3))
        again.fold()
        assert {record.id.epoch for record in again.records()} == {3}
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=8, disk=UnsyncedDisk()) as again:
        assert not again._layout.doubt.exists()


def test_a_fold_refuses_to_carry_damage_on(store: EpochStore) -> None:
    newest = long_chain(store, 6)
    damage(store.show(EpochId(1, 4)).record.path / "pages-1.img")
    with pytest.raises(StoreError, match="damaged"):
        store.fold()
    assert store.newest
    assert store.newest.id == newest


@pytest.mark.parametrize(
    ("sizes", "max_levels", "kept"),
    [
        ([1000, 10, 10, 10, 10, 10], 8, 1),
        ([1000, 100, 10, 10, 10, 10], 8, 2),
        ([1000, 100, 30, 5, 5], 8, 3),
        ([1000, 100, 100, 100, 100, 99], 8, 1),
        ([1000, 100, 100, 100, 100, 100], 8, 0),
        ([1000, 1, 1], 2, 0),
        ([1000, 1, 1], 4, 1),
        ([0, 0, 0], 8, 0),
    ],
)
def test_a_level_is_folded_unless_it_is_much_larger_than_all_above_it(
    sizes: list[int], max_levels: int, kept: int
) -> None:
    assert plan_fold(sizes, max_levels) == kept


def test_after_a_fold_none_is_due() -> None:
    for max_levels in range(2, 40):
        for levels in range(1, 2 * max_levels + 1):
            sizes = [2 ** (60 - level) for level in range(levels)]
            if fold_due(levels, max_levels):
                after = plan_fold(sizes, max_levels) + 1
                assert after <= levels
                assert after <= max_levels // 2
                assert not fold_due(after, max_levels)


def test_a_fold_keeps_to_its_pace_unless_it_is_behind(tmp_path: Path) -> None:
    def folded_s(directory: Path, levels: int, **options: float) -> float:
        with EpochStore.open(
            directory, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk(), **options
        ) as store:
            content: Content = {TASK: {n: 1 for n in range(64)}}
            for number in range(1, levels + 1):
                fresh: Content = {TASK: {**content[TASK], **{n: number + 1 for n in range(32)}}}
                base = EpochId(1, number - 1) if number > 1 else None
                commit(store, EpochId(1, number), fresh, base, content if base else None)
                content = fresh
            started_s = time.monotonic()
            assert store.fold()
            return time.monotonic() - started_s

    # About 1.3 MB are read: the levels' bytes, and again to check them.
    assert folded_s(tmp_path / "paced", 4, fold_bytes_per_s=2_000_000) > 0.2
    assert folded_s(tmp_path / "behind", 6, fold_bytes_per_s=1_000) < 10
