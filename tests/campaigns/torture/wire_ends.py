"""Both ends of the wire, real ones: a receiver with real stores, streams, and peers that say what they like.

Keeps what was captured of each epoch, so that what a store holds can be compared with it. Two workloads:
`redis` is what is attacked, `web` must not notice.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import msgspec
import numpy as np

import replica.receive
from common.config import Peer
from common.criu.images import PE_PARENT, PE_PRESENT, SpaceKey, expand, page_images, read_pagemap
from common.errors import AuthError, OutliveError
from common.identity import PageHasher
from common.keyring import Keyring
from common.keys import KeyPair
from common.messages import (
    BULK_BYTES,
    PROTOCOL,
    Ack,
    Buffer,
    Credit,
    Hello,
    Message,
    Readiness,
    decode,
    encode,
)
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.threads import in_thread
from common.transport import Link, open_link
from primary.capture import CapturedEpoch, SpacePages
from primary.outgoing import Held, Seed, epoch_messages
from primary.stream import ReplicaStream
from replica.receive import Receiver
from replica.store import EpochStore
from tests.unit.store_disks import UnsyncedDisk
from tests.unit.store_histories import WrongCommitError
from tests.unit.wire_fakes import QUICK_LINK, SPEC, Memory, Pair, captured, new_keys, offer, page, until

HASHER = PageHasher(7)
SPECS = {name: msgspec.structs.replace(SPEC, name=name) for name in ("redis", "web")}
SPACES = (SpaceKey("task", 1), SpaceKey("task", 9), SpaceKey("shmem", 3))
_FILE = "mm-1.img"
_UNCONNECTED_S = 1.0

Messages = list[list[Buffer]]


@dataclass(frozen=True)
class Sent:
    """What an epoch was when it was captured."""

    memory: Memory
    file: bytes


class Ends(Pair):
    """Node a leads, node b receives into real stores, node c is a peer that leads nothing."""

    def __init__(self, directory: Path, chance: random.Random, pages: int = 24) -> None:
        super().__init__()
        self.c = new_keys()
        self.peers = (Peer(name="c", address="127.0.0.1", public_key=self.c.public),)
        self.directory = directory
        self.chance = chance
        self.stores = {
            name: EpochStore.open(
                directory / "stores", name, min_free_bytes=0, max_levels=5, disk=UnsyncedDisk()
            )
            for name in SPECS
        }
        self.captured: dict[str, dict[EpochId, Sent]] = {name: {} for name in SPECS}
        self.acknowledged: dict[str, EpochId] = {}
        self.forged: set[EpochId] = set()
        """Epochs that whoever holds a valid key made up: what is in them is their business."""
        self.log = CountedLog()
        self.pages = pages
        self.number = 0
        self.stopped_s = 0.0
        """Longest time that nothing else in the receiver's process had its turn."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for store in self.stores.values():
            store.close()

    def store_of(self, workload: str) -> Any:
        return self.stores[workload]

    def epoch(self, workload: str = "redis", term: int = 1, memory: Memory | None = None) -> CapturedEpoch:
        """Capture the next epoch: most of the one before, some of it changed; or what `memory` says."""
        self.number += 1
        memory = memory or self._next_memory(workload)
        file = self.chance.randbytes(self.chance.choice((10, 3000, 40_000)))
        epoch = captured(
            self.number, memory, directory=self.directory, metadata={f"{workload}-{_FILE}": file}, term=term
        )
        spaces = []
        for space in epoch.spaces:
            content = b"".join(memory[space.key][n] for n in space.numbers.tolist())
            identity = HASHER.identify(memoryview(content))
            spaces.append(SpacePages.of(space.key, space.numbers, space.flags, identity))
        self.captured[workload][epoch.id] = Sent(memory, file)
        return replace(epoch, workload=workload, spaces=tuple(spaces))

    def _next_memory(self, workload: str) -> Memory:
        before = self.captured[workload]
        if not before:
            return {key: {n: page(n + 1) for n in range(self.pages)} for key in SPACES}
        memory = {key: dict(pages) for key, pages in before[max(before)].memory.items()}
        for _ in range(self.chance.randrange(1, 2 + self.pages // 2)):
            pages = memory[self.chance.choice(SPACES)]
            pages[self.chance.randrange(self.pages * 2)] = page(self.chance.randrange(2000) % 1990)
        return memory

    def messages(
        self, epoch: CapturedEpoch, base: CapturedEpoch | None, term: int = 1, seed: Seed | None = None
    ) -> Messages:
        """What a sound primary says to send an epoch."""
        held = Held.of(base) if base else None
        return [list(frames) for frames in epoch_messages(epoch, term, held, seed, bytearray(BULK_BYTES))]

    @asynccontextmanager
    async def living(self) -> AsyncIterator[Receiver]:
        """Receive, and fold as an agent does."""

        async def fold() -> None:
            while True:
                for store in self.stores.values():
                    if store.fold_due():
                        await in_thread(store.fold)
                await asyncio.sleep(0.05)

        async def accept(hello: Hello) -> None:
            if hello.workload not in self.stores:
                raise AuthError(f"{hello.workload} is not followed here")

        async def look() -> None:
            loop = asyncio.get_running_loop()
            while True:
                began_s = loop.time()
                await asyncio.sleep(0)
                self.stopped_s = max(self.stopped_s, loop.time() - began_s)
                await asyncio.sleep(0.001)

        async with self.receiving() as receiver:
            receiver._accept = accept
            folding = asyncio.create_task(fold())
            looking = asyncio.create_task(look())
            try:
                yield receiver
            finally:
                looking.cancel()
                folding.cancel()
                (result,) = await asyncio.gather(folding, return_exceptions=True)
                assert isinstance(result, asyncio.CancelledError), result

    @asynccontextmanager
    async def leading(self, workload: str, **options: Any) -> AsyncIterator[ReplicaStream]:
        """Stream a workload as a sound primary does."""

        def note(epoch: EpochId) -> None:
            self.acknowledged[workload] = epoch

        options = {"spec": SPECS[workload], "secret": HASHER.secret, "on_acknowledged": note, **options}
        async with self.streaming(**options) as stream:
            yield stream

    async def gets_through(self, stream: ReplicaStream, workload: str, term: int = 1) -> None:
        """A new epoch must be acknowledged within seconds."""
        epoch = offer(stream, self.epoch(workload, term))
        try:
            await until(lambda: self.acknowledged.get(workload) == epoch.id)
        except TimeoutError:
            raise WrongCommitError(
                f"{workload} {epoch.id} was not acknowledged: {stream.problem}, {stream.progress}"
            ) from None

    @contextmanager
    def speaking(self, keys: KeyPair | None = None, node: str = "a", port: int = 0) -> Iterator[Speaker]:
        """Connect somebody who says what they like."""
        b = Peer(name="b", address="127.0.0.1", public_key=self.b.public)
        ring = Keyring(keys or self.a, [b])
        with open_link(self.context_a, peer=b, port=port or self.port, keys=ring, timing=QUICK_LINK) as link:
            yield Speaker(link, node)

    def check(self) -> None:
        """All that the stores hold is what was captured, and nothing that was acknowledged is missing."""
        for workload, store in self.stores.items():
            # Folding goes on beside this: nothing must go while it is read.
            with store.hold():
                self._check_store(workload, store)

    def _check_store(self, workload: str, store: EpochStore) -> None:
        newest, acknowledged = store.newest, self.acknowledged.get(workload)
        if acknowledged and (newest is None or newest.id < acknowledged):
            raise WrongCommitError(f"{workload} {acknowledged} was acknowledged and is not held")
        for record in store.records():
            memory, files = _content_of(record.path)
            if problems := store.verify(record.id):
                raise WrongCommitError(f"verify says: {problems}")
            if record.id in self.forged and workload == "redis":
                continue
            sent = self.captured[workload].get(record.id)
            if sent is None or memory != sent.memory or files.get(f"{workload}-{_FILE}") != sent.file:
                raise WrongCommitError(f"{workload} {record.id} is not what was captured")


class Speaker:
    """Speaks message by message, whatever it likes."""

    def __init__(self, link: Link, node: str) -> None:
        self._link = link
        self._node = node

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Send, if there is a connection at all."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNCONNECTED_S):
                await self._link.send(frames)

    async def hear(self, most_s: float = 5.0) -> Message | None:
        """The next thing that is said, but for credit and readiness; None: nothing is, or it is nonsense."""
        try:
            async with asyncio.timeout(most_s):
                while True:
                    message, _ = decode(await self._link.receive())
                    if not isinstance(message, Credit | Readiness):
                        return message
        except (TimeoutError, OutliveError):
            return None

    async def greet(self, term: int = 1, workload: str = "redis") -> Message | None:
        await self.send(self.greeting(term, workload))
        return await self.hear()

    def greeting(self, term: int = 1, workload: str = "redis") -> list[Buffer]:
        return encode(
            Hello(
                protocol=PROTOCOL,
                software="torture",
                node=self._node,
                workload=workload,
                term=term,
                incarnation="i",
                spec=SPECS.get(workload) or WorkloadSpec(name=workload, nodes=("a", "b"), command=("x",)),
            )
        )

    async def sends_whole(self, messages: Messages) -> None:
        """Send an epoch that must be acknowledged."""
        for frames in messages:
            await self.send(frames)
        if not isinstance(answer := await self.hear(), Ack):
            raise WrongCommitError(f"a sound epoch was answered by {answer}")


class CountedLog:
    """Counts what the receiver logs."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, str, str]] = []

    def warning(self, event: str, **values: Any) -> None:
        who = values.get("node") or values.get("workload") or ""
        self.warnings.append((event, str(who), str(values.get("code") or values.get("reason"))))

    def info(self, event: str, **values: Any) -> None:
        if event == "receive.greeted":
            self.warnings.append((event, values["leader"], values["workload"]))

    def debug(self, event: str, **values: Any) -> None:
        pass

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, and find that nothing was said twice."""
        with patch.object(replica.receive, "log", self):
            yield
        if len(set(self.warnings)) != len(self.warnings) or len(self.warnings) > 20:
            raise AssertionError(f"the log was filled: {self.warnings[:5]} …, {len(self.warnings)} lines")


class Resident:
    """How much this process's memory grows while the block runs, in MiB at the peak."""

    grown_mib = 0.0

    def __enter__(self) -> Self:
        self._before = _resident_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.grown_mib = max(self.grown_mib, _resident_mib() - self._before)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / (1 << 20)


def _content_of(path: Path) -> tuple[Memory, dict[str, bytes]]:
    """Read an epoch whole, as CRIU does: along `parent`, until a level has the bytes."""
    memory: Memory = {}
    for image in page_images(path):
        memory[image.key] = {}
        wanted, level = None, path
        while wanted is None or wanted.size:
            pagemap = read_pagemap(level / image.key.pagemap_name)
            numbers, flags = expand(pagemap.entries)
            present = (flags & PE_PRESENT) != 0
            file = level / f"pages-{pagemap.pages_id}.img"
            content = file.read_bytes() if file.exists() else b""
            here = dict(zip(numbers[present].tolist(), range(int(present.sum())), strict=True))
            asked = numbers if wanted is None else wanted
            for number in asked.tolist():
                if (at := here.get(number)) is not None:
                    memory[image.key][number] = content[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            below = numbers[(flags & PE_PARENT) != 0]
            missing = set(asked.tolist()) - here.keys() - set(below.tolist())
            if missing:
                raise WrongCommitError(f"{path.name} lacks {len(missing)} pages")
            wanted, level = np.intersect1d(asked, below), level / "parent"
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name.endswith(f"-{_FILE}")}
    return memory, files
