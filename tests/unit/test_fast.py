"""The fast backend's decisions that need no frozen process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CaptureError
from primary.fast import FastBackend, room_after

MOST_ASKED = 8192
LEAST = 2048


class TestRoomAfterAFreeze:
    def test_halves_in_44_epochs_that_need_little(self) -> None:
        room = MOST_ASKED
        for _ in range(45):
            room = room_after(room, 100, copies_ahead=True)
        assert room < MOST_ASKED // 2
        for _ in range(200):
            room = room_after(room, 100, copies_ahead=True)
        assert room == LEAST

    def test_is_what_every_freeze_needs_where_nothing_is_copied_ahead(self) -> None:
        room = room_after(LEAST, 100_000, copies_ahead=False)
        assert room == 100_000
        assert room_after(room, 10, copies_ahead=False) == 100_000

    @given(st.integers(LEAST, MOST_ASKED), st.integers(0, 131_072))
    def test_is_twice_what_was_dirty_within_what_is_copied_without_a_second_thought(
        self, room: int, dirty: int
    ) -> None:
        after = room_after(room, dirty, copies_ahead=True)
        assert LEAST <= after <= MOST_ASKED
        assert after >= min(2 * dirty, MOST_ASKED)
        assert after >= min(room, LEAST)


class _Copied:
    """A process that was copied early, in a state as proc(5) has it, and what became of its copies."""

    is_same = True
    space = SimpleNamespace(early=object())

    def __init__(self, state: str) -> None:
        self.state = state
        self.told: list[str] = []

    def doubt_early(self) -> None:
        self.told.append("in doubt")

    def keep_early(self, *_: object) -> None:
        self.told.append("kept")

    def not_taken(self) -> None:
        pass


class TestWhatWasCopiedEarly:
    """Of a process that ran meanwhile it is not kept: a system call may have written to it unseen."""

    def freeze(self, processes: list[_Copied], *, taken: list[_Copied]) -> Any:
        backend = cast(Any, FastBackend.__new__(FastBackend))
        backend._processes = dict(enumerate(processes))
        backend._call = SimpleNamespace(run_early=lambda spaces, room: None)
        backend._room_pages = LEAST
        backend._hasher = backend._writer = backend._buffer = object()
        backend._wants_all, backend._chain = False, None
        backend._take_early()
        backend._taken = taken
        return backend

    def test_is_kept_after_a_failure_of_who_was_in_criu_s_hands_to_the_end_of_it(self) -> None:
        held, runs, never_held = _Copied("t"), _Copied("S"), _Copied("t")
        self.freeze([held, runs, never_held], taken=[held, runs])._after_failure()
        assert held.told == ["in doubt", "kept"]
        assert runs.told == never_held.told == ["in doubt"]

    def test_is_kept_after_a_success_of_those_that_criu_dumped(self) -> None:
        dumped, beside = _Copied("t"), _Copied("S")
        backend = self.freeze([dumped, beside], taken=[dumped])
        backend._keep_early(backend._not_taken())
        assert (dumped.told, beside.told) == (["in doubt", "kept"], ["in doubt"])
        assert backend._early == []


class TestWhoDidNotStandStill:
    """Of a process that was killed in the freeze no memory is there: it looks like one that has none."""

    @pytest.mark.parametrize("protects", [True, False])
    @pytest.mark.parametrize("state", ["S", "R", "X", "Z"])
    def test_costs_the_epoch_whatever_tracks_it(self, state: str, protects: bool) -> None:
        backend = cast(Any, FastBackend.__new__(FastBackend))
        held, other = _Stopped(1, "t", protects), _Stopped(2, state, protects)
        backend._taken = [held, other]
        with pytest.raises(CaptureError, match=f"2 .in state {state}."):
            backend._see_that_all_stood_still()
        assert held.forgotten == other.forgotten == protects, "its bits were cleared, and a write may be lost"

    def test_costs_nothing_if_all_did(self) -> None:
        backend = cast(Any, FastBackend.__new__(FastBackend))
        backend._taken = [_Stopped(1, "t", True), _Stopped(2, "T", False)]
        backend._see_that_all_stood_still()
        assert not any(each.forgotten for each in backend._taken)


class _Stopped:
    """A process in a state as proc(5) has it, and whether it was held for doubtful."""

    def __init__(self, pid: int, state: str, protects: bool) -> None:
        self.pid, self.state, self.forgotten = pid, state, False
        self.space = SimpleNamespace(protects=protects)

    def forget_all(self) -> None:
        self.forgotten = True
