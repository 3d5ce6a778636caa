"""What an epoch costs: redis in the lab, streamed to a standby, idle and under writes, at several sizes.

    python -m bench.epoch [--rss-mib 64 --rss-mib 512] [--epochs 20] [--output json|table]

Each size is measured twice: *idle* (nobody talks to redis) and *busy* (200 writes of small values a
second). Prints one JSON object; `docs/reference/benchmarks.md` defines its fields. Times are medians and
spreads of one run on this machine; compare ratios, not milliseconds, between machines.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from typing import Literal

import msgspec

from bench.summary import Summary, summarize
from common.control import AgentMetrics, WorkloadMetrics
from common.errors import LabError
from common.model import HealthCheck, WorkloadSpec
from outlive.cli.running import configure_logs
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Lab

SCHEMA_VERSION = 1
_WORKLOAD = "bench"
_PORT = 6379
_SETTLE_EPOCHS = 3
"""Epochs that are not counted after the base and after a change of load."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One size under one load."""

    rss_mib: int
    load: Literal["idle", "busy"]
    memory_bytes: int
    epochs: int
    frozen_ms: Summary
    epoch_ms: Summary
    commit_ms: Summary
    interval_ms: Summary
    bytes_per_epoch: float
    full_bytes_per_epoch: float
    bytes_ratio: float
    agent_cpu_s_per_epoch: float
    agent_cpu_share: float
    agent_rss_bytes: int
    keeper_rss_bytes: int
    replica_agent_rss_bytes: int


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    backend: str
    kernel: str
    cpus: int
    interval_ms: int
    measured: tuple[Measured, ...]


async def measure(sizes_mib: list[int], epochs: int, interval_ms: int) -> BenchReport:
    """Run all sizes one after the other, each in a lab of its own."""
    measured: list[Measured] = []
    for size_mib in sizes_mib:
        measured += await _measure_size(size_mib, epochs, interval_ms)
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        benchmark="epoch",
        backend="stock",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        interval_ms=interval_ms,
        measured=tuple(measured),
    )


async def _measure_size(size_mib: int, epochs: int, interval_ms: int) -> list[Measured]:
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=_WORKLOAD,
            nodes=("a", "b"),
            command=("redis-server", "--port", str(_PORT), "--protected-mode", "no", "--save", ""),
            vip=str(lab.vip()),
            health=HealthCheck(tcp=_PORT),
            epoch_interval_ms=interval_ms,
        )
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec])
        client = await lab.add_host("client")
        await start_all(nodes)
        first, second = nodes["a"], nodes["b"]
        await first.cli("start", _WORKLOAD)
        probe = [sys.executable, "-m", "outlive.probe", str(lab.vip().ip), str(_PORT)]

        async def serves() -> bool:
            return (await client.run([*probe, "present", "--newest", "1"], check=False)).returncode == 0

        await eventually(serves, what="redis serves")
        await client.run([*probe, "fill", "--bytes", str(size_mib << 20)], timeout_s=300.0)
        await second.wait_for(_WORKLOAD, lambda w: w.restorable, what="restorable", timeout_s=120.0)
        idle = await _measure_load(first, second, size_mib, "idle", epochs)
        log = client.log_dir / "probe.jsonl"
        writer = await client.spawn(
            [*probe, "write", "--rate", "200", "--log", str(log)], log=client.log_dir / "probe.log"
        )
        busy = await _measure_load(first, second, size_mib, "busy", epochs)
        writer.kill()
        await writer.wait()
        return [idle, busy]


async def _measure_load(
    first: Node, second: Node, size_mib: int, load: Literal["idle", "busy"], epochs: int
) -> Measured:
    begun = _workload(await _wait_for_epochs(first, _SETTLE_EPOCHS))
    before = await first.metrics()
    before_s = time.monotonic()
    after = await _wait_for_epochs(first, epochs)
    seconds = time.monotonic() - before_s
    old, new = _workload(before), _workload(after)
    count = new.epochs_acknowledged - old.epochs_acknowledged
    if begun.backend != new.backend or count < 1:
        raise LabError("the agent was restarted while it was measured")
    sent, full = new.bytes_sent - old.bytes_sent, new.bytes_full - old.bytes_full
    cpu_s = after.cpu_s - before.cpu_s
    return Measured(
        rss_mib=size_mib,
        load=load,
        memory_bytes=new.memory_bytes,
        epochs=count,
        frozen_ms=summarize(new.freeze_ms[-count:]),
        epoch_ms=summarize(new.epoch_ms[-count:]),
        commit_ms=summarize(new.commit_ms[-count:]),
        interval_ms=summarize(new.interval_ms[-count:]),
        bytes_per_epoch=sent / count,
        full_bytes_per_epoch=full / count,
        bytes_ratio=sent / full,
        agent_cpu_s_per_epoch=cpu_s / count,
        agent_cpu_share=cpu_s / seconds,
        agent_rss_bytes=after.rss_bytes,
        keeper_rss_bytes=_rss_bytes(first.processes["keeper"].pid),
        replica_agent_rss_bytes=(await second.metrics()).rss_bytes,
    )


async def _wait_for_epochs(node: Node, more: int) -> AgentMetrics:
    """Wait for that many more acknowledged epochs; return the metrics then."""
    start = _workload(await node.metrics()).epochs_acknowledged
    deadline_s = time.monotonic() + 60 + 10 * more
    while time.monotonic() < deadline_s:
        metrics = await node.metrics()
        if _workload(metrics).epochs_acknowledged >= start + more:
            return metrics
        await asyncio.sleep(0.05)
    raise LabError(f"not {more} epochs in time: {await node.workload(_WORKLOAD)}")


def _workload(metrics: AgentMetrics) -> WorkloadMetrics:
    return next(each for each in metrics.workloads if each.name == _WORKLOAD)


def _rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _print_table(report: BenchReport) -> None:
    print("     RSS load   frozen p50  epoch p50  commit p50   of full  CPU/epoch")
    for each in report.measured:
        print(
            f"{each.rss_mib:>4} MiB {each.load:5} {each.frozen_ms.p50:>8.1f} ms {each.epoch_ms.p50:>7.1f} ms "
            f"{each.commit_ms.p50:>8.1f} ms {each.bytes_ratio:>8.2%} {each.agent_cpu_s_per_epoch:>8.3f} s"
        )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rss-mib", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--interval-ms", type=int, default=1000)
    parser.add_argument("--output", choices=("json", "table"), default="table")
    options = parser.parse_args()
    configure_logs("warning")
    report = asyncio.run(measure(options.rss_mib or [64, 512], options.epochs, options.interval_ms))
    if options.output == "json":
        print(msgspec.json.encode(report).decode())
    else:
        _print_table(report)


if __name__ == "__main__":
    main()
