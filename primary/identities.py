"""What each page of an address space holds, as 128-bit identities: one value for each epoch, mostly shared.

In: what was read of pages, and which pages there are. Out: values that stay as they are. Pages that are
neighbours stand in one block, which is `bytes`: what follows from another value shares with it all blocks in
which nothing changed, and two values are compared by what they do not share. So an epoch costs what changed
in it, whatever the size of memory; and all the epochs that somebody holds, little more than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from primary.page_set import NO_PAGES, PageSet

_BLOCK_BITS: Final = np.uint64(6)
"""A block is of 64 page numbers: a page that changes costs 1 KiB, a block that is there about 50 bytes."""
_BATCH_BLOCKS: Final = 1024
"""Blocks whose identities are at once in arrays: 1 MiB."""
_BYTES: Final = 16
_NOTHING: Final = np.iinfo(np.uint64).max
"""Stands in an identity until the page was read: no content has it, nor has a page of zeros."""
_UNREAD: Final = bytes([255]) * (_BYTES << int(_BLOCK_BITS))
"""A whole block of that: there is one of them, however much was not read."""


class Identities:
    """Pages, and an identity for each; never changed by anybody but who made it, with `put`.

    Must hold: a block has the identities of those pages of `pages` that are in its span of numbers, in order.
    """

    __slots__ = ("_blocks", "_firsts", "_places", "pages")

    def __init__(self, pages: PageSet, places: NDArray[np.uint64], blocks: NDArray[np.object_]) -> None:
        """For this module. `blocks` are those that have pages, `places` their numbers, ascending."""
        self.pages = pages
        self._places = places
        self._blocks = blocks
        self._firsts = np.append(pages.rank(places << _BLOCK_BITS), len(pages))

    @classmethod
    def of(cls, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> Identities:
        """Those pages (ascending, unique), with what they hold; shapes (n,) and (n, 2)."""
        made = NO_IDENTITIES.reshaped(PageSet.of(numbers))
        made.put(numbers, identity)
        return made

    def get(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return what pages that are here (ascending) hold; shape (n, 2)."""
        at, rows = self._found(numbers)
        return self._held(at)[rows]

    def copy(self) -> Identities:
        """Return the same, to be changed: it shares all blocks."""
        return Identities(self.pages, self._places, self._blocks.copy())

    def put(self, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> None:
        """Have these pages, which are here (ascending, unique), hold something else; shape (n, 2)."""
        at, rows = self._found(numbers)
        held = self._held(at).copy()
        held[rows] = identity
        for block, before, after in zip(at.tolist(), self._blocks[at], self._cut(held, at), strict=True):
            if before != after:  # else it stays the one that others have
                self._blocks[block] = after

    def reshaped(self, pages: PageSet) -> Identities:
        """Return those pages, with what they hold here; of those that are not here, nothing is known."""
        changed = pages ^ self.pages
        places = _places(pages)
        fresh = Identities(pages, places, np.empty(len(places), dtype=np.object_))
        at = np.searchsorted(self._places, places)
        same = ~np.isin(places, _places(changed), assume_unique=True)
        fresh._blocks[same] = self._blocks[at[same]]
        for batch in _batches(np.flatnonzero(~same)):
            numbers = pages.at(fresh._rows(batch))
            here = self.pages.has(numbers)
            identity = np.full((len(numbers), 2), _NOTHING, dtype=np.uint64)
            identity[here] = self.get(numbers[here])
            for block, content in zip(batch.tolist(), fresh._cut(identity, batch), strict=True):
                fresh._blocks[block] = _UNREAD if content == _UNREAD else content
        return fresh

    def differing(self, other: Identities) -> PageSet:
        """Return the pages that the other one lacks, or has with another identity."""
        if self is other:
            return NO_PAGES
        changed = self.pages ^ other.pages
        _, ours, theirs = np.intersect1d(self._places, other._places, True, return_indices=True)
        # Blocks of other pages may be equal and mean something else.
        moved = np.isin(self._places[ours], _places(changed), assume_unique=True)
        differ = ~moved & (self._blocks[ours] != other._blocks[theirs])
        parts = [changed & self.pages]
        for at, theirs_at in zip(_batches(ours[differ]), _batches(theirs[differ]), strict=True):
            rows = self._rows(at)[_differ(self._held(at), other._held(theirs_at))]
            parts.append(PageSet.of(self.pages.at(rows)))
        for at in _batches(ours[moved]):
            numbers = self.pages.at(self._rows(at))
            numbers = numbers[other.pages.has(numbers)]
            parts.append(PageSet.of(numbers[_differ(self.get(numbers), other.get(numbers))]))
        return PageSet.union(parts)

    def zeros(self, pages: PageSet) -> PageSet:
        """Return those of the pages, which are here, that are all zeros."""
        return PageSet.union(
            [
                PageSet.of(numbers[~self.get(numbers).any(axis=1)])
                for numbers in pages.pieces(_BATCH_BLOCKS << int(_BLOCK_BITS))
            ]
        )

    def _found(self, numbers: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Find pages that are here (ascending): their blocks, and each page's row in what those hold."""
        block = np.searchsorted(self._places, numbers >> _BLOCK_BITS)
        at = block[np.append(True, block[1:] != block[:-1])] if len(block) else block
        return at, self.pages.rank(numbers) - self._skipped(at)[np.searchsorted(at, block)]

    def _held(self, at: NDArray[np.intp]) -> NDArray[np.uint64]:
        """Return what the pages of blocks hold, one block after the other; shape (n, 2)."""
        return np.frombuffer(b"".join(self._blocks[at]), dtype=np.uint64).reshape(-1, 2)

    def _rows(self, at: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return the rows of the pages of blocks."""
        rows = np.repeat(self._skipped(at), self._sizes(at))
        rows += np.arange(len(rows))
        return rows

    def _skipped(self, at: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return how many pages before each of the blocks (ascending) are in none of them."""
        sizes = self._sizes(at)
        skipped: NDArray[np.int64] = self._firsts[at] - (np.cumsum(sizes) - sizes)
        return skipped

    def _sizes(self, at: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return how many pages blocks have."""
        sizes: NDArray[np.int64] = self._firsts[at + 1] - self._firsts[at]
        return sizes

    def _cut(self, identity: NDArray[np.uint64], at: NDArray[np.intp]) -> Iterator[bytes]:
        """Yield the blocks that identities of all their pages make."""
        content = identity.tobytes()
        ends = np.cumsum(self._sizes(at)) * _BYTES
        first = 0
        for end in ends.tolist():
            yield content[first:end]
            first = end


def _places(pages: PageSet) -> NDArray[np.uint64]:
    """Return the numbers of the blocks that have some of the pages, ascending."""
    bounds = pages.bounds
    last = np.uint64(1)
    return PageSet.spanning(
        bounds[0::2] >> _BLOCK_BITS, ((bounds[1::2] - last) >> _BLOCK_BITS) + last
    ).numbers


def _differ(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.bool_]:
    marks: NDArray[np.bool_] = (one[:, 0] != other[:, 0]) | (one[:, 1] != other[:, 1])
    return marks


def _batches(at: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    for first in range(0, len(at), _BATCH_BLOCKS):
        yield at[first : first + _BATCH_BLOCKS]


NO_IDENTITIES = Identities(NO_PAGES, np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.object_))
