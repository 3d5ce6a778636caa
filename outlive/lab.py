"""The lab: hosts of a cluster as network namespaces on a bridge, for the demo, system tests and benchmarks.

In: names. Out: hosts with an address, a disk, a run directory on tmpfs, a power switch and a cable; programs
are started in them by whoever uses the lab. The bridge has a network namespace of its own (the switch), so
the machine's own network gets nothing, its firewall and bridge filters do not matter, and labs cannot meet:
all use the same subnet. When the `async with` ends, or its process dies, nothing is left (`lab_reaper`),
unless the lab is kept.

    async with Lab() as lab:
        a, b = await lab.add_host("a"), await lab.add_host("b")
        await a.spawn(["redis-server", "--port", "6379"], log=a.log_dir / "redis.log")
        await lab.power_off("a")
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from types import MappingProxyType, TracebackType

import structlog

from common.errors import LabError
from outlive import lab_power
from outlive.lab_reaper import clear_directory, remove_cgroups, take_apart, unmount_below
from outlive.lab_state import (
    COMMAND_DEADLINE_S,
    DISK_BASE,
    LabState,
    cgroup_dirs,
    check_host_name,
    check_lab_name,
    disk_dir,
    host_netns,
    in_netns,
    memory_dir,
    off_mark,
    run,
    started_ticks,
    switch_netns,
    switch_port,
    write_state,
)

log = structlog.get_logger(__name__)

SUBNET = IPv4Network("10.99.0.0/24")
SUBNET6 = IPv6Network("fd00:6c61:6200::/64")
FIRST_HOST, FIRST_VIP = 11, 101
"""Hosts are .11, .12, …; .101 and up are left to service addresses."""

REAPER_DEADLINE_S = 30.0
_FAULTS_TABLE = "outlive_lab_faults"


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a lab. Its interface is `eth0`; its processes see the machine's file system and pids."""

    lab: str
    name: str
    address: IPv4Interface
    address6: IPv6Interface
    interface: str = "eth0"

    @property
    def netns(self) -> Path:
        """Its network namespace; `nsenter --net=PATH -- COMMAND` looks at the lab from inside."""
        return host_netns(self.lab, self.name)

    @property
    def dir(self) -> Path:
        """Its disk: survives loss of power. `etc_dir`, `state_dir` and `log_dir` are there from the start."""
        return disk_dir(self.lab) / self.name

    @property
    def etc_dir(self) -> Path:
        """For configuration and keys; on disk."""
        return self.dir / "etc"

    @property
    def state_dir(self) -> Path:
        """For stores, terms and roles; on disk."""
        return self.dir / "state"

    @property
    def log_dir(self) -> Path:
        """For the output of what is started here; on disk."""
        return self.dir / "log"

    @property
    def run_dir(self) -> Path:
        """For sockets, runc's state and images; on tmpfs, empty again after `Lab.power_on`."""
        return memory_dir(self.lab) / self.name

    @property
    def boot_id_file(self) -> Path:
        """Holds a UUID that changes with every boot of this host (the kernel's own is the machine's)."""
        return self.run_dir / "boot_id"

    @property
    def cgroup_parent(self) -> str:
        """What the cgroup paths of its containers must start with: `{cgroup_parent}/WORKLOAD`."""
        return f"/outlive/{self.lab}-{self.name}"

    @property
    def fence_command(self) -> tuple[str, ...]:
        """What others run to turn *this* host off. Exits with 0: confirmed, 1: refused, 2: unknown."""
        return (sys.executable, "-m", "outlive.lab_power", self.lab, self.name, "off")

    async def spawn(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> asyncio.subprocess.Process:
        """Start a program in this host, in a session of its own, output appended to `log`; do not wait.

        The process that is returned is the program itself. `env` replaces the environment. It lives until it
        ends, the host's power goes or the lab is torn down. Raises LabError while the power is off.
        """
        self._refuse_if_off()
        with log.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *in_netns(self.netns, *[os.fspath(part) for part in argv]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        script: str = "",
        check: bool = True,
        timeout_s: float = COMMAND_DEADLINE_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this host to its end, `script` on its stdin.

        The end is also that of its output: a daemon that it leaves behind must close its standard streams.
        Raises LabError, with its stderr, if it fails (unless `check` is off) or passes the deadline.
        """
        self._refuse_if_off()
        command = in_netns(self.netns, *[os.fspath(part) for part in argv])
        return await asyncio.to_thread(run, *command, script=script, check=check, timeout_s=timeout_s)

    def _refuse_if_off(self) -> None:
        if off_mark(self.lab, self.name).exists():
            raise LabError(f"the power of host {self.name} is off", hint="power_on it first")


class Lab:
    """A bridge and its hosts, from `async with` to its end.

    Not to be used by two tasks at once, except that different hosts may be added concurrently.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = check_lab_name(name if name is not None else f"l{secrets.token_hex(2)}")
        self._hosts: dict[str, Host] = {}
        self._one_way_cuts: set[tuple[str, str]] = set()
        self._reaper: subprocess.Popen[bytes] | None = None
        self._kept = False

    @property
    def name(self) -> str:
        """The lab's name, unique on this machine while it stands."""
        return self._name

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts by name, in the order in which they were added."""
        return MappingProxyType(self._hosts)

    @staticmethod
    def vip(number: int = 0) -> IPv4Interface:
        """Return a service address that is no host's: 10.99.0.101/24 and up."""
        return IPv4Interface((SUBNET[FIRST_VIP + number], SUBNET.prefixlen))

    @staticmethod
    def vip6(number: int = 0) -> IPv6Interface:
        """Return an IPv6 service address that is no host's."""
        return IPv6Interface((SUBNET6[FIRST_VIP + number], SUBNET6.prefixlen))

    async def __aenter__(self) -> Lab:
        """Claim the name and build the switch. Raises LabError; nothing is left then."""
        self._claim()
        try:
            self._reaper = _start_reaper(self._name)
            await asyncio.to_thread(_build_switch, self._name)
        except BaseException:
            await self._close()
            raise
        log.info("lab.built", lab=self._name, directory=str(disk_dir(self._name)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tear down, unless the lab is kept. Raises LabError if something resists."""
        await self._close()

    async def add_host(self, name: str) -> Host:
        """Plug a new host in, with `eth0` up and directories made. Raises LabError."""
        if check_host_name(name) in self._hosts:
            raise LabError(f"lab {self._name} has a host {name} already")
        number = FIRST_HOST + len(self._hosts)
        host = Host(
            self._name,
            name,
            IPv4Interface((SUBNET[number], SUBNET.prefixlen)),
            IPv6Interface((SUBNET6[number], SUBNET6.prefixlen)),
        )
        self._hosts[name] = host
        await asyncio.to_thread(_build_host, host)
        return host

    async def power_off(self, name: str) -> float:
        """Cut the host's link, then kill everything in it; return when it was cut (monotonic clock, s).

        When this returns, both are confirmed. What the host kept in memory is lost at `power_on`.
        """
        instant = await asyncio.to_thread(lab_power.power_off, self._name, self._host(name).name)
        log.info("lab.power_off", lab=self._name, host=name)
        return instant

    async def power_on(self, name: str) -> None:
        """Boot a host that is off: addresses as built, no rules, no mounts, empty run directory, new boot id.

        Nothing is started in it. Raises LabError if it is not off.
        """
        host = self._host(name)
        if not await self.is_off(name):
            raise LabError(f"host {name} is not off")
        await asyncio.to_thread(_forget_memory, host)
        await asyncio.to_thread(_boot, host)
        off_mark(self._name, name).unlink(missing_ok=True)
        log.info("lab.power_on", lab=self._name, host=name)

    async def is_off(self, name: str) -> bool:
        """Tell whether the host has neither a link nor a process."""
        return await asyncio.to_thread(lab_power.is_off, self._name, self._host(name).name)

    async def cut(self, name: str) -> None:
        """Pull the host's cable: nothing gets in or out. Everything in it runs on."""
        await asyncio.to_thread(lab_power.cut_link, self._name, self._host(name).name)

    async def cut_one_way(self, source: str, target: str) -> None:
        """Lose every frame from one host to another in the switch; the other way still works."""
        await self._set_one_way_cuts(
            self._one_way_cuts | {(self._host(source).name, self._host(target).name)}
        )

    async def mend(self, name: str) -> None:
        """Undo every cut that this host is part of. Raises LabError while its power is off."""
        if off_mark(self._name, self._host(name).name).exists():
            raise LabError(f"the power of host {name} is off", hint="power_on mends its link too")
        others = {pair for pair in self._one_way_cuts if name not in pair}
        if others != self._one_way_cuts:
            await self._set_one_way_cuts(others)
        await asyncio.to_thread(lab_power.mend_link, self._name, name)

    def keep(self) -> None:
        """Leave the lab up when its `async with` or its process ends; `lab_reaper.tear_down` removes it."""
        self._kept = True
        write_state(self._state(), disk_dir(self._name))

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            raise LabError(f"lab {self._name} has no host {name}")
        return self._hosts[name]

    def _state(self) -> LabState:
        pid = os.getpid()
        return LabState(self._name, pid, started_ticks(pid) or 0, self._kept)

    def _claim(self) -> None:
        """Make the lab's directory, state file and all, or refuse: another lab's is never taken over."""
        if os.geteuid():
            raise LabError("a lab needs root", hint="namespaces, mounts and cgroups are made for its hosts")
        new = DISK_BASE / f".{self._name}.{os.getpid()}"
        _make_directory(new)
        try:
            write_state(self._state(), new)
            new.rename(disk_dir(self._name))
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise LabError(f"there is a lab {self._name} already", hint="choose another name") from error

    async def _set_one_way_cuts(self, cuts: set[tuple[str, str]]) -> None:
        rules = "".join(
            f'add rule bridge {_FAULTS_TABLE} forward iifname "{switch_port(source)}"'
            f' oifname "{switch_port(target)}" drop\n'
            for source, target in sorted(cuts)
        )
        script = f"add table bridge {_FAULTS_TABLE}\ndelete table bridge {_FAULTS_TABLE}\n" + (
            f"add table bridge {_FAULTS_TABLE}\n"
            f"add chain bridge {_FAULTS_TABLE} forward {{ type filter hook forward priority 0; }}\n{rules}"
            if cuts
            else ""
        )
        await asyncio.to_thread(run, *in_netns(switch_netns(self._name), "nft", "-f", "-"), script=script)
        self._one_way_cuts = cuts

    async def _close(self) -> None:
        """Tear down unless kept, then let the reaper go; it has nothing more to do, or tries once more."""
        try:
            if not self._kept:
                await asyncio.shield(asyncio.to_thread(take_apart, self._name))
                log.info("lab.torn_down", lab=self._name)
        finally:
            if self._reaper is not None:
                await asyncio.to_thread(self._reaper.communicate, timeout=REAPER_DEADLINE_S)


def _start_reaper(lab: str) -> subprocess.Popen[bytes]:
    """Start the process that outlives us; its stdin is a pipe whose only other end we hold."""
    with (disk_dir(lab) / "reaper.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "outlive.lab_reaper", "watch", lab],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,
        )


def _build_switch(lab: str) -> None:
    """Mount the lab's tmpfs; make the switch's network namespace and the bridge in it."""
    memory = memory_dir(lab)
    _make_directory(memory)
    run("mount", "-t", "tmpfs", "-o", "mode=0711,size=75%", "outlive-lab", memory)
    for part in (".netns", ".off"):
        (memory / part).mkdir()
    _make_netns(switch_netns(lab))
    # Without multicast snooping neighbour discovery needs no group reports; without STP a port works at once.
    run(
        *in_netns(switch_netns(lab), "ip", "-batch", "-"),
        script="link add name br0 type bridge stp_state 0 mcast_snooping 0\nlink set dev br0 up\n",
    )


def _build_host(host: Host) -> None:
    """Make a host's directories and namespace, plug it in and boot it."""
    for directory in (host.etc_dir, host.state_dir, host.log_dir, host.run_dir):
        directory.mkdir(mode=0o700, parents=True)
    _make_netns(host.netns)
    port = switch_port(host.name)
    run(
        *in_netns(switch_netns(host.lab), "ip", "-batch", "-"),
        script=f"link add name {port} type veth peer name {host.interface} netns {host.netns}\n"
        f"link set dev {port} master br0\n",
    )
    _boot(host)


def _boot(host: Host) -> None:
    """Bring a host's network to what it is after a boot, and its link up."""
    host.boot_id_file.write_text(f"{uuid.uuid4()}\n")
    run(
        *in_netns(host.netns, "ip", "-batch", "-"),
        script=f"link set dev lo up\n"
        f"link set dev {host.interface} down\n"
        f"address flush dev {host.interface}\n"
        f"address add {host.address} dev {host.interface}\n"
        f"address add {host.address6} dev {host.interface} nodad\n"
        f"link set dev {host.interface} up\n",
    )
    lab_power.mend_link(host.lab, host.name)


def _forget_memory(host: Host) -> None:
    """Lose what a host that is off had in memory: mounts, cgroups, packet filters, its run directory."""
    unmount_below(host.dir)
    unmount_below(host.run_dir)
    remove_cgroups(cgroup_dirs(host.lab, host.name))
    clear_directory(host.run_dir)
    run(*in_netns(host.netns, "nft", "flush", "ruleset"))


def _make_directory(path: Path) -> None:
    """Make a directory below one that the tear-down of another lab may be removing because it is empty."""
    for _ in range(3):
        with suppress(FileNotFoundError):
            path.mkdir(parents=True, mode=0o711)
            return
    path.mkdir(parents=True, mode=0o711)


def _make_netns(path: Path) -> None:
    """Make a network namespace that a file holds open, so that it needs no process."""
    path.touch()
    run("unshare", f"--net={path}", "true")
