"""Many seeded runs of simulated clusters: `python -m tests.sim.campaign --seeds N --start S`.

Prints a summary as JSON, also of what was done until Ctrl-C; exits with 1 if an invariant was broken or a
cluster did not come to rest, and prints each seed with its story. The same seed is the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from common.model import WorkloadSpec
from common.succession import holder, successor
from tests.sim.leases import FAULTS as ETCD_FAULTS
from tests.sim.world import Host, Violation, Weather, World

FAULTS = (
    "power",
    "keeper-crash",
    "keeper-pause",
    "agent-crash",
    "partition",
    "one-way",
    "ended",
    "start",
    "stop",
    "failover",
)
SETTLE_S = 12.0
"""The bound of liveness: so long after the last fault, somebody leads, or it is at rest for a reason."""
PAUSING = 0.3
"""Share of the runs in which operators pause and resume."""
MOVING_LINE = 0.3
"""Share of the runs with three nodes in which operators change the line of succession."""
CEDING = 0.3
"""How often an operator who has a third node takes the right to lead for another one."""
SWITCHING = 0.4
"""Share of the runs in which operators hand the workload over."""
LEASING = 0.35
"""Share of the runs in which etcd gives the right to lead."""
MOVING = frozenset(
    {
        "suspecting",
        "acquiring",
        "taking_over",
        "launching",
        "yielding",
        "deposed",
        "handing_over",
        "handed_over",
    }
)


MOVES = 4
"""How often an operator tries to have another node lead, in a run that had no change of leadership."""


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    changes: int
    """How often another node than before led it."""
    by_hand: bool
    """It took an operator's hand, once all was well, to have one."""
    states: tuple[str, ...]
    handovers: int = 0
    taken_back: int = 0


def spec_of(rng: random.Random, seed: int) -> WorkloadSpec:
    """Return a workload as the seed has it."""
    return WorkloadSpec(
        name="w",
        nodes=rng.choice([("a", "b"), ("a", "b"), ("a", "b", "c")]),
        command=("sleep",),
        vip="10.0.0.100/24" if rng.random() < 0.7 else None,
        right_to_lead="fence" if rng.random() < 0.8 else "manual",
        on_exit=rng.choice(["restart", "failover", "stop"]),
        max_takeover_lag_ms=random.Random(f"lag-{seed}").choice([0, 0, 900, 3000]),
    )


def weather_of(rng: random.Random) -> Weather:
    """Return how bad this run's world is."""
    return Weather(
        loss=rng.choice([0.0, 0.02, 0.2]),
        double=rng.choice([0.0, 0.1]),
        delay_s=rng.choice([0.005, 0.05, 0.15]),
        fence_unknown=rng.choice([0.0, 0.3, 0.7]),
        fence_refused=rng.choice([0.0, 0.2]),
        effect_fails=rng.choice([0.0, 0.0, 0.1]),
        faults=tuple(rng.sample(FAULTS, rng.randint(2, len(FAULTS)))),
        fault_every_s=rng.choice([0.7, 2.0, 5.0]),
    )


