"""The freezer on a real cgroup: what is in it stands still while it is held, and runs again."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import CaptureError
from primary.freezer import Freezer, NotFrozenError

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root"),
]

_MOUNT = Path("/sys/fs/cgroup")
_TICKER = """
import mmap, sys
file = open(sys.argv[1], "r+")
board = mmap.mmap(file.fileno(), 8)
count = 0
while True:
    count += 1
    board[:] = count.to_bytes(8, "little")
"""


class Ticker:
    """A process in a cgroup of its own that counts as fast as it can."""

    def __init__(self, directory: Path) -> None:
        board = directory / "board"
        board.write_bytes(bytes(8))
        with board.open("r+b") as file:
            self._board = mmap.mmap(file.fileno(), 8)
        self.name = f"/outlive-freezer-{os.getpid()}"
        mounts = [each for each in (_MOUNT / "freezer", _MOUNT) if (each / "cgroup.procs").exists()]
        if not mounts:
            pytest.skip("no hierarchy of cgroups freezes here")
        self.cgroup = mounts[0] / self.name.strip("/")
        self.cgroup.mkdir()
        self.process = subprocess.Popen([sys.executable, "-c", _TICKER, str(board)])
        (self.cgroup / "cgroup.procs").write_text(str(self.process.pid))
        while not self.count:
            assert self.process.poll() is None
            time.sleep(0.001)

    @property
    def count(self) -> int:
        return int.from_bytes(self._board[:], "little")

    @property
    def runs(self) -> bool:
        before = self.count
        until_s = time.monotonic() + 0.05
        while time.monotonic() < until_s:
            if self.count != before:
                return True
            time.sleep(0.001)
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for _ in range(100):
            try:
                return self.cgroup.rmdir()
            except OSError:
                time.sleep(0.01)


@pytest.fixture
def ticker(tmp_path: Path) -> Iterator[Ticker]:
    ticker = Ticker(tmp_path)
    yield ticker
    ticker.close()


def test_it_stands_still_for_as_long_as_it_is_held(ticker: Ticker) -> None:
    assert ticker.runs
    with Freezer(ticker.name).held(1.0):
        assert not ticker.runs
    assert ticker.runs


def test_it_runs_again_after_a_failure(ticker: Ticker) -> None:
    def fail() -> None:
        with Freezer(ticker.name).held(1.0):
            raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        fail()
    assert ticker.runs


def test_a_thaw_by_somebody_else_is_told(ticker: Ticker) -> None:
    with pytest.raises(CaptureError, match="thawed"), Freezer(ticker.name).held(1.0):
        _thaw(ticker)
    assert ticker.runs


def test_one_that_somebody_else_holds_is_left_alone(ticker: Ticker) -> None:
    with Freezer(ticker.name).held(1.0):
        with pytest.raises(NotFrozenError, match="already"), Freezer(ticker.name).held(1.0):
            pytest.fail("it is held already")
        assert not ticker.runs


def test_one_that_is_not_there_is_told() -> None:
    with pytest.raises(NotFrozenError, match="no freezer"), Freezer("/outlive-is-not-there").held(1.0):
        pytest.fail("there is nothing to freeze")


def _thaw(ticker: Ticker) -> None:
    for name, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        if (ticker.cgroup / name).exists():
            (ticker.cgroup / name).write_text(word)
    while not ticker.runs:
        time.sleep(0.001)
