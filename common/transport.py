"""Encrypted links between nodes: who may connect, who speaks, and when a link is lost.

In: addresses, this node's key pair, the peers' public keys. Out: sockets (`Server`, `Link`) that carry the
frames of `common.messages` without looking into them. A server lets in the keys of configured peers and
nobody else, and says of every message which peer's key sent it: what a message claims about its sender is
never needed. A `Link` lives for one connection: when that is lost it says so and is thrown away, so that a
session's messages never leak into the next one. (It has to be: libzmq stops trying after a refusal.)

The keeper imports this module, so it uses nothing heavy. One server a ZeroMQ context: there is one place in a
context where libzmq asks who may come in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from common.errors import AuthError, ConfigError
from common.keys import KeyPair
from common.messages import MESSAGE_BYTES, Buffer

log = logging.getLogger(__name__)

ZAP_DOMAIN: Final = b"outlive"
"""Named exactly on both sides: a socket with a domain that nobody answers for lets every peer hang."""

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_QUEUE_MESSAGES: Final = 1000
"""Messages that a socket holds a connection, each way. Bytes are bounded by credit, not by this."""
_REFUSALS_REMEMBERED: Final = 1024
_REFUSAL_LOG_INTERVAL_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """How soon a dead link is noticed and a live one is back; milliseconds.

    A ping goes out every `ping_ms`; without any answer for `dead_after_ms` the connection is given up.
    """

    ping_ms: int = 500
    dead_after_ms: int = 3000
    connect_ms: int = 1000
    handshake_ms: int = 3000
    retry_ms: int = 50
    retry_max_ms: int = 500


class KeyRefusedError(AuthError):
    """A peer's gate let this node's key not in: said by the peer itself, never the sign of a broken line."""


DEFAULT_TIMING: Final = LinkTiming()
_LINK_EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message off a server's socket: which connection, which peer's key, and its frames."""

    connection: bytes
    node: str
    frames: tuple[memoryview, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(len(frame) for frame in self.frames)


def tcp_endpoint(address: str, port: int) -> str:
    """Write an IP address and port as ZeroMQ wants them."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


class Server:
    """Listens for peers from its construction until `close()`; nobody gets in unless `serve()` runs.

    Not guaranteed: that a peer is there when `send` returns, or that it reads what was sent.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        *,
        address: str,
        port: int,
        keys: KeyPair,
        peers: Mapping[str, str],
        timing: LinkTiming = DEFAULT_TIMING,
        on_refused: Callable[[str, str], None] = lambda address, reason: None,
    ) -> None:
        """Listen at `address`; `peers` maps public keys (Z85) to node names; port 0 is any free one.

        `on_refused` is told from which address a key was refused, and which, as often as it is logged.

        Raises ConfigError if the address cannot be listened on.
        """
        self._peers = dict(peers)
        self._on_refused = on_refused
        self._logged_at: dict[tuple[str, str], float] = {}
        self.refused = 0
        """Connections refused since the start."""
        endpoint = tcp_endpoint(address, port)
        self._gate = context.socket(zmq.REP)
        self._socket = context.socket(zmq.ROUTER)
        _configure(self._socket, endpoint, keys, timing)
        try:
            self._gate.bind(_ZAP_ENDPOINT)  # first: a connection that finds no gate is lost
            self._socket.curve_server = True
            self._socket.zap_domain = ZAP_DOMAIN
            self._socket.router_mandatory = True
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {endpoint}: {error.strerror}",
                hint="is the address one of this node's, and is no other agent or keeper running?",
            ) from error
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        """The port listened on."""

    async def serve(self) -> None:
        """Answer libzmq when it asks who may come in (ZAP, rfc.zeromq.org/spec/27), until cancelled."""
        while True:
            request = await self._gate.recv_multipart()
            version, number, domain, address, _identity, mechanism, *credentials = request
            node = self._admit(domain, address.decode("ascii", "replace"), mechanism, credentials)
            verdict = [b"200", b"OK", node.encode()] if node else [b"400", b"not a configured peer", b""]
            await self._gate.send_multipart([version, number, *verdict, b""])

    async def receive(self) -> Incoming:
        """Wait for the next message of any peer. Frames are views of what libzmq holds: not copied."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            node = _user_of(frames[0])
            if node and len(frames) > 1:
                return Incoming(frames[0].bytes, node, tuple(frame.buffer for frame in frames[1:]))

    async def send(self, connection: bytes, frames: Sequence[Buffer]) -> bool:
        """Hand a message to a connection without waiting; False if it is gone or does not read."""
        try:
            await self._socket.send_multipart([connection, *frames], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Stop listening and drop all connections. Harmless when repeated."""
        self._socket.close(linger=0)
        self._gate.close(linger=0)

    def _admit(self, domain: bytes, address: str, mechanism: bytes, credentials: list[bytes]) -> str:
        """Return the name of the peer whose key it is; empty: refused, logged at most once a minute."""
        key = z85.encode(credentials[0]).decode("ascii") if len(credentials) == 1 else ""
        node = self._peers.get(key, "")
        if node and domain == ZAP_DOMAIN and mechanism == b"CURVE":
            return node
        self.refused += 1
        now = asyncio.get_running_loop().time()
        if len(self._logged_at) >= _REFUSALS_REMEMBERED:
            self._logged_at.clear()
        last = self._logged_at.get((address, key))
        if last is None or now - last >= _REFUSAL_LOG_INTERVAL_S:
            self._logged_at[(address, key)] = now
            log.warning("transport.refused address=%s public_key=%s reason=not-a-peer", address, key)
            self._on_refused(address, f"the key {key} from {address} is no configured peer's")
        return ""


