"""Moves on purpose: nothing is lost, and whatever fails on the way, it runs on somewhere, and only there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from common.bundle import WorkloadPaths
from common.container import cgroup_frozen, running_init_pid
from common.control import AnnounceFreeze, Done, Refused, Switchover, WorkloadStatus
from common.control_channel import ask
from outlive.cluster import Node, eventually
from primary.freezer import Freezer, NotFrozenError
from tests.campaigns.switchovers import lost_writes, run_rounds, writing_client
from tests.system.clusters import NAME, PORT, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

_BUSY_PORT = f"""
import socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", {PORT}))
s.listen()
print("bound", flush=True)
time.sleep(1000)
"""


def is_led(status: WorkloadStatus) -> bool:
    return status.state == "leading" and status.running


def send(node: Node, role: str, number: signal.Signals) -> None:
    os.kill(node.processes[role].pid, number)


def wait_until_frozen(node: Node) -> None:
    """Blocking: it may stand still for milliseconds only."""
    deadline_s = time.monotonic() + 20
    while not cgroup_frozen(node.config, NAME):
        assert time.monotonic() < deadline_s, "it does not stand still"
        time.sleep(0.0005)


async def hand_over_to_a_deaf_node(cluster: Protected) -> int:
    """Have `a` hand it over to `b`, whose keeper does not run for now; return the PID that `a` keeps."""
    first, second = cluster.nodes["a"], cluster.nodes["b"]
    await first.wait_for(NAME, lambda w: w.restorable, what="restorable elsewhere")
    pid = running_init_pid(first.config, NAME)
    assert pid is not None
    answer = await ask(first.config.keeper_endpoint, Switchover(workload=NAME, to="b"), 5.0)
    send(second, "keeper", signal.SIGSTOP)
    assert isinstance(answer, Done), answer
    await first.wait_for(NAME, lambda w: w.state == "handed_over", what="handed over")
    assert running_init_pid(first.config, NAME) == pid
    assert cgroup_frozen(first.config, NAME)
    return pid


async def test_it_moves_there_and_back_and_no_acknowledged_write_is_lost() -> None:
    report = await run_rounds(2, fill_mib=16)
    assert report.lost == 0
    assert report.acknowledged > 100
    assert all(outage_ms < 30_000 for outage_ms in report.outages_ms)


async def test_what_the_other_node_cannot_restore_runs_on_here_from_the_same_instant() -> None:
    async with protected_redis() as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        async with writing_client(cluster) as log:
            pid = await hand_over_to_a_deaf_node(cluster)
            busy = await second.host.spawn(
                [sys.executable, "-c", _BUSY_PORT], log=second.host.log_dir / "busy"
            )
            await eventually(lambda: _said(second.host.log_dir / "busy", "bound"), what="the port is taken")
            send(second, "keeper", signal.SIGCONT)
            back = await first.wait_for(NAME, is_led, what="led here again")
            busy.kill()
            await busy.wait()
            await eventually(cluster.answers, what="redis answers")
        assert running_init_pid(first.config, NAME) == pid, "it is another one"
        assert back.term == 3
        told = await first.wait_for(
            NAME,
            lambda w: any("a restore failed here" in each for it in w.replicas for each in it.reasons),
            what="told why b could not",
        )
        assert told.replicas[0].node == "b"
        acknowledged, lost = await lost_writes(cluster, log)
        assert acknowledged > 0
        assert lost == 0
        causes = [term.cause for term in (await first.history(NAME)).terms]
        assert "given" in causes[-1], causes
        await cluster.wait_until_protected("a", "b")


async def test_what_was_handed_to_a_host_that_is_lost_is_taken_back_once_it_is_fenced() -> None:
    async with protected_redis() as cluster:
        first = cluster.nodes["a"]
        await cluster.redis("set", "kept", "yes")
        pid = await hand_over_to_a_deaf_node(cluster)
        await cluster.lab.power_off("b")
        await first.wait_for(NAME, is_led, what="led here again")
        await eventually(cluster.answers, what="redis answers")
        assert running_init_pid(first.config, NAME) == pid
        assert await cluster.redis("get", "kept") == "yes"


async def test_a_keeper_that_dies_while_it_keeps_it_frozen_keeps_it_afterwards() -> None:
    async with protected_redis() as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        pid = await hand_over_to_a_deaf_node(cluster)
        await first.stop("keeper", signal.SIGKILL)
        await first.start("keeper")
        await first.wait_for(NAME, lambda w: w.state == "handed_over", what="handed over still")
        assert running_init_pid(first.config, NAME) == pid
        assert cgroup_frozen(first.config, NAME)
        send(second, "keeper", signal.SIGCONT)
        await cluster.wait_until_protected("b", "a")
        await eventually(cluster.answers, what="redis answers")
        assert await cluster.redis("get", "kept") == "yes"
        assert running_init_pid(first.config, NAME) is None


async def test_a_thaw_deadline_that_passes_does_not_wake_what_was_handed_over(tmp_path: Path) -> None:
    async with protected_redis() as cluster:
        first = cluster.nodes["a"]
        await hand_over_to_a_deaf_node(cluster)
        program = tmp_path / "criu"
        program.symlink_to("/bin/sleep")
        criu = await asyncio.create_subprocess_exec(program, "1000")
        announced = AnnounceFreeze(workload=NAME, criu_pid=criu.pid, deadline_ms=300)
        assert isinstance(await ask(first.config.keeper_endpoint, announced, 5.0), Done)
        await criu.wait()  # the watch has come to its end
        await asyncio.sleep(0.5)
        assert cgroup_frozen(first.config, NAME)
        send(cluster.nodes["b"], "keeper", signal.SIGCONT)
        await cluster.wait_until_protected("b", "a")


async def test_an_agent_that_dies_on_the_way_costs_nothing_but_the_move() -> None:
    async with protected_redis(fill_mib=64) as cluster:
        first = cluster.nodes["a"]
        await cluster.redis("set", "kept", "yes")
        await first.wait_for(NAME, lambda w: w.restorable, what="restorable elsewhere")
        pid = running_init_pid(first.config, NAME)
        answer = await ask(first.config.keeper_endpoint, Switchover(workload=NAME, to="b"), 5.0)
        assert isinstance(answer, Done), answer
        await asyncio.to_thread(wait_until_frozen, first)
        send(cluster.nodes["b"], "agent", signal.SIGSTOP)  # nothing is acknowledged any more
        await first.stop("agent", signal.SIGKILL)
        status = await first.wait_for(NAME, is_led, what="led here")
        send(cluster.nodes["b"], "agent", signal.SIGCONT)
        assert "not handed over" in status.reason
        await eventually(cluster.answers, what="redis answers")
        assert running_init_pid(first.config, NAME) == pid
        await first.start("agent")
        await cluster.wait_until_protected("a", "b")


async def test_a_move_that_cannot_be_is_refused_and_one_that_fails_says_so() -> None:
    async with protected_redis() as cluster:
        first, second = cluster.nodes["a"], cluster.nodes["b"]
        for node, words, code, says in (
            (second, ("switchover", NAME, "--to", "b"), 10, "on a"),
            (first, ("switchover", NAME, "--to", "x"), 10, "not one of the nodes"),
            (first, ("switchover", NAME, "--to", "a"), 10, "already"),
            (first, ("switchover", "nobody", "--to", "b"), 5, "nobody"),
        ):
            done = await node.cli(*words, check=False)
            assert (done.returncode, says in done.stderr) == (code, True), done
        await first.wait_for(NAME, lambda w: w.restorable, what="restorable elsewhere")
        moving = asyncio.create_task(first.cli("switchover", NAME, "--to", "b", check=False))
        await first.wait_for(NAME, lambda w: w.state == "handing_over", what="on its way")
        send(second, "agent", signal.SIGKILL)
        send(second, "keeper", signal.SIGKILL)
        done = await moving
        assert done.returncode in (0, 19, 21), done
        if done.returncode == 21:
            assert "runs on here" in done.stderr
        await eventually(cluster.answers, what="redis answers")


async def test_a_drained_node_leads_nothing() -> None:
    async with protected_redis() as cluster:
        first = cluster.nodes["a"]
        await first.wait_for(NAME, lambda w: w.restorable, what="restorable elsewhere")
        done = await first.cli("drain", "--output", "json")
        (moved,) = json.loads(done.stdout)["moved"]
        assert (moved["workload"], moved["node"], moved["term"]) == (NAME, "b", 2)
        assert await cluster.answers()
        again = json.loads((await first.cli("drain", "--output", "json")).stdout)
        assert again["moved"] == []


async def _said(path: Path, word: str) -> bool:
    return path.exists() and word in path.read_text()


async def _freeze(first: Node) -> None:
    """Freeze the workload and leave it so, unless an epoch has it stand still just now."""
    freezer = Freezer(WorkloadPaths(first.config, NAME).cgroup)
    for _ in range(100):
        with contextlib.suppress(NotFrozenError):
            freezer.keep(1.0)
            break
        await asyncio.sleep(0.01)
    freezer.leave()


async def _thawed_s(first: Node) -> float:
    async def runs() -> bool:
        return not cgroup_frozen(first.config, NAME)

    return await eventually(runs, what="it runs")


async def test_what_stands_still_and_nobody_announced_is_thawed() -> None:
    async with protected_redis(epoch_interval_ms=1000, freeze_deadline_ms=2000) as cluster:
        first = cluster.nodes["a"]
        await _freeze(first)
        # A dump announced just before that has its deadline; no later one may be announced.
        assert await _thawed_s(first) < 10
        await eventually(cluster.answers, what="redis answers")
        assert "nobody had announced" in (await first.cli("events", "--last", "0")).stdout


async def test_a_freeze_that_nobody_announced_does_not_hide_behind_one_that_is() -> None:
    async with protected_redis() as cluster:
        first = cluster.nodes["a"]
        await first.stop("agent", signal.SIGTERM)
        await _freeze(first)
        announcement = AnnounceFreeze(workload=NAME, criu_pid=os.getpid(), deadline_ms=60_000)
        answer = await ask(first.config.keeper_endpoint, announcement, 5.0)
        assert isinstance(answer, Refused)
        assert "nobody had announced" in answer.message
        assert await _thawed_s(first) < 10
