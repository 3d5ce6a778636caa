"""A benchmark that is interrupted takes down what it has started: Ctrl-C and SIGTERM cancel it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(measuring: Coroutine[Any, Any, T]) -> T:
    """Run a benchmark; when it is interrupted, wait until it has cleaned up, and exit."""

    async def watched() -> T:
        task = asyncio.ensure_future(measuring)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        sys.exit("interrupted")
