"""The thaw deadline: whatever the agent and criu do, no workload stays frozen past it.

In: the announcement of a freeze, before it begins, with criu's PID; its end. Out, if the end does not come:
at the freeze deadline criu is continued (somebody may have stopped it); half a second later it gets
SIGALRM, its own time-out, at which it undoes what it did; half a second after that, at the thaw deadline, it
is killed, for the kernel detaches and continues what a dead tracer held, and the workload's cgroup is thawed.
The agent is not needed for any of it. The workload's own stopped processes are left alone.

Why in steps: a criu that is killed while it has a thread of the workload run a call on borrowed registers
takes that thread, and so the workload, with it (docs/concepts/freeze.md). One that is asked hardly ever does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from common.errors import WorkloadError

log = logging.getLogger(__name__)

THAW_AFTER_S = 1.0
"""Between the freeze deadline, when criu is continued, and the thaw deadline, when it is killed; it is asked
to give up half-way."""
_WATCHED = 1000
"""Announcements at a time; more are the work of an agent gone mad."""
_THAW_AGAIN_S = 0.2
_THAW_TIMES = 5


class FreezeWatch:
    """Holds a pidfd of each announced criu, so that no other process is ever hit in its place."""

    def __init__(self, *, thaw: Callable[[str], None], released: Callable[[str, str], None]) -> None:
        """`thaw(workload)` lifts a freeze of its cgroup; `released(workload, reason)` tells what was done."""
        self._thaw = thaw
        self._released = released
        self._watches: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._draining = False

    def announce(self, workload: str, criu_pid: int, deadline_ms: int) -> None:
        """Watch from now on; returns when criu's identity is held.

        Raises WorkloadError if there is no such process, or it isn't criu: then nothing may be frozen.
        """
        if self._draining:
            raise WorkloadError("this keeper is being stopped and watches no new freeze")
        if len(self._watches) >= _WATCHED:
            raise WorkloadError("too many freezes are announced at once")
        self.end(workload, criu_pid)
        try:
            pidfd = os.pidfd_open(criu_pid)
        except OSError as error:
            raise WorkloadError(f"cannot watch criu (PID {criu_pid}): {error.strerror}") from error
        if not is_criu(criu_pid):  # asked while the pidfd is held: the PID cannot change its meaning now
            os.close(pidfd)
            raise WorkloadError(f"PID {criu_pid} is not criu; a keeper kills nothing else")
        watch = asyncio.create_task(self._watch(workload, criu_pid, pidfd, deadline_ms / 1000))
        self._watches[(workload, criu_pid)] = watch

    def end(self, workload: str, criu_pid: int) -> None:
        """Criu has ended and the workload runs; unknown announcements are ignored."""
        watch = self._watches.pop((workload, criu_pid), None)
        if watch is not None:
            watch.cancel()

    @property
    def watched(self) -> int:
        """How many freezes are announced now."""
        return len(self._watches)

    async def drain(self) -> None:
        """Refuse new announcements; return when every announced freeze has ended, by itself or by force."""
        self._draining = True
        await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def _watch(self, workload: str, criu_pid: int, pidfd: int, deadline_s: float) -> None:
        try:
            await asyncio.sleep(max(0.0, deadline_s - THAW_AFTER_S))
            _signal(pidfd, signal.SIGCONT)
            await asyncio.sleep(min(THAW_AFTER_S, deadline_s) / 2)
            _signal(pidfd, signal.SIGALRM)
            await asyncio.sleep(min(THAW_AFTER_S, deadline_s) / 2)
            lived = _signal(pidfd, signal.SIGKILL)
            for _ in range(_THAW_TIMES):  # until criu is gone it may freeze the cgroup once more
                self._thaw(workload)
                await asyncio.sleep(_THAW_AGAIN_S / _THAW_TIMES)
            what = "criu was killed and" if lived else "criu had ended, and"
            self._released(
                workload, f"{what} its cgroup thawed: no end of the freeze within {deadline_s:g} s"
            )
        finally:
            os.close(pidfd)
            if self._watches.get((workload, criu_pid)) is asyncio.current_task():
                del self._watches[(workload, criu_pid)]


def is_criu(pid: int) -> bool:
    """Tell whether a process is criu: itself, through a loader, or still the script that becomes it."""
    with contextlib.suppress(OSError):
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("criu"):
            return True
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        if comm.startswith("criu"):
            return True
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        through = os.path.basename(words[0]).startswith((b"ld-", b"ld.so", b"sh", b"dash", b"bash"))
        return through and any(os.path.basename(word) == b"criu" for word in words[1:6])
    return False


def _signal(pidfd: int, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True
