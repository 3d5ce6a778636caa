"""One workload's container on this node: start, restore, find, kill. runc does it; conmon keeps it.

conmon is the container's shim: it holds the standard streams, writes the log, and waits for the exit
code, and so outlives any of our processes. Used by the agent (start, restore) and by the keeper (find,
kill), hence light: no bulk data, nothing imported that the keeper could not afford.

A container is *ours* only if the PID in its pid file belongs to the workload's cgroup: PIDs are reused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from common.bringing_up import end_bringing_up
from common.bundle import CRIU_RESTORE_SETTINGS, WorkloadPaths, bind_mounts, runtime_config
from common.children import end_child, hangs
from common.config import NodeConfig
from common.errors import RestoreError, WorkloadError
from common.gate import Gate, close_gate, gate_of, is_closed, open_gate
from common.model import EpochId, WorkloadSpec
from common.program import missing_program, runc_misses_program, surely_missing
from common.scheduling import cpu_home
from common.threads import in_daemon_thread

_START_TIMEOUT_S = 20.0
_RESTORE_TIMEOUT_S = 300.0
_KILL_TIMEOUT_S = 10.0
_STORAGE_TIMEOUT_S = 20.0
_ENTER_ROUNDS = 20
"""What forks while it is moved leaves a child behind, which is moved in the next round."""
_RUNTIME_UMASK = 0o022
"""For runc: it may have to make mount points in the workload's root, which all users of it pass through."""
_ANSWER_POLL_S = 0.005
_LOG_LIMIT_BYTES = 64 * 1024 * 1024
_CGROUP_MOUNT = Path("/sys/fs/cgroup")


class Incarnation(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a workload's processes: changes whenever they are started or restored."""

    id: str
    restored: EpochId | None = None
    order: int = 0
    """Number of the order that it came from: an order is carried out once, agent restarts included."""
    came_up: bool = False
    """It has been seen to run: if it does not now, it has ended. False: it may have been interrupted."""


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
        mark_up(config, spec.name)
    except (WorkloadError, OSError) as error:
        await kill_workload(config, spec.name)
        if isinstance(error, OSError):
            raise WorkloadError(f"cannot start {spec.name}: {error}") from error
        if runc_misses_program(spec, error.message):
            raise missing_program(spec) from error
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
    options = ["--manage-cgroups-mode", "ignore", "--work-path", str(work)]
    arguments = ["--restore", str(images)]
    for option in options:
        arguments += ["--runtime-opt", option]
    try:
        work.mkdir(mode=0o700, exist_ok=True)
        pid = await _run_conmon(paths, spec.root, arguments, _RESTORE_TIMEOUT_S, criu=criu)
        mark_up(config, spec.name)
    except (WorkloadError, OSError) as error:
        await kill_workload(config, spec.name)
        raise RestoreError(
            f"epoch {epoch} of {spec.name} could not be restored: {_criu_errors(work) or error}",
            hint=f"the whole log: {work / 'restore.log'}",
        ) from error
    return pid


def mark_up(config: NodeConfig, name: str) -> None:
    """Record that the present incarnation has been seen to run. Raises OSError."""
    run = incarnation(config, name)
    if run is not None and not run.came_up:
        _write_incarnation(WorkloadPaths(config, name), msgspec.structs.replace(run, came_up=True))


async def stop_workload(config: NodeConfig, name: str, grace_s: float) -> None:
    """Ask the workload's first process to end (SIGTERM); kill what is left after `grace_s`.

    A first process without a handler for it never sees the signal: it is the init of its PID namespace.
    Raises WorkloadError as `kill_workload` does.
    """
    pid = running_init_pid(config, name)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while running_init_pid(config, name) == pid and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_ANSWER_POLL_S)
    await kill_workload(config, name)


async def kill_workload(config: NodeConfig, name: str) -> None:
    """Kill every process of the workload at once, and remove its container. Idempotent.

    Kills by cgroup as well as by PID namespace, so it works whatever state runc's records are in; and first,
    if it is not up yet, whatever brings it up: that may have put nothing into the cgroup so far.
    Raises WorkloadError if something still runs after the deadline: then nobody may take it for dead.
    """
    paths = WorkloadPaths(config, name)
    if not paths.pid_file.exists():  # conmon writes it once the container is there
        await end_bringing_up(config, name)
    gate = gate_of(config, name)
    closed = is_closed(gate)
    try:
        await _kill_all(config, name, gate)
    finally:
        if closed:  # killed processes of a frozen cgroup end only once it is thawed
            close_gate(gate)
    if (config.runc_root / name).exists():
        await _runc(config, ["delete", "--force", name], timeout_s=_KILL_TIMEOUT_S, check=False)
    with contextlib.suppress(OSError):
        paths.pid_file.unlink(missing_ok=True)


