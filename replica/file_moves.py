"""Which names have to come and go so that a tree of files has those of an epoch, and how that is done.

In: what became different since the epoch that the tree is, or the tree itself, walked. Out: `Moves`, and
then the names of the epoch on the disk. An inode that stays keeps its file, whatever becomes of its names:
what has lost the last one waits in limbo for the next, so that no two moves stand in each other's way. Swaps,
circles, and a directory that goes into what was below it, are like all others. A directory moves with all
that is in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.file_records import ROOTS, Entry, Inode
from replica.file_model import Difference, FileModel, traits_of
from replica.file_ops import FileOps, explained
from replica.file_site import Site
from replica.stored_files import EpochFiles


@dataclass(slots=True)
class Moves:
    """What is wrong with the names of a tree. Inodes that go have numbers below zero."""

    lost: list[Entry] = field(default_factory=list)
    """Names that are there, and shall not be."""
    won: list[Entry] = field(default_factory=list)
    """Names that shall be there."""
    fresh: set[int] = field(default_factory=set)
    """Those of the inodes that `won` leads to which have to be made."""
    doomed: dict[int, Entry] = field(default_factory=dict)
    """Directories that go, each with its name (one of `lost`)."""


def moves_since(difference: Difference, model: FileModel, site: Site) -> Moves:
    """Tell what to do in a tree that was the model before the difference."""
    ghosts = {
        number: site.new_number()
        for number, inode in difference.before.items()
        if not _stays(inode, difference.after.get(number))
    }
    moves = Moves(won=list(difference.won))
    moves.fresh = {
        number for number in difference.after if number in ghosts or number not in difference.before
    }
    lost, won = list(difference.lost), set(difference.won)
    for number in ghosts.keys() & difference.after.keys():
        # Another file under the same number takes over the names that did not change, too.
        same = [entry for entry in model.names[number] if entry not in won]
        lost += same
        moves.won += same
    for entry in lost:
        gone = Entry(ghosts.get(entry.parent, entry.parent), entry.name, ghosts.get(entry.inode, entry.inode))
        moves.lost.append(gone)
        if gone.inode < 0 and stat.S_ISDIR(difference.before[entry.inode].mode):
            moves.doomed[gone.inode] = gone
    return moves


def moves_on_disk(model: FileModel, site: Site, files: EpochFiles) -> Moves:
    """Look at every name of a tree, and tell what to do there.

    Raises StoreError if it cannot be looked at, or something is mounted on a directory in it.
    """
    return _Walk(model, site, files).run()


class _Walk:
    """Finds for each file of a tree which inode of the epoch it is, by its name, or that it is none."""

    def __init__(self, model: FileModel, site: Site, files: EpochFiles) -> None:
        self._model = model
        self._site = site
        self._files = files
        self._moves = Moves()
        self._found: set[int] = set()
        self._linked: dict[tuple[int, int], int] = {}
        """Numbers of files with several links, by device and inode of the file system."""

    def run(self) -> Moves:
        moves = self._moves
        self._found.update(self._site.roots)
        left = [*self._site.roots, *self._site.find_limbos()]
        while left:
            left += self._directory(left.pop())
        for number, entries in self._model.children.items():
            if number != ROOTS and number not in self._found:
                moves.won += entries.values()
        moves.fresh = {entry.inode for entry in moves.won} - self._found
        return moves

    def _directory(self, number: int) -> list[int]:
        """Compare the names in a directory with those that shall be there; returns the directories in it."""
        wanted = self._model.children.get(number, {})
        met: set[bytes] = set()
        below: list[int] = []
        with explained("list", lambda: self._path_of(number)):
            descriptor = self._site.descriptor(number)
            for name in map(os.fsencode, os.listdir(descriptor)):
                entry = wanted.get(name)
                if entry is None and self._site.is_none_of_it(number, name):
                    continue
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                found = Entry(number, name, self._identify(descriptor, name, status, entry))
                if found == entry:
                    met.add(name)
                else:
                    self._moves.lost.append(found)
                if stat.S_ISDIR(status.st_mode):
                    below.append(found.inode)
                    if found.inode < 0:
                        self._site.where[found.inode] = self._moves.doomed[found.inode] = found
        self._moves.won += (entry for name, entry in wanted.items() if name not in met)
        return below

    def _identify(self, directory: int, name: bytes, status: os.stat_result, entry: Entry | None) -> int:
        key = status.st_dev, status.st_ino
        linked = status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
        if linked and key in self._linked:
            return self._linked[key]
        if (
            entry is not None
            and entry.inode not in self._found
            and self._fits(directory, name, status, entry)
        ):
            number = entry.inode
            self._found.add(number)
        else:
            number = self._site.new_number()
        if linked:
            self._linked[key] = number
        return number

    def _fits(self, directory: int, name: bytes, status: os.stat_result, entry: Entry) -> bool:
        """Tell whether a file can become an inode: what is left can be changed in any file."""
        inode = self._model.inodes[entry.inode]
        if stat.S_IFMT(inode.mode) != stat.S_IFMT(status.st_mode):
            return False
        if stat.S_ISLNK(inode.mode):
            return os.readlink(name, dir_fd=directory) == traits_of(inode, self._files)[0]
        return not _is_device(inode.mode) or inode.device == status.st_rdev

    def _path_of(self, number: int) -> str:
        return self._site.path(Entry(number, b".", number))


class Mover:
    """Makes names be as `Moves` say. Raises StoreError, NoSpaceError; then the tree is no epoch."""

    def __init__(self, model: FileModel, site: Site, files: EpochFiles, ops: FileOps) -> None:
        self._model = model
        self._site = site
        self._files = files
        self._ops = ops
        self._at: dict[int, Entry] = {}
        """A name that leads there just now, of inodes that have come or lost one."""
        self._waiting: set[int] = set()
        """Inodes in limbo."""

    def run(self, moves: Moves) -> None:
        """Take names away, and give others. Afterwards no limbo is left."""
        self._site.where.update(moves.doomed)
        self._find_stays(moves)
        for entry in moves.lost:
            if entry.inode not in moves.doomed:
                self._take(entry)
        for entry in reversed(list(_top_down(moves.doomed))):
            with explained("remove", lambda: self._site.path(entry)):  # noqa: B023
                self._ops.remove_directory(self._site.descriptor(entry.parent), entry.name)
            self._site.forget(entry.inode)
        directories = {
            entry.inode: entry
            for entry in moves.won
            if entry.inode in moves.fresh and self._model.is_directory(entry.inode)
        }
        for entry in _top_down(directories):
            self._make(entry)
        for entry in moves.won:
            if entry.inode not in directories:
                self._give(entry)
        self._site.remove_limbos(self._ops)

    def _find_stays(self, moves: Moves) -> None:
        """Take note where those inodes are just now that stay, and whose names change."""
        coming = {entry for entry in moves.won if entry.inode not in moves.fresh}
        for entry in (*moves.lost, *coming):
            if entry.inode > 0 and entry.inode not in self._at:
                names = self._model.names[entry.inode]
                kept = next((name for name in names if name not in coming), None)
                if kept is not None:
                    self._at[entry.inode] = kept
        for entry in moves.lost:
            if self._model.is_directory(entry.inode):
                self._site.where[entry.inode] = entry

    def _take(self, entry: Entry) -> None:
        """Take a name away; an inode that stays and has no other waits in limbo."""
        with explained("remove", lambda: self._site.path(entry)):
            if entry.inode < 0 or entry.inode in self._at:
                self._ops.remove(self._site.descriptor(entry.parent), entry.name)
                return
            limbo = self._site.limbo_for(entry, self._ops)
            waiting = Entry(limbo, b"%d" % entry.inode, entry.inode)
            self._move(entry, waiting)
            self._waiting.add(entry.inode)
            if entry.inode in self._site.where:
                self._site.where[entry.inode] = waiting

    def _give(self, entry: Entry) -> None:
        """Give a name to an inode; the first one to one that is not there makes it."""
        at = self._at.get(entry.inode)
        if at is None:
            self._make(entry)
        elif entry.inode in self._waiting:
            with explained("move", lambda: self._site.path(entry)):
                self._move(at, entry)
            self._waiting.discard(entry.inode)
            self._site.where.pop(entry.inode, None)
        else:
            with explained("link", lambda: self._site.path(entry)):
                source = self._site.descriptor(at.parent)
                self._ops.link(source, at.name, self._site.descriptor(entry.parent), entry.name)

    def _make(self, entry: Entry) -> None:
        inode = self._model.inodes[entry.inode]
        target = traits_of(inode, self._files)[0] if stat.S_ISLNK(inode.mode) else b""
        with explained("make", lambda: self._site.path(entry)):
            self._ops.make(self._site.descriptor(entry.parent), entry.name, inode, target)
        if len(self._model.names[entry.inode]) > 1:
            self._at[entry.inode] = entry

    def _move(self, source: Entry, target: Entry) -> None:
        directory = self._site.descriptor(source.parent)
        self._ops.move(directory, source.name, self._site.descriptor(target.parent), target.name)
        self._at[source.inode] = target


def _stays(old: Inode, new: Inode | None) -> bool:
    """Tell whether an inode's file can go on as what the inode is now."""
    if new is None or stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode) or old.device != new.device:
        return False
    if stat.S_ISLNK(new.mode):  # which cannot be changed
        return old.extra is None and new.extra is None and old.target == new.target
    return True


def _top_down(entries: dict[int, Entry]) -> Iterator[Entry]:
    """Yield entries of directories (by their numbers), each after the one of the directory that it is in."""
    below: dict[int, list[Entry]] = {}
    for entry in entries.values():
        below.setdefault(entry.parent, []).append(entry)
    left: list[Entry] = [entry for entry in entries.values() if entry.parent not in entries]
    while left:
        entry = left.pop()
        yield entry
        left += below.get(entry.inode, ())


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
