"""Asks every peer whether it would let a key in, before a node relies on it.

In: a key pair. Out: for each peer what came of a connection with it to the peer's keeper; nothing is sent.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import zmq.asyncio

from common.config import NodeConfig, Peer
from common.errors import AuthError
from common.keyring import Keyring
from common.keys import KeyPair
from common.transport import KeyRefusedError, open_link

Answer = Literal["accepts", "refuses", "does not answer"]

_DEADLINE_S = 3.0


async def probe_peers(config: NodeConfig, pair: KeyPair) -> dict[str, Answer]:
    """Ask all peers side by side; takes a few seconds if one of them does not answer."""
    context = zmq.asyncio.Context()
    keys = Keyring(pair, config.peers)
    try:
        answers = await asyncio.gather(*(_probe(context, keys, peer) for peer in config.peers))
    finally:
        context.destroy(linger=0)
    return dict(zip((peer.name for peer in config.peers), answers, strict=True))


async def _probe(context: zmq.asyncio.Context, keys: Keyring, peer: Peer) -> Answer:
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                with open_link(context, peer=peer, port=peer.keeper_port, keys=keys) as link:
                    lost = asyncio.ensure_future(link.lost())
                    ready = asyncio.ensure_future(link.ready())
                    try:
                        await asyncio.wait({lost, ready}, return_when=asyncio.FIRST_COMPLETED)
                        if not lost.done():
                            return "accepts"
                        lost.result()  # it ended; perhaps the peer is known by another of its keys
                    finally:
                        lost.cancel()
                        ready.cancel()
    except KeyRefusedError:
        return "refuses"
    except (AuthError, TimeoutError):
        return "does not answer"
