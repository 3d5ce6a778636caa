"""The benchmark of overhead at a size that says nothing about speed: epochs when protected, else none."""

from __future__ import annotations

import os
import shutil

import pytest

from bench.overhead import Options, measure
from tests.system.bench_page import documented, printed

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


async def test_epochs_are_taken_in_protected_rounds_only() -> None:
    options = Options(
        fill_mib=0, rounds=1, seconds=4, load_percent=20, keys=1000, writer_mib=8, writer_pages_per_s=2000
    )
    report = await measure(options)  # which checks that there were epochs, and that there were none
    opened = report.open_loop
    assert opened.rate_per_s == pytest.approx(report.capacity_per_s / 5, rel=0.01)
    assert 0 < opened.unprotected.p50_ms <= opened.unprotected.p99_ms <= opened.unprotected.max_ms
    assert min(opened.epochs, report.saturated.epochs, report.writer.epochs) >= 1
    assert opened.within_bound == (opened.protected.p99_ms <= opened.p99_bound_ms)
    assert report.saturated.cpu_s_per_epoch.workload > 0
    assert report.writer.protected_per_s.p50 > 0
    fields, mentioned = documented("bench.overhead")
    assert fields <= printed(report) <= mentioned
