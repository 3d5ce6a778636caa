"""What happens when something breaks, in the lab: one line for each failure, and never two that answer.

    python -m tests.campaigns.scenarios [--only power-loss-a,...] [--output json|table]

Two hosts with the product, a client, a power switch as the fence (or sshd), or three members of etcd. The
workload says on which host it runs and in which life, and counts. `vip_prober` on the client asks every 10 ms
who has the address; beside it, this process looks as often where copies run that are not frozen. Each failure
is one function that breaks something, waits for the state that a human should find, mends it, and waits until
all is well again.

Prints one JSON object, or a table for the docs. Exits with 1 if two answered, two ran, or a state was not
reached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from common.bundle import WorkloadPaths
from common.container import cgroup_frozen, running_init_pid
from common.control import TermHistory, WorkloadStatus
from common.errors import OutliveError
from common.model import WorkloadSpec
from common.threads import in_thread
from outlive.cli.running import configure_logs
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Host, Lab
from outlive.lab_etcd import LabEtcd
from tests.campaigns.vip_prober import EVERY_S, WORKLOAD

NAME, _PORT = "witness", 7100
_QUIET_S = 1.0
"""How long a state has to stay as it is before it counts as what a human finds."""
_TOGETHER_S = 3 * EVERY_S
"""Answers of two hosts, one so soon after the other, are two that answer at once: no move is that fast."""
_DISK_MIB = 96
_TTL_S = 3
_PF_EXITING = 4
"""<linux/sched.h>; in proc(5)'s `stat`."""
_STOLEN_ANSWERS = int(2 * 1.5 / EVERY_S)
"""Both hosts answer each question until it was looked at twice, a second later, and some time for it."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One failure."""

    scenario: str
    broke: str
    """What was done."""
    found: dict[str, str]
    """State of each node, and why, when things had come to rest: what a human finds."""
    cause: str
    """Why the term began that was the newest then, as `history` has it."""
    afterwards: dict[str, str]
    """The same when it was mended."""
    outage_ms: float
    """The longest time without an answer from the workload."""
    lives: int
    """In how many processes the workload has lived: one, and one more for each restore."""
    lost_count: int
    """By how much it has counted back at most: what it did after the epoch that was restored."""
    answered: int
    two_answered: int
    """Times at which two hosts answered for the address."""
    two_ran: int
    """Looks at which two copies ran."""
    problem: str = ""
    """What was not as it should be."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All failures."""

    schema_version: int
    commit: str
    seconds: float
    passed: bool
    outcomes: tuple[Outcome, ...]


@dataclass
class Pair:
    """A workload that leads on `a` and is protected by `b`, with everybody who looks at it."""

    lab: Lab
    nodes: dict[str, Node]
    client: Host
    log: Path
    etcd: LabEtcd | None = None
    two_ran: int = 0
    found: dict[str, str] = field(default_factory=dict)
    cause: str = ""
    broke: str = ""

    @property
    def a(self) -> Node:
        return self.nodes["a"]

    @property
    def b(self) -> Node:
        return self.nodes["b"]

    async def has(self, node: str, state: str, says: str = "") -> None:
        """Wait until a node is in a state, and until its reason says so."""
        what = f"{state}{f', saying {says!r}' if says else ''}"
        await self.nodes[node].wait_for(
            NAME, lambda w: w.state == state and says in w.reason, what=what, timeout_s=45
        )

    async def leads(self, node: str, *, restorable: bool | None = None) -> None:
        """Wait until the workload runs on a node, and answers; and whether it is restorable elsewhere."""

        def so(status: WorkloadStatus) -> bool:
            led = status.state == "leading" and status.running
            return led and (restorable is None or status.restorable == restorable)

        what = "led" + ("" if restorable is None else ", protected" if restorable else ", unprotected")
        await self.nodes[node].wait_for(NAME, so, what=what, timeout_s=45)
        await eventually(self._answers, what="it answers")

    async def now_found(self, broke: str) -> None:
        """Take down what a human finds."""
        await asyncio.sleep(_QUIET_S)
        self.broke, self.found, self.cause = broke, await self.states(), await self._newest_cause()

    async def states(self) -> dict[str, str]:
        """Return the state of each node with its reason; whether its keeper answers."""
        states: dict[str, str] = {}
        for name, node in self.nodes.items():
            states[name] = "no answer"
            with contextlib.suppress(OutliveError):
                status = await node.workload(NAME)
                states[name] = _told(status) if status is not None else "unknown there"
        return states

    async def _newest_cause(self) -> str:
        terms: list[TermHistory] = []
        for node in self.nodes.values():
            with contextlib.suppress(OutliveError):
                terms += (await node.history(NAME)).terms
        newest = max(terms, key=lambda each: each.term, default=None)
        return f"term {newest.term}, {newest.leader}: {newest.cause}" if newest is not None else ""

    async def _answers(self) -> bool:
        lines = await in_thread(self.log.read_text)
        newest = [line for line in lines.splitlines() if " udp " in line][-1:]
        return bool(newest) and time.time() - float(newest[0].split()[0]) < 0.3

    async def restart(self, name: str) -> None:
        """Switch a host on again, and start what runs there at boot."""
        await self.lab.power_on(name)
        await self.nodes[name].start()

    async def watch_copies(self) -> None:
        """Count the looks at which two copies run."""
        while True:
            running = [node for node in self.nodes.values() if await in_thread(runs, node)]
            self.two_ran += len(running) > 1
            await asyncio.sleep(EVERY_S)


