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

from common.errors import AuthError, ConfigError
from common.keys import KeyPair
from common.messages import MESSAGE_BYTES
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
) -> AsyncIterator[Server]:
    server = Server(
        context,
        address=address,
        port=0,
        keys=SERVER,
        peers={A.public: "a", B.public: "b"},
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
    return open_link(
        context, peer="s", address=address, port=server.port, server_key=key, keys=keys, timing=TIMING
    )


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
                assert incoming.size_bytes == 100_004
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


async def test_nothing_is_queued_while_there_is_no_connection(context) -> None:
    async with serving(context) as server:
        port = server.port
    with open_link(
        context, peer="s", address="127.0.0.1", port=port, server_key=SERVER.public, keys=A, timing=TIMING
    ) as link:
        assert not await link.try_send([b"late"])


async def test_an_address_that_is_not_here_is_a_configuration_error(context) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        Server(context, address="203.0.113.9", port=1, keys=SERVER, peers={})


def test_what_the_keeper_imports_carries_nothing_heavy() -> None:
    code = (
        "import sys, common.transport, common.messages, common.control_channel, common.terms;"
        "heavy = {'numpy', 'lz4', 'blake3', 'xxhash', 'structlog', 'google'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
