"""What pages hold against a dictionary, with more blocks than are worked on at once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primary import identities
from primary.identities import NO_IDENTITIES, Identities
from primary.page_set import PageSet

UNREAD = (2**64 - 1, 2**64 - 1)
CONTENTS = st.dictionaries(st.integers(0, 700), st.integers(0, 2), max_size=60)
RANGES = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 200)), max_size=4).map(
    lambda ranges: {number for first, count in ranges for number in range(first, first + count)}
)


@pytest.fixture(autouse=True, scope="module")
def few_at_once() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identities, "_BATCH_BLOCKS", 2)
        yield


def array(numbers: Iterable[int]) -> np.ndarray:
    return np.array(sorted(numbers), dtype=np.uint64)


def halves(content: int) -> tuple[int, int]:
    return (content and 5, content)


def in_halves(contents: dict[int, int]) -> np.ndarray:
    return np.array([halves(contents[n]) for n in sorted(contents)], dtype=np.uint64).reshape(-1, 2)


def made_of(contents: dict[int, int]) -> Identities:
    return Identities.of(array(contents), in_halves(contents))


def told(made: Identities) -> dict[int, tuple[int, int]]:
    numbers = made.pages.numbers
    return dict(zip(numbers.tolist(), map(tuple, made.get(numbers).tolist()), strict=True))


@settings(deadline=None)
@given(CONTENTS, RANGES, CONTENTS)
def test_pages_hold_what_was_put_wherever_others_come_and_go(
    contents: dict[int, int], present: set[int], later: dict[int, int]
) -> None:
    made = made_of(contents)
    before = told(made)
    assert before == {number: halves(content) for number, content in contents.items()}
    reshaped = made.reshaped(PageSet.of(array(present)))
    expected = {number: before.get(number, UNREAD) for number in present}
    assert told(reshaped) == expected
    changed = reshaped.copy()
    now = {number: content for number, content in later.items() if number in present}
    changed.put(array(now), in_halves(now))
    assert told(changed) == expected | {number: halves(content) for number, content in now.items()}
    assert told(reshaped) == expected
    assert told(made) == before


@settings(deadline=None)
@given(CONTENTS, RANGES, CONTENTS)
def test_two_values_differ_in_what_one_lacks_or_has_otherwise(
    contents: dict[int, int], kept: set[int], later: dict[int, int]
) -> None:
    """One follows from the other, so that they share blocks; and both are compared with one that does not."""
    one = made_of(contents)
    other = one.reshaped(PageSet.of(array((contents.keys() & kept) | later.keys())))
    other.put(array(later), in_halves(later))
    apart = Identities.of(other.pages.numbers, other.get(other.pages.numbers))
    ours, theirs = told(one), told(other)
    lacking = sorted(number for number in theirs if ours.get(number) != theirs[number])
    assert other.differing(one).numbers.tolist() == apart.differing(one).numbers.tolist() == lacking
    gone = sorted(number for number in ours if theirs.get(number) != ours[number])
    assert one.differing(other).numbers.tolist() == one.differing(apart).numbers.tolist() == gone
    assert not len(apart.differing(other))


@settings(deadline=None)
@given(CONTENTS)
def test_zeros_are_found(contents: dict[int, int]) -> None:
    made = made_of(contents)
    zeros = sorted(number for number, content in contents.items() if content == 0)
    assert made.zeros(made.pages).numbers.tolist() == zeros


def test_a_block_of_other_pages_that_looks_the_same_is_not_taken_for_the_same() -> None:
    one, other = made_of({5: 1, 7: 1, 70: 2}), made_of({5: 1, 8: 1, 70: 2})
    assert other.differing(one).numbers.tolist() == [8]
    assert one.differing(other).numbers.tolist() == [7]


def test_nothing_is_not_changed_by_what_begins_with_it() -> None:
    made_of({1: 1})
    assert len(NO_IDENTITIES.pages) == 0
    assert told(NO_IDENTITIES) == {}
    assert not len(NO_IDENTITIES.differing(made_of({})))
