"""One workload's container on this node: start, restore, find, kill. runc does it; conmon keeps it.

conmon is the container's shim: it holds the standard streams, writes the log, and waits for the exit
code, and so outlives any of our processes. Used by the agent (start, restore) and by the keeper (find,
kill), hence light: no bulk data, nothing imported that the keeper could not afford.

A container is *ours* only if the PID in its pid file belongs to the workload's cgroup: PIDs are reused.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.bundle import CRIU_RESTORE_SETTINGS, WorkloadPaths, bind_mounts, runtime_config
from common.config import NodeConfig
from common.errors import RestoreError, WorkloadError
from common.model import EpochId, WorkloadSpec

_START_TIMEOUT_S = 20.0
_RESTORE_TIMEOUT_S = 300.0
_KILL_TIMEOUT_S = 10.0
_LOG_LIMIT_BYTES = 64 * 1024 * 1024
_CGROUP_MOUNT = Path("/sys/fs/cgroup")


class Incarnation(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a workload's processes: changes whenever they are started or restored."""

    id: str
    restored: EpochId | None = None
    order: int = 0
    """Number of the order that it came from: an order is carried out once, agent restarts included."""


def running_init_pid(config: NodeConfig, name: str) -> int | None:
    """Return the host PID of the workload's first process if it runs here, else None.

    A zombie counts as ended. Reads three small files; safe to call several times a second.
    """
    paths = WorkloadPaths(config, name)
    try:
        pid = int(paths.pid_file.read_text())
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    ours = any(line.split(":", 2)[2] == paths.cgroup for line in groups.splitlines())
    return pid if ours and state not in {"Z", "X"} else None


def incarnation(config: NodeConfig, name: str) -> Incarnation | None:
    """Return which run of the workload the bundle belongs to; None before the first start."""
    try:
        text = WorkloadPaths(config, name).incarnation_file.read_bytes()
        return msgspec.json.decode(text, type=Incarnation)
    except (OSError, msgspec.DecodeError):
        return None


def exit_code(config: NodeConfig, name: str) -> int | None:
    """Return how the last incarnation ended (128 + n: by signal n); None while it runs or unknown."""
    if running_init_pid(config, name) is not None:
        return None
    try:
        return int((WorkloadPaths(config, name).exit_dir / name).read_text())
    except (OSError, ValueError):
        return None


async def start_workload(config: NodeConfig, spec: WorkloadSpec, *, order: int = 0) -> int:
    """Start the workload afresh; return the host PID of its first process.

    Raises WorkloadError if it runs already or cannot be started. What a failed start left is removed.
    """
    paths = await _prepare(config, spec, restored=None, order=order)
    try:
        pid = await _run_conmon(paths, spec.root, [], _START_TIMEOUT_S)
        await _runc(config, ["start", spec.name], timeout_s=_START_TIMEOUT_S)
    except WorkloadError:
        await kill_workload(config, spec.name)
        raise
    return pid


async def restore_workload(
    config: NodeConfig, spec: WorkloadSpec, images: Path, epoch: EpochId, criu: Path, *, order: int = 0
) -> int:
    """Bring the epoch whose images lie in `images` to life; return its first process's host PID.

    The directory is read only. Connections of the epoch come back closed. Raises RestoreError with
    criu's own words; what a failed restore left is removed.
    """
    paths = await _prepare(config, spec, restored=epoch, order=order)
    work = paths.bundle / "restore"
    work.mkdir(mode=0o700, exist_ok=True)
    options = ["--manage-cgroups-mode", "ignore", "--work-path", str(work)]
    arguments = ["--restore", str(images)]
    for option in options:
        arguments += ["--runtime-opt", option]
    try:
        return await _run_conmon(paths, spec.root, arguments, _RESTORE_TIMEOUT_S, criu=criu)
    except WorkloadError as error:
        await kill_workload(config, spec.name)
        raise RestoreError(
            f"epoch {epoch} of {spec.name} could not be restored: {_criu_errors(work) or error.message}",
            hint=f"the whole log: {work / 'restore.log'}",
        ) from error


