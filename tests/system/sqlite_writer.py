"""A workload that keeps its state twice: rows in an SQLite database in WAL mode, and what they are in memory.

In: lines over TCP. Out: a line each.

    insert 17     a transaction that adds row 17, rewrites an earlier one and moves money; `17` once it is
                  committed, also if it was earlier
    check         JSON: what SQLite's `integrity_check` says, and how the rows differ from what memory says

Memory is of the instant of an epoch's freeze. So if files come back that are of another one, the two differ,
however sound the files are by themselves. Beside the writer a thread or another process reads the database
and checkpoints it without a pause: files and their shared mapping are hardly ever at rest, nor are, between
processes, the locks on them.

    python sqlite_writer.py PORT DATABASE [--beside process] [--synchronous NORMAL] [--mmap-bytes 1048576]

It stops at SIGTERM, leaving the database open, so that its files are as a crash leaves them. It runs in a
container, and uses the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import socketserver
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ACCOUNTS = 500
"""As many as the schema makes."""
WAIT_S = 20.0
_READ_PAUSE_S = 0.005
_CACHED_PAGES = 20
"""Few, so that pages are read from files and not from memory."""

_SCHEMA = """
CREATE TABLE rows (number INTEGER PRIMARY KEY, revision INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX contents ON rows (content);
CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id < 499)
    INSERT INTO accounts SELECT id, 0 FROM ids;
"""


class Database:
    """Where it is, and how it is to be used."""

    def __init__(self, path: Path, synchronous: str, mmap_bytes: int) -> None:
        self._path = path
        self._pragmas = f"""
            PRAGMA synchronous = {synchronous};
            PRAGMA mmap_size = {mmap_bytes};
            PRAGMA cache_size = {_CACHED_PAGES};
            PRAGMA wal_autocheckpoint = 50;
        """

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=WAIT_S, isolation_level=None, check_same_thread=False
        )
        connection.executescript(self._pragmas)
        return connection

    def read_for_ever(self) -> str:
        """Read in one snapshot what must add up, and checkpoint, again and again; return what is wrong."""
        connection = self.connect()
        while not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'accounts'").fetchone():
            time.sleep(_READ_PAUSE_S)
        for mode in itertools.cycle(("PASSIVE", "TRUNCATE", "RESTART", "FULL")):
            connection.execute("BEGIN")
            (first,) = connection.execute("SELECT count(*) FROM rows").fetchone()
            time.sleep(_READ_PAUSE_S)
            (total,) = connection.execute("SELECT sum(balance) FROM accounts").fetchone()
            (second,) = connection.execute("SELECT count(*) FROM rows").fetchone()
            connection.execute("COMMIT")
            if total or first != second:
                return f"a snapshot adds up to {total}, and had {first} rows, then {second}"
            connection.execute(f"PRAGMA wal_checkpoint({mode})")
        raise AssertionError("a cycle has no end")


class Store:
    """The database, and what it is to hold."""

    def __init__(self, database: Database) -> None:
        """Open or make it. What was there before is taken for what memory knows."""
        self._lock = threading.Lock()
        self._writer = database.connect()
        if not self._writer.execute("SELECT 1 FROM sqlite_schema").fetchone():
            self._writer.executescript(f"PRAGMA journal_mode = WAL; BEGIN; {_SCHEMA} COMMIT;")
        self._revisions = dict(self._writer.execute("SELECT number, revision FROM rows"))
        self._balances = [
            each for (each,) in self._writer.execute("SELECT balance FROM accounts ORDER BY id")
        ]
        self.problems: list[str] = []
        """What others than the writer found."""

    def insert(self, number: int) -> None:
        """Commit a row, once."""
        with self._lock:
            if number in self._revisions:
                return
            earlier = random.Random(number).randrange(number)
            revision = self._revisions.get(earlier, 0) + 1
            source, target, amount = number % ACCOUNTS, number * 31 % ACCOUNTS, number % 97
            execute = self._writer.execute
            if self._writer.in_transaction:  # one that failed
                execute("ROLLBACK")
            execute("BEGIN IMMEDIATE")
            execute("INSERT INTO rows VALUES (?, 1, ?)", (number, content_of(number, 1)))
            if revision > 1:
                changed = (revision, content_of(earlier, revision), earlier)
                execute("UPDATE rows SET revision = ?, content = ? WHERE number = ?", changed)
            execute("UPDATE accounts SET balance = balance - ? WHERE id = ?", (amount, source))
            execute("UPDATE accounts SET balance = balance + ? WHERE id = ?", (amount, target))
            execute("COMMIT")
            self._revisions[number] = 1
            if revision > 1:
                self._revisions[earlier] = revision
            self._balances[source] -= amount
            self._balances[target] += amount

    def check(self) -> dict[str, object]:
        """Compare the database with memory."""
        with self._lock:
            integrity = [text for (text,) in self._writer.execute("PRAGMA integrity_check")]
            found = {
                number: revision if bytes(content) == content_of(number, revision) else -1
                for number, revision, content in self._writer.execute("SELECT * FROM rows")
            }
            balances = self._writer.execute("SELECT balance FROM accounts ORDER BY id").fetchall()
            known = self._revisions
            return {
                "integrity": integrity,
                "numbers": sorted(known),
                "only_in_memory": sorted(known.keys() - found.keys()),
                "only_in_files": sorted(found.keys() - known.keys()),
                "differ": sorted(each for each in known.keys() & found.keys() if known[each] != found[each]),
                "balances_differ": [each for (each,) in balances] != self._balances,
                "problems": self.problems,
            }


def content_of(number: int, revision: int) -> bytes:
    """Return the content of a row: some of them need pages of their own."""
    seed = hashlib.blake2b(f"{number}:{revision}".encode()).digest()
    return seed * (100 if number % 16 == 0 else 4)


def do(store: Store, verb: str, argument: str) -> str:
    if verb == "insert":
        store.insert(int(argument))
        return argument
    return json.dumps(store.check())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("database", type=Path)
    parser.add_argument("--beside", choices=["thread", "process"], default="thread")
    parser.add_argument("--synchronous", choices=["NORMAL", "FULL"], default="FULL")
    parser.add_argument("--mmap-bytes", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    database = Database(options.database, options.synchronous, options.mmap_bytes)
    # A process begins before there is a connection: none may be taken along.
    read = _in_a_process(database) if options.beside == "process" else database.read_for_ever
    store = Store(database)
    threading.Thread(target=_note, args=(store, read), daemon=True).start()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                for line in self.rfile:
                    verb, _, argument = line.decode().strip().partition(" ")
                    try:
                        answer = do(store, verb, argument)
                    except sqlite3.Error as error:
                        store.problems.append(f"{verb} {argument}: {error}")
                        answer = json.dumps({"numbers": [], "problems": store.problems})
                    self.wfile.write(answer.encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("0.0.0.0", options.port), Handler) as server:  # noqa: S104 - the address moves
        server.serve_forever()


def _note(store: Store, read: Callable[[], str]) -> None:
    """Tell of the end of what reads beside the writer, which should not come."""
    try:
        store.problems.append(read())
    except sqlite3.Error as error:
        store.problems.append(f"what reads beside the writer: {error}")


def _in_a_process(database: Database) -> Callable[[], str]:
    """Read in a child; return how to wait for its end."""
    if pid := os.fork():
        return lambda: f"the process that reads ended ({os.waitpid(pid, 0)[1]}): the log says why"
    try:
        sys.stderr.write(f"{database.read_for_ever()}\n")
    except sqlite3.Error as error:
        sys.stderr.write(f"{error}\n")
    finally:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
