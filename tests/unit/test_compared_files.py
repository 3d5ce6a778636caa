"""Directories that somebody else changed on a standby: found when they are compared, and made equal again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_worlds import DIR, REG, Epochs, FakeFiles, World, walk

from common.errors import StoreError
from common.model import PAGE_BYTES, EpochId
from outlive.followed_files import FollowedFiles
from replica.file_check import START, Cursor
from replica.file_tree import FileTree

ROOT = 1
"""The directory `/data` in a new world."""


class Standby:
    """A workload's directory, what is stored of it, and what keeps it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "data"
        self.world, self.epochs = World(), Epochs()
        self.stored: dict[EpochId, FakeFiles] = {}
        self.trees: list[FileTree] = []
        self.altered: list[str] = []
        self._state = directory / "state"
        self.files = FollowedFiles("redis", self, self._tree, self.altered.append)  # type: ignore[arg-type]

    def _tree(self) -> FileTree:
        self.trees.append(FileTree({b"/data": self.root}, self._state))
        return self.trees[-1]

    @contextmanager
    def files_of(self, epoch: EpochId) -> Iterator[FakeFiles]:
        if epoch not in self.stored:
            raise StoreError(f"{epoch} is not held")
        yield self.stored[epoch]

    def commit(self) -> EpochId:
        files = self.epochs.tell(self.world)
        self.stored[files.epoch] = files
        return files.epoch

    async def follow(self) -> None:
        epoch = self.commit()
        self.files.follow(epoch)
        await until(lambda: self.files.laid_out == epoch)

    async def compared(self) -> None:
        self.files.compare()
        await until(lambda: not self.files.comparison.running)

    def is_the_world(self) -> bool:
        return walk({b"/data": self.root}) == self.world.found()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
def standby(tmp_path: Path) -> Standby:
    made = Standby(tmp_path)
    world = made.world
    below = world.make(ROOT, b"a", DIR | 0o755)
    for number in range(40):
        world.make(below, b"f%d" % number, REG | 0o644, b"%d" % number * 3000)
    world.entries[ROOT, b"link"] = world.entries[below, b"f7"]
    world.make(ROOT, b"large", REG | 0o600, os.urandom(100 * PAGE_BYTES))
    world.make(world.make(ROOT, b"b", DIR | 0o700), b"c", DIR | 0o700)
    return made


