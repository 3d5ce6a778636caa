"""Directories for secrets: made for their owner alone, refused if anybody else could get at them."""

import os
import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.private_directory import prepare_private_directory


def test_it_is_made_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        prepare_private_directory(tmp_path / "images", "node.image_dir")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700
    prepare_private_directory(tmp_path / "images", "node.image_dir")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
def test_one_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d").chmod(mode)
    with pytest.raises(ConfigError, match=r"node\.state_dir: .* open to others \(mode"):
        prepare_private_directory(tmp_path / "d", "node.state_dir")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_owns_or_leads_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    prepare_private_directory(tmp_path / "link", "node.image_dir")
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    for name in ("theirs", "link"):
        with pytest.raises(ConfigError, match="open to others"):
            prepare_private_directory(tmp_path / name, "node.image_dir")


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch(mode=0o600)
    with pytest.raises(ConfigError, match="open to others"):
        prepare_private_directory(tmp_path / "f", "node.image_dir")
