"""Several replicas of one workload: a late one harms nobody, and follows whoever takes over."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from common.control import ReplicaProgress
from common.events import Event, event_file, read_events
from common.model import EpochId
from outlive.cluster import Node, eventually
from outlive.declare import toml_value
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

INTERVAL_MS = 200


def with_store(node: Node, **store: Any) -> Node:
    """Give a node whose agent does not run another `[store]` table."""
    text = node.config_path.read_text().split("[store]")[0].rstrip()
    lines = "".join(f"{key} = {toml_value(value)}\n" for key, value in store.items())
    node.config_path.write_text(f"{text}\n\n[store]\n{lines}")
    return Node(node.host, node.config_path)


async def progress(cluster: Protected, replica: str) -> ReplicaProgress | None:
    """How far a replica is, as a's keeper says."""
    led = await cluster.nodes["a"].workload(NAME)
    assert led is not None
    assert led.running
    return next((each for each in led.replicas if each.node == replica), None)


class Steady:
    """Watches how long a replica is without a new epoch, and whether redis answers."""

    def __init__(self, cluster: Protected, replica: str) -> None:
        self._cluster = cluster
        self._replica = replica
        self.epochs = 0
        self.longest_gap_s = 0.0
        self.unanswered = 0

    async def __aenter__(self) -> Steady:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        failed = self._task.done()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        assert not failed, self._task

    async def _watch(self) -> None:
        newest: EpochId | None = None
        since_s = time.monotonic()
        while True:
            seen = await progress(self._cluster, self._replica)
            now_s = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now_s - since_s)
            if seen is not None and seen.acknowledged != newest:
                newest, since_s = seen.acknowledged, now_s
                self.epochs += 1
            self.unanswered += not await self._cluster.answers()
            await asyncio.sleep(0.05)


async def test_a_third_node_joins_late_is_refused_for_want_of_space_and_follows_the_successor() -> None:
    async with protected_redis(
        ("a", "b", "c"), fill_mib=64, without_agent=("c",), epoch_interval_ms=INTERVAL_MS
    ) as cluster:
        await cluster.redis("set", "kept", "yes")
        await refuses_without_space(cluster)
        await joins_while_epochs_go_on(cluster)
        await is_volatile(cluster.nodes["c"], cluster.nodes["b"])

        await cluster.lab.power_off("a")
        second, third = cluster.nodes["b"], cluster.nodes["c"]
        await second.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led by b")
        await eventually(cluster.answers, what="redis answers at b")
        assert await cluster.redis("get", "kept") == "yes"
        assert int(await cluster.redis("dbsize")) > 64 * 64
        follows = await third.wait_for(
            NAME,
            lambda w: w.restorable and w.stored is not None and w.stored.term == 2,
            what="restorable in b's term",
        )
        assert (follows.role, follows.leader, follows.running) == ("replica", "b", False)
        led = await second.wait_for(NAME, lambda w: w.restorable, what="protected by c")
        assert [each.node for each in led.replicas if each.restorable] == ["c"]


async def refuses_without_space(cluster: Protected) -> None:
    """A node without room refuses every epoch and says why; nobody else notices."""
    third = with_store(
        cluster.nodes["c"], min_free_bytes=1 << 60, directory=str(cluster.nodes["c"].host.run_dir / "store")
    )
    third.processes = cluster.nodes["c"].processes
    cluster.nodes["c"] = third
    async with Steady(cluster, "b") as steady:
        await third.start("agent")

        async def refused() -> bool:
            log = (cluster.nodes["a"].host.log_dir / "agent.log").read_text()
            return any("not_acknowledged" in line and "bytes free" in line for line in log.splitlines())

        await eventually(refused, what="a hears from c that there is no room")

        async def told() -> bool:
            return Event.STORE_LOW_SPACE in [event.event for event in read_events(event_file(third.config))]

        await eventually(told, what="c tells its operator of the lack of space")
        await cluster.wait_for_epochs(3)
    assert steady.unanswered == 0
    assert steady.longest_gap_s < 10.0
    held = await progress(cluster, "c")
    assert held is not None
    assert held.acknowledged is None
    assert not held.restorable
    assert any("bytes free" in reason for reason in held.reasons)
    lines = (await cluster.nodes["a"].cli("status", check=False)).stdout.splitlines()
    assert any("replica c could not restore it" in line and "bytes free" in line for line in lines)
    status = await third.workload(NAME)
    assert status is None or status.stored is None


async def joins_while_epochs_go_on(cluster: Protected) -> None:
    """With a sane limit the node gets all of the memory, while the other one gets its epochs."""
    third = cluster.nodes["c"]
    await third.stop("agent")
    joined = with_store(third, min_free_bytes=1 << 20, directory=third.config.store.directory)
    joined.processes = third.processes
    cluster.nodes["c"] = joined
    async with Steady(cluster, "b") as steady:
        await joined.start("agent")
        ready = await joined.wait_for(NAME, lambda w: w.restorable, what="restorable")
        await cluster.wait_for_epochs(3)
    assert ready.role == "replica"
    assert ready.stored is not None
    assert steady.unanswered == 0
    assert steady.epochs >= 3
    assert steady.longest_gap_s < 10.0
    done = await joined.cli("store", "show", NAME, "--output", "json")
    assert json.loads(done.stdout)["epoch"]["pages"] * 4096 > 64 << 20


async def is_volatile(volatile: Node, durable: Node) -> None:
    """A store in memory is called what it is, one on disk is not."""
    for node, expected in ((volatile, True), (durable, False)):
        status = await node.workload(NAME)
        assert status is not None
        assert status.volatile is expected
        lines = (await node.cli("status", check=False)).stdout.splitlines()
        assert any("volatile" in line for line in lines) is expected
