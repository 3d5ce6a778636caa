"""How many files the agent may open: it takes what it can get, and the doctor knows what it needs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from common.config import Node, NodeConfig, Peer, Store
from common.model import WorkloadSpec
from outlive.descriptors import limit_of, needed, streams
from outlive.doctor.descriptors import check_descriptors, judge_descriptors

PEERS = tuple(Peer(name=name, address="127.0.0.2", public_key="k" * 40) for name in "bc")


def config_in(directory: Path, **store: int) -> NodeConfig:
    node = Node(name="a", address="127.0.0.1", run_dir=str(directory))
    return NodeConfig(node=node, peers=PEERS, store=Store(**store))


def workloads(count: int) -> list[WorkloadSpec]:
    return [WorkloadSpec(name=f"w{n}", nodes=("a", "b", "c"), command=("x",)) for n in range(count)]


def test_the_soft_limit_becomes_the_hard_one() -> None:
    script = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (100, 500));"
        "from outlive.descriptors import raise_limit; raise_limit();"
        "print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["500", "500"]


def test_a_process_says_its_limit() -> None:
    assert limit_of(os.getpid()) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_each_workload_each_replica_and_each_level_of_a_chain_needs_more(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    one, two = needed(config, workloads(1)), needed(config, workloads(2))
    assert one < two
    assert needed(config, [msgspec.structs.replace(workloads(1)[0], nodes=("a", "b"))]) < one
    assert needed(config_in(tmp_path, max_levels=16), workloads(1)) > one
    assert streams(config, workloads(5)) == 10
    assert streams(config, [msgspec.structs.replace(workloads(1)[0], nodes=("b", "c"))]) == 0


@pytest.mark.parametrize(
    ("count", "limit", "status"),
    [(1, 1024, "ok"), (20, 1024, "fail"), (20, 4096, "ok"), (151, 1 << 20, "fail")],
)
def test_the_doctor_compares_what_is_needed_with_what_is_allowed(
    tmp_path: Path, count: int, limit: int, status: str
) -> None:
    check = judge_descriptors(config_in(tmp_path), workloads(count), limit)
    assert (check.status, bool(check.hint)) == (status, status == "fail")


async def test_without_an_agent_the_doctors_own_limit_counts(tmp_path: Path) -> None:
    check = await check_descriptors(config_in(tmp_path), workloads(1))
    assert f"may open {resource.getrlimit(resource.RLIMIT_NOFILE)[1]};" in check.detail
