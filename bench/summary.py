"""How a series of measurements is told: its median and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """Of `n` values: median, the quartiles' distance, 99th percentile, largest. Same unit as the values."""

    n: int
    p50: float
    iqr: float
    p99: float
    max: float


def summarize(values: Sequence[float]) -> Summary:
    """Summarize a series; all zeros if it is empty."""
    if not values:
        return Summary(0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    at = max(0, -(-len(ordered) * 99 // 100) - 1)
    return Summary(
        len(ordered),
        round(statistics.median(ordered), 3),
        round(high - low, 3),
        round(ordered[at], 3),
        round(ordered[-1], 3),
    )
