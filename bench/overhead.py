"""What being protected costs a workload: redis under load, and a process that writes memory all the time.

    python -m bench.overhead [--fill-mib 256] [--rounds 3] [--seconds 10] [--interval-ms 200]
                             [--connections 50] [--keys 100000] [--value-bytes 100] [--write-percent 50]
                             [--apart 1] [--tick-us 100] [--writer-mib 512] [--writer-pages-per-s 20000]
                             [--output json|table]

Rounds alternate: unprotected (the replica's agent is stopped, so no epoch is taken), then protected. redis
gets `--load-percent` (50) of what it can do unprotected, at a steady rate (*open loop*: latency counts from
when a request was due), then as much as it can take (*saturated*). All runs on one machine: the replica, the
load and the workload share its CPUs. With `--apart 1`, load and redis keep to a CPU each, in all rounds: as
if on machines of their own; with 0 they are where the kernel puts them. Prints one JSON object;
`docs/reference/benchmarks.md` defines its fields. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.compiled import compile_program
from bench.interrupt import run_to_end
from bench.redis_load import PORT, RedisLoad
from bench.rounds import NO_CPU, WORKLOAD, CpuParts, Switched, Window, switched
from bench.summary import Summary, summarize
from bench.target import Board, board_address
from common.errors import LabError
from common.model import HealthCheck, WorkloadSpec
from common.threads import in_thread
from outlive.cli.running import configure_logs
from outlive.cluster import eventually
from outlive.lab import Lab

SCHEMA_VERSION = 3
_ALLOWED_MS = 5.0
"""What p99 may grow by beyond the median freeze."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How it is measured."""

    fill_mib: int = 256
    rounds: int = 3
    seconds: float = 10.0
    interval_ms: int = 200
    load_percent: int = 50
    connections: int = 50
    keys: int = 100_000
    value_bytes: int = 100
    write_percent: int = 50
    apart: int = 1
    tick_us: int = 100
    writer_mib: int = 512
    writer_pages_per_s: int = 20_000


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of one kind of round."""

    answered_per_s: float
    kept: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpus_idle: float
    """Share of the processors' time."""


class OpenLoop(msgspec.Struct, frozen=True, kw_only=True):
    """A steady rate."""

    rate_per_s: float
    unprotected: Latency
    protected: Latency
    p99_added_ms: float
    p99_bound_ms: float
    within_bound: bool
    epochs: int
    epochs_per_s: float
    frozen_ms: Summary
    cpu_s_per_epoch: CpuParts


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """As much as it can."""

    unprotected_per_s: Summary
    protected_per_s: Summary
    ratio: float
    epochs: int
    epochs_per_s: float
    frozen_ms: Summary
    cpu_s_per_epoch: CpuParts


class OverheadReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    backend: str
    kernel: str
    cpus: int
    options: Options
    capacity_per_s: float
    open_loop: OpenLoop
    saturated: Throughput
    writer: Throughput


@dataclass(slots=True)
class _Rounds:
    """What the rounds of one kind, protected or not, have brought so far."""

    windows: list[Window] = field(default_factory=list)
    latencies_us: list[NDArray[np.uint32]] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        return sum(window.epochs for window in self.windows)

    @property
    def epochs_per_s(self) -> float:
        return round(self.epochs / sum(window.seconds for window in self.windows), 2)

    @property
    def frozen_ms(self) -> Summary:
        return summarize([value for window in self.windows for value in window.freeze_ms])

    @property
    def cpus_idle(self) -> float:
        """Share of the processors' time."""
        cpus_s = (os.cpu_count() or 1) * sum(window.seconds for window in self.windows)
        return round(sum(window.idle_s for window in self.windows) / cpus_s, 3)

    @property
    def cpu_s_per_epoch(self) -> CpuParts:
        total = NO_CPU
        for window in self.windows:
            total = total.plus(window.cpu)
        return total.each(self.epochs)


_Both = dict[bool, _Rounds]
"""By whether protected."""


