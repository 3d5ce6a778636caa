"""A bound on bytes a second, as the time that whoever moves them has to wait.

In: sizes and the time. Out: seconds to wait. Pure: the waiting itself is the caller's, in a thread or in the
event loop. After a pause there is at most `BURST_S` worth of bytes to catch up with, so that a bound over
seconds is one over tenths of seconds too.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.1


class RateLimit:
    """At most `bytes_per_s` on the average; 0 for no bound. Not for several threads at once."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s: float | None = None

    def take(self, size_bytes: int, now_s: float) -> float:
        """Count bytes that are moved now; return how long to wait before the next ones are."""
        if not self._bytes_per_s:
            return 0.0
        earliest_s = now_s - BURST_S
        free_at_s = max(earliest_s, self._free_at_s if self._free_at_s is not None else earliest_s)
        self._free_at_s = free_at_s + size_bytes / self._bytes_per_s
        return max(0.0, self._free_at_s - now_s)
