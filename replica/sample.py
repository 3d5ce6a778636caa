"""What lies on this node's disk of a few pages of a committed epoch: for its primary, which verifies them.

In: a chain of levels, a range of pages. Out: their identities, read from the files as a restore would find
them; the page cache is let go of first, so that it is the disk that answers. Only the runs of a level's
pagemap are kept in memory, not its pages' numbers: a few kilobytes for each level.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.criu.images import PE_PRESENT, SpaceKey
from common.criu.pagemap import parse_runs
from common.durable import Disk
from common.errors import StoreError
from common.identity import PageHasher
from common.model import PAGE_BYTES
from replica.folding import DAMAGE_HINT, Origin, read_pages
from replica.holdings import HeldPart
from replica.levels import Level, Numbers

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Runs:
    """The pagemap of one space in one level: shapes (n,)."""

    first: NDArray[np.uint64]
    end: NDArray[np.uint64]
    present: NDArray[np.bool_]
    before: NDArray[np.int64]
    """Pages in the level's own file before the run."""


class Sampler:
    """Reads samples of one store; remembers the pagemaps of the chain that it read last."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._runs: dict[tuple[Level, SpaceKey], _Runs] = {}

    def identify(
        self, chain: Sequence[Level], key: SpaceKey, first: int, end: int, most: int, hasher: PageHasher
    ) -> HeldPart:
        """Identify the pages of a space from page number `first` up to `end`, at most `most` of them.

        None if there is no such space. Raises StoreError if they cannot be read, or the levels do not fit
        each other: `tells_damage` says whether that is the disk's fault.
        """
        self._runs = {at: runs for at, runs in self._runs.items() if at[0] in chain}
        if chain[0].space(key) is None:
            return HeldPart(np.empty(0, np.uint64), np.empty((0, 2), np.uint64), False)
        numbers = _numbers_within(self._runs_of(chain[0], key), first, end, most + 1)
        numbers, more = numbers[:most], len(numbers) > most
        origin = self._origin(chain, key, numbers)
        here = origin.level >= 0
        origin = Origin(origin.level[here], origin.row[here])
        self._forget_cached(chain, key, origin)
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(len(origin.row), 1) * PAGE_BYTES)))
        identities = [hasher.identify(block) for block in read_pages(chain, self._disk, key, origin, buffer)]
        identity = np.concatenate(identities) if identities else np.empty((0, 2), dtype=np.uint64)
        return HeldPart(numbers[here], identity, more)

    def _runs_of(self, level: Level, key: SpaceKey) -> _Runs:
        if (level, key) not in self._runs:
            path = level.path / key.pagemap_name
            runs = parse_runs(self._disk.read_file(path, op="read.pagemap"), path.name)
            present = (runs.flags & PE_PRESENT) != 0
            counts = np.where(present, runs.counts, np.uint64(0)).astype(np.int64)
            before = np.cumsum(counts) - counts
            self._runs[level, key] = _Runs(runs.first, runs.first + runs.counts, present, before)
        return self._runs[level, key]

    def _origin(self, chain: Sequence[Level], key: SpaceKey, numbers: Numbers) -> Origin:
        """Follow each page down the levels as CRIU does, to the first that has its bytes (-1: none has)."""
        level_of = np.full(len(numbers), -1, dtype=np.int16)
        row_of = np.full(len(numbers), -1, dtype=np.int64)
        left = np.arange(len(numbers))
        for depth, level in enumerate(chain):
            if not left.size:
                break
            if level.space(key) is None:
                raise StoreError(f"{level.path} lacks {key.pagemap_name}", hint=DAMAGE_HINT)
            runs, wanted = self._runs_of(level, key), numbers[left]
            at = np.searchsorted(runs.first, wanted, side="right").astype(np.intp) - 1
            if not len(runs.first) or (at < 0).any() or (wanted >= runs.end[at]).any():
                raise StoreError(f"{level.path / key.pagemap_name} lacks pages", hint=DAMAGE_HINT)
            here = runs.present[at]
            level_of[left[here]] = depth
            row_of[left[here]] = runs.before[at[here]] + (wanted - runs.first[at]).astype(np.int64)[here]
            left = left[~here]
        return Origin(level_of, row_of)

    def _forget_cached(self, chain: Sequence[Level], key: SpaceKey, origin: Origin) -> None:
        """Let the kernel drop what it keeps of these pages in memory. Nothing if the store lies in memory."""
        for depth in np.unique(origin.level).tolist():
            space = chain[depth].space(key)
            if space is None:
                continue
            rows = np.sort(origin.row[origin.level == depth])
            file = self._disk.open_file(chain[depth].path / space.pages_name, op="read.pages")
            try:
                for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                    where, size = int(run[0]) * PAGE_BYTES, len(run) * PAGE_BYTES
                    os.posix_fadvise(file, where, size, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _numbers_within(runs: _Runs, first: int, end: int, most: int) -> Numbers:
    """Return the page numbers of runs that lie between two, at most so many."""
    low = np.clip(runs.first, np.uint64(first), np.uint64(max(first, end)))
    high = np.clip(runs.end, np.uint64(first), np.uint64(max(first, end)))
    found: list[Numbers] = []
    left = most
    for at in np.flatnonzero(low < high).tolist():
        count = min(int(high[at] - low[at]), left)
        found.append(np.arange(count, dtype=np.uint64) + low[at])
        left -= count
        if not left:
            break
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)
