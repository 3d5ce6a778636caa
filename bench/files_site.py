"""Where files are captured and where they go: two file systems, and a process in a container between them.

In: a kind of file system, what is to be in it. Out: a `Site`: a running process whose declared directory lies
on one file system, and another one for the replica and for rsync, so that nobody watches these.

Both are loop devices on files below /var/tmp, mounted where nobody else sees them (`own_mounts`): else every
mount namespace that is made meanwhile would hold them. All is gone when `running_site` is left, whatever the
reason. A SIGKILL of the benchmark leaves its directory, which is locked as long as it runs, and the
container, which keeps the mounts: `clear_leftovers` ends and removes what nobody has locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from bench.compiled import compile_program
from bench.target import WORKLOAD, Board, board_address
from common.bundle import WorkloadPaths, file_roots
from common.config import Node, NodeConfig
from common.container import cgroup_directories, kill_workload, start_workload
from common.errors import LabError
from common.model import FilePath, WorkloadSpec
from common.threads import in_thread
from outlive.lab_reaper import clear_directory, remove_cgroups, unmount_below
from outlive.lab_state import run

FileSystem = Literal["xfs", "ext4", "btrfs"]
Kind = Literal["small", "large", "log"]
"""As `bench/files_target.c` has them."""

_BASE: Final = Path("/var/tmp")  # noqa: S108 - not a tmpfs, and a container sees it
_PREFIX: Final = "outlive-bench-files-"
_CHANGE, _PRETEND = 0, 1
_CLONE_NEWNS: Final = 0x20000
"""From <linux/sched.h>."""
_LEAST_BYTES: Final = 512 << 20
"""mkfs.xfs makes nothing smaller than 300 MiB."""
_FREEZE_DEADLINE_MS: Final = 60_000
_MAKE_S: Final = 600.0
_GONE_S: Final = 60.0
"""A killed rsync of a whole file may end that late."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is in the declared directory."""

    kind: Kind
    size: int
    """Files, or MiB."""

    @property
    def files(self) -> int:
        """How many there are."""
        return self.size if self.kind == "small" else 1

    @property
    def size_bytes(self) -> int:
        """Of all files together, as they are made."""
        return self.size * 4096 if self.kind == "small" else self.size << 20


@dataclass(frozen=True, slots=True)
class Site:
    """A running process with files, and room for copies of them."""

    config: NodeConfig
    spec: WorkloadSpec
    pid: int
    board: Board
    source: Path
    """The declared directory, as the node has it."""
    replica: Path
    """Another file system, empty."""

    @property
    def roots(self) -> dict[bytes, Path]:
        """As `FileCapture` takes them."""
        return file_roots(self.spec, WorkloadPaths(self.config, self.spec.name))

    @property
    def images(self) -> Path:
        """The tmpfs for captured pages."""
        return Path(self.config.node.image_dir) / WORKLOAD

    async def change(self, number: int, *, pretend: bool = False) -> None:
        """Have the process change so many files, blocks or KiB; or do all else that this takes."""
        await self.board.perform(_PRETEND if pretend else _CHANGE, number)


