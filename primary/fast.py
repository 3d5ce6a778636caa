"""The fast memory backend: pages are copied while the workload runs; frozen, only what was written since.

    running   find the processes, track them, copy what was written (pre-copy)     primary.tracking
              read a few clean pages, and compare them with what is believed       primary.verification
              criu is asked to dump, and hides the pages that are ours              native/shim.c
    frozen    criu writes everything but memory; beside it, the dirty pages are copied
              that criu leaves alone; at its `post-dump` hook, the rest of them      native/pages.c
    running   identify them, put CRIU's pages and ours together: CapturedEpoch

An epoch that would freeze for long, because much is dirty at the freeze, is abandoned at the hook, copied
while it runs, and tried again. After `_ATTEMPTS` of them the freeze is accepted: slower, never wrong.

An epoch in which a clean page turns out not to be what it was believed to be is not used at all: nothing is
believed any more of that process's memory, all of it is read again, and the epoch is tried anew.

Nothing that was copied is lost with an epoch that fails: a page that was read after it was protected is known
until the kernel reports it written (`primary.book`), whichever epoch takes it in.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from common.config import NodeConfig
from common.container import workload_pids
from common.criu.images import PageImage, SpaceKey, page_images, read_memory_map
from common.errors import CaptureError
from common.identity import PageHasher
from common.model import EpochId
from common.threads import in_thread
from primary.book import PageBook
from primary.capture import CapturedEpoch, SpacePages
from primary.criu_pages import stack_pages, take_criu_pages
from primary.dumping import Dumped, Dumper, metadata_in
from primary.freezer import Work
from primary.layers import LayerChain, LayeredPages, LayerWriter
from primary.page_set import PageSet
from primary.pages import FrozenBuffer, FrozenCall
from primary.process import TrackedProcess
from primary.shim import ShimChannel
from primary.tracking import TrackerName, make
from primary.verification import Mismatch, Verification

log = structlog.get_logger(__name__)

_ATTEMPTS = 4
_FIRST_BUFFER_PAGES = 2048
_MOST_FROZEN_PAGES = 8192
"""Dirty pages that are copied within a freeze without a second thought: about 25 ms."""
_MOST_BUFFER_PAGES = 131_072
"""Half a GiB, about 0.4 s: criu gives up when its hook is not answered for a second."""
_TOO_LITTLE_ROOM = (errno.E2BIG, errno.EMLINK, errno.ENOBUFS, errno.ENOSPC)
_BACKFILL_S = 0.1
"""How long an epoch may wait for pages that only a new replica needs."""
_REMOVER = ThreadPoolExecutor(1, "images")


class TooDirtyError(CaptureError):
    """More pages were dirty at the freeze than may be copied within it; the workload runs on."""

    def __init__(self, pages: int) -> None:
        super().__init__(f"{pages} pages were dirty at the freeze: it was abandoned, and is tried again")
        self.pages = pages


class UnseenWriteError(CaptureError):
    """Pages changed without their tracking noticing; all of their process's memory is read again."""


