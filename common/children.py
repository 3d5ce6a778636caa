"""Programs that were started and are to end: killed, reaped, and waited for no longer than for a moment.

In: a child process. Out: nothing of it, or a child that the kernel does not let go of (it waits for a disk, a
lock, a device that is gone): whoever asked goes on without it. The event loop reaps that one when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Final

REAP_WITHIN_S: Final = 1.0


async def end_child(child: asyncio.subprocess.Process, *, group: bool = False) -> None:
    """Kill a child that has not ended, with `group` all of its process group, and wait for that a moment."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REAP_WITHIN_S):
            await child.wait()
