"""Which pages are compared at which epoch, and what came of it: one round after the other over all pages.

In: the pages that there are when a round begins, as ranges; then, epoch by epoch, whether the slice that was
planned was looked at, and what differed. Out: slices, and how far the round is. The same for the two things
that are compared: memory with what the primary believes of it, and each replica's store with that epoch.

Keeps this: a round looks once at every page that there was when it began, within `length` epochs, as long as
slices of `MOST_PAGES` are enough for that. What came since is looked at by the next round; what is gone is
passed over. So it harms no round that processes come and go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.model import PAGE_BYTES, EpochId
from primary.page_set import PageSet

LEAST_PAGES: Final = 64
"""A slice is at least as large: small workloads are through in no time."""
MOST_PAGES: Final = 8192
"""... and at most: 32 MiB that are read, hashed, and asked for, between two epochs."""
HURRIED_PAGES: Final = 4096
"""Slice of a round that somebody waits for."""

_ADDRESSES_TOLD: Final = 8


@dataclass(frozen=True, slots=True)
class Slice:
    """Pages of one address space that are due: first page number and end of each range; shape (2n,)."""

    key: SpaceKey
    bounds: NDArray[np.uint64]

    @property
    def pages(self) -> int:
        """How many there were."""
        return int((self.bounds[1::2] - self.bounds[0::2]).sum())

    def within(self, pages: PageSet) -> NDArray[np.uint64]:
        """Return the numbers of those of `pages` that lie in it, ascending."""
        return (pages & PageSet(self.bounds)).numbers


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Pages of one address space that were not what they should have been."""

    replica: str
    """Whose store it was; empty: the memory of the workload itself."""
    epoch: EpochId
    key: SpaceKey
    numbers: NDArray[np.uint64]
    pid: int = 0
    """Which process, as this host counts; 0: not known."""

    @property
    def addresses(self) -> str:
        """Where they are, the first few of them."""
        first = [f"{int(number) * PAGE_BYTES:#x}" for number in self.numbers[:_ADDRESSES_TOLD]]
        return ", ".join(first) + (", …" if len(self.numbers) > _ADDRESSES_TOLD else "")

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        process = f"{self.key.kind} {self.key.ident}" + (f" (PID {self.pid})" if self.pid else "")
        pages = "1 page" if len(self.numbers) == 1 else f"{len(self.numbers)} pages"
        where = f"{pages} of {process} at {self.addresses}"
        if self.replica:
            return f"{self.replica} has stored {where} otherwise than they were in {self.epoch}"
        return f"{where} changed unseen before {self.epoch}"


class Verification:
    """The rounds of one thing that is compared. `hurry` may come from another thread than all else."""

    def __init__(
        self,
        length: int,
        on_mismatch: Callable[[Mismatch], None] = lambda mismatch: None,
        *,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """A round takes `length` epochs; 0: there is none unless somebody hurries.

        `on_mismatch` must not block; it is called wherever something was compared.
        """
        self._length = length
        self._on_mismatch = on_mismatch
        self._wall_s = wall_s
        self._keys: tuple[SpaceKey, ...] = ()
        self._ranges: tuple[NDArray[np.uint64], ...] = ()
        self._planned = 0
        self._wanted = self._hurried = False
        self.pages_due = 0
        """Pages of the round that is under way; 0: none is."""
        self.pages_done = 0
        """Of which its slices were looked at."""
        self.epochs = 0
        """... at so many epochs."""
        self.rounds = 0
        """Rounds that ended."""
        self.ended_wall_s: float | None = None
        """When the last of them did."""
        self.pages_compared = 0
        self.pages_different = 0
        self.problem = ""
        """Why the last slice could not be compared; empty if it was."""

    def hurry(self) -> None:
        """Begin a round anew, in large slices. One that is under way does not count."""
        self._wanted = True

    def plan(self, present: Callable[[], Mapping[SpaceKey, PageSet]]) -> tuple[Slice, ...]:
        """Say what is due at the next epoch; the same until `looked_at`.

        `present` is asked when a round begins: the pages of each space.
        """
        if not (self._length or self._wanted or self._hurried):
            return ()
        if self._wanted or not self.pages_due:
            self._begin(present())
        left = self.pages_due - self.pages_done
        if self._hurried:
            due = HURRIED_PAGES
        else:
            evenly = -(-left // max(self._length - self.epochs, 1))
            due = min(max(evenly, LEAST_PAGES), MOST_PAGES)
        self._planned = min(due, left)
        return self._cut(self.pages_done, self.pages_done + self._planned)

    def looked_at(self, compared: int) -> None:
        """The slice that was planned last was looked at, and `compared` pages of it could be compared."""
        self.problem = ""
        self.pages_compared += compared
        if self._wanted or not self._planned:
            return
        self.pages_done += self._planned
        self.epochs += 1
        self._planned = 0
        if self.pages_done == self.pages_due:
            self.rounds += 1
            self.ended_wall_s = self._wall_s()
            self._hurried = False
            self.pages_due = 0

    def found(self, mismatch: Mismatch) -> None:
        """Something differs."""
        self.pages_different += len(mismatch.numbers)
        self._on_mismatch(mismatch)

    def _begin(self, present: Mapping[SpaceKey, PageSet]) -> None:
        self._hurried, self._wanted = self._hurried or self._wanted, False
        self._keys = tuple(sorted(key for key, pages in present.items() if len(pages)))
        self._ranges = tuple(present[key].bounds for key in self._keys)
        self.pages_due = sum(len(present[key]) for key in self._keys)
        self.pages_done = self.epochs = 0

    def _cut(self, first: int, end: int) -> tuple[Slice, ...]:
        """Return the pages from the `first`-th to the `end`-th of all, space after space."""
        slices: list[Slice] = []
        before = 0
        for key, ranges in zip(self._keys, self._ranges, strict=True):
            starts, counts = ranges[0::2], ranges[1::2] - ranges[0::2]
            place = np.concatenate(([0], np.cumsum(counts))).astype(np.int64) + before
            low = np.clip(first - place[:-1], 0, counts.astype(np.int64)).astype(np.uint64)
            high = np.clip(end - place[:-1], 0, counts.astype(np.int64)).astype(np.uint64)
            here = low < high
            if here.any():
                bounds = np.empty(2 * int(here.sum()), dtype=np.uint64)
                bounds[0::2], bounds[1::2] = (starts + low)[here], (starts + high)[here]
                slices.append(Slice(key, bounds))
            before = int(place[-1])
        return tuple(slices)


def different(
    numbers: NDArray[np.uint64],
    identity: NDArray[np.uint64],
    told: NDArray[np.uint64],
    told_identity: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Mark those of the pages (ascending) that somebody else does not have, or has otherwise; shape (n,)."""
    if not len(told):
        return np.ones(len(numbers), dtype=np.bool_)
    rows = np.minimum(np.searchsorted(told, numbers), len(told) - 1)
    same: NDArray[np.bool_] = (told[rows] == numbers) & (told_identity[rows] == identity).all(axis=1)
    return ~same
