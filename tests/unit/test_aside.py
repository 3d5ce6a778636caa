"""Epochs that nobody acknowledged, kept for a human: usable, and never at the cost of the resync."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from common.config import Node, NodeConfig, Store
from common.criu.images import SpaceKey
from common.durable import RealDisk
from common.errors import CaptureError, NoSpaceError
from common.model import EpochId, WorkloadSpec
from outlive.aside import MOST_KEPT, Aside, AsideEpoch, kept_aside
from primary.capture import CapturedEpoch
from primary.outgoing import Held
from replica.ceiling import used_bytes
from replica.store import EpochHeader, EpochStore
from replica.store_reader import StoreReader, aside_level
from tests.unit.wire_fakes import TASK, Memory, captured, page

SPEC = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",))
SHARED = SpaceKey("shmem", 7)
BASE: Memory = {TASK: {1: page(1), 2: page(2), 3: page(3)}, SHARED: {9: page(9)}}
NEWER: Memory = {TASK: {1: page(1), 2: page(22), 3: page(0), 8: page(8)}, SHARED: {9: page(9)}}


class FullDisk(RealDisk):
    """A disk with so much room."""

    def __init__(self, free_bytes: int) -> None:
        self._free_bytes = free_bytes

    def free_bytes(self, path: Path) -> int:
        return self._free_bytes


def aside(directory: Path, *, disk: RealDisk | None = None, **store: int) -> Aside:
    room = Store(directory=str(directory / "store"), **{"min_free_bytes": 0, **store})
    Path(room.directory).mkdir(exist_ok=True)
    return Aside(
        NodeConfig(node=Node(name="a", address="127.0.0.1"), store=room),
        restore_command=lambda spec: ("criu", "restore", "--root", f"/{spec.name}"),
        disk=disk,
    )


def epoch(directory: Path, number: int = 42, stands_on: EpochId | None = None) -> CapturedEpoch:
    return captured(number, NEWER, directory=directory, metadata={"core-1.img": b"core"}, stands_on=stands_on)


def content(reader: StoreReader, kept: AsideEpoch) -> None:
    """Read every byte, and see that nothing is wrong with it."""
    assert reader.newest is not None
    assert reader.newest.id == kept.epoch
    assert reader.verify(kept.epoch) == []


def test_an_epoch_whose_pages_are_all_here_is_kept_whole_with_the_command_that_restores_it(
    tmp_path: Path,
) -> None:
    kept = aside(tmp_path).keep(epoch(tmp_path), SPEC, Held.of(captured(41, BASE)))
    assert kept.path.name == "redis-t1-e42-unacknowledged"
    reader = StoreReader.inspect(kept.path.parent, kept.path.name)
    content(reader, kept)
    details = reader.show(kept.epoch)
    assert details.record.base is None
    assert details.record.pages_present == 5
    assert str(kept.path / "views" / "t1-e42") in details.command
    assert "--root /redis" in details.command
    assert (kept.path / "views/t1-e42/core-1.img").read_bytes() == b"core"
    level, needs = aside_level(kept.path, kept.epoch)
    assert level is not None
    assert needs is None


def test_what_changed_only_is_kept_on_top_of_what_the_replica_has_and_whole_again_beside_it(
    tmp_path: Path,
) -> None:
    base = captured(41, BASE)
    kept = aside(tmp_path).keep(epoch(tmp_path, stands_on=EpochId(1, 40)), SPEC, Held.of(base))
    level, needs = aside_level(kept.path, kept.epoch)
    assert level is not None
    assert sum(space.present for space in level.spaces) == 3, "one changed, one of zeros, one new"
    assert needs == base.id

    with EpochStore.open(tmp_path / "b", "redis", min_free_bytes=0, max_levels=8) as replica:
        header = EpochHeader(workload="redis", id=base.id, base=None, incarnation="first", frozen_wall_s=1.0)
        with replica.begin(header) as arriving:
            for space in base.spaces:
                arriving.space(space.key, space.numbers, np.full(len(space.numbers), 4, dtype=np.uint8))
                raw = memoryview(bytearray(4096 * len(space.numbers)))
                base.pages.read(space.key, np.arange(len(space.numbers)), raw)
                arriving.pages(space.key, raw)
            arriving.commit()
    shutil.copytree(tmp_path / "b" / "redis", kept.path, symlinks=True, dirs_exist_ok=True)
    assert aside_level(kept.path, kept.epoch)[1] is None
    content(StoreReader.inspect(kept.path.parent, kept.path.name), kept)


@pytest.mark.parametrize("held", [None, 39], ids=["nothing is known", "too old"])
def test_what_stands_on_nothing_that_anybody_has_is_not_kept(tmp_path: Path, held: int | None) -> None:
    base = Held.of(captured(held, BASE)) if held else None
    with pytest.raises(CaptureError, match="t1-e40"):
        aside(tmp_path).keep(epoch(tmp_path, stands_on=EpochId(1, 40)), SPEC, base)
    assert kept_aside(tmp_path / "store/_aside") == []


def test_one_that_lies_there_is_not_written_again(tmp_path: Path) -> None:
    room = aside(tmp_path)
    kept = room.keep(epoch(tmp_path), SPEC, None)
    (kept.path / "NOTES").write_text("mine")
    assert room.keep(epoch(tmp_path), SPEC, None) == kept
    assert (kept.path / "NOTES").read_text() == "mine"


def test_only_so_many_are_kept_and_none_is_removed_for_a_newer_one(tmp_path: Path) -> None:
    room = aside(tmp_path)
    for number in range(MOST_KEPT):
        room.keep(epoch(tmp_path, number), SPEC, None)
    with pytest.raises(NoSpaceError, match="lie aside already"):
        room.keep(epoch(tmp_path, 99), SPEC, None)
    assert [each.epoch.epoch for each in kept_aside(room.directory)] == list(range(MOST_KEPT))


def test_the_resync_that_follows_keeps_its_room(tmp_path: Path) -> None:
    taken = epoch(tmp_path)
    needed = 2 * 1000 + 4 * 4096 + len(b"core") + taken.memory_bytes
    with pytest.raises(NoSpaceError, match="must find room"):
        aside(tmp_path, disk=FullDisk(needed - 1), min_free_bytes=1000).keep(taken, SPEC, None)
    assert list((tmp_path / "store").iterdir()) == []
    aside(tmp_path, disk=FullDisk(needed), min_free_bytes=1000).keep(taken, SPEC, None)


def test_what_lies_aside_counts_for_the_stores_ceiling(tmp_path: Path) -> None:
    aside(tmp_path).keep(epoch(tmp_path, 1), SPEC, None)
    used = used_bytes(tmp_path / "store")
    assert used > 0
    with pytest.raises(NoSpaceError):
        aside(tmp_path, max_bytes=used + 4096).keep(epoch(tmp_path, 2), SPEC, None)


def test_a_failure_leaves_nothing_and_what_an_agent_left_half_done_is_cleared_up(tmp_path: Path) -> None:
    room, taken = aside(tmp_path), epoch(tmp_path)
    taken.pages.unreadable = True  # type: ignore[attr-defined]
    with pytest.raises(CaptureError):
        room.keep(taken, SPEC, None)
    assert list(room.directory.iterdir()) == []
    (room.directory / ".new-redis-t1-e42-unacknowledged-0a").mkdir()
    room.clear_up()
    assert list(room.directory.iterdir()) == []


def test_names_are_read_back_whatever_the_workload_is_called(tmp_path: Path) -> None:
    for name in ("a-t1-e2-t3-e4-unacknowledged", "x-t9-e9-unacknowledged", "notes", "x-unacknowledged"):
        (tmp_path / name).mkdir()
    assert [(each.workload, str(each.epoch)) for each in kept_aside(tmp_path)] == [
        ("a-t1-e2", "t3-e4"),
        ("x", "t9-e9"),
    ]
    assert kept_aside(tmp_path / "none") == []
