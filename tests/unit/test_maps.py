"""Which mappings are the agent's own, as native/maps.h says it to the shim and to the page reader."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import CaptureError
from common.model import PAGE_BYTES
from primary import pages
from primary.pages import EXECUTABLE, FILE, OWNED, READABLE, VMA, Space

NATIVE = Path(pages.__file__).resolve().parent.parent / "native"

_PROGRAM = """
#include "maps.h"
long parse(const char *text, size_t size, struct vma *vmas, size_t room)
{
    return maps_parse(text, size, vmas, room);
}
size_t vma_bytes(void) { return sizeof(struct vma); }
int flags(int at) { return (int[]){ VMA_OWNED, VMA_FILE, VMA_READABLE, VMA_EXECUTABLE }[at]; }
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("maps")
    (directory / "maps.c").write_text(_PROGRAM)
    options = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{NATIVE}")
    subprocess.run(["cc", *options, "-o", directory / "maps.so", directory / "maps.c"], check=True)
    library = ctypes.CDLL(str(directory / "maps.so"))
    library.parse.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]
    library.parse.restype = ctypes.c_long
    return library


Mapping = tuple[int, int, int]
"""First byte, end, flags."""


class Parser:
    """Parses texts; None for those that are no maps file."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, text: str | bytes, room: int = 1000) -> list[Mapping] | None:
        text = text.encode() if isinstance(text, str) else text
        # Nothing behind the text may be looked at: what stands there would make a longer line of it.
        found = np.zeros(room, dtype=VMA)
        count = self._library.parse(text + b"-1000 rwxp 0 0:0 0\n", len(text), found.ctypes.data, room)
        return None if count < 0 else [(start, end, flags) for start, end, flags, _ in found[:count].tolist()]

    def flags(self, permissions: str, inode: int = 0, name: str = "", device: str = "00:00") -> int:
        """What a line says of its mapping."""
        line = f"7f0000000000-7f0000002000 {permissions} 00000000 {device} {inode}"
        found = self(f"{line:<72} {name}\n" if name else f"{line} \n")
        assert found is not None
        ((start, end, flags),) = found
        assert (start, end) == (0x7F0000000000, 0x7F0000002000)
        return flags


@pytest.fixture
def parse(library: ctypes.CDLL) -> Parser:
    return Parser(library)


def test_both_sides_lay_mappings_out_alike(library: ctypes.CDLL) -> None:
    assert library.vma_bytes() == VMA.itemsize
    assert [library.flags(at) for at in range(4)] == [OWNED, FILE, READABLE, EXECUTABLE]


class TestOwned:
    @pytest.mark.parametrize(
        ("inode", "name"),
        [
            (0, ""),
            (0, "[heap]"),
            (0, "[stack]"),
            (0, "[stack:1234]"),
            (0, "[anon:jvm heap]"),
            (0, "[anon:[vdso]]"),
            (4711, "/usr/lib/x86_64-linux-gnu/libc.so.6"),
            (4711, "/home/a file with spaces (deleted)"),
            (4711, "/home/[vdso]"),
            (4711, "/srv/anon_hugepage"),
            (4711, "/memfd:buffer (deleted)"),
            (4711, "//anon_hugepage"),
        ],
    )
    @pytest.mark.parametrize("permissions", ["r--p", "rw-p", "r-xp", "---p", "-w-p", "--xp"])
    def test_is_what_is_private(self, parse: Parser, permissions: str, inode: int, name: str) -> None:
        wanted = OWNED | (FILE if inode else 0)
        wanted |= READABLE if permissions[0] == "r" else 0
        wanted |= EXECUTABLE if permissions[2] == "x" else 0
        assert parse.flags(permissions, inode, name) == wanted

    @pytest.mark.parametrize(
        ("inode", "name"),
        [(0, ""), (4711, "/dev/zero (deleted)"), (9, "/SYSV00000000 (deleted)"), (1, "/dev/shm/x")],
    )
    @pytest.mark.parametrize("permissions", ["r--s", "rw-s", "---s"])
    def test_is_nothing_that_is_shared(self, parse: Parser, permissions: str, inode: int, name: str) -> None:
        assert not parse.flags(permissions, inode, name) & OWNED

    @pytest.mark.parametrize(
        "name", ["[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[vectors]", "[uprobes]"]
    )
    def test_is_nothing_that_the_kernel_makes(self, parse: Parser, name: str) -> None:
        assert parse.flags("r-xp", 0, name) == READABLE | EXECUTABLE

    @pytest.mark.parametrize("name", ["/anon_hugepage", "/anon_hugepage (deleted)"])
    def test_is_no_memory_of_huge_pages(self, parse: Parser, name: str) -> None:
        assert parse.flags("rw-p", 4711, name) == FILE | READABLE

    @pytest.mark.parametrize(
        "name", ["[vdso", "[vdso]x", "[vvar_vclock", "vdso", "[anon_hugepage", "/anon_huge"]
    )
    def test_is_what_has_only_a_similar_name(self, parse: Parser, name: str) -> None:
        assert parse.flags("r--p", 0, name) & OWNED


class TestFile:
    @pytest.mark.parametrize("inode", [1, 9, 10, 4711, 2**63])
    def test_is_what_has_an_inode(self, parse: Parser, inode: int) -> None:
        assert parse.flags("r--p", inode, "/x") & FILE
        assert parse.flags("r--s", inode) & FILE

    def test_is_nothing_without_one_whatever_its_name(self, parse: Parser) -> None:
        assert not parse.flags("r--p", 0, "/x") & FILE
        assert not parse.flags("r--p", 0, "4711") & FILE


class TestText:
    def test_of_nothing_has_no_mappings(self, parse: Parser) -> None:
        assert parse("") == []

    def test_may_have_neighbours_and_gaps(self, parse: Parser) -> None:
        text = "1000-2000 r--p 0 00:00 0\n2000-3000 rw-p 0 00:00 0\n5000-6000 ---p 0 00:00 0\n"
        assert parse(text) == [
            (0x1000, 0x2000, OWNED | READABLE),
            (0x2000, 0x3000, OWNED | READABLE),
            (0x5000, 0x6000, OWNED),
        ]

    def test_reaches_up_to_the_highest_address(self, parse: Parser) -> None:
        line = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
        assert parse(line) == [(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, EXECUTABLE)]

    def test_has_room_for_just_as_many_as_there_are(self, parse: Parser) -> None:
        text = "".join(f"{at:x}000-{at + 1:x}000 r--p 0 00:00 0 \n" for at in range(1, 6))
        assert len(parse(text, room=5) or []) == 5
        assert parse(text, room=4) is None

    @pytest.mark.parametrize(
        "text",
        [
            "\n",
            "1000-2000 r--p 0 00:00 0",  # cut off before its end
            "1000-2000 r--p 0 00:00 0\n3000",
            "1000-2000 r--p 0 00:00 0\n\n",
            "1000 r--p 0 00:00 0\n",
            "-2000 r--p 0 00:00 0\n",
            "1000- r--p 0 00:00 0\n",
            "1000-2000\n",
            "1000-2000 \n",
            "1000-2000 r--\n",
            "1000-2000 r--p\n",
            "1000-2000 r--p 0\n",
            "1000-2000 r--p 0 00:00\n",
            "1000-2000 r--x 0 00:00 0\n",
            "1000-2000 r--p0 00:00 0\n",
            "2000-1000 r--p 0 00:00 0\n",
            "1000-1000 r--p 0 00:00 0\n",
            "Size: 4 kB\n",
            "VmFlags: rd mr mw me\n",
            "1000-3000 r--p 0 00:00 0\n2000-4000 r--p 0 00:00 0\n",  # torn: one was read twice
            "3000-4000 r--p 0 00:00 0\n1000-2000 r--p 0 00:00 0\n",
        ],
    )
    def test_that_is_not_of_the_kernel_is_refused(self, parse: Parser, text: str) -> None:
        assert parse(text) is None

    def test_with_bytes_of_all_kinds_in_its_names_is_read(self, parse: Parser) -> None:
        name = bytes(byte for byte in range(256) if byte not in b"\n\0")
        found = parse(b"1000-2000 r--p 0 fe:00 7 /" + name + b"\n2000-3000 rw-p 0 00:00 0 \n")
        assert found == [(0x1000, 0x2000, OWNED | FILE | READABLE), (0x2000, 0x3000, OWNED | READABLE)]


_LINE = re.compile(r"(\w+)-(\w+) (r|-).(x|-)(p|s) \w+ \S+ (\d+) *(.*)\n")
_KERNEL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[vectors]", "[uprobes]")


def plainly(text: str) -> list[Mapping]:
    """The same by another way."""
    found = []
    for start, end, readable, executable, kind, inode, name in _LINE.findall(text):
        owned = kind == "p" and name not in _KERNEL and not name.startswith("/anon_hugepage")
        flags = OWNED * owned | FILE * (inode != "0") | READABLE * (readable == "r")
        flags |= EXECUTABLE * (executable == "x")
        found.append((int(start, 16), int(end, 16), flags))
    assert len(found) == text.count("\n")
    return found


_MAPPER = """
import ctypes, mmap, os, sys
kept = [mmap.mmap(-1, 4096, flags=kind | mmap.MAP_ANONYMOUS, prot=prot)
        for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED) for prot in (0, mmap.PROT_READ, mmap.PROT_WRITE)]
