"""What brings a workload up: the shells before conmon, conmon, and the runc that it starts.

In: a workload's name. Out: their PIDs, or that they have ended. They outlive whoever started them, and until
runc has put something into the workload's cgroup, that is empty: so whoever ends the workload ends them too.
Found by their command lines: a PID in a file may be anybody's by now. Once the workload is up, conmon waits
for its end and its exit code, and leaves by itself then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from common.bundle import WorkloadPaths
from common.config import NodeConfig
from common.errors import WorkloadError
from common.processes import end, matching
from common.threads import in_thread

_END_S = 5.0
"""How long a killed process may take to be gone."""
_LOOKS, _LOOK_PAUSE_S = 2, 0.005
"""Nothing brings the workload up any more if that many looks in a row find nobody who does: a process that is
just becoming another program shows no command line."""


def bringing_up(config: NodeConfig, name: str) -> list[int]:
    """Return the processes that bring the workload up, or have: conmon stays with it."""
    bundle, root = str(WorkloadPaths(config, name).bundle), str(config.runc_root)

    def is_its(words: Sequence[str]) -> bool:
        starts = root in words and list(words)[-3:-1] == ["start", name]  # the last one is empty
        return bundle in words or starts

    return matching(is_its)


async def end_bringing_up(config: NodeConfig, name: str) -> None:
    """End them all. Raises WorkloadError if one stays, or if something goes on starting others."""
    until_s = time.monotonic() + _END_S
    looks = 0
    while looks < _LOOKS:
        pids = await in_thread(bringing_up, config, name)
        looks = 0 if pids else looks + 1
        for pid in pids:
            await in_thread(end, pid, _END_S)
        if time.monotonic() > until_s:
            raise WorkloadError(f"something keeps bringing {name} up: processes {pids}")
        if looks < _LOOKS:
            await asyncio.sleep(_LOOK_PAUSE_S)
