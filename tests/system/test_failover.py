"""The main job: a redis outlives its host, again and again, and everybody sees what happened."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.control import WorkloadStatus
from common.errors import LabError
from outlive.cluster import eventually
from replica.store_reader import StoreReader
from tests.system.clusters import NAME, PORT, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def test_the_demo_survives_and_prints_one_object() -> None:
    command = [sys.executable, "-m", "outlive.cli", "demo", "--output", "json"]
    small = ["--size-mib", "32", "--epochs", "5", "--interval-ms", "400"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["survived"] is True
    assert report["epochs_committed"] >= 5
    assert report["writes"]["acknowledged"] > 100
    assert report["writes"]["present"] + report["writes"]["lost"] == report["writes"]["acknowledged"]
    assert report["writes"]["lost_window_ms"] <= 2 * report["epoch_interval_ms"]["max"] + 1000
    assert report["bytes"]["sent"] < report["bytes"]["full_equivalent"]
    assert [entry["event"] for entry in report["timeline"]]
    assert all(entry["reason"] for entry in report["timeline"])


async def test_a_restored_workload_is_protected_and_restored_again_three_times() -> None:
    async with protected_redis(("a", "b")) as cluster:
        leader, replica = "a", "b"
        for turn in range(3):
            await cluster.redis("set", f"turn:{turn}", f"value {turn}")
            await cluster.wait_for_epochs(4, leader)
            await cluster.lab.power_off(leader)
            await cluster.nodes[replica].wait_for(
                NAME, lambda w: w.role == "primary" and w.running, what="taken over"
            )
            await eventually(cluster.answers, what=f"redis answers after takeover {turn}")
            for earlier in range(turn + 1):
                assert await cluster.redis("get", f"turn:{earlier}") == f"value {earlier}"
            await cluster.lab.power_on(leader)
            await cluster.nodes[leader].start()
            leader, replica = replica, leader
            status = await cluster.wait_until_protected(leader, replica)
            assert status.term == turn + 2


async def test_manual_failover_is_refused_without_accepting_loss_and_works_with_it() -> None:
    async with protected_redis(("a", "b"), right_to_lead="manual", fenced=False) as cluster:
        second = cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)
        await cluster.lab.power_off("a")
        waiting = await second.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        assert "failover" in waiting.reason
        refused = await second.cli("failover", NAME, check=False)
        assert refused.returncode == 10
        unsure = await second.cli("failover", NAME, "--accept-data-loss", check=False)
        assert unsure.returncode == 10
        assert "old-primary-is-off" in unsure.stderr
        await second.cli("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "a")
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led by b")
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("get", "kept") == "yes"


async def test_an_unfenced_silent_primary_is_never_replaced_and_goes_on_after_the_partition() -> None:
    settings = {"heartbeat": {"interval_ms": 50, "suspect_after_ms": 300}}
    async with protected_redis(("a", "b"), fenced=False, settings=settings) as cluster:
        await cluster.lab.cut("a")
        waiting = await cluster.nodes["b"].wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        assert not waiting.running
        first = await cluster.nodes["a"].workload(NAME)
        assert first is not None
        assert first.running
        await cluster.lab.mend("a")
        await cluster.nodes["b"].wait_for(NAME, lambda w: w.state == "following", what="following again")
        await cluster.wait_for_epochs(4)


async def test_a_primary_that_was_replaced_while_cut_off_ends_its_copy_when_it_hears_of_it() -> None:
    async with protected_redis(("a", "b"), fenced=False, right_to_lead="manual") as cluster:
        await cluster.lab.cut("a")
        second = cluster.nodes["b"]
        await second.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        await second.cli("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "a")
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led by b")
        await cluster.lab.mend("a")

        def follows(status: WorkloadStatus) -> bool:
            return status.role == "replica" and not status.running and status.leader == "b"

        await cluster.nodes["a"].wait_for(NAME, follows, what="a replica of b")
        await cluster.wait_until_protected("b", "a")
        assert await cluster.answers()


@pytest.mark.parametrize("backend", ["auto", "stock"])
async def test_what_a_cut_off_primary_captured_last_is_kept_and_can_be_restored_by_hand(backend: str) -> None:
    for _ in range(4):  # with epochs of milliseconds, the moment of the cut may find none on its way
        if await captured_last_is_kept(backend):
            return
    pytest.fail("nothing was ever on its way when the primary was cut off")


async def captured_last_is_kept(backend: str) -> bool:
    """Cut off a primary; return whether an epoch was on its way, after having seen to what became of it."""
    settings = {"capture": {"backend": backend}}
    async with protected_redis(fenced=False, right_to_lead="manual", settings=settings) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        address = str(cluster.lab.vip().ip)
        count = f"while redis-cli -h {address} -p {PORT} incr counted; do :; done >/dev/null 2>&1"
        counting = asyncio.create_task(
            first.host.run(["timeout", "8", "sh", "-c", count], check=False, timeout_s=60.0)
        )
        await cluster.wait_for_epochs(4)
        await cluster.lab.cut("a")
        await second.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        await second.cli("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "a")
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led by b")
        taken_over = int(await cluster.redis("get", "counted"))
        await cluster.lab.mend("a")
        await counting
        await cluster.wait_until_protected("b", "a")
        try:
            told = await first.wait_for(NAME, lambda w: bool(w.aside), what="set aside", timeout_s=10.0)
        except LabError:
            return False

        listed = json.loads((await first.cli("store", "aside", "--output", "json")).stdout)["epochs"]
        assert [each["path"] for each in listed] == list(told.aside)
        kept = Path(listed[0]["path"])
        if backend == "stock":
            assert listed[0]["needs"] is None, "all pages are at hand of a whole dump"
        if listed[0]["needs"] is not None:
            await second.stop("agent")  # it folds levels away
            shutil.copytree(second.config.store_dir / NAME, kept, symlinks=True, dirs_exist_ok=True)
            listed = json.loads((await first.cli("store", "aside", "--output", "json")).stdout)["epochs"]
            assert listed[0]["needs"] is None
        await first.stop("keeper")
        await first.stop("agent")
        epoch = f"t{listed[0]['epoch']['term']}-e{listed[0]['epoch']['epoch']}"
        script = f"cd {first.host.dir} && sh {kept}/views/{epoch}/RESTORE </dev/null >restore.out 2>&1"
        await first.host.run(["sh", "-c", script])
        own = str(first.host.address.ip)
        asked = await first.host.run(
            ["timeout", "3", "redis-cli", "-h", own, "-p", str(PORT), "get", "counted"]
        )
        assert int(asked.stdout) >= taken_over, "it is no older than what was taken over"
        return True


async def test_idle_epochs_cost_less_than_a_hundredth_of_the_memory() -> None:
    async with protected_redis(("a", "b"), fill_mib=64) as cluster:
        await cluster.wait_for_epochs(3)
        before = (await cluster.nodes["a"].metrics()).workloads[0]
        await cluster.wait_for_epochs(5)
        after = (await cluster.nodes["a"].metrics()).workloads[0]
        epochs = after.epochs_acknowledged - before.epochs_acknowledged
        assert (after.bytes_sent - before.bytes_sent) / epochs < 0.01 * after.memory_bytes


async def test_stock_criu_alone_restores_what_is_stored() -> None:
    async with protected_redis(("a", "b"), fill_mib=8) as cluster:
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(12)  # enough for a fold
        second = cluster.nodes["b"]
        await second.stop("keeper")
        await second.stop("agent")
        await cluster.lab.power_off("a")
        newest = StoreReader.inspect(second.config.store_dir, NAME).newest
        assert newest is not None
        script = f"cd {second.host.dir} && sh {newest.path}/RESTORE </dev/null >restore.out 2>&1"
        await second.host.run(["sh", "-c", script])
        address = str(second.host.address.ip)

        async def answer(*words: str) -> str:
            command = ["timeout", "3", "redis-cli", "-h", address, "-p", str(PORT), *words]
            return (await cluster.client.run(command, check=False)).stdout.strip()

        assert await answer("get", "kept") == "yes"
        assert int(await answer("dbsize")) > 8 * 64


async def test_a_paused_takeover_waits_for_the_operator_however_often_nodes_start_again() -> None:
    async with protected_redis(("a", "b")) as cluster:
        second = cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)
        would = json.loads((await second.cli("explain", NAME, "--output", "json")).stdout)
        assert would["workloads"][0]["would_fail_over"], would
        assert would["workloads"][0]["successor"] == "b"

        await cluster.nodes["a"].cli("pause", NAME)
        for role in ("keeper", "agent"):
            await second.stop(role)
        await second.start()
        await second.wait_for(NAME, lambda w: w.state == "following", what="following again")
        assert (await second.cli("explain", NAME, check=False)).returncode == 20
        await cluster.lab.power_off("a")
        waiting = await second.wait_for(NAME, lambda w: w.state == "waiting", what="waiting")
        assert "paused" in waiting.reason
        assert not waiting.running

        resumed = await second.cli("resume", NAME, "--timeout", "0.5", check=False)
        assert resumed.returncode == 19, "a is off, and cannot confirm it"
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="taken over")
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("get", "kept") == "yes"
