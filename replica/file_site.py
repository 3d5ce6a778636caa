"""Where the directories of a tree of files are just now, while names in it change.

In: the declared directories, and a model of what shall be. Out: descriptors of directories by number, however
deep they lie, and a limbo for each declared directory: a directory on the same file system, in which waits
what has lost one name and not got the next. Numbers below zero are of what is on the disk and in no epoch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Final

from common.excludes import NOTHING, Excludes
from common.file_records import ROOTS, Entry
from replica.file_model import FileModel, readable
from replica.file_ops import FileOps, explained, open_in

_OPEN_DIRECTORIES: Final = 128
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_LIMBO_PREFIX: Final = b".outlive-limbo-"


def limbo_name(root: Path) -> bytes:
    """Return how the limbo of a declared directory is called; of two beside each other not the same."""
    return _LIMBO_PREFIX + blake2b(os.fsencode(root.name), digest_size=8).hexdigest().encode()


@dataclass(slots=True)
class _Limbo:
    """The limbo of one declared directory."""

    parent: int
    """Descriptor of the directory in which it is or would be made."""
    name: bytes
    inside: bool
    """Whether that is the declared directory itself, because something is mounted there."""
    number: int = 0
    """0 while it is not open."""


class Site:
    """Descriptors of one tree, from opening it to closing it."""

    def __init__(self, model: FileModel, roots: Mapping[bytes, Path], excludes: Excludes = NOTHING) -> None:
        """Open the declared directories; all must be in the model. Raises StoreError if one is not there."""
        self.roots: dict[int, Path] = {}
        self.where: dict[int, Entry] = {}
        """Entries that lead to directories, as far as the model has another one or none."""
        self._model = model
        self._excludes = excludes
        self._declared: dict[int, bytes] = {}
        self._numbers = count(-1, -1)
        self._fixed: dict[int, int] = {}
        self._limbos: dict[int, _Limbo] = {}
        self._open: dict[int, int] = {}
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.close)
            for declared, path in roots.items():
                with explained("open", path.__str__):
                    number = model.children[ROOTS][declared].inode
                    self._declared[number] = declared
                    self._open_root(number, path)
            undo.pop_all()

    def close(self) -> None:
        """Close what was opened. Harmless when repeated."""
        self._stack.close()
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_number(self) -> int:
        """Return a number for something that is on the disk and in no epoch."""
        return next(self._numbers)

    def entry_of(self, number: int) -> Entry:
        """Return the entry that leads to a directory just now."""
        return self.where.get(number) or self._model.names[number][0]

    def path(self, entry: Entry) -> str:
        """Return where an entry is on this node, for people."""
        parts = [entry.name]
        while entry.parent not in self._fixed and entry.parent != ROOTS:
            entry = self.entry_of(entry.parent)
            parts.append(entry.name)
        if entry.parent == ROOTS:
            return str(self.roots[entry.inode])
        above = self.roots.get(entry.parent, "what an earlier attempt left")
        return f"{above}/{readable(b'/'.join(reversed(parts)))}"

    def descriptor(self, number: int) -> int:
        """Return a directory's descriptor, which stays valid until the second next call. Raises OSError."""
        if number in self._fixed:
            return self._fixed[number]
        if number in self._open:
            self._open[number] = self._open.pop(number)  # it was used last
            return self._open[number]
        descriptor = self._walk(number)
        self._open[number] = descriptor
        if len(self._open) > _OPEN_DIRECTORIES:
            os.close(self._open.pop(next(iter(self._open))))
        return descriptor

    def forget(self, number: int) -> None:
        """Let go of a directory that is no more."""
        self.where.pop(number, None)
        if number in self._open:
            os.close(self._open.pop(number))

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[int]:
        """Open what an entry leads to itself, of whatever kind, as O_PATH does. Raises OSError."""
        if entry.parent == ROOTS:
            yield self._fixed[entry.inode]
            return
        descriptor = open_in(self.descriptor(entry.parent), entry.name, os.O_PATH)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def find_limbos(self) -> list[int]:
        """Open the limbos that an earlier attempt has left, and return their numbers."""
        return [limbo.number for limbo in self._limbos.values() if self._find(limbo)]

    @property
    def leaves_out_names(self) -> bool:
        """Whether files may have names here that are in no epoch."""
        return bool(self._excludes)

    def is_none_of_it(self, number: int, name: bytes) -> bool:
        """Tell whether a name in a directory of an epoch is of no concern: an open limbo, or excluded."""
        limbo = self._limbos.get(number)
        if limbo is not None and limbo.inside and limbo.number != 0 and limbo.name == name:
            return True
        return number >= 0 and self._excludes.has(name, self._declared.get(number))

    def limbo_for(self, entry: Entry, ops: FileOps) -> int:
        """Return the number of the limbo on an entry's file system; it is made if it is not there."""
        number = entry.parent
        while number not in self._fixed:
            number = self.entry_of(number).parent
        if number not in self._limbos:
            return number  # it is in one already
        limbo = self._limbos[number]
        if not limbo.number:
            with explained("make", lambda: readable(limbo.name)):
                ops.make_directory(limbo.parent, limbo.name)
            if not self._find(limbo):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return limbo.number

    def remove_limbos(self, ops: FileOps) -> None:
        """Remove the limbos, which must be empty."""
        for limbo in self._limbos.values():
            if limbo.number:
                with explained("remove", lambda name=limbo.name: readable(name)):  # type: ignore[misc]
                    ops.remove_directory(limbo.parent, limbo.name)
                limbo.number = 0

    def _open_root(self, number: int, path: Path) -> None:
        descriptor = self._keep(os.open(path, _DIRECTORY | os.O_CLOEXEC))
        self._fixed[number] = descriptor
        self.roots[number] = path
        parent = self._keep(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        inside = _is_mount_point(parent, os.fsencode(path.name))
        self._limbos[number] = _Limbo(descriptor if inside else parent, limbo_name(path), inside)

    def _find(self, limbo: _Limbo) -> bool:
        """Open a limbo; False if it is not there, or something else is."""
        with explained("open", lambda: readable(limbo.name)):
            try:
                descriptor = self._keep(open_in(limbo.parent, limbo.name, _DIRECTORY))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    return False
                raise
        limbo.number = self.new_number()
        self._fixed[limbo.number] = descriptor
        return True

    def _keep(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _walk(self, number: int) -> int:
        """Open a directory from the nearest one above it that is open."""
        names: list[bytes] = []
        while number not in self._fixed and number not in self._open:
            entry = self.entry_of(number)
            names.append(entry.name)
            number = entry.parent
        above = self._fixed[number] if number in self._fixed else self._open[number]
        with ExitStack() as last:
            for name in reversed(names):
                above = open_in(above, name, _DIRECTORY)
                last.close()
                last.callback(os.close, above)
            last.pop_all()
        return above


def inside_of(roots: Mapping[bytes, Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each of these directories that lies in another one (or is it), and that one."""
    for declared, path in roots.items():
        for other, above in roots.items():
            if declared != other and path.is_relative_to(above):
                yield path, above


def _is_mount_point(parent: int, name: bytes) -> bool:
    try:
        os.close(open_in(parent, name, os.O_PATH | os.O_DIRECTORY))
    except OSError as error:
        if error.errno == errno.EXDEV:
            return True
        raise
    return False
