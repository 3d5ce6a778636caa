"""What stands in bulk frames: runs of pages, blocks of pages, and the digest over an epoch's frames.

In: arrays and buffers. Out: lz4 blocks (no size in front: the header says it), and back, checked. Apart from
`common.messages` because it needs numpy, lz4 and blake3, which the keeper must not carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import lz4.block
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from common.criu.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from common.errors import ProtocolError
from common.messages import BULK_BYTES, Buffer
from common.model import PAGE_BYTES

ZERO: Final = 0x80
"""Page flag beside CRIU's own: the page changed and is all zeros; its content is not sent."""

SEEDED: Final = 0x40
"""Page flag beside CRIU's own: the page changed, but what is kept of an interrupted epoch has its content."""

REPEATED: Final = 0x20
"""Page flag beside CRIU's own: the page changed; which page holds the same is said by `Repeats`."""

IN_BASE: Final = 1 << 63
"""Added to the number of a page that a repeated one is like: it is the base's."""

BLOCK_PAGES: Final = BULK_BYTES // PAGE_BYTES
"""Most pages of one block."""

_HELD_BYTES: Final = 24
HELD_PAGES: Final = BULK_BYTES // _HELD_BYTES
"""Most pages of which one message says what they are."""

NUMBERS: Final = BULK_BYTES // 8
"""Most numbers of pages in one frame."""

_PAGE_LIMIT: Final = 1 << 52
"""Page numbers are addresses / 4096 of a 64-bit space."""

_RUN: Final = np.dtype([("start", "<u8"), ("count", "<u4"), ("flags", "<u4")])
_RUNS_PER_FRAME: Final = BULK_BYTES // _RUN.itemsize
_RUN_PAGES: Final = (1 << 32) - 1

_CHANGED: Final = (PE_PRESENT, PE_PRESENT | PE_LAZY)
_KNOWN_FLAGS: Final = np.array(
    [
        *_CHANGED,
        *(flags | ZERO for flags in _CHANGED),
        *(flags | SEEDED for flags in _CHANGED),
        *(flags | REPEATED for flags in _CHANGED),
        PE_PARENT,
        PE_PARENT | PE_LAZY,
    ],
    dtype=np.uint32,
)


@dataclass(frozen=True, slots=True)
class PackedRuns:
    """One frame's worth of an address space: what its `Space` message says, and the frame."""

    pages: int
    changed: int
    """Pages whose content follows."""
    frame: bytes


