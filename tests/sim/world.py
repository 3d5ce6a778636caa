"""A simulated cluster in virtual time: hosts, a network, disks, agents, fences; the role machines are real.

Everything random comes from one seed. Invariants are checked after every event; a broken one raises
`Violation` with the story so far. What is simulated is the world of the keeper, at its own edges: effects
take time and may fail, processes crash and stand still, hosts lose power, messages are lost, late, doubled.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from common import lease
from common.control import Done, Refused, ReplicaProgress, WorkloadReport
from common.model import EpochId, WorkloadSpec
from common.pauses import Pauses, joined
from common.role_events import (
    AddVip,
    AgentReport,
    Announce,
    Answer,
    CheckHealth,
    ClaimTerm,
    DropVip,
    Effect,
    Event,
    FenceResult,
    Heard,
    HoldVip,
    KeeperStarted,
    KillWorkload,
    LiftHold,
    Note,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    OperatorStart,
    OperatorStop,
    OperatorSwitchover,
    PausesPersisted,
    PersistPauses,
    PersistTerm,
    RunFence,
    SaveSpec,
    StepDone,
    StepFailed,
    TermPersisted,
    ThawWorkload,
    Tick,
    WorkloadEnded,
)
from common.role_explain import replaces, takeovers
from common.role_table import step
from common.roles import (
    LEADING,
    RUNS,
    SILENCES,
    Instant,
    Refusal,
    Role,
    Takeover,
    TermRecord,
    Timing,
    claim_of,
    heir_of,
    new_role,
)
from common.succession import is_silent, keeps_frozen, planned, unheard_leader
from tests.sim.leases import Leases

REPLACES = (Takeover(silence="host loss", missing=("not said here",)),)
"""What heartbeats say of a takeover where there is a leader to replace."""
TICK_S = 0.05
BEAT_S = 0.1
REPORT_S = 0.1
EPOCH_S = 0.5
TIMING = Timing(
    suspect_after_s=0.5,
    listen_s=2.0,
    agent_silent_after_s=1.0,
    stop_grace_s=3.0,
    handover_s=2.0,
    order_s=3.0,
    fence_s=1.5,
    retry_most_s=4.0,
)
LAG_TOLERANCE_S = 0.3
"""The agent reports later than it stores, and beats of keeper and agent may arrive in another order."""
STORY_LINES = 60
RUNS_WITHOUT_RIGHT_S = 3.0
"""The keeper kills at once; killing may fail and is repeated, hence some time."""


class Violation(AssertionError):
    """An invariant is broken."""


@dataclass(frozen=True)
class Weather:
    """How bad the world is, as probabilities and seconds."""

    loss: float = 0.0
    double: float = 0.0
    delay_s: float = 0.02
    fence_unknown: float = 0.0
    fence_refused: float = 0.0
    fence_by_ssh: float = 0.0
    """How many of the fences that work kill processes and leave a refusal, instead of cutting the power."""
    effect_fails: float = 0.0
    faults: tuple[str, ...] = ()
    fault_every_s: float = 4.0


@dataclass
class Host:
    """One host: what is on its disk, and what is gone when its power is."""

    name: str
    saved: WorkloadSpec | None
    """How its disk keeps the workload; None: not yet."""
    declared: WorkloadSpec
    """How its agent has it declared: as the last order says, or as came with the leader's epochs."""
    on: bool = True
    boot: int = 1
    record: TermRecord = field(default_factory=TermRecord)
    refusal: Refusal | None = None
    fences: int = 0
    """How often it was fenced by SSH: what a keeper was writing then is on the disk, or never will be."""
    starts: int = 0
    stored: EpochId | None = None
    role: Role | None = None
    stands_still: bool = False
    heard_before: dict[str, float] | None = None
    """It goes on, and has not read what came meanwhile: for how long each node was silent before."""
    inbox: list[Event] = field(default_factory=list)
    keeper_life: int = 0
    agent_on: bool = True
    agent_life: int = 0
    busy: bool = False
    done: int = 0
    failed: int = 0
    container: int | None = None
    """Life number of the container that runs, if one does."""
    frozen: bool = False
    """The container stands still, to be handed over."""
    frozen_since: float = 0.0
    outer_frozen: bool = False
    """It stands still for the lack of a lease, by another switch."""
    lease: lease.Lease | None = None
    lease_record: lease.LeaseRecord | None = None
    """In memory, and so gone when its power is."""
    delayed: list[Callable[[], None]] = field(default_factory=list)
    """What etcd answered while the keeper stood still."""
    handing: int = 0
    """Number of the order to hand it over that the agent is carrying out; 0: none."""
    handed: EpochId | None = None
    handed_term: int = 0
    """The last term that it handed over."""
    served: int = 0
    """The newest term in which a container of it ran."""
    order_of_run: int = 0
    kills: int = 0
    """How often everything of the workload was killed."""
    exit_code: int | None = None
    restored: EpochId | None = None
    epoch: int = 0
    acked: dict[str, EpochId] = field(default_factory=dict)
    vip: bool = False
    held: bool = False
    sequence: int = 0
    newest_boot: dict[str, int] = field(default_factory=dict)
    newest_beat: dict[tuple[str, str, int], int] = field(default_factory=dict)
    spoke_at: dict[str, float] = field(default_factory=dict)
    without_right_since: float | None = None
    clock_s: float = 0.0
    """How far its wall clock is ahead of the others'."""
    stored_at: float = 0.0
    """When the stored epoch was captured, in the world's own time."""
    led_at: dict[tuple[str, int], float] = field(default_factory=dict)
    """When a node sent the last sign of life that arrived here while it led a term."""
    pauses: Pauses = ()
    """What its disk holds of pauses."""
    terms_writing: list[TermRecord] = field(default_factory=list)
    """Those on their way to the disk, one after the other."""
    pauses_writing: list[Pauses] = field(default_factory=list)
    told_paused: set[tuple[str, int]] = field(default_factory=set)
    """Pauses, by node and number, that its keeper knows: acknowledged here, read from disk, or heard."""
    told_resumed: set[tuple[str, int]] = field(default_factory=set)
    """Those of which it knows that they are lifted."""
    disk_free_at: float = 0.0
    host_free_at: float = 0.0


