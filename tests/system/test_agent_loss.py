"""The agent's absence never harms a workload; the end of a workload is told and handled as declared."""

from __future__ import annotations

import asyncio
import signal

import pytest

from outlive.cluster import eventually
from outlive.probe import read_log
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


async def test_a_killed_agent_leaves_redis_serving_and_a_new_one_goes_on() -> None:
    async with protected_redis(("a", "b"), fill_mib=32) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        log = cluster.client.log_dir / "probe.jsonl"
        probe = await cluster.client.spawn(
            cluster.probe("write", "--log", str(log)), log=cluster.client.log_dir / "probe.log"
        )
        await cluster.wait_for_epochs(4)
        incarnation = (await first.workload(NAME), await first.metrics())
        await first.stop("agent", signal.SIGKILL)
        written = len(read_log(log))
        status = await first.wait_for(NAME, lambda w: "unprotected" in w.reason, what="unprotected")
        assert status.running
        await asyncio.sleep(1.0)
        assert (await first.status()).agent == "silent"
        standby = await second.workload(NAME)
        assert standby is not None
        assert standby.role == "replica"
        assert standby.term == 1
        assert len(read_log(log)) > written + 100
        await first.start("agent")
        await cluster.wait_for_epochs(3)
        again = await first.workload(NAME)
        assert again is not None
        assert again.term == 1
        assert incarnation[0] is not None
        probe.kill()
        await probe.wait()
        acknowledged = read_log(log)
        assert await cluster.present(acknowledged[-1].number) >= {each.number for each in acknowledged}


async def test_a_stopped_agent_ends_cleanly_and_leaves_the_workload() -> None:
    async with protected_redis(("a", "b")) as cluster:
        first = cluster.nodes["a"]
        process = first.processes["agent"]
        await first.stop("agent")
        assert process.returncode == 0
        assert await cluster.answers()
        await first.start("agent")
        await cluster.wait_for_epochs(4)


async def test_a_killed_keeper_is_no_reason_to_take_over_and_comes_back_as_leader() -> None:
    async with protected_redis(("a", "b")) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        await first.stop("keeper", signal.SIGKILL)
        await asyncio.sleep(1.5)
        standby = await second.workload(NAME)
        assert standby is not None
        assert standby.role == "replica"
        assert await cluster.answers()
        await first.start("keeper")
        await first.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led again")
        await cluster.wait_for_epochs(4)


async def test_agent_and_keeper_gone_is_silence_and_the_standby_takes_over() -> None:
    async with protected_redis(("a", "b")) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)
        await first.stop("keeper", signal.SIGKILL)
        await first.stop("agent", signal.SIGKILL)
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="taken over")
        assert await cluster.lab.is_off("a")  # the fence saw to it
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("get", "kept") == "yes"


async def _end_redis(cluster: Protected, node: str) -> None:
    """Let redis end by itself, without saving, with exit code 0."""
    await cluster.redis("shutdown", "nosave", check=False)


async def test_a_workload_that_ends_with_policy_stop_stays_down_and_its_exit_code_is_told() -> None:
    async with protected_redis(("a", "b"), on_exit="stop") as cluster:
        await _end_redis(cluster, "a")
        status = await cluster.nodes["a"].wait_for(NAME, lambda w: w.state == "stopped", what="stopped")
        assert status.exit_code == 0
        await asyncio.sleep(1.5)
        standby = await cluster.nodes["b"].workload(NAME)
        assert standby is not None
        assert not standby.running
        assert standby.role == "replica"


async def test_a_workload_that_ends_with_policy_restart_starts_afresh_in_the_same_term() -> None:
    async with protected_redis(("a", "b"), on_exit="restart") as cluster:
        await cluster.redis("set", "gone", "yes")
        await _end_redis(cluster, "a")
        await eventually(cluster.answers, what="redis answers again")
        assert await cluster.redis("get", "gone") == ""
        status = await cluster.wait_until_protected("a", "b")
        assert status.term == 1


async def test_a_workload_that_ends_with_policy_failover_goes_on_at_the_standby() -> None:
    async with protected_redis(("a", "b"), on_exit="failover") as cluster:
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)
        await _end_redis(cluster, "a")
        status = await cluster.nodes["b"].wait_for(
            NAME, lambda w: w.role == "primary" and w.running, what="taken over"
        )
        assert status.term == 2
        await eventually(cluster.answers, what="redis answers at b")
        assert await cluster.redis("get", "kept") == "yes"
        assert not await cluster.lab.is_off("a")  # it said itself that it runs nothing


async def test_a_planned_stop_is_no_failure() -> None:
    async with protected_redis(("a", "b"), on_exit="failover") as cluster:
        await cluster.nodes["a"].cli("stop", NAME)
        await cluster.nodes["a"].wait_for(NAME, lambda w: w.state == "stopped", what="stopped")
        await asyncio.sleep(1.5)
        standby = await cluster.nodes["b"].workload(NAME)
        assert standby is not None
        assert not standby.running
        await cluster.nodes["a"].cli("start", NAME)
        await cluster.wait_until_protected("a", "b")
