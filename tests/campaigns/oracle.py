"""The memory oracle: what the fast backend captures is, page for page, what stock CRIU dumps at that instant.

    python -m tests.campaigns.oracle --epochs 2000 --seeds 3 [--seed 1] [--every 4] [--tracker soft-dirty]

A program that changes its memory in every way there is (`tests/oracle/mutator.c`) runs in a container and
is captured by the fast backend, epoch after epoch, as the agent does it. In a sample of epochs the
container's cgroup is frozen between pre-copy and dump; the fast backend takes its epoch, and then, still
frozen, the stock backend takes an independent one. Both must have the same pages with the same content.
Epochs are committed to a real store, as by a replica that misses every third one. After every 50th the
program is asked whether it finds itself intact; every other seed also has what the store holds brought to
life beside it, in a network namespace of its own, and asked the same (its files must not change then: those
paths are left out).

A run counts only if every path of the program was taken. What goes wrong is told with the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np

from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig
from common.container import cgroup_directories, kill_workload, restore_workload, start_workload
from common.criu.images import PE_LAZY
from common.criu.locate import locate_criu
from common.errors import CaptureError, OutliveError
from common.identity import PageHasher
from common.messages import BULK_BYTES, decode
from common.model import EpochId, WorkloadSpec
from common.terms import TermGuard
from outlive.cli.running import configure_logs
from primary.capture import CapturedEpoch
from primary.dumping import Dumped, Dumper
from primary.fast import FastBackend
from primary.outgoing import Held, epoch_messages
from primary.stock import StockBackend
from primary.tracking import TrackerName, choose
from replica.assembly import Assembly, Committed
from replica.store import EpochStore
from tests.oracle.build import ask, build

NAME = "oracle"
_FROZEN_WITHIN_S = 5.0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One seed."""

    seed: int
    epochs: int
    compared: int
    pages_compared: int
    refused: int
    """Captures that failed and were tried again: a vfork, too many dirty pages."""
    checks: int
    restored: int
    steps: int
    wrong: tuple[str, ...]
    untouched: tuple[str, ...]
    """Paths of the program that were never taken."""
    freeze_p50_ms: float
    stops: int
    """Epochs for which it stood still once more, ahead of the freeze."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole campaign."""

    schema_version: int
    backend: str
    tracker: str
    seconds: float
    runs: tuple[Run, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong and every path was taken."""
        return not any(run.wrong or run.untouched for run in self.runs)


class Freezer:
    """The freezer of the workload's cgroup."""

    def __init__(self, config: NodeConfig) -> None:
        directories = cgroup_directories(WorkloadPaths(config, NAME).cgroup)
        self._v1 = next((each for each in directories if (each / "freezer.state").exists()), None)
        self.directory = self._v1 or next(each for each in directories if (each / "cgroup.freeze").exists())

    async def freeze(self) -> None:
        """Freeze, and wait until it is so."""
        if self._v1:
            (self._v1 / "freezer.state").write_text("FROZEN")
        else:
            (self.directory / "cgroup.freeze").write_text("1")
        until_s = time.monotonic() + _FROZEN_WITHIN_S
        while not self._frozen:
            if time.monotonic() > until_s:
                self.thaw()
                raise CaptureError("the cgroup does not freeze")
            await asyncio.sleep(0.001)

    @property
    def _frozen(self) -> bool:
        if self._v1:
            return (self._v1 / "freezer.state").read_text().strip() == "FROZEN"
        return "frozen 1" in (self.directory / "cgroup.events").read_text()

    def thaw(self) -> None:
        """Let it run."""
        if self._v1:
            (self._v1 / "freezer.state").write_text("THAWED")
        else:
            (self.directory / "cgroup.freeze").write_text("0")


class TwinDumper(Dumper):
    """Freezes the cgroup just before a dump, when it is told to, and leaves it frozen."""

    freezer: Freezer | None = None

    async def dump(self, directory: Path, at_post_dump: object = None) -> Dumped:
        """See `Dumper.dump`."""
        if self.freezer is not None:
            await self.freezer.freeze()
        return await super().dump(directory, at_post_dump)  # type: ignore[arg-type]


class Unwatched:
    """No keeper: nothing is killed in this campaign."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """See `FreezeGuard`."""

    async def end(self, criu_pid: int) -> None:
        """See `FreezeGuard`."""


class Subject:
    """The program in its container, and the two backends."""

    def __init__(
        self, config: NodeConfig, spec: WorkloadSpec, init_pid: int, tracker: TrackerName | None
    ) -> None:
        self.config, self.spec = config, spec
        self.directory = Path(config.node.state_dir).parent
        self.freezer = Freezer(config)
        hasher = PageHasher()

        def dumper(*, with_shim: bool) -> TwinDumper:
            return TwinDumper(
                config,
                spec,
                init_pid=init_pid,
                criu=locate_criu(None),
                guard=Unwatched(),
                with_shim=with_shim,
            )

        self._fast_dumper, self._stock_dumper = dumper(with_shim=True), dumper(with_shim=False)
        self.fast = FastBackend(
            config, self._fast_dumper, workload=NAME, incarnation="first", hasher=hasher, tracker=tracker
        )
        self.stock = StockBackend(self._stock_dumper, workload=NAME, incarnation="first", hasher=hasher)

    async def compare(self, epoch: EpochId, since: EpochId | None) -> tuple[CapturedEpoch, list[str], int]:
        """Take one instant with both backends; return the fast one's epoch, what differs, pages compared."""
        self._fast_dumper.freezer = self.freezer
        self._fast_dumper.freeze_cgroup = self._stock_dumper.freeze_cgroup = self.freezer.directory
        try:
            captured = await self.fast.capture(epoch, since)
            try:
                twin = await self.stock.capture(epoch_of_twin(epoch))
            except CaptureError:
                # CRIU takes a marker of the tracking for a page, and fails to read it. All is still frozen.
                await self.fast.close()
                twin = await self.stock.capture(epoch_of_twin(epoch, again=True))
        finally:
            self._fast_dumper.freezer = None
            self._fast_dumper.freeze_cgroup = None
            self.freezer.thaw()
        wrong = list(differences(captured, twin))
        pages = sum(len(space.numbers) for space in twin.spaces)
        twin.release()
        return captured, wrong, pages

    async def close(self) -> None:
        """Let go of the workload."""
        await self.fast.close()
        await self.stock.close()


def epoch_of_twin(epoch: EpochId, *, again: bool = False) -> EpochId:
    """Name the twin: of another term, so that their images do not meet."""
    return EpochId(epoch.term + (2000 if again else 1000), epoch.epoch)


class Replica:
    """A real store that takes epochs as a replica does, but for the wire."""

    def __init__(self, directory: Path, config: NodeConfig, spec: WorkloadSpec) -> None:
        self.store = EpochStore.open(directory, NAME, min_free_bytes=0, max_levels=8)
        guard = TermGuard(lambda workload, leadership: None)
        guard.advance(NAME, 1, "a")
        self._assembly = Assembly(NAME, "a", 1, self.store, guard, most_memory_bytes=1 << 33)
        self._held: Held | None = None
        self._buffer = bytearray(BULK_BYTES)

    @property
    def holds(self) -> EpochId | None:
        """What it stands on."""
        return self._held.id if self._held else None

    def take(self, epoch: CapturedEpoch) -> None:
        """Commit an epoch; raises AssertionError if it is not committed. Blocking."""
        for frames in epoch_messages(epoch, 1, self._held, None, self._buffer):
            message, bulk = decode([bytes(frame) for frame in frames])
            outcome = self._assembly.take(message, bulk, frames)
        if not isinstance(outcome, Committed):
            raise AssertionError(f"epoch {epoch.id} was answered by {outcome}")
        self._held = Held.of(epoch)
        while self.store.fold_due():
            self.store.fold()


def differences(ours: CapturedEpoch, theirs: CapturedEpoch) -> Iterator[str]:
    """Say in what two epochs of one instant differ, page for page."""
    mine = {space.key: space for space in ours.spaces}
    twin = {space.key: space for space in theirs.spaces}
    for key in mine.keys() ^ twin.keys():
        yield f"{key.pagemap_name}: only {'we' if key in mine else 'CRIU'} captured it"
    for key in mine.keys() & twin.keys():
        one, other = mine[key], twin[key]
        # CRIU without PAGEMAP_SCAN takes the huge page of zeros for content; restored, it is the same.
        zeros = (other.identity == 0).all(axis=1) & ((other.flags & PE_LAZY) != 0)
        lost = np.setdiff1d(other.numbers[~zeros], one.numbers)
        more = np.setdiff1d(one.numbers, other.numbers)
        for what, numbers in (("missing", lost), ("not in CRIU's image", more)):
            if len(numbers):
                first = int(numbers[0]) << 12
                yield f"{key.pagemap_name}: {len(numbers)} pages {what}, the first at {first:#x}"
        _, here, there = np.intersect1d(one.numbers, other.numbers, return_indices=True)
        stale = (one.identity[here] != other.identity[there]).any(axis=1)
        if stale.any():
            first = int(one.numbers[here[stale][0]]) << 12
            yield f"{key.pagemap_name}: {int(stale.sum())} pages hold something else, the first at {first:#x}"


async def run_seed(
    seed: int,
    epochs: int,
    every: int,
    *,
    options: tuple[str, ...] = (),
    restores: bool = False,
    tracker: TrackerName | None = None,
    check_every: int = 50,
    talk: bool = False,
) -> Run:
    """Capture so many epochs of one program."""
    if restores:
        options = (*options, "--no-file-changes")
    chance = random.Random(seed)
    wrong: list[str] = []
    compared = pages = refused = checks = steps = restored = stops = 0
    freezes: list[float] = []
    missing: list[str] = []
    async with running(seed, options, tracker) as (subject, port):
        replica = Replica(subject.directory / "store", subject.config, subject.spec)
        number = 0
        while number < epochs and refused < 5 * epochs and not wrong:
            epoch = EpochId(1, number + refused + 1)
            try:
                if chance.randrange(every) == 0:
                    captured, found, size = await subject.compare(epoch, replica.holds)
                    compared, pages = compared + 1, pages + size
                    wrong += [f"epoch {number + 1}: {each}" for each in found]
                else:
                    captured = await subject.fast.capture(epoch, replica.holds)
            except CaptureError as error:
                refused += 1
                if talk:
                    print(f"seed {seed}, epoch {number + 1}: {error}", file=sys.stderr)
                await asyncio.sleep(0.05)
                continue
            number += 1
            freezes.append(captured.freeze.total_ms)
            stops += captured.freeze.ahead_ms > 0
            # A slow replica takes only some of them.
            if chance.randrange(3) or number % check_every == 0:
                try:
                    await asyncio.to_thread(replica.take, captured)
                except (CaptureError, AssertionError) as error:
                    wrong.append(f"epoch {number}: {error}")
            captured.release()
            if talk and number % 10 == 0:
                print(f"seed {seed}: {number}/{epochs}, {compared} compared", file=sys.stderr)
            if number % check_every == 0:
                answer = await asyncio.to_thread(ask, port, "check")
                checks += 1
                steps, missing = answer["steps"], answer["missing"]
                if not answer["ok"]:
                    wrong.append(f"epoch {number}: it finds itself damaged: {answer['error']}")
                if restores and not wrong:
                    newest = replica.store.records()[-1]
                    found = await restored_elsewhere(subject, newest.path, newest.id, port)
                    restored += 1
                    wrong += [f"epoch {number}, restored: {found}"] if found else []
            await asyncio.sleep(chance.uniform(0.0, 0.1))
        replica.store.close()
    return Run(
        seed=seed,
        epochs=number,
        compared=compared,
        pages_compared=pages,
        refused=refused,
        checks=checks,
        restored=restored,
        steps=steps,
        wrong=tuple(wrong),
        untouched=tuple(sorted(missing)),
        freeze_p50_ms=float(np.median(freezes)) if freezes else 0.0,
        stops=stops,
    )


async def restored_elsewhere(subject: Subject, images: Path, epoch: EpochId, port: int) -> str:
    """Restore images in a network namespace of their own and ask the program; return what is wrong."""
    space = f"oracle-{os.getpid()}"
    node = subject.config.node
    other = msgspec.structs.replace(
        subject.config,
        node=msgspec.structs.replace(
            node,
            state_dir=f"{node.state_dir}-restored",
            run_dir=f"{node.run_dir}-restored",
            cgroup_parent=f"{node.cgroup_parent}-restored",
        ),
    )
    work = msgspec.json.encode((other, subject.spec, str(images), epoch, port)).decode()
    await _run("ip", "netns", "add", space)
    try:
        await _run("ip", "-n", space, "link", "set", "lo", "up")
        here = (f"--net=/run/netns/{space}", sys.executable, "-m", "tests.campaigns.oracle", "--revive", work)
        return await _run("nsenter", *here)
    finally:
        await _run("ip", "netns", "delete", space)


async def _run(*command: str) -> str:
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{command[0]} failed: {done.stderr.strip()[-500:]}"
    return done.stdout.strip()


async def _revive(work: str) -> str:
    """Restore, ask, kill: in the network namespace that this process is in."""
    config, spec, images, epoch, port = msgspec.json.decode(
        work, type=tuple[NodeConfig, WorkloadSpec, str, EpochId, int]
    )
    try:
        await restore_workload(config, spec, Path(images), epoch, locate_criu(None))
        answer = await asyncio.to_thread(ask, port, "check")
        return "" if answer["ok"] else str(answer["error"])
    except (OutliveError, OSError, EOFError) as error:
        return f"it does not come to life: {error}"
    finally:
        await kill_workload(config, NAME)
        _remove_cgroups(config)


def _remove_cgroups(config: NodeConfig) -> None:
    for group in cgroup_directories(config.node.cgroup_parent):
        for each in (*group.glob("*/"), group):
            with contextlib.suppress(OSError):
                each.rmdir()


@contextlib.asynccontextmanager
async def running(
    seed: int, options: tuple[str, ...], tracker: TrackerName | None
) -> AsyncIterator[tuple[Subject, int]]:
    """Run the program in a container; nothing of it is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="outlive-oracle-"))
    images = Path(tempfile.mkdtemp(prefix="outlive-oracle-", dir="/dev/shm"))
    config = NodeConfig(
        node=Node(
            name="n0",
            address="127.0.0.1",
            state_dir=str(directory / "state"),
            run_dir=str(directory / "run"),
            image_dir=str(images),
            cgroup_parent=f"/outlive/oracle-{os.getpid()}-{seed}",
        )
    )
    scratch = directory / "scratch"
    scratch.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    words = ("--seed", str(seed), "--scratch", str(scratch), "--port", str(port), "--memory-mib", "48")
    spec = WorkloadSpec(
        name=NAME,
        nodes=("n0",),
        command=(str(build(directory / "program")), *words, *options),
        # The kernel writes a number into registered memory whenever a thread changes processors, also while
        # CRIU has it run a call between the two dumps: without it, both must be equal to the last byte.
        environment={"GLIBC_TUNABLES": "glibc.pthread.rseq=0"},
        freeze_deadline_ms=10_000,
    )
    try:
        init_pid = await start_workload(config, spec)
        (images / NAME).mkdir(mode=0o700)
        for _ in range(200):
            try:
                await asyncio.to_thread(ask, port, "counters")
                break
            except OSError:
                await asyncio.sleep(0.05)
        subject = Subject(config, spec, init_pid, tracker)
        try:
            yield subject, port
        finally:
            subject.freezer.thaw()
            await subject.close()
    finally:
        await kill_workload(config, NAME)
        _remove_cgroups(config)
        rootfs = WorkloadPaths(config, NAME).rootfs
        await asyncio.to_thread(
            subprocess.run, ["umount", "--recursive", str(rootfs)], capture_output=True, check=False
        )
        shutil.rmtree(images, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


async def run_campaign(
    first_seed: int, seeds: int, epochs: int, every: int, tracker: TrackerName, *, talk: bool
) -> Report:
    """Run seed after seed; of every two, one has its images restored."""
    started_s = time.monotonic()
    runs = [
        await run_seed(first_seed + each, epochs, every, restores=each % 2 == 0, tracker=tracker, talk=talk)
        for each in range(seeds)
    ]
    return Report(
        schema_version=1,
        backend="fast",
        tracker=tracker,
        seconds=round(time.monotonic() - started_s, 1),
        runs=tuple(runs),
    )


def main() -> int:
    """Read the command line, run, print one JSON object; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=700, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--every", type=int, default=4, help="one epoch of so many is compared")
    parser.add_argument("--tracker", choices=get_args(TrackerName), help="else the best that works here")
    parser.add_argument("--revive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure_logs("warning")
    if options.revive:
        print(asyncio.run(_revive(options.revive)))
        return 0
    print(f"seed {options.seed}", file=sys.stderr)
    tracker = options.tracker or choose("auto").name
    if tracker is None:
        parser.error(choose("auto").reason)
    report = asyncio.run(
        run_campaign(options.seed, options.seeds, options.epochs, options.every, tracker, talk=True)
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
