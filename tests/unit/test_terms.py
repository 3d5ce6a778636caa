"""The guard of terms: what it refuses, and that it knows nothing that was not recorded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StaleTermError
from common.terms import Leadership, TermGuard


def test_older_terms_and_second_leaders_are_refused() -> None:
    guard = TermGuard(lambda workload, leadership: None, {"redis": Leadership(3, "a")})
    guard.check("redis", 3, "a")
    guard.check("redis", 4, "b")
    guard.check("other", 1, "b")
    with pytest.raises(StaleTermError):
        guard.check("redis", 2, "a")
    with pytest.raises(StaleTermError, match="one leader"):
        guard.check("redis", 3, "b")
    assert guard.newest("redis") == Leadership(3, "a")


def test_nothing_is_known_that_could_not_be_recorded() -> None:
    def fail(workload: str, leadership: Leadership) -> None:
        raise OSError("disk full")

    guard = TermGuard(fail)
    with pytest.raises(OSError, match="disk full"):
        guard.advance("redis", 1, "a")
    assert guard.newest("redis") is None


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from("abc"))))
def test_recorded_terms_grow_and_have_one_leader_each(claims: list[tuple[int, str]]) -> None:
    recorded: list[Leadership] = []
    guard = TermGuard(lambda workload, leadership: recorded.append(leadership))
    for term, leader in claims:
        try:
            guard.advance("redis", term, leader)
        except StaleTermError:
            continue
        assert guard.newest("redis") == Leadership(term, leader)
    terms = [leadership.term for leadership in recorded]
    assert terms == sorted(set(terms))
