"""Ready before it counts: can this node restore the epoch that it just committed, and if not, why?

Asked at every epoch, never first at a takeover. In: the workload's declaration, the epoch's images and the
memory it takes. Out: a verdict whose reasons each say what is wrong, why it matters and what to do.

What the images say is read once per content. What the node has (memory, ports, files, programs) is looked at
anew each time, by asking the kernel the same question that a restore would ask: sockets are bound for a
moment, files are looked up in the very tree that the container would get. The rules are CRIU's own
(`open_path`, `validate_file`, `open_inet_sk` of 4.2) or stricter where CRIU would restore something wrong.

Not checked, because only a restore can tell: the content of files that have no build-id (their size is),
files that nobody has open, and whether a name server or another service is reachable from here.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from ipaddress import ip_interface
from pathlib import Path

import msgspec

from common.bundle import WorkloadPaths
from common.config import NodeConfig
from common.criu.locate import locate_criu
from common.criu.rpc import spawn
from common.errors import OutliveError
from common.excludes import Excludes
from common.file_records import RECORDS
from common.model import FilePath, WorkloadSpec
from common.origin import Origin, obstacles, read_origin
from common.threads import in_daemon_thread
from replica.buildid import BuildIds
from replica.needs import NeededFile, Needs, borrowed_huge_pages, fingerprint, read_needs
from replica.ports import obstacle_to_name, obstacle_to_socket
from replica.rootview import RootView

_CRIU_ANSWER_VALID_S = 60.0
"""How long criu's version is believed before it is asked again: it may be upgraded under us."""

_PATIENCE_S = 5.0
"""A look at files, ports and programs takes milliseconds; one that takes this long waits for storage."""

_OVERDUE = (
    f"a look at this node's files has not come back within {_PATIENCE_S:g} s: does storage hang that the "
    "workload's root, or its shared files, are on? A restore would hang as well"
)

_RESTORE_OVERHEAD_BYTES = 64 * 1024 * 1024
"""Room for criu, runc and page tables beside the workload's own memory."""

_SHOWN_FILES = 8
"""Reasons about single files are cut after this many: hundreds mean that the roots differ."""

_NOT_LOOKED_FOR = ("/proc", "/dev/pts", "/sys")
"""Made anew in the container (/proc), by CRIU (terminals), or of the kernel (/sys, not in the container)."""


class ReadinessVerdict(msgspec.Struct, frozen=True):
    """Whether this node could bring the epoch to life now; if not, `reasons` says why, a sentence each."""

    restorable: bool
    reasons: tuple[str, ...]


