"""Which memory backend captures a workload, and why: the fast one where it can, the stock one where it must.

In: what the node's file wants, what the kernel and CRIU are. Out: one `CaptureBackend` that is always there.
The fast one is given up for a while when it fails several times in a row; then it starts from nothing again,
because its books do not know what the stock one captured meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from common.criu.rpc import CriuVersion
from common.errors import CaptureError, UnsupportedError
from common.model import EpochId
from primary import pages, tracking
from primary.capture import CaptureBackend, CapturedEpoch
from primary.injection import program
from primary.native import built
from primary.shim import KNOWN_VERSIONS

log = structlog.get_logger(__name__)

_FAILURES: Final = 3
_AGAIN_S: Final = 60.0


def fast_problem(version: CriuVersion) -> str:
    """Say why the fast backend cannot work on this node; empty if it can."""
    if (version.major, version.minor) not in KNOWN_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_VERSIONS)
        return f"CRIU {version} is not one that the shim knows ({known})"
    try:
        built("outlive-shim.so")
        program()
        pages.load()
    except (UnsupportedError, OSError) as error:
        return str(error)
    return tracking.problem()


class ChosenBackend:
    """Captures with the fast backend as long as that works, else with the stock one."""

    def __init__(
        self,
        make_fast: Callable[[], CaptureBackend] | None,
        stock: CaptureBackend,
        reason: str,
        *,
        on_change: Callable[[str, str], None] = lambda name, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_fast` is None where it cannot work, and `reason` says why; `on_change` is told of changes."""
        self._make_fast = make_fast
        self._stock = stock
        self._fast: CaptureBackend | None = None
        self._on_change = on_change
        self._clock = clock
        self._failures = 0
        self._again_s = 0.0
        self.name = "fast" if make_fast is not None else "stock"
        self.reason = reason
        """Why this one, in a sentence."""
        on_change(self.name, reason)

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        """See `CaptureBackend.capture`."""
        if self._make_fast is not None and self._clock() >= self._again_s:
            if self._fast is None:
                self._fast = self._make_fast()
            try:
                captured = await self._fast.capture(epoch, since)
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
