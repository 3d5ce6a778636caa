"""The directories of a workload on a node that follows: kept as its newest committed epoch says.

In: epochs as they are committed; the order to take over with one. Out: directories that are that epoch's, and
what stands against it as a sentence. An epoch is acknowledged when its store has it; its directories follow,
as fast as the disk allows, always to the newest one; and are brought to what is restored before that is done.

Nothing is made while the workload may run here: whoever leads has called `bring_to` or `leave`, and `follow`
is called by followers only.

Nobody else may change the directories. Names, sizes and times are looked over before something is restored
on them, as far as a second reaches; everything, contents too, when somebody asks for it (`compare`), part by
part, with epochs in between. What was altered is made equal again, from what is stored here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import msgspec
import structlog

from common.control import FilesComparison
from common.errors import OutliveError, RestoreError, StoreError
from common.model import EpochId
from replica.file_check import START, Cursor
from replica.file_tree import FileTree
from replica.store import EpochStore

log = structlog.get_logger(__name__)

_SYNC_EVERY_S: Final = 10.0
_AGAIN_S: Final = 1.0
_LOOK_OVER_S: Final = 1.0
"""So long a takeover may look whether somebody else changed the directories: some 50,000 files."""
_MOST_EXAMPLES: Final = 100
_TOLD: Final = 3
_PATIENCE: Final = 30
"""How many times a comparison waits for the directories to be an epoch that is stored."""

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class FollowedFiles:
    """Those of one workload; all methods belong to the event loop."""

    def __init__(
        self,
        workload: str,
        store: EpochStore,
        make_tree: Callable[[], FileTree],
        on_altered: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`make_tree` is called in a thread when a tree is needed; it may raise OutliveError.

        `on_altered` is told, in a sentence, when somebody else had changed the directories.
        """
        self._workload = workload
        self._on_altered = on_altered
        self._store = store
        self._make_tree = make_tree
        self._tree: FileTree | None = None
        self._thread = ThreadPoolExecutor(1, f"files-{workload}")
        """One thing at a time."""
        self._closed = False
        self._wanted: EpochId | None = None
        self._following: asyncio.Task[None] | None = None
        self._comparing: asyncio.Task[None] | None = None
        self.comparison = FilesComparison(running=False)
        """How the last `compare` stands."""
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
            looked_at_all = await self._do(self._apply, epoch)
            if not looked_at_all and (altered := await self._do(self._look_over)):
                await self._repair(epoch, altered)
            await self._do(self._forget)
        except OutliveError as error:
            raise RestoreError(
                f"the files of {epoch} could not be laid out: {error.message}", hint=error.hint
            ) from error

    def compare(self) -> None:
        """Begin to compare everything, unless that is under way; `comparison` says how it stands."""
        if self._comparing is None or self._comparing.done():
            self.comparison = FilesComparison(running=True)
            self._comparing = asyncio.create_task(self._compare())

    async def leave(self) -> None:
        """Stop following; returns when nothing is made any more."""
        self._wanted = None
        for task in (self._following, self._comparing):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._following = self._comparing = None
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

    async def _compare(self) -> None:
        problem = "it was broken off: the workload is to run here"
        try:
            cursor: Cursor | None = START
            found: list[str] = []
            patience = _PATIENCE
            while cursor is not None:
                try:
                    part, cursor = await self._do(self._compare_part, cursor)
                except StoreError:
                    if not patience:
                        raise
                    patience -= 1  # the directories are on their way from an epoch that is stored no more
                    await asyncio.sleep(_AGAIN_S)
                    continue
                found += part[: _MOST_EXAMPLES - len(found)]
                self.comparison = msgspec.structs.replace(
                    self.comparison,
                    different=self.comparison.different + len(part),
                    examples=tuple(found),
                )
            if found:
                await self._repair(None, found)
            problem = ""
        except OutliveError as error:
            problem = error.message
        finally:
            repaired = bool(self.comparison.different) and not problem
            self.comparison = msgspec.structs.replace(
                self.comparison, running=False, repaired=repaired, problem=problem
            )

    async def _repair(self, epoch: EpochId | None, found: list[str]) -> None:
        """Make everything what an epoch (None: the one that it should be) says, and tell about it.

        Raises OutliveError if that cannot be: the next epoch that is laid out looks at everything then.
        """
        more = [f"and {len(found) - _TOLD} more"] if len(found) > _TOLD else []
        said = "; ".join(found[:_TOLD] + more)
        try:
            await self._do(self._make_all, epoch)
        except OutliveError:
            self._on_altered(
                f"somebody else changed the directories, and they are not made equal yet: {said}"
            )
            await self._do(self._forget)
            again, self.laid_out = self.laid_out, None
            if epoch is None and again is not None and self._wanted is None:
                self.follow(again)
            raise
        self._on_altered(f"somebody else changed the directories, and all was made equal again: {said}")

    # --- in the thread ------------------------------------------------------------------------------

    async def _do(self, work: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _apply(self, epoch: EpochId) -> bool:
        """Make the directories that epoch; return whether everything was looked at for that."""
        tree = self._known_tree()
        if tree.epoch == epoch:
            return False
        with self._store.files_of(epoch) as files:
            applied = tree.apply(files)
        log.debug("files.laid_out", workload=self._workload, epoch=str(epoch), full=applied.full)
        return applied.full

    def _look_over(self) -> list[str]:
        """Return what is not as it should be at a quick look, as far as there is time for one."""
        tree, until_s = self._known_tree(), time.monotonic() + _LOOK_OVER_S

        def is_over() -> bool:
            return time.monotonic() > until_s

        cursor: Cursor | None = START
        found: list[str] = []
        while cursor is not None and not found:
            if is_over():
                log.info("files.looked_over_in_part", workload=self._workload, within_s=_LOOK_OVER_S)
                break
            try:
                found, cursor = tree.compare_part(None, cursor, is_over)
            except (StoreError, OSError) as error:  # what cannot even be looked at is not as it should be
                found = [str(error)]
        return found

    def _compare_part(self, cursor: Cursor) -> tuple[list[str], Cursor | None]:
        """Compare a part with what is stored, and say in `comparison` with what, and how far that is."""
        tree = self._known_tree()
        if tree.epoch is None:
            raise StoreError("which epoch the directories are is not known: they are being laid out")
        with self._store.files_of(tree.epoch) as files:
            found, following = tree.compare_part(files, cursor)
        self.comparison = msgspec.structs.replace(
            self.comparison,
            epoch=files.epoch,
            pages_done=tree.content_pages(following.page if following is not None else None),
            pages_due=tree.content_pages(),
        )
        return found, following

    def _make_all(self, epoch: EpochId | None) -> None:
        tree = self._known_tree()
        epoch = epoch or tree.epoch
        if epoch is None:
            return  # it is looked at wholly, then
        with self._store.files_of(epoch) as files:
            tree.apply(files, full=True)

    def _known_tree(self) -> FileTree:
        """Return the tree, and have it know the records of the epoch that it is, if they are stored still."""
        if self._tree is None:
            tree = self._make_tree()
            if tree.epoch is not None:
                with contextlib.suppress(StoreError), self._store.files_of(tree.epoch) as files:
                    tree.apply(files)
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
