"""Rounds of verification: every page in its turn, whatever comes and goes; and what is told of a mismatch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.criu.images import SpaceKey
from common.events import Event, EventLog, read_events
from common.model import EpochId
from outlive.verifying import Verifier
from primary.page_set import PageSet
from primary.verification import (
    HURRIED_PAGES,
    LEAST_PAGES,
    MOST_PAGES,
    Mismatch,
    Slice,
    Verification,
    different,
)

TASK, OTHER, SEGMENT = SpaceKey("task", 5), SpaceKey("task", 1), SpaceKey("shmem", 7)


def numbers(*parts: range) -> np.ndarray:
    return np.array([number for part in parts for number in part], dtype=np.uint64)


def sets_of(spaces: dict[SpaceKey, np.ndarray]) -> Callable[[], dict[SpaceKey, PageSet]]:
    return lambda: {key: PageSet.of(each) for key, each in spaces.items()}


def visited(slices: tuple[Slice, ...], spaces: dict[SpaceKey, np.ndarray]) -> dict[SpaceKey, set[int]]:
    """Which pages of the spaces, as they are now, the slices have."""
    return {
        each.key: set(each.within(PageSet.of(spaces[each.key])).tolist())
        for each in slices
        if each.key in spaces
    }


def look(verification: Verification, spaces: dict[SpaceKey, np.ndarray]) -> dict[SpaceKey, set[int]]:
    found = visited(verification.plan(sets_of(spaces)), spaces)
    verification.looked_at(sum(map(len, found.values())))
    return found


def test_a_round_visits_each_page_once_in_order_of_the_spaces() -> None:
    spaces = {
        TASK: numbers(range(100, 300), range(1000, 1100)),
        OTHER: numbers(range(40, 90)),
        SEGMENT: numbers(range(130)),
    }
    verification = Verification(500)
    seen: list[tuple[SpaceKey, int]] = []
    while not verification.rounds:
        for key, pages in look(verification, spaces).items():
            seen += [(key, page) for page in sorted(pages)]
    everything = [(key, int(page)) for key in sorted(spaces) for page in spaces[key]]
    assert seen == everything
    assert verification.pages_compared == len(everything)
    assert verification.ended_wall_s is not None


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(0, 3_000),
    st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4_000)), max_size=4), max_size=20),
    st.integers(0, 40),
)
def test_every_page_of_a_stable_space_is_visited_within_a_round(
    length: int, pages: int, others: list[list[tuple[int, int]]], delay: int
) -> None:
    """Other processes come, go and grow at each epoch; the round is of 500 epochs by default."""
    stable = SpaceKey("task", 20)
    gaps = numbers(range(0, pages, 1)) * np.uint64(3) // np.uint64(2)
    verification = Verification(length)
    missing: set[int] = set()
    epochs = 0
    for epoch in range(delay + 3 * length):
        alive = others[epoch % len(others)] if others else []
        spaces = {SpaceKey("task", ident): numbers(range(size)) for ident, size in alive if ident != 20}
        spaces[stable] = gaps
        if verification.pages_due == 0:
            assert not missing, "a round ended without them"
            missing, epochs = set(gaps.tolist()), 0
        missing -= look(verification, spaces).get(stable, set())
        epochs += 1
        assert epochs <= max(length, 2)  # four spaces of 4,000 pages are more than one slice may have


def test_slices_are_even_so_that_no_freeze_is_longer_than_the_others() -> None:
    spaces = {TASK: numbers(range(524_288))}  # 2 GiB
    verification = Verification(500)
    sizes = []
    while not verification.rounds:
        sizes.append(len(look(verification, spaces)[TASK]))
    assert len(sizes) == 500
    assert max(sizes) == 1049
    assert sum(sizes) == 524_288


def test_a_small_workload_is_through_in_no_time_and_a_huge_one_has_bounded_slices() -> None:
    verification = Verification(500)
    spaces = {TASK: numbers(range(10 * LEAST_PAGES))}
    for _ in range(10):
        assert not verification.rounds
        look(verification, spaces)
    assert verification.rounds == 1
    huge = Verification(2)
    planned = huge.plan(sets_of({TASK: numbers(range(3 * MOST_PAGES))}))
    assert sum(each.pages for each in planned) == MOST_PAGES


def test_what_is_gone_is_passed_over_and_what_came_waits_for_the_next_round() -> None:
    verification = Verification(4)
    before = {OTHER: numbers(range(100)), TASK: numbers(range(300))}
    look(verification, before)
    after = {TASK: numbers(range(200, 400)), SEGMENT: numbers(range(10))}
    seen: set[int] = set()
    while not verification.rounds:
        seen |= look(verification, after).get(TASK, set())
    assert seen == set(range(200, 300))
    seen = set()
    while verification.rounds < 2:
        found = look(verification, after)
        seen |= found.get(TASK, set())
    assert seen == set(range(200, 400))


def test_a_slice_is_due_until_it_was_looked_at() -> None:
    verification = Verification(10)
    spaces = {TASK: numbers(range(1000))}
    first = verification.plan(sets_of(spaces))
    again = verification.plan(sets_of(spaces))
    assert [each.bounds.tolist() for each in first] == [each.bounds.tolist() for each in again]
    assert verification.pages_done == 0


def test_a_hurried_round_begins_anew_and_takes_large_slices() -> None:
    verification = Verification(500)
    spaces = {TASK: numbers(range(2 * HURRIED_PAGES + 1))}
    look(verification, spaces)
    planned = verification.plan(sets_of(spaces))
    verification.hurry()
    verification.looked_at(planned[0].pages)  # of the old round: not to be taken for one of the new
    seen: set[int] = set()
    for _ in range(3):
        assert not verification.rounds
        seen |= look(verification, spaces)[TASK]
    assert verification.rounds == 1
    assert seen == set(range(2 * HURRIED_PAGES + 1))
    assert sum(each.pages for each in verification.plan(sets_of(spaces))) == LEAST_PAGES, "it hurries no more"


def test_a_round_that_would_have_ended_does_not_count_once_somebody_hurries() -> None:
    verification = Verification(1)
    spaces = {TASK: numbers(range(10))}
    verification.plan(sets_of(spaces))
    verification.hurry()
    verification.looked_at(10)
    assert verification.rounds == 0
    look(verification, spaces)
    assert verification.rounds == 1


def test_switched_off_nothing_is_due_unless_somebody_hurries() -> None:
    verification = Verification(0)
    spaces = {TASK: numbers(range(10))}
    assert verification.plan(sets_of(spaces)) == ()
    verification.hurry()
    assert look(verification, spaces) == {TASK: set(range(10))}
    assert verification.rounds == 1
    assert verification.plan(sets_of(spaces)) == ()


def test_without_pages_there_is_no_round() -> None:
    verification = Verification(500)
    assert look(verification, {}) == {}
    assert verification.rounds == 0
    assert look(verification, {TASK: numbers(range(5))}) == {TASK: set(range(5))}
    assert verification.rounds == 1


def identities(*values: int) -> np.ndarray:
    return np.array([(value, value) for value in values], dtype=np.uint64).reshape(-1, 2)


@pytest.mark.parametrize(
    ("told", "told_identity", "expected"),
    [
        (numbers(range(3, 6)), identities(3, 4, 5), [False, False, False]),
        (numbers(range(2, 9)), identities(2, 3, 4, 5, 6, 7, 8), [False, False, False]),
        (numbers(range(3, 6)), identities(3, 44, 5), [False, True, False]),
        (numbers(range(3, 5)), identities(3, 4), [False, False, True]),
        (numbers(range(4, 6)), identities(4, 5), [True, False, False]),
        (numbers(range(0)), identities(), [True, True, True]),
    ],
    ids=["the same", "more", "another content", "the last is missing", "the first is missing", "nothing"],
)
def test_a_page_that_is_missing_or_has_another_content_is_different(
    told: np.ndarray, told_identity: np.ndarray, expected: list[bool]
) -> None:
    assert different(numbers(range(3, 6)), identities(3, 4, 5), told, told_identity).tolist() == expected


def test_a_neighbour_with_the_same_content_is_another_page() -> None:
    zeros = identities(0, 0)
    marks = different(numbers(range(3, 5)), zeros, numbers(range(4, 6)), zeros)
    assert marks.tolist() == [True, False]


def test_one_word_of_an_identity_is_enough_to_differ() -> None:
    other = identities(3)
    other[0, 1] = 4
    assert different(numbers(range(1)), identities(3), numbers(range(1)), other).tolist() == [True]


# --- what is told -----------------------------------------------------------------------------------


def test_a_mismatch_is_an_event_that_names_process_pages_and_epoch(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl", "agent")
    verifier = Verifier("redis", 500, events)
    verifier.memory.found(Mismatch("", EpochId(2, 7), TASK, numbers(range(16, 18)), pid=4711))
    verifier.store_of("b").found(Mismatch("b", EpochId(2, 8), SEGMENT, numbers(range(16, 36))))
    events.close()
    memory, store = read_events(tmp_path / "events.jsonl")
    assert memory.event == store.event == Event.VERIFY_MISMATCH
    assert "2 pages of task 5 (PID 4711) at 0x10000, 0x11000 changed unseen before t2-e7" in memory.reason
    assert (memory.fields["pid"], memory.fields["address"], memory.fields["pages"]) == (4711, "0x10000", 2)
    assert store.reason.startswith("b has stored 20 pages of shmem 7 at 0x10000, ")
    assert "…" in store.reason
    assert store.fields["replica"] == "b"
    memory_now, store_now = verifier.progress(with_memory=True)
    assert (memory_now.pages_different, store_now.pages_different) == (2, 20)
    assert [each.replica for each in verifier.progress(with_memory=False)] == ["b"]
