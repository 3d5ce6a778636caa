"""Puts one session's epochs together: what may come when, whether it is whole, and then the commit.

In: the decoded messages of one authenticated leader, in order. Out: calls to the store, and for each epoch
one outcome: `Committed`, or the `Nack` that its sender is told. No sockets and no event loop: calls block, so
they are made in a thread, one after the other.

Keeps this: the store is told to commit only an epoch of which every declared file, space and page came, in
order, from who leads the newest term known, and whose digest is that of the sender. Everything else leaves
no trace: the store's epoch is aborted.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from common.bulk import (
    HELD_PAGES,
    REPEATED,
    EpochDigest,
    pack_held,
    unpack,
    unpack_numbers,
    unpack_runs,
    with_content,
)
from common.criu.images import SpaceKey
from common.criu.pagemap import PE_PARENT
from common.errors import NoSpaceError, ProtocolError, StoreError
from common.identity import PageHasher
from common.messages import (
    AskHeld,
    AskStored,
    Begin,
    Buffer,
    Commit,
    Doubt,
    HeldPages,
    Message,
    Metadata,
    Nack,
    Pages,
    Repeats,
    Space,
)
from common.model import PAGE_BYTES
from common.terms import TermGuard
from replica.holdings import HeldPart
from replica.levels import CRIU_RESTORE, BaseError, NotHeldError, tells_damage
from replica.store import EpochHeader, EpochRecord, EpochStore, IncomingEpoch

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=np.generic)


class Phase(enum.Enum):
    """Where in an epoch a session stands."""

    IDLE = "no epoch is under way"
    FILES = "metadata files come"
    RUNS = "the runs of a space go on"
    REPEATS = "it is said what repeated pages of a space are like"
    CONTENT = "the content of a space comes"
    COMPLETE = "a space is complete"
    DISCARDING = "the epoch was given up; the rest of it is ignored"


MAY_COME: Final[dict[Phase, tuple[type[Message], ...]]] = {
    Phase.IDLE: (Begin, AskHeld, AskStored, Doubt),
    Phase.FILES: (Begin, Metadata, Space, Commit),
    Phase.RUNS: (Begin, Space),
    Phase.REPEATS: (Begin, Repeats),
    Phase.CONTENT: (Begin, Pages),
    Phase.COMPLETE: (Begin, Space, Commit),
    Phase.DISCARDING: (Begin, AskHeld, AskStored, Doubt, Metadata, Space, Repeats, Pages, Commit),
}
"""The order of messages. `Begin` may always come: whoever sends it gave up the epoch before."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The store has the epoch."""

    record: EpochRecord


@dataclass(frozen=True, slots=True)
class Told:
    """The answer to a question about what is held."""

    message: HeldPages
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Doubted:
    """The leader found that what is stored is not what it captured; the store knows."""

    doubt: Doubt


Outcome = Committed | Nack | Told | Doubted


@dataclass(slots=True)
class _Progress:
    """What an epoch under way still lacks."""

    begin: Begin
    incoming: IncomingEpoch
    digest: EpochDigest
    files_left: int
    spaces_left: int
    pages_left: int
    file: str = ""
    """Name of the metadata file of which more pieces come; empty for none."""
    key: SpaceKey | None = None
    content_left_bytes: int = 0
    repeats_left: int = 0
    numbers: tuple[NDArray[np.uint64], ...] = ()
    flags: tuple[NDArray[np.uint8], ...] = ()
    sources: tuple[NDArray[np.uint64], ...] = ()


