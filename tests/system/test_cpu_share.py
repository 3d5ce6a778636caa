"""The agent leaves the processors to others, except when it is late, and nobody waits with it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from common.bundle import WorkloadPaths
from common.container import running_init_pid
from common.scheduling import agent_group, cpu_home
from outlive.cluster import eventually
from tests.system.clusters import NAME, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

_IDLE = "cpu.idle"


def cpu_group(pid: int) -> Path | None:
    """Return the directory of the cgroup that rules a process's processors, if it is an agent's."""
    home = cpu_home(own=Path(f"/proc/{pid}/cgroup"))
    if home == Path("/dev/null"):
        return None
    names = {line.rpartition(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}
    (name,) = (name for name in names if name.endswith(".agent"))
    return home.parent / name.lstrip("/")


def beating_children(pid: int) -> list[int]:
    """Return the children of an agent that are copies of it: those that beat."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == own]


def sees_first(group: Path) -> None:
    """Look until the group comes first, as it does in each freeze, for milliseconds. Blocking."""
    weights = [group / name for name in ("cpu.weight", "cpu.shares") if (group / name).exists()]
    until_s = time.monotonic() + 20
    while not any(weight.read_text().strip() in ("1000", "10240") for weight in weights):
        assert time.monotonic() < until_s, "it does not come first while the workload stands still"
        time.sleep(0.0005)


async def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_who_beats_for_the_agent_ends_with_it_and_is_replaced_by_it() -> None:
    async with protected_redis() as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        (of_first,) = beating_children(first.processes["agent"].pid)
        (of_second,) = beating_children(second.processes["agent"].pid)
        os.kill(of_first, signal.SIGKILL)
        await eventually(lambda: gone(of_first), what="reaped")
        await first.wait_for(NAME, lambda w: w.state == "leading", what="led")
        assert "beats.lost" in (first.host.log_dir / "agent.log").read_text()
        await second.stop("agent", signal.SIGKILL)
        await eventually(lambda: gone(of_second), what="ended with its agent")


async def test_the_agent_waits_for_others_and_they_do_not_wait_with_it() -> None:
    async with protected_redis(rpo_ms=2000) as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        group = cpu_group(first.processes["agent"].pid)
        if group is None:
            pytest.skip("no cgroup hierarchy here has the cpu controller with cpu.idle")
        assert group.name == agent_group(first.config.node.cgroup_parent)
        init_pid = running_init_pid(first.config, NAME)
        assert init_pid is not None
        shim = int(WorkloadPaths(first.config, NAME).shim_pid_file.read_text())
        (beats,) = beating_children(first.processes["agent"].pid)
        for pid in (first.processes["keeper"].pid, init_pid, shim, beats):
            assert cpu_group(pid) is None

        async def stays(idle: str) -> bool:
            for _ in range(8):
                if (group / _IDLE).read_text().strip() != idle:
                    return False
                await asyncio.sleep(0.02)  # a claim, for a freeze, is over sooner
            return True

        await eventually(lambda: stays("1"), what="it takes what others leave")
        await asyncio.to_thread(sees_first, group)
        second.processes["agent"].send_signal(signal.SIGSTOP)
        await eventually(lambda: stays("0"), what="epochs are overdue")
        second.processes["agent"].send_signal(signal.SIGCONT)
        await eventually(lambda: stays("1"), what="it has caught up")
        assert await cluster.answers()
    assert not group.exists()


async def test_it_does_not_if_the_configuration_says_so() -> None:
    async with protected_redis(settings={"node": {"agent_cpu": "fair"}}) as cluster:
        assert cpu_group(cluster.nodes["a"].processes["agent"].pid) is None
