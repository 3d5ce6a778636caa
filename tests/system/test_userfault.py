"""What a userfaultfd tracks of a real process, since when, and how that is lost."""

import ctypes
import os
import platform
import signal
import time

import numpy as np
import pytest

from common.errors import CaptureError
from common.model import PAGE_BYTES
from primary import userfault
from primary.page_set import PageSet
from primary.pages import (
    DIRTY,
    OWNED,
    FrozenCall,
    Space,
    lift,
    pages_in,
)
from primary.userfault import Userfault
from primary.userfault import problem as userfaultfd_problem
from tests.system.tracked_child import (
    ANONYMOUS,
    MAY_MOVE_AND_FIXED,
    NOT_ACCESSIBLE,
    READ_ONLY,
    WRITABLE,
    Child,
    Frozen,
    Reader,
    Region,
    content,
    is_tracked,
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
]


class TestTracking:
    async def test_covers_once(self, reader: Reader) -> None:
        region = reader.child.map(8)
        assert reader.fresh(region) == set(range(8))
        assert reader.fresh(region) == set()
        assert is_tracked(reader.pagemap, region.start)

    async def test_covers_all_that_is_owned_in_a_process(self, reader: Reader) -> None:
        reader.cover()
        vmas = reader.space.mappings()
        left = [
            hex(start)
            for start, _, flags, _ in vmas.tolist()
            if flags & OWNED and not is_tracked(reader.pagemap, start)
        ]
        assert left == []

    async def test_leaves_alone_what_is_shared(self, reader: Reader) -> None:
        shared = reader.child.map(4, flags=1 | ANONYMOUS)
        reader.cover()
        assert not is_tracked(reader.pagemap, shared.start)

    async def test_shared_memory_between_is_not_tracked_at_all(self, reader: Reader) -> None:
        region = reader.child.map(48)
        shared = reader.child.map(16, flags=0x01 | ANONYMOUS, at=region.start + (16 << 12))
        region.write(1, 40)
        reader.cover()
        assert not is_tracked(reader.pagemap, shared.start)
        assert reader.written(region) == {1, 40}

    async def test_is_lost_by_a_new_mapping_at_the_same_place(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        reader.cover()
        reader.child.do(f"libc.munmap({region.start}, {region.pages * PAGE_BYTES})")
        assert reader.child.map(8, at=region.start) == region
        assert not is_tracked(reader.pagemap, region.start)
        assert reader.fresh(region) == set(range(8))
        assert reader.fresh(region) == set()

    async def test_is_lost_by_a_new_mapping_over_a_part(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        region.write(*range(8))
        reader.cover()
        reader.written(region)
        reader.child.map(3, at=region.start + 2 * PAGE_BYTES)
        assert reader.fresh(region) == {2, 3, 4}

    async def test_is_lost_by_mremap_to_another_place(self, reader: Reader) -> None:
        region, target = reader.child.alone(8), reader.child.alone(8)
        region.write(*range(8))
        reader.cover()
        reader.written(region)
        size = 8 * PAGE_BYTES
        moved = reader.child.do(
            f"libc.mremap({region.start}, {size}, {size}, {MAY_MOVE_AND_FIXED}, {target.start})"
        )
        assert moved == target.start
        reader.know(target)
        found = reader.freeze(target)
        assert found.dirty == {page: content(page) for page in range(8)}, "what was moved is not known there"
        assert reader.fresh(target) == set(range(8))

    @pytest.mark.parametrize("first_written_in_parts", [False, True])
    async def test_lets_a_mapping_move_that_the_kernel_holds_for_one(
        self, reader: Reader, first_written_in_parts: bool
    ) -> None:
        region, target = reader.child.alone(30), reader.child.alone(30)
        if not first_written_in_parts:
            region.write(15)
        middle = Region(reader.child, region.start + 10 * PAGE_BYTES, 10)
        middle.protect(NOT_ACCESSIBLE)
        region.write(0, 25)
        reader.cover()
        middle.protect(WRITABLE)
        assert (len(reader.mappings_of(region)) == 1) is not first_written_in_parts
        size = 30 * PAGE_BYTES
        moved = reader.child.do(
            f"libc.mremap({region.start}, {size}, {size}, {MAY_MOVE_AND_FIXED}, {target.start})"
        )
        # Of several, Linux refuses to move any that a userfaultfd tracks; before 6.17, it does so of all.
        assert (moved == target.start) is not first_written_in_parts
        stands = region if first_written_in_parts else target
        for page in 0, 25:
            assert reader.child.do(f"peek({stands.start + page * PAGE_BYTES})") == bytes([page])

    async def test_of_a_mapping_that_grows_does_not_take_its_new_pages_for_known(
        self, reader: Reader
    ) -> None:
        around = reader.child.alone(12)
        reader.child.do(f"libc.munmap({around.start + 4 * PAGE_BYTES}, {8 * PAGE_BYTES})")
        region = Region(reader.child, around.start, 4)
        region.write(*range(4))
        reader.cover()
        reader.written(region)
        grown = reader.child.do(f"libc.mremap({region.start}, {4 * PAGE_BYTES}, {12 * PAGE_BYTES}, 0, 0)")
        assert grown == region.start
        reader.know(around)
        around.write(6, 7, value=2)
        found = reader.freeze(around)
        assert found.dirty.keys() >= {6, 7}
        assert found.present == {0, 1, 2, 3, 6, 7}

    async def test_a_neighbour_that_came_since_is_fresh_and_the_old_one_is_not(self, reader: Reader) -> None:
        around = reader.child.alone(8)
        reader.child.do(f"libc.munmap({around.start + 4 * PAGE_BYTES}, {4 * PAGE_BYTES})")
        Region(reader.child, around.start, 4).write(0, 1)
        reader.cover()
        reader.child.map(4, at=around.start + 4 * PAGE_BYTES)
        assert reader.fresh(around) == {4, 5, 6, 7}

    def left_protected(self, reader: Reader) -> Region:
        """Move a mapping beside another: that is not tracked any more, but its pages are protected still."""
        around = reader.child.alone(16)
        reader.child.do(f"libc.munmap({around.start + 8 * PAGE_BYTES}, {8 * PAGE_BYTES})")
        region = Region(reader.child, around.start, 8)
        region.write(*range(8))
        moving = reader.child.alone(8, protection=NOT_ACCESSIBLE)  # no page of it was ever there
        moving.protect(WRITABLE)
        reader.cover()
        assert reader.written(region) == set(range(8))
        size = 8 * PAGE_BYTES
        moved = reader.child.do(
            f"libc.mremap({moving.start}, {size}, {size}, {MAY_MOVE_AND_FIXED}, {region.end})"
        )
        assert moved == region.end
        if is_tracked(reader.pagemap, region.start):
            pytest.skip("this kernel goes on tracking a mapping that another one is moved beside")
        return region

    async def test_of_a_mapping_that_another_was_moved_beside(self, reader: Reader) -> None:
        region = self.left_protected(reader)
        region.write(3, value=2)
        region.protect(READ_ONLY)
        region.protect(WRITABLE)
        reader.know(region)
        assert set(reader.freeze(region).dirty) == set(range(8)), "nothing is known until it is covered"
        assert reader.fresh(region) == set(range(8))
        assert reader.written(region) == set(range(8)), "as of any mapping that is fresh"
        region.write(2, 3, value=4)
        assert reader.written(region) == {2, 3}
        assert reader.written(region) == set()

    async def test_is_in_doubt_until_all_protection_was_lifted(
        self, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader.child.map(4).write(0)
        assert reader.userfault
        reader.userfault.cover(reader.pagemap, reader.space.mappings(), time.monotonic() + 1)
        assert not reader.userfault.is_sound
        with monkeypatch.context() as broken:
            broken.setattr(userfault, "lift", lambda *_: False)
            assert not reader.userfault.lift(reader.pagemap)
        assert not reader.userfault.is_sound
        assert reader.userfault.lift(reader.pagemap)
        assert reader.userfault.is_sound

    async def test_is_in_doubt_where_pages_stay_protected(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.cover()
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert lift(nothing, reader.pagemap, region.start, region.end), "nothing is protected"
            assert reader.written(region) == {0, 1}
            assert not lift(nothing, reader.pagemap, region.start, region.end)
        finally:
            os.close(nothing)
        assert reader.written(region) == set(), "they are protected still"

    async def test_where_pages_are_protected_already_is_lifted_around_what_was_mapped_since(
        self, reader: Reader
    ) -> None:
        """An allocator that gives back page after page, while protection is lifted."""
        region = self.left_protected(reader)
        assert reader.userfault
        reader.userfault.cover(reader.pagemap, reader.space.mappings(), time.monotonic() + 1)
        reader.child.map(1, at=region.start)
        reader.child.map(1, at=region.start + 4 * PAGE_BYTES)
        assert reader.userfault.lift(reader.pagemap)
        assert reader.written(region) == {1, 2, 3, 5, 6, 7}

    async def test_of_more_mappings_than_there_is_time_for_goes_on_later(self, reader: Reader) -> None:
        first, second = reader.child.alone(8), reader.child.alone(8)
        first.write(0), second.write(0)
        for region in (first, second):  # three mappings each, side by side
            middle = Region(reader.child, region.start + 2 * PAGE_BYTES, 4)
            middle.protect(READ_ONLY)
        assert reader.userfault
        for _ in range(200):
            reader.userfault.cover(reader.pagemap, reader.space.mappings(), time.monotonic() - 1)
            for region in (first, second):
                tracked = {is_tracked(reader.pagemap, region.start + at * PAGE_BYTES) for at in range(8)}
                assert len(tracked) == 1, "what lies side by side is alike"
        assert not reader.userfault.is_sound

    def gain(self, reader: Reader, most: int = 1 << 20) -> int:
        vmas = reader.space.mappings()
        assert reader.userfault
        fresh = reader.userfault.fresh(reader.pagemap, vmas)
        tracked = vmas[((vmas["flags"] & OWNED) != 0) & ~np.isin(vmas["start"], fresh["start"])]
        return reader.userfault.gain(reader.pagemap, fresh, tracked, most)

    async def test_gains_what_there_is_to_copy(self, reader: Reader) -> None:
        reader.cover()
        assert self.gain(reader) == 0
        region = reader.child.alone(1000)
        region.write(*range(5))
        assert 5 <= self.gain(reader) < 1000, "what was never touched costs nothing"
        assert self.gain(reader, most=3) == 3

    async def test_of_what_lies_beside_something_tracked_or_was_there_for_long_is_asked_for(
        self, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        around = reader.child.alone(16)
        reader.child.do(f"libc.munmap({around.start + 8 * PAGE_BYTES}, {8 * PAGE_BYTES})")
        reader.cover()
        reader.child.map(4, at=around.start + 12 * PAGE_BYTES)
        assert self.gain(reader) < 10
        with monkeypatch.context() as later:
            later.setattr(userfault, "_OLD_S", -1)
            assert self.gain(reader) == 1 << 20
        reader.child.map(4, at=around.start + 8 * PAGE_BYTES)
        assert self.gain(reader) == 1 << 20

    async def test_survives_mprotect(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(*range(4))
        reader.cover()
        reader.written(region)
        reader.know(region)
        for protection in (READ_ONLY, NOT_ACCESSIBLE, WRITABLE):
            region.protect(protection)
            assert reader.fresh(region) == set()
        assert reader.freeze(region) == Frozen({0, 1, 2, 3}, {})
        region.write(2, value=8)
        assert reader.freeze(region).dirty == {2: content(2, 8)}

    async def test_is_not_inherited_by_a_fork(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.cover()
        reader.written(region)
        forked = reader.child.do("fork()")
        try:
            space = Space(forked)
            space.knows(PageSet.of(region.numbers).byte_bounds)
            with reader.child.stopped():
                FrozenCall(reader.buffer).run([space])
            runs = space.runs
            assert region.index(pages_in(runs[(runs["flags"] & DIRTY) != 0]).numbers) == {0, 1}
            reader.know(region)
            assert reader.freeze(region) == Frozen({0, 1}, {}), "the parent's pages are what they were"
            region.write(1, value=4)
            assert reader.freeze(region).dirty == {1: content(1, 4)}
        finally:
            os.kill(forked, signal.SIGKILL)

    async def test_ends_with_another_program_in_the_process(self, reader: Reader) -> None:
        reader.cover()
        reader.child.become_another_program()
        os.close(reader.pagemap)
        reader.pagemap = os.open(f"/proc/{reader.child.pid}/pagemap", os.O_RDWR)
        fresh, same = reader.cover()
        assert not same
        vmas = reader.space.mappings()
        owned = [(start, end) for start, end, flags, _ in vmas.tolist() if flags & OWNED]
        assert fresh == owned

    async def test_of_one_process_does_not_cover_another(self, reader: Reader) -> None:
        other = Child()
        try:
            region = other.map(4)
            strange = Reader(other, None)
            strange.userfault, reader.userfault = reader.userfault, None
            _, same = strange.cover()
            assert not same
            assert not is_tracked(strange.pagemap, region.start)
            strange.close()
        finally:
            other.end()

    def test_ends_once(self) -> None:
        if problem := userfaultfd_problem():
            pytest.skip(problem)
        number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
        userfault = Userfault(ctypes.CDLL(None).syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
        userfault.close()
        userfault.close()

    def test_by_a_descriptor_that_is_none_is_refused_and_closed(self) -> None:
        read_end, write_end = os.pipe()
        os.close(write_end)
        with pytest.raises(CaptureError, match="cannot be tracked"):
            Userfault(read_end)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read_end)
