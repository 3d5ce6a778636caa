"""Making sure that a node is off: the configured methods in their order, until one confirms.

In: a `FenceRequest` and the `[[fences]]`. Out: a `Verdict`. A command's exit status 0 is *confirmed*, 1
*refused*, everything else, its time-out included, *unknown*. By SSH the node's own word counts, and
whatever keeps it from being heard whole is *unknown*. Only *confirmed* is a right to lead. A method
that has confirmed ends the search; refused outweighs unknown in what is reported, and neither gives a right.
A keeper's search ends, too, with a node that says that a newer term is led: the next method would turn off
whoever leads, for one that is of the past.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Sequence

import msgspec

from common.children import end_child, hangs
from common.config import Fence, NodeConfig
from common.errors import OutliveError
from common.fence_request import FenceRequest, Outcome
from common.model import WorkloadSpec
from common.roles import SILENCES
from common.ssh_child import ask_in_child

_SAYS: dict[Outcome, str] = {
    "confirmed": "{node} is confirmed off",
    "refused": "refused to turn {node} off",
    "unknown": "cannot tell whether {node} is off",
}
_OUTPUT_BYTES = 300
"""What is quoted of a fence command's output."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a method for a node answered, or all of them together."""

    outcome: Outcome
    reason: str
    """Which method said what, in a sentence."""
    newer: bool = False
    """Refused by the node itself, because a newer term is led."""


async def fence_node(request: FenceRequest, methods: Sequence[Fence]) -> Verdict:
    """Ask the methods for the node in order until one confirms. Never raises but when cancelled."""
    return summed_up(request.node, await ask_methods(request, methods, heed_newer=True))


async def ask_methods(
    request: FenceRequest, methods: Sequence[Fence], *, heed_newer: bool = False
) -> tuple[Verdict, ...]:
    """Return what each method for the node answered, up to the first that confirmed.

    With `heed_newer`, up to the node's own word that a newer term is led: only an operator goes on then.

    A command that is still running at its time-out is killed with its process group; what it did until then
    is unknown. Never raises but when cancelled.
    """
    verdicts: list[Verdict] = []
    for method in methods:
        if method.node != request.node:
            continue
        verdicts.append(await _ask_method(method, request))
        if verdicts[-1].outcome == "confirmed" or (heed_newer and verdicts[-1].newer):
            break
    return tuple(verdicts)


def summed_up(node: str, verdicts: Sequence[Verdict]) -> Verdict:
    """Return what the answers come to: the first that confirms; else every reason there is."""
    if not verdicts:
        return Verdict(outcome="unknown", reason=f"no fence method is configured for {node}")
    for verdict in verdicts:
        if verdict.outcome == "confirmed":
            return verdict
    refused = any(verdict.outcome == "refused" for verdict in verdicts)
    reasons = "; ".join(verdict.reason for verdict in verdicts)
    return Verdict(outcome="refused" if refused else "unknown", reason=reasons)


async def _ask_method(method: Fence, request: FenceRequest) -> Verdict:
    if method.ssh is not None:
        return await _ask_by_ssh(method, request)
    return await _run_command(method)


async def _ask_by_ssh(method: Fence, request: FenceRequest) -> Verdict:
    assert method.ssh is not None  # noqa: S101 - asked before
    if not request.terms:
        reason = f"{method.label}: it fences workloads, and none of them was named"
        return Verdict(outcome="unknown", reason=reason)
    began_s = time.monotonic()
    try:
        answer = await ask_in_child(method.ssh, request, method.timeout_ms / 1000)
    except OutliveError as error:
        return Verdict(outcome="unknown", reason=f"{method.label}: {error.message}")
    took_ms = (time.monotonic() - began_s) * 1000
    outcome: Outcome = "unknown" if answer.outcome == "ready" else answer.outcome
    return Verdict(
        outcome=outcome,
        reason=f"{method.label}: {_says(method, outcome)} ({took_ms:.0f} ms): {answer.reason}",
        newer=answer.newer,
    )


def _says(method: Fence, outcome: Outcome) -> str:
    if method.ssh is not None and outcome == "confirmed":
        return f"{method.node} has given it up"
    return _SAYS[outcome].format(node=method.node)


async def _run_command(method: Fence) -> Verdict:
    name = method.label
    kind = f"fence {shlex.join(method.command)}"
    if hangs(kind):
        reason = f"{name} was killed when it did not answer, and has not ended yet"
        return Verdict(outcome="unknown", reason=reason)
    began_s = time.monotonic()
    try:
        process = await asyncio.create_subprocess_exec(
            *method.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Verdict(outcome="unknown", reason=f"{name} could not be run: {error.strerror}")
    output = b""
    try:
        async with asyncio.timeout(method.timeout_ms / 1000):
            output, _ = await process.communicate()
    except TimeoutError:
        return Verdict(outcome="unknown", reason=f"{name} did not answer within {method.timeout_ms} ms")
    finally:
        await end_child(process, kind, group=True)
    took_ms = (time.monotonic() - began_s) * 1000
    said = output[-_OUTPUT_BYTES:].decode(errors="replace").strip().replace("\n", " / ")
    outcome: Outcome = "unknown"
    if process.returncode == 0:
        outcome = "confirmed"
    elif process.returncode == 1:
        outcome = "refused"
    quoted = f": {said}" if said else ""
    return Verdict(
        outcome=outcome,
        reason=f"{name}: {_says(method, outcome)} (exit {process.returncode}, {took_ms:.0f} ms){quoted}",
    )


def fenceable(config: NodeConfig) -> frozenset[str]:
    """Return the nodes for which a method is configured."""
    return frozenset(method.node for method in config.fences)


def covers(config: NodeConfig) -> dict[str, frozenset[str]]:
    """Return for each node the failures of it in which a method can confirm that it is off."""
    found: dict[str, frozenset[str]] = {}
    for method in config.fences:
        found[method.node] = found.get(method.node, frozenset()) | frozenset(method.covered)
    return found


def coverage(config: NodeConfig, spec: WorkloadSpec) -> list[str]:
    """Return what this node would do when each other node of the workload fails, one sentence each."""
    sentences = []
    for node in spec.nodes:
        if node == config.node.name:
            continue
        covered = {case for method in config.fences if method.node == node for case in method.covered}
        for case in SILENCES:
            if spec.right_to_lead == "etcd":
                verdict = (
                    f"automatic takeover, once its lease in etcd is over ({config.etcd.ttl_s} s or more)"
                )
            elif spec.right_to_lead == "manual":
                verdict = "no automatic takeover: right_to_lead is manual"
            elif case in covered:
                verdict = "automatic takeover, once the fence confirms"
            elif covered:
                verdict = f"no automatic takeover: no fence method for {node} covers it"
            else:
                verdict = f"no automatic takeover: no fence method is configured for {node}"
            sentences.append(
                f"{case} of {node}: {verdict}" if case != "partition" else f"partition from {node}: {verdict}"
            )
    return sentences
