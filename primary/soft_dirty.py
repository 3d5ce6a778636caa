"""Tracking of writes by soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`), where there is no userfaultfd for it.

In: the processes of a workload. Out: copies of what they wrote, made while they ran; and at the freeze, by
`native/soft_dirty.c`, what was written since. Nothing is done inside the processes: the kernel always keeps
these bits, in every page table; clearing them begins anew.

    look     running: which pages are written, by reading /proc/PID/pagemap; nothing is cleared
    stop     much is written: the cgroup stands still, the bits are read, and cleared   (`Dumper.stand_still`)
    copy     running again: what was written before the stop
    freeze   the bits are read and cleared again; what is written or not known is copied

What must hold:
- Bits are cleared only while all tasks of the tree stand still, from before they are read until after that:
  reading and clearing are two steps, and a write in between would never be told. Where it is found afterwards
  that they did not stand still, nothing is known of their memory any more.
- A page's content is read after the bits were cleared, never before.
- A process with files open for direct I/O is cleared at freezes only, as with userfaultfd: a device that
  writes into its memory after a clear shows in no bit.
- After a copy there is a look: a page that came to another address, and went back, within the time of the
  copy is not what was copied (native/soft_dirty.c says of moves that no bit tells).

Not guaranteed: if anyone else clears the bits of a process (criu with `--track-mem`, a debugger of memory),
its writes are lost to us. That cannot be detected: one tracker a process. The bits are the kernel's, not
ours: they go on when the agent ends, and its successor, who knows no page, takes all for written. Nor is what
a kernel before 6.19 forgets of mappings that became one, if they have the bounds again that they had before
(native/soft_dirty.c).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import structlog

from common.errors import CaptureError
from common.identity import PageHasher
from common.threads import in_thread
from primary.frames import Frames
from primary.freezer import NotFrozenError, StandStill
from primary.layers import LayerWriter
from primary.page_set import PageSet
from primary.pagemap import zero_frame
from primary.pages import WRITTEN, FrozenBuffer, FrozenCall, Space, pages_in, reads_directly
from primary.process import TrackedProcess

log = structlog.get_logger(__name__)

_ROUNDS: Final = 3
_FEW_PAGES: Final = 512
_PAGES_A_DIRTY_ONE: Final = 64
"""Scanning and clearing that many pages takes about as long as copying one."""
_TRIES: Final = 8
_PASSES: Final = (errno.EBADMSG, errno.EIO)
"""Its mappings changed while they were read; another program begins in it."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of all processes while they ran, in pages."""

    written: int
    present: int
    direct: bool
    """One of them has files open for direct I/O."""

    @property
    def is_worth_a_stop(self) -> bool:
        """Whether stopping once more is shorter than copying all of it at the freeze.

        A stop takes some hundred µs, and scans and clears all that is present. What a device may write into
        must not be cleared then.
        """
        return not self.direct and self.written > _FEW_PAGES + self.present // _PAGES_A_DIRTY_ONE


class SoftDirtyTracker:
    """A `primary.tracking.Tracker`."""

    name: Literal["soft-dirty"] = "soft-dirty"
    copies_ahead = True

    def __init__(self, stand_still: StandStill) -> None:
        """Raises UnsupportedError if this kernel does not tell what is needed."""
        self._stand_still = stand_still
        self._zero_frame = zero_frame()
        self._call = FrozenCall(FrozenBuffer(0))

    def space(self, pid: int) -> Space:
        """See `primary.tracking.Tracker.space`.

        A process that is first seen at a freeze is not cleared there, which would need room for its frames:
        all that it has still reads as written afterwards.
        """
        return Space(pid, Frames(self._zero_frame))

    async def take_up(self, process: TrackedProcess) -> None:
        """Do nothing: the kernel tracks always."""

    def begins_anew_frozen(self, process: TrackedProcess) -> bool:
        """See `primary.tracking.Tracker.begins_anew_frozen`: no bits are cleared that CRIU may set."""
        return False

    def let_go(self, process: TrackedProcess) -> None:
        """Do nothing."""

    async def copy_ahead(
        self,
        processes: Iterable[TrackedProcess],
        hasher: PageHasher,
        writer: LayerWriter,
        *,
        again: bool = False,
    ) -> None:
        """See `primary.tracking.Tracker.copy_ahead`."""
        here = [process for process in processes if not process.borrows]
        look = await in_thread(self._look, here)
        # What an abandoned freeze has cleared, and nobody copied.
        if await in_thread(self._copy, here, hasher, writer, True):
            look = await in_thread(self._look, here)
        for _ in range(_ROUNDS):
            if not look.is_worth_a_stop:
                break
            try:
                await self._stop(here)
            except NotFrozenError as error:
                log.info("tracking.no_stop", reason=error.message)
                break
            await in_thread(self._copy, here, hasher, writer, False)
            before, look = look, await in_thread(self._look, here)
            if look.written > before.written // 2:
                break

    # --- in threads ---------------------------------------------------------------------------------

    def _look(self, processes: list[TrackedProcess]) -> Look:
        """See what is written, clear nothing; what is written is not known any more."""
        written = present = 0
        direct = False
        for process in processes:
            try:
                self._scan(process)
                direct |= reads_directly(process.pid)
            except CaptureError:
                if process.has_memory:
                    raise
                continue
            dirty = _written(process)
            process.book.forget(dirty)
            written += len(dirty)
            present += process.space.present_pages
        return Look(written, present, direct)

    def _scan(self, process: TrackedProcess) -> None:
        """Scan one process while it runs, with as much room as it takes."""
        space = process.space
        space.protects = False
        try:
            for _ in range(_TRIES):
                process.prepare()
                self._call.run([space])
                if not space.error:
                    return
                if not space.grow(space.error) and space.error not in _PASSES:
                    break
        finally:
            space.protects = True
        raise CaptureError(f"process {process.pid} cannot be scanned: {os.strerror(space.error)}")

    async def _stop(self, processes: list[TrackedProcess]) -> None:
        """Begin anew, with everything at rest."""
        for process in processes:
            process.prepare()
        cleared: list[TrackedProcess] = []
        try:
            await self._stand_still(partial(self._clear, processes, cleared))
        except NotFrozenError:
            raise
        except BaseException:
            for process in processes:
                process.forget_all()
            raise
        await in_thread(self._take_note, cleared)

    def _clear(
        self, processes: list[TrackedProcess], cleared: list[TrackedProcess], pids: frozenset[int]
    ) -> None:
        """Read and clear the bits of those that stand still; the others are left for the freeze."""
        cleared += [process for process in processes if process.pid in pids]
        self._call.run([process.space for process in cleared])

    def _take_note(self, processes: list[TrackedProcess]) -> None:
        for process in processes:
            process.not_taken()

    def _copy(
        self, processes: list[TrackedProcess], hasher: PageHasher, writer: LayerWriter, seen: bool
    ) -> int:
        """Copy what is not known; with `seen`, but for what the last look has seen written."""
        copied = 0
        for process in processes:
            book = process.book
            wanted = book.unknown
            try:
                if seen:
                    wanted -= _written(process)
                elif reads_directly(process.pid):  # since when is not known
                    process.forget_all()
                    continue
                copied += process.copy(hasher, writer, wanted)
            except CaptureError as error:
                if process.has_memory:
                    raise
                log.debug("capture.process_ended", pid=process.pid, error=str(error))
        return copied


def _written(process: TrackedProcess) -> PageSet:
    """Return the pages that the last scan has seen written."""
    runs = process.space.runs
    return pages_in(runs[(runs["flags"] & WRITTEN) != 0])
