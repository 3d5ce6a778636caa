"""Epochs that a primary captured, nobody acknowledged, and another node's newer term has made worthless.

In: such an epoch, and what its replica is known to have. Out: a directory for a human, below the store:

    STORE/_aside/WORKLOAD-t1-e42-unacknowledged/    laid out as a workload's store, with this one level in it

Where all pages can be read it stands on nothing, and its file RESTORE restores it with stock CRIU. Else it
has the pages that the replica lacked, and stands on the epoch that the replica has: whole again as soon as
the directories of that replica's store are copied into it. Nothing here is ever restored by Outlive, and
nothing is removed or written over: that is for a human. It lies below the store's directory because that is
what an operator encrypts and bounds. Its name cannot be a workload's.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.bulk import BLOCK_PAGES
from common.config import NodeConfig
from common.criu.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from common.durable import TEMPORARY_PREFIX, Disk, RealDisk, temporary_name
from common.errors import CaptureError, NoSpaceError, StoreError
from common.messages import BULK_BYTES
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from primary.capture import CapturedEpoch, PageTable, SpacePages
from primary.outgoing import Held
from primary.page_set import PageSet
from replica.ceiling import used_bytes
from replica.level_writer import ZERO, LevelWriter, restore_text
from replica.levels import FORMAT, EpochHeader, Flags, Layout

DIRECTORY = "_aside"

MOST_KEPT = 4
"""Epochs of one workload that are kept; one more is not, until a human has removed one."""

_NAME = re.compile(r"(.+)-(t\d+-e\d+)-unacknowledged")
_DESCRIPTORS = "descriptors.json"


@dataclass(frozen=True, slots=True)
class AsideEpoch:
    """One that lies aside."""

    workload: str
    epoch: EpochId
    path: Path


def aside_directory(config: NodeConfig) -> Path:
    """Return where this node keeps such epochs."""
    return config.store_dir / DIRECTORY


def kept_aside(directory: Path) -> list[AsideEpoch]:
    """List what lies aside, by name; empty if nothing does. Raises StoreError if that cannot be told."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{directory} cannot be listed: {error.strerror}") from error
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return [AsideEpoch(match[1], EpochId.parse(match[2]), directory / match[0]) for match in matches]


