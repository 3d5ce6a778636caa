"""A workload's files on this node's disk, kept equal to what epochs say.

In: epochs (`replica.stored_files`), one after the other. Out: directories that are exactly the one that was
applied last: names, kinds, links, owners, modes, times, attributes, contents and holes. As long as it is
known which epoch they are, only what changed is read and touched; if it is not, all is looked at and made
equal. The way of an epoch:

- `file_model`: its records, checked; nothing is touched by what cannot be;
- `file_moves`: names come and go, files stay what they are, wherever they move to;
- `file_contents`: contents, in place;
- `file_ops`: owners, attributes, modes and times come last: all that is before changes them.

What a crash leaves in between is never taken for an epoch (`file_state`), and the next attempt starts from
whatever is there.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from common.criu.images import SpaceKey
from common.durable import cause_of
from common.errors import ConfigError, StoreError
from common.excludes import NOTHING, Excludes
from common.file_records import CONTENTS, ROOTS
from common.model import EpochId
from replica.file_check import START, Cursor, differences, differences_in_part
from replica.file_contents import ContentWriter, Portion, all_portions, changed_portions
from replica.file_model import Difference, FileModel, gone_from, readable, traits_of
from replica.file_moves import Mover, Moves, moves_on_disk, moves_since
from replica.file_ops import FileOps, Step, explained
from replica.file_site import Site, inside_of, limbo_name
from replica.file_state import RootIds, StateFile, read_boot_id
from replica.folding import DAMAGE_HINT
from replica.levels import Numbers
from replica.stored_files import EpochFiles

log = structlog.get_logger(__name__)

_MOST_SENTENCES: Final = 100
_IN_THE_WAY: Final = {
    errno.EXDEV: "something moved from one file system to another",
    errno.ENOTEMPTY: "a directory that goes has something that is in no epoch",
    errno.EEXIST: "something that is in no epoch has the name of what comes",
}
"""What keeps changes from being made, and not the whole epoch."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Applied:
    """What it took to become an epoch."""

    epoch: EpochId
    made: int = 0
    """Names that came; a file that was renamed has one that came and one that went."""
    removed: int = 0
    written_bytes: int = 0
    """Of contents."""
    full_because: str = ""
    """Why the whole tree was looked at; empty if only what changed was."""

    @property
    def full(self) -> bool:
        """Whether the whole tree was looked at."""
        return bool(self.full_because)


