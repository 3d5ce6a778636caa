"""Calls to etcd over its JSON gateway, by HTTP, in the event loop of a process that stays small.

In: `common.lease_calls.Call`s. Out: their answers, or UnreachableError. Every call has a connection of its
own and a deadline, so a member that is slow or hangs holds up nothing but that call. A call that may be
repeated goes to the next member then; one that may not, because it may have been carried out, is left to
whoever asked.

With https, a member is believed whose certificate the configured authority has signed for its address, and
nobody else. The files for that are read when they are needed, and again after a call has failed: a new
certificate needs no restart. With a user, this logs in, and again when etcd does not know it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from common.config import Etcd
from common.errors import UnreachableError
from common.lease_calls import Answer, Call, LeaseKeys, Question
from common.threads import in_thread

if TYPE_CHECKING:  # a keeper that does not need it does not load it
    import ssl

_MOST_BYTES = 1 << 20
"""Of an answer: the keys and values of a lease are short."""
_TRIES = 2
_NO_AUTHENTICATION = "authentication is not enabled"
_NOBODY = ("invalid auth token", "user name is empty", "revision in header is old")
"""What etcd says to who has to log in (again). It has carried out nothing then."""


class _LogIn(msgspec.Struct, frozen=True):
    """Answer of `/v3/auth/authenticate`."""

    token: str = ""


class _NotLoggedInError(ValueError):
    """Etcd does not know who asks."""


class EtcdClient:
    """The members of one etcd. Belongs to one event loop."""

    def __init__(self, config: Etcd, timeout_s: float) -> None:
        """`timeout_s` is for one call to one member, and as long for logging in."""
        self._config = config
        self._members: Sequence[str] = config.endpoints
        self._timeout_s = timeout_s
        self._tls: ssl.SSLContext | None = None
        self._token: str | None = None
        """What etcd knows this node by; None: it has to log in."""
        self._first = 0
        """Whom to ask first: the one that answered last."""

    async def ask(self, keys: LeaseKeys, question: Question) -> Answer:
        """Put a question; never raises but when cancelled."""
        asking = keys.ask(question)
        try:
            call = next(asking)
            while True:
                try:
                    answer = await self._call(call)
                except UnreachableError as error:
                    call = asking.throw(error)
                else:
                    call = asking.send(answer)
        except StopIteration as ended:
            result: Answer = ended.value
            return result

    async def _call(self, call: Call) -> Any:
        """Make one call. Raises UnreachableError."""
        problem = UnreachableError("no etcd is configured here", hint="[etcd] endpoints in the node's file")
        for _ in range(_TRIES if call.repeatable else 1):
            if not self._members:
                break
            member = self._members[self._first % len(self._members)]
            try:
                raw = await self._ask_known(member, call.path, call.body)
                return msgspec.json.decode(raw, type=call.answer, strict=False)
            except TimeoutError:
                problem = UnreachableError(f"{member} did not answer within {self._timeout_s * 1000:.0f} ms")
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                self._tls = None  # perhaps it wants another certificate than before
                problem = UnreachableError(f"{member}: {error}")
            self._first += 1
        raise problem

    async def _ask_known(self, member: str, path: str, body: bytes) -> bytes:
        """Return the body of the answer; log in before if need be, or if etcd says so."""
        if self._token is None:
            self._token = await self._log_in(member)
        try:
            return await self._post(member, path, body, self._token)
        except _NotLoggedInError:
            if not self._config.user:
                raise
        self._token = None
        self._token = await self._log_in(member)
        return await self._post(member, path, body, self._token)

    async def _log_in(self, member: str) -> str:
        """Return the token of this node's user; empty if nobody has to log in."""
        if not self._config.user:
            return ""
        password = await in_thread(_first_line, self._config.password_file)
        body = msgspec.json.encode({"name": self._config.user, "password": password})
        try:
            answer = await self._post(member, "/v3/auth/authenticate", body)
        except ValueError as error:
            if _NO_AUTHENTICATION in str(error):
                return ""
            raise ValueError(f"user {self._config.user} cannot log in: {error}") from error
        return msgspec.json.decode(answer, type=_LogIn).token

    async def _post(self, member: str, path: str, body: bytes, token: str = "") -> bytes:
        """Return the body of the answer. Raises OSError, TimeoutError, ValueError."""
        url = urlsplit(member)
        host, port = url.hostname or "", url.port or 2379
        if url.scheme == "https" and self._tls is None:
            self._tls = await in_thread(_tls_context, self._config)
        tls = self._tls if url.scheme == "https" else None
        async with asyncio.timeout(self._timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=_MOST_BYTES, ssl=tls)
            try:
                # 1.0: what the gateway sends as a stream then ends with the connection, and is not in chunks.
                authorization = f"Authorization: {token}\r\n" if token else ""
                writer.write(
                    f"POST {path} HTTP/1.0\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
                    f"{authorization}Content-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                raw = await _read_all(reader)
            finally:
                writer.transport.abort()  # the answer is here, or nobody waits for it any more
        head, _, answer = raw.partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].split()
        if len(status) < 2 or status[1] != b"200":
            said = answer[:200].decode(errors="replace").strip()
            if any(each in said for each in _NOBODY):
                raise _NotLoggedInError(f"{said}: give etcd.user and etcd.password_file")
            raise ValueError(f"answered {said or 'nothing'}")
        return answer


def _tls_context(config: Etcd) -> ssl.SSLContext:
    """Read the files. Raises OSError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    path = config.ca_file
    try:
        context.load_verify_locations(path)
        if path := config.cert_file:
            context.load_cert_chain(path, config.key_file)
    except OSError as error:
        raise OSError(f"{path} cannot be used: {error}") from error
    return context


def _first_line(path: str) -> str:
    """Return what a file says. Raises OSError, ValueError."""
    return Path(path).read_text().splitlines()[0].strip() if path else ""


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    chunks, size = [], 0
    while chunk := await reader.read(65536):
        size += len(chunk)
        if size > _MOST_BYTES:
            raise ValueError("an answer of more than 1 MiB")
        chunks.append(chunk)
    return b"".join(chunks)
