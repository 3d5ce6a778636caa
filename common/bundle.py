"""From a workload's declaration to the OCI bundle that runc runs. Pure: values in, values out.

Why the bundle looks as it does (each found out on a real CRIU):

- own PID, mount and IPC namespaces: restored PIDs and System V ids must not meet others on the node;
  the network is the node's own, so that the virtual address can serve it;
- the root is a bind mount, made in a private mount namespace of the container's shim: nothing of it
  shows in the node's own mount table, and it is gone when the shim is;
- no tmpfs anywhere: CRIU would archive each one inside the freeze;
- every bind mount is *external* to CRIU, keyed by where the workload sees it, so a node may keep the
  source elsewhere;
- cgroups are ours, not CRIU's: a restored workload lives in the cgroup of the node that restores it.
"""

from __future__ import annotations

import resource
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import NodeConfig
from common.model import WorkloadSpec

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
"""What container engines grant by default; a workload that needs more is not served yet."""

_CPU_PERIOD_US = 100_000
_OPEN_FILES = 1024
"""What systemd gives services too: programs that use select(2) go wrong beyond. The agent may open more."""

CRIU_RESTORE_SETTINGS = "tcp-close\nnetwork-lock skip\nmanage-cgroups=ignore\nfile-locks\nlink-remap\n"
"""What runc cannot be told by flags; it hands this file to criu (annotation `org.criu.config`)."""


@dataclass(frozen=True, slots=True)
class BindMount:
    """A directory of the node, seen by the workload at `destination`."""

    destination: str
    source: str

    @property
    def external(self) -> str:
        """CRIU's name for it: keyed by destination, so that the source may differ between nodes."""
        return f"mnt[{self.destination}]:{self.destination}"


@dataclass(frozen=True, slots=True)
class WorkloadPaths:
    """Where one workload's things lie on one node. Nothing else in the project builds these paths."""

    config: NodeConfig
    name: str

    @property
    def bundle(self) -> Path:
        """The OCI bundle: made anew at every start."""
        return Path(self.config.node.run_dir) / "workloads" / self.name

    @property
    def state(self) -> Path:
        """What outlives a boot: the workload's own directories and its log."""
        return Path(self.config.node.state_dir) / "workloads" / self.name

    @property
    def rootfs(self) -> Path:
        """Mount point of the root; a mount only in the container's own namespaces."""
        return self.bundle / "rootfs"

    @property
    def pid_file(self) -> Path:
        """Host PID of the container's first process."""
        return self.bundle / "init.pid"

    @property
    def shim_pid_file(self) -> Path:
        """Host PID of conmon, which writes the log and waits for the exit code."""
        return self.bundle / "conmon.pid"

    @property
    def shim_answer(self) -> Path:
        """What conmon says of its start: one line of JSON."""
        return self.bundle / "conmon.answer"

    @property
    def incarnation_file(self) -> Path:
        """JSON: which run of the workload this is, and what it was restored from."""
        return self.bundle / "incarnation.json"

    @property
    def exit_dir(self) -> Path:
        """Conmon writes the exit code here, in a file named like the container."""
        return self.bundle / "exit"

    @property
    def log(self) -> Path:
        """Standard output and error of the workload, each line with its time (CRI log format)."""
        return self.state / "log"

    @property
    def criu_settings(self) -> Path:
        """The file that runc hands to criu at a restore."""
        return self.bundle / "criu.conf"

    @property
    def cgroup(self) -> str:
        """Cgroup of the workload, below every hierarchy's mount point."""
        return f"{self.gate}/run"

    @property
    def gate(self) -> str:
        """The cgroup around it, by which it is held while it may not run (`common.gate`)."""
        return f"{self.config.node.cgroup_parent.rstrip('/')}/{self.name}"


def bind_mounts(spec: WorkloadSpec, paths: WorkloadPaths) -> tuple[BindMount, ...]:
    """Return every bind mount of the container in mount order."""
    declared = (
        BindMount(item.path, item.source or str(paths.state / "files" / str(index)))
        for index, item in enumerate(spec.files)
    )
    return (
        BindMount("/dev", "/dev"),
        BindMount("/dev/pts", "/dev/pts"),
        BindMount("/dev/shm", str(paths.bundle / "shm")),  # noqa: S108 - the workload's view of it
        *declared,
    )


def file_roots(spec: WorkloadSpec, paths: WorkloadPaths) -> dict[bytes, Path]:
    """Return the directories that are replicated: as declared, and where they are on this node."""
    replicated = {item.path for item in spec.files if not item.shared}
    return {
        mount.destination.encode(): Path(mount.source)
        for mount in bind_mounts(spec, paths)
        if mount.destination in replicated
    }


def process_environment(spec: WorkloadSpec) -> dict[str, str]:
    """Return the workload's whole environment."""
    return {"PATH": _DEFAULT_PATH} | spec.environment


def runtime_config(spec: WorkloadSpec, paths: WorkloadPaths) -> dict[str, Any]:
    """Return the content of the bundle's config.json (OCI runtime specification 1.0.2)."""
    uid, _, gid = spec.user.partition(":")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (spec.open_files_limit or min(_OPEN_FILES, most)), (spec.open_files_limit or most)
    limits = [{"type": "RLIMIT_NOFILE", "hard": hard, "soft": soft}]
    resources: dict[str, Any] = {"devices": [{"allow": True, "access": "rwm"}]}
    if spec.memory_limit_bytes is not None:
        resources["memory"] = {"limit": spec.memory_limit_bytes}
    if spec.cpu_limit is not None:
        resources["cpu"] = {"period": _CPU_PERIOD_US, "quota": int(spec.cpu_limit * _CPU_PERIOD_US)}
    namespaces = ["pid", "mount", *(["ipc"] if spec.private_ipc else [])]
    capabilities = dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "annotations": {"org.criu.config": str(paths.criu_settings)},
        "process": {
            "terminal": False,
            "user": {"uid": int(uid), "gid": int(gid or uid)},
            "args": list(spec.command),
            "env": [f"{key}={value}" for key, value in process_environment(spec).items()],
            "cwd": spec.working_directory,
            "capabilities": capabilities,
            "rlimits": limits,
            "noNewPrivileges": False,
        },
        "root": {"path": str(paths.rootfs), "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            *(
                {
                    "destination": mount.destination,
                    "type": "bind",
                    "source": mount.source,
                    "options": ["bind", "rprivate"],
                }
                for mount in bind_mounts(spec, paths)
            ),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "cgroupsPath": paths.cgroup,
            "resources": resources,
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }


def restore_command(spec: WorkloadSpec, paths: WorkloadPaths, criu: str) -> tuple[str, ...]:
    """Return the words that run stock `criu restore` for this workload, without Outlive.

    What the images need (where they are, which pipes to replace) is to be appended. The root is mounted
    in namespaces of its own; that mount is gone when the last process in it is.
    """
    mounts = bind_mounts(spec, paths)
    made = shlex.join([mount.source for mount in mounts])
    script = f'mkdir -p {made} "$2" && mount --bind "$1" "$2" && shift 2 && exec "$@"'
    externals = [
        word for mount in mounts for word in ("--external", f"mnt[{mount.destination}]:{mount.source}")
    ]
    return (
        *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh"),
        *(spec.root, str(paths.rootfs), criu, "restore", "--root", str(paths.rootfs)),
        *("--manage-cgroups=ignore", "--network-lock", "skip", "--tcp-close", "--file-locks", "--link-remap"),
        *externals,
    )