def _told(status: WorkloadStatus) -> str:
    missed = "objective missed; " if status.rpo == "missed" else ""
    reasons = "; ".join(reason for each in status.replicas for reason in each.reasons)
    return f"{status.state}: {missed}{status.reason}{f' ({reasons})' if reasons else ''}"


def runs(node: Node) -> bool:
    """Tell whether a copy runs on a node: it is there, not frozen, and not killed."""
    pid = running_init_pid(node.config, NAME)
    return pid is not None and not cgroup_frozen(node.config, NAME) and not _dying(pid)


def _dying(pid: int) -> bool:
    """Tell whether it was killed, and so runs no more of its code, though it is there still."""
    try:
        lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return True
    pending = int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)
    return bool(pending & 1 << (signal.SIGKILL - 1)) or bool(flags & _PF_EXITING)


# --- failures ---------------------------------------------------------------------------------------


async def power_loss_a(pair: Pair) -> None:
    """The host that runs it loses power, and comes back."""
    await pair.lab.power_off("a")
    await pair.leads("b", restorable=False)
    await pair.now_found("power off a")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def power_loss_b(pair: Pair) -> None:
    """The standby loses power, and comes back."""
    await pair.lab.power_off("b")
    await pair.leads("a", restorable=False)
    await pair.now_found("power off b")
    await pair.restart("b")
    await pair.leads("a", restorable=True)


async def power_loss_both(pair: Pair) -> None:
    """Both lose power, and come back: what is stored is there, and a human says that it is to run."""
    await asyncio.gather(pair.lab.power_off("a"), pair.lab.power_off("b"))
    await asyncio.gather(pair.restart("a"), pair.restart("b"))
    await pair.has("b", "leading")
    await pair.now_found("power off a and b, then on")
    await pair.leads("b", restorable=True)


async def agent_killed(pair: Pair) -> None:
    """The agent dies, and is started again: the workload does not notice."""
    await pair.a.stop("agent", signal.SIGKILL)
    await asyncio.sleep(3)
    await pair.leads("a")
    await pair.now_found("SIGKILL of a's agent")
    await pair.a.start("agent")
    await pair.leads("a", restorable=True)


async def agent_stopped(pair: Pair) -> None:
    """The agent stands still for five seconds."""
    pair.a.processes["agent"].send_signal(signal.SIGSTOP)
    await asyncio.sleep(5)
    await pair.now_found("SIGSTOP of a's agent, 5 s")
    pair.a.processes["agent"].send_signal(signal.SIGCONT)
    await pair.leads("a", restorable=True)


