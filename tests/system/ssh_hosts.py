"""A real sshd on a host of a lab, and the files with which the others are let in to fence it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from outlive.cluster import Node, eventually

_PRIVILEGE_SEPARATION = Path("/run/sshd")
"""Compiled into Debian's sshd, which does not start without it; its service would make it."""
PORT = 22


class SshHost:
    """The sshd of one host. What it was asked runs in that host's network, as everything of it does."""

    def __init__(self, node: Node, *, forced: bool) -> None:
        """Make its keys. `forced`: the key may do nothing but be fenced."""
        host = node.host
        self._host = host
        self._process: asyncio.subprocess.Process | None = None
        for name in ("ssh_host", "ssh_client"):
            _make_key(host.etc_dir / name)
        verb = f"{sys.executable} -m outlive.cli --config {node.config_path} accept-fence"
        options = f'command="{verb}",restrict ' if forced else ""
        public = (host.etc_dir / "ssh_client.pub").read_text()
        (host.etc_dir / "authorized_keys").write_text(options + public)
        (host.etc_dir / "sshd_config").write_text(
            f"ListenAddress {host.address.ip}\nPort {PORT}\nPidFile none\n"
            f"HostKey {host.etc_dir / 'ssh_host'}\n"
            f"AuthorizedKeysFile {host.etc_dir / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            f"SetEnv PYTHONPATH={Path(__file__).parents[2]}\n"
        )

    async def start(self) -> None:
        """Start it and wait until it listens."""
        log = self._host.log_dir / "sshd.log"
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self._host.etc_dir / "sshd_config")]
        self._process = await self._host.spawn(command, log=log)

        async def listens() -> bool:
            shown = await self._host.run(["ss", "-ltnH", f"sport = :{PORT}"])
            return bool(shown.stdout.strip())

        await eventually(listens, what="sshd listens")

    async def stop(self) -> None:
        """End it; what it runs for others is left."""
        if self._process is not None:
            self._process.terminate()
            await self._process.wait()


def fence_block(node: Node, *, forced: bool, timeout_ms: int = 10_000) -> str:
    """Return the block of a node's file that fences `node` by SSH."""
    host = node.host
    command = (
        ["outlive"] if forced else [sys.executable, "-m", "outlive.cli", "--config", str(node.config_path)]
    )
    words = ", ".join(f'"{word}"' for word in command)
    return (
        f'\n[[fences]]\nnode = "{node.name}"\ntimeout_ms = {timeout_ms}\n[fences.ssh]\n'
        f'host = "{host.address.ip}"\nport = {PORT}\nkey_file = "{host.etc_dir / "ssh_client"}"\n'
        f'host_key = "{(host.etc_dir / "ssh_host.pub").read_text().strip()}"\ncommand = [{words}]\n'
    )


@asynccontextmanager
async def privilege_separation() -> AsyncIterator[None]:
    """Have the directory that sshd needs, and leave the machine as it was."""
    made = not _PRIVILEGE_SEPARATION.exists()
    if made:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            _PRIVILEGE_SEPARATION.rmdir()


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
