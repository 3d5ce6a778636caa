"""Calls to etcd over its JSON gateway, by HTTP, in the event loop of a process that stays small.

In: `common.lease_calls.Call`s. Out: their answers, or UnreachableError. Every call has a connection of its
own and a deadline, so a member that is slow or hangs holds up nothing but that call. A call that may be
repeated goes to the next member then; one that may not, because it may have been carried out, is left to
whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from common.config import Etcd
from common.errors import UnreachableError
from common.lease_calls import Answer, Call, LeaseKeys, Question

_MOST_BYTES = 1 << 20
"""Of an answer: the keys and values of a lease are short."""
_TRIES = 2


class EtcdClient:
    """The members of one etcd. Belongs to one event loop."""

    def __init__(self, config: Etcd, timeout_s: float) -> None:
        """`timeout_s` is for one call to one member."""
        self._members: Sequence[str] = config.endpoints
        self._timeout_s = timeout_s
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
                async with asyncio.timeout(self._timeout_s):
                    return msgspec.json.decode(await self._post(member, call), type=call.answer, strict=False)
            except TimeoutError:
                problem = UnreachableError(f"{member} did not answer within {self._timeout_s * 1000:.0f} ms")
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                problem = UnreachableError(f"{member}: {error}")
            self._first += 1
        raise problem

    async def _post(self, member: str, call: Call) -> bytes:
        """Return the body of the answer. Raises OSError, ValueError."""
        url = urlsplit(member)
        host, port = url.hostname or "", url.port or 2379
        reader, writer = await asyncio.open_connection(host, port, limit=_MOST_BYTES)
        try:
            # 1.0: what the gateway sends as a stream then ends with the connection, and is not in chunks.
            writer.write(
                f"POST {call.path} HTTP/1.0\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(call.body)}\r\n\r\n".encode()
                + call.body
            )
            raw = await _read_all(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        head, _, body = raw.partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].split()
        if len(status) < 2 or status[1] != b"200":
            raise ValueError(f"answered {body[:200].decode(errors='replace') or 'nothing'}")
        return body


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    chunks, size = [], 0
    while chunk := await reader.read(65536):
        size += len(chunk)
        if size > _MOST_BYTES:
            raise ValueError("an answer of more than 1 MiB")
        chunks.append(chunk)
    return b"".join(chunks)
