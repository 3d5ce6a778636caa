"""A short run of the kill series; `make kill-series` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.campaigns.kill_series import run_series

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.mark.parametrize("backend", ["stock", "auto"])
async def test_signals_at_random_moments_of_capture_leave_redis_running_and_correct(backend: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    report = await run_series(rounds=8, seed=seed, fill_mib=16, backend=backend)
    assert report.passed, report
