"""`outlive doctor`: can this machine, and can this workload, be protected? Looks, changes nothing.

In: the node's configuration, and a workload's name or none (then: every workload that runs here). Out: a
`DoctorReport`. `node` looks at the machine, `named` at what the node's file names, `program` at what a
workload needs to start, `workload` judges what a live process tree uses.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from common.config import DEFAULT_PATH, Node, NodeConfig
from common.container import workload_pids
from common.errors import ConfigError
from common.inspection import inspect_tree
from common.model import WorkloadSpec
from common.terms_file import known_workloads
from outlive.doctor.descriptors import check_descriptors
from outlive.doctor.named import check_named
from outlive.doctor.node import check_machine
from outlive.doctor.program import check_program
from outlive.doctor.report import Check, DoctorReport, node_check
from outlive.doctor.workload import judge_fencing, judge_nodes, judge_tree

__all__ = ["Check", "DoctorReport", "run_doctor", "run_doctor_without_config"]


_LOOK_AGAIN_S, _LOOK_PAUSE_S = 2.0, 0.05
"""While an epoch is captured a process looks traced and has files that are criu's: what fails counts only if
it does so for as long."""


async def run_doctor(config: NodeConfig, workload: str | None) -> DoctorReport:
    """Check the node, then the named workload or all that it knows.

    Takes about a second, or up to a few if peers do not answer. Raises ConfigError for a workload that this
    node does not know; whatever else is wrong is a check that failed.
    """
    known = known_workloads(config)
    chosen = [spec for name, spec in known.items() if workload in {None, name}]
    if workload is not None and not chosen:
        raise ConfigError(
            f"no workload is called {workload!r}",
            hint=f"this node knows: {', '.join(known) or 'none'}",
        )
    checks = [*await check_machine(config), *await check_named(config)]
    checks.append(await check_descriptors(config, known.values()))
    for spec in chosen:
        checks += await _check_workload(config, spec)
        checks += [*await asyncio.to_thread(check_program, config, spec), *judge_fencing(config, spec)]
        checks += judge_nodes(config, spec)
    return DoctorReport(tuple(checks))


async def run_doctor_without_config(missing: Path) -> DoctorReport:
    """Check the machine alone, as a node with the default directories and programs would use it.

    That there is no file at the usual place is worth a warning; one that was named must be there.
    """
    unread = node_check(
        "config",
        "warn" if missing == DEFAULT_PATH else "fail",
        f"there is no file at {missing}, so no config was read: only the machine was checked, with defaults",
        f"outlive config example > {missing}, then edit it; docs/reference/config.md explains every key",
    )
    return DoctorReport((unread, *await check_machine(NodeConfig(node=Node(name="", address="")))))


async def _check_workload(config: NodeConfig, spec: WorkloadSpec) -> list[Check]:
    pids = await asyncio.to_thread(workload_pids, config, spec.name)
    if not pids:
        return [
            Check(
                spec.name,
                "processes",
                "ok",
                "it does not run on this node, so what it uses cannot be looked at here",
                "run outlive doctor on the node that runs it",
            )
        ]
    looks: list[list[Check]] = []
    until_s = time.monotonic() + _LOOK_AGAIN_S
    while not looks or (_failures(looks[-1]) and time.monotonic() < until_s):
        try:
            tree = await asyncio.to_thread(inspect_tree, pids)
        except PermissionError as error:
            return [
                Check(spec.name, "processes", "fail", f"its processes cannot be read: {error}", "be root")
            ]
        looks.append(judge_tree(spec, tree))
        await asyncio.sleep(_LOOK_PAUSE_S)
    return min(looks, key=_failures)


def _failures(checks: list[Check]) -> int:
    return sum(check.status == "fail" for check in checks)
