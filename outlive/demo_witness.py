"""What can be seen of a demonstrated workload from outside: that it ended and how, that it was restored.

In: a node of the lab. Out: sentences for people, each resting on what the kernel or the workload's own log
says. Nothing here asks the workload anything, because nobody knows what a program of the user's own answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.bundle import WorkloadPaths
from common.container import exit_code, incarnation, running_init_pid
from common.control import WorkloadStatus
from common.criu.images import VMA_FILE_PRIVATE, MemoryMap, read_memory_map
from common.errors import LabError
from common.model import EpochId
from outlive.cluster import Node
from outlive.demo_sqlite import problems
from outlive.lab import Host
from outlive.lab_state import started_ticks

WATCH_S = 3.0
"""How long a restored workload must stay before it counts as running."""

_POLL_S = 0.1
_LAST_LINES = 5
_LOG_TAIL_BYTES = 16 * 1024
_RUNC_MESSAGE = re.compile(r'msg=("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True, slots=True)
class Sighting:
    """What was seen of a restored workload: what was checked and holds, and what is wrong."""

    checked: tuple[str, ...]
    problems: tuple[str, ...]

    def and_also(self, other: Sighting) -> Sighting:
        """Return what was seen in both."""
        return Sighting((*self.checked, *other.checked), (*self.problems, *other.problems))


async def watch(node: Node, name: str, epoch: EpochId, images: Path) -> Sighting:
    """Look whether what runs on `node` is the process of `epoch`, and whether it stays for `WATCH_S`."""
    where = node.name.upper()
    pid = running_init_pid(node.config, name)
    ticks = started_ticks(pid) if pid is not None else None
    run = incarnation(node.config, name)
    if pid is None or ticks is None:
        return Sighting((), (ended(node, name),))
    if run is None or run.restored != epoch:
        return Sighting((), (f"what runs on {where} does not come from epoch {epoch}",))
    if Path(f"/proc/{pid}/ns/net").stat().st_ino != node.host.netns.stat().st_ino:
        return Sighting((), (f"process {pid} is not on host {where}",))
    moved = moved_code(read_memory_map(images / "mm-1.img"), Path(f"/proc/{pid}/maps").read_text())
    if moved:
        return Sighting((), (f"process {pid} has no code at {moved[0]:#x}, where epoch {epoch} has some",))
    until_s = time.monotonic() + WATCH_S
    while time.monotonic() < until_s:
        if running_init_pid(node.config, name) != pid or started_ticks(pid) != ticks:
            return Sighting((), (ended(node, name),))
        await asyncio.sleep(_POLL_S)
    return Sighting(
        (
            f"its first process was restored on host {where} from epoch {epoch} (PID {pid})",
            "its program and libraries lie at the addresses of that epoch, which a fresh start draws anew",
            f"it ran on for {WATCH_S:.0f} s",
        ),
        (),
    )


async def check_sqlite(client: Host, ask: Sequence[str], database: Path) -> Sighting:
    """Have the server check its database, and a fresh SQLite the files of it."""
    answer = (await client.run(ask, check=False, timeout_s=60.0)).stdout.strip()
    if answer != "ok":
        return Sighting((), (f"the server finds its database damaged: {answer or 'it does not answer'}",))
    found = await asyncio.to_thread(_check_copy, database)
    if found != "ok":
        return Sighting((), (f"the files of the database are damaged: {found}",))
    return Sighting(("the server and, from its files alone, a fresh SQLite find the database whole",), ())


def _check_copy(database: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="outlive-demo-") as directory:
        for path in database.parent.glob(f"{database.name}*"):
            if not path.name.endswith("-shm"):  # it is an index of the log, for those who have it open
                shutil.copy(path, directory)
        try:
            with contextlib.closing(sqlite3.connect(Path(directory) / database.name)) as connection:
                return problems(connection)
        except sqlite3.Error as error:
            return str(error)


async def check_redis_log(client: Host, directory: Path) -> Sighting:
    """Have redis's own tool check the files of its append-only log."""
    manifest = next(directory.glob("*.manifest"), None)
    if manifest is None:
        return Sighting((), (f"{directory} has no append-only log",))
    done = await client.run(["redis-check-aof", str(manifest)], check=False, timeout_s=60.0)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Sighting((), (f"redis-check-aof finds the log damaged: {said[-1] if said else 'no reason'}",))
    return Sighting(("redis-check-aof finds its append-only log whole",), ())


def moved_code(epoch: MemoryMap, maps: str) -> list[int]:
    """Return where the epoch has code from files and the process of `maps` (as in /proc) has none."""
    mapped = [line.split(None, 2)[:2] for line in maps.splitlines()]
    code = {int(area.partition("-")[0], 16) for area, rights in mapped if "x" in rights}
    return [
        vma.start
        for vma in epoch.vmas
        if vma.status & VMA_FILE_PRIVATE and vma.prot & mmap.PROT_EXEC and vma.start not in code
    ]


def has_ended(status: WorkloadStatus) -> bool:
    """Tell whether the workload came up and is gone, or could not be brought up."""
    return not status.running and (status.exit_code is not None or status.state in ("failed", "stopped"))


def never_ran(node: Node, name: str, reason: str) -> LabError:
    """Return the error of a workload that could not be started; `reason` is the node's."""
    return LabError(
        f"host {node.name.upper()}: {_in_short(reason)}{last_words(node, name)}",
        hint="give a program of this machine; what a shell is to read needs `sh -c '…'`",
    )


def ended_early(node: Node, name: str) -> LabError:
    """Return the error of a workload that ended before its host was to be lost."""
    return LabError(
        ended(node, name),
        hint="demonstrate a command that stays in the foreground and runs until it is stopped",
    )


def ended(node: Node, name: str) -> str:
    """Say in a sentence that the workload ended on a node, how, and what it said last."""
    code = exit_code(node.config, name)
    how = "" if code is None else f" with code {code}"
    return f"the workload ended by itself on host {node.name.upper()}{how}{last_words(node, name)}"


def last_words(node: Node, name: str) -> str:
    """Return the last lines of the workload's output, to stand behind a sentence; empty if there are none."""
    try:
        with WorkloadPaths(node.config, name).log.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    # Each line is: time, stream, F or P (a part of a line), text.
    said = [line.split(" ", 3)[3] for line in lines if line.count(" ") >= 3][-_LAST_LINES:]
    return "; it said last:" + "".join(f"\n   | {line}" for line in said) if said else ""


def _in_short(reason: str) -> str:
    """Take out of a reason what runc said, if it said something, and of that the end, which is the cause."""
    found = _RUNC_MESSAGE.search(reason)
    if found is None:
        return reason
    try:
        message = str(json.loads(found[1]))
    except ValueError:
        return reason
    return message.rpartition("container process: ")[2]
