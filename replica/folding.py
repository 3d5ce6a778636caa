"""Makes one level of the newest ones of a chain, so that no restore has to read a long chain.

In: a chain of levels. Out: a level of the same instant as the chain's newest, standing on the first one that
was not folded, or on nothing. `plan_fold` decides and is pure; `fold_into` copies, from files into a file,
one buffer's worth of memory at a time.

How much is folded: always enough to halve the longest chain allowed, and from there on down while a level is
not more than twice as large as all above it together. Sizes along a chain so fall by powers of two, like the
digits of a counter: a byte is copied about log2(base / delta) times in its life, where folding everything
into one delta each time would copy that delta over and over. The full base is folded by the same rule: when
the rest has grown to half of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from common.criu.images import PE_LAZY, PE_PRESENT, SpaceKey
from common.durable import Disk
from common.errors import StoreError
from common.model import PAGE_BYTES
from replica.level_writer import LevelWriter, check_metadata_name
from replica.levels import MANIFEST_NAME, RESTORE_NAME, Level, Numbers, present_rows, rows_in

_BUFFER_BYTES = 1 << 20
DAMAGE_HINT = "discard the epoch: its primary then sends a full one"


class FoldAbandonedError(Exception):
    """The fold was told to stop; what it made so far is to be removed."""


def fold_due(levels: int, max_levels: int) -> bool:
    """Tell whether a chain of `levels` is long enough: two before the longest allowed, longer than folded."""
    return levels >= max(max_levels - 2, max_levels // 2 + 1)


def plan_fold(sizes_bytes: Sequence[int], max_levels: int) -> int:
    """Decide how many of a chain's levels stay, from the full base up; all others become one.

    `sizes_bytes` are those of the chain's own pages, full base first. The result is at least 0 (a new full
    base) and less than half of `max_levels`, so that the chain then has at most `max_levels // 2` levels.
    """
    kept = min(max_levels // 2, len(sizes_bytes)) - 1
    while kept > 0 and sizes_bytes[kept - 1] <= 2 * sum(sizes_bytes[kept:]):
        kept -= 1
    return kept


def fold_into(
    writer: LevelWriter, folded: Sequence[Level], disk: Disk, *, step: Callable[[int], None]
) -> None:
    """Write what `folded` (newest first) say together into `writer`; its `finish` is left to the caller.

    A page that none of them has the bytes of stays in the parent. Raises StoreError when a level is damaged
    (contents are checked against the manifests first, so that damage never gets a fresh hash). `step` is
    called with the size of each piece that was read; it may wait, or raise to end the fold.
    """
    buffer = bytearray(_BUFFER_BYTES)
    newest = folded[0]
    for level in folded:
        names = {space.pages_name for space in level.manifest.spaces}
        for entry in level.manifest.files:
            needed = level is newest or entry.name in names or entry.name.startswith("pagemap-")
            if needed and file_hash(level, entry.name, buffer, disk, step) != entry.blake3:
                raise StoreError(f"{level.path / entry.name} is damaged", hint=DAMAGE_HINT)
    for entry in newest.manifest.files:
        if not entry.name.startswith(("pagemap-", "pages-")) and entry.name not in (
            RESTORE_NAME,
            MANIFEST_NAME,
        ):
            check_metadata_name(entry.name)
            writer.link(entry, newest.path / entry.name)
    for space in newest.manifest.spaces:
        _fold_space(writer, folded, disk, space.key, buffer, step)


def file_hash(
    level: Level, name: str, buffer: bytearray, disk: Disk, step: Callable[[int], None] = lambda size: None
) -> str:
    """Read a file of a level and return its hash, in hexadecimal. Raises StoreError if it can't be read."""
    hasher = blake3()
    view = memoryview(buffer)
    fd = disk.open_file(level.path / name, op="read.file")
    try:
        while count := os.readv(fd, [view]):
            hasher.update(view[:count])
            step(count)
    except OSError as error:
        raise StoreError(f"{level.path / name}: {error.strerror}", hint=DAMAGE_HINT) from error
    finally:
        os.close(fd)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Origin:
    """For each page of a space: which of a chain's levels has its bytes (-1: none), and where in its file."""

    level: NDArray[np.int16]
    row: NDArray[np.int64]


