"""Epochs, a store in memory, and a pair of nodes on loopback, for tests of what goes over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq
import zmq.asyncio

from common.bulk import IN_BASE, REPEATED, SEEDED, ZERO
from common.config import Node, NodeConfig, Peer
from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey
from common.errors import CaptureError
from common.keyring import Keyring
from common.keys import KeyPair
from common.messages import SPOKEN, Hello, Nack, Versions
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.terms import TermGuard
from common.transport import LinkTiming
from primary.backlog import SharedEpoch
from primary.capture import CapturedEpoch, FreezeTimes, MetadataFile, SpacePages
from primary.session import StreamTiming
from primary.stream import ReplicaStream
from replica.holdings import HeldPart
from replica.levels import BaseError
from replica.receive import Receiver, ReceiverLimits

Memory = dict[SpaceKey, dict[int, bytes]]
"""Content of each page, by space and page number."""

TASK = SpaceKey("task", 1)
SPEC = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",))
QUICK = StreamTiming(greeting_s=5, credit_s=5, acknowledge_s=10, retry_s=0.01, retry_max_s=0.05)
QUICK_LINK = LinkTiming(ping_ms=200, dead_after_ms=1000)


def new_keys() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def page(seed: int) -> bytes:
    """A page that does not compress, the same for the same seed; zeros for 0."""
    return (
        bytes(PAGE_BYTES) if seed == 0 else hashlib.shake_128(seed.to_bytes(8, "little")).digest(PAGE_BYTES)
    )


def identity_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest() if any(content) else bytes(16)


class PagesInMemory:
    """Contents of one epoch's pages; counts releases."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.released = 0
        self.unreadable = False
        self.delay_s = 0.0

    def read(self, key: SpaceKey, rows: np.ndarray, into: memoryview) -> None:
        if self.released or self.unreadable:
            raise CaptureError("the epoch cannot be read")
        time.sleep(self.delay_s)
        numbers = sorted(self._memory[key])
        for place, row in enumerate(rows):
            into[place * PAGE_BYTES : (place + 1) * PAGE_BYTES] = self._memory[key][numbers[row]]

    def release(self) -> None:
        self.released += 1


def captured(
    number: int,
    memory: Memory,
    *,
    directory: Path | None = None,
    metadata: dict[str, bytes] | None = None,
    incarnation: str = "first",
    stands_on: EpochId | None = None,
    term: int = 1,
) -> CapturedEpoch:
    """An epoch as a capture backend would yield it. Metadata needs a directory for its files."""
    spaces = []
    for key, pages in memory.items():
        numbers = np.array(sorted(pages), dtype=np.uint64)
        identity = b"".join(identity_of(pages[n]) for n in sorted(pages))
        spaces.append(
            SpacePages.of(
                key,
                numbers,
                np.full(len(numbers), PE_PRESENT | (PE_LAZY if key.kind == "task" else 0), dtype=np.uint8),
                np.frombuffer(identity, dtype=np.uint64).reshape(len(numbers), 2),
            )
        )
    files = []
    for name, content in (metadata or {}).items():
        assert directory is not None
        path = directory / f"{number}-{name}"
        path.write_bytes(content)
        files.append(MetadataFile(name, path, len(content)))
    return CapturedEpoch(
        workload="redis",
        id=EpochId(term, number),
        incarnation=incarnation,
        stands_on=stands_on,
        frozen_wall_s=1000.0 + number % 1_000_000_000,  # a liar may have made the number a huge one
        freeze=FreezeTimes(0.1, 0.2, 0.3),
        spaces=tuple(spaces),
        metadata=tuple(files),
        pages=PagesInMemory(memory),
    )


@dataclass
class StoredEpoch:
    id: EpochId
    base: EpochId | None
    memory: Memory
    metadata: dict[str, bytes]
    sent_pages: int
    """Pages whose content came."""
    committed_wall_s: float = 2000.0
    frozen_wall_s: float = 1000.0
    last: bool | None = None


