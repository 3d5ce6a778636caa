"""The guard: a small process beside the keeper that freezes a workload when its lease may be over.

    python -I -S lease_guard.py DIRECTORY [WATCHDOG TIMEOUT_S]

The keeper does that itself. The guard is for a keeper that was killed, was stopped, or hangs: it reads what
the keeper has on record (`outlive.lease_records`), and at the recorded moment closes the gate of the workload
and takes its address from the host. It never opens a gate, asks nobody, and outlives the keeper, until
nothing is on record any more. There is one at a time: who finds another at work ends.

With a watchdog it also keeps that from resetting the host, as long as no lease can be over before the
watchdog would act, or the gate is closed: what is left then, a host that freezes nothing, is reset. Nothing
of Outlive is imported, so that it is as small as a Python process can be.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import struct
import sys
import time

_LOOK_EVERY_S = 0.2
"""A lease that comes to be counts for longer than that."""
_AFTER_S = 0.05
"""The keeper comes first: after the recorded moment, and well within the least margin."""
_DESCRIPTORS = 64
"""More than this process ever has."""
_LOCK_ALL = 7
"""MCL_CURRENT, MCL_FUTURE and MCL_ONFAULT of <sys/mman.h>."""
_SET_TIMEOUT = 0xC0045706
"""WDIOC_SETTIMEOUT of <linux/watchdog.h>."""


def records(directory: str) -> list[dict[str, object]]:
    """Return what is on record; what cannot be read is not there yet, or not any more."""
    found: list[dict[str, object]] = []
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        if name.endswith(".json"):
            with contextlib.suppress(OSError, ValueError), open(os.path.join(directory, name), "rb") as file:
                found.append(json.loads(file.read()))
    return found


def close(record: dict[str, object]) -> bool:
    """Close a gate; return whether it is closed."""
    try:
        with open(str(record["gate"]), "w") as file:
            file.write(str(record["word"]))
    except FileNotFoundError:
        return True  # there is no cgroup, and nothing in it
    except OSError:
        return False
    return True


def drop_address(record: dict[str, object]) -> None:
    """Take the address from the host, and wait for nothing: another gate may have to be closed.

    Not by `subprocess`, which waits until the program has been read from a disk. What waits for that here is
    a child, which does not keep the lock.
    """
    drop = record.get("drop")
    if not isinstance(drop, list) or not drop:
        return
    with contextlib.suppress(OSError):
        if os.fork():
            return
        try:
            os.closerange(3, _DESCRIPTORS)
            os.execvp(drop[0], drop)  # noqa: S606
        finally:
            os._exit(127)


class Watchdog:
    """A watchdog device; closed in order while nothing is led, so that it resets nothing then."""

    def __init__(self, path: str, timeout_s: int) -> None:
        self._path = path
        self.timeout_s = timeout_s
        self._file: int | None = None

    def feed(self) -> None:
        """Put the reset off by its time-out; open the device first."""
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
                fcntl.ioctl(self._file, _SET_TIMEOUT, struct.pack("i", self.timeout_s))
            os.write(self._file, b"\0")

    def rest(self) -> None:
        """Stop it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, b"V")
            os.close(self._file)
            self._file = None


def look(directory: str, dropped: set[str], watchdog: Watchdog | None) -> float:
    """Do what is due; return in how many seconds something may be due again.

    A gate is closed at every look while its record is over: a kill opens it for moments, and whoever was to
    close it again may have ended. All gates first; addresses after, each once (`dropped`).
    """
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    next_s, safe, found = now_s + _LOOK_EVERY_S, True, records(directory)
    over: dict[str, dict[str, object]] = {}
    for record in found:
        until_s = float(str(record["until_s"])) + _AFTER_S
        if until_s <= now_s:
            safe = close(record) and safe
            over[f"{record['gate']} {until_s}"] = record
            continue
        next_s = min(next_s, until_s)
        # The watchdog may act up to half the margin after the gate should have been closed.
        latest_s = until_s - _AFTER_S + float(str(record["margin_s"])) / 2
        safe = safe and (watchdog is None or now_s + watchdog.timeout_s <= latest_s)
    for key in over.keys() - dropped:
        drop_address(over[key])
    dropped.update(over)
    if watchdog is not None:
        if not found:
            watchdog.rest()
        elif safe:
            watchdog.feed()
    return max(0.005, next_s - now_s)


def main(directory: str, *device: str) -> int:
    """Guard until the keeper that started this is gone and nothing is on record. 3: another one guards."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a keeper that is stopped leaves its workloads running
    lock = os.open(os.path.join(directory, "guard.lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 3
    ctypes.CDLL(None).mlockall(_LOCK_ALL)
    with contextlib.suppress(OSError):  # before whatever keeps the processors busy
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    keeper = os.getppid()
    watchdog = Watchdog(device[0], int(device[1])) if device else None
    dropped: set[str] = set()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who takes addresses away
    while os.getppid() == keeper or records(directory):
        time.sleep(look(directory, dropped, watchdog))
    if watchdog is not None:
        watchdog.rest()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
