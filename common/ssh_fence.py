"""The client of a fence by SSH: one connection, one command on the node that is to be off, one answer.

In: where, with which key, and a `FenceRequest`. Out: the node's `FenceAnswer`, or an OutliveError, after
which nothing is known of the node. It decides nothing: `common.fencing` says what an answer is worth.

- Only the pinned host key is accepted. There is no known_hosts, no agent, no password.
- paramiko blocks, so it has a thread of its own for each call; the event loop only waits, and at the deadline
  cuts the connection and waits no longer. The thread ends by itself then: its waits are bounded too.
- paramiko takes about 20 MiB: a keeper leaves this to a child (`common.ssh_child`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paramiko

from common.config import SshFence
from common.errors import (
    AuthError,
    FenceRefusedError,
    FenceUnknownError,
    OutliveError,
    ProtocolError,
    UnreachableError,
)
from common.fence_request import FenceAnswer, FenceRequest, Outcome, read_answer, words_of
from common.host_key import parse_host_key
from common.keys import load_ssh_key

_ANSWER_BYTES = 64 * 1024
"""Most that is read of an answer; one is about 300 bytes."""
_QUOTED_BYTES = 300
_EXITS: dict[int, Outcome] = {
    0: "confirmed",
    FenceRefusedError.exit_code: "refused",
    FenceUnknownError.exit_code: "unknown",
}
"""What the verb exits with; an answer counts only if its exit status says the same."""

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # what goes wrong is raised, and told once


async def ask_by_ssh(
    ssh: SshFence, request: FenceRequest, timeout_s: float, *, dry_run: bool = False
) -> FenceAnswer:
    """Let the node fence itself, or (`dry_run`) only say whether it would.

    Raises AuthError: keys do not match; UnreachableError: no answer came, in time or at all; ProtocolError:
    what came is no answer to this request. Each of them means that what happened there is not known.
    """
    call = _Call(ssh, shlex.join([*ssh.command, *words_of(request, dry_run=dry_run)]), timeout_s)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ssh-fence")
    try:
        async with asyncio.timeout(timeout_s):
            status, output, said = await asyncio.get_running_loop().run_in_executor(worker, call.run)
    except TimeoutError:
        raise UnreachableError(f"no answer within {timeout_s * 1000:.0f} ms") from None
    finally:
        call.cut()
        worker.shutdown(wait=False)
    return _checked(request, status, output, said, dry_run=dry_run)


def _checked(request: FenceRequest, status: int, output: bytes, said: bytes, *, dry_run: bool) -> FenceAnswer:
    """Return the answer if it is one, whole, and to this request. Raises ProtocolError."""
    try:
        answer = read_answer(output)
    except ProtocolError:
        quoted = (said or output)[-_QUOTED_BYTES:].decode(errors="replace").strip().replace("\n", " / ")
        raise ProtocolError(f"no answer of Outlive there (exit {status}): {quoted or 'nothing'}") from None
    if (answer.node, answer.by, answer.terms) != (request.node, request.by, request.terms):
        raise ProtocolError(f"{answer.node} answered another question, about {answer.terms}")
    expected = "ready" if dry_run and status == 0 else _EXITS.get(status)
    if answer.outcome != expected:
        raise ProtocolError(f"the answer says {answer.outcome}, its exit status {status} does not")
    return answer


class _Call:
    """One connection. `run` blocks, in a thread; `cut` may be called from any other, and never blocks."""

    def __init__(self, ssh: SshFence, command: str, timeout_s: float) -> None:
        self._ssh = ssh
        self._command = command
        self._deadline_s = time.monotonic() + timeout_s
        self._socket: socket.socket | None = None

    def cut(self) -> None:
        """End the connection under whoever waits for it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> tuple[int, bytes, bytes]:
        """Return exit status (-1: none came), stdout, stderr. Raises AuthError, UnreachableError."""
        where = f"{self._ssh.host} port {self._ssh.port}"
        try:
            return self._run()
        except OutliveError:
            raise
        except paramiko.BadHostKeyException as error:
            raise AuthError(
                f"WRONG HOST KEY at {where}: another machine answers there, or its key was changed: "
                f"{error.key.get_name()} {error.key.get_base64()}",
                hint="compare ssh.host_key with /etc/ssh/ssh_host_*_key.pub on the node itself",
            ) from error
        except paramiko.AuthenticationException as error:
            raise AuthError(
                f"{where} does not accept {self._ssh.key_file} for {self._ssh.user}",
                hint=f"its public half belongs into authorized_keys of {self._ssh.user} there",
            ) from error
        except TimeoutError as error:
            raise UnreachableError(f"no answer from {where}") from error
        except Exception as error:  # a library's surprise must cost the keeper an answer, and nothing more
            raise UnreachableError(f"{where}: {_told(error)}") from error

    def _run(self) -> tuple[int, bytes, bytes]:
        ssh, pinned = self._ssh, parse_host_key(self._ssh.host_key)
        key = _private_key(Path(ssh.key_file))
        self._socket = socket.create_connection((ssh.host, ssh.port), timeout=self._left_s())
        with self._socket, paramiko.SSHClient() as client:
            name = ssh.host if ssh.port == 22 else f"[{ssh.host}]:{ssh.port}"
            server_key = paramiko.PKey.from_type_string(pinned.kind, pinned.blob)
            client.get_host_keys().add(name, pinned.kind, server_key)
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            client.connect(
                *(ssh.host, ssh.port, ssh.user),
                pkey=key,
                sock=self._socket,
                allow_agent=False,
                look_for_keys=False,
                timeout=self._left_s(),
                banner_timeout=self._left_s(),
                auth_timeout=self._left_s(),
                channel_timeout=self._left_s(),
            )
            _, stdout, stderr = client.exec_command(self._command, timeout=self._left_s())
            output = stdout.read(_ANSWER_BYTES)
            said = stderr.read(_ANSWER_BYTES)
            stdout.channel.settimeout(self._left_s())
            stdout.channel.status_event.wait(self._left_s())
            status = stdout.channel.exit_status if stdout.channel.exit_status_ready() else -1
            return status, output, said

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _private_key(path: Path) -> paramiko.PKey:
    """Return the key. Raises AuthError: missing, readable by others, with a passphrase, or none at all."""
    load_ssh_key(path)  # for its checks of who may read it
    try:
        key: paramiko.PKey = paramiko.PKey.from_path(path)
    except Exception as error:  # of paramiko or of what it stands on: each of them has its own
        raise AuthError(
            f"{path} is no private SSH key without a passphrase: {_told(error)}",
            hint="ssh-keygen -t ed25519 -N '' makes one",
        ) from error
    return key


def _told(error: Exception) -> str:
    """Return the error in words; some of paramiko's have none."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return words or type(error).__name__
