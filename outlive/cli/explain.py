"""`outlive explain`: whether a failover would happen if something failed now, and what is missing if not.

In: a name, or none for all. Out: its keeper's `Explanation`, on the successor by its own role machine,
elsewhere by what the successor's last heartbeat said.
"""

from __future__ import annotations

import click

from common.control import AskExplanation, Explanation
from common.errors import NoFailoverError, WorkloadError
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows, duration
from outlive.cli.status import ALL, ask_status, planned_sentence

COLUMNS = ("WORKLOAD", "IF NOW", "OUTCOME", "RUNS ON", "REASON")
_NOTHING = "-"


class ExplainAnswer(Answer, frozen=True, kw_only=True):
    """All workloads that were asked for, and those that make the exit code."""

    workloads: tuple[Explanation, ...]
    no_failover: tuple[str, ...]


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive explain",
        "outlive explain redis",
        "outlive explain redis --output json | jq '.workloads[0].missing'",
    ),
)
@click.argument("workload", required=False)
@click.pass_context
def explain(context: click.Context, workload: str | None) -> None:
    """Say what would happen if something failed now.

    For the loss of the primary's host, a partition from its successor, the death of its keeper and agent, of
    its agent alone, and the end of the workload itself: whether another node takes over by itself, which one,
    what would be lost, and what is missing if not. Nothing is done, and no fence is asked: it is taken to
    confirm in the failures that its covers names.

    Without a name: every workload this node knows. Exits with 20 if, were the primary's host lost now, no
    node would take over a workload by itself; without a name, those that are stopped do not count.
    """
    call = context.ensure_object(Call)
    config = call.config()
    names = [workload] if workload is not None else [each.name for each in ask_status(call, config).workloads]
    if not names:
        raise WorkloadError("no workload is known here", hint="outlive protect --help")
    found = tuple(
        call.ask(config.keeper_endpoint, AskExplanation(workload=name), Explanation) for name in names
    )
    without = tuple(
        each.workload
        for each in found
        if not each.would_fail_over and (workload is not None or not each.stopped)
    )
    sentences = [line for each in found for line in _sentences(each)]
    sentences += [planned_sentence(each.workload, each.planned) for each in found if each.planned is not None]
    rows = [row for each in found for row in _rows(each)]
    call.show(ExplainAnswer(workloads=found, no_failover=without), *sentences, "", Rows(COLUMNS, rows))
    if without:
        context.exit(NoFailoverError.exit_code)


def _sentences(found: Explanation) -> list[str]:
    name = found.workload
    lost = f"if {found.leader}'s host were lost now" if found.leader else "now"
    if found.would_fail_over:
        would = f"{name}: {lost}, {found.successor} would take over"
        if found.epoch is None:
            return [f"{would}; what would be lost is not known here"]
        loss = ALL if found.loss_s is None else f"the last {duration(found.loss_s)}"
        return [f"{would} with {found.epoch}; {loss} would be lost"]
    return [
        f"{name}: {lost}, nobody would take over",
        *(f"{name}: missing: {reason}" for reason in found.missing),
    ]


def _rows(found: Explanation) -> list[tuple[str, ...]]:
    return [
        (found.workload, case.failure, case.outcome, case.node or _NOTHING, case.reason)
        for case in found.cases
    ]
