"""Stream and receiver over real encrypted sockets on loopback; captures and stores are in memory."""

import asyncio
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from wire_fakes import (
    QUICK_LINK,
    SPEC,
    TASK,
    Pair,
    StoreInMemory,
    acknowledged,
    captured,
    new_keys,
    offer,
    page,
    until,
)

from common.bulk import HELD_PAGES, EpochDigest, pack, pack_held
from common.config import Peer
from common.criu.images import SpaceKey
from common.errors import NoSpaceError, StaleTermError, StoreError
from common.keyring import Keyring
from common.messages import (
    BULK_BYTES,
    FRAME_COST_BYTES,
    MIN_CREDIT_BYTES,
    PROTOCOL,
    AskHeld,
    Begin,
    Commit,
    Credit,
    HeldPages,
    Hello,
    Metadata,
    Nack,
    Pages,
    Refused,
    Welcome,
    decode,
    encode,
)
from common.model import EpochId
from common.transport import Server, open_link
from primary.backlog import SharedEpoch
from primary.inquiry import ask_held
from primary.outgoing import Held, epoch_messages
from primary.stream import Unacknowledged
from replica.holdings import HeldPart
from replica.levels import BaseError
from replica.receive import ReceiverLimits


@pytest.fixture
def pair() -> Iterator[Pair]:
    nodes = Pair()
    yield nodes
    nodes.close()


def memory_of(count: int, **changes: int) -> dict[SpaceKey, dict[int, bytes]]:
    """Pages 16, 17, … of one task; every fifth is all zeros. `p17=5` gives page 17 another content."""
    pages = {16 + n: page(0 if n % 5 == 4 else n + 1) for n in range(count)}
    pages.update({int(name[1:]): page(seed) for name, seed in changes.items()})
    return {TASK: pages}


async def test_a_base_and_then_only_what_changed(pair: Pair, tmp_path) -> None:
    first = {**memory_of(600), SpaceKey("shmem", 7): {0: page(0), 2: page(99)}, SpaceKey("task", 2): {}}
    second = {**memory_of(600, p16=7777, p18=0, p5000=8888), SpaceKey("shmem", 7): {0: page(0), 2: page(99)}}
    files = {"core-1.img": b"core", "empty.img": b"", "ghost-file-1.img": b"g" * (2 * BULK_BYTES + 1)}
    async with pair.receiving(), pair.streaming() as stream:
        one = offer(stream, captured(1, first, directory=tmp_path, metadata=files))
        await acknowledged(stream, one)
        sent_bytes = stream.counters.bytes_sent
        two = offer(stream, captured(2, second, directory=tmp_path, metadata=files))
        await acknowledged(stream, two)
        stored = pair.store.epochs
        assert stored[one.id].memory == first
        assert stored[one.id].metadata == files
        assert stored[one.id].base is None
        assert stored[two.id].memory == second
        assert stored[two.id].base == one.id
        assert stored[two.id].sent_pages == 2
        assert stream.counters.bytes_sent - sent_bytes < 3 * 4096 + 50_000
        assert one.pages.released == two.pages.released == 1
        assert stream.progress.acknowledged_wall_s == two.frozen_wall_s
        assert stream.progress.restorable
        assert stream.counters.epochs_acknowledged == 2
        assert len(stream.counters.commit_latency_ms) == 2


async def test_what_is_not_acknowledged_at_its_end_is_handed_over_with_what_the_replica_has(
    pair: Pair,
) -> None:
    left: list[Unacknowledged] = []
    async with pair.receiving(), pair.streaming(on_left=left.append) as stream:
        one = offer(stream, captured(1, memory_of(9)))
        await acknowledged(stream, one)
        pair.store.open.clear()
        two = offer(stream, captured(2, memory_of(9, p17=99)))
        await until(lambda: pair.store.busy)
    pair.store.open.set()
    (kept,) = left
    assert kept.shared.epoch is two
    assert kept.base is not None
    assert kept.base.id == one.id
    assert (one.pages.released, two.pages.released) == (1, 0)
    kept.shared.drop()
    assert two.pages.released == 1


async def test_nothing_is_handed_over_where_all_is_acknowledged(pair: Pair) -> None:
    left: list[Unacknowledged] = []
    async with pair.receiving(), pair.streaming(on_left=left.append) as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(9))))
    assert left == []


async def test_another_run_of_the_workload_sends_only_what_is_not_held_already(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(9))))
        two = offer(stream, captured(2, memory_of(9, p17=99), incarnation="second"))
        await acknowledged(stream, two)
        assert pair.store.epochs[two.id].memory == memory_of(9, p17=99)
        assert pair.store.epochs[two.id].sent_pages == 1


