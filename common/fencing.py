"""Making sure that a node is off: the configured methods in their order, until one confirms.

In: a node's name and its `[[fences]]` commands. Out: a `Verdict`. A command's exit status 0 is *confirmed*,
1 *refused*, everything else, its time-out included, *unknown*: only the first is a right to lead. A method
that has confirmed ends the search; refused outweighs unknown in what is reported, and neither gives a right.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from common.config import Fence, NodeConfig
from common.model import WorkloadSpec
from common.roles import SILENCES

Outcome = Literal["confirmed", "refused", "unknown"]

_SAYS: dict[Outcome, str] = {
    "confirmed": "{node} is confirmed off",
    "refused": "refused to turn {node} off",
    "unknown": "cannot tell whether {node} is off",
}
_OUTPUT_BYTES = 300
"""What is quoted of a fence command's output."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the methods for a node answered."""

    outcome: Outcome
    reason: str
    """Which method said what, in a sentence."""


async def fence_node(node: str, methods: Sequence[Fence]) -> Verdict:
    """Ask the methods for `node` in order until one confirms. Never raises but when cancelled.

    A command that is still running at its time-out is killed with its process group; what it did until then
    is unknown.
    """
    mine = [method for method in methods if method.node == node]
    if not mine:
        return Verdict(outcome="unknown", reason=f"no fence method is configured for {node}")
    verdicts = []
    for method in mine:
        verdict = await _ask_method(method)
        if verdict.outcome == "confirmed":
            return verdict
        verdicts.append(verdict)
    refused = any(verdict.outcome == "refused" for verdict in verdicts)
    reasons = "; ".join(verdict.reason for verdict in verdicts)
    return Verdict(outcome="refused" if refused else "unknown", reason=reasons)


async def _ask_method(method: Fence) -> Verdict:
    name = method.name or method.command[0].rsplit("/", 1)[-1]
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
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
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
        reason=f"{name}: {_SAYS[outcome].format(node=method.node)}"
        f" (exit {process.returncode}, {took_ms:.0f} ms){quoted}",
    )


def fenceable(config: NodeConfig) -> frozenset[str]:
    """Return the nodes for which a method is configured."""
    return frozenset(method.node for method in config.fences)


def covers(config: NodeConfig) -> dict[str, frozenset[str]]:
    """Return for each node the failures of it in which a method can confirm that it is off."""
    found: dict[str, frozenset[str]] = {}
    for method in config.fences:
        found[method.node] = found.get(method.node, frozenset()) | frozenset(method.covers)
    return found


def coverage(config: NodeConfig, spec: WorkloadSpec) -> list[str]:
    """Return what this node would do when each other node of the workload fails, one sentence each."""
    sentences = []
    for node in spec.nodes:
        if node == config.node.name:
            continue
        covered = {case for method in config.fences if method.node == node for case in method.covers}
        for case in SILENCES:
            if spec.right_to_lead == "manual":
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
