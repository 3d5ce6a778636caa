"""One workload on one node, as its agent handles it: carries out the keeper's orders, one at a time.

In: orders (what should be), epochs that a leader sends, the state of the container. Out: a report (what
is). Orders are level-triggered: `obey` may be called with the same order for ever. An order that starts
or restores is carried out once, also if the agent is restarted in between: the incarnation says which
order it came from.

What this file never decides: who leads. It starts and restores only on order, and kills on order.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from common.bundle import WorkloadPaths, file_roots
from common.config import NodeConfig, workload_problems
from common.container import (
    cgroup_frozen,
    exit_code,
    incarnation,
    kill_workload,
    mark_up,
    restore_workload,
    running_init_pid,
    start_workload,
    stop_workload,
    thaw_cgroup,
)
from common.control import FilesComparison, Order, VerificationProgress, WorkloadMetrics, WorkloadReport
from common.errors import (
    CaptureError,
    OutliveError,
    ProtocolError,
    RestoreError,
    StaleTermError,
    WorkloadError,
)
from common.events import Event, EventLog
from common.excludes import Excludes
from common.heartbeat import read_boot_id
from common.messages import Doubt, Hello, Nack
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.scheduling import CpuShare
from common.threads import in_thread
from outlive.aside import Aside
from outlive.followed_files import FollowedFiles, state_file
from outlive.leading import Leading
from outlive.unacknowledged import UnacknowledgedEpochs
from replica.file_tree import FileTree
from replica.readiness import Readiness, ReadinessVerdict
from replica.store import EpochStore
from replica.store_reader import EpochRecord

log = structlog.get_logger(__name__)

_STOP_GRACE_S = 10.0
"""From SIGTERM to SIGKILL; the keeper kills by itself after 15 s."""
_FAILURE_TOLD_S = 60.0
"""How long a leader is told that a restore failed here: who gave it back wants to know why."""
_SAID_WITHIN_S = 0.5
"""Within this the keeper has answered a report with its newest order."""
_AGAIN_S = 1.0
"""How long to wait before capturing is begun again that broke or could not be begun."""

MakeLeading = Callable[["WorkloadAgent", int, int], Leading]
"""Makes the capture loop of a workload for a term and the PID of the container's first process."""


def check_greeting(hello: Hello, here: str) -> None:
    """Raise ProtocolError if a peer sends a workload that cannot be, or is none of its or of this node's.

    Before anything is kept of it: the keeper hears of what is kept, and has it on its disk from then on.
    """
    node, spec = hello.node, hello.spec
    if node not in spec.nodes or here not in spec.nodes:
        raise ProtocolError(
            f"{spec.name} is declared for {', '.join(spec.nodes)}: {node} cannot send it to {here}",
            hint="the `nodes` of the workload and the names of the peers must agree",
        )
    for problem in workload_problems(spec, set(spec.nodes)):
        raise ProtocolError(f"{node} sends {spec.name} with a declaration that cannot be: {problem}")


