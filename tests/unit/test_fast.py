"""The fast backend's decisions that need no frozen process."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from primary.fast import room_after

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
