"""Commands around each epoch's freeze: for storage that nobody here replicates (NFS, DRBD, a database's own).

In: epochs of any backend, and two commands. Out: the same epochs. `before` has ended well before anything is
frozen; `after` is called whatever came of it, so what one has stopped the other starts again. An epoch of
which one of them failed, or took too long, is none: the workload runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex

import structlog

from common.children import end_child, hangs
from common.config import FreezeHook
from common.errors import CaptureError
from common.model import EpochId
from primary.capture import CaptureBackend, CapturedEpoch

log = structlog.get_logger(__name__)


class WithHooks:
    """A `CaptureBackend` that calls commands before and after what another one does."""

    def __init__(self, backend: CaptureBackend, hook: FreezeHook) -> None:
        self._backend = backend
        self._hook = hook

    @property
    def name(self) -> str:
        """That of the other backend."""
        return self._backend.name

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """See `CaptureBackend.capture`."""
        try:
            await self._run("before", self._hook.before, epoch)
            captured = await self._backend.capture(epoch, since)
        except BaseException:
            with contextlib.suppress(CaptureError):  # which was logged
                await self._run("after", self._hook.after, epoch)
            raise
        try:
            await self._run("after", self._hook.after, epoch)
        except BaseException:
            captured.release()
            raise
        return captured

    async def close(self) -> None:
        """Let go of what the other backend has. Idempotent."""
        await self._backend.close()

    async def _run(self, when: str, command: tuple[str, ...], epoch: EpochId) -> None:
        """Run a command of the hook; nothing if it has none. Raises CaptureError if it does not end well."""
        if not command:
            return
        said = shlex.join(command)
        kind = f"freeze hook {said}"
        problem = f"an earlier {command[0]} was killed, and has not ended yet"
        if not hangs(kind):
            problem = await self._problem(command, kind, epoch)
        if problem:
            log.warning("capture.hook_failed", workload=self._hook.workload, when=when, reason=problem)
            raise CaptureError(f"freeze_hooks.{when}: {problem}", hint=f"try it by hand, as root: {said}")

    async def _problem(self, command: tuple[str, ...], kind: str, epoch: EpochId) -> str:
        about = {"OUTLIVE_WORKLOAD": self._hook.workload, "OUTLIVE_EPOCH": str(epoch)}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                env=os.environ | about,
                start_new_session=True,
            )
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror}"
        try:
            async with asyncio.timeout(self._hook.timeout_ms / 1000):
                status = await process.wait()
        except TimeoutError:
            return f"{command[0]} took longer than {self._hook.timeout_ms} ms"
        finally:
            await end_child(process, kind, group=True)
        return "" if status == 0 else f"{command[0]} exited with {status}"
