"""What a keeper tells of its peers: who is heard, who is not, and whose key was refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from common.config import Peer
from common.events import EventLog, read_events
from common.messages import Beat, BeatWorkload
from common.roles import Instant, Timing
from outlive.peers_heard import PeersHeard, heard_of

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
PEERS = [
    Peer(name="b", address="10.0.0.2", public_key=KEY),
    Peer(name="c", address="fd00:0::3", public_key=KEY),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path, "keeper")
    yield log
    log.close()


@pytest.fixture
def peers(log: EventLog) -> PeersHeard:
    return PeersHeard(PEERS, Timing(), log)


def at(monotonic_s: float) -> Instant:
    return Instant(monotonic_s, 1e9 + monotonic_s)


def beat() -> Beat:
    return Beat(node="b", boot_id="boot", sequence=1, origin="keeper", wall_s=5.0, workloads=())


def refusals(peers: PeersHeard, now_s: float) -> list[str]:
    return [peer.refused for peer in peers.status(at(now_s))]


def test_a_key_refused_from_a_peers_address_is_told_of_that_peer_and_written_once(
    peers: PeersHeard, log: EventLog, path: Path
) -> None:
    peers.refuse_address("10.0.0.2", "the key X is no configured peer's", at(1.0))
    peers.refuse_address("10.0.0.2", "the key X is no configured peer's", at(61.0))
    said = "the key X is no configured peer's (does b's public_key in [[peers]] match its key file?)"
    assert refusals(peers, 62.0) == [said, ""]
    log.close()
    (event,) = read_events(path)
    assert (event.event, event.reason, event.fields) == ("peer.refused", said, {"peer": "b"})


def test_an_address_is_the_same_however_it_is_written(peers: PeersHeard) -> None:
    peers.refuse_address("fd00::3", "no", at(1.0))
    assert refusals(peers, 1.0)[1].startswith("no")


def test_a_stranger_is_nobodys_refusal(peers: PeersHeard) -> None:
    peers.refuse_address("10.0.0.9", "no", at(1.0))
    assert refusals(peers, 1.0) == ["", ""]


def test_a_peer_that_is_heard_is_not_called_refused(peers: PeersHeard) -> None:
    peers.refuse("b", "b refuses this node's key", at(1.0))
    assert refusals(peers, 1.0) == ["b refuses this node's key", ""]
    peers.hear(beat(), at(2.0))
    peers.refuse("b", "b refuses this node's key", at(2.1))
    assert refusals(peers, 2.2) == ["", ""]


def test_a_refusal_is_forgotten_when_it_does_not_go_on(peers: PeersHeard) -> None:
    peers.refuse("b", "b refuses this node's key", at(1.0))
    assert refusals(peers, 200.0) == ["", ""]


@pytest.mark.parametrize(("state", "heir", "leader"), [("yielded", "c", ""), ("following", "", "c")])
def test_the_name_beside_a_state_is_the_heir_of_who_yields_and_the_leader_of_who_follows(
    state: str, heir: str, leader: str
) -> None:
    said = BeatWorkload(
        name="w",
        term=2,
        state=state,  # type: ignore[arg-type]
        heir="c",
        alive=False,
        agent_alive=True,
        pauses=(),
        takeovers=(),
    )
    heard = heard_of(msgspec.structs.replace(beat(), workloads=(said,)), "w")
    assert (heard.heir, heard.leader) == (heir, leader)
