"""One epoch on its way into a store: what came so far, and then its commit, its end, or what is kept of it.

In: metadata files, page numbers and pages, in any chunking. Out: a level that the store gives its name, or
nothing, or a seed: the pages of an interrupted epoch, of which the next attempt takes what is still the same,
so that a large base gets through on a line that breaks again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import structlog

from common.criu.images import PE_PARENT, SpaceKey
from common.durable import Disk
from common.errors import NoSpaceError, StoreError
from common.model import PAGE_BYTES, EpochId
from replica.holdings import Lender
from replica.level_writer import LevelWriter, Repeats, restore_text
from replica.levels import BaseError, EpochHeader, Flags, Layout, Level, Numbers, rows_in, tells_damage
from replica.store_reader import EpochRecord

_DESCRIPTORS = "descriptors.json"
_DESCRIPTORS_BYTES = 1 << 16
"""Most bytes of it: the names of three descriptors. It is kept in memory while an epoch comes."""

log = structlog.get_logger(__name__)


class Home(Protocol):
    """The store, as an arriving epoch sees it."""

    def admit(self, header: EpochHeader, made: Level, numbers: dict[SpaceKey, Numbers]) -> EpochRecord:
        """Give a finished level its name; raises StoreError if it may not have it any more."""
        ...

    def require_room(self, epoch: EpochId, expected_bytes: int, *, keep_seed: bool) -> None:
        """Raise NoSpaceError if there is no room for so much more."""
        ...

    def read_base(self, epoch: EpochId, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        """Read pages of a committed epoch, in blocks that are valid until the next one."""
        ...

    def keep_seed(self, made: Level) -> bool:
        """Keep an unfinished level to lend its pages; False: it is not worth it."""
        ...

    def pages_held(self, epoch: EpochId, key: SpaceKey) -> Numbers | None:
        """Which pages a committed epoch knows of a space; None if it has no such space."""
        ...

    def forget(self, epoch: IncomingEpoch) -> None:
        """Take note that an epoch arrives no more."""
        ...

    def wall_s(self) -> float:
        """The wall clock."""
        ...


class IncomingEpoch:
    """An epoch on its way in: metadata files and spaces in any order, then `commit` or `abort`.

    Not for several threads at once. After an error nothing but `abort` is left. As a context manager it
    aborts unless it was committed.
    """

    def __init__(
        self,
        home: Home,
        layout: Layout,
        disk: Disk,
        header: EpochHeader,
        restore_command: tuple[str, ...],
        writer: LevelWriter,
        lender: Lender | None,
    ) -> None:
        """`lender` is where `COPIED` pages come from."""
        self.header = header
        self._home = home
        self._layout = layout
        self._disk = disk
        self._restore_command = restore_command
        self._writer = writer
        self._numbers: dict[SpaceKey, Numbers] = {}
        self._lender = lender
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
                if len(self._descriptors) > _DESCRIPTORS_BYTES:
                    raise StoreError(f"{name} has more than {_DESCRIPTORS_BYTES} bytes")

    def space(self, key: SpaceKey, numbers: Numbers, flags: Flags, sources: Numbers | None = None) -> None:
        """Announce an address space: its pages, ascending, and a flags byte each; shape (n,).

        PE_PARENT: unchanged, the base has it. PE_PRESENT: its bytes follow. `ZERO`: changed, and all zeros
        now, so that none follow. `COPIED`: changed, but the seed has it as it is now. `REPEATED`: changed,
        and like the page that `sources` (one for each of these) says. PE_LAZY is kept.
        Raises StoreError for what cannot be, and BaseError for pages that the base or the seed does not have:
        CRIU would fail at restore; NoSpaceError if there is no room for what repeats others: a few bytes that
        came may stand for many.
        """
        with self._step():
            if sources is not None and len(sources):
                room_bytes = len(sources) * PAGE_BYTES
                self._home.require_room(self.header.id, room_bytes, keep_seed=self._lender is not None)
            repeats = None if sources is None or not len(sources) else Repeats(sources, self._read_base)
            self._writer.space(key, numbers, flags, self._lender, repeats)
            inherited = numbers[(flags & PE_PARENT) != 0]
            if inherited.size:
                held = self._pages_of_base(key)
                if held is None or (rows_in(held, inherited) < 0).any():
                    raise BaseError(
                        f"{key.pagemap_name} has unchanged pages that {self.header.base} does not have"
                    )
            self._numbers[key] = numbers.copy()

    def _read_base(self, key: SpaceKey, numbers: Numbers) -> Iterator[memoryview]:
        if self.header.base is None:
            raise BaseError("pages are said to be like those of the base, and there is none")
        try:
            yield from self._home.read_base(self.header.base, key, numbers)
        except StoreError as error:
            raise BaseError(f"pages of {self.header.base} cannot be taken over: {error.message}") from error

    def _pages_of_base(self, key: SpaceKey) -> Numbers | None:
        if self.header.base is None:
            return None
        try:
            return self._home.pages_held(self.header.base, key)
        except StoreError as error:
            if tells_damage(error):
                raise BaseError(f"{self.header.base} is damaged: {error.message}") from error
            raise

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
            view = self._layout.view(self.header.id)
            text = restore_text(view, self._restore_command, self._descriptors)
            made = self._writer.finish(self._layout, self.header, self._home.wall_s(), text)
            record = self._home.admit(self.header, made, self._numbers)
        self._over = "was committed"
        self._home.forget(self)
        return record

    def interrupt(self) -> None:
        """Give it up, but keep the pages that came for the next attempt, if that pays; see `abort`."""
        if self._over:
            self.abort()
            return
        try:
            kept = self._home.keep_seed(self._writer.finish_seed(self.header))
        except (StoreError, NoSpaceError) as error:
            log.info("store.seed_not_kept", epoch=str(self.header.id), reason=error.message)
            kept = False
        if not kept:
            self.abort()
            return
        self._over = "was aborted"
        self._home.forget(self)

    def abort(self) -> None:
        """Drop it, with all that came. Harmless when repeated or after a commit."""
        if self._over in ("was committed", "was aborted"):
            return
        self._over = "was aborted"
        self._home.forget(self)
        try:
            self._writer.close()
        finally:
            self._disk.remove_tree(self._writer.directory, op="abort.remove")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Let nothing but `abort` follow an error: what was half written must not be committed."""
        if self._over:
            raise StoreError(f"epoch {self.header.id} {self._over}")
        self._over = "failed before"
        yield
        self._over = ""
