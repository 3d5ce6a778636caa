"""What `bench.files` prints: made of the epochs that it saw, and shown as a table.

In: what was seen of each epoch. Out: one object for each case on each file system. All here are values;
nothing is measured.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from bench.files_ends import Brought, Synced
from bench.files_site import FileSystem
from bench.summary import Summary, summarize

SCHEMA_VERSION = 1

Case = Literal["small", "nothing", "blocks", "log"]

CASES: Final[tuple[Case, ...]] = ("small", "nothing", "blocks", "log")

_MOST_ADDED_MS: Final[dict[tuple[FileSystem, Case], float]] = {
    ("xfs", "small"): 10.0,
    ("ext4", "small"): 10.0,
    ("xfs", "nothing"): 1.0,
    ("ext4", "nothing"): 1.0,
    ("xfs", "blocks"): 5.0,
    ("btrfs", "blocks"): 5.0,
}
"""What the files may add to a freeze, where anything is wanted."""
_MOST_SENT_BYTES: Final[dict[tuple[FileSystem, Case], int]] = {
    ("xfs", "blocks"): 2 << 20,
    ("btrfs", "blocks"): 2 << 20,
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    file_systems: tuple[FileSystem, ...] = ("xfs", "ext4")
    cases: tuple[Case, ...] = CASES
    epochs: int = 10
    small_files: int = 100_000
    changed_files: int = 1000
    large_mib: int = 4096
    changed_blocks: int = 100
    log_mib: int = 200
    append_kib: int = 256


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of the parts of `wall_ms`."""

    capture: float
    send: float
    lay_out: float


class RsyncCost(msgspec.Struct, frozen=True, kw_only=True):
    """rsync with the same changes."""

    wall_ms: Summary
    bytes: Summary