async def measure(options: Options) -> OverheadReport:
    """Measure redis, then the writer, each in a lab of its own."""
    # Not on a /tmp that is a tmpfs: a container sees the machine's root and no other mounts.
    directory = Path(tempfile.mkdtemp(prefix="outlive-bench-", dir="/var/tmp"))
    try:
        directory.chmod(0o755)
        capacity_per_s, rate_per_s, opened, saturated = await _measure_redis(directory, options)
        writer, backend = await _measure_writer(directory, options)
    finally:
        shutil.rmtree(directory)
    return OverheadReport(
        schema_version=SCHEMA_VERSION,
        benchmark="overhead",
        backend=backend,
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        options=options,
        capacity_per_s=round(capacity_per_s, 1),
        open_loop=_open_loop(rate_per_s, opened),
        saturated=_throughput(saturated),
        writer=_throughput(writer),
    )


async def _measure_redis(directory: Path, options: Options) -> tuple[float, float, _Both, _Both]:
    program = await in_thread(compile_program, "load", directory)
    cpus = sorted(os.sched_getaffinity(0))
    load_on, redis_on = (["taskset", "-c", str(cpu)] if options.apart else [] for cpu in (cpus[0], cpus[-1]))
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=WORKLOAD,
            nodes=("a", "b"),
            command=(*redis_on, "redis-server", "--port", str(PORT), "--protected-mode", "no", "--save", ""),
            vip=str(lab.vip()),
            health=HealthCheck(tcp=PORT),
            epoch_interval_ms=options.interval_ms,
        )
        address = str(lab.vip().ip)
        async with switched(spec, lab) as redis:
            client = await lab.add_host("client")
            load = RedisLoad(
                client,
                program,
                address,
                connections=options.connections,
                keys=options.keys,
                value_bytes=options.value_bytes,
                write_percent=options.write_percent,
                tick_us=options.tick_us,
                before=load_on,
            )
            probe = [sys.executable, "-m", "outlive.probe", address, str(PORT)]

            async def serves() -> bool:
                return (await client.run([*probe, "present", "--newest", "1"], check=False)).returncode == 0

            await eventually(serves, what="redis serves")
            await redis.protect(False)
            if options.fill_mib:
                await client.run([*probe, "fill", "--bytes", str(options.fill_mib << 20)], timeout_s=300.0)
            await load.write_all()
            capacity_per_s, _ = await load.run(options.seconds)
            rate_per_s = round(capacity_per_s * options.load_percent / 100, 1)
            _tell(f"redis: {capacity_per_s:.0f} requests a second at most")
            opened: _Both = {False: _Rounds(), True: _Rounds()}
            saturated: _Both = {False: _Rounds(), True: _Rounds()}
            async for protected in _alternating(redis, options.rounds, "redis"):
                for rounds, rate in ((opened[protected], rate_per_s), (saturated[protected], 0.0)):
                    async with redis.watched(rounds.windows, protected=protected):
                        per_s, latencies = await load.run(options.seconds, rate)
                    rounds.per_s.append(per_s)
                    rounds.latencies_us.append(latencies)
            return capacity_per_s, rate_per_s, opened, saturated


async def _measure_writer(directory: Path, options: Options) -> tuple[_Both, str]:
    program = await in_thread(compile_program, "freeze_target", directory)
    words = ("-m", options.writer_mib, "-r", options.writer_pages_per_s)
    spec = WorkloadSpec(
        name=WORKLOAD,
        nodes=("a", "b"),
        command=(str(program), *map(str, words)),
        epoch_interval_ms=options.interval_ms,
    )
    both: _Both = {False: _Rounds(), True: _Rounds()}
    async with Lab() as lab, switched(spec, lab) as writer:
        board = Board(writer.pid, await board_address(writer.first.config, WORKLOAD))
        try:
            async for protected in _alternating(writer, options.rounds, "writer"):
                rounds = both[protected]
                async with writer.watched(rounds.windows, protected=protected):
                    before, begun_s = board.progress, time.monotonic()
                    await asyncio.sleep(options.seconds)
                    written, seconds = board.progress - before, time.monotonic() - begun_s
                if not written:
                    raise LabError("the writer does not get on")
                rounds.per_s.append(written / seconds)
        finally:
            board.close()
        return both, (await writer.metrics()).backend


