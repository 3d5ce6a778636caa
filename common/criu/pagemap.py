"""The pagemap of one address space: which pages a checkpoint knows, and where each one's bytes are.

In and out: the entries of a `pagemap-*.img` as frozen values, the same as two numpy arrays (one element a
page), and the file's bytes. A pagemap has one `pages_id`: its bytes are in `pages-<pages_id>.img`, where
the pages of the entries that say PE_PRESENT stand one after the other, in the entries' order.

Written byte for byte as CRIU 4.2 does (`criu/page-xfer.c`): the count in the 64-bit field, the older required
32-bit field zero, flags always there. Images of CRIU before 4.2 (32-bit count only) and the still older
`in_parent` are understood. Flags or fields that 4.2 doesn't know (a later one may compress pages) are
refused: a page whose meaning is in doubt must never be restored.

Who needs arrays asks for them (`parse_runs`, `serialize_pages`): that is much faster (`page_runs`).
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
from common.criu.page_runs import (
    ADDRESS_LIMIT,
    KNOWN_FLAGS,
    MAX_PAGES,
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    PageRuns,
    decode_runs,
    encode_runs,
)
from common.criu.proto.pagemap_pb2 import pagemap_entry, pagemap_head
from common.errors import StoreError

__all__ = [
    "MAX_PAGES",
    "PAGE_SIZE",
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "PageRuns",
    "Pagemap",
    "PagemapEntry",
    "compress",
    "expand",
    "parse_pagemap",
    "parse_runs",
    "read_pagemap",
    "read_runs",
    "serialize_pagemap",
    "serialize_pages",
    "write_pagemap",
]


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


def parse_runs(data: bytes, name: str) -> PageRuns:
    """Parse the bytes of a pagemap image into arrays; raises `StoreError` as `parse_pagemap` does."""
    runs = decode_runs(data)
    return runs if runs is not None else _runs_of(parse_pagemap(data, name).entries)


def read_runs(path: Path) -> PageRuns:
    """Read one pagemap image; raises `StoreError` as `parse_pagemap` does, or if it cannot be read."""
    return parse_runs(read_bytes(path), path.name)


def serialize_pages(pages_id: int, numbers: NDArray[np.uint64], flags: NDArray[np.uint8]) -> bytes:
    """Give the bytes of the image of these pages, in the fewest entries; otherwise as `serialize_pagemap`.

    `numbers` (address / 4096) must grow strictly, and the arrays be equally long, else `ValueError`.
    """
    head = serialize_pagemap(Pagemap(pages_id, ()))
    return head + encode_runs(_compressed(numbers, flags))


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
        if entry.flags & ~KNOWN_FLAGS:
            raise StoreError(f"{name}: page flags {entry.flags:#x} at {entry.vaddr:#x}", hint=NEWER_HINT)
        total_pages += entry.nr_pages
        if (
            entry.nr_pages == 0
            or entry.vaddr % PAGE_SIZE
            or entry.vaddr < previous_end
            or entry.end > ADDRESS_LIMIT
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
    return _runs_of(entries).expand()


def compress(page_numbers: NDArray[np.uint64], flags: NDArray[np.uint8]) -> tuple[PagemapEntry, ...]:
    """Turn pages into the fewest entries: neighbours with equal flags become one run.

    `page_numbers` (address / 4096) must grow strictly, and the arrays be equally long, else `ValueError`.
    `compress(*expand(entries))` is `entries` only if no two of them could have been one.
    """
    runs = _compressed(page_numbers, flags)
    addresses = (runs.first * np.uint64(PAGE_SIZE)).tolist()
    return tuple(map(PagemapEntry, addresses, runs.counts.tolist(), runs.flags.tolist()))


def _runs_of(entries: Iterable[PagemapEntry]) -> PageRuns:
    table = np.array([(e.vaddr, e.nr_pages, e.flags) for e in entries], dtype=np.uint64).reshape(-1, 3)
    return PageRuns(table[:, 0] // np.uint64(PAGE_SIZE), table[:, 1], table[:, 2].astype(np.uint8))


def _compressed(page_numbers: NDArray[np.uint64], flags: NDArray[np.uint8]) -> PageRuns:
    if page_numbers.shape != flags.shape or page_numbers.ndim != 1:
        raise ValueError("one flags byte is needed for each page")
    if not np.all(page_numbers[1:] > page_numbers[:-1]):
        raise ValueError("page numbers must grow strictly")
    breaks = (np.diff(page_numbers) != 1) | (flags[1:] != flags[:-1])
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))[: page_numbers.size]
    counts = np.diff(starts, append=page_numbers.size).astype(np.uint64)
    return PageRuns(page_numbers[starts], counts, flags[starts])


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
