"""Signs of life between nodes: sent to each peer's keeper, and put in order where they arrive.

In: what a node says of its workloads. Out: `Beat`s on the wire, each dropped rather than queued if it cannot
leave now; and from received ones those that are newer than all before. A keeper and its node's agent both
beat, each with a sequence of its own that starts at the time since boot, so that it grows across restarts;
after another boot it begins anew, under another boot id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import zmq.asyncio

from common.config import NodeConfig, Peer
from common.errors import AuthError, ProtocolError
from common.keyring import Keyring
from common.messages import Beat, decode, encode
from common.transport import Incoming, KeyRefusedError, LinkTiming, open_link

log = logging.getLogger(__name__)

BEAT_TIMING = LinkTiming(ping_ms=500, dead_after_ms=1500, connect_ms=500, retry_ms=50, retry_max_ms=200)
"""A peer that is back is heard within a few hundred milliseconds."""

_AUTH_PAUSE_S = 0.1
_AUTH_PAUSE_MAX_S = 5.0
"""A refusal is tried again soon, since keys may just be changing, then twice as late each time up to this."""
_BOOTS_KEPT = 16


def read_boot_id(config: NodeConfig) -> str:
    """Return which boot of the host this is. Raises OSError if the file cannot be read."""
    with open(config.node.boot_id_file, encoding="ascii") as file:
        return file.read(64).strip()


class Beater:
    """Sends one process's beats to every peer until cancelled."""

    def __init__(
        self,
        config: NodeConfig,
        keys: Keyring,
        context: zmq.asyncio.Context,
        *,
        make: Callable[[], Beat],
        on_refused: Callable[[str, str], None] = lambda peer, reason: None,
    ) -> None:
        """`make` returns the beat of this moment, its sequence greater than all before.

        `on_refused` is told at every attempt which peer refuses this node's key, and what may be wrong.
        """
        self._config = config
        self._keys = keys
        self._context = context
        self._make = make
        self._on_refused = on_refused

    async def run(self) -> None:
        """Beat until cancelled; a peer that cannot be reached holds up no other."""
        async with asyncio.TaskGroup() as group:
            for peer in self._config.peers:
                group.create_task(self._beat_at(peer))

    async def _beat_at(self, peer: Peer) -> None:
        pause_s = _AUTH_PAUSE_S
        while True:
            try:
                await self._beat_until_lost(peer)
                pause_s = _AUTH_PAUSE_S
            except AuthError as error:
                log.error("beat.refused peer=%s reason=%s", peer.name, error)
                if isinstance(error, KeyRefusedError):
                    self._on_refused(peer.name, str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _AUTH_PAUSE_MAX_S)

    async def _beat_until_lost(self, peer: Peer) -> None:
        interval_s = self._config.heartbeat.interval_ms / 1000
        with open_link(
            self._context,
            peer=peer,
            port=peer.keeper_port,
            keys=self._keys,
            timing=BEAT_TIMING,
        ) as link:
            lost = asyncio.ensure_future(link.lost())
            try:
                while not lost.done():
                    await link.try_send(encode(self._make()))
                    await asyncio.sleep(interval_s)
                lost.result()
            finally:
                lost.cancel()
        await asyncio.sleep(BEAT_TIMING.retry_ms / 1000)


class AgentBeater:
    """The agent's own beats: that it lives, and nothing about workloads. Run it in the agent's loop."""

    def __init__(self, config: NodeConfig, keys: Keyring, context: zmq.asyncio.Context) -> None:
        self._node = config.node.name
        self._boot_id = read_boot_id(config)
        self._sequence = first_sequence()
        self._beater = Beater(config, keys, context, make=self._make)

    async def run(self) -> None:
        """Beat until cancelled."""
        await self._beater.run()

    def _make(self) -> Beat:
        self._sequence += 1
        return Beat(
            node=self._node,
            boot_id=self._boot_id,
            sequence=self._sequence,
            origin="agent",
            wall_s=time.time(),
            workloads=(),
        )


class BeatFilter:
    """Passes each peer's beats on once and in order: what is older than the newest says nothing any more."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], int] = {}
        self._boots: dict[str, list[str]] = {}
        """Boot ids heard of each node, the present one last."""

    def read(self, incoming: Incoming) -> Beat | None:
        """Return a beat that is newer than all before; None if it is not.

        Raises ProtocolError for anything but a beat, and if a node speaks in another's name.
        """
        message, _ = decode(incoming.frames)
        if not isinstance(message, Beat):
            raise ProtocolError(f"{incoming.node} sent a keeper something that is no heartbeat")
        if message.node != incoming.node:
            raise ProtocolError(f"{incoming.node} speaks in the name of {message.node}")
        boots = self._boots.setdefault(message.node, [])
        if message.boot_id not in boots:
            boots.append(message.boot_id)
            del boots[:-_BOOTS_KEPT]
            self._newest = {who: at for who, at in self._newest.items() if who[0] != message.node}
        elif message.boot_id != boots[-1]:
            return None
        sender = (message.node, message.origin)
        if message.sequence <= self._newest.get(sender, -1):
            return None
        self._newest[sender] = message.sequence
        return message


def first_sequence() -> int:
    """Return a number greater than every sequence number used since the host booted: microseconds since then.

    Holds as long as nobody beats more often than every microsecond.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
