"""Captures the files of a workload: what changed, as it is at the instant of an epoch.

In: the declared directories, and who may have files open there. Out: the spaces of pages that an epoch has of
them, and their content for as long as a replica may need it.

    running   what was reported as changed is looked at and identified, so that little is left    ahead
    frozen    what was reported since, and what is open or mapped, is looked at once more    begin, take
    running   all that was found goes into the book; an epoch has it from there                   settle, seal

What is reported comes from `primary.file_watch`; without it everything is scanned, also while frozen. Of
large files `primary.file_writes` tells which pages may have changed, in whatever way. Of the others, stores
through a shared mapping are reported by nobody: a file that is, or was at the last epoch, mapped shared is
read at every freeze, and of one that is open the times are compared (where a store moves none, it is read).

Content that did not change lately is read from the file itself when it is sent, and believed only if it is
what it was: else that epoch cannot be sent, and a newer one can.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import CaptureError
from common.excludes import NOTHING, Excludes
from common.file_records import Record
from common.identity import PageHasher
from common.model import EpochId
from primary.capture import SpacePages
from primary.file_book import FileBook, FileId, Node, Seen
from primary.file_epoch import EpochFiles
from primary.file_intake import FileIntake
from primary.file_look import Directory, Place, QuickLook, opened
from primary.file_reader import Content, FileReader, FilesError, Found, How, UnreadableError
from primary.file_scrub import FileScrub, Suspicions, Unlike
from primary.file_watch import SYSTEM_BYTES
from primary.file_writes import FileWrites
from primary.open_files import is_writable, mapped_by, opened_by, timeless

log = structlog.get_logger(__name__)

_RAW_BYTES: Final = 8 << 20
"""Files up to that size are kept as they are while frozen, and identified later."""
_MOST_FROZEN_BYTES: Final = 64 << 20
"""So much may be read while frozen without a second thought: about 20 ms."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME
_DIRECTORIES_AT_ONCE: Final = 256
"""So many are open at a time."""
_LEFT_TO_FREEZE: Final = 1024
"""So many pages of a large file that were written may be left for the freeze to read: a millisecond."""
_SAY_EVERY_S: Final = 5.0
_HEARD_EACH: Final = 1000
"""Entries that are looked at between two times that reports are heard."""


class TooMuchWrittenError(FilesError):
    """More was written to files than may be read within a freeze; the workload runs on."""


class Hint(Protocol):
    """Something about an entry of a directory may have changed."""

    @property
    def handle(self) -> bytes:
        """The directory, as `Watch.key_of` calls it; empty: only the object is told."""
        ...

    @property
    def name(self) -> bytes:
        """The entry; `.` is the directory itself."""
        ...

    @property
    def object(self) -> bytes:
        """What the entry led to; empty: that is not told."""
        ...

    @property
    def content(self) -> bool:
        """Only what the object holds, or its attributes, may have changed."""
        ...


class Hints(Protocol):
    """What was reported."""

    @property
    def changed(self) -> Iterable[Hint]:
        """Entries, each once."""
        ...

    @property
    def overflowed(self) -> bool:
        """Whether there may be more."""
        ...


