"""Nodes of different versions of the wire format: neighbours work together, others say what is to be done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio

from common.config import Peer
from common.file_records import CONTENTS
from common.heartbeat import BeatFilter
from common.keyring import Keyring
from common.messages import OLDEST, PROTOCOL, Beat, Versions, encode
from common.model import PAGE_BYTES, EpochId
from common.transport import Incoming, Server, open_link
from primary.verification import Verification
from tests.unit.wire_fakes import (
    QUICK_LINK,
    TASK,
    Memory,
    Pair,
    acknowledged,
    captured,
    offer,
    page,
    until,
)

PREVIOUS, PRESENT, NEXT = (
    Versions(PROTOCOL - 1, PROTOCOL - 1),
    Versions(PROTOCOL - 1, PROTOCOL),
    Versions(PROTOCOL, PROTOCOL + 1),
)
"""What is spoken by a node before the upgrade, by this one, and by the next."""
FAR = Versions(PROTOCOL + 1, PROTOCOL + 2)


@pytest.fixture
def pair() -> Iterator[Pair]:
    nodes = Pair()
    yield nodes
    nodes.close()


def memory_of(**changes: int) -> Memory:
    pages = {16 + n: page(n + 1) for n in range(60)}
    pages.update({int(name[1:]): page(seed) for name, seed in changes.items()})
    return {TASK: pages}


@pytest.mark.parametrize(
    ("primary", "replica", "spoken"),
    [
        (PRESENT, PREVIOUS, PROTOCOL - 1),
        (PREVIOUS, PRESENT, PROTOCOL - 1),
        (PRESENT, PRESENT, PROTOCOL),
        (PRESENT, NEXT, PROTOCOL),
        (NEXT, PRESENT, PROTOCOL),
        (NEXT, NEXT, PROTOCOL + 1),
    ],
)
async def test_neighbours_exchange_epochs_in_the_newest_version_that_both_speak(
    pair: Pair, primary: Versions, replica: Versions, spoken: int
) -> None:
    pair.versions = replica
    async with pair.receiving() as receiver:
        async with pair.streaming(versions=primary, verification=Verification(1)) as stream:
            await acknowledged(stream, offer(stream, captured(1, memory_of())))
            two = captured(2, memory_of(p17=99))
            two.last = True
            await acknowledged(stream, offer(stream, two))
            assert stream.problem == ""
            said = [each.last for each in pair.store.epochs.values()]
            assert said == ([False, True] if spoken >= 6 else [None, None])
        async with pair.streaming(versions=primary, term=2) as stream:  # it has to ask what is held
            three = offer(stream, captured(1, memory_of(p18=98), term=2))
            await acknowledged(stream, three)
        assert pair.store.epochs[three.id].memory == memory_of(p18=98)
        assert pair.store.epochs[three.id].sent_pages == 2
        assert EpochId(1, 2) in pair.store.asked
        assert {hello.protocol for hello in pair.hellos} == {spoken}
        assert receiver.refusals.total() == 0, "to agree on a version is no offence"


@pytest.mark.parametrize(
    ("primary", "replica", "told"),
    [
        (
            PRESENT,
            FAR,
            f"b speaks version {FAR.newest} of the wire format, a {PRESENT}: "
            "upgrade a, one version at a time",
        ),
        (
            FAR,
            PRESENT,
            f"b speaks version {PROTOCOL} of the wire format, a {FAR}: upgrade b, one version at a time",
        ),
    ],
)
async def test_who_is_too_far_away_is_told_both_versions_and_what_to_do(
    pair: Pair, primary: Versions, replica: Versions, told: str
) -> None:
    pair.versions = replica
    async with pair.receiving() as receiver, pair.streaming(versions=primary) as stream:
        offer(stream, captured(1, memory_of()))
        await until(lambda: stream.problem)
        assert stream.problem == f"b refuses: {told}"
        assert not stream.progress.connected
        assert set(receiver.refusals) == {"version"}
    assert pair.store.epochs == {}


async def test_who_greets_in_a_newer_version_again_and_again_is_cut_off(pair: Pair) -> None:
    context = zmq.asyncio.Context()
    peer = Peer(name="b", address="127.0.0.1", public_key=pair.b.public)
    hello = [msgpack.packb([PROTOCOL + 1, "hello", {"oldest": PROTOCOL}, []])]
    try:
        async with pair.receiving():
            ring = Keyring(pair.a, [peer])
            with open_link(context, peer=peer, port=pair.port, keys=ring, timing=QUICK_LINK) as link:
                lost = asyncio.ensure_future(link.lost())
                async with asyncio.timeout(10):
                    while not lost.done():
                        await link.try_send(hello)
                        await asyncio.sleep(0.002)
    finally:
        context.destroy(linger=0)


async def test_a_node_of_the_previous_version_refuses_in_its_own_words_and_is_greeted_again(
    pair: Pair,
) -> None:
    """As that version's code answers what it cannot read: with its own number, and any reason."""
    context = zmq.asyncio.Context()
    peers = pair.config().peers
    server = Server(context, address="127.0.0.1", port=0, keys=Keyring(pair.b, peers), timing=QUICK_LINK)
    serving = asyncio.create_task(server.serve())
    try:
        async with pair.streaming(port=server.port):
            first = await server.receive()
            assert msgpack.unpackb(first.frames[0])[0] == PROTOCOL
            fields = {"code": "version", "reason": f"the peer speaks {PROTOCOL}", "term": 0}
            await server.send(first.connection, [msgpack.packb([OLDEST, "refused", fields, []])])
            second = await server.receive()
            version, tag, said, _ = msgpack.unpackb(second.frames[0])
            assert (version, tag) == (OLDEST, "hello")
            assert said["protocol"] == OLDEST
            assert said["oldest"] == OLDEST
            assert second.connection == first.connection
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        context.destroy(linger=0)


def test_a_keeper_takes_in_the_heartbeats_of_a_newer_one() -> None:
    beat = Beat(node="b", boot_id="x", sequence=7, origin="keeper", wall_s=1.0, workloads=())
    header = msgpack.unpackb(encode(beat)[0])
    header[0] = PROTOCOL + 1
    header[2]["new"] = 1
    incoming = Incoming(b"c", "b", "key", (msgpack.packb(header),))
    assert BeatFilter().read(incoming) == beat


@pytest.mark.parametrize(("replica", "sent_pages"), [(PRESENT, 400), (PREVIOUS, 1000)])
async def test_copies_are_not_sent_to_who_can_make_them(
    pair: Pair, replica: Versions, sent_pages: int
) -> None:
    pair.versions = replica
    random = np.random.default_rng(7)
    contents = [random.bytes(PAGE_BYTES) for _ in range(1000)]
    files = {CONTENTS: dict(enumerate(contents[:400])) | {1000 + n: contents[n % 400] for n in range(600)}}
    # Written anew under another name: the old pages are gone.
    anew = {CONTENTS: {5000 + n: contents[n] for n in range(400)} | {9000: contents[999]}}
    async with pair.receiving(), pair.streaming() as stream:
        one = offer(stream, captured(1, files))
        await acknowledged(stream, one)
        sent_bytes = stream.counters.bytes_sent
        assert sent_pages * PAGE_BYTES < sent_bytes < (sent_pages + 30) * PAGE_BYTES
        two = offer(stream, captured(2, anew))
        await acknowledged(stream, two)
        stored = pair.store.epochs
        assert stored[one.id].memory == files
        assert stored[two.id].memory == anew
        again_pages = (stream.counters.bytes_sent - sent_bytes) // PAGE_BYTES
        assert again_pages < 10 if replica == PRESENT else again_pages > 400
