"""Judges whether the agent may open as many files as the known workloads can make it.

In: the configuration and the workloads. Out: one check of area `node`. Asks the agent for its PID; while none
runs, what it would get by being started like this command is judged.
"""

from __future__ import annotations

import resource
from collections.abc import Collection

from common.config import NodeConfig
from common.control import AgentMetrics, AskStatus
from common.control_channel import ask
from common.errors import OutliveError
from common.model import WorkloadSpec
from outlive.descriptors import MOST_STREAMS, limit_of, needed, streams
from outlive.doctor.report import Check, node_check

_AGENT_DEADLINE_S = 1.0


async def check_descriptors(config: NodeConfig, specs: Collection[WorkloadSpec]) -> Check:
    """Compare the limit of the agent with what it may need."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        agent = await ask(config.agent_endpoint, AskStatus(), _AGENT_DEADLINE_S)
        if isinstance(agent, AgentMetrics):
            limit = limit_of(agent.pid)
    except (OutliveError, OSError):
        pass  # that no agent runs is another check's business
    return judge_descriptors(config, specs, limit)


def judge_descriptors(config: NodeConfig, specs: Collection[WorkloadSpec], limit: int) -> Check:
    """Fail if the limit, or libzmq's own bound on sockets, is too low for these workloads."""
    most, links = needed(config, specs), streams(config, specs)
    detail = f"the agent may open {limit}; {len(specs)} workloads need {most} at most"
    if limit < most:
        hint = f"raise the hard limit that it is started with: LimitNOFILE={2 * most} in its unit"
        return node_check("open files", "fail", detail, hint)
    if links > MOST_STREAMS:
        detail = (
            f"leading all {len(specs)} workloads takes {links} links to replicas, and {MOST_STREAMS} work"
        )
        return node_check("open files", "fail", detail, "protect fewer workloads on this node")
    return node_check("open files", "ok", detail)
