"""The files of one committed epoch, read out of the levels of a store, and what changed since an older one.

In: a chain of levels, newest first, and what is remembered of levels that folds took the place of. Out: which
pages of records and contents (`common.file_records`) the epoch has, their bytes, and which of them may hold
something else than in an older epoch. Of the levels' pagemaps only the runs are kept in memory: kilobytes for
each level, if it was not changed all over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.criu.images import PE_PRESENT, PageRuns, SpaceKey
from common.criu.pagemap import parse_runs
from common.durable import Disk
from common.errors import StoreError
from common.file_records import CONTENTS, RECORDS
from common.model import PAGE_BYTES, EpochId
from replica.folding import DAMAGE_HINT, Origin, read_pages
from replica.levels import Level, Numbers

_BUFFER_BYTES: Final = 1 << 20
_MOST_REMEMBERED: Final = 1 << 20
"""Numbers of pages, 8 bytes each; what thousands of epochs change, unless each changes very much."""
_OF_AN_EPOCH: Final = 100
"""As many as these takes what is remembered of an epoch in which no file changed: 800 bytes."""

NO_NUMBERS: Final[Numbers] = np.empty(0, dtype=np.uint64)


class EpochFiles(Protocol):
    """What is asked of an epoch by whoever makes its files."""

    @property
    def epoch(self) -> EpochId:
        """Which one it is."""
        ...

    def pages(self, key: SpaceKey) -> Numbers:
        """Return the numbers of all pages of a space, ascending; none if the epoch has no such space."""
        ...

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """Read pages in the order of `numbers`, in blocks of whole pages that are valid until the next.

        Raises StoreError if one of them is not there or cannot be read.
        """
        ...

    def changed_since(self, epoch: EpochId) -> dict[SpaceKey, Numbers] | None:
        """Return which pages may hold something else than in an older epoch; None if that cannot be told.

        What the older one had and this one has not is not among them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Changes:
    """What an epoch had of its own when it was committed, and on which one it stood."""

    base: EpochId
    pages: Mapping[SpaceKey, Numbers]


class FoldedChanges:
    """Which pages of files had epochs of their own whose levels were folded; the last ones, in memory only.

    A tree that is slow to become an epoch, while a fold swallows the one that it is, need not be looked at
    wholly for that. For several threads.
    """

    def __init__(self) -> None:
        self._changes: dict[EpochId, Changes] = {}
        self._remembered = 0
        self._mutex = threading.RLock()

    def take(self, folded: Sequence[Level], disk: Disk) -> None:
        """Remember levels, newest first, that are about to be folded. Raises StoreError for damage."""
        for level in reversed(folded):
            if level.base is None or level.space(RECORDS) is None or level.id in self._changes:
                continue  # what was a fold already says more than the epoch changed
            pages = {key: _Runs.read(level, key, disk).numbers(present=True) for key in _spaces_of(level)}
            with self._mutex:
                self.forget(level.id)
                self._changes[level.id] = Changes(level.base, pages)
                self._remembered += _size_of(pages)
                while self._remembered > _MOST_REMEMBERED:
                    self.forget(next(iter(self._changes)))

    def forget(self, epoch: EpochId) -> None:
        """Forget an epoch: another one may take its name."""
        with self._mutex:
            if (changes := self._changes.pop(epoch, None)) is not None:
                self._remembered -= _size_of(changes.pages)

    def get(self, epoch: EpochId) -> Changes | None:
        """Return what is remembered of an epoch."""
        return self._changes.get(epoch)


