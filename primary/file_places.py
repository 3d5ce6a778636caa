"""Where the files of a workload stand in pages: room for contents, and pages of records.

In: sizes of files, packed records. Out: page numbers that stay as long as nothing makes them move, so that
what did not change is not sent. `common.file_records` says what the pages mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from common.errors import CaptureError
from common.file_records import MOST_LIST_BYTES, MOST_PAGES, pack_page

_CLASS_BITS: Final = 48
"""Places of one class stand in page numbers of their own: 2^48 of them."""
_GROWTH_BITS: Final = 4
"""A place of the next class has sixteen times the room: what grows is sent again once in a while, at most a
fifteenth of it."""


def _class_of(pages: int) -> int:
    return -(-(pages - 1).bit_length() // _GROWTH_BITS)


def _slot_of(place: int) -> int:
    return (place & ((1 << _CLASS_BITS) - 1)) >> (_GROWTH_BITS * (place >> _CLASS_BITS))


class Places:
    """Gives out ranges of page numbers. Small files stand side by side, each kind of size apart."""

    def __init__(self) -> None:
        self._next = [0] * (_class_of(MOST_PAGES) + 1)
        self._free: list[list[int]] = [[] for _ in self._next]

    def take(self, pages: int) -> int:
        """Return the first page of a free place with room for so many (at least one).

        Raises CaptureError for more than `MOST_PAGES`.
        """
        if pages > MOST_PAGES:
            raise CaptureError(
                f"a file of {pages} pages is larger than 1 TiB", hint="declare its directory `shared`"
            )
        size = _class_of(pages)
        if self._free[size]:
            slot = heapq.heappop(self._free[size])
        else:
            slot = self._next[size]
            self._next[size] += 1
        return (size << _CLASS_BITS) + (slot << (_GROWTH_BITS * size))

    def resume(self, taken: Iterable[int]) -> None:
        """Begin with these places taken; nothing may have been taken before."""
        slots: dict[int, set[int]] = {}
        for place in taken:
            size = place >> _CLASS_BITS
            slots.setdefault(size, set()).add(_slot_of(place))
        for size, used in slots.items():
            self._next[size] = max(used) + 1
            self._free[size] = sorted(set(range(self._next[size])) - used)

    def give_back(self, place: int) -> None:
        """Let another one have that place."""
        heapq.heappush(self._free[place >> _CLASS_BITS], _slot_of(place))

    @staticmethod
    def start_of(page: int) -> int:
        """Return the first page of the place that a page lies in."""
        return page >> (bits := _GROWTH_BITS * (page >> _CLASS_BITS)) << bits

    @staticmethod
    def fits(place: int, pages: int) -> bool:
        """Tell whether that place has room for so many pages, and not far too much."""
        return _class_of(max(pages, 1)) == place >> _CLASS_BITS


class RecordPages:
    """Packed records by key, each on a page; a page changes only with the records on it."""

    def __init__(self) -> None:
        self._pages: list[dict[Hashable, bytes]] = []
        self._used: list[int] = []
        self._where: dict[Hashable, int] = {}
        self._roomy: set[int] = set()
        self._changed: set[int] = set()
        self._content: dict[int, bytes] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._where

    def put(self, key: Hashable, packed: bytes) -> None:
        """Have `key` say that; it stays on its page if it fits there."""
        page = self._where.get(key)
        if page is not None:
            before = self._pages[page][key]
            if before == packed:
                return
            if self._used[page] + len(packed) - len(before) <= MOST_LIST_BYTES:
                self._pages[page][key] = packed
                self._use(page, len(packed) - len(before))
                return
            self.remove(key)
        page = self._page_for(len(packed))
        self._pages[page][key] = packed
        self._where[key] = page
        self._use(page, len(packed))

    def remove(self, key: Hashable) -> None:
        """Forget what `key` said; harmless if it said nothing."""
        page = self._where.pop(key, None)
        if page is not None:
            self._use(page, -len(self._pages[page].pop(key)))

    def changes(self) -> dict[int, bytes]:
        """Return the pages that changed since the last call."""
        changed = {page: pack_page(self._pages[page].values()) for page in sorted(self._changed)}
        self._content = {**self._content, **changed}
        self._changed.clear()
        return changed

    def snapshot(self) -> Mapping[int, bytes]:
        """Return all pages as of the last `changes`; later ones do not reach it."""
        return MappingProxyType(self._content)

    def _use(self, page: int, more_bytes: int) -> None:
        self._used[page] += more_bytes
        self._changed.add(page)
        if self._used[page] < MOST_LIST_BYTES * 3 // 4:
            self._roomy.add(page)
        else:
            self._roomy.discard(page)

    def _page_for(self, size: int) -> int:
        if self._roomy and size <= MOST_LIST_BYTES // 4:
            return next(iter(self._roomy))
        self._pages.append({})
        self._used.append(0)
        return len(self._pages) - 1
