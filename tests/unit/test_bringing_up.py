"""Who brings a workload up, by command lines: real processes that only look like it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.bringing_up import bringing_up, end_bringing_up
from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    return NodeConfig(node=Node(name="a", address="127.0.0.1", run_dir=str(tmp_path)))


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]) as child:
        while words[-1] not in Path(f"/proc/{child.pid}/cmdline").read_text():  # it is just becoming that
            time.sleep(0.001)
        try:
            yield child
        finally:
            child.kill()


def conmon(config: NodeConfig, name: str) -> list[str]:
    bundle = str(WorkloadPaths(config, name).bundle)
    return [
        *("--api-version", "1", "--runtime-arg", "--root", "--runtime-arg", str(config.runc_root)),
        *("--cid", name, "--name", name, "--bundle", bundle, "--log-size-max", "67108864"),
    ]


@pytest.mark.parametrize("name", ["w", "1", "67108864"])
async def test_its_conmon_and_its_runc_are_ended_and_no_others(config: NodeConfig, name: str) -> None:
    runc = ["--root", str(config.runc_root), "start"]
    with (
        process(*conmon(config, name)) as its_conmon,
        process(*runc, name) as its_runc,
        process(*conmon(config, "other")) as other_conmon,
        process(*runc, "other") as other_runc,
        process("--root", "/elsewhere", "start", name) as elsewhere,
    ):
        assert set(bringing_up(config, name)) == {its_conmon.pid, its_runc.pid}
        await end_bringing_up(config, name)
        assert bringing_up(config, name) == []
        assert None not in (its_conmon.poll(), its_runc.poll())
        assert {each.poll() for each in (other_conmon, other_runc, elsewhere)} == {None}