file = os.open(sys.argv[1], os.O_RDWR)
kept += [mmap.mmap(file, 4096, flags=kind) for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
print("ready", flush=True)
sys.stdin.read()
"""


class TestARealProcess:
    @pytest.fixture
    def child(self, tmp_path: Path) -> Iterator[int]:
        (tmp_path / "a file").write_bytes(bytes(PAGE_BYTES))
        with subprocess.Popen(
            [sys.executable, "-c", _MAPPER, tmp_path / "a file"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == b"ready\n"
                yield process.pid
            finally:
                process.kill()

    def test_has_the_mappings_that_a_plain_reading_finds(self, parse: Parser, child: int) -> None:
        text = Path(f"/proc/{child}/maps").read_text()
        found = parse(text)
        assert found == plainly(text)
        kinds = {flags for _, _, flags in found or []}
        assert kinds >= {OWNED, OWNED | READABLE, OWNED | FILE | READABLE, FILE | READABLE, FILE}

    def test_has_the_same_ones_for_the_page_reader(self, child: int) -> None:
        before = Path(f"/proc/{child}/maps").read_text()
        found = Space(child).mappings()
        assert [(start, end, flags) for start, end, flags, _ in found.tolist()] == plainly(before)

    def test_may_have_more_mappings_than_there_was_room_for(self) -> None:
        with mmap.mmap(-1, 3000 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            libc = ctypes.CDLL(None, use_errno=True)
            start = ctypes.addressof(held := ctypes.c_char.from_buffer(memory))
            for page in range(0, 3000, 2):
                assert libc.mprotect(ctypes.c_void_p(start + page * PAGE_BYTES), PAGE_BYTES, 0) == 0
            space = Space(os.getpid())
            found = space.mappings()
            inside = found[(found["start"] >= start) & (found["end"] <= start + 3000 * PAGE_BYTES)]
            assert len(inside) >= 2998  # the outermost may be one with their neighbours
            assert np.all(found["end"][:-1] <= found["start"][1:])
            del held
        assert space._runs.nbytes < 1 << 20, "mappings are no reason to take room for pages"

    def test_that_has_ended_is_told(self) -> None:
        process = subprocess.Popen(["true"])
        process.wait()
        with pytest.raises(CaptureError, match="No such"):
            Space(process.pid).mappings()
