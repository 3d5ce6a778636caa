"""The page reader on real processes: what it calls dirty, what it copies, and when tracking is lost.

The child does what it is told, line by line; each test looks at mappings of its own in it, not at the
interpreter's. A page that is dirty costs time; one that is clean and should not be costs what it holds: so
the tests are about what must not be clean.
"""

import contextlib
import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import CaptureError
from common.model import PAGE_BYTES
from primary.pages import (
    READABLE,
    UNREADABLE,
    FrozenBuffer,
    FrozenCall,
    Space,
    learn,
    pages_in,
    read_running,
    reads_directly,
    runs_of,
)
from tests.system.tracked_child import (
    BUFFER_PAGES,
    DONT_NEED,
    GUARD_INSTALL,
    HUGE_PAGE,
    NO_HUGE_PAGE,
    NOT_ACCESSIBLE,
    PRIVATE,
    WRITABLE,
    Child,
    Frozen,
    Reader,
    Region,
    content,
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
]


class TestWhileItRuns:
    async def test_written_pages_are_found_once(self, reader: Reader) -> None:
        region = reader.child.map(16)
        reader.cover()
        region.write(0, 3, 4)
        assert reader.written(region) == {0, 3, 4}
        assert reader.written(region) == set()
        region.write(4, 9)
        assert reader.written(region) == {4, 9}

    async def test_what_was_written_before_it_was_tracked_is_found_too(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(1, 2)
        assert reader.fresh(region) == set(range(8))
        assert reader.written(region) == {1, 2}

    async def test_pages_that_are_only_read_are_neither_written_nor_present(self, reader: Reader) -> None:
        region = reader.child.map(8)
        reader.cover()
        region.read(0, 1, 2)
        assert reader.written(region) == set()
        assert reader.freeze(region).present == set()

    async def test_looking_makes_no_page_of_what_is_not_there(self, reader: Reader) -> None:
        region = reader.child.map(16)
        region.write(7)
        reader.cover()
        for _ in range(3):
            reader.written(region)
        assert reader.freeze(region).present == {7}

    async def test_what_the_kernel_writes_for_the_process_is_found(
        self, reader: Reader, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(b"x" * 2 * PAGE_BYTES)
        region = reader.child.map(8)
        region.write(*range(8))
        file = reader.child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY)")
        reader.cover()
        reader.written(region)
        assert reader.child.do(f"libc.read({file}, {region.start + 2 * PAGE_BYTES}, {2 * PAGE_BYTES})") > 0
        assert reader.written(region) == {2, 3}

    async def test_more_runs_than_one_answer_holds_are_all_found(self, reader: Reader) -> None:
        region = reader.child.map(10_000)
        reader.child.do(
            f"[poke({region.start} + page * {PAGE_BYTES}, b'x') for page in range(0, 10_000, 2)] and None"
        )
        reader.cover()
        assert reader.written(region) == set(range(0, 10_000, 2))
        assert reader.written(region) == set()

    async def test_runs_without_read_permission_are_marked_and_can_be_read(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(1, 2)
        reader.cover()
        region.protect(NOT_ACCESSIBLE)
        runs = reader.space.written(reader.pagemap, reader.mappings_of(region))
        assert set(runs["flags"].tolist()) == {UNREADABLE}
        into = bytearray(2 * PAGE_BYTES)
        assert read_running(reader.child.pid, runs, memoryview(into)).all()
        assert bytes(into) == content(1) + content(2)

    def test_pages_that_vanish_are_told_and_their_neighbours_are_read(self, child: Child) -> None:
        region = child.map(6)
        region.write(*range(6))
        child.do(f"libc.munmap({region.start + 2 * PAGE_BYTES}, {2 * PAGE_BYTES})")
        into = bytearray(6 * PAGE_BYTES)
        good = read_running(child.pid, region.runs, memoryview(into))
        assert good.tolist() == [True, True, False, False, True, True]
        for page in (0, 1, 4, 5):
            assert into[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == content(page)

    def test_more_runs_than_one_call_takes_are_read_in_order(self, child: Child) -> None:
        region = child.map(5000)
        child.do(
            f"[poke({region.start} + page * {PAGE_BYTES}, page.to_bytes(2, 'little'))"
            " for page in range(5000)] and None"
        )
        numbers = region.numbers[::2]
        into = bytearray(len(numbers) * PAGE_BYTES)
        assert read_running(child.pid, runs_of(numbers), memoryview(into)).all()
        found = np.frombuffer(into, dtype="<u2").reshape(-1, PAGE_BYTES // 2)[:, 0]
        assert found.tolist() == list(range(0, 5000, 2))

    def test_a_process_that_is_gone_cannot_be_read(self, child: Child) -> None:
        region = child.map(1)
        region.write(0)
        child.end()
        with pytest.raises(CaptureError, match="cannot be read"):
            read_running(child.pid, region.runs, memoryview(bytearray(PAGE_BYTES)))


class TestEarly:
    """What is copied within the freeze while CRIU is at work still."""

    async def protected(self, reader: Reader, region: Region, *pages: int) -> None:
        """Have pages written, protected and known."""
        region.write(*pages)
        reader.cover()
        reader.written(region)
        reader.know(region)

    def early(self, reader: Reader, region: Region, room: int = BUFFER_PAGES) -> tuple[FrozenCall, Frozen]:
        """Copy early; what of the region was."""
        reader.space.make_room(1, early=True)
        call = FrozenCall(reader.buffer)
        call.run_early([reader.space], room)
        early = reader.space.early
        assert early is not None
        numbers = pages_in(early.copied).numbers
        first = region.start // PAGE_BYTES
        contents = {
            int(number) - first: bytes(reader.buffer.content(early.content_at + row, 1))
            for row, number in enumerate(numbers)
            if first <= number < first + region.pages
        }
        return call, Frozen(region.index(numbers), contents)

    async def test_what_is_dirty_is_copied_once_and_known_from_then_on(self, reader: Reader) -> None:
        region = reader.child.map(64)
        await self.protected(reader, region, *range(8))
        region.write(2, 3, 5, 20, value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early.dirty == {page: content(page, 9) for page in (2, 3, 5, 20)}
        assert end == Frozen({*range(8), 20}, {})
        after = reader.freeze(region)
        assert after == Frozen({*range(8), 20}, {}), "what was copied was protected before"
        region.write(3, value=10)
        assert reader.written(region) == {3}

    async def test_where_criu_writes_its_calls_is_left_for_the_end(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        region.protect(WRITABLE | mmap.PROT_EXEC)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early == Frozen(set(), {})
        assert end.dirty == {2: content(2, 9)}
        assert end.clean == {0, 1, 3, 4, 5, 6, 7}

    async def test_what_is_not_tracked_is_copied_too(self, reader: Reader) -> None:
        reader.cover()
        region = reader.child.alone(8)
        region.write(1, 2)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early.dirty == {1: content(1), 2: content(2)}
        assert end == Frozen({1, 2}, {})
        assert set(reader.freeze(region).dirty) == {1, 2}, "it counts as written for ever"

    async def test_what_somebody_outside_writes_afterwards_is_found_the_next_time(
        self, reader: Reader
    ) -> None:
        region = reader.child.map(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            memory = os.open(f"/proc/{reader.child.pid}/mem", os.O_RDWR)
            for page in (2, 5):
                os.pwrite(memory, bytes([page, 77]), region.start + page * PAGE_BYTES)
            os.close(memory)
            reader.found(region, call.run([reader.space]))
        assert early.dirty == {2: content(2, 9)}
        assert reader.written(region) == {2, 5}

    async def test_a_mapping_that_is_another_at_the_end_is_taken_whole(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region)
        assert set(early.dirty) == {2}
        reader.child.do(f"libc.mprotect({region.start}, {4 * PAGE_BYTES}, {mmap.PROT_READ})")
        with reader.child.stopped():
            end = reader.found(region, call.run([reader.space]))
        assert end.dirty == {page: content(page, 9 if page == 2 else 1) for page in range(8)}

    async def test_a_mapping_that_was_open_for_criu_only_is_the_same(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region)
        region.protect(NOT_ACCESSIBLE)
        with reader.child.stopped():
            end = reader.found(region, call.run([reader.space]))
        assert early.dirty == {2: content(2, 9)}
        assert end == Frozen(set(range(8)), {})

    async def test_what_may_not_be_read_is_copied(self, reader: Reader) -> None:
        region = reader.child.alone(8)
        await self.protected(reader, region, *range(8))
        region.write(2, 3, value=9)
        region.protect(NOT_ACCESSIBLE)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early.dirty == {2: content(2, 9), 3: content(3, 9)}
        assert end == Frozen(set(range(8)), {})

    async def test_without_room_nothing_is_touched(self, reader: Reader) -> None:
        region = reader.child.map(64)
        await self.protected(reader, region, *range(64))
        region.write(*range(0, 64, 2), value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region, room=31)
            assert not call.copied_early
            end = reader.found(region, call.run([reader.space]))
        assert early == Frozen(set(), {})
        assert reader.space.early is not None
        assert not reader.space.early.is_lost
        assert end.dirty == {page: content(page, 9) for page in range(0, 64, 2)}
        assert reader.written(region) == set(range(0, 64, 2))

    async def test_a_process_that_devices_may_write_into_is_left_for_the_end(
        self, reader: Reader, tmp_path: Path
    ) -> None:
        region = reader.child.map(8)
        await self.protected(reader, region, *range(8))
        (tmp_path / "file").touch()
        reader.child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY | os.O_DIRECT)")
        if not reads_directly(reader.child.pid):
            pytest.skip(f"{tmp_path} has no O_DIRECT")
        region.write(2, value=9)
        with reader.child.stopped():
            call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early == Frozen(set(), {})
        assert end.dirty == {2: content(2, 9)}
        assert reader.written(region) == {2}, "nothing was protected"

    async def test_what_was_protected_and_could_not_be_read_makes_everything_doubtful(
        self, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        region = reader.child.map(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        with reader.child.stopped():
            with monkeypatch.context() as patch:
                patch.setattr(FrozenBuffer, "address", 0)
                call, early = self.early(reader, region)
            end = reader.found(region, call.run([reader.space]))
        assert early == Frozen(set(), {})
        assert reader.space.early is not None
        assert reader.space.early.is_lost
        assert set(end.dirty) == set(range(8))

    async def test_a_process_that_is_gone_fails_alone(self, reader: Reader) -> None:
        region = reader.child.map(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        ended = Child()
        gone = Space(ended.pid)
        ended.do("1")
        ended.end()
        gone.make_room(1, early=True)
        reader.space.make_room(1, early=True)
        with reader.child.stopped():
            call = FrozenCall(reader.buffer)
            call.run_early([gone, reader.space], BUFFER_PAGES)
            end = reader.found(region, call.run([reader.space]))
        assert gone.early is not None
        assert not gone.early.is_lost
        assert not len(gone.early.copied)
        assert end == Frozen(set(range(8)), {})

    async def test_a_freeze_without_it_does_as_before(self, reader: Reader) -> None:
        region = reader.child.map(8)
        await self.protected(reader, region, *range(8))
        region.write(2, value=9)
        with reader.child.stopped():
            self.early(reader, region)
        region.write(4, value=9)
        reader.know(region, 0, 1, 2, 3, 4, 5)
        assert set(reader.freeze(region).dirty) == {4, 6, 7}


class TestFrozen:
    async def test_pages_that_are_known_and_unwritten_are_clean(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(0, 1, 5)
        reader.cover()
        reader.written(region)
        reader.know(region)
        found = reader.freeze(region)
        assert found.present == {0, 1, 5}
        assert found.dirty == {}

    async def test_a_page_that_was_written_since_it_was_protected_is_dirty(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(0, 1, 2, 5)
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.write(1, 6, value=2)
        found = reader.freeze(region)
        assert found.present == {0, 1, 2, 5, 6}
        assert found.dirty == {1: content(1, 2), 6: content(6, 2)}

    async def test_it_stays_dirty_until_it_is_protected_again(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.write(1, value=2)
        for _ in range(2):
            assert reader.freeze(region).dirty.keys() == {1}
        assert reader.written(region) == {1}
        assert reader.freeze(region).dirty == {}

    async def test_pages_whose_content_is_not_known_are_dirty(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(*range(8))
        reader.cover()
        reader.written(region)
        reader.know(region, 0, 2, 3, 7)
        found = reader.freeze(region)
        assert found.dirty == {page: content(page) for page in (1, 4, 5, 6)}
        assert found.clean == {0, 2, 3, 7}

    async def test_nothing_that_is_known_is_clean_without_tracking(self, untracked: Reader) -> None:
        region = untracked.child.map(8)
        region.write(1, 2)
        untracked.know(region)
        assert untracked.freeze(region).dirty == {1: content(1), 2: content(2)}

    async def test_all_is_dirty_when_tracking_ended(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(1, 2)
        reader.cover()
        reader.written(region)
        reader.know(region)
        assert reader.freeze(region).dirty == {}
        assert reader.userfault
        reader.userfault.close()
        assert reader.freeze(region).dirty.keys() == {1, 2}

    async def test_a_mapping_that_came_since_is_dirty_whatever_was_known_at_its_place(
        self, reader: Reader
    ) -> None:
        region = reader.child.alone(4)
        region.write(0, 1)
        reader.cover()
        reader.written(region)
        reader.know(region)
        reader.child.map(4, at=region.start)
        region.write(1, 2, value=9)
        assert reader.freeze(region) == Frozen({1, 2}, {1: content(1, 9), 2: content(2, 9)})

    async def test_pages_that_were_given_back_are_gone(self, reader: Reader) -> None:
        region = reader.child.map(8)
        region.write(*range(8))
        reader.cover()
        reader.written(region)
        reader.know(region)
        assert region.advise(2, 3, DONT_NEED) == 0
        found = reader.freeze(region)
        assert found == Frozen({0, 1, 5, 6, 7}, {})

    async def test_pages_that_were_given_back_and_written_anew_are_dirty(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(*range(4))
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.advise(1, 2, DONT_NEED)
        region.write(2, value=7)
        assert reader.freeze(region) == Frozen({0, 2, 3}, {2: content(2, 7)})

    async def test_pages_that_were_given_back_and_read_are_gone(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(*range(4))
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.advise(1, 2, DONT_NEED)
        region.read(1, 2)
        assert reader.freeze(region) == Frozen({0, 3}, {})

    async def test_guard_pages_have_no_content(self, reader: Reader) -> None:
        region = reader.child.map(6)
        region.write(*range(6))
        reader.cover()
        reader.written(region)
        reader.know(region)
        if (failure := region.advise(2, 2, GUARD_INSTALL)) < 0:
            pytest.skip(f"guard pages: {os.strerror(-failure)}")
        assert reader.freeze(region) == Frozen({0, 1, 4, 5}, {})

    @pytest.mark.parametrize("known", [True, False])
    async def test_pages_without_read_permission_are_read(self, reader: Reader, known: bool) -> None:
        region = reader.child.map(6)
        region.write(*range(6))
        reader.cover()
        reader.written(region)
        region.write(1, 4, value=3)
        if known:
            reader.know(region)
        region.protect(NOT_ACCESSIBLE)
        found = reader.freeze(region)
        assert found.present == set(range(6))
        wanted = {page: content(page) for page in range(6) if not known}
        assert found.dirty == wanted | {1: content(1, 3), 4: content(4, 3)}

    async def test_pages_with_and_without_read_permission_stand_in_order(self, untracked: Reader) -> None:
        region = untracked.child.map(9)
        region.write(*range(9))
        Region(untracked.child, region.start + 3 * PAGE_BYTES, 3).protect(NOT_ACCESSIBLE)
        assert untracked.freeze(region).dirty == {page: content(page) for page in range(9)}

    async def test_huge_pages_are_dirty_at_least_where_they_were_written(self, reader: Reader) -> None:
        region = reader.child.map(2048)
        region.advise(0, 2048, HUGE_PAGE)
        reader.child.do(f"poke({region.start}, b'x' * {2048 * PAGE_BYTES})")
        reader.cover()
        assert reader.written(region) == set(range(2048))
        reader.know(region)
        assert reader.freeze(region).dirty == {}
        region.write(100, value=5)
        found = reader.freeze(region)
        assert found.present == set(range(2048))
        assert found.dirty[100] == bytes([100, 5]) + b"x" * (PAGE_BYTES - 2)

    async def test_protects_in_the_freeze_if_it_is_told_to(self, reader: Reader) -> None:
        region = reader.child.map(4)
        region.write(0, 1)
        reader.cover()
        reader.know(region)
        reader.space.protects = True
        assert reader.freeze(region).dirty.keys() == {0, 1}
        reader.space.protects = False
        assert reader.freeze(region) == Frozen({0, 1}, {})
        region.write(1, 3, value=2)
        assert reader.freeze(region).dirty == {1: content(1, 2), 3: content(3, 2)}

    async def test_more_dirty_pages_than_there_is_room_for_are_counted_and_not_copied(
        self, untracked: Reader
    ) -> None:
        region = untracked.child.map(40)
        region.write(*range(40))
        untracked.freeze(region)
        dirty = untracked.space.dirty_pages
        assert dirty >= 40
        for room in (30, dirty - 1):
            buffer = FrozenBuffer(room)
            buffer.content(0, room)[:] = b"\xaa" * room * PAGE_BYTES
            with untracked.child.stopped():
                assert FrozenCall(buffer).run([untracked.space]) == dirty
            assert bytes(buffer.content(0, room)) == b"\xaa" * room * PAGE_BYTES
            assert untracked.space.error == 0
        untracked.buffer = FrozenBuffer(dirty)
        assert untracked.freeze(region).dirty.keys() == set(range(40))

    async def test_a_buffer_that_has_grown_is_used(self, untracked: Reader) -> None:
        region = untracked.child.map(40)
        region.write(*range(40))
        untracked.buffer = FrozenBuffer(1)
        with untracked.child.stopped():
            dirty = FrozenCall(untracked.buffer).run([untracked.space])
        untracked.buffer.resize(dirty)
        assert untracked.freeze(region).dirty.keys() == set(range(40))

    async def test_too_little_room_for_runs_is_told_and_can_be_enlarged(self, untracked: Reader) -> None:
        region = untracked.child.map(12_000)
        untracked.child.do(
            f"[poke({region.start} + page * {PAGE_BYTES}, b'x') for page in range(0, 12_000, 2)] and None"
        )
        with untracked.child.stopped():
            FrozenCall(untracked.buffer).run([untracked.space])
        assert untracked.space.error == errno.ENOBUFS
        untracked.space.grow(errno.ENOBUFS)
        assert untracked.freeze(region).dirty.keys() == set(range(0, 12_000, 2))

    async def test_several_processes_stand_one_after_the_other(self, untracked: Reader) -> None:
        with contextlib.ExitStack() as ends:
            others = [Child() for _ in range(2)]
            for other in others:
                ends.callback(other.end)
            regions = [child.map(4) for child in (untracked.child, *others)]
            for at, region in enumerate(regions):
                region.write(*range(at + 1), value=10 + at)
            readers = [untracked]
            for other in others:
                readers.append(Reader(other, None))
                ends.callback(readers[-1].close)
                readers[-1].buffer = untracked.buffer
                ends.enter_context(other.stopped())
            ends.enter_context(untracked.child.stopped())
            dirty = FrozenCall(untracked.buffer).run([each.space for each in readers])
            assert dirty == sum(each.space.dirty_pages for each in readers)
            for at, (each, region) in enumerate(zip(readers, regions, strict=True)):
                assert each.found(region, dirty).dirty == {
                    page: content(page, 10 + at) for page in range(at + 1)
                }

    def test_a_process_that_is_gone_says_so_and_leaves_the_others_whole(self, untracked: Reader) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        region = untracked.child.map(4)
        region.write(1, 2)
        ended = Space(gone.pid)
        with untracked.child.stopped():
            dirty = FrozenCall(untracked.buffer).run([ended, untracked.space])
        assert ended.error in (errno.ENOENT, errno.ESRCH)
        assert dirty == untracked.space.dirty_pages
        assert untracked.found(region, dirty).dirty == {1: content(1), 2: content(2)}


class TestPrivateFiles:
    """Pages of a file are the file's until they are written; what is dropped is the file's again."""

    FILE = b"".join(bytes([0xF0 + page]) * PAGE_BYTES for page in range(8))

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "file").write_bytes(self.FILE)
        return tmp_path / "file"

    def mapped(self, child: Child, path: Path) -> Region:
        file = child.do(f"os.open({str(path)!r}, os.O_RDWR)")
        return child.map(8, flags=PRIVATE, file=file)

    def as_in_file(self, page: int) -> bytes:
        return self.FILE[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]

    async def test_only_written_pages_are_the_process_s_own(self, reader: Reader, path: Path) -> None:
        region = self.mapped(reader.child, path)
        reader.cover()
        region.read(0, 1, 2)
        region.write(2, 5)
        assert reader.written(region) == {2, 5}
        assert reader.freeze(region).present == {2, 5}

    async def test_written_pages_are_clean_once_they_are_known(self, reader: Reader, path: Path) -> None:
        region = self.mapped(reader.child, path)
        region.write(2, 5)
        reader.cover()
        reader.written(region)
        reader.know(region, 2, 5)
        region.write(5, 6, value=4)
        found = reader.freeze(region)
        assert found.clean == {2}
        assert found.dirty == {page: bytes([page, 4]) + self.as_in_file(page)[2:] for page in (5, 6)}

    async def test_a_page_that_was_dropped_is_the_file_s_again(self, reader: Reader, path: Path) -> None:
        region = self.mapped(reader.child, path)
        region.write(2, 5)
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.advise(2, 1, DONT_NEED)
        for _ in range(2):
            assert reader.freeze(region) == Frozen({5}, {})
            region.read(2)
        region.write(2, value=6)
        assert reader.freeze(region) == Frozen({2, 5}, {2: bytes([2, 6]) + self.as_in_file(2)[2:]})

    async def test_all_pages_that_were_dropped_are_the_file_s_again_whatever_is_read_since(
        self, reader: Reader, path: Path
    ) -> None:
        region = self.mapped(reader.child, path)
        region.write(*range(8))
        reader.cover()
        reader.written(region)
        reader.know(region)
        region.advise(0, 8, DONT_NEED)
        region.read(1, 6)
        reader.written(region)
        assert reader.freeze(region) == Frozen(set(), {})

    async def test_pages_that_the_file_lost_do_not_stand_in_the_way(self, reader: Reader, path: Path) -> None:
        region = self.mapped(reader.child, path)
        region.write(2, 5, 7)
        reader.cover()
        reader.written(region)
        reader.know(region)
        os.truncate(path, 4 * PAGE_BYTES)
        assert reader.freeze(region) == Frozen({2}, {}), "what is beyond the file's end has no content"


class TestPageTablesThatWereDropped:
    """What the kernel says nothing about is there, unless its whole page table is gone (2 MiB)."""

    TABLE = 512

    @pytest.fixture(params=[True, False], ids=["as this kernel tells", "as any kernel tells"], autouse=True)
    def _told(self, request: pytest.FixtureRequest) -> Iterator[None]:
        learn(trust=request.param)
        yield
        learn(trust=True)

    @pytest.mark.parametrize("advice", [HUGE_PAGE, NO_HUGE_PAGE], ids=["huge", "small"])
    async def test_their_pages_are_gone_with_them(self, reader: Reader, advice: int) -> None:
        around = reader.child.map(6 * self.TABLE)
        skipped = -(around.start // PAGE_BYTES) % self.TABLE
        region = Region(reader.child, around.start + skipped * PAGE_BYTES, 5 * self.TABLE)
        assert region.advise(0, region.pages, advice) == 0
        reader.child.do(f"ctypes.memset({region.start}, 1, {region.pages * PAGE_BYTES}) and 0")
        reader.cover()
        assert reader.written(region) == set(range(region.pages))
        reader.know(region)
        assert reader.freeze(region).present == set(range(region.pages))
        # One table alone; and one with the first pages of the next.
        gone = {*range(self.TABLE, 2 * self.TABLE), *range(3 * self.TABLE, 4 * self.TABLE + 7)}
        assert region.advise(self.TABLE, self.TABLE, DONT_NEED) == 0
        assert region.advise(3 * self.TABLE, self.TABLE + 7, DONT_NEED) == 0
        found = reader.freeze(region)
        assert found.present == set(range(region.pages)) - gone
        assert set(found.dirty) == set()


class TestMappingsThatAreScannedInPieces:
    """A scan lets go of the address space after every 128 MiB of a mapping; nothing may fall between."""

    PIECE = 64 * 512

    async def test_pages_at_either_side_of_each_bound_are_told(self, reader: Reader) -> None:
        around = reader.child.map(3 * self.PIECE)
        assert around.advise(0, around.pages, NO_HUGE_PAGE) == 0
        at = sorted({bound + each for bound in (self.PIECE, 2 * self.PIECE) for each in (-2, -1, 0, 1)})
        present = {0, *at, around.pages - 1}
        for page in present:
            reader.child.do(f"ctypes.memset({around.start + page * PAGE_BYTES}, 1, 1) and 0")
        reader.cover()
        reader.written(around)
        reader.know(around)
        assert set(reader.freeze(around).dirty) == set()
        written = {*at[1::2], around.pages - 1}
        for page in written:
            reader.child.do(f"ctypes.memset({around.start + page * PAGE_BYTES}, 2, 1) and 0")
        found = reader.freeze(around)
        assert found.present == present
        assert set(found.dirty) == written


class TestReadsDirectly:
    def test_finds_a_file_that_is_open_so(self, child: Child, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE_BYTES))
        plain = child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDWR)")
        assert not reads_directly(child.pid)
        try:
            direct = child.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY | os.O_DIRECT)")
        except AssertionError:
            pytest.skip(f"{tmp_path} has no O_DIRECT")
        assert reads_directly(child.pid)
        child.do(f"os.close({direct})")
        assert not reads_directly(child.pid)
        child.do(f"__import__('fcntl').fcntl({plain}, 4, os.O_DIRECT)")
        assert reads_directly(child.pid), "it may be turned on later"

    def test_looks_at_all_of_many_files(self, child: Child, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE_BYTES))
        child.do(f"globals().update(kept=[open({str(tmp_path / 'file')!r}) for _ in range(200)])")
        assert not reads_directly(child.pid)
        child.do("__import__('fcntl').fcntl(kept[120], 4, os.O_DIRECT)")
        assert reads_directly(child.pid)

    def test_of_a_process_that_is_gone_is_an_error(self, child: Child) -> None:
        child.end()
        with pytest.raises(CaptureError, match="open files"):
            reads_directly(child.pid)


def test_pages_and_runs_say_the_same() -> None:
    numbers = np.array([1, 2, 3, 7, 9, 10], dtype=np.uint64)
    runs = runs_of(numbers, READABLE)
    assert [run[:3] for run in runs.tolist()] == [
        (0x1000, 0x4000, READABLE),
        (0x7000, 0x8000, READABLE),
        (0x9000, 0xB000, READABLE),
    ]
    assert pages_in(runs).numbers.tolist() == numbers.tolist()
    assert pages_in(runs[:0]).numbers.tolist() == []
    assert mmap.PAGESIZE == PAGE_BYTES
