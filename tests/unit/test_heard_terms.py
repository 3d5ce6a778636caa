"""What the agent remembers of terms: it survives restarts, and damage is an error, never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StaleTermError, StoreError
from common.terms import Leadership, TermGuard
from outlive.heard_terms import HeardTerms


def guard(directory: Path) -> TermGuard:
    """A guard as the agent makes it at its start."""
    heard = HeardTerms(directory)
    return TermGuard(heard.record, heard.read_all())


def test_nothing_is_remembered_before_the_first_term(tmp_path: Path) -> None:
    assert HeardTerms(tmp_path / "missing").read_all() == {}


def test_the_newest_leadership_of_each_workload_is_read_back(tmp_path: Path) -> None:
    heard = HeardTerms(tmp_path / "made" / "on-demand")
    heard.record("redis", Leadership(1, "a"))
    heard.record("web", Leadership(7, "c"))
    heard.record("redis", Leadership(2, "b"))
    found = HeardTerms(tmp_path / "made" / "on-demand").read_all()
    assert found == {"redis": Leadership(2, "b"), "web": Leadership(7, "c")}


def test_what_was_refused_before_a_restart_is_refused_after_it(tmp_path: Path) -> None:
    guard(tmp_path).advance("redis", 3, "b")
    again = guard(tmp_path)
    with pytest.raises(StaleTermError):
        again.check("redis", 2, "a")
    with pytest.raises(StaleTermError):
        again.check("redis", 3, "a")
    again.check("redis", 3, "b")
    again.check("redis", 4, "a")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"term": "x", "leader": "a"}', b'{"term": 1'])
def test_a_damaged_file_is_an_error_that_says_what_to_write(tmp_path: Path, content: bytes) -> None:
    HeardTerms(tmp_path).record("web", Leadership(1, "a"))
    (tmp_path / "redis.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"redis\.json") as raised:
        HeardTerms(tmp_path).read_all()
    assert "term" in raised.value.hint


def test_what_cannot_be_recorded_is_not_known_either(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    terms = TermGuard(HeardTerms(tmp_path / "file").record)
    with pytest.raises((StoreError, OSError)):
        terms.advance("redis", 1, "a")
    assert terms.newest("redis") is None
