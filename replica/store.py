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
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import msgspec
import structlog

from common.clock import Clock, SystemClock
from common.criu.images import SpaceKey
from common.durable import FILE_MODE, Disk, RealDisk, temporary_name
from common.errors import NoSpaceError, StoreError
from common.identity import PageHasher
from common.model import EpochId
from common.rate import RateLimit
from replica.ceiling import Ceiling
from replica.doubt import StoredDoubt, end_doubt, keep_doubt, read_doubt
from replica.folding import FoldAbandonedError, fold_due, fold_into, plan_fold
from replica.holdings import HeldPart, Holdings, Lender
from replica.incoming import IncomingEpoch
from replica.level_writer import COPIED, IN_BASE, REPEATED, ZERO, LevelWriter
from replica.levels import (
    CRIU_RESTORE,
    RESTORE_NAME,
    BaseError,
    EpochHeader,
    Layout,
    Level,
    NotHeldError,
    Numbers,
    chain_of,
)
from replica.recovery import make_root, prepare, recover, recover_seed, set_aside, sweep, throw_away
from replica.sample import Sampler
from replica.store_reader import (
    EpochDetails,
    EpochRecord,
    Problem,
    StoreReader,
    stored_workloads,
)
from replica.stored_files import FoldedChanges, StoredFiles

