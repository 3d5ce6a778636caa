"""What a store says of a few pages: what a restore would find of them, whatever levels they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_disks import Content, UnsyncedDisk, commit, header

from common.criu.images import SpaceKey
from common.errors import StoreError
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from replica.doubt import StoredDoubt
from replica.levels import BaseError, NotHeldError, tells_damage
from replica.store import EpochStore

TASK, OTHER = SpaceKey("task", 1), SpaceKey("task", 2)
HASHER = PageHasher(7)
EPOCHS = [EpochId(1, number) for number in range(1, 6)]
BASE: Content = {TASK: {n: n for n in range(1, 40)}, OTHER: {5: 5}}


def opened(directory: Path) -> EpochStore:
    return EpochStore.open(directory, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EpochStore]:
    """A chain: pages come, go, change and become zeros."""
    with opened(tmp_path) as store:
        commit(store, EPOCHS[0], BASE)
        yield store


def sampled(
    store: EpochStore, epoch: EpochId, first: int = 0, end: int = 1 << 40, most: int = 1 << 20
) -> dict[int, tuple[int, int]]:
    part = store.sample(epoch, TASK, first, end, most, HASHER)
    return {int(n): (int(a), int(b)) for n, (a, b) in zip(part.numbers, part.identity, strict=True)}


def held(store: EpochStore, epoch: EpochId) -> dict[int, tuple[int, int]]:
    part = store.identify(epoch, TASK, 0, 1 << 20, HASHER)
    return {int(n): (int(a), int(b)) for n, (a, b) in zip(part.numbers, part.identity, strict=True)}


CONTENTS: list[Content] = [
    BASE,
    {TASK: BASE[TASK] | {3: 33, 7: 0, 100: 100}, OTHER: {5: 5}},
    {TASK: {n: n for n in range(11, 40)} | {100: 100, 20: 222}, OTHER: {5: 6}},
    {TASK: {n: n for n in range(11, 40)} | {100: 101, 20: 222, 21: 0}, OTHER: {5: 6}},
]


def with_deltas(store: EpochStore) -> EpochId:
    for place in range(1, len(CONTENTS)):
        commit(store, EPOCHS[place], CONTENTS[place], EPOCHS[place - 1], CONTENTS[place - 1])
    return EPOCHS[len(CONTENTS) - 1]


def pages_file(store: EpochStore, epoch: EpochId) -> Path:
    return next(
        each for each in store.show(epoch).record.path.glob("pages-*.img") if each.stat().st_size > PAGE_BYTES
    )


def test_it_says_what_a_restore_finds_in_whatever_level_it_lies(store: EpochStore) -> None:
    newest = with_deltas(store)
    for epoch in EPOCHS[2:4]:
        assert sampled(store, epoch) == held(store, epoch)
    assert sampled(store, newest)[21] == (0, 0)
    assert store.fold() is not None
    assert sampled(store, newest) == held(store, newest)


@pytest.mark.parametrize(
    ("first", "end"), [(0, 12), (12, 13), (15, 30), (39, 101), (41, 99), (30, 20), (200, 300)]
)
def test_it_says_what_it_was_asked_for_and_no_more(store: EpochStore, first: int, end: int) -> None:
    newest = with_deltas(store)
    everything = held(store, newest)
    assert sampled(store, newest, first, end) == {
        n: each for n, each in everything.items() if first <= n < end
    }


def test_what_is_too_much_for_one_answer_comes_in_parts(store: EpochStore) -> None:
    newest = with_deltas(store)
    found: dict[int, tuple[int, int]] = {}
    first, more = 0, True
    while more:
        part = store.sample(newest, TASK, first, 1 << 40, 7, HASHER)
        assert len(part.numbers) <= 7
        found |= sampled(store, newest, first, int(part.numbers[-1]) + 1)
        first, more = int(part.numbers[-1]) + 1, part.more
    assert found == held(store, newest)


def test_a_space_that_an_epoch_does_not_have_has_no_pages(store: EpochStore) -> None:
    part = store.sample(EPOCHS[0], SpaceKey("task", 9), 0, 1 << 40, 100, HASHER)
    assert (len(part.numbers), part.more) == (0, False)


def test_what_was_altered_on_disk_is_what_it_says(store: EpochStore) -> None:
    before = sampled(store, EPOCHS[0])
    with pages_file(store, EPOCHS[0]).open("r+b") as file:
        file.seek(5 * PAGE_BYTES + 100)
        file.write(b"x")
    after = sampled(store, EPOCHS[0])
    assert {n for n in before if before[n] != after[n]} == {6}


def test_what_cannot_be_read_back_is_damage(store: EpochStore) -> None:
    path = pages_file(store, EPOCHS[0])
    path.write_bytes(path.read_bytes()[: 7 * PAGE_BYTES])
    with pytest.raises(StoreError) as error:
        sampled(store, EPOCHS[0])
    assert tells_damage(error.value)


def test_an_epoch_that_is_not_held_is_no_damage(store: EpochStore) -> None:
    with pytest.raises(NotHeldError):
        sampled(store, EPOCHS[4])


def test_a_sample_ends_no_fold(store: EpochStore, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = with_deltas(store)
    breathe = store._breathe
    asked = []

    def sampling(size_bytes: int) -> None:
        asked.append(sampled(store, newest))
        breathe(size_bytes)

    monkeypatch.setattr(store, "_breathe", sampling)
    assert store.fold() is not None
    assert asked
    assert all(each == asked[0] for each in asked)


def test_a_level_whose_place_a_fold_took_meanwhile_is_no_damage(
    store: EpochStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = with_deltas(store)
    expected = held(store, newest)
    identify = store._sampler.identify

    def late(chain, *arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(store._sampler, "identify", identify)
        assert store.fold() is not None
        return identify(chain, *arguments)

    monkeypatch.setattr(store._sampler, "identify", late)
    assert sampled(store, newest) == expected


# --- what the primary says against it -----------------------------------------------------------------


def test_nothing_may_stand_on_what_is_in_doubt_also_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, EPOCHS[0], BASE)
        assert store.doubt_about(EPOCHS[0]) == ""
        store.doubt("b has stored 1 page otherwise")
        with pytest.raises(BaseError, match="in doubt"):
            store.begin(header(EPOCHS[1], EPOCHS[0]))
    with opened(tmp_path) as store:
        assert store.newest is not None, "it stays until there is something better"
        assert store.doubt_about(EPOCHS[0]) == "b has stored 1 page otherwise"
        with pytest.raises(BaseError, match="in doubt"):
            store.begin(header(EPOCHS[1], EPOCHS[0]))


def test_an_epoch_that_stands_on_what_is_in_doubt_is_in_doubt_however_new_it_is(store: EpochStore) -> None:
    with_deltas(store)
    doubt = StoredDoubt(epoch=EPOCHS[1], reason="of it")
    assert doubt.touches(store._chain(EPOCHS[3]))
    assert not StoredDoubt(epoch=EpochId(0, 9), reason="of it").touches(store._chain(EPOCHS[3]))


def test_an_epoch_that_was_arriving_cannot_commit_on_what_is_in_doubt(store: EpochStore) -> None:
    arriving = store.begin(header(EPOCHS[1], EPOCHS[0]))
    arriving.metadata("inventory.img", b"inventory")
    store.doubt("of it")
    with pytest.raises(BaseError, match="in doubt"):
        arriving.commit()


def test_a_whole_epoch_ends_the_doubt_and_what_was_in_doubt_goes(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, EPOCHS[0], BASE)
        with_deltas(store)
        store.doubt("of it")
        commit(store, EPOCHS[4], BASE)
        assert store.doubt_about(EPOCHS[4]) == ""
        assert store.doubt_about(EPOCHS[3]) == "of it"
        assert store.fold_due()
        store.fold()
        assert [record.id for record in store.records()] == [EPOCHS[4]]
        assert not (tmp_path / "web" / "doubt").exists()
    with opened(tmp_path) as store:
        commit(store, EpochId(1, 6), BASE, EPOCHS[4], BASE)
        assert store.doubt_about(EpochId(1, 6)) == ""


def test_a_fold_does_not_wash_what_is_in_doubt(store: EpochStore) -> None:
    newest = with_deltas(store)
    store.doubt("of it")
    store.fold()
    assert store.doubt_about(newest) == "of it"


def test_a_power_loss_after_the_whole_epoch_leaves_the_old_ones_in_doubt_only(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, EPOCHS[0], BASE)
        store.doubt("of it")
        commit(store, EPOCHS[1], BASE)
    with opened(tmp_path) as store:
        assert store.doubt_about(EPOCHS[0]) == "of it"
        assert store.doubt_about(EPOCHS[1]) == ""
        store.fold()
        assert [record.id for record in store.records()] == [EPOCHS[1]]


def test_a_store_whose_doubt_cannot_be_read_does_not_open(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, EPOCHS[0], BASE)
    (tmp_path / "web" / "doubt").write_text("{")
    with pytest.raises(StoreError, match="makes no sense"):
        opened(tmp_path)


def test_an_empty_store_has_nothing_to_doubt(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.doubt("of nothing")
        commit(store, EPOCHS[0], BASE)
        commit(store, EPOCHS[1], BASE, EPOCHS[0], BASE)
        assert store.doubt_about(EPOCHS[1]) == ""
