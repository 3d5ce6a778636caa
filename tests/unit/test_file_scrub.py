"""Changes that nobody reported are found by the rounds, and told; those that were reported are not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from file_trees import Changes, rebuild, walk

from common.errors import CaptureError, UnsupportedError
from common.identity import PageHasher
from common.model import EpochId
from primary.file_capture import FileCapture
from primary.file_reader import How
from primary.file_watch import FileWatch, Hints


class DeafWatch(FileWatch):
    """A watch that hears nothing while it is deaf."""

    deaf = False

    def drain(self) -> Hints:
        hints = super().drain()
        return Hints([], False) if self.deaf else hints


class Rounds:
    """A capture whose rounds are told of at once."""

    def __init__(self, root: Path, layers: Path) -> None:
        self.root = root
        self.missed: list[str] = []
        self.watch = DeafWatch([root])
        self.files = FileCapture(
            {b"/data": root},
            hasher=PageHasher(),
            layers=layers,
            pids=lambda: [os.getpid()],
            watch=self.watch,
            on_missed=self.missed.append,
        )
        self._number = 0

    def epoch(self, changes: Callable[[], None] = lambda: None) -> bool:
        """Take an epoch; tell whether it has the tree as it is."""
        self._number += 1
        self.files.ahead(None)
        changes()
        self.files.take(patient=False)
        self.files.settle()
        spaces, reader = self.files.seal(EpochId(1, self._number))
        try:
            return rebuild(spaces, reader) == walk(self.root)
        except CaptureError:  # what the file holds by now is not what is known
            return False
        finally:
            reader.release()


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounds]:
    monkeypatch.setattr("primary.file_scrub._REPORTED_WITHIN_S", 0.0)
    monkeypatch.setattr("primary.file_scrub._LEAST_ENTRIES", 5)
    root, layers = tmp_path / "data", tmp_path / "layers"
    (root / "a" / "b").mkdir(parents=True)
    layers.mkdir()
    for number in range(20):
        (root / "a" / f"f{number}").write_bytes(b"%d" % number * 3000)
    os.link(root / "a" / "f1", root / "a" / "b" / "linked")
    try:
        made = Rounds(root, layers)
    except UnsupportedError as error:
        pytest.skip(error.message)
    yield made
    made.files.close()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written": (lambda root: (root / "a" / "f3").write_bytes(b"new"), "f3 was modified"),
    "written, its time put back": (
        lambda root: (
            times := (root / "a" / "f3").stat(),
            (root / "a" / "f3").write_bytes(b"new"),
            os.utime(root / "a" / "f3", ns=(times.st_atime_ns, times.st_mtime_ns)),
        ),
        "f3 has another size",
    ),
    "made": (lambda root: (root / "a" / "b" / "new").write_bytes(b"new"), "a/b was modified"),
    "a tree": (lambda root: (root / "t" / "u").mkdir(parents=True), "data was modified"),
    "removed": (lambda root: (root / "a" / "f7").unlink(), "a was modified"),
    "another mode": (lambda root: (root / "a" / "f9").chmod(0o600), "f9 has another mode or owner"),
    "another mode of a directory": (lambda root: (root / "a" / "b").chmod(0o700), "b has another mode"),
    "another kind": (
        lambda root: ((root / "a" / "f2").unlink(), (root / "a" / "f2").mkdir()),
        "a was modified",
    ),
    "moved": (lambda root: (root / "a" / "f5").rename(root / "f5"), "a was modified"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_not_reported_is_found_told_and_in_an_epoch(rounds: Rounds, what: str) -> None:
    for _ in range(12):
        assert rounds.epoch()
    change, words = CHANGES[what]
    rounds.watch.deaf = True
    assert not rounds.epoch(lambda: change(rounds.root) and None)
    rounds.watch.deaf = False
    assert rounds.missed == []
    epochs = 0
    while not rounds.epoch():
        epochs += 1
        assert epochs < 15
    assert any(words in each for each in rounds.missed), rounds.missed
    told = len(rounds.missed)
    for _ in range(12):
        assert rounds.epoch()
    assert len(rounds.missed) == told


def test_nothing_is_told_of_what_was_reported(rounds: Rounds) -> None:
    changes = Changes(rounds.root, seed=5)
    for _ in range(60):
        changes.some(4)
        assert rounds.epoch(lambda: changes.some(4))
    assert rounds.missed == []


def test_what_is_reported_late_is_not_told(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primary.file_scrub._REPORTED_WITHIN_S", 3600.0)
    for _ in range(12):
        rounds.epoch()
    real = rounds.watch.drain
    kept: list[Hints] = []

    def late() -> Hints:
        kept.append(real())
        return Hints([], False)

    monkeypatch.setattr(rounds.watch, "drain", late)
    CHANGES["written"][0](rounds.root)
    CHANGES["made"][0](rounds.root)
    CHANGES["another mode"][0](rounds.root)
    for _ in range(12):
        rounds.epoch()
    assert len(rounds.files._suspicions._waiting) >= 3
    hints = [hint for each in kept for hint in each.changed]
    monkeypatch.setattr(rounds.watch, "drain", lambda: Hints(hints, False))
    rounds.epoch()
    assert rounds.files._suspicions._waiting == {}
    assert rounds.missed == []


def test_a_file_of_two_names_is_told_of_by_one(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primary.file_scrub._REPORTED_WITHIN_S", 3600.0)
    monkeypatch.setattr("primary.file_scrub._LEAST_ENTRIES", 100)
    for _ in range(3):
        rounds.epoch()
    rounds.watch.deaf = True
    (rounds.root / "a" / "b" / "linked").write_bytes(b"new")
    rounds.epoch()
    assert len(rounds.files._suspicions._waiting) == 1
    rounds.watch.deaf = False
    (rounds.root / "a" / "f1").write_bytes(b"newer")
    rounds.epoch()
    assert rounds.files._suspicions._waiting == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_a_file_that_cannot_be_looked_at_is_not_gone(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for _ in range(12):
        assert rounds.epoch()
    real = os.stat

    def broken(path: Any, **options: Any) -> os.stat_result:
        if path == b"f3":
            raise OSError(number, os.strerror(number))
        return real(path, **options)

    monkeypatch.setattr("primary.file_scrub.os.stat", broken)
    found = [each for _ in range(12) for each in rounds.files._scrub.some(How(raw_bytes=0), lambda *_: False)]
    assert found == []


def test_a_directory_that_cannot_be_listed_does_not_end_the_capture(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> list[bytes]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("primary.file_reader.FileReader.names_in", fails)
    for _ in range(5):
        assert rounds.epoch(lambda: (rounds.root / "a" / "f3").write_bytes(os.urandom(50)) and None)
    assert rounds.missed == []
