"""How long a client waits when a host is lost, and where that time goes: a redis fails over again and again.

    python -m bench.failover [--runs 20] [--sizes 64,256,1024] [--interval-ms 200] [--suspect-after-ms 300]
                             [--right fence|etcd] [--ttl-s 2] [--output json|table]

For each size a pair protects a redis filled with so much. Then, in turns, the host that leads loses its
power, the other one takes over by itself (the lab's power switch confirms; with `--right etcd` nobody is
fenced, and the lost host's lease runs out), and the lost one comes back and is protected against again, all
of it unattended. Several clients that write and reconnect look on, a few ms
apart from each other, so that what one of them waits for a time-out does not count. Prints one JSON object;
`docs/reference/benchmarks.md` defines its fields. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench.interrupt import run_to_end
from bench.redis_load import PORT
from bench.summary import Summary, summarize
from common.control import TermHistory, WorkloadStatus
from common.errors import LabError
from common.model import HealthCheck, WorkloadSpec
from outlive.cli.running import configure_logs
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Host, Lab
from outlive.lab_etcd import LabEtcd
from outlive.probe import read_log

SCHEMA_VERSION = 1
_NAME = "redis"
_CLIENTS = 10
_RATE = 50
_STAGGER_S = 0.022
_BEFORE_S, _AFTER_S = 0.5, 1.0
_PARTS: dict[str, tuple[str, str]] = {
    "detection_ms": ("last heard", "suspected"),
    "fencing_ms": ("suspected", "right acquired"),
    "recording_ms": ("right acquired", "term recorded"),
    "address_ms": ("term recorded", "ordered"),
    "restore_ms": ("ordered", "running"),
    "health_ms": ("running", "healthy"),
    "opening_ms": ("healthy", "leading"),
}
"""Each part of a takeover, and between which events of the new term's timeline it lies."""


class Failovers(msgspec.Struct, frozen=True, kw_only=True):
    """The failovers of one size."""

    rss_mib: int
    runs: int
    outage_ms: Summary
    outages_ms: tuple[float, ...]
    parts_ms: dict[str, Summary]
    protected_again_s: Summary


class FailoverReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    kernel: str
    cpus: int
    right_to_lead: str
    ttl_s: int | None
    backend: str
    interval_ms: int
    suspect_after_ms: int
    sizes: tuple[Failovers, ...]


