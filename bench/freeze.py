"""How long a freeze is: fast and stock backend on the same process, checked by that process's own clock.

    python -m bench.freeze [--rss-mib 2048] [--dirty-pages 1000] [--epochs 30] [--stock-epochs 3]
                           [--processes 1] [--threads 1] [--shared-mib 0] [--swept 64,512,2048]
                           [--levels 0,1000,5000] [--level-epochs 10] [--output json|table]

Backends run in this process as they do in an agent; nobody streams and no keeper watches. Before every
freeze, when pre-copy is over, the process writes `--dirty-pages` of its pages, scattered: that many are dirty
in it. Prints one JSON object; `docs/reference/benchmarks.md` defines its fields. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.freeze_report import (
    Epoch,
    FirstWrite,
    FreezeReport,
    Options,
    Seen,
    SweptReport,
    print_table,
    report,
    swept,
)
from bench.interrupt import run_to_end
from bench.target import WORKLOAD, Target, running_target
from bench.tcp_walk import tcp_walk_ms
from common.criu.locate import locate_criu
from common.errors import LabError
from common.heap import keep_heap_small
from common.identity import PageHasher
from common.model import EpochId
from outlive.cli.running import configure_logs
from primary.capture import PageTable
from primary.dumping import Dumped, Dumper
from primary.fast import FastBackend
from primary.injection import take_userfaultfd
from primary.shim import ShimChannel
from primary.stock import StockBackend
from primary.verification import Verification

_WARM_UP_EPOCHS = 2
_INJECTIONS = 10
_TOUCHES = 7
_PAUSE_S = 0.1
"""Between epochs."""
_TICKER_S = 0.02
"""Until the ticker has surely noted what it saw."""
_PAGE_BYTES = 4096


class _Unwatched:
    """Nobody watches that these freezes end."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """See `FreezeGuard.announce`."""

    async def end(self, criu_pid: int) -> None:
        """See `FreezeGuard.end`."""


class _DirtyingDumper(Dumper):
    """Has the target write pages before each dump, and remembers when dumps were."""

    def __init__(self, target: Target, criu: Path, *, with_shim: bool) -> None:
        super().__init__(
            target.config,
            target.spec,
            init_pid=target.pid,
            criu=criu,
            guard=_Unwatched(),
            with_shim=with_shim,
        )
        self._target = target
        self.pages = 0
        self.reached_s: list[float] = []
        self.windows: list[tuple[int, int]] = []
        """Of each dump since the last `forget`: when it began and ended, monotonic ns."""

    def forget(self) -> None:
        """Begin a new epoch."""
        self.reached_s.clear()
        self.windows.clear()

    async def dump(
        self,
        directory: Path,
        at_post_dump: Callable[[ShimChannel | None], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Dumped:
        """See `Dumper.dump`."""
        self.reached_s.append(time.monotonic())
        if self.freeze_cgroup is None:  # else it stands still already, and what it wrote before is dirty
            await self._target.write_pages(self.pages)
        begun_ns = time.monotonic_ns()
        try:
            return await super().dump(directory, at_post_dump, meanwhile)
        finally:
            self.windows.append((begun_ns, time.monotonic_ns()))


class _Series:
    """Epochs of one backend, one after the other, each released when the next one is there."""

    def __init__(self, target: Target, dumper: _DirtyingDumper, backend: FastBackend | StockBackend) -> None:
        self._target = target
        self._dumper = dumper
        self._backend = backend
        self._number = 0
        self._table: PageTable | None = None

    async def capture(self, dirty_pages: int) -> Epoch:
        """Take one epoch with so many pages written just before its freeze."""
        self._dumper.pages = dirty_pages
        self._dumper.forget()
        since = EpochId(1, self._number) if self._number else None
        self._number += 1
        begun_s = time.monotonic()
        captured = await self._backend.capture(EpochId(1, self._number), since)
        epoch_ms = (time.monotonic() - begun_s) * 1000
        try:
            await asyncio.sleep(_TICKER_S)
            gaps = [self._target.boards[0].longest_gap_ms(*window) for window in self._dumper.windows]
            held = self._table
            self._table = PageTable(captured.spaces)
            return Epoch(
                freeze=captured.freeze,
                ticker_ms=gaps[-1],
                abandoned_ms=tuple(gaps[:-1]),
                epoch_ms=epoch_ms,
                precopy_ms=(self._dumper.reached_s[0] - begun_s) * 1000,
                present=self._table.pages,
                dirty=_dirty_pages(self._backend),
                changed=self._table.pages if held is None else _changed(held, self._table),
                image_bytes=self._target.images_bytes(),
            )
        finally:
            captured.release()
            await asyncio.sleep(_PAUSE_S)

    async def capture_many(self, count: int, dirty_pages: int) -> list[Epoch]:
        """Take `count` epochs after some to warm up, which do not count."""
        for _ in range(_WARM_UP_EPOCHS):
            await self.capture(dirty_pages)
        return [await self.capture(dirty_pages) for _ in range(count)]


async def measure(rss_mib: int, options: Options) -> FreezeReport:
    """Start a target of that size and measure both backends on it."""
    # VmHWM begins anew: what an earlier size took does not count.
    Path("/proc/self/clear_refs").write_text("5")
    criu = locate_criu(None)
    _tell(f"{rss_mib} MiB: starting")
    async with running_target(
        rss_mib=rss_mib,
        shared_mib=options.shared_mib,
        processes=options.processes,
        threads=options.threads,
    ) as target:
        injections = [await _injection_us(target.pid) for _ in range(_INJECTIONS)]
        dumper = _DirtyingDumper(target, criu, with_shim=True)
        backend = FastBackend(
            target.config,
            dumper,
            workload=WORKLOAD,
            incarnation="bench",
            hasher=PageHasher(),
            verification=Verification(options.verify_epochs),
        )
        try:
            series = _Series(target, dumper, backend)
            _tell(f"{rss_mib} MiB: fast, {options.epochs} epochs")
            first = await series.capture(options.dirty_pages)
            ours = await series.capture_many(options.epochs, options.dirty_pages)
            levels = []
            for level in options.levels if options.level_epochs else ():
                _tell(f"{rss_mib} MiB: fast, {level} pages dirty")
                levels.append((level, await series.capture_many(options.level_epochs, level)))
            first_write = await _first_write(target, series)
            tcp_walks = [tcp_walk_ms() for _ in range(_INJECTIONS)]
            agent_rss_bytes = _peak_rss_bytes()
        finally:
            await backend.close()
        _tell(f"{rss_mib} MiB: stock, {options.stock_epochs} epochs")
        stock = await _stock(target, criu, options)
        return report(
            rss_mib,
            options,
            Seen(first, ours, levels, stock, first_write, injections, tcp_walks, agent_rss_bytes),
        )


async def sweep(sizes_mib: Sequence[int], options: Options) -> SweptReport:
    """Measure several sizes, ascending."""
    return swept([await measure(rss_mib, options) for rss_mib in sorted(sizes_mib)])


async def _stock(target: Target, criu: Path, options: Options) -> list[Epoch]:
    dumper = _DirtyingDumper(target, criu, with_shim=False)
    backend = StockBackend(dumper, workload=WORKLOAD, incarnation="bench", hasher=PageHasher())
    try:
        series = _Series(target, dumper, backend)
        return [await series.capture(options.dirty_pages) for _ in range(options.stock_epochs)]
    finally:
        await backend.close()


async def _injection_us(pid: int) -> float:
    injection = await take_userfaultfd(pid)
    os.close(injection.descriptor)
    return injection.stopped_us


async def _first_write(target: Target, series: _Series) -> FirstWrite:
    """Touch the probe's pages just after an epoch, which has protected them, and once more."""
    protected, unprotected = [], []
    await target.touch_probe()
    for _ in range(_TOUCHES):
        # The first epoch copies what was touched; the next finds nothing to do, so all is protected.
        await series.capture(0)
        await series.capture(0)
        protected.append(await target.touch_probe())
        unprotected.append(await target.touch_probe())
    return FirstWrite(
        protected=round(statistics.median(protected), 1), unprotected=round(statistics.median(unprotected), 1)
    )


