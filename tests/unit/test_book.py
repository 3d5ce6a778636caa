"""The book of pages against a plain model: a dictionary from page numbers to what each holds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from common.criu.images import PE_LAZY, SpaceKey
from common.model import PAGE_BYTES
from primary.book import PageBook
from primary.capture import PageTable, SpacePages
from primary.page_set import PageSet

KEY = SpaceKey("task", 1)
HIGH = (1 << 47) // PAGE_BYTES
"""The stack is up there."""
NUMBERS = st.one_of(st.integers(0, 24), st.integers(60, 68), st.integers(HIGH - 4, HIGH - 1))
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


def pages(*numbers: int) -> PageSet:
    return PageSet.of(array(numbers))


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
        self.book.expect(pages(*numbers))
        self.held = dict.fromkeys(numbers) | self.held

    @rule(numbers=PAGES)
    def forget(self, numbers: set[int]) -> None:
        self.book.forget(pages(*numbers))
        self.known -= numbers

    @rule(start=NUMBERS, count=st.integers(0, 20))
    def forget_range(self, start: int, count: int) -> None:
        self.book.forget_range(start * PAGE_BYTES, (start + count) * PAGE_BYTES)
        self.known -= set(range(start, start + count))

    @rule()
    def forget_all(self) -> None:
        self.book.forget_all()
        self.known.clear()

    @rule(present=PAGES)
    def restrict(self, present: set[int]) -> None:
        self.book.restrict(pages(*present))
        self.held = {number: self.held.get(number) for number in present}
        self.known &= present

    @rule(data=st.data())
    def restrict_to_what_is_there_but_for_one(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from([None, *self.held]))
        present = self.held.keys() - {gone}
        self.book.restrict(pages(*present))
        self.held = {number: self.held[number] for number in present}
        self.known &= present

    @rule(lazy=PAGES)
    def table(self, lazy: set[int]) -> None:
        table = self.book.table(pages(*(lazy & self.held.keys())))
        assert [flags & PE_LAZY != 0 for flags in table.flags] == [n in lazy for n in sorted(self.held)]
        self.tables.append((table, table.numbers, table.identity))

    @rule(contents=CONTENTS)
    def differs(self, contents: dict[int, int]) -> None:
        numbers = sorted(contents)
        marks = self.book.differs(array(numbers), identities(contents[number] for number in numbers))
        assert marks.tolist() == [self.held.get(number) != contents[number] for number in numbers]

    @invariant()
    def says_what_the_dictionary_says(self) -> None:
        assert self.book.pages.numbers.tolist() == sorted(self.held)
        assert self.book.known.numbers.tolist() == sorted(self.known)
        assert self.book.unknown.numbers.tolist() == sorted(self.held.keys() - self.known)
        assert self.book.is_known == (self.held.keys() == self.known)
        assert self.book.knows(array(self.held)).tolist() == [n in self.known for n in sorted(self.held)]
        zeros = sorted(number for number, held in self.held.items() if held == 0)
        assert self.book.zeros(self.book.pages).numbers.tolist() == zeros
        read = sorted(number for number, held in self.held.items() if held is not None)
        held = identities(content for _, content in sorted(self.held.items()) if content is not None)
        assert np.array_equal(self.book.identity_of(array(read)), held)

    @invariant()
    def tables_stay_as_they_were(self) -> None:
        for table, numbers, identity in self.tables:
            assert np.array_equal(table.numbers, numbers)
            assert np.array_equal(table.identity, identity)
            assert len(table.flags) == len(numbers)

    @invariant()
    def tables_differ_in_what_the_arrays_differ_in(self) -> None:
        now = self.book.table(pages())
        held = dict(zip(now.numbers.tolist(), now.identity.tolist(), strict=True))
        for table, numbers, identity in self.tables:
            then = dict(zip(numbers.tolist(), identity.tolist(), strict=True))
            changed = [number for number in sorted(held) if then.get(number) != held[number]]
            assert PageTable([table]).changed(now).numbers.tolist() == changed
            gone = [number for number in sorted(then) if held.get(number) != then[number]]
            assert PageTable([now]).changed(table).numbers.tolist() == gone


TestBookAgainstDictionary = BookAgainstDictionary.TestCase
TestBookAgainstDictionary.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


@pytest.fixture
def book() -> PageBook:
    return PageBook(KEY)


def test_an_empty_book_knows_nothing(book: PageBook) -> None:
    assert len(book.known) == 0
    assert book.is_known
    assert book.differs(array([3]), identities([1])).tolist() == [True]
    assert book.differs(array([]), identities([])).tolist() == []
    book.forget(pages(1, 2))
    book.forget_range(0, 1 << 47)
    book.forget_range(PAGE_BYTES, PAGE_BYTES)
    book.restrict(pages())
    assert book.table(pages()).numbers.tolist() == []


def test_a_page_of_zeros_differs_from_one_that_was_never_read(book: PageBook) -> None:
    book.expect(pages(5))
    assert book.differs(array([5]), identities([0])).tolist() == [True]
    put(book, {5: 0})
    assert book.differs(array([5]), identities([0])).tolist() == [False]


def test_a_page_that_vanished_and_came_back_is_new(book: PageBook) -> None:
    put(book, {1: 1, 2: 2})
    book.restrict(pages(1))
    book.restrict(pages(1, 2))
    assert book.known == pages(1)
    assert book.differs(array([2]), identities([2])).tolist() == [True]


def test_a_forgotten_page_that_still_holds_the_same_is_known_again_and_unchanged(book: PageBook) -> None:
    put(book, {1: 1})
    book.forget(pages(1))
    assert book.known == pages()
    assert book.differs(array([1]), identities([1])).tolist() == [False]
    put(book, {1: 1})
    assert book.known == pages(1)


def test_a_range_is_forgotten_with_both_its_borders_right(book: PageBook) -> None:
    put(book, {1: 1, 2: 1, 3: 1, 4: 1})
    book.forget_range(2 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert book.known == pages(1, 4)


def test_what_changes_after_a_table_was_taken_is_seen_as_changed_by_who_holds_it(book: PageBook) -> None:
    put(book, {1: 1, 2: 2, 3: 0})
    before = PageTable([book.table(pages())])
    put(book, {2: 1, 9: 3})
    assert before.changed(book.table(pages())) == pages(2, 9)


def test_a_table_stays_as_it_is_when_contents_change_and_no_page_comes_or_goes(book: PageBook) -> None:
    put(book, {1: 1, 2: 2})
    table = book.table(pages())
    put(book, {2: 9})
    assert np.array_equal(table.identity, identities([1, 2]))
    assert PageTable([table]).changed(book.table(pages())) == pages(2)


def test_two_tables_share_what_did_not_change(book: PageBook) -> None:
    put(book, dict.fromkeys(range(200), 1))
    one, two = book.table(pages()), book.table(pages())
    assert one.identities is two.identities
    put(book, {70: 2, 130: 1, 1000: 1})
    three = book.table(pages())
    before = {id(block) for block in one.identities._blocks}
    shared = [id(block) in before for block in three.identities._blocks]
    assert shared == [True, False, True, True, False], "that of page 130 holds what it did"


def test_what_was_not_read_takes_next_to_nothing(book: PageBook) -> None:
    book.expect(PageSet(np.array([64, 64 * 101], dtype=np.uint64)))
    assert len({id(block) for block in book.table(pages()).identities._blocks}) == 1
    put(book, {64: 1})
    assert len({id(block) for block in book.table(pages()).identities._blocks}) == 2
