"""Brings a store that was left in any state back to one that is known: run at every open.

In: a store's directory. Out: the levels that count, each view pointing to one of them. What was in the making
or being removed is gone; what claims to be a level and is none is set aside under `damaged/`, with a reason,
never deleted. What merely cannot be read now (no descriptor left, no permission) is not damaged: the store
does not open then. Each step may be interrupted and is simply repeated at the next open.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from common.durable import TEMPORARY_PREFIX, Disk, atomic_write, cause_of
from common.errors import StoreError
from common.model import EpochId
from common.state_format import shown
from replica.levels import FORMAT, REASON_NAME, DamagedLevelError, Layout, Level, chain_of, read_level

READ_ATTEMPTS = 3
"""How often a level is read that the disk fails to read (EIO) before it counts as damaged."""

_NEVER = EpochId(0, 0)

log = structlog.get_logger(__name__)


def make_root(layout: Layout, disk: Disk) -> None:
    """Make the directory that the lock lies in, and those above it."""
    for directory in (*reversed(layout.root.parents), layout.root):
        there = directory.exists()
        if not there:
            disk.make_dir(directory, op="open.make")
        # The store's own name each time: an earlier attempt may have ended before it was synced.
        if not there or directory == layout.root:
            disk.sync_dir(directory.parent, op="open.sync")


def prepare(layout: Layout, disk: Disk) -> None:
    """Make an empty store, or make sure that this one is of our version (else StoreError)."""
    there = disk.names(layout.root, op="open.list")
    check_format(layout, disk, new=layout.epochs.name not in there)
    if layout.format.name not in there:
        atomic_write(layout.format, FORMAT, op="open.format", disk=disk)
    elif layout.epochs.name not in there:
        disk.sync_dir(layout.root, op="open.format")  # rooms without a format are no store
    for room in layout.rooms:
        if room.name not in there:
            disk.make_dir(room, op="open.make")
    disk.sync_dir(layout.root, op="open.sync")


def check_format(layout: Layout, disk: Disk, *, new: bool = False) -> None:
    """Raise StoreError unless the store is of our version; a `new` one may have none yet."""
    try:
        found = disk.read_file(layout.format, op="open.read-format")
    except StoreError as error:
        if cause_of(error) != errno.ENOENT:
            raise
        if new:
            return
        raise StoreError(f"{layout.root} is no epoch store") from None
    if found != FORMAT:
        raise StoreError(
            f"{layout.root} is of another version: `{shown(found)}`, and this one knows `{shown(FORMAT)}`",
            hint="use the version of Outlive that wrote it, or move it away: its primary sends all again",
        )


def recover(layout: Layout, disk: Disk) -> dict[EpochId, Level]:
    """Put the store in order and return its levels: all of them have whole chains.

    Raises StoreError when the store cannot be read now; nothing is set aside for that.
    """
    for room in (layout.incoming, layout.trash):
        sweep(room, disk)
    for path in (*_paths(layout.root, disk), *_paths(layout.views, disk)):
        if path.name.startswith(TEMPORARY_PREFIX):
            disk.unlink(path, op="recover.remove")

    committed = _whole_levels(layout, layout.epochs, disk)
    folded = _whole_levels(layout, layout.folds, disk)
    levels: dict[EpochId, Level] = {}
    for epoch in sorted(committed.keys() | folded.keys()):
        both = [level for level in (committed.get(epoch), folded.get(epoch)) if level]
        view = layout.view(epoch)
        # What the view says counts; where it leads nowhere, what is there: a fold that lacks its view was
        # not finished, so that the level as it was committed comes first.
        says = disk.read_link(view, op="recover.read-view")
        levels[epoch] = next((level for level in both if layout.view_target(level.path) == says), both[0])
        target = layout.view_target(levels[epoch].path)
        if says != target:
            disk.point(view, target, op="recover.view")
        for level in both:
            if level is not levels[epoch]:
                throw_away(layout, disk, level.path)
    led_to = {layout.view(epoch) for epoch in levels}
    for view in _paths(layout.views, disk):
        if view not in led_to:
            disk.unlink(view, op="recover.view")
    disk.sync_dir(layout.views, op="recover.sync")
    sweep(layout.trash, disk)

    whole = {epoch: level for epoch, level in levels.items() if chain_of(levels, epoch)}
    for epoch, level in levels.items():
        if epoch not in whole:
            set_aside(layout, disk, level, f"an epoch that {epoch} stands on is not there")
    return whole


def recover_seed(layout: Layout, disk: Disk, levels: Mapping[EpochId, Level]) -> Level | None:
    """Return what is kept of an interrupted epoch, if it can be used; all others are removed.

    It is the newest; one that is older than a committed epoch has no use any more.
    """
    seeds: list[Level] = []
    for path in _paths(layout.seeds, disk):
        with suppress(DamagedLevelError):
            seeds.append(_read_level(path, disk, named=False))
    useful = [seed for seed in seeds if seed.path.name.isdecimal() and seed.id > max(levels, default=_NEVER)]
    best = max(useful, key=lambda seed: (seed.id, seed.manifest.page_bytes), default=None)
    for path in _paths(layout.seeds, disk):
        if best is None or path != best.path:
            disk.remove_tree(path, op="recover.seed")
    return best


def set_aside(layout: Layout, disk: Disk, level: Level | Path, reason: str) -> None:
    """Move a level under `damaged/`, durably, with the reason beside it; its view goes first.

    One that an earlier attempt has moved already stays where it is.
    """
    path = level if isinstance(level, Path) else level.path
    log.warning("store.set_aside", level=str(path), reason=reason)
    if isinstance(level, Level):
        disk.unlink(layout.view(level.id), op="aside.view")
        disk.sync_dir(layout.views, op="aside.sync")
    target = layout.damaged / f"{path.name}-{secrets.token_hex(4)}"
    if path.exists():
        disk.rename(path, target, op="aside.rename")
    if target.is_dir():
        disk.write_file(target / REASON_NAME, f"{reason}\n".encode(), op="aside.reason")
    disk.sync_dir(layout.damaged, op="aside.sync")


def throw_away(layout: Layout, disk: Disk, path: Path) -> None:
    """Make a level that nothing needs one no more; `sweep` then removes it."""
    if path.exists():  # else an earlier attempt failed at the sync
        disk.rename(
            path, layout.trash / f"{path.parent.name}-{path.name}-{secrets.token_hex(4)}", op="collect.rename"
        )
    # Before anything below it goes: else a power loss could bring back half a level.
    disk.sync_dir(path.parent, op="collect.sync")


def sweep(room: Path, disk: Disk) -> None:
    """Remove all that lies in `incoming` or `trash`. Raises as `Disk` does; what is left goes next time."""
    for path in _paths(room, disk):
        disk.remove_tree(path, op="sweep.remove")


def _whole_levels(layout: Layout, room: Path, disk: Disk) -> dict[EpochId, Level]:
    levels: dict[EpochId, Level] = {}
    for path in _paths(room, disk):
        try:
            level = _read_level(path, disk)
        except DamagedLevelError as error:
            set_aside(layout, disk, path, error.message)
        else:
            levels[level.id] = level
    return levels


def _read_level(path: Path, disk: Disk, *, named: bool = True) -> Level:
    """Read a level, again if the disk fails; what it fails to read each time is damaged."""
    attempt = 1
    while True:
        try:
            return read_level(path, disk, named=named)
        except StoreError as error:
            if cause_of(error) != errno.EIO:
                raise
            if attempt == READ_ATTEMPTS:
                raise DamagedLevelError(f"{error.message}, {attempt} times") from error
            log.warning("store.read_failed", level=str(path), reason=error.message)
        attempt += 1


def _paths(directory: Path, disk: Disk) -> list[Path]:
    return [directory / name for name in disk.names(directory, op="recover.list")]
