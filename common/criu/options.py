"""What is asked of criu: options as frozen values in, requests of `proto/rpc.proto` out.

A request names its directories by descriptors of ours, which criu opens through /proc; so each is made by a
context manager that keeps them open until criu has answered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.criu.proto import rpc_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpOptions:
    """What to dump, where to, and how long it may take. The names are CRIU's, where CRIU has one.

    Images go into `images_dir`; log and statistics into `work_dir` (None: `images_dir`). Cgroups are left
    alone and the network isn't locked: both are ours to do.
    """

    pid: int
    images_dir: Path
    work_dir: Path | None = None
    root: Path | None = None
    external: tuple[str, ...] = ()
    leave_running: bool = True
    tcp_close: bool = True
    tcp_established: bool = False
    ext_unix_sk: bool = False
    file_locks: bool = False
    link_remap: bool = False
    shell_job: bool = False
    ghost_limit_bytes: int = 1 << 20
    freeze_cgroup: Path | None = None
    """Where the cgroup of the tree is, for CRIU to freeze by it. Needed if it is frozen already."""
    cpu_cap: int | None = None
    """Bits of CRIU's `--cpu-cap`. If set, this CPU's features are dumped into cpuinfo.img too."""
    log_level: int = 2
    log_file: str = "dump.log"
    seize_timeout_s: int = 1
    """How long criu tries to stop the tasks; whole seconds, at least 1."""
    answer_timeout_s: float = 1.0
    """How long criu waits for the answer to one hook before it fails and thaws by itself."""
    deadline_s: float = 10.0
    """How long the whole request may take before it is abandoned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What to restore and from where, without a container runtime. Needs a PID namespace of its own."""

    images_dir: Path
    work_dir: Path | None = None
    root: Path | None = None
    external: tuple[str, ...] = ()
    tcp_close: bool = True
    shell_job: bool = False
    log_level: int = 2
    log_file: str = "restore.log"
    answer_timeout_s: float = 5.0
    deadline_s: float = 60.0


@contextmanager
def request_for_dump(options: DumpOptions) -> Iterator[rpc_pb2.criu_req]:
    """Make the request of a dump; raises `OSError` if a directory cannot be opened."""
    opts = rpc_pb2.criu_opts(
        pid=options.pid,
        leave_running=options.leave_running,
        tcp_close=options.tcp_close,
        tcp_established=options.tcp_established,
        # What waits to be accepted comes back closed, as all connections do; CRIU would refuse to dump it.
        tcp_skip_in_flight=options.tcp_close,
        ext_unix_sk=options.ext_unix_sk,
        file_locks=options.file_locks,
        link_remap=options.link_remap,
        shell_job=options.shell_job,
        ghost_limit=options.ghost_limit_bytes,
        freeze_cgroup=str(options.freeze_cgroup) if options.freeze_cgroup else None,
        cpu_cap=options.cpu_cap,
        timeout=options.seize_timeout_s,
    )
    _fill_common(opts, options)
    with _directories(opts, options.images_dir, options.work_dir):
        yield rpc_pb2.criu_req(type=rpc_pb2.DUMP, opts=opts)


@contextmanager
def request_for_restore(options: RestoreOptions) -> Iterator[rpc_pb2.criu_req]:
    """Make the request of a restore; raises `OSError` if a directory cannot be opened."""
    opts = rpc_pb2.criu_opts(tcp_close=options.tcp_close, shell_job=options.shell_job)
    _fill_common(opts, options)
    with _directories(opts, options.images_dir, options.work_dir):
        yield rpc_pb2.criu_req(type=rpc_pb2.RESTORE, opts=opts)


@contextmanager
def request_in(kind: rpc_pb2.criu_req_type, images_dir: Path) -> Iterator[rpc_pb2.criu_req]:
    """Make a request that needs a directory only, and no log; raises `OSError` if it cannot be opened."""
    opts = rpc_pb2.criu_opts(log_to_stderr=True)
    with _directories(opts, images_dir, None):
        yield rpc_pb2.criu_req(type=kind, opts=opts)


def _fill_common(opts: rpc_pb2.criu_opts, options: DumpOptions | RestoreOptions) -> None:
    opts.notify_scripts = True
    opts.manage_cgroups_mode = rpc_pb2.IGNORE
    opts.network_lock = rpc_pb2.SKIP
    opts.external.extend(options.external)
    opts.log_level = options.log_level
    opts.log_file = options.log_file
    if options.root is not None:
        opts.root = str(options.root)


@contextmanager
def _directories(opts: rpc_pb2.criu_opts, images_dir: Path, work_dir: Path | None) -> Iterator[None]:
    with ExitStack() as stack:
        opts.images_dir_fd = _open_directory(images_dir, stack)
        opts.work_dir_fd = _open_directory(work_dir, stack) if work_dir else opts.images_dir_fd
        yield


def _open_directory(path: Path, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    return descriptor
