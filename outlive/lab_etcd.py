"""An etcd of three members on hosts of a lab of their own.

In: a lab. Out: endpoints for a node's `[etcd]`, and an etcd that can be gone, come back, and be slow. Its
processes end with the lab.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import LabError
from outlive.lab import Host, Lab

_CLIENT_PORT, _PEER_PORT = 2379, 2380
_READY_WITHIN_S = 20.0
_POLL_S = 0.05


class TlsFiles(NamedTuple):
    """A certificate with its key, and who signed it; PEM."""

    authority: Path
    certificate: Path
    key: Path


class LabEtcd:
    """The members. Made by `start`."""

    def __init__(self, hosts: tuple[Host, ...], tls: TlsFiles | None = None) -> None:
        self._hosts = hosts
        self._tls = tls
        self._members: list[asyncio.subprocess.Process] = []

    @classmethod
    async def start(
        cls,
        lab: Lab,
        names: tuple[str, ...] = ("e1", "e2", "e3"),
        certify: Callable[[Sequence[str]], TlsFiles] | None = None,
    ) -> LabEtcd:
        """Add the hosts, start a member on each, wait until they have a leader. Raises LabError.

        With `certify`, which makes a certificate for their addresses, clients need TLS and one of their own.
        """
        hosts = tuple([await lab.add_host(name) for name in names])
        tls = certify([str(host.address.ip) for host in hosts]) if certify is not None else None
        etcd = cls(hosts, tls)
        await etcd.come_back()
        return etcd

    @property
    def names(self) -> tuple[str, ...]:
        """Its hosts."""
        return tuple(host.name for host in self._hosts)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """What nodes are told."""
        return tuple(self._client_url(host) for host in self._hosts)

    async def go_away(self) -> None:
        """Kill every member; what they have written stays."""
        for member in self._members:
            member.kill()
        await asyncio.gather(*(member.wait() for member in self._members))
        self._members = []

    async def come_back(self) -> None:
        """Start every member, and wait until they have a leader. Raises LabError."""
        everybody = ",".join(f"{host.name}={_url(host, _PEER_PORT)}" for host in self._hosts)
        for host in self._hosts:
            own = self._client_url(host)
            words = {
                "name": host.name,
                "data-dir": str(host.state_dir / "etcd"),
                "listen-client-urls": own,
                "advertise-client-urls": own,
                "listen-peer-urls": _url(host, _PEER_PORT),
                "initial-advertise-peer-urls": _url(host, _PEER_PORT),
                "initial-cluster": everybody,
            }
            if self._tls is not None:
                words |= {
                    "cert-file": str(self._tls.certificate),
                    "key-file": str(self._tls.key),
                    "trusted-ca-file": str(self._tls.authority),
                    "client-cert-auth": "true",
                }
            command = ["etcd", *(f"--{key}={value}" for key, value in words.items())]
            self._members.append(await host.spawn(command, log=host.log_dir / "etcd.log"))
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                while not await self._answers():  # noqa: ASYNC110 - another process has to come up
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise LabError(f"etcd does not answer within {_READY_WITHIN_S:.0f} s") from None

    @contextlib.asynccontextmanager
    async def slow(self, stands_s: float, runs_s: float) -> AsyncIterator[None]:
        """Have all members stand still and run in turns for the time of the block."""

        async def in_turns() -> None:
            while True:
                self._signal(signal.SIGSTOP)
                await asyncio.sleep(stands_s)
                self._signal(signal.SIGCONT)
                await asyncio.sleep(runs_s)

        turns = asyncio.create_task(in_turns())
        try:
            yield
        finally:
            turns.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await turns
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for member in self._members:
            with contextlib.suppress(ProcessLookupError):
                member.send_signal(number)

    async def _answers(self) -> bool:
        """Tell whether the members agree on something: it reads through their log."""
        return '"true"' in await self.say("/health")

    async def say(self, path: str, body: str = "") -> str:
        """Say something to the first member, from its own host; return what it answers."""
        words = ["curl", "-s", "-m", "1", f"{self.endpoints[0]}{path}", *(["-d", body] if body else [])]
        if (tls := self._tls) is not None:
            words += ["--cacert", str(tls.authority), "--cert", str(tls.certificate), "--key", str(tls.key)]
        return (await self._hosts[0].run(words, check=False)).stdout

    def _client_url(self, host: Host) -> str:
        url = _url(host, _CLIENT_PORT)
        return url if self._tls is None else url.replace("http:", "https:")


def _url(host: Host, port: int) -> str:
    return f"http://{host.address.ip}:{port}"
