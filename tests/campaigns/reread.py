"""Whether what a freeze holds for unchanged is so: read once more, while everything stands still.

In: the processes that a freeze has taken. Out: the pages whose content is not what the epoch will say of
them. No dump by stock CRIU is needed for that, nor a cgroup that was frozen before: a freeze is as it always
is, but longer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.fast import FastBackend
from primary.page_set import PageSet
from primary.pages import DIRTY, UNREADABLE, FrozenBuffer, pages_in, read_running
from primary.process import TrackedProcess
from primary.shim import ShimChannel


class RereadingBackend(FastBackend):
    """The fast backend, which looks once more at what it holds for unchanged, in epochs that are to be so."""

    _stale: list[str] | None = None

    def _take_frozen(self, channel: ShimChannel | None) -> None:
        try:
            super()._take_frozen(channel)
        finally:
            for process in self._taken if self._stale is not None else ():
                if not process.space.error:
                    self._stale += self._look_again(process)

    @contextlib.contextmanager
    def rereading(self, stale: list[str] | None) -> Iterator[None]:
        """Look once more in what is captured meanwhile; what is found goes to `stale`. None: do not look."""
        self._stale = stale
        try:
            yield
        finally:
            self._stale = None

    def _look_again(self, process: TrackedProcess) -> list[str]:
        clean = process.space.runs[(process.space.runs["flags"] & DIRTY) == 0].copy()
        numbers = pages_in(clean).numbers
        clean["flags"] &= UNREADABLE
        content = memoryview(bytearray(len(numbers) * PAGE_BYTES))
        good = read_running(process.pid, clean, content)
        believed, here = _believed(process, self._buffer, self._hasher, numbers)
        wrong = good & here & (self._hasher.identify(content) != believed).any(axis=1)
        return _told(process, numbers[wrong])


def _believed(
    process: TrackedProcess, buffer: FrozenBuffer, hasher: PageHasher, numbers: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return what pages are held to contain, and of which pages anything is held; shapes (n, 2) and (n,)."""
    identity, here = np.zeros((len(numbers), 2), dtype=np.uint64), np.zeros(len(numbers), dtype=np.bool_)
    known = (process.book.known & PageSet.of(numbers)).numbers
    tables = [(known, process.book.identity_of(known))]
    if process.space.early is not None:  # it says more of what was copied beside CRIU
        copied = pages_in(process.space.early.copied).numbers
        content = buffer.content(process.space.early.content_at, len(copied))
        tables.append((copied, hasher.identify(content)))
    for table, identities in tables:
        _, rows, places = np.intersect1d(numbers, table, assume_unique=True, return_indices=True)
        identity[rows], here[rows] = identities[places], True
    return identity, here


def _told(process: TrackedProcess, wrong: NDArray[np.uint64]) -> list[str]:
    """Say which page is stale first, of which mapping, and what the kernel's page table has of it."""
    if not len(wrong):
        return []
    address = int(wrong[0]) * PAGE_BYTES
    mapping = "no mapping"
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= address < end:
            mapping = line
    with open(f"/proc/{process.pid}/pagemap", "rb", buffering=0) as pagemap:
        entry = int.from_bytes(os.pread(pagemap.fileno(), 8, address // PAGE_BYTES * 8), "little")
    return [
        f"{process.key.pagemap_name}: {len(wrong)} pages changed unseen, the first at {address:#x} in "
        f"{mapping} (page table entry {entry:#x})"
    ]
