"""The demonstration: a real workload on host A, A's power goes, the workload lives on at B.

In: what to run and how long. Out: a `DemoReport`, and on a `Screen` how it goes. Everything is real: agents,
keepers, CRIU, runc, redis, sockets; only the hosts are network namespaces, and the power switch cuts the link
before it kills.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.control import AgentMetrics, TermHistory, WorkloadMetrics, WorkloadStatus
from common.errors import LabError
from common.model import EpochId, FilePath, HealthCheck, WorkloadSpec
from outlive import demo_witness
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.demo_report import (
    SCHEMA_VERSION,
    ByteSummary,
    DemoReport,
    EpochName,
    FreezeSummary,
    IntervalSummary,
    WriteSummary,
)
from outlive.demo_witness import Sighting
from outlive.lab import Host, Lab
from outlive.probe import Acknowledged, read_log
from replica.store_reader import EpochRecord, StoreReader

WORKLOAD = "demo"
REDIS_PORT = 6379
_DATA = "/data"
"""Where the workload has its files; replicated."""
SERVERS = {
    "redis": (
        *("redis-server", "--port", str(REDIS_PORT), "--protected-mode", "no", "--save", ""),
        *("--dir", _DATA, "--appendonly", "yes", "--appendfsync", "everysec"),
    ),
    "sqlite": (sys.executable, "-m", "outlive.demo_sqlite", str(REDIS_PORT), f"{_DATA}/demo.db"),
}
"""What can be asked whether it has lost anything."""
_WRITES_PER_S = 200.0
_SHOWN_CHARACTERS = 60
_GO_ON_S = 2.0
"""How long the client must be served by the new host before the demonstration ends."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to demonstrate. `command` empty: a server with a client, filled to `fill_mib`."""

    command: tuple[str, ...] = ()
    server: str = "redis"
    """One of `SERVERS`."""
    fill_mib: int = 256
    epochs: int = 20
    """Committed epochs before the power goes."""
    interval_ms: int = 1000
    keep: bool = False


class Screen(Protocol):
    """Where the demonstration says what it does."""

    def step(self, text: str) -> None:
        """Begin a step; the one before it is done."""
        ...

    def progress(self, text: str) -> None:
        """Say how the current step goes; replaces what was said before."""
        ...

    def note(self, text: str) -> None:
        """Say something that a person may want to use afterwards."""
        ...

    def report(self, report: DemoReport) -> None:
        """Show the end: timeline, figures, verdict."""
        ...


async def run_demo(options: DemoOptions, screen: Screen) -> DemoReport:
    """Run it. Raises LabError if it cannot be set up or the standby never takes over.

    Nothing is left behind unless `options.keep`, whatever happens.
    """
    lab = Lab()
    spec = WorkloadSpec(
        name=WORKLOAD,
        nodes=("a", "b"),
        command=options.command or SERVERS[options.server],
        working_directory=str(Path(__file__).parents[1]),
        files=() if options.command else (FilePath(path=_DATA),),
        vip=str(lab.vip()),
        health=None if options.command else HealthCheck(tcp=REDIS_PORT),
        right_to_lead="fence",
        epoch_interval_ms=options.interval_ms,
    )
    screen.step("Building the lab: hosts A and B, a client, a switch between them")
    async with lab:
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec])
        client = await lab.add_host("client")
        demo = _Demo(options, spec, lab, nodes["a"], nodes["b"], client, screen)
        report = await demo.run()
        if options.keep:
            lab.keep()
            program = Path(sys.executable).with_name("outlive")
            screen.note(f"The lab stays up. Look at it: {program} --config {nodes['b'].config_path} status")
            if not options.command:
                screen.note(f"Be the client:  nsenter --net={client.netns} redis-cli -h {lab.vip().ip}")
            screen.note(f"Remove it:      {program} lab down {lab.name}")
    return report


