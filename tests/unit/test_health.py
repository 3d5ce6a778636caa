"""Health checks by TCP, HTTP and command, against small servers of our own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.health import check_once, health_address, wait_healthy
from common.model import HealthCheck, WorkloadSpec


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def test_a_port_that_accepts_is_healthy_and_one_that_does_not_is_not() -> None:
    async with server(b"") as port:
        assert await check_once(HealthCheck(tcp=port), "127.0.0.1") == ""
    assert await check_once(HealthCheck(tcp=port), "127.0.0.1") != ""


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 302 Found\r\n\r\n", True),
        (b"HTTP/1.1 503 Busy\r\n\r\n", False),
        (b"ERR unknown\r\n", False),
        (b"x" * 10_000, False),
    ],
)
async def test_http_is_healthy_by_its_status(answer: bytes, healthy: bool) -> None:
    async with server(answer) as port:
        wrong = await check_once(HealthCheck(http=f":{port}/health"), "127.0.0.1")
    assert (wrong == "") is healthy


@pytest.mark.parametrize(
    ("http", "target"),
    [
        (":81/h", (81, "/h")),
        ("81/h", (81, "/h")),
        (":81", (81, "/")),
        ("/h", (80, "/h")),
        ("", (80, "/")),
    ],
)
def test_a_port_or_a_path_may_be_missing(http: str, target: tuple[int, str]) -> None:
    assert HealthCheck(http=http).http_target() == target


@pytest.mark.parametrize("http", ["localhost:8080/h", ":99999/", ":0/", ":80/a b", ":80/\r\nX: y", ":/x"])
async def test_a_target_that_is_none_is_not_healthy_and_raises_nothing(http: str) -> None:
    assert "is not of the form :PORT/PATH" in await check_once(HealthCheck(http=http), "127.0.0.1")


async def test_a_command_is_healthy_if_it_exits_with_0() -> None:
    assert await check_once(HealthCheck(command=("true",)), "") == ""
    assert "exited with 1" in await check_once(HealthCheck(command=("false",)), "")
    assert await check_once(HealthCheck(command=("/no/such",)), "") != ""


async def test_a_command_that_hangs_is_ended_at_its_timeout() -> None:
    began_s = time.monotonic()
    check = HealthCheck(command=("sleep", "60"), timeout_ms=100)
    assert "100 ms" in await check_once(check, "")
    assert time.monotonic() - began_s < 1


async def test_it_is_asked_until_it_is_healthy_or_the_grace_is_over() -> None:
    async with server(b"") as port:
        assert await wait_healthy(HealthCheck(tcp=port), "127.0.0.1") == ""
    began_s = time.monotonic()
    assert "200 ms" in await wait_healthy(HealthCheck(tcp=port, grace_ms=200), "127.0.0.1")
    assert 0.2 <= time.monotonic() - began_s < 1


def test_it_is_asked_at_the_virtual_address_if_there_is_one() -> None:
    spec = WorkloadSpec(name="w", nodes=("a",), command=("x",))
    assert health_address(spec) == "127.0.0.1"
    vip = WorkloadSpec(name="w", nodes=("a",), command=("x",), vip="10.0.0.9/24")
    assert health_address(vip) == "10.0.0.9"