class StoreInMemory:
    """Keeps every epoch whole, so that a test can compare it with what was captured."""

    def __init__(self) -> None:
        self.epochs: dict[EpochId, StoredEpoch] = {}
        self.volatile = True
        self.aborted = 0
        self.begun = 0
        self.fail_begin: Exception | None = None
        self.fail_commit: Exception | None = None
        self.delay_s = 0.0
        """How long each block of pages takes."""
        self.open = threading.Event()
        """While it is not set, the store is busy with the block that came last."""
        self.open.set()
        self.busy = False
        self.seeds: dict[int, Memory] = {}
        self.seed_name = 0
        self.asked: list[EpochId | int] = []
        self.told_at_once = 1 << 20
        self.fail_sample: Exception | None = None
        self.doubts: list[str] = []
        self.doubtful_until: EpochId | None = None

    @property
    def newest(self) -> StoredEpoch | None:
        return self.epochs[max(self.epochs)] if self.epochs else None

    @property
    def seed(self) -> int:
        return self.seed_name

    def identify(self, what, key, first_row, most, hasher):
        memory = self.seeds[what] if isinstance(what, int) else self.epochs[what].memory
        self.asked.append(what)
        numbers = sorted(memory.get(key, {}))
        part = numbers[first_row : first_row + min(most, self.told_at_once)]
        identity = b"".join(identity_of(memory[key][n]) for n in part)
        return HeldPart(
            np.array(part, dtype=np.uint64),
            np.frombuffer(identity, dtype=np.uint64).reshape(len(part), 2),
            first_row + len(part) < len(numbers),
        )

    def sample(self, epoch, key, first, end, most, hasher):
        if self.fail_sample:
            raise self.fail_sample
        memory = self.epochs[epoch].memory.get(key, {})
        numbers = [number for number in sorted(memory) if first <= number < end]
        part = numbers[: min(most, self.told_at_once)]
        identity = b"".join(identity_of(memory[key_page]) for key_page in part)
        return HeldPart(
            np.array(part, dtype=np.uint64),
            np.frombuffer(identity, dtype=np.uint64).reshape(len(part), 2),
            len(part) < len(numbers),
        )

    def doubt(self, reason):
        self.doubts.append(reason)
        self.doubtful_until = self.newest.id

    def doubt_about(self, epoch):
        chain = []
        while epoch is not None:
            chain.append(epoch)
            epoch = self.epochs[epoch].base
        touched = self.doubtful_until is not None and min(chain) <= self.doubtful_until
        return self.doubts[-1] if touched else ""

    def begin(self, header, *, expected_bytes=0, restore_command=("criu", "restore"), seed=0):
        self.begun += 1
        if self.fail_begin:
            raise self.fail_begin
        if header.base is not None and header.base not in self.epochs:
            raise BaseError(f"{header.base} is not held")
        if header.base is not None and self.doubt_about(header.base):
            raise BaseError(f"{header.base} is in doubt")
        return _IncomingInMemory(self, header, self.seeds[seed] if seed else {})


class _IncomingInMemory:
    def __init__(self, store: StoreInMemory, header, seed: Memory) -> None:
        self._store = store
        self._seed = seed
        self._base = store.epochs[header.base].memory if header.base else {}
        self._pending: list[int] = []
        self._repeated: list[tuple[SpaceKey, int, int]] = []
        self._key = TASK
        self.epoch = StoredEpoch(
            header.id, header.base, {}, {}, 0, frozen_wall_s=header.frozen_wall_s, last=header.last
        )

    def metadata(self, name: str, data: bytes, *, more: bool = False) -> None:
        self.epoch.metadata[name] = self.epoch.metadata.get(name, b"") + bytes(data)

    def space(
        self, key: SpaceKey, numbers: np.ndarray, flags: np.ndarray, sources: np.ndarray | None = None
    ) -> None:
        assert not self._pending
        self._key = key
        pages = self.epoch.memory[key] = {}
        left = iter([] if sources is None else sources.tolist())
        for number, flag in zip(numbers.tolist(), flags.tolist(), strict=True):
            if flag & PE_PARENT:
                pages[number] = self._base[key][number]
            elif flag & ZERO:
                pages[number] = bytes(PAGE_BYTES)
            elif flag & REPEATED:
                self._repeated.append((key, number, next(left)))
            elif flag & SEEDED:
                pages[number] = self._seed[key][number]
            else:
                assert flag & PE_PRESENT
                self._pending.append(number)
        self.epoch.sent_pages += len(self._pending)
        self._pending.reverse()

    def pages(self, key: SpaceKey, data: bytes) -> None:
        assert key == self._key
        time.sleep(self._store.delay_s)
        self._store.busy = not self._store.open.is_set()
        assert self._store.open.wait(60)
        for at in range(0, len(data), PAGE_BYTES):
            self.epoch.memory[key][self._pending.pop()] = bytes(data[at : at + PAGE_BYTES])

    def commit(self) -> StoredEpoch:
        if self._store.fail_commit:
            raise self._store.fail_commit
        assert not self._pending
        for key, number, source in self._repeated:
            of = self._base if source & IN_BASE else self.epoch.memory
            self.epoch.memory[key][number] = of[key][source & ~IN_BASE]
        self._store.epochs[self.epoch.id] = self.epoch
        return self.epoch

    def abort(self) -> None:
        self._store.aborted += 1

    def interrupt(self) -> None:
        """Keep, like the real store, what came; a new seed has a new name."""
        self._store.aborted += 1
        lacking = set(self._pending)
        self._store.seed_name += 1
        self._store.seeds[self._store.seed_name] = {
            key: {n: content for n, content in pages.items() if key != self._key or n not in lacking}
            for key, pages in self.epoch.memory.items()
        }