class FileTree:
    """The declared directories of one workload. Nobody else may change them. Not for several threads at once.

    All that its methods raise are StoreError and NoSpaceError.
    """

    def __init__(
        self,
        roots: Mapping[bytes, Path],
        state: Path,
        *,
        excludes: Excludes = NOTHING,
        boot_id: Callable[[], str] = read_boot_id,
        step: Step = lambda op: None,
    ) -> None:
        """`roots`: for each declared path the directory on this node, which is made if it is not there.

        `state` is a file outside of them, in a directory that is there. What `excludes` has is in no epoch:
        it stays as it is, as long as the directory that it is in stays. `step` is told of each operation that
        changes something before it is done; what it raises keeps it from being done. Raises ConfigError if
        one directory lies in another one.
        """
        self._roots = {declared: path.resolve() for declared, path in sorted(roots.items())}
        _check_apart(self._roots, state.resolve())
        self._excludes = excludes
        self._step = step
        self._state = StateFile(state, boot_id, step)
        self._model: FileModel | None = None
        self._root_ids = self._make_roots()

    @property
    def epoch(self) -> EpochId | None:
        """Which epoch the tree is; None: that is not known."""
        return self._state.epoch(self._root_ids)

    @property
    def synced(self) -> EpochId | None:
        """Which epoch the tree is after a power loss, too; None: it may be anything then."""
        return self.epoch if self._state.synced else None

    def apply(self, files: EpochFiles, *, full: bool = False) -> Applied:
        """Make the tree be that epoch; only what changed is touched if it is known what that is.

        Applied once more, the epoch that the tree is brings its records into memory: then what changes next
        is known after a restart, too. `full`: look at everything, as if nothing were known.

        Raises StoreError if the epoch makes no sense, or cannot be read or made here, NoSpaceError if there
        is no room. A tree that was touched already is no epoch then (`epoch` is None), and is looked at
        wholly by the next attempt.
        """
        self._root_ids = self._make_roots()
        applied = self._apply(files, full=full)
        log.debug(
            "files.applied",
            epoch=str(applied.epoch),
            made=applied.made,
            removed=applied.removed,
            written_bytes=applied.written_bytes,
            full_because=applied.full_because,
        )
        return applied

    def forget(self) -> None:
        """Take note that somebody else changes the tree from now on: the workload."""
        self._state.begin()
        self._model = None

    def sync(self) -> EpochId | None:
        """Return when what is there survives a power loss, and which epoch that is (None: no one knows)."""
        epoch = self.epoch
        if epoch is None or self._state.synced:
            return epoch
        synced: set[int] = set()
        for path in self._roots.values():
            with explained("sync", path.__str__):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    if (device := os.fstat(descriptor).st_dev) not in synced:
                        self._step("sync")
                        _sync_file_system(descriptor)
                        synced.add(device)
                finally:
                    os.close(descriptor)
        self._state.confirm()
        return epoch

    def check(self, files: EpochFiles | None = None, *, quick: bool = True) -> list[str]:
        """Say in at most 100 sentences how the tree differs from the epoch that it is said to be.

        `quick`: names, kinds, sizes, modes, owners and times; without it attributes and contents too, which
        takes that epoch's `files`. These are needed as well if its records are not in memory.
        """
        epoch = self.epoch
        if epoch is None:
            return ["it is not known which epoch the files are"]
        if files is not None and files.epoch != epoch:
            raise StoreError(f"the files are those of {epoch}, and cannot be compared with {files.epoch}")
        model = self._model
        if model is None and files is not None:
            model = self._model = self._read(files)
        if model is None or (files is None and not quick):
            raise StoreError(f"what {epoch} has is not in memory", hint="pass its files from the store")
        with self._site(model) as site:
            return list(islice(differences(site, model, None if quick else files), _MOST_SENTENCES))

    def compare_part(
        self, files: EpochFiles | None, cursor: Cursor = START, is_over: Callable[[], bool] = lambda: False
    ) -> tuple[list[str], Cursor | None]:
        """Say how a part of the tree differs from the epoch that it is, and where to go on; None: at its end.

        `files` are that epoch's; None: only names are compared, kinds, sizes, modes, owners and times. In
        between the tree may become other epochs. A directory is left unfinished once `is_over` says so.
        Raises StoreError if it is not known what it should be.
        """
        epoch, model = self.epoch, self._model
        if epoch is None or model is None or (files is not None and files.epoch != epoch):
            raise StoreError(f"it is not known what the files of {epoch or 'this workload'} should be")
        with self._site(model) as site:
            return differences_in_part(site, model, files, cursor, is_over)

    def content_pages(self, before: int | None = None) -> int:
        """Return how many pages the contents of its epoch have; `before` a page number, if that is given."""
        if self._model is None:
            return 0
        return len(self._model.contents if before is None else self._model.present(0, before))

    # --- which way ----------------------------------------------------------------------------------

    def _apply(self, files: EpochFiles, *, full: bool) -> Applied:
        epoch = self.epoch
        if full:
            return self._make_all(files, "it was asked for")
        if epoch is None:
            return self._make_all(files, "it was not known which epoch the files were")
        if epoch == files.epoch:
            self._model = self._model or self._read(files)
            return Applied(epoch)
        if self._model is None:
            return self._make_all(files, f"the records of {epoch} were not in memory")
        changed = files.changed_since(epoch)
        if changed is None:
            return self._make_all(files, f"what changed since {epoch} could not be told")
        try:
            applied = self._make_changes(files, changed, self._model)
        except StoreError as error:
            because = _IN_THE_WAY.get(cause_of(error) or 0)
            if because is None:
                raise
            return self._make_all(files, because)
        return applied or self._make_all(files, "a declared directory was replaced by another one")

    def _make_changes(
        self, files: EpochFiles, changed: Mapping[SpaceKey, Numbers], model: FileModel
    ) -> Applied | None:
        """Make the epoch of the one before. None if that is not possible."""
        self._model = None  # until it is the tree again
        contents = model.contents
        difference = model.become(files, changed)
        if any(entry.parent == ROOTS for entry in (*difference.won, *difference.lost)):
            return None
        holes = gone_from(contents, model.contents)
        dirty = dict(_touched(model, difference, np.union1d(changed[CONTENTS], holes)))
        self._check(model, files, difference.after)
        with self._site(model) as site:
            moves = moves_since(difference, model, site)
            portions = changed_portions(model, difference, dirty)
            numbers = _unsettled(model, difference, moves)
            if not numbers:
                self._state.follow(files.epoch)
                self._model = model
                return Applied(files.epoch)
            return self._make(files, model, site, moves, portions, numbers)

    def _make_all(self, files: EpochFiles, because: str) -> Applied:
        """Make the epoch of whatever there is."""
        model = self._read(files)
        self._model = None
        with self._site(model) as site:
            moves = moves_on_disk(model, site, files)
            portions = all_portions(model, moves.fresh)
            return self._make(files, model, site, moves, portions, _in_order(model), because)

    def _make(
        self,
        files: EpochFiles,
        model: FileModel,
        site: Site,
        moves: Moves,
        portions: Iterable[Portion],
        numbers: Iterable[int],
        because: str = "",
    ) -> Applied:
        ops = FileOps(self._step)
        self._state.begin()
        Mover(model, site, files, ops).run(moves)
        ContentWriter(site, model, files, ops).bring(portions)
        for number in numbers:
            inode, entry = model.inodes[number], model.names[number][0]
            _, attributes = traits_of(inode, files)
            with explained("change", lambda: site.path(entry)), site.opened(entry) as descriptor:  # noqa: B023
                ops.settle(descriptor, inode, attributes)
        self._state.finish(files.epoch, self._root_ids)
        self._model = model
        return Applied(files.epoch, len(moves.won), len(moves.lost), ops.written_bytes, because)

    # --- what is to be made --------------------------------------------------------------------------

    def _read(self, files: EpochFiles) -> FileModel:
        model = FileModel()
        model.become(files)
        self._check(model, files, model.inodes)
        return model

    def _check(self, model: FileModel, files: EpochFiles, numbers: Iterable[int]) -> None:
        """Refuse an epoch of other directories than those here, or with attributes that make no sense."""
        declared = model.children.get(ROOTS, {})
        for name in sorted(declared.keys() ^ self._roots.keys()):
            has, here = ("has", "is not") if name in declared else ("lacks", "is")
            raise StoreError(
                f"{files.epoch} {has} the files of {readable(name)}, which {here} declared here",
                hint="let `files` of the workload say the same on all nodes",
            )
        for name, path in self._roots.items():
            if limbo_name(path) in model.children.get(declared[name].inode, {}):
                raise StoreError(
                    f"{files.epoch} has a file with a name that only Outlive uses", hint=DAMAGE_HINT
                )
        for number in numbers:
            if model.inodes[number].extra is not None:
                traits_of(model.inodes[number], files)

    def _site(self, model: FileModel) -> Site:
        return Site(model, self._roots, self._excludes)

    def _make_roots(self) -> RootIds:
        """Make the directories that are not there, and return which ones they are."""
        for path in self._roots.values():
            with explained("make", path.__str__):
                if not path.exists():
                    self._state.begin()  # an empty directory is no epoch
                    self._step("make-root")
                    path.mkdir(mode=0o700, parents=True)
        with explained("look at", lambda: "the declared directories"):
            return tuple((name, path.stat().st_ino) for name, path in self._roots.items())


