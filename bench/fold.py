"""What folding costs the epochs that commit meanwhile: the same epochs with and without it.

    python -m bench.fold [--mib 256] [--changed-pages 2000] [--epochs 60] [--rounds 3] [--interval-ms 200]
                         [--fold-mib-per-s 256] [--directory DIR] [--output json|table]

A store on a real disk gets a base and then deltas. Rounds alternate between one in which nobody folds and one
in which a thread folds whenever it is due, at the pace that the agent keeps by default.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from bench.summary import Summary, summarize
from common.criu.images import PE_PARENT, PE_PRESENT, SpaceKey
from common.errors import NoSpaceError
from common.model import PAGE_BYTES, EpochId
from outlive.cli.running import configure_logs
from replica.store import EpochHeader, EpochStore, IncomingEpoch

SCHEMA_VERSION = 1
_KEY = SpaceKey("task", 1)
_MAX_LEVELS = 8
_BLOCK_PAGES = 256


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of one kind."""

    epoch_ms: Summary
    """From `begin` until the commit is durable."""
    commit_ms: Summary
    """The commit alone."""
    refused: int
    """Times that an epoch had to wait, because folding was too far behind."""
    folds: int
    folded_mib: float
    longest_chain: int


class FoldReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    kernel: str
    cpus: int
    mib: int
    changed_pages: int
    epochs: int
    rounds: int
    interval_ms: int
    fold_mib_per_s: float
    volatile: bool
    without: Phase
    during: Phase
    epoch_ratio: float
    """Median of `epoch_ms`, during over without."""


class _Round:
    """One store and its epochs."""

    def __init__(self, directory: Path, mib: int, *, folding: bool, fold_mib_per_s: float) -> None:
        self._store = EpochStore.open(
            directory,
            "bench",
            min_free_bytes=0,
            max_levels=_MAX_LEVELS if folding else 1 << 20,
            fold_bytes_per_s=fold_mib_per_s * (1 << 20),
        )
        self.volatile = self._store.volatile
        self._folding = folding
        self._over = threading.Event()
        self._numbers = np.arange(mib * (1 << 20) // PAGE_BYTES, dtype=np.uint64)
        self._dice = np.random.default_rng(1)
        self._block = memoryview(self._dice.bytes(_BLOCK_PAGES * PAGE_BYTES))
        self.epoch_ms: list[float] = []
        self.commit_ms: list[float] = []
        self.refused = 0
        self.folds = 0
        self.folded_bytes = 0
        self.longest_chain = 0

    def run(self, epochs: int, changed_pages: int, interval_ms: int) -> None:
        self._send(EpochId(1, 1), None, np.arange(len(self._numbers)))
        folder = threading.Thread(target=self._fold_for_ever)
        folder.start()
        try:
            for number in range(2, epochs + 2):
                time.sleep(interval_ms / 1000)
                rows = np.sort(self._dice.choice(len(self._numbers), changed_pages, replace=False))
                started_s = time.monotonic()
                commit_ms = self._send(EpochId(1, number), EpochId(1, number - 1), rows)
                self.epoch_ms.append((time.monotonic() - started_s) * 1000)
                self.commit_ms.append(commit_ms)
        finally:
            self._over.set()
            self._store.close()
            folder.join()

    def _send(self, epoch: EpochId, base: EpochId | None, changed: np.ndarray) -> float:
        """Write one epoch; return what its commit alone took, in ms."""
        header = EpochHeader(
            workload="bench", id=epoch, base=base, incarnation="bench", frozen_wall_s=time.time()
        )
        flags = np.full(len(self._numbers), PE_PARENT, dtype=np.uint8)
        flags[changed] = PE_PRESENT
        with self._begin(header) as arriving:
            arriving.metadata("inventory.img", b"bench")
            arriving.space(_KEY, self._numbers, flags)
            for at in range(0, len(changed), _BLOCK_PAGES):
                arriving.pages(_KEY, self._block[: min(_BLOCK_PAGES, len(changed) - at) * PAGE_BYTES])
            started_s = time.monotonic()
            record = arriving.commit()
        self.longest_chain = max(self.longest_chain, record.levels)
        return (time.monotonic() - started_s) * 1000

    def _begin(self, header: EpochHeader) -> IncomingEpoch:
        while True:
            try:
                return self._store.begin(header)
            except NoSpaceError:
                self.refused += 1
                time.sleep(0.05)

    def _fold_for_ever(self) -> None:
        while self._folding and not self._over.wait(0.1):
            report = self._store.fold() if self._store.fold_due() else None
            if report:
                self.folds += 1
                self.folded_bytes += report.page_bytes


def measure(options: argparse.Namespace) -> FoldReport:
    """Run the rounds in turn and sum them up."""
    series: dict[bool, list[_Round]] = {False: [], True: []}
    for _ in range(options.rounds):
        for folding in (False, True):
            with tempfile.TemporaryDirectory(prefix="outlive-bench-", dir=options.directory) as directory:
                each = _Round(
                    Path(directory), options.mib, folding=folding, fold_mib_per_s=options.fold_mib_per_s
                )
                each.run(options.epochs, options.changed_pages, options.interval_ms)
                series[folding].append(each)
    without, during = _phase(series[False]), _phase(series[True])
    return FoldReport(
        schema_version=SCHEMA_VERSION,
        benchmark="fold",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        mib=options.mib,
        changed_pages=options.changed_pages,
        epochs=options.epochs,
        rounds=options.rounds,
        interval_ms=options.interval_ms,
        fold_mib_per_s=options.fold_mib_per_s,
        volatile=series[True][0].volatile,
        without=without,
        during=during,
        epoch_ratio=round(during.epoch_ms.p50 / without.epoch_ms.p50, 3),
    )


def _phase(rounds: list[_Round]) -> Phase:
    return Phase(
        epoch_ms=summarize([value for each in rounds for value in each.epoch_ms]),
        commit_ms=summarize([value for each in rounds for value in each.commit_ms]),
        refused=sum(each.refused for each in rounds),
        folds=sum(each.folds for each in rounds),
        folded_mib=round(sum(each.folded_bytes for each in rounds) / (1 << 20), 1),
        longest_chain=max(each.longest_chain for each in rounds),
    )


def _print_table(report: FoldReport) -> None:
    print("folding    epoch p50 (iqr, p99)          commit p50   folds   chain")
    for name, each in (("without", report.without), ("during", report.during)):
        print(
            f"{name:8} {each.epoch_ms.p50:>8.1f} ms ({each.epoch_ms.iqr:.1f}, {each.epoch_ms.p99:.1f}) "
            f"{each.commit_ms.p50:>12.1f} ms {each.folds:>6} {each.longest_chain:>7}"
        )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--changed-pages", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval-ms", type=int, default=200)
    parser.add_argument("--fold-mib-per-s", type=float, default=256)
    parser.add_argument("--directory", default=".")
    parser.add_argument("--output", choices=("json", "table"), default="table")
    options = parser.parse_args()
    configure_logs("warning")
    report = measure(options)
    if options.output == "json":
        print(msgspec.json.encode(report).decode())
    else:
        _print_table(report)


if __name__ == "__main__":
    main()