@pytest.mark.parametrize("told_at_once", [1 << 20, 100])
async def test_a_primary_that_knows_nothing_asks_and_sends_what_differs(
    pair: Pair, told_at_once: int
) -> None:
    pair.store.told_at_once = told_at_once
    segment = SpaceKey("shmem", 7)
    held = {**memory_of(600), SpaceKey("task", 2): {5: page(5)}}
    now = {**memory_of(700, p16=7777, p18=0), segment: {0: page(9)}}
    async with pair.receiving():
        async with pair.streaming() as stream:
            await acknowledged(stream, offer(stream, captured(1, held)))
        async with pair.streaming(term=2) as stream:
            two = offer(stream, captured(1, now, term=2, incarnation="other"))
            await acknowledged(stream, two)
            stored = pair.store.epochs[two.id]
            assert stored.memory == now
            assert stored.base == EpochId(1, 1)
            assert stored.sent_pages == 1 + 80 + 1
            assert set(pair.store.asked) == {EpochId(1, 1)}
            await acknowledged(stream, offer(stream, captured(2, now, term=2, incarnation="other")))
            assert pair.store.epochs[EpochId(2, 2)].sent_pages == 0


async def test_what_cannot_be_told_is_sent(pair: Pair) -> None:
    def broken(*_: object) -> None:
        raise StoreError("bad sector")

    async with pair.receiving():
        async with pair.streaming() as stream:
            await acknowledged(stream, offer(stream, captured(1, memory_of(50))))
        pair.store.identify = broken  # type: ignore[method-assign, assignment]
        async with pair.streaming(term=2) as stream:
            two = offer(stream, captured(1, memory_of(50), term=2))
            await acknowledged(stream, two)
            assert pair.store.epochs[two.id].memory == memory_of(50)
            assert pair.store.epochs[two.id].sent_pages == 40


async def test_an_interrupted_base_goes_on_where_it_broke_off(pair: Pair) -> None:
    memory = {TASK: {n: page(n + 1) for n in range(2000)}}
    later = {TASK: {**memory[TASK], 3: page(9999)}}
    async with pair.streaming(port=await free_port(pair)) as stream:
        async with pair.receiving():
            pair.store.delay_s = 0.05
            offer(stream, captured(1, memory))
            await until(lambda: stream.counters.bytes_sent > 1000 * 4096)
        assert pair.store.seeds
        kept = len(pair.store.seeds[pair.store.seed_name][TASK])
        assert kept >= 256
        pair.store.delay_s = 0
        before_bytes = stream.counters.bytes_sent
        two = offer(stream, captured(2, later))
        async with pair.receiving():
            await acknowledged(stream, two)
            stored = pair.store.epochs[two.id]
            assert stored.memory == later
            assert stored.base is None
            assert stored.sent_pages == 2000 - kept + 1
            assert stream.counters.bytes_sent - before_bytes < (2000 - kept + 100) * 4200


@pytest.mark.parametrize("full", [False, True])
async def test_a_resync_mends_what_went_wrong_on_the_replica(pair: Pair, full: bool) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        one = offer(stream, captured(1, memory_of(50)))
        await acknowledged(stream, one)
        pair.store.epochs[one.id].memory[TASK][17] = page(666)
        two = offer(stream, captured(2, memory_of(50)))
        await acknowledged(stream, two)
        assert pair.store.epochs[two.id].memory[TASK][17] == page(666), "nobody can know"
        stream.resync(full=full)
        three = offer(stream, captured(3, memory_of(50)))
        await acknowledged(stream, three)
        assert pair.store.epochs[three.id].memory == memory_of(50)
        assert pair.store.epochs[three.id].sent_pages == (40 if full else 1)
        four = offer(stream, captured(4, memory_of(50)))
        await acknowledged(stream, four)
        assert pair.store.epochs[four.id].sent_pages == 0


async def test_a_base_that_the_store_refuses_is_not_asked_for_again(pair: Pair) -> None:
    async with pair.receiving():
        async with pair.streaming() as stream:
            await acknowledged(stream, offer(stream, captured(1, memory_of(50))))
        pair.store.fail_begin = BaseError("the chain is broken")
        async with pair.streaming(term=2) as stream:
            two = offer(stream, captured(1, memory_of(50), term=2))
            await until(lambda: stream.problem)
            pair.store.fail_begin = None
            await acknowledged(stream, two)
            assert pair.store.epochs[two.id].base is None
            assert pair.store.epochs[two.id].sent_pages == 40


async def test_a_slow_replica_gets_the_newest_epoch_and_others_are_released_unsent(pair: Pair) -> None:
    pair.store.delay_s = 0.1
    epochs = [captured(n, memory_of(600, p17=1000 + n)) for n in range(1, 9)]
    async with pair.receiving(), pair.streaming() as stream:
        offer(stream, epochs[0])
        await until(lambda: pair.store.begun)
        for epoch in epochs[1:]:
            offer(stream, epoch)
        assert [epoch.pages.released for epoch in epochs] == [0, 1, 1, 1, 1, 1, 1, 0]
        await acknowledged(stream, epochs[-1])
        assert list(pair.store.epochs) == [epochs[0].id, epochs[-1].id]
        assert all(epoch.pages.released == 1 for epoch in epochs)


