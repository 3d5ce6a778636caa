"""Keys that are read again: all of what changed counts, and what cannot be read changes nothing."""

from pathlib import Path

import pytest
from wire_fakes import new_keys

from common.config import Node, NodeConfig, Peer
from common.errors import AuthError
from common.events import EventLog, read_events
from common.keyring import Keyring, read_keyring
from common.keys import generate, load
from outlive.key_reload import reload_keys

A, B, C = (new_keys().public for _ in range(3))


def peer(name: str, *keys: str) -> Peer:
    return Peer(name=name, address="127.0.0.1", public_key=keys[0], also_public_keys=keys[1:])


def test_a_key_is_looked_for_under_all_that_a_peer_may_have() -> None:
    ring = Keyring(new_keys(), [peer("a", A, B), peer("c", C)])
    assert [ring.node_of(key) for key in (A, B, C, "x")] == ["a", "a", "c", ""]
    assert ring.server_key("a") == A
    assert ring.mistook("a", A)
    assert ring.server_key("a") == B, "and the next one is tried"
    assert ring.server_key("c") == C
    assert not ring.mistook("a", B), "none is left: that is an error of somebody's"
    assert ring.server_key("a") == A
    assert not ring.mistook("c", C)
    with pytest.raises(AuthError, match="no key any more"):
        ring.server_key("d")


def test_watchers_are_told_until_they_leave() -> None:
    told: list[str] = []
    ring = Keyring(new_keys(), [peer("a", A)])
    with ring.watched(lambda: told.append(ring.node_of(A))):
        change = ring.replace(new_keys(), [peer("a", B)])
        assert (change.own, change.added, change.revoked) == (True, 1, 1)
    ring.replace(ring.own, [peer("a", A)])
    assert told == [""]


def test_what_cannot_be_read_changes_nothing_and_is_told(tmp_path: Path) -> None:
    own = generate(tmp_path / "node.key")
    node = Node(name="n", address="127.0.0.1", key_file=str(tmp_path / "node.key"))
    before = NodeConfig(node=node, peers=(peer("a", A),))
    ring = read_keyring(before)
    log = EventLog(tmp_path / "events.jsonl", "agent")
    (tmp_path / "node.key").chmod(0o644)
    reload_keys(ring, lambda: NodeConfig(node=node, peers=(peer("a", B),)), log)
    assert (ring.own, ring.node_of(A), ring.node_of(B)) == (own, "a", "")
    (tmp_path / "node.key").chmod(0o600)
    reload_keys(ring, lambda: NodeConfig(node=node, peers=(peer("a", B),)), log)
    assert (ring.own, ring.node_of(A), ring.node_of(B)) == (load(tmp_path / "node.key"), "", "a")
    log.close()
    kept, changed = read_events(tmp_path / "events.jsonl")
    assert kept.event == "keys.not-reloaded"
    assert "can be read by others" in kept.reason
    assert changed.event == "keys.reloaded"
    assert "1 were added and 1 revoked" in changed.reason
