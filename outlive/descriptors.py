"""How many files the agent and the keeper may have open, and how many the agent will need at most.

In: the configuration and the workloads that this node knows. Out: numbers. The limit is raised to what the
host allows at their start; workloads don't inherit that, their bundles name a limit of their own.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable
from pathlib import Path

from common.config import NodeConfig
from common.model import WorkloadSpec

ALWAYS = 64
"""The process itself: its ZeroMQ context, control sockets, log, events, a request or two under way."""
PER_PEER = 8
"""Beats to it, and what a connection that is being replaced keeps for a moment."""
PER_WORKLOAD = 32
"""Its store's lock, criu's pipes and images, the files of an epoch that is captured, received or restored."""
PER_STREAM = 8
"""A link to one replica: its connection, two sockets of ZeroMQ, and again while it is replaced."""
MOST_STREAMS = 300
"""libzmq gives a context 1,023 sockets (`ZMQ_MAX_SOCKETS`); a link takes three of them."""


def raise_limit() -> None:
    """Let this process open as many files as the host allows it at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def needed(config: NodeConfig, specs: Iterable[WorkloadSpec]) -> int:
    """Return how many descriptors the agent needs when it leads or follows all of these, at the worst moment.

    A fold and an answer about what is held each read along a chain of at most twice `max_levels`.
    """
    chains = 2 * 2 * config.store.max_levels
    workloads = sum(PER_WORKLOAD + chains + PER_STREAM * (len(spec.nodes) - 1) for spec in specs)
    return ALWAYS + PER_PEER * len(config.peers) + workloads


def streams(config: NodeConfig, specs: Iterable[WorkloadSpec]) -> int:
    """Return how many links to replicas there are when this node leads all of these."""
    return sum(len(spec.nodes) - 1 for spec in specs if config.node.name in spec.nodes)


def limit_of(pid: int) -> int:
    """Return the limit of a process. Raises OSError if it has ended."""
    text = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    match = re.search(r"^Max open files\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else resource.getrlimit(resource.RLIMIT_NOFILE)[1]
