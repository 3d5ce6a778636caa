"""The process that is frozen, in a container as an agent starts it, and its board, read from outside.

In: how much memory, how many processes. Out: a `Target` to dump, which writes pages when told to and says for
how long it stood still. It and all that was made for it are gone when `running_target` is left, whatever the
reason; after a SIGKILL of the benchmark the container and a tmpfs below /var/tmp remain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.compiled import compile_program
from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig
from common.container import cgroup_directories, kill_workload, start_workload, workload_pids
from common.errors import LabError
from common.model import WorkloadSpec
from common.threads import in_thread
from outlive.lab_reaper import clear_directory, remove_cgroups
from outlive.lab_state import run

WORKLOAD = "bench"
PROBE_PAGES = 1024
"""As `bench/freeze_target.c` has it."""

_READY, _ASKED, _DONE, _COMMAND, _PAGES, _RESULT_NS, _PROGRESS, _GAP_COUNT, _GAPS = range(9)
"""Words of the board, 8 bytes each."""
_GAPS_KEPT = 1024
_WRITE_PAGES, _TOUCH_PROBE = 0, 1
_FILL_S_PER_MIB = 0.05
_POLL_S = 0.0005
_PERFORM_S = 60.0
_SHIM_ENDS_S = 5.0
_FREEZE_DEADLINE_MS = 300_000
"""A stock dump of a large process takes long, and is to be measured, not abandoned."""


class Board:
    """What one process of the target shares with us: words at an address of its memory."""

    def __init__(self, pid: int, address: int) -> None:
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._address = address

    @property
    def ready(self) -> bool:
        """Whether its memory is filled."""
        return self._read(_READY) != 0

    @property
    def progress(self) -> int:
        """Pages written so far by a target that writes all the time."""
        return self._read(_PROGRESS)

    async def perform(self, command: int, pages: int = 0) -> int:
        """Have the process do something; return its `result_ns` when it is done."""
        number = self._read(_ASKED) + 1
        self._write(_COMMAND, command)
        self._write(_PAGES, pages)
        self._write(_ASKED, number)
        deadline_s = time.monotonic() + _PERFORM_S
        while self._read(_DONE) != number:
            if time.monotonic() > deadline_s:
                raise LabError(
                    f"the target did not do its work within {_PERFORM_S:.0f} s", hint="is it frozen?"
                )
            await asyncio.sleep(_POLL_S)
        return self._read(_RESULT_NS)

    def longest_gap_ms(self, begun_ns: int, ended_ns: int) -> float:
        """Return the longest time that the ticker stood still, of those that ended within these; 0: none."""
        count = self._read(_GAP_COUNT)
        kept = os.pread(self._memory, 16 * _GAPS_KEPT, self._address + 8 * _GAPS)
        gaps = list(struct.iter_unpack("<QQ", kept))[: min(count, _GAPS_KEPT)]
        return max((length for end, length in gaps if begun_ns <= end <= ended_ns), default=0) / 1e6

    def close(self) -> None:
        """Let go of the process's memory."""
        os.close(self._memory)

    def _read(self, word: int) -> int:
        data = os.pread(self._memory, 8, self._address + 8 * word)
        if len(data) != 8:
            raise LabError("the target has ended")
        return int.from_bytes(data, "little")

    def _write(self, word: int, value: int) -> None:
        os.pwrite(self._memory, value.to_bytes(8, "little"), self._address + 8 * word)


