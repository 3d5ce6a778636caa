"""The recovery point objective on a real cluster: missed while a replica stores nothing, and met again."""

from __future__ import annotations

import json

import pytest

from common.control import WorkloadStatus
from common.events import Event, event_file, read_events
from outlive.cluster import eventually
from tests.system.clusters import NAME, Protected, protected_redis
from tests.system.test_replicas import with_store

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


async def restart_with_store(cluster: Protected, min_free_bytes: int) -> None:
    """Let b's agent begin again, with another idea of how much of its disk is to stay free."""
    node = cluster.nodes["b"]
    await node.stop("agent")
    directory = str(node.config.store_dir)
    again = with_store(node, min_free_bytes=min_free_bytes, directory=directory)
    again.processes = node.processes
    cluster.nodes["b"] = again
    await again.start("agent")


async def test_a_replica_that_stores_nothing_new_costs_the_objective_until_it_does() -> None:
    async with protected_redis(epoch_interval_ms=500, rpo_ms=4000) as cluster:
        first = cluster.nodes["a"]
        await first.wait_for(NAME, lambda w: w.restorable and w.rpo == "met", what="well within it")

        await restart_with_store(cluster, 1 << 60)

        def missed(workload: WorkloadStatus) -> bool:
            return workload.restorable and workload.rpo == "missed"

        status = await first.wait_for(NAME, missed, what="restorable, but too old")
        assert status.rpo_ms == 4000
        told = await first.cli("status", "--output", "json", check=False)
        assert (told.returncode, json.loads(told.stdout)["rpo_missed"]) == (17, [NAME])

        await restart_with_store(cluster, 1 << 20)
        await first.wait_for(NAME, lambda w: w.restorable and w.rpo == "met", what="within it again")

        async def told_in_order() -> bool:  # the event is written after the status is known
            events = [each.event for each in read_events(event_file(first.config))]
            told = [event for event in events if event.startswith("rpo.")]
            assert told in ([Event.RPO_EXCEEDED], [Event.RPO_EXCEEDED, Event.RPO_MET])
            return len(told) == 2

        await eventually(told_in_order, what="events of both")