async def test_a_bound_on_the_line_holds_one_replica_back_and_no_other(pair: Pair) -> None:
    memory = {TASK: {n: page(n + 1) for n in range(512)}}  # 2 MiB that do not compress
    async with pair.receiving(), pair.streaming(max_mib_per_s=4.0) as slow:
        started_s = asyncio.get_running_loop().time()
        await acknowledged(slow, offer(slow, captured(1, memory)))
        took_s = asyncio.get_running_loop().time() - started_s
        assert took_s > 0.35
        other = Pair()
        async with other.receiving(), other.streaming() as fast:
            for number in range(1, 4):
                epoch = captured(number, {TASK: {n: page(n + number) for n in range(512)}})
                offer(slow, captured(number + 1, memory))
                await acknowledged(fast, offer(fast, epoch))
        other.close()


async def test_an_epoch_is_released_when_its_last_holder_drops_it() -> None:
    epoch = captured(1, memory_of(1))
    shared = SharedEpoch(epoch)
    other = shared.hold()
    shared.drop()
    assert not epoch.pages.released
    other.drop()
    assert epoch.pages.released == 1
    with pytest.raises(ValueError, match="released"):
        shared.hold()


async def test_a_broken_connection_in_mid_epoch_starts_over_and_leaves_nothing_half_done(pair: Pair) -> None:
    async with pair.streaming(port=await free_port(pair)) as stream:
        async with pair.receiving():
            await acknowledged(stream, offer(stream, captured(1, memory_of(600))))
            pair.store.delay_s = 0.2
            two = offer(stream, captured(2, {TASK: {n: page(n + 5000) for n in range(1500)}}))
            await until(lambda: pair.store.begun == 2)
            await asyncio.sleep(0.1)
        assert pair.store.aborted == 1
        assert not stream.progress.connected or await until(lambda: not stream.progress.connected) is None
        assert EpochId(1, 2) not in pair.store.epochs
        assert not two.pages.released
        pair.store.delay_s = 0
        async with pair.receiving():
            await acknowledged(stream, two)
            assert pair.store.epochs[two.id].base == EpochId(1, 1)


async def free_port(pair: Pair) -> int:
    async with pair.receiving() as receiver:
        return receiver.port


async def test_an_epoch_that_was_committed_unheard_counts_as_held_after_reconnecting(pair: Pair) -> None:
    heard: list[EpochId] = []
    async with pair.streaming(port=await free_port(pair), on_acknowledged=heard.append) as stream:
        receiver_stops = asyncio.Event()
        async with pair.receiving() as receiver:

            async def never(workload: str, record: object) -> tuple[bool, tuple[str, ...]]:
                receiver_stops.set()
                await asyncio.sleep(100)
                return True, ()

            receiver._readiness = never
            one = offer(stream, captured(1, memory_of(10)))
            await receiver_stops.wait()
        assert heard == []
        async with pair.receiving():
            await acknowledged(stream, one)
            two = offer(stream, captured(2, memory_of(10, p16=999)))
            await acknowledged(stream, two)
        assert heard == [one.id, two.id]
        assert pair.store.epochs[two.id].base == one.id
        assert pair.store.begun == 2


async def test_a_replica_that_lost_its_epochs_gets_a_full_one(pair: Pair) -> None:
    async with pair.streaming(port=await free_port(pair)) as stream:
        async with pair.receiving():
            await acknowledged(stream, offer(stream, captured(1, memory_of(20))))
        pair.store.epochs.clear()
        async with pair.receiving():
            two = offer(stream, captured(2, memory_of(20)))
            await acknowledged(stream, two)
        assert pair.store.epochs[two.id].base is None


async def test_a_base_that_went_while_connected_is_made_good_by_sending_the_epoch_whole(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(20))))
        pair.store.epochs.clear()
        two = offer(stream, captured(2, memory_of(20)))
        await acknowledged(stream, two)
        assert pair.store.epochs[two.id].memory == memory_of(20)


