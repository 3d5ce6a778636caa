"""The leases of a simulated cluster: the real lease machines, a simulated etcd, clocks that drift.

In: a `World`. Each host that is to lead by a lease has the machine of `common.lease`, the calls of
`common.lease_calls` on their way to an etcd of the world's, a freeze of its own, and a guard: the process
beside the keeper that freezes at the recorded moment, whatever the keeper does. Not simulated: that guard and
keeper fail at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import lease
from common.errors import UnreachableError
from common.lease_calls import Call, LeaseKeys, Question
from common.role_events import ClaimTerm
from tests.sim.etcd import Etcd

if TYPE_CHECKING:
    from tests.sim.world import Host, World

TERMS = lease.LeaseTerms(ttl_s=2, margin_s=0.2, drift=0.1)
GUARD_AFTER_S, GUARD_LOOKS_S = 0.05, 0.03
"""How long the guard leaves it to the keeper, and how late it may be then."""


class Leases:
    """What hosts and etcd have to do with each other."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = random.Random(f"etcd-{world.seed}")
        self.etcd = Etcd()
        bound = TERMS.drift * 0.99 / 2
        fast_etcd = 1 + self.random.choice([-bound, bound, 0.0])
        drifts = [
            self.random.choice([-bound, bound, self.random.uniform(-bound, bound)]) for _ in world.hosts
        ]
        self.rates = {name: (1 + each) / fast_etcd for name, each in zip(world.hosts, drifts, strict=True)}
        self.offsets = {name: self.random.uniform(0, 1e5) for name in world.hosts}
        self.terms = TERMS
        if "no-margin" in world.bugs:
            self.terms = lease.LeaseTerms(ttl_s=TERMS.ttl_s, margin_s=0.0, drift=TERMS.drift)
        if "no-drift" in world.bugs:
            self.terms = lease.LeaseTerms(ttl_s=TERMS.ttl_s, margin_s=TERMS.margin_s, drift=0.0)

    # --- the keeper's side ------------------------------------------------------------------------

    def clock_s(self, host: Host) -> float:
        return self.offsets[host.name] + self.world.now * self.rates[host.name]

    def begin(self, host: Host) -> None:
        """A keeper starts, and finds what the one before left on record."""
        host.lease = lease.found(self.terms, host.lease_record)

    def advance(self, host: Host, event: lease.Event) -> None:
        if host.role is None or host.lease is None:
            return
        need = lease.need_of(host.role)
        host.lease, effects = lease.advance(host.lease, need, event, self.clock_s(host))
        for effect in effects:
            self._perform(host, effect)
        if host.lease is not None and host.lease.closed is False:
            host.outer_frozen = False  # the guard was there in the moment of a renewal

    def claim(self, host: Host, claim: ClaimTerm) -> None:
        self.advance(host, lease.Wanted(claim))

    def _perform(self, host: Host, effect: lease.Effect) -> None:
        match effect:
            case lease.Ask(number=number, question=question):
                self._ask(host, number, question)
            case lease.Freeze():
                self.world.tell(f"{host.name}: may not run")
                host.outer_frozen = True
            case lease.Thaw():
                self.world.tell(f"{host.name}: may run")
                host.outer_frozen = False
            case lease.Keep(record=record):
                host.lease_record = record
                self._guard(host, record)
            case lease.Drop():
                host.lease_record = None
            case lease.Tell(event=event):
                self.world.feed(host, event)

    def _guard(self, host: Host, record: lease.LeaseRecord) -> None:
        boot = host.boot

        def look() -> None:
            if host.on and host.boot == boot and host.lease_record is record:
                host.outer_frozen = True

        until_s = (record.until_s - self.clock_s(host)) / self.rates[host.name]
        after_s = GUARD_AFTER_S + self.random.uniform(0, GUARD_LOOKS_S)
        self.world.later(max(0.0, until_s) + after_s, look)

    # --- calls on their way -----------------------------------------------------------------------

    def _ask(self, host: Host, number: int, question: Question) -> None:
        keys = LeaseKeys(
            self.world.spec.name,
            node=host.name,
            boot_id=f"boot-{host.boot}",
            ttl_s=self.terms.ttl_s,
            clock=lambda: self.clock_s(host),
        )
        asking, life = keys.ask(question), host.keeper_life

        def go_on(step: Callable[[], Call]) -> None:
            if host.role is None or host.keeper_life != life:
                return
            if host.stands_still:
                host.delayed.append(lambda: go_on(step))
                return
            try:
                call = step()
            except StopIteration as ended:
                self.advance(host, lease.Answered(number, ended.value))
                return
            self._call(
                host,
                call,
                lambda answer: go_on(lambda: asking.send(answer)),
                lambda: go_on(lambda: asking.throw(UnreachableError("no answer in time"))),
            )

        go_on(lambda: next(asking))

    def _call(
        self,
        host: Host,
        call: Call,
        answered: Callable[[Any], None],
        failed: Callable[[], None],
        tries: int = 2,
    ) -> None:
        done, sent = False, self._reachable(host)

        def arrive() -> None:
            # What is on its way is carried out, or is not, whatever has become of its sender since.
            under_way = sent and self.etcd.up and self.random.random() < 0.5
            if not (self._reachable(host) or under_way):
                return
            answer = self.etcd.handle(call, self.world.now)
            self.world.later(self._delay_s(), lambda: back(answer))

        def back(answer: Any) -> None:
            nonlocal done
            if not done and self._reachable(host):
                done = True
                answered(answer)

        def give_up() -> None:
            nonlocal done
            if done:
                return
            done = True
            if call.repeatable and tries > 1:
                self._call(host, call, answered, failed, tries - 1)
            else:
                failed()

        self.world.later(self._delay_s(), arrive)
        self.world.later(self.terms.renew_every_s, give_up)

    def _delay_s(self) -> float:
        slow = self.random.uniform(0, self.etcd.slow_s) if self.etcd.slow_s else 0.0
        return self.random.uniform(0.0005, 0.01) + slow

    def _reachable(self, host: Host) -> bool:
        return host.on and self.etcd.up and (host.name, "etcd") not in self.world.blocked

    # --- what may go wrong with it ----------------------------------------------------------------

    def strike(self, host: Host, fault: str, for_s: float) -> None:
        """Let etcd be gone, slow, out of one host's reach, or change its leader; or a host be alone."""
        self.world.tell(f"etcd: {fault} {host.name}, {for_s:.2f} s")
        etcd = self.etcd
        if fault == "gone":
            etcd.up = False
            self.world.later(for_s, lambda: setattr(etcd, "up", True))
        elif fault == "slow":
            etcd.slow_s = self.random.choice([0.3, 0.8, 2.0])
            self.world.later(for_s, lambda: setattr(etcd, "slow_s", 0.0))
        elif fault == "cut":
            cut = {(host.name, "etcd")}
            self.world.blocked |= cut
            self.world.later(for_s, lambda: self.world.blocked.difference_update(cut))
        elif fault == "alone":
            peers = [name for name in self.world.hosts if name != host.name]
            cut = {pair for peer in peers for pair in ((host.name, peer), (peer, host.name))}
            self.world.blocked |= cut | {(host.name, "etcd")}
            self.world.later(for_s, lambda: self.world.blocked.discard((host.name, "etcd")))
            later_s = for_s + self.random.uniform(0, 6)
            self.world.later(later_s, lambda: self.world.blocked.difference_update(cut))
        elif fault == "elect":
            etcd.up = False

            def elected() -> None:
                etcd.elect(self.world.now)
                etcd.up = True

            self.world.later(self.random.uniform(0.3, 1.5), elected)

    def heal(self) -> None:
        self.etcd.up, self.etcd.slow_s = True, 0.0

    # --- invariants -------------------------------------------------------------------------------

    def check(self, host: Host) -> None:
        """Who runs it so that clients may reach it holds the lease at this moment, by etcd's own clock."""
        holder = self.etcd.leader(self.world.spec.name, self.world.now)
        if holder != host.name:
            raise self.world.broken(f"it runs on {host.name}, and the lease is held by {holder or 'nobody'}")
        for other in self.world.hosts.values():
            if other.served > host.record.term:
                what = f"it runs on {host.name} in term {host.record.term}"
                raise self.world.broken(f"{what}, and ran on {other.name} in term {other.served}")


FAULTS = ("gone", "slow", "cut", "cut", "alone", "alone", "elect")
