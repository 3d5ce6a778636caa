"""What lies in the store of one workload, and how one level of it is read.

A *level* is a directory that CRIU can restore: its metadata images, a pagemap and a file of pages for each
address space, and `parent`, a link to the level that it stands on (none: a full base). Beside them stand
`manifest.json`, which says what belongs to the level and makes it one, and `RESTORE`, the command.

    STORE/WORKLOAD/
      format  lock  doubt
      epochs/t1-e7/       a level as it was committed
      folds/t1-e7/        a level that holds what several did, of the same instant as the newest of them
      views/t1-e7         a link to the one of the two that counts: all `parent` links go through here, so
                          that a fold takes a level's place in one rename, and no image is ever altered
      incoming/…          what is being made; means nothing until it is renamed
      seeds/4711/         what came of a full epoch that was interrupted: a level that nobody restores, of
                          which the next attempt takes the pages that are still the same
      trash/…             what is being removed
      damaged/…           what recovery or an operator set aside, each with a file REASON

In: directories, by way of a `Disk`. Out: `Level` values and pages' numbers. Nothing is written here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.criu.images import PE_PRESENT, SpaceKey
from common.criu.pagemap import parse_runs
from common.durable import Disk, cause_of
from common.errors import StoreError
from common.model import PAGE_BYTES, EpochId

FORMAT = b"outlive epoch store 1\n"
"""What the file `format` holds; another version of the store holds something else."""

MANIFEST_NAME = "manifest.json"
PARENT_NAME = "parent"
RESTORE_NAME = "RESTORE"
CRIU_RESTORE = ("criu", "restore")
"""How stock CRIU is run for a workload that needs nothing but its images."""

REASON_NAME = "REASON"

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)

Numbers = NDArray[np.uint64]
Flags = NDArray[np.uint8]


class DamagedLevelError(StoreError):
    """A directory is no whole level: what it lacks or what is wrong with it was seen, not just unreadable."""


class BaseError(StoreError):
    """What an epoch stands on, or takes pages of, is not as its sender believes: it has to be sent whole."""


class NotHeldError(StoreError):
    """An epoch is not held (any more): nothing is wrong with the store."""


class EpochHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Which epoch a level is, and what it stands on (None: a full base)."""

    workload: str
    id: EpochId
    base: EpochId | None
    incarnation: str
    frozen_wall_s: float
    last: bool | None = None
    """It was handed over with this epoch; None: its leader was of a version that does not say so."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a level; `blake3` in hexadecimal."""

    name: str
    size_bytes: int
    blake3: str


class SpaceEntry(msgspec.Struct, frozen=True):
    """One address space of a level: how many pages it has, and of how many the level itself has the bytes."""

    key: SpaceKey
    pages_id: int
    pages: int
    present: int

    @property
    def pages_name(self) -> str:
        """The file of the pages' bytes; not there if `present` is zero."""
        return f"pages-{self.pages_id}.img"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a level consists of. A directory without it, or with files of other sizes, is no level."""

    header: EpochHeader
    committed_wall_s: float
    spaces: tuple[SpaceEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def page_bytes(self) -> int:
        """Size of all pages whose bytes the level itself has."""
        return sum(space.present for space in self.spaces) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Level:
    """A directory of the store with the manifest that was read from it."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> EpochId:
        """The epoch whose instant it is."""
        return self.manifest.header.id

    @property
    def base(self) -> EpochId | None:
        """What it stands on."""
        return self.manifest.header.base

    def space(self, key: SpaceKey) -> SpaceEntry | None:
        """Return the entry of an address space; None if the epoch has no such."""
        return next((space for space in self.manifest.spaces if space.key == key), None)

    def pages_of(self, key: SpaceKey, disk: Disk) -> tuple[Numbers, Flags]:
        """Read which pages the level knows of a space, and their flags. Raises StoreError if damaged."""
        path = self.path / key.pagemap_name
        return parse_runs(disk.read_file(path, op="read.pagemap"), path.name).expand()