class _Demo:
    """One run; the methods follow each other in the order of the story."""

    def __init__(
        self,
        options: DemoOptions,
        spec: WorkloadSpec,
        lab: Lab,
        first: Node,
        second: Node,
        client: Host,
        screen: Screen,
    ) -> None:
        self._options = options
        self._spec = spec
        self._lab = lab
        self._first = first
        self._second = second
        self._client = client
        self._screen = screen
        self._address = str(lab.vip().ip)
        self._log = client.log_dir / "probe.jsonl"
        self._is_served = not options.command

    async def run(self) -> DemoReport:
        await self._start()
        probe = await self._client_begins() if self._is_served else None
        metrics = await self._stream()
        cut_wall_s = await self._power_goes()
        taken_over = await self._takeover()
        if probe is not None:
            await self._client_goes_on(cut_wall_s)
            probe.kill()
            await probe.wait()
        report = await self._judge(metrics, taken_over, cut_wall_s)
        self._screen.report(report)
        return report

    async def _start(self) -> None:
        self._screen.step("Starting a keeper and an agent on A and on B")
        await start_all({"a": self._first, "b": self._second})
        self._screen.step(f"Starting the workload on A: {_shown(self._spec.command)}")
        begun = await self._first.cli("start", WORKLOAD, check=False)
        status = await self._first.workload(WORKLOAD)
        if begun.returncode and (status is None or status.exit_code is None):
            reason = status.reason if status is not None else begun.stderr.strip()
            raise demo_witness.never_ran(self._first, WORKLOAD, reason)
        status = await self._first.wait_for(
            WORKLOAD,
            lambda w: (w.state == "leading" and w.running) or demo_witness.has_ended(w),
            what="running",
        )
        self._refuse_if_ended(status)

    def _refuse_if_ended(self, status: WorkloadStatus | None) -> None:
        if status is not None and demo_witness.has_ended(status):
            raise demo_witness.ended_early(self._first, WORKLOAD)

    async def _client_begins(self) -> asyncio.subprocess.Process:
        server = self._options.server
        await eventually(self._serves, what=f"{server} answers through the service address")
        self._screen.step(f"Filling {server} with {self._options.fill_mib} MiB of random values")
        fill = ("fill", "--bytes", str(self._options.fill_mib << 20))
        await self._client.run(self._probe(*fill), timeout_s=120.0)
        writer = await self._client.spawn(
            self._probe("write", "--rate", str(_WRITES_PER_S), "--log", str(self._log)),
            log=self._client.log_dir / "probe.log",
        )
        # Without any write before the loss there would be nothing to miss after it.
        await eventually(self._has_written, what="the client's first write is acknowledged")
        return writer

    async def _has_written(self) -> bool:
        return self._log.exists() and len(read_log(self._log)) > 0

    async def _stream(self) -> WorkloadMetrics:
        """Wait until the standby is ready and enough epochs are committed; return what A measured."""
        self._screen.step("Streaming epochs to B")
        wanted = self._options.epochs
        started_s = time.monotonic()
        limit_s = 60.0 + 5 * wanted * self._options.interval_ms / 1000
        while True:
            measured = _of_workload(await self._first.metrics())
            self._refuse_if_ended(await self._first.workload(WORKLOAD))
            status = await self._second.workload(WORKLOAD)
            ready = status is not None and status.restorable
            if measured is not None:
                why = "" if ready or status is None else f" ({'; '.join(status.reasons)})"
                self._screen.progress(
                    f"{measured.epochs_acknowledged}/{wanted} epochs committed, "
                    f"frozen {_median(measured.freeze_ms):.0f} ms each, "
                    f"{measured.bytes_sent / 1e6:.0f} MB sent, "
                    f"standby {'ready' if ready else 'not ready'}{why}"
                )
                if ready and measured.epochs_acknowledged >= wanted:
                    # Not in step with the epochs: power does not wait for a good moment either.
                    await asyncio.sleep(random.uniform(0, self._options.interval_ms / 1000))  # noqa: S311
                    return _of_workload(await self._first.metrics()) or measured
            if time.monotonic() - started_s > limit_s:
                why = "; ".join(status.reasons) if status is not None else ""
                raise LabError(
                    f"the standby was not ready within {limit_s:.0f} s: {why or 'too few epochs arrived'}",
                    hint="what a standby needs: docs/concepts/restorable.md",
                )
            await asyncio.sleep(0.1)

    async def _power_goes(self) -> float:
        self._screen.step("A's power goes: link cut, then everything on it killed")
        wall_s = time.time()
        await self._lab.power_off("a")
        return wall_s

    async def _takeover(self) -> TermHistory:
        self._screen.step("B notices, makes sure that A is off, and takes over")
        await self._second.wait_for(
            WORKLOAD,
            lambda w: (w.state == "leading" and w.running) or w.exit_code is not None,
            what="taken over by B",
            timeout_s=60.0,
        )

        async def told() -> bool:
            return any(term.restored is not None for term in (await self._second.history(WORKLOAD)).terms)

        await eventually(told, what="B tells how it took over", timeout_s=10.0)
        return (await self._second.history(WORKLOAD)).terms[-1]

    async def _client_goes_on(self, cut_wall_s: float) -> None:
        self._screen.step("The client goes on through the same address")

        async def served() -> bool:
            acknowledged = read_log(self._log)
            first = next((each for each in acknowledged if each.wall_s > cut_wall_s + 0.05), None)
            return first is not None and acknowledged[-1].wall_s - first.wall_s > _GO_ON_S

        await eventually(served, what="the client is served by B", timeout_s=30.0)

    async def _judge(self, metrics: WorkloadMetrics, term: TermHistory, cut_wall_s: float) -> DemoReport:
        restored = term.restored
        writes: WriteSummary | None = None
        outage_ms: float | None = None
        seen = Sighting((), ("B does not say which epoch it restored",))
        if restored is not None and self._is_served:
            frozen_wall_s = self._stored(restored).frozen_wall_s
            acknowledged = read_log(self._log)
            held = await self._present(acknowledged[-1].number)
            writes = _account(acknowledged, held, cut_wall_s, frozen_wall_s)
            outage_ms = _outage_ms(acknowledged, cut_wall_s)
            self._screen.step(f"Asking {self._options.server} on B, and its files, whether they are whole")
            seen = _early_writes(acknowledged, held, frozen_wall_s).and_also(await self._files_seen())
        elif restored is not None:
            self._screen.step("Watching what B restored")
            seen = await demo_witness.watch(self._second, WORKLOAD, restored, self._stored(restored).path)
        interval_ms = metrics.interval_ms
        return DemoReport(
            schema_version=SCHEMA_VERSION,
            workload=self._spec.command,
            rss_bytes=metrics.memory_bytes,
            epochs_committed=metrics.epochs_acknowledged,
            epoch_interval_ms=IntervalSummary(
                configured=float(self._options.interval_ms),
                p50=_median(interval_ms),
                max=max(interval_ms, default=0.0),
            ),
            freeze_ms=FreezeSummary(
                p50=_median(metrics.freeze_ms),
                p99=_percentile(metrics.freeze_ms, 99),
                max=max(metrics.freeze_ms, default=0.0),
            ),
            restored=EpochName(restored.term, restored.epoch) if restored is not None else None,
            survived=not seen.problems,
            reason="; ".join(seen.problems) or f"{WORKLOAD} runs on B from epoch {restored}",
            checked=seen.checked,
            not_checked=(
                (f"the random values that {self._options.server} was filled with",)
                if self._is_served
                else ("what it answers, and each byte of its memory: only a client of yours can tell",)
            ),
            writes=writes,
            outage_ms=outage_ms,
            timeline=term.timeline,
            bytes=ByteSummary(sent=metrics.bytes_sent, full_equivalent=metrics.bytes_full),
        )

    async def _files_seen(self) -> Sighting:
        """Have the files on B checked by the program whose they are."""
        directory = Path(self._second.config.node.state_dir) / "workloads" / WORKLOAD / "files" / "0"
        if self._options.server == "sqlite":
            return await demo_witness.check_sqlite(self._client, self._probe("check"), directory / "demo.db")
        return await demo_witness.check_redis_log(self._client, directory / "appendonlydir")

    def _stored(self, epoch: EpochId) -> EpochRecord:
        records = StoreReader.inspect(self._second.config.store_dir, WORKLOAD).records()
        found = next((record for record in records if record.id == epoch), None)
        if found is None:
            raise LabError(f"B restored epoch {epoch}, but its store does not hold it")
        return found

    async def _present(self, newest: int) -> set[int]:
        answer = await self._client.run(self._probe("present", "--newest", str(newest)), timeout_s=60.0)
        return set(json.loads(answer.stdout))

    async def _serves(self) -> bool:
        answer = await self._client.run(self._probe("present", "--newest", "1"), check=False)
        return answer.returncode == 0

    def _probe(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "outlive.probe", self._address, str(REDIS_PORT), *words]


