"""`outlive doctor`: can this machine, and can this workload, be protected? Looks, changes nothing.

In: the node's configuration, and a workload's name or none (then: every workload that runs here). Out: a
`DoctorReport`. `node` looks at the machine, `workload` judges what a live process tree uses.
"""

from __future__ import annotations

import asyncio
import time

from common.config import NodeConfig
from common.container import workload_pids
from common.errors import ConfigError
from common.inspection import inspect_tree
from common.model import WorkloadSpec
from common.terms_file import known_workloads
from outlive.doctor.node import check_node
from outlive.doctor.report import Check, DoctorReport
from outlive.doctor.workload import judge_fencing, judge_tree

__all__ = ["Check", "DoctorReport", "run_doctor"]


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
    checks = await check_node(config)
    for spec in chosen:
        checks += await _check_workload(config, spec)
    return DoctorReport(tuple(checks))


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
            ),
            *judge_fencing(config, spec),
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
    return [*min(looks, key=_failures), *judge_fencing(config, spec)]


def _failures(checks: list[Check]) -> int:
    return sum(check.status == "fail" for check in checks)