async def test_an_epoch_that_stands_on_what_the_replica_lacks_is_passed_over(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        delta = offer(stream, captured(5, memory_of(5), stands_on=EpochId(1, 4)))
        await until(lambda: delta.pages.released)
        assert stream.held is None
        full = offer(stream, captured(6, memory_of(5)))
        await acknowledged(stream, full)
        assert stream.held == full.id
        after = offer(stream, captured(7, memory_of(5), stands_on=full.id))
        await acknowledged(stream, after)
        later = offer(stream, captured(8, memory_of(5), stands_on=full.id))  # it has more than that: no harm
        await acknowledged(stream, later)
        assert stream.held == later.id
        beyond = offer(stream, captured(10, memory_of(5), stands_on=EpochId(1, 9)))
        await until(lambda: beyond.pages.released)
        assert stream.held is None  # so that everything is captured, of which it gets what differs
        await acknowledged(stream, offer(stream, captured(11, memory_of(5))))
        assert pair.store.asked


async def test_an_epoch_that_cannot_be_read_has_the_next_one_captured_whole(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(5))))
        unreadable = captured(2, memory_of(5, p2=77))
        unreadable.pages.unreadable = True
        offer(stream, unreadable)
        await until(lambda: unreadable.pages.released)
        assert stream.held is None
        await acknowledged(stream, offer(stream, captured(3, memory_of(5, p2=78))))
        assert pair.store.asked


async def test_no_space_is_told_and_retried_until_there_is(pair: Pair) -> None:
    pair.store.fail_begin = NoSpaceError("the disk is full")
    async with pair.receiving(), pair.streaming() as stream:
        one = offer(stream, captured(1, memory_of(600)))
        await until(lambda: "disk is full" in stream.problem)
        assert [(workload, nack.code) for workload, nack in pair.not_committed[:1]] == [("redis", "no-space")]
        assert stream.progress.connected
        pair.store.fail_begin = None
        await acknowledged(stream, one)
        assert not stream.problem


async def test_a_commit_that_fails_is_not_acknowledged(pair: Pair) -> None:
    pair.store.fail_commit = StoreError("the disk lies")
    async with pair.receiving(), pair.streaming() as stream:
        offer(stream, captured(1, memory_of(6)))
        await until(lambda: "disk lies" in stream.problem)
        assert stream.progress.acknowledged is None
        assert pair.store.aborted >= 1


