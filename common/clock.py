"""Time, passed in. Deadlines use the monotonic reading; the wall reading is for display only."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the rest of the code asks for the time."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def wall_s(self) -> float:
        """Seconds since the Unix epoch, for people to read; may jump."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        """Return CLOCK_MONOTONIC in seconds."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return CLOCK_REALTIME in seconds."""
        return time.time()


class ManualClock:
    """A clock that stands still until it is told to move; for tests and the simulator."""

    def __init__(self, monotonic_s: float = 0.0, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

    def monotonic_s(self) -> float:
        """Return the simulated monotonic reading in seconds."""
        return self._monotonic_s

    def wall_s(self) -> float:
        """Return the simulated wall reading in seconds."""
        return self._wall_s

    def advance(self, seconds: float) -> None:
        """Move both readings forward by `seconds` (not negative)."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back")
        self._monotonic_s += seconds
        self._wall_s += seconds
