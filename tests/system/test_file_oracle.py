"""A short run of the file oracle; `make file-oracle` is the long one."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from tests.campaigns.file_oracle import run_seed

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the oracle is a C program"),
]


@pytest.mark.parametrize(("system", "watched"), [("ext4", True), ("xfs", True), ("tmpfs", False)])
async def test_files_are_what_they_were_when_memory_was_and_both_come_back(
    system: str, watched: bool
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    run = await run_seed(system, seed, 12, 2, restore_every=12, watched=watched)
    assert not run.wrong, run
    assert run.compared, run
    assert run.restored == 1, run
