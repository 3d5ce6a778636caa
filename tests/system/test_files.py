"""Workloads outlive their hosts together with their files: of the same instant, and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import StoreError, WorkloadError
from common.events import Event, EventRecord, event_file, read_events
from common.model import FilePath
from outlive.cluster import eventually
from tests.system.clusters import NAME, REDIS, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

WITH_LOG = (*REDIS, "--dir", "/data", "--appendonly", "yes", "--appendfsync", "no")
DATA = (FilePath(path="/data"),)


def data_of(cluster: Protected, node: str) -> Path:
    return Path(cluster.nodes[node].config.node.state_dir) / "workloads" / NAME / "files" / "0"


async def read_by_its_log(cluster: Protected, node: str) -> None:
    """Have redis begin anew, from nothing but its files."""
    await cluster.nodes[node].cli("stop", NAME)
    await cluster.nodes[node].cli("start", NAME)
    await eventually(cluster.answers, what="redis answers")


async def test_a_redis_and_its_log_outlive_their_host_again_and_again() -> None:
    async with protected_redis(("a", "b"), command=WITH_LOG, files=DATA) as cluster:
        leader, replica = "a", "b"
        for turn in range(3):
            await cluster.redis("set", f"turn:{turn}", f"value {turn}" * 100)
            await cluster.wait_for_epochs(4, leader)
            await cluster.lab.power_off(leader)
            await cluster.nodes[replica].wait_for(
                NAME, lambda w: w.role == "primary" and w.running, what="taken over"
            )
            await eventually(cluster.answers, what=f"redis answers after takeover {turn}")
            assert list(data_of(cluster, replica).glob("appendonlydir/*.incr.aof"))
            for earlier in range(turn + 1):
                assert await cluster.redis("get", f"turn:{earlier}") == f"value {earlier}" * 100
            await cluster.redis("set", "after", str(turn))
            await cluster.lab.power_on(leader)
            await cluster.nodes[leader].start()
            leader, replica = replica, leader
            await cluster.wait_until_protected(leader, replica)
        await read_by_its_log(cluster, leader)
        for earlier in range(3):
            assert await cluster.redis("get", f"turn:{earlier}") == f"value {earlier}" * 100
        assert await cluster.redis("get", "after") == "2"
        assert altered(cluster, "a") == altered(cluster, "b") == []


def altered(cluster: Protected, node: str) -> list[EventRecord]:
    found = read_events(event_file(cluster.nodes[node].config))
    return [each for each in found if each.event == Event.FILES_ALTERED]


async def test_what_somebody_changes_on_a_standby_is_found_and_mended() -> None:
    async with protected_redis(("a", "b"), command=WITH_LOG, files=DATA, exclude=("*.tmp",)) as cluster:
        await cluster.redis("set", "key", "value")
        await cluster.wait_for_epochs(4, "a")
        (data_of(cluster, "a") / "left-out.tmp").write_bytes(b"of a")
        leads = await cluster.nodes["a"].cli("store", "verify", NAME, "--files", check=False)
        assert leads.returncode == WorkloadError.exit_code
        assert "give this order on a standby" in leads.stderr
        b = cluster.nodes["b"]
        sound = await b.cli("store", "verify", NAME, "--files", "--output", "json")
        assert json.loads(sound.stdout)["different"] == 0
        (log_file,) = data_of(cluster, "b").glob("appendonlydir/*.incr.aof")
        log_file.chmod(0o600)
        (data_of(cluster, "b") / "stray").touch()
        (data_of(cluster, "b") / "left-out.tmp").write_bytes(b"of b")
        mended = await b.cli("store", "verify", NAME, "--files", check=False)
        assert mended.returncode == StoreError.exit_code
        assert "stray is not in the epoch" in mended.stdout
        assert "all was made equal again" in mended.stdout
        assert not (data_of(cluster, "b") / "stray").exists()
        assert len(altered(cluster, "b")) == 1
        (data_of(cluster, "b") / "appendonlydir" / "stray").touch()
        await cluster.lab.power_off("a")
        await b.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="taken over")
        await eventually(cluster.answers, what="redis answers after the takeover")
        assert "appendonlydir/stray" in altered(cluster, "b")[1].reason
        assert await cluster.redis("get", "key") == "value"
        assert not (data_of(cluster, "b") / "appendonlydir" / "stray").exists()
        assert (data_of(cluster, "b") / "left-out.tmp").read_bytes() == b"of b"
        await read_by_its_log(cluster, "b")
        assert await cluster.redis("get", "key") == "value"