class StoredFiles:
    """`EpochFiles` in a store. The levels must stay where they are meanwhile. Not for several threads."""

    def __init__(self, chain: Sequence[Level], disk: Disk, folded: FoldedChanges | None = None) -> None:
        """`chain`: the epoch's own level first, its full base last."""
        self._chain = tuple(chain)
        self._disk = disk
        self._folded = folded or FoldedChanges()
        self._runs: dict[tuple[int, SpaceKey], _Runs] = {}

    @property
    def epoch(self) -> EpochId:
        """See `EpochFiles`."""
        return self._chain[0].id

    @property
    def has_files(self) -> bool:
        """Whether the epoch has files at all; an older one, or of a workload that declares none, has not."""
        return self._chain[0].space(RECORDS) is not None

    def pages(self, key: SpaceKey) -> Numbers:
        """See `EpochFiles`. Takes 8 bytes for each page. Raises StoreError for a damaged pagemap."""
        if self._chain[0].space(key) is None:
            return NO_NUMBERS
        return self._runs_of(0, key).numbers()

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """See `EpochFiles`."""
        origin = self._origin(key, numbers)
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(len(numbers), 1) * PAGE_BYTES)))
        return read_pages(self._chain, self._disk, key, origin, buffer)

    def changed_since(self, epoch: EpochId) -> dict[SpaceKey, Numbers] | None:
        """See `EpochFiles`: the pages of both spaces that have their bytes in a newer level than that one.

        None if no level of the chain is that epoch, nor one that it is remembered to have had.
        """
        newer = next((depth for depth, level in enumerate(self._chain) if level.id == epoch), None)
        if newer is not None:
            changes = [self._own(depth) for depth in range(newer)]
        else:
            remembered = self._remembered_since(epoch)
            if remembered is None:
                return None
            changes = remembered
        return {key: self._still_there(key, changes) for key in (RECORDS, CONTENTS)}

    def _remembered_since(self, epoch: EpochId) -> list[Mapping[SpaceKey, Numbers]] | None:
        """Go from epoch to epoch as they were committed; None if that does not lead to the one wanted."""
        depths = {level.id: depth for depth, level in enumerate(self._chain)}
        changes: list[Mapping[SpaceKey, Numbers]] = []
        at: EpochId | None = self.epoch
        while at != epoch:
            if at is None:
                return None
            if (folded := self._folded.get(at)) is not None:
                changes.append(folded.pages)
                at = folded.base
            elif at in depths:
                changes.append(self._own(depths[at]))
                at = self._chain[depths[at]].base
            else:
                return None
        return changes

    def _own(self, depth: int) -> Mapping[SpaceKey, Numbers]:
        """Return which pages of files a level has the bytes of."""
        return {
            key: self._runs_of(depth, key).numbers(present=True) for key in _spaces_of(self._chain[depth])
        }

    def _still_there(self, key: SpaceKey, changes: Iterable[Mapping[SpaceKey, Numbers]]) -> Numbers:
        """Return all those pages that the epoch still has."""
        if self._chain[0].space(key) is None:
            return NO_NUMBERS
        numbers = np.unique(np.concatenate([NO_NUMBERS, *(each.get(key, NO_NUMBERS) for each in changes)]))
        return numbers[self._runs_of(0, key).rows(numbers) >= 0]

    def _origin(self, key: SpaceKey, numbers: Numbers) -> Origin:
        """Follow pages down the levels to the first that has their bytes. Raises StoreError if none has."""
        origin = Origin(np.empty(len(numbers), dtype=np.int16), np.empty(len(numbers), dtype=np.int64))
        left = np.arange(len(numbers))
        for depth, level in enumerate(self._chain):
            if not left.size:
                break
            runs = self._runs_of(depth, key)
            rows = runs.rows(numbers[left])
            if (rows < 0).any():
                raise StoreError(
                    f"{level.path / key.pagemap_name} lacks {int((rows < 0).sum())} pages that are needed",
                    hint=DAMAGE_HINT,
                )
            here = runs.present[rows]
            at = left[here]
            origin.level[at] = depth
            origin.row[at] = runs.places(numbers[at], rows[here])
            left = left[~here]
        if left.size:
            raise StoreError(
                f"{self._chain[-1].path} lacks the bytes of {left.size} pages of {key.pagemap_name}",
                hint=DAMAGE_HINT,
            )
        return origin

    def _runs_of(self, depth: int, key: SpaceKey) -> _Runs:
        if (depth, key) not in self._runs:
            self._runs[depth, key] = _Runs.read(self._chain[depth], key, self._disk)
        return self._runs[depth, key]


@dataclass(frozen=True, slots=True)
class _Runs:
    """The pagemap of one space in one level; arrays of shape (n,)."""

    runs: PageRuns
    present: NDArray[np.bool_]
    before: NDArray[np.int64]
    """Pages in the level's own file before the run."""

    @classmethod
    def read(cls, level: Level, key: SpaceKey, disk: Disk) -> _Runs:
        """Read it. Raises StoreError if it is not there, or damaged."""
        path = level.path / key.pagemap_name
        if level.space(key) is None:
            raise StoreError(f"{level.path} lacks {key.pagemap_name}", hint=DAMAGE_HINT)
        runs = parse_runs(disk.read_file(path, op="read.pagemap"), path.name)
        present = (runs.flags & PE_PRESENT) != 0
        own = np.where(present, runs.counts, np.uint64(0)).astype(np.int64)
        return cls(runs, present, np.cumsum(own) - own)

    def numbers(self, *, present: bool = False) -> Numbers:
        """Return the numbers of all pages, or of those whose bytes the level itself has."""
        first, counts, flags = self.runs
        if present:
            first, counts, flags = first[self.present], counts[self.present], flags[self.present]
        return PageRuns(first, counts, flags).expand()[0]

    def rows(self, numbers: Numbers) -> NDArray[np.intp]:
        """Find the run of each page; -1 where there is none."""
        if not len(self.present):
            return np.full(numbers.shape, -1, dtype=np.intp)
        rows = np.searchsorted(self.runs.first, numbers, side="right") - 1
        inside = (rows >= 0) & (numbers < self.runs.first[rows] + self.runs.counts[rows])
        return np.where(inside, rows, -1)

    def places(self, numbers: Numbers, rows: NDArray[np.intp]) -> NDArray[np.int64]:
        """Find where in the level's own file pages of such runs stand."""
        places: NDArray[np.int64] = self.before[rows] + (numbers - self.runs.first[rows]).astype(np.int64)
        return places


def _size_of(pages: Mapping[SpaceKey, Numbers]) -> int:
    return _OF_AN_EPOCH + sum(map(len, pages.values()))


def _spaces_of(level: Level) -> list[SpaceKey]:
    return [key for key in (RECORDS, CONTENTS) if level.space(key) is not None]
