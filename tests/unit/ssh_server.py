"""An SSH server in this process, on loopback: it answers as a test wants it to, or goes wrong at a step."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import paramiko

from common.config import SshFence

Step = Literal["accepted", "started", "asked", "answered"]
"""Of a connection: TCP is open; keys are exchanged; the command is known; the answer is out, no status is."""


@dataclass
class Answers:
    """What the server does."""

    output: bytes = b""
    status: int = 0
    hang_at: Step | None = None
    cut_at: Step | None = None
    asked: list[str] = field(default_factory=list)


class _Server(paramiko.ServerInterface):
    def __init__(self, allowed: paramiko.PKey) -> None:
        self._allowed = allowed
        self.command = ""
        self.asked = threading.Event()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        right = username == "root" and key == self._allowed
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.command = command.decode()
        self.asked.set()
        return True


@contextlib.contextmanager
def ssh_server(directory: Path, answers: Answers) -> Iterator[SshFence]:
    """Serve until the block ends; yield how a client that may enter would be configured."""
    host, client = _key(directory / "host"), _key(directory / "client")
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def go_on(step: Step, transport: paramiko.Transport | socket.socket) -> bool:
        if answers.hang_at == step:
            ended.wait(20)
        if answers.cut_at == step:
            transport.close()
        return step not in (answers.hang_at, answers.cut_at)

    def serve(connection: socket.socket) -> None:
        if not go_on("accepted", connection):
            return
        transport = paramiko.Transport(connection)
        transport.add_server_key(host)
        server = _Server(client)
        try:
            transport.start_server(server=server)
            if not go_on("started", transport):
                return
            channel = transport.accept(10)
            if channel is None or not server.asked.wait(10):
                return
            answers.asked.append(server.command)
            if not go_on("asked", transport):
                return
            channel.sendall(answers.output)
            time.sleep(0.05)
            if not go_on("answered", transport):
                return
            channel.send_exit_status(answers.status)
            channel.close()
            ended.wait(10)
        except (paramiko.SSHException, OSError, EOFError):
            return  # the client has gone, as some tests want it
        finally:
            transport.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield SshFence(
        host="127.0.0.1",
        port=listener.getsockname()[1],
        key_file=str(directory / "client"),
        host_key=f"{host.get_name()} {host.get_base64()}",
    )
    ended.set()
    listener.shutdown(socket.SHUT_RDWR)  # closing alone leaves it to whoever waits for a connection
    listener.close()


def _key(path: Path) -> paramiko.PKey:
    key = paramiko.ECDSAKey.generate()
    key.write_private_key_file(str(path))
    path.chmod(0o600)
    return key
