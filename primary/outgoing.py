"""One captured epoch as the messages that carry it to one replica.

In: a `CapturedEpoch`, and what the replica is known to have (its base), or nothing. Out: the frames of
`Begin`, metadata, address spaces with the pages that the replica lacks, and `Commit` with the digest, drawn
one message at a time: at no time is more than one block of pages in memory. Reading blocks, so whoever draws
does it in a thread. Which pages are sent is decided here alone: those that are not known to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.bulk import BLOCK_PAGES, SEEDED, ZERO, EpochDigest, pack, pack_runs, with_content
from common.criu.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from common.errors import CaptureError
from common.messages import BULK_BYTES, Begin, Buffer, Commit, Metadata, Pages, Space, encode
from common.model import PAGE_BYTES, EpochId
from primary.capture import CapturedEpoch, MetadataFile, PageTable, SpacePages

Frames = list[Buffer]


@dataclass(frozen=True, slots=True)
class Held:
    """The epoch that a replica has committed, as its primary remembers it or was told."""

    id: EpochId
    table: PageTable

    @classmethod
    def of(cls, epoch: CapturedEpoch) -> Held:
        """What a replica holds that has committed `epoch`."""
        return cls(epoch.id, epoch.table())


@dataclass(frozen=True, slots=True)
class Seed:
    """What a replica kept of an interrupted epoch, as it told."""

    name: int
    table: PageTable


def epoch_messages(
    epoch: CapturedEpoch, term: int, base: Held | None, seed: Seed | None, buffer: bytearray
) -> Iterator[Frames]:
    """Yield the frames of each message in order; `buffer` (BULK_BYTES) is overwritten between them.

    Raises CaptureError when a page or metadata file cannot be read: the epoch cannot be finished then.
    """
    digest = EpochDigest()
    for frames in _body(epoch, term, base, seed, buffer):
        digest.add(frames)
        yield frames
    yield encode(Commit(digest=digest.value()))


def full_bytes(epoch: CapturedEpoch) -> int:
    """What the epoch would cost uncompressed if all of it were sent."""
    return epoch.memory_bytes + sum(file.size_bytes for file in epoch.metadata)


def _body(
    epoch: CapturedEpoch, term: int, base: Held | None, seed: Seed | None, buffer: bytearray
) -> Iterator[Frames]:
    yield encode(
        Begin(
            term=term,
            epoch=epoch.id,
            base=base.id if base else None,
            seed=seed.name if seed else 0,
            incarnation=epoch.incarnation,
            frozen_wall_s=epoch.frozen_wall_s,
            memory_bytes=epoch.memory_bytes,
            spaces=len(epoch.spaces),
            metadata_files=len(epoch.metadata),
        )
    )
    for file in epoch.metadata:
        yield from _metadata(file)
    for space in epoch.spaces:
        yield from _space(epoch, space, _wire_flags(space, base, seed), memoryview(buffer))


def _metadata(file: MetadataFile) -> Iterator[Frames]:
    """The file in pieces; its size is what is read, so that a growing file cannot go on for ever."""
    try:
        with file.path.open("rb") as stream:
            piece = stream.read(BULK_BYTES)
            while True:
                following = stream.read(BULK_BYTES)
                yield encode(Metadata(name=file.name, size=len(piece), more=bool(following)), [pack(piece)])
                if not following:
                    return
                piece = following
    except OSError as error:
        raise CaptureError(f"cannot read {file.path}: {error.strerror}") from error


def _space(
    epoch: CapturedEpoch, space: SpacePages, flags: NDArray[np.uint8], buffer: memoryview
) -> Iterator[Frames]:
    packed = list(pack_runs(space.numbers, flags))
    for place, runs in enumerate(packed, start=1):
        yield encode(
            Space(
                kind=space.key.kind,
                ident=space.key.ident,
                pages=runs.pages,
                changed=runs.changed,
                more=place < len(packed),
            ),
            [runs.frame],
        )
    rows = np.flatnonzero(with_content(flags))
    for at in range(0, len(rows), BLOCK_PAGES):
        block = rows[at : at + BLOCK_PAGES]
        raw = buffer[: len(block) * PAGE_BYTES]
        epoch.pages.read(space.key, block, raw)
        yield encode(Pages(raw_bytes=len(raw)), [pack(raw)])


def _wire_flags(space: SpacePages, base: Held | None, seed: Seed | None) -> NDArray[np.uint8]:
    """CRIU's flags for each page; PE_PARENT for what the base has.

    Of the changed ones, ZERO for those of zeros, and SEEDED for those that the seed has.
    """
    lazy = space.flags & np.uint8(PE_LAZY)
    zero = (space.identity == 0).all(axis=1)
    fresh = np.where(zero, np.uint8(PE_PRESENT | ZERO), np.uint8(PE_PRESENT))
    if seed is not None:
        lent = ~zero & ~seed.table.changed_rows(space)
        fresh = np.where(lent, np.uint8(PE_PRESENT | SEEDED), fresh)
    if base is not None:
        fresh = np.where(base.table.changed_rows(space), fresh, np.uint8(PE_PARENT))
    flags: NDArray[np.uint8] = (fresh | lazy).astype(np.uint8)
    return flags