def own_mounts() -> None:
    """Let nobody else see what this process and its children mount. To be called before any thread is begun.

    Raises LabError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise LabError(
            f"no mounts of our own: {os.strerror(ctypes.get_errno())}", hint="bench.files needs root"
        )
    run("mount", "--make-rprivate", "/")


async def clear_leftovers() -> None:
    """Remove what killed runs left. Raises LabError if something resists."""
    for directory in sorted(_BASE.glob(f"{_PREFIX}*")):
        with _locked(directory) as ours:
            if ours:
                await _remove(directory)


@contextlib.asynccontextmanager
async def running_site(file_system: FileSystem, content: Content) -> AsyncIterator[Site]:
    """Make both file systems and start a process that fills one. Raises LabError and WorkloadError."""
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_BASE))
    board: Board | None = None
    with _locked(directory):
        try:
            config = _config(directory)
            directory.chmod(0o755)
            program = await in_thread(compile_program, "files_target", directory)
            source = await in_thread(_mount, directory, "source", file_system, content, 1)
            replica = await in_thread(_mount, directory, "replica", file_system, content, 4)
            images = directory / "images"
            images.mkdir(mode=0o700)
            await in_thread(run, "mount", "-t", "tmpfs", "-o", "mode=700,size=90%", "outlive-bench", images)
            (images / WORKLOAD).mkdir(mode=0o700)
            declared = directory / "declared"
            declared.mkdir()
            spec = WorkloadSpec(
                name=WORKLOAD,
                nodes=("a",),
                command=(str(program), str(declared), content.kind, str(content.size)),
                files=(FilePath(path=str(declared), source=str(source / "data")),),
                freeze_deadline_ms=_FREEZE_DEADLINE_MS,
            )
            pid = await start_workload(config, spec)
            async with asyncio.timeout(_MAKE_S):
                board = Board(pid, await board_address(config))
                while not board.ready:  # noqa: ASYNC110 - a word in its memory
                    await asyncio.sleep(0.01)
            yield Site(config, spec, pid, board, source / "data", replica)
        finally:
            if board is not None:
                board.close()
            await _remove(directory)


def _config(directory: Path) -> NodeConfig:
    """Return the configuration of a node all of whose things lie in a directory, and are called after it."""
    return NodeConfig(
        node=Node(
            name="a",
            address="127.0.0.1",
            state_dir=str(directory / "state"),
            run_dir=str(directory / "run"),
            image_dir=str(directory / "images"),
            cgroup_parent=f"/outlive/{directory.name}",
        )
    )


def _mount(directory: Path, name: str, file_system: FileSystem, content: Content, copies: int) -> Path:
    """Make a file system with room for some copies, all of whose space is taken only as it is used."""
    image, point = directory / f"{name}.img", directory / name
    with image.open("wb") as file:
        file.truncate(_LEAST_BYTES + content.size_bytes * (copies + 1))
    if file_system == "xfs":
        run("mkfs.xfs", "-q", "-K", image)
    elif file_system == "btrfs":
        run("mkfs.btrfs", "-q", "-K", image)
    else:
        inodes = str(4096 + content.files * (copies + 1))
        now = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"  # not while it is measured
        run("mkfs.ext4", "-q", "-N", inodes, "-E", now, image)
    point.mkdir()
    # Else all would be in the page cache twice.
    device = run("losetup", "--find", "--show", "--direct-io=on", image).stdout.strip()
    try:
        run("mount", device, point)
    finally:
        run("losetup", "--detach", device)  # as soon as it is unmounted
    return point


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory for as long as this process lives or the block lasts; False: somebody else has."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


async def _remove(directory: Path) -> None:
    """Take down the container, the mounts, the loop devices and the directory, as far as they are there."""
    config = _config(directory)
    await kill_workload(config, WORKLOAD)
    shim = WorkloadPaths(config, WORKLOAD).shim_pid_file
    deadline_s = time.monotonic() + _GONE_S
    while _runs(shim) and time.monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await in_thread(remove_cgroups, tuple(cgroup_directories(config.node.cgroup_parent)))
    await in_thread(unmount_below, directory)
    while devices := _loop_devices(directory):
        if time.monotonic() > deadline_s:
            raise LabError(f"{', '.join(devices)} stay in use", hint=f"who has files open below {directory}?")
        await in_thread(_detach, devices)
        await asyncio.sleep(0.02)
    await in_thread(clear_directory, directory)  # refuses to go beyond a mount that is still there
    directory.rmdir()


def _detach(devices: list[str]) -> None:
    """Let go of loop devices: at once if nothing is mounted, else when it is unmounted."""
    for device in devices:
        run("losetup", "--detach", device, check=False)


def _loop_devices(directory: Path) -> list[str]:
    """Return the loop devices whose files lie in a directory, whoever has them mounted."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it is being let go of
            if Path(file.read_text().strip()).is_relative_to(directory):
                found.append(f"/dev/{file.parent.parent.name}")
    return found


def _runs(pid_file: Path) -> bool:
    """Tell whether the container's shim has not ended yet."""
    try:
        pid = int(pid_file.read_text())
        return Path(f"/proc/{pid}/comm").read_text().strip() == "conmon"
    except (OSError, ValueError):
        return False
