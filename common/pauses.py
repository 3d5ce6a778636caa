"""Pauses of automatic takeover, and what two nodes agree on that know different ones. Pure.

In: the pauses that a node knows, and what it is asked for or hears. Out: those that it knows then.

Each node of a workload has one entry, which only grows: the number of the newest pause that was asked for at
that node, and whether somebody has lifted it. Entries of one node are in a fixed order, and the greatest is
kept, so that nodes end up with the same entries whatever they hear, in whatever order and however often. The
workload is paused while any entry is in force. So a resume ends every pause that was known where it was asked
for, and no other: of a pause and a resume asked for on two nodes that do not hear of each other, the pause
stays.

Not guaranteed: that a node which lost its state directory, and is asked for a pause before it hears a peer,
does not use a number again. The peer's entry wins then, and `outlive pause` says that it is not paused.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

BY_CHARACTERS = 64
"""Most characters of who asked; the rest is cut off, for it travels in every heartbeat."""


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """The newest pause that was asked for at one node; it is in force until it is lifted, anywhere."""

    node: str
    """Where it was asked for."""
    number: int
    """Grows with every pause that is asked for at that node; at least 1."""
    by: str
    """The user who asked."""
    since_wall_s: float
    """When, by that node's clock; for people only."""
    lifted_by: str = ""
    """Who resumed, and where (`root on b`); empty: it is in force."""


Pauses = tuple[Pause, ...]
"""At most one of each node, in the order of the nodes' names."""


def _age(pause: Pause) -> tuple[int, str, float, str]:
    """Order the entries of one node. All that it consists of is in it: two nodes never keep two of them."""
    return pause.number, pause.lifted_by, pause.since_wall_s, pause.by


def joined(one: Pauses, other: Pauses) -> Pauses:
    """Return what a node knows that knew `one` and hears `other`; idempotent, in any order the same."""
    newest: dict[str, Pause] = {}
    for pause in (*one, *other):
        known = newest.get(pause.node)
        if known is None or _age(pause) > _age(known):
            newest[pause.node] = pause
    return tuple(newest[node] for node in sorted(newest))


def in_force(pauses: Pauses) -> Pauses:
    """Return those that nobody has lifted."""
    return tuple(pause for pause in pauses if not pause.lifted_by)


def with_pause(pauses: Pauses, node: str, by: str, wall_s: float) -> Pauses:
    """Return them with a new one of that node; unchanged if its own is in force."""
    own = next((pause for pause in pauses if pause.node == node), None)
    if own is not None and not own.lifted_by:
        return pauses
    number = own.number + 1 if own is not None else 1
    return joined(pauses, (Pause(node=node, number=number, by=by[:BY_CHARACTERS], since_wall_s=wall_s),))


def without_pauses(pauses: Pauses, node: str, by: str) -> Pauses:
    """Return them lifted, all of them, by somebody at that node."""
    who = f"{by[:BY_CHARACTERS]} on {node}"
    return tuple(
        pause if pause.lifted_by else msgspec.structs.replace(pause, lifted_by=who) for pause in pauses
    )


def cover(theirs: Pauses, ours: Pauses) -> bool:
    """Tell whether who knows `theirs` knows of each of `ours`, or of what came after it."""
    known = {pause.node: (pause.number, bool(pause.lifted_by)) for pause in theirs}
    return all(known.get(pause.node, (0, False)) >= (pause.number, bool(pause.lifted_by)) for pause in ours)


def told(pauses: Pauses) -> str:
    """Return who paused since when, as the beginning of a sentence; empty if there are none."""
    return " and ".join(
        f"paused by {pause.by} on {pause.node} since {_utc(pause.since_wall_s)}" for pause in pauses
    )


def _utc(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
