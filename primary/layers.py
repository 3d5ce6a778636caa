"""Contents of captured pages, for as long as a replica may need them: one layer an epoch, in memory files.

In: pages as they are captured, in any order, the same page perhaps several times. Out: the content of a page
at an epoch: that of the newest layer that has it. An epoch holds its layers until it is released; the chain
holds them until every replica stands on something newer. A page of zeros has no content here: none is needed.

The files are on the tmpfs for images, and have no name: whatever ends the agent, they are gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.errors import CaptureError, NoSpaceError
from common.model import PAGE_BYTES, EpochId
from primary.page_set import NO_PAGES, PageSet, in_order


@dataclass(frozen=True, slots=True)
class _Runs:
    """Where pages stand in a file: runs of neighbours that are neighbours there too, 24 bytes each."""

    starts: NDArray[np.uint64]
    """First page of each, ascending."""
    counts: NDArray[np.uint64]
    at: NDArray[np.int64]
    """Where that first page stands, in pages."""

    @classmethod
    def of(cls, numbers: NDArray[np.uint64], first: int) -> _Runs:
        """Pages (ascending, at least one) that stand one after the other from `first` on."""
        rows = np.flatnonzero(np.append(True, np.diff(numbers) != 1))
        return cls(numbers[rows], np.diff(rows, append=len(numbers)).astype(np.uint64), rows + first)

    @classmethod
    def newest(cls, parts: list[_Runs]) -> _Runs:
        """Of pages that were added several times, keep the last place."""
        starts = np.concatenate([part.starts for part in parts])
        ends = starts + np.concatenate([part.counts for part in parts])
        at = np.concatenate([part.at for part in parts])
        # Between two of these, all pages were added together.
        points = in_order(np.concatenate((starts, ends)))
        first, end = np.searchsorted(points, starts), np.searchsorted(points, ends)
        covered = np.repeat(first - (np.cumsum(end - first) - (end - first)), end - first)
        covered += np.arange(len(covered))
        newest = np.full(len(points), -1, dtype=np.intp)
        np.maximum.at(newest, covered, np.repeat(np.arange(len(starts)), end - first))
        here = np.flatnonzero(newest >= 0)
        run, begin = newest[here], points[here]
        place = at[run] + (begin - starts[run]).astype(np.int64)
        counts = points[here + 1] - begin
        apart = np.append(
            True,
            (begin[1:] != begin[:-1] + counts[:-1])
            | (place[1:] != place[:-1] + counts[:-1].astype(np.int64)),
        )
        return cls(begin[apart], np.add.reduceat(counts, np.flatnonzero(apart)), place[apart])

    @property
    def pages(self) -> PageSet:
        """Which pages they are."""
        return PageSet.spanning(self.starts, self.starts + self.counts)

    def places(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return where pages stand; -1 for those that are not here; shape (n,)."""
        run = np.maximum(np.searchsorted(self.starts, numbers, side="right") - 1, 0)
        distance = numbers - self.starts[run]  # beyond any count for what comes before the first
        return np.where(distance < self.counts[run], self.at[run] + distance.astype(np.int64), -1)


class LayerWriter:
    """A layer that is being written; `seal` makes it one that can be read."""

    def __init__(self, directory: Path) -> None:
        """Open a nameless file in `directory`. Raises CaptureError."""
        try:
            self._file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CaptureError(f"no file for pages can be made in {directory}: {error.strerror}") from error
        self._directory = directory
        self._pages = 0
        self._index: dict[SpaceKey, list[_Runs]] = {}

    @property
    def size_bytes(self) -> int:
        """How much was written."""
        return self._pages * PAGE_BYTES

    def add(
        self, key: SpaceKey, numbers: NDArray[np.uint64], content: memoryview, rows: NDArray[np.intp]
    ) -> None:
        """Write those pages of `content` that stand at `rows` (ascending): the content of `numbers`.

        Raises NoSpaceError.
        """
        if not len(rows):
            return
        at = self._pages
        try:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                piece = content[int(run[0]) * PAGE_BYTES : (int(run[-1]) + 1) * PAGE_BYTES]
                if os.pwrite(self._file, piece, at * PAGE_BYTES) != len(piece):
                    raise OSError(0, "no space left")
                at += len(run)
        except OSError as error:
            raise NoSpaceError(
                f"pages cannot be kept in {self._directory}: {error.strerror}",
                hint="enlarge the tmpfs, or point node.image_dir at a larger one",
            ) from error
        self._index.setdefault(key, []).append(_Runs.of(numbers, self._pages))
        self._pages = at

    def seal(self, epoch: EpochId) -> Layer:
        """Make it the layer of an epoch; nothing can be added any more. The caller holds it."""
        return Layer(epoch, self._file, {key: _Runs.newest(parts) for key, parts in self._index.items()})

    def drop(self) -> None:
        """Throw it away."""
        os.close(self._file)


