"""The content of what a replica has already, page by page: of its newest epoch, or of a seed.

In: a chain of levels. Out: for each address space which pages have their bytes there, what these are (as
keyed identities, so that a primary can compare without sending them), and the bytes themselves. A primary
that does not know what its replica holds asks here, and sends only what differs. Everything is read from the
files when it is asked for: what was torn, lost or altered meanwhile has another identity, and is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.durable import Disk
from common.errors import StoreError
from common.identity import PageHasher
from common.model import PAGE_BYTES
from replica.folding import Origin, origin_of, read_pages
from replica.levels import BaseError, Level, Numbers, rows_in

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HeldPart:
    """Some pages of a space, ascending, and their identities; shapes (n,) and (n, 2)."""

    numbers: Numbers
    identity: NDArray[np.uint64]
    more: bool
    """Whether there are pages behind the last one."""


class Holdings:
    """Reads along one chain, whose levels must stay where they are. Not for several threads at once."""

    def __init__(self, chain: Sequence[Level], disk: Disk) -> None:
        self._chain = chain
        self._disk = disk
        self._known: tuple[SpaceKey, Numbers, Origin] | None = None

    def identify(self, key: SpaceKey, first_row: int, most: int, hasher: PageHasher) -> HeldPart:
        """Read and identify `most` pages of a space from its `first_row`-th on; none if there is no such.

        Raises StoreError if they cannot be read.
        """
        numbers, origin = self._pages(key)
        rows = slice(first_row, first_row + most)
        part = Origin(origin.level[rows], origin.row[rows])
        identities = [hasher.identify(block) for block in self._read(key, part)]
        identity = np.concatenate(identities) if identities else np.empty((0, 2), dtype=np.uint64)
        return HeldPart(numbers[rows], identity, first_row + most < len(numbers))

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """Read pages by their numbers, in blocks that are valid until the next one.

        Raises StoreError if one of them is not held.
        """
        held, origin = self._pages(key)
        rows = rows_in(held, numbers)
        if (rows < 0).any():
            raise StoreError(f"{int((rows < 0).sum())} pages of {key.pagemap_name} are not held")
        return self._read(key, Origin(origin.level[rows], origin.row[rows]))

    def _read(self, key: SpaceKey, origin: Origin) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(len(origin.row), 1) * PAGE_BYTES)))
        return read_pages(self._chain, self._disk, key, origin, buffer)

    def _pages(self, key: SpaceKey) -> tuple[Numbers, Origin]:
        """Find the pages of a space that have their bytes somewhere in the chain."""
        if self._known is None or self._known[0] != key:
            if self._chain[0].space(key) is None:
                numbers = np.empty(0, dtype=np.uint64)
            else:
                numbers, _ = self._chain[0].pages_of(key, self._disk)
            origin = origin_of(self._chain, self._disk, key, numbers)
            held = origin.level >= 0
            self._known = key, numbers[held], Origin(origin.level[held], origin.row[held])
        _, numbers, origin = self._known
        return numbers, origin


class Lender(Holdings):
    """A seed. It lends pages only while they are what was told of them.

    A seed is not synced, and read twice: to be told, and to be copied into an epoch. What the disk lost or
    altered in between would else be committed, with a hash of its own.
    """

    def __init__(self, chain: Sequence[Level], disk: Disk) -> None:
        super().__init__(chain, disk)
        self._hasher: PageHasher | None = None
        self._told: dict[SpaceKey, dict[int, HeldPart]] = {}

    def identify(self, key: SpaceKey, first_row: int, most: int, hasher: PageHasher) -> HeldPart:
        """See `Holdings.identify`; what is told is remembered, 24 bytes a page."""
        part = super().identify(key, first_row, most, hasher)
        if self._hasher is None or self._hasher.secret != hasher.secret:
            self._hasher = hasher
            self._told.clear()
        self._told.setdefault(key, {})[first_row] = part
        return part

    def read(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """See `Holdings.read`. Raises BaseError for pages that were not told, or are not that any more."""
        told = [part for _, part in sorted(self._told.get(key, {}).items())]
        if self._hasher is None or not told:
            raise BaseError(f"nobody was told what is kept of {key.pagemap_name}")
        rows = rows_in(np.concatenate([part.numbers for part in told]), numbers)
        if (rows < 0).any():
            raise BaseError(f"{int((rows < 0).sum())} pages of {key.pagemap_name} were not told to be kept")
        identity = np.concatenate([part.identity for part in told])[rows]
        at = 0
        for block in super().read(key, numbers):
            pages = len(block) // PAGE_BYTES
            if not np.array_equal(self._hasher.identify(block), identity[at : at + pages]):
                raise BaseError(f"what is kept of {key.pagemap_name} is not what was told of it")
            yield block
            at += pages
