"""What differs between a tree of files on disk and the epoch that it should be, in sentences.

In: the model of the epoch, the opened tree, and the epoch's pages if more than a look is wanted. Out: one
sentence for each difference. Nothing is changed. It can be done part by part, with other epochs in between.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final

from common.durable import cause_of
from common.errors import StoreError
from common.file_records import ROOTS, Entry, Inode
from replica.file_contents import Portion, all_portions, differing, portions_from
from replica.file_model import FileModel, readable, traits_of
from replica.file_ops import HOST_ATTRIBUTES, MISSING, attributes_of, explained
from replica.file_site import Site
from replica.stored_files import EpochFiles

_PART_ENTRIES: Final = 2000
_ASKED_EACH: Final = 500
"""Entries that are looked at between two times that it is asked whether there is time for more."""
_PART_PAGES: Final = 1 << 14
"""64 MiB."""
_KIND_NAMES: Final = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def differences(site: Site, model: FileModel, files: EpochFiles | None) -> Iterator[str]:
    """Compare each name, what it leads to and how that is described; with `files` what it holds, too.

    Raises StoreError if something cannot be looked at.
    """
    comparison = _Comparison(site, model, files)
    for entry in model.children[ROOTS].values():
        yield from comparison.look(entry, os.fstat(site.descriptor(entry.inode)))
    while comparison.directories:
        yield from comparison.directory(comparison.directories.pop())
    if files is not None:
        yield from _contents(site, model, files, all_portions(model))


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a comparison in parts has come: names in the order of directories' numbers, then contents."""

    directory: int | None = 0
    """The names in directories from this number on are due; None: none are."""
    page: int = 0
    """Contents from this page on are due."""


START: Final = Cursor()