async def keeper_killed(pair: Pair) -> None:
    """The keeper dies, and is started again: its agent's heartbeats show that the host lives."""
    await pair.a.stop("keeper", signal.SIGKILL)
    await asyncio.sleep(3)
    await pair.now_found("SIGKILL of a's keeper")
    await pair.a.start("keeper")
    await pair.leads("a", restorable=True)


async def partition_client_with_a(pair: Pair) -> None:
    """The standby is cut off; its power switch still reaches the other host, so it takes over."""
    await pair.lab.cut("b")
    await pair.b.wait_for(NAME, lambda w: w.state == "leading" and w.running, what="led", timeout_s=45)
    await pair.now_found("cut b off")
    await pair.lab.mend("b")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def partition_client_with_b(pair: Pair) -> None:
    """The host that runs it is cut off, and is turned off."""
    await pair.lab.cut("a")
    await pair.leads("b")
    await pair.now_found("cut a off")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def one_way_from_a(pair: Pair) -> None:
    """Nothing of a reaches b, while a hears b: b believes that a is gone, and turns it off first."""
    await pair.lab.cut_one_way("a", "b")
    await pair.leads("b")
    await pair.now_found("lose what a sends to b")
    await pair.restart("a")
    await pair.lab.mend("a")
    await pair.leads("b", restorable=True)


async def one_way_from_b(pair: Pair) -> None:
    """Nothing of b reaches a: not what acknowledges a's heartbeats either (TCP), so b soon hears no more."""
    await pair.lab.cut_one_way("b", "a")
    await pair.leads("b")
    await pair.now_found("lose what b sends to a")
    await pair.restart("a")
    await pair.lab.mend("a")
    await pair.leads("b", restorable=True)


async def address_removed(pair: Pair) -> None:
    """Somebody takes the service address from the host that runs it."""
    await pair.a.host.run(["ip", "address", "del", str(pair.lab.vip()), "dev", pair.a.host.interface])
    await asyncio.sleep(0.5)
    await pair.leads("a", restorable=True)
    await pair.now_found("ip address del VIP on a")


async def address_stolen(pair: Pair) -> None:
    """Somebody gives the standby the service address too: two hosts answer until its keeper drops it."""
    await pair.b.host.run(["ip", "address", "add", str(pair.lab.vip()), "dev", pair.b.host.interface])
    await asyncio.sleep(3)
    await pair.leads("a", restorable=True)
    await pair.now_found("ip address add VIP on b")


async def port_taken(pair: Pair) -> None:
    """The standby knows that it could not bring it up, and turns nothing off. The port is freed."""
    thief = await _take_port(pair)
    await pair.b.wait_for(NAME, lambda w: not w.restorable, what="not restorable")
    await pair.lab.power_off("a")
    await pair.has("b", "waiting", "taken by something else")
    await pair.now_found("its port is taken on b; then power off a")
    thief.kill()
    await thief.wait()
    await pair.leads("b")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def restore_fails(pair: Pair) -> None:
    """The standby finds out only in the restore that it cannot. A human frees the port, and says so."""
    thief = await _port_thief(pair)
    await pair.lab.power_off("a")
    await pair.has("b", "failed")
    await pair.now_found("power off a; its port is taken on b as the restore begins")
    thief.kill()
    await thief.wait()
    await pair.b.cli("failover", NAME, "--accept-data-loss")
    await pair.leads("b")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def _take_port(pair: Pair) -> asyncio.subprocess.Process:
    code = f"import socket, time; s = socket.socket(2, 2); s.bind(('0.0.0.0', {_PORT})); time.sleep(999)"
    return await pair.b.host.spawn([sys.executable, "-c", code], log=pair.b.host.log_dir / "thief.log")


async def _port_thief(pair: Pair) -> asyncio.subprocess.Process:
    """Have the workload's port taken on b once its restore begins there: before that, b would notice."""
    code = (
        "import os, socket, time\n"
        "def run():\n"
        f"    try: return open({str(WorkloadPaths(pair.b.config, NAME).incarnation_file)!r}).read()\n"
        "    except OSError: return ''\n"
        "before = run()\n"
        "while run() == before: time.sleep(0.001)\n"
        "taken = socket.socket(2, 2)\n"
        f"taken.bind(('0.0.0.0', {_PORT}))\n"
        "time.sleep(999)"
    )
    return await pair.b.host.spawn([sys.executable, "-c", code], log=pair.b.host.log_dir / "thief.log")


