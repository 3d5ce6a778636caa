"""A client that tells what a failover cost: it writes numbered values to redis at a steady rate.

In: an address, a port, a rate. Out: one JSON line for each write that was acknowledged, with the wall
clock at the acknowledgement. It reconnects for ever, gives up on an answer after `ANSWER_TIMEOUT_S`, and
writes that number again: a number is acknowledged at most once. A process of its own, because it lives
in the client's host.

    python -m outlive.probe ADDRESS PORT write --rate 200 --log FILE
    python -m outlive.probe ADDRESS PORT fill --bytes 268435456
    python -m outlive.probe ADDRESS PORT present --newest 1000
    python -m outlive.probe ADDRESS PORT check
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import msgspec

CONNECT_TIMEOUT_S = 0.2
ANSWER_TIMEOUT_S = 0.25
RETRY_S = 0.02
KEY_PREFIX = "probe:"
VALUE_BYTES = 16 * 1024
_FILL_BLOCK_BYTES = 64 * VALUE_BYTES
_READ_BLOCK = 1000
_BULK_TIMEOUT_S = 20.0

Word = str | bytes


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

    async def ask(self, *words: Word, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes | None:
        """Send one command, return its answer (None: nil). Raises OSError, TimeoutError, EOFError."""
        return (await self.ask_all([words], timeout_s=timeout_s))[0]

    async def ask_all(
        self, commands: Iterable[tuple[Word, ...]], *, timeout_s: float = ANSWER_TIMEOUT_S
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


def _encode(words: tuple[Word, ...]) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        data = word.encode() if isinstance(word, str) else word
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


async def fill(address: str, port: int, size_bytes: int) -> None:
    """Store `size_bytes` of random values, `VALUE_BYTES` each: nothing that compresses or repeats."""
    redis = await Redis.connect(address, port)
    try:
        for start in range(0, size_bytes, _FILL_BLOCK_BYTES):
            stop = min(size_bytes, start + _FILL_BLOCK_BYTES)
            commands = [
                ("SET", f"fill:{at // VALUE_BYTES}", secrets.token_bytes(VALUE_BYTES))
                for at in range(start, stop, VALUE_BYTES)
            ]
            await redis.ask_all(commands, timeout_s=_BULK_TIMEOUT_S)
    finally:
        redis.close()


async def present(address: str, port: int, newest: int) -> set[int]:
    """Return which numbers up to `newest` the workload holds with the value that was written."""
    found: set[int] = set()
    redis = await Redis.connect(address, port)
    try:
        for start in range(1, newest + 1, _READ_BLOCK):
            block = range(start, min(start + _READ_BLOCK, newest + 1))
            commands = [("GET", f"{KEY_PREFIX}{number}") for number in block]
            answers = await redis.ask_all(commands, timeout_s=_BULK_TIMEOUT_S)
            found.update(n for n, answer in zip(block, answers, strict=True) if answer == str(n).encode())
    finally:
        redis.close()
    return found


async def check(address: str, port: int) -> str:
    """Return what the workload says of its own data (CHECK is `outlive.demo_sqlite`'s)."""
    redis = await Redis.connect(address, port)
    try:
        return (await redis.ask("CHECK", timeout_s=_BULK_TIMEOUT_S) or b"").decode(errors="replace")
    finally:
        redis.close()


def read_log(path: Path) -> list[Acknowledged]:
    """Return the writes that a probe saw acknowledged; a torn last line is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=Acknowledged) for line in lines]


def main() -> None:
    """Read the command line: write until killed, fill, or print the numbers that are present as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="write numbered values for ever")
    write.add_argument("--rate", type=float, default=200.0, help="writes a second")
    write.add_argument("--log", type=Path, required=True)
    verbs.add_parser("fill", help="store random values").add_argument("--bytes", type=int, required=True)
    verbs.add_parser("present", help="say which numbers are there").add_argument(
        "--newest", type=int, required=True
    )
    verbs.add_parser("check", help="have the workload check its data")
    options = parser.parse_args()
    if options.verb == "check":
        sys.stdout.write(asyncio.run(check(options.address, options.port)) + "\n")
    elif options.verb == "write":
        with options.log.open("a", buffering=1) as log:
            asyncio.run(write_for_ever(options.address, options.port, options.rate, log))
    elif options.verb == "fill":
        asyncio.run(fill(options.address, options.port, options.bytes))
    else:
        numbers = asyncio.run(present(options.address, options.port, options.newest))
        sys.stdout.write(msgspec.json.encode(sorted(numbers)).decode() + "\n")


if __name__ == "__main__":
    main()
