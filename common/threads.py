"""Blocking work beside the event loop, never left behind.

In: a function. Out: what it returns, when it has returned. `asyncio.to_thread` alone returns at once when
cancelled, while its thread goes on with files and buffers that the caller then takes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def in_daemon_thread(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Run `function(*arguments)` in a thread of its own, and return the future of what comes of it.

    For what may never return, such as a look at a file of a server that is gone: it holds up neither a pool's
    other work nor the end of the process. To cancel the future does not end the thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", value))

    def work() -> None:
        value, error = None, None
        try:
            value = function(*arguments)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, value, error)

    threading.Thread(target=work, name=getattr(function, "__name__", ""), daemon=True).start()
    return future


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
