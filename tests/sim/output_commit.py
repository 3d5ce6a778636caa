"""Output commit, modelled before it is built: what clients were told is known to whoever may take over.

    python -m tests.sim.output_commit [--seeds 100000] [--start 0]

In: a seed. Out: how a leader, its replicas, their disks and the network fared in virtual time, or a
`Violation`. This is a model of the protocol, not of code that there is: `mode = "output-commit"` is refused.

    emitted ─▶ held ─▶ an epoch frozen afterwards ─▶ committed by every member ─▶ released to clients

Who is *in sync* is a member. What a leader and a replica keep to:

- The leader waits for every member's acknowledgement. It has a member on its disk before that is told so, and
  tells it only once it has what was released until then.
- A replica has on its disk that it is one before it says so, and only then counts towards `MIN_IN_SYNC`.
- A member is let go only by its own word, once that is on its disk, or when a fence has confirmed that it is
  off. A record of an earlier boot, or of an earlier term, is none; nor is it heard of late.
- Only a node whose own record says so takes over.

Checked at every release and takeover (invariant 4): nothing is released that was emitted after the freeze;
enough nodes hold the epoch, and each is recorded, durably, on the leader and by itself; who takes over by
itself knows all that was ever released.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

MIN_IN_SYNC = 1
_EPOCH_S = 0.2
_SILENT_S = 1.5
"""A member that has acknowledged nothing for so long holds up clients: it is asked to go."""
_SUSPECT_S = 0.8
_TROUBLE_S, _REST_S = 25.0, 12.0
_RELEASES_AT_REST = 5


class Violation(Exception):
    """An invariant is broken."""


@dataclass(frozen=True, order=True)
class Epoch:
    """Its number in its term."""

    term: int
    number: int


@dataclass(frozen=True)
class Member:
    """What a replica has on its disk about being in sync."""

    term: int
    version: int
    boot: int
    in_sync: bool


@dataclass
class Host:
    """One node: what is on its disk, and what it has in memory while it is on."""

    name: str
    on: bool = True
    boot: int = 1
    life: int = 1
    """Of its process: what was under way in an earlier one comes to nothing."""
    # on disk
    committed: Epoch | None = None
    member: Member | None = None
    term: int = 0
    members: dict[str, int] = field(default_factory=dict)
    """As a leader: who has to be waited for, and under which boot it was told so."""
    version: int = 0
    # in memory
    leads: bool = False
    heard_s: float = 0.0
    emitted: int = 0
    newest: Epoch | None = None
    acks: dict[str, tuple[Epoch, float]] = field(default_factory=dict)
    boots: dict[str, int] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)
    """Members that have it on record themselves, by their own word."""
    changing: dict[str, int] = field(default_factory=dict)
    """Whose membership is being changed, and the number of that change: the next one calls it off."""
    said: dict[str, int] = field(default_factory=dict)
    """Version of what a node was told last about being in sync; what it answers to an earlier one is old."""
    writing: list[Callable[[], object]] = field(default_factory=list)
    """On its way to the disk."""


class World:
    """Three nodes; one seed, one story."""

    def __init__(self, seed: int, bugs: frozenset[str] = frozenset()) -> None:
        self.seed, self.bugs = seed, bugs
        self.random = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.hosts = {name: Host(name) for name in "abc"}
        self.cut: set[tuple[str, str]] = set()
        self.lossy = self.slow_disk = 0.0
        self.covers: dict[Epoch, int] = {}
        """How many packets had been emitted when an epoch was frozen."""
        self.released = self.releases = self.takeovers = self.by_word = 0
        self.right = (1, "a")
        """The newest term, and who has the right to it: fence or etcd give it once."""
        self.story: list[str] = []

    # --- time, network, disks ---------------------------------------------------------------------

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), what))

    def run(self, for_s: float) -> None:
        end = self.now + for_s
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = end

    def again(self, host: Host, every_s: float, what: Callable[[], None]) -> None:
        """Do it now and then for as long as this process of the host lives."""
        life = host.life

        def once() -> None:
            if host.on and host.life == life:
                what()
                self.later(every_s, once)

        self.later(self.random.uniform(0, every_s), once)

    def send(self, source: Host, to: str, arrive: Callable[[Host], None]) -> None:
        if (source.name, to) in self.cut or self.random.random() < self.lossy:
            return
        target = self.hosts[to]

        def deliver() -> None:
            if target.on and (source.name, to) not in self.cut:
                arrive(target)

        late = self.random.choice([0.0, 0.0, 0.0, 0.0, 2.0]) if self.lossy else 0.0
        self.later(self.random.uniform(0.001, 0.02) + self.random.uniform(0, late), deliver)

    def persist(self, host: Host, write: Callable[[], object], then: Callable[[], None]) -> None:
        """Have it on disk after a while; lost with the power, there or not when the next process begins."""
        boot, life = host.boot, host.life
        host.writing.append(write)

        def written() -> None:
            if host.on and host.boot == boot and any(each is write for each in host.writing):
                host.writing = [each for each in host.writing if each is not write]
                write()
                if host.life == life:
                    then()

        self.later(self.random.uniform(0.002, 0.02) + self.random.uniform(0, self.slow_disk), written)

    def tell(self, line: str) -> None:
        self.story.append(f"{self.now:8.3f} {line}")

    def broken(self, what: str) -> Violation:
        return Violation(f"seed {self.seed}, at {self.now:.3f} s: {what}\n" + "\n".join(self.story[-40:]))

    # --- a leader ---------------------------------------------------------------------------------

    def lead(self, host: Host, term: int, emitted: int) -> None:
        host.leads, host.term, host.emitted, host.newest = True, term, emitted, None
        host.members, host.member = {}, None
        self.begin(host)

    def begin(self, host: Host) -> None:
        """Begin what its process does, with nothing but what is on its disk."""

        def look_after() -> None:
            self.look_after(host)

        host.acks, host.boots, host.confirmed, host.changing, host.said = {}, {}, set(), {}, {}
        host.heard_s = self.now
        if host.leads:
            self.again(host, _EPOCH_S, lambda: self.capture(host))
            # Whatever the process before has told anybody, this one's words count for more.
            self.persist(host, partial(self.count, host), lambda: self.again(host, 0.1, look_after))
        else:
            self.again(host, 0.1, lambda: self.suspect(host))

    def capture(self, host: Host) -> None:
        host.emitted += self.random.randrange(4)
        number = host.newest.number + 1 if host.newest is not None else 1
        epoch = host.newest = Epoch(host.term, number)
        self.covers[epoch] = host.emitted
        host.emitted += self.random.randrange(4)
        for name in self.others(host):
            self.send(host, name, lambda target: self.receive(target, host.name, epoch))
        if "release at capture" in self.bugs:
            self.release(host, epoch)

    def acknowledged(self, host: Host, name: str, boot: int, epoch: Epoch) -> None:
        if not host.leads or epoch.term != host.term or boot < host.boots.get(name, 0):
            return
        host.boots[name] = boot
        if boot > host.members.get(name, boot) and name not in host.changing:
            # It was booted anew: its record is none any more, and nobody has to wait for it.
            host.confirmed.discard(name)
            self.strike_off(host, name)
            return
        before = host.acks.get(name)
        if before is None or epoch > before[0]:
            host.acks[name] = (epoch, self.now)
        self.release_what_may_go(host)

    def release_what_may_go(self, host: Host) -> None:
        """Release what every member has, if enough of them have it on record that they are."""
        counted = set(host.members) if "count who has not said so" in self.bugs else host.confirmed
        if len(counted & set(host.members)) < MIN_IN_SYNC:
            return
        held = [host.acks[name][0] if name in host.acks else Epoch(0, 0) for name in host.members]
        epoch = max(held) if "enough have it" in self.bugs else min(held)
        if epoch.term == host.term:
            self.release(host, epoch)

    def release(self, host: Host, epoch: Epoch) -> None:
        packets = host.emitted if "what came after the freeze too" in self.bugs else self.covers[epoch]
        if packets <= self.released:
            return
        self.released = packets
        self.releases += 1
        if packets > self.covers[epoch]:
            raise self.broken(f"{host.name} releases {packets} packets with {epoch}")
        enough = [
            other
            for other in self.hosts.values()
            if other.committed is not None
            and other.committed >= epoch
            and other.member is not None
            and other.member.in_sync
            and (other.member.term, other.member.boot) == (host.term, host.members.get(other.name))
        ]
        if len(enough) < MIN_IN_SYNC:
            raise self.broken(f"{host.name} releases {epoch}, which {len(enough)} recorded members hold")

    def look_after(self, host: Host) -> None:
        """Take in who is as far as what was released; have go who is silent."""
        for name in self.others(host):
            ack = host.acks.get(name)
            if name in host.changing:
                continue
            if name not in host.members:
                lately = ack is not None and self.now - ack[1] < 2 * _EPOCH_S
                if ack is not None and lately and self.covers[ack[0]] >= self.released:
                    self.take_in(host, name)
            elif self.now - (ack[1] if ack is not None else host.heard_s) > _SILENT_S:
                self.let_go(host, name)
            elif name not in host.confirmed:
                host.said.setdefault(name, host.version)
                caught_up = ack is not None and self.covers[ack[0]] >= self.released
                if caught_up or "told before it has caught up" in self.bugs:
                    self.say(host, name, in_sync=True)

    def take_in(self, host: Host, name: str) -> None:
        boot = host.boots[name]
        host.changing[name] = next(self._order)

        def write() -> None:
            host.members[name] = boot
            self.count(host)

        def then() -> None:
            del host.changing[name]
            host.said[name] = host.version  # and it is told once it has what was released until now

        if "told before it is on disk" in self.bugs:
            host.said[name] = self.count(host)
            self.say(host, name, in_sync=True, boot=boot)
        self.persist(host, write, then)

    def count(self, host: Host) -> int:
        host.version += 1
        return host.version

    def say(self, host: Host, name: str, *, in_sync: bool, boot: int | None = None) -> None:
        boot = host.members.get(name, 0) if boot is None else boot
        wanted = Member(host.term, host.said[name], boot, in_sync)
        self.send(host, name, lambda target: self.become(target, host.name, wanted))

    def let_go(self, host: Host, name: str) -> None:
        """Ask it to go; who does not answer is fenced. It counts no more, but is waited for till then."""
        change = host.changing[name] = next(self._order)
        if "counts until it is gone" not in self.bugs:
            host.confirmed.discard(name)
        life = host.life

        def goes_on() -> bool:
            return host.on and host.life == life and host.leads and host.changing.get(name) == change

        def ask() -> None:
            if not goes_on():
                return
            host.said[name] = host.version
            self.say(host, name, in_sync=False)
            self.later(0.3, fence)

        def fence() -> None:
            if not goes_on():
                return
            confirmed = self.random.random() < 0.6
            if confirmed:
                self.tell(f"{host.name} has {name} fenced")
                self.power_off(self.hosts[name])
                self.later(self.random.uniform(0.5, 5), lambda: self.power_on(self.hosts[name]))
            if confirmed or "unknown is confirmed" in self.bugs:
                self.strike_off(host, name)
            else:
                self.persist(host, partial(self.count, host), stay)

        def stay() -> None:
            if goes_on():
                del host.changing[name]  # it is waited for, and told again that it is one
                host.said[name] = host.version

        if "let go unasked" in self.bugs:
            self.strike_off(host, name)
        else:
            self.persist(host, partial(self.count, host), ask)

    def left(self, host: Host, name: str, version: int) -> None:
        if host.leads and version == host.said.get(name) and name in host.changing and name in host.members:
            self.strike_off(host, name)

    def strike_off(self, host: Host, name: str) -> None:
        change = host.changing[name] = next(self._order)

        def write() -> None:
            host.members.pop(name, None)
            host.confirmed.discard(name)
            host.acks.pop(name, None)

        def then() -> None:
            if host.changing.get(name) == change:
                del host.changing[name]

        self.persist(host, write, then)

    # --- a replica --------------------------------------------------------------------------------

    def receive(self, host: Host, leader: str, epoch: Epoch) -> None:
        if host.leads or epoch.term < host.term:
            return
        host.term, host.heard_s = epoch.term, self.now
        boot = host.boot

        def answer() -> None:
            self.send(host, leader, lambda target: self.acknowledged(target, host.name, boot, epoch))

        def write() -> None:
            host.committed = max(epoch, host.committed or epoch)

        if "acknowledged before it is committed" in self.bugs:
            answer()
            self.persist(host, write, lambda: None)
        else:
            self.persist(host, write, answer)

    def become(self, host: Host, leader: str, wanted: Member) -> None:
        """Be in sync from now on, or no more; say so once it is on disk."""
        if host.leads or wanted.term < host.term:
            return
        before = host.member
        newer = before is None or (wanted.term, wanted.version) >= (before.term, before.version)
        if not newer and "late words count" not in self.bugs:
            return
        if wanted.in_sync and wanted.boot != host.boot:
            if "for whatever boot" not in self.bugs:
                return
            wanted = Member(wanted.term, wanted.version, host.boot, True)

        def say() -> None:
            if wanted.in_sync:
                self.send(host, leader, lambda target: self.is_confirmed(target, host.name, wanted))
            else:
                self.send(host, leader, lambda target: self.left(target, host.name, wanted.version))

        def write() -> None:
            now = host.member
            old = now is not None and (wanted.term, wanted.version) < (now.term, now.version)
            if not old or "late words count" in self.bugs:
                host.member = wanted

        if "confirmed before it is on disk" in self.bugs:
            say()
            self.persist(host, write, lambda: None)
        else:
            self.persist(host, write, say)

    def is_confirmed(self, host: Host, name: str, member: Member) -> None:
        current = host.leads and member.term == host.term and host.members.get(name) == member.boot
        if current and name not in host.changing and member.version == host.said.get(name):
            host.confirmed.add(name)
            self.release_what_may_go(host)

    def suspect(self, host: Host) -> None:
        """Take over from a leader that is silent, if this node's own record says that it may."""
        if host.leads or self.now - host.heard_s < _SUSPECT_S:
            return
        member = host.member
        may = member is not None and member.in_sync
        may &= member is not None and (member.boot == host.boot or "an old boot's record counts" in self.bugs)
        may &= member is not None and (member.term == host.term or "an old term's record counts" in self.bugs)
        if "not in sync is enough" in self.bugs:
            may = host.committed is not None
        if may and host.term == self.right[0] and self.random.random() < 0.3:
            self.take_over(host)

    def take_over(self, host: Host, *, by_word: bool = False) -> None:
        """Have the old leader confirmed off, which gives the right to one node only, and restore."""
        self.power_off(self.hosts[self.right[1]])
        term = self.right[0] + 1
        self.right = (term, host.name)
        known = self.covers[host.committed] if host.committed is not None else 0
        self.tell(f"{host.name} takes over in term {term} with {host.committed}, {known} packets")
        if by_word:
            self.by_word += 1
            self.released = min(self.released, known)
        elif known < self.released:
            raise self.broken(f"{host.name} knows {known} packets, and {self.released} were released")
        else:
            self.takeovers += 1
        host.life += 1
        self.lead(host, term, known)

    # --- what goes wrong --------------------------------------------------------------------------

    def others(self, host: Host) -> list[str]:
        return [name for name in self.hosts if name != host.name]

    def power_off(self, host: Host) -> None:
        if host.on:
            self.tell(f"{host.name}: power is off")
            host.on, host.leads = False, False
            host.life += 1

    def power_on(self, host: Host) -> None:
        if not host.on:
            self.tell(f"{host.name}: power is on")
            host.on = True
            host.boot += 1
            host.writing = []
            self.begin(host)

    def restart(self, host: Host) -> None:
        """Its process ends and another begins; a leader's workload lives on, and its packets are held."""
        if host.on:
            self.tell(f"{host.name}: a new process")
            host.life += 1
            self.settle(host)
            self.begin(host)

    def settle(self, host: Host) -> None:
        """What the process before was writing is there or not: a process is gone once its writes are."""
        writing, host.writing = host.writing, []
        for write in writing:
            if self.random.random() < 0.5:
                write()

    def strike(self) -> None:
        host = self.hosts[self.random.choice("abc")]
        back_s = self.random.uniform(0.2, 6)
        match self.random.choice(["power", "restart", "restart", "cut", "one-way", "loss", "disk"]):
            case "power":
                self.power_off(host)
                self.later(back_s, lambda: self.power_on(host))
            case "restart":
                self.restart(host)
            case "cut" | "one-way" as how:
                other = self.hosts[self.random.choice(self.others(host))]
                ways = {(host.name, other.name)} | ({(other.name, host.name)} if how == "cut" else set())
                self.tell(f"cut {sorted(ways)}")
                self.cut |= ways
                self.later(back_s, lambda: self.cut.difference_update(ways))
            case "loss":
                self.lossy = self.random.choice([0.0, 0.1, 0.4])
            case "disk":
                self.slow_disk = self.random.choice([0.0, 0.1, 1.0])

    def heal(self) -> None:
        self.cut.clear()
        self.lossy = self.slow_disk = 0.0
        for host in self.hosts.values():
            self.power_on(host)


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    releases: int
    takeovers: int
    by_word: int


