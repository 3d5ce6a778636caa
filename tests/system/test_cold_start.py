"""Hosts that come back, alone, together, in either order, with or without their disks.

Follows the table in docs/concepts/cold-start.md, row by row; cases that can follow each other share a lab.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal

import pytest

from common.control import WorkloadStatus
from common.keys import generate
from outlive.cluster import Node, eventually
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

FAILOVER = f"outlive failover {NAME} --accept-data-loss"


async def boot(cluster: Protected, *names: str) -> None:
    for name in names:
        if await cluster.lab.is_off(name):
            await cluster.lab.power_on(name)
            await cluster.nodes[name].start()


async def rests(cluster: Protected, name: str, state: str, reason: str) -> WorkloadStatus:
    """Wait for a state in which the workload doesn't run, with a reason that holds what is given."""
    return await cluster.nodes[name].wait_for(
        NAME,
        lambda w: w.state == state and reason in w.reason and not w.running,
        what=f"{state}: {reason}",
        timeout_s=20.0,
    )


async def led_by(cluster: Protected, name: str, term: int) -> None:
    await cluster.nodes[name].wait_for(
        NAME, lambda w: w.state == "leading" and w.running, what="leading", timeout_s=30.0
    )
    assert await term_on(cluster, name) == term
    await eventually(cluster.answers, what="redis answers")


async def term_on(cluster: Protected, name: str) -> int:
    status = await cluster.nodes[name].workload(NAME)
    assert status is not None
    return status.term