async def kill_workload(config: NodeConfig, name: str) -> None:
    """Kill every process of the workload at once, and remove its container. Idempotent.

    Kills by cgroup as well as by PID namespace, so it works whatever state runc's records are in.
    Raises WorkloadError if something still runs after the deadline: then nobody may take it for dead.
    """
    paths = WorkloadPaths(config, name)
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while pids := workload_pids(config, name):
        if time.monotonic() > deadline_s:
            raise WorkloadError(
                f"processes of {name} are still there {_KILL_TIMEOUT_S:.0f} s after SIGKILL: {pids}",
                hint="a process in uninterruptible sleep (state D) waits for its device; power the node off",
            )
        thaw_cgroup(config, name)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        await asyncio.sleep(0.005)
    if (config.runc_root / name).exists():
        await _runc(config, ["delete", "--force", name], timeout_s=_KILL_TIMEOUT_S, check=False)
    paths.pid_file.unlink(missing_ok=True)


def workload_pids(config: NodeConfig, name: str) -> list[int]:
    """Return the host PIDs of every process in the workload's cgroups, ascending."""
    found: set[int] = set()
    for directory in cgroup_directories(WorkloadPaths(config, name).cgroup):
        try:
            found.update(int(line) for line in (directory / "cgroup.procs").read_text().split())
        except OSError:
            continue  # removed in between, or threaded: another hierarchy names the processes
    return sorted(found - {0})


def thaw_cgroup(config: NodeConfig, name: str) -> None:
    """Lift a freeze of the workload's cgroup, in whichever hierarchy freezes. Idempotent."""
    for directory in cgroup_directories(WorkloadPaths(config, name).cgroup):
        for file, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            try:
                with (directory / file).open("r+") as stream:
                    stream.write(value)
            except OSError:
                continue  # not the hierarchy that freezes


def cgroup_directories(cgroup: str) -> list[Path]:
    """Return the directories of a cgroup in every mounted hierarchy (v1, v2 and hybrid)."""
    relative = cgroup.lstrip("/")
    candidates = [_CGROUP_MOUNT / relative, *_CGROUP_MOUNT.glob(f"*/{relative}")]
    return [path for path in candidates if (path / "cgroup.procs").exists()]


def standard_streams(pid: int) -> list[str]:
    """Return what file descriptors 0-2 of a process are links to, as runc's descriptors.json has it."""
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]


async def _prepare(
    config: NodeConfig, spec: WorkloadSpec, *, restored: EpochId | None, order: int
) -> WorkloadPaths:
    """Make the bundle and everything that it refers to."""
    if (pid := running_init_pid(config, spec.name)) is not None:
        raise WorkloadError(f"{spec.name} runs already (PID {pid})")
    await kill_workload(config, spec.name)  # remnants of an earlier container of this name
    paths = WorkloadPaths(config, spec.name)
    try:
        for directory in (paths.bundle, paths.rootfs, paths.exit_dir, paths.state):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (paths.exit_dir / spec.name).unlink(missing_ok=True)
        uid, _, gid = spec.user.partition(":")
        for mount in bind_mounts(spec, paths):
            source = Path(mount.source)
            if not source.exists():
                source.mkdir(mode=0o755, parents=True)
                os.chown(source, int(uid), int(gid or uid))
        (paths.bundle / "shm").chmod(0o1777)
        paths.criu_settings.write_text(CRIU_RESTORE_SETTINGS)
        (paths.bundle / "config.json").write_text(json.dumps(runtime_config(spec, paths), indent=1))
        run = Incarnation(id=uuid.uuid4().hex, restored=restored, order=order)
        paths.incarnation_file.write_bytes(msgspec.json.encode(run))
    except OSError as error:
        raise WorkloadError(f"cannot prepare the container of {spec.name}: {error}") from error
    return paths


