"""The directories of a workload on a node that follows: kept as its newest committed epoch says.

In: epochs as they are committed; the order to take over with one. Out: directories that are that epoch's, and
what stands against it as a sentence. An epoch is acknowledged when its store has it; its directories follow,
as fast as the disk allows, always to the newest one; and are brought to what is restored before that is done.

Nothing is made while the workload may run here: whoever leads has called `bring_to` or `leave`, and `follow`
is called by followers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog

from common.errors import OutliveError, RestoreError, StoreError
from common.model import EpochId
from replica.file_tree import FileTree
from replica.store import EpochStore

log = structlog.get_logger(__name__)

_SYNC_EVERY_S: Final = 10.0
_AGAIN_S: Final = 1.0


class FollowedFiles:
    """Those of one workload; all methods belong to the event loop."""

    def __init__(self, workload: str, store: EpochStore, make_tree: Callable[[], FileTree]) -> None:
        """`make_tree` is called in a thread when a tree is needed; it may raise OutliveError."""
        self._workload = workload
        self._store = store
        self._make_tree = make_tree
        self._tree: FileTree | None = None
        self._thread = ThreadPoolExecutor(1, f"files-{workload}")
        """One thing at a time."""
        self._closed = False
        self._wanted: EpochId | None = None
        self._following: asyncio.Task[None] | None = None
        self._synced_s = time.monotonic()
        self.laid_out: EpochId | None = None
        """The newest epoch that the directories were since following began."""
        self.problem = ""
        """Why the directories are not what the newest epoch says; empty if they are, or soon will be."""

    def follow(self, epoch: EpochId) -> None:
        """Have the directories become that epoch, or a newer one that is told meanwhile."""
        self._wanted = epoch
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    async def bring_to(self, epoch: EpochId) -> None:
        """Have the directories be that epoch, for it to be restored; nothing follows until `follow` says so.

        Raises RestoreError. If it is cancelled, what is under way goes on to its end.
        """
        await self.leave()
        try:
            self.laid_out = None
            await self._do(self._apply, epoch)
            await self._do(self._forget)
        except OutliveError as error:
            raise RestoreError(
                f"the files of {epoch} could not be laid out: {error.message}", hint=error.hint
            ) from error

    async def leave(self) -> None:
        """Stop following; returns when nothing is made any more."""
        self._wanted = None
        if self._following is not None and not self._following.done():
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        self._following = None
        await self._do(int)

    async def begin(self) -> None:
        """The workload changes the directories from now on: which epoch they are is not known any more."""
        await self.leave()
        await self._do(self._forget)
        self.laid_out = None

    async def close(self) -> None:
        """Let go of it, when what is under way is done. Idempotent; nothing else may be called afterwards."""
        if not self._closed:
            await self.leave()
            self._closed = True
            self._thread.shutdown(wait=False)

    async def _follow(self) -> None:
        while (wanted := self._wanted) is not None:
            try:
                await self._do(self._apply, wanted)
                self.problem, self.laid_out = "", wanted
                if self._wanted == wanted:
                    self._wanted = None
                if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                    await self._do(self._sync)
                    self._synced_s = time.monotonic()
            except OutliveError as error:
                if self.problem != error.message:
                    log.error("files.not_laid_out", workload=self._workload, reason=error.message)
                self.problem = error.message
                await asyncio.sleep(_AGAIN_S)

    # --- in the thread ------------------------------------------------------------------------------

    async def _do(self, work: Callable[..., object], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _apply(self, epoch: EpochId) -> None:
        tree = self._known_tree()
        if tree.epoch == epoch:
            return
        try:
            applied = tree.apply(self._store.files_of(epoch))
        except StoreError:  # a fold may have taken a level's place: once more, with none
            with self._store.hold():
                applied = tree.apply(self._store.files_of(epoch))
        log.debug("files.laid_out", workload=self._workload, epoch=str(epoch), full=applied.full)

    def _known_tree(self) -> FileTree:
        """Return the tree, and have it know the records of the epoch that it is, if they are stored still."""
        if self._tree is None:
            tree = self._make_tree()
            if tree.epoch is not None:
                with contextlib.suppress(StoreError):
                    tree.apply(self._store.files_of(tree.epoch))
            self._tree = tree
        return self._tree

    def _sync(self) -> None:
        if self._tree is not None:
            self._tree.sync()

    def _forget(self) -> None:
        if self._tree is None:
            self._tree = self._make_tree()
        self._tree.forget()
        self._tree = None


def state_file(directory: Path) -> Path:
    """Return where it is written down which epoch a workload's directories are."""
    return directory / "files.state"
