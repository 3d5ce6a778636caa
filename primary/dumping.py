"""One dump of a running workload by criu, watched by the keeper: what both memory backends have in common.

In: where the images go, and what is to be done at criu's hooks. Out: the images on the tmpfs, criu's
statistics, and how long it took. The workload runs again when `Dumper.dump` returns or raises.

    spawn ahead ··· make room ─▶ announce to the keeper ─▶ criu: freeze, write, thaw ─▶ end of freeze

The next criu is spawned ahead, so its start-up is never on an epoch's path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from common.bundle import WorkloadPaths, bind_mounts, file_roots
from common.config import NodeConfig
from common.container import standard_streams
from common.criu.rpc import DumpOptions, DumpResult, Swrk, spawn
from common.errors import CaptureError, NoSpaceError, OutliveError
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from common.scheduling import CpuShare, favour, leave
from common.threads import in_thread
from primary.capture import FreezeTimes, MetadataFile
from primary.freezer import Freezer, NotFrozenError, Work
from primary.shim import ShimChannel

log = structlog.get_logger(__name__)

_ROOM_FACTOR = 1.1
"""Room for the images' pages, and a tenth for everything else."""
_STILL_WITHIN_S = 0.1
"""A cgroup that does not freeze that fast is let go: one of its tasks waits for a disk."""
_STILL_DEADLINE_MS = 2000
"""When the keeper thaws it if we do not: a stop takes milliseconds, and no criu notices our death."""


class FreezeGuard(Protocol):
    """Who watches that a freeze ends: the keeper, reached by the agent."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """Return once the keeper watches. Raises CaptureError if it does not: then nothing is frozen."""
        ...

    async def end(self, criu_pid: int) -> None:
        """Tell the keeper that the workload runs. Never raises: its deadline ends the watch as well."""
        ...


class FrozenWork(Protocol):
    """What is done in each freeze beside criu's work. What it raises abandons the dump."""

    def begin(self) -> None:
        """Called in a thread when everything stands still, while criu is at work; perhaps not at all."""
        ...

    def end(self) -> None:
        """Called in the event loop when criu has done its work, after `begin` has returned."""
        ...


class _NoWork:
    def begin(self) -> None:
        """See `FrozenWork.begin`."""

    def end(self) -> None:
        """See `FrozenWork.end`."""


@dataclass(frozen=True, slots=True)
class Dumped:
    """What a dump was like."""

    result: DumpResult
    frozen_wall_s: float
    """Wall clock at the freeze."""
    wall_ms: float
    hook_ms: float
    """What was done at `post-dump`, while frozen, took that long."""

    @property
    def times(self) -> FreezeTimes:
        """As an epoch tells them."""
        return FreezeTimes(
            freezing_ms=self.result.stats.freezing_us / 1000,
            frozen_ms=self.result.stats.frozen_us / 1000,
            wall_ms=self.wall_ms,
            hook_ms=self.hook_ms,
        )


@dataclass(slots=True)
class _Ahead:
    """A criu that waits for its request, and its line to the shim, if it was started with one."""

    criu: Swrk
    channel: ShimChannel | None


