"""The one interface of capture: what an epoch is before it is sent, and who can take one.

Two memory backends stand behind it. *Stock* lets CRIU write all pages and finds out by content what
changed. *Fast* tracks writes and reads only what is dirty. Both yield the same value, `CapturedEpoch`:

- incarnation, and the epoch that it `stands_on` (None: the content of every page can be read from it);
- the present set of every address space, with a keyed identity of each page's content;
- the zero set: pages whose identity is `PageIdentity` zero; what maps the kernel's zero page is absent;
- the content of what changed, read on demand and only until `release()`;
- CRIU's metadata images as files;
- the workload's own files, as two more spaces of pages (`common.file_records`).

A page whose state is in doubt is in the changed set: it is sent again, never skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.criu.images import PE_LAZY, PE_PRESENT, SpaceKey
from common.model import PAGE_BYTES, EpochId
from primary.identities import Identities
from primary.page_set import PageSet


@dataclass(frozen=True, slots=True)
class SpacePages:
    """The present pages of one address space or shared segment, at the instant of an epoch."""

    key: SpaceKey
    identities: Identities
    """The pages, and a keyed 128-bit identity of each one's content; `ZERO_IDENTITY` for pages of zeros.

    One that no page has (`common.identity.fresh_identity`) for pages that must be sent with every epoch.
    """
    lazy: PageSet
    """Those of them that may be brought in lazily: all have CRIU's PE_PRESENT, these PE_LAZY too."""

    @classmethod
    def of(
        cls,
        key: SpaceKey,
        numbers: NDArray[np.uint64],
        flags: NDArray[np.uint8],
        identity: NDArray[np.uint64],
    ) -> SpacePages:
        """Make it of page numbers (ascending, unique), CRIU's flags, identities; shapes (n,) and (n, 2)."""
        lazy = PageSet.of(numbers[(flags & PE_LAZY) != 0])
        return cls(key, Identities.of(numbers, identity), lazy)

    @property
    def pages(self) -> PageSet:
        """Which pages there are; a page's row is its place among them."""
        return self.identities.pages

    @property
    def numbers(self) -> NDArray[np.uint64]:
        """Their numbers (address / 4096), ascending; shape (n,). Like all that follows: for what is small."""
        return self.pages.numbers

    @property
    def flags(self) -> NDArray[np.uint8]:
        """CRIU's own flags but PE_PARENT; shape (n,)."""
        lazy = self.lazy.has(self.numbers)
        return np.where(lazy, np.uint8(PE_PRESENT | PE_LAZY), np.uint8(PE_PRESENT))

    @property
    def identity(self) -> NDArray[np.uint64]:
        """What they hold; shape (n, 2)."""
        return self.identities.get(self.numbers)


ZERO_IDENTITY = (0, 0)
"""Identity of a page whose content is all zeros, whatever the key."""


class PageTable:
    """What a holder (a replica, as its primary knows) has of every space: page numbers and identities.

    Shares with the epoch that it came from, and with those around it, all that did not change between them.
    """

    def __init__(self, spaces: Sequence[SpacePages]) -> None:
        self.spaces = {space.key: space for space in spaces}

    @property
    def pages(self) -> int:
        """How many there are."""
        return sum(len(space.pages) for space in self.spaces.values())

    def changed(self, space: SpacePages) -> PageSet:
        """Return the pages of `space` that this holder lacks or has with another content.

        A space or page that the holder does not have is changed, whatever its content: a page that
        vanished and came back is new.
        """
        held = self.spaces.get(space.key)
        return space.pages if held is None else space.identities.differing(held.identities)


@dataclass(frozen=True, slots=True)
class FreezeTimes:
    """How long the workload stood still for one epoch, as CRIU's own statistics and our clock say."""

    freezing_ms: float
    """From the first task seized to the last."""
    frozen_ms: float
    """From then until all tasks run again, hooks included."""
    wall_ms: float
    """From the request to criu until its answer: what an epoch takes, not what it freezes."""
    hook_ms: float = 0.0
    """The part of `frozen_ms` that is ours: reading what is dirty, while criu waits."""
    ahead_ms: float = 0.0
    """All stops of their own before that, in which the soft-dirty tracker begins anew."""

    @property
    def total_ms(self) -> float:
        """All the time in which it stood still for this epoch: at once, unless there were stops ahead."""
        return self.ahead_ms + self.freezing_ms + self.frozen_ms


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """One of CRIU's images that is sent whole: everything but pagemaps and pages."""

    name: str
    path: Path
    size_bytes: int


@dataclass(slots=True)
class CapturedEpoch:
    """One consistent checkpoint, held by its backend until `release()`.

    Immutable but for `last` and the release. Reading pages after `release()` raises CaptureError.
    """

    workload: str
    id: EpochId
    incarnation: str
    stands_on: EpochId | None
    """Content can be read of the pages that changed since that epoch; None: of every page."""
    frozen_wall_s: float
    """Wall clock at the freeze: the instant that a restore goes back to."""
    freeze: FreezeTimes
    spaces: tuple[SpacePages, ...]
    metadata: tuple[MetadataFile, ...]
    pages: PageReader
    last: bool = False
    """It stands still since then, to be handed over: whoever had it captured says so before it is offered."""

    @property
    def memory_bytes(self) -> int:
        """Size of all present pages of memory."""
        return _bytes_of(space for space in self.spaces if space.key.kind != "file")

    @property
    def file_bytes(self) -> int:
        """Size of all present pages of files."""
        return _bytes_of(space for space in self.spaces if space.key.kind == "file")

    def release(self) -> None:
        """Give the images back. Harmless when repeated."""
        self.pages.release()


def _bytes_of(spaces: Iterable[SpacePages]) -> int:
    return sum(len(space.pages) for space in spaces) * PAGE_BYTES


class PageReader(Protocol):
    """Where an epoch's page contents come from."""

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """Copy the pages at `rows` (ascending) of a space into `into`, 4096 bytes each.

        Raises CaptureError when a page cannot be read or was not part of what this epoch holds.
        """
        ...

    def release(self) -> None:
        """Drop what is held for this epoch; harmless when repeated."""
        ...


class CaptureBackend(Protocol):
    """Takes epochs of one incarnation of one workload."""

    @property
    def name(self) -> str:
        """`stock` or `fast`, for status and benchmarks."""
        ...

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """Freeze, take the instant, thaw. The workload runs again when this returns or raises.

        All replicas that are there hold epoch `since` or a newer one; None: one of them holds nothing that
        is known, so the content of every page is wanted. That may take several epochs: `stands_on` of what
        is returned says from which epoch on content can be read.

        Raises CaptureError: it was abandoned, nothing of it remains, the workload runs on.
        """
        ...

    async def close(self) -> None:
        """Let go of the workload without touching it. Idempotent."""
        ...
