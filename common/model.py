"""The words that every room shares, as values: which epoch, of which term, of which workload.

Nothing here touches a file, a socket or a clock. `EpochId` is ordered: of two epochs of a workload,
the greater one is the newer one, whoever captured it, because a term is never reused.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

PAGE_BYTES = 4096
"""Size of a page on every machine that is served (x86_64, arm64 with 4 KiB pages)."""

NAME_PATTERN = re.compile(r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\Z")
"""Names of nodes and workloads: they become file, cgroup, container and nft names."""

SpaceKind = Literal["task", "shmem", "file"]
"""Whose pages they are: a task's, a shared segment's, or those of the workload's files."""

_EPOCH_ID = re.compile(r"^t(\d+)-e(\d+)$")


class EpochId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names one epoch of one workload: the term that captured it, and its number.

    Numbers go on growing across terms; `(term, epoch)` orders all epochs of a workload.
    """

    term: int
    epoch: int

    def __str__(self) -> str:
        return f"t{self.term}-e{self.epoch}"

    @classmethod
    def parse(cls, text: str) -> EpochId:
        """Read what `str()` wrote. Raises ValueError for anything else."""
        match = _EPOCH_ID.match(text)
        if match is None:
            raise ValueError(f"{text!r} does not name an epoch; one looks like t3-e1042")
        return cls(int(match[1]), int(match[2]))


_HTTP_TARGET = re.compile(r"(?::?([0-9]{1,5}))?(/[\x21-\x7e]*)?")


class HealthCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to tell that a workload serves: exactly one of `tcp`, `http` and `command`.

    `tcp` is a port and `http` a URL path with port (`:8080/health`), both asked for at the virtual
    address where there is one, else at loopback. `command` runs on the node, outside the container;
    exit status 0 is healthy.
    """

    tcp: int | None = None
    http: str | None = None
    command: tuple[str, ...] | None = None
    timeout_ms: int = 1000
    """One attempt's deadline."""
    grace_ms: int = 10_000
    """How long a restored workload may take to pass for the first time."""

    def http_target(self) -> tuple[int, str]:
        """Return port and path of `http`, either of which may be missing: 80, `/`. Raises ValueError."""
        found = _HTTP_TARGET.fullmatch(self.http or "")
        port = int(found[1] or 80) if found else 0
        if found is None or not 0 < port < 1 << 16:
            raise ValueError(f"{self.http!r} is not of the form :PORT/PATH")
        return port, found[2] or "/"


class FilePath(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A directory of the workload that belongs to it: a bind mount of its own from the start.

    `path` is where the workload sees it. `source` is the directory on the node; empty means one below
    the node's state directory, made when the workload is first started.
    """

    path: str
    source: str = ""
    shared: bool = False
    """True: storage that every node sees alike (NFS, DRBD); never replicated, never waited for."""


class WorkloadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One protected workload, as an operator declares it; travels to the replicas with the stream."""

    name: str
    nodes: tuple[str, ...]
    """Who may run it, in order of succession. The first one starts it for the first time."""
    command: tuple[str, ...]
    environment: dict[str, str] = {}
    user: str = "0:0"
    """`uid` or `uid:gid`, numeric: names may differ between nodes."""
    working_directory: str = "/"
    root: str = "/"
    """The root directory that the workload sees; bind-mounted, the same content on every node."""
    private_ipc: bool = True
    """Own System V and POSIX message queue namespace. False saves about 2 ms a freeze."""
    files: tuple[FilePath, ...] = ()
    exclude: tuple[str, ...] = ()
    """What below `files` is not replicated: see `common.excludes`."""
    memory_limit_bytes: int | None = None
    cpu_limit: float | None = None
    """CPUs, e.g. 1.5."""
    open_files_limit: int | None = None
    vip: str | None = None
    """Virtual address with prefix length, e.g. `10.0.0.100/24`; moves with the workload."""
    health: HealthCheck | None = None
    right_to_lead: Literal["manual", "fence", "etcd"] = "manual"
    on_exit: Literal["restart", "failover", "stop"] = "stop"
    """What to do when the workload ends by itself."""
    epoch_interval_ms: int = 0
    """Time between epochs; 0: `interval_ms` says."""
    freeze_deadline_ms: int = 10_000
    """An epoch that would freeze the workload for longer is abandoned."""
    rpo_ms: int = 0
    """How old the newest epoch that another node could restore may be; 0: `objective_ms` says."""
    max_takeover_lag_ms: int = 0
    """How far behind its leader a replica may be and still take over by itself; 0: without limit."""

    def interval_ms(self, *, fast: bool) -> int:
        """Time between epochs: `epoch_interval_ms`, or what suits the memory backend that captures."""
        return self.epoch_interval_ms or (200 if fast else 1000)

    @property
    def objective_ms(self) -> int:
        """The recovery point objective: `rpo_ms`, or five epochs and at least 5 s if that is 0."""
        return self.rpo_ms or max(5 * self.epoch_interval_ms, 5000)

    @property
    def thaw_deadline_ms(self) -> int:
        """From the announcement of a freeze until the keeper releases by force what is still frozen."""
        return self.freeze_deadline_ms + 1000
