"""Epochs with files: what is tried again, what is given up, and what belongs to an epoch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from common.errors import CaptureError, RestoreError, StoreError
from common.file_records import CONTENTS, RECORDS
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from outlive.followed_files import FollowedFiles
from primary.capture import CapturedEpoch
from primary.file_backend import FrozenHook, WithFiles
from primary.file_capture import FileCapture, TooMuchWrittenError
from tests.unit.wire_fakes import TASK, captured, page


class Memory:
    """A backend whose freezes call the hook, and which `changes` something while it runs."""

    name = "fast"

    def __init__(self, hook: FrozenHook) -> None:
        self.hook = hook
        self.epochs = 0
        self.fails: Exception | None = None
        self.before_freeze: Callable[[], None] = lambda: None
        self.last: CapturedEpoch | None = None
        self.closed = False
        self.all: list[CapturedEpoch] = []

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        self.epochs += 1
        self.before_freeze()
        self.hook.begin()
        self.hook.end()
        if self.fails is not None:
            raise self.fails
        self.last = captured(epoch.epoch, {TASK: {16: page(1)}})
        self.all.append(self.last)
        return self.last

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "file").write_bytes(b"x" * 5000)
    return directory


@pytest.fixture
def both(root: Path, tmp_path: Path) -> Iterator[tuple[WithFiles, Memory, FileCapture]]:
    hook = FrozenHook()
    memory = Memory(hook)
    files = FileCapture(
        {b"/data": root}, hasher=PageHasher(), layers=tmp_path, pids=lambda: [os.getpid()], watch=None
    )
    yield WithFiles(memory, files, hook), memory, files
    for epoch in memory.all:
        epoch.release()
    files.close()


async def test_an_epoch_has_memory_and_files(both: tuple[WithFiles, Memory, FileCapture]) -> None:
    backend, memory, _ = both
    epoch = await backend.capture(EpochId(1, 1))
    assert [space.key for space in epoch.spaces] == [TASK, RECORDS, CONTENTS]
    assert (epoch.memory_bytes, epoch.file_bytes) == (PAGE_BYTES, 3 * PAGE_BYTES)
    content = bytearray(PAGE_BYTES)
    epoch.pages.read(TASK, np.array([0]), memoryview(content))
    assert bytes(content) == page(1)
    epoch.pages.read(CONTENTS, np.array([0]), memoryview(content))
    assert bytes(content) == b"x" * PAGE_BYTES
    assert backend.name == "fast"
    epoch.release()
    await backend.close()
    assert memory.closed


async def test_too_much_is_tried_again_and_the_last_time_accepted(
    both: tuple[WithFiles, Memory, FileCapture], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("primary.file_capture._MOST_FROZEN_BYTES", 1000)
    backend, memory, _ = both
    memory.before_freeze = lambda: (root / "file").write_bytes(os.urandom(5000)) and None
    await backend.capture(EpochId(1, 1))
    assert memory.epochs == 3


async def test_a_failure_of_memory_costs_no_files(
    both: tuple[WithFiles, Memory, FileCapture], root: Path
) -> None:
    backend, memory, files = both
    memory.fails = CaptureError("criu has failed")
    with pytest.raises(CaptureError, match="criu"):
        await backend.capture(EpochId(1, 1))
    assert files.files == 2
    memory.fails = None
    (root / "other").write_bytes(b"y")
    assert (await backend.capture(EpochId(1, 2))).file_bytes == 4 * PAGE_BYTES


async def test_what_cannot_be_sealed_is_given_back(
    both: tuple[WithFiles, Memory, FileCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, memory, files = both

    def refuses(epoch: EpochId) -> None:
        raise CaptureError("a file could not be read")

    monkeypatch.setattr(files, "seal", refuses)
    with pytest.raises(CaptureError, match="a file"):
        await backend.capture(EpochId(1, 1))
    assert memory.last is not None
    assert memory.last.pages.released == 1  # type: ignore[attr-defined]


async def test_files_that_are_too_much_for_memory_s_last_word(
    both: tuple[WithFiles, Memory, FileCapture],
) -> None:
    backend, memory, _ = both
    memory.fails = TooMuchWrittenError("as if the last attempt were not patient")
    with pytest.raises(TooMuchWrittenError):
        await backend.capture(EpochId(1, 1))
    assert memory.epochs == 3


class Tree:
    """What `FollowedFiles` asks of a tree."""

    def __init__(self) -> None:
        self.epoch: EpochId | None = None
        self.applied: list[EpochId] = []
        self.synced = self.forgotten = 0
        self.fails: list[Exception] = []
        self.full = False

    def compare_part(self, *_: object) -> tuple[list[str], None]:
        return [], None

    def apply(self, files: EpochId) -> Tree:
        if self.fails:
            raise self.fails.pop(0)
        self.epoch = files
        self.applied.append(files)
        return self

    def sync(self) -> None:
        self.synced += 1

    def forget(self) -> None:
        self.forgotten += 1
        self.epoch = None


class Store:
    """A store whose epochs' files are their names."""

    def files_of(self, epoch: EpochId) -> nullcontext[EpochId]:
        return nullcontext(epoch)


