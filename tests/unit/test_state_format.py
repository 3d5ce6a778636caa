"""What is on disk in a version that this one does not know is refused with one error, and left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StoreError
from common.state_format import STATE_FORMAT, check_state_format
from tests.unit.test_agent import fill_disk


def test_a_directory_that_says_nothing_is_taken_for_this_version_and_says_so_from_then_on(
    tmp_path: Path,
) -> None:
    check_state_format(tmp_path)
    assert (tmp_path / "format").read_bytes() == STATE_FORMAT
    check_state_format(tmp_path)
    check_state_format(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_full_disk_keeps_nobody_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch)
    check_state_format(tmp_path)
    assert not (tmp_path / "format").exists()


@pytest.mark.parametrize("line", [b"outlive state 2\n", b"", b"\xff" * 500])
def test_another_version_is_refused_with_both_named_and_nothing_touched(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "format").write_bytes(line)
    with pytest.raises(StoreError) as caught:
        check_state_format(tmp_path)
    assert "this version of Outlive knows `outlive state 1`" in caught.value.message
    assert line != b"outlive state 2\n" or "is `outlive state 2`" in caught.value.message
    assert len(caught.value.message) < 400
    assert "run the version that wrote it" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["format"]
    assert (tmp_path / "format").read_bytes() == line
