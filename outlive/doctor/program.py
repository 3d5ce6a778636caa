"""Judges whether a workload could start here at all: is its program there, as the workload would see it?

In: the node's configuration and a declaration. Out: at most one check. Opens paths, runs nothing.
"""

from __future__ import annotations

import stat

from common.bundle import WorkloadPaths
from common.config import NodeConfig
from common.model import WorkloadSpec
from common.program import missing_program, program_candidates
from outlive.doctor.report import Check
from replica.rootview import RootView


def check_program(config: NodeConfig, spec: WorkloadSpec) -> list[Check]:
    """Look for the program where runc would; nothing on a node that is not to run the workload."""
    if config.node.name not in spec.nodes:
        return []
    with RootView(spec, WorkloadPaths(config, spec.name)) as view:
        for path in program_candidates(spec):
            if _is_executable(view, path):
                return [Check(spec.name, "program", "ok", f"{path} below {spec.root}")]
    error = missing_program(spec)
    return [Check(spec.name, "program", "fail", error.message, error.hint)]


def _is_executable(view: RootView, path: str) -> bool:
    try:
        mode = view.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) and bool(mode & 0o111)
