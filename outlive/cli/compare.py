"""`outlive store verify NAME --files`: compare a standby's directories with what is stored.

In: a workload. Out: an order to this node's agent, how far it is until everything was looked at, and what
differed.
"""

from __future__ import annotations

import time

from common.control import CompareFiles, FilesComparison
from common.errors import StoreError, UnreachableError
from common.model import PAGE_BYTES, EpochId
from outlive.cli.call import Call
from outlive.cli.output import Answer, duration

_POLL_S = 0.2
_SHOWN = 20


class CompareFilesAnswer(Answer, frozen=True, kw_only=True):
    """What came of it."""

    workload: str
    epoch: EpochId | None
    """The one that the last part was compared with: epochs go on meanwhile."""
    pages_compared: int
    """Of contents."""
    different: int
    examples: tuple[str, ...]
    """The first hundred of what differed."""
    repaired: bool
    took_s: float


def compare_files(call: Call, workload: str, timeout_s: float) -> CompareFilesAnswer:
    """Compare everything, show what differed, and return it.

    Raises StoreError if it could not be compared to the end, UnreachableError if that takes too long.
    """
    endpoint = call.config().agent_endpoint
    started_s = time.monotonic()
    found = call.ask(endpoint, CompareFiles(workload=workload, begin=True), FilesComparison)
    told = ""
    while found.running:
        if time.monotonic() - started_s > timeout_s:
            raise UnreachableError(
                f"not everything is compared within {timeout_s:g} s: {_line(found)}",
                hint="it goes on, and mends what differs; ask again later",
            )
        if (line := _line(found)) != told and not call.json:
            call.talk(f"{workload}: {line}")
            told = line
        time.sleep(_POLL_S)
        found = call.ask(endpoint, CompareFiles(workload=workload, begin=False), FilesComparison)
    if found.problem:
        raise StoreError(
            f"the files of {workload} were not compared to the end: {found.problem}", hint="outlive status"
        )
    answer = CompareFilesAnswer(
        workload=workload,
        epoch=found.epoch,
        pages_compared=found.pages_due,
        different=found.different,
        examples=found.examples,
        repaired=found.repaired,
        took_s=time.monotonic() - started_s,
    )
    lines = list(found.examples[:_SHOWN])
    if found.different > _SHOWN:
        lines.append(f"... and {found.different - _SHOWN} more")
    size = f"{found.pages_due * PAGE_BYTES / (1 << 20):.1f} MiB"
    said = "all was made equal again" if found.different else f"every file is what {found.epoch} says"
    call.show(answer, *lines, f"{workload}: {said} ({size} compared in {duration(answer.took_s)})")
    return answer


def _line(found: FilesComparison) -> str:
    if not found.pages_done:
        return "names are compared"
    return f"contents are compared: {100 * found.pages_done // max(found.pages_due, 1)} %"
