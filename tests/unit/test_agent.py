"""The agent as a whole, where its parts meet: what it does when its disk or its directories are not as they
should be."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from common import durable
from common.config import Node, NodeConfig, Store
from common.control import Order
from common.errors import ConfigError, ProtocolError, StoreError
from common.keys import generate
from common.messages import PROTOCOL, Hello, Nack
from common.model import EpochId, WorkloadSpec
from common.scheduling import CpuShare
from common.terms import Leadership
from outlive import workload_agent
from outlive.agent import Agent
from outlive.agent_beats import AgentBeats
from outlive.heard_terms import HeardTerms
from outlive.workload_agent import WorkloadAgent

SPEC = WorkloadSpec(name="redis", nodes=("b", "a"), command=("redis-server",))


class Containers:
    """What would be done to containers, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.pid: int | None = None
        monkeypatch.setattr(workload_agent, "running_init_pid", lambda config, name: self.pid)
        for name in ("start_workload", "kill_workload"):
            monkeypatch.setattr(workload_agent, name, self._doing(name))

    def _doing(self, what: str) -> object:
        async def do(*arguments: object, **options: object) -> int:
            self.done.append(what)
            self.pid = 4711 if what == "start_workload" else None
            return 4711

        return do


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="oa-") as name:  # unix socket paths are short
        yield Path(name)


@pytest.fixture
async def agent(directory: Path) -> AsyncIterator[Agent]:
    generate(directory / "node.key")
    node = Node(
        name="a",
        address="127.0.0.1",
        agent_port=0,
        key_file=str(directory / "node.key"),
        state_dir=str(directory / "state"),
        run_dir=str(directory / "run"),
        image_dir=str(directory / "images"),
        criu="/bin/true",
    )
    config = NodeConfig(node=node, store=Store(min_free_bytes=0))
    beats = AgentBeats.fork(config, lambda: config)
    made = Agent(config, CpuShare(None), beats)
    yield made
    beats.end()
    await made._workloads.close()
    made._context.destroy(linger=0)


@pytest.fixture
def containers(monkeypatch: pytest.MonkeyPatch) -> Containers:
    return Containers(monkeypatch)


def order(role: str, number: int = 1, action: str = "none", leader: str = "a") -> Order:
    return Order(
        workload="redis",
        number=number,
        role=role,  # type: ignore[arg-type]
        term=2,
        action=action,  # type: ignore[arg-type]
        leader=leader,
        spec=SPEC,
    )


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(durable.os, "pwrite", no_room)


async def taken_up(agent: Agent) -> WorkloadAgent:
    """Have the agent know the workload before anything happens to its disk."""
    return await agent._workloads.take_up(SPEC)


async def settled(workload: WorkloadAgent) -> None:
    await asyncio.sleep(0)
    if workload._carrying is not None:
        await workload._carrying


# --- a full disk ------------------------------------------------------------------------------------


async def test_nothing_is_led_in_a_term_that_the_agents_own_disk_does_not_hold(
    agent: Agent, containers: Containers, directory: Path
) -> None:
    workload = await taken_up(agent)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        for _ in range(3):  # the keeper repeats it with every report
            await agent._pass_on(order("lead", action="start"))
            await settled(workload)
    assert containers.done == []
    assert agent._guard.newest("redis") is None
    report = workload.report()
    assert (report.order_done, report.order_failed) == (0, 0), "it is neither done nor given up"
    await agent._pass_on(order("lead", action="start"))  # there is room again
    await settled(workload)
    assert containers.done == ["start_workload"]
    assert HeardTerms(directory / "state" / "heard-terms").read_all() == {"redis": Leadership(2, "a")}


async def test_what_must_not_run_is_killed_though_the_disk_is_full(
    agent: Agent, containers: Containers
) -> None:
    workload = await taken_up(agent)
    containers.pid = 99
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        await agent._pass_on(order("follow", leader="b"))
        await settled(workload)
    assert containers.done == ["kill_workload"]
    assert agent._guard.newest("redis") is None


async def test_trouble_with_one_workloads_order_is_not_the_agents_end(
    agent: Agent, containers: Containers
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        await agent._pass_on(order("lead", action="start"))  # its store cannot even be opened
    assert containers.done == []


# --- the directory of images ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["open to others", "another's"])
async def test_images_are_neither_written_nor_cleared_in_a_directory_that_is_not_ours_alone(
    agent: Agent, directory: Path, fault: str
) -> None:
    images = directory / "images"
    epoch = images / "redis" / "t1-e1"
    epoch.mkdir(parents=True)
    if fault == "open to others":
        images.chmod(0o1777)
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        images.chmod(0o700)
        os.chown(images, 65534, 65534)
    with pytest.raises(ConfigError, match="open to others"):
        await agent.run()
    assert epoch.exists()


# --- sessions and workloads ---------------------------------------------------------------------------


async def test_a_refused_epoch_of_a_workload_that_was_let_go_disturbs_nobody(agent: Agent) -> None:
    nack = Nack(epoch=EpochId(1, 1), reason="full", code="no-space", retry_with_base=False)
    agent._note_not_committed("redis", nack)
    workload = await taken_up(agent)
    agent._note_not_committed("redis", nack)
    assert "full" in workload.report().reasons[-1]


async def test_an_agent_that_finds_a_newer_store_refuses_to_start_and_touches_nothing(
    agent: Agent, directory: Path
) -> None:
    await taken_up(agent)
    await agent._workloads.close()
    root = directory / "state/store/redis"
    (root / "format").write_text("outlive epoch store 2\n")
    (directory / "images/redis/t1-e1").mkdir(parents=True)
    before = sorted(root.rglob("*"))
    with pytest.raises(
        StoreError, match="`outlive epoch store 2`, and this one knows `outlive epoch store 1`"
    ):
        await agent.run()
    assert sorted(root.rglob("*")) == before
    assert (directory / "images/redis/t1-e1").exists()


def test_an_agent_that_finds_a_newer_state_directory_refuses_to_start(directory: Path) -> None:
    node = Node(name="a", address="127.0.0.1", state_dir=str(directory / "state"), criu="/bin/true")
    (directory / "state").mkdir(mode=0o700)
    (directory / "state/format").write_text("outlive state 2\n")
    with pytest.raises(StoreError, match="outlive state 2"):
        Agent(NodeConfig(node=node), CpuShare(None), None)  # type: ignore[arg-type]
    assert [path.name for path in (directory / "state").iterdir()] == ["format"]


async def test_nothing_is_kept_of_a_workload_that_cannot_be_whoever_sends_it(agent: Agent) -> None:
    """The keeper would hear of it, and have it on its disk."""
    bad = msgspec.structs.replace(SPEC, name="other", vip="nonsense")
    hello = Hello(
        protocol=PROTOCOL, software="x", node="b", workload="other", term=2, incarnation="i", spec=bad
    )
    with pytest.raises(ProtocolError, match="a declaration that cannot be"):
        await agent._accept(hello)
    assert agent._workloads.all() == ()
