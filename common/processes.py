"""Ending processes of this node for certain: who holds a socket, who started whom, that they are gone.

In: the path of a unix socket, or a test of a command line. Out: PIDs, or processes that have ended. All is
read from /proc, so it works on what hangs, and on what was stopped. Needs root.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from common.errors import WorkloadError

_STOP_S = 1.0
"""A process that is not stopped by then is in the kernel, and is killed without that."""
_POLL_S = 0.002


def holders(path: str) -> list[int]:
    """Return the processes that hold a unix socket bound to `path`, whatever their network namespace."""
    tables: dict[str, set[str]] = {}
    found = []
    for pid in _pids():
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/net")
            if namespace not in tables:
                tables[namespace] = _bound_to(path, Path(f"/proc/{pid}/net/unix").read_text())
            if tables[namespace] and any(_descriptor(pid, each) in tables[namespace] for each in _fds(pid)):
                found.append(pid)
    return found


def matching(wanted: Callable[[Sequence[str]], bool]) -> list[int]:
    """Return the processes with such a command line, this one not among them."""
    found = []
    for pid in _pids():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if pid != os.getpid() and wanted(words):
                found.append(pid)
    return found


def end(pid: int, deadline_s: float, with_children: bool = False, spare: Sequence[int] = ()) -> None:
    """Kill a process and wait until it is gone; with all that it has started and that has it for an ancestor.

    Not those to `spare`.

    It is stopped first, so that it starts nothing meanwhile. A thread that waits for its child to become
    another program cannot be stopped before it has, so whatever it began to start is a program by then.
    Blocking. Raises WorkloadError if something is still there after `deadline_s`.
    """
    with ExitStack() as held:
        first = _hold(held, pid)
        if first is None:
            return
        _signal(first, signal.SIGSTOP)
        _wait_until_stopped(pid)
        doomed = [child for child in _descendants(pid) if child not in spare] if with_children else []
        children = [_hold(held, child) for child in doomed]
        ending = [pidfd for pidfd in (*children, first) if pidfd is not None]
        for pidfd in ending:
            _signal(pidfd, signal.SIGKILL)
        until_s = time.monotonic() + deadline_s
        for pidfd in ending:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(max(0.0, until_s - time.monotonic()) * 1000):
                raise WorkloadError(
                    f"process {pid}, or what it has started, is still there {deadline_s:g} s after SIGKILL",
                    hint="a process in state D waits for its device: power the node off",
                )


def _hold(held: ExitStack, pid: int) -> int | None:
    """Return a pidfd, which is no other's when the number is used again; None if the process is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    held.callback(os.close, pidfd)
    return pidfd


def _wait_until_stopped(pid: int) -> None:
    until_s = time.monotonic() + _STOP_S
    while time.monotonic() < until_s:
        states = set()
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                states.add(_status(Path(f"/proc/{pid}/task/{task}/stat"))[0])
        if states <= {"T", "t", "Z", "X"}:
            return
        time.sleep(_POLL_S)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for each in _pids():
        with suppress(OSError):
            parents[each] = int(_status(Path(f"/proc/{each}/stat"))[1])
    found: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for child, parent in parents.items() if parent in generation]
        found += generation
    return found


def _status(path: Path) -> list[str]:
    """Return the state of a process or thread, its parent, and the rest of its stat file."""
    return path.read_text().rpartition(")")[2].split()


def _bound_to(path: str, table: str) -> set[str]:
    rows = (line.split(maxsplit=7) for line in table.splitlines()[1:])
    return {f"socket:[{row[6]}]" for row in rows if len(row) == 8 and row[7] == path}


def _fds(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/fd")


def _descriptor(pid: int, number: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""  # closed meanwhile


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _signal(pidfd: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
