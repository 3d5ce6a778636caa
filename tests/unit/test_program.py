"""A workload's program: where it is looked for, and a start that is refused before runc is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import Node, NodeConfig
from common.container import incarnation, start_workload
from common.errors import WorkloadError
from common.model import FilePath, WorkloadSpec
from common.program import program_candidates, runc_misses_program, surely_missing


def spec(*command: str, **fields: object) -> WorkloadSpec:
    return WorkloadSpec(name="w", nodes=("a",), command=command, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("declared", "looked_for"),
    [
        (spec("/opt/run"), ["/opt/run"]),
        (spec("./run", working_directory="/opt"), ["/opt/run"]),
        (spec("bin/run", working_directory="/opt"), ["/opt/bin/run"]),
        (spec("run", environment={"PATH": "/a:relative::/b/"}), ["/a/run", "/b/run"]),
        (spec("run", environment={"PATH": ""}), []),
    ],
)
def test_it_is_looked_for_where_runc_does(declared: WorkloadSpec, looked_for: list[str]) -> None:
    assert list(program_candidates(declared)) == looked_for


def test_without_a_path_of_its_own_the_usual_one_is_searched() -> None:
    assert "/usr/bin/run" in program_candidates(spec("run"))


@pytest.mark.parametrize(
    ("declared", "missing"),
    [
        (spec("sh"), False),
        (spec("/bin/sh"), False),
        (spec("no-such-program"), True),
        (spec("/etc/passwd"), True),
        (spec("/etc"), True),
        (spec("/no/such", root="/srv"), False),
        (spec("/no/such", files=(FilePath(path="/no"),)), False),
    ],
)
def test_it_is_missing_only_where_that_is_certain(declared: WorkloadSpec, missing: bool) -> None:
    assert surely_missing(declared) is missing


@pytest.mark.parametrize(
    ("words", "about_it"),
    [
        (r'level=error msg="runc create failed: exec: \"run\": executable file not found in $PATH"', True),
        ('runc create failed: exec: "run": permission denied', True),
        (r'msg="runc create failed: exec: \"other\": executable file not found in $PATH"', False),
        ("runc create failed: cannot mount proc", False),
    ],
)
def test_runcs_words_about_it_are_known(words: str, about_it: bool) -> None:
    assert runc_misses_program(spec("run"), words) is about_it


async def test_a_start_without_its_program_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    node = Node(name="a", address="127.0.0.1", state_dir=f"{tmp_path}/state", run_dir=f"{tmp_path}/run")
    config = NodeConfig(node=node)
    with pytest.raises(WorkloadError) as raised:
        await start_workload(config, spec("no-such-program", "--port", "1"))
    assert raised.value.message.startswith(
        "w cannot start: its program no-such-program is no executable file"
    )
    assert "/usr/bin/no-such-program" in raised.value.message
    assert raised.value.hint
    assert incarnation(config, "w") is None
    assert list(tmp_path.iterdir()) == []