class World:
    """The cluster and its clock."""

    def __init__(
        self, seed: int, spec: WorkloadSpec, weather: Weather, bugs: frozenset[str] = frozenset()
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.spec = spec
        """How operators have it declared on every node; another line of succession counts from a start on."""
        self.weather = weather
        self.bugs = bugs
        self.now = 0.0
        self.by_ssh = random.Random(f"ssh-{seed}")
        clocks = random.Random(f"clocks-{seed}")
        self.hosts = {
            name: Host(name, saved=None, declared=spec, clock_s=clocks.uniform(-3600, 3600))
            for name in spec.nodes
        }
        self.blocked: set[tuple[str, str]] = set()
        self.story: deque[str] = deque(maxlen=STORY_LINES)
        self.leaders: dict[int, str] = {}
        self.lives = 0
        self.requests = 0
        self.answers: dict[int, object] = {}
        self.pausing: dict[int, bool] = {}
        """Requests to pause (True) or to resume."""
        self.finals: dict[int, EpochId] = {}
        """The epoch from which on a workload stood still to be handed over, by term."""
        self.handovers = 0
        self.taken_back = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.leases = Leases(self) if spec.right_to_lead == "etcd" else None
        for host in self.hosts.values():
            self.boot_keeper(host)
            self.boot_agent(host)

    # --- time -------------------------------------------------------------------------------------

    def later(self, after_s: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + after_s, self._count, what))

    def run(self, for_s: float) -> None:
        until = self.now + for_s
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
            self.check()
        self.now = until

    def instant(self, host: Host) -> Instant:
        return Instant(100.0 + self.now, self.wall_s(host, self.now))

    def wall_s(self, host: Host, at: float) -> float:
        return 1.7e9 + at + host.clock_s

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def tell(self, text: str) -> None:
        self.story.append(f"{self.now:8.3f} {text}")

    # --- keepers ----------------------------------------------------------------------------------

    def boot_keeper(self, host: Host) -> None:
        if not host.on or host.role is not None:
            return
        host.keeper_life += 1
        host.starts += 1
        host.stands_still = False
        host.inbox.clear()
        host.delayed.clear()
        host.newest_beat.clear()
        host.newest_boot.clear()
        host.spoke_at.clear()
        host.led_at.clear()
        for (
            record
        ) in host.terms_writing:  # the keeper before this one is gone, and what it wrote is there or not
            if self.chance(0.5):
                break
            self._written(host, record)
        host.terms_writing.clear()
        record = TermRecord() if "forget-terms" in self.bugs else host.record
        for unfinished in host.pauses_writing:
            host.pauses = joined(host.pauses, unfinished if self.chance(0.5) else ())
        host.pauses_writing.clear()
        pauses = () if "forget-pauses" in self.bugs else host.pauses
        host.told_paused.clear()
        host.told_resumed.clear()
        self._know(host, host.pauses)
        host.role = new_role(
            me=host.name,
            boot_id="the-same" if "one-boot-id" in self.bugs else f"boot-{host.boot}",
            spec=host.saved or self.spec,
            timing=TIMING,
            fenceable=frozenset(self.spec.nodes),
            record=record,
            first_order=host.starts * 1000,
            now=self.instant(host),
            pauses=pauses,
            refusal=None if "forget-refusals" in self.bugs else host.refusal,
        )
        self.tell(f"{host.name}: keeper starts with {record.term}/{record.leader}/{record.mark}")
        if self.leases is not None:
            self.leases.begin(host)
        self.feed(host, KeeperStarted(host.container is not None, host.frozen or host.outer_frozen))
        self._every(host, host.keeper_life, TICK_S, lambda: self.feed(host, Tick()))
        self._every(host, host.keeper_life, BEAT_S, lambda: self.beat(host, "keeper"))

    def _every(self, host: Host, life: int, period_s: float, what: Callable[[], None]) -> None:
        def again() -> None:
            if host.role is None or host.keeper_life != life:
                return
            if not host.stands_still:
                what()
            self.later(period_s * self.random.uniform(0.9, 1.1), again)

        self.later(self.random.uniform(0, period_s), again)

    def crash_keeper(self, host: Host) -> None:
        if host.role is not None:
            self.tell(f"{host.name}: keeper crashes")
            host.role = None

    def pause_keeper(self, host: Host, for_s: float) -> None:
        if host.role is None or host.stands_still:
            return
        self.tell(f"{host.name}: keeper stands still for {for_s:.2f} s")
        host.stands_still, life = True, host.keeper_life
        since_s, spoke_at = self.now, dict(host.spoke_at)

        def resume() -> None:
            if host.role is not None and host.keeper_life == life:
                host.stands_still = False
                # So short a stop a keeper does not notice: by what it has read, time went on.
                until_s = self.now if for_s <= TIMING.suspect_after_s / 2 else since_s
                host.heard_before = {node: until_s - at for node, at in spoke_at.items()}
                self.feed(host, Tick())  # the worst order: it looks at the clock before it reads its mail
                host.heard_before = None
                events, host.inbox = host.inbox, []
                for event in events:
                    self.feed(host, event)
                delayed, host.delayed = host.delayed, []
                for go_on in delayed:
                    go_on()

        self.later(for_s, resume)

    def feed(self, host: Host, event: Event) -> None:
        if host.role is None:
            return
        if host.stands_still:
            host.inbox.append(event)
            return
        before = host.role
        if isinstance(event, Heard):
            self._know(host, event.pauses)
        host.role, effects = step(host.role, event, self.instant(host))
        if host.role.name != before.name:
            self.tell(
                f"{host.name}: {before.name} -> {host.role.name} [{host.role.record.term}] {host.role.reason}"
            )
            self._check_lag(host, before)
        self._check_pause(host, before, event)
        self._check_explained(host, before, event)
        for effect in effects:
            self.perform(host, effect)
        if self.leases is not None:
            self.leases.advance(host, lease.Passed())

    def perform(self, host: Host, effect: Effect) -> None:
        match effect:
            case PersistTerm(record):
                self._persist(host, record)
            case PersistPauses(pauses):
                self._persist_pauses(host, pauses)
            case RunFence():
                self._fence(host, effect)
            case ClaimTerm():
                assert self.leases is not None
                self.leases.claim(host, effect)
            case HoldVip():
                self._on_host(host, "hold", lambda: setattr(host, "held", True))
            case LiftHold():
                self._on_host(host, "lift", lambda: setattr(host, "held", False))
            case AddVip():
                self._on_host(host, "add_vip", lambda: setattr(host, "vip", True))
            case DropVip():
                self._on_host(host, "drop_vip", lambda: setattr(host, "vip", False))
            case Announce():
                self._on_host(host, "announce", lambda: None)
            case KillWorkload():
                self._on_host(host, "kill", lambda: self._remove(host))
            case ThawWorkload():
                self._on_host(host, "thaw", lambda: self._thaw(host), fails=False)
            case CheckHealth():
                self._after(host, self.random.uniform(0.01, 0.3), StepDone(step="health"))
            case Answer(request=request, answer=answer):
                self.answers[request] = answer
                self._check_answer(host, request, answer)
                self.tell(f"{host.name}: answers {answer}")
            case SaveSpec(spec):
                self._save(host, spec)
            case Note() | _:
                pass

    def _after(self, host: Host, after_s: float, event: Event) -> None:
        life = host.keeper_life

        def arrive() -> None:
            if host.keeper_life == life:
                self.feed(host, event)

        self.later(after_s, arrive)

    def _persist(self, host: Host, record: TermRecord) -> None:
        """One after the other; what was begun before a crash may be on the disk or not."""
        boot, fences = host.boot, host.fences
        if "act-before-persist" in self.bugs:
            self._after(host, 0.0, TermPersisted(record))
        life = host.keeper_life
        begins = max(self.now, host.disk_free_at)
        ends = begins + self.random.uniform(0.001, 0.05)
        if "act-before-persist" in self.bugs:
            ends += 0.5
        host.disk_free_at = ends
        host.terms_writing.append(record)

        def write() -> None:
            if not any(each is record for each in host.terms_writing):
                return
            host.terms_writing = [each for each in host.terms_writing if each is not record]
            same = host.keeper_life == life and host.role is not None
            if host.boot != boot or host.fences != fences or not host.on or (not same and self.chance(0.5)):
                return  # the crash came first
            if same and self.chance(self.weather.effect_fails):
                if not host.terms_writing:  # else it would be taken for what came of the later one
                    self.feed(host, StepFailed(step="persist", reason="the disk is full"))
                return
            self._written(host, record)
            if same and "act-before-persist" not in self.bugs:
                self.feed(host, TermPersisted(record))

        self.later(ends - self.now, write)

    def _save(self, host: Host, spec: WorkloadSpec) -> None:
        """In its turn on the disk, unless the keeper is gone before."""
        life = host.keeper_life

        def write() -> None:
            if host.keeper_life == life and host.role is not None:
                host.saved = spec

        self.later(max(0.0, host.disk_free_at - self.now), write)

    def _persist_pauses(self, host: Host, pauses: Pauses) -> None:
        """As terms are; what a crash interrupts is on the disk or not when the next keeper reads it."""
        boot, life = host.boot, host.keeper_life
        host.pauses_writing.append(pauses)
        host.disk_free_at = max(self.now, host.disk_free_at) + self.random.uniform(0.001, 0.05)
        if "answer-pause-before-persist" in self.bugs:
            self._after(host, 0.0, PausesPersisted(pauses))

        def write() -> None:
            if host.boot != boot or not host.on or host.keeper_life != life or host.role is None:
                return
            host.pauses_writing.remove(pauses)
            if self.chance(self.weather.effect_fails):
                self.feed(host, StepFailed(step="pauses", reason="the disk is full"))
                return
            host.pauses = joined(host.pauses, pauses)
            self._know(host, pauses)
            self.feed(host, PausesPersisted(pauses))

        self.later(host.disk_free_at - self.now, write)

    def _know(self, host: Host, pauses: Pauses) -> None:
        """Keep what a keeper was told of pauses, by rules of this world's own."""
        for pause in pauses:
            known = host.told_resumed if pause.lifted_by else host.told_paused
            known.add((pause.node, pause.number))
            host.told_resumed.update((pause.node, older) for older in range(1, pause.number))

    def knows_pause(self, host: Host) -> bool:
        """Tell whether the host's keeper was told of a pause and not of its end."""
        return bool(host.told_paused - host.told_resumed)

    def _written(self, host: Host, record: TermRecord) -> None:
        if record.term < host.record.term and "forget-terms" not in self.bugs:
            raise self.broken(f"{host.name} lowers its term from {host.record.term} to {record.term}")
        host.record = record
        if record.leader != host.name:
            return
        if (other := self.leaders.setdefault(record.term, host.name)) != host.name:
            raise self.broken(f"term {record.term} has two leaders: {other}, {host.name}")

    def _on_host(self, host: Host, name: str, what: Callable[[], None], *, fails: bool = True) -> None:
        """Host effects of one keeper are done one after the other."""
        life, boot = host.keeper_life, host.boot
        host.host_free_at = max(self.now, host.host_free_at) + self.random.uniform(0.002, 0.05)

        def act() -> None:
            if not host.on or host.boot != boot or host.keeper_life != life or host.role is None:
                return
            refused = host.role.in_doubt and name in ("add_vip", "lift", "announce")
            if refused or (fails and self.chance(self.weather.effect_fails)):
                self.feed(host, StepFailed(step=name, reason="it failed"))  # type: ignore[arg-type]
                return
            what()
            self.feed(host, StepDone(step=name))  # type: ignore[arg-type]

        self.later(host.host_free_at - self.now, act)

    def _silent_before(self, host: Host, node: str) -> bool:
        """Tell whether a keeper that has just stood still had reason to fence that node before it did."""
        if host.heard_before is None:
            return False
        return host.heard_before.get(node, TIMING.suspect_after_s) >= TIMING.suspect_after_s

    def _fence(self, host: Host, asked_for: RunFence) -> None:
        node, attempt = asked_for.node, asked_for.attempt
        target, heard = self.hosts[node], host.spoke_at.get(node)
        asked = host.role is not None and host.role.by_operator
        if (
            heard is not None
            and self.now - heard < TIMING.suspect_after_s * 0.9
            and not asked
            and not host.stands_still
            and not self._silent_before(host, node)
        ):
            raise self.broken(f"{host.name} fences {node}, heard {self.now - heard:.3f} s ago")
        self.tell(f"{host.name}: fences {node}")
        if "skip-fence" in self.bugs:
            self._after(
                host, 0.01, FenceResult(node=node, attempt=attempt, outcome="confirmed", reason="skipped")
            )
            return
        outcome = "confirmed"
        if self.chance(self.weather.fence_unknown):
            outcome = "unknown"
        elif self.chance(self.weather.fence_refused):
            outcome = "refused"
        works = outcome == "confirmed" or (outcome == "unknown" and self.chance(0.5))
        acts_s, answers_s = self.random.uniform(0.01, 0.5), self.random.uniform(0.51, 1.5)
        if works and self.by_ssh.random() < self.weather.fence_by_ssh:
            self.later(acts_s, lambda: self._fence_by_ssh(host, asked_for, outcome, answers_s))
            return
        if works:
            self.later(acts_s, lambda: self.power_off(target))
        if outcome == "unknown" and "unknown-is-confirmed" in self.bugs:
            outcome = "confirmed"
        verdict = FenceResult(node=node, attempt=attempt, outcome=outcome, reason="as the seed has it")  # type: ignore[arg-type]
        self._after(host, answers_s, verdict)

    def _serves_beyond(self, target: Host, term: int) -> bool:
        """Tell whether it runs there in a later term than who fences knows of, or was stopped in one."""
        beyond = target.record.leader == target.name and target.record.term > term
        runs = target.record.mark == "leads" and target.container is not None
        return beyond and (runs or target.record.mark == "stopped")

    def _fence_by_ssh(self, host: Host, asked: RunFence, outcome: str, answers_s: float) -> None:
        """What `outlive accept-fence` does, at one moment; systemd starts keeper and agent again."""
        target = self.hosts[asked.node]
        if not target.on:
            outcome = "unknown"
        elif target.record.term > asked.up_to or self._serves_beyond(target, asked.term):
            outcome = "refused"
        else:
            term = max(asked.term, target.record.term)
            self.tell(f"{target.name}: is fenced by {host.name} in term {term}")
            if target.refusal is None or target.refusal.term <= term:
                target.refusal = Refusal(term=term, by=host.name)
            target.fences += 1
            target.terms_writing.clear()
            target.role = None
            target.agent_on, target.vip = False, False
            target.agent_life += 1
            self._remove(target, by_fence=True)
            back = self.by_ssh.uniform
            self.later(back(0.1, 2.0), lambda: self.boot_keeper(target))
            self.later(
                back(0.1, 2.0),
                lambda: self.boot_agent(target) if target.on and not target.agent_on else None,
            )
        verdict = FenceResult(node=target.name, attempt=asked.attempt, outcome=outcome, reason="by SSH")  # type: ignore[arg-type]
        self._after(host, answers_s, verdict)

    # --- heartbeats -------------------------------------------------------------------------------

    def beat(self, host: Host, origin: str) -> None:
        host.sequence += 1
        role = host.role
        for name, other in self.hosts.items():
            if name == host.name:
                continue
            clock = other if "clock-of-the-hearer" in self.bugs else host
            wall_s = self.wall_s(clock, self.now)
            event = Heard(node=host.name, origin="agent", boot_id=f"boot-{host.boot}", wall_s=wall_s)
            if origin == "keeper":
                assert role is not None
                event = Heard(
                    node=host.name,
                    origin="keeper",
                    boot_id=f"boot-{host.boot}",
                    wall_s=wall_s,
                    term=role.record.term,
                    claim=claim_of(role),
                    heir=heir_of(role),
                    alive=role.alive,
                    pauses=role.pauses,
                    in_doubt=bool(role.in_doubt),
                    leader=unheard_leader(role, self.instant(host)),
                    takeovers=REPLACES if replaces(role) else (),
                )
            hear = partial(self._hear, other, event, host.sequence, host.boot, self.now, self._leads(host))
            for _ in range(2 if self.chance(self.weather.double) else 1):
                if not self.chance(self.weather.loss):
                    self.later(self.random.uniform(0.001, self.weather.delay_s), hear)

    def _leads(self, host: Host) -> int:
        """Return the term that the host leads, 0 for none; a dead keeper's agent looks after it still."""
        if host.role is not None:
            leads = claim_of(host.role) in RUNS and not host.outer_frozen
            return host.role.record.term if leads else 0
        runs = host.container is not None and not host.outer_frozen and host.record.mark != "yielded"
        return host.record.term if runs and host.record.leader == host.name else 0

    def _hear(self, host: Host, event: Heard, sequence: int, boot: int, sent: float, led: int) -> None:
        if not host.on or host.role is None or (event.node, host.name) in self.blocked:
            return
        key = (event.node, event.origin, boot)
        if boot < host.newest_boot.get(event.node, 0):
            return  # as `BeatFilter` has it: what an earlier boot said comes too late
        host.newest_boot[event.node] = boot
        if sequence <= host.newest_beat.get(key, 0):
            return
        host.newest_beat[key] = sequence
        host.spoke_at[event.node] = self.now
        view = host.role.peers.get(event.node)
        doubted = event.origin == "agent" and view is not None and view.in_doubt  # at its keeper's last word
        if led and not doubted:
            host.led_at[(event.node, led)] = max(sent, host.led_at.get((event.node, led), 0.0))
        self.feed(host, event)

    # --- agents -----------------------------------------------------------------------------------

    def boot_agent(self, host: Host) -> None:
        host.agent_on, host.busy = True, False
        host.done = host.failed = host.handing = 0
        host.handed = None
        host.agent_life += 1
        life = host.agent_life

        def alive() -> bool:
            return host.on and host.agent_on and host.agent_life == life

        def report() -> None:
            if alive():
                self._report(host)
                self.beat(host, "agent")
                self.later(REPORT_S * self.random.uniform(0.9, 1.1), report)

        def capture() -> None:
            if alive():
                self._capture(host)
                self.later(EPOCH_S, capture)

        self.later(self.random.uniform(0, REPORT_S), report)
        self.later(self.random.uniform(0, EPOCH_S), capture)

    def _report(self, host: Host) -> None:
        if host.role is None or host.stands_still:
            return
        leads = host.role.order.role == "lead"
        replicas = tuple(
            ReplicaProgress(
                node=name, connected=self._reaches(host, other), acknowledged=epoch, restorable=True
            )
            for name, epoch in host.acked.items()
            for other in [self.hosts[name]]
        )
        running = host.container is not None
        report = WorkloadReport(
            name=self.spec.name,
            spec=host.declared,
            running=running,
            init_pid=host.container or 0,
            exit_code=None if running else host.exit_code,
            stored=host.stored,
            stored_wall_s=self._frozen_wall_s(host),
            restorable=host.stored is not None,
            replicas=replicas if leads else (),
            order_done=host.done,
            order_failed=host.failed,
            restored=host.restored,
            handed_over=host.handed,
        )
        self.feed(host, AgentReport(report))
        if host.role is not None and host.handing and host.role.order.number != host.handing:
            self._give_up_handing(host)
        if host.role is not None and not host.busy:
            self._obey(host)

    def _frozen_wall_s(self, host: Host) -> float | None:
        """When the stored epoch was captured, by the clock of who led then."""
        if host.stored is None:
            return None
        return self.wall_s(self.hosts[self.leaders[host.stored.term]], host.stored_at)

    def _obey(self, host: Host) -> None:
        assert host.role is not None
        order = host.role.order
        if order.number <= max(host.done, host.failed):
            return
        if order.role == "lead" and (host.record.term, host.record.leader) != (order.term, host.name):
            raise self.broken(f"{host.name} is to lead term {order.term}, its disk says {host.record}")
        host.busy, life, kills = True, host.agent_life, host.kills
        host.declared = order.spec or host.declared
        host.handed = None
        if order.action == "hand_over" and host.container is not None:
            self._hand_over(host, order.number, order.heir)
            return

        def finish() -> None:
            if not host.on or host.agent_life != life:
                return
            if host.outer_frozen and order.role == "lead" and host.container is None:
                if host.kills > kills:  # what was half brought up is gone
                    host.busy, host.failed = False, order.number
                else:
                    self.later(0.2, finish)  # what is brought up does not get on while it is frozen
                return
            host.busy = False
            if order.role == "keep":
                pass
            elif order.role != "lead":
                self._check_not_led(host)
                self._remove(host)
            elif host.container is None and order.action == "hand_over":
                host.failed = order.number
                return
            elif host.container is None and order.action != "none" and host.order_of_run != order.number:
                if order.action == "restore" and (
                    host.stored is None or self.chance(self.weather.effect_fails)
                ):
                    host.failed = order.number
                    return
                if order.newest_only and not self._is_handed_over(host.stored):
                    raise self.broken(f"{host.name} restores {host.stored}, handed over was {self.finals}")
                self.lives += 1
                host.container, host.exit_code = self.lives, None
                host.order_of_run = order.number
                host.served = order.term
                host.restored = host.stored if order.action == "restore" else None
                host.acked.clear()
                host.epoch = max(host.epoch, host.stored.epoch if host.stored else 0)
                self.tell(f"{host.name}: container {self.lives} runs in term {order.term} ({order.action})")
            host.done = order.number

        self.later(self.random.uniform(0.02, 0.4), finish)

    def _is_handed_over(self, stored: EpochId | None) -> bool:
        """Tell whether it is the last epoch of what was handed over, or of a newer term of who took it back.

        Only etcd lets an operator pass over a term that was taken back unheard.
        """
        if stored is None:
            return False
        newer = self.leases is not None and stored.term > max(self.finals, default=stored.term)
        return newer or stored == self.finals.get(stored.term)

    def _hand_over(self, host: Host, order: int, heir: str) -> None:
        """It stands still; its last epoch reaches the heir after some time, or does not."""
        host.handing, life, container = order, host.agent_life, host.container
        if host.frozen or host.outer_frozen:  # by an agent that is gone: whose freeze that is nobody knows
            host.failed, host.busy, host.handing = order, False, 0
            return
        host.frozen, host.frozen_since = True, self.now
        host.epoch += 1
        epoch, at, other = EpochId(host.record.term, host.epoch), self.now, self.hosts[heir]
        self.tell(f"{host.name}: stands still from {epoch} on")

        def finish() -> None:
            if not host.on or host.agent_life != life or host.handing != order or host.container != container:
                return
            host.busy, host.handing = False, 0
            if not self.chance(self.weather.loss):
                self._commit(host, other, epoch, at)
            if host.acked.get(heir) == epoch and host.frozen:
                host.handed, host.done = epoch, order
                self.finals[epoch.term] = epoch
                host.handed_term = epoch.term
                self.handovers += 1
            else:
                host.frozen, host.failed = False, order

        self.later(self.random.uniform(0.05, 0.8), finish)

    def _give_up_handing(self, host: Host) -> None:
        host.handing, host.busy, host.frozen = 0, False, False

    def _thaw(self, host: Host) -> None:
        if host.frozen and host.role is not None:
            self.tell(f"{host.name}: thawed in term {host.record.term}")
            self.taken_back += host.record.mark == "taking_over"
        host.frozen = False

    def _remove(self, host: Host, *, by_fence: bool = False) -> None:
        host.kills += 1
        if host.container is not None:
            self.tell(f"{host.name}: container {host.container} is removed")
            if host.frozen and not by_fence:
                self._check_not_the_last(host)
            host.container, host.frozen = None, False
            if host.role is not None:
                self.feed(host, WorkloadEnded(137))

    def end_container(self, host: Host) -> None:
        """The workload ends by itself."""
        if host.on and host.container is not None:
            self.tell(f"{host.name}: the workload ends")
            host.container, host.exit_code, host.frozen = None, 1, False
            self.feed(host, WorkloadEnded(1))

    def _reaches(self, one: Host, other: Host) -> bool:
        cut = (one.name, other.name) in self.blocked or (other.name, one.name) in self.blocked
        return one.on and other.on and other.agent_on and not cut

    def _capture(self, host: Host) -> None:
        """An epoch is captured; each replica that follows this term commits and acknowledges it, or not."""
        role = host.role
        stands = host.container is None or host.frozen or host.outer_frozen
        if stands or role is None or role.order.role != "lead" or host.busy:
            return
        host.epoch += 1
        epoch = EpochId(host.record.term, host.epoch)
        for other in self.hosts.values():
            if other is host or not self._reaches(host, other) or self.chance(self.weather.loss):
                continue
            at = self.now
            self.later(self.random.uniform(0.01, 0.2), lambda o=other, a=at: self._commit(host, o, epoch, a))

    def _commit(self, host: Host, other: Host, epoch: EpochId, captured_at: float) -> None:
        follows = other.role is not None and other.role.order.role == "follow"
        if not self._reaches(host, other) or not follows or epoch.term < other.record.term:
            return
        if other.stored is None or epoch > other.stored:
            other.stored, other.stored_at = epoch, captured_at
            other.declared = host.declared
        host.acked[other.name] = epoch

    # --- power ------------------------------------------------------------------------------------

    def power_off(self, host: Host) -> None:
        if not host.on:
            return
        self.tell(f"{host.name}: power is off")
        host.on = False
        host.role = None
        host.agent_on = False
        host.container = None
        host.frozen = host.outer_frozen = False
        host.lease = host.lease_record = None
        host.vip = host.held = False
        host.acked.clear()
        host.terms_writing.clear()

    def power_on(self, host: Host) -> None:
        if host.on:
            return
        self.tell(f"{host.name}: power is on")
        host.on = True
        host.boot += 1
        host.exit_code = None
        host.order_of_run = 0
        host.disk_free_at = host.host_free_at = self.now
        self.boot_keeper(host)
        self.later(
            self.random.uniform(0, 1),
            lambda: self.boot_agent(host) if host.on and not host.agent_on else None,
        )

    # --- operators --------------------------------------------------------------------------------

    def _ask(self, name: str, make: Callable[[int], Event]) -> int:
        self.requests += 1
        event = make(self.requests)
        if isinstance(event, OperatorPause | OperatorResume):
            self.pausing[self.requests] = isinstance(event, OperatorPause)
        self.tell(f"{name}: operator: {event}"[:200])
        self.feed(self.hosts[name], event)
        return self.requests

    def start(self, name: str, off: tuple[str, ...] = ()) -> int:
        return self._ask(name, lambda n: OperatorStart(request=n, spec=self.spec, peers_are_off=off))

    def stop(self, name: str) -> int:
        return self._ask(name, lambda n: OperatorStop(request=n))

    def failover(self, name: str, off: str = "", to: str = "") -> int:
        return self._ask(
            name, lambda n: OperatorFailover(request=n, accept_data_loss=True, old_primary_is_off=off, to=to)
        )

    def switchover(self, name: str, to: str) -> int:
        return self._ask(name, lambda n: OperatorSwitchover(request=n, to=to))

    def pause(self, name: str) -> int:
        return self._ask(name, lambda n: OperatorPause(request=n, by="operator"))

    def resume(self, name: str) -> int:
        return self._ask(name, lambda n: OperatorResume(request=n, by="operator"))

    def refused(self, request: int) -> bool:
        return isinstance(self.answers.get(request), Refused)

    @property
    def changes_of_leader(self) -> int:
        """How often a term's leader was another node than the last one's."""
        leaders = [name for _, name in sorted(self.leaders.items())]
        return sum(one != next_one for one, next_one in pairwise(leaders))

    # --- invariants -------------------------------------------------------------------------------

    def broken(self, what: str) -> Violation:
        return Violation(f"seed {self.seed}, at {self.now:.3f} s: {what}\n" + "\n".join(self.story))

    def check(self) -> None:
        """Raise Violation if an invariant is broken. Called after every event, and therefore spare."""
        running = served = None
        for host in self.hosts.values():
            if host.on and not host.outer_frozen:
                if host.container is not None and not host.frozen:
                    if running is not None:
                        raise self.broken(f"it runs on {running.name} and {host.name}")
                    running = host
                if host.vip and not host.held and self.spec.vip is not None:
                    if served is not None:
                        raise self.broken(f"the address is on {served.name} and {host.name}")
                    served = host
            if host.refusal is not None:
                self._check_refusal(host, host.refusal)
            if host.frozen:
                self._check_thawed(host)
        if running is not None:
            self._check_right(running)
            if self.leases is not None:
                self.leases.check(running)

    def _check_refusal(self, host: Host, refusal: Refusal) -> None:
        """A node that was fenced leads nothing under a term up to the fenced one, whatever starts again."""
        role = host.role
        if role is not None and role.name in LEADING and role.record.term <= refusal.term:
            raise self.broken(f"{host.name} is {role.name} in term {role.record.term}, fenced: {refusal}")

    def _check_not_the_last(self, host: Host) -> None:
        """What is kept frozen is not ended before it runs elsewhere, or was stopped or started there.

        With leases a node that did not hear of the hand-over may take over in its own right, and fail: its
        store has the last epoch, and only it knows what was done in its term. And who loses the lease before
        it has recorded that it gives its term up, is replaced like any leader.
        """
        if self.leases is not None and host.record.mark != "yielded":
            return
        others = [other for other in self.hosts.values() if other is not host]
        later = [other for other in others if other.record.term > host.handed_term]
        stopped = any(other.record.mark == "stopped" for other in (*later, host))
        unaware = self.leases is not None and any(
            (other.record.mark == "failed" or (other.role is not None and other.role.name == "failed"))
            and not other.record.handed_by
            for other in later
        )
        ran = stopped or unaware or any(other.served > host.handed_term for other in others)
        if not ran:
            raise self.broken(f"{host.name} ends what it keeps, and it did not run elsewhere")

    def _check_not_led(self, host: Host) -> None:
        """No agent ends what its node leads, by its disk and by all that its keeper knows."""
        role = host.role
        led = host.record.leader == host.name and host.record.mark == "leads" and host.container is not None
        if led and role is not None and role.newest == host.record and role.name in ("leading", "acquiring"):
            raise self.broken(f"the agent of {host.name} ends what is led there in term {host.record.term}")

    def _check_thawed(self, host: Host) -> None:
        """Who leads does not leave its workload frozen."""
        role = host.role
        if role is None or role.name != "leading" or host.stands_still:
            host.frozen_since = self.now
        elif self.now - host.frozen_since > RUNS_WITHOUT_RIGHT_S:
            raise self.broken(f"{host.name} leads, and its workload is frozen")

    def _check_lag(self, host: Host, before: Role) -> None:
        """Nobody goes for the lead, or takes it, unasked with an epoch too far behind its leader."""
        role, limit_s = host.role, self.spec.max_takeover_lag_ms / 1000
        if role is None or not limit_s:
            return
        goes = role.name == "acquiring" and host.heard_before is None  # else it has not read its mail yet
        takes = role.name == "taking_over" and before.name == "acquiring"
        asks = before if takes else role
        if not (goes or takes) or asks.by_operator or asks.request:
            return
        if planned(asks) or keeps_frozen(asks) or asks.record.leader == host.name:
            return  # nothing was captured since
        heard_at = host.led_at.get((asks.record.leader, asks.record.term))
        if heard_at is None or heard_at - host.stored_at > limit_s + LAG_TOLERANCE_S:
            raise self.broken(f"{host.name} is {role.name} with what was captured at {host.stored_at:.3f} s")

    def _check_pause(self, host: Host, before: Role, event: Event) -> None:
        """Nobody goes for the lead, or records a term, unasked while it knows of a pause."""
        role = host.role
        if role is None or role.by_operator or role.request is not None or not self.knows_pause(host):
            return
        decided = planned(before) or keeps_frozen(before) or keeps_frozen(role)
        if decided or (self.leases and before.record.leader == host.name):
            return  # an operator asked for it, elsewhere
        begins = role.name == "acquiring" and before.name != "acquiring"
        records = role.wanted is not None and role.wanted.mark == "taking_over" and before.wanted is None
        if begins or records:
            raise self.broken(f"{host.name} goes for the lead at {event}, paused by {host.told_paused}")

    def _check_explained(self, host: Host, before: Role, event: Event) -> None:
        """What a follower does once its leader is silent is what it would have said a moment before."""
        role = host.role
        if role is None or before.name != "following" or role.name not in ("acquiring", "waiting"):
            return
        if not isinstance(event, Tick) or before.record.mark == "yielded":
            return
        now = self.instant(host)
        if not is_silent(before, before.record.leader, now):
            return
        covers = {name: frozenset(SILENCES) for name in self.spec.nodes}
        said = {takeover.missing for takeover in takeovers(before, now, covers)}
        if any((role.name == "acquiring") != (not missing) for missing in said):
            raise self.broken(f"{host.name} is {role.name} ({role.reason}), and would have said {said}")

    def _check_answer(self, host: Host, request: int, answer: object) -> None:
        """Who paused and was told that it is done finds it on disk, whatever crashes next."""
        if not isinstance(answer, Done) or not self.pausing.get(request):
            return
        if not any(pause.node == host.name for pause in host.pauses):
            raise self.broken(f"{host.name} says that it is paused, its disk says {host.pauses}")

    def _check_right(self, host: Host) -> None:
        role = host.role
        entitled = role is None or host.stands_still or (role.newest.leader == host.name)
        if entitled:
            host.without_right_since = None
        elif host.without_right_since is None:
            host.without_right_since = self.now
        elif self.now - host.without_right_since > RUNS_WITHOUT_RIGHT_S:
            raise self.broken(f"{host.name} runs it without leading the newest term it knows: {role.newest}")
