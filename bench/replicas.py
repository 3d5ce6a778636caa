"""What a slow replica costs the others: a fast one alone, and beside one on a line of 1 MiB/s.

    python -m bench.replicas [--mib 128] [--dirty-mib-per-s 50] [--slow-mib-per-s 1] [--rounds 2]
                             [--epochs 15] [--interval-ms 1000] [--output json|table]

A process keeps `--mib` of memory that does not compress and rewrites `--dirty-mib-per-s` of it. Rounds
alternate: only the fast replica `b`; then the slow one `c` as well, which never gets a whole epoch through.
Prints one JSON object; `docs/reference/benchmarks.md` defines its fields.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec

from bench.summary import Summary, summarize
from common.control import AgentMetrics, StreamMetrics
from common.errors import LabError
from common.model import WorkloadSpec
from outlive.cli.running import configure_logs
from outlive.cluster import Node, build_cluster
from outlive.lab import Lab

SCHEMA_VERSION = 1
_WORKLOAD = "bench"
_SAMPLE_S = 0.05

_DIRTIER = """
import os, sys, time
mib, rate = int(sys.argv[1]), float(sys.argv[2])
memory, piece, at = bytearray(os.urandom(1 << 20) * mib), 1 << 20, 0
for start in range(0, len(memory), piece):
    memory[start : start + piece] = os.urandom(piece)
started, written = time.monotonic(), 0
while True:
    memory[at : at + piece] = os.urandom(piece)
    at, written = (at + piece) % len(memory), written + 1
    time.sleep(max(0.0, started + written / rate - time.monotonic()))
"""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """The fast replica, alone or beside the slow one; all rounds together."""

    beside: Literal["nobody", "a slow one"]
    commit_ms: Summary
    interval_ms: Summary
    agent_rss_max_bytes: int
    images_max_bytes: int
    slow_sent_mib_per_s: float
    slow_epochs: int


class ReplicasReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    backend: str
    kernel: str
    cpus: int
    memory_mib: int
    dirty_mib_per_s: float
    slow_mib_per_s: float
    rounds: int
    interval_ms: int
    alone: Phase
    beside: Phase
    commit_ratio: float
    """Median beside the slow one, of the median alone."""


class _Peak:
    """Samples how much memory the primary holds: its agent's own, and the images on its tmpfs."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.agent_bytes = 0
        self.images_bytes = 0

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sample(self) -> None:
        pid = self._node.processes["agent"].pid
        while True:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.agent_bytes = max(self.agent_bytes, pages * os.sysconf("SC_PAGE_SIZE"))
            self.images_bytes = max(self.images_bytes, _size_bytes(Path(self._node.config.node.image_dir)))
            await asyncio.sleep(_SAMPLE_S)


async def measure(
    *, mib: int, dirty_mib_per_s: float, slow_mib_per_s: float, rounds: int, epochs: int, interval_ms: int
) -> ReplicasReport:
    """Build the lab, run the rounds, sum them up."""
    async with Lab() as lab:
        program = [sys.executable, "-S", "-c", _DIRTIER, str(mib), str(dirty_mib_per_s)]
        spec = WorkloadSpec(
            name=_WORKLOAD, nodes=("a", "b", "c"), command=tuple(program), epoch_interval_ms=interval_ms
        )
        nodes = await build_cluster(lab, spec.nodes, workloads=[spec])
        first = nodes["a"] = _with_slow_peer(nodes["a"], "c", slow_mib_per_s)
        for name in ("a", "b"):
            await nodes[name].start("keeper", "agent")
        await nodes["c"].start("keeper")
        await first.cli("start", _WORKLOAD)
        await nodes["b"].wait_for(_WORKLOAD, lambda w: w.restorable, what="restorable", timeout_s=120.0)
        series: dict[str, list[_Round]] = {"alone": [], "beside": []}
        for _ in range(rounds):
            series["alone"].append(await _round(first, epochs))
            await nodes["c"].start("agent")
            await _wait_for_bytes(first, "c")
            series["beside"].append(await _round(first, epochs))
            await nodes["c"].stop("agent")
        alone, beside = _phase("nobody", series["alone"]), _phase("a slow one", series["beside"])
        return ReplicasReport(
            schema_version=SCHEMA_VERSION,
            benchmark="replicas",
            backend="stock",
            kernel=platform.release(),
            cpus=os.cpu_count() or 0,
            memory_mib=mib,
            dirty_mib_per_s=dirty_mib_per_s,
            slow_mib_per_s=slow_mib_per_s,
            rounds=rounds,
            interval_ms=interval_ms,
            alone=alone,
            beside=beside,
            commit_ratio=round(beside.commit_ms.p50 / alone.commit_ms.p50, 3),
        )


