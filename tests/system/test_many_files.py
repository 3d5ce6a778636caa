"""The short version of the campaign with very many files (`make many-files`)."""

from __future__ import annotations

import pytest

from tests.campaigns.many_files import run

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


async def test_a_redis_among_many_files_outlives_its_host() -> None:
    report = await run(20_000, 3)
    assert report.missing == 0
    assert report.told_scanned > 0
    assert report.primary_rss_mib < 400
    assert report.standby_rss_mib < 400
