"""A workload for the demonstration: keys and values in an SQLite database, over redis's protocol.

In: SET, GET, PING and CHECK on a TCP port (RESP 2, what `outlive.probe` speaks). Out: answers; to a SET when
its transaction is committed. The database is in WAL mode, so that it lives by a file that is mapped as shared
memory: what only holds together if memory and files are of the same instant.

    python -m outlive.demo_sqlite PORT FILE
"""

from __future__ import annotations

import selectors
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_READ_BYTES = 1 << 20
_SCHEMA = "CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


class Database:
    """The pairs. Raises sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(_SCHEMA)

    def answer(self, words: list[bytes]) -> bytes:
        """Carry out one command and return the answer's bytes."""
        match words:
            case [b"SET", key, value]:
                self._connection.execute("INSERT OR REPLACE INTO pairs VALUES (?, ?)", (key, value))
                return b"+OK\r\n"
            case [b"GET", key]:
                row = self._connection.execute("SELECT value FROM pairs WHERE key = ?", (key,)).fetchone()
                return b"$-1\r\n" if row is None else b"$%d\r\n%s\r\n" % (len(row[0]), row[0])
            case [b"PING"]:
                return b"+PONG\r\n"
            case [b"CHECK"]:
                return b"+%s\r\n" % problems(self._connection).encode()
        return b"-ERR SET, GET, PING and CHECK are known\r\n"


def problems(connection: sqlite3.Connection) -> str:
    """Return what SQLite itself finds wrong in a database; `ok` if nothing is."""
    found = connection.execute("PRAGMA integrity_check").fetchall()
    return "; ".join(str(row[0]) for row in found)


def commands(received: bytearray) -> Iterator[list[bytes]]:
    """Take whole commands (arrays of strings) off the front. Raises ValueError for anything else."""
    while received:
        end = received.find(b"\r\n")
        if end < 0:
            return
        if received[:1] != b"*":
            raise ValueError("a command is an array of strings")
        at, words = end + 2, []
        for _ in range(int(received[1:end])):
            end = received.find(b"\r\n", at)
            if end < 0:
                return
            size = int(received[at + 1 : end])
            at = end + 2 + size + 2
            if at > len(received):
                return
            words.append(bytes(received[end + 2 : end + 2 + size]))
        del received[:at]
        yield words


def serve(port: int, answer: Callable[[list[bytes]], bytes]) -> None:
    """Serve clients on all addresses, one command after the other, for ever."""
    selector = selectors.DefaultSelector()
    # On all addresses: the service address comes and goes.
    listener = socket.create_server(("0.0.0.0", port), backlog=64)  # noqa: S104
    selector.register(listener, selectors.EVENT_READ, None)
    while True:
        for ready, _ in selector.select():
            if ready.data is None:
                client, _ = listener.accept()
                selector.register(client, selectors.EVENT_READ, bytearray())
                continue
            client = ready.fileobj  # type: ignore[assignment]
            try:
                part = client.recv(_READ_BYTES)
                if not part:
                    raise ConnectionError
                ready.data.extend(part)
                for words in commands(ready.data):
                    client.sendall(answer(words))
            except (OSError, ValueError):
                selector.unregister(client)
                client.close()


def main() -> None:
    """Read the command line and serve."""
    port, path = int(sys.argv[1]), Path(sys.argv[2])
    serve(port, Database(path).answer)


if __name__ == "__main__":
    main()
