"""Sets of pages of one address space, as runs of neighbours: what there is of a large one is soon said.

In: page numbers (address / 4096), or where runs of them begin and end. Out: sets that are never changed, what
they have in common and in what they differ, and each page's row: how many pages of the set come before it.
Nothing here takes memory or time by the number of pages, but where the numbers themselves are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from common.model import PAGE_BYTES

_Number = TypeVar("_Number", np.uint64, np.int64)
_Rule = Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]


class PageSet:
    """Pages in ascending order; 16 bytes a run of neighbours."""

    __slots__ = ("_rows", "_starts")
    __hash__ = None  # type: ignore[assignment]  # equal ones may be many MiB

    def __init__(self, bounds: NDArray[np.uint64]) -> None:
        """`bounds` are first page and end of each run, in strictly ascending order; shape (2n,)."""
        self._starts = bounds[0::2].copy()
        self._rows = np.concatenate(([0], np.cumsum(bounds[1::2] - self._starts))).astype(np.int64)

    @classmethod
    def spanning(cls, starts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> PageSet:
        """All pages from each start to its end (exclusive); in any order, they may be empty or overlap."""
        here = starts < ends
        starts, ends = starts[here], ends[here]
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        apart = starts[1:] > ends[:-1]
        first, last = np.flatnonzero(np.append(True, apart)), np.flatnonzero(np.append(apart, True))
        if not len(starts):
            return NO_PAGES
        return cls(np.stack((starts[first], ends[last]), axis=1).reshape(-1))

    @classmethod
    def of(cls, numbers: NDArray[np.uint64]) -> PageSet:
        """Those pages, in ascending order, each once or several times."""
        if not len(numbers):
            return NO_PAGES
        apart = np.diff(numbers) > 1
        bounds = np.stack(
            (numbers[np.append(True, apart)], numbers[np.append(apart, True)] + np.uint64(1)), axis=1
        )
        return cls(bounds.reshape(-1))

    @classmethod
    def union(cls, parts: list[PageSet]) -> PageSet:
        """All pages of all parts."""
        if not parts:
            return NO_PAGES
        bounds = np.concatenate([part.bounds for part in parts])
        return cls.spanning(bounds[0::2], bounds[1::2])

    def __len__(self) -> int:
        return int(self._rows[-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageSet):
            return NotImplemented
        return self is other or (
            np.array_equal(self._starts, other._starts) and np.array_equal(self._rows, other._rows)
        )

    def __and__(self, other: PageSet) -> PageSet:
        return self if self == other else self._joined(other, np.logical_and)

    def __or__(self, other: PageSet) -> PageSet:
        return self if not len(other) or self == other else self._joined(other, np.logical_or)

    def __sub__(self, other: PageSet) -> PageSet:
        return self if not len(other) else self._joined(other, np.greater)

    def __xor__(self, other: PageSet) -> PageSet:
        return NO_PAGES if self == other else self._joined(other, np.not_equal)

    def _joined(self, other: PageSet, rule: _Rule) -> PageSet:
        """The pages for which the rule holds of being here and being there."""
        bounds = np.concatenate((self.bounds, other.bounds))
        order = np.argsort(bounds, kind="stable")  # which merges what is in order already
        bounds, ours = bounds[order], order < 2 * len(self._starts)
        # A page lies within a run if an odd number of bounds are at it or before it.
        here, there = np.logical_xor.accumulate(ours), np.logical_xor.accumulate(~ours)
        last = np.append(bounds[1:] != bounds[:-1], True)[: len(bounds)]
        bounds, marks = bounds[last], rule(here[last], there[last])
        return PageSet(bounds[np.diff(marks, prepend=False)])

    @property
    def bounds(self) -> NDArray[np.uint64]:
        """First page and end of each run; shape (2n,)."""
        bounds = np.repeat(self._starts, 2)
        bounds[1::2] += np.diff(self._rows).astype(np.uint64)
        return bounds

    @property
    def byte_bounds(self) -> NDArray[np.uint64]:
        """First byte and end of each run; shape (2n,)."""
        return self.bounds * np.uint64(PAGE_BYTES)

    @property
    def numbers(self) -> NDArray[np.uint64]:
        """Each page's number, ascending; shape (n,). 8 bytes a page: for what is small."""
        return self.at(np.arange(len(self)))

    def pieces(self, most: int) -> Iterator[NDArray[np.uint64]]:
        """Yield the numbers of `most` pages at a time, ascending."""
        for first in range(0, len(self), most):
            yield self.at(np.arange(first, min(first + most, len(self))))

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the numbers of the pages at these rows; shape (n,)."""
        run = np.searchsorted(self._rows, rows, side="right") - 1
        numbers: NDArray[np.uint64] = self._starts[run] + (rows - self._rows[run]).astype(np.uint64)
        return numbers

    def at_rows(self, bounds: NDArray[np.int64]) -> PageSet:
        """Return the pages from each first row to its end, in strictly ascending order; shape (2n,)."""
        points = in_order(np.concatenate((bounds, self._rows)))
        first, end = points[:-1], points[1:]
        here = (np.searchsorted(bounds, first, side="right") & 1).astype(np.bool_)
        starts = self.at(first[here])
        return PageSet.spanning(starts, starts + (end - first)[here].astype(np.uint64))

    def has(self, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark those of the pages that are here; shape (n,)."""
        marks: NDArray[np.bool_] = self._reached(numbers)[1] > 0
        return marks

    def rank(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return how many pages here come before each of these: the row of one that is here; shape (n,)."""
        runs, left = self._reached(numbers)
        rank: NDArray[np.int64] = self._rows[runs] - left
        return rank

    def marks(self, other: PageSet) -> NDArray[np.bool_]:
        """Mark the rows of those pages that the other one has; shape (n,)."""
        toggles = np.zeros(len(self) + 1, dtype=np.bool_)
        np.logical_xor.at(toggles, self.rank(other.bounds), True)
        marks: NDArray[np.bool_] = np.logical_xor.accumulate(toggles)[:-1]
        return marks

    def _reached(self, numbers: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return how many runs begin at each page or before, and what is left of the last of them."""
        runs = np.searchsorted(self._starts, numbers, side="right")
        if not len(self):
            return runs, np.zeros(len(numbers), dtype=np.int64)
        passed = numbers.astype(np.int64) - self._starts[runs - 1].astype(np.int64)
        left = self._rows[runs] - self._rows[runs - 1] - passed
        return runs, np.where(runs > 0, np.maximum(left, 0), 0)


def in_order(values: NDArray[_Number]) -> NDArray[_Number]:
    """Return the values in ascending order, each once; `np.unique` takes a hundred times as long for many."""
    values = np.sort(values)
    found: NDArray[_Number] = values[np.append(True, values[1:] != values[:-1])[: len(values)]]
    return found


NO_PAGES = PageSet(np.empty(0, dtype=np.uint64))
