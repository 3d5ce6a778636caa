"""How the role machine learns of pauses: from operators, peers and its own disk. Pure; the same in any state.

What a pause prevents stands with the guards (`common.succession.obstacle`, `common.role_guards`). Invariants:

- A pause counts from the moment in which it is heard of; a resume only once it is on this node's disk. So at
  no moment, whenever the keeper ends, does a node act as if not paused and find itself paused afterwards.
- What heartbeats say, and what an operator is told is done, is on disk. So who echoes a pause keeps it.
- Only entries of the workload's own nodes are taken in: a peer cannot make the file grow without end.
"""

from __future__ import annotations

from msgspec.structs import replace

from common.control import Done, Refused
from common.pauses import Pauses, cover, in_force, joined, told, with_pause, without_pauses
from common.role_actions import Acted, history, noted
from common.role_events import (
    Answer,
    Effect,
    OperatorPause,
    OperatorResume,
    PausesPersisted,
    PersistPauses,
    StepFailed,
)
from common.roles import LEADING, Instant, Role


def known_pauses(role: Role) -> Pauses:
    """Return the newest that is known, whether it is on disk already or not."""
    return role.pauses if role.pauses_wanted is None else role.pauses_wanted


def unconfirmed_by(role: Role) -> tuple[str, ...]:
    """Return the other nodes that were not heard to know what this node has recorded of pauses."""
    ours = _of_its_nodes(role, role.pauses)
    others = [node for node in role.spec.nodes if node != role.me]
    return tuple(
        node for node in others if not cover(role.peers[node].pauses if node in role.peers else (), ours)
    )


def hear_pauses(role: Role, pauses: Pauses) -> Acted:
    """Take in what a peer has recorded."""
    return _want(role, joined(known_pauses(role), _of_its_nodes(role, pauses)))


def ask_pause(role: Role, event: OperatorPause, now: Instant) -> Acted:
    """Pause; the operator is answered once that is on disk."""
    if role.me not in role.spec.nodes:
        return role, (_refusal(role, event.request),)
    return _asked(role, event.request, with_pause(known_pauses(role), role.me, event.by, now.wall_s))


def ask_resume(role: Role, event: OperatorResume, now: Instant) -> Acted:
    """Lift every pause that is known here; the operator is answered once that is on disk.

    Not one that was heard and is not on disk yet: until the resume is, nothing would be left to pause by.
    """
    if role.me not in role.spec.nodes:
        return role, (_refusal(role, event.request),)
    if any(pause not in role.pauses for pause in in_force(known_pauses(role))):
        message = "a pause is still being recorded here"
        return role, (
            Answer(
                request=event.request,
                answer=Refused(error="WorkloadError", message=message, hint="ask again"),
            ),
        )
    return _asked(role, event.request, without_pauses(known_pauses(role), role.me, event.by))


def pauses_recorded(role: Role, event: PausesPersisted, now: Instant) -> Acted:
    """Go on with what is on disk now."""
    before, role = in_force(role.pauses), replace(role, pauses=event.pauses)
    if role.pauses_wanted == event.pauses:
        role = replace(role, pauses_wanted=None, pauses_retry_at_s=0.0)
    effects: tuple[Effect, ...] = ()
    after = in_force(role.pauses)
    if bool(before) != bool(after) and role.name in LEADING and role.record.leader == role.me:
        role = noted(role, now, "paused" if after else "resumed", change_told(role))
        effects = (history(role),)
    if role.pauses_wanted is not None:
        return role, effects
    detail = change_told(role)
    answers = tuple(Answer(request=request, answer=Done(detail=detail)) for request in role.pause_requests)
    return replace(role, pause_requests=()), (*effects, *answers)


def pauses_not_recorded(role: Role, event: StepFailed, now: Instant) -> Acted:
    """Tell the operators who wait, and try again later."""
    if role.pauses_wanted is None:
        return role, ()
    message = f"this could not be recorded and is tried again: {event.reason}"
    answers = tuple(
        Answer(request=request, answer=Refused(error="StoreError", message=message))
        for request in role.pause_requests
    )
    retry_at_s = now.monotonic_s + role.timing.retry_first_s
    return replace(role, pause_requests=(), pauses_retry_at_s=retry_at_s), answers


def pauses_due(role: Role, now: Instant) -> Acted:
    """Try again to record what could not be recorded."""
    wanted = role.pauses_wanted
    if wanted is None or not 0 < role.pauses_retry_at_s <= now.monotonic_s:
        return role, ()
    return replace(role, pauses_retry_at_s=0.0), (PersistPauses(wanted),)


def change_told(role: Role) -> str:
    """Say how it stands by what is on disk."""
    if pauses := in_force(role.pauses):
        return f"{told(pauses)}: no node takes it over by itself"
    lifted = " and ".join(dict.fromkeys(pause.lifted_by for pause in role.pauses))
    return f"resumed by {lifted}" if lifted else "it was not paused"


def _asked(role: Role, request: int, pauses: Pauses) -> Acted:
    if pauses == role.pauses and role.pauses_wanted is None:
        return role, (Answer(request=request, answer=Done(detail=change_told(role))),)
    return _want(replace(role, pause_requests=(*role.pause_requests, request)), pauses)


def _want(role: Role, pauses: Pauses) -> Acted:
    if pauses == known_pauses(role):
        return role, ()
    return replace(role, pauses_wanted=pauses, pauses_retry_at_s=0.0), (PersistPauses(pauses),)


def _of_its_nodes(role: Role, pauses: Pauses) -> Pauses:
    return tuple(pause for pause in pauses if pause.node in role.spec.nodes)


def _refusal(role: Role, request: int) -> Answer:
    message = f"{role.me} is not one of its nodes ({', '.join(role.spec.nodes)})"
    hint = f"run it on {role.spec.nodes[0]}"
    return Answer(request=request, answer=Refused(error="WorkloadError", message=message, hint=hint))
