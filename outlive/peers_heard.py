"""What this node's keeper has heard of its peers, for people and for workloads that it learns of later.

In: beats, and keys that were refused on either side. Out: `PeerStatus`, events when a peer falls silent, is
heard again or refused, and the last beat's say.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from common.config import Peer
from common.control import PeerStatus
from common.events import Event as LogEvent
from common.events import EventLog
from common.messages import Beat
from common.pauses import Pause
from common.role_events import Heard
from common.roles import Instant, Takeover, Timing

_REFUSAL_KEPT_S = 150.0
"""More than two minutes: a refusal that goes on is told at least once a minute."""


class PeersHeard:
    """The last beat of each peer's keeper and agent."""

    def __init__(self, peers: Sequence[Peer], timing: Timing, events: EventLog) -> None:
        self._names = tuple(peer.name for peer in peers)
        self._addresses = {peer.name: str(ipaddress.ip_address(peer.address)) for peer in peers}
        self._timing = timing
        self._events = events
        self._beats: dict[tuple[str, str], tuple[Beat, float]] = {}
        self._silent: dict[str, bool] = {}
        self._refused: dict[str, tuple[str, float]] = {}

    def hear(self, beat: Beat, now: Instant) -> None:
        """Keep a beat."""
        self._beats[(beat.node, beat.origin)] = (beat, now.monotonic_s)
        if self._silent.get(beat.node, True):
            self._silent[beat.node] = False
            self._refused.pop(beat.node, None)
            self._events.append(LogEvent.PEER_HEARD, reason=f"{beat.node} is heard", peer=beat.node)

    def refuse(self, node: str, reason: str, now: Instant) -> None:
        """Keep why a key, or a heartbeat's version, was refused; of no interest while the peer is heard."""
        if not self._silent.get(node, True):
            return
        if not self._refusal(node, now):
            self._events.append(LogEvent.PEER_REFUSED, reason=reason, peer=node)
        self._refused[node] = (reason, now.monotonic_s)

    def refuse_address(self, address: str, reason: str, now: Instant) -> None:
        """Keep that a key was refused here, if it came from where a peer is."""
        for node in (name for name, its in self._addresses.items() if its == address):
            hint = f"does {node}'s public_key in [[peers]] match its key file?"
            self.refuse(node, f"{reason} ({hint})", now)

    def tick(self, now: Instant) -> None:
        """Notice who has fallen silent."""
        for node in self._names:
            heard = [at for (name, _), (_, at) in self._beats.items() if name == node]
            if (
                heard
                and not self._silent[node]
                and now.monotonic_s - max(heard) > self._timing.suspect_after_s
            ):
                self._silent[node] = True
                after_ms = self._timing.suspect_after_s * 1000
                reason = f"neither keeper nor agent of {node} was heard for {after_ms:.0f} ms"
                self._events.append(LogEvent.PEER_SILENT, reason=reason, peer=node)

    def recent(self, workload: str, now: Instant) -> list[Heard]:
        """Return what peers that are still heard said last of a workload."""
        return [
            heard_of(beat, workload)
            for beat, at in self._beats.values()
            if now.monotonic_s - at <= self._timing.suspect_after_s
        ]

    def status(self, now: Instant) -> tuple[PeerStatus, ...]:
        """Return how each peer looks from here."""
        return tuple(
            PeerStatus(
                node=node,
                keeper_silence_ms=self._silence_ms(node, "keeper", now),
                agent_silence_ms=self._silence_ms(node, "agent", now),
                boot_id=self._boot_id(node),
                refused=self._refusal(node, now),
            )
            for node in self._names
        )

    def _silence_ms(self, node: str, origin: str, now: Instant) -> int | None:
        heard = self._beats.get((node, origin))
        return None if heard is None else round((now.monotonic_s - heard[1]) * 1000)

    def _refusal(self, node: str, now: Instant) -> str:
        reason, at = self._refused.get(node, ("", 0.0))
        return reason if now.monotonic_s - at <= _REFUSAL_KEPT_S else ""

    def _boot_id(self, node: str) -> str:
        heard = self._beats.get((node, "keeper")) or self._beats.get((node, "agent"))
        return heard[0].boot_id if heard is not None else ""


def heard_of(beat: Beat, workload: str) -> Heard:
    """Return what a beat says of one workload."""
    said = next((each for each in beat.workloads if each.name == workload), None)
    if said is None:
        return Heard(node=beat.node, origin=beat.origin, boot_id=beat.boot_id, wall_s=beat.wall_s)
    return Heard(
        node=beat.node,
        origin=beat.origin,
        boot_id=beat.boot_id,
        wall_s=beat.wall_s,
        term=said.term,
        claim=said.state,
        heir=said.heir if said.state != "following" else "",
        alive=said.alive,
        in_doubt=said.in_doubt,
        leader=said.heir if said.state == "following" else "",
        pauses=tuple(
            Pause(
                node=pause.node,
                number=pause.number,
                by=pause.by,
                since_wall_s=pause.since_wall_s,
                lifted_by=pause.lifted_by,
            )
            for pause in said.pauses
        ),
        takeovers=tuple(
            Takeover(silence=silence, missing=each.missing)
            for each in said.takeovers
            for silence in each.silences
        ),
    )