def _shown(command: Sequence[str]) -> str:
    """Return the beginning of a command on one line."""
    return textwrap.shorten(" ".join(command), _SHOWN_CHARACTERS, placeholder=" …")


def _of_workload(metrics: AgentMetrics) -> WorkloadMetrics | None:
    return next((each for each in metrics.workloads if each.name == WORKLOAD), None)


def _account(
    acknowledged: Sequence[Acknowledged], held: set[int], cut_wall_s: float, frozen_wall_s: float
) -> WriteSummary:
    """Count what the client had been promised before the power went, and what of it is there."""
    promised = [write for write in acknowledged if write.wall_s <= cut_wall_s + 0.05]
    lost = [write for write in promised if write.number not in held]
    return WriteSummary(
        acknowledged=len(promised),
        present=len(promised) - len(lost),
        lost=len(lost),
        lost_window_ms=(max(write.wall_s for write in lost) - frozen_wall_s) * 1000 if lost else 0.0,
    )


def _early_writes(acknowledged: Sequence[Acknowledged], held: set[int], frozen_wall_s: float) -> Sighting:
    """Look whether every write is there that was acknowledged before the restored epoch's freeze."""
    early = [write.number for write in acknowledged if write.wall_s < frozen_wall_s]
    gone = sum(number not in held for number in early)
    if gone:
        return Sighting((), (f"{gone} writes acknowledged before the restored epoch are gone",))
    checked = f"all {len(early)} writes acknowledged before the restored epoch were read back, value by value"
    return Sighting(
        (checked, f"new writes were acknowledged through the same address for {_GO_ON_S:.0f} s"), ()
    )


def _outage_ms(acknowledged: Sequence[Acknowledged], cut_wall_s: float) -> float:
    """From the last write acknowledged by A to the first one acknowledged by B."""
    before = max(write.wall_s for write in acknowledged if write.wall_s <= cut_wall_s + 0.05)
    after = min(write.wall_s for write in acknowledged if write.wall_s > cut_wall_s + 0.05)
    return (after - before) * 1000


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0
