"""`outlive verify --now`: compare everything at once, and say what came of it.

In: perhaps the name of a workload. Out: an order to this node's agent, which leads, and how far it is, until
memory and every connected replica's store were compared as a whole.
"""

from __future__ import annotations

import time

import click
import msgspec

from common.control import AgentMetrics, AskStatus, VerificationProgress, Verify, Verifying
from common.errors import MismatchError, UnreachableError
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows, duration

_POLL_S = 0.2
MEMORY = "memory"


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one comparison."""

    workload: str
    replica: str
    """Empty: the workload's memory, compared with what is believed of it."""
    pages_verified: int
    pages_different: int
    epochs: int
    """That were captured meanwhile."""


class VerifyAnswer(Answer, frozen=True, kw_only=True):
    """All comparisons."""

    verified: tuple[Verified, ...]
    pages_verified: int
    pages_different: int
    took_s: float


@click.command(
    cls=Verb, epilog=examples("outlive verify --now", "outlive verify --now --workload redis --output json")
)
@click.option("--now", is_flag=True, required=True, help="A whole round over the next epochs.")
@click.option(
    "--workload", default="", metavar="NAME", help="Only this one; all that this node leads if not given."
)
@click.option("--timeout", "timeout_s", default=3600.0, show_default=True, help="Seconds to follow it.")
@click.pass_context
def verify(context: click.Context, now: bool, workload: str, timeout_s: float) -> None:
    """Compare every page with what is believed of it, and with what each replica has on its disk.

    Without being asked, this goes on all the time, in small slices; --now does it in slices of 4096 pages (16
    MiB) an epoch, each of which freezes the workload for some 4 ms more. Give it to the node that leads.
    What differs is mended by itself. Exits with 18 if anything did; docs/concepts/verification.md says what
    that means.
    """
    call = context.ensure_object(Call)
    endpoint = call.config().agent_endpoint
    started_s = time.monotonic()
    epochs_before = _epochs(call.ask(endpoint, AskStatus(), AgentMetrics))
    before = call.ask(endpoint, Verify(workload=workload), Verifying).before
    told = ""
    while True:
        metrics = call.ask(endpoint, AskStatus(), AgentMetrics)
        after = {each.name: each.verification for each in metrics.workloads}
        pairs = [
            (name, old, new)
            for name, olds in before.items()
            for old in olds
            for new in after.get(name, ())
            if new.replica == old.replica
        ]
        anew = any(new.rounds < old.rounds for _, old, new in pairs)
        if anew or len(pairs) < sum(map(len, before.values())):
            raise UnreachableError(
                "the agent began anew, or leads no more: nothing is known of what it compared",
                hint="outlive status, then verify again",
            )
        under_way = [(name, new) for name, old, new in pairs if new.rounds == old.rounds]
        if not under_way:
            break
        if time.monotonic() - started_s > timeout_s:
            raise UnreachableError(
                f"not everything is compared within {timeout_s:g} s: {_line(under_way)}",
                hint="it goes on; outlive status says how far it is",
            )
        if (line := _line(under_way)) != told and not call.json:
            call.talk(line)
            told = line
        time.sleep(_POLL_S)
    epochs = _epochs(metrics)
    verified = tuple(
        Verified(
            workload=name,
            replica=new.replica,
            pages_verified=new.pages_compared - old.pages_compared,
            pages_different=new.pages_different - old.pages_different,
            epochs=epochs.get(name, 0) - epochs_before.get(name, 0),
        )
        for name, old, new in pairs
    )
    answer = VerifyAnswer(
        verified=verified,
        pages_verified=sum(each.pages_verified for each in verified),
        pages_different=sum(each.pages_different for each in verified),
        took_s=time.monotonic() - started_s,
    )
    columns = ("WORKLOAD", "COMPARED", "PAGES", "DIFFERENT", "EPOCHS")
    rows = [
        (
            each.workload,
            each.replica or MEMORY,
            str(each.pages_verified),
            str(each.pages_different),
            str(each.epochs),
        )
        for each in verified
    ]
    call.show(answer, Rows(columns, rows, right=frozenset(columns[2:])), f"in {duration(answer.took_s)}")
    if answer.pages_different:
        context.exit(MismatchError.exit_code)


def _epochs(metrics: AgentMetrics) -> dict[str, int]:
    return {each.name: each.epochs_captured for each in metrics.workloads}


def _line(under_way: list[tuple[str, VerificationProgress]]) -> str:
    parts = [
        f"{name} {each.replica or MEMORY} {100 * each.pages_done // max(each.pages_due, 1)} %"
        + (f" ({each.problem})" if each.problem else "")
        for name, each in under_way
    ]
    return ", ".join(parts)
