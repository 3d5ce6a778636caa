"""A client that inserts numbers into a database for ever, and writes down which were acknowledged, and when.

In: a kind of database, an address, a port. Out: lines of `outlive.probe.Acknowledged`. It reconnects for
ever, and inserts a number again if it had no answer; who is asked sees to it that a number is there once.

    python database_client.py sqlite ADDRESS PORT --log FILE
    python database_client.py postgres ADDRESS PORT --log FILE
    python database_client.py sqlite ADDRESS PORT --ask check
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import sys
import time
from pathlib import Path
from typing import TextIO

import msgspec

from outlive.probe import Acknowledged

ANSWER_TIMEOUT_S = 2.0
ASK_TIMEOUT_S = 20.0
LONGEST_ANSWER_BYTES = 16 << 20
RETRY_S = 0.05
USER = "postgres"
_VERSION_3 = 196608
_LOST = (OSError, TimeoutError, EOFError)


class Session:
    """A connection to `sqlite_writer`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def greet(self) -> None:
        """Do what comes before the first insertion."""

    async def insert(self, number: int) -> None:
        """Return when it is acknowledged. Raises OSError, EOFError."""
        answer = await self.ask(f"insert {number}")
        if answer.strip() != str(number):
            raise OSError(f"{answer!r} is no answer")

    async def ask(self, question: str) -> str:
        """Return the answer to a line. Raises OSError, EOFError."""
        self.writer.write(f"{question}\n".encode())
        answer = await self.reader.readline()
        if not answer.endswith(b"\n"):
            raise EOFError("the connection was closed")
        return answer.decode()


class Postgres(Session):
    """The little of PostgreSQL's protocol (3.0) that inserting takes, without a password."""

    async def greet(self) -> None:
        words = f"user\0{USER}\0database\0{USER}\0\0".encode()
        self.writer.write(struct.pack("!II", 8 + len(words), _VERSION_3) + words)
        await self._until_ready()

    async def insert(self, number: int) -> None:
        query = b"INSERT INTO acknowledged VALUES (%d) ON CONFLICT DO NOTHING\0" % number
        self.writer.write(struct.pack("!cI", b"Q", 4 + len(query)) + query)
        await self._until_ready()

    async def _until_ready(self) -> None:
        while True:
            kind, length = struct.unpack("!cI", await self.reader.readexactly(5))
            body = await self.reader.readexactly(length - 4)
            if kind == b"E":
                raise OSError(body.decode(errors="replace"))
            if kind == b"Z":
                return


async def insert_for_ever(
    kind: type[Session], address: str, port: int, rate_per_s: float, log: TextIO
) -> None:
    number, due_s = 1, time.monotonic()
    while True:
        await asyncio.sleep(RETRY_S)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                session = kind(*await asyncio.open_connection(address, port))
        except _LOST:
            continue
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await session.greet()
            while True:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await session.insert(number)
                log.write(msgspec.json.encode(Acknowledged(number, time.time())).decode() + "\n")
                number += 1
                due_s = max(due_s + 1 / rate_per_s, time.monotonic() - 1)
        except _LOST:
            continue
        finally:
            session.writer.close()


async def ask(address: str, port: int, question: str) -> str:
    async with asyncio.timeout(ASK_TIMEOUT_S):
        session = Session(*await asyncio.open_connection(address, port, limit=LONGEST_ANSWER_BYTES))
        answer = await session.ask(question)
        session.writer.close()
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["sqlite", "postgres"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=200.0, help="insertions a second, at most")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--log", type=Path, help="insert, and write there what was acknowledged")
    what.add_argument("--ask", help="print the answer to this line")
    options = parser.parse_args()
    if options.ask:
        sys.stdout.write(asyncio.run(ask(options.address, options.port, options.ask)))
        return
    kind = Postgres if options.kind == "postgres" else Session
    with options.log.open("a", buffering=1) as log:
        asyncio.run(insert_for_ever(kind, options.address, options.port, options.rate, log))


if __name__ == "__main__":
    main()
