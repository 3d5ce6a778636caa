"""Blocking work beside the event loop, never left behind.

In: a function. Out: what it returns, when it has returned. `asyncio.to_thread` alone returns at once when
cancelled, while its thread goes on with files and buffers that the caller then takes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function(*arguments)` in a thread and return or raise what it does.

    When cancelled, waits for the thread first; what it returned or raised is lost then.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                continue  # being told twice does not make the thread stop
        if not work.cancelled():
            work.exception()  # seen, so that asyncio does not complain
        raise
