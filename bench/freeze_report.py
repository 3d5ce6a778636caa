"""What `bench.freeze` prints: made of the epochs that it saw, and shown as a table.

In: what was seen of each epoch. Out: one object a size. All here are values; nothing is measured.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bench.summary import Summary, summarize
from primary.capture import FreezeTimes

SCHEMA_VERSION = 1


class Ours(msgspec.Struct, frozen=True, kw_only=True):
    """The fast backend's epochs."""

    frozen_ms: Summary
    ticker_ms: Summary
    disagreement_ms: float
    epoch_ms: Summary
    precopy_ms: Summary
    abandoned: int
    abandoned_ms: Summary


class Stock(msgspec.Struct, frozen=True, kw_only=True):
    """The stock backend's epochs."""

    n: int
    frozen_ms: Summary
    ticker_ms: Summary


class Breakdown(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of the parts of a freeze."""

    freezing: float
    criu: float
    tcp_walk: float
    final_copy: float


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of what an epoch is about."""

    present: float
    dirty_at_freeze: float
    changed: float


class FirstWrite(msgspec.Struct, frozen=True, kw_only=True):
    """What the workload pays for being tracked, as it measures that itself."""

    protected: float
    unprotected: float


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """Epochs with another number of pages written before each freeze."""

    written: int
    dirty_at_freeze: float
    frozen_ms: Summary
    final_copy_ms: float


class FreezeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One size."""

    schema_version: int
    benchmark: str
    kernel: str
    cpus: int
    rss_mib: int
    shared_mib: int
    processes: int
    threads: int
    dirty_pages: int
    epochs: int
    tracker: str
    ours: Ours
    stock: Stock
    ratio_p50: float | None
    breakdown_ms: Breakdown
    pages: Pages
    levels: tuple[Level, ...]
    us_per_dirty_page: float | None
    first_write_ns: FirstWrite
    injection_us: Summary
    first_epoch_ms: float
    first_frozen_ms: float
    agent_rss_bytes: int
    first_image_bytes: int
    image_bytes: int


class SweptReport(msgspec.Struct, frozen=True, kw_only=True):
    """Several sizes, one after the other."""

    schema_version: int
    benchmark: str
    kernel: str
    cpus: int
    sizes: tuple[FreezeReport, ...]
    growth: float


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured of each size."""

    dirty_pages: int = 1000
    epochs: int = 30
    stock_epochs: int = 3
    processes: int = 1
    threads: int = 1
    shared_mib: int = 0
    verify_epochs: int = 500
    levels: tuple[int, ...] = (0, 1000, 5000)
    level_epochs: int = 10


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was seen of one epoch."""

    freeze: FreezeTimes
    ticker_ms: float
    abandoned_ms: tuple[float, ...]
    """The ticker's gaps in attempts that came to nothing."""
    epoch_ms: float
    precopy_ms: float
    present: int
    dirty: int
    changed: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen of one size."""

    first: Epoch
    ours: list[Epoch]
    levels: list[tuple[int, list[Epoch]]]
    stock: list[Epoch]
    first_write_ns: FirstWrite
    injections_us: list[float]
    tcp_walks_ms: list[float]
    agent_rss_bytes: int


def report(rss_mib: int, options: Options, seen: Seen) -> FreezeReport:
    """Sum one size up."""
    first, ours, stock = seen.first, seen.ours, seen.stock
    frozen, stock_frozen = _frozen_ms(ours), _frozen_ms(stock)
    abandoned = [value for each in ours for value in each.abandoned_ms]
    told = tuple(_level(written, epochs) for written, epochs in seen.levels)
    return FreezeReport(
        schema_version=SCHEMA_VERSION,
        benchmark="freeze",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        rss_mib=rss_mib,
        shared_mib=options.shared_mib,
        processes=options.processes,
        threads=options.threads,
        dirty_pages=options.dirty_pages,
        epochs=len(ours),
        tracker="userfaultfd",
        ours=Ours(
            frozen_ms=frozen,
            ticker_ms=summarize([each.ticker_ms for each in ours]),
            disagreement_ms=round(max(abs(each.freeze.total_ms - each.ticker_ms) for each in ours), 3),
            epoch_ms=summarize([each.epoch_ms for each in ours]),
            precopy_ms=summarize([each.precopy_ms for each in ours]),
            abandoned=len(abandoned),
            abandoned_ms=summarize(abandoned),
        ),
        stock=Stock(
            n=len(stock), frozen_ms=stock_frozen, ticker_ms=summarize([each.ticker_ms for each in stock])
        ),
        ratio_p50=round(frozen.p50 / stock_frozen.p50, 5) if stock else None,
        breakdown_ms=Breakdown(
            freezing=_median([each.freeze.freezing_ms for each in ours]),
            criu=_median([each.freeze.frozen_ms - each.freeze.hook_ms for each in ours]),
            tcp_walk=_median(seen.tcp_walks_ms),
            final_copy=_median([each.freeze.hook_ms for each in ours]),
        ),
        pages=Pages(
            present=_median([each.present for each in ours]),
            dirty_at_freeze=_median([each.dirty for each in ours]),
            changed=_median([each.changed for each in ours]),
        ),
        levels=told,
        us_per_dirty_page=_us_per_dirty_page(told),
        first_write_ns=seen.first_write_ns,
        injection_us=summarize(seen.injections_us),
        first_epoch_ms=round(first.epoch_ms, 3),
        first_frozen_ms=round(first.freeze.total_ms, 3),
        agent_rss_bytes=seen.agent_rss_bytes,
        first_image_bytes=first.image_bytes,
        image_bytes=max(each.image_bytes for each in ours),
    )


def _level(written: int, epochs: list[Epoch]) -> Level:
    return Level(
        written=written,
        dirty_at_freeze=_median([each.dirty for each in epochs]),
        frozen_ms=_frozen_ms(epochs),
        final_copy_ms=_median([each.freeze.hook_ms for each in epochs]),
    )


def _us_per_dirty_page(levels: Sequence[Level]) -> float | None:
    """Fit a line through the levels' medians; None if there are not two."""
    dirty = [level.dirty_at_freeze for level in levels]
    if len(set(dirty)) < 2:
        return None
    slope, _ = np.polyfit(dirty, [level.frozen_ms.p50 for level in levels], 1)
    return round(float(slope) * 1000, 3)


def _frozen_ms(epochs: Sequence[Epoch]) -> Summary:
    return summarize([each.freeze.total_ms for each in epochs])


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def swept(sizes: Sequence[FreezeReport]) -> SweptReport:
    """Put several sizes together, ascending."""
    return SweptReport(
        schema_version=SCHEMA_VERSION,
        benchmark="freeze",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        sizes=tuple(sizes),
        growth=round(sizes[-1].ours.frozen_ms.p50 / sizes[0].ours.frozen_ms.p50, 3),
    )


def print_table(reports: Sequence[FreezeReport]) -> None:
    """Show one line a size."""
    print("     RSS   dirty   frozen p50 (iqr, p99)    ticker p50    stock p50   ours/stock   us/dirty page")
    for each in reports:
        frozen, per_page = each.ours.frozen_ms, each.us_per_dirty_page
        print(
            f"{each.rss_mib:>4} MiB {each.pages.dirty_at_freeze:>7.0f} {frozen.p50:>9.1f} ms "
            f"({frozen.iqr:.1f}, {frozen.p99:.1f}) {each.ours.ticker_ms.p50:>11.1f} ms "
            f"{each.stock.frozen_ms.p50:>9.1f} ms {_shown(each.ratio_p50, '.2%'):>11} "
            f"{_shown(per_page, '.2f'):>13}"
        )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