async def _kill_all(config: NodeConfig, name: str, gate: Gate) -> None:
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while pids := workload_pids(config, name):
        if time.monotonic() > deadline_s:
            raise WorkloadError(
                f"processes of {name} are still there {_KILL_TIMEOUT_S:.0f} s after SIGKILL: {pids}",
                hint="a process in uninterruptible sleep (state D) waits for its device; power the node off",
            )
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        thaw_cgroup(config, name)  # after the signal: what was frozen ends before it runs again
        open_gate(gate)
        await asyncio.sleep(0.005)


def workload_pids(config: NodeConfig, name: str) -> list[int]:
    """Return the host PIDs of every process in the workload's cgroups, ascending."""
    found: set[int] = set()
    for directory in cgroup_directories(WorkloadPaths(config, name).cgroup):
        try:
            found.update(int(line) for line in (directory / "cgroup.procs").read_text().split())
        except OSError:
            continue  # removed in between, or threaded: another hierarchy names the processes
    return sorted(found - {0})


def refuse_unknown(config: NodeConfig, name: str) -> None:
    """Raise WorkloadError if processes of the workload are here of which nothing is known any more.

    Without its bundle nobody can tell which is its first process: it would be taken for ended, and be ended.
    """
    paths = WorkloadPaths(config, name)
    if not paths.incarnation_file.exists() and (pids := workload_pids(config, name)):
        raise WorkloadError(
            f"{paths.bundle} is gone, and processes run in the cgroup of {name}: {pids[:8]}",
            hint=f"end them once you know that they are not needed; {config.node.run_dir} is to be emptied "
            "by a boot only (systemd: RuntimeDirectoryPreserve=yes)",
        )


def bring_inside(config: NodeConfig, name: str) -> None:
    """Move what runs in the gate itself into the workload's own cgroup: earlier versions started it there.

    It goes on as it is, frozen or not, and the gate is open then. Raises WorkloadError if that fails: what is
    not found in its cgroup would be taken for ended.
    """
    gate = gate_of(config, name)
    hint = f"move what is in {gate.file.parent} into the cgroup run below it"
    try:
        outside = [each for each in cgroup_directories(WorkloadPaths(config, name).gate) if _members(each)]
        for directory in outside:
            inside = directory / "run"
            inside.mkdir(exist_ok=True)
            for file in ("cpuset.cpus", "cpuset.mems"):  # version 1: nothing may enter while they are empty
                if (inside / file).exists() and not (inside / file).read_text().strip():
                    (inside / file).write_text((directory / file).read_text())
            if directory == gate.file.parent and is_closed(gate):
                (inside / gate.file.name).write_text(gate.close)
            for _ in range(_ENTER_ROUNDS):
                for pid in _members(directory):
                    with contextlib.suppress(ProcessLookupError):
                        (inside / "cgroup.procs").write_text(pid)
        if outside:
            open_gate(gate)
        left = [pid for directory in outside for pid in _members(directory)]
    except OSError as error:
        raise WorkloadError(f"{name} cannot be moved into its cgroup: {error}", hint=hint) from error
    if left:
        raise WorkloadError(
            f"{name} cannot be moved into its cgroup: {', '.join(left)} stayed outside", hint=hint
        )


def _members(directory: Path) -> list[str]:
    return (directory / "cgroup.procs").read_text().split()


def thaw_cgroup(config: NodeConfig, name: str) -> None:
    """Lift a freeze of the workload's cgroup, in whichever hierarchy freezes. Idempotent."""
    for directory in cgroup_directories(WorkloadPaths(config, name).cgroup):
        for file, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            try:
                with (directory / file).open("r+") as stream:
                    stream.write(value)
            except OSError:
                continue  # not the hierarchy that freezes


def cgroup_frozen(config: NodeConfig, name: str) -> bool:
    """Tell whether every process of the workload stands still, as the kernel reports it."""
    return any(
        frozen_by(directory / file)
        for directory in cgroup_directories(WorkloadPaths(config, name).cgroup)
        for file in ("freezer.state", "cgroup.freeze")
    )


def frozen_by(file: Path) -> bool:
    """Tell whether what a cgroup's freezer file (of either version) rules has come to rest."""
    try:
        if file.name == "freezer.state":
            return file.read_text().strip() == "FROZEN"
        return "frozen 1" in (file.parent / "cgroup.events").read_text()
    except OSError:
        return False  # it is gone, or not the hierarchy that freezes


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
    paths = WorkloadPaths(config, spec.name)
    await _on_storage(spec.name, _look_at_root, spec, restored is None)
    await kill_workload(config, spec.name)  # remnants of an earlier container of this name
    try:
        for directory in (paths.bundle, paths.rootfs, paths.exit_dir, paths.state):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (paths.exit_dir / spec.name).unlink(missing_ok=True)
        await _on_storage(spec.name, _make_sources, spec, paths)
        (paths.bundle / "shm").chmod(0o1777)
        paths.criu_settings.write_text(CRIU_RESTORE_SETTINGS)
        (paths.bundle / "config.json").write_text(json.dumps(runtime_config(spec, paths), indent=1))
        paths.shim_pid_file.unlink(missing_ok=True)
        _write_incarnation(paths, Incarnation(id=uuid.uuid4().hex, restored=restored, order=order))
    except OSError as error:
        raise WorkloadError(f"cannot prepare the container of {spec.name}: {error}") from error
    return paths


