"""What a workload's store holds, for whoever looks: lists, details, and a check of every byte.

In: the store's directory. Out: records and problems, as values. Nothing is changed and nothing locked, so
that the command line can look while an agent writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.criu.images import PE_PARENT
from common.durable import Disk, RealDisk
from common.errors import StoreError
from common.model import NAME_PATTERN, PAGE_BYTES, EpochId
from replica.folding import file_hash
from replica.levels import (
    RESTORE_NAME,
    FileEntry,
    Layout,
    Level,
    Manifest,
    SpaceEntry,
    chain_of,
    present_rows,
    read_level,
    rows_in,
    tells_damage,
)
from replica.recovery import check_format


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One committed epoch that can be restored."""

    id: EpochId
    base: EpochId | None
    """The epoch that its images stand on now; folding changes that."""
    incarnation: str
    frozen_wall_s: float
    committed_wall_s: float
    bytes_on_disk: int
    """Sum of its own files' lengths; holes count."""
    pages: int
    """All pages of all its address spaces."""
    pages_present: int
    """Those of which its own files have the bytes."""
    levels: int
    """How many directories a restore reads, its own included."""
    folded: bool
    path: Path
    """The directory to restore from; stays valid when the epoch is folded."""
    last: bool | None = None
    """It was handed over with this epoch; None: that is not known."""
    file_pages: int = 0
    """All pages of the workload's files, which are none of `pages`."""


@dataclass(frozen=True, slots=True)
class EpochDetails:
    """An epoch with what it consists of."""

    record: EpochRecord
    chain: tuple[EpochRecord, ...]
    """The epochs that a restore reads, itself first, the full base last."""
    spaces: tuple[SpaceEntry, ...]
    files: tuple[FileEntry, ...]
    command: str
    """The command that restores it with stock CRIU."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a committed epoch."""

    epoch: EpochId
    """The level in which it was found; every epoch that stands on it is affected."""
    path: Path
    what: str


class ReplacedError(StoreError):
    """A level went while it was read, because a newer one took its place: nothing is wrong with the store."""