@dataclass
class Pair:
    """Node a, which leads, and node b, which receives, on loopback in one process."""

    a: KeyPair = field(default_factory=new_keys)
    b: KeyPair = field(default_factory=new_keys)
    context_a: zmq.asyncio.Context = field(default_factory=zmq.asyncio.Context)
    store: StoreInMemory = field(default_factory=StoreInMemory)
    guard: TermGuard = field(default_factory=lambda: TermGuard(lambda workload, leadership: None))
    limits: ReceiverLimits = field(default_factory=ReceiverLimits)
    port: int = 0
    ring: Keyring | None = None
    """That of b, while it receives."""
    peers: tuple[Peer, ...] = ()
    readiness: Callable[[], tuple[bool, tuple[str, ...]]] = lambda: (True, ())
    hellos: list[Hello] = field(default_factory=list)
    versions: Versions = SPOKEN
    """What b speaks."""
    not_committed: list[tuple[str, Nack]] = field(default_factory=list)
    """What the receiving node was told of epochs that it did not keep."""

    def store_of(self, workload: str) -> StoreInMemory:
        return self.store

    def config(self) -> NodeConfig:
        peers = (Peer(name="a", address="127.0.0.1", public_key=self.a.public), *self.peers)
        return NodeConfig(node=Node(name="b", address="127.0.0.1", agent_port=self.port), peers=peers)

    @contextlib.asynccontextmanager
    async def receiving(self) -> AsyncIterator[Receiver]:
        async def accept(hello: Hello) -> None:
            self.hellos.append(hello)

        async def ready(workload: str, record: object) -> tuple[bool, tuple[str, ...]]:
            return self.readiness()

        self.ring = Keyring(self.b, self.config().peers)
        context = zmq.asyncio.Context()  # its end frees the port at once, like a process's
        receiver = Receiver(
            context,
            self.config(),
            self.ring,
            stores=self.store_of,
            guard=self.guard,
            accept=accept,
            readiness=ready,
            limits=self.limits,
            link_timing=QUICK_LINK,
            on_not_committed=lambda workload, nack: self.not_committed.append((workload, nack)),
            versions=self.versions,
        )
        task = asyncio.create_task(receiver.run())
        try:
            await receiver.listening.wait()
            self.port = receiver.port
            yield receiver
        finally:
            died = task.done()
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            context.destroy(linger=0)
            assert not died, result

    @contextlib.asynccontextmanager
    async def streaming(
        self,
        *,
        keys: KeyPair | None = None,
        node: str = "a",
        term: int = 1,
        port: int = 0,
        max_mib_per_s: float = 0.0,
        **options: object,
    ) -> AsyncIterator[ReplicaStream]:
        peer = Peer(
            name="b",
            address="127.0.0.1",
            public_key=self.b.public,
            agent_port=port or self.port,
            max_mib_per_s=max_mib_per_s,
        )
        options = {"spec": SPEC, "timing": QUICK, "link_timing": QUICK_LINK, **options}
        stream = ReplicaStream(
            self.context_a,
            node=node,
            keys=Keyring(keys or self.a, [peer]),
            peer=peer,
            term=term,
            incarnation="i",
            **options,
        )
        task = asyncio.create_task(stream.run())
        try:
            yield stream
        finally:
            assert not task.done(), task.exception()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def close(self) -> None:
        self.context_a.destroy(linger=0)


def offer(stream: ReplicaStream, epoch: CapturedEpoch) -> CapturedEpoch:
    """Offer an epoch that nobody else holds."""
    shared = SharedEpoch(epoch)
    stream.offer(shared)
    shared.drop()
    return epoch


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def acknowledged(stream: ReplicaStream, epoch: CapturedEpoch) -> None:
    await until(lambda: stream.progress.acknowledged == epoch.id)
