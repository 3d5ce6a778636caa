"""Writes `docs/reference/cli.md` out of the verbs' own help; a test compares the two.

python -m outlive.cli.reference > docs/reference/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from outlive.cli.app import outlive

_WIDTH = 90
_INTRODUCTION = """\
# Command line

What each verb's `--help` says. Made by `python -m outlive.cli.reference`; edit the help texts instead.

- Answers go to stdout, everything else (progress, errors, hints) to stderr.
- `--output json` prints one object with `schema_version` (1); with `--watch` and `--follow`, one object a
  line. Keys may be added; none is removed or given another meaning without a new `schema_version`.
- When a verb fails, JSON has `{"schema_version": 1, "error": {"kind", "message", "hint", "exit_code",
  "retryable"}}` in the answer's place. [Exit codes](exit-codes.md).
- `OUTLIVE_CONFIG` names the node's file where `--config` doesn't; `OUTLIVE_DEBUG=1` shows tracebacks.
"""


def reference() -> str:
    """Return the whole page."""
    return "\n".join([_INTRODUCTION, *_sections(outlive, "outlive", None)])


def _sections(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, parent, info_name=path.split()[-1], terminal_width=_WIDTH)
    context.max_content_width = _WIDTH
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"## {path}\n\n```text\n{text}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _sections(child, f"{path} {name}", context)


if __name__ == "__main__":
    print(reference(), end="")
