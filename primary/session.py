"""One greeted connection to a replica: what may still be sent, and what the replica says to it.

In: frames to send, and the messages that come back. Out: frames on the link, never more bytes under way than
were granted; the outcome of the epoch in flight; the answer to what was asked. What is sent when is
`primary.stream`'s business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from common.errors import ProtocolError, UnreachableError
from common.messages import (
    PROTOCOL,
    Ack,
    Buffer,
    Credit,
    HeldPages,
    Nack,
    Readiness,
    Refused,
    Versions,
    cost_bytes,
    decode,
)
from common.model import EpochId
from common.rate import RateLimit
from common.transport import Link
from primary.outgoing import Frames


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """How long a replica may keep its primary waiting, in seconds, before the stream starts over."""

    greeting_s: float = 5.0
    """From the first attempt to connect until the answer to the greeting."""
    credit_s: float = 15.0
    """Without being granted anything while there is something to send."""
    acknowledge_s: float = 120.0
    """From `Commit` until `Ack` or `Nack`: the replica syncs a whole epoch to disk then."""
    retry_s: float = 0.05
    """Pause before the next attempt; doubles with every failure in a row, plus up to half of it by chance."""
    retry_max_s: float = 3.0


_SLOWEST_COPY_BYTES_PER_S: Final = 32 << 20
"""A disk that copies more slowly than this is not waited for."""

DEFAULT_STREAM_TIMING: Final = StreamTiming()

_UNASKED: Final = 200
_UNASKED_PER_S: Final = 20
"""Messages of a replica beyond those that it owes: a sound one tells its readiness now and then. Counted from
the beginning, not by the second: in a flood this node may be too slow to hear many in a second."""
_ANSWERS: Final = 2
"""Most that a replica has to say of a message that it got: credit for it, and what came of it."""


class RefusedError(ProtocolError):
    """The receiver said no, and why."""

    def __init__(self, peer: str, refusal: Refused) -> None:
        super().__init__(f"{peer} refuses: {refusal.reason}")
        self.refusal = refusal


class Session:
    """One greeted connection. What is sent stays within `rate`; `on_sent` is told how many bytes go out."""

    def __init__(
        self,
        peer: str,
        link: Link,
        credit_bytes: int,
        timing: StreamTiming,
        rate: RateLimit,
        *,
        version: int = PROTOCOL,
        on_sent: Callable[[int], None],
        on_readiness: Callable[[Readiness], None],
    ) -> None:
        self.outcome: Ack | Nack | None = None
        """What the replica said of the epoch in flight, once it did."""
        self.version = version
        """Of the wire format, as both speak it."""
        self._peer = peer
        self._link = link
        self._window_bytes = credit_bytes
        self._credit_bytes = credit_bytes
        self._timing = timing
        self._rate = rate
        self._on_sent = on_sent
        self._on_readiness = on_readiness
        self._in_flight: EpochId | None = None
        self._copying_s = 0.0
        self._asked = False
        self._told: tuple[HeldPages, Buffer] | None = None
        self._sent, self._heard = 0, 0
        self._changed = asyncio.Event()

    def begin(self, epoch: EpochId, *, lent_bytes: int = 0) -> None:
        """Expect an outcome for this epoch from now on.

        The replica may be silent for as long as it takes to copy `lent_bytes` from what it holds.
        """
        self.outcome, self._in_flight = None, epoch
        self._copying_s = lent_bytes / _SLOWEST_COPY_BYTES_PER_S

    def copies(self, more_bytes: int) -> None:
        """Take note that the replica has to copy so much more, within its own disk, before it answers."""
        self._copying_s += more_bytes / _SLOWEST_COPY_BYTES_PER_S

    def end(self) -> None:
        """Expect no outcome any more."""
        self._in_flight = None

    async def send(self, frames: Frames) -> None:
        """Send a message when there is credit for it; not at all if the replica has given up the epoch."""
        size_bytes, cost = sum(len(frame) for frame in frames), cost_bytes(frames)
        await self._until(
            lambda: self._credit_bytes >= cost or self.outcome is not None,
            self._timing.credit_s + self._copying_s,
            "has granted no credit",
        )
        if self.outcome is None:
            self._credit_bytes -= cost
            self._on_sent(size_bytes)
            self._sent += 1
            await self._link.send(frames)
            await asyncio.sleep(self._rate.take(size_bytes, asyncio.get_running_loop().time()))

    async def acknowledged(self) -> Ack | Nack:
        """Wait for the outcome of the epoch in flight."""
        await self._until(
            lambda: self.outcome is not None,
            self._timing.acknowledge_s + self._copying_s,
            "has not acknowledged",
        )
        if self.outcome is None:
            raise ProtocolError("an epoch ended without an answer")
        return self.outcome

    async def ask(self, frames: Frames) -> tuple[HeldPages, Buffer]:
        """Send a question about what is held and wait for the answer."""
        self.outcome, self._asked, self._told = None, True, None
        await self.send(frames)
        await self._until(
            lambda: self._told is not None, self._timing.acknowledge_s, "has not said what it holds"
        )
        self._asked = False
        if self._told is None:
            raise ProtocolError("a question ended without an answer")
        return self._told

    async def listen(self) -> None:
        """Take in what the receiver says, until it says something that ends the session."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        while True:
            message, bulk = decode(await self._link.receive(), Versions(self.version, self.version))
            self._heard += 1
            unasked = self._heard - _ANSWERS * self._sent
            if unasked > _UNASKED + _UNASKED_PER_S * (loop.time() - begun_s):
                raise ProtocolError(f"{self._peer} goes on talking: {unasked} messages without a cause")
            if isinstance(message, Credit):
                self._credit_bytes += message.bytes
                if self._credit_bytes > self._window_bytes:
                    raise ProtocolError(f"{self._peer} grants more credit than it said")
            elif isinstance(message, HeldPages):
                if not self._asked or self._told is not None:
                    raise ProtocolError(f"{self._peer} says what it holds without being asked")
                self._told = message, bulk[0]
            elif isinstance(message, Ack | Nack):
                if message.epoch != self._in_flight or self.outcome is not None:
                    raise ProtocolError(f"{self._peer} answers for {message.epoch}, which is not in flight")
                self.outcome = message
            elif isinstance(message, Readiness):
                self._on_readiness(message)
            elif isinstance(message, Refused):
                raise RefusedError(self._peer, message)
            else:
                raise ProtocolError(f"{self._peer} sent a {type(message).__name__}: not a receiver's")
            self._changed.set()

    async def _until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Wait until something that the receiver said makes `condition` true. Raises UnreachableError."""
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise UnreachableError(f"the replica {what} for {deadline_s:g} s") from None
