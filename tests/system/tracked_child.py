"""A process that does what it is told, line by line, and what is found of its memory.

In: expressions that the child evaluates; mappings made in it. Out: what a scan, a copy or a freeze by the
page reader says of those mappings, and not of the interpreter's own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.model import PAGE_BYTES
from primary.freezer import Work
from primary.page_set import PageSet
from primary.pages import DIRTY, OWNED, VMA, FrozenBuffer, FrozenCall, Space, pages_in, runs_of, untracked
from primary.userfault import Userfault

BUFFER_PAGES = 32_768
NOT_ACCESSIBLE, READ_ONLY, WRITABLE = 0, 1, 3
PRIVATE, FIXED, ANONYMOUS = 0x02, 0x10, 0x20
DONT_NEED, HUGE_PAGE, NO_HUGE_PAGE, GUARD_INSTALL = 4, 14, 15, 102
MAY_MOVE_AND_FIXED = 3

_CHILD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
word, size = ctypes.c_long, ctypes.c_size_t
libc.mmap.argtypes, libc.mmap.restype = [size, size, word, word, word, word], size
libc.mremap.argtypes, libc.mremap.restype = [size, size, size, word, size], size
libc.munmap.argtypes = [size, size]
libc.mprotect.argtypes = libc.madvise.argtypes = [size, size, word]
libc.read.argtypes = [word, size, size]

def done(result):
    return result if result not in (-1, 2**64 - 1) else -ctypes.get_errno()

def poke(address, content):
    ctypes.memmove(address, content, len(content))

def peek(address):
    return ctypes.string_at(address, 1)

def fork():
    child = os.fork()
    if not child:
        import signal
        while True:
            signal.pause()
    return child

for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Child:
    """A process that does what it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def do(self, code: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the child ended at {code}"
        return eval(line)  # noqa: S307 - our own child's answer

    def map(
        self,
        pages: int,
        *,
        protection: int = WRITABLE,
        flags: int = PRIVATE | ANONYMOUS,
        file: int = -1,
        at: int = 0,
    ) -> "Region":
        fixed = FIXED if at else 0
        address = self.do(
            f"done(libc.mmap({at}, {pages * PAGE_BYTES}, {protection}, {flags | fixed}, {file}, 0))"
        )
        assert address > 0, os.strerror(-address)
        return Region(self, address, pages)

    def alone(self, pages: int, *, protection: int = WRITABLE) -> "Region":
        """Map pages with gaps around, so that no neighbour becomes one with them."""
        around = self.map(pages + 2, protection=protection)
        for page in (0, pages + 1):
            self.do(f"libc.munmap({around.start + page * PAGE_BYTES}, {PAGE_BYTES})")
        return Region(self, around.start + PAGE_BYTES, pages)

    def become_another_program(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("os.execvp('sleep', ['sleep', '1000'])\n")
        self.process.stdin.flush()
        while Path(f"/proc/{self.pid}/comm").read_text() != "sleep\n" or not self.waits:
            time.sleep(0.001)

    @property
    def waits(self) -> bool:
        return "nanosleep" in Path(f"/proc/{self.pid}/wchan").read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGSTOP)
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.0005)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Region:
    """Pages of a child, counted from 0."""

    child: Child
    start: int
    pages: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE_BYTES

    def write(self, *pages: int, value: int = 1) -> None:
        for page in pages:
            self.child.do(f"poke({self.start + page * PAGE_BYTES}, {bytes([page, value])!r})")

    def read(self, *pages: int) -> None:
        for page in pages:
            self.child.do(f"peek({self.start + page * PAGE_BYTES})")

    def advise(self, page: int, pages: int, advice: int) -> int:
        return self.child.do(
            f"done(libc.madvise({self.start + page * PAGE_BYTES}, {pages * PAGE_BYTES}, {advice}))"
        )

    def protect(self, protection: int) -> None:
        assert self.child.do(f"libc.mprotect({self.start}, {self.pages * PAGE_BYTES}, {protection})") == 0

    @property
    def numbers(self) -> np.ndarray:
        return np.arange(self.start // PAGE_BYTES, self.end // PAGE_BYTES, dtype=np.uint64)

    @property
    def runs(self) -> np.ndarray:
        return runs_of(self.numbers)

    def index(self, numbers: np.ndarray) -> set[int]:
        """Which of its pages are among the numbers."""
        return {int(n) - self.start // PAGE_BYTES for n in numbers if self.start <= n * PAGE_BYTES < self.end}


@dataclass(frozen=True)
class Frozen:
    """What a freeze found of a region."""

    present: set[int]
    dirty: dict[int, bytes]

    @property
    def clean(self) -> set[int]:
        return self.present - self.dirty.keys()


def is_tracked(pagemap: int, start: int) -> bool:
    vma = np.array([(start, start + PAGE_BYTES, 0, 0)], dtype=VMA)
    return not len(untracked(pagemap, vma))


class Reader:
    """A space of a child, with a pagemap, and a userfaultfd if it is tracked."""

    def __init__(self, child: Child, userfault: Userfault | None) -> None:
        self.child = child
        self.userfault = userfault
        self.space = Space(child.pid)
        self.buffer = FrozenBuffer(BUFFER_PAGES)
        self.pagemap = os.open(f"/proc/{child.pid}/pagemap", os.O_RDWR)

    def cover(self) -> tuple[list[tuple[int, int]], bool]:
        assert self.userfault
        with self.child.stopped():
            vmas = self.space.mappings()
            fresh = self.userfault.fresh(self.pagemap, vmas)
            self.userfault.cover(self.pagemap, vmas, time.monotonic() + 1)
        assert self.userfault.lift(self.pagemap)
        owned = vmas[(vmas["flags"] & OWNED) != 0]
        tracked = len(untracked(self.pagemap, owned)) < len(owned)
        return fresh[["start", "end"]].tolist(), tracked

    def fresh(self, region: Region) -> set[int]:
        """Cover everything; which pages of the region were not tracked."""
        fresh, same = self.cover()
        assert same
        return {
            page
            for page in range(region.pages)
            if any(low <= region.start + page * PAGE_BYTES < high for low, high in fresh)
        }

    def mappings_of(self, region: Region) -> np.ndarray:
        vmas = self.space.mappings()
        return vmas[(vmas["end"] > region.start) & (vmas["start"] < region.end)]

    def written(self, region: Region) -> set[int]:
        return region.index(pages_in(self.space.written(self.pagemap, self.mappings_of(region))).numbers)

    def know(self, region: Region, *pages: int) -> None:
        """Say that the content of pages is known; of all if none are named."""
        wanted = sorted(pages) or range(region.pages)
        self.space.knows(PageSet.of(region.numbers[list(wanted)]).byte_bounds)

    def freeze(self, region: Region) -> Frozen:
        self.space.make_room(1)
        with self.child.stopped():
            dirty_pages = FrozenCall(self.buffer).run([self.space])
        return self.found(region, dirty_pages)

    def found(self, region: Region, dirty_pages: int) -> Frozen:
        assert self.space.error == 0, os.strerror(self.space.error)
        runs = self.space.runs
        present, dirty = pages_in(runs).numbers, pages_in(runs[(runs["flags"] & DIRTY) != 0]).numbers
        assert (runs["start"][1:] >= runs["end"][:-1]).all()
        assert len(present) == self.space._native.present_pages
        assert len(dirty) == self.space.dirty_pages <= dirty_pages
        first = region.start // PAGE_BYTES
        contents = {
            int(number) - first: bytes(self.buffer.content(self.space.content_at + row, 1))
            for row, number in enumerate(dirty)
            if first <= number < first + region.pages
        }
        return Frozen(region.index(present), contents)

    def close(self) -> None:
        if self.userfault:
            self.userfault.close()
        os.close(self.pagemap)


def content(page: int, value: int = 1) -> bytes:
    return bytes([page, value]) + bytes(PAGE_BYTES - 2)


class Stops:
    """Has one child stand still, as the freezer does; may let it run too early."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.count = 0
        self.failure: BaseException | None = None

    async def __call__(self, work: Work) -> None:
        self.count += 1
        with self.child.stopped():
            work(frozenset({self.child.pid}))
        if self.failure:
            raise self.failure