__all__ = [
    "COPIED",
    "IN_BASE",
    "REPEATED",
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

SEED_MIN_BYTES = 1 << 20
"""Least page bytes of an interrupted epoch worth keeping: less is sent again sooner than compared."""

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
        seed: Level | None,
        fold_bytes_per_s: float,
        ceiling: Ceiling,
        doubt: StoredDoubt | None,
    ) -> None:
        super().__init__(layout, levels, disk)
        self._min_free_bytes = min_free_bytes
        self._ceiling = ceiling
        self._max_levels = max_levels
        self._clock = clock
        self._lock_fd = lock_fd
        self._mutex = threading.RLock()  # guards what follows and every rename; never held over bulk work
        self._folding = threading.Lock()  # held by the one fold or collection at a time
        self._arriving: list[IncomingEpoch] = []
        self._wanting: list[tuple[Level, str]] = []  # discarded, and not set aside yet
        self._stale: list[Path] = []  # what is to be removed and may not have been: the rest of it, next time
        self._holds = 0
        self._in_use: Counter[Path] = Counter()  # levels that are being read; they may be stale
        self._folded = FoldedChanges()
        self._known: tuple[EpochId, dict[SpaceKey, Numbers]] | None = None  # pages of the newest epoch
        self._seed = seed
        self._lending: tuple[int, Lender] | None = None
        self._unswept = False
        self._newest_levels = self.newest.levels if self.newest else 0
        self._fold_rate = RateLimit(fold_bytes_per_s)
        self._holdings: tuple[tuple[Level, ...], Holdings] | None = None
        self._sampler = Sampler(disk)
        self._doubt = doubt

    @classmethod
    def open(
        cls,
        directory: Path,
        workload: str,
        *,
        min_free_bytes: int,
        max_levels: int,
        fold_bytes_per_s: float = 0,
        ceiling: Ceiling | None = None,
        disk: Disk | None = None,
        clock: Clock | None = None,
    ) -> EpochStore:
        """Open (or make) the store of `workload` below `directory`, and recover it.

        Raises StoreError when somebody else has it open or it is of another version. `max_levels` (at least
        2) is the longest chain wanted; see `begin`. Folds read at most `fold_bytes_per_s`; 0 for no bound.
        `ceiling` bounds this store and those beside it together; None: nothing but the disk does.
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
            seed = recover_seed(layout, disk, levels)
            doubt = read_doubt(layout, disk)
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
            seed=seed,
            fold_bytes_per_s=fold_bytes_per_s,
            ceiling=ceiling or Ceiling(directory, 0),
            doubt=doubt,
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
        self,
        header: EpochHeader,
        *,
        expected_bytes: int = 0,
        restore_command: Sequence[str] = CRIU_RESTORE,
        seed: int = 0,
    ) -> IncomingEpoch:
        """Start to receive an epoch. `restore_command` runs stock CRIU, but for what the images need.

        `seed` names the one that `COPIED` pages are to be taken from, 0 for none.

        Raises StoreError when it is not newer than the newest, or base or seed are not held; NoSpaceError if
        less than `min_free_bytes` would be left after `expected_bytes`, when the ceiling would be passed, or
        when folding is so far behind that the chain would exceed twice `max_levels`. Several may be under
        way; the first that commits makes older ones fail.
        """
        with self._mutex:
            self._check_next(header)
            lender = self._lender(seed) if seed else None
            if header.base is not None and len(self._chain(header.base)) >= 2 * self._max_levels:
                raise NoSpaceError(
                    f"{header.base} already stands on {2 * self._max_levels - 1} others: folding is behind",
                    hint="retry when the fold in progress is done, or send a full epoch",
                )
            self.require_room(header.id, expected_bytes, keep_seed=bool(seed))
            directory = self._layout.incoming / f"{header.id}-{secrets.token_hex(4)}"
            writer = LevelWriter(self._disk, directory, op="commit")
            epoch = IncomingEpoch(
                self, self._layout, self._disk, header, tuple(restore_command), writer, lender
            )
            self._arriving.append(epoch)
            return epoch

    def require_room(self, epoch: EpochId, expected_bytes: int, *, keep_seed: bool) -> None:
        """Make room for what an epoch brings, if there is none. Raises NoSpaceError if that fails."""
        with self._mutex:
            if self._has_room(expected_bytes) and self._ceiling.admits(expected_bytes):
                return
            if not keep_seed:
                self._drop_seed()
            self._collect_if_idle()
            if not self._has_room(expected_bytes):
                raise NoSpaceError(
                    f"epoch {epoch} would leave less than {self._min_free_bytes} bytes free"
                    f" in {self._layout.root}",
                    hint="free some space, or lower store.min_free_bytes",
                )
            if not self._ceiling.admits(expected_bytes, anew=True):
                raise NoSpaceError(
                    f"with epoch {epoch} the stores in {self._layout.root.parent} would take"
                    f" more than {self._ceiling.max_bytes} bytes",
                    hint="remove stores that nobody needs, or raise store.max_bytes",
                )

    @property
    def seed(self) -> int:
        """Name of what is kept of an interrupted epoch; 0: nothing is.

        Drawn by chance: whoever knows the pages of one seed must never be lent those of another.
        """
        with self._mutex:
            return int(self._seed.path.name) if self._seed else 0

    def identify(
        self, what: EpochId | int, key: SpaceKey, first_row: int, most: int, hasher: PageHasher
    ) -> HeldPart:
        """Say what is held of a space, in a committed epoch or in a seed. See `Holdings.identify`.

        Raises StoreError if that is not there (any more), or cannot be read.
        """
        if isinstance(what, int):
            return self._lender(what).identify(key, first_row, most, hasher)
        with self._reading(what) as chain:
            return self._holdings_of(chain).identify(key, first_row, most, hasher)

    def sample(
        self, epoch: EpochId, key: SpaceKey, first: int, end: int, most: int, hasher: PageHasher
    ) -> HeldPart:
        """Say what is on the disk of some pages of a committed epoch. See `Sampler.identify`.

        Holds up no fold. Raises NotHeldError if the epoch is not held, StoreError if it cannot be read.
        """
        while True:
            chain = chain_of(dict(self._levels), epoch)
            if chain is None:
                raise NotHeldError(f"{epoch} is not held any more")
            try:
                return self._sampler.identify(chain, key, first, end, most, hasher)
            except StoreError:
                if chain_of(dict(self._levels), epoch) == chain:
                    raise
                # A fold has taken a level's place meanwhile: what it left may be gone.

    @contextmanager
    def files_of(self, epoch: EpochId) -> Iterator[StoredFiles]:
        """Have the files of a committed epoch, and keep their bytes; holds up no fold.

        Raises StoreError if it is not held.
        """
        with self._reading(epoch) as chain:
            yield StoredFiles(chain, self._disk, self._folded)

    def doubt(self, reason: str) -> None:
        """Hold all that is stored for doubtful: its primary found that it is not what was captured.

        Durable when this returns. No later epoch may stand on what is stored, so everything is sent anew; as
        soon as that is here, what is in doubt goes. Until then it stays, for an operator to decide.
        """
        with self._mutex:
            self._check_open()
            if self._levels:
                self._doubt = StoredDoubt(epoch=max(self._levels), reason=reason)
                keep_doubt(self._layout, self._disk, self._doubt)

    def doubt_about(self, epoch: EpochId) -> str:
        """Return why an epoch is in doubt; empty if it is not."""
        doubt = self._doubt
        if doubt is None:
            return ""
        chain = chain_of(dict(self._levels), epoch)
        return doubt.reason if chain is not None and doubt.touches(chain) else ""

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
            self._check_open()
            self._chain(epoch)
            affected = [
                level
                for level in self._levels.values()
                if any(link.id == epoch for link in chain_of(self._levels, level.id) or ())
            ]
            for level in sorted(affected, key=lambda level: level.id, reverse=True):
                del self._levels[level.id]
                self._wanting.append((level, reason))
            self._set_wanting_aside()

    def _set_wanting_aside(self) -> None:
        """Set aside what was discarded, and what a fold had replaced by it; what fails is tried next time.

        Else it would be found again, and held, at the next start. The caller holds `_mutex`.
        """
        while self._wanting:
            level, reason = self._wanting[0]
            replaced = [path for path in self._stale if path.name == str(level.id)]
            if replaced:
                self._disk.sync_dir(self._layout.views, op="collect.sync-views")
            for path in replaced:
                throw_away(self._layout, self._disk, path)
                self._stale.remove(path)
            set_aside(self._layout, self._disk, level, reason)
            self._wanting.pop(0)

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
                self._wanting
                or self._removable()
                or self._unswept
                or self._garbage()
                or (newest and fold_due(newest.levels, self._max_levels))
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
                fold_into(writer, folded, self._disk, step=self._breathe)
                self._folded.take(folded, self._disk)
                command = self._disk.read_file(newest.path / RESTORE_NAME, op="fold.read-command")
                made = writer.finish(self._layout, header, newest.manifest.committed_wall_s, command)
            finally:
                writer.close()
            with self._mutex:
                if self._holds or self._lock_fd < 0 or self._levels.get(newest.id) is not newest:
                    raise FoldAbandonedError
                level = replace(made, path=self._layout.folds / str(newest.id))
                self._disk.rename(directory, level.path, op="fold.rename")
                try:
                    self._disk.sync_dir(self._layout.folds, op="fold.sync-folds")
                    self._disk.point(
                        self._layout.view(level.id), self._layout.view_target(level.path), op="fold.view"
                    )
                except (StoreError, NoSpaceError):
                    # No view leads there: it would stand in the next fold's way, and outlive its base.
                    throw_away(self._layout, self._disk, level.path)
                    raise
                self._levels[level.id] = level
                self._stale.append(newest.path)
                return level
        except FoldAbandonedError:
            return None
        finally:
            self._disk.remove_tree(directory, op="fold.remove")

    def _breathe(self, size_bytes: int) -> None:
        """Let a fold go on, at its pace; raises FoldAbandonedError when it has to end.

        When the newest chain is longer than wanted, it goes as fast as it can: soon no delta would be taken.
        """
        if self._holds > 0 or self._lock_fd < 0:
            raise FoldAbandonedError
        wait_s = self._fold_rate.take(size_bytes, self._clock.monotonic_s())
        if self._newest_levels <= self._max_levels:
            time.sleep(wait_s)

    # --- what an arriving epoch needs of its store -----------------------------------------------

    def admit(self, header: EpochHeader, made: Level, numbers: dict[SpaceKey, Numbers]) -> EpochRecord:
        """Give a finished level its name. From the rename on it is committed."""
        with self._mutex:
            self._check_next(header)
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
            self._folded.forget(level.id)
            self._known = (level.id, numbers)
            if self._seed is not None:
                self._stale.append(self._seed.path)
                self._seed = None
            self._lending = self._holdings = None  # the tables of what was asked take memory
            record = self._record(self._levels, level.id)
            self._newest_levels = record.levels
        log.info("store.committed", epoch=str(level.id), bytes=record.bytes_on_disk, levels=record.levels)
        return record

    def forget(self, epoch: IncomingEpoch) -> None:
        """Take note that an epoch arrives no more."""
        with self._mutex:
            if epoch in self._arriving:
                self._arriving.remove(epoch)

    def keep_seed(self, made: Level) -> bool:
        """Keep what came of an interrupted epoch for the next attempt, if it is more than the last one left.

        False if it is not, or if the store was closed: then it is to be removed.
        """
        with self._mutex:
            kept = self._seed.manifest if self._seed else None
            # What is left of another run of the workload says nothing about how far this one has come.
            same_run = kept is not None and kept.header.incarnation == made.manifest.header.incarnation
            kept_bytes = kept.page_bytes if kept is not None and same_run else 0
            if self._lock_fd < 0 or made.manifest.page_bytes < max(SEED_MIN_BYTES, kept_bytes + 1):
                return False
            self._drop_seed()
            path = self._layout.seeds / str(1 + secrets.randbits(52))
            self._disk.rename(made.path, path, op="seed.rename")
            self._seed = replace(made, path=path)
        log.info("store.seed_kept", epoch=str(made.id), bytes=made.manifest.page_bytes)
        return True

    def wall_s(self) -> float:
        """What the store's clock says."""
        return self._clock.wall_s()

    def pages_held(self, epoch: EpochId, key: SpaceKey) -> Numbers | None:
        """Say which pages a committed epoch knows of a space; None if it has no such space."""
        with self._mutex:
            level = self._chain(epoch)[0]
            known = self._known
        if known and known[0] == epoch:
            return known[1].get(key)
        return level.pages_of(key, self._disk)[0] if level.space(key) else None

    def read_base(self, epoch: EpochId, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """Read pages of a committed epoch, in blocks that are valid until the next one. Raises StoreError."""
        with self.files_of(epoch) as files:
            yield from files.read(key, numbers)

    @contextmanager
    def _reading(self, epoch: EpochId) -> Iterator[tuple[Level, ...]]:
        """Have an epoch's chain as it is now, and keep its levels' files, also if folds take their place."""
        with self._mutex:
            chain = self._chain(epoch)
            self._in_use.update(level.path for level in chain)
        try:
            yield chain
        finally:
            with self._mutex:
                self._in_use.subtract(level.path for level in chain)
                self._in_use = +self._in_use

    def _holdings_of(self, chain: tuple[Level, ...]) -> Holdings:
        """Return what reads a chain: to be used within `_reading`."""
        with self._mutex:
            if self._holdings is None or self._holdings[0] != chain:
                self._holdings = chain, Holdings(chain, self._disk)
            return self._holdings[1]

    def _lender(self, seed: int) -> Lender:
        """Open a seed for reading. It fails to read, and never reads another one, once it is dropped."""
        with self._mutex:
            if self._seed is None or seed != self.seed:
                raise BaseError("what was kept of an interrupted epoch is not here any more")
            if self._lending is None or self._lending[0] != seed:
                self._lending = seed, Lender((self._seed,), self._disk)
            return self._lending[1]

    def _drop_seed(self) -> None:
        """Throw the seed away; what an arriving epoch still reads of it stays readable or fails it."""
        if self._seed is not None:
            seed, self._seed = self._seed, None
            throw_away(self._layout, self._disk, seed.path)
            self._unswept = True

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
            raise BaseError(
                f"epoch {header.id} stands on {header.base}, which is not here", hint="send a full epoch"
            )
        if header.base is not None and self.doubt_about(header.base):
            raise BaseError(f"epoch {header.id} stands on {header.base}, which is in doubt")

    def _has_room(self, expected_bytes: int) -> bool:
        return self._disk.free_bytes(self._layout.root) - expected_bytes >= self._min_free_bytes

    def _garbage(self) -> list[Level]:
        """List the levels that neither a kept epoch nor an arriving one reads, newest first."""
        sound = [epoch for epoch in sorted(self._levels) if not self.doubt_about(epoch)]
        roots = (sound or sorted(self._levels))[-KEPT_EPOCHS:]
        roots += [epoch.header.base for epoch in self._arriving if epoch.header.base in self._levels]
        needed = {level.id for root in roots for level in chain_of(self._levels, root) or ()}
        return [self._levels[epoch] for epoch in sorted(self._levels.keys() - needed, reverse=True)]

    def _removable(self) -> list[Path]:
        """List what is to be removed and read by nobody."""
        return [path for path in self._stale if not self._in_use[path]]

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
            self._set_wanting_aside()
            # Newest first: at no moment does one stand on what is not there.
            garbage = self._garbage()
            if not garbage and not self._removable() and not self._unswept:
                return
            if garbage and self._stale:
                # A power loss that takes back where a fold's view leads, and no removal, would leave it on
                # what has no view any more.
                self._disk.sync_dir(self._layout.views, op="collect.sync-folded")
            for level in garbage:
                self._disk.unlink(self._layout.view(level.id), op="collect.view")
                del self._levels[level.id]
                self._stale.append(level.path)
            # What a fold replaced goes only when no power loss can make its view lead there again: the
            # command beside an epoch works without our recovery too.
            self._disk.sync_dir(self._layout.views, op="collect.sync-views")
            for path in self._removable():
                throw_away(self._layout, self._disk, path)
                self._stale.remove(path)
            self._unswept = False
            if self._doubt is not None and not self._stale and not any(map(self.doubt_about, self._levels)):
                # Not before all of it is gone: what is still read would be held for sound after a crash.
                end_doubt(self._layout, self._disk)
                self._doubt = None
        sweep(self._layout.trash, self._disk)


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
