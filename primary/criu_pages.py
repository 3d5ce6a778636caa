"""Pages that CRIU captured itself in a fast epoch, and what its images say of all pages.

In: the images of one dump. Out: page numbers with CRIU's flags, their content added to the epoch's layer.
That is shared memory, the vDSO, and nothing else: what the workload owns privately is hidden from CRIU.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from common.criu.framing import ImageKind, read_image
from common.criu.images import (
    MAP_HUGETLB,
    PE_LAZY,
    PE_PRESENT,
    MemoryMap,
    PageImage,
    Vma,
    read_pagemap,
)
from common.criu.proto import core_pb2
from common.errors import CaptureError
from common.identity import PageHasher, fresh_identity
from common.model import PAGE_BYTES
from primary.book import PageBook
from primary.layers import LayerChain, LayerWriter
from primary.page_set import PageSet

Marks = Callable[[NDArray[np.uint64]], NDArray[np.bool_]]
"""Marks some of the pages that it is given; shapes (n,)."""

_BLOCK_PAGES = 512
_MAP_LOCKED, _MAP_DROPPABLE = 0x2000, 0x08
"""As in <linux/mman.h>."""
_VDSO, _VSYSCALL, _VVAR, _GUARD = 1 << 3, 1 << 2, 1 << 12, 1 << 16
"""Bits of `Vma.status` (CRIU 4.2, `criu/include/image.h`)."""


def take_criu_pages(
    hasher: PageHasher,
    writer: LayerWriter,
    book: PageBook,
    directory: Path,
    image: PageImage,
    *,
    missing: LayerChain | None,
    always: Marks | None = None,
) -> tuple[PageSet, PageSet]:
    """Note in `book` what CRIU dumped of a space, and keep what changed; return its pages, and the lazy ones.

    With `missing`, pages that are not in that chain are kept too. Those that `always` marks are kept in any
    case, and get an identity that no page had. Raises CaptureError if an entry says its page is elsewhere.
    """
    pages, lazy = dumped_pages(directory, image)
    if not len(pages):
        return pages, lazy
    book.expect(pages)
    file = os.open(directory / image.pages_name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        buffer = memoryview(bytearray(min(len(pages), _BLOCK_PAGES) * PAGE_BYTES))
        for block in pages.pieces(_BLOCK_PAGES):
            content = buffer[: len(block) * PAGE_BYTES]
            if os.preadv(file, [content], at) != len(content):
                raise CaptureError(f"{image.pages_name} ends too early")
            at += len(content)
            keep(hasher, writer, book, block, content)
            if missing is not None and (marks := ~missing.covered(image.key, block)).any():
                writer.add(book.key, block[marks], content, np.flatnonzero(marks))
            if always is not None and (marks := always(block)).any():
                writer.add(book.key, block[marks], content, np.flatnonzero(marks))
                book.put(block[marks], np.tile(fresh_identity(), (int(marks.sum()), 1)))
    finally:
        os.close(file)
    return pages, lazy


def dumped_pages(directory: Path, image: PageImage) -> tuple[PageSet, PageSet]:
    """Return the pages that CRIU dumped of a space, in the order in which they stand, and the lazy ones.

    Raises CaptureError if an entry says its page is elsewhere.
    """
    entries = read_pagemap(directory / image.key.pagemap_name).entries
    if not all(entry.flags & PE_PRESENT for entry in entries):
        raise CaptureError(f"{image.key.pagemap_name} names pages that the dump does not hold")
    lazy = [entry for entry in entries if entry.flags & PE_LAZY]
    return (
        _spanned((entry.vaddr, entry.end) for entry in entries),
        _spanned((entry.vaddr, entry.end) for entry in lazy),
    )


def keep(
    hasher: PageHasher,
    writer: LayerWriter,
    book: PageBook,
    numbers: NDArray[np.uint64],
    content: memoryview,
    good: NDArray[np.bool_] | None = None,
) -> None:
    """Note what pages (ascending) hold, those that are `good`; write down what changed and is not zeros."""
    identity = hasher.identify(content)
    rows = np.arange(len(numbers)) if good is None else np.flatnonzero(good)
    numbers, identity = numbers[rows], identity[rows]
    changed = book.differs(numbers, identity) & (identity != 0).any(axis=1)
    writer.add(book.key, numbers[changed], content, rows[changed])
    book.put(numbers, identity)


def restored_pages(private: PageSet, memory_map: MemoryMap, stacks: PageSet) -> tuple[PageSet, PageSet]:
    """Return which of these private pages CRIU would restore, and which of those may come lazily.

    That is by the rule of CRIU's `vma_entry_can_be_lazy` (criu/include/vma.h), but for pages that a stack
    pointer points into.
    """
    vmas = [
        vma
        for vma in memory_map.vmas
        if vma.flags & mmap.MAP_PRIVATE and not (vma.flags & _MAP_DROPPABLE or vma.status & _GUARD)
    ]
    lazy = [
        vma
        for vma in vmas
        if vma.flags & mmap.MAP_ANONYMOUS
        and not vma.flags & (_MAP_LOCKED | MAP_HUGETLB)
        and not vma.status & (_VDSO | _VSYSCALL | _VVAR)
    ]
    restored = private & pages_of(vmas)
    return restored, (restored & pages_of(lazy)) - stacks


def pages_of(vmas: Iterable[Vma]) -> PageSet:
    """Return all pages that there may be in mappings."""
    return _spanned((vma.start, vma.end) for vma in vmas)


def stack_pages(directory: Path) -> PageSet:
    """Return the pages that any thread's stack pointer points into."""
    pointers = []
    for path in directory.glob("core-*.img"):
        (core,) = cast("tuple[core_pb2.core_entry]", read_image(path, ImageKind.CORE).messages)
        for info in ("thread_info", "ti_aarch64"):
            if core.HasField(info):
                pointers.append(getattr(core, info).gpregs.sp)
    return _spanned((pointer, pointer + PAGE_BYTES) for pointer in pointers)


def _spanned(ranges: Iterable[tuple[int, int]]) -> PageSet:
    """Return the pages from each address to another (exclusive), both rounded down."""
    bounds = np.array(list(ranges), dtype=np.uint64).reshape(-1, 2) // np.uint64(PAGE_BYTES)
    return PageSet.spanning(bounds[:, 0], bounds[:, 1])