def differences_in_part(
    site: Site,
    model: FileModel,
    files: EpochFiles | None,
    cursor: Cursor,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[list[str], Cursor | None]:
    """Compare some names, or some contents, and return what differs, and what is left; None: nothing is.

    Without `files`, attributes and contents are left out. Takes about a tenth of a second, unless a single
    directory is very large: what is left of that one is not looked at once `is_over` says so. Raises
    StoreError.
    """
    if cursor.directory is None:
        if files is None:
            return [], None
        portions, page = portions_from(model, cursor.page, _PART_PAGES)
        found = list(_contents(site, model, files, portions))
        return found, None if page is None else Cursor(None, page)
    comparison = _Comparison(site, model, files, is_over)
    found = []
    if cursor.directory == 0:
        for entry in model.children[ROOTS].values():
            found += comparison.look(entry, os.fstat(site.descriptor(entry.inode)))
    due = (each for each in model.inodes if each >= cursor.directory and model.is_directory(each))
    looked_at = 0
    for number in nsmallest(_PART_ENTRIES, due):
        if looked_at >= _PART_ENTRIES:
            return found, Cursor(number)
        looked_at += 1 + len(model.children.get(number, ()))
        try:
            found += comparison.directory(number)
        except StoreError as error:
            if cause_of(error) not in MISSING:  # else the directory above it tells
                raise
    return found, Cursor(None) if looked_at < _PART_ENTRIES else Cursor(number + 1)


def _contents(site: Site, model: FileModel, files: EpochFiles, portions: Iterable[Portion]) -> Iterator[str]:
    for inode in differing(site, model, files, portions):
        yield f"{site.path(model.names[inode.number][0])} holds something else"


class _Comparison:
    def __init__(
        self,
        site: Site,
        model: FileModel,
        files: EpochFiles | None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directories: list[int] = []
        """Those that were found and are to be looked into."""
        self._site = site
        self._model = model
        self._files = files
        self._is_over = is_over

    def directory(self, number: int) -> Iterator[str]:
        """Compare what is in a directory."""
        wanted = self._model.children.get(number, {})
        with explained("list", lambda: self._path(Entry(number, b".", number))):
            here = self._site.descriptor(number)
        for count, (name, entry) in enumerate(wanted.items(), 1):
            with explained("look at", lambda: self._path(entry)):  # noqa: B023
                try:
                    status = os.stat(name, dir_fd=here, follow_symlinks=False)
                except FileNotFoundError:
                    status = None
            if status is None:
                yield f"{self._path(entry)} is missing"
            else:
                yield from self.look(entry, status)
                here = self._site.descriptor(number)  # another one was open for that, perhaps
            if count % _ASKED_EACH == 0 and self._is_over():
                return
        with explained("list", lambda: self._path(Entry(number, b".", number))):
            names = set(map(os.fsencode, os.listdir(here)))
        for name in sorted(names - wanted.keys()):
            if not self._site.is_none_of_it(number, name):
                yield f"{self._path(Entry(number, name, 0))} is not in the epoch"

    def look(self, entry: Entry, status: os.stat_result) -> Iterator[str]:
        """Compare what an entry leads to."""
        inode, path = self._model.inodes[entry.inode], self._path(entry)
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(inode.mode):
            yield f"{path} is a {_kind_of(status.st_mode)}, not a {_kind_of(inode.mode)}"
            return
        yield from (f"{path} {what}" for what in _unlike(inode, status))
        names = self._model.names[inode.number]
        surplus = status.st_nlink > len(names) and not self._site.leaves_out_names
        if not stat.S_ISDIR(inode.mode) and (surplus or status.st_nlink < len(names)):
            yield f"{path} has {status.st_nlink} names, not {len(names)}"
        if names[0] != entry and not self._is_same(names[0], status):
            yield f"{path} is not the same file as {self._path(names[0])}"
        if stat.S_ISDIR(inode.mode):
            self.directories.append(inode.number)
        if names[0] == entry and self._files is not None:
            yield from (f"{path} {what}" for what in self._unlike_traits(entry, inode, self._files))

    def _is_same(self, entry: Entry, status: os.stat_result) -> bool:
        """Tell whether an entry leads to that file, or is missing, which is told anyway."""
        try:
            with explained("look at", lambda: self._path(entry)), self._site.opened(entry) as descriptor:
                return os.path.samestat(os.fstat(descriptor), status)
        except StoreError as error:
            if cause_of(error) not in MISSING:
                raise
            return True

    def _unlike_traits(self, entry: Entry, inode: Inode, files: EpochFiles) -> Iterator[str]:
        target, attributes = traits_of(inode, files)
        with explained("look at", lambda: self._path(entry)), self._site.opened(entry) as descriptor:
            have = attributes_of(descriptor)
            leads_to = os.readlink(b"", dir_fd=descriptor) if stat.S_ISLNK(inode.mode) else b""
        if leads_to != target:
            yield f"leads to {readable(leads_to)!r}, not {readable(target)!r}"
        wanted = dict(attributes)
        for name in sorted(have.keys() | wanted.keys()):
            if have.get(name) != wanted.get(name) and (name in wanted or name not in HOST_ATTRIBUTES):
                yield f"has another attribute {readable(name)}"

    def _path(self, entry: Entry) -> str:
        return self._site.path(entry)


def _unlike(inode: Inode, status: os.stat_result) -> Iterator[str]:
    if stat.S_ISREG(inode.mode) and status.st_size != inode.size:
        yield f"has {status.st_size} bytes, not {inode.size}"
    if status.st_mode != inode.mode and not stat.S_ISLNK(inode.mode):
        yield f"has the mode {stat.S_IMODE(status.st_mode):04o}, not {stat.S_IMODE(inode.mode):04o}"
    if (status.st_uid, status.st_gid) != (inode.uid, inode.gid):
        yield f"belongs to {status.st_uid}:{status.st_gid}, not {inode.uid}:{inode.gid}"
    if status.st_mtime_ns != inode.mtime_ns:
        yield f"was modified at {status.st_mtime_ns} ns, not {inode.mtime_ns} ns"
    if (stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)) and status.st_rdev != inode.device:
        yield f"is the device {status.st_rdev:#x}, not {inode.device:#x}"


def _kind_of(mode: int) -> str:
    return _KIND_NAMES.get(stat.S_IFMT(mode), "file of another kind")