def _touched(model: FileModel, difference: Difference, dirty: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Yield what changed of each content or extra, by its place, and have its inode count as changed."""
    for first, number, part in model.places.touched(dirty):
        if number not in difference.after:
            difference.before[number] = difference.after[number] = model.inodes[number]
        yield first, part


def _unsettled(model: FileModel, difference: Difference, moves: Moves) -> set[int]:
    """Return the inodes that have to be given what they say: those that changed, and directories around."""
    numbers = set(difference.after)
    for entry in (*moves.won, *moves.lost):
        numbers |= {number for number in (entry.parent, entry.inode) if model.is_directory(number)}
    if moves.won or moves.lost:
        numbers |= {entry.inode for entry in model.children[ROOTS].values()}
    return numbers


def _in_order(model: FileModel) -> Iterator[int]:
    """Yield all inodes, those of one directory together."""
    for entries in model.children.values():
        for entry in entries.values():
            if model.names[entry.inode][0] == entry:
                yield entry.inode


def _check_apart(roots: Mapping[bytes, Path], state: Path) -> None:
    """Raise ConfigError if one directory lies in another: each would be what the other one must not have."""
    for inner, outer in inside_of({**roots, b"the state": state}):
        if outer != state:
            raise ConfigError(f"{inner} lies within {outer}: each would have to hold other files")
    for path in roots.values():
        if path == path.parent:
            raise ConfigError(f"{path} cannot be the directory of a workload's files")


def _sync_file_system(descriptor: int) -> None:
    if _libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
