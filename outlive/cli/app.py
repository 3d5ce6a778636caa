"""The tree of verbs, and what becomes of their errors: one line of what and why, a hint, an exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import click
from click.shell_completion import get_completion_class

from common.errors import OutliveError
from outlive import __version__
from outlive.cli import DEBUG_VARIABLE
from outlive.cli.call import Call, Verbs, examples, group_config_option, output_option
from outlive.cli.explain import explain
from outlive.cli.fence import accept_fence, fence
from outlive.cli.handover import drain, switchover
from outlive.cli.node import agent, config, doctor, keeper, keys
from outlive.cli.output import Answer, error_answer, print_answer
from outlive.cli.pause import pause, resume
from outlive.cli.records import events, history
from outlive.cli.resync import resync
from outlive.cli.running import print_error
from outlive.cli.status import status
from outlive.cli.store import store
from outlive.cli.trial import demo, lab
from outlive.cli.verify import verify
from outlive.cli.workloads import failover, protect, start, stop, unprotect

_COMPLETION_VARIABLE = "_OUTLIVE_COMPLETE"
_INTERRUPTED = 130


class CompletionAnswer(Answer, frozen=True, kw_only=True):
    """The text that a shell is to evaluate."""

    shell: str
    script: str


@click.group(
    cls=Verbs,
    params=[group_config_option(), output_option()],
    context_settings={"max_content_width": 100},
    epilog=examples(
        "outlive keys generate                 a new node's key",
        "outlive config example > node.toml    a file to start from",
        "outlive doctor                        can this machine do it?",
        "outlive status                        how things stand",
    ),
)
@click.version_option(__version__, prog_name="outlive")
def outlive() -> None:
    """Keeps a hot standby of any Linux process or container, so that it outlives its machine.

    Answers go to stdout, everything else to stderr. Every verb takes --output json, and then prints one
    object with a schema_version. Exit codes: docs/reference/exit-codes.md; 2 is a wrong command line.
    """


@outlive.command(epilog=examples('eval "$(outlive completion bash)"'))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def completion(call: Call, shell: str) -> None:
    """Print what makes a shell complete verbs and options."""
    complete = get_completion_class(shell)
    assert complete is not None  # noqa: S101 - the choice above has only shells that click knows
    script = complete(outlive, {}, "outlive", _COMPLETION_VARIABLE).source()
    call.show(CompletionAnswer(shell=shell, script=script), script)


for _verb in (
    agent,
    keeper,
    status,
    explain,
    events,
    history,
    protect,
    unprotect,
    start,
    stop,
    switchover,
    drain,
    failover,
    fence,
    accept_fence,
    pause,
    resume,
    resync,
    verify,
    store,
    config,
    keys,
    doctor,
    demo,
    lab,
):
    outlive.add_command(_verb)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; return the exit code. Errors are told, never shown as a traceback.

    With OUTLIVE_DEBUG set, errors that are not about the command line itself are raised instead.
    """
    call = Call()
    try:
        code = outlive.main(
            list(arguments),
            prog_name="outlive",
            complete_var=_COMPLETION_VARIABLE,
            standalone_mode=False,
            obj=call,
        )
    except click.ClickException as error:
        error.show()
        if call.json or _wants_json(arguments):
            wrong = OutliveError(error.format_message(), hint="outlive --help")
            print_answer(error_answer(wrong, exit_code=error.exit_code))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        told = _told(error)
        print_error(told)
        if call.json:
            print_answer(error_answer(told))
        return told.exit_code
    return code if isinstance(code, int) else 0


def _told(error: Exception) -> OutliveError:
    """Return what the operator is told about an error."""
    if isinstance(error, OutliveError):
        return error
    if isinstance(error, PermissionError):
        return OutliveError(f"permission denied: {error.filename}", hint="run it as root")
    return OutliveError(
        f"a defect in Outlive: {type(error).__name__}: {error}",
        hint=f"run it again with {DEBUG_VARIABLE}=1 and report what it prints",
    )


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line that could not be read asks for JSON."""
    return "--output=json" in arguments or ("--output", "json") in pairwise(arguments)
