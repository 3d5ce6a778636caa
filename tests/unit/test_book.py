"""The book of pages against a plain model: a dictionary from page numbers to what each holds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.model import PAGE_BYTES
from primary.book import PageBook
from primary.capture import PageTable, SpacePages
from primary.pages import bounds_of

KEY = SpaceKey("task", 1)
HIGH = (1 << 47) // PAGE_BYTES
"""The stack is up there."""
NUMBERS = st.one_of(st.integers(0, 24), st.integers(HIGH - 4, HIGH - 1))
PAGES = st.sets(NUMBERS, max_size=12)
CONTENTS = st.dictionaries(NUMBERS, st.integers(0, 3), max_size=12)
"""What pages hold: 0 is a page of zeros."""

Held = dict[int, int | None]
"""None: the page is there and was never read."""


def array(numbers: Iterable[int]) -> NDArray[np.uint64]:
    return np.array(sorted(numbers), dtype=np.uint64)


def identities(contents: Iterable[int]) -> NDArray[np.uint64]:
    """One half alone tells contents apart, now the first, now the second."""
    halves = [(0, 0) if each == 0 else (7, each) if each < 3 else (8, 1) for each in contents]
    return np.array(halves, dtype=np.uint64).reshape(-1, 2)


def put(book: PageBook, contents: dict[int, int]) -> None:
    book.put(array(contents), identities(contents[number] for number in sorted(contents)))


def flags_of(book: PageBook) -> NDArray[np.uint8]:
    return np.full(len(book.numbers), 4, dtype=np.uint8)


class BookAgainstDictionary(RuleBasedStateMachine):
    """Whatever is done to both, they say the same; and tables that were handed out never change."""

    def __init__(self) -> None:
        super().__init__()
        self.book = PageBook(KEY)
        self.held: Held = {}
        self.known: set[int] = set()
        self.tables: list[tuple[SpacePages, NDArray[np.uint64], NDArray[np.uint64]]] = []

    @rule(contents=CONTENTS)
    def put(self, contents: dict[int, int]) -> None:
        put(self.book, contents)
        self.held |= contents
        self.known |= contents.keys()

    @rule(numbers=PAGES)
    def expect(self, numbers: set[int]) -> None:
        self.book.expect(array(numbers))
        self.held = dict.fromkeys(numbers) | self.held

    @rule(numbers=PAGES)
    def forget(self, numbers: set[int]) -> None:
        self.book.forget(array(numbers))
        self.known -= numbers

    @rule(start=NUMBERS, pages=st.integers(0, 20))
    def forget_range(self, start: int, pages: int) -> None:
        self.book.forget_range(start * PAGE_BYTES, (start + pages) * PAGE_BYTES)
        self.known -= set(range(start, start + pages))

    @rule()
    def forget_all(self) -> None:
        self.book.forget_all()
        self.known.clear()

    @rule(present=PAGES)
    def restrict(self, present: set[int]) -> None:
        self.book.restrict(array(present))
        self.held = {number: self.held.get(number) for number in present}
        self.known &= present

    @rule(data=st.data())
    def restrict_to_what_is_there_but_for_one(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from([None, *self.held]))
        present = self.held.keys() - {gone}
        self.book.restrict(array(present))
        self.held = {number: self.held[number] for number in present}
        self.known &= present

    @rule()
    def table(self) -> None:
        table = self.book.table(flags_of(self.book))
        self.tables.append((table, table.numbers.copy(), table.identity.copy()))

    @rule(contents=CONTENTS)
    def differs(self, contents: dict[int, int]) -> None:
        numbers = sorted(contents)
        marks = self.book.differs(array(numbers), identities(contents[number] for number in numbers))
        assert marks.tolist() == [self.held.get(number) != contents[number] for number in numbers]

    @invariant()
    def says_what_the_dictionary_says(self) -> None:
        assert self.book.numbers.tolist() == sorted(self.held)
        assert self.book.numbers.dtype == np.uint64
        assert set(self.book.numbers[self.book.known].tolist()) == self.known
        read = sorted(number for number, held in self.held.items() if held is not None)
        held = identities(content for _, content in sorted(self.held.items()) if content is not None)
        assert np.array_equal(self.book.identity_of(array(read)), held)

    @invariant()
    def known_ranges_are_as_long_as_can_be(self) -> None:
        bounds = self.book.known_bounds.tolist()
        assert all(low < high for low, high in pairwise(bounds))
        ranges = zip(bounds[0::2], bounds[1::2], strict=True)
        covered = [page for low, high in ranges for page in range(low // PAGE_BYTES, high // PAGE_BYTES)]
        assert covered == sorted(self.known)

    @invariant()
    def tables_stay_as_they_were(self) -> None:
        for table, numbers, identity in self.tables:
            assert np.array_equal(table.numbers, numbers)
            assert np.array_equal(table.identity, identity)
            assert len(table.flags) == len(numbers)


TestBookAgainstDictionary = BookAgainstDictionary.TestCase
TestBookAgainstDictionary.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


@pytest.fixture
def book() -> PageBook:
    return PageBook(KEY)


def test_an_empty_book_knows_nothing(book: PageBook) -> None:
    assert book.known_bounds.tolist() == []
    assert book.differs(array([3]), identities([1])).tolist() == [True]
    assert book.differs(array([]), identities([])).tolist() == []
    book.forget(array([1, 2]))
    book.forget_range(0, 1 << 47)
    book.restrict(array([]))
    assert book.table(flags_of(book)).numbers.tolist() == []


def test_a_page_of_zeros_differs_from_one_that_was_never_read(book: PageBook) -> None:
    book.expect(array([5]))
    assert book.differs(array([5]), identities([0])).tolist() == [True]
    put(book, {5: 0})
    assert book.differs(array([5]), identities([0])).tolist() == [False]


def test_a_page_that_vanished_and_came_back_is_new(book: PageBook) -> None:
    put(book, {1: 1, 2: 2})
    book.restrict(array([1]))
    book.restrict(array([1, 2]))
    assert book.known.tolist() == [True, False]
    assert book.differs(array([2]), identities([2])).tolist() == [True]


def test_a_forgotten_page_that_still_holds_the_same_is_known_again_and_unchanged(book: PageBook) -> None:
    put(book, {1: 1})
    book.forget(array([1]))
    assert book.known_bounds.tolist() == []
    assert book.differs(array([1]), identities([1])).tolist() == [False]
    put(book, {1: 1})
    assert book.known_bounds.tolist() == [PAGE_BYTES, 2 * PAGE_BYTES]


def test_a_range_is_forgotten_with_both_its_borders_right(book: PageBook) -> None:
    put(book, {1: 1, 2: 1, 3: 1, 4: 1})
    book.forget_range(2 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert book.known.tolist() == [True, False, False, True]


def test_what_changes_after_a_table_was_taken_is_seen_as_changed_by_who_holds_it(book: PageBook) -> None:
    put(book, {1: 1, 2: 2, 3: 0})
    before = PageTable([book.table(flags_of(book))])
    put(book, {2: 1, 9: 3})
    after = book.table(flags_of(book))
    assert before.changed_rows(after).tolist() == [False, True, False, True]


def test_two_tables_in_a_row_share_what_did_not_change(book: PageBook) -> None:
    put(book, {1: 1, 2: 2})
    one, two = book.table(flags_of(book)), book.table(flags_of(book))
    assert one.identity is two.identity
    put(book, {1: 2})
    three = book.table(flags_of(book))
    assert three.numbers is one.numbers
    assert three.identity is not one.identity


@given(PAGES)
def test_bounds_and_numbers_say_the_same(pages: set[int]) -> None:
    bounds = (bounds_of(array(pages)) // np.uint64(PAGE_BYTES)).astype(int).tolist()
    spans = [range(first, end) for first, end in zip(bounds[0::2], bounds[1::2], strict=True)]
    assert [number for span in spans for number in span] == sorted(pages)
