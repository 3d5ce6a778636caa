"""Runs a part in a process with mounts of its own.

Every mount namespace that is made while a file system is mounted (a container's, a lab's) holds a copy of the
mount. Such a file system is not unmounted when we unmount it, and after a loss of power it would be found as
it was: shut down. Nobody copies mounts that only we can see, and they are gone when this process is.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
from collections.abc import Callable

from tests.campaigns.torture.cases import Part, Scale

_CLONE_NEWNS = 0x00020000  # linux/sched.h


def with_own_mounts(part: Callable[[int, Scale], list[Part]]) -> Callable[[int, Scale], list[Part]]:
    """Make of a part one that runs in a child; as root, for others there is nothing to mount."""

    def run(seed: int, scale: Scale) -> list[Part]:
        if os.geteuid() != 0:
            return part(seed, scale)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                _unshare_mounts()
                with os.fdopen(writing, "wb") as told:
                    told.write(pickle.dumps(part(seed, scale)))
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        try:
            with os.fdopen(reading, "rb") as told:
                rows = told.read()
        except BaseException:
            os.kill(child, signal.SIGTERM)
            raise
        finally:
            os.waitpid(child, 0)
        if not rows:
            raise RuntimeError(f"{part.__name__} ended without a result")
        found: list[Part] = pickle.loads(rows)  # noqa: S301 - our own child
        return found

    return run


def _unshare_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
