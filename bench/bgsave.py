"""How long a large redis stands still while it saves: BGSAVE forks it, and epochs go on.

    python -m bench.bgsave [--fill-mib 1024] [--saves 3] [--interval-ms 200] [--rate 1000]
                           [--seconds 15] [--output json|table]

A fork of a large process just before a freeze is what a capture could pay most for: all that the child has is
new to it. A client asks at a steady rate meanwhile; what it waits for longest is told beside the freezes,
with and without protection, because the fork itself stops redis as well. Prints one JSON object;
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
from pathlib import Path

import msgspec
import numpy as np

from bench.compiled import compile_program
from bench.interrupt import run_to_end
from bench.redis_load import PORT, RedisLoad
from bench.rounds import WORKLOAD, Switched, Window, switched
from bench.summary import Summary, summarize
from common.errors import LabError
from common.model import HealthCheck, WorkloadSpec
from common.threads import in_thread
from outlive.cli.running import configure_logs
from outlive.cluster import eventually
from outlive.lab import Host, Lab

SCHEMA_VERSION = 1
_BEFORE_S = 1.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How it is measured."""

    fill_mib: int = 1024
    saves: int = 3
    interval_ms: int = 200
    rate: float = 1000.0
    seconds: float = 15.0


class Saves(msgspec.Struct, frozen=True, kw_only=True):
    """The saves of one kind, protected or not."""

    save_s: Summary
    client_p99_ms: Summary
    client_max_ms: Summary
    epochs: int
    frozen_ms: Summary
    abandoned_ms: Summary


class BgsaveReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    backend: str
    kernel: str
    cpus: int
    options: Options
    unprotected: Saves
    protected: Saves


async def measure(options: Options) -> BgsaveReport:
    """Fill a redis, and have it save, unprotected and protected in turns."""
    # Not on a /tmp that is a tmpfs: a container sees the machine's root and no other mounts.
    directory = Path(tempfile.mkdtemp(prefix="outlive-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    saves = directory / "saves"
    saves.mkdir()
    spec = WorkloadSpec(
        name=WORKLOAD,
        nodes=("a", "b"),
        command=(
            *("redis-server", "--port", str(PORT), "--protected-mode", "no", "--save", ""),
            *("--dir", str(saves), "--rdbcompression", "no"),
        ),
        health=HealthCheck(tcp=PORT),
        epoch_interval_ms=options.interval_ms,
    )
    taken: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    windows: dict[bool, list[Window]] = {False: [], True: []}
    try:
        async with Lab() as lab:
            spec = msgspec.structs.replace(spec, vip=str(lab.vip()))
            address = str(lab.vip().ip)
            async with switched(spec, lab) as redis:
                client = await lab.add_host("client")
                load = RedisLoad(
                    client,
                    await in_thread(compile_program, "load", directory),
                    address,
                    connections=4,
                    keys=10_000,
                    value_bytes=100,
                    write_percent=10,
                    tick_us=1,
                )
                await _fill(client, redis, address, options.fill_mib)
                await load.write_all()
                for number in range(1, options.saves + 1):
                    for protected in (False, True):
                        await redis.protect(protected)
                        _tell(f"save {number} of {options.saves}, {'' if protected else 'un'}protected")
                        async with redis.watched(windows[protected], protected=protected):
                            taken[protected].append(await _save(client, load, address, options))
                backend = (await redis.metrics()).backend
    finally:
        shutil.rmtree(directory)
    return BgsaveReport(
        schema_version=SCHEMA_VERSION,
        benchmark="bgsave",
        backend=backend,
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        options=options,
        unprotected=_saves(taken[False], windows[False]),
        protected=_saves(taken[True], windows[True]),
    )


async def _fill(client: Host, redis: Switched, address: str, mib: int) -> None:
    probe = [sys.executable, "-m", "outlive.probe", address, str(PORT)]

    async def serves() -> bool:
        return (await client.run([*probe, "present", "--newest", "1"], check=False)).returncode == 0

    await eventually(serves, what="redis serves")
    await redis.protect(False)
    _tell(f"redis: filling {mib} MiB")
    await client.run([*probe, "fill", "--bytes", str(mib << 20)], timeout_s=600.0)


async def _save(client: Host, load: RedisLoad, address: str, options: Options) -> tuple[float, float, float]:
    """Save once under load; return the seconds it took, and the client's p99 and longest wait in ms."""
    redis = ("redis-cli", "-h", address, "-p", str(PORT))
    loading = asyncio.create_task(load.run(options.seconds, options.rate))
    await asyncio.sleep(_BEFORE_S)
    begun_s = time.monotonic()
    await client.run([*redis, "bgsave"])

    async def is_saved() -> bool:
        told = await client.run([*redis, "info", "persistence"])
        return "rdb_bgsave_in_progress:0" in told.stdout

    await eventually(is_saved, what="redis has saved", timeout_s=options.seconds)
    took_s = time.monotonic() - begun_s
    _, latencies_us = await loading
    if took_s + _BEFORE_S > options.seconds:
        raise LabError(f"redis took {took_s:.1f} s to save", hint="give it more with --seconds")
    p99, most = np.percentile(latencies_us, [99, 100]) / 1000
    return took_s, float(p99), float(most)


def _saves(taken: list[tuple[float, float, float]], windows: list[Window]) -> Saves:
    seconds, p99, most = zip(*taken, strict=True)
    return Saves(
        save_s=summarize(seconds),
        client_p99_ms=summarize(p99),
        client_max_ms=summarize(most),
        epochs=sum(window.epochs for window in windows),
        frozen_ms=summarize([value for window in windows for value in window.freeze_ms]),
        abandoned_ms=summarize([value for window in windows for value in window.abandoned_ms]),
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
        return
    print("one BGSAVE          took    client p99    client max    frozen p50    frozen max    abandoned max")
    for name, each in (("unprotected", report.unprotected), ("protected", report.protected)):
        print(
            f"{name:15} {each.save_s.p50:>8.1f} s {each.client_p99_ms.p50:>10.2f} ms "
            f"{each.client_max_ms.max:>10.2f} ms "
            f"{each.frozen_ms.p50:>10.1f} ms {each.frozen_ms.max:>10.1f} ms "
            f"{each.abandoned_ms.max:>13.1f} ms"
        )


if __name__ == "__main__":
    main()
