"""The workloads of one agent while they come and go: who looks is not disturbed by who changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from common.config import Node, NodeConfig, Store
from common.errors import WorkloadError
from common.model import WorkloadSpec
from outlive import held_workloads
from outlive.held_workloads import HeldWorkloads

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",))


class WorkloadInMemory:
    """As much of a `WorkloadAgent` as is asked for here."""

    follows = False

    def __init__(self, spec: WorkloadSpec, store: object) -> None:
        self.spec = spec
        self.store = store
        self.learned = False
        self.closing = asyncio.Event()
        self.may_close = asyncio.Event()
        self.may_close.set()

    async def close(self) -> None:
        self.closing.set()
        await self.may_close.wait()
        self.store.close()  # type: ignore[attr-defined]


@pytest.fixture
def held(tmp_path: Path) -> HeldWorkloads:
    node = Node(name="a", address="127.0.0.1", state_dir=str(tmp_path))
    return HeldWorkloads(NodeConfig(node=node, store=Store(min_free_bytes=0)), WorkloadInMemory)  # type: ignore[arg-type]


def spec(name: str) -> WorkloadSpec:
    return msgspec.structs.replace(SPEC, name=name)


async def test_workloads_may_come_and_go_while_others_are_looked_at(held: HeldWorkloads) -> None:
    for name in ("one", "two"):
        await held.take_up(spec(name))
    seen = []
    for workload in held.all():
        seen.append(workload.spec.name)
        await held.take_up(spec(f"{workload.spec.name}-more"))
        held.drop_unwanted({"one-more"})
    assert seen == ["one", "two"]
    assert [workload.spec.name for workload in held.all()] == ["one-more"]


async def test_who_takes_long_to_be_let_go_keeps_nobody_waiting_and_is_not_opened_twice(
    held: HeldWorkloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_workloads, "_LET_GO_WITHIN_S", 0.05)
    old = await held.take_up(spec("old"))
    old.may_close.clear()  # type: ignore[attr-defined]
    held.drop_unwanted(())
    await old.closing.wait()  # type: ignore[attr-defined]
    await held.take_up(spec("new"))
    assert [workload.spec.name for workload in held.all()] == ["new"]
    with pytest.raises(WorkloadError, match="still being let go"):
        await held.take_up(spec("old"))
    old.may_close.set()  # type: ignore[attr-defined]
    assert await held.take_up(spec("old")) is not old


async def test_what_a_leader_has_just_sent_is_not_dropped_before_the_keeper_knows_it(
    held: HeldWorkloads,
) -> None:
    await held.take_up(spec("w"), learned=True)
    held.drop_unwanted(())
    assert held.get("w") is not None


async def test_a_workload_is_opened_once_however_many_want_it(held: HeldWorkloads) -> None:
    found = await asyncio.gather(*(held.take_up(spec("w")) for _ in range(5)))
    assert len(set(map(id, found))) == 1


async def test_a_session_that_outlives_its_workload_gets_an_error_that_ends_no_agent(
    held: HeldWorkloads,
) -> None:
    with pytest.raises(WorkloadError, match="not held"):
        held["gone"]


async def test_a_workload_whose_storage_hangs_keeps_no_other_waiting(
    held: HeldWorkloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    class Stored(EpochStoreInMemory):
        newest = object()

    async def judge(self: WorkloadInMemory, record: object) -> None:
        asked.set()
        await asyncio.Future()

    monkeypatch.setattr(held_workloads, "_JUDGED_WITHIN_S", 0.1)
    monkeypatch.setattr(held_workloads.EpochStore, "open", lambda *_, **__: Stored())
    monkeypatch.setattr(WorkloadInMemory, "follows", True)
    monkeypatch.setattr(WorkloadInMemory, "judge", judge, raising=False)
    async with asyncio.timeout(5):
        await asyncio.gather(held.take_up(spec("one")), held.take_up(spec("two")))
    assert asked.is_set()


class EpochStoreInMemory:
    def close(self) -> None:
        pass
