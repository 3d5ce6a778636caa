"""A short run of the memory oracle, and bugs that it must find; `make oracle` is the long one."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from tests.campaigns.oracle import run_seed
from tests.campaigns.oracle_planted import hunt

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the oracle is a C program"),
]


async def test_what_is_captured_while_it_runs_is_restored_and_finds_itself_intact() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    run = await run_seed(seed, 50, 1 << 30, restores=True)
    assert not run.wrong, run
    assert run.restored == 1, run


async def test_trackers_and_agents_that_die_cost_time_and_nothing_else() -> None:
    run = await run_seed(random.SystemRandom().randrange(1 << 32), 30, 3, troubled=True)
    assert not run.wrong, run
    assert run.compared, run
    assert len(run.troubles) > 1, run


async def test_what_a_pagemap_says_is_what_stock_criu_dumps() -> None:
    """Scans without PAGEMAP_SCAN, as on older kernels; nothing is tracked, so it works on each."""
    run = await run_seed(random.SystemRandom().randrange(1 << 32), 15, 2, tracker="none")
    assert not run.wrong, run
    assert run.compared, run


@pytest.mark.parametrize(
    "bug", ["a marker in a file mapping counts as clean", "what is written counts as clean"]
)
async def test_a_planted_bug_is_found(bug: str) -> None:
    found = await hunt(bug, random.SystemRandom().randrange(1 << 32), 60)
    assert found.found, found