def run_seed(seed: int, bugs: frozenset[str] = frozenset()) -> Result:
    """Run a cluster through its trouble, and see that clients are served again. Raises Violation."""
    world = World(seed, bugs)
    world.lead(world.hosts["a"], 1, 0)
    for name in "bc":
        world.begin(world.hosts[name])
    while world.now < _TROUBLE_S:
        world.run(world.random.uniform(0.02, 1.2))
        world.strike()
    world.heal()
    world.run(_REST_S)
    if not any(host.on and host.leads for host in world.hosts.values()):
        # Nobody's record says so, the leader's memory is lost: an operator decides, with the newest epoch.
        newest = max(world.hosts.values(), key=lambda host: host.committed or Epoch(0, 0))
        world.take_over(newest, by_word=True)
        world.heal()
        world.run(_REST_S)
    before = world.releases
    world.run(_REST_S / 2)
    if world.releases - before < _RELEASES_AT_REST:
        raise world.broken("all is well, and clients are told nothing")
    return Result(world.releases, world.takeovers, world.by_word)


BUGS = (
    "release at capture",
    "enough have it",
    "count who has not said so",
    "what came after the freeze too",
    "acknowledged before it is committed",
    "told before it is on disk",
    "told before it has caught up",
    "confirmed before it is on disk",
    "let go unasked",
    "counts until it is gone",
    "unknown is confirmed",
    "late words count",
    "for whatever boot",
    "an old boot's record counts",
    "an old term's record counts",
    "not in sync is enough",
)


def main() -> None:
    """Run many seeds and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    given = parser.parse_args()
    begun_s, totals, violated = time.monotonic(), Counter[str](), []
    for seed in range(given.start, given.start + given.seeds):
        try:
            result = run_seed(seed)
        except Violation as violation:
            violated.append(str(violation).splitlines()[0])
            print(violation, file=sys.stderr)
            continue
        totals["releases"] += result.releases
        totals["takeovers"] += result.takeovers
        totals["by_an_operators_word"] += result.by_word
        totals["with_takeover"] += result.takeovers > 0
        if (seed + 1 - given.start) % 1000 == 0:
            print(f"{seed + 1 - given.start} of {given.seeds}, {len(violated)} violations", file=sys.stderr)
    told = {"seeds": given.seeds, "start": given.start, "violations": len(violated), "violated": violated}
    print(json.dumps(told | totals | {"seconds": round(time.monotonic() - begun_s, 1)}, indent=2))


if __name__ == "__main__":
    main()
