"""Encrypted links: who gets in, who is said to speak, and how a loss is noticed."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import zmq
import zmq.asyncio
from wire_fakes import new_keys

from common.config import Peer
from common.errors import AuthError, ConfigError
from common.keyring import Keyring
from common.keys import KeyPair
from common.messages import FRAME_COST_BYTES, MESSAGE_BYTES
from common.transport import KeyRefusedError, LinkTiming, Server, open_link, tcp_endpoint

A, B, C, SERVER = (new_keys() for _ in range(4))
TIMING = LinkTiming(ping_ms=100, dead_after_ms=500)


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    made = zmq.asyncio.Context()
    yield made
    made.destroy(linger=0)


@contextlib.asynccontextmanager
async def serving(
    context: zmq.asyncio.Context,
    address: str = "127.0.0.1",
    on_refused: Callable[[str, str], None] = lambda address, reason: None,
    ring: Keyring | None = None,
) -> AsyncIterator[Server]:
    server = Server(
        context,
        address=address,
        port=0,
        keys=ring or Keyring(SERVER, [peer_of("a", A.public), peer_of("b", B.public)]),
        timing=TIMING,
        on_refused=on_refused,
    )
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


def link_to(server: Server, context, keys: KeyPair, *, address: str = "127.0.0.1", key: str = SERVER.public):
    peer = peer_of("s", key, address=address)
    return open_link(context, peer=peer, port=server.port, keys=Keyring(keys, [peer]), timing=TIMING)


def peer_of(name: str, *keys: str, address: str = "127.0.0.1") -> Peer:
    return Peer(name=name, address=address, public_key=keys[0], also_public_keys=keys[1:])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_messages_go_both_ways_and_carry_who_sent_them(context, address: str) -> None:
    async with serving(context, address) as server:
        with (
            link_to(server, context, A, address=address) as a,
            link_to(server, context, B, address=address) as b,
        ):
            for link, name in ((a, "a"), (b, "b")):
                await link.send([b"head", bytes(100_000)])
                incoming = await server.receive()
                assert incoming.node == name
                assert [bytes(frame) for frame in incoming.frames] == [b"head", bytes(100_000)]
                assert incoming.cost_bytes == 100_004 + 2 * FRAME_COST_BYTES
                assert await server.send(incoming.connection, [b"to", name.encode()])
                assert await link.receive() == [b"to", name.encode()]


async def test_an_unknown_key_is_refused_and_logged_once(context, caplog) -> None:
    told: list[tuple[str, str]] = []
    async with serving(context, on_refused=lambda *what: told.append(what)) as server:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                with link_to(server, context, C) as link, pytest.raises(KeyRefusedError, match="refuses"):
                    async with asyncio.timeout(5):
                        await link.lost()
        assert server.refused == 3
        assert len([r for r in caplog.records if "transport.refused" in r.message]) == 1
        ((address, reason),) = told
        assert address == "127.0.0.1"
        assert C.public in reason


async def test_a_server_with_another_key_is_not_spoken_to(context) -> None:
    async with serving(context) as server:
        with (
            link_to(server, context, A, key=C.public) as link,
            pytest.raises(AuthError, match="proved") as caught,
        ):
            async with asyncio.timeout(5):
                await link.lost()
        assert not isinstance(caught.value, KeyRefusedError)  # a peer that dies looks the same


async def test_a_peer_without_encryption_gets_nothing_through(context) -> None:
    async with serving(context) as server:
        with context.socket(zmq.DEALER) as plain:
            plain.linger = 0
            plain.connect(tcp_endpoint("127.0.0.1", server.port))
            await plain.send(b"hello")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await server.receive()


async def test_the_end_of_a_server_is_noticed(context) -> None:
    async with serving(context) as server:
        with link_to(server, context, A) as link:
            await link.send([b"x"])
            await server.receive()
            server.close()
            async with asyncio.timeout(5):
                assert "ended" in await link.lost()


async def test_a_message_to_a_connection_that_is_gone_is_not_taken(context) -> None:
    async with serving(context) as server:
        with link_to(server, context, A) as link:
            await link.send([b"x"])
            incoming = await server.receive()
        async with asyncio.timeout(5):
            while await server.send(incoming.connection, [b"y"]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_message_larger_than_any_ends_the_connection(context) -> None:
    async with serving(context) as server:
        with link_to(server, context, A) as link:
            await link.send([bytes(MESSAGE_BYTES + 1)])
            async with asyncio.timeout(5):
                assert "ended" in await link.lost()


@pytest.mark.parametrize("frames", [1, 5000])
async def test_who_floods_is_cut_off_and_nobody_else(context, frames: int, caplog) -> None:
    """A peer that sends more than anybody can read must take neither memory nor anybody's turn."""
    async with serving(context) as server:
        with link_to(server, context, A) as a, link_to(server, context, B) as b:
            gone = asyncio.create_task(a.lost())
            await b.send([b"before"])
            for _ in range(3000):
                await a.send([b"x"] * frames)
                if frames > 1:
                    break
            await b.send([b"after"])
            heard = []
            async with asyncio.timeout(5):
                while b"after" not in heard:
                    heard.append(bytes((await server.receive()).frames[0]))
            assert heard.count(b"x") <= 1000
            if frames > 1:
                reading = asyncio.create_task(server.receive())
                async with asyncio.timeout(5):
                    assert await gone
                reading.cancel()
            gone.cancel()
    assert caplog.text.count("floods") <= 1


