"""One process as the fast backend follows it: whose writes it learns of, and whose it must leave alone."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import CaptureError
from common.identity import PageHasher
from primary import userfault
from primary.freezer import NotFrozenError, StandStill, Work
from primary.layers import LayerWriter
from primary.page_set import PageSet
from primary.pages import FrozenBuffer, FrozenCall, count_written
from primary.process import TrackedProcess, open_of
from primary.userfault_tracker import UserfaultTracker
from primary.verification import Slice
from tests.system.tracked_child import WRITABLE, Child, Region, Stops

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
    pytest.mark.skipif(bool(userfault.problem()), reason="userfaultfd cannot track writes here"),
]

_PAGES = 2048
_SHARE_MEMORY = 0x100
_BORROWER = "libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), ctypes.c_void_p({stack}), {flags}, None)"


class _Everybody(frozenset[int]):
    def __contains__(self, pid: object) -> bool:
        return True


async def stand_still(work: Work) -> None:
    """Pretend: nobody writes anything meanwhile."""
    work(_Everybody([0]))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LayerWriter]:
    writer = LayerWriter(tmp_path)
    yield writer
    writer.drop()


async def copied(
    tracker: UserfaultTracker, process: TrackedProcess, hasher: PageHasher, writer: LayerWriter
) -> None:
    await tracker.copy_ahead([process], hasher, writer)


def written_in(process: TrackedProcess, pages: Region) -> int:
    """Return how many pages of it count as written since they were protected."""
    vmas = process.space.mappings()
    here = vmas[(vmas["start"] <= pages.start) & (vmas["end"] >= pages.end)].copy()
    here["start"], here["end"] = pages.start, pages.end
    with open_of(process.pid, "pagemap", os.O_RDWR) as pagemap:
        return count_written(pagemap, here, _PAGES)


async def test_a_child_in_its_parents_memory_takes_nothing_from_the_parents_book(
    child: Child, writer: LayerWriter
) -> None:
    hasher, tracker = PageHasher(), UserfaultTracker(stand_still)
    pages = child.map(_PAGES)
    child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
    stack = child.map(16)
    parent = TrackedProcess(child.pid, tracker.space(child.pid))
    assert not parent.borrows_from([])
    await tracker.take_up(parent)
    await copied(tracker, parent, hasher, writer)
    assert len(parent.book.known & PageSet.of(pages.numbers)) == _PAGES
    assert written_in(parent, pages) == 0

    borrower_pid = child.do(_BORROWER.format(stack=stack.end, flags=_SHARE_MEMORY | signal.SIGCHLD))
    try:
        borrower = TrackedProcess(borrower_pid, tracker.space(borrower_pid))
        assert borrower.borrows_from([parent])
        pages.write(7, value=9)
        for _ in range(2):  # small ones are not taken up at once
            await tracker.take_up(borrower)
        await copied(tracker, borrower, hasher, writer)
        assert not len(borrower.book.pages)
        assert written_in(parent, pages) == 1, "the write will go unnoticed"
    finally:
        os.kill(borrower_pid, signal.SIGKILL)
        tracker.let_go(parent)


async def test_a_process_with_memory_of_its_own_borrows_none(child: Child) -> None:
    forked = child.do("fork()")
    try:
        parent, other = (
            TrackedProcess(pid, UserfaultTracker(stand_still).space(pid)) for pid in (child.pid, forked)
        )
        assert not other.borrows_from([parent])
        assert not other.borrows
    finally:
        os.kill(forked, signal.SIGKILL)


async def test_a_process_that_ended_is_no_lender(child: Child) -> None:
    other = Child()
    lender = TrackedProcess(other.pid, UserfaultTracker(stand_still).space(other.pid))
    other.end()
    assert not TrackedProcess(child.pid, UserfaultTracker(stand_still).space(child.pid)).borrows_from(
        [lender]
    )


def test_a_process_may_have_half_a_character_in_its_name(child: Child) -> None:
    child.do("libc.prctl(15, b'\\xe2\\x82', 0, 0, 0)")
    assert b"\xe2\x82" in Path(f"/proc/{child.pid}/stat").read_bytes()
    process = TrackedProcess(child.pid, UserfaultTracker(stand_still).space(child.pid))
    assert process.is_same
    assert process.key.ident == child.pid


class Looked:
    """A child all of whose pages are known, and are read to be compared with that."""

    def __init__(self, child: Child, hasher: PageHasher, writer: LayerWriter) -> None:
        self.hasher, self.writer = hasher, writer
        self.tracker = UserfaultTracker(stand_still)
        self.pages = child.map(_PAGES)
        child.do(f"ctypes.memset({self.pages.start}, 1, {_PAGES << 12}) and 0")
        self.process = TrackedProcess(child.pid, self.tracker.space(child.pid))
        self.child = child

    async def known(self) -> None:
        await self.tracker.take_up(self.process)
        await copied(self.tracker, self.process, self.hasher, self.writer)

    def look(self, first: int = 0, last: int = _PAGES) -> None:
        bounds = self.pages.numbers[0] + np.array([first, last], dtype=np.uint64)
        self.process.look(self.hasher, Slice(self.process.key, bounds))

    def freeze(self, *, early: bool = False) -> None:
        self.process.prepare(early=early)
        self.buffer = FrozenBuffer(8192)
        call = FrozenCall(self.buffer)
        with self.child.stopped():
            if early:
                call.run_early([self.process.space], 4096)
            call.run([self.process.space])

    def misremember(self, *pages: int) -> None:
        """Have the book say something else of pages."""
        numbers = self.pages.numbers[list(pages)]
        self.process.book.put(numbers, np.full((len(numbers), 2), 7, dtype=np.uint64))


@pytest.fixture
async def looked(child: Child, writer: LayerWriter) -> AsyncIterator[Looked]:
    looked = Looked(child, PageHasher(), writer)
    await looked.known()
    yield looked
    looked.tracker.let_go(looked.process)


class TestComparison:
    def test_memory_that_is_what_it_is_believed_to_be_is_no_mismatch(self, looked: Looked) -> None:
        looked.look()
        looked.freeze()
        compared, differing = looked.process.compare()
        assert (compared, differing.tolist()) == (_PAGES, [])

    @pytest.mark.parametrize("early", [False, True])
    def test_a_clean_page_that_holds_something_else_is_found(self, looked: Looked, early: bool) -> None:
        looked.misremember(3, 900)
        looked.look()
        looked.freeze(early=early)
        compared, differing = looked.process.compare()
        assert compared == _PAGES
        assert looked.pages.index(differing) == {3, 900}

    @pytest.mark.parametrize("early", [False, True])
    def test_what_was_written_is_no_mismatch_whenever_that_was(self, looked: Looked, early: bool) -> None:
        looked.pages.write(5, value=9)
        looked.look()
        looked.pages.write(6, value=9)
        looked.freeze(early=early)
        compared, differing = looked.process.compare()
        assert (compared, differing.tolist()) == (_PAGES - 1, [])

    def test_what_is_gone_is_no_mismatch(self, looked: Looked) -> None:
        looked.pages.advise(8, 4, mmap.MADV_DONTNEED)
        looked.look()
        looked.freeze()
        assert looked.process.compare()[1].tolist() == []

    def test_only_what_is_due_is_looked_at(self, looked: Looked) -> None:
        looked.misremember(3, 900)
        looked.look(800, 1000)
        looked.freeze()
        compared, differing = looked.process.compare()
        assert compared == 200
        assert looked.pages.index(differing) == {900}
        looked.process.look(looked.hasher, None)
        looked.freeze()
        assert looked.process.compare()[0] == 0


class TestStandingStill:
    """What is protected is read only after everybody came out of the system calls that they were in."""

    def tracked(self, child: Child, stand_still: StandStill) -> tuple[UserfaultTracker, TrackedProcess]:
        tracker = UserfaultTracker(stand_still)
        return tracker, TrackedProcess(child.pid, tracker.space(child.pid))

    async def test_what_was_under_way_at_the_protection_is_over_when_it_is_read(
        self, child: Child, writer: LayerWriter
    ) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        stops = 0

        async def stand_still(work: Work) -> None:
            nonlocal stops
            stops += 1
            if stops == 2:  # the first one is for what was not tracked
                await asyncio.to_thread(pages.write, 7, value=9)
            work(frozenset({child.pid}))

        hasher = PageHasher()
        tracker, process = self.tracked(child, stand_still)
        await tracker.take_up(process)
        await copied(tracker, process, hasher, writer)
        assert stops == 2
        (found,) = hasher.identify(memoryview(bytes([7, 9]) + b"\1" * 4094))
        assert (process.book.identity_of(pages.numbers[7:8])[0] == found).all()
        tracker.let_go(process)

    async def test_what_has_grown_by_then_is_tracked_as_one(self, child: Child, writer: LayerWriter) -> None:
        """The kernel would make two mappings of one that is tracked in part, and mremap(2) of both fails."""
        around = child.alone(3 * _PAGES)
        child.do(f"libc.munmap({around.start + (_PAGES << 12)}, {2 * _PAGES << 12})")
        pages = Region(child, around.start, _PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        grown = 0

        async def stand_still(work: Work) -> None:
            nonlocal grown
            if not grown:
                resize = f"libc.mremap({pages.start}, {_PAGES << 12}, {2 * _PAGES << 12}, 0, 0)"
                grown = await asyncio.to_thread(child.do, resize)
            with child.stopped():
                work(frozenset({child.pid}))

        tracker, process = self.tracked(child, stand_still)
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        assert grown == pages.start
        assert len(process.book.known & PageSet.of(pages.numbers)) == _PAGES
        moved = child.do(f"done(libc.mremap({pages.start}, {2 * _PAGES << 12}, {4 * _PAGES << 12}, 1, 0))")
        assert moved > 0, os.strerror(-moved)
        tracker.let_go(process)

    async def test_what_was_begun_in_a_stop_that_was_none_is_given_up(
        self, child: Child, writer: LayerWriter
    ) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")

        stops = Stops(child)
        stops.failure = CaptureError("it was thawed by somebody else")
        tracker, process = self.tracked(child, stops)
        await tracker.take_up(process)
        assert tracker.begins_anew_frozen(process)
        await copied(tracker, process, PageHasher(), writer)
        assert not len(process.book.known)
        assert not tracker.begins_anew_frozen(process)
        tracker.let_go(process)

    async def test_of_who_runs_on_nothing_is_known(self, child: Child, writer: LayerWriter) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")

        async def others(work: Work) -> None:
            work(frozenset({1}))

        tracker, process = self.tracked(child, others)
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        assert not len(process.book.known)
        tracker.let_go(process)

    async def test_of_who_runs_on_since_then_nothing_that_was_written_is_known(
        self, child: Child, writer: LayerWriter
    ) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        here = child.pid

        async def stand_still(work: Work) -> None:
            with child.stopped():
                work(frozenset({here}))

        tracker, process = self.tracked(child, stand_still)
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        assert process.book.known.has(pages.numbers).all()
        here = 1
        child.do(f"ctypes.memset({pages.start}, 2, {_PAGES << 12}) and 0")
        await copied(tracker, process, PageHasher(), writer)
        assert not process.book.known.has(pages.numbers).any()
        tracker.let_go(process)

    async def test_that_gains_nothing_is_not_asked_for(self, child: Child, writer: LayerWriter) -> None:
        """A thread's stack comes and goes in every epoch, and is hardly used."""
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        stops = Stops(child)
        tracker, process = self.tracked(child, stops)
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        before = stops.count
        for _ in range(3):
            stack = child.alone(2048)
            stack.write(7, 8)
            await copied(tracker, process, PageHasher(), writer)
            child.do(f"libc.munmap({stack.start}, {2048 << 12})")
        assert stops.count == before
        tracker.let_go(process)

    async def test_is_asked_for_when_a_mapping_came_beside_one_that_is_tracked(
        self, child: Child, writer: LayerWriter
    ) -> None:
        """Until it is tracked as well, mremap(2) of it and of what it was mapped beside fails."""
        around = child.alone(2 * _PAGES)
        child.do(f"libc.munmap({around.start + (_PAGES << 12)}, {_PAGES << 12})")
        pages = Region(child, around.start, _PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")

        tracker, process = self.tracked(child, Stops(child))
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        child.map(16, at=pages.end)
        await copied(tracker, process, PageHasher(), writer)
        both = _PAGES + 16
        moved = child.do(f"done(libc.mremap({pages.start}, {both << 12}, {2 * both << 12}, 1, 0))")
        assert moved > 0, os.strerror(-moved)
        tracker.let_go(process)

    async def test_is_not_asked_for_again_for_who_ran_on_in_one(
        self, child: Child, writer: LayerWriter
    ) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        stops = 0

        async def others(work: Work) -> None:
            nonlocal stops
            stops += 1
            work(frozenset({1}))

        tracker, process = self.tracked(child, others)
        await tracker.take_up(process)
        for _ in range(3):
            await copied(tracker, process, PageHasher(), writer)
        assert stops == 1
        tracker.let_go(process)

    async def test_without_it_nothing_is_known(self, child: Child, writer: LayerWriter) -> None:
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")

        async def stand_still(work: Work) -> None:
            raise NotFrozenError("a task waits for a disk")

        tracker, process = self.tracked(child, stand_still)
        await tracker.take_up(process)
        await copied(tracker, process, PageHasher(), writer)
        assert not len(process.book.known)
        tracker.let_go(process)

    async def test_for_few_pages_nobody_stands_still(self, child: Child, writer: LayerWriter) -> None:
        stops = Stops(child)
        pages = child.map(_PAGES)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        hasher = PageHasher()
        tracker, process = self.tracked(child, stops)
        await tracker.take_up(process)
        for _ in range(2):  # the child's own pages too
            await copied(tracker, process, hasher, writer)
        before = stops.count
        assert before
        pages.write(7, 8, value=9)
        await copied(tracker, process, hasher, writer)
        assert stops.count == before
        assert written_in(process, pages) == 2, "they are left for the freeze"
        tracker.let_go(process)

    async def test_few_pages_of_executable_memory_are_protected_all_the_same(
        self, child: Child, writer: LayerWriter
    ) -> None:
        """Nobody protects them within a freeze: they would be copied in each one from now on."""
        pages = child.map(_PAGES)
        code = child.alone(16, protection=WRITABLE | mmap.PROT_EXEC)
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        code.write(*range(16), value=1)
        tracker, process = self.tracked(child, Stops(child))
        await tracker.take_up(process)
        for _ in range(2):
            await copied(tracker, process, PageHasher(), writer)
        code.write(7, value=9)
        await copied(tracker, process, PageHasher(), writer)
        assert written_in(process, code) == 0
        assert code.index(process.book.unknown.numbers) == {7}, "it is copied once"
        tracker.let_go(process)

    async def test_what_is_written_as_fast_as_it_is_copied_is_left_for_the_freeze(
        self, child: Child, writer: LayerWriter
    ) -> None:
        stops, hot = Stops(child), 2 * _PAGES
        pages = child.map(hot)

        async def written_again(work: Work) -> None:
            await stops(work)
            child.do(f"ctypes.memset({pages.start}, {stops.count % 250 + 1}, {hot << 12}) and 0")

        child.do(f"ctypes.memset({pages.start}, 1, {hot << 12}) and 0")
        tracker, process = self.tracked(child, written_again)
        await tracker.take_up(process)
        for _ in range(3):
            await copied(tracker, process, PageHasher(), writer)
        before = stops.count
        for _ in range(20):
            await copied(tracker, process, PageHasher(), writer)
        assert stops.count == before, "copying it ahead does not leave less"
        await tracker.copy_ahead([process], PageHasher(), writer, again=True)
        assert stops.count > before, "the freeze found too much: it is copied ahead all the same"
        before = stops.count
        for _ in range(5):
            await copied(tracker, process, PageHasher(), writer)
        assert stops.count >= before + 5, "and for a while, so that not each freeze finds too much"
        for _ in range(40):
            await copied(tracker, process, PageHasher(), writer)
        before = stops.count
        for _ in range(40):
            await copied(tracker, process, PageHasher(), writer)
        assert before < stops.count <= before + 4, "every now and then it is found out anew"
        tracker.let_go(process)


class TestWhatWasCopiedEarly:
    def test_is_in_the_book_whatever_becomes_of_the_freeze(self, looked: Looked) -> None:
        before = looked.process.book.identity_of(looked.pages.numbers).copy()
        looked.pages.write(5, 200, value=9)
        looked.freeze(early=True)
        looked.process.doubt_early()
        looked.process.keep_early(looked.hasher, looked.writer, looked.buffer, None)
        looked.process.not_taken()
        changed = (looked.process.book.identity_of(looked.pages.numbers) != before).any(axis=1)
        assert np.flatnonzero(changed).tolist() == [5, 200]
        assert looked.process.book.known.has(looked.pages.numbers).all()

    def test_is_doubtful_if_it_cannot_be_written_down(
        self, looked: Looked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked.pages.write(5, 200, value=9)
        looked.freeze(early=True)
        looked.process.doubt_early()
        with monkeypatch.context() as patch:
            patch.setattr(LayerWriter, "add", _full)
            with pytest.raises(OSError, match="No space"):
                looked.process.keep_early(looked.hasher, looked.writer, looked.buffer, None)
        book = looked.process.book
        assert looked.pages.index(book.unknown.numbers) >= {5, 200}

    def test_leaves_nothing_known_if_it_is_lost(
        self, looked: Looked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked.pages.write(5, value=9)
        with monkeypatch.context() as patch:
            patch.setattr(FrozenBuffer, "address", 0)
            looked.freeze(early=True)
        looked.process.doubt_early()
        looked.process.keep_early(looked.hasher, looked.writer, looked.buffer, None)
        assert not len(looked.process.book.known)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestMappings:
    """What is tracked never becomes one with what comes beside it later."""

    async def grown(self, child: Child, writer: LayerWriter, tracker: UserfaultTracker, steps: int) -> int:
        """Let it grow step by step, with an epoch after each; return how many mappings that made."""
        hasher = PageHasher()
        around = child.alone(_PAGES + steps)
        pages = Region(child, around.start, _PAGES)
        child.do(f"libc.munmap({pages.end}, {steps << 12})")
        child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        for _ in range(2):
            await tracker.take_up(process)
        await copied(tracker, process, hasher, writer)
        before = len(process.space.mappings())
        for step in range(steps):
            child.map(1, at=pages.end + (step << 12))
            child.do(f"ctypes.memset({pages.end + (step << 12)}, 2, 1) and 0")
            await tracker.take_up(process)
            await copied(tracker, process, hasher, writer)
        after = len(process.space.mappings())
        tracker.let_go(process)
        return after - before

    async def test_a_process_that_grows_is_not_given_more_mappings_than_it_has_room_for(
        self, child: Child, writer: LayerWriter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = len(UserfaultTracker(stand_still).space(child.pid).mappings())
        monkeypatch.setattr("primary.userfault_tracker.most_mappings", lambda: 4 * own + 40)
        made = await self.grown(child, writer, UserfaultTracker(stand_still), 60)
        assert made < 20, "a quarter of what it may have, less what it had"

    async def test_a_process_with_half_of_what_it_may_have_is_not_tracked_any_more(
        self, child: Child, writer: LayerWriter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = len(UserfaultTracker(stand_still).space(child.pid).mappings())
        monkeypatch.setattr("primary.userfault_tracker.most_mappings", lambda: 2 * own)
        tracker = UserfaultTracker(stand_still)
        assert await self.grown(child, writer, tracker, 20) <= 1
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        assert not tracker.begins_anew_frozen(process)