class Readiness:
    """Judges epochs for one node. Keeps what it read of each workload's newest images, and build-ids."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._needs: dict[str, tuple[bytes, Needs]] = {}
        self._build_ids = BuildIds()
        self._here: Origin | None = None
        self._asked_s = 0.0
        self._looks: dict[str, asyncio.Future[list[str]]] = {}
        """Looks at the node on behalf of a workload that have not come back, one each."""
        self._overdue: set[str] = set()

    async def check(self, spec: WorkloadSpec, images: Path, memory_bytes: int) -> ReadinessVerdict:
        """Judge the epoch in the directory `images`, whose pages take `memory_bytes`.

        Never raises for what is wrong with epoch or node: that is a reason. Not to be called while the
        workload is being restored or runs here: its own ports would count as taken. Returns within seconds,
        though storage may hang: until an overdue look has come back, there is no other one, and no.
        """
        reasons: list[str] = []
        here = await self._ask_criu(reasons)
        while (earlier := self._looks.get(spec.name)) is not None:
            if not await self._came_back(spec.name, earlier):
                return ReadinessVerdict(False, (_OVERDUE,))
        look = self._looks[spec.name] = in_daemon_thread(self._check, spec, images, memory_bytes, here)
        look.add_done_callback(lambda done: self._ended(spec.name, done))
        if not await self._came_back(spec.name, look):
            return ReadinessVerdict(False, (_OVERDUE,))
        reasons += look.result()
        return ReadinessVerdict(not reasons, tuple(map(_printable, reasons)))

    async def _came_back(self, workload: str, look: asyncio.Future[list[str]]) -> bool:
        """Wait for a look, but not for one that is overdue."""
        await asyncio.sleep(0)  # what has come back is taken off the list at the loop's next turn
        if workload not in self._overdue:
            await asyncio.wait({look}, timeout=_PATIENCE_S)
        if not look.done():
            self._overdue.add(workload)
        return look.done()

    def _ended(self, workload: str, look: asyncio.Future[list[str]]) -> None:
        del self._looks[workload]
        self._overdue.discard(workload)
        if not look.cancelled():
            look.exception()  # seen: who asked may be gone

    def forget(self, workload: str) -> None:
        """Drop what is kept of a workload."""
        self._needs.pop(workload, None)

    async def _ask_criu(self, reasons: list[str]) -> Origin | None:
        """Describe this node, or add why it has no criu that works."""
        try:
            criu = locate_criu(Path(self._config.node.criu) if self._config.node.criu else None)
            if self._here is None or time.monotonic() - self._asked_s > _CRIU_ANSWER_VALID_S:
                version = await (await spawn(criu)).version()
                self._here = await asyncio.to_thread(read_origin, str(version))
                self._asked_s = time.monotonic()
        except OutliveError as error:
            self._here = None
            reasons.append(f"this node has no criu that works: {error}")
        return self._here

    def _check(self, spec: WorkloadSpec, images: Path, memory_bytes: int, here: Origin | None) -> list[str]:
        reasons = _missing_programs(self._config, spec)
        try:
            needs = self._read(spec.name, images)
            if needs.hugetlb_bytes:
                reasons += borrowed_huge_pages(images)
        except (OutliveError, OSError) as error:
            return [*reasons, f"the epoch's images cannot be read: {error}"]
        if here is not None:
            reasons += obstacles(needs.origin, here)
        reasons += needs.problems
        reasons += _memory_obstacles(needs, memory_bytes)
        vip = ip_interface(spec.vip).ip if spec.vip else None
        reasons += dict.fromkeys(filter(None, (obstacle_to_socket(socket, vip) for socket in needs.sockets)))
        reasons += filter(None, map(obstacle_to_name, needs.abstract_names))
        with RootView(spec, WorkloadPaths(self._config, spec.name)) as view:
            with_files = (images / RECORDS.pagemap_name).exists()
            about_files = list(self._file_obstacles(spec, needs, view, with_files=with_files))
        reasons += about_files[:_SHOWN_FILES]
        if len(about_files) > _SHOWN_FILES:
            reasons.append(f"{len(about_files) - _SHOWN_FILES} more files are missing or differ")
        return reasons

    def _read(self, workload: str, images: Path) -> Needs:
        content = fingerprint(images)
        known = self._needs.get(workload)
        if known is None or known[0] != content:
            known = self._needs[workload] = (content, read_needs(images))
        return known[1]

    def _file_obstacles(
        self, spec: WorkloadSpec, needs: Needs, view: RootView, *, with_files: bool
    ) -> Iterator[str]:
        """Say which files stand in the way. What the epoch itself has (`with_files`) is laid out from it."""
        said: set[str] = set()
        excludes = Excludes(spec.exclude)
        for file in needs.files:
            if file.path in said or any(is_below(file.path, directory) for directory in _NOT_LOOKED_FOR):
                continue
            declared = closest(spec, file.path)
            excluded = declared is not None and excludes.has_path(declared.path, file.path)
            if with_files and declared is not None and not declared.shared and not excluded:
                continue
            if file.written and file.is_data and not (declared is not None and declared.shared):
                how = "open for writing" if file.written == "open" else "mapped as writable shared memory"
                advice = (
                    "take it out of `exclude` of the workload, or have it closed"
                    if excluded
                    else "declare its directory in `files` of the workload, or (a log) write to standard "
                    "output"
                )
                yield f"{file.path} is {how} and is not replicated: {advice}"
                said.add(file.path)
            elif reason := self._difference(file, view):
                yield reason
                said.add(file.path)

    def _difference(self, file: NeededFile, view: RootView) -> str | None:
        """Say how what is here differs from what CRIU will insist on."""
        try:
            descriptor = view.open(file.path)
        except OSError as error:
            made = view.made_at_start(file.path)
            if made is not None and file.mode in {None, made}:
                return None
            return (
                f"{file.path} is missing on this node ({os.strerror(error.errno or 0)}), and the workload "
                "has it open, mapped or as a directory: install or make the same here"
            )
        try:
            found = os.fstat(descriptor)
            if file.mode is not None and found.st_mode != file.mode:
                return (
                    f"{file.path} has mode {stat.filemode(found.st_mode)} here and "
                    f"{stat.filemode(file.mode)} on the primary, which criu refuses: make them equal"
                )
            if file.size is not None and found.st_size != file.size:
                sizes = f"{file.path} has {found.st_size} bytes here and had {file.size} in the epoch"
                advice = (
                    "open it for appending only" if file.written else "install the same version on all nodes"
                )
                return f"{sizes}, which criu refuses: {advice}"
            if file.build_id and self._build_ids.of(descriptor, found) != file.build_id:
                return (
                    f"{file.path} is another build than on the primary (its build-id differs): install the "
                    "same version on all nodes"
                )
        finally:
            os.close(descriptor)
        return None


def _printable(reason: str) -> str:
    """Return it as text that can be sent: the names in it are the workload's choice, and may be any bytes."""
    return reason.encode(errors="backslashreplace").decode()


