"""One process of a workload, as the fast backend follows it from epoch to epoch.

In: its PID, and what the page reader finds. Out: pages that were copied while it ran, what the shim needs to
know of it, and its part of an epoch. A process that was never tracked (it came just before the freeze, or
cannot be) is captured whole: all that it has reads as written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.criu.images import MemoryMap, PageImage, SpaceKey
from common.errors import CaptureError
from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.book import PageBook
from primary.capture import SpacePages
from primary.criu_pages import keep, pages_of, restored_pages, take_criu_pages
from primary.layers import LayerChain, LayerWriter
from primary.page_set import PageSet
from primary.pages import (
    DIRTY,
    OWNED,
    READABLE,
    UNREADABLE,
    FrozenBuffer,
    Space,
    pages_in,
    read_running,
    runs_of,
)
from primary.shim import Smaps
from primary.verification import Slice

_BLOCK_PAGES: Final = 512
_WRITTEN_RUNS: Final = 16_384
"""Runs that written pages make of few others: two for each of the most that may be copied frozen."""
_SMAPS_AGE_S: Final = 1.0
_SMAPS_SHARE: Final = 20.0
"""The flags of unchanged mappings are read anew after a second, and after 20 times as long as that takes."""
_DROPPABLE: Final = b" dp "
"""Among the flags of a mapping (MAP_DROPPABLE, since 6.11): the kernel may drop its pages."""
_KCMP: Final = {"x86_64": 312, "aarch64": 272}
_KCMP_VM: Final = 1


class TrackedProcess:
    """What is known of one process; its methods block, and are called by one thread at a time."""

    def __init__(self, pid: int, space: Space) -> None:
        """`space` is what its tracker scans it with. Raises CaptureError if there is no such process."""
        self.pid = pid
        self.started_ticks = _started_ticks(pid)
        self.key = SpaceKey("task", _pid_within(pid))
        self.book = PageBook(self.key)
        self.space = space
        self.borrows = False
        """It lives in the address space of another process of the workload, until it executes a program."""
        self._smaps: Smaps | None = None
        self._smaps_until_s = 0.0
        self._looked, self._differing = 0, np.empty(0, dtype=np.uint64)

    @property
    def is_same(self) -> bool:
        """Whether the PID still is this process's, and it has not ended."""
        try:
            return _started_ticks(self.pid) == self.started_ticks
        except CaptureError:
            return False

    @property
    def has_memory(self) -> bool:
        """Whether it has any: one that is ending has none, before it is a zombie."""
        try:
            with open_of(self.pid, "pagemap", os.O_RDONLY):  # newer kernels refuse; older ones say 0 pages
                return self.is_same and _statm(self.pid)[0] > 0
        except CaptureError:
            return False

    def borrows_from(self, others: Iterable[TrackedProcess]) -> bool:
        """Look whether it has an address space of its own; remember it in `borrows`.

        What was written is told once for each address space. A child of vfork that was asked for it would
        take from its parent what the parent's book never learned of.
        """
        self.borrows = any(_share_memory(self.pid, other.pid) for other in others if not other.borrows)
        return self.borrows

    @property
    def state(self) -> str:
        """The letter that proc(5) has for it: `t` while a tracer holds it; `X` if it is gone."""
        try:
            return _stat(self.pid)[0]
        except CaptureError:
            return "X"

    # --- while it runs ------------------------------------------------------------------------------

    def copy(
        self,
        hasher: PageHasher,
        writer: LayerWriter,
        wanted: PageSet,
        owned: NDArray[np.void] | None = None,
    ) -> int:
        """Copy pages that were protected before, or cleared; return how many were wanted.

        `owned` are its mappings that are ours, if they are known. A page that cannot be read stays unknown.
        """
        if owned is None:
            vmas = self.space.mappings()
            owned = vmas[(vmas["flags"] & OWNED) != 0]
        self.book.expect(wanted)
        for block, content, good in self._read(wanted, owned):
            keep(hasher, writer, self.book, block, content, good)
        return len(wanted)

    def copy_uncovered(
        self, hasher: PageHasher, writer: LayerWriter, chain: LayerChain, until_s: float
    ) -> None:
        """Copy known pages whose content is in no layer, as many as the time allows."""
        uncovered = self.book.known - chain.of(self.key)
        uncovered -= self.book.zeros(uncovered)
        vmas = self.space.mappings()
        owned = vmas[(vmas["flags"] & OWNED) != 0]
        for block, content, good in self._read(uncovered, owned):
            if time.monotonic() > until_s:
                return
            # What was written since is not what the book says; it is copied as such.
            same = (hasher.identify(content) == self.book.identity_of(block)).all(axis=1)
            rows = np.flatnonzero(good & same)
            writer.add(self.key, block[rows], content, rows)

    def _read(
        self, pages: PageSet, owned: NDArray[np.void]
    ) -> Iterator[tuple[NDArray[np.uint64], memoryview, NDArray[np.bool_]]]:
        """Read pages in blocks: numbers, content, and which of them could be read."""
        buffer = memoryview(bytearray(min(len(pages), _BLOCK_PAGES) * PAGE_BYTES))
        for numbers in pages.pieces(_BLOCK_PAGES):
            block, runs = _runs_within(numbers, owned)
            if len(block):
                content = buffer[: len(block) * PAGE_BYTES]
                yield block, content, read_running(self.pid, runs, content)

    def look(self, hasher: PageHasher, due: Slice | None) -> None:
        """Read the pages that are `due`, and note which of them are not what the book says of them.

        They may have been written since; `compare` tells what the next freeze finds of that.
        """
        self._looked, self._differing = 0, np.empty(0, dtype=np.uint64)
        if due is None:
            return
        numbers = due.within(self.book.pages)
        pages = PageSet.of(numbers[self.book.knows(numbers)])
        vmas = self.space.mappings()
        differing = [self._differing]
        for block, content, good in self._read(pages, vmas[(vmas["flags"] & OWNED) != 0]):
            differs = (hasher.identify(content) != self.book.identity_of(block)).any(axis=1)
            differing.append(block[good & differs])
            self._looked += int(good.sum())
        self._differing = np.concatenate(differing)

    def prepare(self, *, early: bool = False) -> None:
        """Lay everything out for the freeze; with `early`, copy as much as can be while CRIU is at work."""
        bounds = self.book.known.byte_bounds
        self.space.knows(bounds)
        written = min(len(self.book.pages), _WRITTEN_RUNS)
        self.space.make_room(len(bounds) // 2 * 5 // 4 + written, early=early)

    def smaps(self) -> Smaps | None:
        """Return what its smaps say, read anew if its mappings changed or some time has passed.

        Or if any may drop its pages: criu leaves those out, and an ordinary mapping may be there by now.
        """
        try:
            maps = Path(f"/proc/{self.pid}/maps").read_bytes()
            now_s = time.monotonic()
            if self._smaps is None or self._smaps.maps != maps or now_s > self._smaps_until_s:
                text = Path(f"/proc/{self.pid}/smaps").read_bytes()
                self._smaps = Smaps.parse(text)
                took_s = time.monotonic() - now_s
                kept_s = 0.0 if _DROPPABLE in text else max(_SMAPS_AGE_S, _SMAPS_SHARE * took_s)
                self._smaps_until_s = now_s + kept_s
        except OSError:
            self._smaps = None
        return self._smaps

    def forget_all(self) -> None:
        """Hold all of its memory for doubtful."""
        self.book.forget_all()
        if self.space.frames is not None:
            self.space.frames.forget()

    # --- after a freeze -----------------------------------------------------------------------------

    def doubt_early(self) -> None:
        """Hold for doubtful what was protected while CRIU was at work: what is said of it is out of date."""
        early = self.space.early
        if early is not None and early.is_lost:
            self.forget_all()
        elif early is not None:
            self.book.forget(pages_in(early.copied))

    def keep_early(
        self, hasher: PageHasher, writer: LayerWriter, buffer: FrozenBuffer, missing: LayerChain | None
    ) -> None:
        """Take in the copies that were made of it, which are good whatever became of the freeze.

        With `missing`, pages that are not in that chain are kept too, though nothing changed in them.
        """
        early = self.space.early
        if early is not None:
            self._keep(hasher, writer, buffer, early.content_at, early.copied, missing)

    def not_taken(self) -> None:
        """The epoch came to nothing: what was protected for it is unknown."""
        self.space.grow(self.space.error)
        if self.space.protects and self.space.error:
            self.forget_all()
        elif self.space.protects:
            runs = self.space.runs
            self.book.restrict(pages_in(runs))
            self.book.forget(pages_in(runs[(runs["flags"] & DIRTY) != 0]))

    def compare(self) -> tuple[int, NDArray[np.uint64]]:
        """Find the pages that `look` found to differ, and that nobody was told were written by the freeze.

        Returns how many were compared, and which of them differ: their writes were missed. Comes before
        `assemble`, which changes the book.
        """
        differing = self._differing
        if len(differing):
            runs = self.space.runs
            clean = pages_in(runs[(runs["flags"] & DIRTY) == 0])
            if self.space.early is not None:
                clean -= pages_in(self.space.early.copied)
            differing = differing[clean.has(differing)]
        return self._looked - len(self._differing) + len(differing), differing

    def assemble(
        self,
        hasher: PageHasher,
        writer: LayerWriter,
        buffer: FrozenBuffer,
        directory: Path,
        image: PageImage,
        memory_map: MemoryMap,
        stacks: PageSet,
        missing: LayerChain | None,
    ) -> SpacePages:
        """Take in what was dirty at the freeze, and what CRIU dumped of it; return its table.

        Raises CaptureError if a page that is present is neither known nor was copied.
        """
        runs = self.space.runs
        dirty = runs[(runs["flags"] & DIRTY) != 0]
        self._keep(hasher, writer, buffer, self.space.content_at, dirty, missing)
        present, lazy = restored_pages(pages_in(runs), memory_map, stacks)
        if len(present & pages_of(memory_map.parentless)):
            raise CaptureError(
                f"process {self.pid} maps a file of huge pages privately: only the stock backend can do that"
            )
        theirs, their_lazy = take_criu_pages(
            hasher,
            writer,
            self.book,
            directory,
            image,
            missing=missing,
            always=memory_map.without_parent,
        )
        present, lazy = present | theirs, (lazy - theirs) | their_lazy
        self.book.restrict(present)
        if not self.book.is_known:
            raise CaptureError(f"{image.key.pagemap_name}: a page is neither known nor was it copied")
        return self.book.table(lazy)

    def _keep(
        self,
        hasher: PageHasher,
        writer: LayerWriter,
        buffer: FrozenBuffer,
        first: int,
        runs: NDArray[np.void],
        missing: LayerChain | None,
    ) -> None:
        """Take in the pages of runs, copied frozen: they stand in the buffer from `first` on, in order."""
        if (runs["start"][1:] < runs["end"][:-1]).any():
            raise CaptureError(f"the dirty pages of process {self.pid} are told out of order")
        pages = pages_in(runs)
        self.book.expect(pages)
        for block in pages.pieces(_BLOCK_PAGES):
            content = buffer.content(first, len(block))
            first += len(block)
            keep(hasher, writer, self.book, block, content)
            if missing is not None:
                rows = np.flatnonzero(~missing.covered(self.key, block))
                writer.add(self.key, block[rows], content, rows)


def _runs_within(
    numbers: NDArray[np.uint64], owned: NDArray[np.void]
) -> tuple[NDArray[np.uint64], NDArray[np.void]]:
    """Keep the pages (ascending) that lie in owned mappings, and return them as runs too."""
    addresses = numbers * np.uint64(PAGE_BYTES)
    at = np.searchsorted(owned["start"], addresses, side="right").astype(np.intp) - 1
    here = at >= 0
    if len(owned):
        here &= addresses < owned["end"][at]
    numbers, at = numbers[here], at[here]
    unreadable = (owned["flags"][at] & READABLE) == 0
    if not unreadable.any():
        return numbers, runs_of(numbers)
    parts = np.flatnonzero(np.diff(unreadable)) + 1
    runs = [
        runs_of(part, UNREADABLE if closed[0] else 0)
        for part, closed in zip(np.split(numbers, parts), np.split(unreadable, parts), strict=True)
    ]
    return numbers, np.concatenate(runs)


@contextlib.contextmanager
def open_of(pid: int, name: str, flags: int) -> Iterator[int]:
    """Open a file of /proc/PID. Raises CaptureError if that fails."""
    try:
        file = os.open(f"/proc/{pid}/{name}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise CaptureError(f"{name} of process {pid} cannot be opened: {error.strerror}") from error
    try:
        yield file
    finally:
        os.close(file)


def _started_ticks(pid: int) -> int:
    """Return when a process was started; raises CaptureError if it has ended, waited for or not."""
    fields = _stat(pid)
    if fields[0] in "ZX":
        raise CaptureError(f"process {pid} has ended")
    return int(fields[19])


def _share_memory(one: int, other: int) -> bool:
    """Ask the kernel whether two processes have the same address space; no if one of them has ended.

    Raises CaptureError where it cannot tell (CRIU needs kcmp(2) as well).
    """
    same = ctypes.CDLL(None, use_errno=True).syscall(_KCMP[platform.machine()], one, other, _KCMP_VM, 0, 0)
    if same < 0 and (number := ctypes.get_errno()) != errno.ESRCH:
        raise CaptureError(f"processes {one} and {other} cannot be compared: {os.strerror(number)}")
    return bool(same == 0)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on, its state."""
    try:
        # A name may hold anything, also half a character.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError as error:
        raise CaptureError(f"there is no process {pid} any more") from error


def resident_pages(pid: int) -> int:
    """Return how much memory a process has; raises CaptureError if there is none."""
    return _statm(pid)[1]


def _statm(pid: int) -> list[int]:
    """Return the numbers of /proc/PID/statm: pages of its mappings, pages resident, and more."""
    try:
        return [int(field) for field in Path(f"/proc/{pid}/statm").read_text().split()]
    except OSError as error:
        raise CaptureError(f"there is no process {pid} any more") from error


def _pid_within(pid: int) -> int:
    """Return the PID that a process has in its own PID namespace: CRIU names its images by that."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").split("\n"):
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except OSError as error:
        raise CaptureError(f"there is no process {pid} any more") from error
    raise CaptureError("this kernel does not tell PIDs within namespaces", hint="Linux 4.1 or newer")
