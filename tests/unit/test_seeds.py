"""What is kept of an interrupted epoch, what a replica says that it holds; neither is ever trusted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from store_disks import UnsyncedDisk, commit, composed, header

from common.criu.images import PE_PARENT, PE_PRESENT, SpaceKey
from common.errors import NoSpaceError, StoreError
from common.identity import PageHasher
from common.model import EpochId
from replica.levels import BaseError
from replica.store import COPIED, IN_BASE, REPEATED, ZERO, EpochStore, IncomingEpoch
from replica.store_reader import EpochRecord

TASK, OTHER = SpaceKey("task", 1), SpaceKey("task", 2)
HASHER = PageHasher(7)
ALL = 1 << 20


def opened(directory: Path) -> EpochStore:
    return EpochStore.open(directory, "web", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk())


def page(fill: int) -> bytes:
    return fill.to_bytes(2, "little") * 2048


def identity_of(fill: int) -> list[int]:
    return HASHER.identify(memoryview(page(fill)))[0].tolist()


def announce(arriving: IncomingEpoch, key: SpaceKey, flags: dict[int, int]) -> None:
    numbers = np.array(sorted(flags), dtype=np.uint64)
    arriving.space(key, numbers, np.array([flags[n] for n in sorted(flags)], dtype=np.uint8))


def interrupted(
    store: EpochStore, epoch: EpochId, pages: int, came: int, first: int = 0, incarnation: str = "one"
) -> None:
    """Begin a full epoch of `pages` pages, of which `came` come; every tenth one is all zeros."""
    arriving = store.begin(msgspec.structs.replace(header(epoch, None), incarnation=incarnation))
    arriving.metadata("inventory.img", b"inventory")
    announce(arriving, TASK, {first + n: ZERO if n % 10 == 9 else PE_PRESENT for n in range(pages)})
    for n in [n for n in range(pages) if n % 10 != 9][:came]:
        arriving.pages(TASK, page(first + n + 1))
    arriving.interrupt()


def pages_kept(store: EpochStore) -> int:
    return len(store.identify(store.seed, TASK, 0, ALL, HASHER).numbers)


def test_what_came_of_an_interrupted_epoch_is_lent_to_the_next_one_and_never_restored(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
        assert store.newest is None
        assert store.records() == []
        part = store.identify(store.seed, TASK, 0, ALL, HASHER)
        # 300 pages with content, and the zeros between them
        assert part.numbers.tolist() == list(range(333))
        assert not part.more
        assert part.identity[0].tolist() == identity_of(1)
        assert part.identity[9].tolist() == [0, 0]
        arriving = store.begin(header(EpochId(1, 1), None), seed=store.seed)
        announce(arriving, TASK, {0: COPIED, 1: PE_PRESENT, 2: COPIED, 9: COPIED, 10: ZERO, 2000: PE_PRESENT})
        arriving.pages(TASK, page(5000) + page(6000))
        record = arriving.commit()
        data = (record.path / "pages-1.img").read_bytes()
        assert [data[at : at + 4096] for at in range(0, len(data), 4096)] == [
            page(1),
            page(5000),
            page(3),
            bytes(4096),
            bytes(4096),
            page(6000),
        ]
        assert store.verify() == []
        assert store.seed == 0
        assert store.fold_due()
        store.fold()
        assert list((tmp_path / "web" / "seeds").iterdir()) == []
        assert list((tmp_path / "web" / "trash").iterdir()) == []


def test_a_seed_survives_the_agent_but_not_what_is_wrong_with_it(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
    with opened(tmp_path) as store:
        assert pages_kept(store) == 333
    (seed,) = (tmp_path / "web" / "seeds").iterdir()
    os.truncate(seed / "pages-1.img", 4096)
    with opened(tmp_path) as store:
        assert store.seed == 0
        assert list((tmp_path / "web" / "seeds").iterdir()) == []
        assert list((tmp_path / "web" / "damaged").iterdir()) == []


def test_what_was_torn_in_a_seed_has_another_identity(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
        (seed,) = (tmp_path / "web" / "seeds").iterdir()
        with (seed / "pages-1.img").open("r+b") as file:
            file.seek(4096 + 512)
            file.write(bytes(512))
        identity = store.identify(store.seed, TASK, 0, ALL, HASHER).identity
        assert identity[0].tolist() == identity_of(1)
        assert identity[1].tolist() != identity_of(2)


def test_what_goes_wrong_between_telling_and_copying_is_not_committed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
        assert pages_kept(store) == 333
        (seed,) = (tmp_path / "web" / "seeds").iterdir()
        with (seed / "pages-1.img").open("r+b") as file:
            file.write(bytes(4096))  # as after a write that never reached the disk
        arriving = store.begin(header(EpochId(1, 2), None), seed=store.seed)
        announce(arriving, TASK, {0: COPIED, 2: COPIED})
        with pytest.raises(BaseError, match="is not what was told"):
            arriving.commit()
        arriving.abort()
        assert store.newest is None


def test_of_several_seeds_the_newest_survives_a_restart_and_none_that_is_outdated(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
        (old,) = (tmp_path / "web" / "seeds").iterdir()
        shutil.copytree(old, tmp_path / "kept")
        interrupted(store, EpochId(1, 3), 1000, 400)
        shutil.copytree(tmp_path / "kept", tmp_path / "web" / "seeds" / "1")
        newest = store.seed
    with opened(tmp_path) as store:
        assert store.seed == newest
        assert len(list((tmp_path / "web" / "seeds").iterdir())) == 1
        commit(store, EpochId(1, 4), {TASK: {1: 1}})
    with opened(tmp_path) as store:
        assert store.seed == 0


def test_the_larger_of_two_seeds_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 400)
        interrupted(store, EpochId(1, 2), 1000, 290)
        assert store.identify(store.seed, TASK, 0, 1, HASHER).numbers.tolist() == [0]
        assert pages_kept(store) == 444
        interrupted(store, EpochId(1, 3), 1000, 500, first=7)
        assert pages_kept(store) == 555
        assert len(list((tmp_path / "web" / "seeds").iterdir())) == 1


def test_little_is_not_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 100)
        assert store.seed == 0
        assert list((tmp_path / "web" / "incoming").iterdir()) == []


def test_an_interrupted_delta_lends_what_it_brought_itself(tmp_path: Path) -> None:
    base = {TASK: {n: 1 for n in range(600)}, OTHER: {0: 9}}
    with opened(tmp_path) as store:
        commit(store, EpochId(1, 1), base)
        arriving = store.begin(header(EpochId(1, 2), EpochId(1, 1)))
        announce(arriving, OTHER, {0: PE_PARENT})
        announce(arriving, TASK, {n: PE_PARENT if n < 100 else PE_PRESENT for n in range(600)})
        for n in range(400):
            arriving.pages(TASK, page(n))
        arriving.interrupt()
        assert store.identify(store.seed, TASK, 0, ALL, HASHER).numbers.tolist() == list(range(100, 500))
        assert store.identify(store.seed, OTHER, 0, ALL, HASHER).numbers.tolist() == []
        arriving = store.begin(header(EpochId(1, 3), EpochId(1, 1)), seed=store.seed)
        announce(arriving, TASK, {0: PE_PARENT, 100: COPIED, 499: COPIED})
        record = arriving.commit()
        data = (record.path / "pages-1.img").read_bytes()
        assert data == page(0) + page(399)


def test_pages_that_the_seed_does_not_have_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        arriving = store.begin(header(EpochId(1, 1), None))
        announce(arriving, TASK, {0: COPIED})
        with pytest.raises(StoreError, match="nothing is"):
            arriving.commit()
        arriving.abort()
        interrupted(store, EpochId(1, 1), 1000, 300)
        arriving = store.begin(header(EpochId(1, 2), None), seed=store.seed)
        announce(arriving, TASK, {0: COPIED})
        with pytest.raises(BaseError, match="nobody was told"):
            arriving.commit()
        arriving.abort()
        assert pages_kept(store) == 333
        arriving = store.begin(header(EpochId(1, 2), None), seed=store.seed)
        announce(arriving, TASK, {0: COPIED, 999: COPIED})
        with pytest.raises(BaseError, match="not told to be kept"):
            arriving.commit()
        arriving.abort()
        assert store.newest is None


def test_what_an_epoch_holds_is_told_along_its_chain_in_parts(tmp_path: Path) -> None:
    first = {TASK: {n: n % 7 for n in range(1, 9)}}
    second = {TASK: {**first[TASK], 3: 200, 20: 0}}
    with opened(tmp_path) as store:
        commit(store, EpochId(1, 1), first)
        record = commit(store, EpochId(1, 2), second, EpochId(1, 1), first)
        assert record
        assert record.levels == 2
        told: dict[int, list[int]] = {}
        row, more = 0, True
        while more:
            part = store.identify(record.id, TASK, row, 4, HASHER)
            told |= dict(zip(part.numbers.tolist(), part.identity.tolist(), strict=True))
            row, more = row + 4, part.more
        assert told == {
            n: [0, 0] if not fill else HASHER.identify(memoryview(bytes([fill]) * 4096))[0].tolist()
            for n, fill in second[TASK].items()
        }
        assert composed(record.path) == second
        assert not store.identify(record.id, OTHER, 0, 4, HASHER).numbers.size
        with pytest.raises(StoreError, match="has no epoch"):
            store.identify(EpochId(1, 7), TASK, 0, 4, HASHER)


def test_pages_of_one_seed_are_never_taken_for_those_of_another(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 300)
        first = store.seed
        arriving = store.begin(header(EpochId(1, 2), None), seed=first)
        interrupted(store, EpochId(1, 3), 1000, 400)
        assert store.seed != first
        with pytest.raises(StoreError, match="not here any more"):
            store.begin(header(EpochId(1, 4), None), seed=first)
        with pytest.raises(StoreError, match="not here any more"):
            store.identify(first, TASK, 0, 1, HASHER)
        with pytest.raises(StoreError):  # noqa: PT012 - whichever of the two reads first
            announce(arriving, TASK, {0: COPIED})
            arriving.commit()
        arriving.abort()


def test_a_seed_of_another_run_stands_in_nobodys_way(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        interrupted(store, EpochId(1, 1), 1000, 600)
        interrupted(store, EpochId(1, 2), 1000, 300, first=5000, incarnation="two")
        assert store.identify(store.seed, TASK, 0, 1, HASHER).numbers.tolist() == [5000]


def test_an_abort_that_meets_a_broken_disk_leaves_neither_a_directory_nor_a_claim_on_its_base(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as store:
        commit(store, EpochId(1, 1), {TASK: {n: 1 for n in range(8)}})
        arriving = store.begin(header(EpochId(1, 2), EpochId(1, 1)))
        announce(arriving, TASK, {n: PE_PRESENT for n in range(4)})
        arriving.pages(TASK, page(1))

        def broken() -> None:
            raise StoreError("commit.pages: quota")

        arriving._writer.close = broken  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="quota"):
            arriving.abort()
        assert list((tmp_path / "web" / "incoming").iterdir()) == []
        assert store._arriving == []


# Pages that repeat others


def repeating(arriving: IncomingEpoch, flags: dict[int, int], sources: list[int]) -> None:
    numbers = np.array(sorted(flags), dtype=np.uint64)
    told = np.array([flags[n] for n in sorted(flags)], dtype=np.uint8)
    arriving.space(TASK, numbers, told, np.array(sources, dtype=np.uint64))


def stored(record: EpochRecord) -> list[bytes]:
    data = (record.path / "pages-1.img").read_bytes()
    return [data[at : at + 4096] for at in range(0, len(data), 4096)]


def test_repeated_pages_are_copied_from_the_epoch_and_from_its_base(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        first = store.begin(header(EpochId(1, 1), None))
        announce(first, TASK, {7: PE_PRESENT, 8: PE_PRESENT, 9: PE_PRESENT})
        first.pages(TASK, page(70) + page(80) + page(90))
        first.commit()
        second = store.begin(header(EpochId(1, 2), EpochId(1, 1)))
        flags = {
            0: PE_PRESENT,
            1: PE_PRESENT | REPEATED,
            2: PE_PRESENT | REPEATED,
            3: ZERO,
            4: PE_PRESENT | REPEATED,
            5: PE_PRESENT | REPEATED,
            6: PE_PRESENT,
            7: PE_PRESENT | REPEATED,
            8: PE_PARENT,
        }
        # The base's 9 is gone in this epoch; 4 is like 2, which was copied itself.
        base = int(IN_BASE)
        repeating(second, flags, [0, base + 9, 2, base + 8, 6])
        second.pages(TASK, page(1))
        second.pages(TASK, page(2))
        record = second.commit()
        expected = [page(1), page(1), page(90), bytes(4096), page(90), page(80), page(2), page(2)]
        assert stored(record) == expected
        assert store.verify() == []


def test_what_repeats_others_needs_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        arriving = store.begin(header(EpochId(1, 1), None))
        monkeypatch.setattr(store, "_min_free_bytes", 9 * 4096)
        monkeypatch.setattr(store._disk, "free_bytes", lambda path: 10 * 4096)
        flags = {number: PE_PRESENT | REPEATED * (number > 0) for number in range(3)}
        with pytest.raises(NoSpaceError, match="bytes free"):
            repeating(arriving, flags, [0, 0])
        arriving.abort()
        assert store.newest is None


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        ([2], StoreError, "repeats one that is not before it"),
        ([1], StoreError, "repeats one that is not before it"),
        ([5], StoreError, "repeats one that is not before it"),
        ([9], StoreError, "repeats one that is not before it"),
        ([], StoreError, "not said what 1 repeated pages are like"),
        ([0, 0], StoreError, "not said what 1 repeated pages are like"),
        ([int(IN_BASE)], BaseError, "there is none"),
    ],
)
def test_a_page_that_repeats_what_cannot_be_is_refused(
    tmp_path: Path, sources: list[int], error: type[StoreError], words: str
) -> None:
    with opened(tmp_path) as store:
        arriving = store.begin(header(EpochId(1, 1), None))

        def whole() -> None:
            repeating(arriving, {0: PE_PRESENT, 1: PE_PRESENT | REPEATED, 2: PE_PRESENT}, sources)
            arriving.pages(TASK, page(1) + page(2))
            arriving.commit()

        with pytest.raises(error, match=words):
            whole()
        arriving.abort()
        assert store.newest is None


def test_a_page_that_the_base_lost_is_asked_for_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        first = store.begin(header(EpochId(1, 1), None))
        announce(first, TASK, {7: PE_PRESENT})
        first.pages(TASK, page(70))
        level = first.commit().path
        for missing in (True, False):
            if not missing:
                os.truncate(level / "pages-1.img", 0)
            second = store.begin(header(EpochId(1, 2), EpochId(1, 1)))
            repeating(second, {0: PE_PRESENT | REPEATED}, [int(IN_BASE) + (99 if missing else 7)])
            with pytest.raises(BaseError, match="t1-e1 cannot be taken over"):
                second.commit()
            second.abort()


def test_what_came_of_an_interrupted_epoch_has_its_repeated_pages(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        arriving = store.begin(header(EpochId(1, 1), None))
        flags = {n: PE_PRESENT | (REPEATED if n % 2 else 0) for n in range(1200)}
        repeating(arriving, flags, [n - 1 for n in range(1, 1200, 2)])
        for n in range(0, 700, 2):
            arriving.pages(TASK, page(n + 1))
        arriving.interrupt()
        part = store.identify(store.seed, TASK, 0, ALL, HASHER)
        assert part.numbers.tolist() == list(range(699))
        assert part.identity[5].tolist() == identity_of(5)
