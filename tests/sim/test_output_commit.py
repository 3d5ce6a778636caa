"""Output commit as it is modelled: sound in many clusters, and each planted bug is found."""

from __future__ import annotations

import pytest

from tests.sim.output_commit import BUGS, Violation, run_seed

SEEDS = 300
WITHIN = 3000
"""Seeds within which a bug has to show."""


def test_who_takes_over_knows_all_that_clients_were_told() -> None:
    results = [run_seed(seed) for seed in range(SEEDS)]
    assert sum(result.takeovers for result in results) > SEEDS
    assert min(result.releases for result in results) > 0


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_of_output_commit_is_found(bug: str) -> None:
    assert any(is_found(seed, bug) for seed in range(WITHIN))


def is_found(seed: int, bug: str) -> bool:
    try:
        run_seed(seed, frozenset({bug}))
    except Violation:
        return True
    return False
