"""What the transitions of a leading node do: bring the workload up, step by step, keep it, end it.

Pure, as `common.role_actions`, whose building blocks are used here.
"""

from __future__ import annotations

from msgspec.structs import replace

from common.control import Done
from common.role_actions import _VIP_STEPS, Acted, answered, both, history, noted, remark, undo
from common.role_events import (
    AddVip,
    Announce,
    Answer,
    CheckHealth,
    Effect,
    Event,
    Forget,
    ForgetFiles,
    HoldVip,
    KeeperStarted,
    LiftHold,
    OperatorStop,
    SaveSpec,
    StepDone,
    StepFailed,
    ThawWorkload,
    Tick,
)
from common.roles import PIPELINE, Instant, Role, Step
from common.succession import by_lease

# --- bringing the workload up -----------------------------------------------------------------------


def begin(role: Role, event: Event, now: Instant) -> Acted:
    """Begin the steps of a term that is on disk now, and keep the declaration that counts in it.

    Not before: a keeper that is started again in between would not know that the line of succession moves.
    """
    role = replace(
        role,
        step=None,
        undo=frozenset(),
        restarts=0,
        retries=0,
        retry_at_s=0.0,
        exit_code=None,
        vip_problem="",
        unhealthy="",
        by_operator=False,
        heir="",
    )
    role = noted(role, now, "term recorded", f"term {role.record.term} is led by {role.me}")
    doing = f"term {role.record.term} begins: {role.record.cause}"
    starting = both((role, (SaveSpec(role.spec), history(role))), answered(role, Done(detail=doing)))
    return both(starting, advance(starting[0], event, now))


def begin_start(role: Role, event: Event, now: Instant) -> Acted:
    """Begin a fresh start whose term is on disk; its declaration counts from here on."""
    return begin(replace(role, starts_from=None, spec_before=None), event, now)


def resume(role: Role, event: Event, now: Instant) -> Acted:
    """Take the steps of a recorded term again; each may be repeated."""
    role = replace(role, step=None, timeline=(), timeline_from_s=now.monotonic_s)
    return advance(noted(role, now, "resumed", "the keeper was restarted on the way"), event, now)


def following_step(role: Role) -> Step | None:
    """Return the next step that applies to this workload; None after the last."""
    rest = PIPELINE if role.step is None else PIPELINE[PIPELINE.index(role.step) + 1 :]
    for step in rest:
        if step in _VIP_STEPS and role.spec.vip is None:
            continue
        if step == "health" and role.spec.health is None:
            continue
        return step
    return None


def advance(role: Role, event: Event, now: Instant) -> Acted:
    """Note how the current step went and begin the next one."""
    role = _step_noted(role, event, now)
    step = following_step(role)
    if step == "order":
        action = "restored" if role.name == "taking_over" or role.record.mark == "taking_over" else "started"
        role = noted(role, now, "ordered", f"the agent is told to have it {action}")
    effects = _effect_of(step)
    if step == "order" and role.alive:  # it was kept, frozen, while another node was to lead
        effects = (ThawWorkload(), *effects)
    return replace(role, step=step, launched_at_s=now.monotonic_s), effects


def lead(role: Role, event: Event, now: Instant) -> Acted:
    """The last step is done: the workload is served."""
    role = replace(_step_noted(role, event, now), step=None)
    role = noted(role, now, "leading", role.unhealthy or role.vip_problem or "every step succeeded")
    leads = remark(role, "leads")
    return leads[0], (*leads[1], history(leads[0]))


def fail(role: Role, event: Event, now: Instant) -> Acted:
    """The workload did not come up: leave nothing half there."""
    role = replace(noted(role, now, "failed", _failure(role, event)), step=None)
    cleaning = undo(role, "kill", "drop_vip", "lift")
    failed = remark(cleaning[0], "failed")
    return failed[0], (*cleaning[1], *failed[1], history(failed[0]))


def lead_again(role: Role, event: Event, now: Instant) -> Acted:
    """Lead on after a restart of the keeper, which may have died between any two steps."""
    role = noted(replace(role, timeline_from_s=now.monotonic_s), now, "keeper restarted", "it leads on")
    role = replace(role, launched_at_s=now.monotonic_s)
    thaw = (ThawWorkload(),) if role.alive else ()  # it may have died while it was handing over
    return role, (*thaw, *((AddVip(), LiftHold(), Announce()) if role.spec.vip is not None else ()))


def _step_noted(role: Role, event: Event, now: Instant) -> Role:
    """Write what came of the current step into the timeline, and keep what went wrong."""
    step = role.step
    if step is None:
        return role
    if isinstance(event, StepFailed):
        if step == "health":
            role = replace(role, unhealthy=f"not healthy: {event.reason}", retry_at_s=now.monotonic_s)
        else:
            role = replace(role, vip_problem=f"{step}: {event.reason}", retry_at_s=now.monotonic_s)
        return noted(role, now, f"{_DONE[step]}: failed", event.reason)
    detail = event.detail if isinstance(event, StepDone) else ""
    if step == "order" and role.report is not None:
        detail = role.report.order_detail
    return noted(role, now, _DONE[step], detail or _WHY[step])