async def test_an_unreadable_epoch_is_skipped_and_the_next_one_arrives(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        broken = captured(1, memory_of(6))
        broken.pages.unreadable = True
        offer(stream, broken)
        await until(lambda: broken.pages.released)
        await acknowledged(stream, offer(stream, captured(2, memory_of(6))))
        assert list(pair.store.epochs) == [EpochId(1, 2)]


async def test_readiness_is_told_with_the_epoch_at_the_greeting_and_when_it_changes(pair: Pair) -> None:
    pair.readiness = lambda: (False, ("port 6379 is taken",))
    port = await free_port(pair)
    async with pair.receiving() as receiver:
        async with pair.streaming(port=port) as stream:
            await acknowledged(stream, offer(stream, captured(1, memory_of(1))))
            assert (stream.progress.restorable, stream.progress.reasons) == (False, ("port 6379 is taken",))
            await receiver.readiness_changed("redis", True, ())
            await until(lambda: stream.progress.restorable)
        async with pair.streaming(port=port) as later:
            await until(lambda: later.progress.reasons)
            assert later.progress.acknowledged == EpochId(1, 1)
            assert later.progress.acknowledged_wall_s == 1001.0


async def test_a_wrong_key_is_refused_and_the_stream_says_so(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming(keys=new_keys()) as stream:
        epoch = offer(stream, captured(1, memory_of(1)))
        await until(lambda: "refuses this node's key" in stream.problem)
        assert not pair.hellos
        assert not epoch.pages.released


async def test_a_peer_cannot_speak_as_another_node(pair: Pair) -> None:
    c = new_keys()
    pair.peers = (Peer(name="c", address="127.0.0.1", public_key=c.public),)
    refusals: list[Refused] = []
    async with pair.receiving(), pair.streaming(keys=c, node="a", on_refused=refusals.append):
        await until(lambda: refusals)
        assert refusals[0].code == "identity"
        assert not pair.hellos


async def test_an_old_term_is_refused_at_the_greeting_with_the_newest_one(pair: Pair) -> None:
    pair.guard.advance("redis", 5, "b")
    refusals: list[Refused] = []
    async with pair.receiving(), pair.streaming(term=4, on_refused=refusals.append):
        await until(lambda: refusals)
        assert (refusals[0].code, refusals[0].term) == ("stale-term", 5)


async def test_a_second_leader_of_a_term_is_refused(pair: Pair) -> None:
    pair.guard.advance("redis", 5, "b")
    refusals: list[Refused] = []
    async with pair.receiving(), pair.streaming(term=5, on_refused=refusals.append):
        await until(lambda: refusals)
        assert refusals[0].code == "stale-term"


async def test_a_term_that_ends_in_mid_epoch_is_refused_at_the_commit(pair: Pair) -> None:
    pair.store.delay_s = 0.1
    refusals: list[Refused] = []
    async with pair.receiving(), pair.streaming(on_refused=refusals.append) as stream:
        offer(stream, captured(1, memory_of(600)))
        await until(lambda: pair.store.begun)
        pair.guard.advance("redis", 2, "b")
        await until(lambda: refusals)
        assert refusals[0].code == "stale-term"
        assert not pair.store.epochs


async def test_nobody_listening_is_said_and_the_stream_connects_once_there_is(pair: Pair) -> None:
    async with pair.streaming(port=await free_port(pair)) as stream:
        epoch = offer(stream, captured(1, memory_of(2)))
        await asyncio.sleep(0.3)
        assert not stream.progress.connected
        async with pair.receiving():
            await acknowledged(stream, epoch)


async def test_a_lagging_replica_does_not_hold_up_another(pair: Pair) -> None:
    slow = Pair()
    slow.store.delay_s = 0.5
    try:
        async with (
            pair.receiving(),
            slow.receiving(),
            pair.streaming() as quick_stream,
            slow.streaming(keys=slow.a) as slow_stream,
        ):
            for number in range(1, 6):
                epoch = captured(number, memory_of(600, p16=number + 10_000))
                shared = SharedEpoch(epoch)
                quick_stream.offer(shared)
                slow_stream.offer(shared)
                shared.drop()
                await acknowledged(quick_stream, epoch)
            assert slow_stream.progress.acknowledged is None
            await acknowledged(slow_stream, epoch)
            assert epoch.pages.released == 1
        assert len(pair.store.epochs) == 5
        assert len(slow.store.epochs) == 2
    finally:
        slow.close()


# --- a peer that does not keep to the protocol ------------------------------------------------------


class RawPeer:
    """Speaks to the receiver message by message."""

    def __init__(self, link) -> None:
        self.link = link

    async def say(self, message, *bulk: bytes) -> None:
        await self.link.send(encode(message, bulk))

    async def hear(self, *skipping: type):
        async with asyncio.timeout(5):
            while True:
                message, _ = decode(await self.link.receive())
                if not isinstance(message, skipping):
                    return message

    async def greet(self, term: int = 1):
        await self.say(
            Hello(
                protocol=PROTOCOL,
                software="t",
                node="a",
                workload="redis",
                term=term,
                incarnation="i",
                spec=SPEC,
            )
        )
        return await self.hear()


@pytest.fixture
async def raw(pair: Pair):
    async with pair.receiving() as receiver:
        b = Peer(name="b", address="127.0.0.1", public_key=pair.b.public)
        keys = Keyring(pair.a, [b])
        with open_link(pair.context_a, peer=b, port=pair.port, keys=keys, timing=QUICK_LINK) as link:
            peer = RawPeer(link)
            peer.receiver = receiver
            yield peer


def frames_of(epoch, base=None) -> list[list[bytes]]:
    return list(epoch_messages(epoch, 1, base, None, bytearray(BULK_BYTES)))


async def test_a_digest_that_differs_is_not_committed_and_the_session_goes_on(pair: Pair, raw) -> None:
    assert isinstance(await raw.greet(), Welcome)
    *body, _ = frames_of(captured(1, memory_of(3)))
    for frames in body:
        await raw.link.send(frames)
    await raw.say(Commit(digest=bytes(32)))
    nack = await raw.hear(Credit)
    assert isinstance(nack, Nack)
    assert nack.code == "digest"
    assert not pair.store.epochs
    assert pair.store.aborted == 1
    for frames in frames_of(captured(1, memory_of(3))):
        await raw.link.send(frames)
    assert (await raw.hear(Credit)).epoch == EpochId(1, 1)
    assert pair.store.epochs


async def test_a_damaged_block_commits_nothing(pair: Pair, raw) -> None:
    await raw.greet()
    for frames in frames_of(captured(1, memory_of(3))):
        if isinstance(decode(frames)[0], Pages):
            frames = [frames[0], bytes(len(frames[1]))]
        await raw.link.send(frames)
    assert (await raw.hear(Credit)).code == "nonsense"
    assert not pair.store.epochs
    await until(lambda: pair.store.aborted == 1)


@pytest.mark.parametrize("missing", range(1, 5))
async def test_an_epoch_with_a_message_missing_is_never_committed(pair, raw, tmp_path, missing: int) -> None:
    await raw.greet()
    epoch = captured(1, memory_of(3), directory=tmp_path, metadata={"core-1.img": b"c", "mm-1.img": b"m"})
    all_frames = frames_of(epoch)
    assert len(all_frames) == 6
    for frames in all_frames[:missing] + all_frames[missing + 1 :]:
        await raw.link.send(frames)
    answer = await raw.hear(Credit)
    assert isinstance(answer, Refused | Nack)
    assert not pair.store.epochs


async def test_an_epoch_must_be_newer_than_the_newest(pair: Pair, raw) -> None:
    await raw.greet()
    for number, expected in ((2, "Ack"), (2, "Nack"), (1, "Nack"), (3, "Ack")):
        for frames in frames_of(captured(number, memory_of(3))):
            await raw.link.send(frames)
        assert type(await raw.hear(Credit)).__name__ == expected
    assert sorted(pair.store.epochs) == [EpochId(1, 2), EpochId(1, 3)]


async def test_more_than_the_granted_credit_ends_the_session(pair: Pair, raw) -> None:
    pair.store.delay_s = 0.2
    welcome = await raw.greet()
    epoch = captured(1, {TASK: {n: page(n + 1) for n in range(256 * 8)}})
    frames = frames_of(epoch)
    assert sum(len(f) for message in frames for f in message) > welcome.credit_bytes
    for message in frames:
        await raw.link.send(message)
    refused = await raw.hear(Credit)
    assert isinstance(refused, Refused)
    assert "granted" in refused.reason
    assert not pair.store.epochs


async def test_the_stream_never_has_more_under_way_than_was_granted(pair: Pair) -> None:
    pair.store.delay_s = 0.02
    pair.limits = ReceiverLimits(credit_bytes=MIN_CREDIT_BYTES)
    most = 0
    async with pair.receiving() as receiver, pair.streaming() as stream:
        epoch = offer(stream, captured(1, {TASK: {n: page(n + 1) for n in range(256 * 20)}}))

        async def measure() -> None:
            nonlocal most
            while True:
                session = receiver._active.get("redis")
                if session:
                    most = max(most, session.unpaid_bytes)
                await asyncio.sleep(0)

        measuring = asyncio.create_task(measure())
        await acknowledged(stream, epoch)
        measuring.cancel()
        assert not receiver.refusals
    assert BULK_BYTES < most <= MIN_CREDIT_BYTES


async def test_silence_in_mid_epoch_gives_the_epoch_up(pair: Pair, raw) -> None:
    raw.receiver._limits = ReceiverLimits(silence_s=0.2)
    await raw.greet()
    await raw.link.send(frames_of(captured(1, memory_of(3)))[0])
    refused = await raw.hear(Credit)
    assert isinstance(refused, Refused)
    assert pair.store.aborted == 1


async def test_an_epoch_that_trickles_in_is_given_up(pair: Pair, raw, tmp_path) -> None:
    raw.receiver._limits = ReceiverLimits(silence_s=5, patience_s=0.3)
    await raw.greet()
    epoch = captured(1, memory_of(3), directory=tmp_path, metadata={"core-1.img": b"c"})
    await raw.link.send(frames_of(epoch)[0])
    for _ in range(40):
        await raw.say(Metadata(name="core-1.img", size=1, more=True), pack(b"c"))
        await asyncio.sleep(0.1)
        if pair.store.aborted:
            break
    refused = await raw.hear(Credit)
    assert isinstance(refused, Refused)
    assert "more slowly than 16 KiB/s" in refused.reason


async def test_frames_without_content_cost_credit_too(pair: Pair, raw) -> None:
    pair.store.open.clear()
    raw.receiver._limits = ReceiverLimits(credit_bytes=MIN_CREDIT_BYTES)
    await raw.greet()
    for frames in frames_of(captured(1, memory_of(3)))[:-1]:
        await raw.link.send(frames)
    await until(lambda: pair.store.busy)
    session = raw.receiver._active["redis"]
    for _ in range(raw.receiver._limits.credit_bytes // FRAME_COST_BYTES + 1):
        await raw.link.send([b""])
    await until(lambda: session.over)
    pair.store.open.set()
    refused = await raw.hear(Credit)
    assert isinstance(refused, Refused)
    assert "granted" in refused.reason


async def test_a_node_has_no_more_sessions_than_it_may(pair: Pair, raw) -> None:
    raw.receiver._limits = ReceiverLimits(sessions_per_node=1)
    assert isinstance(await raw.greet(), Welcome)
    b = Peer(name="b", address="127.0.0.1", public_key=pair.b.public)
    keys = Keyring(pair.a, [b])
    with open_link(pair.context_a, peer=b, port=pair.port, keys=keys, timing=QUICK_LINK) as link:
        refused = await RawPeer(link).greet()
    assert isinstance(refused, Refused)
    assert (refused.code, refused.reason) == ("busy", "a has too many sessions")


async def test_where_there_is_no_room_for_everything_what_differs_is_tried(pair: Pair) -> None:
    class NoRoomTwice(StoreInMemory):
        def begin(self, header, **options):
            if header.base is None and self.epochs:
                raise NoSpaceError("no room for a second base")
            return super().begin(header, **options)

    pair.store = NoRoomTwice()
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(50))))
        stream.resync(full=True)
        two = offer(stream, captured(2, memory_of(50, p16=77)))
        await acknowledged(stream, two)
        assert pair.store.epochs[two.id].base == EpochId(1, 1)
        assert pair.store.epochs[two.id].sent_pages == 1


