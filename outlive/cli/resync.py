"""`outlive resync NODE`: bring a replica's copy to what the primary has, taking nothing for granted.

In: a replica's name. Out: an order to this node's agent, which leads, and how far the replica is, until it
holds a newer epoch than there was at the order.
"""

from __future__ import annotations

import time

import click
import msgspec

from common.control import AgentMetrics, AskStatus, NodeStatus, Resync, Resyncing
from common.errors import UnreachableError
from common.model import EpochId
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer

_POLL_S = 0.2


class Resynced(msgspec.Struct, frozen=True, kw_only=True):
    """One workload's copy: which epoch is in sync again."""

    workload: str
    epoch: EpochId


class ResyncAnswer(Answer, frozen=True, kw_only=True):
    """What was brought in sync again, and what it cost."""

    node: str
    full: bool
    workloads: tuple[Resynced, ...]
    took_s: float
    bytes_sent: int
    """By this node's agent to all replicas of these workloads meanwhile."""


@click.command(
    cls=Verb,
    epilog=examples("outlive resync b", "outlive resync b --workload redis --full"),
)
@click.argument("node")
@click.option(
    "--workload", default="", metavar="NAME", help="Only this one; all that NODE receives if not given."
)
@click.option("--full", is_flag=True, help="Send everything anew, without a look at what it holds.")
@click.option("--timeout", "timeout_s", default=3600.0, show_default=True, help="Seconds to follow it.")
@click.pass_obj
def resync(call: Call, node: str, workload: str, full: bool, timeout_s: float) -> None:
    """Bring the copy on replica NODE to what this primary has. Epochs go on meanwhile.

    The replica reads all that it holds from its disk and says what it is; what differs is sent. Give it to
    the node that leads. The replica can take over throughout, with the epochs that it holds.
    """
    config = call.config()
    started_s = time.monotonic()
    asked = call.ask(config.agent_endpoint, Resync(node=node, workload=workload, full=full), Resyncing)
    sent_before = _bytes_sent(call, asked)
    done: dict[str, EpochId] = {}
    told = ""
    while True:
        found = call.ask(config.keeper_endpoint, AskStatus(), NodeStatus)
        for each in found.workloads:
            progress = next((replica for replica in each.replicas if replica.node == node), None)
            epoch = progress.acknowledged if progress else None
            since = asked.since.get(each.name)
            if each.name in asked.since and epoch is not None and (since is None or epoch > since):
                done[each.name] = epoch
        sent = _bytes_sent(call, asked) - sent_before
        if len(done) == len(asked.since):
            break
        if time.monotonic() - started_s > timeout_s:
            raise UnreachableError(
                f"{node} is not in sync again within {timeout_s:g} s: {_missing(asked, done)}",
                hint="outlive status says how far it is; nothing was lost",
            )
        line = f"{node}: {_missing(asked, done)} under way, {sent / 1e6:.0f} MB sent"
        if line != told and not call.json:
            call.talk(line)
            told = line
        time.sleep(_POLL_S)
    answer = ResyncAnswer(
        node=node,
        full=full,
        workloads=tuple(Resynced(workload=name, epoch=epoch) for name, epoch in sorted(done.items())),
        took_s=time.monotonic() - started_s,
        bytes_sent=sent,
    )
    lines = [f"{node} holds {each.epoch} of {each.workload}" for each in answer.workloads]
    call.show(answer, *lines, f"{answer.bytes_sent / 1e6:.1f} MB were sent in {answer.took_s:.1f} s")


def _bytes_sent(call: Call, asked: Resyncing) -> int:
    metrics = call.ask(call.config().agent_endpoint, AskStatus(), AgentMetrics)
    return sum(each.bytes_sent for each in metrics.workloads if each.name in asked.since)


def _missing(asked: Resyncing, done: dict[str, EpochId]) -> str:
    return ", ".join(sorted(asked.since.keys() - done.keys()))
