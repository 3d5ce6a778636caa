"""What a replica has stored is compared with what was captured; where it differs it gets everything anew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from common.criu.images import SpaceKey
from common.errors import StoreError
from common.identity import fresh_identity, is_fresh
from common.model import EpochId
from primary.capture import SpacePages
from primary.verification import Mismatch, Verification
from replica.levels import NotHeldError
from tests.unit.wire_fakes import TASK, Memory, Pair, acknowledged, captured, offer, page, until

SEGMENT = SpaceKey("shmem", 7)


def memory_of(pages: int, **changed: int) -> Memory:
    """Pages 1, 2, … with a gap, every tenth one zeros; `p17=99` gives page 17 another content."""
    numbers = [n for n in range(pages) if not 100 <= n < 120]
    seeds = {n: 0 if n % 10 == 9 else n + 1 for n in numbers} | {
        int(name[1:]): seed for name, seed in changed.items()
    }
    return {TASK: {n: page(seed) for n, seed in seeds.items()}, SEGMENT: {n: page(n + 5) for n in range(4)}}


class Scene:
    """A stream to a replica whose store can be tampered with; epochs that all have the same memory."""

    def __init__(self, length: int) -> None:
        self.found: list[Mismatch] = []
        self.verification = Verification(length, self.found.append)
        self.pair = Pair()
        self.number = 0

    async def epoch(self, stream, memory: Memory) -> EpochId:  # type: ignore[no-untyped-def]
        self.number += 1
        compared = self.verification.pages_compared
        epoch = offer(stream, captured(self.number, memory))
        await acknowledged(stream, epoch)
        await until(lambda: self.verification.problem or self.verification.pages_compared != compared)
        return epoch.id

    def tamper(self, number: int, content: bytes | None) -> None:
        """Alter a page of what is stored (newest epoch); or lose it, as soon as the next one stands on it."""
        store = self.pair.store
        store.epochs[max(store.epochs)].memory[TASK][number] = content or page(0)
        if content is None:
            sample = store.sample

            def losing(epoch, *arguments):  # type: ignore[no-untyped-def]
                store.sample = sample  # type: ignore[method-assign]
                del store.epochs[epoch].memory[TASK][number]
                return sample(epoch, *arguments)

            store.sample = losing  # type: ignore[method-assign]


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene(3)
    yield scene
    scene.pair.close()


@pytest.mark.parametrize("told_at_once", [1 << 20, 50])
async def test_a_sound_replica_is_compared_page_by_page_and_nothing_is_found(
    scene: Scene, told_at_once: int
) -> None:
    scene.pair.store.told_at_once = told_at_once
    memory = memory_of(600)
    async with scene.pair.receiving(), scene.pair.streaming(verification=scene.verification) as stream:
        for number in range(6):
            memory = memory_of(600, p17=1000 + number)
            await scene.epoch(stream, memory)
    assert scene.verification.rounds == 2
    assert scene.verification.pages_compared == 2 * (580 + 4)
    assert scene.found == []
    assert scene.pair.store.doubts == []


@pytest.mark.parametrize("content", [page(666), page(0), None], ids=["altered", "zeros", "lost"])
async def test_what_is_stored_otherwise_is_found_told_and_sent_anew(
    scene: Scene, content: bytes | None
) -> None:
    memory = memory_of(600)
    store = scene.pair.store
    scene.pair.readiness = lambda: (not store.doubt_about(store.newest.id), ())  # type: ignore[union-attr]
    async with scene.pair.receiving(), scene.pair.streaming(verification=scene.verification) as stream:
        await scene.epoch(stream, memory)
        assert stream.progress.restorable
        scene.tamper(302, content)
        second = await scene.epoch(stream, memory)
        await until(lambda: store.doubts)
        (mismatch,) = scene.found[-1:]
        assert (mismatch.replica, mismatch.epoch, mismatch.key) == ("b", second, TASK)
        assert mismatch.numbers.tolist() == [302]
        await until(lambda: not stream.progress.restorable)
        assert stream.held is None, "the next capture takes in everything"
        third = await scene.epoch(stream, memory)
        assert store.epochs[third].base is None
        assert store.epochs[third].memory == memory
        assert stream.progress.restorable
        scene.verification.hurry()
        before = len(scene.found)
        await scene.epoch(stream, memory)
        assert len(scene.found) == before
        assert scene.verification.rounds >= 1


async def test_a_replica_that_was_doubted_is_nothing_to_stand_on_for_a_primary_that_began_anew(
    scene: Scene,
) -> None:
    memory = memory_of(100)
    async with scene.pair.receiving():
        async with scene.pair.streaming() as stream:
            await acknowledged(stream, offer(stream, captured(1, memory)))
        scene.pair.store.doubt("of it")
        async with scene.pair.streaming(term=2) as stream:
            two = offer(stream, captured(2, memory, term=2))
            await acknowledged(stream, two)
        assert scene.pair.store.epochs[two.id].base is None
        assert scene.pair.store.asked == []


@pytest.mark.parametrize("why", [NotHeldError("it was set aside"), "descriptors"])
async def test_a_replica_that_cannot_tell_is_not_doubted_and_asked_again(scene: Scene, why: object) -> None:
    if isinstance(why, str):
        why = StoreError("no descriptor left")
        why.__cause__ = OSError(24, "Too many open files")
    memory = memory_of(600)
    async with scene.pair.receiving(), scene.pair.streaming(verification=scene.verification) as stream:
        scene.pair.store.fail_sample = why  # type: ignore[assignment]
        await scene.epoch(stream, memory)
        assert scene.verification.problem
        assert scene.verification.pages_done == 0
        scene.pair.store.fail_sample = None
        scene.verification.problem = ""
        await scene.epoch(stream, memory)
        assert scene.verification.pages_done > 0
        assert scene.verification.problem == ""
    assert scene.found == []


async def test_what_a_replica_cannot_read_back_is_not_stored(scene: Scene) -> None:
    async with scene.pair.receiving(), scene.pair.streaming(verification=scene.verification) as stream:
        scene.pair.store.fail_sample = StoreError("pages are cut short")
        await scene.epoch(stream, memory_of(600))
        await until(lambda: scene.pair.store.doubts)
    assert scene.found


async def test_pages_that_go_with_every_epoch_are_not_compared(scene: Scene) -> None:
    epoch = captured(1, memory_of(60))
    identity = epoch.spaces[0].identity.copy()
    identity[5:9] = fresh_identity()
    first = epoch.spaces[0]
    epoch.spaces = (SpacePages.of(first.key, first.numbers, first.flags, identity), *epoch.spaces[1:])
    async with scene.pair.receiving(), scene.pair.streaming(verification=scene.verification) as stream:
        offer(stream, epoch)
        await acknowledged(stream, epoch)
        await until(lambda: scene.verification.rounds or scene.verification.epochs)
    assert scene.found == []
    assert scene.verification.pages_compared == 60 + 4 - 4


def test_only_a_drawn_identity_is_known_as_such() -> None:
    drawn = np.stack([fresh_identity(), fresh_identity()])
    assert is_fresh(drawn).all()
    assert drawn[0].tolist() != drawn[1].tolist()
    assert not is_fresh(np.array([[0, 0], [1, 2]], dtype=np.uint64)).any()
