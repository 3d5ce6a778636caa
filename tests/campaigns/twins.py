"""Two captures of one frozen instant, one by each backend, and in what they differ.

In: a workload in a container. Out: epochs of the fast backend; of some, what an independent dump by stock
CRIU has otherwise; and what comes to life from their images. For that the cgroup is frozen between pre-copy
and dump; the fast backend takes its epoch, and then, still frozen, the stock backend takes its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig
from common.container import (
    cgroup_directories,
    exit_code,
    kill_workload,
    restore_workload,
    start_workload,
    workload_pids,
)
from common.criu.images import SpaceKey, Vma, read_memory_map
from common.criu.locate import locate_criu
from common.errors import CaptureError, OutliveError
from common.identity import PageHasher
from common.messages import BULK_BYTES, decode
from common.model import PAGE_BYTES, EpochId, FilePath, WorkloadSpec
from common.terms import TermGuard
from primary.capture import CapturedEpoch
from primary.dumping import Dumped, Dumper
from primary.file_backend import FrozenHook
from primary.outgoing import Held, epoch_messages
from primary.stock import StockBackend
from primary.tracking import TrackerName
from replica.assembly import Assembly, Committed
from replica.store import EpochStore
from tests.campaigns.reread import RereadingBackend
from tests.oracle.build import ask

NAME = "subject"
_FROZEN_WITHIN_S = 5.0


class Freezer:
    """The freezer of the workload's cgroup."""

    def __init__(self, config: NodeConfig, workload: str) -> None:
        directories = cgroup_directories(WorkloadPaths(config, workload).cgroup)
        self._v1 = next((each for each in directories if (each / "freezer.state").exists()), None)
        self.directory = self._v1 or next(each for each in directories if (each / "cgroup.freeze").exists())

    async def freeze(self) -> None:
        """Freeze, and wait until it is so."""
        if self._v1:
            (self._v1 / "freezer.state").write_text("FROZEN")
        else:
            (self.directory / "cgroup.freeze").write_text("1")
        until_s = time.monotonic() + _FROZEN_WITHIN_S
        while not self.frozen:
            if time.monotonic() > until_s:
                self.thaw()
                raise CaptureError("the cgroup does not freeze")
            await asyncio.sleep(0.001)

    @property
    def frozen(self) -> bool:
        """Whether all of it is."""
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

    async def dump(self, directory: Path, at_post_dump: object = None, meanwhile: object = None) -> Dumped:
        """See `Dumper.dump`."""
        if self.freezer is not None:
            await self.freezer.freeze()
        return await super().dump(directory, at_post_dump, meanwhile)  # type: ignore[arg-type]


