"""A workload's lease in its keeper: what becomes of the gate when another right to lead is declared."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from common.config import Etcd, Node, NodeConfig
from common.etcd import EtcdClient
from common.gate import Gate
from common.lease import Keep, LeaseRecord, LeaseTerms
from common.lease_calls import Held
from common.role_events import ClaimTerm, FenceResult
from common.roles import Role
from outlive.keeper_effects import Hands
from outlive.kept_lease import KeptLease, boottime_s
from outlive.lease_records import LeaseRecords
from tests.unit.test_role_lease import LEASED, SPEC, standby

CLAIM = ClaimTerm(attempt=4, term=2, known=1, unused=(), over=False, blank=False)


class _Hands:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def gate(self, name: str) -> Gate:
        return self._gate


class _Scene:
    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        node = Node(name="b", address="127.0.0.1", run_dir=str(directory / "run"), vip_interface="eth0")
        config = NodeConfig(node=node, etcd=Etcd())
        (directory / "w").mkdir()
        self.gate = Gate(directory / "w" / "cgroup.freeze", "1", "0")
        self.gate.file.write_text("0")
        self.role: Role = standby().role
        self.records = LeaseRecords(config, "boot-b")
        self.fed: list[Any] = []
        self.kept = KeptLease(
            lambda: self.role,
            feed=self.fed.append,
            terms=LeaseTerms(ttl_s=2, margin_s=0.5, drift=0.0),
            etcd=EtcdClient(config.etcd, 0.1),
            hands=cast(Hands, _Hands(self.gate)),
            records=self.records,
            tasks=tasks,
        )

    def declare(self, *, by_lease: bool, **fields: Any) -> None:
        spec = LEASED if by_lease else SPEC
        self.role = replace(self.role, spec=spec, **fields)

    @property
    def closed(self) -> bool:
        return self.gate.file.read_text() == "1"


async def test_the_gate_of_a_standby_is_open_again_once_its_right_to_lead_is_another(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        scene = _Scene(tmp_path, tasks)
        scene.kept.begin()
        assert scene.closed, "a standby has no lease"
        scene.kept.claim(CLAIM)
        scene.declare(by_lease=False)
        await asyncio.sleep(0.25)
        assert not scene.closed
        assert [(each.attempt, each.outcome) for each in scene.fed if isinstance(each, FenceResult)] == [
            (4, "unknown")
        ]
        scene.declare(by_lease=True)
        await asyncio.sleep(0.25)
        assert scene.closed
        scene.kept.close()


async def test_what_another_node_leads_stays_shut_in_until_it_is_killed(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        scene = _Scene(tmp_path, tasks)
        scene.kept.begin()
        scene.declare(by_lease=False, alive=True)
        await asyncio.sleep(0.25)
        assert scene.closed
        scene.declare(by_lease=False, alive=False)
        await asyncio.sleep(0.25)
        assert not scene.closed
        scene.kept.close()


@pytest.mark.parametrize("closed", [False, True])
async def test_a_record_of_before_is_dropped_whatever_the_gate_is(tmp_path: Path, closed: bool) -> None:
    async with asyncio.TaskGroup() as tasks:
        scene = _Scene(tmp_path, tasks)
        record = LeaseRecord(held=Held(lease_id=1, revision=1, term=1), until_s=boottime_s() + 60)
        scene.records.keep(SPEC.name, record, scene.gate, None)
        scene.gate.file.write_text("1" if closed else "0")
        scene.declare(by_lease=False)
        scene.kept.begin()
        assert not scene.closed
        assert scene.records.left(SPEC.name) is None
        scene.kept.close()


async def test_a_lease_that_cannot_be_put_on_record_lets_nothing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with asyncio.TaskGroup() as tasks:
        scene = _Scene(tmp_path, tasks)
        scene.kept.begin()
        record = LeaseRecord(held=Held(lease_id=1, revision=1, term=1), until_s=boottime_s() + 60)
        monkeypatch.setattr(scene.records, "keep", full)
        scene.kept._lease = replace(scene.kept._lease, held=record.held, until_s=record.until_s)
        scene.kept._perform(Keep(record))
        status = scene.kept.status()
        assert status is not None
        assert status.good_for_s is None
        assert "No space left" in status.problem
        assert scene.closed
        scene.kept.close()
