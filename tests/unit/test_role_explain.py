"""What explain says is what the role machine then does."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.config import Fence, Node, NodeConfig
from common.control import Explanation
from common.fencing import coverage, covers
from common.model import EpochId, WorkloadSpec
from common.pauses import Pause
from common.role_events import (
    FenceResult,
    Heard,
    OperatorPause,
    OperatorStop,
    PersistTerm,
    RunFence,
    Tick,
    WorkloadEnded,
)
from common.role_explain import Covers, explain, takeovers
from common.roles import SILENCES, Mark, Takeover, TermRecord
from common.succession import obstacles
from tests.unit.test_roles import SPEC, Driver, follower, leader, ready_replica

ALL: Covers = {"a": frozenset(SILENCES), "b": frozenset(SILENCES)}
STORED = {"stored": EpochId(1, 9), "stored_wall_s": 1e9 + 99.0, "restorable": True}
PAUSE = Pause(node="a", number=1, by="root", since_wall_s=1e9)


def asked(driver: Driver, covered: Covers = ALL) -> Explanation:
    return explain(driver.role, driver.instant(), covered)


def outcomes(found: Explanation) -> dict[str, tuple[str, str]]:
    return {case.failure: (case.outcome, case.node) for case in found.cases}


def really_lost(driver: Driver, report: Mapping[str, object], *, confirms: bool) -> bool:
    """Let the leader be silent for good, on the real machine; tell whether it goes for the next term."""
    driver.effects.clear()
    for _ in range(60):
        driver.report(**report)
        driver.after(0.1)
        for fence in [effect for effect in driver.effects if isinstance(effect, RunFence)]:
            outcome = "confirmed" if confirms else "unknown"
            driver.effects.remove(fence)
            driver.feed(
                FenceResult(node=fence.node, attempt=fence.attempt, outcome=outcome, reason="so")  # type: ignore[arg-type]
            )
        if any(isinstance(e, PersistTerm) and e.record.mark == "taking_over" for e in driver.effects):
            return True
    return False


SPECS = st.builds(
    lambda nodes, right, on_exit, lag: replace(
        SPEC, nodes=nodes, right_to_lead=right, on_exit=on_exit, max_takeover_lag_ms=lag
    ),
    st.sampled_from([("a", "b"), ("a", "b", "c"), ("a", "c", "b")]),
    st.sampled_from(["manual", "fence", "fence"]),
    st.sampled_from(["restart", "failover", "stop"]),
    st.sampled_from([0, 0, 500, 5000]),
)
REPORTS = st.fixed_dictionaries(
    {
        "stored": st.sampled_from([None, EpochId(1, 9), EpochId(1, 9), EpochId(1, 9), EpochId(2, 1)]),
        "stored_wall_s": st.sampled_from([1e9 + 90.0, 1e9 + 99.9]),
        "restorable": st.sampled_from([True, True, True, False]),
        "doubt": st.sampled_from(["", "", "", "pages differ"]),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    spec=SPECS,
    report=REPORTS,
    term=st.sampled_from([1, 1, 1, 2]),
    mark=st.sampled_from(["leads", "leads", "leads", "stopped", "failed", "yielded"]),
    claim=st.sampled_from(["leading", "leading", "leading", "following", "stopped", "yielded", None]),
    paused=st.sampled_from([False, False, True]),
    persisted=st.booleans(),
    fenceable=st.sampled_from([frozenset({"a"}), frozenset({"a"}), frozenset()]),
    covered=st.booleans(),
)
def test_what_is_said_of_the_loss_of_the_leader_is_what_the_machine_does_when_it_is_lost(
    spec: WorkloadSpec,
    report: Mapping[str, object],
    term: int,
    mark: Mark,
    claim: str | None,
    paused: bool,
    persisted: bool,
    fenceable: frozenset[str],
    covered: bool,
) -> None:
    record = TermRecord(term=term, leader="a", mark=mark, boot_id="boot-1")
    driver = Driver("b", record, spec=spec, fenceable=fenceable)
    driver.report(**report)
    driver.feed(
        Heard(
            node="a",
            origin="keeper",
            boot_id="boot-a",
            wall_s=1e9 + 100.0,
            term=term,
            claim=claim,  # type: ignore[arg-type]
            alive=claim == "leading",
            pauses=(PAUSE,) if paused else (),
        )
    )
    if driver.role.wanted is not None:
        driver.persisted()
    if paused and persisted:
        driver.pauses_persisted()
    if driver.role.name == "acquiring":
        return  # under way already: it had been given up in favour of this node
    found = asked(driver, {"a": frozenset({"host loss"})} if covered else {})
    assert found.would_fail_over == (not found.missing)
    assert all(found.missing) or not found.missing
    assert found.would_fail_over == really_lost(driver, report, confirms=covered)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stored": None}, "no epoch is stored here"),
        ({"restorable": False, "reasons": ("port 80 is taken",)}, "port 80 is taken"),
        ({"doubt": "pages differ"}, "pages differ"),
    ],
    ids=["nothing stored", "not restorable", "doubtful"],
)
def test_what_is_missing_on_the_successor_is_named(change: Mapping[str, object], reason: str) -> None:
    driver = follower()
    driver.report(**{**STORED, **change})
    found = asked(driver)
    assert (found.would_fail_over, found.epoch, found.loss_s) == (False, None, None)
    assert reason in found.missing[0]


def test_everything_that_is_missing_is_said_at_once_the_pause_first() -> None:
    spec = replace(SPEC, right_to_lead="manual", max_takeover_lag_ms=100)
    driver = follower(spec=spec)
    driver.hear("leading", wall_s=1e9 + 100.0)
    driver.report(**{**STORED, "doubt": "pages differ"})
    driver.feed(OperatorPause(request=1, by="root"))
    missing = asked(driver).missing
    assert [word for word in missing[0].split() if word == "paused"]
    assert missing[1].startswith("pages differ")
    assert missing[2].startswith("right_to_lead is manual")
    assert "max_takeover_lag_ms" in missing[3]


def test_a_successor_that_would_take_over_says_what_would_be_lost_and_under_which_condition() -> None:
    driver = follower()
    driver.report(**STORED)
    found = asked(driver)
    assert (found.would_fail_over, found.successor, found.epoch) == (True, "b", EpochId(1, 9))
    assert found.loss_s == pytest.approx(1.0)
    assert outcomes(found) == {
        "process failure": ("failover", "b"),
        "host loss": ("failover", "b"),
        "partition": ("failover", "b"),
        "agent dead": ("runs on", "a"),
        "workload ended": ("not known here", ""),
    }
    assert "once a fence confirms that a is off" in found.cases[0].reason


def test_a_fence_confirms_in_the_failures_that_it_covers_and_in_no_others() -> None:
    driver = follower()
    driver.report(**STORED)
    found = asked(driver, {"a": frozenset({"process failure"})})
    assert not found.would_fail_over
    assert "no fence method for a covers host loss" in found.missing[0]
    assert outcomes(found)["process failure"] == ("failover", "b")
    assert outcomes(found)["partition"] == ("no failover", "")


def test_without_any_fence_that_is_what_is_missing() -> None:
    driver = follower(fenceable=frozenset())
    driver.report(**STORED)
    assert asked(driver, {}).missing[0].startswith("no fence method is configured for a")


def test_a_fence_that_did_not_confirm_in_this_silence_is_not_taken_to_confirm() -> None:
    driver = follower()
    driver.after(0.4)
    assert driver.state == "acquiring"
    assert asked(driver).would_fail_over, "it is being asked"
    driver.feed(FenceResult(node="a", attempt=1, outcome="unknown", reason="no route"))
    found = asked(driver)
    assert (driver.state, found.would_fail_over) == ("waiting", False)
    assert "no route" in found.missing[0]


def test_asking_changes_nothing_and_can_be_repeated() -> None:
    driver = follower()
    before = driver.role
    assert asked(driver) == asked(driver)
    assert driver.role is before


def test_the_leader_relays_what_its_successor_says_and_knows_its_own_part() -> None:
    driver = leader(spec=replace(SPEC, on_exit="failover"))
    replica = replace(ready_replica(), acknowledged_wall_s=1e9 + 98.0)
    driver.report(replicas=(replica,), running=True)
    found = asked(driver)
    assert not found.would_fail_over
    assert "the keeper of b is not heard" in found.missing[0]
    says = tuple(Takeover(silence=why, missing=()) for why in SILENCES)
    driver.feed(Heard(node="b", origin="keeper", boot_id="x", term=1, claim="following", takeovers=says))
    found = asked(driver)
    assert (found.would_fail_over, found.successor, found.epoch) == (True, "b", EpochId(1, 9))
    assert found.loss_s == pytest.approx(2.0)
    assert outcomes(found)["agent dead"] == ("runs on", "a")
    assert outcomes(found)["workload ended"] == ("failover", "b")
    refuses = tuple(Takeover(silence=why, missing=("port 80 is taken",)) for why in SILENCES)
    driver.feed(Heard(node="b", origin="keeper", boot_id="x", term=1, claim="following", takeovers=refuses))
    assert asked(driver).missing == ("port 80 is taken",)
    driver.feed(Heard(node="b", origin="keeper", boot_id="x", term=0, claim=None, takeovers=says))
    assert "b does not say that it follows term 1" in asked(driver).missing[0]


@pytest.mark.parametrize("on_exit", ["restart", "failover", "stop"])
@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("paused", [True, False])
def test_what_is_said_of_the_workloads_end_is_what_the_machine_does_when_it_ends(
    on_exit: str, able: bool, paused: bool
) -> None:
    driver = leader(spec=replace(SPEC, on_exit=on_exit))
    driver.hear("following", node="b")
    driver.report(replicas=(ready_replica(),) if able else (), running=True)
    if paused:
        driver.feed(OperatorPause(request=1, by="root"))
    outcome = outcomes(asked(driver))["workload ended"][0]
    driver.feed(WorkloadEnded(1))
    driver.feed(Tick())
    did = "failover" if driver.state == "yielding" else driver.role.newest.mark
    assert {"launching": "restart", "stopped": "stays down"}.get(did, did) == outcome
    assert not (paused and outcome == "failover")


def test_what_is_said_of_a_dead_agent_is_what_the_machine_does() -> None:
    driver = follower()
    for _ in range(40):
        driver.hear("leading")
        driver.after(0.1)
    assert (driver.state, outcomes(asked(driver))["agent dead"]) == ("following", ("runs on", "a"))


def test_of_what_is_stopped_or_has_no_other_node_nobody_takes_over() -> None:
    driver = leader()
    driver.feed(OperatorStop(request=1))
    driver.persisted()
    found = asked(driver)
    assert (found.stopped, found.would_fail_over) == (True, False)
    assert "it is to run nowhere" in found.missing[0]
    assert outcomes(found)["agent dead"] == ("stays down", "")
    alone = leader(spec=replace(SPEC, nodes=("a",)))
    assert asked(alone).missing == ("a is the only node that may run it",)


def test_a_node_that_is_not_the_successor_relays_and_would_not_itself() -> None:
    spec = replace(SPEC, nodes=("a", "b", "c"))
    driver = Driver("c", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1"), spec=spec)
    driver.report(**STORED)
    driver.hear("leading")
    assert "b is the successor of a" in takeovers(driver.role, driver.instant(), ALL)[0].missing[0]
    says = tuple(Takeover(silence=why, missing=()) for why in SILENCES)
    driver.feed(Heard(node="b", origin="keeper", boot_id="x", term=1, claim="following", takeovers=says))
    found = asked(driver)
    assert (found.would_fail_over, found.successor, found.node, found.epoch) == (True, "b", "c", None)


def test_the_words_of_the_failures_are_those_that_fences_cover() -> None:
    fence = Fence(node="a", command=("true",))
    config = NodeConfig(node=Node(name="b", address="127.0.0.1"), fences=(fence,))
    assert covers(config) == {"a": frozenset(SILENCES)}
    assert len(coverage(config, SPEC)) == len(SILENCES)


def test_the_obstacle_that_a_waiting_node_shows_is_the_first_that_explain_names() -> None:
    driver = follower()
    driver.report(stored=None)
    driver.after(0.5)
    assert driver.state == "waiting"
    assert driver.role.reason == next(obstacles(driver.role, driver.instant()))
    assert asked(driver).missing[0].partition(":")[0] == driver.role.reason.partition(":")[0]
