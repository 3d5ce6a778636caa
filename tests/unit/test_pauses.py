"""Pauses: nodes agree whatever they hear in whatever order, and a resume ends what it knew and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.pauses import (
    BY_CHARACTERS,
    Pause,
    Pauses,
    cover,
    in_force,
    joined,
    told,
    with_pause,
    without_pauses,
)

PAUSE = st.builds(
    Pause,
    node=st.sampled_from(["a", "b", "c"]),
    number=st.integers(1, 3),
    by=st.sampled_from(["root", "eve"]),
    since_wall_s=st.sampled_from([1e9, 2e9]),
    lifted_by=st.sampled_from(["", "root on a", "root on b"]),
)
PAUSES = st.lists(PAUSE, max_size=4).map(lambda pauses: joined((), tuple(pauses)))


@given(PAUSES, PAUSES, PAUSES)
def test_what_nodes_know_in_the_end_does_not_depend_on_what_they_heard_first(
    one: Pauses, other: Pauses, third: Pauses
) -> None:
    assert joined(one, other) == joined(other, one)
    assert joined(joined(one, other), third) == joined(one, joined(other, third))
    assert joined(one, one) == one
    assert cover(joined(one, other), one)


@given(PAUSES)
def test_a_resume_ends_all_that_was_known_and_nothing_ends_it_but_another_pause(known: Pauses) -> None:
    after = without_pauses(known, "b", "root")
    assert in_force(after) == ()
    assert in_force(joined(known, after)) == ()
    assert [pause.node for pause in in_force(with_pause(after, "a", "root", 3e9))] == ["a"]


@given(PAUSES, st.sampled_from(["a", "b", "c"]), st.sampled_from(["a", "b", "c"]))
def test_of_a_pause_and_a_resume_that_did_not_know_each_other_the_pause_stays(
    known: Pauses, here: str, there: str
) -> None:
    resumed = without_pauses(known, there, "root")
    paused = with_pause(without_pauses(known, here, "root"), here, "root", 3e9)
    assert [pause.node for pause in in_force(joined(paused, resumed))] == [here]


def test_a_second_pause_at_the_same_node_is_the_first_one() -> None:
    first = with_pause((), "a", "root", 1e9)
    assert with_pause(first, "a", "eve", 2e9) == first
    assert told(first) == "paused by root on a since 2001-09-09 01:46:40 UTC"
    both = with_pause(first, "b", "eve", 2e9)
    assert [(pause.node, pause.by) for pause in in_force(both)] == [("a", "root"), ("b", "eve")]


def test_who_knows_only_the_pause_does_not_know_that_it_is_lifted() -> None:
    paused = with_pause((), "a", "root", 1e9)
    resumed = without_pauses(paused, "b", "root")
    assert resumed[0].lifted_by == "root on b"
    assert cover(resumed, paused)
    assert not cover(paused, resumed)
    assert not cover((), paused)
    assert cover((), ())
    assert cover(with_pause(resumed, "a", "root", 2e9), resumed)


def test_whoever_asks_has_a_name_that_fits_every_heartbeat() -> None:
    (pause,) = without_pauses(with_pause((), "a", "x" * 10_000, 1e9), "b", "y" * 10_000)
    assert len(pause.by) == BY_CHARACTERS
    assert len(pause.lifted_by) < 2 * BY_CHARACTERS
