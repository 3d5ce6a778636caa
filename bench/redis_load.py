"""Load on a redis in the lab, from another host: `bench/load.c`, and what it measured.

In: an address, and what is asked of it. Out: answers a second, and every request's latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outlive.lab import Host

PORT = 6379
_LOAD_BEYOND_S = 60.0


class _Answered(msgspec.Struct, frozen=True):
    """What `bench/load.c` prints."""

    asked: int
    answered_in_time: int
    cpu_s: float


class RedisLoad:
    """`bench/load.c` on the client's host."""

    def __init__(
        self,
        client: Host,
        program: Path,
        address: str,
        *,
        connections: int,
        keys: int,
        value_bytes: int,
        write_percent: int,
        tick_us: int,
        before: Sequence[str] = (),
    ) -> None:
        """`program` is `bench/load.c`, compiled; the latencies are written beside it.

        `before` stands before its command.
        """
        self._client = client
        self._output = program.with_name("latencies")
        self._command = (
            *(*before, str(program), "-c", str(connections), "-k", str(keys)),
            *("-v", str(value_bytes), "-w", str(write_percent), "-t", str(tick_us)),
            *("-o", str(self._output)),
        )
        self._to = (address, str(PORT))

    async def write_all(self) -> None:
        """Write every key once."""
        await self._run(("-p",), _LOAD_BEYOND_S)

    async def run(self, seconds: float, rate_per_s: float = 0.0) -> tuple[float, NDArray[np.uint32]]:
        """Load for so long (0: as fast as it goes); return answers a second, and every latency in us."""
        told = await self._run(("-d", str(seconds), "-r", str(rate_per_s)), seconds + _LOAD_BEYOND_S)
        return told.answered_in_time / seconds, np.fromfile(self._output, dtype=np.uint32)

    async def _run(self, words: Sequence[str], timeout_s: float) -> _Answered:
        done = await self._client.run([*self._command, *words, *self._to], timeout_s=timeout_s)
        return msgspec.json.decode(done.stdout, type=_Answered)