class Dumper:
    """Dumps one incarnation of one workload, again and again; one dump at a time."""

    def __init__(
        self,
        config: NodeConfig,
        spec: WorkloadSpec,
        *,
        init_pid: int,
        criu: Path,
        guard: FreezeGuard,
        share: CpuShare | None = None,
        attachments: Mapping[str, bytes] | None = None,
        with_shim: bool = False,
        freezer: Freezer | None = None,
        on_abandoned: Callable[[float], None] = lambda frozen_ms: None,
        at_frozen: FrozenWork | None = None,
    ) -> None:
        """Say what to dump. `attachments` are files that go with every epoch's metadata.

        `on_abandoned` is told, of each freeze that came to nothing, for how many ms at most it lasted.

        `at_frozen` is done in each dump when everything stands still.

        `share` comes first on the processors while anything stands still.

        What `freezer` (that of the workload's cgroup) keeps frozen is dumped as it is, and stays so.
        """
        self._config = config
        self._spec = spec
        self._init_pid = init_pid
        self._criu = criu
        self._guard = guard
        self._share = share or CpuShare(None)
        self._attachments = dict(attachments or {})
        self._with_shim = with_shim
        self._paths = WorkloadPaths(config, spec.name)
        self._with_files = bool(file_roots(spec, self._paths))
        self._ahead: _Ahead | None = None
        self._beside: ThreadPoolExecutor | None = None
        self._on_abandoned = on_abandoned
        self._at_frozen = at_frozen or _NoWork()
        self._working: ThreadPoolExecutor | None = None
        self._freezer = freezer or Freezer(self._paths.cgroup)
        self.freeze_cgroup: Path | None = None
        """The workload's cgroup, if somebody else has frozen it already: CRIU must be told."""
        self.directory = Path(config.node.image_dir) / spec.name
        """Where the images of all its epochs are."""

    def make_room(self, epoch: EpochId, pages_bytes: int) -> Path:
        """Make an empty directory for an epoch's images; refuse if its pages would not fit. Blocking."""
        directory = self.directory / str(epoch)
        directory.mkdir(mode=0o700, parents=True)
        usage = os.statvfs(directory)
        free_bytes = usage.f_bavail * usage.f_frsize
        wanted_bytes = int(max(pages_bytes, PAGE_BYTES) * _ROOM_FACTOR)
        if free_bytes < wanted_bytes:
            raise NoSpaceError(
                f"{directory.parent} has {free_bytes >> 20} MiB free, an epoch of {self._spec.name} "
                f"needs {wanted_bytes >> 20} MiB",
                hint="enlarge the tmpfs, or point node.image_dir at a larger one",
            )
        streams = json.dumps(standard_streams(self._init_pid))
        (directory / "descriptors.json").write_text(streams)
        for name, content in self._attachments.items():
            (directory / name).write_bytes(content)
        return directory

    async def spawned(self) -> ShimChannel | None:
        """See that a criu waits; return its line to the shim, None without one."""
        if self._ahead is None:
            channel = ShimChannel() if self._with_shim else None
            try:
                criu = await spawn(
                    self._criu,
                    environment=channel.environment if channel else None,
                    descriptors=[channel.descriptor] if channel else [],
                )
            except BaseException:
                if channel:
                    channel.close()
                raise
            leave(criu.pid)  # what it waits for, the workload waits for
            self._ahead = _Ahead(criu, channel)
            if self._with_shim and self._beside is None:
                self._beside = _thread()
            if self._with_files and self._working is None:
                self._working = _thread()
        return self._ahead.channel

    async def dump(
        self,
        directory: Path,
        at_post_dump: Callable[[ShimChannel | None], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Dumped:
        """Freeze, dump, thaw. `at_post_dump` is called when everything stands still, in the event loop.

        `meanwhile` is called in a thread when everything is frozen, and runs beside criu; it has returned
        before `at_post_dump` is called, and before this returns. What it raises is only logged, and it is not
        called if there is no thread for it. Raises what `at_post_dump` raises, and CaptureError; the workload
        runs then as well.
        """
        await self.spawned()
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            raise CaptureError("criu could not be started")
        frozen_wall_s, hook_ms = time.time(), 0.0
        frozen_s: float | None = None
        beside: Future[None] | None = None
        begun: Future[None] | None = None

        async def on_notify(script: str, pid: int | None) -> bool:
            nonlocal frozen_wall_s, frozen_s, hook_ms, beside, begun
            if script == "pre-dump":
                frozen_wall_s, frozen_s = time.time(), time.monotonic()
                first.enter_context(self._share.claimed())
                favour(ahead.criu.pid)
            elif script == "query-ext-files":
                if self._working is not None:
                    begun = self._working.submit(self._at_frozen.begin)
                if meanwhile is not None and self._beside is not None:
                    beside = self._beside.submit(meanwhile)
            elif script == "post-dump":
                begun_s = time.monotonic()
                if beside is not None:
                    await _ended(beside)
                if at_post_dump is not None:
                    at_post_dump(ahead.channel)
                if begun is not None:
                    await asyncio.wrap_future(begun)
                self._at_frozen.end()
                hook_ms = (time.monotonic() - begun_s) * 1000
            return True

        options = DumpOptions(
            pid=self._init_pid,
            images_dir=directory,
            work_dir=self._paths.bundle,  # its log stays there after a failure, until the next dump
            root=self._paths.rootfs,
            external=tuple(mount.external for mount in bind_mounts(self._spec, self._paths)),
            # Locks and names of files are restored where the files are: on the next node, if they are sent.
            file_locks=self._with_files,
            link_remap=self._with_files,
            freeze_cgroup=self.freeze_cgroup or self._freezer.kept,
            log_level=1,
            deadline_s=self._spec.freeze_deadline_ms / 1000,
        )
        try:
            await self._guard.announce(ahead.criu.pid, self._spec.thaw_deadline_ms)
        except BaseException:
            await _abandon(ahead)
            raise
        started_s = time.monotonic()
        try:
            with contextlib.ExitStack() as first:
                result = await ahead.criu.dump(options, on_notify)
        except BaseException:
            if frozen_s is not None:
                self._on_abandoned((time.monotonic() - frozen_s) * 1000)
            raise
        finally:
            wall_ms = (time.monotonic() - started_s) * 1000
            try:
                if running := [each for each in (beside, begun) if each is not None and not each.done()]:
                    await in_thread(wait, running)
            finally:
                await self._guard.end(ahead.criu.pid)
                if ahead.channel:
                    ahead.channel.close()
        with contextlib.suppress(OutliveError):  # the next dump tries again, and says so
            await self.spawned()
        return Dumped(result, frozen_wall_s, wall_ms, hook_ms)

    async def stand_still(self, work: Work) -> float:
        """Freeze the workload's cgroup for as long as `work` takes, in a thread; return for how many ms.

        The keeper watches as it does at a dump: the criu that waits for the next one stands for the freeze.
        Raises NotFrozenError if nothing was frozen; CaptureError, and what `work` raises, if what it did is
        worth nothing: it may not have stood still. It runs then as well.
        """
        await self.spawned()
        if self._ahead is None:
            raise NotFrozenError("criu could not be started")
        criu_pid = self._ahead.criu.pid
        await self._guard.announce(criu_pid, min(_STILL_DEADLINE_MS, self._spec.thaw_deadline_ms))
        try:
            with self._share.claimed():
                return await in_thread(self._still, work)
        finally:
            await self._guard.end(criu_pid)

    def _still(self, work: Work) -> float:
        begun_s = time.monotonic()
        with self._freezer.held(_STILL_WITHIN_S) as pids:
            work(pids)
        return (time.monotonic() - begun_s) * 1000

    async def close(self) -> None:
        """End the criu that waits for the next epoch. Idempotent."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await _abandon(ahead)
        for executor in (self._beside, self._working):
            if executor is not None:
                executor.shutdown(wait=False)
        self._beside = self._working = None


def metadata_in(directory: Path) -> tuple[MetadataFile, ...]:
    """List what is sent whole: everything but pagemaps and pages."""
    return tuple(
        MetadataFile(path.name, path, path.stat().st_size)
        for path in sorted(directory.iterdir())
        if not path.name.startswith(("pagemap-", "pages-"))
    )


def _thread() -> ThreadPoolExecutor | None:
    """Start a thread, so that no freeze has to; None if there cannot be one more."""
    executor = ThreadPoolExecutor(1, "beside-criu")
    try:
        executor.submit(int)
    except RuntimeError:
        return None
    return executor


async def _ended(beside: Future[None]) -> None:
    try:
        await asyncio.wrap_future(beside)
    except Exception as error:  # what it did not do is done at the end
        log.warning("capture.not_early", error=f"{type(error).__name__}: {error}")


async def _abandon(ahead: _Ahead) -> None:
    await ahead.criu.abandon()
    if ahead.channel:
        ahead.channel.close()
