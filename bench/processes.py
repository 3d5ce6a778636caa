"""CPU seconds of processes, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that it has waited for; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS


def has_children(pid: int) -> bool:
    """Tell whether a process of one thread has children that it has not waited for."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())