class Aside:
    """The directory of one node, for its agent. Blocking: call it in a thread."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        restore_command: Callable[[WorkloadSpec], Sequence[str]],
        disk: Disk | None = None,
    ) -> None:
        """`restore_command` says how stock CRIU restores a workload; what the images need is added to it."""
        self.directory = aside_directory(config)
        self._store_dir = config.store_dir
        self._min_free_bytes = config.store.min_free_bytes
        self._max_bytes = config.store.max_bytes
        self._restore_command = restore_command
        self._disk = disk or RealDisk()

    def clear_up(self) -> None:
        """Remove what was being written when an agent ended, as far as that is possible."""
        for path in self.directory.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, epoch: CapturedEpoch, spec: WorkloadSpec, base: Held | None) -> AsideEpoch:
        """Write an epoch down, durably, with all that its `base` lacks; None: with everything.

        Raises CaptureError if its pages are not here, NoSpaceError if the resync that follows could lack the
        room, or if enough lies aside already, StoreError. Nothing is left then.
        """
        if epoch.stands_on is None:
            base = None
        elif base is None or base.id < epoch.stands_on:
            raise CaptureError(
                f"only what changed since {epoch.stands_on} is here, and nothing that has that"
            )
        name = f"{epoch.workload}-{epoch.id}-unacknowledged"
        kept = AsideEpoch(epoch.workload, epoch.id, self.directory / name)
        if kept.path.exists():
            return kept
        self._check_room(epoch, base)
        made = temporary_name(kept.path)
        try:
            self._write(epoch, spec, base, Layout(made), Layout(kept.path))
            self._disk.rename(made, kept.path, op="aside.rename")
            self._disk.sync_dir(self.directory, op="aside.sync")
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return kept

    def _check_room(self, epoch: CapturedEpoch, base: Held | None) -> None:
        """Leave room for a whole epoch of it, and for as much as the store warns of."""
        others = [each for each in kept_aside(self.directory) if each.workload == epoch.workload]
        if len(others) >= MOST_KEPT:
            raise NoSpaceError(
                f"{len(others)} epochs of {epoch.workload} lie aside already",
                hint=f"look at them, then remove what is not needed from {self.directory}",
            )
        size_bytes = sum(file.size_bytes for file in epoch.metadata) + PAGE_BYTES * sum(
            len(_content(space, base.table if base else None)) for space in epoch.spaces
        )
        wanted_bytes = size_bytes + epoch.memory_bytes + epoch.file_bytes
        free_bytes = self._disk.free_bytes(self._store_dir) - 2 * self._min_free_bytes
        if self._max_bytes:
            free_bytes = min(free_bytes, self._max_bytes - used_bytes(self._store_dir))
        if wanted_bytes > free_bytes:
            raise NoSpaceError(
                f"it takes {size_bytes >> 20} MiB, and the epochs that follow must find room: "
                f"{max(0, free_bytes) >> 20} MiB are left",
                hint="free some space, or raise store.max_bytes",
            )

    def _write(
        self, epoch: CapturedEpoch, spec: WorkloadSpec, base: Held | None, made: Layout, final: Layout
    ) -> None:
        disk = self._disk
        if not self.directory.exists():
            disk.make_dir(self.directory, op="aside.make")
            disk.sync_dir(self._store_dir, op="aside.sync")
        for directory in (made.root, made.epochs, made.views):
            disk.make_dir(directory, op="aside.make")
        level = made.epochs / str(epoch.id)
        writer = LevelWriter(disk, level, op="aside")
        try:
            descriptors = b""
            for file in epoch.metadata:
                content = file.path.read_bytes()
                writer.metadata(file.name, content)
                if file.name == _DESCRIPTORS:
                    descriptors = content
            for space in epoch.spaces:
                _write_space(writer, epoch, space, base.table if base else None)
            header = EpochHeader(
                workload=epoch.workload,
                id=epoch.id,
                base=base.id if base else None,
                incarnation=epoch.incarnation,
                frozen_wall_s=epoch.frozen_wall_s,
            )
            text = restore_text(final.view(epoch.id), self._restore_command(spec), descriptors)
            writer.finish(made, header, time.time(), text)
        except OSError as error:
            raise StoreError(f"{epoch.id} cannot be set aside: {error}") from error
        finally:
            writer.close()
        disk.point(made.view(epoch.id), made.view_target(level), op="aside.view")
        disk.write_file(made.format, FORMAT, op="aside.format")
        disk.sync_files([made.format], op="aside.sync")
        for directory in (made.epochs, made.views, made.root):
            disk.sync_dir(directory, op="aside.sync")


def _content(space: SpacePages, base: PageTable | None) -> PageSet:
    """Return the pages whose bytes have to be kept."""
    changed = space.pages if base is None else base.changed(space)
    return changed - space.identities.zeros(changed)


def _write_space(
    writer: LevelWriter, epoch: CapturedEpoch, space: SpacePages, base: PageTable | None
) -> None:
    changed = space.pages if base is None else base.changed(space)
    content = _content(space, base)
    numbers = space.numbers
    flags: Flags = np.full(len(numbers), PE_PARENT, dtype=np.uint8)
    flags[changed.has(numbers)] = ZERO
    flags[content.has(numbers)] = PE_PRESENT
    flags[space.lazy.has(numbers)] |= PE_LAZY
    writer.space(space.key, numbers, flags)
    buffer = memoryview(bytearray(BULK_BYTES))
    for block in content.pieces(BLOCK_PAGES):
        raw = buffer[: len(block) * PAGE_BYTES]
        epoch.pages.read(space.key, space.pages.rank(block), raw)
        writer.pages(space.key, raw)
