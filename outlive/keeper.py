"""The keeper: one small process a node that decides who runs what, and never does heavy work.

    agent ── reports, freezes ──▶ ┐                           ┌──▶ address, processes, fences, term files
    operator ── requests ───────▶ ├─▶ role machine (one a ───▶├──▶ orders, in the answer to each report
    peers ── heartbeats ────────▶ ┘   workload, pure)         └──▶ heartbeats to every peer

It holds no bulk data, has a ZeroMQ context of its own and its memory locked, and works while the agent is
dead. When it ends, workloads run on; when it starts again it finds its terms on disk and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from common.config import NodeConfig
from common.container import bring_inside, refuse_unknown, thaw_cgroup
from common.control import (
    AnnounceFreeze,
    AskExplanation,
    AskHistory,
    AskStatus,
    CancelSwitchover,
    Done,
    EndFreeze,
    Failover,
    ForgetWorkload,
    History,
    KeeperAnswer,
    KeeperRequest,
    NodeStatus,
    Orders,
    PauseTakeover,
    PlannedSwitchover,
    PlanSwitchover,
    Refused,
    Report,
    ResumeTakeover,
    StartWorkload,
    StopWorkload,
    Switchover,
)
from common.control_channel import ControlServer
from common.errors import NoSpaceError, OutliveError, ProtocolError, StoreError, WorkloadError
from common.etcd import EtcdClient
from common.events import Event as LogEvent
from common.events import EventLog, event_file
from common.fencing import fenceable
from common.heartbeat import BEAT_TIMING, Beater, BeatFilter, first_sequence, read_boot_id
from common.keyring import read_keyring
from common.lease import lease_terms
from common.messages import Beat, VersionError
from common.model import WorkloadSpec
from common.private_directory import prepare_private_directory
from common.role_events import (
    Forget,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    OperatorStart,
    OperatorStop,
    OperatorSwitchover,
    Tick,
)
from common.roles import LEADING, Instant, Timing
from common.sd_notify import notify, watchdog_interval_s
from common.state_format import check_state_format
from common.succession import by_lease, keeps_frozen
from common.terms_file import TermFiles, look_up
from common.threads import in_thread
from common.transport import Server
from outlive.address_watch import LOOK_EVERY_S, address_of
from outlive.descriptors import raise_limit
from outlive.freeze_records import FreezeRecords
from outlive.freeze_watch import FreezeWatch
from outlive.keeper_effects import Hands, RealHands
from outlive.keeper_process import lock_memory, log_to_stderr, rss_bytes
from outlive.kept_workload import KeptWorkload
from outlive.key_reload import reload_on_hangup
from outlive.lease_guarding import LeaseGuard
from outlive.lease_records import LeaseRecords
from outlive.peers_heard import PeersHeard, heard_of
from outlive.set_aside import AGAIN_S, SetAside

log = logging.getLogger(__name__)

_AGENT_SILENT_S = 2.0
_LISTEN_POLL_S = 0.05
_USES_ADDRESS = LEADING | {"acquiring"}
_FORGOTTEN_S = 0.5
_GUARD_EVERY_S = 0.5
_THAWS_LOOKS, _THAWS_PAUSE_S = 5, 0.01
"""How often to look whether a cgroup has come out of a freeze that is over, and the time between."""


async def run_keeper(
    config: NodeConfig, hands: Hands | None = None, *, reread: Callable[[], NodeConfig] | None = None
) -> None:
    """Run this node's keeper until SIGTERM or SIGINT. Raises OutliveError if it cannot start.

    `reread` returns the file as it is at SIGHUP, for its keys; without it, keys do not change.
    Workloads and addresses are left as they are, whatever ends it.
    """
    log_to_stderr()
    raise_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keeper = Keeper(config, hands or RealHands(config))
    if reread is not None:
        keeper.reload_keys_on_hangup(reread)
    await keeper.run(stop)


class Keeper:
    """Everything the keeper holds: one `KeptWorkload` a workload, its sockets, and what it has heard."""

    def __init__(self, config: NodeConfig, hands: Hands) -> None:
        """Read the term files, listen on both sockets. Raises ConfigError, AuthError, StoreError."""
        self._config = config
        self._hands = hands
        prepare_private_directory(Path(config.node.state_dir), "node.state_dir")
        check_state_format(Path(config.node.state_dir))
        self._keys = read_keyring(config)
        self._boot_id = read_boot_id(config)
        self._timing = timing_of(config)
        self._context = zmq.asyncio.Context()
        try:
            # First: whoever holds this socket is the only keeper that touches the term files.
            self._control = ControlServer(self._context, config.keeper_endpoint, self._answer)
            self._server = Server(
                self._context,
                address=config.node.address,
                port=config.node.keeper_port,
                keys=self._keys,
                timing=BEAT_TIMING,
                on_refused=lambda address, reason: self._peers.refuse_address(address, reason, now()),
            )
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._files = TermFiles(Path(config.node.state_dir), config.node.name)
        self._events = EventLog(event_file(config), "keeper")
        self._peers = PeersHeard(config.peers, self._timing, self._events)
        self._freezes = FreezeWatch(
            thaw=self._thaw,
            released=self._released,
            records=FreezeRecords(Path(config.node.run_dir), self._boot_id),
        )
        self._leases = LeaseRecords(config, self._boot_id)
        self._etcd = EtcdClient(config.etcd, lease_terms(config.etcd).renew_every_s)
        self._workloads: dict[str, KeptWorkload] = {}
        self._aside = SetAside(lambda name: hands.init_pid(name) is not None)
        self._sequence = first_sequence()
        self._last_order = 0
        """No workload that is taken up may be given this order number or a smaller one: agents know those."""
        self._agent_at_s: float | None = None
        self._agent_silent = False
        self._requests = 0
        self._warnings: tuple[str, ...] = ()
        self._tasks: asyncio.TaskGroup | None = None

    def reload_keys_on_hangup(self, reread: Callable[[], NodeConfig]) -> None:
        """Have SIGHUP read the keys again. Call it in the keeper's loop."""
        reload_on_hangup(self._keys, reread, self._events)

    async def run(self, stop: asyncio.Event) -> None:
        """Keep this node's workloads until `stop` is set."""
        if refused := lock_memory():
            self._warnings = (refused,)
            log.warning("keeper.memory reason=%r", refused)
        try:
            self._last_order = first_sequence()  # more orders of earlier keepers there cannot be
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                known = await in_thread(look_up, self._config, self._files)
                for name, error in known.damaged.items():
                    self._set_aside(name, error)
                for name in known.specs.keys() - known.damaged.keys():
                    await self._find(known.specs[name])
                self._freezes.resume()  # who keeps a frozen workload is known now
                running = [
                    tasks.create_task(self._thaw_forgotten()),
                    tasks.create_task(self._watch_addresses()),
                    tasks.create_task(self._look_aside_again()),
                    tasks.create_task(self._have_guard()),
                    tasks.create_task(self._control.serve()),
                    tasks.create_task(self._server.serve()),
                    tasks.create_task(self._listen()),
                    tasks.create_task(self._tick_for_ever()),
                    tasks.create_task(self._beater().run()),
                    tasks.create_task(self._watchdog()),
                ]
                self._events.append(
                    LogEvent.KEEPER_STARTED, reason=f"PID {os.getpid()}, boot {self._boot_id}"
                )
                log.info("keeper.started node=%s rss_mib=%.1f", self._config.node.name, rss_bytes() / 2**20)
                notify("READY=1", f"STATUS=keeps {len(self._workloads)} workloads")
                await stop.wait()
                notify("STOPPING=1")
                await self._freezes.drain()
                for task in running:
                    task.cancel()
                for workload in self._workloads.values():
                    workload.close()
        finally:
            self._events.append(
                LogEvent.KEEPER_STOPPED, reason="workloads and addresses are left as they are"
            )
            self._events.close()
            self._control.close()
            self._server.close()
            self._context.destroy(linger=0)
            log.info("keeper.stopped")

    # --- workloads --------------------------------------------------------------------------------

    def _in_force(self, declared: WorkloadSpec) -> WorkloadSpec:
        """Return the declaration that counts, and see that it is kept; on a full disk, by the next start.

        Raises StoreError.
        """
        spec = self._files.in_force(declared)
        if self._files.load(spec.name).term and self._files.load_spec(spec.name) != spec:
            with contextlib.suppress(NoSpaceError):
                self._files.save_spec(spec)
        return spec

    async def _find(self, spec: WorkloadSpec) -> None:
        """Take up a workload that may run here, if its files and its cgroup are in order."""
        try:
            await in_thread(bring_inside, self._config, spec.name)
            await in_thread(refuse_unknown, self._config, spec.name)
            kept = await self._take_up(await in_thread(self._in_force, spec))
        except (StoreError, WorkloadError) as error:
            if spec.name not in self._aside:
                self._set_aside(spec.name, error)
            return
        if spec.name in self._aside:
            self._aside.remove(spec.name)
            log.info("workload.taken-back workload=%s", spec.name)
            reason = f"its files and its cgroup are in order again: {kept.role.reason}"
            self._events.append(
                LogEvent.ROLE_CHANGED, workload=spec.name, reason=reason, state=kept.role.name
            )

    async def _look_aside_again(self) -> None:
        """Take back what is in order by now: a disk may have failed for a moment, or somebody mended it.

        Not one without a term: whoever moves its file away says by a restart that nothing runs here.
        """
        while True:
            await asyncio.sleep(AGAIN_S)
            if not self._aside.names():
                continue
            try:
                known = await in_thread(look_up, self._config, self._files)
                for name in known.specs.keys() - known.damaged.keys():
                    if name in self._aside and (await in_thread(self._files.load, name)).term:
                        await self._find(known.specs[name])
            except (OutliveError, OSError) as error:
                log.error("aside.not-looked-at reason=%r", str(error))

    async def _take_up(self, spec: WorkloadSpec) -> KeptWorkload:
        """Begin to keep a workload. Raises StoreError if a file about it cannot be read."""
        record = await in_thread(self._files.load, spec.name)
        pauses = await in_thread(self._files.load_pauses, spec.name)
        refusal = await in_thread(self._files.load_refusal, spec.name)
        plan = await self._load_plan(spec.name)
        if (kept := self._workloads.get(spec.name)) is not None:
            return kept
        assert self._tasks is not None  # noqa: S101 - run() has begun
        kept = KeptWorkload(
            self._config,
            spec,
            boot_id=self._boot_id,
            timing=self._timing,
            fenceable=fenceable(self._config),
            record=record,
            pauses=pauses,
            refusal=refusal,
            plan=plan,
            first_order=self._last_order + 1,
            next_request=self._next_request,
            hands=self._hands,
            files=self._files,
            tasks=self._tasks,
            events=self._events,
            etcd=self._etcd,
            leases=self._leases,
        )
        self._workloads[spec.name] = kept
        kept.begin()
        for heard in self._peers.recent(spec.name, now()):
            kept.feed(heard)
        return kept

    async def _load_plan(self, name: str) -> PlannedSwitchover | None:
        """Return the switchover that is planned. One that cannot be read is told, and not carried out."""
        try:
            return await in_thread(self._files.load_plan, name)
        except StoreError as error:
            self._events.append(LogEvent.SWITCHOVER_DROPPED, workload=name, reason=str(error))
            return None

    def _set_aside(self, name: str, error: StoreError | WorkloadError) -> None:
        """Go on without a workload whose files or cgroup are not in order: the others keep their keeper."""
        reason = self._aside.add(name, error)
        log.error("workload.set-aside workload=%s reason=%r", name, reason)
        self._events.append(LogEvent.ROLE_CHANGED, workload=name, reason=reason, state="failed")

    def _known(self, name: str) -> KeptWorkload:
        """Return a workload. Raises WorkloadError if this node does not know it, or set it aside."""
        self._aside.refuse(name)
        kept = self._workloads.get(name)
        if kept is None:
            raise WorkloadError(f"this node knows no workload {name!r}", hint="outlive status")
        return kept

    # --- time and peers ---------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        interval_s = self._config.heartbeat.interval_ms / 2000
        while True:
            for name, kept in list(self._workloads.items()):
                kept.feed(Tick())
                if kept.forgotten:
                    kept.close()
                    self._last_order = max(self._last_order, kept.role.order.number)
                    del self._workloads[name]
            self._peers.tick(now())
            self._watch_agent()
            await asyncio.sleep(interval_s)

    def _watch_agent(self) -> None:
        silent = self._agent_at_s is not None and now().monotonic_s - self._agent_at_s > _AGENT_SILENT_S
        if silent == self._agent_silent:
            return
        self._agent_silent = silent
        led = [name for name, kept in self._workloads.items() if kept.role.name == "leading"]
        what = f"unprotected: {', '.join(led)}" if led else "nothing is led here"
        if silent:
            log.error("agent.silent reason=%r", f"no report for {_AGENT_SILENT_S:g} s; {what}")
            self._events.append(LogEvent.AGENT_SILENT, reason=f"no report for {_AGENT_SILENT_S:g} s; {what}")
        else:
            log.info("agent.heard")
            self._events.append(LogEvent.AGENT_HEARD, reason="it reports again")

    async def _listen(self) -> None:
        beats = BeatFilter()
        while True:
            incoming = await self._server.receive()
            try:
                beat = beats.read(incoming)
            except VersionError as error:
                self._peers.refuse(incoming.node, str(error), now())
                continue
            except ProtocolError as error:
                log.warning("peer.refused peer=%s reason=%r", incoming.node, error.message)
                continue
            if beat is None:
                continue
            self._peers.hear(beat, now())
            for name, kept in self._workloads.items():
                kept.feed(heard_of(beat, name))

    def _beat(self) -> Beat:
        self._sequence += 1
        agent_alive = self._agent_at_s is not None and not self._agent_silent
        return Beat(
            node=self._config.node.name,
            boot_id=self._boot_id,
            sequence=self._sequence,
            origin="keeper",
            wall_s=time.time(),
            workloads=(
                *(kept.beat(agent_alive=agent_alive) for kept in self._workloads.values()),
                *self._aside.beats(agent_alive=agent_alive),
            ),
        )

    def _beater(self) -> Beater:
        def refused(peer: str, reason: str) -> None:
            self._peers.refuse(peer, reason, now())

        return Beater(self._config, self._keys, self._context, make=self._beat, on_refused=refused)

    async def _watchdog(self) -> None:
        interval_s = watchdog_interval_s()
        while interval_s is not None:
            notify("WATCHDOG=1")
            await asyncio.sleep(interval_s)

    def _thaw(self, workload: str) -> None:
        """Lift a freeze of its cgroup, unless it stands still because it was handed over."""
        kept = self._workloads.get(workload)
        if kept is not None and keeps_frozen(kept.role):
            log.error("freeze.kept workload=%s reason=%r", workload, kept.role.reason)
            return
        thaw_cgroup(self._config, workload)

    async def _thaw_forgotten(self) -> None:
        """Let what is led here run if it stands still and nobody has announced a freeze, for a second.

        A criu that was cut off, or an agent that died, may leave a cgroup frozen.
        """
        frozen: frozenset[str] = frozenset()
        while True:
            await asyncio.sleep(_FORGOTTEN_S)
            now_frozen = frozenset(filter(self._frozen_by_nobody, self._workloads))
            for name in now_frozen & frozen:
                self._thaw(name)
                self._released(
                    name, "its cgroup was thawed: it stood still, and nobody had announced a freeze"
                )
            frozen = now_frozen

    async def _have_guard(self) -> None:
        """See to it that somebody else closes the gates in time if this keeper does not."""
        guard = LeaseGuard(self._config, self._leases.directory)
        while True:
            if any(by_lease(kept.role) for kept in self._workloads.values()):
                guard.look()
            await asyncio.sleep(_GUARD_EVERY_S)

    async def _watch_addresses(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            all_kept = list(self._workloads.values())
            for kept in all_kept:
                led = (each for each in all_kept if each is not kept and each.role.name in _USES_ADDRESS)
                kept.look_at_address({address_of(each.role) for each in led})

    def _frozen_by_nobody(self, name: str) -> bool:
        """Tell whether it is led here and stands still, and no freeze of it is announced."""
        kept = self._workloads.get(name)
        led = kept is not None and kept.role.name == "leading" and not kept.role.in_doubt
        return led and not self._freezes.watches(name) and self._hands.frozen(name)

    async def _announce(self, request: AnnounceFreeze) -> Done:
        """Watch a freeze, unless it has begun: one that nobody announced must not hide behind the next.

        Raises WorkloadError if it is not watched: nothing may be frozen then.
        """
        kept = self._workloads.get(request.workload)
        if kept is not None and kept.role.in_doubt:
            raise WorkloadError(f"{request.workload} stands still: {kept.role.in_doubt}")
        for _ in range(_THAWS_LOOKS):  # what was thawed just now still looks frozen (cgroup version 2)
            if not self._frozen_by_nobody(request.workload):
                break
            await asyncio.sleep(_THAWS_PAUSE_S)
        else:
            raise WorkloadError(
                f"{request.workload} stands still already, and nobody had announced a freeze",
                hint="it is thawed within a second",
            )
        self._freezes.announce(request.workload, request.criu_pid, request.deadline_ms)
        return Done()

    def _released(self, workload: str, reason: str) -> None:
        log.error("freeze.released workload=%s reason=%r", workload, reason)
        self._events.append(LogEvent.FREEZE_RELEASED_BY_FORCE, workload=workload, reason=reason)

    # --- requests ---------------------------------------------------------------------------------

    async def _answer(self, request: KeeperRequest) -> KeeperAnswer:
        match request:
            case Report():
                return await self._take_report(request)
            case AnnounceFreeze():
                return await self._announce(request)
            case EndFreeze(workload=name, criu_pid=pid):
                self._freezes.end(name, pid)
                return Done()
            case Failover():
                event = OperatorFailover(
                    request=self._next_request(),
                    accept_data_loss=request.accept_data_loss,
                    old_primary_is_off=request.old_primary_is_off,
                    to=request.to,
                    others_are_off=request.others_are_off,
                )
                return await self._known(request.workload).ask(event)
            case Switchover(workload=name, to=to):
                return await self._known(name).ask(OperatorSwitchover(request=self._next_request(), to=to))
            case PlanSwitchover(workload=name):
                return await self._known(name).plan(request)
            case CancelSwitchover(workload=name, by=by):
                if await self._known(name).planned.cancel(by):
                    return Done()
                return Refused(error="WorkloadError", message=f"no switchover of {name} is planned here")
            case StartWorkload():
                return await self._start(request)
            case StopWorkload(workload=name):
                return await self._known(name).ask(OperatorStop(request=self._next_request()))
            case PauseTakeover(workload=name, by=by):
                return await self._known(name).ask(OperatorPause(request=self._next_request(), by=by))
            case ResumeTakeover(workload=name, by=by):
                return await self._known(name).ask(OperatorResume(request=self._next_request(), by=by))
            case ForgetWorkload(workload=name):
                return await self._known(name).ask(Forget(request=self._next_request()))
            case AskStatus():
                return self._status()
            case AskExplanation(workload=name):
                return self._known(name).explain()
            case AskHistory(workload=name):
                return await self._history(name)
        return Refused(error="ProtocolError", message="this keeper does not know that request")

    def _next_request(self) -> int:
        self._requests += 1
        return self._requests

    async def _take_report(self, report: Report) -> Orders:
        self._agent_at_s = now().monotonic_s
        for each in report.workloads:
            kept = self._workloads.get(each.name)
            if kept is None:
                if self._config.node.name not in each.spec.nodes or not each.learned:
                    continue  # forgotten here: the agent drops it when this answer does not name it
                if each.name in self._aside:
                    continue
                try:
                    kept = await self._take_up(each.spec)
                except StoreError as error:
                    self._set_aside(each.name, error)
                    continue
                await in_thread(self._files.save_spec, each.spec)
            if each.handed_over is not None:
                self._freezes.forget(each.name)  # its last dump is over, whether that was said or not
            kept.take_report(each)
        return Orders(orders=tuple(kept.role.order for kept in self._workloads.values()))

    async def _start(self, request: StartWorkload) -> Done | Refused:
        """Start it once all peers were heard, or had the time to be: one of them may lead it."""
        self._aside.refuse(request.spec.name)
        kept = self._workloads.get(request.spec.name)
        if kept is None:
            kept = await self._take_up(await in_thread(self._files.in_force, request.spec))
        while not kept.has_listened(request.spec):  # noqa: ASYNC110 - time alone may fulfil it
            await asyncio.sleep(_LISTEN_POLL_S)
        event = OperatorStart(
            request=self._next_request(), spec=request.spec, peers_are_off=request.peers_are_off
        )
        return await kept.ask(event)

    def _status(self) -> NodeStatus:
        agent_state = (
            "never seen" if self._agent_at_s is None else "silent" if self._agent_silent else "alive"
        )
        return NodeStatus(
            node=self._config.node.name,
            boot_id=self._boot_id,
            agent=agent_state,  # type: ignore[arg-type]
            peers=self._peers.status(now()),
            workloads=(*(kept.status() for kept in self._workloads.values()), *self._aside.statuses()),
            warnings=self._warnings,
        )

    async def _history(self, name: str) -> History:
        kept = self._known(name)
        stored = await in_thread(self._files.history, name)
        stories = {each.term: each for each in stored}
        if (current := kept.story()) is not None:
            stories[current.term] = current.after(stories.get(current.term))
        return History(terms=tuple(stories[term] for term in sorted(stories)))


def timing_of(config: NodeConfig) -> Timing:
    """Return the role machine's times for this configuration."""
    suspect_after_s = config.heartbeat.suspect_after_ms / 1000
    fences_s = [
        sum(method.timeout_ms for method in config.fences if method.node == node) / 1000
        for node in fenceable(config)
    ]
    return Timing(
        suspect_after_s=suspect_after_s,
        listen_s=max(2.0, 3 * suspect_after_s),
        fence_s=max(fences_s, default=0.0),
    )


def now() -> Instant:
    """Read both clocks."""
    return Instant(time.monotonic(), time.time())