async def test_another_failure_of_the_disk_costs_no_base(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(50))))
        pair.store.fail_begin = StoreError("too many open files")
        two = offer(stream, captured(2, memory_of(50, p16=77)))
        await until(lambda: stream.problem)
        pair.store.fail_begin = None
        await acknowledged(stream, two)
        assert pair.store.epochs[two.id].base == EpochId(1, 1)


async def test_a_full_resync_that_breaks_off_is_still_a_full_one(pair: Pair) -> None:
    async with pair.streaming(port=await free_port(pair)) as stream:
        async with pair.receiving():
            await acknowledged(stream, offer(stream, captured(1, memory_of(1500))))
            pair.store.delay_s = 0.2
            stream.resync(full=True)
            two = offer(stream, captured(2, memory_of(1500)))
            await until(lambda: pair.store.begun == 2)
            await asyncio.sleep(0.1)
        pair.store.delay_s = 0
        stream.resync(full=False)
        async with pair.receiving():
            await acknowledged(stream, two)
            assert pair.store.epochs[two.id].base is None
            assert pair.store.epochs[two.id].sent_pages == 1200
            await acknowledged(stream, offer(stream, captured(3, memory_of(1500))))
            assert pair.store.epochs[EpochId(1, 3)].sent_pages == 0


async def test_who_goes_on_before_it_is_welcomed_is_refused(pair: Pair, raw) -> None:
    """So that only welcomed sessions take memory."""
    hello = Hello(
        protocol=PROTOCOL, software="x", node="a", workload="redis", term=1, incarnation="i", spec=SPEC
    )
    await raw.link.send(encode(hello))
    await raw.link.send(encode(Commit(digest=bytes(32))))
    said = []
    async with asyncio.timeout(5):
        while not said or not isinstance(said[-1], Refused):
            said.append(decode(await raw.link.receive())[0])
    assert said[-1].code == "nonsense"


