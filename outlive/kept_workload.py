"""One workload as its keeper handles it: a role machine, and what it needs of the world around it.

In: events, reports, requests. Out: effects carried out, orders, beats, status. The keeper's own knowledge of
whether the workload lives is a pidfd of its first process: it needs no agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection

import msgspec

from common.config import NodeConfig
from common.control import (
    Done,
    Explanation,
    PlannedSwitchover,
    PlanSwitchover,
    Refused,
    TermHistory,
    WorkloadReport,
    WorkloadStatus,
)
from common.errors import OutliveError
from common.etcd import EtcdClient
from common.events import Event as LogEvent
from common.events import EventLog
from common.fencing import covers
from common.lease import Passed, lease_terms
from common.messages import BeatPause, BeatTakeover, BeatWorkload
from common.model import WorkloadSpec
from common.objective import Objective, judged
from common.pauses import Pauses, in_force
from common.role_actions import history
from common.role_events import (
    AddressLost,
    AgentReport,
    Answer,
    ClaimTerm,
    DropVip,
    Event,
    FenceResult,
    Forget,
    ForgetFiles,
    KeeperStarted,
    KillWorkload,
    LeaseInDoubt,
    LeaseStands,
    Note,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    OperatorStart,
    OperatorStop,
    OperatorSwitchover,
    OrderAgent,
    RunFence,
    StepDone,
    StepFailed,
    Tick,
    Told,
    WorkloadEnded,
)
from common.role_explain import ETCD, Covers, explain, takeovers
from common.role_handover import as_thawed, has_to_stand_still, switchover_refusal
from common.role_pauses import change_told
from common.role_table import step
from common.role_view import workload_status
from common.roles import (
    Instant,
    Refusal,
    Role,
    Silence,
    Takeover,
    TermRecord,
    Timing,
    claim_of,
    heir_of,
    new_role,
)
from common.succession import agent_alive, has_listened, unheard_leader
from common.terms_file import TermFiles
from common.threads import in_thread
from outlive.address_watch import AddressWatch, address_of, misplaced
from outlive.keeper_effects import Effects, Hands
from outlive.kept_lease import KeptLease
from outlive.lease_records import LeaseRecords
from outlive.planned import Planned

log = logging.getLogger(__name__)

_EXIT_CODE_POLL_S = 0.02
_EXIT_CODE_POLLS = 15
"""conmon writes the exit code a moment after the process has ended."""
_ANSWER_DEADLINE_S = 60.0
_TAKEOVERS_S = 0.5
"""How old what heartbeats say of a takeover by this node may be: beats are many, each costs the keeper."""
_REASONS, _REASON_CHARACTERS = 4, 200
"""Of why this node would not take over travels in heartbeats, which must stay small; `explain` has all."""


class KeptWorkload:
    """One workload; all methods belong to the event loop's thread."""

    def __init__(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        *,
        boot_id: str,
        timing: Timing,
        fenceable: frozenset[str],
        record: TermRecord,
        pauses: Pauses,
        refusal: Refusal | None,
        plan: PlannedSwitchover | None,
        first_order: int,
        next_request: Callable[[], int],
        hands: Hands,
        files: TermFiles,
        tasks: asyncio.TaskGroup,
        events: EventLog,
        etcd: EtcdClient,
        leases: LeaseRecords,
    ) -> None:
        """`next_request` returns a number that no other operator's request has."""
        self._hands = hands
        self._covers = covers(config)
        self._takeovers: tuple[BeatTakeover, ...] = ()
        self._takeovers_of: TermRecord | None = None
        self._takeovers_until_s = 0.0
        self._events = events
        self._tasks = tasks
        self._effects = Effects(
            hands,
            files,
            self.feed,
            tasks,
            no_address=lambda: self.role.in_doubt,
            is_pending=self._is_pending,
        )
        self._claiming: set[asyncio.Task[None]] = set()
        self._files = files
        self.planned = Planned(
            spec.name,
            files,
            events,
            tasks,
            plan=plan,
            ask=lambda due: self.ask(OperatorSwitchover(request=next_request(), to=due.to)),
            remember=self._remember,
        )
        self._answers: dict[int, asyncio.Future[Done | Refused]] = {}
        self._pid = 0
        self._pidfd: int | None = None
        self._objective = Objective()
        self._address = AddressWatch()
        self._dropping = False
        """An address that has no business here is being looked at, or dropped."""
        self.forgotten = False
        """An operator asked to forget it; the keeper lets go of it at the next tick."""
        self.role: Role = new_role(
            me=config.node.name,
            boot_id=boot_id,
            spec=spec,
            timing=timing,
            fenceable=fenceable,
            record=record,
            first_order=first_order,
            now=_now(),
            pauses=pauses,
            refusal=refusal,
        )
        self._lease = KeptLease(
            lambda: self.role,
            feed=self.feed,
            terms=lease_terms(config.etcd),
            etcd=etcd,
            hands=hands,
            records=leases,
            tasks=tasks,
        )

    def begin(self) -> None:
        """Look whether it runs here, and let the machine start."""
        pid = self._hands.init_pid(self.role.spec.name)
        if pid is not None:
            self._hold(pid)
        frozen = self._hands.frozen(self.role.spec.name)
        self.feed(KeeperStarted(running=self._pidfd is not None, frozen=frozen))
        self._lease.begin()

    def close(self) -> None:
        """Let go of it; nothing is done to it."""
        self._release()
        for claiming in self._claiming:
            claiming.cancel()
        self._lease.close()
        self._effects.close()

    # --- events in, effects out -------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Let the machine take an event in, and begin what it wants done."""
        if isinstance(event, StepDone | StepFailed) and event.step == "drop_vip":
            self._dropping = False
        before, paused_before = self.role.name, in_force(self.role.pauses)
        self.role, effects = step(self.role, event, _now())
        if isinstance(event, LeaseInDoubt):
            self._tell(LogEvent.LEASE_IN_DOUBT, f"the workload is frozen: {event.reason}")
        elif isinstance(event, LeaseStands):
            self._tell(LogEvent.LEASE_STANDS, "the workload is not frozen for the lack of a lease")
        if isinstance(event, FenceResult):
            self._tell(LogEvent.FENCE_ANSWERED, f"{event.node}: {event.outcome}: {event.reason}")
        if in_force(self.role.pauses) != paused_before:
            now_paused = bool(in_force(self.role.pauses))
            event_of = LogEvent.TAKEOVER_PAUSED if now_paused else LogEvent.TAKEOVER_RESUMED
            self._tell(event_of, change_told(self.role))
        for effect in effects:
            match effect:
                case Note(reason=reason, event=label):
                    self._tell_note(before, label, reason)
                case Answer(request=number, answer=answer):
                    self._answer(number, answer)
                case ClaimTerm():
                    self._tell(LogEvent.FENCE_ASKED, f"etcd is asked for term {effect.term}", peer="etcd")
                    claiming = self._tasks.create_task(self._claim(effect))
                    self._claiming.add(claiming)
                    claiming.add_done_callback(self._claiming.discard)
                case OrderAgent(order=order):
                    log.info(
                        "order.changed workload=%s number=%d role=%s action=%s term=%d",
                        *(order.workload, order.number, order.role, order.action, order.term),
                    )
                case _:
                    self._effects.perform(effect, self.role.spec)
                    if isinstance(effect, RunFence):
                        self._tell(LogEvent.FENCE_ASKED, f"attempt {self.role.retries + 1}", peer=effect.node)
                    elif isinstance(effect, KillWorkload) and self.role.alive:
                        self._tell(LogEvent.WORKLOAD_KILLED, self.role.reason)
                    elif isinstance(effect, ForgetFiles):
                        self._tell(LogEvent.WORKLOAD_FORGOTTEN, "asked for by an operator")
                        self.forgotten = True

        if isinstance(event, Tick):
            self._find_unreported()
            self._judge_objective(_now())
            self.planned.tick(self.role, _now())
        self._lease.advance(Passed())

    def _find_unreported(self) -> None:
        """See what was restored here though the agent that began it is dead: conmon and criu outlive that."""
        role = self.role
        waits = role.name == "taking_over" and role.step == "order" and self._pidfd is None
        if not waits or agent_alive(role, _now()):
            return
        pid = self._hands.init_pid(role.spec.name)
        if pid is not None and self._hands.came_of(role.spec.name) == role.order.number:
            self._hold(pid)
            if self._pidfd is not None:
                self.feed(KeeperStarted(running=True, frozen=False))

    def _is_pending(self, attempt: int) -> bool:
        """Tell whether the role machine still waits for what comes of that attempt to lead."""
        return self.role.name == "acquiring" and attempt == self.role.fence_attempt

    async def _claim(self, claim: ClaimTerm) -> None:
        """Ask etcd for a term, unless this node could not record it: a lease without use blocks others."""
        if not (reason := await self._effects.cannot_record(self.role.spec)):
            if self._is_pending(claim.attempt):
                self._lease.claim(claim)
            return
        self.feed(FenceResult(node="etcd", attempt=claim.attempt, outcome="unknown", reason=reason))

    async def ask(
        self,
        event: OperatorFailover
        | OperatorSwitchover
        | OperatorStart
        | OperatorStop
        | OperatorPause
        | OperatorResume
        | Forget,
    ) -> Done | Refused:
        """Put an operator's request to the machine and wait for its answer."""
        answer: asyncio.Future[Done | Refused] = asyncio.get_running_loop().create_future()
        self._answers[event.request] = answer
        self.feed(event)
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                return await answer
        except TimeoutError:
            if isinstance(event, OperatorPause | OperatorResume):  # only what is on disk is done
                return Refused(error="StoreError", message="it is not on this node's disk yet")
            return Done(detail=f"still under way: {self.role.reason}")
        finally:
            self._answers.pop(event.request, None)

    async def plan(self, asked: PlanSwitchover) -> Done | Refused:
        """Plan a switchover, if it could begin now. Raises StoreError, NoSpaceError."""
        event, now = OperatorSwitchover(request=0, to=asked.to), _now()
        if asked.at_wall_s <= now.wall_s:
            return Refused(error="WorkloadError", message="that time is past by this node's clock")
        if refusal := switchover_refusal(self.role, event, now):
            return refusal
        plan = PlannedSwitchover(
            to=asked.to, at_wall_s=asked.at_wall_s, by=asked.by, term=self.role.record.term
        )
        replaced = self.planned.plan is not None
        await self.planned.make(plan)
        return Done(detail="it takes the place of the one that was planned" if replaced else "")

    async def _remember(self, plan: PlannedSwitchover, reason: str) -> None:
        """Add what became of a plan to its term's history; that may be older than this keeper."""
        record, what = self.role.record, "planned switchover"
        if record.term == plan.term and record.leader == self.role.me and self.role.timeline:
            self.feed(Told(event=what, reason=reason))
            return
        name = self.role.spec.name
        try:
            await in_thread(self._files.add_to_history, name, plan.term, what, reason, time.time())
        except OutliveError as error:
            log.error("history.not-kept workload=%s reason=%r", name, str(error))

    def take_report(self, report: WorkloadReport) -> None:
        """Take the agent's report in; whether the workload lives is for the kernel to say."""
        new = report.running and report.init_pid not in (0, self._pid)
        if new and self._hands.init_pid(report.name) == report.init_pid:
            self._hold(report.init_pid)
        if has_to_stand_still(self.role, report) and not self._hands.frozen(report.name):
            report = as_thawed(self.role, report)
        self.feed(AgentReport(msgspec.structs.replace(report, running=self._pidfd is not None)))

    def look_at_address(self, in_use: Collection[str]) -> None:
        """Bring the address back if it is led here without, and drop it if another node leads it.

        Those `in_use` belong to another workload that is led here as well, and are left alone.
        """
        address = address_of(self.role)
        if not address:
            return
        wrong = self._address.look(self.role, self._hands.has_address(address))
        if wrong == "missing":
            self._tell(LogEvent.ADDRESS_MISPLACED, f"{address} was gone from here, and is added again")
            self.feed(AddressLost(reason=f"{address} was gone from this host"))
        elif wrong == "not ours" and address not in in_use and not self._dropping:
            self._dropping = True
            self._tasks.create_task(self._drop_stray(address))

    async def _drop_stray(self, address: str) -> None:
        """Drop the address if it is on the interface of the workload; elsewhere it is somebody else's."""
        try:
            there = await self._hands.holds_vip(self.role.spec)
        except (OutliveError, OSError, ValueError):
            there = False  # the next look tries again
        if there and misplaced(self.role, True) == "not ours":  # it may be on its way to the lead by now
            self._tell(LogEvent.ADDRESS_MISPLACED, f"{address} is here, where it is not led: dropped")
            self._effects.perform(DropVip(), self.role.spec)
        else:
            self._dropping = False

    # --- what it shows ----------------------------------------------------------------------------

    def beat(self, *, agent_alive: bool) -> BeatWorkload:
        """Return what heartbeats say of it."""
        return BeatWorkload(
            name=self.role.spec.name,
            term=self.role.record.term,
            state=claim_of(self.role),
            heir=heir_of(self.role) or unheard_leader(self.role, _now()),
            alive=self.role.alive,
            agent_alive=agent_alive,
            pauses=tuple(
                BeatPause(
                    node=pause.node,
                    number=pause.number,
                    by=pause.by,
                    since_wall_s=pause.since_wall_s,
                    lifted_by=pause.lifted_by,
                )
                for pause in self.role.pauses
            ),
            takeovers=self._beat_takeovers(_now()),
            in_doubt=bool(self.role.in_doubt),
        )

    def _beat_takeovers(self, now: Instant) -> tuple[BeatTakeover, ...]:
        """Return what heartbeats say of a takeover by this node, worked out anew every now and then."""
        if now.monotonic_s >= self._takeovers_until_s or self._takeovers_of is not self.role.record:
            self._takeovers_of = self.role.record
            self._takeovers = _told_once(takeovers(self.role, now, self._covered()))
            self._takeovers_until_s = now.monotonic_s + _TAKEOVERS_S
        return self._takeovers

    def status(self) -> WorkloadStatus:
        """Return how it stands."""
        status = workload_status(self.role, _now(), self._objective.verdict, self._lease.status())
        return msgspec.structs.replace(status, planned=self.planned.plan)

    def explain(self) -> Explanation:
        """Return what would follow if something failed now."""
        explanation = explain(self.role, _now(), self._covered())
        return msgspec.structs.replace(explanation, planned=self.planned.plan)

    def _covered(self) -> Covers:
        """Return what fences cover, and whether etcd would give a lease now."""
        return self._covers if self._lease.etcd_answers else {**self._covers, ETCD: frozenset()}

    def story(self) -> TermHistory | None:
        """Return the present term's story, if this node leads it; it may be newer than the one on disk."""
        ours = self.role.record.term > 0 and self.role.record.leader == self.role.me and self.role.timeline
        return history(self.role).history if ours else None

    def has_listened(self, spec: WorkloadSpec) -> bool:
        """Tell whether all nodes of that declaration were heard, or had the time to be."""
        return has_listened(msgspec.structs.replace(self.role, spec=spec), _now())

    # --- the process ------------------------------------------------------------------------------

    def _hold(self, pid: int) -> None:
        """Hold the first process by a pidfd, and hear of its end."""
        self._release()
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return  # it has just ended
        if self._hands.init_pid(self.role.spec.name) != pid:
            os.close(pidfd)
            return
        self._pid, self._pidfd = pid, pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._process_ended)

    def _release(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._pid, self._pidfd = 0, None

    def _process_ended(self) -> None:
        self._release()
        self._tasks.create_task(self._tell_end())

    async def _tell_end(self) -> None:
        name = self.role.spec.name
        code = self._hands.exit_code(name)
        for _ in range(_EXIT_CODE_POLLS):
            if code is not None or self._pidfd is not None:
                break
            await asyncio.sleep(_EXIT_CODE_POLL_S)
            code = self._hands.exit_code(name)
        if self._pidfd is None:  # not started again meanwhile
            self._tell(LogEvent.WORKLOAD_ENDED, f"exit code {code if code is not None else 'unknown'}")
            self.feed(WorkloadEnded(code))

    # --- how much is at risk ----------------------------------------------------------------------

    def _judge_objective(self, now: Instant) -> None:
        """Tell when the objective begins to be missed, and when it is met again; not when the lead ends."""
        before, self._objective = self._objective, judged(self._objective, self.role, now)
        if before.verdict == "none" or self._objective.verdict in ("none", before.verdict):
            return
        missed = self._objective.verdict == "missed"
        what = (
            f"the newest epoch that another node could restore is {self._objective.age_s(now):.1f} s old"
            if self._objective.epoch is not None
            else f"no other node could restore it for {self._objective.age_s(now):.1f} s"
        )
        reason = f"{what}; rpo_ms allows {self.role.spec.objective_ms / 1000:g} s"
        self._tell(LogEvent.RPO_EXCEEDED if missed else LogEvent.RPO_MET, reason)

    # --- telling ----------------------------------------------------------------------------------

    def _answer(self, number: int, answer: Done | Refused) -> None:
        future = self._answers.get(number)
        if future is not None and not future.done():
            future.set_result(answer)

    def _tell_note(self, before: str, label: str, reason: str) -> None:
        state = self.role.name
        log.info(
            "role.%s workload=%s state=%s reason=%r",
            label.replace(" ", "-"),
            self.role.spec.name,
            state,
            reason,
        )
        if state == before:
            if state == "taking_over" and self.role.timeline:
                newest = self.role.timeline[-1]
                self._tell(LogEvent.TAKEOVER_STEP, f"{newest.event}: {newest.reason}")
            return
        event = LogEvent.ROLE_CHANGED
        if state == "taking_over":
            event = LogEvent.TAKEOVER_STARTED
        elif before == "taking_over" and state in ("leading", "failed"):
            event = LogEvent.TAKEOVER_FINISHED if state == "leading" else LogEvent.TAKEOVER_FAILED
        elif state == "waiting":
            event = LogEvent.TAKEOVER_REFUSED
        self._tell(event, reason, state=state, term=self.role.record.term)

    def _tell(self, event: LogEvent, reason: str, **fields: str | int) -> None:
        self._events.append(event, workload=self.role.spec.name, reason=reason, **fields)


def _now() -> Instant:
    return Instant(time.monotonic(), time.time())


def _told_once(found: tuple[Takeover, ...]) -> tuple[BeatTakeover, ...]:
    """Return them as heartbeats have them: what is the same is said once, and nothing at length."""
    silences: dict[tuple[str, ...], tuple[Silence, ...]] = {}
    for each in found:
        missing = tuple(reason[:_REASON_CHARACTERS] for reason in each.missing[:_REASONS])
        silences[missing] = (*silences.get(missing, ()), each.silence)
    return tuple(BeatTakeover(silences=why, missing=missing) for missing, why in silences.items())