def rewritten(path: Path) -> None:
    """Change a file so that neither its size nor its times tell."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(b"!!!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ALTERED: dict[str, tuple[Callable[[Path], None], bool]] = {
    "a file was made": (lambda root: (root / "b" / "c" / "new").touch(), True),
    "a file is gone": (lambda root: (root / "a" / "f3").unlink(), True),
    "a directory is gone": (lambda root: (root / "b" / "c").rmdir(), True),
    "a file is a FIFO": (lambda root: replaced(root / "a" / "f3"), True),
    "another size": (lambda root: os.truncate(root / "large", 5), True),
    "another mode": (lambda root: (root / "a").chmod(0o700), True),
    "another time": (lambda root: os.utime(root / "a" / "f9"), True),
    "other content, told by nothing": (lambda root: rewritten(root / "large"), False),
    "another file under the second name": (
        lambda root: ((root / "link").unlink(), (root / "link").write_bytes(b"7" * 3000)),
        True,
    ),
}
"""What was done, and whether a quick look finds it."""


@pytest.mark.parametrize("what", ALTERED)
async def test_what_was_altered_is_found_and_made_equal(standby: Standby, what: str) -> None:
    await standby.follow()
    await standby.compared()
    assert standby.files.comparison.different == 0
    assert standby.files.comparison.pages_done == standby.files.comparison.pages_due > 100
    ALTERED[what][0](standby.root)
    await standby.compared()
    found = standby.files.comparison
    assert (found.different > 0, found.repaired, found.problem) == (True, True, "")
    assert len(standby.altered) == 1
    assert standby.is_the_world()
    await standby.compared()
    assert standby.files.comparison.different == 0
    await standby.files.close()


@pytest.mark.parametrize("what", ALTERED)
async def test_before_a_takeover_a_quick_look_finds_what_times_and_sizes_tell(
    standby: Standby, what: str
) -> None:
    await standby.follow()
    alter, quickly = ALTERED[what]
    alter(standby.root)
    await standby.files.bring_to(standby.commit())
    assert (len(standby.altered) == 1) == standby.is_the_world() == quickly
    await standby.files.close()


async def test_a_takeover_of_what_nobody_altered_tells_nothing(standby: Standby) -> None:
    await standby.follow()
    standby.world.make(ROOT, b"more", REG | 0o600, b"x")
    await standby.files.bring_to(standby.commit())
    assert standby.altered == []
    assert standby.is_the_world()
    await standby.files.close()


async def test_a_takeover_is_not_given_up_for_what_cannot_be_looked_at(
    standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    await standby.follow()

    def fails(tree: FileTree, *_: object) -> None:
        raise StoreError("no permission")

    monkeypatch.setattr(FileTree, "compare_part", fails)
    await standby.files.bring_to(standby.commit())
    assert "no permission" in standby.altered[0]
    assert standby.is_the_world()
    await standby.files.close()


async def test_a_takeover_does_not_look_for_ever(standby: Standby, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlive.followed_files._LOOK_OVER_S", -1.0)
    await standby.follow()
    (standby.root / "new").touch()
    await standby.files.bring_to(standby.commit())
    assert standby.altered == []
    await standby.files.close()


@pytest.mark.parametrize("within_s", [0.0, 60.0])
async def test_a_takeover_does_not_look_through_a_large_directory_for_ever(
    standby: Standby, monkeypatch: pytest.MonkeyPatch, within_s: float
) -> None:
    monkeypatch.setattr("outlive.followed_files._LOOK_OVER_S", within_s)
    monkeypatch.setattr("replica.file_check._ASKED_EACH", 1)
    await standby.follow()
    monkeypatch.setattr("outlive.followed_files.time", Ticking())
    times = (standby.root / "a").stat()
    (standby.root / "a" / "new").touch()  # found only when all that should be there was looked at
    os.utime(standby.root / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    await standby.files.bring_to(standby.commit())
    assert (standby.altered == []) == (within_s == 0.0)
    await standby.files.close()


class Ticking:
    """A clock that goes on a second after it was read twice."""

    def __init__(self) -> None:
        self.read = 0

    def monotonic(self) -> float:
        self.read += 1
        return float(self.read > 2)


async def test_what_cannot_be_made_equal_is_told_and_looked_at_wholly_the_next_time(
    standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    await standby.follow()
    rewritten(standby.root / "large")
    apply = FileTree.apply

    def gone(tree: FileTree, files: FakeFiles, *, full: bool = False) -> object:
        if full:
            raise StoreError(f"{files.epoch} is not held any more")
        return apply(tree, files)

    with monkeypatch.context() as patched:
        patched.setattr(FileTree, "apply", gone)
        await standby.compared()
        found = standby.files.comparison
        assert (found.different, found.repaired) == (1, False)
        assert "not held" in found.problem
        assert "not made equal yet" in standby.altered[0]
    await standby.follow()
    assert standby.is_the_world()
    await standby.files.close()


async def test_epochs_go_on_while_all_is_compared(standby: Standby, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.file_check._PART_ENTRIES", 3)
    monkeypatch.setattr("replica.file_check._PART_PAGES", 4)
    await standby.follow()
    parts: list[tuple[Cursor, EpochId]] = []
    compare_part = FileTree.compare_part

    def noted(tree: FileTree, files: FakeFiles, cursor: Cursor = START) -> tuple[list[str], Cursor | None]:
        parts.append((cursor, files.epoch))
        if len(parts) % 3 == 0:
            number = len(parts)
            standby.world.make(ROOT, b"while %d" % number, REG | 0o600, b"%d" % number * 5000)
            if (ROOT, b"while %d" % (number - 6)) in standby.world.entries:
                standby.world.remove(ROOT, b"while %d" % (number - 6))
            tree.apply(epoch := standby.stored.setdefault(*_stored(standby)))
            files = epoch
        return compare_part(tree, files, cursor)

    monkeypatch.setattr(FileTree, "compare_part", noted)
    (standby.root / "b" / "c" / "new").touch()
    rewritten(standby.root / "large")
    await standby.compared()
    found = standby.files.comparison
    assert len(parts) > 20
    assert len({epoch for _, epoch in parts}) > 5
    assert any("new is not in the epoch" in each for each in found.examples)
    assert any("large holds something else" in each for each in found.examples)
    assert found.different == len(found.examples) <= 4
    assert found.repaired
    assert standby.is_the_world()
    await standby.files.close()


def _stored(standby: Standby) -> tuple[EpochId, FakeFiles]:
    files = standby.epochs.tell(standby.world)
    return files.epoch, files


async def test_a_comparison_gives_way_to_a_takeover(
    standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.file_check._PART_PAGES", 1)
    await standby.follow()
    standby.files.compare()
    await until(lambda: standby.files.comparison.epoch is not None)
    await standby.files.bring_to(standby.commit())
    assert not standby.files.comparison.running
    assert "broken off" in standby.files.comparison.problem
    await standby.files.close()


async def test_what_cannot_be_compared_is_told(standby: Standby, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlive.followed_files._PATIENCE", 2)
    monkeypatch.setattr("outlive.followed_files._AGAIN_S", 0.01)
    await standby.follow()
    standby.stored.clear()
    await standby.compared()
    assert standby.files.comparison.problem == "t1-e1 is not held"
    assert not standby.files.comparison.repaired
    await standby.files.close()
