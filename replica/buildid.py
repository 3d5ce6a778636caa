"""The build-id of an ELF file: how CRIU tells one build of a library from another of the same size.

In: an O_PATH descriptor. Out: the bytes of the note, as images have them (padded to four bytes), or empty.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_MOST_NOTES_BYTES = 64 * 1024
"""Notes beyond this are not looked at: no linker writes that many."""

_Key = tuple[int, int, int, int, int]


class BuildIds:
    """Reads build-ids, each file once as long as it stays the same (device, inode, size, times)."""

    def __init__(self) -> None:
        self._known: dict[_Key, bytes] = {}

    def of(self, descriptor: int, found: os.stat_result) -> bytes:
        """Return the build-id of the file behind an O_PATH descriptor; empty if there is none to read."""
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in self._known:
            try:
                with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                    self._known[key] = read_build_id(file)
            except (OSError, struct.error):
                return b""
        return self._known[key]


def read_build_id(file: BinaryIO) -> bytes:
    """Read the build-id of an open ELF file; empty if there is none. Raises OSError, struct.error."""
    header = file.read(64)
    if header[:4] != b"\x7fELF" or header[5:6] != b"\x01":
        return b""
    wide = header[4] == 2
    table, entry_size, count = (
        (struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54))
        if wide
        else (struct.unpack_from("<I", header, 28)[0], *struct.unpack_from("<HH", header, 42))
    )
    for number in range(count):
        file.seek(table + number * entry_size)
        entry = file.read(entry_size)
        if struct.unpack_from("<I", entry)[0] != _PT_NOTE:
            continue
        offset, size = (
            (struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0])
            if wide
            else (struct.unpack_from("<I", entry, 4)[0], struct.unpack_from("<I", entry, 16)[0])
        )
        file.seek(offset)
        if found := _find_note(file.read(min(size, _MOST_NOTES_BYTES))):
            return found
    return b""


def _find_note(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_size, content_size, kind = struct.unpack_from("<III", notes, at)
        content = at + 12 + _padded(name_size)
        if kind == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0":
            return notes[content : content + content_size].ljust(_padded(content_size), b"\0")
        at = content + _padded(content_size)
    return b""


def _padded(size: int) -> int:
    return -(-size // 4) * 4
