"""How answers reach stdout: as one JSON object, or as tables and lines for people.

In: an `Answer` (what a program reads) and `Rows` or lines (what people read). JSON has every epoch as
`{"term": 3, "epoch": 1042}` and a `schema_version`; keys may be added without a new version, never removed
or given another meaning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from common.errors import OutliveError
from common.model import EpochId

if TYPE_CHECKING:
    from rich.text import Text

SCHEMA_VERSION = 1

_STYLES = {
    "yes": "green",
    "ok": "green",
    "alive": "green",
    "no": "bold red",
    "fail": "bold red",
    "silent": "bold red",
    "failed": "bold red",
    "warn": "yellow",
    "waiting": "yellow",
    "never seen": "yellow",
    "never heard": "yellow",
    "refused": "bold red",
    "all": "bold red",
}
"""Colours of the fixed words, on a terminal."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Root of what a verb prints with `--output json`."""

    schema_version: int = SCHEMA_VERSION


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An error as programs read it; `kind` is the class name, `exit_code` what the process exits with."""

    kind: str
    message: str
    hint: str
    exit_code: int
    retryable: bool


class ErrorAnswer(Answer, frozen=True, kw_only=True):
    """What stands on stdout instead of the answer when a verb fails."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: every row has one text for each column; columns in `right` are aligned to the right."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: frozenset[str] = field(default_factory=frozenset)


def print_answer(answer: Answer, *, one_line: bool = False) -> None:
    """Print one JSON object; on one line where more will follow."""
    print_json(plain(answer), one_line=one_line)


def print_json(value: object, *, one_line: bool = False) -> None:
    """Print one value of JSON's own types."""
    print(json.dumps(value, indent=None if one_line else 2, ensure_ascii=False), flush=True)


def print_view(*parts: Rows | str) -> None:
    """Print tables and lines for people; nothing is cut off, coloured only on a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=1000, markup=False, highlight=False, emoji=False)
    for part in parts:
        if isinstance(part, str):
            print(part)
            continue
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in part.columns:
            table.add_column(column, justify="right" if column in part.right else "left", no_wrap=True)
        for row in part.rows:
            table.add_row(*(_styled(cell) for cell in row))
        with console.capture() as drawn:
            console.print(table)
        print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # the last column is padded too
    sys.stdout.flush()


def error_answer(error: OutliveError, *, exit_code: int | None = None) -> ErrorAnswer:
    """Return an error as JSON has it; the exit code is that of its class unless another is given."""
    return ErrorAnswer(
        error=ErrorDetail(
            kind=type(error).__name__,
            message=error.message,
            hint=error.hint,
            exit_code=error.exit_code if exit_code is None else exit_code,
            retryable=error.retryable,
        )
    )


def plain(value: object) -> object:
    """Return `value` as JSON's own types: structs as objects with all their keys, epochs too."""
    match value:
        case EpochId():
            return {"term": value.term, "epoch": value.epoch}
        case msgspec.Struct():
            return {key: plain(item) for key, item in msgspec.structs.asdict(value).items()}
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case tuple() | list():
            return [plain(item) for item in value]
    return value


def wall_time(wall_s: float) -> str:
    """Return a wall clock reading for people, in local time with milliseconds."""
    return datetime.fromtimestamp(wall_s).astimezone().isoformat(sep=" ", timespec="milliseconds")


def duration(value_s: float) -> str:
    """Return a length of time for people: seconds at first, then the largest unit of which there are two."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value_s >= 2 * unit_s:
            return f"{int(value_s // unit_s)} {unit}"
    return f"{value_s:.1f} s"


def yes_no(value: bool) -> str:
    """Return the fixed word."""
    return "yes" if value else "no"


def _styled(cell: str) -> Text:
    from rich.text import Text

    return Text(cell, style=_STYLES.get(cell, ""))
