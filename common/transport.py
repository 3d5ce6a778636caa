"""Encrypted links between nodes: who may connect, who speaks, and when a link is lost.

In: addresses, and a `Keyring`: this node's key pair and the peers' public keys, which may change meanwhile.
Out: sockets (`Server`, `Link`) that carry the frames of `common.messages` without looking into them. A
server lets in the keys of configured peers and nobody else, and says of every message which peer's key sent
it: what a message claims about its sender is never needed. A `Link` lives for one connection: when that is
lost it says so and is thrown away, so that a session's messages never leak into the next one. (It has to be:
libzmq stops trying after a refusal.)

Keeps this: a key counts until the ring drops it and not a message longer, let in before or not.

The keeper imports this module, so it uses nothing heavy. One server a ZeroMQ context: there is one place in a
context where libzmq asks who may come in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket as sockets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from common.config import Peer
from common.errors import AuthError, ConfigError
from common.keyring import Keyring
from common.keys import KeyPair
from common.messages import MESSAGE_BYTES, Buffer, cost_bytes

log = logging.getLogger(__name__)

ZAP_DOMAIN: Final = b"outlive"
"""Named exactly on both sides: a socket with a domain that nobody answers for lets every peer hang."""

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_SEND_QUEUE_MESSAGES: Final = 64
"""Messages that a socket holds for a connection whose other end does not read."""
_RECEIVE_QUEUE_MESSAGES: Final = 0
"""No bound. libzmq 4.3.5 ends the whole process when a ping is due on a connection that broke while its
input was stopped for a full queue (zeromq/libzmq#3937, #4364). Input never stops: who floods is cut off."""
_MOST_FRAMES: Final = 4
"""Frames of a message that are kept; one more than any message has, to show that there were more."""
_FLOOD_FRAMES: Final = 1000
"""Frames of one message for which its connection is cut off."""
_MOST_PER_S: Final = 1000
_FORGOTTEN: Final = 1024
_REFUSALS_REMEMBERED: Final = 1024
_REFUSAL_LOG_INTERVAL_S: Final = 60.0
_CONNECTIONS_KNOWN: Final = 256
"""Connections remembered before those that have ended are looked for and forgotten."""
_LISTEN_AGAIN_S: Final = 5.0
_LISTEN_POLL_S: Final = 0.005
_PARTING_POLLS: Final = 100


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
    key: str
    """The public key that the connection was let in with."""
    frames: tuple[memoryview, ...]

    @property
    def cost_bytes(self) -> int:
        """What it costs of the credit."""
        return cost_bytes(self.frames)


def tcp_endpoint(address: str, port: int) -> str:
    """Write an IP address and port as ZeroMQ wants them."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


@dataclass(frozen=True, slots=True)
class _Connection:
    """The TCP socket below one of a server's connections, and how to tell it from a later one's."""

    key: str
    descriptor: int
    remote: tuple[object, ...]

    def cut(self) -> None:
        """End it, if it is still there. libzmq offers no way to end one connection of several."""
        with contextlib.suppress(OSError):
            if _remote_of(self.descriptor) == self.remote:
                with sockets.socket(fileno=os.dup(self.descriptor)) as socket:
                    socket.shutdown(sockets.SHUT_RDWR)

    @property
    def gone(self) -> bool:
        """Whether its descriptor is another connection's by now, or nobody's."""
        try:
            return _remote_of(self.descriptor) != self.remote
        except OSError:
            return True


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
        keys: Keyring,
        timing: LinkTiming = DEFAULT_TIMING,
        most_per_s: int = _MOST_PER_S,
        on_refused: Callable[[str, str], None] = lambda address, reason: None,
    ) -> None:
        """Listen at `address`; `keys` says who may come in; port 0 is any free one.

        A connection that brings more than `most_per_s` messages in a second is cut off; 0 is no bound.

        `on_refused` is told from which address a key was refused, and which, as often as it is logged.

        Raises ConfigError if the address cannot be listened on.
        """
        self._keys = keys
        self._own = keys.own
        self._on_refused = on_refused
        self._logged_at: dict[tuple[str, str], float] = {}
        self._connections: dict[bytes, _Connection] = {}
        self._most_per_s = most_per_s
        self._came: Counter[bytes] = Counter()
        self._second = 0
        self._cut_off: set[bytes] = set()
        self.refused = 0
        """Connections refused since the start."""
        endpoint = tcp_endpoint(address, port)
        self._gate = context.socket(zmq.REP)
        self._socket = context.socket(zmq.ROUTER)
        _configure(self._socket, endpoint, keys.own, timing)
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
        self._endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(self._endpoint.rpartition(":")[2])
        """The port listened on."""

    async def serve(self) -> None:
        """Answer libzmq when it asks who may come in (ZAP, rfc.zeromq.org/spec/27), until cancelled.

        Meanwhile changes of the keys take effect. Raises ConfigError if a new key of this node's own cannot
        be listened with.
        """
        changed = asyncio.Event()

        def take_in() -> None:
            self._cut_revoked()
            changed.set()

        async def follow() -> None:
            while True:
                await changed.wait()
                changed.clear()
                if self._own != self._keys.own:
                    await self._listen_again()

        with self._keys.watched(take_in):
            take_in()  # what changed before somebody watched
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._guard())
                tasks.create_task(follow())

    async def receive(self) -> Incoming:
        """Wait for the next message of any peer. Frames are views of what libzmq holds: not copied."""
        while True:
            frames, frames_came = await _next_message(self._socket)
            key = _key_of(frames[0])
            connection = frames[0].bytes
            if not key or connection in self._cut_off:
                continue
            if connection not in self._connections:
                self._remember(connection, key, frames[0])
            node = self._keys.node_of(key)
            if not node:
                self._cut(connection)
            elif frames_came > _FLOOD_FRAMES or self._floods(connection):
                self.cut(connection)
                if self._to_be_logged(node, "flood"):
                    log.warning("transport.cut node=%s reason=it floods this node", node)
            elif len(frames) > 1:
                return Incoming(connection, node, key, tuple(frame.buffer for frame in frames[1:]))

    async def send(self, connection: bytes, frames: Sequence[Buffer]) -> bool:
        """Hand a message to a connection without waiting; False if it is gone, revoked or does not read."""
        known = self._connections.get(connection)
        if known is None or not self._keys.node_of(known.key):
            return False
        try:
            await self._socket.send_multipart([connection, *frames], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def cut(self, connection: bytes) -> None:
        """End a connection whose peer goes on and on, and read nothing of it any more."""
        if len(self._cut_off) >= _FORGOTTEN:
            self._cut_off.clear()
        self._cut_off.add(connection)
        if connection in self._connections:
            self._cut(connection)

    def close(self) -> None:
        """Stop listening and drop all connections. Harmless when repeated."""
        self._socket.close(linger=0)
        self._gate.close(linger=0)

    async def _guard(self) -> None:
        while True:
            request = await self._gate.recv_multipart()
            version, number, domain, address, _identity, mechanism, *credentials = request
            key = self._admit(domain, address.decode("ascii", "replace"), mechanism, credentials)
            verdict = [b"200", b"OK", key.encode()] if key else [b"400", b"not a configured peer", b""]
            await self._gate.send_multipart([version, number, *verdict, b""])

    async def _listen_again(self) -> None:
        """Listen with the present key. Every connection was made with the former one, and ends."""
        self._own = self._keys.own
        self._socket.unbind(self._endpoint)
        _identify(self._socket, self._own)
        deadline_s = asyncio.get_running_loop().time() + _LISTEN_AGAIN_S
        while True:
            try:
                self._socket.bind(self._endpoint)
            except zmq.ZMQError as error:  # the former listener may need a moment to go
                if error.errno != zmq.EADDRINUSE or asyncio.get_running_loop().time() > deadline_s:
                    raise ConfigError(f"cannot listen on {self._endpoint} again: {error.strerror}") from error
                await asyncio.sleep(_LISTEN_POLL_S)
            else:
                break
        # libzmq ends connections while something is asked of their socket, and nobody may be receiving now.
        for _ in range(_PARTING_POLLS):
            self._socket.get(zmq.EVENTS)  # not `getsockopt`, which would swallow a wake-up
            await asyncio.sleep(_LISTEN_POLL_S)

    def _remember(self, connection: bytes, key: str, frame: zmq.Frame) -> None:
        if len(self._connections) >= _CONNECTIONS_KNOWN:
            self._connections = {name: each for name, each in self._connections.items() if not each.gone}
        descriptor = -1
        remote: tuple[object, ...] = ()
        with contextlib.suppress(OSError, ValueError):  # it may have ended since
            descriptor = int(frame.get("__fd"))
            remote = _remote_of(descriptor)
        self._connections[connection] = _Connection(key, descriptor, remote)

    def _cut_revoked(self) -> None:
        for connection in [
            name for name, each in self._connections.items() if not self._keys.node_of(each.key)
        ]:
            self._cut(connection)

    def _floods(self, connection: bytes) -> bool:
        second = int(asyncio.get_running_loop().time())
        if second != self._second:
            self._second = second
            self._came.clear()
        self._came[connection] += 1
        return 0 < self._most_per_s < self._came[connection]

    def _cut(self, connection: bytes) -> None:
        self._connections.pop(connection).cut()

    def _admit(self, domain: bytes, address: str, mechanism: bytes, credentials: list[bytes]) -> str:
        """Return the key if it is a peer's; empty: refused, logged at most once a minute."""
        key = z85.encode(credentials[0]).decode("ascii") if len(credentials) == 1 else ""
        if self._keys.node_of(key) and domain == ZAP_DOMAIN and mechanism == b"CURVE":
            return key
        self.refused += 1
        if self._to_be_logged(address, key):
            log.warning("transport.refused address=%s public_key=%s reason=not-a-peer", address, key)
            self._on_refused(address, f"the key {key} from {address} is no configured peer's")
        return ""

    def _to_be_logged(self, who: str, what: str) -> bool:
        now = asyncio.get_running_loop().time()
        if len(self._logged_at) >= _REFUSALS_REMEMBERED:
            self._logged_at.clear()
        last = self._logged_at.get((who, what))
        if last is not None and now - last < _REFUSAL_LOG_INTERVAL_S:
            return False
        self._logged_at[(who, what)] = now
        return True


class Link:
    """One connection to a peer's server, from the first attempt until it is lost; see `open_link`.

    While the peer cannot be reached it keeps trying, and `send` waits. Once connected, the first loss ends
    it: `lost()` returns, and a new link must be opened.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        monitor: zmq.asyncio.Socket,
        peer: str,
        keys: Keyring,
        server_key: str,
    ) -> None:
        self._socket = socket
        self._monitor = monitor
        self._peer = peer
        self._keys = keys
        self._server_key = server_key

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
        frames, _ = await _next_message(self._socket)
        return [frame.bytes for frame in frames]

    async def lost(self) -> str:
        """Wait until the connection ends and say how. Raises AuthError if keys do not match."""
        revoked = asyncio.Event()

        def look() -> None:
            if self._keys.node_of(self._server_key) != self._peer:
                revoked.set()

        with self._keys.watched(look):
            look()
            over = asyncio.ensure_future(revoked.wait())
            ending = asyncio.ensure_future(self._ending())
            try:
                await asyncio.wait({over, ending}, return_when=asyncio.FIRST_COMPLETED)
                if revoked.is_set():
                    return f"the key by which {self._peer} was known was revoked"
                return ending.result()
            finally:
                over.cancel()
                ending.cancel()

    async def ready(self) -> None:
        """Wait until the peer has let this node in and proved its own key. It may never: see `lost`."""
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLOUT)
        await poller.poll()

    async def _ending(self) -> str:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise KeyRefusedError(
                    f"{self._peer} refuses this node's key",
                    hint=f"is this node's public key in a [[peers]] block on {self._peer}?",
                )
            if event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                if self._keys.mistook(self._peer, self._server_key):
                    return f"{self._peer} did not prove one of its keys: another is tried"
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
    peer: Peer,
    port: int,
    keys: Keyring,
    timing: LinkTiming = DEFAULT_TIMING,
) -> Iterator[Link]:
    """Begin to connect to one of a peer's servers, encrypted for its key; closed with the block.

    Raises ConfigError if the address or the key is not one, AuthError if the peer has no key.
    """
    endpoint = tcp_endpoint(peer.address, port)
    server_key = keys.server_key(peer.name)
    socket = context.socket(zmq.DEALER)
    monitor = socket.get_monitor_socket(_LINK_EVENTS)
    try:
        try:
            _configure(socket, endpoint, keys.own, timing)
            socket.curve_serverkey = server_key.encode("ascii")
            socket.immediate = True  # nothing is queued for a connection that does not exist yet
            socket.reconnect_ivl = timing.retry_ms
            socket.reconnect_ivl_max = timing.retry_max_ms
            socket.connect_timeout = timing.connect_ms
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {peer.name} at {endpoint}: {error.strerror}") from error
        yield Link(socket, monitor, peer.name, keys, server_key)
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)


def _configure(socket: zmq.asyncio.Socket, endpoint: str, keys: KeyPair, timing: LinkTiming) -> None:
    """Set what both ends have in common; nothing that matters is left at libzmq's default."""
    socket.linger = 0
    socket.ipv6 = "[" in endpoint
    socket.sndhwm, socket.rcvhwm = _SEND_QUEUE_MESSAGES, _RECEIVE_QUEUE_MESSAGES
    socket.maxmsgsize = MESSAGE_BYTES
    socket.handshake_ivl = timing.handshake_ms
    socket.heartbeat_ivl = timing.ping_ms
    socket.heartbeat_timeout = timing.dead_after_ms
    socket.heartbeat_ttl = timing.dead_after_ms
    socket.setsockopt(zmq.TCP_MAXRT, timing.dead_after_ms)
    _identify(socket, keys)


def _identify(socket: zmq.asyncio.Socket, keys: KeyPair) -> None:
    socket.curve_secretkey = keys.secret.encode("ascii")
    socket.curve_publickey = keys.public.encode("ascii")


async def _next_message(socket: zmq.asyncio.Socket) -> tuple[list[zmq.Frame], int]:
    """Wait for the next message; of frames beyond any sound message's one is kept. And how many came.

    What is there already would come without a pause: in a flood nothing else would have its turn.
    """
    await asyncio.sleep(0)
    frames: list[zmq.Frame] = [await socket.recv(copy=False)]
    more, came = frames[0].more, 1
    while more:
        # The rest of a message is there with its first frame: nothing to wait for.
        frame = zmq.Socket.recv(socket, copy=False)
        more, came = frame.more, came + 1
        if len(frames) < _MOST_FRAMES:
            frames.append(frame)
    return frames, came


def _key_of(frame: zmq.Frame) -> str:
    """Return the public key that the message came with: what our gate said when it let the peer in."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _remote_of(descriptor: int) -> tuple[object, ...]:
    """Return the other end's address of a TCP connection. Raises OSError if the descriptor is none."""
    with sockets.socket(fileno=os.dup(descriptor)) as socket:
        return tuple(socket.getpeername())
