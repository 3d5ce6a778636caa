"""A redis among very many files: its first sync, epochs, and the loss of its host.

    python -m tests.campaigns.many_files --files 1000000

Prints one JSON object: how long the first look and the first sync take, what `status` said of them, how much
memory the agents take, what epochs cost in which a thousand files change, how long a takeover takes, and
whether the standby had every file then. Exits with 1 if it had not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from common.model import FilePath, HealthCheck, WorkloadSpec
from outlive.cli.running import configure_logs
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Lab
from tests.system.clusters import NAME, PORT, REDIS, Protected

_IN_A_DIRECTORY = 1000
_CHANGED = 1000
_POLL_S = 0.2
_PATIENCE_S = 3600.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What it came to."""

    schema_version: int = 1
    files: int
    first_look_s: float
    """Until the first epoch was captured; the workload ran meanwhile, and was not protected."""
    first_sync_s: float
    """Until the standby could restore it, from the same moment on."""
    told_scanned: int
    """How many times `status` said how many files were looked through, and it was another number ..."""
    told_sent: int
    """... or how much of an epoch has come to the standby."""
    primary_rss_mib: float
    """Most memory that the agent has had, VmHWM."""
    standby_rss_mib: float
    changed: int
    """How many files change before each of the epochs that follow."""
    freeze_ms_p50: float
    freeze_ms_max: float
    takeover_s: float
    """From the loss of the host until redis answered elsewhere."""
    missing: int
    """Files that were not there then, or not as they were for seconds before."""


def fill(root: Path, count: int) -> None:
    """Make so many small files, each with other content."""
    for first in range(0, count, _IN_A_DIRECTORY):
        directory = root / f"{first // _IN_A_DIRECTORY:04}"
        directory.mkdir(parents=True)
        for number in range(first, min(count, first + _IN_A_DIRECTORY)):
            (directory / f"file-{number}").write_bytes(content_of(number, 0))


def content_of(number: int, version: int) -> bytes:
    """Return what a file holds."""
    return b"%d of %d\n" % (version, number) * 20


def change(root: Path, count: int, version: int) -> dict[int, int]:
    """Change a thousand files; return which version they have now."""
    numbers = random.Random(version).sample(range(count), min(count, _CHANGED))
    for number in numbers:
        path = root / f"{number // _IN_A_DIRECTORY:04}" / f"file-{number}"
        path.write_bytes(content_of(number, version))
    return dict.fromkeys(numbers, version)


def missing(root: Path, count: int, versions: dict[int, int]) -> int:
    """Count the files that are not what they should be, and those that should not be."""
    wrong = 0
    for number in range(count):
        path = root / f"{number // _IN_A_DIRECTORY:04}" / f"file-{number}"
        try:
            wrong += path.read_bytes() != content_of(number, versions.get(number, 0))
        except OSError:
            wrong += 1
    there = sum(len(names) for _, _, names in os.walk(root))
    return wrong + abs(there - count)


def files_of(node: Node) -> Path:
    """Return where a node has the workload's files."""
    return Path(node.config.node.state_dir) / "workloads" / NAME / "files" / "0"


async def most_memory_mib(node: Node) -> float:
    """Return the most memory that a node's agent has had."""
    pid = (await node.metrics()).pid
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"the agent {pid} has no memory")


async def run(count: int, epochs: int) -> Report:
    """Do it once."""
    scanned: set[int] = set()
    sent: set[int] = set()
    captured_s = 0.0
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=NAME,
            nodes=("a", "b"),
            command=(*REDIS, "--dir", "/data"),
            files=(FilePath(path="/data"),),
            vip=str(lab.vip()),
            health=HealthCheck(tcp=PORT),
            right_to_lead="fence",
            epoch_interval_ms=500,
        )
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec])
        cluster = Protected(lab, nodes, await lab.add_host("client"), spec)
        a, b = nodes["a"], nodes["b"]
        await asyncio.to_thread(fill, files_of(a), count)
        await start_all(nodes)
        await a.cli("start", NAME)
        began_s = time.monotonic()
        while True:
            led = await a.workload(NAME)
            if led is not None:
                captured_s = captured_s or (time.monotonic() if led.captured is not None else 0.0)
                if led.capture is not None and led.capture.files_scanned:
                    scanned.add(led.capture.files_scanned)
                sent |= {each.sending.done_bytes for each in led.replicas if each.sending is not None}
                if any(each.restorable for each in led.replicas):
                    break
            if time.monotonic() > began_s + _PATIENCE_S:
                raise TimeoutError(f"not protected after {_PATIENCE_S:g} s: {led}")
            await asyncio.sleep(_POLL_S)
        synced_s = time.monotonic()
        await cluster.redis("set", "key", "value")
        before = len((await a.metrics()).workloads[0].freeze_ms)
        versions: dict[int, int] = {}
        for version in range(1, epochs + 1):
            versions |= await asyncio.to_thread(change, files_of(a), count, version)
            await cluster.wait_for_epochs(1, timeout_s=_PATIENCE_S)
        freezes = (await a.metrics()).workloads[0].freeze_ms[before:]
        await cluster.wait_for_epochs(4, timeout_s=_PATIENCE_S)
        memory_mib = await most_memory_mib(a), await most_memory_mib(b)
        await lab.power_off("a")
        lost_s = time.monotonic()
        await eventually(cluster.answers, what="redis answers elsewhere", timeout_s=_PATIENCE_S)
        took_s = time.monotonic() - lost_s
        lacking = await asyncio.to_thread(missing, files_of(b), count, versions)
        lacking += await cluster.redis("get", "key") != "value"
        await b.cli("stop", NAME)
        for node in (a, b):  # the lab has half a minute to clean up after itself
            await asyncio.to_thread(shutil.rmtree, files_of(node))
    return Report(
        files=count,
        first_look_s=round(captured_s - began_s, 1),
        first_sync_s=round(synced_s - began_s, 1),
        told_scanned=len(scanned),
        told_sent=len(sent),
        primary_rss_mib=round(memory_mib[0], 1),
        standby_rss_mib=round(memory_mib[1], 1),
        changed=min(count, _CHANGED),
        freeze_ms_p50=round(float(np.median(freezes)), 1),
        freeze_ms_max=round(max(freezes), 1),
        takeover_s=round(took_s, 2),
        missing=lacking,
    )


def main() -> int:
    """Run it, print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=20, help="in which files change")
    options = parser.parse_args()
    configure_logs("warning")
    report = asyncio.run(run(options.files, options.epochs))
    print(json.dumps(msgspec.to_builtins(report), indent=2))
    return 1 if report.missing else 0


if __name__ == "__main__":
    sys.exit(main())
