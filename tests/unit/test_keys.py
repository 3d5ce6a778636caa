"""Key files: nobody but the node can read its secret, at any moment."""

import os
import stat
from pathlib import Path

import pytest

from common import keys
from common.errors import AuthError


def test_what_is_generated_is_loaded_and_the_public_half_stands_beside(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    made = keys.generate(path)
    assert keys.load(path) == made
    assert keys.public_key_path(path).read_text() == f"{made.public}\n"
    assert len(made.public) == len(made.secret) == 40
    assert made.secret not in repr(made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.public_key_path(path).stat().st_mode) == 0o644


def test_the_secret_is_never_readable_by_others_whatever_the_umask(tmp_path: Path, monkeypatch) -> None:
    modes = []
    real_open = os.open

    def watching_open(path, flags, mode=0o777, **rest):
        descriptor = real_open(path, flags, mode, **rest)
        if str(path).endswith("node.key"):
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watching_open)
    before = os.umask(0)
    try:
        keys.generate(tmp_path / "node.key")
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    first = keys.generate(tmp_path / "node.key")
    with pytest.raises(AuthError, match="already"):
        keys.generate(tmp_path / "node.key")
    assert keys.load(tmp_path / "node.key") == first


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o611])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    keys.generate(tmp_path / "node.key")
    (tmp_path / "node.key").chmod(mode)
    with pytest.raises(AuthError, match="read by others") as caught:
        keys.load(tmp_path / "node.key")
    assert "chmod 0600" in caught.value.hint


@pytest.mark.parametrize("content", ["", "short", "x" * 41, "\x00" * 40, "ü" * 20, "~" * 40])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(AuthError, match="does not hold a key"):
        keys.load(path)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AuthError) as caught:
        keys.load(tmp_path / "none")
    assert "outlive keys generate" in caught.value.hint
    with pytest.raises(AuthError):
        keys.generate(tmp_path / "nowhere" / "node.key")


def test_the_next_key_waits_beside_the_present_one_until_it_is_activated(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    first = keys.generate(path)
    following = keys.prepare_next(path)
    assert keys.prepare_next(path) == following != first
    assert keys.load(path) == first
    assert keys.activate_next(path) == following
    assert keys.load(path) == following
    assert keys.public_key_path(path).read_text() == f"{following.public}\n"
    assert keys.load(keys.former_key_path(path)) == first
    assert not keys.next_key_path(path).exists()
    with pytest.raises(AuthError, match="no key"):
        keys.activate_next(path)
    assert keys.load(path) == following
    assert keys.prepare_next(path) not in (first, following)


def test_an_activation_that_is_cut_off_anywhere_leaves_a_key_in_its_place(
    tmp_path: Path, monkeypatch
) -> None:
    for cut_at in ("link", "rename", "replace"):
        path = tmp_path / cut_at / "node.key"
        path.parent.mkdir()
        first = keys.generate(path)
        following = keys.prepare_next(path)

        def cut(*_args: object, **_options: object) -> None:
            raise OSError(5, "cut off")

        with monkeypatch.context() as patch:
            patch.setattr(*((os, "link") if cut_at == "link" else (Path, cut_at)), cut)
            with pytest.raises(AuthError, match="cut off"):
                keys.activate_next(path)
        assert keys.load(path) == (following if cut_at == "replace" else first)
