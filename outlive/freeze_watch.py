"""The thaw deadline: whatever the agent and criu do, no workload stays frozen past it.

In: the announcement of a freeze, before it begins, with criu's PID; its end. Out, if the end does not come:
at the freeze deadline criu is continued (somebody may have stopped it); half a second later it gets
SIGALRM, its own time-out, at which it undoes what it did; half a second after that, at the thaw deadline, it
is killed, for the kernel detaches and continues what a dead tracer held, and the workload's cgroup is thawed.
The agent is not needed for any of it. The workload's own stopped processes are left alone.

A keeper that is killed loses its watches. Each is on record (`freeze_records`) before the announcement is
answered, and the next keeper takes up what is left: it waits for the same thaw deadline, or, if that has
passed, goes through the same steps within a second.

Why in steps: a criu that is killed while it has a thread of the workload run a call on borrowed registers
takes that thread, and so the workload, with it (docs/concepts/freeze.md). One that is asked hardly ever does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import WorkloadError
from outlive.freeze_records import FreezeRecord, FreezeRecords

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

    def __init__(
        self, *, thaw: Callable[[str], None], released: Callable[[str, str], None], records: FreezeRecords
    ) -> None:
        """`thaw(workload)` lifts a freeze of its cgroup; `released(workload, reason)` tells what was done."""
        self._thaw = thaw
        self._released = released
        self._records = records
        self._watches: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._draining = False

    def announce(self, workload: str, criu_pid: int, deadline_ms: int) -> None:
        """Watch from now on; returns when criu's identity is held, and on record for the next keeper.

        Raises WorkloadError if there is no such process, or it isn't criu, or it cannot be put on record:
        then nothing may be frozen.
        """
        if self._draining:
            raise WorkloadError("this keeper is being stopped and watches no new freeze")
        if len(self._watches) >= _WATCHED:
            raise WorkloadError("too many freezes are announced at once")
        self.end(workload, criu_pid)
        pidfd, started_ticks = _hold_criu(criu_pid)
        deadline_s = deadline_ms / 1000
        record = FreezeRecord(
            workload=workload,
            criu_pid=criu_pid,
            started_ticks=started_ticks,
            thaw_at_s=time.monotonic() + deadline_s,
        )
        try:
            self._records.keep(record)
        except WorkloadError:
            os.close(pidfd)
            raise
        self._begin(record, pidfd, deadline_s)

    def resume(self) -> None:
        """Take up the freezes that an earlier keeper watched. To be called before anything is announced."""
        for record in self._records.left():
            try:
                pidfd, started_ticks = _hold_criu(record.criu_pid)
            except WorkloadError:
                self._end_left(record)
                continue
            if started_ticks != record.started_ticks:  # another criu that was given the same PID
                os.close(pidfd)
                self._end_left(record)
                continue
            log.warning("freeze.found workload=%s criu=%d", record.workload, record.criu_pid)
            # Past its time or not, criu is continued and asked before it is killed.
            self._begin(record, pidfd, max(record.thaw_at_s - time.monotonic(), THAW_AFTER_S))

    def _end_left(self, record: FreezeRecord) -> None:
        """Criu has ended while no keeper was there; what it did to the cgroup may be left."""
        self._thaw(record.workload)
        self._records.drop(record.criu_pid)

    def _begin(self, record: FreezeRecord, pidfd: int, deadline_s: float) -> None:
        watch = asyncio.create_task(self._watch(record.workload, record.criu_pid, pidfd, deadline_s))
        self._watches[(record.workload, record.criu_pid)] = watch

    def end(self, workload: str, criu_pid: int) -> None:
        """Criu has ended and the workload runs; unknown announcements are ignored."""
        watch = self._watches.pop((workload, criu_pid), None)
        if watch is not None:
            watch.cancel()
            self._records.drop(criu_pid)

    def forget(self, workload: str) -> None:
        """Watch no freeze of that workload any more: whoever had it frozen is done with it."""
        for name, criu_pid in [key for key in self._watches if key[0] == workload]:
            self.end(name, criu_pid)

    def watches(self, workload: str) -> bool:
        """Tell whether a freeze of it is announced."""
        return any(name == workload for name, _ in self._watches)

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
            self._records.drop(criu_pid)
            what = "criu was killed and" if lived else "criu had ended, and"
            self._released(
                workload, f"{what} its cgroup thawed: no end of the freeze within {deadline_s:g} s"
            )
        finally:
            os.close(pidfd)
            if self._watches.get((workload, criu_pid)) is asyncio.current_task():
                del self._watches[(workload, criu_pid)]


def _hold_criu(pid: int) -> tuple[int, int]:
    """Return a pidfd of a criu, to be closed, and its start time. Raises WorkloadError if it is none."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise WorkloadError(f"cannot watch criu (PID {pid}): {error.strerror}") from error
    try:  # asked while the pidfd is held: the PID cannot change its meaning now
        if not is_criu(pid):
            raise WorkloadError(f"PID {pid} is not criu; a keeper kills nothing else")
        return pidfd, _started_ticks(pid)
    except OSError as error:
        os.close(pidfd)
        raise WorkloadError(f"cannot watch criu (PID {pid}): {error.strerror}") from error
    except WorkloadError:
        os.close(pidfd)
        raise


def _started_ticks(pid: int) -> int:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19])  # field 22; the third is the first after the name


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
