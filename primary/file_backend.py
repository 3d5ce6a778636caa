"""Epochs with files: any memory backend, and beside it the files of the same instant.

In: epochs of memory, and a hook within their freezes. Out: epochs of both. One in which too much would have
to be read while everything stands still is given up, read while it runs, and tried again; after `_ATTEMPTS`
of them the freeze is accepted: slower, never wrong.
"""

from __future__ import annotations

from typing import Final

import structlog
from numpy import int64
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.model import EpochId
from common.threads import in_thread
from primary.capture import CaptureBackend, CapturedEpoch, PageReader
from primary.file_capture import FileCapture, TooMuchWrittenError
from primary.file_epoch import EpochFiles

log = structlog.get_logger(__name__)

_ATTEMPTS: Final = 3


class FrozenHook:
    """What is done in a freeze beside memory, when all stands still: a `FrozenWork` for all dumpers."""

    def __init__(self) -> None:
        self._files: FileCapture | None = None
        self._patient = False

    def begin(self) -> None:
        """See `FrozenWork.begin`."""
        if self._files is not None:
            self._files.begin(patient=self._patient)

    def end(self) -> None:
        """See `FrozenWork.end`."""
        if self._files is not None:
            self._files.take(patient=self._patient)

    def set(self, files: FileCapture | None, *, patient: bool = False) -> None:
        """Say whose files are to be taken at the next freezes; None: nobody's."""
        self._files, self._patient = files, patient


class WithFiles:
    """A `CaptureBackend` that adds the files to what another one captures."""

    def __init__(self, memory: CaptureBackend, files: FileCapture, hook: FrozenHook) -> None:
        """`hook` is called within each freeze of `memory`."""
        self._memory = memory
        self._files = files
        self._hook = hook

    @property
    def name(self) -> str:
        """That of the memory backend."""
        return self._memory.name

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """See `CaptureBackend.capture`."""
        for attempt in range(1, _ATTEMPTS + 1):
            await in_thread(self._files.ahead, since)
            patient = attempt == _ATTEMPTS
            self._hook.set(self._files, patient=patient)
            try:
                captured = await self._memory.capture(epoch, since)
            except TooMuchWrittenError as error:
                log.info("capture.files_too_much", epoch=str(epoch), reason=error.message)
                if patient:
                    raise
                continue
            finally:
                self._hook.set(None)
                await in_thread(self._files.settle)
            break
        try:
            spaces, pages = await in_thread(self._files.seal, epoch)
        except BaseException:
            captured.release()
            raise
        captured.spaces += spaces
        captured.pages = _Both(captured.pages, pages)
        return captured

    async def close(self) -> None:
        """Let go of workload and files. Idempotent."""
        await self._memory.close()
        await in_thread(self._files.close)


class _Both:
    """Pages of memory and of files; a `PageReader`."""

    def __init__(self, memory: PageReader, files: EpochFiles) -> None:
        self._memory = memory
        self._files = files

    def read(self, key: SpaceKey, rows: NDArray[int64], into: memoryview) -> None:
        """See `PageReader.read`."""
        (self._files if key.kind == "file" else self._memory).read(key, rows, into)

    def release(self) -> None:
        """Let go of both. Harmless when repeated."""
        self._memory.release()
        self._files.release()
