"""The power switch of a lab's hosts, which is also their fence command.

In: a lab's name and a host's name; everything else is read from the file system and the kernel, so it works
from any process on the machine, inside any other host too. Out: the host's link cut, *then* everything in it
killed (nothing that dies may say goodbye), then both read back. As a command:

    python -m outlive.lab_power LAB HOST off       exit 0: confirmed off, 1: refused, 2: unknown
    python -m outlive.lab_power LAB HOST status    exit 0: off, 1: on, 2: unknown
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from common.errors import LabError
from outlive.lab_state import (
    cgroup_dirs,
    host_netns,
    in_netns,
    off_mark,
    run,
    switch_netns,
    switch_port,
)

KILL_DEADLINE_S = 10.0
"""A killed process may sit in the kernel for a while: a large address space takes ~0.1 s a GiB to free."""

CONFIRMED, REFUSED, UNKNOWN = 0, 1, 2


def power_off(lab: str, host: str) -> float:
    """Cut the link, kill every process of the host, confirm both; return when, on the monotonic clock.

    The instant is one just before the cut. Killed are all processes in the host's network namespace or in its
    cgroups, the caller too if it is there; what left both (a daemon in a namespace of its own outside of a
    container) is not found. Raises LabError if anything is not confirmed: the host must then be taken for
    running. Off already: confirmed again.
    """
    _must_exist(lab, host)
    off_mark(lab, host).touch()
    instant = time.monotonic()
    cut_link(lab, host)
    kill_all([host_netns(lab, host)], cgroup_dirs(lab, host))
    if not is_off(lab, host):
        raise LabError(f"host {host} of lab {lab} came back while its power was being cut")
    return instant


def is_off(lab: str, host: str) -> bool:
    """Read from the kernel whether the host has no link and no process. Raises LabError if it is unknown."""
    return not link_is_up(lab, host) and not processes_of(lab, host)


def cut_link(lab: str, host: str) -> None:
    """Take the host's port of the bridge down: not one packet passes from now on, either way."""
    _set_link(lab, host, "down")


def mend_link(lab: str, host: str) -> None:
    """Undo `cut_link`."""
    _set_link(lab, host, "up")


def link_is_up(lab: str, host: str) -> bool:
    """Tell whether the host's port of the bridge is up."""
    _must_exist(lab, host)
    shown = run(*in_netns(switch_netns(lab), "ip", "-j", "link", "show", "dev", switch_port(host))).stdout
    return "UP" in json.loads(shown)[0]["flags"]


def processes_of(lab: str, host: str) -> frozenset[int]:
    """Return the processes of a host: those in its network namespace and those in its cgroups."""
    _must_exist(lab, host)
    return _processes({host_netns(lab, host).stat().st_ino}, cgroup_dirs(lab, host))


def kill_all(namespaces: Iterable[Path], cgroups: Iterable[Path]) -> None:
    """Kill what runs in these network namespaces or below these cgroups until nothing is left.

    Raises LabError if something is still there at the deadline (KILL_DEADLINE_S).
    """
    inodes, cgroups = {namespace.stat().st_ino for namespace in namespaces}, tuple(cgroups)
    deadline = time.monotonic() + KILL_DEADLINE_S
    while found := _processes(inodes, cgroups):
        if time.monotonic() > deadline:
            raise LabError(
                f"processes do not die: {sorted(found)}", hint="see their state in /proc/PID/stack"
            )
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _thaw(cgroups)
        time.sleep(0.002)


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit code of a fence command."""
    try:
        lab, host, verb = argv
        if verb not in ("off", "status"):
            raise ValueError(verb)
    except ValueError:
        print("usage: python -m outlive.lab_power LAB HOST off|status", file=sys.stderr)
        return UNKNOWN
    try:
        if verb == "status":
            return CONFIRMED if is_off(lab, host) else REFUSED
        if os.getpid() in processes_of(lab, host):
            print(f"host {host} of lab {lab} does not cut its own power", file=sys.stderr)
            return REFUSED
        power_off(lab, host)
    except (LabError, OSError) as error:
        print(error, file=sys.stderr)
        return UNKNOWN
    return CONFIRMED


def _must_exist(lab: str, host: str) -> None:
    if not host_netns(lab, host).exists():
        raise LabError(f"there is no host {host} in a lab {lab}")


def _set_link(lab: str, host: str, state: str) -> None:
    _must_exist(lab, host)
    run(*in_netns(switch_netns(lab), "ip", "link", "set", "dev", switch_port(host), state))


def _processes(inodes: set[int], cgroups: Iterable[Path]) -> frozenset[int]:
    """Return the living processes in any of these network namespaces (by inode) or below these cgroups."""
    wanted = {f"net:[{inode}]" for inode in inodes}
    of_cgroups = _listed_in(cgroups)
    return frozenset(
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and (name := _net_of(entry)) and (name in wanted or int(entry) in of_cgroups)
    )


def _net_of(pid: str) -> str | None:
    """Return the name of a process's network namespace; None for the dead, zombies included."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def _listed_in(cgroups: Iterable[Path]) -> frozenset[int]:
    """Return the pids in these cgroups and below; a cgroup that vanishes meanwhile has none."""
    pids: set[int] = set()
    for top in cgroups:
        for directory, _, _ in os.walk(top):
            with suppress(OSError):
                pids.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    return frozenset(pids)


def _thaw(cgroups: Iterable[Path]) -> None:
    """Thaw what is frozen: a version 1 freezer lets a killed process die only then (it runs no more code)."""
    for top in cgroups:
        for directory, _, files in os.walk(top):
            if "freezer.state" in files:
                with suppress(OSError):
                    Path(directory, "freezer.state").write_text("THAWED")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
