"""What a keeper does between its role machine and the world: what it hands on, and what it asks too late."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from common.config import Node, NodeConfig
from common.control import ReplicaProgress, WorkloadReport
from common.etcd import EtcdClient
from common.events import EventLog
from common.gate import Gate
from common.model import EpochId, WorkloadSpec
from common.role_events import ClaimTerm, Heard, OperatorSwitchover, Tick
from common.roles import TermRecord, Timing
from common.terms_file import TermFiles
from outlive.kept_lease import KeptLease
from outlive.kept_workload import KeptWorkload
from outlive.lease_records import LeaseRecords
from tests.unit.test_keeper_effects import _Hands

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",))
READY = ReplicaProgress(node="b", connected=True, acknowledged=EpochId(1, 9), restorable=True)


class Hands(_Hands):
    """A host on which the workload is frozen or not."""

    def __init__(self, directory: Path, *, runs: bool = False) -> None:
        super().__init__()
        self.directory, self.runs, self.stands_still = directory, runs, False
        self.order: int | None = None

    def gate(self, workload: str) -> Gate:
        return Gate(self.directory / "gate", "1", "0")

    def init_pid(self, workload: str) -> int | None:
        return os.getpid() if self.runs else None

    def frozen(self, workload: str) -> bool:
        return self.stands_still

    def came_of(self, workload: str) -> int | None:
        return self.order


@asynccontextmanager
async def kept(tmp_path: Path, hands: Hands, record: TermRecord) -> AsyncIterator[KeptWorkload]:
    config = NodeConfig(
        node=Node(name="a", address="127.0.0.1", state_dir=str(tmp_path), run_dir=str(tmp_path / "run"))
    )
    events = EventLog(tmp_path / "events.jsonl", "keeper")
    try:
        async with asyncio.TaskGroup() as tasks:
            workload = KeptWorkload(
                config,
                SPEC,
                boot_id="boot-1",
                timing=Timing(),
                fenceable=frozenset(),
                record=record,
                pauses=(),
                refusal=None,
                plan=None,
                first_order=1000,
                next_request=lambda: 1,
                hands=hands,
                files=TermFiles(tmp_path, "a"),
                tasks=tasks,
                events=events,
                etcd=EtcdClient(config.etcd, 0.1),
                leases=LeaseRecords(config, "boot-1"),
            )
            workload.begin()
            yield workload
            workload.close()
    finally:
        events.close()


LEADS = TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1")
FOLLOWS = TermRecord(term=1, leader="b", mark="leads", boot_id="boot-1")


@pytest.mark.parametrize("stands_still", [True, False])
async def test_what_runs_though_it_has_to_stand_still_is_not_handed_over(
    tmp_path: Path, stands_still: bool
) -> None:
    """Somebody thawed it: what it has done since its last epoch would be lost."""
    hands = Hands(tmp_path, runs=True)
    async with kept(tmp_path, hands, LEADS) as workload:
        workload.feed(Heard(node="b", origin="keeper", boot_id="b", term=1, claim="following"))
        report = WorkloadReport(name="w", spec=SPEC, running=True, init_pid=os.getpid(), replicas=(READY,))
        workload.take_report(report)
        workload.feed(OperatorSwitchover(request=1, to="b"))
        assert workload.role.name == "handing_over"
        hands.stands_still = stands_still
        done = workload.role.order.number
        workload.take_report(replace(report, order_done=done, handed_over=EpochId(1, 9)))
        assert workload.role.name == ("handing_over" if stands_still else "leading")


@pytest.mark.parametrize("agent", ["dead", "alive"])
async def test_what_was_restored_is_found_though_the_agent_that_did_it_is_dead(
    tmp_path: Path, agent: str
) -> None:
    hands = Hands(tmp_path)
    taken = TermRecord(term=2, leader="a", mark="taking_over", boot_id="boot-1")
    async with kept(tmp_path, hands, taken) as workload:
        assert (workload.role.name, workload.role.step) == ("taking_over", "order")
        if agent == "alive":
            workload.take_report(WorkloadReport(name="w", spec=SPEC, running=False))
        hands.runs, hands.order = True, workload.role.order.number - 1
        workload.feed(Tick())
        assert not workload.role.alive, "it is of another order: nobody knows what it is"
        hands.order = workload.role.order.number
        for _ in range(2):
            workload.feed(Tick())
        assert workload.role.alive == (agent == "dead")
        assert workload.role.newest.mark == ("leads" if agent == "dead" else "taking_over")


@pytest.mark.parametrize("pending", [True, False])
async def test_a_claim_that_is_not_waited_for_any_more_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pending: bool
) -> None:
    """While this node looked whether it can record the next term, it has gone on to something else."""
    asked: list[ClaimTerm] = []
    monkeypatch.setattr(KeptLease, "claim", lambda self, claim: asked.append(claim))
    async with kept(tmp_path, Hands(tmp_path), FOLLOWS) as workload:
        workload.role = replace(workload.role, name="acquiring", fence_attempt=3 if pending else 4)
        claim = ClaimTerm(attempt=3, term=2, known=1, unused=(), over=False, blank=False)
        await workload._claim(claim)
        assert asked == ([claim] if pending else [])
