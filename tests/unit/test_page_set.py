"""Sets of pages against Python's own sets."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.model import PAGE_BYTES
from primary.page_set import NO_PAGES, PageSet

HIGH = (1 << 52) - 40
"""The vsyscall page is up there."""
NUMBERS = st.one_of(st.integers(0, 30), st.integers(HIGH, HIGH + 30))
PAGES = st.sets(NUMBERS, max_size=24)
EVERYWHERE = [*range(33), *range(HIGH - 2, HIGH + 30)]


def array(numbers: Iterable[int]) -> NDArray[np.uint64]:
    return np.array(sorted(numbers), dtype=np.uint64)


def told(pages: PageSet) -> list[int]:
    numbers = pages.numbers
    assert numbers.dtype == np.uint64
    assert len(numbers) == len(pages)
    return numbers.tolist()


@given(PAGES)
def test_a_set_has_what_it_was_made_of(pages: set[int]) -> None:
    made = PageSet.of(array(pages))
    assert told(made) == sorted(pages)
    assert made.has(array(EVERYWHERE)).tolist() == [number in pages for number in EVERYWHERE]
    assert made == PageSet(made.bounds)
    bounds = made.bounds.tolist()
    assert made.byte_bounds.tolist() == [bound * PAGE_BYTES for bound in bounds]
    assert all(low < high for low, high in pairwise(bounds)), "runs are as long as can be"
    spans = [range(first, end) for first, end in zip(bounds[0::2], bounds[1::2], strict=True)]
    assert [number for span in spans for number in span] == sorted(pages)
    assert made == PageSet.of(np.repeat(array(pages), 2))


@given(PAGES)
def test_a_page_s_row_is_how_many_come_before_it(pages: set[int]) -> None:
    made = PageSet.of(array(pages))
    ranks = [sum(each < number for each in pages) for number in EVERYWHERE]
    assert made.rank(array(EVERYWHERE)).tolist() == ranks
    rows = np.arange(len(pages))
    assert made.at(rows[::-1]).tolist() == sorted(pages, reverse=True)
    assert made.rank(made.at(rows)).tolist() == rows.tolist()


@given(PAGES, PAGES)
def test_rows_of_what_another_set_has_are_marked(one: set[int], other: set[int]) -> None:
    marks = PageSet.of(array(one)).marks(PageSet.of(array(other)))
    assert marks.tolist() == [number in other for number in sorted(one)]


@given(PAGES, PAGES)
@pytest.mark.parametrize("join", [operator.and_, operator.or_, operator.sub, operator.xor])
def test_sets_are_joined_as_pythons_are(
    join: Callable[[object, object], object], one: set[int], other: set[int]
) -> None:
    joined = join(PageSet.of(array(one)), PageSet.of(array(other)))
    assert isinstance(joined, PageSet)
    expected = join(one, other)
    assert isinstance(expected, set)
    assert told(joined) == sorted(expected)
    assert joined == PageSet.of(array(expected)), "its runs are as long as can be"


@given(st.lists(st.tuples(NUMBERS, st.integers(0, 6)), max_size=12))
def test_spans_may_come_in_any_order_be_empty_and_overlap(spans: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in spans], dtype=np.uint64)
    ends = np.array([start + count for start, count in spans], dtype=np.uint64)
    expected = {number for start, count in spans for number in range(start, start + count)}
    assert PageSet.spanning(starts, ends) == PageSet.of(array(expected))


@given(st.lists(PAGES, max_size=4))
def test_a_union_has_what_any_part_has(parts: list[set[int]]) -> None:
    union = PageSet.union([PageSet.of(array(part)) for part in parts])
    assert told(union) == sorted(set().union(*parts))


@given(PAGES, st.integers(1, 9))
def test_pieces_are_all_pages_in_order(pages: set[int], most: int) -> None:
    pieces = [piece.tolist() for piece in PageSet.of(array(pages)).pieces(most)]
    assert [number for piece in pieces for number in piece] == sorted(pages)
    assert all(len(piece) == most for piece in pieces[:-1])


@given(PAGES, st.sets(st.integers(0, 24), max_size=8))
def test_rows_name_the_pages_that_stand_there(pages: set[int], edges: set[int]) -> None:
    bounds = sorted(edge for edge in edges if edge <= len(pages))
    bounds = bounds[: len(bounds) // 2 * 2]
    found = PageSet.of(array(pages)).at_rows(np.array(bounds, dtype=np.int64))
    rows = [row for low, high in zip(bounds[0::2], bounds[1::2], strict=True) for row in range(low, high)]
    assert found == PageSet.of(array(sorted(pages)[row] for row in rows))


def test_sets_differ_in_where_they_begin_as_in_how_long_they_are() -> None:
    assert PageSet.of(array([1, 2])) != PageSet.of(array([2, 3]))
    assert PageSet.of(array([1, 2])) != PageSet.of(array([1, 2, 3]))
    assert PageSet.of(array([])) == NO_PAGES
    assert object() != NO_PAGES


def test_a_large_set_takes_little() -> None:
    tebibyte = PageSet(np.array([0, 1 << 28], dtype=np.uint64))
    assert len(tebibyte) * PAGE_BYTES == 1 << 40
    hole = tebibyte - PageSet.of(array([5, 1 << 20]))
    assert hole.bounds.tolist() == [0, 5, 6, 1 << 20, (1 << 20) + 1, 1 << 28]
    assert len(tebibyte & hole) == (1 << 28) - 2
