"""The files of an epoch are read along its chain, and what changed in them is what newer levels have."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_disks import Content, UnsyncedDisk, commit

from common.criu.images import SpaceKey
from common.errors import StoreError
from common.file_records import CONTENTS, RECORDS
from common.model import PAGE_BYTES, EpochId
from replica.levels import Level, chain_of, read_level
from replica.store import EpochStore
from replica.stored_files import StoredFiles

TASK = SpaceKey("task", 1)
FIRST, SECOND, THIRD = EpochId(1, 1), EpochId(1, 2), EpochId(2, 3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EpochStore]:
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=20, disk=UnsyncedDisk()) as store:
        yield store


def files_of(tmp_path: Path, epoch: EpochId) -> StoredFiles:
    return StoredFiles(chain(tmp_path, epoch), UnsyncedDisk())


def chain(tmp_path: Path, epoch: EpochId) -> tuple[Level, ...]:
    views = sorted((tmp_path / "web/views").iterdir())
    levels = [read_level(view.resolve(), UnsyncedDisk()) for view in views]
    found = chain_of({level.id: level for level in levels}, epoch)
    assert found is not None
    return found


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def fills(files: StoredFiles, key: SpaceKey, wanted: np.ndarray) -> list[int]:
    """Return of each page the byte that fills it."""
    content = b"".join(map(bytes, files.read(key, wanted)))
    assert len(content) == len(wanted) * PAGE_BYTES
    pages = [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]
    assert all(page == page[:1] * PAGE_BYTES for page in pages)
    return [page[0] for page in pages]


def changed(files: StoredFiles, epoch: EpochId) -> dict[SpaceKey, list[int]] | None:
    found = files.changed_since(epoch)
    return None if found is None else {key: each.tolist() for key, each in found.items()}


def three_epochs(store: EpochStore) -> None:
    first: Content = {TASK: {1: 1}, RECORDS: {0: 1, 1: 2}, CONTENTS: {10: 1, 11: 2, 12: 3, 1 << 50: 4}}
    second: Content = {TASK: {1: 1}, RECORDS: {0: 1, 1: 3}, CONTENTS: {10: 5, 11: 6, 12: 3, 1 << 50: 4}}
    third: Content = {TASK: {1: 9}, RECORDS: {0: 1, 1: 3, 2: 7}, CONTENTS: {10: 5, 12: 0, 13: 8, 1 << 50: 4}}
    commit(store, FIRST, first)
    commit(store, SECOND, second, FIRST, first)
    commit(store, THIRD, third, SECOND, second)


def test_pages_are_read_wherever_in_the_chain_they_are(store: EpochStore, tmp_path: Path) -> None:
    three_epochs(store)
    files = files_of(tmp_path, THIRD)
    assert files.epoch == THIRD
    assert files.has_files
    assert files.pages(RECORDS).tolist() == [0, 1, 2]
    assert files.pages(CONTENTS).tolist() == [10, 12, 13, 1 << 50]
    assert fills(files, RECORDS, files.pages(RECORDS)) == [1, 3, 7]
    assert fills(files, CONTENTS, files.pages(CONTENTS)) == [5, 0, 8, 4]
    assert fills(files, CONTENTS, numbers(1 << 50, 10, 10)) == [4, 5, 5]
    assert fills(files, CONTENTS, numbers()) == []
    assert fills(files_of(tmp_path, FIRST), CONTENTS, numbers(10, 11)) == [1, 2]


def test_blocks_have_whole_pages(store: EpochStore, tmp_path: Path) -> None:
    commit(store, FIRST, {CONTENTS: dict.fromkeys(range(600), 7)})
    blocks = [
        len(block) for block in files_of(tmp_path, FIRST).read(CONTENTS, np.arange(600, dtype=np.uint64))
    ]
    assert sum(blocks) == 600 * PAGE_BYTES
    assert not [size for size in blocks if size % PAGE_BYTES or size > 1 << 20]


def test_what_changed_is_what_newer_levels_have(store: EpochStore, tmp_path: Path) -> None:
    three_epochs(store)
    files = files_of(tmp_path, THIRD)
    assert changed(files, THIRD) == {RECORDS: [], CONTENTS: []}
    assert changed(files, SECOND) == {RECORDS: [2], CONTENTS: [12, 13]}
    assert changed(files, FIRST) == {RECORDS: [1, 2], CONTENTS: [10, 12, 13]}
    assert changed(files_of(tmp_path, SECOND), FIRST) == {RECORDS: [1], CONTENTS: [10, 11]}


def test_what_changed_cannot_be_told_of_an_epoch_that_is_not_in_the_chain(
    store: EpochStore, tmp_path: Path
) -> None:
    three_epochs(store)
    assert changed(files_of(tmp_path, THIRD), EpochId(1, 7)) is None
    assert changed(files_of(tmp_path, SECOND), THIRD) is None


def test_what_a_fold_swallowed_cannot_be_told_once_it_is_not_remembered(tmp_path: Path) -> None:
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        three_epochs(store)
        assert store.fold() is not None
    files = files_of(tmp_path, THIRD)
    assert fills(files, CONTENTS, files.pages(CONTENTS)) == [5, 0, 8, 4]
    assert changed(files, SECOND) is None
    assert changed(files, THIRD) == {RECORDS: [], CONTENTS: []}


def test_what_a_fold_swallowed_is_remembered(tmp_path: Path) -> None:
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        three_epochs(store)
        assert store.fold() is not None
        with store.files_of(THIRD) as files:
            assert changed(files, SECOND) == {RECORDS: [2], CONTENTS: [12, 13]}
            assert changed(files, FIRST) == {RECORDS: [1, 2], CONTENTS: [10, 12, 13]}
            assert changed(files, EpochId(1, 7)) is None


def test_an_epoch_that_was_discarded_is_remembered_no_more(tmp_path: Path) -> None:
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        three_epochs(store)
        assert store.fold() is not None
        store.discard(THIRD, "for a test")
        commit(store, THIRD, {RECORDS: {0: 1, 4: 4}})
        with store.files_of(THIRD) as files:
            assert changed(files, SECOND) is None
            assert changed(files, FIRST) is None


def test_no_more_is_remembered_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.stored_files._MOST_REMEMBERED", 110)  # the third has 3, the second has 3
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        three_epochs(store)
        assert store.fold() is not None
        with store.files_of(THIRD) as files:
            known = [changed(files, each) is not None for each in (FIRST, SECOND)]
    assert known.count(False) == 1


def test_epochs_in_which_nothing_changed_are_not_remembered_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.stored_files._MOST_REMEMBERED", 1000)
    content: Content = {TASK: {1: 1}, RECORDS: {0: 1}, CONTENTS: {7: 1}}
    with EpochStore.open(tmp_path, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        commit(store, EpochId(1, 1), content)
        for number in range(2, 60):
            commit(store, EpochId(1, number), content, EpochId(1, number - 1), content)
            store.fold()
        assert 2 <= len(store._folded._changes) <= 10
        with store.files_of(EpochId(1, 59)) as files:
            assert changed(files, EpochId(1, 55)) == {RECORDS: [], CONTENTS: []}


def test_an_epoch_may_have_no_files_or_be_the_first_that_has(store: EpochStore, tmp_path: Path) -> None:
    commit(store, FIRST, {TASK: {1: 1}})
    files = files_of(tmp_path, FIRST)
    assert not files.has_files
    assert files.pages(RECORDS).tolist() == files.pages(CONTENTS).tolist() == []
    assert fills(files, CONTENTS, numbers()) == []
    second: Content = {TASK: {1: 1}, RECORDS: {0: 1}, CONTENTS: {5: 1}}
    commit(store, SECOND, second, FIRST, {TASK: {1: 1}})
    assert changed(files_of(tmp_path, SECOND), FIRST) == {RECORDS: [0], CONTENTS: [5]}
    commit(store, THIRD, {TASK: {1: 1}}, SECOND, second)
    assert not files_of(tmp_path, THIRD).has_files
    assert changed(files_of(tmp_path, THIRD), FIRST) == {RECORDS: [], CONTENTS: []}


def test_pages_that_are_not_there_are_refused(store: EpochStore, tmp_path: Path) -> None:
    three_epochs(store)
    files = files_of(tmp_path, THIRD)
    for wanted in (numbers(9), numbers(10, 11), numbers(14), numbers((1 << 50) + 1)):
        with pytest.raises(StoreError, match="lacks 1 pages"):
            files.read(CONTENTS, wanted)
    with pytest.raises(StoreError, match="lacks pagemap-7"):
        files.read(SpaceKey("task", 7), numbers(1))


@pytest.mark.parametrize("what", ["truncated", "removed", "no pagemap", "damaged pagemap"])
def test_damage_is_an_error(store: EpochStore, tmp_path: Path, what: str) -> None:
    three_epochs(store)
    levels = chain(tmp_path, THIRD)
    space = levels[-1].space(CONTENTS)
    assert space is not None
    pages, pagemap = levels[-1].path / space.pages_name, levels[-1].path / CONTENTS.pagemap_name
    if what == "truncated":
        os.truncate(pages, 100)
    elif what == "removed":
        pages.unlink()
    elif what == "no pagemap":
        pagemap.unlink()
    else:
        pagemap.write_bytes(b"damaged")
    with pytest.raises(StoreError):
        list(StoredFiles(levels, UnsyncedDisk()).read(CONTENTS, numbers(1 << 50)))


@pytest.mark.parametrize("max_levels", [20, 4])
@pytest.mark.parametrize("seed", range(5))
def test_any_history_is_read_as_it_was_sent(tmp_path: Path, seed: int, max_levels: int) -> None:
    with EpochStore.open(
        tmp_path, "web", min_free_bytes=0, max_levels=max_levels, disk=UnsyncedDisk()
    ) as store:
        _check_history(store, random.Random(seed), folds=max_levels == 4)


def _check_history(store: EpochStore, chance: random.Random, *, folds: bool) -> None:
    history: list[tuple[EpochId, Content]] = []
    folded = 0
    for number in range(1, 12):
        before = history[-1][1] if history else {}
        content: Content = {}
        for key in (RECORDS, CONTENTS):
            pages = dict(before.get(key, {}))
            for page in chance.sample(range(60), 15):
                pages[page] = chance.randrange(250)
            for page in chance.sample(sorted(pages), 5):
                del pages[page]
            content[key] = pages
        epoch = EpochId(1, number)
        commit(store, epoch, content, history[-1][0] if history else None, before)
        history.append((epoch, content))
        folded += chance.random() < 0.6 and store.fold() is not None
    assert folded > 1 or not folds
    newest, content = history[-1]
    with store.files_of(newest) as files:
        _check_files(files, history, content)


def _check_files(files: StoredFiles, history: list[tuple[EpochId, Content]], content: Content) -> None:
    for key, pages in content.items():
        wanted = files.pages(key)
        assert dict(zip(wanted.tolist(), fills(files, key, wanted), strict=True)) == pages
    for epoch, old in history:
        told = changed(files, epoch)
        assert told is not None
        for key, pages in content.items():
            differing = {page for page, fill in pages.items() if old[key].get(page) != fill}
            assert differing <= set(told[key]) <= pages.keys()