class StoreReader:
    """The epochs of one workload as they were when the store was opened."""

    def __init__(self, layout: Layout, levels: Mapping[EpochId, Level], disk: Disk) -> None:
        self._layout = layout
        self._levels = dict(levels)
        self._disk = disk

    @classmethod
    def inspect(cls, directory: Path, workload: str) -> StoreReader:
        """Look at a store without writing, whoever else has it open. Raises StoreError if there is none."""
        layout = Layout(directory / workload)
        disk = RealDisk()
        check_format(layout, disk)
        levels: dict[EpochId, Level] = {}
        # The directory may just be being made.
        for view in sorted(layout.views.iterdir()) if layout.views.is_dir() else ():
            try:
                level = read_level(view.resolve(strict=True), disk)
            except (OSError, StoreError):
                continue  # being removed, or damaged: recovery at the agent's next start says which
            levels[level.id] = level
        whole = {epoch: level for epoch, level in levels.items() if chain_of(levels, epoch)}
        return StoreReader(layout, whole, disk)

    @cached_property
    def volatile(self) -> bool:
        """Whether the store lies in memory, and survives crashes of processes only. Looked up once."""
        return self._disk.is_volatile(self._layout.root)

    @property
    def newest(self) -> EpochRecord | None:
        """The newest committed epoch; None if there is none."""
        levels = dict(self._levels)
        return self._record(levels, max(levels)) if levels else None

    def records(self) -> list[EpochRecord]:
        """List all epochs that can be restored, oldest first."""
        levels = dict(self._levels)
        return [self._record(levels, epoch) for epoch in sorted(levels)]

    def show(self, epoch: EpochId) -> EpochDetails:
        """Return all about one epoch. Raises StoreError if it is not held."""
        chain = self._chain(epoch)
        levels = {level.id: level for level in chain}
        try:
            text = (chain[0].path / RESTORE_NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{chain[0].path / RESTORE_NAME}: {error}") from error
        records = tuple(self._record(levels, level.id) for level in chain)
        manifest = chain[0].manifest
        return EpochDetails(
            records[0], records, manifest.spaces, manifest.files, text.strip().splitlines()[-1]
        )

    def verify(self, epoch: EpochId | None = None) -> list[Problem]:
        """Read every byte that a restore of `epoch` (default: the newest) would read, and check it.

        Returns what is wrong, nothing if all is well. Raises StoreError if the epoch is not held, was
        replaced by a newer one meanwhile, or cannot be read just now (no descriptor left): no damage, that.
        """
        if epoch is None:
            if not self._levels:
                return []
            epoch = max(self._levels)
        return verify_chain(self._chain(epoch), self._disk)

    def _chain(self, epoch: EpochId) -> tuple[Level, ...]:
        chain = chain_of(self._levels, epoch)
        if chain is None:
            raise StoreError(
                f"{self._layout.root.name} has no epoch {epoch}", hint="`outlive store list` shows them"
            )
        return chain

    def _record(self, levels: Mapping[EpochId, Level], epoch: EpochId) -> EpochRecord:
        chain = chain_of(levels, epoch)
        level = levels[epoch]
        header = level.manifest.header
        return EpochRecord(
            id=epoch,
            base=header.base,
            incarnation=header.incarnation,
            frozen_wall_s=header.frozen_wall_s,
            committed_wall_s=level.manifest.committed_wall_s,
            bytes_on_disk=sum(file.size_bytes for file in level.manifest.files),
            pages=sum(space.pages for space in level.manifest.spaces if space.key.kind != "file"),
            file_pages=sum(space.pages for space in level.manifest.spaces if space.key.kind == "file"),
            pages_present=sum(space.present for space in level.manifest.spaces),
            levels=len(chain or ()),
            folded=level.path.parent == self._layout.folds,
            path=self._layout.view(epoch),
            last=header.last,
        )


def check_stores(directory: Path) -> None:
    """Raise StoreError if a store below `directory` is of another version; none is touched."""
    disk = RealDisk()
    for name in stored_workloads(directory):
        check_format(Layout(directory / name), disk)


def aside_level(root: Path, epoch: EpochId) -> tuple[Manifest | None, EpochId | None]:
    """Return what a directory laid out as a store has of an epoch, and which one it lacks to restore that.

    None: nothing that can be read; and nothing that it lacks.
    """
    layout, disk = Layout(root), RealDisk()
    try:
        newest = level = read_level(layout.view(epoch).resolve(strict=True), disk)
    except (OSError, StoreError):
        return None, epoch
    while level.base is not None:
        try:
            level = read_level(layout.view(level.base).resolve(strict=True), disk)
        except (OSError, StoreError):
            return newest.manifest, level.base
    return newest.manifest, None


def stored_workloads(directory: Path) -> list[str]:
    """Name the workloads that have a store below `directory`, sorted."""
    if not directory.is_dir():
        return []
    return sorted(
        path.name
        for path in directory.iterdir()
        if NAME_PATTERN.match(path.name) and Layout(path).format.is_file()
    )


def verify_chain(chain: Sequence[Level], disk: Disk) -> list[Problem]:
    """Check the content of every level's files, and that no page is missing in the level below."""
    buffer = bytearray(1 << 20)
    problems: list[Problem] = []
    for level, below in zip(chain, [*chain[1:], None], strict=True):
        for entry in level.manifest.files:
            path = level.path / entry.name
            try:
                if file_hash(level, entry.name, buffer, disk) != entry.blake3:
                    problems.append(Problem(level.id, path, "its content is not what was committed"))
            except StoreError as error:
                if not tells_damage(error):
                    raise
                problems.append(Problem(level.id, path, error.message))
        for space in level.manifest.spaces:
            path = level.path / space.key.pagemap_name
            try:
                what = _wrong_with(level, below, space, disk)
            except StoreError as error:
                if not tells_damage(error):
                    raise
                what = error.message
            if what:
                problems.append(Problem(level.id, path, what))
        if problems and not level.path.exists():
            raise ReplacedError(f"{level.path} was replaced while it was read", hint="run the command again")
    return problems


def _wrong_with(level: Level, below: Level | None, space: SpaceEntry, disk: Disk) -> str:
    numbers, flags = level.pages_of(space.key, disk)
    present = int(np.count_nonzero(present_rows(flags)))
    if (len(numbers), present) != (space.pages, space.present):
        return f"it has {present} of {len(numbers)} pages, not {space.present} of {space.pages}"
    sizes = {entry.name: entry.size_bytes for entry in level.manifest.files}
    if sizes.get(space.pages_name, 0) != present * PAGE_BYTES:
        return f"{space.pages_name} has not the size of {present} pages"
    inherited = numbers[(flags & PE_PARENT) != 0]
    if inherited.size:
        if below is None or below.space(space.key) is None:
            return "it needs a parent that does not have this address space"
        missing = np.count_nonzero(rows_in(below.pages_of(space.key, disk)[0], inherited) < 0)
        if missing:
            return f"{missing} of its pages are not in the epoch that it stands on"
    return ""
