"""One end of the wire, as a process: `wire_node.py a|b DIRECTORY ADDRESS-A ADDRESS-B`.

`b` receives into a real store below the directory. `a` streams an epoch of 2,000 pages every 100 ms, one page
of it changed, and prints what is acknowledged. Keys are exchanged through the directory.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from bench.wire_ends import open_store, receive, stream_to_b
from primary.session import StreamTiming
from tests.unit.wire_fakes import SPEC, TASK, captured, offer, page

PORT = 7701


def say(text: str) -> None:
    print(text, flush=True)


async def follow(directory: Path, addresses: tuple[str, str]) -> None:
    store = open_store(directory, SPEC.name)
    say(f"newest {store.newest.id if store.newest else None}")
    await receive(directory, store, addresses, PORT, lambda port: say("key"))


async def stream(directory: Path, addresses: tuple[str, str]) -> None:
    number = int(time.time() * 10)  # greater than all of a node that ran before
    memory = {TASK: {n: page(n + 1) for n in range(2000)}}
    full_bytes = 0
    connected = False

    def acknowledged(epoch: object) -> None:
        nonlocal full_bytes, connected
        connected = True
        sent_bytes = sender.counters.bytes_sent
        say(f"acknowledged {epoch} {'full' if sent_bytes - full_bytes > 1_000_000 else 'base'}")
        full_bytes = sent_bytes

    sender = stream_to_b(
        directory,
        addresses[1],
        PORT,
        SPEC,
        on_acknowledged=acknowledged,
        timing=StreamTiming(greeting_s=2),
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.run())
        while True:
            number += 1
            memory = {TASK: {**memory[TASK], 7: page(100_000 + number)}}
            offer(sender, captured(number, memory))
            await asyncio.sleep(0.1)
            if connected and not sender.progress.connected:
                say("lost")
                connected = False


if __name__ == "__main__":
    role, where, *at = sys.argv[1:]
    asyncio.run((follow if role == "b" else stream)(Path(where), (at[0], at[1])))
