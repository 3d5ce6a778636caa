"""One end of the wire, as a process: `wire_node.py a|b DIRECTORY ADDRESS-A ADDRESS-B`.

`b` receives into a real store below the directory. `a` streams an epoch of 2,000 pages every 100 ms, one page
of it changed, and prints what is acknowledged. Keys are exchanged through the directory.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import zmq.asyncio

from common import keys
from common.config import Node, NodeConfig, Peer
from common.errors import AuthError
from common.keyring import Keyring
from common.terms import TermGuard
from primary.session import StreamTiming
from primary.stream import ReplicaStream
from replica.receive import Receiver
from replica.store import EpochStore
from tests.unit.wire_fakes import SPEC, TASK, captured, offer, page

PORT = 7701


def say(text: str) -> None:
    print(text, flush=True)


def key_of(directory: Path, name: str) -> keys.KeyPair:
    path = directory / f"{name}.key"
    try:
        return keys.load(path)
    except AuthError:
        return keys.generate(path)


async def receive(directory: Path, addresses: list[str]) -> None:
    store = EpochStore.open(directory / "store", "redis", min_free_bytes=0, max_levels=8)
    say(f"newest {store.newest.id if store.newest else None}")
    config = NodeConfig(
        node=Node(name="b", address=addresses[1], agent_port=PORT),
        peers=(Peer(name="a", address=addresses[0], public_key=key_of(directory, "a").public),),
    )

    async def accept(hello: object) -> None:
        return None

    async def ready(workload: str, record: object) -> tuple[bool, tuple[str, ...]]:
        return True, ()

    receiver = Receiver(
        zmq.asyncio.Context(),
        config,
        Keyring(key_of(directory, "b"), config.peers),
        stores=lambda workload: store,
        guard=TermGuard(lambda workload, leadership: None),
        accept=accept,
        readiness=ready,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(receiver.run())
        await receiver.listening.wait()
        say("key")
        while True:
            await asyncio.sleep(0.5)
            if store.fold_due():
                await asyncio.to_thread(store.fold)


async def stream(directory: Path, addresses: list[str]) -> None:
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

    peer = Peer(name="b", address=addresses[1], public_key=key_of(directory, "b").public, agent_port=PORT)
    sender = ReplicaStream(
        zmq.asyncio.Context(),
        node="a",
        keys=Keyring(key_of(directory, "a"), [peer]),
        peer=peer,
        spec=SPEC,
        term=1,
        incarnation="i",
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
    asyncio.run((receive if role == "b" else stream)(Path(where), at))
