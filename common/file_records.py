"""A workload's files as pages: how an epoch says which files there are, and where their contents stand.

In: inodes and directory entries. Out: pages of 4096 bytes, so that files travel, are stored, compared and
resumed exactly as memory is. Two spaces of pages carry them in every epoch of a workload that has files:

- `RECORDS`: which inodes and entries there are. Each page is a list of records, in no order, and means the
  same wherever it stands: what changes in one record changes one page.
- `CONTENTS`: what regular files hold, from `Inode.place` on, one page after the other; the last page of a
  file is filled up with zeros. A page that is not there is zeros: a hole, or as good as one. What is too
  large for a record (extended attributes, a long symbolic link) stands there too.

A page of records: its length in two bytes (little-endian), that many bytes of msgpack (a list of records),
zeros. A page of zeros has no records. A record is a list that begins with 0 (`Inode`) or 1 (`Entry`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgpack  # type: ignore[import-untyped]
import msgspec

from common.criu.images import SpaceKey
from common.errors import ProtocolError
from common.model import PAGE_BYTES

RECORDS: Final = SpaceKey("file", 0)
"""The space of the records."""
CONTENTS: Final = SpaceKey("file", 1)
"""The space of the contents."""

ROOTS: Final = 0
"""The parent of the declared directories: it is no inode. Their names are their paths, as declared."""

NOWHERE: Final = -1
"""The place of what has no content: of an empty file, or of one that is not regular."""

MOST_RECORD_BYTES: Final = 1024
"""A record that would be longer says by `Inode.extra` where the rest of it stands."""

OTHERWISE_TOLD: Final = b"trusted.SGI_ACL_"
"""What the names of attributes begin with that repeat others: XFS lists access control lists twice."""

_LENGTH_BYTES: Final = 2
MOST_LIST_BYTES: Final = PAGE_BYTES - _LENGTH_BYTES - 3
"""Room for records in a page: what is left beside the length and the head of the list."""

MOST_PAGES: Final = 1 << 28
"""Pages of the largest file: 1 TiB."""


class Inode(msgspec.Struct, frozen=True):
    """One inode of a workload's files; several entries may lead to it. Shared as a value, never changed."""

    number: int
    """Ours, not the file system's: unique in an epoch, at least 1, the same while the inode exists."""
    mode: int
    """Kind and permissions, as `st_mode`."""
    uid: int
    gid: int
    mtime_ns: int
    size: int
    """Of a regular file in bytes; else 0."""
    device: int = 0
    """Of a device node, as `st_rdev`; else 0."""
    place: int = NOWHERE
    """First page of its content in `CONTENTS`, or `NOWHERE`."""
    target: bytes = b""
    """Of a symbolic link."""
    attributes: tuple[tuple[bytes, bytes], ...] = ()
    """Extended attributes (access control lists and capabilities are some), ascending by name."""
    extra: tuple[int, int] | None = None
    """Where `target` and `attributes` stand if they are too large: first page and bytes, in `CONTENTS`."""

    @property
    def pages(self) -> int:
        """How many pages its content has."""
        return -(-self.size // PAGE_BYTES)


class Entry(msgspec.Struct, frozen=True):
    """A name in a directory."""

    parent: int
    """Number of the directory's inode, or `ROOTS`."""
    name: bytes
    inode: int


Record = Inode | Entry


def pack_record(record: Record) -> bytes:
    """Return a record's bytes; a page is any such, one after the other, by `pack_page`."""
    packed: bytes = msgpack.packb([0 if isinstance(record, Inode) else 1, *msgspec.structs.astuple(record)])
    return packed


def pack_page(records: Iterable[bytes]) -> bytes:
    """Return the page that has these records. Raises ValueError if they have more than `MOST_LIST_BYTES`."""
    packed = list(records)
    if not packed:
        return bytes(PAGE_BYTES)
    body = b"".join(packed)
    if len(body) > MOST_LIST_BYTES:
        raise ValueError(f"{len(body)} bytes of records do not fit a page")
    head: bytes = msgpack.Packer().pack_array_header(len(packed))
    listed = head + body
    return (len(listed).to_bytes(_LENGTH_BYTES, "little") + listed).ljust(PAGE_BYTES, b"\0")


def unpack_page(page: bytes | bytearray | memoryview) -> Iterator[Record]:
    """Yield the records of a page. Raises ProtocolError for what no `pack_page` has made."""
    length = int.from_bytes(page[:_LENGTH_BYTES], "little")
    if not length:
        return
    try:
        listed = msgpack.unpackb(page[_LENGTH_BYTES : _LENGTH_BYTES + length], raw=False, use_list=False)
        for kind, *fields in listed:
            record: Record = msgspec.convert(dict(zip(_FIELDS[kind], fields, strict=True)), _KINDS[kind])
            yield record
    except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a page of file records makes no sense: {error}") from error


def pack_extra(target: bytes, attributes: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Return what stands at `Inode.extra`."""
    packed: bytes = msgpack.packb([target, attributes])
    return packed


def unpack_extra(content: bytes) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """Read what `pack_extra` wrote: target and attributes. Raises ProtocolError."""
    try:
        target, attributes = msgpack.unpackb(content, raw=False, use_list=False)
        return msgspec.convert(
            (target, attributes), tuple[bytes, tuple[tuple[bytes, bytes], ...]], builtin_types=(bytes,)
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a file's attributes make no sense: {error}") from error


_KINDS: Final[tuple[type[Record], ...]] = (Inode, Entry)
_FIELDS: Final = tuple(kind.__struct_fields__ for kind in _KINDS)