async def test_a_key_that_becomes_another_peers_ends_the_session_of_its_former_owner(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as stream:
        await acknowledged(stream, offer(stream, captured(1, memory_of(50))))
        other = Peer(name="c", address="127.0.0.1", public_key=pair.a.public)
        pair.ring.replace(pair.b, [other])
        two = offer(stream, captured(2, memory_of(50, p16=77)))
        await until(lambda: not stream.progress.connected or "another" in stream.problem)
        await asyncio.sleep(0.3)
        assert two.id not in pair.store.epochs


async def test_who_goes_on_after_being_refused_is_cut_off(pair: Pair, raw) -> None:
    gone = asyncio.create_task(raw.link.lost())
    for _ in range(100):
        await raw.link.send([b"nonsense"])
    async with asyncio.timeout(5):
        assert await gone
    assert 32 <= raw.receiver.refusals["nonsense"] < 100


async def test_a_few_bytes_that_name_any_number_of_pages_are_not_believed(pair: Pair, raw) -> None:
    await raw.greet()
    begin, *_ = frames_of(captured(1, memory_of(3)))
    message, _ = decode(begin)
    await raw.say(msgspec.structs.replace(message, memory_bytes=1 << 53))
    nack = await raw.hear(Credit)
    assert isinstance(nack, Nack)
    assert nack.code == "no-space"
    assert not pair.store.begun


async def test_many_questions_at_once_are_answered_one_after_the_other(pair: Pair, raw, monkeypatch) -> None:
    most = 0

    def identify(what, key, first_row, pages, hasher):
        nonlocal most
        most = max(most, first_row - len(told))
        return HeldPart(np.empty(0, np.uint64), np.empty((0, 2), np.uint64), False)

    told: list[object] = []
    monkeypatch.setattr(pair.store, "identify", identify)
    send = Server.send

    async def note(server, connection, frames):
        told.extend(m for m in [decode(frames)[0]] if isinstance(m, HeldPages))
        return await send(server, connection, frames)

    monkeypatch.setattr(Server, "send", note)
    await raw.greet()
    for row in range(20):  # two answers each: fewer than may wait for a peer
        await raw.say(AskHeld(epoch=None, seed=1, secret=bytes(8), kind="task", ident=1, first_row=row))
    await until(lambda: len(told) == 20)
    assert most == 0


async def test_a_replica_that_always_has_more_is_listened_to_for_a_while_only() -> None:
    epoch = captured(1, memory_of(3))

    class Endless:
        version = PROTOCOL

        asked = 0

        async def ask(self, frames):
            self.asked += 1
            ask, _ = decode(frames)
            numbers = ask.first_row + 1_000_000 * np.arange(HELD_PAGES, dtype=np.uint64)
            if ask.first_row:
                numbers = numbers + np.uint64(ask.first_row * 1_000_000)
            identity = np.zeros((HELD_PAGES, 2), np.uint64)
            held = HeldPages(kind=ask.kind, ident=ask.ident, pages=HELD_PAGES, more=True)
            return held, pack_held(numbers, identity)

    async def kept(session, epoch) -> int:
        return sum(
            len(space.numbers) for space in (await ask_held(session, epoch, 1, seed=7)).spaces.values()
        )

    assert await kept(session := Endless(), epoch) <= 3
    assert session.asked == 1  # the rest lies behind the epoch's last page
    far = captured(1, {TASK: {1: page(1), 1 << 50: page(2)}})
    assert await kept(session := Endless(), far) <= 2
    assert session.asked == 4


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1 nonsense"],
        [b""],
        [b"x"] * 9,
        encode(Metadata(name="core-1.img", size=1), [b"c"]),
        encode(Commit(digest=bytes(32))),
    ],
)
async def test_nonsense_is_refused_before_and_after_the_greeting(pair: Pair, raw, frames) -> None:
    await raw.link.send(frames)
    assert isinstance(await raw.hear(), Refused)
    assert isinstance(await raw.greet(), Welcome)
    await raw.link.send(frames)
    assert (await raw.hear()).code == "nonsense"
    assert isinstance(await raw.greet(), Welcome)
    assert not pair.store.begun