async def disk_full_on_b(pair: Pair) -> None:
    """The standby's disk is full: it keeps the epoch that it has, and says so."""
    with _full(Path(pair.b.config.node.state_dir)):
        await pair.a.wait_for(
            NAME,
            lambda w: any("free" in reason for each in w.replicas for reason in each.reasons),
            what="told",
        )
        await pair.now_found("fill b's disk")
    await pair.leads("a", restorable=True)


async def disk_full_on_a(pair: Pair) -> None:
    """The disk of the host that runs it is full: it runs on."""
    with _full(Path(pair.a.config.node.state_dir)):
        await asyncio.sleep(4)
        await pair.leads("a")
        await pair.now_found("fill a's disk")
    await pair.leads("a", restorable=True)


async def sshd_down(pair: Pair) -> None:
    """The only fence is SSH, and nothing answers there: nobody takes over, until a human vouches."""
    await pair.lab.power_off("a")
    await pair.has("b", "waiting", "fence")
    await pair.now_found("power off a; fence by SSH")

    async def vouched() -> bool:  # not while the next attempt to fence is under way
        words = ("failover", NAME, "--accept-data-loss", "--old-primary-is-off", "a")
        return (await pair.b.cli(*words, check=False)).returncode == 0

    await eventually(vouched, what="an operator's word counts")
    await pair.leads("b")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def etcd_gone(pair: Pair) -> None:
    """Etcd is gone: the workload is frozen before its lease can be over, and runs on when etcd is back."""
    etcd = _etcd_of(pair)
    await etcd.go_away()
    await pair.a.wait_for(NAME, is_frozen, what="frozen", timeout_s=45)
    await asyncio.sleep(_TTL_S)
    await pair.now_found("kill all three members of etcd, start them again")
    await etcd.come_back()
    await pair.leads("a", restorable=True)


async def etcd_slow(pair: Pair) -> None:
    """Etcd answers late, but in time: nothing happens."""
    async with _etcd_of(pair).slow(stands_s=0.4, runs_s=0.1):
        await asyncio.sleep(3 * _TTL_S)
        await pair.leads("a", restorable=True)
        await pair.now_found("etcd stands still 0.4 s of every 0.5 s")
    await pair.leads("a", restorable=True)


async def etcd_power_loss_a(pair: Pair) -> None:
    """The host that runs it is lost, and nobody can turn it off: its lease runs out."""
    await pair.lab.power_off("a")
    await pair.leads("b", restorable=False)
    await pair.now_found("power off a; the right to lead is a lease in etcd")
    await pair.restart("a")
    await pair.leads("b", restorable=True)


async def etcd_partition_a(pair: Pair) -> None:
    """The host that runs it is cut off from everybody: it freezes it before the other one takes over."""
    await pair.lab.cut("a")
    await pair.leads("b", restorable=False)
    await pair.now_found("cut a off; the right to lead is a lease in etcd")
    await pair.lab.mend("a")
    await pair.leads("b", restorable=True)


async def etcd_out_of_reach_of_a(pair: Pair) -> None:
    """Only the host that runs it does not reach etcd: it freezes it and says so, and the other takes over."""
    for member in _etcd_of(pair).names:
        await pair.lab.cut_one_way("a", member)
    await pair.leads("b", restorable=True)
    await pair.now_found("cut a off from etcd")
    await pair.lab.mend("a")
    await pair.leads("b", restorable=True)


async def etcd_keeper_stopped(pair: Pair) -> None:
    """The keeper of a host that is cut off stands still: the guard beside it freezes the workload."""
    pair.a.processes["keeper"].send_signal(signal.SIGSTOP)
    await pair.lab.cut("a")
    await pair.leads("b", restorable=False)
    await pair.now_found("SIGSTOP of a's keeper, cut a off; the right to lead is a lease in etcd")
    pair.a.processes["keeper"].send_signal(signal.SIGCONT)
    await pair.lab.mend("a")
    await pair.leads("b", restorable=True)


