"""The stock memory backend: CRIU dumps everything, content tells what changed.

Works on every kernel that CRIU works on. The workload is frozen for as long as CRIU needs to write all
of its memory to tmpfs; hashing happens after the thaw. Per epoch:

    announce to the keeper ─▶ criu dump, leave running (tmpfs) ─▶ end of freeze ─▶ hash ─▶ CapturedEpoch
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey, page_images, read_memory_map
from common.errors import CaptureError
from common.identity import BLOCK_PAGES, PageHasher, fresh_identity
from common.model import PAGE_BYTES, EpochId
from common.threads import in_thread
from primary.book import PageBook
from primary.capture import CapturedEpoch, SpacePages
from primary.criu_pages import dumped_pages
from primary.dumping import Dumper, metadata_in

_REMOVER = ThreadPoolExecutor(1, "images")


class StockBackend:
    """Takes epochs of one incarnation by full CRIU dumps."""

    name = "stock"

    def __init__(self, dumper: Dumper, *, workload: str, incarnation: str, hasher: PageHasher) -> None:
        """`dumper` says what to capture."""
        self._dumper = dumper
        self._workload = workload
        self._incarnation = incarnation
        self._hasher = hasher
        self._last_bytes = 0
        self._books: dict[SpaceKey, PageBook] = {}
        """What epochs have in common; each is identified as a whole all the same."""

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """Freeze, dump, thaw, hash. See `CaptureBackend.capture`."""
        pages = ImagePages(self._dumper.directory / str(epoch))
        try:
            directory = await in_thread(self._dumper.make_room, epoch, self._last_bytes)
            dumped = await self._dumper.dump(directory)
            spaces = await in_thread(self._identify, directory, pages)
            metadata = metadata_in(directory)
        except BaseException as error:
            pages.release()
            if isinstance(error, OSError):
                raise CaptureError(f"epoch {epoch} of {self._workload}: {error}") from error
            raise
        self._last_bytes = sum(len(space.pages) for space in spaces) * PAGE_BYTES
        return CapturedEpoch(
            workload=self._workload,
            id=epoch,
            incarnation=self._incarnation,
            stands_on=None,
            frozen_wall_s=dumped.frozen_wall_s,
            freeze=dumped.times,
            spaces=spaces,
            metadata=metadata,
            pages=pages,
        )

    async def close(self) -> None:
        """End the criu that waits for the next epoch and remove the images. Idempotent."""
        await self._dumper.close()

    def _identify(self, directory: Path, reader: ImagePages) -> tuple[SpacePages, ...]:
        """Read the pagemaps, hash the pages."""
        spaces: list[SpacePages] = []
        before, self._books = self._books, {}
        for image in page_images(directory):
            book = self._books[image.key] = before.get(image.key) or PageBook(image.key)
            pages, lazy = dumped_pages(directory, image)
            book.restrict(pages)
            if len(pages):
                name = image.key.memory_map_name
                always = read_memory_map(directory / name).without_parent if name else None
                descriptor = reader.open(image.key, image.pages_name)
                blocks = self._hasher.identify_blocks(descriptor, len(pages))
                for numbers, identity in zip(pages.pieces(BLOCK_PAGES), blocks, strict=True):
                    if always is not None:
                        # Pages that no base can lend, zeros included, are sent with every epoch.
                        identity[always(numbers)] = fresh_identity()
                    book.put(numbers, identity)
            spaces.append(book.table(lazy))
        return tuple(spaces)


class ImagePages:
    """Page contents out of CRIU's images: row n of a space is the n-th page of its file."""

    def __init__(self, directory: Path) -> None:
        """Own `directory`: it is removed with all that is in it at the release."""
        self._directory = directory
        self._files: dict[SpaceKey, int] = {}
        self._released = False

    def open(self, key: SpaceKey, name: str) -> int:
        """Open the file with a space's pages; return its descriptor, which stays this object's."""
        self._files[key] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[key]

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """Copy the pages at `rows` into `into`. See `PageReader.read`."""
        if self._released or key not in self._files:
            raise CaptureError(f"the images in {self._directory} no longer hold {key.pagemap_name}")
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        at = 0
        for run in np.split(rows, breaks):
            size = len(run) * PAGE_BYTES
            if not size:
                continue
            if os.preadv(self._files[key], [into[at : at + size]], int(run[0]) * PAGE_BYTES) != size:
                raise CaptureError(f"{key.pagemap_name}: the pages' file ends too early")
            at += size

    def release(self) -> None:
        """Close and delete the images. Harmless when repeated."""
        if self._released:
            return
        self._released = True
        for descriptor in self._files.values():
            os.close(descriptor)
        # Giving a GiB of tmpfs back takes ~0.1 s: not in the event loop.
        _REMOVER.submit(shutil.rmtree, self._directory, ignore_errors=True)
