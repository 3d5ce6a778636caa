"""The demonstration's database: what it answers, to whole commands or parts, and damage that it tells."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from outlive.demo_sqlite import Database, commands
from outlive.demo_witness import check_sqlite


def spoken(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def test_it_keeps_what_it_is_given(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    assert database.answer([b"SET", b"k\r\n", b"\x00v"]) == b"+OK\r\n"
    assert database.answer([b"GET", b"k\r\n"]) == b"$2\r\n\x00v\r\n"
    assert database.answer([b"GET", b"other"]) == b"$-1\r\n"
    assert database.answer([b"PING"]) == b"+PONG\r\n"
    assert database.answer([b"CHECK"]) == b"+ok\r\n"
    assert database.answer([b"DEL", b"k"]).startswith(b"-ERR")
    assert Database(tmp_path / "db").answer([b"GET", b"k\r\n"]) == b"$2\r\n\x00v\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_commands_may_come_in_parts(size: int) -> None:
    sent = spoken(b"SET", b"a", b"x\r\ny") + spoken(b"PING")
    received, heard = bytearray(), []
    for at in range(0, len(sent), size):
        received += sent[at : at + size]
        heard += list(commands(received))
    assert heard == [[b"SET", b"a", b"x\r\ny"], [b"PING"]]
    assert not received


def test_what_is_no_command_ends_the_connection() -> None:
    with pytest.raises(ValueError, match="array"):
        list(commands(bytearray(b"PING\r\n")))


class _Client:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    async def run(self, words: list[str], **_: object) -> _Client:
        return self

    @property
    def stdout(self) -> str:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "damaged", "told"),
    [
        ("ok", False, ""),
        ("row 7 missing", False, "its database damaged: row 7"),
        ("ok", True, "files of the"),
    ],
)
async def test_damage_is_told(tmp_path: Path, answer: str, damaged: bool, told: str) -> None:
    database = Database(tmp_path / "demo.db")
    for number in range(500):
        database.answer([b"SET", b"%d" % number, bytes(1000)])
    sqlite3.connect(tmp_path / "demo.db").execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if damaged:
        with (tmp_path / "demo.db").open("r+b") as file:
            file.seek(4096 * 20)
            file.write(b"\xff" * 8192)
    seen = await check_sqlite(_Client(answer), ["ask"], tmp_path / "demo.db")  # type: ignore[arg-type]
    assert bool(seen.problems) == bool(told)
    assert told in "".join(seen.problems)
