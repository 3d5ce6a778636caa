"""The epochs that a replica holds of one workload: committed whole or not at all, always restorable.

In: an epoch's metadata, page numbers and pages, as they arrive. Out: directories that stock `criu restore`
takes, on disk before `commit` returns. `levels` says what lies where, `level_writer` writes a level,
`folding` shortens chains, `recovery` puts a store in order at open; this module decides when which of them
may, and keeps what the store promises:

- An epoch is visible when its directory has its name under `epochs/`; everything that it needs was synced
  before. There is no moment, power loss included, at which the newest committed epoch is not whole.
- What is named is never altered: folding moves a view from one whole level to another of the same instant.
- The two newest epochs, and what an arriving one stands on, are never removed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import msgspec
import structlog

from common.clock import Clock, SystemClock
from common.criu.images import PE_PARENT, SpaceKey
from common.durable import FILE_MODE, Disk, RealDisk, temporary_name
from common.errors import NoSpaceError, StoreError
from common.model import EpochId
from replica.folding import FoldAbandonedError, fold_due, fold_into, plan_fold
from replica.level_writer import ZERO, LevelWriter, restore_text
from replica.levels import (
    CRIU_RESTORE,
    RESTORE_NAME,
    EpochHeader,
    Flags,
    Layout,
    Level,
    Numbers,
    chain_of,
    rows_in,
)
from replica.recovery import make_root, prepare, recover, set_aside, sweep, throw_away
from replica.store_reader import (
    EpochDetails,
    EpochRecord,
    Problem,
    StoreReader,
    stored_workloads,
)

__all__ = [
    "ZERO",
    "EpochDetails",
    "EpochHeader",
    "EpochRecord",
    "EpochStore",
    "FoldReport",
    "IncomingEpoch",
    "Problem",
    "StoreReader",
    "stored_workloads",
]

KEPT_EPOCHS = 2
"""How many of the newest epochs stay restorable."""

_DESCRIPTORS = "descriptors.json"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold did."""

    epoch: EpochId
    base: EpochId | None
    levels_before: int
    levels_after: int
    page_bytes: int
    """Size of the pages that the new level holds itself."""


