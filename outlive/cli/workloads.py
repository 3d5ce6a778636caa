"""The verbs that change something: protect, unprotect, start, stop, failover.

In: a declaration or a name. Out: an order to the keeper, and how it went, followed until the keeper's role
machine has come to rest. Declarations go into the node's file first; the keeper is told what they say.
"""

from __future__ import annotations

import shlex
import time
from typing import Literal

import click

from common.config import NodeConfig
from common.container import running_init_pid
from common.control import Done, Failover, ForgetWorkload, StartWorkload, StopWorkload
from common.errors import ConfigError, UnreachableError, WorkloadError
from common.model import FilePath, HealthCheck, WorkloadSpec
from common.terms_file import known_workloads
from outlive.cli.call import Call, Verb, examples, shown_command
from outlive.cli.follow import Outcome, find_workload, follow_role
from outlive.cli.output import Answer, Rows
from outlive.cli.status import ask_status
from outlive.declare import declare_workload, withdraw_workload


class WorkloadAnswer(Answer, frozen=True, kw_only=True):
    """What became of a workload: how the role machine came to rest."""

    workload: str
    detail: str
    outcome: Outcome | None
    """None: the keeper was asked for nothing."""


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive protect web --health-tcp 8080 -- python3 -m http.server 8080",
        "outlive protect redis --node a --node b --vip 10.0.0.100/24 --health-tcp 6379 \\",
        '    --right-to-lead fence -- redis-server --save "" --appendonly no',
        "outlive protect worker --no-start --env QUEUE=jobs --files /var/lib/worker -- /srv/worker",
    ),
)
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--node",
    "nodes",
    multiple=True,
    metavar="NODE",
    help="Who may run it, in order of succession; may be repeated. Default: this node, then its peers.",
)
@click.option("--vip", metavar="ADDRESS/LEN", help="Virtual address that moves with it.")
@click.option("--health-tcp", type=click.IntRange(1, 65535), metavar="PORT", help="Healthy: it accepts.")
@click.option("--health-http", metavar=":PORT/PATH", help="Healthy: it answers with 2xx or 3xx.")
@click.option("--health-command", metavar="CMD", help="Healthy: this exits with 0 on the node.")
@click.option("--env", "environment", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--user", default="0:0", show_default=True, metavar="UID[:GID]")
@click.option("--working-directory", default="/", show_default=True, metavar="PATH")
@click.option("--files", multiple=True, metavar="PATH", help="A directory of its own; may be repeated.")
@click.option("--shared", multiple=True, metavar="PATH", help="A directory that all nodes see alike.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="A name ('*.tmp') or path ('/data/cache') below --files that is not replicated; may be repeated.",
)
@click.option(
    "--interval-ms",
    default=0,
    show_default="200 with the fast memory backend, 1000 with stock",
    help="Time between epochs.",
)
@click.option(
    "--right-to-lead", type=click.Choice(["manual", "fence", "etcd"]), default="manual", show_default=True
)
@click.option(
    "--on-exit", type=click.Choice(["restart", "failover", "stop"]), default="stop", show_default=True
)
@click.option("--no-start", is_flag=True, help="Declare it only.")
@click.pass_obj
def protect(
    call: Call,
    name: str,
    command: tuple[str, ...],
    nodes: tuple[str, ...],
    vip: str | None,
    health_tcp: int | None,
    health_http: str | None,
    health_command: str | None,
    environment: tuple[str, ...],
    user: str,
    working_directory: str,
    files: tuple[str, ...],
    shared: tuple[str, ...],
    exclude: tuple[str, ...],
    interval_ms: int,
    right_to_lead: Literal["manual", "fence", "etcd"],
    on_exit: str,
    no_start: bool,
) -> None:
    """Declare a workload in this node's file, and start it.

    The file keeps its comments; it is replaced at once, and only if it is good with the new block in it.
    docs/reference/config.md has more keys than there are options here.
    """
    config = call.config()
    health = None
    if health_tcp is not None or health_http is not None or health_command is not None:
        words = tuple(shlex.split(health_command)) if health_command is not None else None
        health = HealthCheck(tcp=health_tcp, http=health_http, command=words)
    spec = WorkloadSpec(
        name=name,
        nodes=nodes or (config.node.name, *(peer.name for peer in config.peers)),
        command=command,
        environment=dict(_pair(text) for text in environment),
        user=user,
        working_directory=working_directory,
        files=(*(FilePath(path=path) for path in files), *(FilePath(path=p, shared=True) for p in shared)),
        exclude=exclude,
        vip=vip,
        health=health,
        right_to_lead=right_to_lead,
        on_exit="restart" if on_exit == "restart" else "failover" if on_exit == "failover" else "stop",
        epoch_interval_ms=interval_ms,
    )
    config = declare_workload(call.config_path, spec)
    call.talk(f"{name}: {shown_command(command)} is declared in {call.config_path}")
    if no_start:
        answer = WorkloadAnswer(workload=name, detail="declared, not started", outcome=None)
        call.show(answer, f"{name} is declared; start it with: outlive start {name}")
        return
    _start(call, config, spec)


@click.command(cls=Verb, epilog=examples("outlive stop redis && outlive unprotect redis"))
@click.argument("name")
@click.pass_obj
def unprotect(call: Call, name: str) -> None:
    """Protect a stopped workload no longer: the keeper forgets it, its block leaves this node's file.

    Stored epochs are not deleted. On a replica it is forgotten too, unless its leader sends it again.
    """
    config = call.config()
    declared = any(workload.name == name for workload in config.workloads)
    if not declared and name not in known_workloads(config):
        _declared(call, config, name)
    if running_init_pid(config, name) is not None:
        raise WorkloadError(f"{name} runs here", hint=f"outlive stop {name}")
    detail = f"{name} was not known to the keeper"
    if any(workload.name == name for workload in ask_status(call, config).workloads):
        detail = call.ask(config.keeper_endpoint, ForgetWorkload(workload=name), Done).detail
    if declared:
        withdraw_workload(call.config_path, name)
    answer = WorkloadAnswer(workload=name, detail=detail, outcome=None)
    call.show(answer, f"{name} is protected no longer")


@click.command(cls=Verb, epilog=examples("outlive start redis", "outlive start redis --off a"))
@click.argument("name")
@click.option(
    "--off",
    "peers_are_off",
    multiple=True,
    metavar="NODE",
    help="You have made sure yourself that this node is off. If it is not, two of them may run.",
)
@click.pass_obj
def start(call: Call, name: str, peers_are_off: tuple[str, ...]) -> None:
    """Start a workload here, afresh. Refused where it may run elsewhere (exit code 10).

    A first start needs the other nodes to be heard, or --off for those that are not set up yet.

    If it runs here already, that is said and nothing is changed (exit code 0).
    """
    config = call.config()
    spec = known_workloads(config).get(name)
    if spec is None:
        raise WorkloadError(
            f"no workload {name!r} is declared in {call.config_path}, and no peer has sent one",
            hint=f"declare it: outlive protect {name} -- COMMAND…",
        )
    _start(call, config, spec, peers_are_off)


@click.command(cls=Verb, epilog=examples("outlive stop redis"))
@click.argument("name")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for its end.")
@click.pass_obj
def stop(call: Call, name: str, timeout_s: float) -> None:
    """End a workload and keep it ended: nobody takes it over. Start it again with `outlive start`."""
    config = call.config()
    asked_wall_s = time.time()
    before = find_workload(call, config, name)
    done = call.ask(config.keeper_endpoint, StopWorkload(workload=name), Done)
    outcome = follow_role(
        *(call, config, name), goal="stopped", since_term=0, asked_wall_s=asked_wall_s, timeout_s=timeout_s
    )
    already = before is not None and before.state == "stopped" and not before.running
    _show(call, name, done.detail, outcome, already="is stopped" if already else "")


@click.command(
    cls=Verb,
    epilog=examples(
        "outlive failover redis --accept-data-loss",
        "outlive failover redis --accept-data-loss --old-primary-is-off a",
        "outlive failover redis --accept-data-loss --to c       if only c has its epochs",
    ),
)
@click.argument("name")
@click.option("--accept-data-loss", is_flag=True, help="What the newest epoch here does not hold is lost.")
@click.option(
    "--old-primary-is-off",
    default="",
    metavar="NODE",
    help="You have made sure yourself that this node is off. If it is not, two of them will run.",
)
@click.option(
    "--off",
    "others_are_off",
    multiple=True,
    metavar="NODE",
    help="The same for another node, where a third one has to be heard.",
)
@click.option("--to", default="", metavar="NODE", help="Not this node is to lead, but that one.")
@click.option("--timeout", "timeout_s", default=300.0, show_default=True, help="Seconds to follow it.")
@click.pass_obj
def failover(
    call: Call,
    name: str,
    accept_data_loss: bool,
    old_primary_is_off: str,
    others_are_off: tuple[str, ...],
    to: str,
    timeout_s: float,
) -> None:
    """Let this node take a workload over, and follow that until it serves from here.

    The old primary is fenced first; if that is not confirmed, nothing happens (exit code 10).

    With three nodes, only the first of `nodes` that is not the old primary may take over. If only the third
    one has epochs (outlive status on each), run it on the first with --to: the old primary is fenced, and
    the right to lead given to that node, on which this verb is run then without --to.
    """
    config = call.config()
    asked_wall_s = time.time()
    before = find_workload(call, config, name)
    request = Failover(
        workload=name,
        accept_data_loss=accept_data_loss,
        old_primary_is_off=old_primary_is_off,
        to=to,
        others_are_off=others_are_off,
    )
    done = call.ask(config.keeper_endpoint, request, Done)
    outcome = follow_role(
        *(call, config, name),
        goal="yielded" if to not in ("", config.node.name) else "leading",
        since_term=before.term + 1 if before is not None else 1,
        asked_wall_s=asked_wall_s,
        timeout_s=timeout_s,
    )
    _show(call, name, done.detail, outcome)


def _start(call: Call, config: NodeConfig, spec: WorkloadSpec, peers_are_off: tuple[str, ...] = ()) -> None:
    asked_wall_s = time.time()
    try:
        before = find_workload(call, config, spec.name)
        request = StartWorkload(spec=spec, peers_are_off=peers_are_off)
        done = call.ask(config.keeper_endpoint, request, Done)
    except UnreachableError as error:
        raise UnreachableError(
            f"{spec.name} is declared, but not started: {error.message}",
            hint=f"start the keeper and the agent, then: outlive start {spec.name}",
        ) from error
    outcome = follow_role(
        *(call, config, spec.name),
        goal="leading",
        since_term=before.term if before is not None else 0,
        asked_wall_s=asked_wall_s,
        timeout_s=60.0,
    )
    already = before is not None and before.state == "leading" and before.running
    _show(call, spec.name, done.detail, outcome, already="runs here" if already else "")


def _declared(call: Call, config: NodeConfig, name: str) -> WorkloadSpec:
    found = next((workload for workload in config.workloads if workload.name == name), None)
    if found is None:
        raise WorkloadError(
            f"no workload {name!r} is declared in {call.config_path}",
            hint=f"declare it: outlive protect {name} -- COMMAND…",
        )
    return found


def _show(call: Call, name: str, detail: str, outcome: Outcome, *, already: str = "") -> None:
    answer = WorkloadAnswer(workload=name, detail=detail, outcome=outcome)
    row = (name, outcome.role, outcome.state, str(outcome.term), f"{outcome.took_s:.1f} s", outcome.reason)
    columns = ("WORKLOAD", "ROLE", "STATE", "TERM", "TOOK", "REASON")
    rows = Rows(columns, [row], frozenset({"TERM", "TOOK"}))
    call.show(answer, *((f"{name} {already} already: nothing was changed", "") if already else ()), rows)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--env {text!r} is not KEY=VALUE", hint="e.g. --env LANG=C.UTF-8")
    return key, value
