"""Orders that are cut off half-way, and runs that must not be taken for one another."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from common.bundle import WorkloadPaths
from common.container import incarnation
from outlive.cluster import eventually
from tests.system.clusters import NAME, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.mark.parametrize("returns", [True, False])
async def test_an_agent_that_dies_in_mid_restore_is_no_end_of_the_takeover(returns: bool) -> None:
    async with protected_redis(("a", "b"), fill_mib=256, freeze_deadline_ms=10_000) as cluster:
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)
        second = cluster.nodes["b"]
        file = WorkloadPaths(second.config, NAME).incarnation_file
        assert not file.exists()
        await cluster.lab.power_off("a")
        deadline_s = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        await second.stop("agent", signal.SIGKILL)
        run = incarnation(second.config, NAME)
        assert run is not None
        assert not run.came_up, "it was to be killed in the middle"
        if returns:
            await second.start("agent")
        await second.wait_for(NAME, lambda w: w.state == "leading" and w.running, what="led by b")
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("get", "kept") == "yes"
        if not returns:  # conmon and criu have done it without the agent, which takes it for its own later
            await second.start("agent")
            await second.wait_for(NAME, lambda w: w.capture is not None, what="captured on b")
            assert await cluster.redis("get", "kept") == "yes"


async def test_what_was_stopped_and_started_afresh_is_not_brought_back_from_before() -> None:
    async with protected_redis(("a", "b")) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.redis("set", "x", "old")
        await cluster.wait_for_epochs(4)
        await first.cli("stop", NAME)
        # From here on every capture of a fails: the images' directory is a file.
        images = first.host.run_dir / "images" / NAME
        await first.host.run(["sh", "-c", f"rm -rf {images} && touch {images}"])
        await first.cli("start", NAME)
        await eventually(cluster.answers, what="redis answers again")

        async def told() -> bool:
            status = await second.workload(NAME)
            return status is not None and not status.restorable and "earlier run" in " ".join(status.reasons)

        await eventually(told, what="b knows that what it has is of an earlier run")
        status = await first.workload(NAME)
        assert status is not None
        assert not status.restorable
        assert "unprotected" in status.reason
        await cluster.lab.power_off("a")
        waiting = await second.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        assert "earlier run" in waiting.reason
        await asyncio.sleep(1.0)
        standby = await second.workload(NAME)
        assert standby is not None
        assert not standby.running


async def test_two_workloads_on_one_node_do_not_disturb_each_other() -> None:
    zeros = "b = bytearray(64 << 20)\nimport time\nfor i in range(0, len(b), 4096): b[i] = 0\ntime.sleep(1e6)"
    async with protected_redis(("a", "b"), fill_mib=64, epoch_interval_ms=100) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        options = ("--node", "a", "--node", "b", "--interval-ms", "100", "--right-to-lead", "fence")
        await first.cli("protect", "zeros", *options, "--", "python3", "-c", zeros)
        await second.wait_for("zeros", lambda w: w.restorable, what="restorable")
        await cluster.wait_for_epochs(15)
        digest = await cluster.redis("eval", _DIGEST, "0")
        await cluster.wait_for_epochs(4)
        await cluster.lab.power_off("a")
        for name in (NAME, "zeros"):
            await second.wait_for(name, lambda w: w.state == "leading" and w.running, what="led by b")
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("eval", _DIGEST, "0") == digest


_DIGEST = """
local sum = ''
for i = 0, 4095 do sum = redis.sha1hex(sum .. (redis.call('get', 'fill:' .. i) or 'none')) end
return sum
"""