def with_content(flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mark the pages whose content is sent: changed, and none of `ZERO`, `SEEDED`, `REPEATED`; shape (n,)."""
    marks: NDArray[np.bool_] = (flags & (PE_PRESENT | ZERO | SEEDED | REPEATED)) == PE_PRESENT
    return marks


def pack_runs(
    starts: NDArray[np.uint64], counts: NDArray[np.uint64], flags: NDArray[np.uint8]
) -> Iterator[PackedRuns]:
    """Write runs of pages (ascending, apart) as many frames as it takes (≥ 1).

    Of each run its first page, how many pages it has, and their flags; shapes (n,).
    """
    runs = np.empty(len(starts), dtype=_RUN)
    runs["start"], runs["count"], runs["flags"] = starts, counts, flags
    for at in range(0, max(len(runs), 1), _RUNS_PER_FRAME):
        part = runs[at : at + _RUNS_PER_FRAME]
        content = with_content(flags[at : at + _RUNS_PER_FRAME])
        yield PackedRuns(
            pages=int(part["count"].sum()),
            changed=int(part["count"][content].sum()),
            frame=pack(part.tobytes()),
        )


def unpack_runs(frame: Buffer, pages: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Read one frame of `pack_runs` that holds `pages` pages: numbers and flags, shape (n,).

    The caller bounds `pages`: memory for them is taken. Raises ProtocolError for runs that are empty, out of
    order, overlapping, beyond the address space, of unknown flags, or not of `pages` pages.
    """
    raw = unpack(frame)
    if len(raw) % _RUN.itemsize:
        raise ProtocolError(f"runs of pages have {len(raw)} bytes, not a multiple of {_RUN.itemsize}")
    runs = np.frombuffer(raw, dtype=_RUN)
    starts, counts = runs["start"], runs["count"].astype(np.uint64)
    if int(counts.sum()) != pages or not counts.all():
        raise ProtocolError(f"runs that are said to have {pages} pages have {int(counts.sum())}")
    if (starts > _PAGE_LIMIT).any() or (starts + counts > _PAGE_LIMIT).any():
        raise ProtocolError("runs of pages reach beyond the address space")
    if (starts[1:] < starts[:-1] + counts[:-1]).any():
        raise ProtocolError("runs of pages are out of order or overlap")
    if not np.isin(runs["flags"], _KNOWN_FLAGS).all():
        raise ProtocolError("runs of pages have flags that this version does not know")
    before = np.cumsum(counts) - counts
    numbers = np.repeat(starts - before, counts.astype(np.intp)) + np.arange(pages, dtype=np.uint64)
    return numbers, np.repeat(runs["flags"].astype(np.uint8), counts.astype(np.intp))


def pack_held(numbers: NDArray[np.uint64], identity: NDArray[np.uint64]) -> bytes:
    """Write which pages are held and what they are: shapes (n,) and (n, 2), at most HELD_PAGES."""
    return pack(numbers.astype("<u8").tobytes() + identity.astype("<u8").tobytes())


def unpack_held(frame: Buffer, pages: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Read what `pack_held` wrote. Raises ProtocolError if it is not that, or out of order."""
    if not pages:
        return np.empty(0, dtype=np.uint64), np.empty((0, 2), dtype=np.uint64)
    words = np.frombuffer(unpack(frame, pages * _HELD_BYTES), dtype="<u8").astype(np.uint64)
    numbers, identity = words[:pages], words[pages:].reshape(-1, 2)
    if not (numbers[1:] > numbers[:-1]).all():
        raise ProtocolError("pages that are held are out of order")
    return numbers, identity


def pack_numbers(numbers: NDArray[np.uint64]) -> Iterator[tuple[int, bytes]]:
    """Write numbers of pages in frames; yields how many are in each."""
    for first in range(0, len(numbers), NUMBERS):
        part = numbers[first : first + NUMBERS]
        yield len(part), pack(part.astype("<u8").tobytes())


def unpack_numbers(frame: Buffer, count: int) -> NDArray[np.uint64]:
    """Read one frame of `pack_numbers`; shape (count,). Raises ProtocolError if it is not that."""
    return np.frombuffer(unpack(frame, count * 8), dtype="<u8").astype(np.uint64)


def pack(raw: Buffer) -> bytes:
    """Compress at most BULK_BYTES into one lz4 block."""
    packed: bytes = lz4.block.compress(raw, store_size=False)
    return packed


def unpack(frame: Buffer, size_bytes: int | None = None) -> bytes:
    """Uncompress one block, to exactly `size_bytes` if given. Raises ProtocolError."""
    try:
        raw: bytes = lz4.block.decompress(frame, uncompressed_size=size_bytes or BULK_BYTES)
    except lz4.block.LZ4BlockError as error:
        raise ProtocolError(f"a bulk frame does not uncompress: {error}") from error
    if size_bytes is not None and len(raw) != size_bytes:
        raise ProtocolError(f"a bulk frame has {len(raw)} bytes uncompressed instead of {size_bytes}")
    return raw


class EpochDigest:
    """blake3 over an epoch's frames in order, `Begin` first and `Commit` not included.

    Headers tell where they end and how long their bulk frames are, so no two epochs have the same bytes.
    """

    def __init__(self) -> None:
        self._hash = blake3()

    def add(self, frames: Sequence[Buffer]) -> None:
        """Take in the frames of one message."""
        for frame in frames:
            self._hash.update(frame)

    def value(self) -> bytes:
        """Return the digest so far, 32 bytes."""
        return self._hash.digest()
