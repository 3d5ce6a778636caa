"""The agent: captures, streams, receives, stores and restores, as its node's keeper orders.

    keeper ◀── report / orders, several times a second ──▶ agent ──┬─ leading: capture ─▶ streams
                                                                   └─ following: receiver ─▶ stores
    peers' keepers ◀── the agent's own beats

It may be killed, hang or be upgraded at any time: workloads live in containers of their own and run on,
criu ends by itself, and the keeper watches every freeze. When it starts again it finds what runs, asks the
keeper what should be, and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import structlog
import zmq.asyncio

from common.bundle import WorkloadPaths, file_roots, restore_command
from common.config import NodeConfig, Peer
from common.container import incarnation, workload_pids
from common.control import (
    AgentMetrics,
    AnnounceFreeze,
    AskStatus,
    CaptureStatus,
    CompareFiles,
    Done,
    EndFreeze,
    FilesComparison,
    Order,
    Orders,
    Refused,
    Report,
    Resync,
    Resyncing,
    VerificationProgress,
    Verify,
    Verifying,
)
from common.control_channel import ControlClient, ControlServer, ask
from common.criu.locate import locate_criu
from common.criu.rpc import spawn
from common.errors import (
    CaptureError,
    OutliveError,
    UnsupportedError,
    WorkloadError,
)
from common.events import Event, EventLog, event_file
from common.excludes import Excludes
from common.file_records import RECORDS, Record, unpack_page
from common.heap import keep_heap_small
from common.heartbeat import AgentBeater
from common.identity import PageHasher
from common.keyring import read_keyring
from common.messages import Doubt, Hello, Nack
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.origin import ORIGIN_FILE, encode_origin, read_origin
from common.private_directory import prepare_private_directory
from common.scheduling import CpuShare
from common.sd_notify import notify
from common.state_format import check_state_format
from common.terms import Leadership, TermGuard
from outlive.agent_beats import AgentBeats
from outlive.aside import Aside
from outlive.descriptors import raise_limit
from outlive.heard_terms import HeardTerms
from outlive.held_workloads import HeldWorkloads
from outlive.key_reload import reload_on_hangup
from outlive.leading import SERIES, Leading, clear_images
from outlive.store_room import prepare_store_room
from outlive.store_upkeep import StoreUpkeep
from outlive.verifying import Verifier
from outlive.workload_agent import WorkloadAgent, check_greeting
from primary.backend import BackendChoice, ChosenBackend, choose_backend
from primary.capture import CaptureBackend
from primary.dumping import Dumper
from primary.fast import FastBackend
from primary.file_backend import FrozenHook, WithFiles
from primary.file_capture import FileCapture
from primary.file_watch import FileWatch
from primary.freeze_hooks import WithHooks
from primary.freezer import Freezer
from primary.numbering import EpochNumbers
from primary.stock import StockBackend
from primary.stream import ReplicaStream, Unacknowledged
from replica.readiness import Readiness
from replica.receive import Receiver
from replica.store import EpochStore
from replica.store_reader import check_stores

log = structlog.get_logger(__name__)

_KEEPER_DEADLINE_S = 1.0
_REFUSED_PAUSE_S = 1.0
_LOOK_EVERY_S, _LATE_S, _KEEP_UP_S = 0.1, 0.5, 1.0
"""How often to look whether anything is overdue; when looking is; how long to make up for it at least."""
_OVERDUE = 0.5
"""As a share of what may be lost: half of it, and the agent no longer takes only what is spare."""
_JUDGE_EVERY_S = 5.0
_SHUTDOWN_S = 10.0


async def run_agent(config: NodeConfig, reread: Callable[[], NodeConfig], beats: AgentBeats) -> None:
    """Run the agent of this node until SIGTERM or SIGINT. Raises OutliveError if it cannot start.

    `reread` returns the file as it is at SIGHUP, for its keys; `beats` says meanwhile that it lives.
    Workloads are left running, whatever ends it.
    """
    keep_heap_small()
    raise_limit()
    share = CpuShare.take(config.node.cgroup_parent, spare=config.node.agent_cpu == "spare")
    agent = Agent(config, share, beats)
    agent.reload_keys_on_hangup(reread)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    task = asyncio.create_task(agent.run())
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        notify("STOPPING=1")
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await task
        except* OutliveError as group:
            raise group.exceptions[0] from None


class _KeeperGuard:
    """Asks the keeper to watch a freeze: no freeze without its answer."""

    def __init__(self, config: NodeConfig, workload: str) -> None:
        self._endpoint = config.keeper_endpoint
        self._workload = workload

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """See `primary.dumping.FreezeGuard`."""
        request = AnnounceFreeze(workload=self._workload, criu_pid=criu_pid, deadline_ms=deadline_ms)
        try:
            answer = await ask(self._endpoint, request, _KEEPER_DEADLINE_S)
        except OutliveError as error:
            raise CaptureError(
                f"no keeper answers, and nothing is frozen without its thaw deadline: {error.message}",
                hint="start it: systemctl start outlive-keeper",
            ) from error
        if not isinstance(answer, Done):
            raise CaptureError(f"the keeper refuses to watch the freeze: {answer}")

    async def end(self, criu_pid: int) -> None:
        """See `primary.dumping.FreezeGuard`."""
        request = EndFreeze(workload=self._workload, criu_pid=criu_pid)
        with contextlib.suppress(OutliveError):
            await ask(self._endpoint, request, _KEEPER_DEADLINE_S)


class Agent:
    """Everything the agent holds: one `WorkloadAgent` a workload, one receiver, one line to the keeper."""

    def __init__(self, config: NodeConfig, share: CpuShare, beats: AgentBeats) -> None:
        """Find criu, load the keys, make the directories.

        Raises UnsupportedError, AuthError, ConfigError; StoreError if what is on disk is of another version.
        """
        self._config = config
        self._share = share
        self._beats = beats
        prepare_private_directory(Path(config.node.state_dir), "node.state_dir")
        check_state_format(Path(config.node.state_dir))
        self._criu = locate_criu(Path(config.node.criu) if config.node.criu else None)
        self._keys = read_keyring(config)
        self._hasher = PageHasher()
        self._events = EventLog(event_file(config), "agent")
        self._readiness = Readiness(config)
        self._workloads = HeldWorkloads(config, self._make_workload)
        self._upkeep = StoreUpkeep(self._workloads.all, config.store_dir, self._events)
        self._aside = Aside(config, restore_command=self._restore_command)
        self._heard = HeardTerms(Path(config.node.state_dir) / "heard-terms")
        self._guard = TermGuard(self._heard.record, self._heard.read_all())
        self._attachments: dict[str, bytes] = {}
        self._choice = BackendChoice(None, "not chosen yet")
        self._keeper_lost = False
        self._context = zmq.asyncio.Context()
        self._receiver = Receiver(
            self._context,
            config,
            self._keys,
            stores=lambda name: self._workloads[name].store,
            guard=self._guard,
            accept=self._accept,
            readiness=lambda name, record: self._workloads[name].judge(record),
            restore_command=self._restore_command,
            on_refused=lambda _, reason: self._events.append(Event.PEER_REFUSED, reason=reason),
            on_not_committed=self._note_not_committed,
            on_doubt=self._note_doubt,
        )

    def _restore_command(self, spec: WorkloadSpec) -> tuple[str, ...]:
        return restore_command(spec, WorkloadPaths(self._config, spec.name), str(self._criu))

    def reload_keys_on_hangup(self, reread: Callable[[], NodeConfig]) -> None:
        """Have SIGHUP read the keys again. Call it in the agent's loop."""
        reload_on_hangup(self._keys, reread, self._events, then=self._beats.reload_keys)

    async def run(self) -> None:
        """Serve until cancelled."""
        # First of all the socket: a second agent by mistake ends here, before it touches the images.
        control = ControlServer(self._context, self._config.agent_endpoint, self._answer)
        self._beats.begin()
        await asyncio.to_thread(prepare_store_room, self._config)
        await asyncio.to_thread(check_stores, self._config.store_dir)
        await asyncio.to_thread(self._aside.clear_up)
        images = Path(self._config.node.image_dir)
        prepare_private_directory(images, "node.image_dir")
        await asyncio.to_thread(clear_images, images)
        version = await (await spawn(self._criu)).version()
        criu_version = str(version)
        self._choice = await asyncio.to_thread(choose_backend, self._config.capture, version)
        self._attachments = {ORIGIN_FILE: encode_origin(read_origin(criu_version))}
        self._events.append(Event.AGENT_STARTED, reason=f"CRIU {criu_version}, PID {os.getpid()}")
        log.info("agent.started", node=self._config.node.name, criu=criu_version)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(control.serve())
                group.create_task(self._receiver.run())
                group.create_task(self._beat_for_ever())
                group.create_task(self._report_for_ever())
                group.create_task(self._upkeep.run())
                group.create_task(self._judge_for_ever())
                group.create_task(self._keep_up_for_ever())
                notify("READY=1")
        finally:
            self._beats.end()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_S):
                    await self._workloads.close()
            self._events.append(Event.AGENT_STOPPED, reason="workloads run on, unprotected")
            self._events.close()
            control.close()
            self._context.destroy(linger=0)

    async def _beat_for_ever(self) -> None:
        """Beat in this process if the one that does it has ended: late is better than never."""
        await self._beats.ended()
        log.error("beats.lost", error="the process that sends this agent's heartbeats has ended")
        await AgentBeater(self._config, self._keys, self._context).run()

    async def _report_for_ever(self) -> None:
        """Tell the keeper what is, take its orders; at its heartbeat's interval."""
        interval_s = self._config.heartbeat.interval_ms / 1000
        keeper = ControlClient(self._config.keeper_endpoint, self._context)
        while True:
            reports = tuple(workload.report() for workload in self._workloads.all())
            try:
                answer = await keeper.ask(
                    Report(agent_pid=os.getpid(), workloads=reports), _KEEPER_DEADLINE_S
                )
            except OutliveError as error:
                if not self._keeper_lost:
                    log.error("keeper.silent", error=str(error))
                self._keeper_lost = True
                await asyncio.sleep(interval_s)
                continue
            if self._keeper_lost:
                log.info("keeper.heard")
            self._keeper_lost = False
            if isinstance(answer, Orders):
                for order in answer.orders:
                    await self._pass_on(order)
                self._workloads.drop_unwanted({order.workload for order in answer.orders})
            elif isinstance(answer, Refused):
                log.error("keeper.refused", message=answer.message)
                await asyncio.sleep(_REFUSED_PAUSE_S)
            notify("WATCHDOG=1")
            await asyncio.sleep(interval_s)

    async def _pass_on(self, order: Order) -> None:
        """Hand an order to its workload. One workload's trouble is logged, and stops no other."""
        workload = self._workloads.get(order.workload)
        try:
            if workload is None:
                if order.spec is None:
                    return
                workload = await self._workloads.take_up(order.spec)
            heard = Leadership(order.term, order.leader)
            if order.term > 0 and order.leader and self._guard.newest(order.workload) != heard:
                await asyncio.to_thread(self._guard.advance, order.workload, order.term, order.leader)
        except (OutliveError, OSError) as error:
            log.error("order.not_taken", workload=order.workload, number=order.number, error=str(error))
            if workload is None or order.role == "lead":
                return  # an order to end it is obeyed in any case
        workload.obey(order)

    def _make_workload(self, spec: WorkloadSpec, store: EpochStore) -> WorkloadAgent:
        workload = WorkloadAgent(
            self._config,
            spec,
            criu=self._criu,
            store=store,
            readiness=self._readiness,
            make_leading=self._make_leading,
            share=self._share,
            end_session=self._receiver.end_session,
            events=self._events,
            aside=self._aside,
        )
        workload.leader_run = self._heard.read_run(spec.name)
        return workload

    async def _accept(self, hello: Hello) -> None:
        """Say whether the greeting node may send epochs of a workload; raises if not."""
        name = hello.workload
        workload = self._workloads.get(name)
        if workload is None:
            check_greeting(hello, self._config.node.name)
            workload = await self._workloads.take_up(hello.spec, learned=True)
        workload.accept(hello)
        await asyncio.to_thread(self._heard.record_run, name, hello.incarnation)

    def _note_not_committed(self, name: str, nack: Nack) -> None:
        workload = self._workloads.get(name)
        if workload is not None:  # else it was let go of meanwhile
            workload.not_committed(nack)

    def _note_doubt(self, name: str, doubt: Doubt) -> None:
        workload = self._workloads.get(name)
        if workload is not None:
            workload.doubted(doubt)

    def _make_leading(self, workload: WorkloadAgent, term: int, init_pid: int) -> Leading:
        spec = workload.spec
        run = incarnation(self._config, spec.name)
        paths = WorkloadPaths(self._config, spec.name)
        newest = workload.store.newest
        verifier = Verifier(spec.name, self._config.capture.verify_epochs, self._events)
        freezer = Freezer(paths.cgroup)
        abandoned_ms: deque[float] = deque(maxlen=SERIES)
        backend, status = self._make_backend(
            spec,
            run.id if run is not None else "unknown",
            init_pid,
            verifier,
            freezer,
            abandoned_ms.append,
            self._make_files(spec, workload.store, run.restored if run is not None else None),
        )
        return Leading(
            self._config,
            spec,
            term=term,
            incarnation=run.id if run is not None else "unknown",
            backend=backend,
            numbers=EpochNumbers(paths.state / "epoch-mark", at_least=newest.id.epoch if newest else 0),
            make_stream=partial(
                self._make_stream, spec, term, run.id if run is not None else "unknown", verifier
            ),
            events=self._events,
            verifier=verifier,
            freezer=freezer,
            capture_status=status,
            abandoned_ms=abandoned_ms,
        )

    def _make_backend(
        self,
        spec: WorkloadSpec,
        run: str,
        init_pid: int,
        verifier: Verifier,
        freezer: Freezer,
        on_abandoned: Callable[[float], None],
        files: FileCapture | None,
    ) -> tuple[CaptureBackend, Callable[[], CaptureStatus]]:
        """Return what captures, and what tells how."""
        hook = FrozenHook()

        def dumper(*, with_shim: bool) -> Dumper:
            return Dumper(
                self._config,
                spec,
                init_pid=init_pid,
                criu=self._criu,
                guard=_KeeperGuard(self._config, spec.name),
                share=self._share,
                attachments=self._attachments,
                with_shim=with_shim,
                freezer=freezer,
                on_abandoned=on_abandoned,
                at_frozen=hook,
            )

        def fast() -> FastBackend:
            return FastBackend(
                self._config,
                dumper(with_shim=True),
                workload=spec.name,
                incarnation=run,
                hasher=self._hasher,
                verification=verifier.memory,
                tracker=self._choice.tracker,
            )

        stock = StockBackend(
            dumper(with_shim=False), workload=spec.name, incarnation=run, hasher=self._hasher
        )
        memory = ChosenBackend(
            None if self._choice.tracker is None else fast,
            stock,
            self._choice,
            on_change=lambda name, reason: self._events.append(
                Event.CAPTURE_BACKEND, workload=spec.name, reason=f"{name}: {reason}"
            ),
        )
        backend: CaptureBackend = memory if files is None else WithFiles(memory, files, hook)
        for hooks in self._config.freeze_hooks:
            if hooks.workload == spec.name:
                backend = WithHooks(backend, hooks)
        if files is None:
            return backend, memory.status
        return backend, lambda: msgspec.structs.replace(memory.status(), files_scanned=files.scanned)

    def _make_files(
        self, spec: WorkloadSpec, store: EpochStore, restored: EpochId | None
    ) -> FileCapture | None:
        """Make what captures the workload's files; None if none are replicated."""
        roots = file_roots(spec, WorkloadPaths(self._config, spec.name))
        if not roots:
            return None
        watch: FileWatch | None = None
        try:
            watch = FileWatch(list(roots.values()))
        except UnsupportedError as error:
            log.warning("capture.files_not_watched", workload=spec.name, reason=error.message)
        return FileCapture(
            roots,
            hasher=self._hasher,
            layers=Path(self._config.node.image_dir) / spec.name,
            pids=lambda: workload_pids(self._config, spec.name),
            watch=watch,
            excludes=Excludes(spec.exclude),
            adopt=partial(_records_of, store, restored),
            on_missed=lambda what: self._events.append(
                Event.FILES_NOT_REPORTED, workload=spec.name, reason=f"nothing was reported of it: {what}"
            ),
        )

    def _make_stream(
        self,
        spec: WorkloadSpec,
        term: int,
        run: str,
        verifier: Verifier,
        peer: Peer,
        on_acknowledged: Callable[[EpochId], None],
        on_left: Callable[[Unacknowledged], None],
    ) -> ReplicaStream:
        return ReplicaStream(
            self._context,
            node=self._config.node.name,
            keys=self._keys,
            peer=peer,
            spec=spec,
            term=term,
            incarnation=run,
            secret=self._hasher.secret,
            on_acknowledged=on_acknowledged,
            on_left=on_left,
            verification=verifier.store_of(peer.name),
        )

    async def _keep_up_for_ever(self) -> None:
        """Ask for some of the processors' time while an epoch is overdue, or everything here is late."""
        quarter_until_s = fair_until_s = 0.0
        while True:
            begun_s = time.monotonic()
            self._beats.gets_on()
            await asyncio.sleep(_LOOK_EVERY_S)
            now_s = time.monotonic()
            receiving = self._receiver.receiving
            late = now_s - begun_s > _LATE_S
            ages = [each.age_of_objective(each.spec.name in receiving) for each in self._workloads.all()]
            oldest = max(ages, default=0.0)
            if late or oldest > _OVERDUE:
                quarter_until_s = now_s + _KEEP_UP_S
            if oldest > 1:
                fair_until_s = now_s + _KEEP_UP_S
            self._share.need(
                "fair" if now_s < fair_until_s else "quarter" if now_s < quarter_until_s else "spare"
            )

    async def _judge_for_ever(self) -> None:
        """Ask again whether what is stored could be restored: the node changes, not only the epochs."""
        while True:
            await asyncio.sleep(_JUDGE_EVERY_S)
            for workload in self._workloads.all():
                newest = workload.store.newest
                try:
                    if newest is not None and workload.follows:
                        restorable, reasons = await workload.judge(newest)
                        await self._receiver.readiness_changed(workload.spec.name, restorable, reasons)
                    await workload.look_aside()
                except (OutliveError, OSError) as error:
                    log.error("judge.failed", workload=workload.spec.name, error=str(error))

    async def _answer(
        self, request: object
    ) -> AgentMetrics | Resyncing | Verifying | FilesComparison | Refused:
        """Answer the command line and the benchmarks."""
        if isinstance(request, Resync):
            return self._resync(request)
        if isinstance(request, Verify):
            return self._verify(request)
        if isinstance(request, CompareFiles):
            return self._compare_files(request)
        if not isinstance(request, AskStatus):
            return Refused(error="ProtocolError", message="the agent takes orders from its keeper only")
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        metrics = [workload.metrics() for workload in self._workloads.all()]
        return AgentMetrics(
            node=self._config.node.name,
            pid=os.getpid(),
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            cpu_s=sum(each.ru_utime + each.ru_stime for each in usage),
            workloads=tuple(each for each in metrics if each is not None),
        )

    def _verify(self, request: Verify) -> Verifying | Refused:
        before: dict[str, tuple[VerificationProgress, ...]] = {}
        for workload in self._workloads.all():
            name = workload.spec.name
            if request.workload in ("", name) and (progress := workload.verify()):
                before[name] = progress
        if before:
            return Verifying(before=before)
        what = request.workload or "any workload"
        return Refused(
            error="WorkloadError",
            message=f"{self._config.node.name} does not lead {what} with a replica that is connected",
            hint="outlive status: give this order on the primary, while a replica is connected",
        )

    def _compare_files(self, request: CompareFiles) -> FilesComparison:
        workload = self._workloads.get(request.workload)
        if workload is None:
            raise WorkloadError(
                f"{self._config.node.name} knows no workload {request.workload!r}", hint="outlive status"
            )
        return workload.compare_files(begin=request.begin)

    def _resync(self, request: Resync) -> Resyncing | Refused:
        since: dict[str, EpochId | None] = {}
        for workload in self._workloads.all():
            name = workload.spec.name
            if request.workload in ("", name) and workload.resync(request.node, full=request.full):
                since[name] = workload.report().captured
        if since:
            return Resyncing(since=since)
        what = request.workload or "no workload that this node leads"
        return Refused(
            error="WorkloadError",
            message=f"{request.node} does not receive epochs of {what} from {self._config.node.name} now",
            hint="outlive status: give this order on the primary, while its replica is connected",
        )


def _records_of(store: EpochStore, epoch: EpochId | None) -> list[Record]:
    """Return what an epoch in the store says of files; nothing if it is not there."""
    if epoch is None:
        return []
    try:
        with store.files_of(epoch) as files:
            blocks = files.read(RECORDS, files.pages(RECORDS))
            return [
                record
                for block in blocks
                for at in range(0, len(block), PAGE_BYTES)
                for record in unpack_page(block[at : at + PAGE_BYTES])
            ]
    except OutliveError as error:
        log.warning("capture.files_begin_anew", epoch=str(epoch), reason=error.message)
        return []
