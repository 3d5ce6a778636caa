"""What the agent and the shim say to each other: both sides have the same layout, and mean the same by it.

The shim itself is preloaded here into a program that is called `criu` and asks the kernel as criu does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import CaptureError, UnsupportedError
from common.model import PAGE_BYTES
from primary import shim
from primary.native import built
from primary.shim import ShimChannel, ShimReport, Smaps

NATIVE = Path(shim.__file__).resolve().parent.parent / "native"

_SOURCE = Path(__file__).with_name("shim_criu.c")
_NEEDS_CC = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def criu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of that name: the shim looks at it."""
    directory = tmp_path_factory.mktemp("shim")
    options = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}")
    subprocess.run(["cc", *options, "-o", directory / "criu", _SOURCE], check=True)
    return directory / "criu"


@pytest.fixture
def channel() -> Iterator[ShimChannel]:
    channel = ShimChannel()
    yield channel
    channel.close()


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose mappings do not change."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"x\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"x\n"
    yield process
    process.kill()
    process.communicate()


def maps_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/maps").read_bytes()


def smaps_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/smaps").read_bytes()


class TestSmaps:
    def test_of_a_process_that_stands_still_make_its_maps(self, target: subprocess.Popen[bytes]) -> None:
        assert Smaps.parse(smaps_of(target.pid)).maps == maps_of(target.pid)

    def test_of_this_process_make_its_maps(self) -> None:
        for _ in range(20):  # reading may itself need memory
            before, text, after = maps_of(os.getpid()), smaps_of(os.getpid()), maps_of(os.getpid())
            if before == after:
                break
        assert Smaps.parse(text).maps == after

    def test_keep_each_header_and_its_flags_and_nothing_else(self, target: subprocess.Popen[bytes]) -> None:
        found = Smaps.parse(smaps_of(target.pid))
        lines, headers = found.smaps.splitlines(), found.maps.splitlines()
        assert lines[0::2] == headers
        assert all(line.startswith(b"VmFlags: ") for line in lines[1::2])
        assert set(lines) <= set(smaps_of(target.pid).splitlines())

    def test_of_names_that_look_like_other_lines_are_told_apart(self, tmp_path: Path) -> None:
        names = [
            "VmFlags: rd",
            "1000-2000 rw-p",
            "a\nVmFlags: rd\n1000-2000 rw-p 0 0:0 0",
            "a\rb",
            " (deleted)",
        ]
        code = (
            "import mmap, os, sys\n"
            "kept = []\n"
            "for name in sys.argv[1:]:\n"
            "    with open(name, 'w+b') as file:\n"
            "        file.write(b'x')\n"
            "        file.flush()\n"
            "        kept.append(mmap.mmap(file.fileno(), 1))\n"
            "print('ready', flush=True)\n"
            "sys.stdin.read()\n"
        )
        with subprocess.Popen(
            ["python3", "-c", code, *names], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            found = Smaps.parse(smaps_of(process.pid))
            assert found.maps == maps_of(process.pid)
            assert found.maps.count(str(tmp_path).encode()) == len(names)
            assert found.smaps.count(b"\n") == 2 * found.maps.count(b"\n")
            assert process.stdin
            process.stdin.close()


@_NEEDS_CC
class TestLayout:
    @pytest.fixture
    def layout(self, criu: Path) -> dict[str, int]:
        return json.loads(subprocess.run([criu], check=True, capture_output=True).stdout)

    def test_is_that_of_the_header(self, layout: dict[str, int]) -> None:
        assert shim._HEADER.size == layout["shim_shared.plan"]
        assert shim._PLAN.size == layout["shim_plan"]
        assert shim._REPORT.size == layout["shim_report"]
        assert layout["shim_shared.plan"] == shim._PLANS_AT
        assert layout["shim_shared.report"] == shim._REPORTS_AT
        assert layout["shim_shared"] == shim._TEXTS_AT
        assert layout["shim_shared.plans"] == shim._PLANS_COUNT_AT

    def test_has_every_field_at_its_place(self, layout: dict[str, int]) -> None:
        def fields(struct: str) -> list[int]:
            return [at for name, at in layout.items() if name.startswith(f"{struct}.")]

        assert fields("shim_shared")[:5] == [0, 8, 16, 20, 24]  # "<QQIIII"
        assert fields("shim_plan") == [0, 8, 16, 24, 32]  # "<IIQQQQ"
        assert fields("shim_report") == [0, 4, 8]  # "<IIII"

    def test_has_its_constants(self, layout: dict[str, int]) -> None:
        assert layout["magic"] == shim._MAGIC
        assert layout["room"] == shim._ROOM
        assert layout["flags"] == [shim._SERVED, shim._REAL, shim._UNKNOWN_SCAN, shim._FAILED]


@_NEEDS_CC
class TestChannel:
    @staticmethod
    def answered(criu: Path, channel: ShimChannel, *reports: int) -> str:
        words = ["answer", str(channel.descriptor), *map(str, reports)]
        done = subprocess.run([criu, *words], check=True, capture_output=True, pass_fds=[channel.descriptor])
        return done.stdout.decode()

    def test_hands_over_the_plans(self, criu: Path, channel: ShimChannel) -> None:
        channel.plan({7: Smaps(b"maps of 7", b"smaps of 7"), 12: Smaps(b"", b"x" * 5000)})
        assert self.answered(criu, channel) == f"7 <maps of 7> <smaps of 7>\n12 <> <{'x' * 5000}>\n"

    def test_hands_over_the_last_plans_alone(self, criu: Path, channel: ShimChannel) -> None:
        channel.plan({7: Smaps(b"long maps of 7", b"a"), 8: Smaps(b"b", b"c")})
        channel.plan({9: Smaps(b"maps", b"smaps")})
        assert self.answered(criu, channel) == "9 <maps> <smaps>\n"

    def test_without_plans_has_none(self, criu: Path, channel: ShimChannel) -> None:
        assert self.answered(criu, channel) == ""

    def test_leaves_out_plans_for_which_there_is_no_room(
        self, criu: Path, channel: ShimChannel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shim, "_TEXT_BYTES", 10)
        channel.plan({7: Smaps(b"1234", b"5678"), 8: Smaps(b"90", b"1")})
        assert self.answered(criu, channel) == "7 <1234> <5678>\n"

    def test_has_as_many_plans_as_there_is_room_for(self, criu: Path, channel: ShimChannel) -> None:
        channel.plan(dict.fromkeys(range(1, shim._ROOM + 2), Smaps(b"m", b"s")))
        told = self.answered(criu, channel).splitlines()
        assert len(told) == shim._ROOM
        assert told[-1] == f"{shim._ROOM} <m> <s>"
        assert channel.reports() == (), "the last plan did not reach into the reports"

    def test_tells_what_became_of_each_process(self, criu: Path, channel: ShimChannel) -> None:
        self.answered(criu, channel, 7, shim._SERVED, 8, shim._REAL, 9, shim._REAL | shim._FAILED)
        assert channel.reports() == (
            ShimReport(7, smaps_served=True, hides=True),
            ShimReport(8, smaps_served=False, hides=True),
            ShimReport(9, smaps_served=False, hides=False),
        )

    def test_refuses_a_criu_that_asks_in_an_unknown_way(self, criu: Path, channel: ShimChannel) -> None:
        self.answered(criu, channel, 7, shim._SERVED, 8, shim._SERVED | shim._UNKNOWN_SCAN)
        with pytest.raises(CaptureError, match="does not know"):
            channel.reports()

    def test_refuses_a_dump_in_which_no_shim_was(self, channel: ShimChannel) -> None:
        with pytest.raises(CaptureError, match="did not load the shim"):
            channel.reports()

    def test_refuses_more_processes_than_it_can_name(self, criu: Path, channel: ShimChannel) -> None:
        words = [word for pid in range(1, shim._ROOM + 1) for word in (pid, shim._SERVED)]
        self.answered(criu, channel, *words)
        assert len(channel.reports()) == shim._ROOM
        shim._HEADER.pack_into(channel._memory, 0, shim._MAGIC, shim._TEXTS_AT, 0, shim._ROOM + 1, 1, 0)
        with pytest.raises(CaptureError, match="more than 4096 processes"):
            channel.reports()

    def test_can_be_closed_twice(self, channel: ShimChannel) -> None:
        descriptor = channel.descriptor
        channel.close()
        channel.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def _built() -> bool:
    try:
        return bool(built("outlive-shim.so"))
    except UnsupportedError:
        return False


@_NEEDS_CC
@pytest.mark.skipif(not _built(), reason="the shim was not built: `make setup`")
class TestTheShim:
    @staticmethod
    def dumped(
        criu: Path, pid: int, channel: ShimChannel | None, how: str = "dump"
    ) -> tuple[bytes, list[str]]:
        """Return the smaps that criu got, and the ranges of pages."""
        done = subprocess.run(
            [criu, how, str(pid)],
            capture_output=True,
            check=True,
            pass_fds=[channel.descriptor] if channel else [],
            env=dict(os.environ) | (channel.environment if channel else {}),
        )
        ranges, inherited = done.stderr.decode().splitlines()
        if ranges == "failed":
            pytest.skip("this kernel has no PAGEMAP_SCAN")
        assert not inherited, "criu's children would get the shim"
        return done.stdout, ranges.split()

    @staticmethod
    def copied_vdso(pid: int) -> str:
        """Have the process hold the first page of the vDSO itself, as a debugger would."""
        found = re.search(rb"^(\w+)-\w+ .*\[vdso\]$", maps_of(pid), re.MULTILINE)
        assert found
        at = int(found[1], 16)
        try:
            with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(at)
                page = memory.read(PAGE_BYTES)
                memory.seek(at)
                memory.write(page)
        except PermissionError:
            pytest.skip("other processes must not be written to here")
        return f"{at:x}-{at + PAGE_BYTES:x}"

    def test_serves_the_planned_smaps_where_the_maps_are_as_planned(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes]
    ) -> None:
        planned = Smaps.parse(smaps_of(target.pid))
        channel.plan({1: Smaps(b"another's", b"another's"), target.pid: planned})
        text, _ = self.dumped(criu, target.pid, channel)
        assert text == planned.smaps
        assert channel.reports() == (ShimReport(target.pid, smaps_served=True, hides=True),)

    @pytest.mark.parametrize("change", ["one byte", "one byte more", "one mapping less", "everything"])
    def test_serves_the_real_smaps_where_the_maps_are_not_as_planned(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes], change: str
    ) -> None:
        planned = Smaps.parse(smaps_of(target.pid))
        maps = {
            "one byte": planned.maps.replace(b"rw-p", b"r--p", 1),
            "one byte more": planned.maps + b"\n",
            "one mapping less": planned.maps[planned.maps.index(b"\n") + 1 :],
            "everything": b"",
        }[change]
        assert maps != planned.maps
        channel.plan({target.pid: Smaps(maps, planned.smaps)})
        text, _ = self.dumped(criu, target.pid, channel)
        assert text.startswith(planned.maps.splitlines()[0])
        assert b"Rss:" in text
        assert channel.reports() == (ShimReport(target.pid, smaps_served=False, hides=True),)

    def test_serves_the_real_smaps_where_nothing_was_planned(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes]
    ) -> None:
        text, _ = self.dumped(criu, target.pid, channel)
        assert b"Rss:" in text
        assert channel.reports() == (ShimReport(target.pid, smaps_served=False, hides=True),)

    def test_hides_all_private_pages_but_those_of_the_vdso(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes]
    ) -> None:
        vdso = self.copied_vdso(target.pid)
        _, without = self.dumped(criu, target.pid, None)
        assert vdso in without
        assert len(without) > 3
        _, ranges = self.dumped(criu, target.pid, channel)
        assert ranges == [vdso]

    def test_hides_the_same_where_the_pagemap_is_read(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes]
    ) -> None:
        vdso = self.copied_vdso(target.pid).split("-")[0]
        _, without = self.dumped(criu, target.pid, None, "read")
        assert vdso in without
        assert len(without) > 3
        _, pages = self.dumped(criu, target.pid, channel, "read")
        assert pages == [vdso]

    def test_reports_a_way_of_asking_that_it_does_not_know_and_hides_nothing(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes]
    ) -> None:
        _, without = self.dumped(criu, target.pid, None, "own")
        _, ranges = self.dumped(criu, target.pid, channel, "own")
        assert ranges == without
        with pytest.raises(CaptureError, match="does not know"):
            channel.reports()

    def test_does_nothing_in_a_program_that_is_not_criu(
        self, criu: Path, channel: ShimChannel, target: subprocess.Popen[bytes], tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copy(criu, other)
        done = subprocess.run(
            [other, "dump", str(target.pid)],
            capture_output=True,
            check=True,
            pass_fds=[channel.descriptor],
            env=dict(os.environ) | channel.environment,
        )
        assert b"Rss:" in done.stdout
        with pytest.raises(CaptureError, match="did not load"):
            channel.reports()
