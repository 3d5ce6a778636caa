"""The keys that count at this moment: this node's own pair, and which peer each public key belongs to.

In: a node's configuration, at the start and whenever it is read again. Out: answers to what every connection
asks: whose key is this, and by which key to look for that peer. Whoever listens or holds a connection is told
when the answers change, so that a key that was taken out stops to count at once and not at the next restart.

A peer may have several keys while it changes from one to the next (docs/threat-model.md has the procedure).
Peers themselves do not come or go here: only their keys do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import NodeConfig, Peer
from common.errors import AuthError
from common.keys import KeyPair, load


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What reading the keys again changed."""

    own: bool
    """Whether this node's own key is another one now."""
    added: int
    revoked: int
    """Public keys of peers that count since now, and that count no more."""

    def __str__(self) -> str:
        own = "this node's own key is a new one" if self.own else "this node's own key is the same"
        return f"{own}; of peers' keys {self.added} were added and {self.revoked} revoked"


class Keyring:
    """Belongs to one event loop."""

    def __init__(self, own: KeyPair, peers: Iterable[Peer]) -> None:
        self.own = own
        self._nodes = _by_key(peers)
        self._mistaken: set[str] = set()
        """Keys that a peer did not prove when they were tried; emptied once all of that peer's are in it."""
        self._watchers: list[Callable[[], None]] = []

    def node_of(self, key: str) -> str:
        """Return the name of the peer whose public key this is; empty: nobody's."""
        return self._nodes.get(key, "")

    def server_key(self, node: str) -> str:
        """Return the public key by which to look for a peer next. Raises AuthError if it has none."""
        keys = self._keys_of(node)
        if not keys:
            raise AuthError(f"{node} has no key any more", hint=f"is {node} still in a [[peers]] block?")
        return next((key for key in keys if key not in self._mistaken), keys[0])

    def mistook(self, node: str, key: str) -> bool:
        """Take note that a peer did not prove this key; return whether another one is to be tried first."""
        self._mistaken.add(key)
        keys = set(self._keys_of(node))
        if keys - self._mistaken:
            return True
        self._mistaken -= keys
        return False

    @contextlib.contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Have `watcher` called, in the event loop, after every change, until the block ends."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def replace(self, own: KeyPair, peers: Iterable[Peer]) -> KeyChange:
        """Let these keys count from now on, and tell whoever watches; return what that changed."""
        before, self._nodes = self._nodes, _by_key(peers)
        change = KeyChange(
            own=own != self.own,
            added=len(self._nodes.items() - before.items()),
            revoked=len(before.items() - self._nodes.items()),
        )
        self.own = own
        self._mistaken.clear()
        for watcher in list(self._watchers):
            watcher()
        return change

    def _keys_of(self, node: str) -> list[str]:
        return [key for key, owner in self._nodes.items() if owner == node]


def read_keyring(config: NodeConfig) -> Keyring:
    """Make the ring that a configuration says. Raises AuthError if the node's own key cannot be used."""
    return Keyring(load(Path(config.node.key_file)), config.peers)


def _by_key(peers: Iterable[Peer]) -> dict[str, str]:
    return {key: peer.name for peer in peers for key in peer.keys}
