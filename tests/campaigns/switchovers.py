"""A redis moves back and forth under a client that writes and reconnects: what is lost, how long it is away.

    python -m tests.campaigns.switchovers --rounds 20

Prints one JSON object: for each switchover the client's longest wait for an acknowledgement around it, and
how many acknowledged writes are not there at the end. Exits with 1 if one was lost, or a switchover failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import msgspec

from bench.summary import Summary, summarize
from outlive.cli.running import configure_logs
from outlive.cluster import eventually
from outlive.probe import Acknowledged, read_log
from tests.system.clusters import NAME, Protected, protected_redis

_RATE = 200
_AFTER_S = 1.0
"""How long the client goes on after each one before its outage is looked for."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the rounds came to."""

    schema_version: int
    rounds: int
    backend: str
    fill_mib: int
    interval_ms: int
    outage_ms: Summary
    """The client's longest wait between two acknowledgements, around each switchover."""
    outages_ms: tuple[float, ...]
    took_s: tuple[float, ...]
    """How long the verb said that it took, until the old node was a replica."""
    acknowledged: int
    lost: int


@asynccontextmanager
async def writing_client(cluster: Protected) -> AsyncIterator[Path]:
    """Have a client write, and log what is acknowledged, for the time of the context."""
    log = cluster.client.dir / "writes.log"
    process = await cluster.client.spawn(
        cluster.probe("write", "--rate", str(_RATE), "--log", str(log)),
        log=cluster.client.log_dir / "probe.log",
    )
    try:
        await eventually(lambda: _has_written(log), what="the client writes")
        yield log
    finally:
        process.terminate()
        await process.wait()


async def _has_written(log: Path) -> bool:
    return log.exists() and len(read_log(log)) > 0


async def lost_writes(cluster: Protected, log: Path) -> tuple[int, int]:
    """Return how many writes were acknowledged, and how many of them are not there."""
    acknowledged = {write.number for write in read_log(log)}
    there = await cluster.present(max(acknowledged))
    return len(acknowledged), len(acknowledged - there)


def outage_ms(writes: list[Acknowledged], since_wall_s: float) -> float:
    """Return the longest time without an acknowledgement since then, in ms."""
    late = [write.wall_s for write in writes if write.wall_s >= since_wall_s - _AFTER_S]
    return max(((after - before) * 1000 for before, after in pairwise(late)), default=float("inf"))


async def run_rounds(
    rounds: int, *, backend: str = "auto", fill_mib: int = 64, interval_ms: int = 200, talk: bool = False
) -> Report:
    """Move it `rounds` times. Raises LabError if one does not come about."""
    outages: list[float] = []
    took: list[float] = []
    async with protected_redis(
        ("a", "b"),
        settings={"capture": {"backend": backend}},
        epoch_interval_ms=interval_ms,
        fill_mib=fill_mib,
    ) as cluster:
        async with writing_client(cluster) as log:
            leader, replica = "a", "b"
            for number in range(1, rounds + 1):
                await cluster.wait_until_protected(leader, replica)
                await cluster.nodes[leader].wait_for(
                    NAME, lambda w: w.restorable, what="restorable elsewhere"
                )
                begun_wall_s = time.time()
                done = await cluster.nodes[leader].cli(
                    "switchover", NAME, "--to", replica, "--output", "json"
                )
                took.append(json.loads(done.stdout)["moved"][0]["took_s"])
                await asyncio.sleep(_AFTER_S)
                outages.append(round(outage_ms(read_log(log), begun_wall_s), 1))
                leader, replica = replica, leader
                if talk:
                    print(f"{number}/{rounds}: {outages[-1]:.0f} ms, on {leader}", file=sys.stderr)
        acknowledged, lost = await lost_writes(cluster, log)
    return Report(
        schema_version=1,
        rounds=rounds,
        backend=backend,
        fill_mib=fill_mib,
        interval_ms=interval_ms,
        outage_ms=summarize(outages),
        outages_ms=tuple(outages),
        took_s=tuple(took),
        acknowledged=acknowledged,
        lost=lost,
    )


def main() -> int:
    """Read the command line, run, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fill-mib", type=int, default=64)
    parser.add_argument("--interval-ms", type=int, default=200)
    parser.add_argument("--backend", choices=("stock", "auto"), default="auto")
    options = parser.parse_args()
    configure_logs("warning")
    report = asyncio.run(
        run_rounds(
            options.rounds,
            backend=options.backend,
            fill_mib=options.fill_mib,
            interval_ms=options.interval_ms,
            talk=True,
        )
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
