"""Calls to etcd over its JSON gateway, by HTTP, in the event loop of a process that stays small.

In: `common.lease_calls.Call`s. Out: their answers, or UnreachableError. Every call has a connection of its
own and a deadline, so a member that is slow or hangs holds up nothing but that call. A call that may be
repeated goes to the next member then; one that may not, because it may have been carried out, is left to
whoever asked.

With https, a member is believed whose certificate the configured authority has signed for its address, and
nobody else. With a user, this logs in, and again when etcd does not know it any more; all who wait for that
wait for the same. What is needed from files is read in threads for which nobody waits longer than for a call,
and anew after a call has failed; what was read before is used until then. So a new certificate or password
needs no restart, and a disk that hangs holds up nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec

from common.config import Etcd
from common.errors import OutliveError, UnreachableError
from common.keys import check_secret, load_password
from common.lease_calls import Answer, Call, LeaseKeys, Question

if TYPE_CHECKING:  # a keeper that does not need it does not load it
    import ssl

_MOST_BYTES = 1 << 20
"""Of an answer: the keys and values of a lease are short."""
_TRIES = 2
_NO_AUTHENTICATION = "authentication is not enabled"
_NOBODY = ("invalid auth token", "user name is empty", "revision in header is old")
"""What etcd says to who has to log in (again). It has carried out nothing then."""


_T = TypeVar("_T")


class _LogIn(msgspec.Struct, frozen=True):
    """Answer of `/v3/auth/authenticate`."""

    token: str = ""


class _Status(msgspec.Struct, frozen=True):
    """Answer of `/v3/maintenance/status`."""

    version: str = ""


class _NotLoggedInError(ValueError):
    """Etcd does not know who asks."""


class _Kept(Generic[_T]):
    """What is read from files: when it is first asked for, and once more after every doubt."""

    def __init__(self, read: Callable[[], _T]) -> None:
        self._read = read
        self._value: _T | None = None
        self._reading: asyncio.Future[_T] | None = None
        self._doubted = True

    def doubt(self) -> None:
        """Have it read anew; until that is done, it is what it was."""
        self._doubted = True

    async def get(self, within_s: float) -> _T:
        """Return it, at once if it was ever read. Raises TimeoutError, and what reading raises."""
        if self._reading is None and self._doubted:
            self._doubted = False
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
        reading = self._reading
        if reading is not None and self._value is None:
            await asyncio.wait({reading}, timeout=within_s)
        if reading is not None and reading.done():
            if self._reading is reading:
                self._reading = None
            if reading.exception() is None:
                self._value = reading.result()
            elif self._value is None:
                self._doubted = True
                return reading.result()
        if self._value is None:
            raise TimeoutError
        return self._value


class EtcdClient:
    """The members of one etcd. Belongs to one event loop."""

    def __init__(self, config: Etcd, timeout_s: float) -> None:
        """`timeout_s` is for one call to one member, and as long for logging in."""
        self._user = config.user
        self._members: Sequence[str] = config.endpoints
        self._timeout_s = timeout_s
        self._tls = _Kept(lambda: _tls_context(config))
        self._password = _Kept(lambda: load_password(Path(config.password_file)))
        self._token: str | None = None
        """What etcd knows this node by; None: it has to log in."""
        self._logging_in: asyncio.Future[str] | None = None
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

    async def version(self) -> tuple[int, ...]:
        """Return which etcd answers: (3, 5, 13); empty if it does not say. Raises UnreachableError."""
        asked = Call(path="/v3/maintenance/status", body=b"{}", answer=_Status, repeatable=True)
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", (await self._call(asked)).version)
        return tuple(map(int, numbers.groups())) if numbers else ()

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
            except (OSError, ValueError, OutliveError, msgspec.MsgspecError) as error:
                self._tls.doubt()  # perhaps it wants another certificate than before
                problem = UnreachableError(f"{member}: {error}")
            if self._members[self._first % len(self._members)] == member:  # nobody has moved on meanwhile
                self._first += 1
        raise problem

    async def _ask_known(self, member: str, path: str, body: bytes) -> bytes:
        """Return the body of the answer; log in before if need be, or if etcd says so."""
        token = self._token if self._token is not None else await self._logged_in(member)
        try:
            return await self._post(member, path, body, token)
        except _NotLoggedInError:
            if not self._user:
                raise
        if self._token == token:
            self._token = None
        token = self._token if self._token is not None else await self._logged_in(member)
        return await self._post(member, path, body, token)

    async def _logged_in(self, member: str) -> str:
        """Log in, or wait for who is doing that; return the token."""
        if not self._user:
            return ""
        if self._logging_in is None:
            self._logging_in = asyncio.ensure_future(self._log_in(member))
        logging_in = self._logging_in
        await asyncio.wait({logging_in})
        if self._logging_in is logging_in:
            self._logging_in = None
            if logging_in.exception() is None:
                self._token = logging_in.result()
        return logging_in.result()

    async def _log_in(self, member: str) -> str:
        """Return the token of this node's user; empty if nobody has to log in."""
        password = await self._password.get(self._timeout_s)
        body = msgspec.json.encode({"name": self._user, "password": password})
        try:
            answer = await self._post(member, "/v3/auth/authenticate", body)
        except ValueError as error:
            if _NO_AUTHENTICATION in str(error):
                return ""
            self._password.doubt()
            raise ValueError(f"user {self._user} cannot log in: {error}") from error
        return msgspec.json.decode(answer, type=_LogIn).token

    async def _post(self, member: str, path: str, body: bytes, token: str = "") -> bytes:
        """Return the body of the answer. Raises OSError, TimeoutError, ValueError."""
        url = urlsplit(member)
        host, port = url.hostname or "", url.port or 2379
        tls = await self._tls.get(self._timeout_s) if url.scheme == "https" else None
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
    """Read the files. Raises OSError, and AuthError if others can read the key."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    path = config.ca_file
    try:
        context.load_verify_locations(path)
        if path := config.cert_file:
            check_secret(Path(config.key_file))
            context.load_cert_chain(path, config.key_file, password="")  # not: ask on the terminal
    except OSError as error:
        raise OSError(f"{path} cannot be used: {error}") from error
    return context


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    chunks, size = [], 0
    while chunk := await reader.read(65536):
        size += len(chunk)
        if size > _MOST_BYTES:
            raise ValueError("an answer of more than 1 MiB")
        chunks.append(chunk)
    return b"".join(chunks)
