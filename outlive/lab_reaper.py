"""Takes labs apart: at the end of their use, after the death of who built them, or days later by name.

In: a lab's name. Out: nothing of it is left. Everything is found by the rules of `lab_state`, never by what
the builder remembers, and each step may be repeated, so it does not matter where a build or an earlier
tear-down stopped. Every lab has a reaper of its own, a process that is started before anything is built and
holds one end of a pipe: when the owner's end closes, for whatever reason, what is still there is taken apart.
As a command:

    python -m outlive.lab_reaper watch LAB     (started by the lab) wait for the end of stdin, then tear down
    python -m outlive.lab_reaper --all         tear down every lab whose owner is dead and that is not kept
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import LabError
from outlive.lab_power import kill_all
from outlive.lab_state import (
    CGROUP_BASE,
    DISK_BASE,
    MEMORY_BASE,
    cgroup_dirs,
    disk_dir,
    host_names,
    host_netns,
    in_netns,
    list_labs,
    memory_dir,
    mounts_below,
    read_state,
    run,
    switch_netns,
)

REAPER_ATTEMPTS = 5
REAPER_PAUSE_S = 0.5
CGROUP_DEADLINE_S = 5.0
"""A cgroup stays busy for a moment after its last process died."""


async def tear_down(lab: str) -> None:
    """Take a lab apart, whether it is kept, left behind, or our own. Nothing happens if there is none.

    Raises LabError if another living process owns the lab, or if something resists.
    """
    state = read_state(lab)
    if state is not None and state.owner_lives and not state.kept and state.owner_pid != os.getpid():
        raise LabError(
            f"lab {lab} is in use by process {state.owner_pid}", hint="end that process; its lab goes with it"
        )
    await asyncio.to_thread(take_apart, lab)


def reap_leftovers() -> tuple[str, ...]:
    """Take apart every lab whose owner is dead and that is not kept; return their names."""
    left = tuple(state.name for state in list_labs() if not state.owner_lives and not state.kept)
    for lab in left:
        take_apart(lab)
    return left


def take_apart(lab: str) -> None:
    """Leave nothing of the lab: links, processes, mounts, namespaces, cgroups, directories, in this order.

    Blocks for some tenths of a second. Safe to run at the same time in several processes. Raises LabError.
    """
    with _alone(lab) as exists:
        if not exists:
            return
        _unplug_all(lab)
        kill_all([host_netns(lab, host) for host in host_names(lab)], cgroup_dirs(lab))
        unmount_below(disk_dir(lab))
        unmount_below(memory_dir(lab))
        remove_cgroups(cgroup_dirs(lab))
        with suppress(FileNotFoundError):
            memory_dir(lab).rmdir()
        clear_directory(disk_dir(lab))
        disk_dir(lab).rmdir()
        if not list_labs():
            _remove_bases()


def unmount_below(directory: Path) -> None:
    """Unmount everything at and below a directory. Raises LabError if something stays."""
    if points := mounts_below(directory):
        tried = run("umount", "--lazy", *points, check=False)
        if left := mounts_below(directory):
            raise LabError(f"cannot unmount {', '.join(map(str, left))}: {tried.stderr.strip()}")


def remove_cgroups(tops: tuple[Path, ...]) -> None:
    """Remove empty cgroups bottom-up. Raises LabError if one stays busy."""
    deadline = time.monotonic() + CGROUP_DEADLINE_S
    for top in tops:
        for directory, _, _ in os.walk(top, topdown=False):
            while not _removed(directory):
                if time.monotonic() > deadline:
                    raise LabError(f"the cgroup {directory} stays busy")
                time.sleep(0.005)


def clear_directory(directory: Path) -> None:
    """Delete everything in a directory, but nothing of what is mounted below it.

    A container's root is a bind mount of the machine's root. Were one still there, a plain recursive delete
    would remove the machine. So this works in a mount namespace of its own, on a non-recursive bind of the
    directory, which shows no mount below; the empty mount point is then busy, and that is the LabError.
    """
    script = 'mount --bind "$0" "$0" && exec find "$0" -xdev -mindepth 1 -delete'
    run("unshare", "--mount", "--propagation", "private", "sh", "-c", script, directory, timeout_s=60)


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    match argv:
        case ["watch", lab]:
            return _watch(lab)
        case ["--all"]:
            for lab in reap_leftovers():
                print(f"removed lab {lab}", file=sys.stderr)
            return 0
    print("usage: python -m outlive.lab_reaper watch LAB | --all", file=sys.stderr)
    return 2


def _watch(lab: str) -> int:
    """Wait until the owner's end of the pipe on stdin closes, then leave nothing, unless the lab is kept."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    for attempt in range(REAPER_ATTEMPTS):
        state = read_state(lab)
        if state is None or state.kept:
            return 0
        # A command that the dead owner had just started may still be building: hence more than one attempt.
        time.sleep(REAPER_PAUSE_S * bool(attempt))
        try:
            take_apart(lab)
        except (LabError, OSError) as error:
            print(f"attempt {attempt + 1}: {error}", file=sys.stderr, flush=True)
    return int(read_state(lab) is not None)


@contextmanager
def _alone(lab: str) -> Iterator[bool]:
    """Keep other tear-downs of the lab out; yields whether there is (still) something to tear down."""
    try:
        directory = os.open(disk_dir(lab), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield disk_dir(lab).exists()
    finally:
        os.close(directory)


def _unplug_all(lab: str) -> None:
    """Delete all ports of the bridge, at once and for sure: a namespace that goes away takes its time."""
    switch = switch_netns(lab)
    if switch not in mounts_below(switch):
        return
    links = json.loads(run(*in_netns(switch, "ip", "-j", "link", "show", "type", "veth")).stdout or "[]")
    ports = [link["ifname"] for link in links if "ifname" in link]
    run(*in_netns(switch, "ip", "-batch", "-"), script="".join(f"link delete dev {port}\n" for port in ports))


def _removed(cgroup: str) -> bool:
    """Try to remove a cgroup; False if it is busy."""
    try:
        os.rmdir(cgroup)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _remove_bases() -> None:
    """Remove the directories that the last lab leaves empty; what is not empty belongs to somebody else."""
    cgroups = [mount / CGROUP_BASE for mount in Path("/sys/fs/cgroup").glob("*")]
    for directory in (DISK_BASE, MEMORY_BASE, Path("/sys/fs/cgroup", CGROUP_BASE), *cgroups):
        with suppress(OSError):
            directory.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
