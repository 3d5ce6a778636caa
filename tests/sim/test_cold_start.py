"""Every order in which hosts come back (docs/concepts/cold-start.md), in the simulated world."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from common.roles import TermRecord
from tests.sim.test_cluster import TWO, protected_pair, role_of, state
from tests.sim.world import World

SEEDS = range(8)
MANUAL = replace(TWO, right_to_lead="manual")


def off(world: World, *names: str) -> None:
    for name in names:
        world.power_off(world.hosts[name])


def on(world: World, *names: str) -> None:
    for name in names:
        world.power_on(world.hosts[name])


def lose_disk(world: World, name: str) -> None:
    """Replace the disk of a host that is off."""
    host = world.hosts[name]
    host.record, host.stored = TermRecord(), None


def nothing_runs(world: World) -> bool:
    return all(host.container is None for host in world.hosts.values())


def after_takeover(seed: int) -> World:
    """Return a world in which `b` took over and lost its power before `a` came back."""
    world = protected_pair(seed)
    off(world, "a")
    world.run(6.0)
    assert state(world, "b") == "leading"
    off(world, "b")
    world.run(1.0)
    return world


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("away_s", [0.0, 0.2, 0.4, 0.7, 3.0])
def test_a_primary_that_reboots_however_fast_gives_way_to_its_replica(seed: int, away_s: float) -> None:
    world = protected_pair(seed)
    off(world, "a")
    world.run(away_s)
    on(world, "a")
    world.run(3.0)
    on(world, "a")  # the fence may have turned it off once more
    world.run(7.0)
    assert (state(world, "a"), state(world, "b")) == ("following", "leading")
    assert world.hosts["b"].restored is not None
    assert world.hosts["a"].record.term == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replica_that_reboots_changes_nothing(seed: int) -> None:
    world = protected_pair(seed)
    off(world, "b")
    world.run(3.0)
    assert state(world, "a") == "leading"
    on(world, "b")
    world.run(3.0)
    assert (state(world, "a"), state(world, "b")) == ("leading", "following")
    assert role_of(world, "a").record.term == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gap_s", [0.0, 1.0, 1.9, 2.1, 6.0])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_both_return_in_either_order_and_the_replica_restores(seed: int, gap_s: float, order: str) -> None:
    world = protected_pair(seed)
    off(world, "a", "b")
    world.run(2.0)
    on(world, order[0])
    world.run(gap_s)
    if order == "ab":
        assert nothing_runs(world)
        assert state(world, "a") == "starting"
    on(world, order[1])
    world.run(4.0)
    on(world, "a")  # the replica may have fenced it while it booted
    world.run(8.0)
    assert (state(world, "a"), state(world, "b")) == ("following", "leading")
    assert world.hosts["b"].restored is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_both_return_and_manual_waits_for_the_operator(seed: int) -> None:
    world = protected_pair(seed, MANUAL)
    off(world, "a", "b")
    world.run(1.0)
    on(world, "a", "b")
    world.run(6.0)
    assert (state(world, "a"), state(world, "b")) == ("yielded", "waiting")
    assert role_of(world, "b").reason.endswith("outlive failover w --accept-data-loss")
    assert nothing_runs(world)
    assert not world.refused(world.failover("b"))
    world.run(3.0)
    assert state(world, "b") == "leading"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_old_primary_that_returns_first_runs_nothing_and_then_gets_the_right(seed: int) -> None:
    world = after_takeover(seed)
    on(world, "a")
    world.run(8.0)
    assert state(world, "a") == "starting"
    assert "outlive start w --off b" in role_of(world, "a").reason
    assert world.refused(world.start("a"))
    assert world.refused(world.failover("a", "b"))
    on(world, "b")
    world.run(6.0)
    assert (state(world, "a"), state(world, "b")) == ("waiting", "yielded")
    assert "no epoch is stored here: outlive start w" in role_of(world, "a").reason
    assert nothing_runs(world)
    assert not world.refused(world.start("a"))
    world.run(3.0)
    assert (state(world, "a"), state(world, "b")) == ("leading", "following")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_primary_that_returns_alone_starts_only_if_the_other_is_vouched_for(seed: int) -> None:
    world = protected_pair(seed)
    off(world, "a", "b")
    world.run(1.0)
    on(world, "a")
    world.run(3.0)
    assert world.refused(world.start("a"))
    assert not world.refused(world.start("a", ("b",)))
    world.run(3.0)
    assert state(world, "a") == "leading"
    assert role_of(world, "a").record.term >= 100
    on(world, "b")
    world.run(4.0)
    assert (state(world, "a"), state(world, "b")) == ("leading", "following")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_primary_with_a_new_disk_starts_nothing_while_the_other_is_unheard(seed: int) -> None:
    world = protected_pair(seed)
    off(world, "a")
    lose_disk(world, "a")
    world.run(6.0)
    assert state(world, "b") == "leading"
    world.blocked |= {("a", "b"), ("b", "a")}  # new keys: neither accepts the other
    on(world, "a")
    world.run(4.0)
    assert world.refused(world.start("a"))
    world.blocked.clear()
    world.run(4.0)
    assert (state(world, "a"), state(world, "b")) == ("following", "leading")
    assert role_of(world, "a").record.term == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_primary_that_forgot_its_term_leaves_it_to_an_operator(seed: int) -> None:
    world = protected_pair(seed, MANUAL)
    off(world, "a")
    lose_disk(world, "a")
    world.run(2.0)
    on(world, "a")
    world.run(5.0)
    assert state(world, "b") == "waiting"
    assert "does not know that it leads term 1" in role_of(world, "b").reason
    assert nothing_runs(world)
    assert not world.refused(world.failover("b"))
    world.run(5.0)
    assert state(world, "b") == "leading"
    on(world, "a")
    world.run(4.0)
    assert state(world, "a") == "following"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replica_without_terms_leads_nothing_and_follows_when_it_hears(seed: int) -> None:
    world = protected_pair(seed)
    off(world, "b")
    stored = world.hosts["b"].stored
    world.hosts["b"].record = TermRecord()
    off(world, "a")
    world.run(1.0)
    on(world, "b")
    world.run(6.0)
    assert nothing_runs(world)
    assert world.hosts["b"].record == TermRecord()
    assert world.refused(world.start("b"))
    on(world, "a")
    world.run(8.0)
    assert (state(world, "a"), state(world, "b")) == ("following", "leading")
    assert world.hosts["b"].restored == stored


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replica_without_a_store_starts_afresh_only_on_an_operators_word(seed: int) -> None:
    world = protected_pair(seed, MANUAL)
    off(world, "a", "b")
    world.hosts["b"].stored = None
    world.run(1.0)
    on(world, "b")
    world.run(5.0)
    assert state(world, "b") == "waiting"
    assert "outlive start w --off a (memory content is lost)" in role_of(world, "b").reason
    assert world.refused(world.failover("b", "a"))
    assert world.refused(world.start("b"))
    assert not world.refused(world.start("b", ("a",)))
    world.run(3.0)
    assert state(world, "b") == "leading"
    on(world, "a")
    world.run(4.0)
    assert state(world, "a") == "following"
