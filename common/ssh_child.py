"""A fence by SSH from a process that must stay small: the client runs in a child, once for each call.

paramiko and what it stands on take some 20 MiB, and its threads cannot be ended from outside. In the child
both are gone with the answer, or at the time-out, whatever they wait for.

    python -m common.ssh_child <CALL >ANSWER        both JSON; exit status 0 whenever there is an answer
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from common import errors
from common.children import end_child, hangs
from common.config import SshFence
from common.errors import OutliveError, UnreachableError
from common.fence_request import FenceAnswer, FenceRequest

_CHILD = (sys.executable, "-m", __name__)
_CHILD_GRACE_S = 1.0
"""Above the call's own time-out: for the child's start and end."""


class _Call(msgspec.Struct, frozen=True):
    """What the child is to do."""

    ssh: SshFence
    request: FenceRequest
    timeout_s: float


class _Failure(msgspec.Struct, frozen=True):
    """Why there is no answer: an error by its class's name."""

    kind: str
    message: str
    hint: str


class _Result(msgspec.Struct, frozen=True):
    """What came of it; one of both."""

    answer: FenceAnswer | None = None
    failure: _Failure | None = None


async def ask_in_child(ssh: SshFence, request: FenceRequest, timeout_s: float) -> FenceAnswer:
    """Do what `common.ssh_fence.ask_by_ssh` does, and raise what it raises.

    UnreachableError too if the child cannot be run, ends without an answer or does not end in time; it is
    killed then. Like every other error that says: what happened on the node is not known.
    """
    kind = f"ssh {ssh.host}"
    if hangs(kind):
        raise UnreachableError("an earlier SSH client was killed, and has not ended yet")
    try:
        child = await asyncio.create_subprocess_exec(
            *_CHILD,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise UnreachableError(f"the SSH client could not be run: {error.strerror}") from error
    call = msgspec.json.encode(_Call(ssh, request, timeout_s))
    try:
        async with asyncio.timeout(timeout_s + _CHILD_GRACE_S):
            output, _ = await child.communicate(call)
    except TimeoutError:
        raise UnreachableError(f"no answer within {timeout_s * 1000:.0f} ms") from None
    finally:
        await end_child(child, kind)
    return _answer_in(output)


def _answer_in(output: bytes) -> FenceAnswer:
    try:
        result = msgspec.json.decode(output, type=_Result)
    except msgspec.MsgspecError:
        raise UnreachableError("the SSH client ended without an answer") from None
    if result.answer is not None:
        return result.answer
    failure = result.failure or _Failure("", "the SSH client said nothing", "")
    kind = getattr(errors, failure.kind, UnreachableError)
    if not (isinstance(kind, type) and issubclass(kind, OutliveError)):
        kind = UnreachableError
    raise kind(failure.message, hint=failure.hint)


def main() -> None:
    """Carry out the call that stands on stdin."""
    from common.ssh_fence import ask_by_ssh

    call = msgspec.json.decode(sys.stdin.buffer.read(), type=_Call)
    try:
        result = _Result(answer=asyncio.run(ask_by_ssh(call.ssh, call.request, call.timeout_s)))
    except OutliveError as error:
        result = _Result(failure=_Failure(type(error).__name__, error.message, error.hint))
    sys.stdout.buffer.write(msgspec.json.encode(result))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
