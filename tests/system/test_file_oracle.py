"""The file oracle, for a moment on each file system; `make file-oracle` is the long run."""

from __future__ import annotations

import os

import pytest

from tests.campaigns.file_oracle import run_seed

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

_SEEDS = {"ext4": 1, "xfs": 61, "overlay": 62, "btrfs": 3, "tmpfs": 4}
"""A seed for each file system."""


@pytest.mark.parametrize(("system", "seed"), _SEEDS.items())
async def test_what_is_captured_of_files_is_what_they_were(system: str, seed: int) -> None:
    run = await run_seed(system, seed, 20, 2, restore_every=20)
    assert run.wrong == ()
    assert run.epochs == 20
    assert run.restored == 1
    assert run.compared >= 4, run
