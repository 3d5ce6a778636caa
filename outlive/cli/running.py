"""Agent and keeper in the foreground: from a configuration file to the coroutine, and to an exit code.

Loaded by the keeper's own process, hence light: neither click nor rich, and the roles only when they run.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from common.config import NodeConfig, load_config
from common.errors import OutliveError
from outlive.cli import DEBUG_VARIABLE

Role = Callable[[NodeConfig, Callable[[], NodeConfig]], Coroutine[Any, Any, object]]
"""Takes the configuration, and what reads it again."""


def run_keeper_process(config_path: Path) -> int:
    """Run this node's keeper until it is told to stop; return the exit code."""
    try:
        run_foreground(config_path, _keeper)
    except OutliveError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def run_agent(config_path: Path) -> None:
    """Run this node's agent until it is told to stop. Raises what stopped it."""
    run_foreground(config_path, _agent)  # which forks, before there is a loop


def run_keeper(config_path: Path) -> None:
    """Run this node's keeper until it is told to stop. Raises what stopped it."""
    run_foreground(config_path, _keeper)


def run_foreground(config_path: Path, role: Role) -> None:
    """Run a role's coroutine to its end; an OutliveError from within its tasks comes out as itself."""
    configure_logs("info")
    # Memory of workloads and keys pass through files: whatever forgets its mode is for its owner alone.
    os.umask(0o077)
    reread = partial(load_config, config_path)
    try:
        asyncio.run(role(reread(), reread))
    except BaseExceptionGroup as group:
        ours = group.subgroup(OutliveError)
        while isinstance(ours, BaseExceptionGroup):
            ours = ours.exceptions[0]  # type: ignore[assignment]
        if ours is None:
            raise
        raise ours from group


def configure_logs(level: Literal["info", "warning"]) -> None:
    """Send structured logs from `level` up to stderr, one line of key=value each: stdout is for answers."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def print_error(error: OutliveError) -> None:
    """Tell an error on stderr: what and why, and what to do about it."""
    print(f"outlive: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"   hint: {error.hint}", file=sys.stderr)


def _agent(config: NodeConfig, reread: Callable[[], NodeConfig]) -> Coroutine[None, None, None]:
    from outlive.agent import run_agent
    from outlive.agent_beats import AgentBeats

    return run_agent(config, reread, AgentBeats.fork(config, reread))


async def _keeper(config: NodeConfig, reread: Callable[[], NodeConfig]) -> None:
    from outlive.keeper import run_keeper

    await run_keeper(config, reread=reread)
