"""Which memory backend captures a workload, and why: the fast one where it can, the stock one where it must.

In: what the node's file wants, what the kernel and CRIU are. Out: one `CaptureBackend` that is always there.
The fast one is given up for a while when it fails several times in a row; then it starts from nothing again,
because its books do not know what the stock one captured meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from common.config import Capture
from common.control import CaptureStatus
from common.criu.rpc import CriuVersion
from common.errors import CaptureError, UnsupportedError
from common.model import EpochId
from primary import pages
from primary.capture import CaptureBackend, CapturedEpoch
from primary.file_reader import FilesError
from primary.injection import program
from primary.native import built
from primary.shim import KNOWN_VERSIONS
from primary.tracking import TrackerName, choose

log = structlog.get_logger(__name__)

_FAILURES: Final = 3
_AGAIN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """Which backend captures on this node, and why."""

    tracker: TrackerName | None
    """How the fast one finds what is written; None: the stock one captures."""
    reason: str

    @property
    def sentence(self) -> str:
        """Both in one line."""
        if self.tracker is None:
            return f"stock backend: {self.reason}"
        return f"fast backend, tracker {self.tracker}: {self.reason}"


def choose_backend(capture: Capture, version: CriuVersion) -> BackendChoice:
    """Choose by what the configuration says and this node can do. `version` is that of criu.

    A criu without the shim is to be started before: what it finds out about the kernel is kept for all.
    """
    if capture.backend == "stock":
        return BackendChoice(None, 'the configuration says capture.backend = "stock"')
    if (version.major, version.minor) not in KNOWN_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_VERSIONS)
        return BackendChoice(None, f"CRIU {version} is not one that the shim knows ({known})")
    try:
        built("outlive-shim.so")
        pages.load()
        choice = choose(capture.tracker)
        if choice.name == "userfaultfd":
            program()
    except (UnsupportedError, OSError) as error:
        return BackendChoice(None, str(error))
    return BackendChoice(choice.name, choice.reason)


class ChosenBackend:
    """Captures with the fast backend as long as that works, else with the stock one."""

    def __init__(
        self,
        make_fast: Callable[[], CaptureBackend] | None,
        stock: CaptureBackend,
        choice: BackendChoice,
        *,
        on_change: Callable[[str, str], None] = lambda name, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_fast` is None where `choice` is the stock one; `on_change` is told of changes, and why."""
        self._make_fast = make_fast
        self._stock = stock
        self._fast: CaptureBackend | None = None
        self._on_change = on_change
        self._clock = clock
        self._failures = 0
        self._again_s = 0.0
        self._tracker = choice.tracker or ""
        self.name = "fast" if make_fast is not None else "stock"
        self.reason = choice.reason
        """Why this one, in a sentence."""
        on_change(self.name, self.reason if not self._tracker else f"tracker {self._tracker}: {self.reason}")

    def status(self) -> CaptureStatus:
        """Return what captures now."""
        tracker = self._tracker if self.name == "fast" else ""
        return CaptureStatus(backend=self.name, tracker=tracker, reason=self.reason)

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """See `CaptureBackend.capture`."""
        if self._make_fast is not None and self._clock() >= self._again_s:
            if self._fast is None:
                self._fast = self._make_fast()
            try:
                captured = await self._fast.capture(epoch, since)
            except FilesError:
                raise  # it has nothing to do with memory
            except (CaptureError, UnsupportedError) as error:
                self._failures += 1
                if self._failures < _FAILURES:
                    raise
                await self._fast.close()
                self._fast = None
                self._again_s = self._clock() + _AGAIN_S
                self._change("stock", f"the fast backend failed {self._failures} times: {error.message}")
            else:
                self._failures = 0
                self._change("fast", "it works again")
                return captured
        return await self._stock.capture(epoch, since)

    async def close(self) -> None:
        """Let go of the workload without touching it. Idempotent."""
        if self._fast is not None:
            await self._fast.close()
            self._fast = None
        await self._stock.close()

    def _change(self, name: str, reason: str) -> None:
        if name != self.name:
            self.name, self.reason = name, reason
            log.warning("capture.backend", backend=name, reason=reason)
            self._on_change(name, reason)
