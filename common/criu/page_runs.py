"""The entries of a pagemap as numpy arrays, read from an image and written into one without a message each.

A pagemap has an entry for each run of pages, a hundred thousand of them where memory is written here and
there, and is read and written with every epoch; protobuf's own code takes microseconds for each. So images
exactly as CRIU 4.2 writes them, and no others, are read and written as arrays here. What is unusual or wrong
is for `pagemap`, which has the last word, to understand or to refuse.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from common.criu.framing import Image, ImageKind, serialize_image
from common.criu.proto.pagemap_pb2 import pagemap_head

PAGE_SIZE = 4096
PE_PARENT = 1
"""The page's content is in the parent checkpoint."""
PE_LAZY = 2
"""The page may be brought in after the process runs again."""
PE_PRESENT = 4
"""The page's content is in this checkpoint's pages image."""
KNOWN_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT

MAX_PAGES = 1 << 28
"""Most pages (1 TiB) that one pagemap may name: a damaged count must not exhaust memory."""

ADDRESS_LIMIT = 1 << 64

_VADDR, _COMPAT_NR_PAGES, _FLAGS, _NR_PAGES = 1 << 3, 2 << 3, 4 << 3, 5 << 3
"""The tags of a `pagemap_entry`'s fields, all varints (https://protobuf.dev/programming-guides/encoding)."""
_VARINT_BYTES = 10
_U32 = struct.Struct("<I")
_ROOM = 2 * _VARINT_BYTES + 8
"""More than an entry of the usual form takes: so far may be read behind the last one."""


_MAGIC = serialize_image(Image(ImageKind.PAGEMAP, ()))
"""What every pagemap image begins with."""


class PageRuns(NamedTuple):
    """The entries of a pagemap as arrays, shapes (n,)."""

    first: NDArray[np.uint64]
    """Page numbers (address / 4096), ascending."""
    counts: NDArray[np.uint64]
    flags: NDArray[np.uint8]

    def expand(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return one page number and one flags byte for each page."""
        # A page's number is its place in the output plus its run's distance from there (modulo 2**64).
        distance = self.first - (np.cumsum(self.counts, dtype=np.uint64) - self.counts)
        repeats = self.counts.astype(np.int64)
        numbers = np.repeat(distance, repeats)
        numbers += np.arange(numbers.size, dtype=np.uint64)
        return numbers, np.repeat(self.flags, repeats)


def decode_runs(data: bytes) -> PageRuns | None:
    """Parse an image that is exactly as CRIU 4.2 writes it, and makes sense; None for all else.

    Raises nothing, whatever the bytes.
    """
    if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + _U32.size:
        return None
    offset = len(_MAGIC)
    starts, end = [], len(data)
    while end - offset >= _U32.size:
        offset += _U32.size
        starts.append(offset)
        offset += _U32.unpack_from(data, offset - _U32.size)[0]
    if offset != end:
        return None
    head, starts = (
        data[starts[0] : starts[1] - _U32.size] if len(starts) > 1 else data[starts[0] :],
        starts[1:],
    )
    if not _is_plain_head(head):
        return None
    at = np.array(starts, dtype=np.int64)
    past = np.append(at[1:] - _U32.size, end)[: len(at)]
    octets = np.frombuffer(data + bytes(_ROOM), dtype=np.uint8)
    usual = octets[at] == _VADDR
    address, at = _varints(octets, at + 1)
    usual &= (octets[at] == _COMPAT_NR_PAGES) & (octets[at + 1] == 0)
    usual &= (octets[at + 2] == _FLAGS) & (octets[at + 4] == _NR_PAGES)
    flags = octets[at + 3]
    count, at = _varints(octets, at + 5)
    usual &= (at == past) & ((flags & ~np.uint8(KNOWN_FLAGS)) == 0)
    usual &= (address % np.uint64(PAGE_SIZE) == 0) & (count > 0) & (count <= MAX_PAGES)
    if not usual.all():
        return None
    first = address // np.uint64(PAGE_SIZE)
    behind = first + count  # cannot overflow: 52 bits and 28
    if (
        (first[1:] < behind[:-1]).any()
        or (behind > ADDRESS_LIMIT // PAGE_SIZE).any()
        or count.sum() > MAX_PAGES
    ):
        return None
    return PageRuns(first, count, flags.copy())


def _is_plain_head(head: bytes) -> bool:
    message = pagemap_head()
    try:
        message.MergeFromString(head)
    except DecodeError:
        return False
    return (
        message.IsInitialized() and message.SerializeToString() == head and not len(UnknownFieldSet(message))
    )


def _varints(
    octets: NDArray[np.uint8], at: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Read a number at each place; return them, and the places behind them.

    One that is not in its shortest form, or has more than 64 bits, ends where nothing usual can follow.
    """
    value = np.zeros(len(at), dtype=np.uint64)
    length = np.zeros(len(at), dtype=np.int64)
    more = np.ones(len(at), dtype=np.bool_)
    last = np.zeros(len(at), dtype=np.uint8)
    for place in range(_VARINT_BYTES):
        if not more.any():
            break
        octet = octets[at + place]
        value |= np.where(more, (octet & 0x7F).astype(np.uint64) << np.uint64(7 * place), np.uint64(0))
        last = np.where(more, octet, last)
        length += more
        more &= octet >= 0x80
    odd = more | ((last == 0) & (length > 1)) | ((length == _VARINT_BYTES) & (last > 1))
    return value, np.where(odd, at - 1, at + length)


def encode_runs(runs: PageRuns) -> bytes:
    """Give the frames of the entries, as they stand in an image behind that of the head."""
    entries = len(runs.first)
    address = runs.first * np.uint64(PAGE_SIZE)
    address_bytes, count_bytes = _varint_bytes(address), _varint_bytes(runs.counts)
    sizes = address_bytes + count_bytes + 6
    at = np.cumsum(sizes + _U32.size) - sizes
    octets = np.zeros(int(sizes.sum()) + _U32.size * entries, dtype=np.uint8)
    octets[at - _U32.size] = sizes  # below 256, and little-endian
    octets[at] = _VADDR
    _put_varints(octets, at + 1, address, address_bytes)
    at = at + 1 + address_bytes
    octets[at] = _COMPAT_NR_PAGES
    octets[at + 2] = _FLAGS
    octets[at + 3] = runs.flags
    octets[at + 4] = _NR_PAGES
    _put_varints(octets, at + 5, runs.counts, count_bytes)
    return octets.tobytes()


def _varint_bytes(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    length = np.ones(len(values), dtype=np.int64)
    for place in range(1, _VARINT_BYTES):
        length += (values >> np.uint64(7 * place)) > 0
    return length


def _put_varints(
    octets: NDArray[np.uint8], at: NDArray[np.int64], values: NDArray[np.uint64], length: NDArray[np.int64]
) -> None:
    for place in range(int(length.max(initial=0))):
        there = length > place
        septet = ((values[there] >> np.uint64(7 * place)) & np.uint64(0x7F)).astype(np.uint8)
        more = np.where(length[there] > place + 1, np.uint8(0x80), np.uint8(0))
        octets[at[there] + place] = septet | more
