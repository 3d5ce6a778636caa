"""The verbs of fencing: `fence`, an operator's, and `accept-fence`, for the node that is fenced by SSH."""

from __future__ import annotations

import asyncio
import os
import shlex
from pathlib import Path

import click

from common.config import NodeConfig
from common.errors import ConfigError, FenceRefusedError, FenceUnknownError, WorkloadError
from common.fence_request import FenceAnswer, FenceRequest, Outcome, checked, read_term, read_words
from common.fencing import Verdict, ask_methods, summed_up
from common.model import WorkloadSpec
from common.succession import successor
from common.terms_file import TermFiles, known_workloads
from outlive.cli.call import Call, Verb, examples
from outlive.cli.output import Answer, Rows, plain, print_json
from outlive.cli.running import configure_logs

ORIGINAL_COMMAND = "SSH_ORIGINAL_COMMAND"
"""Where sshd puts what the client asked for, when a forced command runs instead (sshd(8))."""

_EXITS: dict[str, int] = {
    "refused": FenceRefusedError.exit_code,
    "unknown": FenceUnknownError.exit_code,
}


class FencingAnswer(Answer, frozen=True, kw_only=True):
    """What the fence methods of a node answered."""

    node: str
    terms: dict[str, int]
    outcome: Outcome
    methods: tuple[Verdict, ...]
    """In the order in which they were asked; none is asked after one that confirmed."""


@click.command(
    cls=Verb, epilog=examples("outlive fence a --yes", "outlive fence a --workload redis --yes --output json")
)
@click.argument("node")
@click.option(
    "--workload",
    "names",
    multiple=True,
    metavar="NAME",
    help="Fence it for this one; may be repeated. Default: all that it leads, as this node knows.",
)
@click.option("--yes", is_flag=True, help="You know that what runs there ends.")
@click.pass_context
def fence(context: click.Context, node: str, names: tuple[str, ...], yes: bool) -> None:
    """Make sure that another node is off, by its [[fences]] methods in their order, now.

    Exits with 0 if one confirmed, 22 if one refused and none confirmed, else 23: then take it for running.
    Nobody takes over because of it: outlive failover does. A method by command turns the whole node off; one
    by SSH ends these workloads there, with the node's keeper and agent.
    """
    call = context.ensure_object(Call)
    config = call.config()
    if config.peer(node) is None:
        raise ConfigError(f"{node} is no peer of {config.node.name}", hint="outlive config show")
    request = FenceRequest(node=node, by=config.node.name, terms=_terms(config, node, names))
    if not yes:
        what = ", ".join(request.terms) or "what runs there"
        raise ConfigError(f"this ends {what} on {node}", hint="if that is what you want: --yes")
    verdicts = asyncio.run(ask_methods(request, config.fences))
    found = summed_up(node, verdicts)
    methods = verdicts or (found,)
    rows = Rows(("ANSWER", "REASON"), [(each.outcome, each.reason) for each in methods])
    answer = FencingAnswer(node=node, terms=request.terms, outcome=found.outcome, methods=methods)
    call.show(answer, rows, "", f"{node}: {found.outcome}")
    if found.outcome != "confirmed":
        context.exit(_EXITS[found.outcome])


@click.command(
    "accept-fence", cls=Verb, epilog=examples("outlive accept-fence --node a --by b --workload redis=4")
)
@click.option("--node", default="", metavar="NODE", help="The node that is to be fenced: this one.")
@click.option("--by", default="", metavar="NODE", help="The peer that fences it.")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="NAME=TERM",
    help="What is to end, and up to which term this node leads it no more; may be repeated.",
)
@click.option(
    "--up-to",
    type=click.IntRange(0),
    default=0,
    metavar="TERM",
    help="A later term that this node has begun is fenced too, up to this one.",
)
@click.option("--dry-run", is_flag=True, help="Only say whether it would be done.")
@click.pass_context
def accept_fence(
    context: click.Context, node: str, by: str, workloads: tuple[str, ...], up_to: int, dry_run: bool
) -> None:
    """Be fenced: what a fence by SSH runs here. Ends the workloads, and this node's keeper and agent.

    Without options it takes them from SSH_ORIGINAL_COMMAND: as a forced command of a key it lets that key do
    this and nothing else. Exits with 0 if nothing is left, read back, 22 if it refuses, 23 if it cannot tell.
    """
    from outlive.accept_fence import accept_fence as carry_out

    configure_logs("warning")
    call = context.ensure_object(Call)
    original = os.environ.get(ORIGINAL_COMMAND, "")
    if not (node or by or workloads or up_to or dry_run) and original:
        request, dry_run = read_words(_split(original))
        call.json = True
    else:
        terms = dict(map(read_term, workloads))
        request = checked(FenceRequest(node=node, by=by, terms=terms, up_to=up_to))
    answer = asyncio.run(carry_out(call.config(), request, dry_run=dry_run))
    _show(call, answer)
    context.exit(_EXITS.get(answer.outcome, 0))


def _show(call: Call, answer: FenceAnswer) -> None:
    if call.json:
        print_json(plain(answer))
    else:
        call.show(Answer(), f"{answer.outcome}: {answer.reason}")


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _terms(config: NodeConfig, node: str, names: tuple[str, ...]) -> dict[str, int]:
    """Return the newest terms known here: of the workloads that are named, or all that `node` may lead."""
    files = TermFiles(Path(config.node.state_dir), config.node.name)
    known = known_workloads(config)
    for name in names:
        if name not in known:
            raise WorkloadError(f"this node knows no workload {name!r}", hint="outlive status")
        if files.load(name).leader == config.node.name:
            raise WorkloadError(f"this node leads {name} itself: there is nothing to fence on {node}")
    chosen = {name: spec for name, spec in known.items() if name in names or not names}
    terms = {name: files.load(name).term for name in chosen}
    if names:
        return terms
    return {name: term for name, term in terms.items() if node == _holder(files, chosen[name])}


def _holder(files: TermFiles, spec: WorkloadSpec) -> str:
    """Return who may lead the next term as of what is on disk here."""
    record = files.load(spec.name)
    if record.mark != "yielded":
        return record.leader
    return record.heir or successor(spec, record.leader)