class Layer:
    """Pages' contents of one epoch, or of several that were merged; gone with its last holder."""

    def __init__(self, epoch: EpochId, file: int, index: dict[SpaceKey, _Runs]) -> None:
        self.epoch = epoch
        """The newest epoch whose changes are here."""
        self._file = file
        self._index = index
        self._holders = 1

    @property
    def pages(self) -> int:
        """How many pages can be read of it."""
        return sum(len(self.of(key)) for key in self._index)

    @property
    def keys(self) -> tuple[SpaceKey, ...]:
        """Whose pages are here."""
        return tuple(self._index)

    def hold(self) -> Layer:
        """Become one more holder."""
        self._holders += 1
        return self

    def drop(self) -> None:
        """Hold it no longer."""
        self._holders -= 1
        if self._holders == 0:
            os.close(self._file)

    def of(self, key: SpaceKey) -> PageSet:
        """Return which pages of a space are here."""
        return self._index[key].pages if key in self._index else NO_PAGES

    def places(self, key: SpaceKey, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return where in the file pages stand; -1 for those that are not here; shape (n,)."""
        if key not in self._index:
            return np.full(len(numbers), -1, dtype=np.int64)
        return self._index[key].places(numbers)

    def read(self, places: NDArray[np.int64], slots: NDArray[np.int64], into: memoryview) -> None:
        """Copy the pages at `places` to the pages `slots` of `into`. Raises CaptureError."""
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(slots) != 1)) + 1
        for run in np.split(np.arange(len(places)), breaks):
            at, size = int(slots[run[0]]) * PAGE_BYTES, len(run) * PAGE_BYTES
            if os.preadv(self._file, [into[at : at + size]], int(places[run[0]]) * PAGE_BYTES) != size:
                raise CaptureError("captured pages are gone")


class LayeredPages:
    """Page contents of one epoch, out of its layers; a `PageReader`."""

    def __init__(self, layers: Sequence[Layer], pages: dict[SpaceKey, PageSet]) -> None:
        """`layers` from the oldest to the newest; `pages` are those of the epoch's spaces."""
        self._layers = tuple(layer.hold() for layer in layers)
        self._pages = pages
        self._released = False

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """Copy the pages at `rows` into `into`. See `PageReader.read`."""
        if self._released or key not in self._pages:
            raise CaptureError(f"the epoch was released, or never had {key.pagemap_name}")
        wanted = self._pages[key].at(rows)
        left = self.read_some(key, wanted, into)
        if len(left):
            raise CaptureError(
                f"{key.pagemap_name}: page {int(wanted[left[0]]):#x} is not among what changed lately"
            )

    def read_some(self, key: SpaceKey, wanted: NDArray[np.uint64], into: memoryview) -> NDArray[np.int64]:
        """Copy those of the pages that are here; return the places in `into` of those that are not."""
        if self._released:
            raise CaptureError(f"the epoch was released: {key.pagemap_name} cannot be read")
        slots = np.arange(len(wanted), dtype=np.int64)
        for layer in reversed(self._layers):
            places = layer.places(key, wanted[slots])
            here = places >= 0
            if here.any():
                layer.read(places[here], slots[here], into)
                slots = slots[~here]
            if not len(slots):
                break
        return slots

    def release(self) -> None:
        """Let go of the layers. Harmless when repeated."""
        if not self._released:
            self._released = True
            for layer in self._layers:
                layer.drop()


class LayerChain:
    """All that changed since `stands_on`, from the oldest layer to the newest."""

    def __init__(self, directory: Path, most_layers: int = 16) -> None:
        """Merge what are more than `most_layers`."""
        self._directory = directory
        self._most_layers = most_layers
        self._layers: list[Layer] = []
        self.stands_on: EpochId | None = None
        """The epoch whose holder lacks nothing else; None: there is none yet."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """From the oldest to the newest."""
        return tuple(self._layers)

    def append(self, layer: Layer) -> None:
        """Take the newest layer, and the hold on it."""
        self._layers.append(layer)

    def drop_through(self, epoch: EpochId) -> None:
        """Forget what every replica has that holds `epoch`; `stands_on` moves there."""
        if self.stands_on is not None and epoch <= self.stands_on:
            return
        while self._layers and self._layers[0].epoch <= epoch:
            self._layers.pop(0).drop()
            self.stands_on = epoch

    def covered(self, key: SpaceKey, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Mark the pages whose content is in the chain; shape (n,)."""
        marks = np.zeros(len(numbers), dtype=np.bool_)
        for layer in self._layers:
            marks |= layer.places(key, numbers) >= 0
        return marks

    def of(self, key: SpaceKey) -> PageSet:
        """Return the pages of a space whose content is in the chain."""
        return PageSet.union([layer.of(key) for layer in self._layers])

    def merge(self, present: dict[SpaceKey, PageSet]) -> None:
        """Make one layer of all, if they are too many: the newest content of each page that is present."""
        if len(self._layers) <= self._most_layers:
            return
        writer = LayerWriter(self._directory)
        try:
            buffer = memoryview(bytearray(256 * PAGE_BYTES))
            for key, pages in present.items():
                wanted = pages & self.of(key)
                source = LayeredPages(self._layers, {key: wanted})
                try:
                    for numbers in wanted.pieces(256):
                        source.read(key, wanted.rank(numbers), buffer[: len(numbers) * PAGE_BYTES])
                        writer.add(key, numbers, buffer, np.arange(len(numbers)))
                finally:
                    source.release()
        except BaseException:
            writer.drop()
            raise
        merged = writer.seal(self._layers[-1].epoch)
        for layer in self._layers:
            layer.drop()
        self._layers = [merged]

    def close(self) -> None:
        """Forget everything; epochs that hold layers keep them."""
        for layer in self._layers:
            layer.drop()
        self._layers = []
