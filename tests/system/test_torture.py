"""A short run of the torture campaign; `make torture` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.campaigns.torture.__main__ import run
from tests.campaigns.torture.cases import Scale

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "part", ["crashes", "disks", "restores", "planted", "replicas", "wire", "planted-wire"]
)
def test_a_store_keeps_what_it_acknowledged_and_every_planted_bug_is_found(part: str) -> None:
    report = run(random.SystemRandom().randrange(1 << 32), Scale.SHORT, (part,))
    assert report.passed, report