async def test_another_version_is_refused_by_name(pair: Pair, raw) -> None:
    hello = encode(
        Hello(protocol=PROTOCOL, software="t", node="a", workload="redis", term=1, incarnation="i", spec=SPEC)
    )
    await raw.link.send([b"\x94\x63" + hello[0][2:]])
    assert (await raw.hear()).code == "version"


async def test_a_newer_session_of_the_same_node_replaces_the_older(pair: Pair) -> None:
    async with pair.receiving(), pair.streaming() as old:
        await until(lambda: old.progress.connected)
        async with pair.streaming() as new:
            await until(lambda: new.progress.connected)
            await acknowledged(new, offer(new, captured(1, memory_of(2))))


async def test_a_leader_that_the_agent_does_not_follow_is_told_why(pair: Pair, raw) -> None:
    async def refuse(hello: Hello) -> None:
        raise StaleTermError("c leads redis")

    raw.receiver._accept = refuse
    refused = await raw.greet()
    assert isinstance(refused, Refused)
    assert "c leads redis" in refused.reason


async def test_cancelling_both_ends_leaves_no_task_and_no_epoch(pair: Pair) -> None:
    pair.store.delay_s = 0.05
    before = asyncio.all_tasks()
    async with pair.receiving(), pair.streaming() as stream:
        one = offer(stream, captured(1, {TASK: {n: page(n + 1) for n in range(256 * 8)}}))
        await until(lambda: pair.store.begun)
        two = offer(stream, captured(2, memory_of(1)))
    assert one.pages.released == two.pages.released == 1
    assert pair.store.aborted == 1
    assert asyncio.all_tasks() == before


def test_what_a_base_has_is_not_sent_whatever_else_changes() -> None:
    first, second = captured(1, memory_of(300)), captured(2, memory_of(300, p20=0, p21=4242))
    frames = frames_of(second, Held.of(first))
    messages = [decode(message)[0] for message in frames]
    assert isinstance(messages[0], Begin)
    assert messages[0].base == first.id
    assert [m.raw_bytes for m in messages if isinstance(m, Pages)] == [4096]


async def test_a_cancellation_that_comes_with_a_failure_is_not_forgotten(pair: Pair, monkeypatch) -> None:
    breaks = asyncio.Event()

    async def lost(self) -> str:
        await breaks.wait()
        return "the connection broke"

    monkeypatch.setattr("common.transport.Link.lost", lost)
    async with pair.receiving(), pair.streaming() as stream:
        await until(lambda: stream.progress.connected)
        breaks.set()
        await asyncio.sleep(0)  # the failure is raised in the step in which `streaming` cancels


@pytest.mark.parametrize(
    "lacking",
    [{"metadata_files": 1}, {"spaces": 1}, {"memory_bytes": 4096}, {"spaces": 1, "memory_bytes": 4096}],
)
async def test_what_was_declared_and_did_not_come_is_missed_even_if_the_digest_fits(
    pair, raw, lacking
) -> None:
    await raw.greet()
    sizes = {"metadata_files": 0, "spaces": 0, "memory_bytes": 0, **lacking}
    begin = encode(
        Begin(term=1, epoch=EpochId(1, 1), base=None, seed=0, incarnation="i", frozen_wall_s=1.0, **sizes)
    )
    digest = EpochDigest()
    digest.add(begin)
    await raw.link.send(begin)
    await raw.say(Commit(digest=digest.value()))
    refused = await raw.hear(Credit)
    assert isinstance(refused, Refused)
    assert "did not come" in refused.reason
    assert not pair.store.epochs
