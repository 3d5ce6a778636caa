"""What native/soft_dirty.c makes of a pagemap: a file made for it, with an entry for each page."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from primary import pages
from primary.frames import Frames, SoftDirtyStruct

NATIVE = Path(pages.__file__).resolve().parent.parent / "native"
PAGE = 4096
SOFT_DIRTY, GUARD, FILE, SWAPPED, PRESENT = (1 << bit for bit in (55, 58, 61, 62, 63))
ZERO_FRAME = 77

_PROGRAM = """
#include <stddef.h>
#include "soft_dirty.h"
size_t sizes(int at) { return at ? sizeof(struct frames) : sizeof(struct soft_dirty); }
size_t offsets(int at)
{
    return (size_t[]){ offsetof(struct soft_dirty, before), offsetof(struct soft_dirty, now),
                       offsetof(struct soft_dirty, mapping_at), offsetof(struct frames, mapped) }[at];
}
"""

Run = tuple[int, int, bool]
"""First page, page behind the last one, whether written."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("soft-dirty")
    (directory / "sizes.c").write_text(_PROGRAM)
    options = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{NATIVE}")
    sources = (directory / "sizes.c", NATIVE / "soft_dirty.c")
    subprocess.run(["cc", *options, "-o", directory / "soft.so", *sources], check=True)
    library = ctypes.CDLL(str(directory / "soft.so"))
    library.soft_dirty_begin.argtypes = [ctypes.c_void_p]
    u64 = ctypes.c_uint64
    library.soft_dirty_scan.argtypes = [ctypes.c_void_p, ctypes.c_int, u64, u64, ctypes.c_void_p, u64]
    library.sizes.restype = library.offsets.restype = ctypes.c_size_t
    return library


_FOUND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_bool)


