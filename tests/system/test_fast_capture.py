"""The fast memory backend in whole clusters: what it captures is restored, goes on, and is captured again."""

from __future__ import annotations

import pytest

from common.events import Event
from outlive.cluster import eventually
from replica.store_reader import StoreReader
from tests.system.clusters import NAME, PORT, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

FAST = {"capture": {"backend": "auto"}}


async def test_a_workload_captured_while_it_ran_is_restored_and_captured_again_three_times() -> None:
    async with protected_redis(("a", "b"), settings=FAST, epoch_interval_ms=200, fill_mib=32) as cluster:
        leader, replica = "a", "b"
        for turn in range(3):
            metrics = (await cluster.nodes[leader].metrics()).workloads[0]
            assert metrics.backend == "fast"
            await cluster.redis("set", f"turn:{turn}", f"value {turn}")
            await cluster.wait_for_epochs(10, leader)
            await cluster.lab.power_off(leader)
            await cluster.nodes[replica].wait_for(
                NAME, lambda w: w.role == "primary" and w.running, what="taken over"
            )
            await eventually(cluster.answers, what=f"redis answers after takeover {turn}")
            for earlier in range(turn + 1):
                assert await cluster.redis("get", f"turn:{earlier}") == f"value {earlier}"
            assert int(await cluster.redis("dbsize")) > 32 * 64
            await cluster.lab.power_on(leader)
            await cluster.nodes[leader].start()
            leader, replica = replica, leader
            await cluster.wait_until_protected(leader, replica)


async def test_stock_criu_alone_restores_what_was_captured_while_it_ran() -> None:
    async with protected_redis(("a", "b"), settings=FAST, epoch_interval_ms=200, fill_mib=8) as cluster:
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(30)  # enough for folds
        second = cluster.nodes["b"]
        await second.stop("keeper")
        await second.stop("agent")
        await cluster.lab.power_off("a")
        newest = StoreReader.inspect(second.config.store_dir, NAME).newest
        assert newest is not None
        script = f"cd {second.host.dir} && sh {newest.path}/RESTORE </dev/null >restore.out 2>&1"
        await second.host.run(["sh", "-c", script])
        address = str(second.host.address.ip)
        command = ["timeout", "3", "redis-cli", "-h", address, "-p", str(PORT)]
        answer = await cluster.client.run([*command, "get", "kept"], check=False)
        assert answer.stdout.strip() == "yes"
        answer = await cluster.client.run([*command, "dbsize"], check=False)
        assert int(answer.stdout) > 8 * 64


async def test_a_replica_that_is_to_have_everything_anew_gets_what_no_epoch_changed() -> None:
    async with protected_redis(("a", "b"), settings=FAST, epoch_interval_ms=200, fill_mib=32) as cluster:
        await cluster.wait_for_epochs(5)
        before = (await cluster.nodes["a"].metrics()).workloads[0]
        await cluster.nodes["a"].cli("resync", "b", "--full")
        await cluster.wait_for_epochs(5)
        after = (await cluster.nodes["a"].metrics()).workloads[0]
        assert after.bytes_sent - before.bytes_sent > 8 << 20  # the filling compresses
        assert after.backend == "fast"
        events = (await cluster.nodes["a"].cli("events")).stdout
        assert Event.CAPTURE_BACKEND in events
        assert Event.CAPTURE_FAILED not in events


async def test_without_tracking_everything_is_copied_at_each_freeze_and_only_changes_are_sent() -> None:
    settings = {"capture": {"backend": "auto", "tracker": "none"}}
    async with protected_redis(("a", "b"), settings=settings, epoch_interval_ms=200, fill_mib=16) as cluster:
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(5)
        found = await cluster.nodes["a"].workload(NAME)
        assert found is not None
        assert found.capture is not None
        assert (found.capture.backend, found.capture.tracker) == ("fast", "none")
        before = (await cluster.nodes["a"].metrics()).workloads[0]
        await cluster.wait_for_epochs(5)
        after = (await cluster.nodes["a"].metrics()).workloads[0]
        epochs = after.epochs_captured - before.epochs_captured
        assert after.bytes_sent - before.bytes_sent < epochs * (8 << 20)
        await cluster.lab.power_off("a")
        await eventually(cluster.answers, what="redis answers after the takeover")
        assert await cluster.redis("get", "kept") == "yes"
