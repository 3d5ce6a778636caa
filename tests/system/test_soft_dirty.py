"""The soft-dirty tracker on real processes; where the kernel lacks it, `make test-kernels` brings one.

As in test_pages.py, the tests are about what must not be clean. Those without tracking run everywhere.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.identity import PageHasher
from common.model import PAGE_BYTES
from primary.frames import Frames
from primary.layers import LayerWriter
from primary.page_set import PageSet
from primary.pagemap import pagemap_problem, soft_dirty_problem, zero_frame
from primary.pages import WRITTEN, FrozenBuffer, FrozenCall, Space, pages_in
from primary.process import TrackedProcess
from primary.soft_dirty import SoftDirtyTracker
from primary.tracking import NoTracker, choose
from tests.system.tracked_child import (
    DONT_NEED,
    HUGE_PAGE,
    MAY_MOVE_AND_FIXED,
    NOT_ACCESSIBLE,
    PRIVATE,
    READ_ONLY,
    WRITABLE,
    Child,
    Frozen,
    Reader,
    Region,
    Stops,
    content,
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
    pytest.mark.skipif(bool(pagemap_problem()), reason=pagemap_problem()),
]
needs_soft_dirty = pytest.mark.skipif(bool(soft_dirty_problem()), reason=soft_dirty_problem())

_HUGE_BYTES = 2 << 20


class SoftReader(Reader):
    """A space of a child that is scanned by soft-dirty bits."""

    def __init__(self, child: Child, *, tracks: bool = True) -> None:
        super().__init__(child, None)
        self.space = Space(child.pid, Frames(zero_frame(), tracks=tracks))

    def look(self, region: Region) -> Frozen:
        """Scan it, stopped, and clear nothing."""
        self.space.protects = False
        self.space.make_room(0)
        return self.freeze(region)

    def clear(self, region: Region) -> Frozen:
        """Scan it, stopped, and clear."""
        self.look(region)  # so that there is room
        self.space.make_room(0)
        self.space.protects = True
        try:
            return self.freeze(region)
        finally:
            self.space.protects = False

    def written_pages(self, region: Region) -> set[int]:
        runs = self.space.runs
        return region.index(pages_in(runs[(runs["flags"] & WRITTEN) != 0]).numbers)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    child.do("1")  # it has started
    yield child
    child.end()


@pytest.fixture
def reader(child: Child) -> Iterator[SoftReader]:
    reader = SoftReader(child)
    yield reader
    reader.close()


@pytest.fixture
def untracked(child: Child) -> Iterator[SoftReader]:
    reader = SoftReader(child, tracks=False)
    yield reader
    reader.close()


def aligned(child: Child, huge_pages: int) -> Region:
    """Map so many times 2 MiB, aligned to that: the kernel moves whole page tables of these."""
    around = child.map((huge_pages + 1) * _HUGE_BYTES // PAGE_BYTES)
    start = -(-around.start // _HUGE_BYTES) * _HUGE_BYTES
    assert child.do(f"libc.madvise({around.start}, {around.pages * PAGE_BYTES}, 15)") == 0  # no huge pages
    return Region(child, start, huge_pages * _HUGE_BYTES // PAGE_BYTES)


@needs_soft_dirty
class TestAfterAClear:
    def test_what_is_known_and_unwritten_is_clean(self, reader: SoftReader) -> None:
        region = reader.child.map(8)
        region.write(0, 1, 5)
        assert reader.clear(region).dirty.keys() == {0, 1, 5}
        reader.know(region)
        assert reader.look(region) == Frozen({0, 1, 5}, {})

    def test_what_was_written_since_is_dirty(self, reader: SoftReader) -> None:
        region = reader.child.map(8)
        region.write(0, 1, 2, 5)
        reader.clear(region)
        reader.know(region)
        region.write(1, 6, value=2)
        found = reader.look(region)
        assert found.present == {0, 1, 2, 5, 6}
        assert found.dirty == {1: content(1, 2), 6: content(6, 2)}
        assert reader.written_pages(region) == {1, 6}

    def test_it_stays_dirty_until_it_is_cleared_again(self, reader: SoftReader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.clear(region)
        reader.know(region)
        region.write(1, value=2)
        for _ in range(2):
            assert reader.look(region).dirty.keys() == {1}
        assert reader.clear(region).dirty == {1: content(1, 2)}
        assert reader.look(region).dirty == {}

    def test_what_is_not_known_is_dirty_and_not_told_as_written(self, reader: SoftReader) -> None:
        region = reader.child.map(4)
        region.write(0, 1, 2)
        reader.clear(region)
        reader.know(region, 1)
        assert reader.look(region).dirty.keys() == {0, 2}
        assert reader.written_pages(region) == set()

    def test_what_the_kernel_writes_for_the_process_is_dirty(
        self, reader: SoftReader, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(b"x" * 2 * PAGE_BYTES)
        region = reader.child.map(8)
        region.write(*range(8))
        file = reader.child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY)")
        reader.clear(region)
        reader.know(region)
        assert reader.child.do(f"libc.read({file}, {region.start + 2 * PAGE_BYTES}, {2 * PAGE_BYTES})") > 0
        assert reader.look(region).dirty.keys() == {2, 3}

    def test_what_another_process_writes_is_dirty(self, reader: SoftReader) -> None:
        region = reader.child.map(4)
        region.write(0, 1, 2)
        reader.clear(region)
        reader.know(region)
        with Path(f"/proc/{reader.child.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(region.start + PAGE_BYTES)
            memory.write(b"zz")
        assert reader.look(region).dirty.keys() == {1}

    def test_pages_that_are_only_read_are_not_there(self, reader: SoftReader) -> None:
        region = reader.child.map(8)
        reader.clear(region)
        region.read(0, 1, 2)
        assert reader.look(region).present == set()

    def test_pages_that_were_given_back_are_gone(self, reader: SoftReader) -> None:
        region = reader.child.map(8)
        region.write(*range(8))
        reader.clear(region)
        reader.know(region)
        assert region.advise(2, 4, DONT_NEED) == 0
        region.read(3)
        region.write(4, value=7)
        assert reader.look(region) == Frozen({0, 1, 4, 6, 7}, {4: content(4, 7)})

    def test_a_new_mapping_is_dirty_whatever_was_known_at_its_place(self, reader: SoftReader) -> None:
        region = reader.child.alone(4)
        region.write(0, 1)
        reader.clear(region)
        reader.know(region)
        reader.child.map(4, at=region.start)
        region.write(1, 2, value=9)
        assert reader.look(region) == Frozen({1, 2}, {1: content(1, 9), 2: content(2, 9)})

    def test_closed_pages_are_read(self, reader: SoftReader) -> None:
        region = reader.child.map(4)
        region.write(0, 1, 2)
        reader.clear(region)
        reader.know(region)
        region.write(1, value=3)
        region.protect(NOT_ACCESSIBLE)
        assert reader.look(region) == Frozen({0, 1, 2}, {1: content(1, 3)})

    def test_only_written_pages_of_a_private_file_are_there(self, reader: SoftReader, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"f" * 8 * PAGE_BYTES)
        file = reader.child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDWR)")
        region = reader.child.map(8, flags=PRIVATE, file=file)
        region.read(0, 1)
        region.write(2, 5)
        assert reader.clear(region).present == {2, 5}
        reader.know(region)
        region.write(5, 6, value=4)
        region.advise(2, 1, DONT_NEED)
        region.read(2)
        found = reader.look(region)
        assert found.present == {5, 6}
        assert found.dirty.keys() == {5, 6}

    def test_huge_pages_are_dirty_at_least_where_they_were_written(self, reader: SoftReader) -> None:
        region = reader.child.map(2048)
        region.advise(0, 2048, HUGE_PAGE)
        reader.child.do(f"poke({region.start}, b'x' * {2048 * PAGE_BYTES})")
        assert reader.clear(region).dirty.keys() == set(range(2048))
        reader.know(region)
        assert reader.look(region).dirty == {}
        region.write(100, value=5)
        found = reader.look(region)
        assert found.present == set(range(2048))
        assert found.dirty[100] == bytes([100, 5]) + b"x" * (PAGE_BYTES - 2)

    def test_huge_pages_that_are_only_read_are_not_there(self, reader: SoftReader) -> None:
        region = aligned(reader.child, 2)
        region.advise(0, region.pages, HUGE_PAGE)
        region.read(0, 1, 600)
        assert reader.clear(region).present == set()


@needs_soft_dirty
class TestMoves:
    """A page is what stood at an address: another page that comes there is another content."""

    @pytest.mark.parametrize("huge", [0, 2], ids=["a few pages", "whole page tables"])
    def test_what_was_moved_over_known_pages_is_dirty(self, reader: SoftReader, huge: int) -> None:
        child = reader.child
        region, target = (aligned(child, huge) if huge else child.alone(8) for _ in range(2))
        pages = (0, 1, region.pages - 1)
        for page in pages:
            child.do(f"poke({region.start + page * PAGE_BYTES}, b'region')")
            child.do(f"poke({target.start + page * PAGE_BYTES}, b'target')")
        reader.clear(target)
        reader.know(target)
        assert reader.look(target).dirty == {}
        size = region.pages * PAGE_BYTES
        moved = child.do(f"libc.mremap({region.start}, {size}, {size}, {MAY_MOVE_AND_FIXED}, {target.start})")
        assert moved == target.start
        found = reader.look(target)
        assert found.dirty.keys() == set(pages)
        assert all(each.startswith(b"region") for each in found.dirty.values())

    def test_whole_page_tables_keep_their_bits_and_only_the_frame_tells(self, reader: SoftReader) -> None:
        """Why frames are compared at all: on a kernel where this fails, the bit alone would do."""
        child = reader.child
        region, target = aligned(child, 1), aligned(child, 1)
        region.write(0, 1)
        reader.clear(region)
        size = region.pages * PAGE_BYTES
        child.do(f"libc.mremap({region.start}, {size}, {size}, {MAY_MOVE_AND_FIXED}, {target.start})")
        entry = int.from_bytes(os.pread(reader.pagemap, 8, target.start // PAGE_BYTES * 8), "little")
        assert entry >> 63 == 1
        if entry >> 55 & 1:
            pytest.skip("this kernel marks them")
        reader.know(target, 0, 1)
        assert reader.look(target).dirty.keys() == {0, 1}


@needs_soft_dirty
class TestMappingsThatBecomeOne:
    """What is written is told by the mapping, not by its pages' bits, and the kernel may forget it."""

    def written_without_a_bit(self, reader: SoftReader, *, by_force: bool) -> Region:
        """Have 14 pages, from 24 on, written so that, before Linux 6.19, the kernel tells of none of them."""
        child = reader.child
        region = child.alone(200)
        neighbour, written = (Region(child, region.start + at * PAGE_BYTES, 14) for at in (0, 24))
        end = region.start + 100 * PAGE_BYTES
        child.do(f"libc.munmap({end}, {100 * PAGE_BYTES})")
        region.write(*range(20, 60))
        neighbour.protect(READ_ONLY)
        reader.clear(region)
        reader.know(region)
        assert reader.look(region).dirty == {}
        child.map(50, at=end)  # becomes one with the mapping before it, which counts as written from now on
        written.protect(READ_ONLY)
        if by_force:
            with Path(f"/proc/{child.pid}/mem").open("r+b", buffering=0) as memory:
                for page in range(14):
                    memory.seek(written.start + page * PAGE_BYTES)
                    memory.write(bytes([page, 9]))
        written.protect(WRITABLE)
        if not by_force:
            written.write(*range(14), value=9)
        neighbour.protect(WRITABLE)  # becomes one with it, and has not been written
        return region

    @pytest.mark.parametrize("by_force", [False, True], ids=["by itself", "by force"])
    def test_what_was_written_is_dirty(self, reader: SoftReader, *, by_force: bool) -> None:
        region = self.written_without_a_bit(reader, by_force=by_force)
        found = reader.look(region)
        written = {24 + page: content(page, 9) for page in range(14)}
        assert found.dirty.items() >= written.items()

    def test_only_the_bounds_of_the_mapping_tell(self, reader: SoftReader) -> None:
        """Why they are compared at all: on a kernel where this fails, bits and frames would do."""
        region = self.written_without_a_bit(reader, by_force=False)
        content = os.pread(reader.pagemap, region.pages * 8, region.start // PAGE_BYTES * 8)
        entries = np.frombuffer(content, dtype=np.uint64)
        if (entries[24:38] >> np.uint64(55) & np.uint64(1)).any():
            pytest.skip("this kernel marks them")


@needs_soft_dirty
class TestProcesses:
    def test_all_is_dirty_after_another_program_began(self, reader: SoftReader) -> None:
        reader.clear(reader.child.map(1))
        reader.child.become_another_program()
        reader.space.knows(np.array([0, 1 << 47], dtype=np.uint64))
        with reader.child.stopped():
            self.run(reader.space)
        runs = reader.space.runs
        assert len(runs)
        assert ((runs["flags"] & WRITTEN) != 0).all()

    def test_of_a_fork_nothing_is_known_and_its_parent_stays_as_it_was(self, reader: SoftReader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.clear(region)
        forked = reader.child.do("fork()")
        try:
            space = Space(forked, Frames(zero_frame()))
            space.knows(PageSet.of(region.numbers).byte_bounds)
            self.run(space)
            runs = space.runs
            assert region.index(pages_in(runs[(runs["flags"] & WRITTEN) != 0]).numbers) == {0, 1}
            reader.know(region)
            assert reader.look(region) == Frozen({0, 1}, {})
            region.write(1, value=4)
            assert reader.look(region).dirty == {1: content(1, 4)}
        finally:
            os.kill(forked, signal.SIGKILL)

    @staticmethod
    def run(space: Space) -> None:
        FrozenCall(FrozenBuffer(0)).run([space])
        assert space.error == 0, os.strerror(space.error)


class TestWithoutTracking:
    def test_all_that_is_there_is_dirty_again_and_again(self, untracked: SoftReader) -> None:
        region = untracked.child.map(8)
        region.write(1, 2)
        region.read(3)
        untracked.know(region)
        for _ in range(2):
            assert untracked.clear(region) == Frozen({1, 2}, {1: content(1), 2: content(2)})

    def test_of_private_files_the_written_pages_are(self, untracked: SoftReader, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"f" * 8 * PAGE_BYTES)
        file = untracked.child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDWR)")
        region = untracked.child.map(8, flags=PRIVATE, file=file)
        region.read(0, 1)
        region.write(2, 5)
        assert untracked.look(region).dirty.keys() == {2, 5}

    def test_finds_what_the_other_way_of_scanning_finds(self, untracked: SoftReader) -> None:
        child = untracked.child
        child.map(64).write(*range(0, 64, 3))
        other = Reader(child, None)
        with child.stopped():
            for each in (untracked, other):
                FrozenCall(each.buffer).run([each.space])
        if other.space.error:
            pytest.skip(f"PAGEMAP_SCAN: {os.strerror(other.space.error)}")
        try:
            ours, theirs = pages_in(untracked.space.runs).numbers, pages_in(other.space.runs).numbers
            assert ours.tolist() == theirs.tolist()
        finally:
            other.close()


@needs_soft_dirty
class TestCopyingAhead:
    @pytest.fixture
    def writer(self, tmp_path: Path) -> LayerWriter:
        return LayerWriter(tmp_path)

    async def test_much_is_copied_after_one_stop_and_known_then(
        self, child: Child, writer: LayerWriter
    ) -> None:
        stops = Stops(child)
        tracker = SoftDirtyTracker(stops)
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        region = child.map(4000)
        child.do(f"poke({region.start}, b'x' * {4000 * PAGE_BYTES})")
        await tracker.copy_ahead([process], PageHasher(), writer)
        assert stops.count == 1
        assert process.book.known.has(region.numbers).all()
        region.write(7, 9)
        await tracker.copy_ahead([process], PageHasher(), writer)
        assert stops.count == 1, "little was written since"
        unknown = process.book.unknown.numbers
        assert {7, 9} <= region.index(unknown)
        assert len(region.index(unknown)) < 20

    async def test_nothing_is_known_where_it_did_not_stand_still(
        self, child: Child, writer: LayerWriter
    ) -> None:
        stops = Stops(child)
        tracker = SoftDirtyTracker(stops)
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        region = child.map(4000)
        child.do(f"poke({region.start}, b'x' * {4000 * PAGE_BYTES})")
        await tracker.copy_ahead([process], PageHasher(), writer)
        assert len(process.book.known)
        child.do(f"poke({region.start}, b'y' * {4000 * PAGE_BYTES})")
        stops.failure = RuntimeError("thawed")
        with pytest.raises(RuntimeError):
            await tracker.copy_ahead([process], PageHasher(), writer)
        assert not len(process.book.known)

    async def test_what_may_be_read_into_directly_is_never_cleared_ahead(
        self, child: Child, writer: LayerWriter, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE_BYTES))
        try:
            child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY | os.O_DIRECT)")
        except AssertionError:
            pytest.skip(f"{tmp_path} has no O_DIRECT")
        stops = Stops(child)
        tracker = SoftDirtyTracker(stops)
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        region = child.map(4000)
        child.do(f"poke({region.start}, b'x' * {4000 * PAGE_BYTES})")
        await tracker.copy_ahead([process], PageHasher(), writer)
        assert stops.count == 0

    async def test_a_process_that_has_ended_is_passed_over(self, child: Child, writer: LayerWriter) -> None:
        tracker = SoftDirtyTracker(Stops(child))
        process = TrackedProcess(child.pid, tracker.space(child.pid))
        child.end()
        await tracker.copy_ahead([process], PageHasher(), writer)


@needs_soft_dirty
def test_it_is_chosen_where_there_is_nothing_better() -> None:
    assert choose("soft-dirty").name == "soft-dirty"


async def test_no_tracker_copies_nothing_ahead(child: Child, tmp_path: Path) -> None:
    tracker = NoTracker()
    process = TrackedProcess(child.pid, tracker.space(child.pid))
    await tracker.take_up(process)
    await tracker.copy_ahead([process], PageHasher(), LayerWriter(tmp_path))
    assert len(process.book.pages) == 0
