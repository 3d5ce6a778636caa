"""What is left out of a workload's files, told by names; and which patterns are none."""

from __future__ import annotations

import pytest

from common.excludes import Excludes, problems
from common.model import FilePath, WorkloadSpec

DATA = b"/data"


@pytest.mark.parametrize(
    ("pattern", "name", "root", "left_out"),
    [
        ("*.tmp", b"x.tmp", None, True),
        ("*.tmp", b"x.tmp", DATA, True),
        ("*.tmp", b"x.tmpl", None, False),
        ("*.tmp", b".tmp", None, True),
        ("*.tmp", b"two\nlines.tmp", None, True),
        ("*.tmp", b"\xff\xfe.tmp", None, True),
        ("*.TMP", b"x.tmp", None, False),
        ("cache", b"cache", None, True),
        ("cache", b"cache2", None, False),
        ("\u00e4?[!0-9]", b"\xc3\xa4\xc3\xb6x", None, True),
        ("\u00e4?[!0-9]", b"\xc3\xa4\xc3\xb67", None, False),
        ("/data/cache", b"cache", DATA, True),
        ("/data/cache", b"cache", b"/data/", True),
        ("/data/cache", b"cache", None, False),
        ("/data/cache", b"cache", b"/other", False),
        ("/data/*.log", b"a.log", DATA, True),
        ("/data/*.log", b"a.log", None, False),
    ],
)
def test_an_entry_is_left_out_by_its_name(
    pattern: str, name: bytes, root: bytes | None, left_out: bool
) -> None:
    assert Excludes([pattern]).has(name, root) == left_out
    assert Excludes(["no", pattern, "/data/none"]).has(name, root) == left_out


def test_without_patterns_nothing_is() -> None:
    assert not Excludes([])
    assert not Excludes([]).has(b"x", DATA)


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("/data", False),
        ("/data/cache", True),
        ("/data/cache/deep/file", True),
        ("/data/deep/cache", False),
        ("/data/deep/x.tmp/file", True),
        ("/data/deep/file", False),
    ],
)
def test_a_path_is_left_out_by_any_of_its_parts(path: str, left_out: bool) -> None:
    assert Excludes(["/data/cache", "*.tmp"]).has_path("/data", path) == left_out


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*.tmp", ""),
        ("/data/cache", ""),
        ("/data/*", ""),
        ("", "must be a name"),
        ("..", "must be a name"),
        ("a/b", "must be a name"),
        ("/data", "not directly in one"),
        ("/data/a/b", "not directly in one"),
        ("/data/..", "not directly in one"),
        ("/shared/cache", "not directly in one"),
        ("/", "not directly in one"),
    ],
)
def test_what_is_no_pattern_is_told(pattern: str, words: str) -> None:
    files = (FilePath(path="/data/"), FilePath(path="/shared", shared=True))
    spec = WorkloadSpec(name="w", nodes=("a", "b"), command=("x",), files=files, exclude=(pattern,))
    said = list(problems(spec))
    assert len(said) == bool(words)
    assert all(words in each and f"{pattern!r}" in each for each in said)
