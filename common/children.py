"""Programs that were started and are to end: killed, reaped, and waited for no longer than for a moment.

In: a child process, and what kind it is of. Out: nothing of it, or a child that the kernel does not let go of
(it waits for a disk, a lock, a device that is gone): whoever asked goes on without it, and starts no other of
that kind until it is gone (`hangs`): what it was asked for may be done yet. The event loop reaps it then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Final

REAP_WITHIN_S: Final = 1.0

_hanging: dict[str, asyncio.subprocess.Process] = {}


def hangs(kind: str) -> bool:
    """Tell whether a child of that kind was killed and is there still."""
    child = _hanging.get(kind)
    if child is not None and child.returncode is not None:
        del _hanging[kind]
        return False
    return child is not None


async def end_child(child: asyncio.subprocess.Process, kind: str, *, group: bool = False) -> None:
    """Kill a child that has not ended, with `group` all of its process group, and wait for that a moment."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_WITHIN_S):
                await child.wait()
    finally:
        if child.returncode is None:
            _hanging[kind] = child
