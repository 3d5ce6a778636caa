"""A replica that its primary knows nothing of is asked what it holds, and gets no more than what differs."""

from __future__ import annotations

import json
import time

import pytest

from common.errors import StoreError
from outlive.cluster import eventually
from replica.store_reader import StoreReader
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

FILL_MIB = 64


async def bytes_sent(cluster: Protected) -> int:
    return sum(each.bytes_sent for each in (await cluster.nodes["a"].metrics()).workloads)


async def test_a_restarted_agent_and_a_resync_send_what_differs_and_a_full_one_everything() -> None:
    async with protected_redis(("a", "b"), fill_mib=FILL_MIB, epoch_interval_ms=300) as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.wait_for_epochs(3)
        whole_bytes = await bytes_sent(cluster)
        assert whole_bytes > FILL_MIB << 18

        await a.stop("agent")
        await cluster.redis("set", "kept", "yes")
        await a.start("agent")
        await cluster.wait_until_protected("a", "b")
        await cluster.wait_for_epochs(4)
        assert await bytes_sent(cluster) < whole_bytes / 10

        started_s = time.monotonic()
        answer = json.loads((await a.cli("resync", "b", "--output", "json")).stdout)
        assert [each["workload"] for each in answer["workloads"]] == [NAME]
        assert answer["bytes_sent"] < whole_bytes / 10
        assert time.monotonic() - started_s < 60
        answer = json.loads((await a.cli("resync", "b", "--full", "--output", "json")).stdout)
        assert answer["bytes_sent"] > whole_bytes / 2

        refused = await b.cli("resync", "a", check=False)
        assert refused.returncode == 5
        assert "does not receive epochs" in refused.stderr

        async def sound() -> bool:
            try:
                return StoreReader.inspect(b.config.store_dir, NAME).verify() == []
            except StoreError:
                return False  # replaced by a newer one meanwhile

        await eventually(sound, what="what b holds is whole", timeout_s=20)
        assert await cluster.redis("get", "kept") == "yes"
