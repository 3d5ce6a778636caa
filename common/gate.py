"""The gate of a workload: a cgroup around its own, whose freezer holds whatever is in there.

    CGROUP_PARENT/NAME         the gate: closed while the workload may not run for the lack of a lease
    CGROUP_PARENT/NAME/run     the workload; criu, trackers and the thaw deadline freeze and thaw this one

A freeze of a cgroup holds for all below it, whatever their own freezers say (both versions of cgroups). So
nothing that thaws the workload opens the gate, and only `common.lease` decides about it. What is started or
restored into a closed gate does not run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from common.bundle import WorkloadPaths
from common.config import NodeConfig

_CGROUP_MOUNT = Path("/sys/fs/cgroup")


class Gate(NamedTuple):
    """The file that rules it, and the words for it."""

    file: Path
    close: str
    open: str


def gate_of(config: NodeConfig, name: str) -> Gate:
    """Return the gate of a workload, in the hierarchy that freezes."""
    relative = WorkloadPaths(config, name).gate.lstrip("/")
    first = _CGROUP_MOUNT / "freezer"
    if first.is_dir():
        return Gate(first / relative / "freezer.state", "FROZEN", "THAWED")
    return Gate(_CGROUP_MOUNT / relative / "cgroup.freeze", "1", "0")


def close_gate(gate: Gate) -> None:
    """Close it, whatever is in it; that stops within moments. Raises OSError."""
    gate.file.parent.mkdir(parents=True, exist_ok=True)
    gate.file.write_text(gate.close)


def open_gate(gate: Gate) -> None:
    """Open it, if there is one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        gate.file.write_text(gate.open)


def is_closed(gate: Gate) -> bool:
    """Tell whether it is closed, or being closed."""
    try:
        if gate.file.name == "freezer.state":
            return (gate.file.parent / "freezer.self_freezing").read_text().strip() == "1"
        return gate.file.read_text().strip() == "1"
    except OSError:
        return False
