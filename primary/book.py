"""What is known of the pages of one address space: which there are, and what each holds.

In: pages that were read, ranges whose content is in doubt, and what a freeze found to be present. Out: the
table of an epoch (`SpacePages`), which is never changed afterwards.

A page is *known* if its content was read after it was last protected: as long as the kernel does not report
it written, it still holds that. Whatever makes this doubtful (a new mapping at its place, a read that failed)
must `forget` the page; a forgotten page counts as dirty.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.model import PAGE_BYTES
from primary.capture import SpacePages
from primary.pages import bounds_of

_NOTHING = np.iinfo(np.uint64).max
"""Stands in an identity until the page was read: no content has it, nor has a page of zeros."""


class PageBook:
    """Page numbers, identities and what is known, of one address space; used by one thread at a time."""

    def __init__(self, key: SpaceKey) -> None:
        self.key = key
        self._numbers = np.empty(0, dtype=np.uint64)
        self._identity = np.empty((0, 2), dtype=np.uint64)
        self._known = np.empty(0, dtype=np.bool_)
        self._shared = False

    @property
    def numbers(self) -> NDArray[np.uint64]:
        """All pages that were present when last looked, ascending; never written to."""
        return self._numbers

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which of them are known."""
        return self._known

    @property
    def known_bounds(self) -> NDArray[np.uint64]:
        """First byte and end of each range of known pages; shape (2n,)."""
        return bounds_of(self._numbers if self._known.all() else self._numbers[self._known])

    def differs(self, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark those of the pages (ascending) that are new here or held something else; shape (n,)."""
        rows, here = self._rows(numbers)
        marks = ~here
        marks[here] = (self._identity[rows[here]] != identity[here]).any(axis=1)
        return marks

    def put(self, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> None:
        """Take note of what pages hold (ascending, unique): they are known from now on."""
        if not len(numbers):
            return
        self.expect(numbers)
        if self._shared:
            self._identity = self._identity.copy()
            self._shared = False
        rows = np.searchsorted(self._numbers, numbers)
        self._identity[rows] = identity
        self._known[rows] = True

    def expect(self, numbers: NDArray[np.uint64]) -> None:
        """Make room for pages (ascending) of which something will be `put`; they are unknown until then."""
        _, here = self._rows(numbers)
        if here.all():
            return
        fresh = numbers[~here]
        numbers = np.concatenate((self._numbers, fresh))
        order = np.argsort(numbers, kind="stable")
        nothing = np.full((len(fresh), 2), _NOTHING, dtype=np.uint64)
        self._identity = np.concatenate((self._identity, nothing))[order]
        self._known = np.concatenate((self._known, np.zeros(len(fresh), np.bool_)))[order]
        self._numbers, self._shared = numbers[order], False

    def forget(self, numbers: NDArray[np.uint64]) -> None:
        """Hold the content of these pages (ascending) for doubtful."""
        rows, here = self._rows(numbers)
        self._known[rows[here]] = False

    def forget_range(self, start: int, end: int) -> None:
        """Hold the content of all pages between two addresses for doubtful."""
        bounds = np.array([start, end], dtype=np.uint64) // np.uint64(PAGE_BYTES)
        first, last = np.searchsorted(self._numbers, bounds)
        self._known[first:last] = False

    def forget_all(self) -> None:
        """Hold everything for doubtful."""
        self._known[:] = False

    def restrict(self, present: NDArray[np.uint64]) -> None:
        """Keep just the pages that are present (ascending); those that were not in here are unknown."""
        if len(present) == len(self._numbers) and np.array_equal(present, self._numbers):
            return
        rows = np.searchsorted(self._numbers, present)
        rows = np.minimum(rows, max(len(self._numbers) - 1, 0))
        here = (
            self._numbers[rows] == present if len(self._numbers) else np.zeros(len(present), dtype=np.bool_)
        )
        identity = np.full((len(present), 2), _NOTHING, dtype=np.uint64)
        known = np.zeros(len(present), dtype=np.bool_)
        identity[here] = self._identity[rows[here]]
        known[here] = self._known[rows[here]]
        self._numbers, self._identity, self._known, self._shared = present, identity, known, False

    def table(self, flags: NDArray[np.uint8]) -> SpacePages:
        """Return what is here now, with each page's `flags`; later changes do not reach it."""
        self._shared = True
        return SpacePages(self.key, self._numbers, flags, self._identity)

    def identity_of(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return what pages that are here (ascending) hold; shape (n, 2)."""
        found: NDArray[np.uint64] = self._identity[np.searchsorted(self._numbers, numbers)]
        return found

    def _rows(self, numbers: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        rows = np.searchsorted(self._numbers, numbers)
        if not len(self._numbers):
            return rows, np.zeros(len(numbers), dtype=np.bool_)
        rows = np.minimum(rows, len(self._numbers) - 1)
        return rows, self._numbers[rows] == numbers