@dataclass(frozen=True, slots=True)
class Layout:
    """Names every path of one workload's store; the only place that does."""

    root: Path

    @property
    def format(self) -> Path:
        """The version of the store."""
        return self.root / "format"

    @property
    def lock(self) -> Path:
        """Locked by whoever may write."""
        return self.root / "lock"

    @property
    def doubt(self) -> Path:
        """That the primary found something to be stored otherwise than it was; usually not there."""
        return self.root / "doubt"

    @property
    def epochs(self) -> Path:
        """Levels as they were committed."""
        return self.root / "epochs"

    @property
    def folds(self) -> Path:
        """Levels that folding made."""
        return self.root / "folds"

    @property
    def views(self) -> Path:
        """Links to the levels that count."""
        return self.root / "views"

    @property
    def incoming(self) -> Path:
        """Levels in the making."""
        return self.root / "incoming"

    @property
    def seeds(self) -> Path:
        """What came of full epochs that were interrupted."""
        return self.root / "seeds"

    @property
    def trash(self) -> Path:
        """Levels being removed."""
        return self.root / "trash"

    @property
    def damaged(self) -> Path:
        """Levels set aside."""
        return self.root / "damaged"

    @property
    def rooms(self) -> tuple[Path, ...]:
        """All directories directly below the root."""
        return (
            self.epochs,
            self.folds,
            self.views,
            self.incoming,
            self.seeds,
            self.trash,
            self.damaged,
        )

    def view(self, epoch: EpochId) -> Path:
        """Where the level of an epoch is found, folded or not: the directory to restore from."""
        return self.views / str(epoch)

    def view_target(self, level: Path) -> str:
        """What a view must say to lead to a level."""
        return os.path.relpath(level, self.views)

    def parent_target(self, base: EpochId) -> str:
        """What the `parent` link of any level must say to lead to its base."""
        return f"../../{self.views.name}/{base}"


def tells_damage(error: StoreError) -> bool:
    """Whether a failure to read says that a file is damaged, and not that it cannot be read just now.

    What has no cause of the operating system's is content that makes no sense.
    """
    return cause_of(error) in (None, *_NOT_THERE, errno.EIO)


def encode_manifest(manifest: Manifest) -> bytes:
    """Write a manifest as JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_level(path: Path, disk: Disk, *, named: bool = True) -> Level:
    """Read a level's manifest and look at the size of each of its files, not at their content.

    `named`: it must have the name of its epoch. Raises DamagedLevelError that says why the directory is no
    whole level, and StoreError when that could not be found out (no descriptor left, no permission, a disk
    that does not answer): then nothing is known.
    """
    try:
        content = disk.read_file(path / MANIFEST_NAME, op="read.manifest")
        manifest = msgspec.json.decode(content, type=Manifest)
    except StoreError as error:
        if cause_of(error) in _NOT_THERE:
            raise DamagedLevelError(f"{path} has no manifest: it was never committed") from None
        raise
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedLevelError(f"the manifest in {path} makes no sense: {error}") from error
    for file in manifest.files:
        try:
            size_bytes = disk.size_bytes(path / file.name, op="read.size")
        except StoreError as error:
            if cause_of(error) in _NOT_THERE:
                raise DamagedLevelError(f"{path / file.name} is missing") from None
            raise
        if size_bytes != file.size_bytes:
            raise DamagedLevelError(f"{path / file.name} has {size_bytes} bytes, not {file.size_bytes}")
    if named and str(manifest.header.id) != path.name:
        raise DamagedLevelError(f"{path} says that it is epoch {manifest.header.id}")
    return Level(path, manifest)


def chain_of(levels: Mapping[EpochId, Level], epoch: EpochId) -> tuple[Level, ...] | None:
    """Follow an epoch down to its full base: newest level first. None if one of them is not there."""
    chain: list[Level] = []
    link: EpochId | None = epoch
    while link is not None:
        level = levels.get(link)
        # A base is older than what stands on it; anything else would be a circle.
        if level is None or (chain and not level.id < chain[-1].id):
            return None
        chain.append(level)
        link = level.base
    return tuple(chain)


def present_rows(flags: Flags) -> NDArray[np.bool_]:
    """Mark the pages whose bytes the level itself has."""
    rows: NDArray[np.bool_] = (flags & PE_PRESENT) != 0
    return rows


def rows_in(haystack: Numbers, needles: Numbers) -> NDArray[np.int64]:
    """Find where each of `needles` stands in the ascending `haystack`; -1 where it does not."""
    if not haystack.size:
        return np.full(needles.shape, -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(haystack, needles), haystack.size - 1).astype(np.int64)
    rows[haystack[rows] != needles] = -1
    return rows
