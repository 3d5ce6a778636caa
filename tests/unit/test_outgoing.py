"""What is said of each page on the wire, against what base, seed and epoch are known to have."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bulk import SEEDED, ZERO, unpack_runs, with_content
from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey
from common.model import EpochId
from primary.capture import PageTable, SpacePages
from primary.outgoing import Held, Seed, _packed

KEY, OTHER = SpaceKey("task", 1), SpaceKey("task", 2)
CONTENTS = st.dictionaries(st.integers(0, 20) | st.integers(120, 135), st.integers(0, 2), max_size=30)
"""What pages hold; 0: zeros."""


def space(pages: dict[int, int], lazy: set[int], key: SpaceKey = KEY) -> SpacePages:
    numbers = sorted(pages)
    identity = np.array([(9 if pages[number] else 0, pages[number]) for number in numbers], dtype=np.uint64)
    flags = np.array([PE_PRESENT | (PE_LAZY if number in lazy else 0) for number in numbers], dtype=np.uint8)
    return SpacePages.of(key, np.array(numbers, dtype=np.uint64), flags, identity.reshape(-1, 2))


@settings(max_examples=300)
@given(CONTENTS, st.none() | CONTENTS, st.none() | CONTENTS, st.sets(st.integers(0, 140)))
def test_each_page_is_sent_lent_or_taken_from_the_base(
    now: dict[int, int], held: dict[int, int] | None, seeded: dict[int, int] | None, lazy: set[int]
) -> None:
    base = None if held is None else Held(EpochId(1, 1), PageTable([space(held, set())]))
    seed = None if seeded is None else Seed(1, PageTable([space(seeded, set()), space({1: 1}, set(), OTHER)]))
    content, packed = _packed(space(now, lazy), base, seed)
    expected = {}
    for number, holds in now.items():
        if held is not None and held.get(number) == holds:
            flags = PE_PARENT
        elif holds == 0:
            flags = PE_PRESENT | ZERO
        elif seeded is not None and seeded.get(number) == holds:
            flags = PE_PRESENT | SEEDED
        else:
            flags = PE_PRESENT
        expected[number] = flags | (PE_LAZY if number in lazy else 0)
    (part,) = packed
    numbers, flags = unpack_runs(part.frame, part.pages)
    assert dict(zip(numbers.tolist(), flags.tolist(), strict=True)) == expected
    assert content.numbers.tolist() == numbers[with_content(flags)].tolist()
    assert part.changed == len(content)


def test_pages_that_are_told_alike_are_one_run() -> None:
    pages = dict.fromkeys(range(1000), 1)
    table = PageTable([space(pages, set())])
    _, (packed,) = _packed(space(pages | {500: 2}, set(range(300, 1000))), Held(EpochId(1, 1), table), None)
    _, (same,) = _packed(space(pages, set()), Held(EpochId(1, 1), table), None)
    _, flags = unpack_runs(packed.frame, packed.pages)
    assert np.flatnonzero(np.diff(flags)).tolist() == [299, 499, 500]
    assert len(same.frame) < len(packed.frame) < 64