class _Scene:
    """One pair with its clients."""

    def __init__(self, lab: Lab, nodes: dict[str, Node], client: Host) -> None:
        self.lab = lab
        self.nodes = nodes
        self.client = client
        self.address = str(lab.vip().ip)

    def probe(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "outlive.probe", self.address, str(PORT), *words]

    @contextlib.asynccontextmanager
    async def clients(self, run: int) -> AsyncIterator[list[Path]]:
        """Have clients write, each from another moment on."""
        logs = [self.client.dir / f"run-{run}-{number}.log" for number in range(_CLIENTS)]
        running = []
        try:
            for log in logs:
                words = self.probe("write", "--rate", str(_RATE), "--log", str(log))
                running.append(await self.client.spawn(words, log=self.client.log_dir / "probe.log"))
                await asyncio.sleep(_STAGGER_S)

            async def all_write() -> bool:
                return all(log.exists() and log.stat().st_size for log in logs)

            await eventually(all_write, what="all clients write")
            yield logs
        finally:
            for process in running:
                process.terminate()
            await asyncio.gather(*(process.wait() for process in running))


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in the whole run."""

    right_to_lead: Literal["fence", "etcd"]
    ttl_s: int
    interval_ms: int
    suspect_after_ms: int


async def measure(runs: int, sizes: tuple[int, ...], choice: Choice) -> FailoverReport:
    """Measure each size on a pair of its own. Raises LabError if a failover does not come about."""
    measured = [await _measure_size(runs, size, choice) for size in sizes]
    return FailoverReport(
        schema_version=SCHEMA_VERSION,
        benchmark="failover",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        right_to_lead=choice.right_to_lead,
        ttl_s=choice.ttl_s if choice.right_to_lead == "etcd" else None,
        backend=measured[0][1],
        interval_ms=choice.interval_ms,
        suspect_after_ms=choice.suspect_after_ms,
        sizes=tuple(each for each, _ in measured),
    )


async def _measure_size(runs: int, rss_mib: int, choice: Choice) -> tuple[Failovers, str]:
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=_NAME,
            nodes=("a", "b"),
            command=("redis-server", "--port", str(PORT), "--protected-mode", "no", "--save", ""),
            vip=str(lab.vip()),
            health=HealthCheck(tcp=PORT),
            right_to_lead=choice.right_to_lead,
            epoch_interval_ms=choice.interval_ms,
        )
        settings: dict[str, dict[str, Any]] = {"heartbeat": {"suspect_after_ms": choice.suspect_after_ms}}
        if leased := choice.right_to_lead == "etcd":
            etcd = await LabEtcd.start(lab)
            settings["etcd"] = {"endpoints": list(etcd.endpoints), "ttl_s": choice.ttl_s}
        nodes = await build_cluster(lab, spec.nodes, workloads=[spec], settings=settings, fenced=not leased)
        scene = _Scene(lab, nodes, await lab.add_host("client"))
        await start_all(nodes)
        await nodes["a"].cli("start", _NAME)
        await _wait_protected(nodes["a"], nodes["b"])
        await scene.client.run(scene.probe("fill", "--bytes", str(rss_mib << 20)), timeout_s=600.0)
        leader, heir = "a", "b"
        outages: list[float] = []
        again_s: list[float] = []
        terms: list[TermHistory] = []
        for run in range(1, runs + 1):
            await _wait_protected(nodes[leader], nodes[heir])
            outage_ms, term = await _fail_over(scene, run, leader, heir)
            outages.append(round(outage_ms, 1))
            terms.append(term)
            _tell(f"{rss_mib} MiB: run {run} of {runs}, {outage_ms:.0f} ms")
            begun_s = time.monotonic()
            await lab.power_on(leader)
            await nodes[leader].start()
            leader, heir = heir, leader
            await _wait_protected(nodes[leader], nodes[heir])
            again_s.append(time.monotonic() - begun_s)
        backend = (await nodes[leader].metrics()).workloads[0].backend
        parts = {name: [_between(term, *ends) for term in terms] for name, ends in _PARTS.items()}
        return (
            Failovers(
                rss_mib=rss_mib,
                runs=runs,
                outage_ms=summarize(outages),
                outages_ms=tuple(outages),
                parts_ms={name: summarize([v for v in values if v >= 0]) for name, values in parts.items()},
                protected_again_s=summarize(again_s),
            ),
            backend,
        )


async def _fail_over(scene: _Scene, run: int, leader: str, heir: str) -> tuple[float, TermHistory]:
    """Cut the leader's power under load; return the outage in ms, and the new term's story."""
    async with scene.clients(run) as logs:
        await asyncio.sleep(_BEFORE_S)
        cut_wall_s = time.time()
        await scene.lab.power_off(leader)
        await scene.nodes[heir].wait_for(_NAME, _leads, what="taken over")
        await asyncio.sleep(_AFTER_S)
    acknowledged = sorted(write.wall_s for log in logs for write in read_log(log))
    around = [wall_s for wall_s in acknowledged if wall_s > cut_wall_s - _BEFORE_S]
    outage_ms = max(((late - early) * 1000 for early, late in pairwise(around)), default=float("inf"))
    status = await scene.nodes[heir].workload(_NAME)
    term = (await scene.nodes[heir].history(_NAME)).terms[-1]
    if status is None or term.restored is None or outage_ms == float("inf"):
        raise LabError(f"run {run}: {heir} did not take over, or no client came back")
    return outage_ms, term


def _leads(status: WorkloadStatus) -> bool:
    return status.state == "leading" and status.running


async def _wait_protected(leader: Node, heir: Node) -> None:
    """Wait until the heir could restore what was in memory when this was called."""
    called_wall_s = time.time()

    def is_protected(status: WorkloadStatus) -> bool:
        risk_s = status.data_at_risk_s
        return (
            _leads(status)
            and status.restorable
            and risk_s is not None
            and time.time() - risk_s > called_wall_s
        )

    await leader.wait_for(_NAME, is_protected, what="protected", timeout_s=180.0)
    await heir.wait_for(_NAME, lambda w: w.role == "replica" and w.restorable, what="restorable")


def _between(term: TermHistory, first: str, last: str) -> float:
    """Return the ms between two events of the timeline; -1 if one of them is not there."""
    at = {step.event: step.at_ms for step in reversed(term.timeline)}
    return at[last] - at[first] if first in at and last in at else -1.0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--sizes", default="64,256,1024", help="MiB of random values, one after the other")
    parser.add_argument("--interval-ms", type=int, default=200)
    parser.add_argument("--suspect-after-ms", type=int, default=300)
    parser.add_argument("--right", choices=("fence", "etcd"), default="fence", help="to lead")
    parser.add_argument("--ttl-s", type=int, default=2, help="of leases")
    parser.add_argument("--output", choices=("json", "table"), default="table")
    options = parser.parse_args()
    configure_logs("warning")
    sizes = tuple(int(size) for size in options.sizes.split(","))
    choice = Choice(
        right_to_lead=options.right,
        ttl_s=options.ttl_s,
        interval_ms=options.interval_ms,
        suspect_after_ms=options.suspect_after_ms,
    )
    report = run_to_end(measure(options.runs, sizes, choice))
    if options.output == "json":
        print(msgspec.json.encode(report).decode())
        return
    print("  RSS    runs    outage p50 (max)    " + "    ".join(name.removesuffix("_ms") for name in _PARTS))
    for each in report.sizes:
        outage = f"{each.outage_ms.p50:.0f} ({each.outage_ms.max:.0f}) ms"
        parts = "    ".join(f"{each.parts_ms[name].p50:.0f} ms" for name in _PARTS)
        print(f"{each.rss_mib:5d}    {each.runs:4d}    {outage:>16}    {parts}")


if __name__ == "__main__":
    main()