async def followed(tree: Tree) -> FollowedFiles:
    return FollowedFiles("redis", Store(), lambda: tree)  # type: ignore[arg-type,return-value]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_directories_follow_to_the_newest_epoch() -> None:
    tree = Tree()
    files = await followed(tree)
    files.follow(EpochId(1, 1))
    files.follow(EpochId(1, 2))
    await until(lambda: files.laid_out == EpochId(1, 2))
    files.follow(EpochId(1, 2))
    await until(lambda: files._following is not None and files._following.done())
    assert tree.applied == [EpochId(1, 2)]
    await files.close()
    await files.close()


async def test_what_cannot_be_laid_out_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlive.followed_files._AGAIN_S", 0.05)
    tree = Tree()
    tree.fails = [StoreError("no permission")]
    files = await followed(tree)
    files.follow(EpochId(1, 1))
    await until(lambda: files.problem == "no permission")
    await until(lambda: files.laid_out == EpochId(1, 1))
    assert files.problem == ""
    await files.close()


async def test_a_takeover_brings_them_to_its_epoch_and_nothing_follows() -> None:
    tree = Tree()
    files = await followed(tree)
    files.follow(EpochId(1, 5))
    await files.bring_to(EpochId(1, 4))
    assert tree.applied[-1] == EpochId(1, 4)
    assert tree.epoch is None, "the workload changes them from now on"
    assert tree.forgotten == 1
    assert files.laid_out is None
    await files.close()


async def test_a_takeover_without_its_files_is_none() -> None:
    tree = Tree()
    tree.fails = [StoreError("damaged"), StoreError("damaged")]
    files = await followed(tree)
    with pytest.raises(RestoreError, match="damaged"):
        await files.bring_to(EpochId(1, 4))
    assert tree.forgotten == 0
    await files.close()


async def test_a_start_makes_them_nobody_s_epoch() -> None:
    tree = Tree()
    files = await followed(tree)
    await files.begin()
    assert tree.forgotten == 1
    await files.close()


async def test_what_is_laid_out_is_synced_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlive.followed_files._SYNC_EVERY_S", 0.0)
    tree = Tree()
    files = await followed(tree)
    files.follow(EpochId(1, 1))
    await until(lambda: tree.synced == 1)
    await files.close()


async def test_a_tree_that_is_known_is_told_its_records_first() -> None:
    tree = Tree()
    tree.epoch = EpochId(1, 1)
    files = await followed(tree)
    files.follow(EpochId(1, 2))
    await until(lambda: files.laid_out == EpochId(1, 2))
    assert tree.applied == [EpochId(1, 1), EpochId(1, 2)]
    await files.close()