class Unwatched:
    """No keeper: nothing is killed in this campaign."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """See `FreezeGuard`."""

    async def end(self, criu_pid: int) -> None:
        """See `FreezeGuard`."""


class Subject:
    """A workload in its container, and the two backends."""

    def __init__(
        self, config: NodeConfig, spec: WorkloadSpec, init_pid: int, tracker: TrackerName | None = None
    ) -> None:
        self.config, self.spec = config, spec
        self.directory = Path(config.node.state_dir).parent
        self.freezer = Freezer(config, spec.name)
        self._init_pid, self._tracker = init_pid, tracker
        self.hook = FrozenHook()
        """What is done in each freeze beside memory."""
        self._start_backends()

    def _start_backends(self) -> None:
        hasher = PageHasher()

        def dumper(*, with_shim: bool) -> TwinDumper:
            return TwinDumper(
                self.config,
                self.spec,
                init_pid=self._init_pid,
                criu=locate_criu(None),
                guard=Unwatched(),
                with_shim=with_shim,
                at_frozen=self.hook,
            )

        self._fast_dumper, self._stock_dumper = dumper(with_shim=True), dumper(with_shim=False)
        self.fast = RereadingBackend(
            self.config,
            self._fast_dumper,
            workload=self.spec.name,
            incarnation="first",
            hasher=hasher,
            tracker=self._tracker,
        )
        self.stock = StockBackend(
            self._stock_dumper, workload=self.spec.name, incarnation="first", hasher=hasher
        )

    async def start_over(self) -> None:
        """Forget everything, as an agent that was killed and started again."""
        await self.close()
        self._start_backends()

    def lose_track(self, chance: random.Random) -> None:
        """End the userfaultfd of a process behind its tracker's back: its descriptor is another file's."""
        watched = getattr(self.fast._tracker, "_watched", {})
        open_ones = [each.userfault for each in watched.values() if each.userfault is not None]
        if open_ones:
            nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(nothing, chance.choice(open_ones)._descriptor, inheritable=False)
            os.close(nothing)

    async def compare(self, epoch: EpochId, since: EpochId | None) -> tuple[CapturedEpoch, list[str], int]:
        """Take one instant with both; return the fast one's epoch, what differs, how many were compared."""
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

    def ending(self) -> str:
        """Say how its program ended, and its last words; empty if it runs."""
        code = exit_code(self.config, self.spec.name)
        if code is None:
            return ""
        log = WorkloadPaths(self.config, self.spec.name).log
        return f"exit code {code}: {log.read_text()[-1500:].strip() if log.exists() else ''}"

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
        self.store = EpochStore.open(directory, spec.name, min_free_bytes=0, max_levels=8)
        guard = TermGuard(lambda workload, leadership: None)
        guard.advance(spec.name, 1, "a")
        self._assembly = Assembly(spec.name, "a", 1, self.store, guard, most_memory_bytes=1 << 33)
        self._held: Held | None = None
        self._buffer = bytearray(BULK_BYTES)

    @property
    def holds(self) -> EpochId | None:
        """What it stands on."""
        return self._held.id if self._held else None

    def distrust(self) -> None:
        """Hold for unknown what it has: another agent's identities say nothing."""
        self._held = None

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
    """Say in what two epochs of one instant differ, page for page.

    A page of zeros in anonymous or shared memory is the same as none: the kernel itself puts some in between
    two captures of frozen memory (khugepaged, where a mapping is not tracked yet), and takes them away.
    """
    mine = {space.key: space for space in ours.spaces}
    twin = {space.key: space for space in theirs.spaces}
    for key in mine.keys() ^ twin.keys():
        yield f"{key.pagemap_name}: only {'we' if key in mine else 'CRIU'} captured it"
    for key in mine.keys() & twin.keys():
        one, other = mine[key], twin[key]
        vmas = _mappings(theirs, key)
        for what, space, numbers in (
            ("missing", other, np.setdiff1d(other.numbers, one.numbers)),
            ("not in CRIU's image", one, np.setdiff1d(one.numbers, other.numbers)),
        ):
            zero = (space.identity[np.searchsorted(space.numbers, numbers)] == 0).all(axis=1)
            nothing = zero & (_within_anonymous(vmas, numbers) if key.kind == "task" else True)
            numbers = numbers[~nothing]
            if len(numbers):
                yield f"{key.pagemap_name}: {len(numbers)} pages {what}, {_told(vmas, int(numbers[0]))}"
        _, here, there = np.intersect1d(one.numbers, other.numbers, return_indices=True)
        stale = (one.identity[here] != other.identity[there]).any(axis=1)
        if stale.any():
            row, twin_row = int(here[stale][0]), int(there[stale][0])
            told = _told(vmas, int(one.numbers[row]))
            bytes_told = _bytes_told(_page(ours, key, row), _page(theirs, key, twin_row))
            yield f"{key.pagemap_name}: {int(stale.sum())} pages hold something else, {told}: {bytes_told}"


def _mappings(epoch: CapturedEpoch, key: SpaceKey) -> tuple[Vma, ...]:
    name = f"mm-{key.ident}.img"
    path = next((file.path for file in epoch.metadata if file.name == name), None)
    return read_memory_map(path).vmas if path and key.kind == "task" else ()