def run_seed(
    seed: int, bugs: frozenset[str] = frozenset(), trouble_s: float = 20.0, right: str = ""
) -> Result:
    """Run one cluster through trouble and let it come to rest. Raises Violation.

    `right` is how the right to lead is had; empty: as the seed has it.
    """
    rng = random.Random(f"plan-{seed}")
    spec, weather = spec_of(rng, seed), weather_of(rng)
    leasing = random.Random(f"lease-{seed}")
    right = right or ("etcd" if leasing.random() < LEASING else spec.right_to_lead)
    spec = msgspec.structs.replace(spec, right_to_lead=right)
    by_ssh = random.Random(f"by-ssh-{seed}").choice([0.0, 0.5, 1.0])
    world = World(seed, spec, replace(weather, fence_by_ssh=by_ssh), bugs)
    world.run(2.5)
    world.start("a")
    world.run(3.0)
    pausing = random.Random(f"pause-{seed}")
    pauses = pausing.random() < PAUSING
    moving = random.Random(f"move-{seed}")
    moves = moving.random() < SWITCHING
    lining = random.Random(f"line-{seed}")
    lines_move = len(spec.nodes) > 2 and lining.random() < MOVING_LINE
    end = world.now + trouble_s
    while world.now < end:
        world.run(rng.uniform(0.1, 2 * world.weather.fault_every_s))
        if pauses and pausing.random() < 0.5:
            _pause_or_resume(world, pausing)
        if moves and moving.random() < 0.7:
            _switch_over(world, moving)
        if lines_move and lining.random() < 0.3:
            _move_line(world, lining)
        _strike(world, rng, lining)
        if world.leases is not None and leasing.random() < 0.6:
            host = world.hosts[leasing.choice(spec.nodes)]
            world.leases.strike(host, leasing.choice(ETCD_FAULTS), leasing.uniform(0.1, 8.0))
    settle(world)
    pass_over(world)
    result = at_rest(world)
    if result.changes:
        return result
    move_by_hand(world)
    settle(world)
    return replace(at_rest(world), by_hand=True)


def settle(world: World) -> None:
    """Let it come to rest without trouble; a fence that was asked for before may still turn a host off."""
    for _ in range(3):
        heal(world)
        world.run(SETTLE_S / 3)


def pass_over(world: World) -> None:
    """Do what a node that keeps the workload frozen asks of an operator; what it asks for has to help.

    A newer term is known there, of which it has nothing: nobody passes over that unasked.
    """
    asks = f"outlive failover {world.spec.name} --accept-data-loss"
    for host in world.hosts.values():
        for _ in range(20):  # it asks etcd again and again, and takes no request meanwhile
            if host.role is None or host.role.name not in ("handed_over", "acquiring"):
                break
            heir, request = host.role.record.heir, 0
            if asks in host.role.reason:
                request = world.failover(host.name)
                if world.refused(request) and world.spec.right_to_lead == "manual":
                    world.power_off(world.hosts[heir])
                    world.run(1.0)
                    request = world.failover(host.name, heir)
            if request and not world.refused(request):
                world.run(SETTLE_S / 3)
                heal(world)  # a fence may have turned the heir off
                world.run(SETTLE_S / 3)
                break
            world.run(0.05)


def move_by_hand(world: World) -> None:
    """Let an operator have another node lead, in a healthy cluster; raise Violation if it cannot be done."""
    for name in world.spec.nodes:
        world.resume(name)
    for _ in range(MOVES):
        before = world.leaders[max(world.leaders)] if world.leaders else ""
        leads = [host.role for host in world.hosts.values() if host.role and host.role.name == "leading"]
        line = leads[0].spec.nodes if leads else world.spec.nodes
        to = next(name for name in line if name != before)  # the first start is for the first
        if leads and successor(leads[0].spec, to) != before:  # a third node could replace both
            put_first(world, before)
        request = world.switchover(before, to) if leads else world.start(to)
        if world.refused(request) and world.refused(world.failover(to)) and before:
            run_elsewhere(world, before)
        world.run(SETTLE_S / 3)
        if world.changes_of_leader:
            return
    raise world.broken(f"an operator could not have another node than {before or 'none'} lead")


def run_elsewhere(world: World, leader: str) -> None:
    """Let an operator start it where it may: nothing of it is where it should lead, or that is not its turn.

    If it may be started nowhere, he does what a node asks for that waits with what is stored there.

    If each node takes another one for the holder of the right, since who missed the start that moved the line
    goes by the old one, he does what the refusals say, one after the other: the node that is named is powered
    off.
    """
    if not all(world.refused(world.start(name)) for name in (leader, *world.spec.nodes)):
        return
    asks = f"outlive failover {world.spec.name} --accept-data-loss"
    waiting = [host.name for host in world.hosts.values() if host.role and asks in host.role.reason]
    if not all(world.refused(world.failover(name)) for name in waiting):
        return
    roles = [world.hosts[name].role for name in (leader, *world.spec.nodes)]
    if any(role is None or holder(role) == role.me for role in roles):
        return
    for role in roles:
        if role is not None and successor(world.spec, holder(role)) == role.me:
            named = world.hosts[holder(role)]
            world.power_off(named)
            world.run(2.0)
            started = not world.refused(world.start(role.me, (named.name,)))
            world.run(2.0)
            world.power_on(named)
            world.run(2.0)
            if started:
                return


