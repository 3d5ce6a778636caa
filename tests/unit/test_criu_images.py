"""The codec without a criu: what it writes byte for byte, and that damage is always a StoreError."""

import contextlib
import itertools
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.criu.images import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    DumpStats,
    Image,
    ImageKind,
    InetSocket,
    MemoryMap,
    OtherFile,
    PageImage,
    Pagemap,
    PagemapEntry,
    PageRuns,
    RegularFile,
    Remap,
    SpaceKey,
    UnixSocket,
    Vma,
    compress,
    expand,
    page_images,
    parse_image,
    parse_pagemap,
    parse_runs,
    read_dump_stats,
    read_memory_map,
    read_open_files,
    read_remaps,
    serialize_image,
    serialize_pagemap,
    serialize_pages,
    write_image,
    write_pagemap,
)
from common.criu.page_runs import decode_runs
from common.criu.pagemap import MAX_PAGES
from common.criu.proto import fdinfo_pb2, mm_pb2, remap_file_path_pb2, stats_pb2
from common.criu.proto.pagemap_pb2 import pagemap_entry, pagemap_head
from common.errors import StoreError

FLAGS = st.sampled_from([PE_PRESENT, PE_PARENT, PE_PRESENT | PE_LAZY, PE_PARENT | PE_LAZY])

_SOCKET_OPTIONS = (
    "so_sndbuf",
    "so_rcvbuf",
    "so_snd_tmo_sec",
    "so_snd_tmo_usec",
    "so_rcv_tmo_sec",
    "so_rcv_tmo_usec",
)


@st.composite
def entries(draw: st.DrawFn) -> tuple[PagemapEntry, ...]:
    made = []
    page = draw(st.integers(0, 1 << 40))
    for gap, count, flags in draw(
        st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 2000), FLAGS), max_size=20)
    ):
        page += gap
        made.append(PagemapEntry(page * 4096, count, flags))
        page += count
    return tuple(made)


def pagemap_bytes(*messages: pagemap_entry) -> bytes:
    return serialize_image(Image(ImageKind.PAGEMAP, (pagemap_head(pages_id=1), *messages)))