def _within_anonymous(vmas: tuple[Vma, ...], numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
    marks = np.zeros(numbers.shape, dtype=np.bool_)
    for vma in vmas:
        if vma.flags & mmap.MAP_PRIVATE and vma.flags & mmap.MAP_ANONYMOUS:
            bounds = np.array([vma.start, vma.end], dtype=np.uint64) // np.uint64(PAGE_BYTES)
            first, last = np.searchsorted(numbers, bounds)
            marks[first:last] = True
    return marks


def _page(epoch: CapturedEpoch, key: SpaceKey, row: int) -> bytes:
    content = bytearray(PAGE_BYTES)
    try:
        epoch.pages.read(key, np.array([row]), memoryview(content))
    except CaptureError:  # it is in a layer that the replica has already
        return b""
    return bytes(content)


def _bytes_told(ours: bytes, theirs: bytes) -> str:
    at = [offset for offset in range(len(ours)) if ours[offset] != theirs[offset]]
    if not at:
        return "our content is not at hand"
    part = slice(at[0], at[0] + 16)
    return f"{len(at)} bytes from {at[0]:#x} to {at[-1]:#x}: {ours[part].hex()} for {theirs[part].hex()}"


def _told(vmas: tuple[Vma, ...], number: int) -> str:
    address = number * PAGE_BYTES
    for vma in vmas:
        if vma.start <= address < vma.end:
            return f"the first at {address:#x} in {vma.start:#x}-{vma.end:#x} (flags {vma.flags:#x})"
    return f"the first at {address:#x} in no mapping"


@contextlib.asynccontextmanager
async def running_subject(
    command: Callable[[Path], Sequence[str]],
    tracker: TrackerName | None = None,
    *,
    files: tuple[FilePath, ...] = (),
) -> AsyncIterator[Subject]:
    """Run a command in a container; nothing of it is left afterwards.

    It is made with a directory in which it may lie, and of which nothing is left either.
    """
    directory = Path(tempfile.mkdtemp(prefix="outlive-oracle-"))
    images = Path(tempfile.mkdtemp(prefix="outlive-oracle-", dir="/dev/shm"))
    config = NodeConfig(
        node=Node(
            name="n0",
            address="127.0.0.1",
            state_dir=str(directory / "state"),
            run_dir=str(directory / "run"),
            image_dir=str(images),
            cgroup_parent=f"/outlive/{directory.name}",
        )
    )
    try:
        spec = WorkloadSpec(
            name=NAME,
            nodes=("n0",),
            command=tuple(await asyncio.to_thread(command, directory)),
            # The kernel writes a number into registered memory whenever a thread changes processors, also
            # while CRIU has it run a call between the two dumps: without it, both must be equal.
            environment={"GLIBC_TUNABLES": "glibc.pthread.rseq=0"},
            freeze_deadline_ms=10_000,
            files=files,
        )
        init_pid = await start_workload(config, spec)
        (images / NAME).mkdir(mode=0o700)
        subject = Subject(config, spec, init_pid, tracker)
        try:
            yield subject
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


class _Revival(msgspec.Struct, frozen=True):
    config: NodeConfig
    spec: WorkloadSpec
    images: str
    epoch: EpochId
    port: int
    processes: int


async def restored_elsewhere(
    subject: Subject,
    images: Path,
    epoch: EpochId,
    *,
    port: int = 0,
    processes: int = 0,
    files: tuple[FilePath, ...] = (),
) -> str:
    """Restore images in a network namespace of their own; return what is wrong.

    The program of the memory oracle is asked at `port`; of others it is seen whether they are so many
    processes as they were. `files` are its directories there.
    """
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
    spec = msgspec.structs.replace(subject.spec, files=files)
    work = _Revival(other, spec, str(images), epoch, port, processes)
    await _run("ip", "netns", "add", space)
    try:
        await _run("ip", "-n", space, "link", "set", "lo", "up")
        here = (f"--net=/run/netns/{space}", sys.executable, "-m", "tests.campaigns.twins")
        return await _run("nsenter", *here, msgspec.json.encode(work).decode())
    finally:
        await _run("ip", "netns", "delete", space)


async def _run(*command: str) -> str:
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{command[0]} failed: {done.stderr.strip()[-500:]}"
    return done.stdout.strip()


async def _revive(work: _Revival) -> str:
    """Restore, ask, kill: in the network namespace that this process is in."""
    try:
        await restore_workload(work.config, work.spec, Path(work.images), work.epoch, locate_criu(None))
        if work.port:
            answer = await asyncio.to_thread(ask, work.port, "check")
            return "" if answer["ok"] else str(answer["error"])
        count = len(workload_pids(work.config, work.spec.name))
        return "" if count == work.processes else f"{count} processes instead of {work.processes}"
    except (OutliveError, OSError, EOFError) as error:
        return f"it does not come to life: {error}"
    finally:
        await kill_workload(work.config, work.spec.name)
        _remove_cgroups(work.config)


def _remove_cgroups(config: NodeConfig) -> None:
    for group in cgroup_directories(config.node.cgroup_parent):
        for each in (*group.glob("*/"), group):
            with contextlib.suppress(OSError):
                each.rmdir()


if __name__ == "__main__":
    print(asyncio.run(_revive(msgspec.json.decode(sys.argv[1], type=_Revival))))
