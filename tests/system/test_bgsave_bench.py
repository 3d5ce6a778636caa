"""The benchmark of BGSAVE at a size that says nothing about speed: it saves both ways, and epochs go on."""

from __future__ import annotations

import os
import shutil

import pytest

from bench.bgsave import Options, measure
from tests.system.bench_page import documented, printed

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


async def test_it_saves_with_and_without_protection() -> None:
    report = await measure(Options(fill_mib=8, saves=1, seconds=6, rate=200))
    assert report.unprotected.epochs == 0
    assert report.protected.epochs >= 1
    assert report.protected.frozen_ms.n == report.protected.epochs
    for saves in (report.unprotected, report.protected):
        assert 0 < saves.client_p99_ms.p50 <= saves.client_max_ms.p50
        assert 0 < saves.save_s.max < 6
    fields, mentioned = documented("bench.bgsave")
    assert fields <= printed(report) <= mentioned