class TestPagemap:
    def test_is_written_as_criu_4_2_writes_it(self) -> None:
        pagemap = Pagemap(3, (PagemapEntry(0x400000, 2, PE_PRESENT | PE_LAZY),))
        assert serialize_pagemap(pagemap) == bytes.fromhex(
            "19435654 25400856"  # magics
            "02000000 0803"  # pages_id 3
            "0b000000 08808080 02 1000 2006 2802".replace(" ", "")  # vaddr, 32-bit count 0, flags, count
        )

    @given(st.integers(0, 2**32 - 1), entries())
    def test_round_trips(self, pages_id: int, made: tuple[PagemapEntry, ...]) -> None:
        pagemap = Pagemap(pages_id, made)
        assert parse_pagemap(serialize_pagemap(pagemap), "x") == pagemap

    @given(entries())
    def test_expands_and_compresses_to_the_same_pages(self, made: tuple[PagemapEntry, ...]) -> None:
        page_numbers, flags = expand(made)
        assert (page_numbers.itemsize, flags.itemsize) == (8, 1)
        assert page_numbers.tolist() == [e.vaddr // 4096 + i for e in made for i in range(e.nr_pages)]
        assert flags.tolist() == [e.flags for e in made for _ in range(e.nr_pages)]
        again = compress(page_numbers, flags)
        for left, right in itertools.pairwise(again):
            assert left.end < right.vaddr or left.flags != right.flags
        assert expand(again)[0].tolist() == page_numbers.tolist()
        assert expand(again)[1].tolist() == flags.tolist()

    def test_half_a_million_pages_expand_and_compress_in_milliseconds(self) -> None:
        page_numbers = np.arange(500_000, dtype=np.uint64)
        flags = np.where(page_numbers % 1000 < 500, PE_PRESENT, PE_PARENT).astype(np.uint8)
        started = time.perf_counter()
        made = compress(page_numbers, flags)
        expand(made)
        assert time.perf_counter() - started < 0.2  # 5 ms here; a loop over the pages takes longer than this
        assert len(made) == 1000

    @pytest.mark.parametrize("pages", [[1, 1], [2, 1]])
    def test_unsorted_pages_are_not_compressed(self, pages: list[int]) -> None:
        with pytest.raises(ValueError, match="strictly"):
            compress(np.array(pages, np.uint64), np.zeros(2, np.uint8))

    def test_of_an_older_criu_has_its_count_in_32_bits(self) -> None:
        data = pagemap_bytes(
            pagemap_entry(vaddr=4096, compat_nr_pages=2, flags=PE_PRESENT),
            pagemap_entry(vaddr=12288, compat_nr_pages=1, in_parent=True),
            pagemap_entry(vaddr=16384, compat_nr_pages=1),
        )
        assert parse_pagemap(data, "x").entries == (
            PagemapEntry(4096, 2, PE_PRESENT),
            PagemapEntry(12288, 1, PE_PARENT),
            PagemapEntry(16384, 1, PE_PRESENT),
        )

    @pytest.mark.parametrize(
        "entry",
        [
            pytest.param({"flags": 8, "nr_pages": 1}, id="unknown flag"),
            pytest.param({"flags": 4, "nr_pages": 0}, id="no pages"),
            pytest.param({"flags": 4, "nr_pages": 1, "vaddr": 4097}, id="unaligned"),
            pytest.param({"flags": 4, "nr_pages": 2, "vaddr": (1 << 64) - 4096}, id="past the end of memory"),
            pytest.param({"flags": 4, "nr_pages": MAX_PAGES + 1}, id="more pages than can be"),
        ],
    )
    def test_refuses_an_entry_that_it_cannot_trust(self, entry: dict[str, int]) -> None:
        message = pagemap_entry(vaddr=4096, compat_nr_pages=0)
        for field, value in entry.items():
            setattr(message, field, value)
        data = pagemap_bytes(message)
        with pytest.raises(StoreError, match=r"pagemap-7\.img"):
            parse_pagemap(data, "pagemap-7.img")

    def test_refuses_overlap(self) -> None:
        first = pagemap_entry(vaddr=4096, compat_nr_pages=0, flags=4, nr_pages=2)
        second = pagemap_entry(vaddr=8192, compat_nr_pages=0, flags=4, nr_pages=1)
        with pytest.raises(StoreError, match="cannot be"):
            parse_pagemap(pagemap_bytes(first, second), "x")

    def test_refuses_fields_of_a_later_criu(self) -> None:
        entry = pagemap_entry(vaddr=4096, compat_nr_pages=0, flags=4, nr_pages=1)
        body = entry.SerializeToString() + b"\x30\x01"  # field 6
        data = pagemap_bytes() + struct.pack("<I", len(body)) + body
        with pytest.raises(StoreError, match="fields that this version does not know"):
            parse_pagemap(data, "x")


def as_entries(runs: PageRuns) -> tuple[PagemapEntry, ...]:
    table = zip(runs.first.tolist(), runs.counts.tolist(), runs.flags.tolist(), strict=True)
    return tuple(PagemapEntry(first * 4096, count, flags) for first, count, flags in table)


class TestArrays:
    @given(st.integers(0, 2**32 - 1), entries())
    def test_are_read_as_protobuf_reads_and_without_it(
        self, pages_id: int, made: tuple[PagemapEntry, ...]
    ) -> None:
        runs = decode_runs(serialize_pagemap(Pagemap(pages_id, made)))
        assert runs is not None
        assert as_entries(runs) == made

    @given(st.integers(0, 2**32 - 1), entries())
    def test_are_written_as_protobuf_writes(self, pages_id: int, made: tuple[PagemapEntry, ...]) -> None:
        numbers, flags = expand(made)
        assert serialize_pages(pages_id, numbers, flags) == serialize_pagemap(
            Pagemap(pages_id, compress(numbers, flags))
        )

    @given(entries(), st.integers(0, 2**32 - 1), st.data())
    @settings(max_examples=400)
    def test_of_a_damaged_image_are_refused_or_what_protobuf_reads(
        self, made: tuple[PagemapEntry, ...], pages_id: int, draw: st.DataObject
    ) -> None:
        data = bytearray(serialize_pagemap(Pagemap(pages_id, made)))
        for _ in range(draw.draw(st.integers(1, 3))):
            at = draw.draw(st.integers(0, len(data) - 1))
            if draw.draw(st.booleans()):
                data[at] ^= 1 << draw.draw(st.integers(0, 7))
            else:
                data[at : at + draw.draw(st.integers(0, 4))] = draw.draw(st.binary(min_size=1, max_size=4))
        runs = decode_runs(bytes(data))
        if runs is not None:
            assert as_entries(runs) == parse_pagemap(bytes(data), "x").entries

    @given(st.binary(max_size=60))
    def test_of_arbitrary_bytes_are_refused_or_what_protobuf_reads(self, body: bytes) -> None:
        data = pagemap_bytes() + body
        runs = decode_runs(data)
        if runs is not None:
            assert as_entries(runs) == parse_pagemap(data, "x").entries
        assert decode_runs(body) is None

    @pytest.mark.parametrize(
        "body",
        [
            b"\x08\x80\x20\x10\x00\x20\x04\x28\x81\x00",  # a number longer than it need be
            b"\x08\x80\x20\x10\x00\x20\x04\x28\x00",  # no pages
            b"\x08\x81\x20\x10\x00\x20\x04\x28\x01",  # in the midst of a page
            b"\x08\x80\x20\x10\x00\x20\x08\x28\x01",  # a flag of a later CRIU
            b"\x08\x80\x20\x10\x00\x20\x04\x28\x01\x30\x01",  # a field of a later CRIU
            b"\x08\x80\x20\x10\x01\x20\x04",  # an older CRIU's count
            b"\x08" + b"\xff" * 9 + b"\x02\x10\x00\x20\x04\x28\x01",  # 65 bits
            b"\x08" + b"\xff" * 10 + b"\x01\x10\x00\x20\x04\x28\x01",  # without an end
            b"",
        ],
    )
    def test_of_what_is_unusual_are_left_to_protobuf(self, body: bytes) -> None:
        assert decode_runs(pagemap_bytes() + struct.pack("<I", len(body)) + body) is None

    def test_of_an_older_criu_are_understood_all_the_same(self) -> None:
        data = pagemap_bytes(pagemap_entry(vaddr=4096, compat_nr_pages=2))
        assert as_entries(parse_runs(data, "x")) == (PagemapEntry(4096, 2, PE_PRESENT),)

    def test_of_overlapping_entries_are_refused(self) -> None:
        first = pagemap_entry(vaddr=4096, compat_nr_pages=0, flags=4, nr_pages=2)
        second = pagemap_entry(vaddr=8192, compat_nr_pages=0, flags=4, nr_pages=1)
        with pytest.raises(StoreError, match="cannot be"):
            parse_runs(pagemap_bytes(first, second), "x")


class TestFrames:
    @given(st.binary(max_size=200), st.sampled_from(list(ImageKind)))
    def test_arbitrary_bytes_behind_the_magic_raise_nothing_but_store_error(
        self, body: bytes, kind: ImageKind
    ) -> None:
        magics = (kind.leading, kind.magic) if kind.leading else (kind.magic,)
        data = b"".join(struct.pack("<I", magic) for magic in magics) + body
        with contextlib.suppress(StoreError):
            parse_image(data, "x")
            if kind is ImageKind.PAGEMAP:
                parse_pagemap(data, "x")

    @given(entries(), st.integers(0, 2**32 - 1), st.data())
    def test_a_damaged_pagemap_is_a_store_error_or_another_pagemap(
        self, made: tuple[PagemapEntry, ...], pages_id: int, draw: st.DataObject
    ) -> None:
        data = bytearray(serialize_pagemap(Pagemap(pages_id, made)))
        for _ in range(draw.draw(st.integers(1, 3))):
            at = draw.draw(st.integers(0, len(data) - 1))
            if draw.draw(st.booleans()):
                data[at] ^= 1 << draw.draw(st.integers(0, 7))
            else:
                data[at : at + draw.draw(st.integers(0, 4))] = draw.draw(st.binary(min_size=1, max_size=4))
        with contextlib.suppress(StoreError):
            found = parse_pagemap(bytes(data), "x")
            assert sum(entry.nr_pages for entry in found.entries) <= MAX_PAGES
            assert parse_pagemap(serialize_pagemap(found), "x") == found

    @given(st.binary(max_size=100))
    def test_arbitrary_bytes_raise_nothing_but_store_error(self, data: bytes) -> None:
        with contextlib.suppress(StoreError):
            parse_image(data, "x")

    @given(entries().filter(bool), st.data())
    def test_a_pagemap_cut_short_inside_a_frame_is_refused(
        self, made: tuple[PagemapEntry, ...], draw: st.DataObject
    ) -> None:
        data = serialize_pagemap(Pagemap(1, made))
        last = (
            4
            + pagemap_entry(
                vaddr=made[-1].vaddr, compat_nr_pages=0, flags=made[-1].flags, nr_pages=made[-1].nr_pages
            ).ByteSize()
        )
        cut = draw.draw(st.integers(1, last - 1))
        with pytest.raises(StoreError, match="ends inside the frame"):
            parse_pagemap(data[:-cut], "x")

    def test_a_size_field_is_not_trusted(self) -> None:
        data = pagemap_bytes() + struct.pack("<I", 0xFFFFFFFF)
        with pytest.raises(StoreError, match="ends inside"):
            parse_image(data, "x")

    def test_another_kind_than_expected_is_refused(self) -> None:
        with pytest.raises(StoreError, match="of kind pagemap, not mm"):
            parse_image(pagemap_bytes(), "x", ImageKind.MM)

    def test_an_image_of_one_message_must_have_one(self) -> None:
        with pytest.raises(StoreError, match="0 messages"):
            parse_image(struct.pack("<II", 0x54564319, ImageKind.MM.magic), "x")

    def test_a_ghost_file_keeps_its_content(self) -> None:
        ghost = ImageKind.GHOST_FILE.entry(uid=0, gid=0, mode=0o100600)
        image = Image(ImageKind.GHOST_FILE, (ghost,), b"content of the file")
        assert parse_image(serialize_image(image), "x") == image


class TestReaders:
    def test_page_images_name_tasks_and_segments(self, tmp_path: Path) -> None:
        for name, pages_id in (("pagemap-7.img", 2), ("pagemap-shmem-9.img", 1)):
            write_pagemap(tmp_path / name, Pagemap(pages_id, ()))
        (tmp_path / "pages-1.img").touch()
        found = page_images(tmp_path)
        assert found == [PageImage(SpaceKey("shmem", 9), 1), PageImage(SpaceKey("task", 7), 2)]
        assert [image.key.pagemap_name for image in found] == ["pagemap-shmem-9.img", "pagemap-7.img"]
        assert found[0].pages_name == "pages-1.img"

    def test_two_pagemaps_of_the_same_pages_are_refused(self, tmp_path: Path) -> None:
        for name in ("pagemap-7.img", "pagemap-8.img"):
            write_pagemap(tmp_path / name, Pagemap(1, ()))
        with pytest.raises(StoreError, match="both name pages-1"):
            page_images(tmp_path)

    def test_a_missing_image_is_a_store_error(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="No such file"):
            read_memory_map(tmp_path / "mm-1.img")

    def test_open_files_are_read_by_type(self, tmp_path: Path) -> None:
        fown = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
        options = dict.fromkeys(_SOCKET_OPTIONS, 0)
        reg = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=1)
        reg.reg.MergeFrom(type(reg.reg)(id=1, flags=0o2, pos=3, fown=fown, name="/a", size=5, mode=0o100644))
        reg.reg.build_id.extend([0x04030201])
        isk = fdinfo_pb2.file_entry(type=fdinfo_pb2.INETSK, id=2)
        isk.isk.MergeFrom(
            type(isk.isk)(
                id=2, ino=5, family=10, type=1, proto=6, state=1, src_port=80, dst_port=4000, flags=0,
                backlog=0, fown=fown, opts=options,
                src_addr=[0, 0, 0, 0x01000000], dst_addr=[0, 0, 0xFFFF0000, 0x0100007F],
            )
        )  # fmt: skip
        usk = fdinfo_pb2.file_entry(type=fdinfo_pb2.UNIXSK, id=3)
        usk.usk.MergeFrom(
            type(usk.usk)(
                id=3, ino=6, type=1, state=10, flags=0, uflags=0, backlog=1, peer=0, fown=fown, opts=options,
                name=b"\0abstract",
            )
        )  # fmt: skip
        pipe = fdinfo_pb2.file_entry(type=fdinfo_pb2.PIPE, id=4)
        write_image(tmp_path / "files.img", Image(ImageKind.FILES, (reg, isk, usk, pipe)))

        files = read_open_files(tmp_path / "files.img")
        assert files.regular == (RegularFile(1, "/a", 5, 0o100644, 2, 3, b"\1\2\3\4", False),)
        assert files.regular[0].writable
        assert files.inet == (InetSocket(2, 10, 1, 6, 1, "::1", 80, "::ffff:127.0.0.1", 4000),)
        assert files.unix == (UnixSocket(3, 6, 1, 10, 0, b"\0abstract"),)
        assert files.other == (OtherFile(4, "pipe"),)

    def test_a_socket_of_an_impossible_address_is_a_store_error(self, tmp_path: Path) -> None:
        file = fdinfo_pb2.file_entry(type=fdinfo_pb2.INETSK, id=2)
        file.isk.MergeFrom(
            type(file.isk)(
                id=2, ino=5, family=2, type=1, proto=6, state=1, src_port=80, dst_port=0, flags=0, backlog=0,
                src_addr=[0, 0],
            )
        )  # fmt: skip
        file.isk.fown.MergeFrom(type(file.isk.fown)(uid=0, euid=0, signum=0, pid_type=0, pid=0))
        for name in _SOCKET_OPTIONS:
            setattr(file.isk.opts, name, 0)
        write_image(tmp_path / "files.img", Image(ImageKind.FILES, (file,)))
        with pytest.raises(StoreError, match="file 0x2 makes no sense"):
            read_open_files(tmp_path / "files.img")

    def test_memory_map_keeps_the_order_and_counts_aio_rings(self, tmp_path: Path) -> None:
        mm = mm_pb2.mm_entry()
        for name in list(mm.DESCRIPTOR.fields_by_name)[:12]:
            setattr(mm, name, 0)
        for start in (4096, 8192):
            mm.vmas.add(start=start, end=start + 4096, pgoff=0, shmid=4, prot=3, flags=34, status=513, fd=-1)
        mm.aios.add(id=1, nr_req=1, ring_len=4096)
        write_image(tmp_path / "mm-1.img", Image(ImageKind.MM, (mm,)))
        memory = read_memory_map(tmp_path / "mm-1.img")
        assert [vma.start for vma in memory.vmas] == [4096, 8192]
        assert memory.vmas[0].shmid == 4
        assert memory.aio_rings == 1

    @given(st.data())
    def test_damaged_images_are_store_errors_or_other_images(self, draw: st.DataObject) -> None:
        mm = mm_pb2.mm_entry()
        for name in list(mm.DESCRIPTOR.fields_by_name)[:12]:
            setattr(mm, name, 0)
        mm.vmas.add(start=4096, end=8192, pgoff=0, shmid=4, prot=3, flags=34, status=513, fd=-1)
        pipe = fdinfo_pb2.file_entry(type=fdinfo_pb2.PIPE, id=4)
        remap = remap_file_path_pb2.remap_file_path_entry(
            orig_id=1, remap_id=2, remap_type=remap_file_path_pb2.GHOST
        )
        stats = stats_pb2.stats_entry()
        for name in stats.dump.DESCRIPTOR.fields_by_name:
            setattr(stats.dump, name, 7)
        readers = {
            "mm-1.img": (ImageKind.MM, mm, lambda path: read_memory_map(path / "mm-1.img")),
            "files.img": (ImageKind.FILES, pipe, lambda path: read_open_files(path / "files.img")),
            "remap-fpath.img": (ImageKind.REMAP_PATHS, remap, read_remaps),
            "stats-dump": (ImageKind.STATS, stats, read_dump_stats),
        }
        name = draw.draw(st.sampled_from(sorted(readers)))
        kind, entry, read = readers[name]
        data = bytearray(serialize_image(Image(kind, (entry,))))
        for _ in range(draw.draw(st.integers(1, 3))):
            at = draw.draw(st.integers(0, len(data) - 1))
            data[at : at + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(min_size=1, max_size=3))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            (path / name).write_bytes(data)
            with contextlib.suppress(StoreError):
                read(path)

    def test_private_huge_pages_alone_are_without_a_parent(self) -> None:
        private, shared, huge = 0x22, 0x21, 0x40000
        kinds = [private, private | huge, shared | huge, private | huge]
        memory = MemoryMap(
            tuple(Vma(2 * n * 4096, (2 * n + 2) * 4096, 3, flags, 513, 0) for n, flags in enumerate(kinds)), 0
        )
        numbers = np.array([0, 2, 3, 4, 5, 7, 8], dtype=np.uint64)
        assert numbers[memory.without_parent(numbers)].tolist() == [2, 3, 7]
        assert not memory.without_parent(numbers[:0]).any()
        assert memory.hugetlb_bytes == 6 * 4096

    def test_remaps_are_none_without_an_image_and_named_with_one(self, tmp_path: Path) -> None:
        assert read_remaps(tmp_path) == ()
        entry = remap_file_path_pb2.remap_file_path_entry(
            orig_id=1, remap_id=2, remap_type=remap_file_path_pb2.GHOST
        )
        write_image(tmp_path / "remap-fpath.img", Image(ImageKind.REMAP_PATHS, (entry,)))
        assert read_remaps(tmp_path) == (Remap(1, 2, "ghost"),)

    def test_statistics_of_a_restore_are_not_those_of_a_dump(self, tmp_path: Path) -> None:
        stats = stats_pb2.stats_entry()
        write_image(tmp_path / "stats-dump", Image(ImageKind.STATS, (stats,)))
        with pytest.raises(StoreError, match="no statistics of a dump"):
            read_dump_stats(tmp_path)
        for number, name in enumerate(stats.dump.DESCRIPTOR.fields_by_name):
            setattr(stats.dump, name, number)
        write_image(tmp_path / "stats-dump", Image(ImageKind.STATS, (stats,)))
        assert read_dump_stats(tmp_path) == DumpStats(0, 1, 2, 3, 4, 5, 6, 8, 11, 13)
