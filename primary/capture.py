"""The one interface of capture: what an epoch is before it is sent, and who can take one.

Two memory backends stand behind it. *Stock* lets CRIU write all pages and finds out by content what
changed. *Fast* tracks writes and reads only what is dirty. Both yield the same value, `CapturedEpoch`:

- incarnation, and the epoch that it `stands_on` (None: the content of every page can be read from it);
- the present set of every address space, with a keyed identity of each page's content;
- the zero set: pages whose identity is `PageIdentity` zero; what maps the kernel's zero page is absent;
- the content of what changed, read on demand and only until `release()`;
- CRIU's metadata images as files, and the manifest of the workload's own files.

A page whose state is in doubt is in the changed set: it is sent again, never skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.model import EpochId


@dataclass(frozen=True, slots=True)
class SpacePages:
    """The present pages of one address space or shared segment, at the instant of an epoch."""

    key: SpaceKey
    numbers: NDArray[np.uint64]
    """Page numbers (address / 4096), ascending, unique; shape (n,)."""
    flags: NDArray[np.uint8]
    """CRIU's own flags but PE_PARENT: PE_PRESENT, and PE_LAZY where eligible; shape (n,)."""
    identity: NDArray[np.uint64]
    """Keyed 128-bit content identity; shape (n, 2). `ZERO_IDENTITY` for pages of zeros.

    One that no page has (`common.identity.fresh_identity`) for pages that must be sent with every epoch.
    """


ZERO_IDENTITY = (0, 0)
"""Identity of a page whose content is all zeros, whatever the key."""


class PageTable:
    """What a holder (a replica, as its primary knows) has of every space: page numbers and identities.

    24 bytes a page; arrays are shared with the epoch that they came from and never written to.
    """

    def __init__(self, spaces: Sequence[SpacePages]) -> None:
        self.spaces = {space.key: space for space in spaces}

    @property
    def pages(self) -> int:
        """How many there are."""
        return sum(len(space.numbers) for space in self.spaces.values())

    def changed_rows(self, space: SpacePages) -> NDArray[np.bool_]:
        """Mark the rows of `space` that this holder lacks or has with another content; shape (n,).

        A space or page that the holder does not have is changed, whatever its content: a page that
        vanished and came back is new.
        """
        held = self.spaces.get(space.key)
        if held is None:
            return np.ones(space.numbers.shape, dtype=np.bool_)
        if held.numbers.shape == space.numbers.shape and np.array_equal(held.numbers, space.numbers):
            rows = np.arange(len(space.numbers))
            known = np.ones(space.numbers.shape, dtype=np.bool_)
        else:
            rows = np.searchsorted(held.numbers, space.numbers)
            rows = np.minimum(rows, max(len(held.numbers) - 1, 0))
            known = (
                held.numbers[rows] == space.numbers
                if len(held.numbers)
                else np.zeros(space.numbers.shape, dtype=np.bool_)
            )
        if not len(held.numbers):
            return ~known
        same = (held.identity[rows] == space.identity).all(axis=1)
        changed: NDArray[np.bool_] = ~(known & same)
        return changed


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


@dataclass(frozen=True, slots=True)
class FileManifest:
    """The changed files of the same instant. Empty until files are replicated."""

    entries: tuple[str, ...] = ()


@dataclass(slots=True)
class CapturedEpoch:
    """One consistent checkpoint, held by its backend until `release()`.

    Immutable but for the release. Reading pages after `release()` raises CaptureError.
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
    files: FileManifest = field(default_factory=FileManifest)

    @property
    def memory_bytes(self) -> int:
        """Size of all present pages."""
        return sum(len(space.numbers) for space in self.spaces) * 4096

    def table(self) -> PageTable:
        """Return what a holder of this epoch has."""
        return PageTable(self.spaces)

    def release(self) -> None:
        """Give the images back. Harmless when repeated."""
        self.pages.release()


class PageReader(Protocol):
    """Where an epoch's page contents come from."""

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """Copy the pages at `rows` (ascending) of a space's `numbers` into `into`, 4096 bytes each.

        Raises CaptureError when a page cannot be read or was not part of what this epoch holds.
        """
        ...

    def release(self) -> None:
        """Drop what is held for this epoch; harmless when repeated."""
        ...


class CaptureBackend(Protocol):
    """Takes epochs of one incarnation of one workload."""

    name: str
    """`stock` or `fast`, for status and benchmarks."""

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