def _etcd_of(pair: Pair) -> LabEtcd:
    assert pair.etcd is not None
    return pair.etcd


def is_frozen(status: WorkloadStatus) -> bool:
    return status.lease is not None and bool(status.lease.frozen)


def _told_of_no_room(status: WorkloadStatus) -> bool:
    return any("free" in reason for each in status.replicas for reason in each.reasons)


@contextlib.contextmanager
def _full(directory: Path) -> Iterator[None]:
    """Leave no room in the file system of a directory (a small one of its own) for the time of the block."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    try:
        yield
    finally:
        ballast.unlink()


Scenario = Callable[[Pair], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {
    each.__name__.replace("_", "-"): each
    for each in (
        power_loss_a,
        power_loss_b,
        power_loss_both,
        agent_killed,
        agent_stopped,
        keeper_killed,
        partition_client_with_a,
        partition_client_with_b,
        one_way_from_a,
        one_way_from_b,
        address_removed,
        address_stolen,
        port_taken,
        restore_fails,
        disk_full_on_a,
        disk_full_on_b,
        sshd_down,
        etcd_gone,
        etcd_slow,
        etcd_power_loss_a,
        etcd_partition_a,
        etcd_out_of_reach_of_a,
        etcd_keeper_stopped,
    )
}


# --- running one ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pair_for(name: str) -> AsyncIterator[Pair]:
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=NAME,
            nodes=("a", "b"),
            command=(sys.executable, "-u", "-c", WORKLOAD, str(_PORT)),
            vip=str(lab.vip()),
            right_to_lead="etcd" if name.startswith("etcd") else "fence",
            epoch_interval_ms=200,
        )
        etcd = await LabEtcd.start(lab) if name.startswith("etcd") else None
        settings: dict[str, dict[str, Any]] = {}
        if etcd is not None:
            settings["etcd"] = {"endpoints": list(etcd.endpoints), "ttl_s": _TTL_S}
        if "disk" in name:
            settings["store"] = {"min_free_bytes": 32 << 20}
        fenced = name != "sshd-down" and etcd is None
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec], settings=settings, fenced=fenced)
        if name == "sshd-down":
            _fence_by_ssh(nodes)
        if "disk" in name:  # a disk of its own, that can be filled
            directory = nodes[name[-1]].config.node.state_dir
            await in_thread(_mount, directory)
        client = await lab.add_host("client")
        pair = Pair(lab, nodes, client, client.dir / "answers", etcd)
        await start_all(nodes)
        await nodes["a"].cli("start", NAME)
        prober = await client.spawn(
            [
                *(sys.executable, "-m", "tests.campaigns.vip_prober", client.interface),
                *(str(lab.vip().ip), str(_PORT), str(pair.log)),
            ],
            log=client.log_dir / "prober.log",
            cwd=Path(__file__).parents[2],
        )
        watching = asyncio.create_task(pair.watch_copies())
        try:
            await eventually(lambda: in_thread(pair.log.exists), what="the prober asks")
            await pair.leads("a", restorable=True)
            yield pair
        finally:
            watching.cancel()
            prober.terminate()
            await prober.wait()


def _mount(directory: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m,mode=0700", "outlive-full", directory]
    subprocess.run(command, check=True)


def _fence_by_ssh(nodes: dict[str, Node]) -> None:
    """Name an sshd as the only fence, on a host where none runs."""
    for name, node in nodes.items():
        other = nodes["b" if name == "a" else "a"].host
        for key in ("ssh_client", "ssh_host"):
            path = node.host.etc_dir / key
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        public = (node.host.etc_dir / "ssh_host.pub").read_text().strip()
        with node.config_path.open("a") as file:
            file.write(
                f'\n[[fences]]\nnode = "{other.name}"\ntimeout_ms = 2000\n[fences.ssh]\n'
                f'host = "{other.address.ip}"\nkey_file = "{node.host.etc_dir / "ssh_client"}"\n'
                f'host_key = "{public}"\ncommand = ["outlive"]\n'
            )
        nodes[name] = Node(node.host, node.config_path)


async def run_one(name: str) -> Outcome:
    """Run one failure in a lab of its own."""
    problem, afterwards = "", {}
    async with pair_for(name) as pair:
        begun_s = time.time()
        try:
            await SCENARIOS[name](pair)
        except OutliveError as error:
            problem = str(error)
        afterwards = await pair.states()
        told = read_answers(pair.log.read_text(), since_s=begun_s)
    return Outcome(
        scenario=name,
        broke=pair.broke,
        found=pair.found,
        cause=pair.cause,
        afterwards=afterwards,
        outage_ms=told.outage_ms,
        lives=told.lives,
        lost_count=told.lost_count,
        answered=told.answered,
        two_answered=told.two_answered,
        two_ran=pair.two_ran,
        problem=problem,
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """What the prober's log says."""

    answered: int
    outage_ms: float
    lives: int
    lost_count: int
    two_answered: int