def is_below(path: str, directory: str) -> bool:
    """Tell whether `path` is `directory` or lies in it; both absolute and normal."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def closest(spec: WorkloadSpec, path: str) -> FilePath | None:
    """Return the declared directory that the workload's `path` lies in, the closest one; None: in none."""
    declared = [item for item in spec.files if is_below(path, item.path.rstrip("/"))]
    return max(declared, key=lambda item: len(item.path.rstrip("/")), default=None)


def stays_on_node(spec: WorkloadSpec, path: str) -> bool:
    """Tell whether what the workload writes at that path is on no other node."""
    declared = closest(spec, path)
    if declared is None:
        return True
    return not declared.shared and Excludes(spec.exclude).has_path(declared.path, path)


def _missing_programs(config: NodeConfig, spec: WorkloadSpec) -> list[str]:
    wanted = [config.node.runc, config.node.conmon, "unshare", *(["ip", "nft"] if spec.vip else [])]
    return [
        f"{program} is not installed here, and a takeover needs it: make setup, or apt-get install it"
        for program in wanted
        if shutil.which(program) is None
    ]


def _memory_obstacles(needs: Needs, memory_bytes: int) -> list[str]:
    found = []
    info = {
        name: int(value) * 1024
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    }
    wanted = memory_bytes + _RESTORE_OVERHEAD_BYTES
    if info["MemAvailable"] < wanted:
        found.append(
            f"the workload needs {_mib(wanted)} of memory and {_mib(info['MemAvailable'])} are available "
            "here: free memory or add some"
        )
    strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    if strict and (room := info["CommitLimit"] - info["Committed_AS"]) < needs.committed_bytes:
        found.append(
            f"the workload has {_mib(needs.committed_bytes)} of private memory mapped and this node, which "
            f"does not overcommit, has room for {_mib(max(room, 0))}: raise vm.overcommit_ratio"
        )
    if needs.hugetlb_bytes and (free := _free_huge_bytes()) < needs.hugetlb_bytes:
        found.append(
            f"the workload uses {_mib(needs.hugetlb_bytes)} of huge pages and {_mib(free)} are free here: "
            "raise vm.nr_hugepages"
        )
    return found


def _free_huge_bytes() -> int:
    pools = Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")
    return sum(
        int((pool / "free_hugepages").read_text()) * int(pool.name.removeprefix("hugepages-")[:-2]) * 1024
        for pool in pools
    )


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // (1024 * 1024))} MiB"
