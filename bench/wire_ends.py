"""Both ends of the wire as processes have them: real keys, a real store, a real receiver and stream.

Two processes share a directory: keys are exchanged through it, and the store of the receiving one (`b`) lies
below it. `bench.stream_node` and the system tests of the wire are made of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from common import keys
from common.config import Node, NodeConfig, Peer
from common.errors import AuthError
from common.keyring import Keyring
from common.messages import Hello
from common.model import EpochId, WorkloadSpec
from common.terms import TermGuard
from common.threads import in_thread
from primary.session import DEFAULT_STREAM_TIMING, StreamTiming
from primary.stream import ReplicaStream
from replica.receive import Receiver
from replica.store import EpochRecord, EpochStore

_FOLD_EVERY_S = 0.5


def key_of(directory: Path, name: str) -> keys.KeyPair:
    """Return a node's key; made by whoever asks first, so that one process has to be the first."""
    path = directory / f"{name}.key"
    try:
        return keys.load(path)
    except AuthError:
        return keys.generate(path)


def open_store(directory: Path, workload: str) -> EpochStore:
    """Open the store of `b` with the chain length that nodes have by default and no room kept free."""
    return EpochStore.open(directory / "store", workload, min_free_bytes=0, max_levels=8)


async def receive(
    directory: Path, store: EpochStore, addresses: tuple[str, str], port: int, ready: Callable[[int], None]
) -> None:
    """Be `b`: receive from `a`, and fold, until cancelled. `ready` is told the port (0: any free one)."""
    config = NodeConfig(
        node=Node(name="b", address=addresses[1], agent_port=port),
        peers=(Peer(name="a", address=addresses[0], public_key=key_of(directory, "a").public),),
    )

    async def accept(hello: Hello) -> None:
        return None

    async def restorable(workload: str, record: EpochRecord) -> tuple[bool, tuple[str, ...]]:
        return True, ()

    receiver = Receiver(
        zmq.asyncio.Context(),
        config,
        Keyring(key_of(directory, "b"), config.peers),
        stores=lambda workload: store,
        guard=TermGuard(lambda workload, leadership: None),
        accept=accept,
        readiness=restorable,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(receiver.run())
        await receiver.listening.wait()
        ready(receiver.port)
        while True:
            await asyncio.sleep(_FOLD_EVERY_S)
            if store.fold_due():
                await in_thread(store.fold)


def stream_to_b(
    directory: Path,
    address: str,
    port: int,
    spec: WorkloadSpec,
    *,
    on_acknowledged: Callable[[EpochId], None],
    timing: StreamTiming = DEFAULT_STREAM_TIMING,
) -> ReplicaStream:
    """Make the stream of `a`, which leads in term 1, to `b`."""
    public_key = key_of(directory, "b").public
    peer = Peer(name="b", address=address, public_key=public_key, agent_port=port)
    return ReplicaStream(
        zmq.asyncio.Context(),
        node="a",
        keys=Keyring(key_of(directory, "a"), [peer]),
        peer=peer,
        spec=spec,
        term=1,
        incarnation="i",
        on_acknowledged=on_acknowledged,
        timing=timing,
    )