def read_answers(log: str, since_s: float = 0.0) -> Answers:
    """Read the prober's log from an instant on. Pure.

    The outage is what the client saw. Who answered beside whom goes by when the workloads spoke: what one had
    said before it was frozen may reach the client after the other one's first words.
    """
    lines = [line.split() for line in log.splitlines() if len(line.split()) >= 3]
    told = [(float(at), kind, rest) for at, kind, *rest in lines if float(at) >= since_s - _QUIET_S]
    heard_s = [at for at, kind, _ in told if kind == "udp"]
    answers = (rest for _, kind, rest in told if kind == "udp")
    said = sorted((float(at), net, pid, int(count)) for net, pid, count, at in answers)
    gaps = [(later - sooner) * 1000 for sooner, later in itertools.pairwise(heard_s)]
    back = [sooner - later for (*_, sooner), (*_, later) in itertools.pairwise(said)]
    hosts = [[(at, rest[0]) for at, kind, rest in told if kind == "arp"], [(at, net) for at, net, *_ in said]]
    two = sum(
        first != second and later - sooner < _TOGETHER_S
        for seen in hosts
        for (sooner, first), (later, second) in itertools.pairwise(seen)
    )
    return Answers(
        answered=len(said),
        outage_ms=round(max(gaps, default=float("inf")), 1),
        lives=len({(net, pid) for _, net, pid, _ in said}),
        lost_count=max([0, *back]),
        two_answered=two,
    )


def table(report: Report) -> str:
    """Return the report as a table in Markdown."""
    lines = [
        "| what broke | state found: a | b | why, in `history` | outage | lives | two answered; ran |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report.outcomes:
        found = [each.found.get(node, "") for node in ("a", "b")]
        cells = [each.broke or each.scenario, *found, each.cause]
        cells += [f"{each.outage_ms:,.0f} ms", str(each.lives), f"{each.two_answered}; {each.two_ran}"]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        if each.problem:
            lines.append(f"| **{each.scenario}: {each.problem}** | | | | | | |")
    return "\n".join(lines)


async def run(names: list[str]) -> Report:
    """Run failures, one after the other."""
    begun_s, outcomes = time.monotonic(), []
    for name in names:
        outcome = await run_one(name)
        good = _as_expected(outcome)
        print(f"{name}: {'as expected' if good else f'WRONG: {outcome}'}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    return Report(
        schema_version=1,
        commit=_commit(),
        seconds=round(time.monotonic() - begun_s, 1),
        passed=all(map(_as_expected, outcomes)),
        outcomes=tuple(outcomes),
    )


def _as_expected(outcome: Outcome) -> bool:
    """Two may answer only where somebody has put the address on a second host by hand, and for a moment."""
    allowed = _STOLEN_ANSWERS if outcome.scenario == "address-stolen" else 0
    return not outcome.problem and outcome.two_answered <= allowed and not outcome.two_ran


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="some of them, with commas between")
    parser.add_argument("--output", choices=("json", "table"), default="json")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SCENARIOS):
        parser.error(f"no such failure: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    configure_logs("warning")
    report = asyncio.run(run(names))
    print(table(report) if options.output == "table" else json.dumps(msgspec.to_builtins(report), indent=1))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
