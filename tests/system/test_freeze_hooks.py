"""Commands around freezes, run by a real agent: each epoch has them, and one that fails costs epochs only."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.model import EpochId
from outlive.cluster import eventually
from tests.system.clusters import NAME, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


async def test_a_hook_that_fails_costs_epochs_until_it_does_not(tmp_path: Path) -> None:
    closed, log = tmp_path / "closed", tmp_path / "log"
    hook = {
        "workload": NAME,
        "before": ["/usr/bin/test", "!", "-e", str(closed)],
        "after": ["/bin/sh", "-c", f"echo $OUTLIVE_EPOCH >> {log}"],
    }
    async with protected_redis(settings={"[freeze_hooks]": hook}) as cluster:
        await cluster.wait_for_epochs(3, "a")
        told = [EpochId.parse(line) for line in log.read_text().split()]
        assert len(told) > 3
        assert told == sorted(told)

        closed.touch()

        async def told_of_it() -> bool:
            return (
                "freeze_hooks.before" in (await cluster.nodes["a"].cli("events", "--output", "json")).stdout
            )

        await eventually(told_of_it, what="the failing hook is told")
        assert await cluster.redis("ping") == "PONG"
        closed.unlink()
        await cluster.wait_for_epochs(2, "a")
