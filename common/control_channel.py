"""The local socket on which a node's agent and keeper are asked things.

In: a request of `common.control`. Out: its answer. One request and one answer an exchange, over a unix socket
in the node's run directory; requests are answered side by side, so a slow one holds up no other. An error of
the handler travels as `Refused`; that nobody answers is an UnreachableError with what to do about it.

Trust: the run directory is for its owner alone (mode 0700), and so is the socket. Both processes and the
command line are one version of Outlive, so this format is not a promise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket as sockets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from common.control import KeeperAnswer, KeeperRequest, Refused
from common.errors import ConfigError, OutliveError, ProtocolError, UnreachableError
from common.private_directory import prepare_private_directory

log = logging.getLogger(__name__)

Handler = Callable[[KeeperRequest], Awaitable[KeeperAnswer]]

_MESSAGE_BYTES: Final = 16 << 20
"""Most bytes of a request or answer: a long history of many workloads fits in."""
_QUEUE_MESSAGES: Final = 1000
_PATH_BYTES: Final = 107
"""Longest path of a unix socket (`sun_path` in <sys/un.h>, less the final zero)."""

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[KeeperRequest] = msgspec.msgpack.Decoder(KeeperRequest)
_answers: msgspec.msgpack.Decoder[KeeperAnswer] = msgspec.msgpack.Decoder(KeeperAnswer)


class ControlServer:
    """Answers at `endpoint` (`ipc://PATH`) from its construction until `close()`, while `serve()` runs."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, handler: Handler) -> None:
        """Listen. A socket left by a dead process is replaced.

        Raises ConfigError: somebody answers there already, the path is too long, or the directory cannot be
        made or is open to others.
        """
        path = _socket_path(endpoint)
        prepare_private_directory(path.parent, "node.run_dir")
        if _somebody_listens(path):
            raise ConfigError(f"another process answers at {path} already", hint="stop it first")
        self._handler = handler
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = _QUEUE_MESSAGES
        self._socket.maxmsgsize = _MESSAGE_BYTES
        try:
            self._socket.bind(endpoint)
            path.chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            self._socket.close(linger=0)
            raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error

    async def serve(self) -> None:
        """Answer requests until cancelled; what is being answered then is cancelled too."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                frames = await self._socket.recv_multipart()
                if len(frames) == 3:  # connection, REQ's empty delimiter, request
                    tasks.create_task(self._answer(*frames))

    def close(self) -> None:
        """Stop listening; libzmq removes the socket file. Harmless when repeated."""
        self._socket.close(linger=0)

    async def _answer(self, connection: bytes, delimiter: bytes, request: bytes) -> None:
        answer = _encoder.encode(await self._ask_handler(request))
        await self._socket.send_multipart([connection, delimiter, answer])

    async def _ask_handler(self, request: bytes) -> KeeperAnswer:
        try:
            return await self._handler(_requests.decode(request))
        except msgspec.DecodeError as error:
            return Refused(error=ProtocolError.__name__, message=f"not a request: {error}")
        except OutliveError as error:
            return Refused(error=type(error).__name__, message=error.message, hint=error.hint)
        except Exception as error:
            # One wrong answer must not cost all workloads their keeper: who asked is told, and so is the log.
            log.exception("control.handler_failed")
            return Refused(error=OutliveError.__name__, message=f"a defect in Outlive: {error!r}")


class ControlClient:
    """Asks at one endpoint again and again, over one connection as long as that goes well; one at a time."""

    def __init__(self, endpoint: str, context: zmq.asyncio.Context | None = None) -> None:
        """Connect to nothing yet. Raises ConfigError for a path that is too long."""
        self._endpoint = endpoint
        self._path = _socket_path(endpoint)
        self._context = context
        self._socket: zmq.asyncio.Socket | None = None

    async def ask(self, request: KeeperRequest, deadline_s: float) -> KeeperAnswer:
        """Send a request and wait for its answer, at most `deadline_s`; `Refused` is an answer too.

        Raises UnreachableError: at once if nobody listens (after a first answer: at the deadline), or if
        nobody answers until then (the request may have been carried out); ProtocolError for an answer that
        makes no sense. After any error the next request is sent over a new connection.
        """
        who = self._path.stem
        hint = f"is the {who} running? systemctl status outlive-{who}"
        answered = False
        try:
            async with asyncio.timeout(deadline_s):
                socket = self._connected(hint)
                await socket.send(_encoder.encode(request))
                answer = _answers.decode(await socket.recv())
            answered = True
        except TimeoutError:
            raise UnreachableError(
                f"the {who} at {self._path} did not answer within {deadline_s:g} s", hint=hint
            ) from None
        except msgspec.DecodeError as error:
            raise ProtocolError(
                f"the {who} at {self._path} answered nonsense: {error}",
                hint=f"it may run another version: systemctl restart outlive-{who}",
            ) from error
        finally:
            if not answered:  # what comes late on this connection would pass for the next answer
                self.close()
        return answer

    def close(self) -> None:
        """Let go of the connection, if there is one. Harmless when repeated."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def _connected(self, hint: str) -> zmq.asyncio.Socket:
        if self._socket is None:
            if not _somebody_listens(self._path):
                raise UnreachableError(f"no {self._path.stem} answers at {self._path}", hint=hint)
            self._socket = (self._context or zmq.asyncio.Context.instance()).socket(zmq.REQ)
            self._socket.linger = 0
            self._socket.maxmsgsize = _MESSAGE_BYTES
            self._socket.connect(self._endpoint)
        return self._socket


async def ask(
    endpoint: str,
    request: KeeperRequest,
    deadline_s: float,
    *,
    context: zmq.asyncio.Context | None = None,
) -> KeeperAnswer:
    """Ask once: see `ControlClient.ask`."""
    client = ControlClient(endpoint, context)
    try:
        return await client.ask(request, deadline_s)
    finally:
        client.close()


def _socket_path(endpoint: str) -> Path:
    path = endpoint.removeprefix("ipc://")
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise ConfigError(f"the socket path {path} is too long", hint="choose a shorter node.run_dir")
    return Path(path)


def _somebody_listens(path: Path) -> bool:
    """Whether a process holds the socket; a file that a dead one left does not count."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its queue of connections is full: it is there, and busy
        except OSError:
            return False
        return True