async def test_nothing_is_queued_while_there_is_no_connection(context) -> None:
    async with serving(context) as server:
        port = server.port
    peer = peer_of("s", SERVER.public)
    with open_link(context, peer=peer, port=port, keys=Keyring(A, [peer]), timing=TIMING) as link:
        assert not await link.try_send([b"late"])


async def test_an_address_that_is_not_here_is_a_configuration_error(context) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        Server(context, address="203.0.113.9", port=1, keys=Keyring(SERVER, []))


def test_what_the_keeper_imports_carries_nothing_heavy() -> None:
    code = (
        "import sys, common.transport, common.messages, common.control_channel, common.terms;"
        "heavy = {'numpy', 'lz4', 'blake3', 'xxhash', 'structlog', 'google'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("speaks", [True, False])
async def test_a_revoked_key_ends_its_connection_and_no_other(context, speaks: bool) -> None:
    ring = Keyring(SERVER, [peer_of("a", A.public), peer_of("b", B.public)])
    async with serving(context, ring=ring) as server:
        with link_to(server, context, A) as a, link_to(server, context, B) as b:
            connections = {}
            for link in (a, b):
                await link.send([b"hello"])
                incoming = await server.receive()
                connections[incoming.node] = incoming.connection
            ring.replace(SERVER, [peer_of("b", B.public)])
            if speaks:
                assert await a.try_send([b"still there"]) in (True, False)
            assert not await server.send(connections["a"], [b"secret"])
            async with asyncio.timeout(5):
                lost = asyncio.ensure_future(b.lost())
                with contextlib.suppress(KeyRefusedError):
                    assert "ended" in await a.lost()
            assert await server.send(connections["b"], [b"still here"])
            assert await b.receive() == [b"still here"]
            assert not lost.done()
            lost.cancel()
        with link_to(server, context, A) as again, pytest.raises(KeyRefusedError):
            async with asyncio.timeout(5):
                await again.lost()


async def test_what_a_revoked_key_sent_before_is_not_read_after(context) -> None:
    ring = Keyring(SERVER, [peer_of("a", A.public), peer_of("b", B.public)])
    async with serving(context, ring=ring) as server:
        with link_to(server, context, A) as a, link_to(server, context, B) as b:
            await a.send([b"waits in the server's queue"])
            await asyncio.sleep(0.2)
            ring.replace(SERVER, [peer_of("b", B.public)])
            await b.send([b"ours"])
            assert (await server.receive()).node == "b"
            with contextlib.suppress(KeyRefusedError):
                async with asyncio.timeout(5):
                    await a.lost()


async def test_both_keys_of_a_peer_are_the_same_peer(context) -> None:
    ring = Keyring(SERVER, [peer_of("a", A.public)])
    async with serving(context, ring=ring) as server:
        with link_to(server, context, B) as early, pytest.raises(KeyRefusedError):
            await early.lost()
        ring.replace(SERVER, [peer_of("a", A.public, B.public)])
        with link_to(server, context, A) as old, link_to(server, context, B) as new:
            for link, key in ((old, A.public), (new, B.public)):
                await link.send([b"x"])
                incoming = await server.receive()
                assert (incoming.node, incoming.key) == ("a", key)


async def test_a_server_with_a_new_key_of_its_own_is_found_by_whoever_has_both(context) -> None:
    theirs = Keyring(SERVER, [peer_of("a", A.public)])
    new = new_keys()
    peer = peer_of("s", SERVER.public, new.public)
    ours = Keyring(A, [peer])
    async with serving(context, ring=theirs) as server:

        def link():
            return open_link(context, peer=peer, port=server.port, keys=ours, timing=TIMING)

        with link() as before:
            await before.send([b"x"])
            await server.receive()
            theirs.replace(new, [peer_of("a", A.public)])
            async with asyncio.timeout(5):
                assert "ended" in await before.lost()
        tried = 0
        started_s = asyncio.get_running_loop().time()
        while True:
            tried += 1
            with link() as after:
                lost = asyncio.ensure_future(after.lost())
                ready = asyncio.ensure_future(after.ready())
                async with asyncio.timeout(5):
                    await asyncio.wait({lost, ready}, return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                ready.cancel()
                if not lost.done():
                    await after.send([b"y"])
                    assert (await server.receive()).node == "a"
                    break
                assert "another is tried" in lost.result()
        assert tried == 2
        assert asyncio.get_running_loop().time() - started_s < 1


async def test_a_link_ends_when_the_key_of_the_other_end_is_revoked(context) -> None:
    async with serving(context) as server:
        peer = peer_of("s", SERVER.public)
        ring = Keyring(A, [peer])
        with open_link(context, peer=peer, port=server.port, keys=ring, timing=TIMING) as link:
            await link.send([b"x"])
            await server.receive()
            lost = asyncio.ensure_future(link.lost())
            await asyncio.sleep(0)
            ring.replace(A, [peer_of("s", C.public)])
            async with asyncio.timeout(1):
                assert "revoked" in await lost
        ring.replace(A, [])
        with (
            pytest.raises(AuthError, match="no key any more"),
            open_link(context, peer=peer, port=server.port, keys=ring, timing=TIMING),
        ):
            pass
