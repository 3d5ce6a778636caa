"""A TCP line that does what it likes with the bytes: below the encryption, between two sound ends.

Bytes of either way are altered, left out, repeated, swapped, held back, the connection is cut, or an old
session's bytes come instead of a new one's. While `wild` is not set it is a good line.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.campaigns.torture.cases import Case, Scale, chance_of
from tests.campaigns.torture.wire_ends import Ends
from tests.unit.wire_fakes import offer

_MOST_BYTES = 1 << 16
_REMEMBERED = 8
_DOES = ("flip", "leave out", "repeat", "swap", "hold back", "cut", "cut within", "nothing")


class _CutError(Exception):
    """The connection ends here."""


class Line:
    """A proxy on loopback."""

    def __init__(self, target: int, chance: random.Random) -> None:
        self.wild = True
        self.port = 0
        self.done: set[str] = set()
        self._target = target
        self._chance = chance
        self._sessions: list[bytes] = []
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def behave(self) -> None:
        """Be a good line from now on; what was garbled already stays so."""
        self.wild = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        far = None
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
            if self.wild and self._sessions and self._chance.random() < 0.2:
                self.done.add("replay")
                far.write(self._chance.choice(self._sessions))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._carry(reader, far, outward=True))
                tasks.create_task(self._carry(far_reader, writer, outward=False))
        except* (_CutError, OSError, asyncio.CancelledError):
            pass  # or the line was closed
        finally:
            self._connections.discard(task)
            for end in (writer, far):
                if end is not None:
                    end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outward: bool) -> None:
        carried, held = bytearray(), b""
        # Some connections live long enough for an epoch, others not even for a handshake.
        mischief = self._chance.choice((0.3, 0.05, 0.01))
        while chunk := await reader.read(self._chance.choice((100, 5000, _MOST_BYTES))):
            if outward and len(carried) < 10 * _MOST_BYTES:
                carried += chunk
            if self.wild and self._chance.random() < mischief:
                chunk, held = await self._altered(chunk, held, writer)
            elif held:
                chunk, held = chunk + held, b""
            writer.write(chunk)
            await writer.drain()
        if outward:
            self._sessions = [*self._sessions, bytes(carried)][-_REMEMBERED:]
        raise _CutError

    async def _altered(self, chunk: bytes, held: bytes, writer: asyncio.StreamWriter) -> tuple[bytes, bytes]:
        """What is sent now, and what after the next bytes."""
        does = self._chance.choice(_DOES)
        self.done.add(does)
        at = self._chance.randrange(len(chunk))
        if does == "flip":
            return chunk[:at] + bytes([chunk[at] ^ 1 << self._chance.randrange(8)]) + chunk[at + 1 :], held
        if does == "leave out":
            return chunk[:at] + chunk[at + self._chance.randrange(1, 40) :], held
        if does == "repeat":
            return chunk + chunk[at:], held
        if does == "swap":
            return held, chunk
        if does == "hold back":
            await asyncio.sleep(self._chance.uniform(0, 0.3))
        if does.startswith("cut"):
            writer.write(chunk[: at if does == "cut within" else 0])
            with contextlib.suppress(OSError):
                await writer.drain()
            raise _CutError
        return chunk, held


def cases(seed: int, scale: Scale) -> list[Case]:
    """Lines of different whims."""

    def case(number: int) -> Case:
        return Case(
            "a line that alters bytes",
            f"line {seed}-{number}",
            lambda directory: asyncio.run(_stream_over(directory, f"{seed}-{number}", scale)),
        )

    return [case(number) for number in range(scale.of(2, 30, 150))]


async def _stream_over(directory: Path, seed: str, scale: Scale) -> None:
    """Epochs go over a wild line for a while, and over a good one then."""
    chance = chance_of("line", seed)
    with Ends(directory, chance, pages=chance.choice((20, 300))) as ends:
        async with ends.living():
            line = Line(ends.port, chance)
            async with line.open(), ends.leading("redis", port=line.port) as stream:
                for _ in range(scale.of(15, 25, 40)):
                    offer(stream, ends.epoch())
                    await asyncio.sleep(chance.choice((0.01, 0.1)))
                ends.check()
                line.behave()
                await ends.gets_through(stream, "redis")
        ends.check()
