"""The freezer of a cgroup: it always thaws what it has frozen, and nothing else. On files made for it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from common.errors import CaptureError
from primary import freezer as freezer_module
from primary.freezer import Freezer, NotFrozenError


class Cgroup:
    """A directory that looks like a cgroup's, and does what the kernel would, as soon as it is looked at."""

    def __init__(self, directory: Path, version: int) -> None:
        self.directory = directory
        self.obeys = True
        self.version = version
        self.words: list[str] = []
        (directory / "freezer.state" if version == 1 else directory / "cgroup.freeze").write_text("")
        self.let("thawed")

    @property
    def file(self) -> Path:
        return self.directory / ("freezer.state" if self.version == 1 else "cgroup.freeze")

    def let(self, state: str) -> None:
        frozen = state == "frozen"
        if self.version == 1:
            self.file.write_text("FROZEN\n" if frozen else "THAWED\n")
        else:
            self.file.write_text(f"{int(frozen)}\n")
            (self.directory / "cgroup.events").write_text(f"populated 1\nfrozen {int(frozen)}\n")

    @property
    def is_frozen(self) -> bool:
        if self.version == 1:
            return self.file.read_text().startswith("FROZEN")
        return "frozen 1" in (self.directory / "cgroup.events").read_text()


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cgroup:
    cgroup = Cgroup(tmp_path, request.param)
    monkeypatch.setattr(freezer_module, "cgroup_directories", lambda path: [tmp_path])

    def written(switch: int, text: str) -> None:
        cgroup.words.append(text)
        if text in ("THAWED", "0"):
            cgroup.let("thawed")
        elif cgroup.obeys:
            cgroup.let("frozen")

    monkeypatch.setattr(freezer_module, "_write", written)
    return cgroup


def test_a_freeze_that_somebody_else_has_begun_is_left_to_them(cgroup: Cgroup) -> None:
    """A task is not at rest yet: it is not frozen, and is to be."""
    cgroup.file.write_text("FREEZING\n" if cgroup.version == 1 else "1\n")
    freezer = Freezer("/w")
    with pytest.raises(NotFrozenError, match="by somebody else"), freezer.held(1.0):
        pytest.fail("it was not frozen by us")
    with pytest.raises(NotFrozenError, match="by somebody else"):
        freezer.keep(1.0)
    assert cgroup.words == []


def test_it_stands_still_for_as_long_as_it_is_held(cgroup: Cgroup) -> None:
    with Freezer("/w").held(1.0):
        assert cgroup.is_frozen
    assert not cgroup.is_frozen
    assert cgroup.words == (["FROZEN", "THAWED"] if cgroup.version == 1 else ["1", "0"])


def test_it_tells_who_stands_still_in_cgroups_below_too(cgroup: Cgroup) -> None:
    (cgroup.directory / "cgroup.procs").write_text("4\n12\n")
    (cgroup.directory / "below" / "that").mkdir(parents=True)
    (cgroup.directory / "below" / "that" / "cgroup.procs").write_text("99\n")
    (cgroup.directory / "below" / "cgroup.procs").mkdir()  # it cannot be read
    with Freezer("/w").held(1.0) as pids:
        assert pids == {4, 12, 99}


def test_it_is_waited_for(cgroup: Cgroup) -> None:
    cgroup.obeys = False
    later = threading.Timer(0.05, cgroup.let, ["frozen"])
    later.start()
    with Freezer("/w").held(2.0):
        assert cgroup.is_frozen
    later.join()
    assert not cgroup.is_frozen


def test_one_that_does_not_freeze_in_time_is_let_go(cgroup: Cgroup) -> None:
    cgroup.obeys = False
    with pytest.raises(NotFrozenError, match="did not freeze"), Freezer("/w").held(0.01):
        pytest.fail("it was not frozen")
    assert cgroup.words[-1] in ("THAWED", "0")


def work(cgroup: Cgroup, failure: BaseException) -> None:
    with Freezer("/w").held(1.0):
        assert cgroup.is_frozen
        raise failure


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError(5, "read error")])
def test_it_is_thawed_whatever_happens(cgroup: Cgroup, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        work(cgroup, failure)
    assert not cgroup.is_frozen


def test_one_that_was_thawed_meanwhile_is_told(cgroup: Cgroup) -> None:
    with pytest.raises(CaptureError, match="thawed by somebody else"), Freezer("/w").held(1.0):
        cgroup.let("thawed")


def test_one_that_somebody_else_has_frozen_is_left_alone(cgroup: Cgroup) -> None:
    cgroup.let("frozen")
    with pytest.raises(NotFrozenError, match="frozen already"), Freezer("/w").held(1.0):
        pytest.fail("it is not ours to hold")
    assert cgroup.is_frozen
    assert cgroup.words == []


def test_one_without_a_freezer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer_module, "cgroup_directories", lambda path: [tmp_path])
    with pytest.raises(NotFrozenError, match="no freezer"), Freezer("/w").held(1.0):
        pytest.fail("nothing is frozen")


def test_it_is_thawed_even_if_no_file_can_be_opened_any_more(
    cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:

        def exhaust() -> None:
            with Freezer("/w").held(1.0):
                assert cgroup.is_frozen
                patch.setattr(os, "open", exhausted)
                patch.setattr(Path, "read_text", exhausted)

        with pytest.raises(CaptureError):
            exhaust()
    assert not cgroup.is_frozen


def test_what_is_kept_stays_frozen_until_it_is_thawed(cgroup: Cgroup) -> None:
    freezer = Freezer("/w")
    freezer.keep(1.0)
    assert cgroup.is_frozen
    assert freezer.is_kept
    assert freezer.kept == cgroup.directory
    with pytest.raises(NotFrozenError, match="frozen already"), freezer.held(1.0):
        pytest.fail("it is kept")
    freezer.thaw()
    freezer.thaw()
    assert not cgroup.is_frozen
    assert not freezer.is_kept
    assert freezer.kept is None
    assert len(cgroup.words) == 2


def test_what_was_kept_and_thawed_by_somebody_else_is_kept_no_more(cgroup: Cgroup) -> None:
    freezer = Freezer("/w")
    freezer.keep(1.0)
    cgroup.let("thawed")
    assert not freezer.is_kept
    freezer.thaw()


def test_what_does_not_come_to_rest_is_not_kept(cgroup: Cgroup) -> None:
    cgroup.obeys = False
    freezer = Freezer("/w")
    with pytest.raises(NotFrozenError, match="did not freeze"):
        freezer.keep(0.01)
    assert freezer.kept is None
    assert cgroup.words[-1] in ("THAWED", "0")


def test_what_is_left_stays_frozen(cgroup: Cgroup) -> None:
    freezer = Freezer("/w")
    freezer.keep(1.0)
    freezer.leave()
    freezer.thaw()
    assert cgroup.is_frozen
    assert freezer.kept is None
