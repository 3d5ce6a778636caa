"""A workload that keeps its state twice: rows in an SQLite database in WAL mode, and what they are in memory.

In: lines over TCP. Out: a line each.

    insert 17     a transaction that adds row 17, rewrites an earlier one and moves money; `17` once it is
                  committed, also if it was earlier
    check         JSON: what SQLite's `integrity_check` says, and how the rows differ from what memory says

Memory is of the instant of an epoch's freeze. So if files come back that are of another one, the two differ,
however sound the files are by themselves. Beside the writer, something else (a process, or a thread if files
are not to be locked) reads the database and checkpoints it without a pause: files and their shared mapping are
hardly ever at rest.

    python sqlite_writer.py PORT DATABASE [--synchronous NORMAL] [--mmap-bytes 1048576] [--no-locks]

It stops at SIGTERM, leaving the database open, so that its files are as a crash leaves them. Uses the standard
library alone: it runs in a container.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
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
WAIT_S = 20.0
_READ_PAUSE_S = 0.005
_CACHED_PAGES = 20
"""Few, so that pages are read from files and not from memory."""

_SCHEMA = f"""
CREATE TABLE rows (number INTEGER PRIMARY KEY, revision INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX contents ON rows (content);
CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id < {ACCOUNTS - 1})
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
        self._balances = [each for (each,) in self._writer.execute("SELECT balance FROM accounts ORDER BY id")]
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


def do_without_locks() -> None:
    """Have SQLite lock no files: it asks the system to, and is told that it has (sqlite3_vfs.xSetSystemCall).

    Its connections within this process still exclude each other; a second process would not be excluded.
    """
    fcntl_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    libc = ctypes.CDLL(None, use_errno=True)

    def lockless(descriptor: int, command: int, argument: int | None) -> int:
        if command in (fcntl.F_SETLK, fcntl.F_SETLKW):
            return 0
        if command == fcntl.F_GETLK:
            ctypes.c_short.from_address(argument or 0).value = fcntl.F_UNLCK
            return 0
        return int(libc.fcntl(descriptor, command, ctypes.c_void_p(argument)))

    class Vfs(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_int) for name in ("version", "file_bytes", "path_bytes")),
            *((name, ctypes.c_void_p) for name in ("next", "name", "data")),
            *((f"method_{number}", ctypes.c_void_p) for number in range(12)),
            ("xCurrentTimeInt64", ctypes.c_void_p),
            (
                "xSetSystemCall",
                ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
            ),
        )

    import _sqlite3

    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(Vfs)
    vfs = library.sqlite3_vfs_find(None)
    do_without_locks.kept = fcntl_type(lockless)  # type: ignore[attr-defined]
    replaced = ctypes.cast(do_without_locks.kept, ctypes.c_void_p)  # type: ignore[attr-defined]
    if vfs.contents.xSetSystemCall(ctypes.cast(vfs, ctypes.c_void_p), b"fcntl", replaced):
        raise OSError("SQLite does not let its calls of fcntl be replaced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("database", type=Path)
    parser.add_argument("--synchronous", choices=["NORMAL", "FULL"], default="FULL")
    parser.add_argument("--mmap-bytes", type=int, default=0)
    parser.add_argument("--no-locks", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    database = Database(options.database, options.synchronous, options.mmap_bytes)
    if options.no_locks:
        do_without_locks()
        store = Store(database)
        threading.Thread(target=_note, args=(store, database.read_for_ever), daemon=True).start()
    else:
        reader = _read_in_a_process(database)  # before a connection is there: none may be taken along
        store = Store(database)
        threading.Thread(target=_note, args=(store, reader), daemon=True).start()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                for line in self.rfile:
                    verb, _, argument = line.decode().strip().partition(" ")
                    if verb == "insert":
                        store.insert(int(argument))
                        answer = argument
                    else:
                        answer = json.dumps(store.check())
                    self.wfile.write(answer.encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("0.0.0.0", options.port), Handler) as server:  # noqa: S104 - the address moves
        server.serve_forever()


def _note(store: Store, wait: Callable[[], str]) -> None:
    try:
        store.problems.append(wait())
    except sqlite3.Error as error:
        store.problems.append(f"what reads beside it: {error}")


def _read_in_a_process(database: Database) -> Callable[[], str]:
    """Read in a child; return how to wait for its end, which should not come."""
    pid = os.fork()
    if pid:
        return lambda: f"the process that reads beside it ended ({os.waitpid(pid, 0)[1]}): see the log"
    try:
        sys.stderr.write(f"{database.read_for_ever()}\n")
    except sqlite3.Error as error:
        sys.stderr.write(f"{error}\n")
    finally:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
