"""CPU seconds of processes, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that it has waited for; steps of 10 ms."""
    return sum(cpu_parts_s(pid))


def cpu_parts_s(pid: int) -> tuple[float, float]:
    """Return the CPU seconds of a process itself, and of its children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = fields[11:13], fields[13:15]
    return sum(map(int, own)) / _TICKS, sum(map(int, children)) / _TICKS


def kernel_s(pid: int) -> float:
    """Return what the kernel took of `cpu_s`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[12]) + int(fields[14])) / _TICKS


def idle_s() -> float:
    """Return for how many seconds all processors together have been idle, or waiting for a disk."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICKS


def has_children(pid: int) -> bool:
    """Tell whether a process of one thread has children that it has not waited for."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())
