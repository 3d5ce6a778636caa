"""Which pages need not be sent because another page holds the same: files are copied, and written anew.

In: the pages of a space whose content would be sent, and what the replica's base has. Out: those of them that
hold what an earlier one of them does, or a page of the base does, wherever that stood; and which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.bulk import IN_BASE
from common.identity import is_fresh
from primary.capture import SpacePages
from primary.page_set import NO_PAGES, PageSet

_LEAST: Final = 256
_SHARE: Final = 16
"""The base is looked through if so many pages, and one for so many of its own, would be sent: to sort what it
has takes 0.1 µs a page, to send a page 10."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """Pages that hold what others do."""

    pages: PageSet
    sources: NDArray[np.uint64]
    """For each of them, in their order, the page that holds the same, `IN_BASE` added if it is the base's."""


NO_REPEATS: Final = Repeats(NO_PAGES, np.empty(0, dtype=np.uint64))


def repeats_in(space: SpacePages, content: PageSet, base: SpacePages | None) -> Repeats:
    """Find them among `content`, of which all identities must be known. `base`: what is held of the space."""
    if len(content) < 2 and base is None:
        return NO_REPEATS
    numbers = content.numbers
    identity = space.identities.get(numbers)
    known = ~is_fresh(identity)
    numbers, identity = numbers[known], identity[known]
    earlier = _earlier(numbers, identity)
    sources, rows = earlier.copy(), np.flatnonzero(earlier == numbers)
    if base is not None and len(rows) >= max(_LEAST, len(base.pages) // _SHARE):
        found, held = _held(identity[rows], base)
        sources[rows[found]] = held | np.uint64(IN_BASE)
        sources = sources[np.searchsorted(numbers, earlier)]  # what is like those is read there as well
    again = sources != numbers
    return Repeats(PageSet.of(numbers[again]), sources[again])


def _earlier(numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return for each page the first one that holds the same: itself, or an earlier one."""
    order = np.argsort(identity[:, 0], kind="stable")
    ordered = identity[order]
    begins = np.append(True, ordered[1:, 0] != ordered[:-1, 0])[: len(order)]
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    same = identity[first, 1] == ordered[:, 1]
    sources = numbers.copy()
    sources[order[same]] = numbers[first[same]]
    return sources


def _held(identity: NDArray[np.uint64], base: SpacePages) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """Mark what a page of the base holds too, and return which pages these are."""
    numbers = base.pages.numbers
    if not len(numbers):
        return np.zeros(len(identity), dtype=np.bool_), numbers
    held = base.identities.get(numbers)
    order = np.argsort(held[:, 0])
    at = np.minimum(np.searchsorted(held[order, 0], identity[:, 0]), len(order) - 1)
    rows = order[at]
    found: NDArray[np.bool_] = (held[rows] == identity).all(axis=1)
    return found, numbers[rows[found]]
