"""An etcd of three members on hosts of a lab of their own.

In: a lab. Out: endpoints for a node's `[etcd]`, and an etcd that can be gone, come back, and be slow. Its
processes end with the lab.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

from common.errors import LabError
from outlive.lab import Host, Lab

_CLIENT_PORT, _PEER_PORT = 2379, 2380
_READY_WITHIN_S = 20.0
_POLL_S = 0.05


class LabEtcd:
    """The members. Made by `start`."""

    def __init__(self, hosts: tuple[Host, ...]) -> None:
        self._hosts = hosts
        self._members: list[asyncio.subprocess.Process] = []

    @classmethod
    async def start(cls, lab: Lab, names: tuple[str, ...] = ("e1", "e2", "e3")) -> LabEtcd:
        """Add the hosts, start a member on each, wait until they have a leader. Raises LabError."""
        etcd = cls(tuple([await lab.add_host(name) for name in names]))
        await etcd.come_back()
        return etcd

    @property
    def names(self) -> tuple[str, ...]:
        """Its hosts."""
        return tuple(host.name for host in self._hosts)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """What nodes are told."""
        return tuple(_url(host, _CLIENT_PORT) for host in self._hosts)

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
            own = _url(host, _CLIENT_PORT)
            words = {
                "name": host.name,
                "data-dir": str(host.state_dir / "etcd"),
                "listen-client-urls": own,
                "advertise-client-urls": own,
                "listen-peer-urls": _url(host, _PEER_PORT),
                "initial-advertise-peer-urls": _url(host, _PEER_PORT),
                "initial-cluster": everybody,
            }
            command = ["etcd", *(part for key, value in words.items() for part in (f"--{key}", value))]
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
        """Tell whether the members agree on something: a read that goes through their log."""
        host = self._hosts[0]
        body = '{"key": "AA=="}'
        words = ["curl", "-s", "-m", "1", "-d", body, f"{self.endpoints[0]}/v3/kv/range"]
        finished = await host.run(words, check=False)
        return '"header"' in finished.stdout


def _url(host: Host, port: int) -> str:
    return f"http://{host.address.ip}:{port}"
