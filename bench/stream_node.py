"""One end of the measured stream, as a process: `python -m bench.stream_node replica|primary DIRECTORY ...`.

`replica DIRECTORY` prints its port and receives until it is killed. `primary DIRECTORY PORT OPTIONS` (JSON)
makes the payload, connects, prints an empty line, and then performs what comes on its standard input, a word
a line: `base` sends all pages, `steady` some epochs with changed pages. Each is answered with a `Transfers`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.payload import Payload
from bench.wire_ends import open_store, receive, stream_to_b
from common.criu.images import PE_LAZY, PE_PRESENT, SpaceKey
from common.identity import PageHasher
from common.model import EpochId, WorkloadSpec
from common.threads import in_thread
from outlive.cli.running import configure_logs
from primary.backlog import SharedEpoch
from primary.capture import CapturedEpoch, FreezeTimes, SpacePages
from primary.stock import ImagePages
from primary.stream import ReplicaStream

WORKLOAD = "bench"
SPACE = SpaceKey("task", 1)
SECRET = 1
"""Under which pages are identified; whoever compares afterwards needs it."""

_ADDRESS = "127.0.0.1"
_FIRST_PAGE = 0x10000
_IMAGE = "pages-1.img"
_DEADLINE_S = 300.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the primary sends."""

    mib: int
    seed: int
    epochs: int
    changed_pages: int
    interval_ms: int


class Transfers(msgspec.Struct, frozen=True, kw_only=True):
    """Epochs that were offered one after the other, each when the one before was acknowledged."""

    seconds: tuple[float, ...]
    """From the offer of each to its acknowledgement."""
    cpu_s: float
    """Of the primary's process within these."""
    sent_bytes: int


class _Primary:
    """Makes epochs of the payload and offers them."""

    def __init__(self, directory: Path, port: int, options: Options) -> None:
        self._directory = directory
        self._options = options
        self._payload = Payload(directory / "memory.img", options.mib, options.seed)
        self._numbers = np.arange(_FIRST_PAGE, _FIRST_PAGE + self._payload.pages, dtype=np.uint64)
        self._flags = np.full(self._payload.pages, PE_PRESENT | PE_LAZY, dtype=np.uint8)
        self._hasher = PageHasher(SECRET)
        self._identity = self._identify_all()
        self._number = 0
        self._acknowledged = asyncio.Event()
        spec = WorkloadSpec(name=WORKLOAD, nodes=("a", "b"), command=("bench",))
        self.stream: ReplicaStream = stream_to_b(
            directory, _ADDRESS, port, spec, on_acknowledged=lambda epoch: self._acknowledged.set()
        )

    async def perform(self, word: str) -> Transfers:
        """Send a base, or the epochs of a steady phase."""
        sent_bytes = self.stream.counters.bytes_sent
        if word == "base":
            costs = [await self._send()]
        else:
            costs = []
            for _ in range(self._options.epochs):
                await asyncio.sleep(self._options.interval_ms / 1000)
                rows, content = self._payload.change(self._options.changed_pages)
                # Epochs that were sent share the old array.
                self._identity = self._identity.copy()
                self._identity[rows] = self._hasher.identify(memoryview(content))
                costs.append(await self._send())
        return Transfers(
            seconds=tuple(seconds for seconds, _ in costs),
            cpu_s=sum(cpu_s for _, cpu_s in costs),
            sent_bytes=self.stream.counters.bytes_sent - sent_bytes,
        )

    async def _send(self) -> tuple[float, float]:
        """Send one epoch; seconds and CPU seconds from its offer until it is acknowledged."""
        shared = SharedEpoch(self._capture())
        self._acknowledged.clear()
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        self.stream.offer(shared)
        shared.drop()
        async with asyncio.timeout(_DEADLINE_S):
            await self._acknowledged.wait()
        return time.monotonic() - started_s, time.process_time() - started_cpu_s

    def _capture(self) -> CapturedEpoch:
        """Return the memory as it is now as an epoch; its images are a second name of the payload's file."""
        self._number += 1
        images = self._directory / f"images-{self._number}"
        images.mkdir()
        os.link(self._payload.path, images / _IMAGE)
        pages = ImagePages(images)
        pages.open(SPACE, _IMAGE)
        return CapturedEpoch(
            workload=WORKLOAD,
            id=EpochId(1, self._number),
            incarnation="i",
            stands_on=None,
            frozen_wall_s=time.time(),
            freeze=FreezeTimes(0.0, 0.0, 0.0),
            spaces=(SpacePages.of(SPACE, self._numbers, self._flags, self._identity),),
            metadata=(),
            pages=pages,
        )

    def _identify_all(self) -> NDArray[np.uint64]:
        with self._payload.path.open("rb") as file:
            return self._hasher.identify_image(file.fileno(), self._payload.pages)


async def _lead(directory: Path, port: int, options: Options) -> None:
    primary = _Primary(directory, port, options)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(primary.stream.run())
        async with asyncio.timeout(_DEADLINE_S):
            while not primary.stream.progress.connected:  # noqa: ASYNC110 - a stream tells nobody
                await asyncio.sleep(0.01)
        print(flush=True)
        while word := (await in_thread(sys.stdin.readline)).strip():
            print(msgspec.json.encode(await primary.perform(word)).decode(), flush=True)
        running.cancel()


async def _follow(directory: Path) -> None:
    with open_store(directory, WORKLOAD) as store:
        await receive(directory, store, (_ADDRESS, _ADDRESS), 0, lambda port: print(port, flush=True))


if __name__ == "__main__":
    configure_logs("warning")
    role, where, *rest = sys.argv[1:]
    if role == "replica":
        asyncio.run(_follow(Path(where)))
    else:
        asyncio.run(_lead(Path(where), int(rest[0]), msgspec.json.decode(rest[1], type=Options)))
