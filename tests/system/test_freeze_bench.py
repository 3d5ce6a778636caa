"""The freeze's benchmark at a size that says nothing about speed: both backends, and the process's clock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.freeze import measure
from bench.freeze_report import Options, swept
from primary.userfault import problem
from tests.system.bench_page import documented, printed

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(bool(problem()), reason=f"no fast backend: {problem()}"),
]


def _mounts() -> int:
    return Path("/proc/self/mounts").read_text().count("outlive-bench")


async def test_the_process_sees_the_freezes_that_criu_tells_of() -> None:
    before = _mounts()
    options = Options(
        dirty_pages=100, epochs=3, stock_epochs=1, processes=2, threads=2, levels=(0, 400), level_epochs=1
    )
    report = await measure(16, options)
    assert (report.ours.frozen_ms.n, report.stock.n) == (3, 1)
    assert report.pages.present >= 16 * 256
    assert report.pages.dirty_at_freeze >= 100 * 0.8
    assert report.pages.changed >= 100 * 0.8
    assert report.ours.frozen_ms.p50 * 0.5 < report.ours.ticker_ms.p50
    assert report.first_write_ns.protected > report.first_write_ns.unprotected
    assert [level.written for level in report.levels] == [0, 400]
    assert report.levels[1].dirty_at_freeze > report.levels[0].dirty_at_freeze
    assert _mounts() == before
    fields, mentioned = documented("bench.freeze")
    assert fields <= printed(swept([report])) <= mentioned
