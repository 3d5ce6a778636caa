"""What is said of each page on the wire, against what base, seed and epoch are known to have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bulk import IN_BASE, REPEATED, SEEDED, ZERO, unpack_runs, with_content
from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey
from common.identity import fresh_identity
from common.model import EpochId
from primary.capture import PageTable, SpacePages
from primary.outgoing import Held, Seed, _planned
from primary.page_set import PageSet
from primary.repeats import repeats_in

KEY, OTHER = SpaceKey("task", 1), SpaceKey("task", 2)
CONTENTS = st.dictionaries(st.integers(0, 20) | st.integers(120, 135), st.integers(0, 2), max_size=30)
"""What pages hold; 0: zeros."""


def space(pages: dict[int, int], lazy: set[int], key: SpaceKey = KEY) -> SpacePages:
    numbers = sorted(pages)
    identity = np.array([(pages[number], 9 if pages[number] else 0) for number in numbers], dtype=np.uint64)
    flags = np.array([PE_PRESENT | (PE_LAZY if number in lazy else 0) for number in numbers], dtype=np.uint8)
    return SpacePages.of(key, np.array(numbers, dtype=np.uint64), flags, identity.reshape(-1, 2))


@settings(max_examples=300)
@given(CONTENTS, st.none() | CONTENTS, st.none() | CONTENTS, st.sets(st.integers(0, 140)))
def test_each_page_is_sent_lent_or_taken_from_the_base(
    now: dict[int, int], held: dict[int, int] | None, seeded: dict[int, int] | None, lazy: set[int]
) -> None:
    base = None if held is None else Held(EpochId(1, 1), PageTable([space(held, set())]))
    seed = None if seeded is None else Seed(1, PageTable([space(seeded, set()), space({1: 1}, set(), OTHER)]))
    plan = _planned(space(now, lazy), base, seed)
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
    (part,) = plan.runs
    numbers, flags = unpack_runs(part.frame, part.pages)
    assert dict(zip(numbers.tolist(), flags.tolist(), strict=True)) == expected
    assert plan.content.numbers.tolist() == numbers[with_content(flags)].tolist()
    assert part.changed == len(plan.content)


def test_pages_that_are_told_alike_are_one_run() -> None:
    pages = dict.fromkeys(range(1000), 1)
    table = PageTable([space(pages, set())])
    held = Held(EpochId(1, 1), table)
    (packed,) = _planned(space(pages | {500: 2}, set(range(300, 1000))), held, None).runs
    (same,) = _planned(space(pages, set()), held, None).runs
    _, flags = unpack_runs(packed.frame, packed.pages)
    assert np.flatnonzero(np.diff(flags)).tolist() == [299, 499, 500]
    assert len(same.frame) < len(packed.frame) < 64


@settings(max_examples=300)
@given(CONTENTS, st.none() | CONTENTS, st.none() | CONTENTS, st.booleans())
def test_what_is_said_to_repeat_is_what_the_page_holds(
    now: dict[int, int], held: dict[int, int] | None, seeded: dict[int, int] | None, far: bool
) -> None:
    base = None if held is None else Held(EpochId(1, 1), PageTable([space(held, set())]))
    seed = None if seeded is None else Seed(1, PageTable([space(seeded, set())]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("primary.repeats._LEAST", 0 if far else 1000)
        plan = _planned(space(now, set()), base, seed, repeats=True)
    (part,) = plan.runs
    numbers, flags = unpack_runs(part.frame, part.pages)
    sources = iter(plan.sources.tolist())
    found: dict[int, int] = {}
    for number, flag in zip(numbers.tolist(), flags.tolist(), strict=True):
        if not flag & REPEATED:
            found[number] = now[number]
            continue
        source = next(sources)
        # An earlier one has its bytes by then, whatever was said of it; one of the base is what it was there.
        found[number] = held[source & ~IN_BASE] if source & IN_BASE and held else found[source]
        assert flag == PE_PRESENT | REPEATED
    assert next(sources, None) is None
    assert found == now
    sent = [now[number] for number in plan.content.numbers.tolist()]
    assert len(sent) == len(set(sent)) == part.changed
    if far and held is not None and now:
        assert not set(sent) & {each for each in held.values() if len(held) < 16}


def test_of_what_has_no_identity_nothing_is_said_to_repeat() -> None:
    numbers = np.arange(4, dtype=np.uint64)
    drawn = fresh_identity()
    identity = np.array([drawn, drawn, (1, 9), (1, 9)], dtype=np.uint64)
    fresh = SpacePages.of(KEY, numbers, np.full(4, PE_PRESENT, dtype=np.uint8), identity)
    found = repeats_in(fresh, PageSet.of(numbers), None)
    assert (found.pages.numbers.tolist(), found.sources.tolist()) == ([3], [2])
