"""What sending costs: our stream with a real store, against ssh and rsync with the same bytes, in turn.

    python -m bench.stream [--mib 1024] [--rounds 5] [--output json|table]

Each round every sender brings the whole payload (*base*) and then changes of it (*steady*) from one process
to the disk of another over loopback, encrypted and synced; who begins changes from round to round. What
arrived is compared each time. Prints one JSON object; `docs/reference/benchmarks.md` defines its fields.
Compare ratios, not seconds, between machines.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from bench.payload import SHARES, Payload
from bench.processes import cpu_s
from bench.ssh_host import Cost, SshHost, missing_programs, ssh_host, versions
from bench.stream_node import SECRET, SPACE, WORKLOAD, Options, Transfers
from bench.summary import Summary, summarize
from bench.wire_ends import open_store
from common.errors import LabError
from common.identity import PageHasher
from common.model import PAGE_BYTES
from outlive.cli.running import configure_logs

SCHEMA_VERSION = 1
_REPOSITORY = Path(__file__).resolve().parents[1]
_SEED = 1
_OURS = "outlive"

Phase = Literal["base", "steady"]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One sender in one phase."""

    sender: str
    phase: Phase
    raw_bytes: int
    seconds: Summary
    mb_per_s: Summary
    cpu_s_per_gb: Summary
    sent_ratio: float | None


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Our medians over another sender's."""

    against: str
    phase: Phase
    mb_per_s: float
    cpu_s_per_gb: float


class Connecting(msgspec.Struct, frozen=True, kw_only=True):
    """What every transfer by ssh or rsync contains, and none of ours: making a connection."""

    seconds: Summary
    cpu_s: Summary


class StreamReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    schema_version: int
    benchmark: str
    kernel: str
    cpus: int
    mib: int
    rounds: int
    epochs: int
    changed_pages: int
    interval_ms: int
    payload: dict[str, float]
    volatile: bool
    versions: str
    skipped: str
    connecting: Connecting
    measured: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]


class _Turn(msgspec.Struct, frozen=True):
    """What one sender did in one round and phase."""

    sender: str
    phase: Phase
    raw_bytes: int
    """Of each transfer."""
    seconds: tuple[float, ...]
    cpu_s: float
    """Of all transfers together."""
    sent_bytes: int | None


def measure(directory: Path, options: Options, rounds: int) -> StreamReport:
    """Run all rounds below `directory`, which is left as it was. Raises LabError if wrong bytes arrived."""
    turns: list[_Turn] = []
    greetings: list[Cost] = []
    skipped = missing_programs()
    with contextlib.ExitStack() as stack:
        below = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory.resolve())))
        senders: list[Callable[[], list[_Turn]]] = [lambda: _stream(below, options)]
        if not skipped:
            host = stack.enter_context(ssh_host(below))
            payload = Payload(below / "payload.img", options.mib, _SEED)
            senders.append(lambda: _ssh(host, payload, below, options))
            senders.append(lambda: _rsync(host, payload, below, options))
        for number in range(rounds):
            if not skipped:
                greetings.append(host.greet())
            first = number % len(senders)
            for sender in senders[first:] + senders[:first]:
                turns += sender()
        with open_store(below, WORKLOAD) as store:
            volatile = store.volatile
    measured = _summarized(turns)
    return StreamReport(
        schema_version=SCHEMA_VERSION,
        benchmark="stream",
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        mib=options.mib,
        rounds=rounds,
        epochs=options.epochs,
        changed_pages=options.changed_pages,
        interval_ms=options.interval_ms,
        payload=SHARES,
        volatile=volatile,
        versions="" if skipped else versions(),
        skipped=skipped,
        connecting=Connecting(
            seconds=summarize([cost.seconds for cost in greetings]),
            cpu_s=summarize([cost.cpu_s for cost in greetings]),
        ),
        measured=measured,
        ratios=_ratios(measured),
    )


def _stream(directory: Path, options: Options) -> list[_Turn]:
    """Our turn, with two new processes and a new store."""
    with (
        tempfile.TemporaryDirectory(dir=directory) as name,
        _node("replica", name) as replica,
        _node("primary", name, _said(replica), msgspec.json.encode(options).decode()) as primary,
    ):
        _said(primary)
        base = _perform("base", primary, replica, options.mib << 20)
        steady = _perform("steady", primary, replica, options.changed_pages * PAGE_BYTES)
        for process in (primary, replica):
            process.kill()
            process.wait()
        _compare_store(Path(name))
        return [base, steady]


def _perform(
    phase: Phase, primary: subprocess.Popen[str], replica: subprocess.Popen[str], raw_bytes: int
) -> _Turn:
    os.sync()
    before_s = cpu_s(replica.pid)
    if primary.stdin is None:
        raise LabError("the primary cannot be told what to do")
    print(phase, file=primary.stdin, flush=True)
    sent = msgspec.json.decode(_said(primary), type=Transfers)
    spent_s = sent.cpu_s + cpu_s(replica.pid) - before_s
    return _Turn(_OURS, phase, raw_bytes, sent.seconds, spent_s, sent.sent_bytes)


