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
from primary.identities import NO_IDENTITIES
from primary.page_set import PageSet


class PageBook:
    """Pages, identities and what is known, of one address space; used by one thread at a time.

    Takes 17 bytes a page, most of which it shares with the tables that were taken of it.
    """

    def __init__(self, key: SpaceKey) -> None:
        self.key = key
        self._identities = NO_IDENTITIES
        self._shared = True
        self._known = np.empty(0, dtype=np.bool_)

    @property
    def pages(self) -> PageSet:
        """All pages that were present when last looked."""
        return self._identities.pages

    @property
    def known(self) -> PageSet:
        """Those of them that are known."""
        if self.is_known:
            return self.pages
        return self.pages.at_rows(np.flatnonzero(np.diff(self._known, prepend=False, append=False)))

    @property
    def unknown(self) -> PageSet:
        """Those of them that are not."""
        return self.pages - self.known

    @property
    def is_known(self) -> bool:
        """Whether all of them are known."""
        return bool(self._known.all())

    def knows(self, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark those pages, of such as are here, that are known; shape (n,)."""
        marks: NDArray[np.bool_] = self._known[self.pages.rank(numbers)]
        return marks

    def differs(self, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark those of the pages (ascending) that are new here or held something else; shape (n,)."""
        here = self.pages.has(numbers)
        marks = ~here
        marks[here] = (self.identity_of(numbers[here]) != identity[here]).any(axis=1)
        return marks

    def put(self, numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> None:
        """Take note of what pages hold (ascending, unique): they are known from now on."""
        if not self.pages.has(numbers).all():
            self.expect(PageSet.of(numbers))
        if self._shared:
            self._identities, self._shared = self._identities.copy(), False
        self._identities.put(numbers, identity)
        self._known[self.pages.rank(numbers)] = True

    def expect(self, pages: PageSet) -> None:
        """Make room for pages of which something will be `put`; they are unknown until then."""
        self._become(self.pages | pages)

    def forget(self, pages: PageSet) -> None:
        """Hold the content of these pages for doubtful."""
        for first, end in self.pages.rank(pages.bounds).reshape(-1, 2).tolist():
            self._known[first:end] = False

    def forget_range(self, start: int, end: int) -> None:
        """Hold the content of all pages between two addresses for doubtful."""
        if start < end:
            self.forget(PageSet(np.array([start, end], dtype=np.uint64) // np.uint64(PAGE_BYTES)))

    def forget_all(self) -> None:
        """Hold everything for doubtful."""
        self._known[:] = False

    def restrict(self, present: PageSet) -> None:
        """Keep just the pages that are present; those that were not in here are unknown."""
        self._become(present)

    def table(self, lazy: PageSet) -> SpacePages:
        """Return what is here now, of which `lazy` may come lazily; later changes do not reach it."""
        self._shared = True
        return SpacePages(self.key, self._identities, lazy)

    def identity_of(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return what pages that are here (ascending) hold; shape (n, 2)."""
        return self._identities.get(numbers)

    def zeros(self, pages: PageSet) -> PageSet:
        """Return those of the pages, which are here, that hold zeros only."""
        return self._identities.zeros(pages)

    def _become(self, pages: PageSet) -> None:
        """Have just these pages, and know of them what was known."""
        if pages == self.pages:
            return
        known = self.known
        self._identities, self._shared = self._identities.reshaped(pages), False
        self._known = pages.marks(known)
