"""The stock memory backend: CRIU dumps everything, content tells what changed.

Works on every kernel that CRIU works on. The workload is frozen for as long as CRIU needs to write all
of its memory to tmpfs; hashing happens after the thaw. Per epoch:

    announce to the keeper ─▶ criu dump, leave running (tmpfs) ─▶ end of freeze ─▶ hash ─▶ CapturedEpoch

The next criu is spawned ahead, so its start-up is never on an epoch's path.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from common.bundle import WorkloadPaths, bind_mounts
from common.config import NodeConfig
from common.container import standard_streams
from common.criu.images import PE_PRESENT, SpaceKey, expand, page_images, read_memory_map, read_pagemap
from common.criu.rpc import DumpOptions, DumpResult, Swrk, spawn
from common.errors import CaptureError, NoSpaceError, OutliveError
from common.identity import PageHasher, fresh_identity
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.threads import in_thread
from primary.capture import CapturedEpoch, FreezeTimes, MetadataFile, SpacePages

log = structlog.get_logger(__name__)

_REMOVER = ThreadPoolExecutor(1, "images")
_ROOM_FACTOR = 1.1
"""Room for the images' pages, and a tenth for everything else."""


class FreezeGuard(Protocol):
    """Who watches that a freeze ends: the keeper, reached by the agent."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """Return once the keeper watches. Raises CaptureError if it does not: then nothing is frozen."""
        ...

    async def end(self, criu_pid: int) -> None:
        """Tell the keeper that the workload runs. Never raises: its deadline ends the watch as well."""
        ...


class StockBackend:
    """Takes epochs of one incarnation by full CRIU dumps."""

    name = "stock"

    def __init__(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        *,
        incarnation: str,
        init_pid: int,
        criu: Path,
        hasher: PageHasher,
        guard: FreezeGuard,
        attachments: Mapping[str, bytes] | None = None,
    ) -> None:
        """Say what to capture. `attachments` are files that go with every epoch's metadata."""
        self._config = config
        self._spec = spec
        self._incarnation = incarnation
        self._init_pid = init_pid
        self._criu = criu
        self._hasher = hasher
        self._guard = guard
        self._attachments = dict(attachments or {})
        self._paths = WorkloadPaths(config, spec.name)
        self._images = Path(config.node.image_dir) / spec.name
        self._ahead: Swrk | None = None
        self._last_bytes = 0

    async def capture(self, epoch: EpochId) -> CapturedEpoch:
        """Freeze, dump, thaw, hash. See `CaptureBackend.capture`."""
        directory = self._images / str(epoch)
        pages = ImagePages(directory)
        try:
            await in_thread(self._make_room, directory)
            result, frozen_wall_s, wall_ms = await self._dump(directory)
            spaces = await in_thread(self._identify, directory, pages)
            metadata = _metadata(directory)
        except BaseException as error:
            pages.release()
            if isinstance(error, OSError):
                raise CaptureError(f"epoch {epoch} of {self._spec.name}: {error}") from error
            raise
        self._last_bytes = sum(len(space.numbers) for space in spaces) * PAGE_BYTES
        return CapturedEpoch(
            workload=self._spec.name,
            id=epoch,
            incarnation=self._incarnation,
            stands_on=None,
            frozen_wall_s=frozen_wall_s,
            freeze=FreezeTimes(
                freezing_ms=result.stats.freezing_us / 1000,
                frozen_ms=result.stats.frozen_us / 1000,
                wall_ms=wall_ms,
            ),
            spaces=spaces,
            metadata=metadata,
            pages=pages,
        )

    async def close(self) -> None:
        """End the criu that waits for the next epoch and remove the images. Idempotent."""
        if self._ahead is not None:
            await self._ahead.abandon()
            self._ahead = None

    def _make_room(self, directory: Path) -> None:
        """Make an empty directory on the tmpfs; refuse if the images would not fit."""
        directory.mkdir(mode=0o700, parents=True)
        usage = os.statvfs(directory)
        free_bytes = usage.f_bavail * usage.f_frsize
        wanted_bytes = int(max(self._last_bytes, PAGE_BYTES) * _ROOM_FACTOR)
        if free_bytes < wanted_bytes:
            raise NoSpaceError(
                f"{directory.parent} has {free_bytes >> 20} MiB free, an epoch of {self._spec.name} "
                f"needs {wanted_bytes >> 20} MiB",
                hint="enlarge the tmpfs, or point node.image_dir at a larger one",
            )
        streams = json.dumps(standard_streams(self._init_pid))
        (directory / "descriptors.json").write_text(streams)
        for name, content in self._attachments.items():
            (directory / name).write_bytes(content)

    async def _dump(self, directory: Path) -> tuple[DumpResult, float, float]:
        """Run criu; return its result, the wall clock at the freeze, and how long it took in ms."""
        criu = self._ahead if self._ahead is not None else await spawn(self._criu)
        self._ahead = None
        frozen_wall_s = time.time()

        async def on_notify(script: str, pid: int | None) -> bool:
            nonlocal frozen_wall_s
            if script == "pre-dump":
                frozen_wall_s = time.time()
            return True

        options = DumpOptions(
            pid=self._init_pid,
            images_dir=directory,
            work_dir=self._paths.bundle,  # its log stays there after a failure, until the next dump
            root=self._paths.rootfs,
            external=tuple(mount.external for mount in bind_mounts(self._spec, self._paths)),
            log_level=1,
            deadline_s=self._spec.freeze_deadline_ms / 1000,
        )
        try:
            await self._guard.announce(criu.pid, self._spec.thaw_deadline_ms)
        except BaseException:
            await criu.abandon()
            raise
        started_s = time.monotonic()
        try:
            result = await criu.dump(options, on_notify)
        finally:
            wall_ms = (time.monotonic() - started_s) * 1000
            await self._guard.end(criu.pid)
        with contextlib.suppress(OutliveError):  # the next capture tries again, and says so
            self._ahead = await spawn(self._criu)
        return result, frozen_wall_s, wall_ms

    def _identify(self, directory: Path, pages: ImagePages) -> tuple[SpacePages, ...]:
        """Read the pagemaps, hash the pages."""
        spaces: list[SpacePages] = []
        for image in page_images(directory):
            numbers, flags = expand(read_pagemap(directory / image.key.pagemap_name).entries)
            if not np.all(flags & PE_PRESENT):
                raise CaptureError(f"{image.key.pagemap_name} names pages that the dump does not hold")
            if len(numbers):
                descriptor = pages.open(image.key, image.pages_name)
                identity = self._hasher.identify_image(descriptor, len(numbers))
                if name := image.key.memory_map_name:
                    # Pages that no base can lend, zeros included, are sent with every epoch.
                    identity[read_memory_map(directory / name).without_parent(numbers)] = fresh_identity()
            else:
                identity = np.zeros((0, 2), dtype=np.uint64)
            spaces.append(SpacePages(image.key, numbers, flags, identity))
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


def _metadata(directory: Path) -> tuple[MetadataFile, ...]:
    """List what is sent whole: everything but pagemaps and pages."""
    return tuple(
        MetadataFile(path.name, path, path.stat().st_size)
        for path in sorted(directory.iterdir())
        if not path.name.startswith(("pagemap-", "pages-"))
    )