def _look_at_root(spec: WorkloadSpec, starts: bool) -> None:
    inside = Path(spec.working_directory)
    declared = any(inside.is_relative_to(item.path) for item in spec.files)
    if (
        not declared and not Path(spec.root, *inside.parts[1:]).is_dir()
    ):  # runc would make it, on the node's disk
        raise WorkloadError(
            f"the working directory {inside} of {spec.name} does not exist below {spec.root}",
            hint="make it on every node, or declare it under `files`",
        )
    if starts and surely_missing(spec):
        raise missing_program(spec)


def _make_sources(spec: WorkloadSpec, paths: WorkloadPaths) -> None:
    uid, _, gid = spec.user.partition(":")
    for mount in bind_mounts(spec, paths):
        source = Path(mount.source)
        if not source.exists():
            source.mkdir(mode=0o755, parents=True)
            source.chmod(0o755)  # a workload may have several users
            os.chown(source, int(uid), int(gid or uid))


async def _on_storage(name: str, work: Callable[..., None], *arguments: object) -> None:
    """Do what touches the workload's own storage. Raises WorkloadError if that hangs, and what it raises."""
    doing = in_daemon_thread(work, *arguments)
    await asyncio.wait({doing}, timeout=_STORAGE_TIMEOUT_S)
    if not doing.done():
        doing.cancel()
        raise WorkloadError(
            f"the storage that {name} needs has not answered within {_STORAGE_TIMEOUT_S:.0f} s",
            hint="its root, or a directory under `files`, is on storage that hangs",
        )
    doing.result()


def _write_incarnation(paths: WorkloadPaths, run: Incarnation) -> None:
    """Replace the file at once: a torn one would lose which order was carried out."""
    new = paths.incarnation_file.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(run))
    new.rename(paths.incarnation_file)


async def _run_conmon(
    paths: WorkloadPaths, root: str, arguments: Sequence[str], timeout_s: float, criu: Path | None = None
) -> int:
    """Run conmon, which runs runc; return the container's PID as conmon tells it in a file."""
    node, name = paths.config.node, paths.name
    command = [
        *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c"),
        'echo 0 >"$1"; mount --bind "$2" "$3" && shift 3 && exec "$@"',
        *("sh", str(cpu_home()), root, str(paths.rootfs)),
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
    # A file and not a pipe: conmon must be able to answer when whoever asked is gone.
    answer = os.open(paths.shim_answer, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment | {"_OCI_SYNCPIPE": str(answer)},
            umask=_RUNTIME_UMASK,
            pass_fds=(answer,),
            start_new_session=True,
        )
    finally:
        os.close(answer)
    try:
        async with asyncio.timeout(timeout_s):
            if await process.wait():  # no conmon was ever there: the root cannot be mounted, for one
                return _container_pid(paths.shim_answer.read_bytes(), name)
            return _container_pid(await _answer(paths), name)
    except TimeoutError:
        raise WorkloadError(f"no container of {name} after {timeout_s:.0f} s") from None


async def _answer(paths: WorkloadPaths) -> bytes:
    """Wait until conmon has answered, or is gone; return what it said."""
    while True:
        gone = not _shim_lives(paths)
        said = paths.shim_answer.read_bytes()
        if said.endswith(b"\n") or gone:
            return said
        await asyncio.sleep(_ANSWER_POLL_S)


def _shim_lives(paths: WorkloadPaths) -> bool:
    """Tell whether conmon runs, or has not been forked far enough to say who it is."""
    try:
        pid = int(paths.shim_pid_file.read_text())
    except (OSError, ValueError):
        return not paths.shim_answer.read_bytes()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


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


def _which(program: str) -> str:
    """Resolve a program's name: conmon wants runc's absolute path."""
    found = shutil.which(program)
    if found is None:
        raise WorkloadError(f"{program} is not installed", hint="make setup, or apt-get install it")
    return found


async def _runc(
    config: NodeConfig, arguments: Sequence[str], *, timeout_s: float, check: bool = True
) -> None:
    kind = f"runc {' '.join(arguments)}"
    if hangs(kind):
        raise WorkloadError(f"an earlier {kind} was killed, and has not ended yet")
    try:
        process = await asyncio.create_subprocess_exec(
            _which(config.node.runc),
            "--root",
            str(config.runc_root),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            umask=_RUNTIME_UMASK,
        )
    except OSError as error:
        raise WorkloadError(f"cannot run {config.node.runc}: {error}", hint="outlive doctor") from error
    try:
        async with asyncio.timeout(timeout_s):
            _, stderr = await process.communicate()
    except TimeoutError:
        await end_child(process, kind)
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