class Assembly:
    """The epochs of one session, one at a time. Not for several threads at once."""

    def __init__(
        self,
        workload: str,
        leader: str,
        term: int,
        store: EpochStore,
        guard: TermGuard,
        restore_command: Sequence[str] = CRIU_RESTORE,
        *,
        most_memory_bytes: int,
    ) -> None:
        """`restore_command` says how stock CRIU restores this workload, but for what the images need.

        `most_memory_bytes` bounds what is taken at a sender's word: a few bytes can name any number of pages.
        """
        self._workload = workload
        self._restore_command = restore_command
        self._leader = leader
        self._term = term
        self._store = store
        self._guard = guard
        self._most_memory_bytes = most_memory_bytes
        self._phase = Phase.IDLE
        self._epoch: _Progress | None = None

    @property
    def under_way(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._epoch is not None

    def take(self, message: Message, bulk: Sequence[Buffer], frames: Sequence[Buffer]) -> Outcome | None:
        """Take in the next message; `frames` are those that it was decoded from. None: the epoch goes on.

        Raises ProtocolError for what a sound sender never says, StaleTermError if it no longer leads. The
        session is over then: call `abort`.
        """
        if not isinstance(message, MAY_COME[self._phase]):
            raise ProtocolError(f"a {type(message).__name__} came when {self._phase.value}")
        if isinstance(message, AskHeld):
            return self._tell_held(message)
        if isinstance(message, AskStored):
            return self._tell_stored(message)
        if isinstance(message, Doubt):
            self._guard.check(self._workload, self._term, self._leader)
            self._store.doubt(message.reason)
            return Doubted(message)
        if isinstance(message, Begin):
            self.abort()
            return self._begin(message, frames)
        epoch = self._epoch
        if epoch is None:
            return None  # the rest of an epoch that was given up
        try:
            if isinstance(message, Commit):
                return self._commit(epoch, message)
            epoch.digest.add(frames)
            if isinstance(message, Metadata):
                self._metadata(epoch, message, bulk[0])
            elif isinstance(message, Space):
                self._space(epoch, message, bulk[0])
            elif isinstance(message, Repeats):
                self._repeats(epoch, message, bulk[0])
            elif isinstance(message, Pages):
                self._pages(epoch, message, bulk[0])
        except (StoreError, NoSpaceError) as error:
            return self._give_up(epoch.begin, error)
        return None

    def abort(self) -> None:
        """Give up the epoch under way, if there is one; the store may keep its pages for the next one."""
        if self._epoch is not None:
            self._epoch.incoming.interrupt()
            self._epoch = None
        self._phase = Phase.IDLE

    def _tell_held(self, ask: AskHeld) -> Told:
        key = SpaceKey(ask.kind, ask.ident)
        hasher = PageHasher(int.from_bytes(ask.secret, "little"))
        try:
            part = self._store.identify(ask.epoch or ask.seed, key, ask.first_row, HELD_PAGES, hasher)
        except StoreError as error:
            # Nothing is claimed to be held then, and all of it is sent.
            log.debug("receive.cannot_tell", workload=self._workload, reason=error.message)
            numbers, identity, more = np.empty(0, np.uint64), np.empty((0, 2), np.uint64), False
        else:
            numbers, identity, more = part.numbers, part.identity, part.more
        message = HeldPages(kind=ask.kind, ident=ask.ident, pages=len(numbers), more=more)
        return Told(message, pack_held(numbers, identity))

    def _tell_stored(self, ask: AskStored) -> Told:
        key = SpaceKey(ask.kind, ask.ident)
        hasher = PageHasher(int.from_bytes(ask.secret, "little"))
        problem = ""
        part = HeldPart(np.empty(0, np.uint64), np.empty((0, 2), np.uint64), False)
        try:
            part = self._store.sample(ask.epoch, key, ask.first_page, ask.end_page, HELD_PAGES, hasher)
        except StoreError as error:
            log.debug("receive.cannot_sample", workload=self._workload, reason=error.message)
            # Damage is an answer: what cannot be read back is not stored.
            if isinstance(error, NotHeldError) or not tells_damage(error):
                problem = error.message[:4096]
        message = HeldPages(
            kind=ask.kind, ident=ask.ident, pages=len(part.numbers), more=part.more, problem=problem
        )
        return Told(message, pack_held(part.numbers, part.identity))

    def _begin(self, begin: Begin, frames: Sequence[Buffer]) -> Outcome | None:
        if begin.term != self._term or begin.epoch.term > begin.term:
            raise ProtocolError(
                f"epoch {begin.epoch} of term {begin.term} came in a session of term {self._term}"
            )
        if begin.base is not None and begin.base >= begin.epoch:
            raise ProtocolError(f"epoch {begin.epoch} stands on {begin.base}, which is not older")
        pages_bytes = begin.memory_bytes + begin.file_bytes
        if begin.memory_bytes % PAGE_BYTES or begin.file_bytes % PAGE_BYTES:
            raise ProtocolError(f"{pages_bytes} bytes of memory and files are not whole pages")
        self._guard.check(self._workload, begin.term, self._leader)
        newest = self._store.newest
        if newest is not None and begin.epoch <= newest.id:
            self._phase = Phase.DISCARDING
            return Nack(
                epoch=begin.epoch,
                reason=f"{begin.epoch} is not newer than {newest.id}, which is stored already",
                code="not-newer",
                retry_with_base=False,
            )
        if pages_bytes > self._most_memory_bytes:
            return self._give_up(
                begin,
                NoSpaceError(
                    f"{begin.epoch} has {pages_bytes} bytes of memory and files, and this node takes at most "
                    f"{self._most_memory_bytes}: four times its own memory",
                    hint="let a machine with more memory be the replica",
                ),
            )
        header = EpochHeader(
            workload=self._workload,
            id=begin.epoch,
            base=begin.base,
            incarnation=begin.incarnation,
            frozen_wall_s=begin.frozen_wall_s,
            last=begin.last,
        )
        try:
            incoming = self._store.begin(
                header,
                # How much a delta takes is not known before it is here.
                expected_bytes=pages_bytes if begin.base is None else 0,
                restore_command=self._restore_command,
                seed=begin.seed,
            )
        except (StoreError, NoSpaceError) as error:
            return self._give_up(begin, error)
        self._epoch = _Progress(
            begin=begin,
            incoming=incoming,
            digest=EpochDigest(),
            files_left=begin.metadata_files,
            spaces_left=begin.spaces,
            pages_left=pages_bytes // PAGE_BYTES,
        )
        self._epoch.digest.add(frames)
        self._phase = Phase.FILES
        return None

    def _metadata(self, epoch: _Progress, message: Metadata, block: Buffer) -> None:
        if epoch.file and epoch.file != message.name:
            raise ProtocolError(f"{message.name} came before {epoch.file} was complete")
        if not epoch.files_left:
            raise ProtocolError(f"{message.name} is more metadata than the epoch declared")
        epoch.incoming.metadata(message.name, unpack(block, message.size), more=message.more)
        epoch.file = message.name if message.more else ""
        epoch.files_left -= not message.more

    def _space(self, epoch: _Progress, message: Space, runs: Buffer) -> None:
        key = SpaceKey(message.kind, message.ident)
        if self._phase is Phase.RUNS:
            if key != epoch.key:
                raise ProtocolError(f"{key.pagemap_name} came before another space was complete")
        else:
            if epoch.file or epoch.files_left:
                raise ProtocolError("memory came before all metadata files were complete")
            if not epoch.spaces_left:
                raise ProtocolError(f"{key.pagemap_name} is one space more than the epoch declared")
            epoch.spaces_left -= 1
            epoch.key = key
        if message.pages > epoch.pages_left:
            raise ProtocolError(f"{key.pagemap_name} has more pages than the epoch declared")
        epoch.pages_left -= message.pages
        numbers, flags = unpack_runs(runs, message.pages)
        changed = int(np.count_nonzero(with_content(flags)))
        if changed != message.changed:
            raise ProtocolError(
                f"{key.pagemap_name} has {changed} changed pages and declares {message.changed}"
            )
        if epoch.begin.base is None and (flags & PE_PARENT).any():
            raise ProtocolError(f"{key.pagemap_name} has unchanged pages, but its epoch stands on nothing")
        if epoch.numbers and len(numbers) and numbers[0] <= epoch.numbers[-1][-1]:
            raise ProtocolError(f"{key.pagemap_name} goes on with pages that came before")
        if len(numbers):
            epoch.numbers += (numbers,)
            epoch.flags += (flags,)
        epoch.content_left_bytes += changed * PAGE_BYTES
        epoch.repeats_left += int(np.count_nonzero(flags & REPEATED))
        if message.more:
            self._phase = Phase.RUNS
        elif epoch.repeats_left:
            self._phase = Phase.REPEATS
        else:
            self._announce(epoch, key)

    def _repeats(self, epoch: _Progress, message: Repeats, numbers: Buffer) -> None:
        if message.pages > epoch.repeats_left or epoch.key is None:
            raise ProtocolError("more repeated pages came than their space declared")
        epoch.sources += (unpack_numbers(numbers, message.pages),)
        epoch.repeats_left -= message.pages
        if not epoch.repeats_left:
            self._announce(epoch, epoch.key)

    def _announce(self, epoch: _Progress, key: SpaceKey) -> None:
        """Tell the store of a space of which all but its content is here."""
        numbers, flags = _joined(epoch.numbers, np.uint64), _joined(epoch.flags, np.uint8)
        sources = _joined(epoch.sources, np.uint64)
        epoch.numbers, epoch.flags, epoch.sources = (), (), ()
        epoch.incoming.space(key, numbers, flags, sources)
        self._phase = Phase.CONTENT if epoch.content_left_bytes else Phase.COMPLETE

    def _pages(self, epoch: _Progress, message: Pages, block: Buffer) -> None:
        if message.raw_bytes > epoch.content_left_bytes or epoch.key is None:
            raise ProtocolError("more pages came than their space declared")
        epoch.incoming.pages(epoch.key, unpack(block, message.raw_bytes))
        epoch.content_left_bytes -= message.raw_bytes
        if not epoch.content_left_bytes:
            self._phase = Phase.COMPLETE

    def _commit(self, epoch: _Progress, message: Commit) -> Outcome:
        if epoch.file or epoch.files_left or epoch.spaces_left or epoch.pages_left:
            raise ProtocolError(
                f"{epoch.begin.epoch} is to be committed, but {epoch.files_left} files, {epoch.spaces_left} "
                f"spaces and {epoch.pages_left} pages of it did not come"
            )
        if epoch.digest.value() != message.digest:
            self._drop()
            return Nack(
                epoch=epoch.begin.epoch,
                reason="the digest of what arrived is not that of what was sent",
                code="digest",
                retry_with_base=epoch.begin.base is not None,
            )
        self._guard.check(self._workload, self._term, self._leader)
        record = epoch.incoming.commit()
        self._epoch = None
        self._phase = Phase.IDLE
        return Committed(record)

    def _drop(self) -> None:
        """Give up the epoch under way with all that came of it."""
        if self._epoch is not None:
            self._epoch.incoming.abort()
            self._epoch = None
        self._phase = Phase.IDLE

    def _give_up(self, begin: Begin, error: StoreError | NoSpaceError) -> Nack:
        """The store refused: nothing of the epoch stays, and the rest of it will be ignored."""
        self._drop()
        self._phase = Phase.DISCARDING
        if isinstance(error, NoSpaceError):
            return Nack(epoch=begin.epoch, reason=str(error), code="no-space", retry_with_base=False)
        # Another failure of the disk is no reason to send a base again, for which there may be no room.
        at_fault = isinstance(error, BaseError)
        return Nack(
            epoch=begin.epoch,
            reason=str(error),
            code="base" if at_fault else "store",
            retry_with_base=at_fault,
        )


def _joined(parts: tuple[NDArray[T], ...], kind: type[T]) -> NDArray[T]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=kind)
