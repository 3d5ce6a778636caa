"""The local socket of agent and keeper."""

import asyncio
import contextlib
import socket
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from common.control import AskHistory, AskStatus, Done, Failover, KeeperAnswer, KeeperRequest, Refused
from common.control_channel import ControlClient, ControlServer, Handler, ask
from common.errors import ConfigError, NoRightToLeadError, UnreachableError


@contextlib.asynccontextmanager
async def answering(endpoint: str, handler: Handler) -> AsyncIterator[ControlServer]:
    context = zmq.asyncio.Context()
    server = ControlServer(context, endpoint, handler)
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()
        context.destroy(linger=0)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/run/keeper.sock"


async def echo(request: KeeperRequest) -> KeeperAnswer:
    return Done(detail=repr(request))


async def test_a_request_is_answered_and_the_directory_is_the_owners_alone(endpoint: str) -> None:
    async with answering(endpoint, echo):
        request = Failover(workload="redis", accept_data_loss=True)
        assert await ask(endpoint, request, 5) == Done(detail=repr(request))
        path = Path(endpoint.removeprefix("ipc://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_slow_request_holds_up_no_other(endpoint: str) -> None:
    async def handler(request: KeeperRequest) -> KeeperAnswer:
        if isinstance(request, AskHistory):
            await asyncio.sleep(60)
        return Done()

    async with answering(endpoint, handler):
        slow = asyncio.create_task(ask(endpoint, AskHistory(workload="x"), 60))
        await asyncio.sleep(0.05)
        assert await ask(endpoint, AskStatus(), 5) == Done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)


async def test_errors_travel_with_their_class_message_and_hint(endpoint: str) -> None:
    async def handler(request: KeeperRequest) -> KeeperAnswer:
        raise NoRightToLeadError("a may still run it", hint="outlive explain redis")

    async with answering(endpoint, handler):
        answer = await ask(endpoint, AskStatus(), 5)
        assert answer == Refused(
            error="NoRightToLeadError", message="a may still run it", hint="outlive explain redis"
        )


async def test_a_defect_in_one_answer_costs_only_that_answer(endpoint: str) -> None:
    async def handler(request: KeeperRequest) -> KeeperAnswer:
        if isinstance(request, AskStatus):
            raise KeyError("oops")
        return Done()

    async with answering(endpoint, handler):
        answer = await ask(endpoint, AskStatus(), 5)
        assert isinstance(answer, Refused)
        assert "oops" in answer.message
        assert await ask(endpoint, AskHistory(workload="x"), 5) == Done()


async def test_nonsense_is_refused(endpoint: str) -> None:
    async with answering(endpoint, echo):
        with zmq.asyncio.Context() as context, context.socket(zmq.REQ) as client:
            client.linger = 0
            client.connect(endpoint)
            await client.send(b"\xc1")
            assert b"ProtocolError" in await client.recv()
            client.close()
        assert await ask(endpoint, AskStatus(), 5)


async def test_nobody_there_is_said_at_once_with_what_to_do(endpoint: str) -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        await ask(endpoint, AskStatus(), 30)
    assert time.monotonic() - began < 5
    assert "systemctl status outlive-keeper" in caught.value.hint


async def test_no_answer_in_time_is_said_at_the_deadline(endpoint: str) -> None:
    async def handler(request: KeeperRequest) -> KeeperAnswer:
        await asyncio.sleep(60)
        return Done()

    async with answering(endpoint, handler):
        with pytest.raises(UnreachableError, match="within"):
            await ask(endpoint, AskStatus(), 0.1)


async def test_a_late_answer_is_not_taken_for_the_next_one(endpoint: str) -> None:
    async def handler(request: KeeperRequest) -> KeeperAnswer:
        if isinstance(request, AskHistory):
            await asyncio.sleep(0.2)
        return Done(detail=repr(request))

    client = ControlClient(endpoint)
    async with answering(endpoint, handler):
        assert await client.ask(AskStatus(), 5) == Done(detail=repr(AskStatus()))
        with pytest.raises(UnreachableError, match="within"):
            await client.ask(AskHistory(workload="x"), 0.05)
        await asyncio.sleep(0.3)
        assert await client.ask(AskStatus(), 5) == Done(detail=repr(AskStatus()))
    client.close()


async def test_a_client_outlives_who_answers_it(endpoint: str) -> None:
    client = ControlClient(endpoint)
    async with answering(endpoint, echo):
        assert await client.ask(AskStatus(), 5) == Done(detail=repr(AskStatus()))
    with pytest.raises(UnreachableError):
        await client.ask(AskStatus(), 0.1)
    with pytest.raises(UnreachableError, match="no keeper answers"):
        await client.ask(AskStatus(), 30)
    async with answering(endpoint, echo):
        assert await client.ask(AskStatus(), 5) == Done(detail=repr(AskStatus()))
    client.close()


async def test_a_dead_processs_socket_is_replaced_and_a_living_ones_is_not(endpoint: str) -> None:
    path = Path(endpoint.removeprefix("ipc://"))
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with answering(endpoint, echo):
        with zmq.asyncio.Context() as context, pytest.raises(ConfigError, match="already"):
            ControlServer(context, endpoint, echo)
        assert await ask(endpoint, AskStatus(), 5)


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with zmq.asyncio.Context() as context, pytest.raises(ConfigError, match="open to others"):
        ControlServer(context, f"ipc://{tmp_path}/open/agent.sock", echo)
    with zmq.asyncio.Context() as context, pytest.raises(ConfigError, match="too long"):
        ControlServer(context, f"ipc://{tmp_path}/{'x' * 120}/agent.sock", echo)
