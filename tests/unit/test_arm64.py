"""The parts in C on arm64: built by a cross compiler, and what needs no kernel of its own run by qemu.

No arm64 machine was at hand. What is shown here: that they compile without a warning, lay out what they share
with Python as on x86_64, read maps alike, and tell the same of the same pagemap.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from primary.pages import _Space
from setup import native

_COMPILER, _EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
_SOFT_DIRTY, _PRESENT = 1 << 55, 1 << 63

_PROGRAM = """
#include "pages.c"
#include <stddef.h>

static int found(void *nothing, uint64_t start, uint64_t end, bool written)
{
    (void)nothing;
    printf(" %u-%u%s", (unsigned)(start / 4096), (unsigned)(end / 4096), written ? "w" : "");
    return 0;
}

int main(int count, char **words)
{
    static char text[65536];
    struct vma vmas[16];
    struct soft_dirty soft = { 0 };
    (void)count;
    printf("%zu %zu %zu %zu %zu", sizeof(struct space), offsetof(struct space, runs_count),
           offsetof(struct space, vmas), offsetof(struct space, early), offsetof(struct space, soft));
    printf("\\n%d", _IOC_NR(PAGEMAP_SCAN) == 16 && _IOC_SIZE(PAGEMAP_SCAN) == sizeof(struct pm_scan_arg));
    const int maps = open(words[1], O_RDONLY), pagemap = open(words[2], O_RDONLY);
    const long vma_count = maps_parse(text, (size_t)read(maps, text, sizeof(text)), vmas, 16);
    printf("\\n");
    for (long at = 0; at < vma_count; at++)
        printf(" %lx-%lx:%u", (long)vmas[at].start, (long)vmas[at].end, vmas[at].flags);
    printf("\\n");
    soft.zero_frame = 77;
    soft_dirty_begin(&soft);
    return soft_dirty_scan(&soft, pagemap, 0, 8 * 4096, found, NULL);
}
"""

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the other machine is the subject here"),
    pytest.mark.skipif(shutil.which(_COMPILER) is None, reason=f"no {_COMPILER}"),
]


def test_all_parts_can_be_built(tmp_path: Path) -> None:
    native.build(tmp_path / "build", compiler=_COMPILER)


@pytest.mark.skipif(shutil.which(_EMULATOR) is None, reason=f"no {_EMULATOR}")
def test_they_say_what_those_for_this_machine_say(tmp_path: Path) -> None:
    program = tmp_path / "program.c"
    program.write_text(_PROGRAM)
    maps, pagemap = tmp_path / "maps", tmp_path / "pagemap"
    shutil.copyfile("/proc/self/maps", tmp_path / "whole")
    maps.write_text("".join((tmp_path / "whole").read_text().splitlines(keepends=True)[:12]))
    frames = (5, 0, 77, 6, 0, 0, 7, 8)
    pagemap.write_bytes(
        b"".join(struct.pack("<Q", frame and (frame | _PRESENT | _SOFT_DIRTY)) for frame in frames)
    )
    said = []
    for compiler, runner in (("cc", ()), (_COMPILER, (_EMULATOR,))):
        made = tmp_path / compiler
        sources = (program, *(native.SOURCES / name for name in ("scan.c", "copy.c", "soft_dirty.c")))
        options = ("-static", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{native.SOURCES}")
        subprocess.run([compiler, *options, "-o", made, *sources], check=True)
        done = subprocess.run([*runner, made, maps, pagemap], capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines())
    here, arm64 = said
    assert arm64 == here
    fields = (getattr(_Space, name).offset for name in ("runs_count", "vmas", "early", "soft"))
    assert here[0].split() == [str(each) for each in (ctypes.sizeof(_Space), *fields)]
    assert here[1] == "1"
    assert here[2].count(":") == 12
    assert here[3].split() == ["0-1w", "3-4w", "6-8w"]