class WorkloadAgent:
    """What the agent knows and does of one workload."""

    def __init__(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        *,
        criu: Path,
        store: EpochStore,
        readiness: Readiness,
        make_leading: MakeLeading,
        share: CpuShare,
        end_session: Callable[[str, str], None],
        events: EventLog,
        aside: Aside,
    ) -> None:
        """`end_session` ends what a leader is sending of the workload, and says why."""
        self.spec = spec
        self.store = store
        self._config = config
        self._criu = criu
        self._readiness = readiness
        self._make_leading = make_leading
        self._share = share
        self._end_session = end_session
        self._events = events
        self._unacknowledged = UnacknowledgedEpochs(aside, lambda: self.spec, events)
        self._files = FollowedFiles(spec.name, store, self._make_tree, self._tell_altered)
        self._order: Order | None = None
        self._done = 0
        self._failed = 0
        self._detail = ""
        self._handed_over: EpochId | None = None
        self._given_up: asyncio.Task[None] | None = None
        """A handing over that was cancelled."""
        self._restore_failed = ("", 0.0)
        """Why the last restore failed, and until when (monotonic) that is told."""
        self._restorable = False
        self._reasons: tuple[str, ...] = ("no epoch is stored here yet",)
        self._refused: tuple[EpochId | None, str] = (None, "")
        """Newest epoch here when a later one could not be stored, and why it could not."""
        self._leading: Leading | None = None
        self._leading_task: asyncio.Task[None] | None = None
        self._carrying: asyncio.Task[None] | None = None
        self._told = False
        """What runs here was started, restored or found, and that was told."""
        self._doubted = False
        self.leader_run = ""
        """Incarnation that the leader greeted with last; empty: not known."""
        self.learned = False
        """A leader sent it, and no order has named it since."""
        self._newest_order = 0
        """Number of the keeper's newest order, which waits until the one under way is carried out."""
        self._greeted = False
        """A leader has sent its declaration since this node led last: no order of a follower is newer."""

    # --- what the keeper says ---------------------------------------------------------------------

    def obey(self, order: Order) -> None:
        """Take the keeper's order and see that it is, or is being, carried out. Never blocks."""
        self.learned = False
        self._newest_order = order.number
        newly = self._order is None or order.number != self._order.number
        if order.role == "lead":
            self._greeted = False
        if order.spec is not None and (order.role == "lead" or (newly and not self._greeted)):
            self.spec = order.spec
        if self._carrying is not None and not self._carrying.done():
            handing = self._order is not None and self._order.action == "hand_over"
            if newly and handing and self._carrying is not self._given_up:
                self._given_up = self._carrying  # once: it has to clean up undisturbed
                self._carrying.cancel()
            return  # one at a time; the next report brings the newest order again
        if newly:
            self._order = order
            self._carrying = asyncio.create_task(self._carry_out(order))
            return
        self._look_after(order)

    async def close(self) -> None:
        """Stop capturing and whatever is under way; the workload is left as it is."""
        if self._carrying is not None and not self._carrying.done():
            # A start or restore that is cut off would be taken for a failed one: let it end.
            await asyncio.wait([self._carrying])
        await self._stop_leading()
        await self._unacknowledged.close()
        await self._files.close()
        self._readiness.forget(self.spec.name)
        await in_thread(self.store.close)  # it waits for a fold, which may be at a sync

    # --- what the leader of another node says -----------------------------------------------------

    def accept(self, hello: Hello) -> None:
        """Let the greeting node send epochs, or raise: ProtocolError, StaleTermError."""
        spec, here = hello.spec, self._config.node.name
        check_greeting(hello, here)
        if self._order is not None and self._order.role == "lead":
            raise StaleTermError(f"{here} leads {spec.name} itself, in term {self._order.term}")
        if running_init_pid(self._config, spec.name) is not None:
            raise StaleTermError(f"{spec.name} still runs on {here}, so {here} cannot be its replica yet")
        self.spec, self._greeted = spec, True
        self.leader_run = hello.incarnation

    def not_committed(self, nack: Nack) -> None:
        """Show why this node's store takes no epochs, until it has taken one."""
        if nack.code in ("no-space", "store"):
            newest = self.store.newest
            reason = f"epoch {nack.epoch} could not be stored here: {nack.reason}"
            self._refused = (newest.id if newest is not None else None, reason)

    @property
    def follows(self) -> bool:
        """Whether this node is a replica of the workload, or was never told what else to be."""
        return (self._order is None or self._order.role == "follow") and running_init_pid(
            self._config, self.spec.name
        ) is None

    async def judge(self, record: EpochRecord) -> tuple[bool, tuple[str, ...]]:
        """Say whether a committed epoch could be restored here now, and why not, or why one could not be."""
        verdict = await self._ask_readiness(record)
        if record.file_pages and self.follows and self.leader_run == record.incarnation:
            self._files.follow(record.id)  # not to what was before this node led: that would undo its last
        if reason := self._file_obstacle(record):
            verdict = ReadinessVerdict(False, (*verdict.reasons, reason))
        if verdict.restorable != self._restorable or (verdict.reasons != self._reasons and verdict.reasons):
            self._events.append(
                Event.REPLICA_RESTORABLE if verdict.restorable else Event.REPLICA_NOT_RESTORABLE,
                workload=self.spec.name,
                reason=f"epoch {record.id}: " + ("; ".join(verdict.reasons) or "ready to be restored here"),
            )
        self._restorable, self._reasons = verdict.restorable, verdict.reasons
        failure, until_s = self._restore_failed
        reasons = (*verdict.reasons, failure) if time.monotonic() < until_s else verdict.reasons
        if doubt := self._doubt_about(record):
            return False, (*reasons, doubt)
        if self._doubted:
            self._doubted = False
            reason = f"epoch {record.id} is here, and stands on nothing that was in doubt"
            self._events.append(Event.VERIFY_MENDED, workload=self.spec.name, reason=reason)
        return verdict.restorable, reasons

    def _file_obstacle(self, record: EpochRecord) -> str:
        """Say what stands against the files of a committed epoch here; empty: nothing does."""
        if not record.file_pages:
            return ""
        if self._files.problem:
            return f"its files are not as {record.id} says: {self._files.problem}"
        if self.follows and self.leader_run == record.incarnation and self._files.laid_out is None:
            return "its files are being laid out here, for the first time since this node follows"
        return ""

    def doubted(self, doubt: Doubt) -> None:
        """Tell that a leader found something else to be stored here than it captured."""
        if self._doubted:
            return  # it was told, and is not mended yet
        self._doubted = True
        reason = f"{doubt.reason}: nobody takes over with it unasked, and everything is sent anew"
        self._events.append(Event.VERIFY_DOUBTED, workload=self.spec.name, reason=reason)

    def _doubt_about(self, record: EpochRecord) -> str:
        why = self.store.doubt_about(record.id)
        return f"{record.id} is in doubt: {why}" if why else ""

    async def _ask_readiness(self, record: EpochRecord) -> ReadinessVerdict:
        if self.leader_run not in ("", record.incarnation):
            return ReadinessVerdict(
                False,
                (f"epoch {record.id} is of an earlier run of {self.spec.name}, none of the present one",),
            )
        try:
            return await self._readiness.check(self.spec, record.path, record.pages * PAGE_BYTES)
        except (OSError, ValueError) as error:
            return ReadinessVerdict(False, (f"whether it could be restored cannot be told: {error}",))

    # --- what is ----------------------------------------------------------------------------------

    def report(self) -> WorkloadReport:
        """Return how things stand, for the keeper."""
        name = self.spec.name
        pid = running_init_pid(self._config, name)
        run = incarnation(self._config, name)
        newest = self.store.newest
        stored = newest.id if newest is not None else None
        newest_when_refused, refusal = self._refused
        refused = (refusal,) if refusal and newest_when_refused == stored else ()
        leading = self._leading
        return WorkloadReport(
            name=name,
            spec=self.spec,
            learned=self.learned,
            running=pid is not None,
            init_pid=pid or 0,
            incarnation=run.id if run is not None else "",
            restored=run.restored if run is not None else None,
            exit_code=exit_code(self._config, name) if pid is None else None,
            stored=stored,
            stored_wall_s=newest.frozen_wall_s if newest is not None else None,
            restorable=newest is not None and self._restorable,
            reasons=(*self._reasons, *refused),
            capture=leading.capture_status() if leading is not None else None,
            captured=leading.captured if leading is not None else None,
            capture_failures=leading.failures if leading is not None else 0,
            replicas=leading.progress() if leading is not None else (),
            verification=leading.verification() if leading is not None else (),
            doubt=self._doubt_about(newest) if newest is not None else "",
            order_done=self._done,
            order_failed=self._failed,
            handed_over=self._handed_over,
            order_detail=self._detail,
            volatile=self.store.volatile,
            aside=self._unacknowledged.kept,
        )

    async def look_aside(self) -> None:
        """See again which epochs of it lie aside, for the reports. Raises StoreError."""
        await self._unacknowledged.look()

    def age_of_objective(self, receiving: bool) -> float:
        """Return how old the newest epoch is, as a share of what may be lost; `receiving`: a leader sends.

        0 if none is due.

        By the wall clocks: one that is wrong costs the workloads some time on the processors, no more.
        """
        if self._leading is not None:
            connected = [each for each in self._leading.progress() if each.connected]
            newest = max((each.acknowledged_wall_s or 0.0 for each in connected), default=None)
        elif receiving:
            newest = self.store.newest.frozen_wall_s if self.store.newest is not None else 0.0
        else:
            newest = None
        return 0.0 if newest is None else (time.time() - newest) / (self.spec.objective_ms / 1000)

    def resync(self, node: str, *, full: bool) -> bool:
        """See `Leading.resync`; False if this node does not lead."""
        return self._leading is not None and self._leading.resync(node, full=full)

    def verify(self) -> tuple[VerificationProgress, ...] | None:
        """See `Leading.verify`; None if this node does not lead."""
        return self._leading.verify() if self._leading is not None else None

    def compare_files(self, *, begin: bool) -> FilesComparison:
        """Say how a comparison of the directories with their epoch stands. Raises WorkloadError."""
        here, name = self._config.node.name, self.spec.name
        if not file_roots(self.spec, WorkloadPaths(self._config, name)):
            raise WorkloadError(f"{name} declares no files that are replicated", hint="outlive config show")
        if begin:
            if not self.follows:
                raise WorkloadError(
                    f"{here} leads {name}: it changes its files itself", hint="give this order on a standby"
                )
            if self._files.laid_out is None:
                raise WorkloadError(
                    f"the files of {name} are not laid out on {here} since it follows",
                    hint="outlive status says why, once an epoch of its leader has come",
                )
            self._files.compare()
        return self._files.comparison

    def metrics(self) -> WorkloadMetrics | None:
        """Return what was measured while leading; None if this node doesn't."""
        return self._leading.metrics() if self._leading is not None else None

    # --- carrying out -----------------------------------------------------------------------------

    async def _carry_out(self, order: Order) -> None:
        try:
            with self._share.claimed():
                detail = await self._achieve(order)
        except OutliveError as error:
            self._fail(order, str(error))
            log.error("order.failed", workload=order.workload, order=order.number, error=str(error))
        except Exception as error:  # whatever it is, the keeper must hear that it was not done
            self._fail(order, f"a defect in Outlive, or its host: {error!r}")
            log.exception("order.failed", workload=order.workload, order=order.number)
        else:
            self._done, self._detail = order.number, detail
            log.info("order.done", workload=order.workload, order=order.number, detail=detail)

    def _fail(self, order: Order, reason: str) -> None:
        self._failed, self._detail = order.number, reason
        if order.action == "restore":
            self._restore_failed = (f"a restore failed here: {reason}", time.monotonic() + _FAILURE_TOLD_S)
        if order.action in ("start", "restore"):
            self._events.append(Event.WORKLOAD_FAILED, workload=order.workload, reason=reason)

    async def _achieve(self, order: Order) -> str:
        """Bring about what the order says; return a sentence about it."""
        name = self.spec.name
        self._handed_over = None
        if order.role == "keep":
            await self._stop_leading()
            return f"{name} is left as it is"
        if order.role != "lead":
            await self._stop_leading()
            try:
                return await self._end_here(order)
            finally:
                if order.role == "follow":
                    self._unacknowledged.superseded(order.term, order.leader)
        await self._files.leave()
        pid, run = running_init_pid(self._config, name), incarnation(self._config, name)
        ours = run is not None and run.order == order.number
        interrupted = ours and run is not None and not run.came_up
        # Made, and not seen to run: perhaps nothing executes. If its keeper died too, the number is another.
        unstarted = run is not None and not run.came_up and run.restored is None
        if pid is not None and not ((interrupted or unstarted) and order.action == "start"):
            if not unstarted or order.action != "none":  # else it is to be started next, or was long ago
                mark_up(self._config, name)
            if not self._told:
                self._tell_up(Event.WORKLOAD_FOUND, f"PID {pid}, led in term {order.term}")
            if order.action == "hand_over":
                return await self._hand_over(order.heir)
            if self._leading is not None and self._leading.handed_over:  # and it was taken back
                await self._stop_leading()
            if cgroup_frozen(self._config, name):  # by an agent that died while it handed it over
                thaw_cgroup(self._config, name)
            return f"{name} runs (PID {pid})"
        self._end_session(name, f"{self._config.node.name} leads {name} itself, in term {order.term}")
        if order.action == "none" or (ours and not interrupted):
            return f"{name} does not run"
        if order.action == "hand_over":  # it ended meanwhile, and another node may take over because of that
            raise CaptureError(f"{name} does not run: nothing of it can be handed over")
        if pid is not None:  # it was made, but an agent that died did not see it start
            await kill_workload(self._config, name)
        if order.action == "restore":
            return await self._restore(order)
        if file_roots(self.spec, WorkloadPaths(self._config, name)):
            await self._files.begin()
        pid = await start_workload(self._config, self.spec, order=order.number)
        self._tell_up(Event.WORKLOAD_STARTED, f"fresh, PID {pid}")
        return f"{name} was started (PID {pid})"

    async def _end_here(self, order: Order) -> str:
        """End what runs here and is not to."""
        name = self.spec.name
        if running_init_pid(self._config, name) is None:
            await kill_workload(self._config, name)  # an agent before this one may have begun to bring it up
            return f"{name} does not run here"
        if order.role == "idle":
            await stop_workload(self._config, name, _STOP_GRACE_S)
        else:  # it runs without a right: no time to be gentle
            await kill_workload(self._config, name)
        reason = "it was to be stopped" if order.role == "idle" else f"{order.leader} leads it"
        self._events.append(Event.WORKLOAD_KILLED, workload=name, reason=reason)
        return f"{name} was ended here"

    async def _hand_over(self, heir: str) -> str:
        """Have it stand still from its last epoch on, which the heir has committed."""
        if self._leading is None:
            raise CaptureError(f"{self.spec.name} is not captured at the moment")
        self._handed_over = await self._leading.hand_over(heir)
        return f"epoch {self._handed_over} is the last one, and {heir} has it"

    async def _restore(self, order: Order) -> str:
        """Restore the newest committed epoch, or else the one before it (of the same run), if that may be."""
        newest = self.store.newest
        if newest is None:
            raise RestoreError(
                f"no committed epoch of {self.spec.name} is stored here", hint="outlive store list"
            )
        if order.newest_only and newest.last is False:
            raise RestoreError(
                f"the epoch with which {self.spec.name} was handed over is not stored here any more:"
                f" the newest is {newest.id}",
                hint="outlive store list; the node that handed it over takes it back",
            )
        records = self.store.records()[::-1]
        candidates = [each for each in records if each.incarnation == newest.incarnation]
        if not self.store.doubt_about(newest.id):  # else an operator has decided to take what there is
            candidates = [each for each in candidates if not self.store.doubt_about(each.id)]
        failure: RestoreError | None = None
        for record in candidates[: 1 if order.newest_only else 2]:
            if failure is not None and await self._is_superseded(order):
                break  # the keeper has killed what was being restored
            try:
                if record.file_pages:
                    await self._files.bring_to(record.id)
                with self.store.hold():
                    pid = await restore_workload(
                        self._config, self.spec, record.path, record.id, self._criu, order=order.number
                    )
            except RestoreError as error:
                failure = error
                log.error("restore.failed", workload=self.spec.name, epoch=str(record.id), error=str(error))
                continue
            detail = f"epoch {record.id} was restored (PID {pid})"
            if failure is not None:
                detail += f", an older one, because the newest could not be: {failure.message}"
            self._tell_up(Event.WORKLOAD_RESTORED, detail)
            return detail
        assert failure is not None  # noqa: S101 - the loop ran at least once
        raise failure

    def _tell_altered(self, reason: str) -> None:
        log.error("files.altered", workload=self.spec.name, reason=reason)
        self._events.append(Event.FILES_ALTERED, workload=self.spec.name, reason=reason)

    def _make_tree(self) -> FileTree:
        paths = WorkloadPaths(self._config, self.spec.name)
        paths.state.mkdir(parents=True, exist_ok=True)
        return FileTree(
            file_roots(self.spec, paths),
            state_file(paths.state),
            excludes=Excludes(self.spec.exclude),
            boot_id=lambda: read_boot_id(self._config),
        )

    async def _is_superseded(self, order: Order) -> bool:
        """Tell whether the keeper wants something else by now; it is given the time to say so."""
        await asyncio.sleep(_SAID_WITHIN_S)
        return self._newest_order != order.number

    def _tell_up(self, event: Event, reason: str) -> None:
        self._told = True
        self._events.append(event, workload=self.spec.name, reason=reason)

    def _look_after(self, order: Order) -> None:
        """See that the capture loop runs exactly while the workload runs here and this node leads."""
        pid = running_init_pid(self._config, self.spec.name) if order.role == "lead" else None
        run = incarnation(self._config, self.spec.name)
        current = self._leading
        fits = (
            current is not None
            and pid is not None
            and run is not None
            and current.incarnation == run.id
            and current.term == order.term
            and current.spec == self.spec
        )
        if fits and self._leading_task is not None and not self._leading_task.done():
            return
        if current is not None:
            self._carrying = asyncio.create_task(self._stop_leading())
        elif pid is not None and (self._leading_task is None or self._leading_task.done()):
            self._leading_task = asyncio.create_task(self._lead(order.term, pid))

    async def _lead(self, term: int, pid: int) -> None:
        """Capture until cancelled. Whatever breaks, ends here: an order to end the workload must not."""
        self._unacknowledged.forget()
        try:
            leading = self._leading = self._make_leading(self, term, pid)
            try:
                await leading.run()
            finally:
                self._unacknowledged.hold(term, leading.take_unacknowledged())
        except Exception:
            log.exception("leading.failed", workload=self.spec.name)
            await asyncio.sleep(_AGAIN_S)  # begun again by the next report

    async def _stop_leading(self) -> None:
        task, self._leading_task = self._leading_task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._leading = None
