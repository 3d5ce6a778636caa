"""The benchmark of failovers: a short run of it, and what its numbers have to agree on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def test_a_short_run_prints_one_object_whose_parts_lie_within_the_outage() -> None:
    command = [sys.executable, "-m", "bench.failover", "--runs", "2", "--sizes", "16", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["benchmark"], report["right_to_lead"]) == ("failover", "fence")
    (size,) = report["sizes"]
    assert len(size["outages_ms"]) == size["runs"] == 2
    parts = size["parts_ms"]
    assert all(part["n"] == 2 for part in parts.values()), parts
    assert parts["detection_ms"]["p50"] >= report["suspect_after_ms"]
    assert 0 < parts["restore_ms"]["p50"] < size["outage_ms"]["max"]