class Pagemap:
    """A pagemap that is written by hand, and scanned again and again."""

    def __init__(self, library: ctypes.CDLL, *, tracks: bool = True) -> None:
        self._library = library
        self.frames = Frames(ZERO_FRAME, tracks=tracks)
        self.file = os.memfd_create("pagemap")
        self.room = 1 << 20

    def holds(self, first: int, *entries: int) -> None:
        content = b"".join(entry.to_bytes(8, "little") for entry in entries)
        os.pwrite(self.file, content, first * 8)

    def scan(self, *mappings: tuple[int, int], clears: bool = False) -> list[Run]:
        found: list[Run] = []

        def on_found(_: int, start: int, end: int, written: bool) -> int:
            found.append((start // PAGE, end // PAGE, written))
            return 0 if len(found) <= self.room else errno.ENOBUFS

        address = self.frames.prepared(clears=clears)
        self._library.soft_dirty_begin(address)
        for first, end in mappings:
            callback = ctypes.cast(_FOUND(on_found), ctypes.c_void_p)
            failure = self._library.soft_dirty_scan(address, self.file, first * PAGE, end * PAGE, callback, 0)
            if failure:
                raise OSError(failure, os.strerror(failure))
        return found

    def clear(self, *mappings: tuple[int, int]) -> list[Run]:
        """Scan, and clear all bits as the kernel does."""
        found = self.scan(*mappings, clears=True)
        self.frames.cleared()
        for first, end in mappings:
            for page in range(first, end):
                entry = int.from_bytes(os.pread(self.file, 8, page * 8), "little")
                self.holds(page, entry & ~SOFT_DIRTY)
        return found


@pytest.fixture
def pagemap(library: ctypes.CDLL) -> Iterator[Pagemap]:
    pagemap = Pagemap(library)
    yield pagemap
    os.close(pagemap.file)


def test_both_sides_lay_it_out_alike(library: ctypes.CDLL) -> None:
    native = SoftDirtyStruct
    assert library.sizes(0) == ctypes.sizeof(native)
    assert library.sizes(1) == ctypes.sizeof(type(native().before))
    at = [native.before.offset, native.now.offset, native.mapping_at.offset, type(native().now).mapped.offset]
    assert [library.offsets(number) for number in range(4)] == at


class TestWhatIsThere:
    @pytest.mark.parametrize(
        ("entry", "there"),
        [
            (0, False),
            (SOFT_DIRTY, False),
            (PRESENT | 5, True),
            (PRESENT | SOFT_DIRTY | 5, True),
            (SWAPPED | 5, True),
            (PRESENT | ZERO_FRAME, False),
            (PRESENT | SOFT_DIRTY | ZERO_FRAME, False),
            (SWAPPED | ZERO_FRAME, True),
            (PRESENT | FILE | 5, False),
            (SWAPPED | FILE | 5, False),
            (SWAPPED | GUARD | 5, False),
            (PRESENT | 1 << 56 | 1 << 57 | 5, True),
        ],
    )
    def test_is_told_by_the_entry(self, pagemap: Pagemap, entry: int, there: bool) -> None:
        pagemap.holds(10, entry, PRESENT | 9)
        assert [run[:2] for run in pagemap.scan((10, 12))] == ([(10, 12)] if there else [(11, 12)])

    def test_are_runs_of_neighbours_with_gaps(self, pagemap: Pagemap) -> None:
        pagemap.holds(100, PRESENT | 1, PRESENT | 2, 0, 0, PRESENT | 3, 0)
        assert [run[:2] for run in pagemap.scan((100, 106))] == [(100, 102), (104, 105)]

    def test_is_looked_for_in_the_mappings_only(self, pagemap: Pagemap) -> None:
        pagemap.holds(9, *(PRESENT | frame for frame in range(1, 12)))
        assert [run[:2] for run in pagemap.scan((10, 12), (15, 17))] == [(10, 12), (15, 17)]

    def test_spans_more_than_one_read(self, pagemap: Pagemap) -> None:
        many = 8192 * 2 + 5
        pagemap.holds(1 << 20, *(PRESENT | SOFT_DIRTY | frame for frame in range(1000, 1000 + many)))
        assert pagemap.scan((1 << 20, (1 << 20) + many)) == [(1 << 20, (1 << 20) + many, True)]

    def test_cannot_be_told_where_the_pagemap_ends(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            pagemap.scan((10, 12))

    def test_has_no_more_runs_than_there_is_room_for(self, pagemap: Pagemap) -> None:
        pagemap.room = 1
        pagemap.holds(10, PRESENT | 1, 0, PRESENT | 2, 0)
        with pytest.raises(OSError, match=os.strerror(errno.ENOBUFS)):
            pagemap.scan((10, 14))


class TestWhatIsWritten:
    def test_is_everything_before_the_first_clear(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | SOFT_DIRTY | 1, PRESENT | 2)
        assert pagemap.scan((10, 12)) == [(10, 12, True)], "nobody knows since when the second bit is clear"

    def test_is_nothing_after_it(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | SOFT_DIRTY | 1, PRESENT | SOFT_DIRTY | 2, SWAPPED | SOFT_DIRTY | 2)
        assert pagemap.clear((10, 13)) == [(10, 13, True)]
        assert pagemap.scan((10, 13)) == [(10, 13, False)]

    def test_is_what_the_bit_says_since(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, *(PRESENT | frame for frame in range(1, 6)))
        pagemap.clear((10, 15))
        pagemap.holds(12, PRESENT | SOFT_DIRTY | 3)
        assert pagemap.scan((10, 15)) == [(10, 12, False), (12, 13, True), (13, 15, False)]

    def test_stays_so_without_another_clear(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1)
        pagemap.clear((10, 11))
        pagemap.holds(10, PRESENT | SOFT_DIRTY | 1)
        for _ in range(3):
            assert pagemap.scan((10, 11)) == [(10, 11, True)]

    def test_is_a_page_in_another_frame_whatever_its_bit(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, PRESENT | 2, PRESENT | 3)
        pagemap.clear((10, 13))
        pagemap.holds(11, PRESENT | 9)  # as mremap leaves it that moves page tables
        assert pagemap.scan((10, 13)) == [(10, 11, False), (11, 12, True), (12, 13, False)]

    def test_is_what_was_moved_on_from_one_place_to_another(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, PRESENT | 2, 0, 0)
        pagemap.clear((10, 14))
        pagemap.holds(10, 0, 0, PRESENT | 1, PRESENT | 2)
        assert pagemap.scan((10, 14)) == [(12, 14, True)]

    def test_is_a_page_that_went_to_swap_or_came_back(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 5, SWAPPED | 6)
        pagemap.clear((10, 12))
        pagemap.holds(10, SWAPPED | 5, PRESENT | 6)
        assert pagemap.scan((10, 12)) == [(10, 12, True)]

    def test_is_a_page_that_was_not_there_at_the_clear(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, 0, PRESENT | 3)
        pagemap.clear((10, 13))
        pagemap.holds(11, PRESENT | 2)
        assert pagemap.scan((10, 13)) == [(10, 11, False), (11, 12, True), (12, 13, False)]

    def test_is_everything_where_the_last_clear_is_doubtful(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, PRESENT | 2)
        pagemap.clear((10, 12))
        pagemap.frames.forget()
        assert pagemap.scan((10, 12)) == [(10, 12, True)]
        pagemap.clear((10, 12))
        assert pagemap.scan((10, 12)) == [(10, 12, False)]

    def test_is_judged_by_the_last_clear_not_the_last_scan(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1)
        pagemap.clear((10, 11))
        pagemap.holds(10, PRESENT | 2)
        for _ in range(2):
            assert pagemap.scan((10, 11)) == [(10, 11, True)]
        assert pagemap.clear((10, 11)) == [(10, 11, True)]
        assert pagemap.scan((10, 11)) == [(10, 11, False)]

    def test_is_told_apart_across_mappings_that_come_and_go(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, PRESENT | 2, 0, PRESENT | 3)
        pagemap.holds(20, PRESENT | 4, PRESENT | 5)
        pagemap.clear((10, 13), (13, 14), (18, 20), (20, 22))
        pagemap.holds(15, PRESENT | 6, PRESENT | 7)
        assert pagemap.scan((13, 14), (15, 17), (20, 22)) == [
            (13, 14, False),
            (15, 17, True),
            (20, 22, False),
        ]

    @pytest.mark.parametrize(
        ("before", "now"),
        [
            ([(10, 14)], [(10, 15)]),
            ([(10, 14)], [(9, 14)]),
            ([(10, 14)], [(10, 12)]),
            ([(10, 14)], [(10, 12), (12, 14)]),
            ([(10, 12), (12, 14)], [(10, 14)]),
            ([(10, 11), (11, 13), (13, 14)], [(10, 12), (12, 14)]),
            ([], [(10, 14)]),
        ],
        ids=["grown", "grown downwards", "shrunk", "split", "become one", "divided anew", "new"],
    )
    def test_is_all_of_a_mapping_whose_bounds_changed(
        self, pagemap: Pagemap, before: list[tuple[int, int]], now: list[tuple[int, int]]
    ) -> None:
        pagemap.holds(2, PRESENT | 8)
        pagemap.holds(9, 0, *(PRESENT | frame for frame in range(1, 5)), 0)
        pagemap.holds(20, PRESENT | 9)
        pagemap.clear((2, 3), *before, (20, 21))
        found = pagemap.scan((2, 3), *now, (20, 21))
        assert found[0] == (2, 3, False)
        assert found[-1] == (20, 21, False)
        assert all(written for _, _, written in found[1:-1])
        assert found[1][0] == 10

    def test_is_judged_by_the_mappings_at_the_last_clear(self, pagemap: Pagemap) -> None:
        pagemap.holds(10, PRESENT | 1, PRESENT | 2, 0)
        pagemap.clear((10, 12))
        assert pagemap.scan((10, 13)) == [(10, 12, True)]
        assert pagemap.scan((10, 12)) == [(10, 12, False)]
        assert pagemap.clear((10, 13)) == [(10, 12, True)]
        assert pagemap.scan((10, 13)) == [(10, 12, False)]
        assert pagemap.scan((10, 12)) == [(10, 12, True)]

    def test_is_everything_without_tracking(self, library: ctypes.CDLL) -> None:
        pagemap = Pagemap(library, tracks=False)
        pagemap.holds(10, PRESENT | 1, PRESENT | ZERO_FRAME, PRESENT | 2)
        for _ in range(2):
            assert pagemap.clear((10, 13)) == [(10, 11, True), (12, 13, True)]
        os.close(pagemap.file)


class TestRoom:
    def test_that_is_too_little_for_pages_is_told_and_can_be_enlarged(self, pagemap: Pagemap) -> None:
        pagemap.holds(0, *(PRESENT | 1000 + page for page in range(5000)))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            pagemap.scan((0, 5000), clears=True)
        pagemap.frames.grow()
        pagemap.clear((0, 5000))
        pagemap.frames.make_room(5000, 1)
        assert pagemap.scan((0, 5000)) == [(0, 5000, False)]
        assert pagemap.clear((0, 5000)) == [(0, 5000, False)]

    def test_that_is_too_little_for_ranges_is_told_and_can_be_enlarged(self, pagemap: Pagemap) -> None:
        pagemap.holds(0, *(entry for page in range(400) for entry in (PRESENT | 1000 + page, 0)))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            pagemap.scan((0, 800), clears=True)
        pagemap.frames.make_room(0, 400)
        assert len(pagemap.clear((0, 800))) == 400

    def test_that_is_too_little_for_mappings_is_told_and_can_be_enlarged(self, pagemap: Pagemap) -> None:
        pagemap.holds(3998, PRESENT | 1, PRESENT | 2)
        mappings = [(page, page + 2) for page in range(0, 4000, 2)]
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            pagemap.scan(*mappings, clears=True)
        pagemap.frames.grow()
        pagemap.clear(*mappings)
        assert pagemap.scan(*mappings) == [(3998, 4000, False)]
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            pagemap.scan(*mappings, clears=True)
        pagemap.frames.make_room(0, 0, 2000)
        assert pagemap.clear(*mappings) == [(3998, 4000, False)]

    def test_is_not_needed_to_look(self, pagemap: Pagemap) -> None:
        pagemap.holds(0, *(PRESENT | 1000 + page for page in range(5000)))
        assert pagemap.scan((0, 5000)) == [(0, 5000, True)]

    def test_that_failed_leaves_what_the_last_clear_noted(self, pagemap: Pagemap) -> None:
        pagemap.holds(0, PRESENT | 1)
        pagemap.clear((0, 1))
        pagemap.holds(1, *(PRESENT | 2000 + page for page in range(5000)))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            pagemap.scan((0, 1), (1, 5000), clears=True)
        assert pagemap.scan((0, 1), (1, 2)) == [(0, 1, False), (1, 2, True)]
