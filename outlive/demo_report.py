"""What the demonstration reports: the one object that `outlive demo --output json` prints.

`docs/reference/benchmarks.md` has its fields in words.
"""

from __future__ import annotations

import msgspec

from common.control import TimelineEntry

SCHEMA_VERSION = 1


class IntervalSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Time between the freezes of committed epochs."""

    configured: float
    p50: float
    max: float


class FreezeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How long the workload stood still for an epoch."""

    p50: float
    p99: float
    max: float


class WriteSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the writes that were acknowledged to the client before the power went."""

    acknowledged: int
    present: int
    lost: int
    lost_window_ms: float
    """From the restored epoch's freeze to the last acknowledged write that is gone; 0 if none is."""


class ByteSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What went over the wire, against the same epochs sent whole."""

    sent: int
    full_equivalent: int


class EpochName(msgspec.Struct, frozen=True):
    """An epoch, spelled out for readers of JSON."""

    term: int
    epoch: int


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """What happened, in numbers."""

    schema_version: int
    workload: tuple[str, ...]
    rss_bytes: int
    epochs_committed: int
    epoch_interval_ms: IntervalSummary
    freeze_ms: FreezeSummary
    restored: EpochName | None
    survived: bool
    reason: str
    """Why it survived or not, in a sentence."""
    checked: tuple[str, ...]
    """What the verdict rests on, one observation each."""
    not_checked: tuple[str, ...]
    """What nobody looked at."""
    writes: WriteSummary | None
    """None for a workload of the user's own: no client knows what it should answer."""
    outage_ms: float | None
    timeline: tuple[TimelineEntry, ...]
    bytes: ByteSummary