def put_first(world: World, leader: str) -> None:
    """Let an operator put the leader first in the line of succession, which takes a new start there."""
    nodes = (leader, *(name for name in world.spec.nodes if name != leader))
    world.spec = msgspec.structs.replace(world.spec, nodes=nodes)
    world.stop(leader)
    world.run(2.0)
    world.start(leader)
    world.run(2.0)


def heal(world: World) -> None:
    """End all trouble; what was lost stays lost."""
    world.tell("all is well from here on")
    world.blocked.clear()
    world.weather = Weather()
    if world.leases is not None:
        world.leases.heal()
    for host in world.hosts.values():
        world.power_on(host)
        world.boot_keeper(host)
        if not host.agent_on:
            world.boot_agent(host)


def at_rest(world: World) -> Result:
    """Return the states; raise if one is not a state of rest."""
    states = tuple(host.role.name if host.role else "-" for host in world.hosts.values())
    if MOVING & set(states):
        raise world.broken(f"not at rest {SETTLE_S:g} s after the last fault: {states}")
    for host in world.hosts.values():
        if host.role is None:
            raise world.broken(f"{host.name} is off though nobody had a reason to fence it")
        if host.role.name == "leading" and (host.container is None or host.outer_frozen):
            raise world.broken(f"{host.name} leads and nothing runs")
        newest = max(other.record.term for other in world.hosts.values())
        if host.record.term != newest:
            raise world.broken(f"{host.name} knows term {host.record.term} and not {newest}")
    pauses = {host.pauses for host in world.hosts.values()}
    if len(pauses) > 1:
        raise world.broken(f"the nodes do not agree on what is paused: {pauses}")
    return Result(world.changes_of_leader, False, states, world.handovers, world.taken_back)


def _move_line(world: World, rng: random.Random) -> None:
    """Operators declare another line of succession on every node; it counts from the next start on."""
    nodes = tuple(rng.sample(world.spec.nodes, len(world.spec.nodes)))
    world.tell(f"operators: nodes are {nodes}")
    world.spec = msgspec.structs.replace(world.spec, nodes=nodes)


def _strike(world: World, rng: random.Random, lining: random.Random) -> None:
    """Let one thing go wrong, or an operator do something. `lining` decides what is for three nodes only."""
    fault = rng.choice(world.weather.faults)
    host = world.hosts[rng.choice(world.spec.nodes)]
    back_s = rng.uniform(0.05, 6.0)
    if fault == "power":
        world.power_off(host)
        world.later(back_s, lambda: world.power_on(host))
    elif fault == "keeper-crash":
        world.crash_keeper(host)
        world.later(back_s / 2, lambda: world.boot_keeper(host))
    elif fault == "keeper-pause":
        world.pause_keeper(host, rng.uniform(0.05, 2.0))
    elif fault == "agent-crash":
        _crash_agent(world, host, back_s)
    elif fault in ("partition", "one-way"):
        _cut(world, host, rng, both=fault == "partition", for_s=back_s)
    elif fault == "ended":
        world.end_container(host)
    elif fault == "start":
        off = tuple(name for name, other in world.hosts.items() if not other.on)
        if rng.random() < 0.3:  # on all nodes at once, as a deployment tool would
            for name in world.spec.nodes:
                world.start(name, off)
        else:
            world.start(host.name, off)
    elif fault == "stop":
        world.stop(host.name)
    elif fault == "failover":
        off = [name for name, other in world.hosts.items() if not other.on]
        doubted = host.role is not None and bool(host.role.in_doubt)  # it stands still, and could go on
        if off or doubted or world.spec.right_to_lead == "fence":
            others = [name for name in world.hosts if name != host.name]
            to = lining.choice(others) if len(others) > 1 and lining.random() < CEDING else ""
            world.failover(host.name, rng.choice(off) if off else "", to)


