"""Several replicas of one primary at once: a fast one, a slow one, one that flaps, one that joins late.

Real streams, sockets and stores; captures and syncs are simulated. The primary offers random epochs, some of
which cannot be read to their end, and starts anew now and then, knowing nothing of what its replicas hold.
Afterwards all of them must come to hold the newest epoch, every epoch that is stored must be what was
captured, and the primary must never have held more epochs than two for each replica and one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.criu.images import SpaceKey
from common.errors import StoreError
from common.identity import PageHasher
from common.model import EpochId
from common.threads import in_thread
from primary.backlog import SharedEpoch
from primary.capture import CapturedEpoch, SpacePages
from primary.stream import ReplicaStream
from replica.store import EpochStore
from tests.campaigns.torture.cases import Case, Part, Scale, chance_of, rows
from tests.unit.store_disks import Content, UnsyncedDisk, composed
from tests.unit.store_histories import WrongCommitError
from tests.unit.wire_fakes import Pair, captured

PAGE_BYTES = 4096
SPACES = (SpaceKey("task", 1), SpaceKey("task", 2), SpaceKey("shmem", 9))
_HASHER = PageHasher(0)
_RECOVERY_S = 20.0


def replicas(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    return rows(cases(seed, scale))


def cases(seed: int, scale: Scale) -> Iterator[Case]:
    """Make the cases."""
    for number in range(scale.of(2, 10, 100)):
        yield Case("several replicas", f"{seed}-{number}", _Campaign(f"{seed}-{number}").run)


class _SlowDisk(UnsyncedDisk):
    """Takes its time to sync."""

    def sync_files(self, paths: Iterable[Path], *, op: str) -> None:
        time.sleep(0.15)


class _Replica:
    """One of them: its store, and whether anybody listens there."""

    def __init__(self, name: str, directory: Path, dice: random.Random, *, slow: bool = False) -> None:
        self.name = name
        self.pair = Pair()
        self._directory = directory / name
        self._dice = dice
        self._disk = _SlowDisk() if slow else UnsyncedDisk()
        self.open()

    def open(self) -> None:
        store = EpochStore.open(self._directory, "redis", min_free_bytes=0, max_levels=4, disk=self._disk)
        self.store = store
        self.pair.store = store  # type: ignore[assignment]

    async def fold_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(0.01, 0.1))
            with contextlib.suppress(StoreError):  # closed meanwhile
                await in_thread(self.store.fold)  # which does not go on when this ends

    async def flap(self, until: asyncio.Event) -> None:
        """Listen and be gone in turn; now and then as if the agent had been killed."""
        while not until.is_set():
            async with self.pair.receiving():
                await asyncio.sleep(self._dice.uniform(0.02, 0.3))
            if self._dice.random() < 0.5:
                self.store.close()
                self.open()
            await asyncio.sleep(self._dice.uniform(0.0, 0.1))
        async with self.pair.receiving():
            await asyncio.Event().wait()

    async def listen(self, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        async with self.pair.receiving():
            await asyncio.Event().wait()


class _Campaign:
    """One run."""

    def __init__(self, seed: str) -> None:
        self._dice = chance_of(seed)
        self._offered: dict[EpochId, Content] = {}
        self._epochs: list[CapturedEpoch] = []

    def run(self, directory: Path) -> None:
        asyncio.run(self._run(directory))

    async def _run(self, directory: Path) -> None:
        dice = self._dice
        fast = _Replica("fast", directory, dice)
        slow = _Replica("slow", directory, dice, slow=True)
        flapping = _Replica("flapping", directory, dice)
        late = _Replica("late", directory, dice)
        everyone = [fast, slow, flapping, late]
        calm = asyncio.Event()
        # A port that stays the same while nobody listens.
        for each in everyone:
            async with each.pair.receiving():
                pass
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(fast.listen()),
                group.create_task(slow.listen()),
                group.create_task(flapping.flap(calm)),
                group.create_task(late.listen(after_s=0.5)),
                *(group.create_task(each.fold_for_ever()) for each in everyone),
            ]
            try:
                await self._lead(everyone, calm)
            finally:
                for task in tasks:
                    task.cancel()
        for each in everyone:
            self._check(each)
            each.store.close()
            each.pair.close()

    async def _lead(self, everyone: list[_Replica], calm: asyncio.Event) -> None:
        """Be the primary: a few lives of it, each longer or shorter, the last one until all are in sync."""
        content: Content = {SPACES[0]: dict.fromkeys(range(400), 1)}
        number = 0
        for life in range(lives := self._dice.randint(1, 4)):
            async with contextlib.AsyncExitStack() as stack:
                streams = [
                    await stack.enter_async_context(each.pair.streaming(term=1 + life)) for each in everyone
                ]
                for _ in range(self._dice.randint(5, 25)):
                    number += 1
                    content = _changed(content, self._dice)
                    self._offer(streams, EpochId(1 + life, number), content)
                    await asyncio.sleep(self._dice.uniform(0.0, 0.04))
                if life == lives - 1:
                    calm.set()
                    number += 1
                    await self._bring_in_sync(streams, EpochId(1 + life, number), content)

    async def _bring_in_sync(self, streams: list[ReplicaStream], first: EpochId, content: Content) -> None:
        last = first
        self._offer(streams, last, content, sound=True)
        deadline_s = time.monotonic() + _RECOVERY_S
        while any(
            (stream.progress.acknowledged or first) < first or not stream.progress.acknowledged
            for stream in streams
        ):
            if time.monotonic() > deadline_s:
                said = [f"{stream.progress.acknowledged} ({stream.problem})" for stream in streams]
                raise WrongCommitError(f"{first} is not everywhere within {_RECOVERY_S:g} s: {said}")
            if all(stream.wants_epoch for stream in streams):
                last = EpochId(last.term, last.epoch + 1)
                self._offer(streams, last, content, sound=True)
            await asyncio.sleep(0.02)

    def _offer(
        self, streams: list[ReplicaStream], epoch_id: EpochId, content: Content, *, sound: bool = False
    ) -> None:
        epoch = _epoch(epoch_id, content)
        epoch.pages.unreadable = not sound and self._dice.random() < 0.05  # type: ignore[attr-defined]
        self._offered[epoch_id] = {key: dict(pages) for key, pages in content.items()}
        self._epochs.append(epoch)
        _offer_to_all(streams, epoch)
        held = sum(not each.pages.released for each in self._epochs)  # type: ignore[attr-defined]
        if held > 2 * len(streams) + 1:
            raise WrongCommitError(f"{held} epochs are held for {len(streams)} replicas")

    def _check(self, replica: _Replica) -> None:
        for record in replica.store.records():
            if composed(record.path) != self._offered[record.id]:
                raise WrongCommitError(f"{replica.name}: {record.id} is not what was captured")
            if problems := replica.store.verify(record.id):
                raise WrongCommitError(f"{replica.name}: {problems}")


def _offer_to_all(streams: list[ReplicaStream], epoch: CapturedEpoch) -> None:
    shared = SharedEpoch(epoch)
    for stream in streams:
        stream.offer(shared)
    shared.drop()


def _epoch(epoch: EpochId, content: Content) -> CapturedEpoch:
    """Make an epoch as a capture would, identified as its replicas will identify what they hold."""
    made = captured(
        epoch.epoch,
        {key: {n: bytes([fill]) * PAGE_BYTES for n, fill in pages.items()} for key, pages in content.items()},
        term=epoch.term,
    )
    made.spaces = tuple(
        SpacePages.of(
            space.key,
            space.numbers,
            space.flags,
            _HASHER.identify(
                memoryview(b"".join(bytes([content[space.key][int(n)]]) * PAGE_BYTES for n in space.numbers))
            ),
        )
        for space in made.spaces
    )
    return made


def _changed(content: Content, dice: random.Random) -> Content:
    """Let the workload run on: pages change, come and go, and so do spaces now and then."""
    after = {key: dict(pages) for key, pages in content.items()}
    for key in SPACES:
        if dice.random() < 0.1:
            if len(after) > 1:
                after.pop(key, None)
            continue
        pages = after.setdefault(key, {})
        for _ in range(dice.randint(0, 60)):
            number = dice.randrange(800)
            if dice.random() < 0.2:
                pages.pop(number, None)
            else:
                pages[number] = dice.choice((0, dice.randrange(256)))
    return after