def room_after(room: int, dirty: int, *, copies_ahead: bool) -> int:
    """Return for how many dirty pages there is room in the next freeze, after one with `dirty`.

    Twice as many as needed lately: what goes beyond it costs an abandoned epoch, and room for a burst of long
    ago costs memory (it halves in 44 epochs). Where nothing is copied ahead, every freeze needs the same.
    """
    if not copies_ahead:
        return max(room, dirty)
    return max(_FIRST_BUFFER_PAGES, room * 63 // 64, min(2 * dirty, _MOST_FROZEN_PAGES))


class FastBackend:
    """Takes epochs of one incarnation of one workload; one at a time."""

    name = "fast"

    def __init__(
        self,
        config: NodeConfig,
        dumper: Dumper,
        *,
        workload: str,
        incarnation: str,
        hasher: PageHasher,
        verification: Verification | None = None,
        tracker: TrackerName | None = None,
    ) -> None:
        """`dumper` says what to capture, with the shim; `verification`, what is compared (None: nothing).

        Without a `tracker`, the best that works here. Raises UnsupportedError if it, or none, does.
        """
        self._config = config
        self._dumper = dumper
        self._workload = workload
        self._incarnation = incarnation
        self._hasher = hasher
        self._tracker = make(tracker, self._stand_still)
        self._stopped_ms = 0.0
        """How long the workload stood still since the last epoch, before freezes."""
        self._processes: dict[int, TrackedProcess] = {}
        self._shared: dict[SpaceKey, PageBook] = {}
        self._metadata_bytes = 0
        self._verification = verification or Verification(0)
        self._room_pages = _FIRST_BUFFER_PAGES
        self._dirty_pages = 0
        """How many were copied within the last freeze."""
        self._buffer = FrozenBuffer(self._room_pages)
        self._call = FrozenCall(self._buffer)
        self._chain: LayerChain | None = None
        self._writer: LayerWriter | None = None
        self._taken: list[TrackedProcess] = []
        self._early: list[TrackedProcess] = []
        """Those of which the last freeze copied something early that is not taken in yet."""
        self._ran_on: list[TrackedProcess] = []
        """Of these, whoever may not have stood still all the time."""
        self._wants_all = False
        """A replica lacks pages that no layer has."""

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """See `CaptureBackend.capture`."""
        try:
            return await self._attempts(epoch, since)
        finally:
            if self._tracker.copies_ahead:  # what one epoch had to accept is no measure for the next
                self._room_pages = min(self._room_pages, _MOST_FROZEN_PAGES)

    async def _attempts(self, epoch: EpochId, since: EpochId | None) -> CapturedEpoch:
        too_dirty = False
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(epoch, since, again=too_dirty)
            except UnseenWriteError:
                continue
            except TooDirtyError as error:
                too_dirty = True
                log.info("capture.too_dirty", workload=self._workload, epoch=str(epoch), pages=error.pages)
                if attempt == _ATTEMPTS - 1:
                    self._room_pages = max(self._room_pages, min(error.pages * 2, _MOST_BUFFER_PAGES))
                elif error.pages <= _MOST_FROZEN_PAGES or not self._tracker.copies_ahead:
                    self._room_pages = max(self._room_pages, error.pages * 5 // 4)
        raise CaptureError(f"epoch {epoch} of {self._workload}: {_ATTEMPTS} attempts at it came to nothing")

    async def close(self) -> None:
        """Stop tracking, and let go of everything; the workload is not touched. Idempotent."""
        await self._dumper.close()
        for process in self._processes.values():
            self._tracker.let_go(process)
        self._processes.clear()
        self._shared.clear()
        self._taken.clear()
        self._early.clear()
        self._buffer.resize(0)
        if self._writer is not None:
            self._writer.drop()
            self._writer = None
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    # --- one attempt --------------------------------------------------------------------------------

    async def _attempt(self, epoch: EpochId, since: EpochId | None, *, again: bool) -> CapturedEpoch:
        directory = self._dumper.directory / str(epoch)
        try:
            directory = await in_thread(self._dumper.make_room, epoch, self._metadata_bytes)
            await self._find_processes()
            await in_thread(self._begin, since)
            processes = list(self._processes.values())
            await self._tracker.copy_ahead(processes, self._hasher, self._writer_of(), again=again)
            await in_thread(self._backfill, since)
            await in_thread(self._look)
            channel = await self._dumper.spawned()
            if channel is None:
                raise CaptureError("criu was started without the shim")
            await in_thread(self._plan, channel)
            self._taken = []
            try:
                dumped = await self._dumper.dump(directory, self._take_frozen, self._take_early)
                await in_thread(self._keep_early, self._not_taken())
                await in_thread(self._compare, epoch)
                spaces = await in_thread(self._assemble, epoch, directory)
            except BaseException:
                await in_thread(self._after_failure)
                raise
            stands_on = await in_thread(self._stands_on, spaces)
            return self._captured(epoch, dumped, directory, spaces, stands_on)
        except BaseException as error:
            await in_thread(partial(shutil.rmtree, directory, ignore_errors=True))
            if isinstance(error, OSError):
                raise CaptureError(f"epoch {epoch} of {self._workload}: {error}") from error
            raise

    def _captured(
        self,
        epoch: EpochId,
        dumped: Dumped,
        directory: Path,
        spaces: tuple[SpacePages, ...],
        stands_on: EpochId | None,
    ) -> CapturedEpoch:
        chain = self._chain_of(directory.parent)
        metadata = metadata_in(directory)
        self._metadata_bytes = sum(file.size_bytes for file in metadata)
        stopped_ms, self._stopped_ms = self._stopped_ms, 0.0
        return CapturedEpoch(
            workload=self._workload,
            id=epoch,
            incarnation=self._incarnation,
            stands_on=stands_on,
            frozen_wall_s=dumped.frozen_wall_s,
            freeze=replace(dumped.times, ahead_ms=stopped_ms),
            spaces=spaces,
            metadata=metadata,
            pages=_EpochPages(
                directory, LayeredPages(chain.layers, {space.key: space.pages for space in spaces})
            ),
        )

    # --- while it runs ------------------------------------------------------------------------------

    async def _stand_still(self, work: Work) -> None:
        """Have it stand still ahead of the freeze, and count how long, whatever comes of it."""
        begun_s = time.monotonic()
        try:
            stopped_ms = await self._dumper.stand_still(work)
        except BaseException:
            stopped_ms = (time.monotonic() - begun_s) * 1000  # at most: how far it came is not known
            raise
        finally:
            self._stopped_ms += stopped_ms

    async def _find_processes(self) -> None:
        """Take up processes that came, let go of those that went, and see that all are tracked."""
        pids = await in_thread(workload_pids, self._config, self._workload)
        for pid in self._processes.keys() - set(pids):
            self._tracker.let_go(self._processes.pop(pid))
        undecided: list[TrackedProcess] = []
        for pid in pids:
            process = self._processes.get(pid)
            if process is None or not process.is_same:
                if process is not None:
                    self._tracker.let_go(process)
                try:
                    process = self._processes[pid] = TrackedProcess(pid, self._tracker.space(pid))
                except CaptureError:  # it has ended since
                    self._processes.pop(pid, None)
                    continue
                undecided.append(process)
            elif process.borrows:
                undecided.append(process)
        owners = [process for process in self._processes.values() if process not in undecided]
        for process in sorted(undecided, key=lambda each: each.started_ticks):  # parents before children
            if not process.borrows_from(owners):
                owners.append(process)
        for process in list(self._processes.values()):
            try:
                await self._tracker.take_up(process)
            except CaptureError:
                self._tracker.let_go(self._processes.pop(process.pid))

    def _begin(self, since: EpochId | None) -> None:
        """Let go of what all replicas have."""
        chain = self._chain_of(self._dumper.directory)
        if since is not None:
            chain.drop_through(since)
        chain.merge(self._present())

    def _backfill(self, since: EpochId | None) -> None:
        """Copy what only a new replica needs."""
        chain, writer = self._chain_of(self._dumper.directory), self._writer_of()
        self._wants_all = chain.stands_on is not None and (since is None or since < chain.stands_on)
        if self._wants_all:
            until_s = time.monotonic() + _BACKFILL_S
            for process in self._processes.values():
                try:
                    process.copy_uncovered(self._hasher, writer, chain, until_s)
                except CaptureError as error:
                    if process.has_memory:
                        raise
                    log.debug("capture.process_ended", pid=process.pid, error=str(error))

    def _look(self) -> None:
        """Read the pages whose turn it is to be compared."""
        due = {each.key: each for each in self._verification.plan(self._private)}
        for process in self._processes.values():
            try:
                process.look(self._hasher, due.get(process.key))
            except CaptureError as error:  # it has ended, or is compared in the next round
                log.debug("verify.not_looked", pid=process.pid, error=str(error))

    def _plan(self, channel: ShimChannel) -> None:
        """Last of all before the freeze: what the shim may say of each process's mappings."""
        texts = {}
        for process in self._processes.values():
            process.prepare(early=self._tracker.begins_anew_frozen(process))
            if (smaps := process.smaps()) is not None:
                texts[process.pid] = smaps
        if not self._room_pages <= self._buffer.pages <= 2 * self._room_pages:
            self._buffer.resize(self._room_pages)
            self._call = FrozenCall(self._buffer)
        self._call.begin()
        channel.plan(texts)

    # --- while it is frozen -------------------------------------------------------------------------

    def _take_early(self) -> None:
        """Copy what was written since pre-copy, while criu is at work; in a thread of its own.

        What is not, for whatever reason, is copied at the end. Criu may change pages meanwhile: they count as
        written, and are copied again.
        """
        early = [
            process
            for process in self._processes.values()
            if process.space.early is not None and process.is_same
        ]
        self._early = early  # from here on they may be protected anew
        self._call.run_early([process.space for process in early], self._room_pages)
        # Criu may have given up meanwhile, and some may never have been in its hands.
        self._ran_on = [process for process in early if process.state not in "tT"]

    def _take_frozen(self, channel: ShimChannel | None) -> None:
        """Copy what is dirty; raise if it is too much, or anything is in doubt: criu then gives up."""
        if channel is None:
            raise CaptureError("criu was started without the shim")
        taken: list[TrackedProcess] = []
        for report in channel.reports():
            if not report.hides:
                raise CaptureError(f"the mappings of process {report.pid} could not be read while frozen")
            process = self._processes.get(report.pid)
            if process is None or not process.is_same:  # it has come since
                if process is not None:
                    self._tracker.let_go(process)
                space = self._tracker.space(report.pid)
                process = self._processes[report.pid] = TrackedProcess(report.pid, space)
            taken.append(process)
        spaces = [process.space for process in taken]
        self._taken = taken  # from here on they may be protected anew
        left = self._call.run(spaces, self._room_pages)
        dirty = self._dirty_pages = self._call.copied_early + left
        self._see_that_all_stood_still()
        for space in spaces:
            if space.error in _TOO_LITTLE_ROOM:
                raise TooDirtyError(0)
            if space.error:
                raise CaptureError(f"process {space.pid} could not be read: {os.strerror(space.error)}")
        if dirty > self._room_pages:
            raise TooDirtyError(dirty)
        self._room_pages = room_after(self._room_pages, dirty, copies_ahead=self._tracker.copies_ahead)

    def _see_that_all_stood_still(self) -> None:
        """Raise if a process did not stand still until it was read.

        One that was killed meanwhile has no memory any more, and looks like one without any. If bits were
        cleared of one that runs again, everything is held for doubtful: a write between reading and clearing
        them would never be told.
        """
        states = {each: each.state for each in self._taken}
        moving = {each: state for each, state in states.items() if state not in "tT"}
        if not moving:
            return
        if any(each.space.protects for each in moving):
            for process in self._taken:
                process.forget_all()
        names = ", ".join(f"{each.pid} (in state {state})" for each, state in moving.items())
        raise CaptureError(f"processes did not stand still while their memory was read: {names}")

    def _after_failure(self) -> None:
        """Hold for doubtful what the freeze protected without its being kept; make room where it lacked."""
        try:
            self._keep_early([*self._ran_on, *self._not_taken()])
        finally:
            try:
                for process in self._taken:
                    process.not_taken()
            except BaseException:
                for process in self._taken:
                    process.forget_all()
                raise

    # --- when it runs again -------------------------------------------------------------------------

    def _not_taken(self) -> list[TrackedProcess]:
        """Return who was copied early, and is none of criu's: it is in the cgroup, and ran all the time."""
        return [process for process in self._early if process not in self._taken]

    def _keep_early(self, but: Sequence[TrackedProcess]) -> None:
        """Take in what was copied early: like all pre-copy, it is good whatever became of the freeze.

        Not of those that may not have stood still to its end: where a system call of theirs wrote to a page
        after it was protected and copied, that would show nowhere.
        """
        early, self._early, self._ran_on = self._early, [], []
        try:  # of all of them, first: what cannot be written down below stays in doubt
            for process in early:
                process.doubt_early()
        except BaseException:
            for process in early:
                process.forget_all()
            raise
        for process in early:
            if process not in but:
                process.keep_early(self._hasher, self._writer_of(), self._buffer, self._missing)

    def _compare(self, epoch: EpochId) -> None:
        """See what became of the pages that differed. Raises UnseenWriteError if one is clean all the same.

        Then nothing of this freeze is used: where one write was missed, others may have been.
        """
        compared, unseen = 0, False
        for process in self._taken:
            pages, numbers = process.compare()
            compared += pages
            if len(numbers):
                unseen = True
                process.forget_all()
                self._tracker.let_go(process)  # who missed one write may miss another: it begins anew
                self._verification.found(Mismatch("", epoch, process.key, numbers, process.pid))
        self._verification.looked_at(compared)
        if unseen:
            raise UnseenWriteError(f"pages changed unseen before epoch {epoch}")

    def _assemble(self, epoch: EpochId, directory: Path) -> tuple[SpacePages, ...]:
        """Put criu's pages and ours together; what changed becomes the epoch's layer."""
        writer = self._writer_of()
        processes = {process.key: process for process in self._taken}
        spaces: list[SpacePages] = []
        stacks = stack_pages(directory)
        images = page_images(directory)
        missing = self._missing
        for image in images:
            if image.key.kind == "task":
                process = processes.pop(image.key, None)
                if process is None:
                    raise CaptureError(f"criu dumped {image.key.pagemap_name}, which the shim does not know")
                memory_map = read_memory_map(directory / f"mm-{image.key.ident}.img")
                spaces.append(
                    process.assemble(
                        self._hasher, writer, self._buffer, directory, image, memory_map, stacks, missing
                    )
                )
            else:
                spaces.append(self._assemble_shared(writer, directory, image, missing))
        if processes:
            raise CaptureError(f"criu did not dump {', '.join(key.pagemap_name for key in processes)}")
        for image in images:
            (directory / image.pages_name).unlink(missing_ok=True)
        self._shared = {key: book for key, book in self._shared.items() if key in {s.key for s in spaces}}
        self._chain_of(self._dumper.directory).append(writer.seal(epoch))
        self._writer = None
        return tuple(spaces)

    def _stands_on(self, spaces: tuple[SpacePages, ...]) -> EpochId | None:
        """Return the epoch without which the layers cannot do; None if they hold everything."""
        chain = self._chain_of(self._dumper.directory)
        if not self._wants_all:
            return chain.stands_on
        for space in spaces:
            uncovered = space.pages - chain.of(space.key)
            if len(space.identities.zeros(uncovered)) < len(uncovered):
                return chain.stands_on
        return None

    def _assemble_shared(
        self, writer: LayerWriter, directory: Path, image: PageImage, missing: LayerChain | None
    ) -> SpacePages:
        """Take over a shared segment as CRIU dumped it: whole, with what changed told by content."""
        book = self._shared.setdefault(image.key, PageBook(image.key))
        pages, lazy = take_criu_pages(self._hasher, writer, book, directory, image, missing=missing)
        book.restrict(pages)
        return book.table(lazy)

    # --- what is kept -------------------------------------------------------------------------------

    def _chain_of(self, directory: Path) -> LayerChain:
        if self._chain is None:
            self._chain = LayerChain(directory)
        return self._chain

    def _writer_of(self) -> LayerWriter:
        if self._writer is None:
            self._writer = LayerWriter(self._dumper.directory)
        return self._writer

    @property
    def _missing(self) -> LayerChain | None:
        """What has all pages but those that a replica lacks; None if none lacks any."""
        return self._chain if self._wants_all else None

    def _private(self) -> dict[SpaceKey, PageSet]:
        return {process.key: process.book.pages for process in self._processes.values()}

    def _present(self) -> dict[SpaceKey, PageSet]:
        books = [*self._shared.values(), *(process.book for process in self._processes.values())]
        return {book.key: book.pages for book in books}


class _EpochPages:
    """The layers of an epoch, and the directory with its metadata; a `PageReader`."""

    def __init__(self, directory: Path, layers: LayeredPages) -> None:
        self._directory = directory
        self._layers = layers

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """See `PageReader.read`."""
        self._layers.read(key, rows, into)

    def release(self) -> None:
        """Let go of the layers and remove the metadata. Harmless when repeated."""
        self._layers.release()
        _REMOVER.submit(shutil.rmtree, self._directory, ignore_errors=True)
