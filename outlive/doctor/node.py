"""Judges the machine: kernel, CRIU, privileges, programs, directories, memory.

In: the node's configuration, or one with the defaults only. Out: checks of area `node`. Nothing is changed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from common.children import end_child
from common.config import NodeConfig
from common.container import workload_pids
from common.criu.locate import locate_criu
from common.criu.rpc import spawn
from common.errors import OutliveError, UnsupportedError
from outlive.doctor.at_rest import kept_at_rest
from outlive.doctor.report import Check, node_check
from primary.backend import choose_backend
from primary.file_writes import check_support

_OLDEST_CRIU = (4, 2, 0)
_PROGRAM_DEADLINE_S = 5.0
_LITTLE_MEMORY_MIB = 1024
"""Less available memory than this is worth a warning on any node."""

_CAPABILITIES = {"SYS_ADMIN": 21, "SYS_PTRACE": 19, "NET_ADMIN": 12, "NET_RAW": 13, "CHECKPOINT_RESTORE": 40}
"""Numbers from <linux/capability.h>. Root in a container may lack some."""


class _Trial(msgspec.Struct, frozen=True):
    """`.criu/accepted`, as set-up writes it: the CRIU that dumped and restored something on this kernel."""

    version: str
    kernel: str
    date: str


async def check_machine(config: NodeConfig) -> list[Check]:
    """Make all checks of this machine. Takes about a second."""
    found = [_check_kernel(), _check_capabilities()]
    found += await _check_criu(config)
    found += [await _check_program(name, needed) for name, needed in _programs(config)]
    found += _check_directories(config)
    found.append(_check_memory())
    if any(not files.shared for spec in config.workloads for files in spec.files):
        found.append(await asyncio.to_thread(_check_large_files))
    found.append(node_check("clocks", "ok", "not measured: deadlines use each node's own monotonic clock"))
    return found


def _check_kernel() -> Check:
    release = os.uname().release
    return node_check("kernel", "ok", f"{os.uname().sysname} {release} on {os.uname().machine}")


def _check_large_files() -> Check:
    """Tell whether a large file that changes has to be read as a whole."""
    try:
        check_support()
    except UnsupportedError as error:
        return node_check(
            "large files", "warn", f"read as a whole when they change: {error.message}", error.hint
        )
    return node_check("large files", "ok", "the kernel tells which parts change (on ext4, XFS, btrfs)")


def _check_capabilities() -> Check:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s+([0-9a-f]+)", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    missing = [f"CAP_{name}" for name, number in _CAPABILITIES.items() if not effective >> number & 1]
    if missing:
        return node_check("capabilities", "fail", f"missing: {', '.join(missing)}", "run as root, unconfined")
    return node_check("capabilities", "ok", ", ".join(f"CAP_{name}" for name in _CAPABILITIES))


async def _check_criu(config: NodeConfig) -> list[Check]:
    """Find criu, ask its version, let it check this kernel and say what it can track."""
    try:
        criu = locate_criu(Path(config.node.criu) if config.node.criu else None)
        version = await (await spawn(criu)).version()
    except OutliveError as error:
        return [node_check("criu", "fail", error.message, error.hint or "make setup")]
    numbers = (version.major, version.minor, version.sublevel)
    old = numbers < _OLDEST_CRIU
    found = [
        node_check(
            "criu",
            "warn" if old else "ok",
            f"{version} at {criu}",
            "kernels from 6.16 on need 4.2: make setup" if old else "",
        )
    ]
    try:
        await (await spawn(criu)).check()
        found.append(node_check("criu check", "ok", "this kernel has what criu needs"))
    except OutliveError as error:
        found.append(
            node_check("criu check", "fail", error.message, "make setup finds a criu for this kernel")
        )
    found.append(_check_trial(criu, str(version)))
    try:
        features = await (await spawn(criu)).features()
    except OutliveError as error:
        found.append(node_check("dirty memory", "warn", error.message))
    else:
        soft_dirty = "yes" if features.mem_track else "no"
        lazy = "yes" if features.lazy_pages else "no"
        detail = f"criu finds soft-dirty {soft_dirty}, userfaultfd for lazy restore {lazy}"
        found.append(node_check("dirty memory", "ok", detail))
    choice = await asyncio.to_thread(choose_backend, config.capture, version)
    wanted = config.capture.backend == "auto" and choice.tracker is None
    found.append(
        node_check(
            "capture",
            "warn" if wanted else "ok",
            choice.sentence,
            "docs/concepts/capture.md says what each backend and tracker takes" if wanted else "",
        )
    )
    return found


def _check_trial(criu: Path, version: str) -> Check:
    """Look up what set-up recorded beside its own criu."""
    record = criu.parent.parent / "accepted"
    retry = "make setup tries a dump and a restore"
    try:
        trial = msgspec.json.decode(record.read_bytes(), type=_Trial)
    except (OSError, msgspec.DecodeError):
        return node_check("criu trial", "warn", f"no trial of {criu} is on record", retry)
    if trial.kernel != os.uname().release or trial.version != version:
        detail = f"the trial on record was CRIU {trial.version} on kernel {trial.kernel}"
        return node_check("criu trial", "warn", detail, retry)
    return node_check("criu trial", "ok", f"dump and restore passed on this kernel ({trial.date})")


def _programs(config: NodeConfig) -> list[tuple[tuple[str, ...], bool]]:
    """Name the programs with how they say their version, and whether this configuration needs them."""
    has_vip = any(workload.vip for workload in config.workloads)
    return [
        ((config.node.runc, "--version"), True),
        ((config.node.conmon, "--version"), True),
        (("nft", "--version"), has_vip),
        (("ip", "-V"), has_vip),
        (("ss", "-V"), False),
    ]


async def _check_program(command: tuple[str, ...], needed: bool) -> Check:
    name = Path(command[0]).name
    path = shutil.which(command[0])
    if path is None:
        return node_check(
            name, "fail" if needed else "warn", "not installed", f"make setup, or apt-get install {name}"
        )
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            *command[1:],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return node_check(name, "fail", f"{path} cannot be run: {error.strerror}")
    try:
        async with asyncio.timeout(_PROGRAM_DEADLINE_S):
            said, _ = await process.communicate()
    except TimeoutError:
        await end_child(process, path)
        return node_check(name, "fail", f"{path} did not answer within {_PROGRAM_DEADLINE_S:.0f} s")
    return node_check(name, "ok", f"{(said.decode(errors='replace').splitlines() or ['?'])[0]} ({path})")


def _check_directories(config: NodeConfig) -> Iterator[Check]:
    images, state = Path(config.node.image_dir), Path(config.node.state_dir)
    room = os.statvfs(_existing(images))
    free_bytes, total_bytes = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    needed_bytes = max((_memory_of(config, spec.name) for spec in config.workloads), default=0)
    detail = (
        f"{images}: {free_bytes >> 20} of {total_bytes >> 20} MiB free, a capture needs {needed_bytes >> 20}"
    )
    if _filesystem(images) not in {"tmpfs", "ramfs"}:
        yield node_check(
            "image_dir", "warn", f"{images} is not on a tmpfs: freezes last as long as its disk takes"
        )
    elif free_bytes < needed_bytes:
        yield node_check("image_dir", "fail", detail, "enlarge the tmpfs: mount -o remount,size=…")
    else:
        yield node_check("image_dir", "ok", detail)
    kind = _filesystem(state)
    if kind in {"tmpfs", "ramfs"}:
        detail = f"{state} is on {kind}: terms and roles would be forgotten at a power loss"
        yield node_check("state_dir", "fail", detail, "point node.state_dir at a disk")
    else:
        yield node_check("state_dir", "ok", f"{state} on {kind}")
    store = config.store_dir
    if _filesystem(store) in {"tmpfs", "ramfs"}:
        yield node_check(
            "store", "warn", f"{store} is volatile: it survives crashes of processes, not of the machine"
        )
    else:
        free_bytes = shutil.disk_usage(_existing(store)).free
        low = free_bytes < config.store.min_free_bytes
        detail = f"{store}: {free_bytes >> 20} MiB free, {config.store.min_free_bytes >> 20} are kept free"
        yield node_check("store", "fail" if low else "ok", detail, "free space" if low else "")
    protected, how = kept_at_rest(store)
    advice = "" if protected else "docs/threat-model.md says how it can be encrypted"
    yield node_check("store at rest", "ok" if protected else "warn", f"{store}: {how}", advice)
    run = Path(config.node.run_dir)
    if run.exists() and run.stat().st_mode & 0o077:
        detail = f"{run} can be entered by others (mode {run.stat().st_mode & 0o777:04o})"
        yield node_check("run_dir", "fail", detail, f"chmod 0700 {run}")
    else:
        yield node_check("run_dir", "ok", f"{run}" if run.exists() else f"{run} is made at the first start")


def _check_memory() -> Check:
    """Say what is available; whether it is enough for an epoch, the agent judges at each one."""
    info = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", info, re.MULTILINE)
    available_mib = int(match[1]) >> 10 if match else 0
    detail = f"{available_mib} MiB available; each stored workload is compared with it at every epoch"
    low = available_mib < _LITTLE_MEMORY_MIB
    return node_check("memory", "warn" if low else "ok", detail, "add memory" if low else "")


def _memory_of(config: NodeConfig, workload: str) -> int:
    """Return the resident bytes of a workload that runs here, shared pages counted for each process."""
    total = 0
    for pid in workload_pids(config, workload):
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # ended meanwhile
    return total


def _existing(path: Path) -> Path:
    """Return the closest directory above that is there."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _filesystem(path: Path) -> str:
    """Return the type of the filesystem that `path` is on or would be made on."""
    wanted = _existing(path).stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        major, minor = fields.split()[2].split(":")
        if os.makedev(int(major), int(minor)) == wanted:
            return rest.split()[0]
    return "an unknown filesystem"
