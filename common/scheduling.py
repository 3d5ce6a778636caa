"""Who gets the processors: the workloads before the agent, except while one of them waits for it.

In: what the agent is about to do. Out: the weight of its cgroup. Four of them:

- *spare*: what others leave (the kernel's idle class). Compressing, hashing and folding can wait; a workload
  whose processor is taken from it cannot. The normal state.
- *quarter*: a quarter of any other group's, while an epoch is overdue: on a machine that is never idle,
  protection must not starve.
- *fair*: as much as any other group, when that was not enough.
- *first*: before others, from before a freeze until after it, and while a workload is started or restored.

criu, the injector and conmon leave the group as soon as they are started, and are on a par with workloads:
what criu waits for, a stopped workload waits for. Within a freeze criu comes first, too.

The group lies at the top of the hierarchy, `CGROUP_PARENT.agent` with dashes for slashes, for weights count
among siblings only: from within a slice, the agent would give way to that slice alone. Where it cannot be
made, nothing is changed. Files and values: cgroup-v2.rst and sched-design-CFS.rst of
the kernel; `cpu.idle` since 5.15.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")
_FILES: Final = (("cpu.weight", 100), ("cpu.shares", 1024))
"""What holds the weight, in version 2 and 1, and what a group has that nobody has changed."""
_QUARTER: Final = 0.25
_FIRST: Final = 10
"""Times the weight of an unchanged group; not more, for heartbeats want their turn as well."""
_FAVOURED_NICE: Final = -10
"""About as much, for a single process (sched-nice-design.rst): 9,548 where others have 1,024."""


Need = Literal["spare", "quarter", "fair"]


class CpuShare:
    """The weight of this process among all. Made by `CpuShare.take`; without a group it does nothing."""

    def __init__(self, group: Path | None) -> None:
        """`group` is the directory of a cgroup that this process is in."""
        self.group = group
        self._claims = 0
        self._need: Need = "spare"
        self._files: tuple[int, int, int] | None = None
        self._state = "fair"
        if group is None:
            return
        for name, fair in _FILES:
            if (group / name).exists():
                flags = os.O_WRONLY | os.O_CLOEXEC
                idle = os.open(group / "cpu.idle", flags)
                self._files = idle, os.open(group / name, flags), fair
        self._apply()

    @classmethod
    def take(
        cls, cgroup_parent: str, *, spare: bool = True, mount: Path = _MOUNT, own: Path = _OWN
    ) -> CpuShare:
        """Move this process into a group of its own, if it has none and may; children follow.

        Not if it is not to take only what is `spare`. Never raises.
        """
        if not spare:
            return cls(None)
        try:
            return cls(_own_group(cgroup_parent, mount, own))
        except (OSError, ValueError):
            return cls(None)

    @property
    def state(self) -> str:
        """`spare`, `quarter`, `fair` or `first`; `fair` without a group."""
        return self._state

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Come first as long as the block takes; claims may overlap."""
        self.claim()
        try:
            yield
        finally:
            self.release()

    def claim(self) -> None:
        """Come first until `release` was called as often as this."""
        self._claims += 1
        self._apply()

    def release(self) -> None:
        """End one claim."""
        self._claims -= 1
        self._apply()

    def need(self, need: Need) -> None:
        """Say how much is needed while nothing is claimed: more than what is spare if work has waited."""
        self._need = need
        self._apply()

    def _apply(self) -> None:
        state = "first" if self._claims > 0 else self._need
        if self._files is None or state == self._state:
            return
        idle, weight, fair = self._files
        with contextlib.suppress(OSError):  # the group is gone: nothing here depends on it
            if state == "spare":
                os.pwrite(idle, b"1", 0)
            else:
                if self._state == "spare":
                    os.pwrite(idle, b"0", 0)
                times = {"quarter": _QUARTER, "fair": 1, "first": _FIRST}[state]
                os.pwrite(weight, str(int(fair * times)).encode(), 0)
        self._state = state


def leave(pid: int) -> None:
    """Have a child leave the agent's group, to be on a par with workloads."""
    with contextlib.suppress(OSError):
        cpu_home().write_text(str(pid))


def favour(pid: int) -> None:
    """Have a child that left the group come before others: from now on somebody waits for it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _FAVOURED_NICE)


def cpu_home(mount: Path = _MOUNT, own: Path = _OWN) -> Path:
    """Return the file through which a child leaves the agent's group; /dev/null if there is none to leave."""
    with contextlib.suppress(OSError, ValueError):
        top, relative = _hierarchy(mount, own)
        if _is_agents(relative):
            return top / "cgroup.procs"
    return Path("/dev/null")


def agent_group(cgroup_parent: str) -> str:
    """Return the name of an agent's cgroup at the top of its hierarchy."""
    return cgroup_parent.strip("/").replace("/", "-") + ".agent"


def _own_group(cgroup_parent: str, mount: Path, own: Path) -> Path | None:
    top, _ = _hierarchy(mount, own)
    group = top / agent_group(cgroup_parent)
    with contextlib.suppress(OSError):  # version 2 only; it may be on already
        (top / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir(exist_ok=True)
    if not (group / "cpu.idle").exists():
        group.rmdir()
        return None
    (group / "cgroup.procs").write_text("0")
    return group


def _is_agents(relative: str) -> bool:
    return relative.count("/") == 1 and relative.endswith(".agent")


def _hierarchy(mount: Path, own: Path) -> tuple[Path, str]:
    """Return the mount point that has the cpu controller, and our path in it. Raises ValueError."""
    lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    paths = {controller: path for _, controllers, path in lines for controller in controllers.split(",")}
    for controller, directories in (("cpu", ("cpu", "cpu,cpuacct")), ("", (".",))):
        for directory in directories:
            if controller in paths and (mount / directory / "cgroup.procs").exists():
                return mount / directory, paths[controller]
    raise ValueError("no hierarchy has the cpu controller")
