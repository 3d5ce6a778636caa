"""Several workloads of a pair, each with its own role; and three nodes that take over from one another."""

from __future__ import annotations

import pytest

from common.control import WorkloadStatus
from common.model import HealthCheck, WorkloadSpec
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Host, Lab
from tests.system.clusters import NAME, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def leads(status: WorkloadStatus) -> bool:
    return status.role == "primary" and status.running


def stands_by(status: WorkloadStatus) -> bool:
    return status.role == "replica" and status.restorable and not status.running


def a_redis(lab: Lab, number: int, nodes: tuple[str, ...]) -> WorkloadSpec:
    port = 6400 + number
    return WorkloadSpec(
        name=f"redis-{nodes[0]}",
        nodes=nodes,
        command=("redis-server", "--port", str(port), "--protected-mode", "no", "--save", ""),
        vip=str(lab.vip(number)),
        health=HealthCheck(tcp=port),
        right_to_lead="fence",
        epoch_interval_ms=300,
    )


async def ask_redis(client: Host, lab: Lab, number: int, *words: str) -> str:
    command = ["timeout", "3", "redis-cli", "-h", str(lab.vip(number).ip), "-p", str(6400 + number), *words]
    return (await client.run(command, check=False, timeout_s=15.0)).stdout.strip()


async def epochs_acknowledged(node: Node, workload: str) -> int:
    metrics = (await node.metrics()).workloads
    return next((each.epochs_acknowledged for each in metrics if each.name == workload), 0)


async def wait_for_epochs(node: Node, workload: str, more: int = 4) -> None:
    start = await epochs_acknowledged(node, workload)

    async def enough() -> bool:
        return await epochs_acknowledged(node, workload) >= start + more

    await eventually(enough, what=f"{more} more epochs of {workload}", timeout_s=60.0)


async def test_two_workloads_that_stand_by_crosswise_have_roles_of_their_own() -> None:
    async with Lab() as lab:
        specs = [a_redis(lab, 0, ("a", "b")), a_redis(lab, 1, ("b", "a"))]
        nodes = await build_cluster(lab, ("a", "b"), workloads=specs)
        client = await lab.add_host("client")
        await start_all(nodes)
        for number, spec in enumerate(specs):
            here, there = (nodes[name] for name in spec.nodes)
            await here.cli("start", spec.name)
            await there.wait_for(spec.name, stands_by, what="standing by")
            assert await ask_redis(client, lab, number, "set", "kept", spec.name) == "OK"
            await wait_for_epochs(here, spec.name)

        await lab.power_off("a")
        second = nodes["b"]
        await second.wait_for("redis-a", leads, what="taken over")
        went_on = await second.workload("redis-b")
        assert went_on is not None
        assert (went_on.term, went_on.running) == (1, True), "the other one's term is its own"
        for number, spec in enumerate(specs):

            async def answers(number: int = number, name: str = spec.name) -> bool:
                return await ask_redis(client, lab, number, "get", "kept") == name

            await eventually(answers, what=f"{spec.name} answers")

        await lab.power_on("a")
        await nodes["a"].start()
        for spec in specs:
            await nodes["a"].wait_for(spec.name, stands_by, what="standing by for both")
        await second.cli("switchover", "redis-a", "--to", "a")
        await nodes["a"].wait_for("redis-a", leads, what="led where it began")
        stayed = await second.workload("redis-b")
        assert stayed is not None
        assert (stayed.term, stayed.role) == (1, "primary")
        assert await ask_redis(client, lab, 0, "get", "kept") == "redis-a"


async def test_three_nodes_take_over_from_one_another_and_the_first_one_returns() -> None:
    async with protected_redis(("a", "b", "c")) as cluster:
        nodes, lab = cluster.nodes, cluster.lab
        await nodes["c"].wait_for(NAME, stands_by, what="standing by")
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(4)

        await lab.power_off("a")
        await nodes["b"].wait_for(NAME, leads, what="taken over by the first in the list")
        follows = await nodes["c"].wait_for(
            NAME, lambda w: stands_by(w) and w.leader == "b" and w.term == 2, what="following b"
        )
        assert not follows.running
        await eventually(cluster.answers, what="redis answers at b")

        await lab.power_on("a")
        await nodes["a"].start()
        await nodes["a"].wait_for(NAME, lambda w: stands_by(w) and w.leader == "b", what="following b")
        assert await cluster.redis("get", "kept") == "yes"
        await nodes["b"].cli("switchover", NAME, "--to", "a")
        await nodes["a"].wait_for(NAME, leads, what="moved back")
        for name in ("b", "c"):
            await nodes[name].wait_for(
                NAME, lambda w: stands_by(w) and w.leader == "a" and w.term == 3, what="following a"
            )
        assert await cluster.redis("get", "kept") == "yes"
        terms = (await nodes["a"].history(NAME)).terms
        assert [(each.term, each.leader) for each in terms] == [(1, "a"), (2, "b"), (3, "a")]
        second = (await nodes["b"].history(NAME)).terms[-2]
        assert second.timeline[-1].event == "leading", "how it began is kept"
        assert second.handover[-1].event == "handed over"


async def test_a_third_node_that_alone_has_the_epochs_leads_by_the_leave_of_the_first() -> None:
    async with protected_redis(("a", "b", "c")) as cluster:
        nodes, lab = cluster.nodes, cluster.lab
        await nodes["c"].wait_for(NAME, stands_by, what="standing by")
        await lab.power_off("a")
        await nodes["b"].wait_for(NAME, leads, what="taken over")
        await nodes["c"].wait_for(NAME, lambda w: stands_by(w) and w.term == 2, what="following b")
        await eventually(cluster.answers, what="redis answers at b")
        await cluster.redis("set", "kept", "since a was lost")
        await wait_for_epochs(nodes["b"], NAME)

        await lab.power_off("b")
        await lab.power_on("a")
        await nodes["a"].start()
        await nodes["a"].wait_for(
            NAME,
            lambda w: w.leader == "b" and "no epoch is stored here" in w.reason,
            what="told by c who led, and without anything to restore",
        )
        refused = await nodes["c"].cli("failover", NAME, "--accept-data-loss", check=False)
        assert (refused.returncode, "--to c" in refused.stderr) == (10, True)
        given = await nodes["a"].cli("failover", NAME, "--accept-data-loss", "--to", "c")
        assert "on c: outlive failover" in given.stdout
        await nodes["c"].wait_for(NAME, lambda w: w.leader == "a" and w.term == 3, what="given the right")
        await nodes["c"].cli("failover", NAME, "--accept-data-loss")
        await nodes["c"].wait_for(NAME, leads, what="led")
        assert await cluster.redis("get", "kept") == "since a was lost"
        await nodes["a"].wait_for(NAME, lambda w: stands_by(w) and w.term == 4, what="standing by for c")