class _Round(msgspec.Struct, frozen=True, kw_only=True):
    commit_ms: tuple[float, ...]
    interval_ms: tuple[float, ...]
    agent_bytes: int
    images_bytes: int
    slow_bytes: int
    slow_epochs: int
    seconds: float


async def _round(first: Node, epochs: int) -> _Round:
    """Let the fast replica have so many epochs."""
    await _wait_for_epochs(first, "b", 3)
    peak = _Peak(first)
    before, begun_s = await first.metrics(), time.monotonic()
    async with peak.sampling():
        after = await _wait_for_epochs(first, "b", epochs)
    old, new = _stream(before, "b"), _stream(after, "b")
    count = new.epochs_acknowledged - old.epochs_acknowledged
    slow_old, slow_new = _stream(before, "c"), _stream(after, "c")
    return _Round(
        commit_ms=new.commit_ms[-count:],
        interval_ms=after.workloads[0].interval_ms[-count:],
        agent_bytes=peak.agent_bytes,
        images_bytes=peak.images_bytes,
        slow_bytes=slow_new.bytes_sent - slow_old.bytes_sent,
        slow_epochs=slow_new.epochs_acknowledged - slow_old.epochs_acknowledged,
        seconds=time.monotonic() - begun_s,
    )


def _phase(beside: Literal["nobody", "a slow one"], rounds: list[_Round]) -> Phase:
    return Phase(
        beside=beside,
        commit_ms=summarize([value for each in rounds for value in each.commit_ms]),
        interval_ms=summarize([value for each in rounds for value in each.interval_ms]),
        agent_rss_max_bytes=max(each.agent_bytes for each in rounds),
        images_max_bytes=max(each.images_bytes for each in rounds),
        slow_sent_mib_per_s=round(
            sum(each.slow_bytes for each in rounds) / sum(each.seconds for each in rounds) / (1 << 20), 3
        ),
        slow_epochs=sum(each.slow_epochs for each in rounds),
    )


def _with_slow_peer(node: Node, peer: str, mib_per_s: float) -> Node:
    """Bound what a node may send to one of its peers; it must not run yet."""
    text = node.config_path.read_text()
    block = f'[[peers]]\nname = "{peer}"\n'
    if block not in text:
        raise LabError(f"{node.config_path} has no block for {peer}")
    node.config_path.write_text(text.replace(block, f"{block}max_mib_per_s = {mib_per_s}\n"))
    return Node(node.host, node.config_path)


async def _wait_for_epochs(node: Node, replica: str, more: int) -> AgentMetrics:
    start = _stream(await node.metrics(), replica).epochs_acknowledged
    deadline_s = time.monotonic() + 60 + 10 * more
    while time.monotonic() < deadline_s:
        metrics = await node.metrics()
        if _stream(metrics, replica).epochs_acknowledged >= start + more:
            return metrics
        await asyncio.sleep(0.05)
    raise LabError(f"not {more} epochs on {replica} in time: {await node.workload(_WORKLOAD)}")


async def _wait_for_bytes(node: Node, replica: str) -> None:
    start = _stream(await node.metrics(), replica).bytes_sent
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if _stream(await node.metrics(), replica).bytes_sent > start:
            return
        await asyncio.sleep(0.05)
    raise LabError(f"nothing is sent to {replica}")


def _stream(metrics: AgentMetrics, replica: str) -> StreamMetrics:
    return next(each for each in metrics.workloads[0].streams if each.node == replica)


def _size_bytes(directory: Path) -> int:
    """Sum of the files' sizes below a directory that others change meanwhile."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def _print_table(report: ReplicasReport) -> None:
    print("beside       commit p50 (iqr)      interval p50   agent max   images max   slow one gets")
    for each in (report.alone, report.beside):
        print(
            f"{each.beside:10} {each.commit_ms.p50:>8.1f} ms ({each.commit_ms.iqr:.1f}) "
            f"{each.interval_ms.p50:>12.1f} ms {each.agent_rss_max_bytes >> 20:>8} MiB "
            f"{each.images_max_bytes >> 20:>8} MiB {each.slow_sent_mib_per_s:>8.2f} MiB/s"
        )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--dirty-mib-per-s", type=float, default=50)
    parser.add_argument("--slow-mib-per-s", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--interval-ms", type=int, default=1000)
    parser.add_argument("--output", choices=("json", "table"), default="table")
    options = vars(parser.parse_args())
    output = options.pop("output")
    configure_logs("warning")
    report = asyncio.run(measure(**options))
    if output == "json":
        print(msgspec.json.encode(report).decode())
    else:
        _print_table(report)


if __name__ == "__main__":
    main()