async def _run_conmon(
    paths: WorkloadPaths, root: str, arguments: Sequence[str], timeout_s: float, criu: Path | None = None
) -> int:
    """Run conmon, which runs runc; return the container's PID as conmon tells it over its sync pipe."""
    node, name = paths.config.node, paths.name
    command = [
        *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c"),
        'mount --bind "$1" "$2" && shift 2 && exec "$@"',
        *("sh", root, str(paths.rootfs)),
        *(_which(node.conmon), "--api-version", "1", "--full-attach", "--stdin"),
        *("--runtime", _which(node.runc), "--runtime-arg", "--root", "--runtime-arg"),
        *(str(paths.config.runc_root), "--cid", name, "--cuuid", name, "--name", name),
        *("--bundle", str(paths.bundle), "--container-pidfile", str(paths.pid_file)),
        *("--conmon-pidfile", str(paths.shim_pid_file), "--exit-dir", str(paths.exit_dir)),
        *("--log-path", f"k8s-file:{paths.log}", "--log-size-max", str(_LOG_LIMIT_BYTES)),
        *arguments,
    ]
    paths.config.runc_root.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = dict(os.environ)
    if criu is not None:  # runc looks for a program called criu in its PATH
        environment["PATH"] = f"{criu.parent}:{environment.get('PATH', '')}"
    reader, writer = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment | {"_OCI_SYNCPIPE": str(writer)},
            pass_fds=(writer,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        raise WorkloadError(f"cannot run {command[0]}: {error}", hint="outlive doctor") from error
    finally:
        os.close(writer)
    try:
        async with asyncio.timeout(timeout_s):
            answer = await asyncio.to_thread(_read_line, reader, timeout_s)
            await process.wait()
    except TimeoutError:
        raise WorkloadError(f"no container of {name} after {timeout_s:.0f} s") from None
    finally:
        os.close(reader)
    return _container_pid(answer, name)


def _container_pid(answer: bytes, name: str) -> int:
    """Read conmon's answer: {"data": pid, "message": why not}."""
    try:
        told = json.loads(answer)
        pid = int(told.get("data", told.get("pid", -1)))
        message = str(told.get("message", ""))
    except (ValueError, AttributeError):
        pid, message = -1, "conmon ended without a word"
    if pid <= 0:
        raise WorkloadError(f"runc cannot run {name}: {message.strip()}", hint="outlive doctor")
    return pid


def _read_line(descriptor: int, timeout_s: float) -> bytes:
    """Read up to a newline or the end, for `timeout_s` at most (a thread cannot be cancelled)."""
    received = b""
    deadline_s = time.monotonic() + timeout_s
    while not received.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            return received
        block = os.read(descriptor, 65536)
        if not block:
            return received
        received += block
    return received


def _which(program: str) -> str:
    """Resolve a program's name: conmon wants runc's absolute path."""
    found = shutil.which(program)
    if found is None:
        raise WorkloadError(f"{program} is not installed", hint="make setup, or apt-get install it")
    return found


async def _runc(
    config: NodeConfig, arguments: Sequence[str], *, timeout_s: float, check: bool = True
) -> None:
    process = await asyncio.create_subprocess_exec(
        _which(config.node.runc),
        "--root",
        str(config.runc_root),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, stderr = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise WorkloadError(f"runc {arguments[0]} did not answer within {timeout_s:.0f} s") from None
    if check and process.returncode != 0:
        raise WorkloadError(f"runc {' '.join(arguments)} failed: {stderr.decode(errors='replace').strip()}")


def _criu_errors(work: Path) -> str:
    """Return the last error lines of criu's restore log; empty if there is none."""
    try:
        lines = (work / "restore.log").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "; ".join(line.split(") ", 1)[-1].strip() for line in lines if "Error" in line)[-600:]
