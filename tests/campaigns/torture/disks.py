"""The store on real disks: a process that is killed, and a file system that loses its power.

A child goes through a history until operation n. There it says what it knows to have been acknowledged, and
either sends itself SIGKILL, or shuts the file system down: the kernel drops everything that is not on the
disk, its log included. Mounted again, the file system recovers as after a power loss, and the store must too.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from common.durable import RealDisk
from tests.campaigns.torture.cases import Case, Part, Scale, chance_of, rows, skipped
from tests.campaigns.torture.own_mounts import with_own_mounts
from tests.unit.store_disks import STOP, FaultyDisk
from tests.unit.store_histories import Run, check_recovered, check_unopened, operations, random_steps

# _IOR('X', 125, __u32), linux/fs/xfs/libxfs/xfs_fs.h; ext4 takes the same. 2: without flushing the log.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2
_IMAGE_BYTES = 320 << 20  # mkfs.xfs makes none of less than 300 MiB
FILE_SYSTEMS = ("ext4", "xfs")


class CannotMountError(Exception):
    """There is no such file system to be had here; says why."""


class Place(Protocol):
    """Where a store lies that is about to be cut off."""

    @property
    def directory(self) -> Path:
        """The directory of the store."""
        ...

    def cut(self) -> None:
        """Let the machine end, in the child; need not return."""
        ...

    def come_back(self) -> None:
        """Start the machine again, in the parent."""
        ...

    def clear(self) -> None:
        """Remove the store, for good."""
        ...


class Killed:
    """The process ends, the machine lives on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "store"

    def cut(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def come_back(self) -> None:
        pass

    def clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # it may have ended before it was made


class Mounted:
    """A file system on a loop device, in a file that lies in memory."""

    def __init__(self, kind: str, room: Path) -> None:
        self._kind = kind
        self._image = room / "image"
        self._point = room / "mounted"
        self._is_mounted = False  # what is shut down does not answer when it is asked

    @property
    def directory(self) -> Path:
        return self._point / "store"

    def make(self) -> None:
        self._point.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _run(f"mkfs.{self._kind}", "-q", str(self._image))
        self.mount()

    def mount(self) -> None:
        # `mount` takes a free loop device, which is given back when it is unmounted.
        _run("mount", "-o", "loop,nodev,nosuid", "-t", self._kind, str(self._image), str(self._point))
        self._is_mounted = True

    def unmount(self) -> None:
        if self._is_mounted:
            _run("umount", str(self._point))
            self._is_mounted = False

    def cut(self) -> None:
        point = os.open(self._point, os.O_RDONLY)
        fcntl.ioctl(point, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))

    def come_back(self) -> None:
        self.unmount()
        self.mount()

    def clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # it may have ended before it was made
        # Else the next loss of power brings this store back.
        RealDisk().sync_dir(self._point, op="clear")


@contextmanager
def mounted(kind: str) -> Iterator[Mounted]:
    """Make and mount an empty file system; it is gone afterwards. Raises CannotMountError."""
    if os.geteuid() != 0:
        raise CannotMountError("mounting needs root")
    if shutil.which(f"mkfs.{kind}") is None:
        raise CannotMountError(f"there is no mkfs.{kind} here")
    memory = Path("/dev/shm")
    room = Path(tempfile.mkdtemp(prefix="outlive-torture-disk-", dir=memory if memory.is_dir() else None))
    place = Mounted(kind, room)
    try:
        try:
            place.make()
        except subprocess.CalledProcessError as error:
            raise CannotMountError(f"{error.cmd[0]}: {error.stderr.strip()}") from error
        yield place
    finally:
        place.unmount()
        shutil.rmtree(room)


@with_own_mounts
def disks(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    parts = rows(killed_cases(seed, scale))
    for kind in FILE_SYSTEMS:
        name = f"power loss on {kind}"
        try:
            with mounted(kind) as place:
                parts += rows(power_cases(seed, scale, place, name))
        except CannotMountError as error:
            parts.append(skipped(name, str(error)))
    return parts


def killed_cases(seed: int, scale: Scale) -> Iterator[Case]:
    """SIGKILL at every label, some of them more than once, on the file system of the temporary files."""

    def case(steps: list[Any], n: int) -> Callable[[Path], None]:
        def run(_: Path) -> None:
            # Not in memory: syncs and the page cache are part of it.
            with tempfile.TemporaryDirectory(prefix="outlive-torture-") as directory:
                _check(Killed(Path(directory)), steps, n)

        return run

    return _cases(seed, scale.of(0, 3, 8), "SIGKILL", case)


def power_cases(seed: int, scale: Scale, place: Place, name: str) -> Iterator[Case]:
    """Loss of power at every label, some of them more than once, on a file system that is made new once."""

    def case(steps: list[Any], n: int) -> Callable[[Path], None]:
        def run(_: Path) -> None:
            try:
                _check(place, steps, n)
            finally:
                place.clear()

        return run

    return _cases(seed, scale.of(0, 3, 8), name, case)


def _cases(
    seed: int, more: int, name: str, case: Callable[[list[Any], int], Callable[[Path], None]]
) -> Iterator[Case]:
    """One case for each label of a history, and `more` at random places for each."""
    steps = random_steps(chance_of(seed), epochs=6)
    ops = operations(steps)
    for n in chosen_places(ops, more, seed):
        yield Case(name, f"history {seed}, operation {n} ({ops[n]})", case(steps, n))


def chosen_places(ops: list[str], more: int, seed: object) -> list[int]:
    """Choose one operation of each label, and `more` others for each of these."""
    chance = chance_of("places", seed)
    by_label: dict[str, list[int]] = {}
    for place, op in enumerate(ops):
        by_label.setdefault(op, []).append(place)
    chosen: set[int] = set()
    for places in by_label.values():
        chosen.update(chance.sample(places, min(len(places), 1 + more)))
    return sorted(chosen)


def _check(place: Place, steps: list[Any], n: int) -> None:
    run = cut_off(place, Run(steps), n)
    check_unopened(place.directory, run)
    check_recovered(place.directory, run, RealDisk())


def cut_off(place: Place, run: Run, n: int) -> Run:
    """Go through a history in a child until operation n; returns what the child knew, with the machine back.

    The child is forked: it has all modules already, so that it starts within milliseconds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _live(place, run, n, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with ExitStack() as after:
        after.callback(place.come_back)
        after.callback(os.waitpid, child, 0)
        with os.fdopen(reading, "rb") as told:
            knew = told.read()
    if not knew:
        raise RuntimeError(f"the child ended before operation {n}")
    run.contents, run.held, run.possible, run.gone = pickle.loads(knew)  # noqa: S301 - our own child
    return run


def _live(place: Place, run: Run, n: int, writing: int) -> None:
    def stop() -> None:
        with os.fdopen(writing, "wb") as told:
            pickle.dump((run.contents, run.held, run.possible, run.gone), told)
        place.cut()
        os._exit(0)

    run.go(place.directory, FaultyDisk({n: STOP}, real=RealDisk(), stop=stop))
    stop()  # what was sampled was a longer run: the end is as good a place


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