async def _alternating(workload: Switched, rounds: int, what: str) -> AsyncIterator[bool]:
    """Switch the protection for each round, and say whether it is protected."""
    for number in range(1, rounds + 1):
        for protected in (False, True):
            await workload.protect(protected)
            _tell(f"{what}: round {number} of {rounds}, {'protected' if protected else 'unprotected'}")
            yield protected


def _open_loop(rate_per_s: float, both: _Both) -> OpenLoop:
    unprotected, protected = (_latency(rate_per_s, both[key]) for key in (False, True))
    frozen_ms = both[True].frozen_ms
    bound_ms = unprotected.p99_ms + frozen_ms.p50 + _ALLOWED_MS
    return OpenLoop(
        rate_per_s=rate_per_s,
        unprotected=unprotected,
        protected=protected,
        p99_added_ms=round(protected.p99_ms - unprotected.p99_ms, 3),
        p99_bound_ms=round(bound_ms, 3),
        within_bound=protected.p99_ms <= bound_ms,
        epochs=both[True].epochs,
        epochs_per_s=both[True].epochs_per_s,
        frozen_ms=frozen_ms,
        cpu_s_per_epoch=both[True].cpu_s_per_epoch,
    )


def _latency(rate_per_s: float, rounds: _Rounds) -> Latency:
    p50, p99, most = np.percentile(np.concatenate(rounds.latencies_us), [50, 99, 100]) / 1000
    answered_per_s = sum(rounds.per_s) / len(rounds.per_s)
    return Latency(
        answered_per_s=round(answered_per_s, 1),
        kept=round(answered_per_s / rate_per_s, 4),
        p50_ms=round(float(p50), 3),
        p99_ms=round(float(p99), 3),
        max_ms=round(float(most), 3),
        cpus_idle=rounds.cpus_idle,
    )


def _throughput(both: _Both) -> Throughput:
    unprotected, protected = summarize(both[False].per_s), summarize(both[True].per_s)
    return Throughput(
        unprotected_per_s=unprotected,
        protected_per_s=protected,
        ratio=round(protected.p50 / unprotected.p50, 4),
        epochs=both[True].epochs,
        epochs_per_s=both[True].epochs_per_s,
        frozen_ms=both[True].frozen_ms,
        cpu_s_per_epoch=both[True].cpu_s_per_epoch,
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_table(report: OverheadReport) -> None:
    opened = report.open_loop
    print(f"open loop, {opened.rate_per_s:.0f} a second     kept        p50        p99")
    for name, each in (("unprotected", opened.unprotected), ("protected", opened.protected)):
        print(f"{name:30} {each.kept:>7.1%} {each.p50_ms:>7.2f} ms {each.p99_ms:>7.2f} ms")
    bound = "within" if opened.within_bound else "beyond"
    print(
        f"frozen p50 {opened.frozen_ms.p50:.1f} ms; p99 is {bound} the bound of {opened.p99_bound_ms:.2f} ms"
    )
    print("as much as it can   unprotected    protected    ratio   frozen p50   CPU/epoch: agent, criu")
    for name, told in (("redis", report.saturated), ("writer", report.writer)):
        cpu = told.cpu_s_per_epoch
        print(
            f"{name:15} {told.unprotected_per_s.p50:>13.0f}/s {told.protected_per_s.p50:>10.0f}/s "
            f"{told.ratio:>8.3f} {told.frozen_ms.p50:>9.1f} ms {cpu.agent:>14.4f}, {cpu.criu:.4f} s"
        )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in msgspec.structs.asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", choices=("json", "table"), default="table")
    given = vars(parser.parse_args())
    output = given.pop("output")
    configure_logs("warning")
    report = run_to_end(measure(Options(**given)))
    if output == "json":
        print(msgspec.json.encode(report).decode())
    else:
        _print_table(report)


if __name__ == "__main__":
    main()
