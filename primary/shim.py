"""What the shim inside criu is told before a dump, and what it reports afterwards.

In: the smaps of each process, as they were read just before the freeze. Out: which processes criu stopped,
and whether the plan held for them. The layout of the shared memory is that of `native/shim_protocol.h`; what
the shim does with it, and never does, stands in `native/shim.c`.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from common.errors import CaptureError
from primary.native import built

_MAGIC: Final = 0x4F55544C49564531
_ROOM: Final = 4096
_HEADER: Final = struct.Struct("<QQIIII")
_PLAN: Final = struct.Struct("<IIQQQQ")
_REPORT: Final = struct.Struct("<IIII")
_PLANS_COUNT_AT: Final = 16
_PLANS_AT: Final = _HEADER.size
_REPORTS_AT: Final = _PLANS_AT + _ROOM * _PLAN.size
_TEXTS_AT: Final = _REPORTS_AT + _ROOM * _REPORT.size
_TEXT_BYTES: Final = 64 << 20
"""Room for the smaps and maps of all processes; a file in memory that takes only what is written."""

_SERVED, _REAL, _UNKNOWN_SCAN, _FAILED = 1, 2, 4, 8

_LINES: Final = re.compile(rb"^(?:([0-9a-f]+-[0-9a-f]+ .*)|VmFlags:.*)$", re.MULTILINE)

KNOWN_VERSIONS: Final = ((4, 2),)
"""Major and minor versions of CRIU whose way of asking for pages the shim knows and was tested with."""


@dataclass(frozen=True, slots=True)
class Smaps:
    """What the shim needs of one process's smaps: lines that criu reads, and the maps that they make."""

    maps: bytes
    smaps: bytes

    @classmethod
    def parse(cls, text: bytes) -> Smaps:
        """Take header lines and flags out of /proc/PID/smaps; criu reads no others."""
        headers, lines = [], []
        for match in _LINES.finditer(text):
            lines.append(match[0])
            if match[1] is not None:
                headers.append(match[1])
        return cls(b"\n".join(headers) + b"\n", b"\n".join(lines) + b"\n")


@dataclass(frozen=True, slots=True)
class ShimReport:
    """What became of one process that criu stopped."""

    pid: int
    smaps_served: bool
    hides: bool
    """Its owned pages were kept out of criu's images."""


class ShimChannel:
    """Shared memory with one criu process. Made before it is spawned; `close` it when criu is gone."""

    def __init__(self) -> None:
        self._file = os.memfd_create("outlive-shim", 0)
        os.ftruncate(self._file, _TEXTS_AT + _TEXT_BYTES)
        self._memory = mmap.mmap(self._file, _TEXTS_AT + _TEXT_BYTES)
        _HEADER.pack_into(self._memory, 0, _MAGIC, _TEXTS_AT + _TEXT_BYTES, 0, 0, 0, 0)

    @property
    def descriptor(self) -> int:
        """What criu must inherit."""
        return self._file

    @property
    def environment(self) -> dict[str, str]:
        """What must stand in criu's environment. Raises UnsupportedError if the shim was not built."""
        return {"LD_PRELOAD": str(built("outlive-shim.so")), "OUTLIVE_SHIM_FD": str(self._file)}

    def plan(self, texts: dict[int, Smaps]) -> None:
        """Say what the smaps of the processes (by PID) were; those that find no room get their own."""
        at, count = _TEXTS_AT, 0
        for pid, text in texts.items():
            end = at + len(text.maps) + len(text.smaps)
            if count == _ROOM or end > _TEXTS_AT + _TEXT_BYTES:
                break
            self._memory[at : at + len(text.maps)] = text.maps
            self._memory[at + len(text.maps) : end] = text.smaps
            place = _PLANS_AT + count * _PLAN.size
            _PLAN.pack_into(
                self._memory, place, pid, 0, at, len(text.maps), at + len(text.maps), len(text.smaps)
            )
            at, count = end, count + 1
        struct.pack_into("<I", self._memory, _PLANS_COUNT_AT, count)

    def reports(self) -> tuple[ShimReport, ...]:
        """Return what was done, a report for each process. Raises CaptureError if the shim was not there."""
        _, _, _, count, loaded, _ = _HEADER.unpack_from(self._memory)
        if not loaded:
            raise CaptureError("criu did not load the shim", hint="use the CRIU that `make setup` found")
        if count > _ROOM:
            raise CaptureError(f"the workload has more than {_ROOM} processes")
        found = []
        for at in range(count):
            pid, flags, _, _ = _REPORT.unpack_from(self._memory, _REPORTS_AT + at * _REPORT.size)
            if flags & _UNKNOWN_SCAN:
                raise CaptureError("this criu asks for pages in a way that the shim does not know")
            found.append(ShimReport(pid, bool(flags & _SERVED), not flags & _FAILED))
        return tuple(found)

    def close(self) -> None:
        """Give the memory back. Harmless when repeated."""
        if self._file >= 0:
            self._memory.close()
            os.close(self._file)
            self._file = -1
