"""What the page on benchmarks says of one of them, against what that prints."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

PAGE = Path(__file__).parents[2] / "docs/reference/benchmarks.md"


def printed(report: msgspec.Struct) -> set[str]:
    """All field names of a report; the page has words of its own for those of summaries."""
    return _names(msgspec.json.decode(msgspec.json.encode(report)))


def documented(module: str) -> tuple[set[str], set[str]]:
    """Names in code in the tables of a benchmark's section: those that have a row, and all that are there."""
    section = PAGE.read_text().partition(f"## `python -m {module}`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.M)
    return _code(" ".join(field for field, _ in rows)), _code(" ".join(" ".join(row) for row in rows))


def _code(text: str) -> set[str]:
    return {name for code in re.findall(r"`([^`]*)`", text) for name in re.findall(r"\w+", code)}


def _names(value: object) -> set[str]:
    if isinstance(value, dict):
        inner = [part for part in value.values() if not (isinstance(part, dict) and "p50" in part)]
        return set(value).union(*map(_names, inner))
    return set().union(*map(_names, value)) if isinstance(value, list) else set()
