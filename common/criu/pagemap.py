"""The pagemap of one address space: which pages a checkpoint knows, and where each one's bytes are.

In and out: the entries of a `pagemap-*.img` as frozen values, the same as two numpy arrays (one element a
page), and the file's bytes. A pagemap has one `pages_id`: its bytes are in `pages-<pages_id>.img`, where
the pages of the entries that say PE_PRESENT stand one after the other, in the entries' order.

Written byte for byte as CRIU 4.2 does (`criu/page-xfer.c`): the count in the 64-bit field, the older required
32-bit field zero, flags always there. Images of CRIU before 4.2 (32-bit count only) and the still older
`in_parent` are understood. Flags or fields that 4.2 doesn't know (a later one may compress pages) are
refused: a page whose meaning is in doubt must never be restored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from common.criu.framing import (
    DAMAGED_HINT,
    NEWER_HINT,
    Image,
    ImageKind,
    parse_image,
    read_bytes,
    serialize_image,
)
from common.criu.proto.pagemap_pb2 import pagemap_entry, pagemap_head
from common.errors import StoreError

PAGE_SIZE = 4096
PE_PARENT = 1
"""The page's content is in the parent checkpoint."""
PE_LAZY = 2
"""The page may be brought in after the process runs again."""
PE_PRESENT = 4
"""The page's content is in this checkpoint's pages image."""
_KNOWN_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT

MAX_PAGES = 1 << 28
"""Most pages (1 TiB) that one pagemap may name: a damaged count must not exhaust memory."""

_ADDRESS_LIMIT = 1 << 64


class PagemapEntry(msgspec.Struct, frozen=True, gc=False):
    """A run of `nr_pages` pages from `vaddr` (bytes; an offset in the segment for shared memory)."""

    vaddr: int
    nr_pages: int
    flags: int

    @property
    def end(self) -> int:
        """The first address behind the run."""
        return self.vaddr + self.nr_pages * PAGE_SIZE


class Pagemap(msgspec.Struct, frozen=True):
    """All entries of one address space, sorted by address and without overlap."""

    pages_id: int
    entries: tuple[PagemapEntry, ...]

    def count(self, flag: int) -> int:
        """Count the pages whose entry has the flag."""
        return sum(entry.nr_pages for entry in self.entries if entry.flags & flag)


def parse_pagemap(data: bytes, name: str) -> Pagemap:
    """Parse the bytes of a pagemap image; `name` is for messages only.

    Raises `StoreError` for what `parse_image` refuses, for flags and fields of a later CRIU, and for entries
    that are empty, unaligned, out of order, overlapping or more than `MAX_PAGES` in all.
    """
    head, *frames = parse_image(data, name, ImageKind.PAGEMAP).messages
    _refuse_unknown_fields(head, name)
    entries: list[PagemapEntry] = []
    previous_end = total_pages = 0
    for message in cast("list[pagemap_entry]", frames):
        _refuse_unknown_fields(message, name)
        entry = _entry_of(message)
        if entry.flags & ~_KNOWN_FLAGS:
            raise StoreError(f"{name}: page flags {entry.flags:#x} at {entry.vaddr:#x}", hint=NEWER_HINT)
        total_pages += entry.nr_pages
        if (
            entry.nr_pages == 0
            or entry.vaddr % PAGE_SIZE
            or entry.vaddr < previous_end
            or entry.end > _ADDRESS_LIMIT
            or total_pages > MAX_PAGES
        ):
            raise StoreError(
                f"{name}: the entry of {entry.nr_pages} pages at {entry.vaddr:#x} cannot be",
                hint=DAMAGED_HINT,
            )
        previous_end = entry.end
        entries.append(entry)
    return Pagemap(cast(pagemap_head, head).pages_id, tuple(entries))


def serialize_pagemap(pagemap: Pagemap) -> bytes:
    """Give the bytes of the pagemap image, equal to what CRIU 4.2 writes for the same entries."""
    messages: list[pagemap_head | pagemap_entry] = [pagemap_head(pages_id=pagemap.pages_id)]
    messages += (
        pagemap_entry(vaddr=entry.vaddr, compat_nr_pages=0, flags=entry.flags, nr_pages=entry.nr_pages)
        for entry in pagemap.entries
    )
    return serialize_image(Image(ImageKind.PAGEMAP, tuple(messages)))


def read_pagemap(path: Path) -> Pagemap:
    """Read one pagemap image; raises `StoreError` as `parse_pagemap` does, or if it cannot be read."""
    return parse_pagemap(read_bytes(path), path.name)


def write_pagemap(path: Path, pagemap: Pagemap) -> None:
    """Write one pagemap image. Not durable and not atomic: that is the store's business."""
    path.write_bytes(serialize_pagemap(pagemap))


def expand(entries: Iterable[PagemapEntry]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Turn entries into one number (address / 4096) and one flags byte a page, in the entries' order."""
    table = np.array([(e.vaddr, e.nr_pages, e.flags) for e in entries], dtype=np.uint64).reshape(-1, 3)
    first = table[:, 0] // np.uint64(PAGE_SIZE)
    counts = table[:, 1]
    # A page's number is its place in the output plus its run's distance from there (modulo 2**64).
    distance = first - (np.cumsum(counts, dtype=np.uint64) - counts)
    repeats = counts.astype(np.int64)
    page_numbers = np.repeat(distance, repeats)
    page_numbers += np.arange(page_numbers.size, dtype=np.uint64)
    return page_numbers, np.repeat(table[:, 2].astype(np.uint8), repeats)


def compress(page_numbers: NDArray[np.uint64], flags: NDArray[np.uint8]) -> tuple[PagemapEntry, ...]:
    """Turn pages into the fewest entries: neighbours with equal flags become one run.

    `page_numbers` (address / 4096) must grow strictly, and the arrays be equally long, else `ValueError`.
    `compress(*expand(entries))` is `entries` only if no two of them could have been one.
    """
    if page_numbers.shape != flags.shape or page_numbers.ndim != 1:
        raise ValueError("one flags byte is needed for each page")
    if page_numbers.size == 0:
        return ()
    if not np.all(page_numbers[1:] > page_numbers[:-1]):
        raise ValueError("page numbers must grow strictly")
    breaks = (np.diff(page_numbers) != 1) | (flags[1:] != flags[:-1])
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    counts = np.diff(starts, append=page_numbers.size)
    return tuple(
        map(
            PagemapEntry,
            (page_numbers[starts] * np.uint64(PAGE_SIZE)).tolist(),
            counts.tolist(),
            flags[starts].tolist(),
        )
    )


def _entry_of(message: pagemap_entry) -> PagemapEntry:
    """Read one entry as CRIU's own `init_compat_pagemap_entry` does."""
    flags = message.flags
    if message.in_parent:
        flags |= PE_PARENT
    elif not message.HasField("flags"):
        flags = PE_PRESENT
    nr_pages = message.nr_pages if message.HasField("nr_pages") else message.compat_nr_pages
    return PagemapEntry(message.vaddr, nr_pages, flags)


def _refuse_unknown_fields(message: Message, name: str) -> None:
    if len(UnknownFieldSet(message)):
        raise StoreError(f"{name} has fields that this version does not know", hint=NEWER_HINT)
