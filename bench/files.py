"""What files add to an epoch: to its freeze, to what is sent, until they are laid out; and rsync beside it.

    python -m bench.files [--epochs 10] [--file-systems xfs,ext4] [--cases small,nothing,blocks,log]
                          [--small-files 100000] [--changed-files 1000] [--large-mib 4096]
                          [--changed-blocks 100] [--log-mib 200] [--append-kib 256] [--output json|table]

A process in a container changes files of its declared directory just before every freeze, when all that is
copied ahead has been copied, and again if the freeze is tried again: so none of its changes is known before
it stands still. The epoch is then brought to a second file system, and rsync brings the same changes there.
Prints one JSON object; `docs/reference/benchmarks.md` defines its fields. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

import msgspec

from bench.files_ends import Replica, Rsync, compare, rsync_version
from bench.files_report import (
    CASES,
    Arrived,
    Case,
    FilesReport,
    Measured,
    Options,
    Seen,
    measured,
    print_table,
    report,
)
from bench.files_site import Content, FileSystem, Kind, Site, clear_leftovers, own_mounts, running_site
from bench.interrupt import run_to_end
from bench.target import WORKLOAD
from common.container import workload_pids
from common.criu.locate import locate_criu
from common.errors import CaptureError, LabError
from common.heap import keep_heap_small
from common.identity import PageHasher
from common.model import EpochId
from common.threads import in_thread
from outlive.cli.running import configure_logs
from outlive.lab_state import run
from primary.dumping import Dumped, Dumper, FrozenWork
from primary.fast import FastBackend
from primary.file_backend import FrozenHook, WithFiles
from primary.file_capture import FileCapture
from primary.file_watch import FileWatch
from primary.shim import ShimChannel
from primary.verification import Verification

_WARM_UP_EPOCHS: Final = 2
_MOST_FAILED: Final = 3
"""When no epoch of a case comes off, no more of them are tried."""
_PAUSE_S: Final = 0.1
"""Between epochs."""
_SYNC_S: Final = 600.0
_VERIFY_EPOCHS: Final = 500
"""As nodes have it by default."""

_CASES_OF: Final[dict[Kind, tuple[Case, ...]]] = {
    "small": ("small", "nothing"),
    "large": ("blocks",),
    "log": ("log",),
}
"""Which cases each kind of content is for."""


class _Unwatched:
    """Nobody watches that these freezes end."""

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        """See `FreezeGuard.announce`."""

    async def end(self, criu_pid: int) -> None:
        """See `FreezeGuard.end`."""


class _ChangingDumper(Dumper):
    """Has the process change files before each dump."""

    def __init__(self, site: Site, at_frozen: FrozenWork, on_abandoned: Callable[[float], None]) -> None:
        super().__init__(
            site.config,
            site.spec,
            init_pid=site.pid,
            criu=locate_criu(None),
            guard=_Unwatched(),
            with_shim=True,
            at_frozen=at_frozen,
            on_abandoned=on_abandoned,
        )
        self._site = site
        self.changed = 0
        self.pretend = False

    async def dump(
        self,
        directory: Path,
        at_post_dump: Callable[[ShimChannel | None], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Dumped:
        """See `Dumper.dump`."""
        if self.changed:
            await self._site.change(self.changed, pretend=self.pretend)
        return await super().dump(directory, at_post_dump, meanwhile)


class _TimedHook:
    """The work within freezes, with what it takes: beside criu, and at the end."""

    def __init__(self, hook: FrozenHook) -> None:
        self._hook = hook
        self.took_ms = 0.0
        """The last time."""
        self.ended_s = 0.0

    def begin(self) -> None:
        """See `FrozenWork.begin`."""
        self.took_ms = 0.0
        self._timed(self._hook.begin)

    def end(self) -> None:
        """See `FrozenWork.end`."""
        self._timed(self._hook.end)

    def _timed(self, work: Callable[[], None]) -> None:
        begun_s = time.monotonic()
        try:
            work()
        finally:
            self.ended_s = time.monotonic()
            self.took_ms += (self.ended_s - begun_s) * 1000


class _Epochs:
    """Epochs of one process, with files and without, numbered as they are tried."""

    def __init__(self, site: Site, replica: Replica, rsync: Rsync) -> None:
        self._site = site
        self._replica = replica
        self._rsync = rsync
        hook = FrozenHook()
        self._hook = _TimedHook(hook)
        self._abandoned_ms: list[float] = []
        self._dumper = _ChangingDumper(site, self._hook, self._abandoned_ms.append)
        hasher = PageHasher()
        self._memory = FastBackend(
            site.config,
            self._dumper,
            workload=WORKLOAD,
            incarnation="bench",
            hasher=hasher,
            verification=Verification(_VERIFY_EPOCHS),
        )
        files = FileCapture(
            site.roots,
            hasher=hasher,
            layers=site.images,
            pids=lambda: workload_pids(site.config, WORKLOAD),
            watch=FileWatch(list(site.roots.values())),
        )
        self._with_files = WithFiles(self._memory, files, hook)
        self._number = 0

    async def without(self, changed: int) -> float | None:
        """Take an epoch without files, in which none are changed either.

        Return for how many ms it froze; None if it failed.
        """
        await self._settle(changed)
        self._dumper.pretend = True
        try:
            captured = await self._memory.capture(self._next(), self._replica.newest)
        except CaptureError:
            return None
        captured.release()
        return captured.freeze.total_ms

    async def take(self, changed: int) -> Seen:
        """Take an epoch with files, bring it to the replica, and have rsync do the same."""
        await self._settle(changed)
        begun_s = time.monotonic()
        failure, arrived = "", None
        try:
            captured = await self._with_files.capture(self._next(), self._replica.newest)
        except CaptureError as error:
            failure = error.message
            epoch_ms = (time.monotonic() - begun_s) * 1000
        else:
            captured_s = time.monotonic()
            epoch_ms = (captured_s - begun_s) * 1000
            try:
                brought = await in_thread(self._replica.bring, captured)
            finally:
                captured.release()
            arrived = Arrived(
                frozen_ms=captured.freeze.total_ms,
                capture_ms=(captured_s - self._hook.ended_s) * 1000,
                wall_ms=(brought.ended_s - self._hook.ended_s) * 1000,
                brought=brought,
            )
        return Seen(
            files_ms=self._hook.took_ms,
            abandoned_ms=tuple(self._abandoned_ms),
            epoch_ms=epoch_ms,
            arrived=arrived,
            failure=failure,
            synced=await in_thread(self._rsync.bring, self._site.source),
        )

    async def close(self) -> None:
        """Let go of the process."""
        await self._with_files.close()

    async def _settle(self, changed: int) -> None:
        """Begin a new epoch with nothing left to do from the one before."""
        await in_thread(self._replica.tidy)
        for directory in (self._site.source, self._site.replica):
            await in_thread(lambda path: run("sync", "--file-system", path, timeout_s=_SYNC_S), directory)
        await asyncio.sleep(_PAUSE_S)
        self._dumper.changed, self._dumper.pretend = changed, False
        self._abandoned_ms.clear()

    def _next(self) -> EpochId:
        self._number += 1
        return EpochId(1, self._number)


async def measure(options: Options) -> FilesReport:
    """Measure all cases on all file systems. To be called with mounts of our own."""
    versions = rsync_version()
    await clear_leftovers()
    found: list[Measured] = []
    for file_system in options.file_systems:
        for content in (
            Content("small", options.small_files),
            Content("large", options.large_mib),
            Content("log", options.log_mib),
        ):
            if cases := [case for case in _CASES_OF[content.kind] if case in options.cases]:
                found += await _measure_site(file_system, content, cases, options)
    return report(options, versions, found)


async def _measure_site(
    file_system: FileSystem, content: Content, cases: list[Case], options: Options
) -> list[Measured]:
    _tell(f"{file_system}, {content.kind}: making it")
    found: list[Measured] = []
    async with running_site(file_system, content) as site:
        replica = await in_thread(Replica, site.replica, *site.roots)
        epochs = _Epochs(site, replica, Rsync(site.replica, large=content.kind != "small"))
        try:
            _tell(f"{file_system}, {content.kind}: the first epoch")
            if (first := await epochs.take(0)).arrived is None:
                raise LabError(f"the first epoch failed: {first.failure}")
            for case in cases:
                changed = _changed(case, options)
                without_ms, seen = await _series(epochs, changed, options.epochs, f"{file_system}, {case}")
                found.append(
                    measured(
                        file_system,
                        case,
                        files=content.files,
                        tree_bytes=content.size_bytes,
                        changed=changed,
                        without_ms=without_ms,
                        seen=seen,
                    )
                )
            _tell(f"{file_system}, {content.kind}: comparing")
            await in_thread(compare, site.source, site.replica / "rsync")
            if seen[-1].arrived is not None:
                await in_thread(compare, site.source, replica.tree)
                await in_thread(replica.check)
        finally:
            await epochs.close()
            replica.close()
    return found


async def _series(epochs: _Epochs, changed: int, count: int, what: str) -> tuple[list[float], list[Seen]]:
    """Take that many epochs without files and with them, in turn, after a few that do not count."""
    without_ms: list[float] = []
    seen: list[Seen] = []
    for number in range(-_WARM_UP_EPOCHS, count):
        frozen_ms, each = await epochs.without(changed), await epochs.take(changed)
        _tell(f"{what}: {'warming up' if number < 0 else f'{number + 1} of {count}'}: {_said(each)}")
        if number >= 0:
            without_ms += [] if frozen_ms is None else [frozen_ms]
            seen.append(each)
        if len(seen) == _MOST_FAILED and not any(one.arrived for one in seen):
            break
    return without_ms, seen


def _said(seen: Seen) -> str:
    return seen.failure or f"{seen.files_ms:.2f} ms within the freeze, {len(seen.abandoned_ms)} given up"


def _changed(case: Case, options: Options) -> int:
    """Return what is changed before each freeze: files, blocks, or KiB."""
    return {
        "small": options.changed_files,
        "nothing": 0,
        "blocks": options.changed_blocks,
        "log": options.append_kib,
    }[case]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _words(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return what reads some of the known words."""

    def read(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if not set(words) <= set(known):
            raise argparse.ArgumentTypeError(f"{text}: some of {','.join(known)} are expected")
        return words

    return read


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = {"file_systems": _words(get_args(FileSystem)), "cases": _words(CASES)}
    for name, default in msgspec.structs.asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kinds.get(name, int), default=default)
    parser.add_argument("--output", choices=("json", "table"), default="table")
    given = vars(parser.parse_args())
    output = given.pop("output")
    keep_heap_small()  # as agents do
    configure_logs("warning")
    own_mounts()
    told = run_to_end(measure(Options(**given)))
    if output == "json":
        print(msgspec.json.encode(told).decode())
    else:
        print_table(told)


if __name__ == "__main__":
    main()
