"""Which freezes are announced, where the next keeper finds them if this one is killed.

In: an announcement, before it is answered; its end. Out: at a keeper's start, what was not ended. One small
file a freeze in `RUN_DIR/freezes`, a tmpfs in production: nothing is synced, for after a boot nothing is
frozen. A process is named by boot, PID and start time, so that none is ever taken for another.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from common.errors import WorkloadError
from common.private_directory import prepare_private_directory

log = logging.getLogger(__name__)


class FreezeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One announced freeze."""

    workload: str
    criu_pid: int
    started_ticks: int
    """Start time of that process, in clock ticks since the boot: field 22 of proc(5)'s `stat`."""
    thaw_at_s: float
    """Its thaw deadline on the monotonic clock, which all processes of one boot share."""
    boot_id: str = ""


class FreezeRecords:
    """The files. Blocking, but only for a system call or two on a tmpfs."""

    def __init__(self, run_dir: Path, boot_id: str) -> None:
        """Make the directory. Raises ConfigError if it cannot be made or is open to others."""
        self._directory = run_dir / "freezes"
        self._boot_id = boot_id
        prepare_private_directory(self._directory, "node.run_dir")

    def keep(self, record: FreezeRecord) -> None:
        """Write it down. Raises WorkloadError if that fails: then nothing may be frozen."""
        path = self._path(record.criu_pid)
        content = msgspec.json.encode(msgspec.structs.replace(record, boot_id=self._boot_id))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(descriptor, content)
            finally:
                os.close(descriptor)
            if written < len(content):
                raise OSError(0, "no room for all of it")
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise WorkloadError(
                f"{path} cannot be written, and nothing is frozen that a restarted keeper would not find: "
                f"{error.strerror}",
                hint="free some space in node.run_dir",
            ) from error

    def drop(self, criu_pid: int) -> None:
        """Forget a freeze that has ended. One that cannot be forgotten is found to have ended later."""
        with contextlib.suppress(OSError):
            self._path(criu_pid).unlink()

    def left(self) -> list[FreezeRecord]:
        """Return what an earlier keeper of this boot left; remove what is of another boot or half written."""
        found: list[FreezeRecord] = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=FreezeRecord)
            except (OSError, msgspec.DecodeError) as error:
                # Its keeper was killed while it wrote, before it answered: nothing was frozen because of it.
                log.warning("freeze.unreadable path=%s reason=%r", path, str(error))
            else:
                if record.boot_id == self._boot_id and path == self._path(record.criu_pid):
                    found.append(record)
                    continue
            with contextlib.suppress(OSError):
                path.unlink()
        return found

    def _path(self, criu_pid: int) -> Path:
        return self._directory / f"{criu_pid}.json"
