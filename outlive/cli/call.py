"""One call of the command line: which configuration, which output, and how the node's processes are asked.

Every verb is a `Verb`: it takes `--config` and `--output`, and gets the `Call` that they end up in.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from common import errors
from common.config import DEFAULT_PATH, NodeConfig, load_config
from common.control import KeeperRequest, Refused
from common.errors import OutliveError, ProtocolError
from outlive.cli import CONFIG_VARIABLE
from outlive.cli.output import Answer, Rows, print_answer, print_view

ASK_DEADLINE_S = 5.0

_Expected = TypeVar("_Expected")


@dataclass(slots=True)
class Call:
    """What the options common to all verbs say."""

    config_path: Path = DEFAULT_PATH
    json: bool = False

    def config(self) -> NodeConfig:
        """Read this node's configuration. Raises ConfigError."""
        return load_config(self.config_path)

    def ask(
        self,
        endpoint: str,
        request: KeeperRequest,
        expected: type[_Expected],
        *,
        deadline_s: float = ASK_DEADLINE_S,
    ) -> _Expected:
        """Ask agent or keeper; return the answer. A refusal is raised as the error that it names.

        Raises UnreachableError too, and ProtocolError for an answer of another kind.
        """
        from common.control_channel import ask

        answer: object = asyncio.run(ask(endpoint, request, deadline_s))
        if isinstance(answer, Refused):
            raise refusal(answer)
        if not isinstance(answer, expected):
            raise ProtocolError(
                f"{endpoint} answered with {type(answer).__name__} where {expected.__name__} was expected",
                hint="agent, keeper and command line must be one version: restart the older ones",
            )
        return answer

    def show(self, answer: Answer, *view: Rows | str, one_line: bool = False) -> None:
        """Print the answer on stdout, as the caller wants it."""
        if self.json:
            print_answer(answer, one_line=one_line)
        else:
            print_view(*view)

    @staticmethod
    def talk(text: str) -> None:
        """Say something that is not the answer."""
        print(text, file=sys.stderr, flush=True)


def refusal(answer: Refused) -> OutliveError:
    """Return the error that a refusal names; an OutliveError for a name that is not known."""
    kind = getattr(errors, answer.error, OutliveError)
    if not (isinstance(kind, type) and issubclass(kind, OutliveError)):
        kind = OutliveError
    return kind(answer.message, hint=answer.hint)


def config_option(**particulars: Any) -> click.Option:
    """Return `--config`, which sets the call's path when it is given."""
    return click.Option(
        ["--config"],
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="PATH",
        callback=_set_config,
        expose_value=False,
        **particulars,
    )


def output_option() -> click.Option:
    """Return `--output`."""
    return click.Option(
        ["--output"],
        type=click.Choice(["table", "json"]),
        callback=_set_output,
        expose_value=False,
        help="For people (table, the default) or for programs (json).",
    )


class Verb(click.Command):
    """A verb: has the common options after its own."""

    def __init__(self, *arguments: Any, **particulars: Any) -> None:
        super().__init__(*arguments, **particulars)
        self.params = [
            *self.params,
            config_option(help="This node's file."),
            output_option(),
        ]


class Verbs(click.Group):
    """A group whose verbs are `Verb`s and whose groups are `Verbs`."""

    command_class = Verb
    group_class = type


def examples(*lines: str) -> str:
    """Return the examples that close a verb's help."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def shown_command(command: Sequence[str]) -> str:
    """Return a command as a shell would be given it."""
    return shlex.join(command)


def _set_config(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Call).config_path = value


def _set_output(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Call).json = value == "json"


def group_config_option() -> click.Option:
    """Return the group's `--config`, which the environment may set."""
    return config_option(
        envvar=CONFIG_VARIABLE,
        show_envvar=True,
        help=f"This node's file; {DEFAULT_PATH} by default.",
    )
