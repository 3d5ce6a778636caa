"""Leases in a real etcd of three members: who leads holds one, and what has none stands still in time."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from common.container import cgroup_frozen, running_init_pid
from common.control import WorkloadStatus
from common.gate import gate_of, is_closed
from common.model import WorkloadSpec
from outlive.cluster import build_cluster, start_all
from outlive.lab import Lab
from outlive.lab_etcd import LabEtcd
from tests.campaigns.scenarios import NAME, SCENARIOS, Pair, is_frozen, pair_for, read_answers, run_one, runs
from tests.certificates import Authority

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(200),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed: make setup"),
]

TTL_S = 3.0


class Witness:
    """Looks every few ms where copies run, and notes when that changes."""

    def __init__(self, pair: Pair) -> None:
        self._nodes = pair.nodes
        self.changes: list[tuple[float, frozenset[str]]] = []
        self._task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            running = frozenset(name for name, node in self._nodes.items() if runs(node))
            if not self.changes or self.changes[-1][1] != running:
                self.changes.append((time.monotonic(), running))
            await asyncio.sleep(0.003)

    def end(self) -> None:
        self._task.cancel()
        assert all(len(running) <= 1 for _, running in self.changes), self.changes

    def last_of(self, name: str, since_s: float) -> float:
        """Return when a node ran it no more, after that moment."""
        return next(at for at, running in self.changes if at >= since_s and name not in running)

    def first_of(self, name: str, since_s: float) -> float:
        """Return when a node ran it first, after that moment."""
        return next(at for at, running in self.changes if at >= since_s and name in running)


def leads(status: WorkloadStatus) -> bool:
    return status.state == "leading" and status.running


def leads_with_a_standby(status: WorkloadStatus) -> bool:
    return leads(status) and status.restorable


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.parametrize("name", ["etcd-power-loss-a", "etcd-slow", "etcd-out-of-reach-of-a"])
async def test_a_failure_ends_as_expected_and_never_two_answer(name: str) -> None:
    outcome = await run_one(name)
    assert not outcome.problem, outcome
    assert (outcome.two_answered, outcome.two_ran) == (0, 0)
    assert outcome.lives == (1 if name == "etcd-slow" else 2)


async def test_without_etcd_the_leader_stands_still_in_time_and_runs_on_when_it_is_back() -> None:
    async with pair_for("etcd-gone") as pair:
        assert pair.etcd is not None
        witness, pid = Witness(pair), running_init_pid(pair.a.config, NAME)
        gone_s = time.monotonic()
        await pair.etcd.go_away()
        status = await pair.a.wait_for(NAME, is_frozen, what="frozen", timeout_s=20)
        assert status.lease is not None
        assert "etcd does not answer" in status.lease.problem
        assert "frozen" in status.reason
        assert is_closed(gate_of(pair.a.config, NAME))
        told = await pair.a.cli("status", check=False)
        assert told.returncode == 16
        assert "the workload is frozen until etcd says" in told.stdout
        await asyncio.sleep(2 * TTL_S)
        assert cgroup_frozen(pair.a.config, NAME), "nothing thaws it meanwhile"
        assert not runs(pair.b)
        await pair.etcd.come_back()
        await pair.leads("a", restorable=True)
        assert running_init_pid(pair.a.config, NAME) == pid
        witness.end()
        assert witness.last_of("a", gone_s) - gone_s < TTL_S
        history = (await pair.a.history(NAME)).terms[-1]
        assert {"frozen: lease in doubt", "lease stands"} <= {step.event for step in history.timeline}
        assert history.term == 1


@pytest.mark.parametrize("keeper_hangs", [False, True], ids=["the keeper", "the guard, for the keeper hangs"])
async def test_a_leader_that_is_cut_off_is_frozen_before_the_other_one_runs_it(keeper_hangs: bool) -> None:
    async with pair_for("etcd-partition-a") as pair:
        witness = Witness(pair)
        if keeper_hangs:
            pair.a.processes["keeper"].send_signal(signal.SIGSTOP)
        cut_s = time.monotonic()
        await pair.lab.cut("a")
        await pair.leads("b", restorable=False)
        frozen_s, led_s = witness.last_of("a", cut_s), witness.first_of("b", cut_s)
        assert frozen_s - cut_s < TTL_S
        assert frozen_s < led_s
        if keeper_hangs:
            pair.a.processes["keeper"].send_signal(signal.SIGCONT)
        await pair.lab.mend("a")
        await pair.leads("b", restorable=True)
        witness.end()
        answers = read_answers(pair.log.read_text())
        assert answers.two_answered == 0


async def test_a_keeper_that_is_killed_and_started_again_goes_on_with_its_lease() -> None:
    async with pair_for("etcd-gone") as pair:
        witness, began_s = Witness(pair), time.monotonic()
        await pair.a.stop("keeper", signal.SIGKILL)
        await pair.a.start("keeper")
        await pair.leads("a", restorable=True)
        await asyncio.sleep(TTL_S)
        await pair.leads("a", restorable=True)
        witness.end()
        stood_still = [at for at, running in witness.changes if at > began_s + 0.3 and not running]
        assert len(stood_still) < 60, "freezes of epochs are short, and it was not frozen for good"
        assert (await pair.a.history(NAME)).terms[-1].term == 1


async def test_a_keeper_that_is_killed_for_good_leaves_a_guard_that_freezes() -> None:
    async with pair_for("etcd-gone") as pair:
        killed_s = time.monotonic()
        await pair.a.stop("keeper", signal.SIGKILL)
        while not is_closed(gate_of(pair.a.config, NAME)):
            assert time.monotonic() - killed_s < TTL_S, "the lease may be over"
            await asyncio.sleep(0.01)
        await pair.a.start("keeper")
        await pair.leads("a", restorable=True)


async def test_a_switchover_and_a_stop_end_the_lease_so_that_nobody_waits() -> None:
    async with pair_for("etcd-gone") as pair:
        await pair.a.cli("switchover", NAME, "--to", "b")
        await pair.leads("b", restorable=True)
        status = await pair.b.workload(NAME)
        assert status is not None
        assert status.lease is not None
        assert status.lease.holder == "b"
        term = (await pair.b.history(NAME)).terms[-1]
        at = {step.event: step.at_ms for step in term.timeline}
        assert at["right acquired"] - at["lease asked"] < 1000 * TTL_S / 2
        await pair.b.cli("stop", NAME)
        await pair.b.wait_for(NAME, lambda w: w.lease is not None and not w.lease.holder, what="no lease")
        await pair.a.cli("start", NAME)
        await pair.leads("a")
        at = {step.event: step.at_ms for step in (await pair.a.history(NAME)).terms[-1].timeline}
        assert at["right acquired"] < 1000 * TTL_S / 2
        if not any(name.startswith("COVERAGE_PROCESS") for name in os.environ):  # that takes memory, too
            assert rss_mib(pair.a.processes["keeper"].pid) < 32


async def test_when_etcd_is_gone_for_good_an_operator_has_it_run_on_without() -> None:
    async with pair_for("etcd-gone") as pair:
        assert pair.etcd is not None
        pid = running_init_pid(pair.a.config, NAME)
        await pair.etcd.go_away()
        await pair.a.wait_for(NAME, is_frozen, what="frozen", timeout_s=20)
        await asyncio.gather(*(node.stop("keeper") for node in pair.nodes.values()))
        file = pair.a.config_path
        file.write_text(file.read_text().replace('right_to_lead = "etcd"', 'right_to_lead = "manual"'))
        for node in (pair.a, pair.b):  # the agent reads the file when it begins
            await node.start("keeper")
        await pair.leads("a")
        assert running_init_pid(pair.a.config, NAME) == pid
        assert not is_closed(gate_of(pair.a.config, NAME))


def test_every_scenario_of_etcd_is_there() -> None:
    assert {"etcd-gone", "etcd-slow"} <= set(SCENARIOS)


async def test_leases_are_had_by_tls_as_a_user_and_etcd_may_forget_who_is_logged_in(tmp_path: Path) -> None:
    authority, password = Authority(tmp_path), tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text("secret\n")
    own = authority.issue("node")
    async with Lab() as lab:
        etcd = await LabEtcd.start(lab, certify=lambda addresses: authority.issue("etcd", addresses))
        await turn_authentication_on(etcd)
        access = {
            "endpoints": list(etcd.endpoints),
            "ttl_s": int(TTL_S),
            "ca_file": str(own.authority),
            "cert_file": str(own.certificate),
            "key_file": str(own.key),
            "user": "outlive",
            "password_file": str(password),
        }
        spec = WorkloadSpec(name=NAME, nodes=("a", "b"), command=("sleep", "inf"), right_to_lead="etcd")
        nodes = await build_cluster(
            lab, ("a", "b"), workloads=[spec], settings={"etcd": access}, fenced=False
        )
        await start_all(nodes)
        told = await nodes["a"].cli("doctor", "--output", "json", check=False)
        assert all(f"{member} answers" in told.stdout for member in etcd.endpoints), told.stdout
        await nodes["a"].cli("start", NAME)
        await nodes["a"].wait_for(NAME, leads_with_a_standby, what="protected")
        print(f"keeper: {rss_mib(nodes['a'].processes['keeper'].pid):.1f} MiB")
        await etcd.go_away()
        await nodes["a"].wait_for(NAME, is_frozen, what="frozen", timeout_s=20)
        await etcd.come_back()
        await nodes["a"].wait_for(NAME, leads_with_a_standby, what="logged in again")
        await lab.power_off("a")
        await nodes["b"].wait_for(NAME, leads, what="b leads", timeout_s=20)


async def turn_authentication_on(etcd: LabEtcd) -> None:
    """Have one user who may do all, as etcd wants it, and one who may write what nodes write."""

    def encoded(key: str) -> str:
        return base64.b64encode(key.encode()).decode()

    steps: tuple[tuple[str, dict[str, object]], ...] = (
        ("user/add", {"name": "root", "password": "rooted"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("role/add", {"name": "outlive"}),
        (
            "role/grant",
            {
                "name": "outlive",
                "perm": {
                    "permType": "READWRITE",
                    "key": encoded("/outlive/"),
                    "range_end": encoded("/outlive0"),
                },
            },
        ),
        ("user/add", {"name": "outlive", "password": "secret"}),
        ("user/grant", {"user": "outlive", "role": "outlive"}),
        ("enable", {}),
    )
    for what, body in steps:
        said = await etcd.say(f"/v3/auth/{what}", json.dumps(body))
        assert '"error"' not in said, said