class EpochStore(StoreReader):
    """The one writer of a workload's store. Its methods may be called from several threads."""

    def __init__(
        self,
        layout: Layout,
        levels: Mapping[EpochId, Level],
        disk: Disk,
        *,
        min_free_bytes: int,
        max_levels: int,
        clock: Clock,
        lock_fd: int,
    ) -> None:
        super().__init__(layout, levels, disk)
        self._min_free_bytes = min_free_bytes
        self._max_levels = max_levels
        self._clock = clock
        self._lock_fd = lock_fd
        self._mutex = threading.RLock()  # guards what follows and every rename; never held over bulk work
        self._folding = threading.Lock()  # held by the one fold or collection at a time
        self._arriving: list[IncomingEpoch] = []
        self._stale: list[Path] = []  # levels that a fold replaced
        self._holds = 0
        self._known: tuple[EpochId, dict[SpaceKey, Numbers]] | None = None  # pages of the newest epoch

    @classmethod
    def open(
        cls,
        directory: Path,
        workload: str,
        *,
        min_free_bytes: int,
        max_levels: int,
        disk: Disk | None = None,
        clock: Clock | None = None,
    ) -> EpochStore:
        """Open (or make) the store of `workload` below `directory`, and recover it.

        Raises StoreError when somebody else has it open or it is of another version. `max_levels` (at least
        2) is the longest chain wanted; see `begin`.
        """
        if max_levels < 2:
            raise StoreError(f"a chain of at most {max_levels} levels cannot hold a delta; allow 2 or more")
        disk = disk or RealDisk()
        layout = Layout(directory.absolute() / workload)
        make_root(layout, disk)
        lock_fd = _lock(layout)
        try:
            prepare(layout, disk)
            levels = recover(layout, disk)
        except BaseException:
            os.close(lock_fd)
            raise
        return cls(
            layout,
            levels,
            disk,
            min_free_bytes=min_free_bytes,
            max_levels=max_levels,
            clock=clock or SystemClock(),
            lock_fd=lock_fd,
        )

    def close(self) -> None:
        """Let go of the store. A running fold is abandoned. Harmless when repeated."""
        # Arriving epochs are left to whoever writes them: they cannot commit any more.
        with self._mutex:
            fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            with self._folding:  # so that nobody writes any more when the next one may
                os.close(fd)

    def __enter__(self) -> EpochStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def space_warning(self) -> bool:
        """Whether less than twice the room is free below which epochs are refused."""
        return self._disk.free_bytes(self._layout.root) < 2 * self._min_free_bytes

    def begin(
        self, header: EpochHeader, *, expected_bytes: int = 0, restore_command: Sequence[str] = CRIU_RESTORE
    ) -> IncomingEpoch:
        """Start to receive an epoch. `restore_command` runs stock CRIU, but for what the images need.

        Raises StoreError when it is not newer than the newest, or its base is not held; NoSpaceError when
        less than `min_free_bytes` would be left after `expected_bytes`, or when folding is so far behind
        that the chain would exceed twice `max_levels`. Several may be under way; the first that commits
        makes older ones fail.
        """
        with self._mutex:
            self._check_next(header)
            if header.base is not None and len(self._chain(header.base)) >= 2 * self._max_levels:
                raise NoSpaceError(
                    f"{header.base} already stands on {2 * self._max_levels - 1} others: folding is behind",
                    hint="retry when the fold in progress is done, or send a full epoch",
                )
            if not self._has_room(expected_bytes):
                self._collect_if_idle()
                if not self._has_room(expected_bytes):
                    raise NoSpaceError(
                        f"epoch {header.id} would leave less than {self._min_free_bytes} bytes free"
                        f" in {self._layout.root}",
                        hint="free some space, or lower store.min_free_bytes",
                    )
            directory = self._layout.incoming / f"{header.id}-{secrets.token_hex(4)}"
            epoch = IncomingEpoch(
                self, header, tuple(restore_command), LevelWriter(self._disk, directory, op="commit")
            )
            self._arriving.append(epoch)
            return epoch

    def verify(self, epoch: EpochId | None = None) -> list[Problem]:
        """See `StoreReader.verify`; nothing is removed meanwhile."""
        with self.hold():
            return super().verify(epoch)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every level where it is: no fold ends and nothing is removed. For restoring and checking."""
        with self._mutex:
            self._holds += 1
        try:
            yield
        finally:
            with self._mutex:
                self._holds -= 1

    def discard(self, epoch: EpochId, reason: str) -> None:
        """Set an epoch aside under `damaged/`, with all that stand on it; for one that proved unusable.

        Raises StoreError if it is not held.
        """
        with self._mutex:
            self._chain(epoch)
            affected = [
                level
                for level in self._levels.values()
                if any(link.id == epoch for link in chain_of(self._levels, level.id) or ())
            ]
            for level in sorted(affected, key=lambda level: level.id, reverse=True):
                del self._levels[level.id]
                set_aside(self._layout, self._disk, level, reason)

    def destroy(self) -> None:
        """Remove the whole store and close it; for a workload that is protected no more."""
        self.close()
        # First another name: half a store must not be taken for one.
        doomed = temporary_name(self._layout.root)
        self._disk.rename(self._layout.root, doomed, op="destroy.rename")
        self._disk.remove_tree(doomed, op="destroy.remove")

    def fold_due(self) -> bool:
        """Tell whether `fold` has something to do: a long chain, or levels that nothing needs."""
        with self._mutex:
            newest = self.newest
            return bool(
                self._stale or self._garbage() or (newest and fold_due(newest.levels, self._max_levels))
            )

    def fold(self) -> FoldReport | None:
        """Remove what nothing needs, and shorten the newest epoch's chain if it is due (else None).

        Takes seconds for big epochs: call it in a thread of its own. Epochs go on committing meanwhile, on
        top of the one that is folded. Interrupted, by `hold`, `close` or a crash, it leaves the store as it
        was. Raises NoSpaceError if it can't keep `min_free_bytes` free, StoreError if a level is damaged.
        """
        with self._folding:
            self._collect()
            with self._mutex:
                self._check_open()
                newest = self.newest
                if not newest or self._holds or not fold_due(newest.levels, self._max_levels):
                    return None
                chain = self._chain(newest.id)
            kept = plan_fold([level.manifest.page_bytes for level in reversed(chain)], self._max_levels)
            folded = chain[: len(chain) - kept]
            base = chain[len(folded)].id if kept else None
            expected_bytes = sum(level.manifest.page_bytes for level in folded)
            if not self._has_room(expected_bytes):
                raise NoSpaceError(
                    f"folding {len(folded)} epochs up to {newest.id} needs {expected_bytes} bytes",
                    hint="free some space, or let the primary send a full epoch",
                )
            level = self._fold(folded, base)
            self._collect()
        if level is None:
            return None
        report = FoldReport(newest.id, base, len(chain), kept + 1, level.manifest.page_bytes)
        log.info("store.folded", epoch=str(report.epoch), levels=report.levels_after, bytes=report.page_bytes)
        return report

    def _fold(self, folded: Sequence[Level], base: EpochId | None) -> Level | None:
        """Make one level of `folded` and let its view lead there. None if it had to be abandoned."""
        newest = folded[0]
        header = msgspec.structs.replace(newest.manifest.header, base=base)
        directory = self._layout.incoming / f"fold-{newest.id}-{secrets.token_hex(4)}"
        try:
            writer = LevelWriter(self._disk, directory, op="fold")
            try:
                fold_into(writer, folded, self._disk, stop=lambda: self._holds > 0 or self._lock_fd < 0)
                command = self._disk.read_file(newest.path / RESTORE_NAME, op="fold.read-command")
                made = writer.finish(self._layout, header, newest.manifest.committed_wall_s, command)
            finally:
                writer.close()
            with self._mutex:
                if self._holds or self._lock_fd < 0 or self._levels.get(newest.id) is not newest:
                    raise FoldAbandonedError
                level = replace(made, path=self._layout.folds / str(newest.id))
                self._disk.rename(directory, level.path, op="fold.rename")
                self._disk.sync_dir(self._layout.folds, op="fold.sync-folds")
                self._disk.point(
                    self._layout.view(level.id), self._layout.view_target(level.path), op="fold.view"
                )
                self._levels[level.id] = level
                self._stale.append(newest.path)
                return level
        except FoldAbandonedError:
            return None
        finally:
            self._disk.remove_tree(directory, op="fold.remove")

    def _commit(self, epoch: IncomingEpoch, made: Level, numbers: dict[SpaceKey, Numbers]) -> EpochRecord:
        """Give a finished level its name. From the rename on it is committed."""
        with self._mutex:
            self._check_next(epoch.header)
            level = replace(made, path=self._layout.epochs / str(made.id))
            view = self._layout.view(level.id)
            try:
                # The view comes first: whoever finds the epoch after a power loss finds its view too.
                self._disk.point(view, self._layout.view_target(level.path), op="commit.view")
                self._disk.sync_dir(self._layout.views, op="commit.sync-views")
                self._disk.rename(made.path, level.path, op="commit.rename")
                self._disk.sync_dir(self._layout.epochs, op="commit.sync-epochs")
            except BaseException:
                # It may or may not survive a power loss now; while we live, it was never committed.
                if level.path.exists():
                    throw_away(self._layout, self._disk, level.path)
                self._disk.unlink(view, op="commit.undo")
                raise
            self._levels[level.id] = level
            self._known = (level.id, numbers)
            record = self._record(self._levels, level.id)
        log.info("store.committed", epoch=str(level.id), bytes=record.bytes_on_disk, levels=record.levels)
        return record

    def _forget(self, epoch: IncomingEpoch) -> None:
        with self._mutex:
            if epoch in self._arriving:
                self._arriving.remove(epoch)

    def _pages_held(self, epoch: EpochId, key: SpaceKey) -> Numbers | None:
        """Say which pages a committed epoch knows of a space; None if it has no such space."""
        with self._mutex:
            level = self._chain(epoch)[0]
            known = self._known
        if known and known[0] == epoch:
            return known[1].get(key)
        return level.pages_of(key, self._disk)[0] if level.space(key) else None

    def _check_open(self) -> None:
        if self._lock_fd < 0:
            raise StoreError(f"the store {self._layout.root} was closed")

    def _check_next(self, header: EpochHeader) -> None:
        """Raise StoreError unless this epoch may be the next one."""
        self._check_open()
        if header.workload != self._layout.root.name:
            raise StoreError(f"an epoch of {header.workload} came to the store of {self._layout.root.name}")
        if self._levels and header.id <= max(self._levels):
            raise StoreError(f"epoch {header.id} is not newer than {max(self._levels)}, which is committed")
        if header.base is not None and header.base not in self._levels:
            raise StoreError(
                f"epoch {header.id} stands on {header.base}, which is not here", hint="send a full epoch"
            )

    def _has_room(self, expected_bytes: int) -> bool:
        return self._disk.free_bytes(self._layout.root) - expected_bytes >= self._min_free_bytes

    def _garbage(self) -> list[Level]:
        """List the levels that neither a kept epoch nor an arriving one reads, newest first."""
        roots = sorted(self._levels)[-KEPT_EPOCHS:]
        roots += [epoch.header.base for epoch in self._arriving if epoch.header.base in self._levels]
        needed = {level.id for root in roots for level in chain_of(self._levels, root) or ()}
        return [self._levels[epoch] for epoch in sorted(self._levels.keys() - needed, reverse=True)]

    def _collect_if_idle(self) -> None:
        if self._folding.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._folding.release()

    def _collect(self) -> None:
        """Remove what nothing needs; the caller holds `_folding`."""
        with self._mutex:
            if self._holds or self._lock_fd < 0:
                return
            # Newest first: at no moment does one stand on what is not there.
            garbage = self._garbage()
            if not garbage and not self._stale:
                return
            for level in garbage:
                del self._levels[level.id]
                self._disk.unlink(self._layout.view(level.id), op="collect.view")
            # What a fold replaced goes only when no power loss can make its view lead there again: the
            # command beside an epoch works without our recovery too.
            self._disk.sync_dir(self._layout.views, op="collect.sync-views")
            while self._stale:
                throw_away(self._layout, self._disk, self._stale[-1])
                self._stale.pop()
            for level in garbage:
                throw_away(self._layout, self._disk, level.path)
        sweep(self._layout.trash, self._disk)


class IncomingEpoch:
    """An epoch on its way in: metadata files and spaces in any order, then `commit` or `abort`.

    Not for several threads at once. After an error nothing but `abort` is left. As a context manager it
    aborts unless it was committed.
    """

    def __init__(
        self, store: EpochStore, header: EpochHeader, restore_command: tuple[str, ...], writer: LevelWriter
    ) -> None:
        self.header = header
        self._store = store
        self._restore_command = restore_command
        self._writer = writer
        self._numbers: dict[SpaceKey, Numbers] = {}
        self._descriptors = b""
        self._over = ""

    def __enter__(self) -> IncomingEpoch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def metadata(self, name: str, data: bytes | memoryview, *, more: bool = False) -> None:
        """Add to one of CRIU's images that go whole; with `more`, the rest follows in the next call.

        Raises StoreError for a name that is not a plain one or that the store gives itself.
        """
        with self._step():
            self._writer.metadata(name, data, more=more)
            if name == _DESCRIPTORS:
                self._descriptors += data

    def space(self, key: SpaceKey, numbers: Numbers, flags: Flags) -> None:
        """Announce an address space: its pages, ascending, and a flags byte each; shape (n,).

        PE_PARENT: unchanged, the base has it. PE_PRESENT: its bytes follow. `ZERO`: changed, and all zeros
        now, so that none follow. PE_LAZY is kept. Raises StoreError for what cannot be, and for unchanged
        pages that the base does not have: CRIU would fail at restore.
        """
        with self._step():
            self._writer.space(key, numbers, flags)
            inherited = numbers[(flags & PE_PARENT) != 0]
            if inherited.size:
                base = self.header.base
                held = self._store._pages_held(base, key) if base is not None else None
                if held is None or (rows_in(held, inherited) < 0).any():
                    raise StoreError(f"{key.pagemap_name} has unchanged pages that {base} does not have")
            self._numbers[key] = numbers.copy()

    def pages(self, key: SpaceKey, data: bytes | bytearray | memoryview) -> None:
        """Add bytes of the pages that follow `space`, in ascending order of pages, cut anywhere.

        Raises StoreError for another space than the one announced last, or for more than it needs.
        """
        with self._step():
            self._writer.pages(key, data)

    def commit(self) -> EpochRecord:
        """Make it durable and visible; takes as long as the disk takes.

        Raises StoreError when something is missing, or when a newer epoch was committed or the base went
        meanwhile. When this returns, the epoch survives a power loss (unless the store is `volatile`).
        """
        with self._step():
            view = self._store._layout.view(self.header.id)
            text = restore_text(view, self._restore_command, self._descriptors)
            wall_s = self._store._clock.wall_s()
            made = self._writer.finish(self._store._layout, self.header, wall_s, text)
            record = self._store._commit(self, made, self._numbers)
        self._over = "was committed"
        self._store._forget(self)
        return record

    def abort(self) -> None:
        """Drop it, with all that came. Harmless when repeated or after a commit."""
        if self._over in ("was committed", "was aborted"):
            return
        self._over = "was aborted"
        self._writer.close()
        self._store._forget(self)
        self._store._disk.remove_tree(self._writer.directory, op="abort.remove")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Let nothing but `abort` follow an error: what was half written must not be committed."""
        if self._over:
            raise StoreError(f"epoch {self.header.id} {self._over}")
        self._over = "failed before"
        yield
        self._over = ""


def _lock(layout: Layout) -> int:
    """Become the store's only writer; returns what must stay open as long. StoreError if there is one."""
    try:
        fd = os.open(layout.lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise StoreError(f"{layout.lock}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreError(
            f"somebody else writes to the store {layout.root}", hint="only one agent a node may run"
        ) from error
    return fd
