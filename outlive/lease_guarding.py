"""Having a guard: the keeper's side of `outlive.lease_guard`.

In: the directory of the records. Out: a process that guards them, started again if there is none. It is in a
session of its own, and not ended with the keeper.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

from common.config import NodeConfig
from outlive import lease_guard

log = logging.getLogger(__name__)


class LeaseGuard:
    """Starts guards; the lock that each of them holds says whether there is one."""

    def __init__(self, config: NodeConfig, directory: Path) -> None:
        etcd = config.etcd
        device = [etcd.watchdog, str(max(1, etcd.ttl_s // 3))] if etcd.watchdog else []
        self._command = [sys.executable, "-I", "-S", lease_guard.__file__, str(directory), *device]
        self._lock = directory / "guard.lock"
        self._process: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Start a guard if none is at work. Blocks for a moment, and never raises."""
        if self._process is not None and self._process.poll() is None:
            return
        try:
            if self._is_held():
                return
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            log.error("lease.no-guard reason=%r", str(error))

    def _is_held(self) -> bool:
        lock = os.open(self._lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            return False
        finally:
            os.close(lock)
