"""The etcd client: one call, one connection, one deadline; who does not answer is passed over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.config import Etcd
from common.etcd import EtcdClient
from common.lease_calls import Claim, Granted, LeaseKeys, Look, Seen, Unanswered
from tests.sim import etcd as simulated


@asynccontextmanager
async def member(store: simulated.Etcd | None, *, status: str = "200 OK") -> AsyncIterator[str]:
    """Serve a simulated etcd over HTTP; None: take connections, and never answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if store is None:
            await reader.read()
        else:
            answer = store.answer(path, body, time.monotonic())
            writer.write(f"HTTP/1.0 {status}\r\nContent-Type: application/json\r\n\r\n".encode() + answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def keys() -> LeaseKeys:
    return LeaseKeys("w", node="a", boot_id="x", ttl_s=2, clock=time.monotonic)


async def test_a_question_is_answered_over_http() -> None:
    async with member(simulated.Etcd()) as url:
        client = EtcdClient(Etcd(endpoints=(url,)), 1.0)
        assert isinstance(await client.ask(keys(), Claim(term=1, known=0, over=False, blank=True)), Granted)
        looked = await client.ask(keys(), Look())
        assert isinstance(looked, Seen)
        assert looked.standing.leader is not None
        assert looked.standing.leader.node == "a"


async def test_a_member_that_hangs_costs_one_deadline_and_is_asked_last_from_then_on() -> None:
    async with member(None) as hanging, member(simulated.Etcd()) as good:
        client = EtcdClient(Etcd(endpoints=(hanging, good)), 0.2)
        began_s = time.monotonic()
        assert isinstance(await client.ask(keys(), Look()), Seen)
        assert 0.2 <= time.monotonic() - began_s < 1.0
        began_s = time.monotonic()
        assert isinstance(await client.ask(keys(), Look()), Seen)
        assert time.monotonic() - began_s < 0.2


async def test_nobody_answers_is_unanswered_with_the_reason() -> None:
    client = EtcdClient(Etcd(endpoints=("http://127.0.0.1:1",)), 0.2)
    answer = await client.ask(keys(), Look())
    assert isinstance(answer, Unanswered)
    assert "127.0.0.1:1" in answer.reason


async def test_an_answer_that_is_an_error_is_no_answer() -> None:
    async with member(simulated.Etcd(), status="503 Service Unavailable") as url:
        answer = await EtcdClient(Etcd(endpoints=(url,)), 1.0).ask(keys(), Look())
        assert isinstance(answer, Unanswered)


async def test_without_endpoints_the_reason_says_so() -> None:
    answer = await EtcdClient(Etcd(), 1.0).ask(keys(), Look())
    assert isinstance(answer, Unanswered)
    assert "no etcd is configured here" in answer.reason
