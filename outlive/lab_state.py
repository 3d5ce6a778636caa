"""What a lab is on this machine: its names, its paths, its state file, and the way its commands are run.

In: a lab's name and a host's name. Out: where everything that belongs to them stands. All other modules of
the lab ask here, so that whoever tears it down finds what somebody else built, knowing nothing but its name:

    /var/lib/outlive-lab/LAB/state.json      who owns the lab, whether it is kept
    /var/lib/outlive-lab/LAB/HOST/           a host's disk: etc, state, log
    /run/outlive-lab/LAB/                    a tmpfs; its size is what is used, at most 75 % of the memory
    /run/outlive-lab/LAB/HOST/               a host's run directory: sockets, images; emptied by a boot
    /run/outlive-lab/LAB/.netns/HOST         its network namespace; .switch is the one that holds the bridge
    /run/outlive-lab/LAB/.off/HOST           there while the host's power is off
    /sys/fs/cgroup/*/outlive/LAB-HOST/       its containers

Needs little and imports little: the fence command of a lab starts in the middle of a takeover.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.errors import LabError
from common.scheduling import agent_group

DISK_BASE = Path("/var/lib/outlive-lab")
MEMORY_BASE = Path("/run/outlive-lab")
CGROUP_BASE = "outlive"

COMMAND_DEADLINE_S = 10.0
"""Commands of the lab take milliseconds; the rest is for a machine that is busy with tests."""

_LAB_NAME = re.compile(r"[a-z][a-z0-9]{0,5}")
_HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,9}")


class LabState(msgspec.Struct, frozen=True):
    """The state file. A process is told from a later one with the same pid by its start (clock ticks)."""

    name: str
    owner_pid: int
    owner_started_ticks: int
    kept: bool = False

    @property
    def owner_lives(self) -> bool:
        """Whether the process that built the lab is still there."""
        return started_ticks(self.owner_pid) == self.owner_started_ticks


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: Path
    filesystem: str


def check_lab_name(name: str) -> str:
    """Return the name. Raises LabError unless it is at most six letters and digits, a letter first."""
    if not _LAB_NAME.fullmatch(name):
        raise LabError(
            f"{name!r} cannot name a lab", hint="a lower-case letter, then up to 5 letters or digits"
        )
    return name


def check_host_name(name: str) -> str:
    """Return the name. Raises LabError unless an interface and a cgroup can be named after it."""
    if not _HOST_NAME.fullmatch(name):
        raise LabError(
            f"{name!r} cannot name a host", hint="a lower-case letter, then up to 9 letters or digits"
        )
    return name


def disk_dir(lab: str) -> Path:
    """Return the lab's directory on disk; it exists as long as anything of the lab does."""
    return DISK_BASE / check_lab_name(lab)


def memory_dir(lab: str) -> Path:
    """Return the mount point of the lab's tmpfs."""
    return MEMORY_BASE / check_lab_name(lab)


def switch_netns(lab: str) -> Path:
    """Return the network namespace that holds the bridge."""
    return memory_dir(lab) / ".switch"


def host_netns(lab: str, host: str) -> Path:
    """Return a host's network namespace."""
    return memory_dir(lab) / ".netns" / check_host_name(host)


def off_mark(lab: str, host: str) -> Path:
    """Return the file that stands while a host's power is off."""
    return memory_dir(lab) / ".off" / check_host_name(host)


def switch_port(host: str) -> str:
    """Return the name of the bridge port that a host is plugged into."""
    return f"p-{check_host_name(host)}"


def host_names(lab: str) -> tuple[str, ...]:
    """Return the hosts of the lab in no particular order; none if it is not (or no longer) built."""
    return tuple(entry.name for entry in (memory_dir(lab) / ".netns").glob("*"))


def cgroup_dirs(lab: str, host: str = "*") -> tuple[Path, ...]:
    """Return the existing top cgroup directories of a host, or of all of them, in every hierarchy."""
    roots = {mount.point for mount in mounts() if mount.filesystem in ("cgroup", "cgroup2")}
    patterns = (f"{CGROUP_BASE}/{lab}-{host}", agent_group(f"{CGROUP_BASE}/{lab}-{host}"))
    return tuple(found for root in roots for each in patterns for found in root.glob(each))


def read_state(lab: str) -> LabState | None:
    """Return the lab's state; None if there is no such lab. Raises LabError for an unreadable file."""
    path = disk_dir(lab) / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=LabState)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError as error:
        raise LabError(
            f"{path} is damaged: {error}", hint="remove it by hand with what it belongs to"
        ) from error


def write_state(state: LabState, directory: Path) -> None:
    """Replace the state file in `directory` at once: a reader sees the old one or the new one."""
    new = directory / "state.json.new"
    new.write_bytes(msgspec.json.encode(state))
    new.rename(directory / "state.json")


def list_labs() -> tuple[LabState, ...]:
    """Return every lab of this machine: running, kept, or left behind."""
    names = sorted(entry.name for entry in DISK_BASE.glob("*") if _LAB_NAME.fullmatch(entry.name))
    return tuple(state for state in map(read_state, names) if state is not None)


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def mounts() -> tuple[Mount, ...]:
    """Return the mounts that this process sees, in the order in which they cover each other."""
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return tuple(Mount(Path(_unescape(line[4])), line[line.index("-") + 1]) for line in lines)


def mounts_below(directory: Path) -> tuple[Path, ...]:
    """Return the mount points at or below a directory, those that cover others first."""
    points = [mount.point for mount in mounts() if mount.point.is_relative_to(directory)]
    return tuple(reversed(points))


def in_netns(netns: Path, *argv: str) -> tuple[str, ...]:
    """Return the command that runs `argv` in a network namespace, and in nothing else that is new.

    `ip netns exec` would also give it a mount namespace of its own, which CRIU cannot dump a container in.
    """
    return ("nsenter", f"--net={netns}", "--", *argv)


def run(
    *argv: str | os.PathLike[str], script: str = "", check: bool = True, timeout_s: float = COMMAND_DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, `script` on its stdin; kill it at the deadline.

    Raises LabError with the command and its stderr if it fails (unless `check` is off), hangs or is missing.
    """
    shown = " ".join(map(str, argv))
    try:
        done = subprocess.run(
            argv, input=script, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise LabError(
            f"the program {argv[0]!r} is missing", hint="install iproute2, nftables, util-linux and findutils"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{shown}` did not end within {timeout_s:g} s") from error
    if check and done.returncode:
        raise LabError(
            f"`{shown}` ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done


def _unescape(path: str) -> str:
    """Undo the octal escapes of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