class Link:
    """One connection to a peer's server, from the first attempt until it is lost; see `open_link`.

    While the peer cannot be reached it keeps trying, and `send` waits. Once connected, the first loss ends
    it: `lost()` returns, and a new link must be opened.
    """

    def __init__(self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket, peer: str) -> None:
        self._socket = socket
        self._monitor = monitor
        self._peer = peer

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Hand over a message; waits while there is no connection. The frames must not change any more."""
        await self._socket.send_multipart(list(frames), copy=False)

    async def try_send(self, frames: Sequence[Buffer]) -> bool:
        """Hand over a message if it can leave now, else drop it (False): for what is soon outdated."""
        try:
            await self._socket.send_multipart(list(frames), flags=zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    async def receive(self) -> list[bytes]:
        """Wait for the peer's next message."""
        frames: list[bytes] = await self._socket.recv_multipart()
        return frames

    async def lost(self) -> str:
        """Wait until the connection ends and say how. Raises AuthError if keys do not match."""
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise KeyRefusedError(
                    f"{self._peer} refuses this node's key",
                    hint=f"is this node's public key in a [[peers]] block on {self._peer}?",
                )
            if event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                raise AuthError(
                    f"{self._peer} broke off before it proved its key",
                    hint=f"does its public_key in [[peers]] match its key file on {self._peer}?",
                )
            if event == zmq.EVENT_DISCONNECTED:
                return f"the connection to {self._peer} ended"


@contextlib.contextmanager
def open_link(
    context: zmq.asyncio.Context,
    *,
    peer: str,
    address: str,
    port: int,
    server_key: str,
    keys: KeyPair,
    timing: LinkTiming = DEFAULT_TIMING,
) -> Iterator[Link]:
    """Begin to connect to a peer's server, encrypted for `server_key` (Z85); closed with the block.

    Raises ConfigError if the address or the key is not one.
    """
    endpoint = tcp_endpoint(address, port)
    socket = context.socket(zmq.DEALER)
    monitor = socket.get_monitor_socket(_LINK_EVENTS)
    try:
        try:
            _configure(socket, endpoint, keys, timing)
            socket.curve_serverkey = server_key.encode("ascii")
            socket.immediate = True  # nothing is queued for a connection that does not exist yet
            socket.reconnect_ivl = timing.retry_ms
            socket.reconnect_ivl_max = timing.retry_max_ms
            socket.connect_timeout = timing.connect_ms
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {peer} at {endpoint}: {error.strerror}") from error
        yield Link(socket, monitor, peer)
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)


def _configure(socket: zmq.asyncio.Socket, endpoint: str, keys: KeyPair, timing: LinkTiming) -> None:
    """Set what both ends have in common; nothing that matters is left at libzmq's default."""
    socket.linger = 0
    socket.ipv6 = "[" in endpoint
    socket.sndhwm = socket.rcvhwm = _QUEUE_MESSAGES
    socket.maxmsgsize = MESSAGE_BYTES
    socket.handshake_ivl = timing.handshake_ms
    socket.heartbeat_ivl = timing.ping_ms
    socket.heartbeat_timeout = timing.dead_after_ms
    socket.heartbeat_ttl = timing.dead_after_ms
    socket.setsockopt(zmq.TCP_MAXRT, timing.dead_after_ms)
    socket.curve_secretkey = keys.secret.encode("ascii")
    socket.curve_publickey = keys.public.encode("ascii")


def _user_of(frame: zmq.Frame) -> str:
    """Return the node whose key the message came with: what our gate said when it let the peer in."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