async def refused(node: Node, *words: str, code: int = 10) -> str:
    done = await node.cli(*words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


async def save(cluster: Protected, leader: str, key: str) -> None:
    """Write a key and wait until it is committed on the replica."""
    await cluster.redis("set", key, "kept")
    await cluster.wait_for_epochs(4, leader)


def lose(node: Node, *directories: str) -> None:
    for directory in directories:
        shutil.rmtree(node.host.state_dir / directory)


def replace_disk(node: Node) -> str:
    """Leave nothing but the configuration, make a new key; return the public one."""
    for entry in node.host.state_dir.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    key_file = node.host.etc_dir / "node.key"
    key_file.unlink()
    return generate(key_file).public


def accept_key(node: Node, peer: str, public: str) -> None:
    """Put a peer's new key into the node's file, and have its processes read it."""
    text = node.config_path.read_text()
    block = re.compile(rf'(name = "{peer}"\naddress = "[^"]*"\npublic_key = ")[^"]*')
    text, changed = block.subn(lambda match: match[1] + public, text)
    assert changed == 1
    node.config_path.write_text(text)
    for process in node.processes.values():
        process.send_signal(signal.SIGHUP)


async def test_one_reboots_then_both_and_the_replica_restores_by_itself() -> None:
    async with protected_redis() as cluster:
        a = cluster.nodes["a"]
        await save(cluster, "a", "first")

        # The replica alone: nothing changes, and it keeps what it has.
        sent = (await a.metrics()).workloads[0]
        await cluster.lab.power_off("b")
        await boot(cluster, "b")
        await cluster.wait_until_protected("a", "b")
        again = (await a.metrics()).workloads[0]
        assert again.bytes_sent - sent.bytes_sent < sent.memory_bytes / 4
        assert await term_on(cluster, "a") == 1

        # The primary alone: the replica takes over, and the old one comes back as its replica.
        await cluster.lab.power_off("a")
        await led_by(cluster, "b", 2)
        await boot(cluster, "a")
        await cluster.wait_until_protected("b", "a")
        await save(cluster, "b", "second")

        # Both, the primary's host first: it hears nobody and starts nothing.
        await asyncio.gather(cluster.lab.power_off("a"), cluster.lab.power_off("b"))
        await boot(cluster, "b")
        status = await rests(cluster, "b", "starting", f"outlive start {NAME} --off a")
        assert status.term == 2
        assert "a was not heard" in await refused(cluster.nodes["b"], "start", NAME)
        await boot(cluster, "a")
        await led_by(cluster, "a", 3)
        assert await cluster.redis("get", "second") == "kept"
        await cluster.wait_until_protected("a", "b")
        await save(cluster, "a", "third")

        # Both, the replica's host first: it confirms the other one off and restores.
        await asyncio.gather(cluster.lab.power_off("a"), cluster.lab.power_off("b"))
        await boot(cluster, "b")
        await led_by(cluster, "b", 4)
        for key in ("first", "second", "third"):
            assert await cluster.redis("get", key) == "kept"
        await boot(cluster, "a")
        await cluster.wait_until_protected("b", "a")


async def test_an_old_primary_that_is_up_first_starts_nothing() -> None:
    async with protected_redis() as cluster:
        a = cluster.nodes["a"]
        await cluster.lab.power_off("a")
        await led_by(cluster, "b", 2)
        await cluster.lab.power_off("b")
        await boot(cluster, "a")
        await rests(cluster, "a", "starting", f"outlive start {NAME} --off b")
        assert "b was not heard" in await refused(a, "start", NAME)
        await refused(a, "failover", NAME, "--accept-data-loss", "--old-primary-is-off", "b")
        assert (await a.cli("status", check=False)).returncode == 16
        await boot(cluster, "b")
        await rests(cluster, "b", "yielded", "outlive status on a")
        waiting = await rests(cluster, "a", "waiting", f"no epoch is stored here: outlive start {NAME}")
        assert waiting.term == 2
        await a.cli("start", NAME)
        await led_by(cluster, "a", 3)
        await cluster.wait_until_protected("a", "b")


async def test_without_a_fence_an_operator_decides_and_status_says_how() -> None:
    async with protected_redis(fenced=False, right_to_lead="manual") as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        await save(cluster, "a", "first")

        # Back at once: the term is given up, and the replica waits for a word.
        await cluster.lab.power_off("a")
        await boot(cluster, "a")
        await rests(cluster, "a", "yielded", "outlive status on b")
        await rests(cluster, "b", "waiting", FAILOVER)
        await b.cli("failover", NAME, "--accept-data-loss")
        await led_by(cluster, "b", 2)
        await cluster.wait_until_protected("b", "a")
        await save(cluster, "b", "second")

        # Both, and the primary never returns.
        await asyncio.gather(cluster.lab.power_off("a"), cluster.lab.power_off("b"))
        await boot(cluster, "a")
        await rests(cluster, "a", "waiting", FAILOVER)
        assert "--old-primary-is-off b" in await refused(a, "failover", NAME, "--accept-data-loss")
        await a.cli("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "b")
        await led_by(cluster, "a", 100)
        assert await cluster.redis("get", "second") == "kept"
        await boot(cluster, "b")
        await cluster.wait_until_protected("a", "b")

        # Both, and the replica never returns.
        await asyncio.gather(cluster.lab.power_off("a"), cluster.lab.power_off("b"))
        await boot(cluster, "a")
        await rests(cluster, "a", "starting", f"outlive start {NAME} --off b")
        await a.cli("start", NAME, "--off", "b")
        await led_by(cluster, "a", 200)
        assert await cluster.redis("get", "second") == ""
        await boot(cluster, "b")
        await cluster.wait_until_protected("a", "b")
        await save(cluster, "a", "third")

        # The primary comes back without its state before anybody took over.
        await cluster.lab.power_off("a")
        lose(a, "terms", "store")
        await boot(cluster, "a")
        said = await rests(cluster, "b", "waiting", "does not know that it leads term 200")
        assert said.reason.endswith(f"{FAILOVER} --old-primary-is-off a")
        assert (await b.cli("status", check=False)).returncode == 16
        await a.stop("keeper")
        await a.stop("agent")
        await rests(cluster, "b", "waiting", "right_to_lead is manual")
        await b.cli("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "a")
        await led_by(cluster, "b", 310)
        assert await cluster.redis("get", "third") == "kept"
        await a.start()
        await cluster.wait_until_protected("b", "a")


async def test_a_replica_that_lost_its_disk_or_a_part_of_it_learns_all_from_the_primary() -> None:
    async with protected_redis() as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]

        # The whole disk, keys too.
        await cluster.lab.power_off("b")
        public = replace_disk(b)
        await boot(cluster, "b")
        await asyncio.sleep(0.5)
        assert await b.workload(NAME) is None
        accept_key(a, "b", public)
        await cluster.wait_until_protected("a", "b")

        # The store, as if it were on a tmpfs; then the terms.
        for part in ("store", "terms"):
            await cluster.lab.power_off("b")
            lose(b, part)
            await boot(cluster, "b")
            await cluster.wait_until_protected("a", "b")
            assert await term_on(cluster, "b") == 1
        await save(cluster, "a", "kept")

        # The terms, and the primary has rebooted: what is stored says nothing about who may lead.
        await asyncio.gather(cluster.lab.power_off("a"), cluster.lab.power_off("b"))
        lose(b, "terms")
        await boot(cluster, "b")
        await asyncio.sleep(2.5)
        assert await b.workload(NAME) is None
        await boot(cluster, "a")
        await rests(cluster, "a", "starting", "declare it in b's file")
        declared = a.config_path.read_text()
        b.config_path.write_text(b.config_path.read_text() + declared[declared.index("[[workloads]]") :])
        await b.stop("keeper")
        await b.start("keeper")
        await led_by(cluster, "b", 2)
        assert await cluster.redis("get", "kept") == "kept"


async def test_a_primary_with_a_new_disk_never_starts_beside_the_node_that_took_over() -> None:
    async with protected_redis() as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.lab.power_off("a")
        await led_by(cluster, "b", 2)
        public = replace_disk(a)
        await boot(cluster, "a")
        assert "b was not heard and may lead it" in await refused(a, "start", NAME)
        assert not (await rests(cluster, "a", "stopped", "never started")).term
        accept_key(b, "a", public)
        await cluster.wait_until_protected("b", "a")
        assert await term_on(cluster, "a") == 2
