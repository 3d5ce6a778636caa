"""Some of the failures of the long series, each in a lab of its own (`make scenarios` runs them all)."""

from __future__ import annotations

import pytest

from tests.campaigns.scenarios import SCENARIOS, Report, run, table

pytestmark = [pytest.mark.system, pytest.mark.timeout(200)]


@pytest.mark.parametrize("name", ["power-loss-a", "keeper-killed", "address-removed", "address-stolen"])
async def test_it_is_as_expected_and_told_in_a_line(name: str) -> None:
    report: Report = await run([name])
    assert report.passed, report
    (outcome,) = report.outcomes
    assert outcome.lives == (2 if name == "power-loss-a" else 1)
    assert outcome.answered > 10
    assert outcome.cause.startswith("term ") or name == "keeper-killed"
    assert (outcome.two_answered > 0) == (name == "address-stolen"), "the prober sees two that answer"
    assert outcome.broke in table(report)


def test_every_failure_says_what_it_is() -> None:
    assert all(scenario.__doc__ for scenario in SCENARIOS.values())