def _pause_or_resume(world: World, rng: random.Random) -> None:
    """An operator pauses or resumes somewhere, or two of them at once."""
    for name in rng.sample(world.spec.nodes, rng.choice([1, 1, 2])):
        (world.pause if rng.random() < 0.5 else world.resume)(name)


def _switch_over(world: World, rng: random.Random) -> None:
    """An operator hands the workload over, and something goes wrong at some moment of it."""
    leaders = [host for host in world.hosts.values() if host.role is not None and host.role.name == "leading"]
    if not leaders:
        return
    here = rng.choice(leaders)
    others = [name for name in world.spec.nodes if name != here.name]
    to = others[0] if rng.random() < 0.8 else rng.choice(others)
    world.switchover(here.name, to)
    world.run(rng.uniform(0.0, 2.0))


def _crash_agent(world: World, host: Host, back_s: float) -> None:
    if host.agent_on:
        world.tell(f"{host.name}: agent crashes")
        host.agent_on = False
        host.agent_life += 1
        world.later(back_s, lambda: world.boot_agent(host) if host.on and not host.agent_on else None)


def _cut(world: World, host: Host, rng: random.Random, *, both: bool, for_s: float) -> None:
    other = rng.choice([name for name in world.spec.nodes if name != host.name])
    cut = {(host.name, other), (other, host.name)} if both else {(host.name, other)}
    world.tell(f"network: cut {sorted(cut)}")
    world.blocked |= cut
    world.later(for_s, lambda: world.blocked.difference_update(cut))


@dataclass
class Summary:
    """What many runs came to."""

    runs: int = 0
    changed: int = 0
    by_hand: int = 0
    changes: int = 0
    handovers: int = 0
    taken_back: int = 0
    states: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, outcome: Result | str) -> None:
        """Count a run: its result, or how it broke an invariant."""
        self.runs += 1
        if isinstance(outcome, str):
            self.violations.append(outcome)
            return
        self.changed += outcome.changes > 0
        self.by_hand += outcome.by_hand
        self.changes += outcome.changes
        self.handovers += outcome.handovers
        self.taken_back += outcome.taken_back
        self.states[" ".join(sorted(outcome.states))] += 1


def outcome_of(seed: int, right: str) -> Result | str:
    """Run one seed; return its result, or the story of its violation."""
    try:
        return run_seed(seed, right=right)
    except Violation as violation:
        return str(violation)


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--right", choices=("manual", "fence", "etcd"), default="", help="in every run")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes; default: one a processor"
    )
    options = parser.parse_args()
    began_s = time.monotonic()
    summary = Summary()
    seeds = range(options.start, options.start + options.seeds)
    ignored = signal.SIGINT, signal.SIG_IGN  # it is for this process, which then tells how far they came
    with (
        contextlib.suppress(KeyboardInterrupt),
        multiprocessing.Pool(options.jobs, signal.signal, ignored) as pool,
    ):
        for outcome in pool.imap(partial(outcome_of, right=options.right), seeds, chunksize=20):
            summary.add(outcome)
            if isinstance(outcome, str):
                print(outcome, file=sys.stderr, flush=True)
            if summary.runs % 1000 == 0:
                told = f"{summary.runs} of {len(seeds)} runs, {len(summary.violations)} violations"
                print(told, file=sys.stderr, flush=True)
    printed = {
        "seeds": summary.runs,
        "of": options.seeds,
        "start": options.start,
        "right": options.right or "as the seed has it",
        "violations": len(summary.violations),
        "violated": [each.splitlines()[0] for each in summary.violations],
        "with_change_of_leadership": summary.changed,
        "of_these_by_hand_only": summary.by_hand,
        "changes_of_leadership": summary.changes,
        "handovers": summary.handovers,
        "handovers_given_back": summary.taken_back,
        "end_states": dict(summary.states.most_common()),
        "seconds": round(time.monotonic() - began_s, 1),
    }
    print(json.dumps(printed, indent=2))
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())