class Target:
    """A running target: what is needed to dump it, and the boards of its processes."""

    def __init__(self, config: NodeConfig, spec: WorkloadSpec, pid: int, boards: list[Board]) -> None:
        self.config = config
        self.spec = spec
        self.pid = pid
        self.boards = boards

    async def write_pages(self, pages: int) -> None:
        """Write so many of its pages, scattered, in equal parts by all processes."""
        share, rest = divmod(pages, len(self.boards))
        async with asyncio.TaskGroup() as tasks:
            for number, board in enumerate(self.boards):
                tasks.create_task(board.perform(_WRITE_PAGES, share + (number < rest)))

    async def touch_probe(self) -> float:
        """Write to each of `PROBE_PAGES` pages once; return ns for each."""
        return await self.boards[0].perform(_TOUCH_PROBE) / PROBE_PAGES

    def images_bytes(self) -> int:
        """Return how much of the tmpfs for images is in use, files without a name included."""
        usage = os.statvfs(self.config.node.image_dir)
        return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


@contextlib.asynccontextmanager
async def running_target(
    *, rss_mib: int, shared_mib: int = 0, processes: int = 1, threads: int = 1
) -> AsyncIterator[Target]:
    """Start a target and wait until its memory is filled. Raises LabError and what a container raises."""
    name = f"bench{os.getpid()}"
    # Not on a /tmp that is a tmpfs: the container sees the machine's root and no other mounts.
    directory = Path(tempfile.mkdtemp(prefix="outlive-bench-", dir="/var/tmp"))
    config = NodeConfig(
        node=Node(
            name="a",
            address="127.0.0.1",
            state_dir=str(directory / "state"),
            run_dir=str(directory / "run"),
            image_dir=str(directory / "images"),
            cgroup_parent=f"/outlive/{name}",
        )
    )
    boards: list[Board] = []
    try:
        directory.chmod(0o755)
        program = await in_thread(compile_program, "freeze_target", directory)
        images = directory / "images"
        images.mkdir(mode=0o700)
        await in_thread(run, "mount", "-t", "tmpfs", "-o", "mode=700,size=90%", "outlive-bench", images)
        (images / WORKLOAD).mkdir(mode=0o700)
        options = ("-m", rss_mib, "-s", shared_mib, "-p", processes, "-t", threads)
        spec = WorkloadSpec(
            name=WORKLOAD,
            nodes=("a",),
            command=(str(program), *map(str, options)),
            freeze_deadline_ms=_FREEZE_DEADLINE_MS,
        )
        pid = await start_workload(config, spec)
        async with asyncio.timeout(30.0 + _FILL_S_PER_MIB * (rss_mib + shared_mib)):
            address = await board_address(config)
            while len(pids := workload_pids(config, WORKLOAD)) < processes:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            boards += [Board(each, address) for each in sorted(pids, key=lambda each: each != pid)]
            while not all(board.ready for board in boards):  # noqa: ASYNC110 - words in their memory
                await asyncio.sleep(0.01)
        yield Target(config, spec, pid, boards)
    finally:
        for board in boards:
            board.close()
        await _remove(config, directory)


async def board_address(config: NodeConfig, workload: str = WORKLOAD) -> int:
    """Wait until the target has printed where its board is."""
    log = WorkloadPaths(config, workload).log
    while True:
        text = log.read_text() if log.exists() else ""
        if "board 0x" in text and text.endswith("\n"):
            return int(text.rpartition("board ")[2].split()[0], 16)
        await asyncio.sleep(0.01)


async def _remove(config: NodeConfig, directory: Path) -> None:
    """Kill the container and take away everything that was made for it."""
    paths = WorkloadPaths(config, WORKLOAD)
    await kill_workload(config, WORKLOAD)
    deadline_s = time.monotonic() + _SHIM_ENDS_S
    while _runs(paths.shim_pid_file) and time.monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    remove_cgroups(tuple(cgroup_directories(config.node.cgroup_parent)))
    if os.path.ismount(config.node.image_dir):
        run("umount", "--lazy", config.node.image_dir)
    clear_directory(directory)  # refuses to go beyond a mount that is still there
    shutil.rmtree(directory)


def _runs(pid_file: Path) -> bool:
    try:
        pid = int(pid_file.read_text())
        return Path(f"/proc/{pid}/comm").read_text().strip() == "conmon"
    except (OSError, ValueError):
        return False
