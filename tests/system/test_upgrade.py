"""A pair is upgraded one node at a time, while its workload runs on and stays protected."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from common.container import running_init_pid
from common.control import WorkloadStatus
from common.messages import BEAT_VERSION, PROTOCOL, Versions
from outlive.cluster import Node
from tests.system.clusters import NAME, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

_AS_VERSION = """
from common import messages
messages.SPOKEN = messages.Versions({oldest}, {newest})
messages.BEAT_VERSION = {beats}
from outlive.cli import main
main()
"""
PREVIOUS, PRESENT, NEXT = (
    Versions(PROTOCOL - 1, PROTOCOL - 1),
    Versions(PROTOCOL - 1, PROTOCOL),
    Versions(PROTOCOL, PROTOCOL + 1),
)


async def become(node: Node, spoken: Versions) -> None:
    """Restart a node's processes one after the other, as another version of Outlive."""
    beats = spoken.newest if spoken == NEXT else BEAT_VERSION
    program = _AS_VERSION.format(oldest=spoken.oldest, newest=spoken.newest, beats=beats)
    for role, endpoint in (("keeper", node.config.keeper_endpoint), ("agent", node.config.agent_endpoint)):
        await node.stop(role)
        node.processes[role] = await node.host.spawn(
            [sys.executable, "-c", program, "--config", str(node.config_path), role],
            log=node.host.log_dir / f"{role}.log",
            env=dict(os.environ),
            cwd=Path(__file__).parents[2],
        )
        await node._wait_for_answer(role, endpoint)


async def test_a_pair_stays_protected_while_it_is_upgraded_and_says_who_is_too_far_behind() -> None:
    async with protected_redis() as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        pid = running_init_pid(first.config, NAME)
        for versions in (PREVIOUS, NEXT):
            await become(second, versions)
            await cluster.wait_until_protected("a", "b")
            await cluster.wait_for_epochs(4)
        await become(first, NEXT)
        await cluster.wait_until_protected("a", "b")
        await cluster.wait_for_epochs(4)
        moved = await first.cli("switchover", NAME, "--to", "b", check=False)
        assert moved.returncode == 0, moved.stderr
        await become(first, PRESENT)  # the old primary is left behind by one version
        await cluster.wait_until_protected("b", "a")
        await cluster.wait_for_epochs(4, "b")

        await become(first, PREVIOUS)
        why = f"a speaks version {PROTOCOL - 1} of the wire format, b versions {PROTOCOL} to {PROTOCOL + 1}"

        def told(status: WorkloadStatus) -> bool:
            return any(why in reason and "upgrade a" in reason for reason in status.reasons)

        await second.wait_for(NAME, told, what="told that a is too far behind")
        await asyncio.sleep(1.0)
        status = await first.workload(NAME)
        assert status is not None
        assert (status.state, status.running) == ("following", False), "it hears b, and takes nothing over"
        await become(first, PRESENT)
        await cluster.wait_until_protected("b", "a")
        assert await cluster.answers()
        assert running_init_pid(first.config, NAME) is None
        assert pid != running_init_pid(second.config, NAME)
