"""One captured epoch as the messages that carry it to one replica.

In: a `CapturedEpoch`, and what the replica is known to have (its base), or nothing. Out: the frames of
`Begin`, metadata, address spaces with the pages that the replica lacks, and `Commit` with the digest, drawn
one message at a time: at no time is more than one block of pages in memory. Reading blocks, so whoever draws
does it in a thread. Which pages are sent is decided here alone: those that are not known to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from common.bulk import (
    BLOCK_PAGES,
    REPEATED,
    SEEDED,
    ZERO,
    EpochDigest,
    PackedRuns,
    pack,
    pack_numbers,
    pack_runs,
)
from common.criu.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from common.errors import CaptureError
from common.messages import (
    BULK_BYTES,
    PROTOCOL,
    REPEATS_SINCE,
    Begin,
    Buffer,
    Commit,
    Metadata,
    Pages,
    Repeats,
    Space,
    encode,
)
from common.model import PAGE_BYTES, EpochId
from primary.capture import CapturedEpoch, MetadataFile, PageTable, SpacePages
from primary.page_set import NO_PAGES, PageSet, in_order
from primary.repeats import NO_REPEATS, repeats_in

Frames = list[Buffer]

Speak = Callable[..., Frames]
"""`encode`, in the version that the replica speaks."""


@dataclass(frozen=True, slots=True)
class Held:
    """The epoch that a replica has committed, as its primary remembers it or was told."""

    id: EpochId
    table: PageTable

    @classmethod
    def of(cls, epoch: CapturedEpoch) -> Held:
        """What a replica holds that has committed `epoch`."""
        return cls(epoch.id, PageTable(epoch.spaces))


@dataclass(slots=True)
class Passage:
    """How far an epoch on its way is; whoever draws its messages changes it, others may read it."""

    done_bytes: int = 0
    """Of all its pages: what was sent, and what the replica has already or can copy."""
    on_copies: Callable[[int], None] = lambda size_bytes: None
    """Told how many bytes the replica is going to copy, because another page holds the same."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What a replica kept of an interrupted epoch, as it told."""

    name: int
    table: PageTable


def epoch_messages(
    epoch: CapturedEpoch,
    term: int,
    base: Held | None,
    seed: Seed | None,
    buffer: bytearray,
    version: int = PROTOCOL,
    passage: Passage | None = None,
) -> Iterator[Frames]:
    """Yield the frames of each message in order; `buffer` (BULK_BYTES) is overwritten between them.

    `version` is that of the wire format which the replica speaks. `passage` is kept up to date meanwhile.

    Raises CaptureError when a page or metadata file cannot be read: the epoch cannot be finished then.
    """
    speak = partial(encode, version=version)
    digest = EpochDigest()
    passage = passage or Passage()
    for frames in _body(speak, epoch, term, base, seed, buffer, passage, repeats=version >= REPEATS_SINCE):
        digest.add(frames)
        yield frames
    yield speak(Commit(digest=digest.value()))


def full_bytes(epoch: CapturedEpoch) -> int:
    """What the epoch would cost uncompressed if all of it were sent."""
    return epoch.memory_bytes + epoch.file_bytes + sum(file.size_bytes for file in epoch.metadata)


def _body(
    speak: Speak,
    epoch: CapturedEpoch,
    term: int,
    base: Held | None,
    seed: Seed | None,
    buffer: bytearray,
    passage: Passage,
    *,
    repeats: bool,
) -> Iterator[Frames]:
    yield speak(
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
            last=epoch.last,
            file_bytes=epoch.file_bytes,
        )
    )
    for file in epoch.metadata:
        yield from _metadata(speak, file)
    for space in epoch.spaces:
        # Of memory seldom a page is like another one; of files, those that were copied or written anew.
        plan = _planned(space, base, seed, repeats=repeats and space.key.kind == "file")
        passage.on_copies(len(plan.sources) * PAGE_BYTES)
        passage.done_bytes += (len(space.pages) - len(plan.content)) * PAGE_BYTES
        yield from _space(speak, epoch, space, plan, memoryview(buffer), passage)


def _metadata(speak: Speak, file: MetadataFile) -> Iterator[Frames]:
    """The file in pieces; its size is what is read, so that a growing file cannot go on for ever."""
    try:
        with file.path.open("rb") as stream:
            piece = stream.read(BULK_BYTES)
            while True:
                following = stream.read(BULK_BYTES)
                yield speak(Metadata(name=file.name, size=len(piece), more=bool(following)), [pack(piece)])
                if not following:
                    return
                piece = following
    except OSError as error:
        raise CaptureError(f"cannot read {file.path}: {error.strerror}") from error


def _space(
    speak: Speak,
    epoch: CapturedEpoch,
    space: SpacePages,
    plan: _Plan,
    buffer: memoryview,
    passage: Passage,
) -> Iterator[Frames]:
    for place, runs in enumerate(plan.runs, start=1):
        yield speak(
            Space(
                kind=space.key.kind,
                ident=space.key.ident,
                pages=runs.pages,
                changed=runs.changed,
                more=place < len(plan.runs),
            ),
            [runs.frame],
        )
    for pages, frame in pack_numbers(plan.sources):
        yield speak(Repeats(pages=pages), [frame])
    for block in plan.content.pieces(BLOCK_PAGES):
        raw = buffer[: len(block) * PAGE_BYTES]
        epoch.pages.read(space.key, space.pages.rank(block), raw)
        yield speak(Pages(raw_bytes=len(raw)), [pack(raw)])
        passage.done_bytes += len(raw)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is said of the pages of one space."""

    content: PageSet
    """Those whose content is sent."""
    sources: NDArray[np.uint64]
    """What those hold that are `REPEATED`; see `primary.repeats`."""
    runs: list[PackedRuns]
    """All of them, with the flags that say where each is."""


def _planned(space: SpacePages, base: Held | None, seed: Seed | None, *, repeats: bool = False) -> _Plan:
    """Tell of each page where it is to be taken from.

    Flags are CRIU's; PE_PARENT for what the base has. Of the changed ones, ZERO for those of zeros, SEEDED
    for those that the seed has, and REPEATED, if that is to be used, for those that are like another page.
    """
    changed = space.pages if base is None else base.table.changed(space)
    zero = space.identities.zeros(changed)
    lent = NO_PAGES if seed is None else (changed - zero) - seed.table.changed(space)
    content = (changed - zero) - lent
    held = base.table.spaces.get(space.key) if base is not None else None
    again = repeats_in(space, content, held) if repeats else NO_REPEATS
    marks = (
        (changed, PE_PRESENT ^ PE_PARENT),
        (zero, ZERO),
        (lent, SEEDED),
        (again.pages, REPEATED),
        (space.lazy, PE_LAZY),
    )
    points = in_order(np.concatenate([space.pages.bounds, *(pages.bounds for pages, _ in marks)]))
    at = np.flatnonzero(space.pages.has(points))
    starts, counts = points[at], points[at + 1] - points[at]
    flags = np.full(len(starts), PE_PARENT, dtype=np.uint8)
    for pages, flag in marks:
        flags ^= pages.has(starts) * np.uint8(flag)
    return _Plan(content - again.pages, again.sources, list(pack_runs(starts, counts, flags)))