@contextlib.contextmanager
def _node(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bench.stream_node", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_REPOSITORY
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _said(process: subprocess.Popen[str]) -> str:
    """Wait for the next line of a node, which gives up by itself if it waits too long."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise LabError("a node of the stream ended early", hint="what it wrote to stderr says why")
    return line.strip()


def _compare_store(directory: Path) -> None:
    """Raise LabError unless the newest epoch in the store is the payload, page by page."""
    hasher = PageHasher(SECRET)
    image = directory / "memory.img"
    pages = image.stat().st_size // PAGE_BYTES
    with open_store(directory, WORKLOAD) as store, image.open("rb") as file:
        newest = store.newest
        if newest is None:
            raise LabError("the store holds no epoch")
        held = store.identify(newest.id, SPACE, 0, pages, hasher)
        if held.more or not np.array_equal(held.identity, hasher.identify_image(file.fileno(), pages)):
            raise LabError("the store holds other pages than were sent")


def _ssh(host: SshHost, payload: Payload, directory: Path, options: Options) -> list[_Turn]:
    """Whole: the file. Changes: the changed pages alone, as if both sides knew which these are."""
    target, changes = directory / "piped", directory / "changes"
    base = _transfer(host.pipe, payload.path, target)
    changes.write_bytes(payload.change(options.changed_pages)[1])
    steady = _transfer(host.pipe, changes, target)
    target.unlink()
    return [
        _turn("ssh", "base", payload.size_bytes, base),
        _turn("ssh", "steady", changes.stat().st_size, steady),
    ]


def _rsync(host: SshHost, payload: Payload, directory: Path, options: Options) -> list[_Turn]:
    target = directory / "synced"
    base = _transfer(host.rsync, payload.path, target)
    _, content = payload.change(options.changed_pages)
    steady = _transfer(host.rsync, payload.path, target)
    target.unlink()
    return [_turn("rsync", "base", payload.size_bytes, base), _turn("rsync", "steady", len(content), steady)]


def _transfer(send: Callable[[Path, Path], Cost], source: Path, target: Path) -> Cost:
    os.sync()
    cost = send(source, target)
    if not filecmp.cmp(source, target, shallow=False):
        raise LabError(f"{target.name} is not what was sent")
    return cost


def _turn(sender: str, phase: Phase, raw_bytes: int, cost: Cost) -> _Turn:
    return _Turn(sender, phase, raw_bytes, (cost.seconds,), cost.cpu_s, cost.sent_bytes)


def _summarized(turns: list[_Turn]) -> tuple[Measured, ...]:
    groups: dict[tuple[Phase, str], list[_Turn]] = {}
    for turn in sorted(turns, key=lambda turn: (turn.phase, turn.sender != _OURS, turn.sender)):
        groups.setdefault((turn.phase, turn.sender), []).append(turn)
    return tuple(
        Measured(
            sender=sender,
            phase=phase,
            raw_bytes=group[0].raw_bytes,
            seconds=summarize([seconds for turn in group for seconds in turn.seconds]),
            mb_per_s=summarize([_all_bytes(turn) / sum(turn.seconds) / 1e6 for turn in group]),
            cpu_s_per_gb=summarize([turn.cpu_s / _all_bytes(turn) * 1e9 for turn in group]),
            sent_ratio=_sent_ratio(group),
        )
        for (phase, sender), group in groups.items()
    )


def _all_bytes(turn: _Turn) -> int:
    return turn.raw_bytes * len(turn.seconds)


def _sent_ratio(group: list[_Turn]) -> float | None:
    ratios = [turn.sent_bytes / _all_bytes(turn) for turn in group if turn.sent_bytes is not None]
    return round(statistics.median(ratios), 4) if ratios else None


def _ratios(measured: tuple[Measured, ...]) -> tuple[Ratio, ...]:
    ours = {each.phase: each for each in measured if each.sender == _OURS}
    return tuple(
        Ratio(
            against=each.sender,
            phase=each.phase,
            mb_per_s=round(ours[each.phase].mb_per_s.p50 / each.mb_per_s.p50, 3),
            cpu_s_per_gb=round(ours[each.phase].cpu_s_per_gb.p50 / each.cpu_s_per_gb.p50, 3),
        )
        for each in measured
        if each.sender != _OURS
    )


def _print_table(report: StreamReport) -> None:
    print("phase  sender      seconds p50     MB/s p50 (iqr)    CPU s/GB p50 (iqr)    sent")
    for each in report.measured:
        sent = "" if each.sent_ratio is None else f"{each.sent_ratio:.2%}"
        print(
            f"{each.phase:6} {each.sender:8} {each.seconds.p50:>14.3f} "
            f"{_spread(each.mb_per_s):>18} {_spread(each.cpu_s_per_gb):>21} {sent:>7}"
        )
    if report.skipped:
        print(f"ssh and rsync were skipped: {report.skipped}")


def _spread(summary: Summary) -> str:
    return f"{summary.p50:.2f} ({summary.iqr:.2f})"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="steady epochs a round")
    parser.add_argument("--changed-pages", type=int, default=1000)
    parser.add_argument("--interval-ms", type=int, default=200)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--output", choices=("json", "table"), default="table")
    given = parser.parse_args()
    configure_logs("warning")
    options = Options(
        mib=given.mib,
        seed=_SEED,
        epochs=given.epochs,
        changed_pages=given.changed_pages,
        interval_ms=given.interval_ms,
    )
    report = measure(given.directory, options, given.rounds)
    if given.output == "json":
        print(msgspec.json.encode(report).decode())
    else:
        _print_table(report)


if __name__ == "__main__":
    main()