def _changed(held: PageTable, table: PageTable) -> int:
    return sum(len(held.changed(space)) for space in table.spaces.values())


def _dirty_pages(backend: FastBackend | StockBackend) -> int:
    """Count what was copied within the last freeze; that is told to nobody, so it is looked up inside."""
    if isinstance(backend, StockBackend):
        return 0
    return backend._dirty_pages


def _peak_rss_bytes() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise LabError("the kernel does not tell VmHWM")
    return int(match[1]) * 1024


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _run(options: argparse.Namespace) -> FreezeReport | SweptReport:
    wanted = Options(
        dirty_pages=options.dirty_pages,
        epochs=options.epochs,
        stock_epochs=options.stock_epochs,
        processes=options.processes,
        threads=options.threads,
        shared_mib=options.shared_mib,
        verify_epochs=options.verify_epochs,
        levels=tuple(options.levels),
        level_epochs=options.level_epochs,
    )
    if options.swept:
        return await sweep(options.swept, wanted)
    return await measure(options.rss_mib, wanted)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Read the command line, measure, print."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rss-mib", type=int, default=2048)
    parser.add_argument("--dirty-pages", type=int, default=defaults.dirty_pages)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--stock-epochs", type=int, default=defaults.stock_epochs, help="0: no comparison")
    parser.add_argument("--processes", type=int, default=1, help="that the memory is split among")
    parser.add_argument("--threads", type=int, default=1, help="of each process, besides the ticker")
    parser.add_argument("--shared-mib", type=int, default=0, help="shared memory in addition")
    parser.add_argument(
        "--verify-epochs", type=int, default=defaults.verify_epochs, help="0: no verification"
    )
    parser.add_argument("--swept", type=_numbers, default=[], help="sizes in MiB, instead of --rss-mib")
    parser.add_argument("--levels", type=_numbers, default=list(defaults.levels))
    parser.add_argument("--level-epochs", type=int, default=defaults.level_epochs, help="0: no levels")
    parser.add_argument("--output", choices=("json", "table"), default="table")
    options = parser.parse_args()
    keep_heap_small()  # as agents do
    configure_logs("warning")
    told = run_to_end(_run(options))
    if options.output == "json":
        print(msgspec.json.encode(told).decode())
    else:
        print_table(told.sizes if isinstance(told, SweptReport) else [told])


if __name__ == "__main__":
    main()
