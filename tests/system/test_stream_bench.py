"""The stream's benchmark at a size that says nothing about speed: all senders run, what they send arrives."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import pytest

from bench.stream import StreamReport, measure
from bench.stream_node import Options

PAGE = Path(__file__).parents[2] / "docs/reference/benchmarks.md"

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root")]


def _names(value: object) -> set[str]:
    """All field names in a JSON value, but summaries' and the payload's: the page has words for them."""
    if isinstance(value, dict):
        inner = [part for name, part in value.items() if name != "payload" and "p50" not in _keys(part)]
        return _keys(value).union(*map(_names, inner))
    return set().union(*map(_names, value)) if isinstance(value, list) else set()


def _keys(value: object) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def test_every_sender_delivers_and_every_field_is_documented(tmp_path: Path) -> None:
    options = Options(mib=4, seed=1, epochs=3, changed_pages=50, interval_ms=20)
    report: StreamReport = measure(tmp_path, options, rounds=1)  # compares what arrived with what was sent
    assert report.skipped == ""
    assert {(each.sender, each.phase) for each in report.measured} == {
        (sender, phase) for sender in ("outlive", "ssh", "rsync") for phase in ("base", "steady")
    }
    assert all(each.seconds.p50 > 0 and each.cpu_s_per_gb.p50 > 0 for each in report.measured)
    ours = {each.phase: each for each in report.measured if each.sender == "outlive"}
    assert (ours["base"].seconds.n, ours["steady"].seconds.n) == (1, 3)
    assert 0.4 < ours["base"].sent_ratio < 0.8
    assert not list(tmp_path.iterdir())
    section = PAGE.read_text().partition("## `python -m bench.stream`")[2].partition("\n## ")[0]
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"\w+", row)
    }
    assert _names(msgspec.json.decode(msgspec.json.encode(report))) == documented
