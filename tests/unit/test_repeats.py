"""Pages of files that repeat others, from the plan of the sender to what lies in a real store."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from store_disks import UnsyncedDisk
from wire_fakes import captured

from common.bulk import IN_BASE
from common.file_records import CONTENTS
from common.identity import PageHasher
from common.messages import BULK_BYTES, decode
from common.model import PAGE_BYTES, EpochId
from common.terms import TermGuard
from primary.outgoing import Held, epoch_messages
from primary.page_set import PageSet
from primary.repeats import repeats_in
from replica.assembly import Assembly, Committed
from replica.store import EpochStore

HASHER = PageHasher(7)


def page(content: int) -> bytes:
    return content.to_bytes(2, "little") * (PAGE_BYTES // 2)


def changed(pages: dict[int, int], chance: random.Random) -> dict[int, int]:
    """Copy, move, shift, write and remove runs of pages; there are few contents, and zeros."""
    made = dict(pages)
    for _ in range(chance.randrange(1, 6)):
        first, count = chance.randrange(200), chance.randrange(1, 40)
        run = {number: made[number] for number in range(first, first + count) if number in made}
        what = chance.randrange(5)
        if what == 0:
            made |= {number: chance.randrange(12) for number in range(first, first + count)}
        elif what == 1:
            made |= {number + 300: content for number, content in run.items()}
        elif what == 2:
            shift = chance.randrange(1, 4)
            made = {number: content for number, content in made.items() if number not in run}
            made |= {number + shift: content for number, content in run.items()}
        elif what == 3:
            made |= {number: 100 + number for number in range(first, first + count)}
        else:
            made = {number: content for number, content in made.items() if number not in run}
    return made


@pytest.mark.parametrize("seed", range(4))
def test_what_is_stored_is_what_was_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("primary.repeats._LEAST", 1)
    chance = random.Random(seed)
    guard = TermGuard(lambda workload, leadership: None)
    guard.advance("redis", 1, "a")
    pages: dict[int, int] = {}
    held: Held | None = None
    repeated = 0
    with EpochStore.open(tmp_path, "redis", min_free_bytes=0, max_levels=4, disk=UnsyncedDisk()) as store:
        assembly = Assembly("redis", "a", 1, store, guard, most_memory_bytes=1 << 30)
        for number in range(1, 120):
            pages = changed(pages, chance)
            epoch = captured(number, {CONTENTS: {each: page(content) for each, content in pages.items()}})
            outcome: object = None
            for frames in epoch_messages(epoch, 1, held, None, bytearray(BULK_BYTES)):
                message, bulk = decode([bytes(frame) for frame in frames])
                repeated += type(message).__name__ == "Repeats"
                outcome = assembly.take(message, bulk, frames)
                if chance.randrange(2000) == 0:
                    break  # the line is cut
            if not isinstance(outcome, Committed):
                assembly.abort()
                continue
            held = Held.of(epoch)
            part = store.identify(EpochId(1, number), CONTENTS, 0, 1 << 20, HASHER)
            assert part.numbers.tolist() == sorted(pages)
            told = dict(zip(part.numbers.tolist(), part.identity.tolist(), strict=True))
            expected = {
                each: HASHER.identify(memoryview(page(content)))[0].tolist()
                for each, content in pages.items()
            }
            assert told == expected
            while store.fold_due():
                store.fold()
        assert store.verify() == []
    assert repeated > 60


def test_what_repeats_a_page_that_the_base_has_is_read_from_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is now here and now there, page by page, when a file of many equal pages is copied."""
    monkeypatch.setattr("primary.repeats._LEAST", 1)
    base = {number: 100 + number for number in range(0, 20, 2)} | dict.fromkeys(range(1, 20, 2), 7)
    copied = base | {number + 1000: content for number, content in base.items()}
    had, space = (captured(1, {CONTENTS: _content(each)}).spaces[0] for each in (base, copied))
    repeats = repeats_in(space, PageSet.of(np.arange(1000, 1020, dtype=np.uint64)), had)
    assert repeats.pages.numbers.tolist() == list(range(1000, 1020))
    assert [base[int(each)] for each in repeats.sources - np.uint64(IN_BASE)] == list(
        base[n] for n in range(20)
    )


def _content(pages: dict[int, int]) -> dict[int, bytes]:
    return {number: page(content) for number, content in sorted(pages.items())}