def origin_of(folded: Sequence[Level], disk: Disk, key: SpaceKey, numbers: Numbers) -> Origin:
    """Follow each page down the levels as CRIU does, to the first that has its bytes."""
    origin = Origin(np.full(numbers.shape, -1, dtype=np.int16), np.full(numbers.shape, -1, dtype=np.int64))
    open_rows = np.arange(len(numbers))
    for depth, level in enumerate(folded):
        if not open_rows.size:
            break
        if level.space(key) is None:
            raise StoreError(
                f"{level.path} lacks {key.pagemap_name}, which a newer one needs", hint=DAMAGE_HINT
            )
        known, flags = level.pages_of(key, disk)
        rows = rows_in(known, numbers[open_rows])
        if (rows < 0).any():
            raise StoreError(
                f"{level.path / key.pagemap_name} lacks pages that a newer one needs", hint=DAMAGE_HINT
            )
        present = present_rows(flags)
        here = present[rows]
        place = np.cumsum(present, dtype=np.int64) - 1
        origin.level[open_rows[here]] = depth
        origin.row[open_rows[here]] = place[rows[here]]
        open_rows = open_rows[~here]
    return origin


def _fold_space(
    writer: LevelWriter,
    folded: Sequence[Level],
    disk: Disk,
    key: SpaceKey,
    buffer: bytearray,
    step: Callable[[int], None],
) -> None:
    numbers, flags = folded[0].pages_of(key, disk)
    origin = origin_of(folded, disk, key, numbers)
    found = origin.level >= 0
    if folded[-1].base is None and not found.all():
        raise StoreError(f"{folded[-1].path} is no full base: it lacks bytes of {key}", hint=DAMAGE_HINT)
    writer.space(key, numbers, np.where(found, (flags & PE_LAZY) | PE_PRESENT, flags).astype(np.uint8))
    levels, rows = origin.level[found], origin.row[found]
    if not levels.size:
        return
    for part in read_pages(folded, disk, key, Origin(levels, rows), memoryview(buffer)):
        writer.pages(key, part)
        step(len(part))


def read_pages(
    chain: Sequence[Level], disk: Disk, key: SpaceKey, origin: Origin, buffer: memoryview
) -> Iterator[memoryview]:
    """Read the bytes of pages in the order of `origin`, as many at once as fit in `buffer` (whole pages).

    What is yielded is `buffer` or, at the end, a part of it, overwritten by the next. All pages must have
    their bytes in the chain. Raises StoreError if they cannot be read.
    """
    levels, rows = origin.level, origin.row
    breaks = np.flatnonzero((np.diff(levels) != 0) | (np.diff(rows) != 1)) + 1
    starts = np.concatenate(([0], breaks)) if levels.size else np.empty(0, dtype=np.int64)
    counts = np.diff(starts, append=levels.size)
    files: dict[int, int] = {}
    filled = 0
    try:
        for depth, row, count in zip(
            levels[starts].tolist(), rows[starts].tolist(), counts.tolist(), strict=True
        ):
            if depth not in files:
                files[depth] = _open_pages(chain[depth], disk, key)
            offset, left = row * PAGE_BYTES, count * PAGE_BYTES
            while left:
                part = buffer[filled : filled + left]
                if os.preadv(files[depth], [part], offset) != len(part):
                    raise StoreError(f"{chain[depth].path}: pages of {key} are cut short", hint=DAMAGE_HINT)
                offset += len(part)
                left -= len(part)
                filled += len(part)
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]
    except OSError as error:
        raise StoreError(f"pages of {key} cannot be read: {error.strerror}", hint=DAMAGE_HINT) from error
    finally:
        for fd in files.values():
            os.close(fd)


def _open_pages(level: Level, disk: Disk, key: SpaceKey) -> int:
    space = level.space(key)
    if space is None:
        raise StoreError(f"{level.path} has no {key.pagemap_name}", hint=DAMAGE_HINT)
    return disk.open_file(level.path / space.pages_name, op="read.pages")