class Within(msgspec.Struct, frozen=True, kw_only=True):
    """Whether medians are what is wanted; null: nothing is."""

    freeze: bool | None
    sent: bool | None
    wall_of_rsync: bool
    bytes_of_rsync: bool


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One case on one file system."""

    file_system: FileSystem
    case: Case
    files: int
    tree_bytes: int
    changed: int
    epochs: int
    failed: int
    failure: str
    frozen_ms: Summary
    frozen_without_ms: Summary
    added_ms: float
    files_ms: Summary
    abandoned: int
    abandoned_ms: Summary
    epoch_ms: Summary
    sent_bytes: Summary
    wall_ms: Summary
    parts_ms: Parts
    rsync: RsyncCost
    within: Within


class FilesReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    backend: str
    kernel: str
    cpus: int
    versions: str
    options: Options
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """An epoch that was captured and brought."""

    frozen_ms: float
    capture_ms: float
    """From the end of the files' part to the captured epoch."""
    wall_ms: float
    brought: Brought


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one epoch with files."""

    files_ms: float
    """Of its last freeze."""
    abandoned_ms: tuple[float, ...]
    epoch_ms: float
    arrived: Arrived | None
    """None: it failed."""
    failure: str
    """Why."""
    synced: Synced


def measured(
    file_system: FileSystem,
    case: Case,
    *,
    files: int,
    tree_bytes: int,
    changed: int,
    without_ms: Sequence[float],
    seen: Sequence[Seen],
) -> Measured:
    """Sum up the epochs of one case. `without_ms` are freezes in which no files were captured."""
    arrived = [each.arrived for each in seen if each.arrived is not None]
    failures = [each.failure for each in seen if each.arrived is None]
    abandoned_ms = [value for each in seen for value in each.abandoned_ms]
    frozen_ms = summarize([each.frozen_ms for each in arrived])
    frozen_without_ms = summarize(without_ms)
    added_ms = round(frozen_ms.p50 - frozen_without_ms.p50, 3) if arrived else 0.0
    files_ms = summarize([each.files_ms for each in seen])
    sent_bytes = summarize([each.brought.sent_bytes for each in arrived])
    wall_ms = summarize([each.wall_ms for each in arrived])
    rsync = RsyncCost(
        wall_ms=summarize([each.synced.wall_ms for each in seen]),
        bytes=summarize([each.synced.bytes for each in seen]),
    )
    whole = bool(arrived) and not failures
    most_added_ms, most_sent_bytes = (
        bounds.get((file_system, case)) for bounds in (_MOST_ADDED_MS, _MOST_SENT_BYTES)
    )
    return Measured(
        file_system=file_system,
        case=case,
        files=files,
        tree_bytes=tree_bytes,
        changed=changed,
        epochs=len(arrived),
        failed=len(failures),
        failure=failures[-1] if failures else "",
        frozen_ms=frozen_ms,
        frozen_without_ms=frozen_without_ms,
        added_ms=added_ms,
        files_ms=files_ms,
        abandoned=len(abandoned_ms),
        abandoned_ms=summarize(abandoned_ms),
        epoch_ms=summarize([each.epoch_ms for each in seen]),
        sent_bytes=sent_bytes,
        wall_ms=wall_ms,
        parts_ms=Parts(
            capture=_median(each.capture_ms for each in arrived),
            send=_median(each.brought.send_ms for each in arrived),
            lay_out=_median(each.brought.lay_out_ms for each in arrived),
        ),
        rsync=rsync,
        within=Within(
            freeze=None if most_added_ms is None else whole and added_ms <= most_added_ms,
            sent=None if most_sent_bytes is None else whole and sent_bytes.p50 <= most_sent_bytes,
            wall_of_rsync=whole and wall_ms.p50 <= rsync.wall_ms.p50,
            bytes_of_rsync=whole and sent_bytes.p50 <= rsync.bytes.p50,
        ),
    )


def report(options: Options, versions: str, all_measured: Iterable[Measured]) -> FilesReport:
    """Put the cases together."""
    return FilesReport(
        schema_version=SCHEMA_VERSION,
        benchmark="files",
        backend="fast",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        versions=versions,
        options=options,
        measured=tuple(all_measured),
    )


def print_table(told: FilesReport) -> None:
    """Print what matters of it."""
    print("               added p50  own work (max)  frozen p50, without  given up  failed    sent    rsync")
    for each in told.measured:
        print(
            f"{each.file_system:4} {each.case:8} {each.added_ms:>8.2f} ms "
            f"{each.files_ms.p50:>9.2f} ms ({each.files_ms.max:.2f}) "
            f"{_ms(each.frozen_ms):>14} {_ms(each.frozen_without_ms):>10} "
            f"{each.abandoned:>9} {each.failed:>7} {_kib(each.sent_bytes):>8} {_kib(each.rsync.bytes):>9}"
        )
    print(
        "                  wall p50: capture + send + lay out     rsync   within: freeze, sent, wall, bytes"
    )
    for each in told.measured:
        parts, within = each.parts_ms, each.within
        summed = f"{parts.capture:.0f} + {parts.send:.0f} + {parts.lay_out:.0f} ms" if each.epochs else ""
        print(
            f"{each.file_system:4} {each.case:8} {_ms(each.wall_ms):>12}: {summed:<22}"
            f"{each.rsync.wall_ms.p50:>8.0f} ms {_word(within.freeze):>14}, {_word(within.sent)}, "
            f"{_word(within.wall_of_rsync)}, {_word(within.bytes_of_rsync)}"
        )


def _median(values: Iterable[float]) -> float:
    every = list(values)
    return round(statistics.median(every), 3) if every else 0.0


def _ms(summary: Summary) -> str:
    return f"{summary.p50:.1f} ms" if summary.n else "-"


def _kib(summary: Summary) -> str:
    return f"{summary.p50 / 1024:.0f}K" if summary.n else "-"


def _word(within: bool | None) -> str:
    return "-" if within is None else "yes" if within else "NO"