_DONE: dict[Step, str] = {
    "hold": "VIP held",
    "add_vip": "VIP added",
    "order": "running",
    "health": "healthy",
    "lift": "hold lifted",
    "announce": "announced",
}
_WHY: dict[Step, str] = {
    "hold": "no client reaches the address before the workload is there",
    "add_vip": "this node has the address",
    "order": "the agent has carried out its order",
    "health": "the health check passed",
    "lift": "clients may come",
    "announce": "the neighbours know where the address is",
}


def _effect_of(step: Step | None) -> tuple[Effect, ...]:
    effects: dict[Step, Effect] = {
        "hold": HoldVip(),
        "add_vip": AddVip(),
        "health": CheckHealth(),
        "lift": LiftHold(),
        "announce": Announce(),
    }
    return (effects[step],) if step in effects else ()


def unanswered(role: Role) -> str:
    """Say that the agent owes an answer."""
    return f"the agent has not carried out its order within {role.timing.order_s:g} s"


def _failure(role: Role, event: Event) -> str:
    if isinstance(event, Tick):
        return unanswered(role)
    if role.report is not None and role.step == "order" and role.alive is False:
        return role.report.order_detail or "the agent could not carry out its order"
    return "it ended as soon as it was restored"


# --- leading, and its end ---------------------------------------------------------------------------


def repair(role: Role, event: Event, now: Instant) -> Acted:
    """Try again what did not succeed when the workload came up; it serves meanwhile as well as it can."""
    role = replace(role, retry_at_s=now.monotonic_s + role.timing.retry_most_s)
    effects: tuple[Effect, ...] = (CheckHealth(),) if role.unhealthy else ()
    if role.vip_problem:
        effects = (AddVip(), LiftHold(), Announce(), *effects)
        role = replace(role, vip_problem="")
    return role, effects


def restart(role: Role, event: Event, now: Instant) -> Acted:
    """Start it again in the same term, a little later each time."""
    lasted = now.monotonic_s - role.launched_at_s > role.timing.restart_window_s
    count = 1 if lasted else role.restarts + 1
    delay_s = (
        0.0 if count == 1 else min(role.timing.retry_first_s * 2 ** (count - 2), role.timing.retry_most_s)
    )
    role = replace(role, restarts=count, restart_at_s=now.monotonic_s + delay_s, step=None)
    role = replace(role, timeline_from_s=now.monotonic_s, unhealthy="")
    launching = remark(noted(role, now, "ended", how_it_ended(role)), "launching")
    return launching[0], launching[1]


def relaunch(role: Role, event: Event, now: Instant) -> Acted:
    """Order the restart; the address is here already."""
    role = noted(role, now, "ordered", f"restart {role.restarts} of at most {role.timing.restarts}")
    return replace(role, step="order", launched_at_s=now.monotonic_s), ()


def stop(role: Role, event: Event, now: Instant) -> Acted:
    """Record that it is not to run, before anything is ended."""
    if isinstance(event, OperatorStop):
        role = replace(role, request=event.request)
    return remark(role, "stopped")


def stopped(role: Role, event: Event, now: Instant) -> Acted:
    """End it: the agent gracefully, the keeper by force if that takes too long.

    What does not run yet may be half brought up, and wait for a gate to open: that is not left for later. Nor
    is what an earlier keeper, before it was started again, may have left like that.
    """
    grace_s = role.timing.stop_grace_s if role.alive else 0.0
    role = replace(role, stop_deadline_s=now.monotonic_s + grace_s, step=None)
    begins = isinstance(event, KeeperStarted) and role.record.term > 0 and by_lease(role)
    half = not role.alive and (role.order.role == "lead" or begins)
    cleaning = undo(role, *(("kill",) if half else ()), "drop_vip", "lift")
    return both(cleaning, answered(cleaning[0], Done(detail="it is being ended and stays so")))


def clean_up(role: Role, event: Event, now: Instant) -> Acted:
    """Remove what is left of the workload, before the right to lead is given away."""
    role = noted(replace(role, step=None, timeline_from_s=now.monotonic_s), now, "ended", how_it_ended(role))
    return undo(role, "kill", "drop_vip", "lift")


def give_up(role: Role, event: Event, now: Instant) -> Acted:
    """Record that this term is given up; that cannot be taken back."""
    return remark(role, "yielded")


def forget(role: Role, event: Forget, now: Instant) -> Acted:
    """Let go of the workload."""
    return role, (
        Answer(request=event.request, answer=Done(detail="forgotten; its term stays recorded")),
        ForgetFiles(),
    )


def how_it_ended(role: Role) -> str:
    """Say how the workload ended."""
    return (
        "it ended by itself" if role.exit_code is None else f"it ended by itself with code {role.exit_code}"
    )
