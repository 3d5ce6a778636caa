"""A client that tells what a failover cost: it writes numbered values to redis at a steady rate.

In: an address, a port, a rate. Out: one JSON line for each write that was acknowledged, with the wall
clock at the acknowledgement. It reconnects for ever, gives up on an answer after `ANSWER_TIMEOUT_S`, and
writes that number again: a number is acknowledged at most once. A process of its own, because it lives
in the client's host.

    python -m outlive.probe ADDRESS PORT --rate 200 --log FILE
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import msgspec

CONNECT_TIMEOUT_S = 0.2
ANSWER_TIMEOUT_S = 0.25
RETRY_S = 0.02
KEY_PREFIX = "probe:"


class Acknowledged(msgspec.Struct, frozen=True, array_like=True):
    """One write that the workload confirmed."""

    number: int
    wall_s: float


class Redis:
    """The little of redis's protocol (RESP 2) that a probe needs, over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, address: str, port: int) -> Redis:
        """Connect, or raise OSError or TimeoutError."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return cls(*await asyncio.open_connection(address, port))

    async def ask(self, *words: str, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes | None:
        """Send one command, return its answer (None: nil). Raises OSError, TimeoutError, EOFError."""
        return (await self.ask_all([words], timeout_s=timeout_s))[0]

    async def ask_all(
        self, commands: Iterable[tuple[str, ...]], *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> list[bytes | None]:
        """Send several commands at once, return their answers in order."""
        encoded = [_encode(words) for words in commands]
        async with asyncio.timeout(timeout_s):
            self._writer.write(b"".join(encoded))
            await self._writer.drain()
            return [await self._answer() for _ in encoded]

    async def _answer(self) -> bytes | None:
        line = await self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("the connection was closed")
        kind, text = line[:1], line[1:-2]
        if kind == b"-":
            raise OSError(text.decode(errors="replace"))
        if kind != b"$":
            return text
        length = int(text)
        if length < 0:
            return None
        return (await self._reader.readexactly(length + 2))[:-2]

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


def _encode(words: tuple[str, ...]) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        data = word.encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


async def write_for_ever(address: str, port: int, rate_per_s: float, log: TextIO) -> None:
    """Write numbers from 1 on, `rate_per_s` a second; one line a confirmed write. Never returns."""
    number = 1
    due_s = time.monotonic()
    while True:
        try:
            redis = await Redis.connect(address, port)
        except (OSError, TimeoutError):
            await asyncio.sleep(RETRY_S)
            continue
        try:
            while True:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                if await redis.ask("SET", f"{KEY_PREFIX}{number}", str(number)) != b"OK":
                    raise OSError("redis did not say OK")
                log.write(msgspec.json.encode(Acknowledged(number, time.time())).decode() + "\n")
                number += 1
                due_s = max(due_s + 1 / rate_per_s, time.monotonic() - 1)
        except (OSError, TimeoutError, EOFError):
            await asyncio.sleep(RETRY_S)
        finally:
            redis.close()


def read_log(path: Path) -> list[Acknowledged]:
    """Return the writes that a probe saw acknowledged; a torn last line is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=Acknowledged) for line in lines]


async def present(address: str, port: int, numbers: Iterable[int]) -> set[int]:
    """Return which of `numbers` the workload holds with the value that was written."""
    wanted = list(numbers)
    found: set[int] = set()
    redis = await Redis.connect(address, port)
    try:
        for start in range(0, len(wanted), 1000):
            block = wanted[start : start + 1000]
            answers = await redis.ask_all([("GET", f"{KEY_PREFIX}{n}") for n in block], timeout_s=5.0)
            found.update(n for n, answer in zip(block, answers, strict=True) if answer == str(n).encode())
    finally:
        redis.close()
    return found


def main() -> None:
    """Read the command line and write until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=200.0, help="writes a second")
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    with options.log.open("a", buffering=1) as log:
        asyncio.run(write_for_ever(options.address, options.port, options.rate, log))


if __name__ == "__main__":
    main()