class Watch(Protocol):
    """Who reports changes: `primary.file_watch.FileWatch`."""

    def drain(self) -> Hints:
        """Return what was reported since the last call."""
        ...

    def key_of(self, descriptor: int) -> bytes:
        """Tell how an open file or directory is called in hints."""
        ...

    def open(self, key: bytes, flags: int) -> int | None:
        """Open what is called so, wherever it is; None: it is gone."""
        ...

    def handle_of(self, key: bytes) -> tuple[int, bytes]:
        """Return what a key is made of: something open on its file system, and a `struct file_handle`."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class FileCapture:
    """The files of one incarnation of one workload. `take` is called in a freeze, all else while it runs."""

    def __init__(
        self,
        roots: Mapping[bytes, Path],
        *,
        hasher: PageHasher,
        layers: Path,
        pids: Callable[[], Iterable[int]],
        watch: Watch | None,
        writes: FileWrites | None = None,
        excludes: Excludes = NOTHING,
        adopt: Callable[[], Iterable[Record]] = tuple,
        on_missed: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`roots`: declared paths, and where these directories are on this node.

        `adopt` returns the records of an epoch that this is about to go on from; see `FileBook.adopt`.

        `on_missed` is told in a sentence when something had changed that was not reported: see
        `primary.file_scrub`. All is looked at again then.

        `layers` is where contents are kept for a while; `pids` tells whose files may be open. `writes`
        follows large files; it is closed with this. `excludes` says what is left out.
        """
        self._roots = roots
        self._pids = pids
        self._watch = watch
        self._book = FileBook(hasher)
        self._writes = writes or FileWrites()
        self._reader = FileReader(self._book, roots, hasher, watch, self._writes, excludes)
        self._intake = FileIntake(self._book, self._reader, self._writes, hasher, layers)
        self.scanned = 0
        """How many files were looked at so far, while all are; 0: they are not."""
        self._scan_due = True
        self._sealed = False
        self._left: defaultdict[bytes, set[bytes]] = defaultdict(set)
        """By directory (its key), names that were not looked at yet since something was told of them."""
        self._left_objects: set[bytes] = set()
        """Keys of files, likewise."""
        self._again: set[bytes] = set()
        """Keys that the book may have when that freeze is over."""
        self._taken: list[Found | _Files | _Names] = []
        """In the order in which it was found: a freeze may take several attempts."""
        self._quick = QuickLook(handles=watch is not None)
        self._scrub = FileScrub(self._book, self._reader, self._writes, hasher)
        self._suspicions = Suspicions()
        self._on_missed = on_missed
        self._mapped: frozenset[FileId] = frozenset()
        self._now_mapped: frozenset[FileId] = frozenset()
        self._begun = False
        self._frozen_bytes = 0
        self._patient = False
        self._timeless = timeless(roots.values())
        self._adopt: Callable[[], Iterable[Record]] | None = adopt

    @property
    def files(self) -> int:
        """How many inodes are known."""
        return len(self._book)

    # --- the parts of an epoch ----------------------------------------------------------------------

    def ahead(self, since: EpochId | None) -> None:
        """Look at what was reported, while the workload runs. All replicas that are there hold `since`."""
        self._intake.prune(since)
        how = How(raw_bytes=0, keep=self._sealed, timeless=self._timeless)
        if self._adopt is not None:
            self._book.adopt(self._adopt())
            self._adopt = None
        self._intake.take_in(self._look(how, frozen=False))
        if self._watch is not None and self._is_more_missed(how):
            self._intake.take_in(self._look(how, frozen=False))
        with self._intake.lock:
            self._book.adopted()
        for file in self._writes.followed:
            if self._book.find(file) is None:
                self._writes.forget(file)
        self._intake.keep_wanted()

    def begin(self, *, patient: bool) -> None:
        """Begin with `take`, in any thread, as soon as all stands still; `take` has the rest then.

        Criu is at work meanwhile, and may still make names of its own. Raises as `take` does.
        """
        if self._watch is not None and not self._scan_due:
            self.take(patient=patient)
            self._begun = True

    def take(self, *, patient: bool) -> None:
        """Look at the rest, while all stands still. Raises TooMuchWrittenError, unless `patient`."""
        first, self._begun = not self._begun, False
        always = frozenset(self._writes.told())  # a device may have done what it was asked to
        if first:
            self._frozen_bytes, self._patient = 0, patient
            always |= self._open_files().union(self._writes.in_doubt())
        self._hear()
        if self._scan_due and self._watch is not None:
            raise TooMuchWrittenError("reports of changes were lost: everything is looked at while it runs")
        how = How(raw_bytes=_RAW_BYTES, still=True, always=always, room=self._room, timeless=self._timeless)
        # What was found before an error is as good as what a whole round finds.
        if self._watch is None:
            for found in self._look(how, frozen=True):
                self._taken.append(found)
        else:
            if not first:
                self._take_new(self._watch, how)
            self._take_hinted(self._watch, how)

    def settle(self) -> None:
        """Take in what was found while frozen, whatever became of the freeze."""
        self._begun = False
        self._mapped |= self._now_mapped  # until an epoch was sealed without them: stores may move no time
        taken, self._taken = self._taken, []
        try:
            self._intake.take_in(
                chain.from_iterable(
                    (each,) if isinstance(each, Found) else each.found(self._quick) for each in taken
                )
            )
        except BaseException:  # the rest of it is lost
            self._scan_due = True
            for file in self._writes.followed:
                self._writes.doubt(file)
            raise
        finally:
            self._quick.begin()

    def seal(self, epoch: EpochId) -> tuple[tuple[SpacePages, ...], EpochFiles]:
        """Make it part of an epoch. Raises CaptureError if something could not be read."""
        if self._left or self._left_objects:
            raise CaptureError("not all files that changed could be read; it is tried again")
        with self._intake.lock:
            spaces, records, extras = self._book.seal()
        layered = self._intake.seal(epoch)
        self._sealed = True
        self._mapped = self._now_mapped
        return spaces, EpochFiles(self._intake, spaces, layered, records, extras)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._watch is not None:
            self._watch.close()
        self._writes.close()
        self._intake.close()

    # --- looking ------------------------------------------------------------------------------------

    def _look(self, how: How, *, frozen: bool) -> Iterator[Found]:
        self._reader.begin()
        self._hear()
        if self._scan_due or self._watch is None:
            how.everything, self._scan_due = True, False
            self._left.clear()
            self._left_objects.clear()
            try:
                yield from self._everything(how)  # what is reported meanwhile stays due
            except BaseException:
                self._scan_due = True
                raise
            finally:
                how.everything = False
        else:
            yield from self._hinted(how)
        if frozen:
            yield from self._candidates(how)
        else:
            written = [self._book.find(file) for file in self._writes.in_doubt(_LEFT_TO_FREEZE)]
            for node in {*self._book.take_unsettled(), *filter(None, written)}:
                with contextlib.suppress(UnreadableError):  # then a freeze reads it once more, if it is open
                    yield from self._itself(node, how)

    def _is_more_missed(self, how: How) -> bool:
        """Look at some files of which nothing was reported, and tell whether more must have been missed.

        What has changed may still be reported, for a while. After that all is to be looked at.
        """
        told: list[Unlike] = []
        self._reader.begin()
        self._intake.take_in(self._unlike(how, told))
        in_use = self._in_use() if told else frozenset()
        for each in told:
            if each.found.seen is None or each.found.seen.id not in in_use:
                self._suspicions.add(each)
        if self._suspicions:
            self._hear()
        missed = self._suspicions.overdue()
        if content := self._scrub.some_content():
            missed.append(content)
        for what in missed:
            log.error("capture.change_not_reported", what=what)
            self._on_missed(what)
        self._scan_due = self._scan_due or bool(missed)
        return bool(missed)

    def _unlike(self, how: How, told: list[Unlike]) -> Iterator[Found]:
        """Yield what is not as it is known; `told` gets what an epoch would have otherwise."""
        for each in self._scrub.some(how, self._is_due):
            if each.what:
                told.append(each)
            yield each.found

    def _in_use(self) -> frozenset[FileId]:
        """Find the files that may be, or lately were, stored to through a mapping: that is not reported."""
        found = set(self._mapped)
        for pid in self._pids():
            found |= mapped_by(pid)
            found |= {(status.st_dev, status.st_ino) for status, at in opened_by(pid) if is_writable(at)}
        return frozenset(found)

    def _is_due(self, directory: bytes, name: bytes, file: bytes) -> bool:
        """Tell whether an entry (empty: a directory) was reported, and is still to be looked at."""
        names = self._left.get(directory, ())
        return bool(names) if not name else name in names or file in self._left_objects

    def _everything(self, how: How) -> Iterator[Found]:
        """Look at all there is, and say from time to time how far that has come."""
        said_s = time.monotonic()
        try:
            for path, directory in self._roots.items():
                for found in self._root(path, directory, how):
                    self.scanned += 1
                    yield found
                    if self.scanned % _HEARD_EACH == 0:  # there is no room for all that is reported meanwhile
                        self._hear()
                    if time.monotonic() - said_s > _SAY_EVERY_S:
                        said_s = time.monotonic()
                        log.info("capture.files_scanned", directory=str(directory), files=len(self._book))
        finally:
            self.scanned = 0

    def _hear(self) -> None:
        """Take note of what was reported."""
        if self._watch is not None:
            self._left_objects |= self._again
            self._again = set()
            drained = self._watch.drain()
            self._scan_due = self._scan_due or drained.overflowed
            if drained.overflowed:
                self._suspicions.clear()
            knows_file, leads_only_to = self._book.knows_file, self._book.leads_only_to
            for hint in drained.changed:
                if self._suspicions:
                    self._suspicions.told(hint.handle, hint.name, hint.object)
                if hint.content and knows_file(hint.object):
                    self._left_objects.add(hint.object)
                    continue
                if hint.handle:
                    self._left[hint.handle].add(hint.name)
                if hint.object and not leads_only_to(hint.handle, hint.name, hint.object):
                    self._left_objects.add(hint.object)

    def _take_hinted(self, watch: Watch, how: How) -> None:
        """Look at what was reported, and at what may have changed without a report: most of it at once."""
        self._reader.begin()
        self._take_files(watch, how)
        names = {
            directory: told
            for handle, told in self._left.items()
            if (directory := self._book.by_key(handle)) is not None
        }
        directories = list(names)
        for first in range(0, len(directories), _DIRECTORIES_AT_ONCE):
            part = directories[first : first + _DIRECTORIES_AT_ONCE]
            with opened([watch.handle_of(node.key) for node in part]) as found:
                all_opened = list(zip(part, found, strict=True))
                self._take_names([each for each in all_opened if each[0].id == each[1].id], names, how)
            for node, opened_one in all_opened:
                if node.id != opened_one.id:
                    self._taken += self._entries(node, names[node] | {b"."}, how)
        self._left.clear()
        self._left_objects.clear()

    def _take_new(self, watch: Watch, how: How) -> None:
        """Look at what was reported of directories that were found in this freeze: the book has them not."""
        unknown = {handle for handle in self._left if self._book.by_key(handle) is None}
        self._again = {key for key in self._left_objects if self._book.by_key(key) is None}
        found = [each for each in self._taken if isinstance(each, Found) and each.key in unknown]
        for each in found:
            if each.seen is None:
                continue
            try:
                fd = watch.open(each.key, _DIRECTORY)
            except OSError as error:
                raise UnreadableError(f"a directory cannot be opened: {error.strerror}") from error
            if fd is None:
                continue
            try:
                for name in self._left.pop(each.key, ()):
                    if name != b".":
                        self._taken += self._reader.look(each.seen.id, fd, name, how)
                self._taken.append(self._reader.itself(fd))
            finally:
                os.close(fd)

    def _take_files(self, watch: Watch, how: How) -> None:
        """Look at files that are known, whatever their names are by now."""
        told = [self._book.by_key(key) for key in self._left_objects]
        told += [self._book.find(file) for file in how.always]
        nodes: list[Node] = []
        others: list[Node] = []
        for node in dict.fromkeys([*told, *self._book.linked_elsewhere]):
            if node is not None and node.names and not node.is_directory:
                (nodes if stat.S_ISREG(node.inode.mode) else others).append(node)
        at_ns = time.time_ns()
        looks, left = self._quick.look_by_handle([watch.handle_of(node.key) for node in nodes])
        self._taken.append(_Files(looks, nodes, at_ns))
        self._room(int(looks["st_size"].sum()))
        for node in [*others, *(nodes[row] for row in left)]:
            self._taken += self._itself(node, how)

    def _take_names(
        self, there: list[tuple[Node, Directory]], names: Mapping[Node, set[bytes]], how: How
    ) -> None:
        entries = [
            (node, Place(directory.fd, name))
            for node, directory in there
            for name in names[node]
            if name != b"." and not self._reader.is_excluded(node.id, name)
        ]
        at_ns = time.time_ns()
        looks, left = self._quick.look([place for _, place in entries])
        self._taken.append(_Names(looks, entries, at_ns))
        self._room(int(looks["st_size"].sum()))
        for row in left:
            node, place = entries[row]
            self._taken += self._reader.look(node.id, place.directory, place.name, how)
        for node, directory in there:
            # Its times tell whether names came or went, which is reported of those alone.
            if directory.mtime_ns != node.inode.mtime_ns or b"." in names[node]:
                self._taken.append(self._reader.itself(directory.fd))

    def _root(self, path: bytes, directory: Path, how: How) -> Iterator[Found]:
        for found in self._reader.look(None, None, os.fsencode(directory), how):
            yield found if found.parent is not None else _renamed(found, path)

    def _hinted(self, how: How) -> Iterator[Found]:
        """Look at what was reported, one directory after the other; what cannot be looked at stays due."""
        for handle, names in list(self._left.items()):
            directory = self._book.by_key(handle)
            if directory is not None:
                try:
                    # With the directory itself: its times moved too, perhaps.
                    yield from self._entries(directory, names | {b"."}, how)
                except UnreadableError as error:
                    log.info("capture.file_not_read", reason=error.message)
                    continue  # the freeze tries again
            del self._left[handle]
        for key in list(self._left_objects):  # perhaps by a name that it has no more
            node = self._book.by_key(key)
            if node is not None and not node.is_directory:
                try:
                    yield from self._itself(node, how)
                except UnreadableError as error:
                    log.info("capture.file_not_read", reason=error.message)
                    continue
            self._left_objects.discard(key)

    def _entries(self, directory: Node, names: Iterable[bytes], how: How) -> Iterator[Found]:
        fd = self._reader.open_directory(directory)
        if fd is None and how.still:
            return  # it was moved or removed, which was reported as well
        if fd is None:  # ... or something above it is being moved just now
            raise UnreadableError(f"directory {directory.number} cannot be opened")
        try:
            for name in names:
                if name == b".":
                    yield self._reader.itself(fd)
                else:
                    yield from self._reader.look(directory.id, fd, name, how)
        finally:
            os.close(fd)

    def _itself(self, node: Node, how: How) -> Iterator[Found]:
        """Look at a file, whatever its names are by now: it may have lost some of those that are known."""
        if stat.S_ISREG(node.inode.mode):
            if (found := self._reader.file(node, how)) is not None:
                yield found
            return
        for parent, name in list(node.names):
            directory = self._book.node(parent)
            for found in self._entries(directory, (name,), how) if directory is not None else ():
                yield found
                if found.seen is not None and found.seen.id == node.id:
                    return

    def _candidates(self, how: How) -> Iterator[Found]:
        """Look at what may have changed without a report: what is open or mapped, or has a name elsewhere."""
        nodes = [self._book.find(file) for file in how.always]
        for node in [*nodes, *self._book.linked_elsewhere]:
            if node is not None:
                yield from self._itself(node, how)

    def _open_files(self) -> frozenset[FileId]:
        """Find the files whose content may have changed through a mapping."""
        mapped: set[FileId] = set()
        doubtful: set[FileId] = set()
        for pid in self._pids():
            mapped |= mapped_by(pid)
            for status, at in opened_by(pid):
                node = self._book.find((status.st_dev, status.st_ino))
                if node is None:
                    continue
                unsure = status.st_dev in self._timeless or not (node.still or node.followed)
                if not node.looks_same(status) or (unsure and is_writable(at)):
                    doubtful.add(node.id)
        self._now_mapped = frozenset(mapped)
        return frozenset(doubtful) | self._now_mapped | self._mapped

    def _room(self, size: int) -> None:
        self._frozen_bytes += size
        if self._frozen_bytes > _MOST_FROZEN_BYTES and not self._patient:
            raise TooMuchWrittenError(
                f"{self._frozen_bytes >> 20} MiB of files were to be read while frozen: it is tried again"
            )


@dataclass(frozen=True, slots=True)
class _Files:
    """What was found at once, while frozen, of files that were known."""

    looks: NDArray[np.void]
    nodes: list[Node]
    at_ns: int

    def found(self, quick: QuickLook) -> Iterator[Found]:
        for look in quick.found(self.looks):
            if look.status is not None:
                key, content = self.nodes[look.at].key, Content(look.content)
                yield Found(None, b"", Seen(look.status), key, content, self.at_ns, itself=True, still=True)


@dataclass(frozen=True, slots=True)
class _Names:
    """What was found at once, while frozen, under names."""

    looks: NDArray[np.void]
    entries: list[tuple[Node, Place]]
    at_ns: int

    def found(self, quick: QuickLook) -> Iterator[Found]:
        for look in quick.found(self.looks):
            directory, place = self.entries[look.at]
            if look.status is None:
                yield Found(directory.id, place.name, None)
                continue
            key = directory.key[:SYSTEM_BYTES] + look.handle if look.handle else b""
            seen, content = Seen(look.status), Content(look.content)
            yield Found(directory.id, place.name, seen, key, content, self.at_ns, still=True)


def _renamed(found: Found, name: bytes) -> Found:
    return replace(found, name=name)
