"""The role machine: single transitions, and what no sequence of events may break."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.control import Done, Refused, ReplicaProgress, WorkloadReport
from common.model import EpochId, HealthCheck, WorkloadSpec
from common.pauses import Pause, Pauses, in_force
from common.role_diagram import edges, mermaid, table
from common.role_events import (
    AddressLost,
    AddVip,
    AgentReport,
    Announce,
    Answer,
    CheckHealth,
    DropVip,
    Effect,
    Event,
    FenceResult,
    Heard,
    HoldVip,
    KeeperStarted,
    KillWorkload,
    LiftHold,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    OperatorStart,
    OperatorStop,
    OperatorSwitchover,
    PausesPersisted,
    PersistTerm,
    RunFence,
    SaveHistory,
    StepDone,
    StepFailed,
    TermPersisted,
    Tick,
    Told,
    WorkloadEnded,
)
from common.role_handover import as_thawed, has_to_stand_still
from common.role_table import TABLE, step
from common.role_view import workload_status
from common.roles import (
    LEADING,
    MEANING,
    Claim,
    Instant,
    Mark,
    Refusal,
    Role,
    Takeover,
    TermRecord,
    Timing,
    claim_of,
    new_role,
)

SPEC = WorkloadSpec(
    name="w",
    nodes=("a", "b"),
    command=("sleep",),
    vip="10.0.0.9/24",
    right_to_lead="fence",
    health=HealthCheck(tcp=80),
)


class Driver:
    """A machine, its clock, and everything that it wanted done."""

    def __init__(
        self,
        me: str = "b",
        record: TermRecord | None = None,
        *,
        spec: WorkloadSpec = SPEC,
        running: bool = False,
        frozen: bool = False,
        fenceable: frozenset[str] = frozenset({"a", "b"}),
        boot: str = "boot-1",
        pauses: Pauses = (),
        refusal: Refusal | None = None,
    ) -> None:
        self.now_s = 100.0
        self.role: Role = new_role(
            me=me,
            boot_id=boot,
            spec=spec,
            timing=Timing(),
            fenceable=fenceable,
            record=record or TermRecord(),
            first_order=1000,
            now=self.instant(),
            pauses=pauses,
            refusal=refusal,
        )
        self.effects: list[Effect] = []
        self.feed(KeeperStarted(running, frozen))

    def instant(self) -> Instant:
        return Instant(self.now_s, 1e9 + self.now_s)

    def feed(self, event: Event) -> list[Effect]:
        self.role, effects = step(self.role, event, self.instant())
        self.effects += effects
        return list(effects)

    def after(self, seconds: float) -> list[Effect]:
        """Let time pass, ticking, hearing nobody."""
        found: list[Effect] = []
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.025
            found += self.feed(Tick())
        return found

    def hear(self, claim: Claim, term: int = 1, node: str = "a", wall_s: float = 0.0) -> list[Effect]:
        return self.feed(
            Heard(
                node=node,
                origin="keeper",
                boot_id="boot-a",
                wall_s=wall_s,
                term=term,
                claim=claim,
                alive=True,
            )
        )

    def report(self, **values: object) -> list[Effect]:
        report = WorkloadReport(name="w", spec=self.role.spec, running=self.role.alive)
        return self.feed(AgentReport(replace(report, **values)))

    def persisted(self) -> list[Effect]:
        assert self.role.wanted is not None
        return self.feed(TermPersisted(self.role.wanted))

    def pauses_persisted(self) -> list[Effect]:
        assert self.role.pauses_wanted is not None
        return self.feed(PausesPersisted(self.role.pauses_wanted))

    @property
    def state(self) -> str:
        return self.role.name


def follower(**values: object) -> Driver:
    driver = Driver("b", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1"), **values)  # type: ignore[arg-type]
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.hear("leading")
    return driver


def leader(**values: object) -> Driver:
    record = TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1")
    return Driver("a", record, running=True, **values)  # type: ignore[arg-type]


def ready_replica() -> ReplicaProgress:
    return ReplicaProgress(node="b", connected=True, acknowledged=EpochId(1, 9), restorable=True)


def test_silence_of_both_leads_by_a_fence_to_a_durable_term_before_anything_is_done() -> None:
    driver = follower()
    asked = driver.after(0.4)
    assert [effect for effect in asked if isinstance(effect, RunFence)] == [RunFence("a", 1, 1, 1)]
    assert driver.state == "acquiring"
    confirmed = driver.feed(FenceResult(node="a", attempt=1, outcome="confirmed", reason="off"))
    assert [type(effect) for effect in confirmed if not isinstance(effect, type(confirmed[-1]))] == [
        PersistTerm
    ]
    assert driver.role.record.term == 1
    assert HoldVip() in driver.persisted()
    assert (driver.state, driver.role.record.term, driver.role.record.leader) == ("taking_over", 2, "b")


def test_the_steps_of_a_takeover_come_in_their_order() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=1, outcome="confirmed", reason="off"))
    assert HoldVip() in driver.persisted()
    assert AddVip() in driver.feed(StepDone(step="hold"))
    driver.feed(StepDone(step="add_vip"))
    order = driver.role.order
    assert (order.role, order.action, order.term) == ("lead", "restore", 2)
    driver.feed(AgentReport(WorkloadReport(name="w", spec=SPEC, running=False, order_done=order.number - 1)))
    assert driver.role.step == "order"
    up = WorkloadReport(name="w", spec=SPEC, running=True, order_done=order.number, restored=EpochId(1, 9))
    assert CheckHealth() in driver.feed(AgentReport(up))
    assert LiftHold() in driver.feed(StepDone(step="health"))
    driver.feed(StepDone(step="lift"))
    driver.feed(StepDone(step="announce"))
    assert driver.state == "leading"
    assert driver.role.order.action == "none"
    assert driver.role.order.number > order.number
    names = [entry.event for entry in driver.role.timeline]
    assert names[:4] == ["last heard", "suspected", "fence asked", "right acquired"]
    assert names[4:] == [
        *("term recorded", "VIP held", "VIP added"),
        *("ordered", "running", "healthy", "hold lifted", "announced", "leading"),
    ]


@pytest.mark.parametrize("origin", ["keeper", "agent"])
def test_one_of_keeper_and_agent_is_enough_to_be_alive(origin: str) -> None:
    driver = follower()
    for _ in range(20):
        driver.after(0.1)
        driver.feed(Heard(node="a", origin=origin, boot_id="boot-a", term=1, claim="leading"))  # type: ignore[arg-type]
    assert driver.state == "following"


@pytest.mark.parametrize("outcome", ["unknown", "refused"])
def test_a_fence_that_does_not_confirm_gives_no_right_and_is_asked_again(outcome: str) -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=1, outcome=outcome, reason="no answer"))  # type: ignore[arg-type]
    assert driver.state == "waiting"
    assert outcome in driver.role.reason
    assert driver.role.wanted is None
    driver.report(stored=EpochId(1, 9), restorable=True)
    assert RunFence("a", 2, 1, 1) in driver.after(1.1)
    asked = [entry.reason for entry in driver.role.timeline if entry.event == "fence asked"]
    assert [reason.split(":")[0] for reason in asked] == ["attempt 1", "attempt 2"]


def test_the_first_attempt_to_fence_is_the_first_in_every_term() -> None:
    driver = follower()
    driver.hear("leading", term=2)
    driver.persisted()
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.after(0.4)
    (asked,) = [entry.reason for entry in driver.role.timeline if entry.event == "fence asked"]
    assert asked == "attempt 1: a has to be confirmed off"


def test_a_leader_that_is_heard_while_its_fence_runs_is_followed_unless_the_fence_confirms() -> None:
    driver = follower()
    driver.after(0.4)
    driver.hear("leading")
    assert driver.state == "acquiring"
    driver.feed(FenceResult(node="a", attempt=1, outcome="unknown", reason="?"))
    assert driver.state == "following"


def test_an_answer_of_an_earlier_attempt_is_ignored() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=0, outcome="confirmed", reason="off"))
    assert driver.role.wanted is None


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"stored": None, "restorable": False}, "no epoch"),
        ({"stored": EpochId(1, 9), "restorable": False, "reasons": ("no room",)}, "no room"),
    ],
)
def test_without_a_restorable_epoch_nobody_is_fenced(values: dict[str, object], word: str) -> None:
    driver = follower()
    driver.report(**values)
    effects = driver.after(0.5)
    assert driver.state == "waiting"
    assert word in driver.role.reason
    assert not any(isinstance(effect, RunFence) for effect in effects)


LIMITED = replace(SPEC, max_takeover_lag_ms=30_000)
LEADERS_CLOCK_S = 5_000.0
"""Far from this node's own, which must not matter."""


def behind(seconds: float, spec: WorkloadSpec = LIMITED) -> Driver:
    """Return a follower that heard its leader that long after the epoch it has was captured."""
    driver = follower(spec=spec)
    driver.report(stored=EpochId(1, 9), stored_wall_s=LEADERS_CLOCK_S - seconds, restorable=True)
    driver.hear("leading", wall_s=LEADERS_CLOCK_S)
    return driver


@pytest.mark.parametrize(("seconds", "state"), [(29.9, "acquiring"), (30.0, "acquiring"), (30.5, "waiting")])
def test_a_replica_too_far_behind_its_leader_does_not_take_over_by_itself(seconds: float, state: str) -> None:
    driver = behind(seconds)
    asked = driver.after(0.5)
    assert driver.state == state
    assert any(isinstance(effect, RunFence) for effect in asked) == (state == "acquiring")


def test_a_replica_too_far_behind_says_how_far_what_is_allowed_and_what_to_do() -> None:
    driver = behind(42.0)
    driver.after(0.5)
    reason = driver.role.reason
    assert reason == (
        "the newest epoch here was 42.0 s behind when a was last heard to lead; "
        "max_takeover_lag_ms allows 30 s: outlive failover w --accept-data-loss"
    )
    for _ in range(300):  # the silence itself adds nothing to the lag
        driver.after(0.1)
        driver.report(stored=EpochId(1, 9), stored_wall_s=LEADERS_CLOCK_S - 42, restorable=True)
    assert driver.role.reason == reason


def test_without_a_limit_no_lag_is_too_long() -> None:
    driver = behind(4000.0, SPEC)
    driver.after(0.5)
    assert driver.state == "acquiring"


def test_an_operator_may_take_over_with_any_lag() -> None:
    driver = behind(42.0)
    driver.after(0.5)
    asked = driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert driver.state == "acquiring"
    assert any(isinstance(effect, RunFence) for effect in asked)


DOUBT = "t1-e9 is in doubt: b has stored 1 page otherwise"


def test_a_replica_whose_store_is_in_doubt_does_not_take_over_by_itself_and_says_why() -> None:
    driver = follower()
    driver.report(stored=EpochId(1, 9), restorable=True, doubt=DOUBT)
    asked = driver.after(0.5)
    assert driver.state == "waiting"
    assert not any(isinstance(effect, RunFence) for effect in asked)
    assert driver.role.reason == f"{DOUBT}: outlive failover w --accept-data-loss"
    driver.report(stored=EpochId(1, 10), restorable=True)  # it was sent anew
    driver.after(0.5)
    assert driver.state == "acquiring"


def test_an_operator_may_take_over_with_what_is_in_doubt() -> None:
    driver = follower()
    driver.report(stored=EpochId(1, 9), restorable=True, doubt=DOUBT)
    driver.after(0.5)
    asked = driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert driver.state == "acquiring"
    assert any(isinstance(effect, RunFence) for effect in asked)


def test_the_agents_last_word_counts_too_while_the_keeper_is_dead() -> None:
    driver = behind(0.5)
    driver.feed(Heard(node="a", origin="agent", boot_id="boot-a", wall_s=LEADERS_CLOCK_S + 60))
    driver.after(0.5)
    assert (driver.state, "60.5 s behind" in driver.role.reason) == ("waiting", True)


def test_what_a_leader_says_after_it_led_adds_nothing_to_the_lag() -> None:
    driver = behind(0.5)
    driver.feed(Heard(node="a", origin="agent", boot_id="another", wall_s=LEADERS_CLOCK_S + 60))
    driver.hear("yielded", wall_s=LEADERS_CLOCK_S + 90)
    driver.persisted()
    driver.after(0.025)
    assert driver.state == "acquiring"


def test_a_keeper_that_never_heard_the_leader_lead_does_not_know_the_lag_and_waits() -> None:
    driver = Driver("b", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1"), spec=LIMITED)
    driver.report(stored=EpochId(1, 9), stored_wall_s=LEADERS_CLOCK_S, restorable=True)
    for _ in range(25):
        driver.after(0.1)
        driver.report(stored=EpochId(1, 9), stored_wall_s=LEADERS_CLOCK_S, restorable=True)
    assert driver.state == "waiting"
    assert "a was not heard to lead term 1 since this keeper began" in driver.role.reason


def test_a_lag_of_an_earlier_term_says_nothing_of_this_one() -> None:
    driver = behind(0.5)
    driver.hear("starting", term=2, wall_s=LEADERS_CLOCK_S + 1)
    driver.persisted()
    driver.report(stored=EpochId(2, 10), stored_wall_s=LEADERS_CLOCK_S + 2, restorable=True)
    driver.after(0.5)
    assert (driver.state, "not known" in driver.role.reason) == ("waiting", True)


def test_an_epoch_of_an_older_term_is_not_restored_without_an_operator() -> None:
    driver = follower()
    driver.hear("leading", term=5)
    driver.persisted()
    driver.after(0.5)
    assert driver.state == "waiting"
    assert "older than term 5" in driver.role.reason


def test_manual_mode_waits_for_an_operator_who_accepts_the_loss() -> None:
    driver = follower(spec=replace(SPEC, right_to_lead="manual"), fenceable=frozenset())
    driver.after(0.5)
    assert "--accept-data-loss" in driver.role.reason
    for request, accepted, off in [(1, False, "a"), (2, True, "")]:
        driver.feed(OperatorFailover(request=request, accept_data_loss=accepted, old_primary_is_off=off))
        assert _answer(driver, request, Refused).error == "NoRightToLeadError"
    driver.feed(OperatorFailover(request=3, accept_data_loss=True, old_primary_is_off="a"))
    driver.persisted()
    assert driver.state == "taking_over"
    _answer(driver, 3, Done)


def test_an_operator_cannot_vouch_for_a_node_that_is_heard() -> None:
    driver = follower(spec=replace(SPEC, right_to_lead="manual"), fenceable=frozenset())
    for request, off in [(1, "a"), (2, "")]:
        driver.feed(OperatorFailover(request=request, accept_data_loss=True, old_primary_is_off=off))
        refused = _answer(driver, request, Refused)
        assert "a is not off: it was heard" in refused.message
        assert "--old-primary-is-off" not in refused.hint
        assert "outlive stop w on a" in refused.hint
        assert "fence" in refused.hint


def test_nobody_is_asked_to_vouch_for_a_node_that_is_heard_though_its_fence_fails() -> None:
    driver = follower()
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    driver.feed(FenceResult(node="a", attempt=1, outcome="unknown", reason="?"))
    assert "outlive stop w on a" in _answer(driver, 1, Refused).hint


def test_an_operator_cannot_vouch_for_a_node_that_has_no_part_in_it() -> None:
    driver = follower(spec=replace(SPEC, right_to_lead="manual"))
    driver.after(0.5)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="c"))
    refused = _answer(driver, 1, Refused)
    assert (refused.message, refused.hint) == ("c is not one of the nodes of w", "one of: a, b")
    driver.feed(OperatorStart(request=2, spec=SPEC, peers_are_off=("c",)))
    assert "c is not one of the nodes" in _answer(driver, 2, Refused).message


def test_a_leader_that_hears_of_a_newer_term_is_killed_and_follows() -> None:
    driver = leader()
    effects = driver.hear("leading", term=2, node="b")
    assert driver.state == "deposed"
    assert effects.index(DropVip()) < effects.index(KillWorkload())
    for done in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    driver.persisted()
    driver.after(0.05)
    assert (driver.state, driver.role.record.term, driver.role.record.leader) == ("following", 2, "b")


def test_a_kill_that_fails_is_repeated_and_nothing_else_happens_before_it_succeeds() -> None:
    driver = leader()
    driver.hear("leading", term=2, node="b")
    driver.feed(StepFailed(step="kill", reason="a process in state D"))
    assert KillWorkload() in driver.after(1.1)
    assert driver.state == "deposed"


def test_older_terms_are_ignored() -> None:
    driver = leader()
    driver.hear("leading", term=0, node="b")
    assert driver.state == "leading"


def test_of_two_leaders_of_one_term_exactly_one_gives_way() -> None:
    one, two = (
        leader(),
        Driver("b", TermRecord(term=1, leader="b", mark="leads", boot_id="boot-1"), running=True),
    )
    one.hear("leading", node="b")
    two.hear("leading", node="a")
    assert (one.state, two.state) == ("leading", "deposed")


def test_an_ended_workload_is_yielded_only_when_nothing_of_it_is_left_and_that_is_recorded() -> None:
    driver = leader(spec=replace(SPEC, on_exit="failover"))
    driver.report(replicas=(ready_replica(),))
    driver.feed(WorkloadEnded(1))
    driver.after(0.05)
    assert driver.state == "yielding"
    assert claim_of(driver.role) == "leading"
    for done in ("kill", "drop_vip", "lift"):
        assert driver.role.wanted is None
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    driver.after(0.05)
    assert driver.state == "yielding"
    driver.persisted()
    assert claim_of(driver.role) == "yielded"


def test_the_successor_of_a_leader_that_yielded_takes_over_without_a_fence() -> None:
    driver = follower(fenceable=frozenset())
    driver.hear("yielded")
    driver.persisted()
    driver.after(0.05)
    driver.persisted()
    assert (driver.state, driver.role.record.term) == ("taking_over", 2)


def test_a_yield_counts_after_a_boot_of_the_successor_only_if_it_is_heard_again() -> None:
    record = TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-0")
    driver = Driver("b", record, fenceable=frozenset())
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.after(0.1)
    assert driver.state == "waiting"
    driver.hear("yielded")
    driver.after(0.05)
    assert driver.role.newest.term == 2


@pytest.mark.parametrize("policy", ["restart", "failover"])
def test_an_ended_workload_without_an_heir_is_restarted_in_the_same_term_and_not_for_ever(
    policy: str,
) -> None:
    driver = leader(spec=replace(SPEC, on_exit=policy, vip=None, health=None))
    paused_s = []
    for count in range(1, 7):
        driver.feed(WorkloadEnded(3))
        ended_s = driver.now_s
        for _ in range(2000):
            if driver.role.wanted is not None:
                driver.persisted()
            driver.after(0.025)
            if driver.role.step == "order" or driver.state == "stopped":
                break
        if count == 6:
            break
        assert driver.role.order.action == "start"
        paused_s.append(round(driver.now_s - ended_s))
        driver.feed(
            AgentReport(
                WorkloadReport(
                    name="w", spec=driver.role.spec, running=True, order_done=driver.role.order.number
                )
            )
        )
        assert (driver.state, driver.role.newest.term) == ("leading", 1)
    assert driver.state == "stopped"
    assert "5 times" in driver.role.reason
    assert paused_s[1:] == [1, 2, 4, 8]
    assert paused_s[0] == 0 or policy == "failover", "an heir is waited for"


def test_an_ended_workload_with_on_exit_stop_is_stopped_and_its_exit_code_shown() -> None:
    driver = leader()
    driver.feed(WorkloadEnded(7))
    driver.after(0.05)
    driver.persisted()
    assert driver.state == "stopped"
    assert workload_status(driver.role, driver.instant()).exit_code == 7
    assert "code 7" in driver.role.reason


def test_a_stop_is_recorded_before_the_agent_is_told_and_forced_if_the_agent_does_nothing() -> None:
    driver = leader()
    driver.feed(OperatorStop(request=1))
    assert driver.role.order.role == "lead"
    driver.persisted()
    assert (driver.state, driver.role.order.role) == ("stopped", "idle")
    assert KillWorkload() not in driver.after(10)
    assert KillWorkload() in driver.after(6)


def test_a_stop_ends_what_is_only_half_brought_up() -> None:
    """Else it would go on at whatever opens its gate next, in a later term."""
    driver = Driver("a", TermRecord(term=1, leader="a", mark="launching", boot_id="boot-1"))
    assert (driver.state, driver.role.alive) == ("launching", False)
    driver.feed(OperatorStop(request=2))
    assert KillWorkload() not in driver.effects, "it is on record first"
    driver.persisted()
    assert driver.state == "stopped"
    assert KillWorkload() in driver.effects


def test_a_stopped_leader_is_not_taken_over_from() -> None:
    driver = follower()
    driver.hear("stopped")
    driver.persisted()
    driver.after(3)
    assert driver.state == "following"


def test_a_leader_that_starts_again_in_its_term_is_watched_again() -> None:
    driver = follower()
    driver.hear("stopped")
    driver.persisted()
    driver.hear("leading")
    driver.persisted()
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.after(0.4)
    assert driver.state == "acquiring"


@pytest.mark.parametrize(
    ("mark", "running", "expected"),
    [
        ("leads", True, "leading"),
        ("taking_over", False, "taking_over"),
        ("taking_over", True, "taking_over"),
        ("launching", False, "launching"),
        ("stopped", False, "stopped"),
        ("yielded", False, "yielded"),
        ("failed", False, "failed"),
    ],
)
def test_a_restarted_keeper_goes_on_where_it_was(mark: Mark, running: bool, expected: str) -> None:
    record = TermRecord(term=3, leader="a", mark=mark, boot_id="boot-1")
    assert Driver("a", record, running=running).state == expected


@pytest.mark.parametrize("mark", ["leads", "taking_over", "launching", "failed"])
def test_after_a_boot_a_leader_runs_nothing_until_it_has_heard_its_successor(mark: Mark) -> None:
    record = TermRecord(term=3, leader="a", mark=mark, boot_id="another-boot")
    driver = Driver("a", record)
    driver.after(5)
    assert driver.state == "starting"
    assert driver.role.order.role == "idle"
    driver.feed(OperatorStart(request=1, spec=SPEC))
    assert _answer(driver, 1, Refused).error == "NoRightToLeadError"
    driver.hear("following", term=3, node="b")
    driver.after(0.05)
    driver.persisted()
    assert driver.state == "yielded"


def test_an_address_that_is_lost_again_and_again_is_added_each_time() -> None:
    driver = leader()
    for _ in range(3):
        driver.after(1.0)
        driver.effects.clear()
        driver.feed(AddressLost(reason="gone"))
        assert "gone" in driver.role.vip_problem
        driver.after(0.05)
        assert [effect for effect in driver.effects if isinstance(effect, AddVip | Announce)] == [
            AddVip(),
            Announce(),
        ]
        assert driver.role.vip_problem == ""


def gave_back() -> Driver:
    """The heir of a term that it could not use, and gave back to `a`, which has been silent since."""
    driver = Driver("b", TermRecord(term=2, leader="b", mark="yielded", boot_id="boot-1", heir="a"))
    driver.hear("yielded", term=1)
    driver.report(stored=EpochId(1, 9), restorable=True)
    return driver


def test_who_gave_a_term_back_restores_its_epoch_if_the_one_that_kept_the_workload_is_lost() -> None:
    driver = gave_back()
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert "is heard" in _answer(driver, 1, Refused).message
    driver.after(1.0)
    assert driver.state == "yielded", "only an operator takes that right back"
    driver.feed(OperatorFailover(request=2, accept_data_loss=True, old_primary_is_off=""))
    (fence,) = (effect for effect in driver.effects if isinstance(effect, RunFence))
    assert fence.node == "a"
    driver.feed(FenceResult(node="a", attempt=fence.attempt, outcome="confirmed", reason="off"))
    driver.persisted()
    assert (driver.state, driver.role.record.leader) == ("taking_over", "b")
    assert driver.role.record.term >= 100, "a's next term may have begun, unheard"


def test_who_gave_a_term_back_leads_nothing_without_a_fence_that_confirms() -> None:
    driver = gave_back()
    driver.after(1.0)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    (fence,) = (effect for effect in driver.effects if isinstance(effect, RunFence))
    driver.feed(FenceResult(node="a", attempt=fence.attempt, outcome="unknown", reason="no answer"))
    assert (driver.state, driver.role.wanted) == ("yielded", None)
    assert _answer(driver, 1, Refused)


def test_a_start_after_a_boot_does_not_take_the_number_that_a_successor_may_take() -> None:
    driver = Driver("a", TermRecord(term=3, leader="a", mark="stopped", boot_id="another-boot"))
    driver.hear("following", term=3, node="b")
    driver.after(0.05)
    driver.feed(OperatorStart(request=1, spec=SPEC))
    driver.persisted()
    assert (driver.state, driver.role.record.term) == ("launching", 100)


@pytest.mark.parametrize("booted", [False, True])
def test_an_heir_that_cannot_use_its_right_begins_a_term_of_failure_under_the_boot_in_which_it_heard(
    booted: bool,
) -> None:
    """After another boot, others may have been told that this node was off, and lead a newer term."""
    boot = "another-boot" if booted else "boot-1"
    driver = Driver("b", TermRecord(term=1, leader="a", mark="yielded", boot_id=boot, heir="b"))
    driver.after(29.0)  # its agent is silent, and so is a
    assert not any(isinstance(effect, PersistTerm) for effect in driver.effects)
    driver.after(2.0)
    begun = [effect.record.term for effect in driver.effects if isinstance(effect, PersistTerm)]
    assert begun == ([] if booted else [2])


@pytest.mark.parametrize("kept", [True, False])
def test_an_heir_waits_if_the_one_that_gave_its_term_away_has_nothing_of_the_workload(kept: bool) -> None:
    """So it is after a fence by SSH: nobody can take a failure back, and any epoch may be restored."""
    driver = Driver("b", TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-1", heir="b"))
    driver.feed(
        Heard(node="a", origin="keeper", boot_id="boot-a", term=1, claim="yielded", heir="b", alive=kept)
    )
    driver.after(31.0)  # its agent is silent
    assert (driver.role.wanted is not None) is kept
    if kept:
        assert (driver.role.newest.mark, driver.role.newest.handed_by) == ("failed", "a")
        return
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.after(0.05)
    driver.persisted()
    assert (driver.state, driver.role.record.handed_by) == ("taking_over", "")
    driver.after(0.05)
    driver.feed(StepDone(step="hold"))
    driver.feed(StepDone(step="add_vip"))
    assert (driver.role.order.action, driver.role.order.newest_only) == ("restore", False)


def test_a_returning_leader_follows_the_newer_term() -> None:
    record = TermRecord(term=3, leader="a", mark="leads", boot_id="another-boot")
    driver = Driver("a", record)
    driver.hear("leading", term=4, node="b")
    driver.persisted()
    assert (driver.state, driver.role.order.role, driver.role.order.term) == ("following", "follow", 4)


def test_what_runs_where_another_node_leads_is_killed_at_the_keepers_start() -> None:
    driver = Driver("b", TermRecord(term=3, leader="a", mark="leads"), running=True)
    assert driver.state == "deposed"
    assert KillWorkload() in driver.effects


def test_the_first_start_is_for_the_first_node_alone() -> None:
    first, second = Driver("a"), Driver("b")
    for driver, peer in ((first, "b"), (second, "a")):
        driver.after(2.1)
        driver.hear("stopped", term=0, node=peer)
        driver.feed(OperatorStart(request=1, spec=SPEC))
    assert _answer(second, 1, Refused).error == "NoRightToLeadError"
    first.persisted()
    assert (first.state, first.role.record.term) == ("launching", 1)


def test_a_node_without_a_term_starts_nothing_that_an_unheard_peer_may_lead() -> None:
    driver = Driver("a")
    driver.after(2.1)
    driver.feed(OperatorStart(request=1, spec=SPEC))
    assert "--off b" in _answer(driver, 1, Refused).hint
    driver.feed(OperatorStart(request=2, spec=SPEC, peers_are_off=("b",)))
    driver.persisted()
    assert (driver.state, driver.role.record.term) == ("launching", 100)


def test_a_leader_that_forgot_its_term_is_not_followed_in_silence() -> None:
    driver = follower()
    driver.feed(Heard(node="a", origin="keeper", boot_id="boot-2", wall_s=0.0, term=1, claim="following"))
    driver.after(0.05)
    assert driver.state == "waiting"
    assert "does not know that it leads term 1" in driver.role.reason
    assert driver.role.reason.endswith("outlive failover w --accept-data-loss")
    assert not any(isinstance(effect, RunFence) for effect in driver.effects)
    driver.hear("leading")
    assert driver.state == "following"


def test_a_start_on_a_replica_is_refused_whatever_its_leader_says() -> None:
    driver = follower()
    for claim in ("leading", "stopped"):
        driver.hear(claim)  # type: ignore[arg-type]
        if driver.role.wanted is not None:
            driver.persisted()
        driver.feed(OperatorStart(request=1, spec=SPEC))
        assert _answer(driver, 1, Refused).error == "NoRightToLeadError"
        driver.effects.clear()


@pytest.mark.parametrize("claim", ["acquiring", "leading"])
def test_a_start_waits_for_a_node_that_is_heard_to_go_for_the_lead_in_an_older_term(claim: Claim) -> None:
    """It need not hear this node, and goes on by an operator's word that was true when it was given."""
    driver = Driver("a", TermRecord(term=100, leader="a", mark="stopped", boot_id="another-boot"))
    driver.feed(Heard(node="b", origin="keeper", boot_id="boot-b", term=1, claim=claim))
    driver.feed(OperatorStart(request=1, spec=SPEC))
    assert "b leads it or is about to, in term 1" in _answer(driver, 1, Refused).message
    driver.hear("following", term=1, node="b")
    driver.feed(OperatorStart(request=2, spec=SPEC))
    assert driver.role.newest.mark == "launching"


def test_a_start_waits_for_the_word_of_those_who_may_lead_the_term_of_which_only_the_number_is_known() -> (
    None
):
    """b has just begun to lead term 2, and what this node heard of it last is from before that."""
    spec = replace(SPEC, nodes=("a", "b", "c"))
    driver = Driver("a", TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-a"), spec=spec)
    driver.after(2.1)
    driver.hear("following", node="b", term=1)
    driver.hear("following", node="c", term=2)
    driver.persisted()
    driver.feed(StepDone(step="kill"))
    driver.feed(StepDone(step="drop_vip"))
    assert (driver.role.record.term, driver.role.record.leader) == (2, "")
    driver.feed(OperatorStart(request=1, spec=spec))
    assert _answer(driver, 1, Refused).message == "b does not say yet who leads term 2"
    driver.hear("following", node="b", term=2)
    driver.hear("following", node="c", term=2)
    driver.feed(OperatorStart(request=2, spec=spec))
    assert driver.role.newest.mark == "launching" or driver.role.wanted is not None


def test_a_fresh_start_waits_for_a_node_that_does_not_know_whether_it_leads() -> None:
    driver = Driver("a", fenceable=frozenset())
    driver.feed(Heard(node="b", origin="keeper", boot_id="x", term=0, claim="starting", alive=True))
    driver.feed(OperatorStart(request=1, spec=SPEC))
    refusal = _answer(driver, 1, Refused)
    assert isinstance(refusal, Refused)
    assert "b does not know" in refusal.message


def test_a_step_that_fails_does_not_stop_a_takeover_but_a_failed_restore_does() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=1, outcome="confirmed", reason="off"))
    driver.persisted()
    driver.feed(StepFailed(step="hold", reason="no nft"))
    driver.feed(StepDone(step="add_vip"))
    assert driver.role.step == "order"
    number = driver.role.order.number
    driver.report(order_failed=number, order_detail="criu says no")
    assert driver.state == "failed"
    assert "criu says no" in driver.role.reason
    assert {KillWorkload(), DropVip(), LiftHold()} <= {
        e for e in driver.effects if isinstance(e, KillWorkload | DropVip | LiftHold)
    }


@pytest.mark.parametrize("state", ["taking_over", "launching"])
def test_an_order_that_is_never_answered_ends_in_failed(state: Mark) -> None:
    driver = Driver("b", TermRecord(term=2, leader="b", mark=state, boot_id="boot-1"))
    driver.feed(StepDone(step="hold"))
    driver.feed(StepDone(step="add_vip"))
    number = driver.role.order.number
    driver.after(Timing().order_s - 1)
    assert (driver.state, driver.role.step) == (state, "order")
    driver.effects.clear()
    driver.after(2)
    assert driver.state == "failed"
    assert "systemctl status outlive-agent" in driver.role.reason
    assert (driver.role.timeline[-1].event, driver.role.timeline[-1].reason) == (
        "failed",
        "the agent has not carried out its order within 660 s",
    )
    for effect in (DropVip(), KillWorkload(), LiftHold()):
        assert effect in driver.effects
    assert driver.role.order.role == "idle"
    driver.feed(StepDone(step="kill"))
    driver.effects.clear()
    driver.report(running=True, order_done=number)
    driver.after(0.1)
    assert KillWorkload() in driver.effects, "what a late agent brings up must not run"


def test_a_workload_that_runs_is_not_ended_because_its_agent_does_not_answer() -> None:
    record = TermRecord(term=2, leader="b", mark="taking_over", boot_id="boot-1")
    driver = Driver("b", record, running=True)
    driver.feed(StepDone(step="hold"))
    driver.feed(StepDone(step="add_vip"))
    driver.after(Timing().order_s + 2)
    assert driver.state == "taking_over"
    assert KillWorkload() not in driver.effects


def test_a_workload_that_is_not_healthy_in_time_serves_and_is_called_unhealthy() -> None:
    driver = Driver("a", TermRecord(term=1, leader="a", mark="launching", boot_id="boot-1"))
    driver.feed(StepDone(step="hold"))
    driver.feed(StepDone(step="add_vip"))
    driver.report(running=True, order_done=driver.role.order.number)
    assert LiftHold() in driver.feed(StepFailed(step="health", reason="refused"))
    driver.feed(StepDone(step="lift"))
    driver.feed(StepDone(step="announce"))
    assert driver.state == "leading"
    assert workload_status(driver.role, driver.instant()).reason.startswith("not healthy: refused")


def test_time_in_which_this_keeper_stood_still_is_no_silence() -> None:
    driver = follower()
    driver.now_s += 30
    driver.feed(Tick())
    assert driver.state == "following"


def test_what_could_not_be_ended_is_ended_later_though_a_stop_is_asked_for_meanwhile() -> None:
    record = TermRecord(term=1, leader="a", mark="failed", boot_id="boot-1")
    driver = Driver("a", record, running=True)
    assert driver.role.undo >= {"kill", "drop_vip"}
    driver.feed(StepFailed(step="kill", reason="it hangs"))
    driver.feed(OperatorStop(request=1))
    driver.persisted()
    assert driver.state == "stopped"
    assert any(isinstance(each, KillWorkload) for each in driver.after(10.0))


def test_a_term_that_cannot_be_recorded_is_not_led_and_tried_again() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=1, outcome="confirmed", reason="off"))
    driver.feed(StepFailed(step="persist", reason="the disk is full"))
    assert driver.state == "acquiring"
    assert any(isinstance(effect, PersistTerm) for effect in driver.after(1.1))


def _answer(driver: Driver, request: int, kind: type) -> object:
    answers = [e.answer for e in driver.effects if isinstance(e, Answer) and e.request == request]
    assert len(answers) == 1
    assert isinstance(answers[0], kind), answers[0]
    return answers[0]


PAUSES = st.lists(
    st.builds(
        Pause,
        node=st.sampled_from(["a", "b", "c"]),
        number=st.integers(1, 3),
        by=st.just("root"),
        since_wall_s=st.just(1e9),
        lifted_by=st.sampled_from(["", "root on a"]),
    ),
    max_size=2,
    unique_by=lambda pause: pause.node,
).map(tuple)
CLAIMS = st.sampled_from(["starting", "leading", "stopped", "yielded", "following", "acquiring"])
EVENTS = st.one_of(
    st.builds(Tick),
    st.builds(
        Heard,
        node=st.sampled_from(["a", "c"]),
        origin=st.sampled_from(["keeper", "agent"]),
        boot_id=st.sampled_from(["x", "y"]),
        term=st.integers(0, 4),
        claim=st.none() | CLAIMS,
        pauses=PAUSES,
    ),
    st.builds(WorkloadEnded, st.none() | st.integers(0, 137)),
    st.builds(
        StepDone, step=st.sampled_from(["hold", "add_vip", "health", "lift", "announce", "kill", "drop_vip"])
    ),
    st.builds(
        StepFailed,
        step=st.sampled_from(
            ["hold", "add_vip", "health", "lift", "announce", "kill", "drop_vip", "persist"]
        ),
        reason=st.just("no"),
    ),
    st.builds(
        FenceResult,
        node=st.just("a"),
        attempt=st.integers(0, 3),
        outcome=st.sampled_from(["confirmed", "refused", "unknown"]),
        reason=st.just("so"),
    ),
    st.builds(
        OperatorFailover,
        request=st.integers(1, 3),
        accept_data_loss=st.booleans(),
        old_primary_is_off=st.sampled_from(["", "a", "c"]),
    ),
    st.builds(
        OperatorStart,
        request=st.integers(4, 6),
        spec=st.just(SPEC),
        peers_are_off=st.sampled_from([(), ("a",)]),
    ),
    st.builds(OperatorStop, request=st.integers(7, 9)),
    st.builds(OperatorPause, request=st.integers(10, 12), by=st.just("root")),
    st.builds(OperatorResume, request=st.integers(13, 15), by=st.just("root")),
    st.sampled_from(["persisted", "pauses persisted", "time", "report"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=60), st.sampled_from(["restart", "failover", "stop"]))
def test_no_sequence_of_events_lowers_a_term_or_acts_before_it_is_recorded(
    events: list[Event | str], on_exit: str
) -> None:
    spec = replace(SPEC, nodes=("a", "b", "c"), on_exit=on_exit)
    driver = Driver("b", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1"), spec=spec)
    term = driver.role.newest.term
    for event in events:
        before = driver.role
        paused = in_force(before.pauses) or in_force(before.pauses_wanted or ())
        if event == "persisted":
            effects = driver.persisted() if driver.role.wanted is not None else []
        elif event == "pauses persisted":
            effects = driver.pauses_persisted() if driver.role.pauses_wanted is not None else []
        elif event == "time":
            effects = driver.after(0.6)
        elif event == "report":
            effects = driver.report(
                stored=EpochId(1, 1),
                restorable=True,
                order_done=driver.role.order.number,
                running=driver.role.alive,
            )
        else:
            assert not isinstance(event, str)
            effects = driver.feed(event)
        role = driver.role
        if paused and role.name == "acquiring" and before.name != "acquiring":
            assert isinstance(event, OperatorFailover | OperatorStart)
        if paused and role.wanted != before.wanted and role.newest.mark == "taking_over":
            assert role.by_operator or before.wanted == role.wanted
        assert role.newest.term >= term
        term = role.newest.term
        if role.name in LEADING:
            assert role.record.leader == role.me
        if any(isinstance(effect, AddVip | HoldVip) for effect in effects) or role.order.role == "lead":
            assert role.record.leader == role.me
        assert role.reason


def test_every_state_is_entered_and_left_by_the_table_and_explained() -> None:
    states = set(MEANING)
    assert {source for source, _ in edges()} == states
    assert {target for _, target in edges()} | {"starting"} == states
    assert all(set(row.sources) <= states for row in TABLE)


def test_the_page_on_roles_shows_the_table_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/roles.md").read_text()
    generated = dict(re.findall(r"<!-- generated: (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    assert generated == {"states": table(), "diagram": mermaid()}, "run: python -m common.role_diagram"


def test_stopping_after_another_boot_gives_no_right_to_start_unheard() -> None:
    record = TermRecord(term=2, leader="a", mark="leads", boot_id="another-boot")
    driver = Driver("a", record)
    driver.feed(OperatorStop(request=1))
    driver.persisted()
    assert driver.state == "stopped"
    for done in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    driver.after(10.0)  # b, which may have fenced this node and lead term 3, is not heard
    driver.feed(OperatorStart(request=2, spec=SPEC))
    assert driver.state == "stopped"
    assert "b was not heard and may lead it by now" in _answer(driver, 2, Refused).message


def test_what_is_told_from_beside_the_machine_is_in_the_story_and_changes_nothing() -> None:
    driver = Driver("a", TermRecord(term=3, leader="a", mark="leads", boot_id="boot-1"), running=True)
    before = driver.role
    effects = driver.feed(Told(event="planned switchover", reason="cancelled by eve"))
    assert replace(driver.role, timeline=before.timeline) == before
    (saved,) = effects
    assert isinstance(saved, SaveHistory)
    assert saved.history.timeline[-1].reason == "cancelled by eve"


def test_a_term_that_another_node_leads_is_told_in_the_history_too() -> None:
    driver = follower()
    stories = [each.history for each in driver.hear("leading", term=7) if isinstance(each, SaveHistory)]
    assert [(each.term, each.leader, each.timeline) for each in stories] == [(7, "a", ())]


@pytest.mark.parametrize("outcome", ["confirmed", "refused"])
def test_what_is_kept_is_not_ended_while_a_fence_may_end_the_other_copy(outcome: str) -> None:
    record = TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-1", heir="b")
    driver = Driver("a", record, running=True, frozen=True)
    for _ in range(101):  # no earlier keeper's fence counts any more
        driver.hear("acquiring", node="b")
        driver.after(0.1)
    (fence,) = (effect for effect in driver.after(0.5) if isinstance(effect, RunFence))
    driver.hear("leading", term=2, node="b")
    assert (driver.state, KillWorkload() in driver.effects) == ("acquiring", False)
    driver.feed(FenceResult(node="b", attempt=fence.attempt, outcome=outcome, reason="so"))  # type: ignore[arg-type]
    if outcome == "confirmed":
        driver.persisted()
        assert (driver.state, driver.role.record.leader) == ("taking_over", "a")
        return
    driver.hear("leading", term=2, node="b")
    assert driver.state == "handed_over", "the fence may come late"
    for _ in range(11):
        driver.after(0.1)
        driver.hear("leading", term=2, node="b")
    assert (driver.state, KillWorkload() in driver.effects) == ("deposed", True)


@pytest.mark.parametrize("followed", [True, False])
def test_a_term_in_which_it_served_is_not_given_back_while_a_third_node_may_have_its_epochs(
    followed: bool,
) -> None:
    spec = replace(SPEC, nodes=("a", "b", "c"))
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="another-boot", handed_by="a")
    driver = Driver("b", record, spec=spec)
    for done in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    driver.hear("yielded", term=1)
    driver.feed(Heard(node="c", origin="keeper", boot_id="c", term=2 if followed else 1, claim="following"))
    driver.report(order_done=driver.role.order.number)
    driver.after(0.05)
    driver.report(order_done=driver.role.order.number)
    driver.after(0.05)
    assert (driver.role.newest.mark, driver.role.newest.heir) == (
        ("leads", "") if followed else ("yielded", "a")
    )
    if followed:
        driver.after(0.2)
        driver.hear("yielded", term=1)
        driver.after(0.05)
        assert "a keeps it, frozen, as it was in term 1" in driver.role.reason


def test_any_epoch_may_be_restored_once_an_operator_says_that_who_kept_the_newest_is_off() -> None:
    record = TermRecord(term=2, leader="b", mark="failed", boot_id="boot-1", handed_by="a")
    driver = Driver("b", record)
    driver.after(3.0)
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="a"))
    assert (driver.role.newest.mark, driver.role.newest.handed_by) == ("taking_over", "")


def kept_and_fencing(nodes: tuple[str, ...] = ("a", "b")) -> tuple[Driver, RunFence]:
    """A node that handed the workload over to `b`, keeps it, and has asked for the fence of `b`."""
    record = TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-1", heir="b")
    driver = Driver("a", record, spec=replace(SPEC, nodes=nodes), running=True, frozen=True)
    driver.hear("acquiring", node="b")
    (fence,) = (effect for effect in driver.after(0.5) if isinstance(effect, RunFence))
    return driver, fence


@pytest.mark.parametrize(("node", "claim"), [("c", "leading"), ("b", "stopped")])
def test_what_a_fence_cannot_end_ends_what_is_kept(node: str, claim: Claim) -> None:
    driver, _ = kept_and_fencing(("a", "b", "c"))
    driver.hear(claim, term=120, node=node)
    assert (driver.state, KillWorkload() in driver.effects) == ("deposed", True)


def test_a_fence_that_was_asked_for_counts_until_its_time_is_over_whatever_is_heard() -> None:
    driver, _ = kept_and_fencing()
    driver.hear("taking_over", term=2, node="b")
    assert driver.state == "handed_over", "the attempt is given up, and the fence program runs on"
    for _ in range(90):
        driver.after(0.1)
        driver.hear("leading", term=2, node="b")
        assert driver.state == "handed_over"
    for _ in range(12):
        driver.after(0.1)
        driver.hear("leading", term=2, node="b")
    assert driver.state == "deposed"


def test_an_heir_gives_back_though_its_keeper_stands_still_now_and_then() -> None:
    driver = Driver("b", TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-1", heir="b"))
    for _ in range(4):
        driver.after(9.0)
        driver.now_s += 0.3
    assert driver.role.newest.mark == "failed"


def test_what_was_thawed_while_its_address_was_dropped_is_not_handed_over() -> None:
    driver = leader()
    driver.hear("following", node="b")
    driver.report(replicas=(ready_replica(),))
    driver.feed(OperatorSwitchover(request=1, to="b"))
    assert driver.state == "handing_over"
    done = driver.role.order.number
    driver.report(order_done=done, handed_over=EpochId(1, 9), replicas=(ready_replica(),))
    assert DropVip() in driver.effects
    report = WorkloadReport(name="w", spec=SPEC, running=True, replicas=(ready_replica(),), order_done=done)
    assert has_to_stand_still(driver.role, report), "the agent does not say so any more"
    driver.feed(AgentReport(as_thawed(driver.role, report)))
    assert (driver.state, driver.role.wanted) == ("leading", None)
    driver.feed(StepDone(step="drop_vip"))
    driver.after(0.1)
    assert (driver.state, driver.role.newest.mark) == ("leading", "leads")


@pytest.mark.parametrize("running", [True, False])
def test_a_stop_is_not_overwritten_by_what_happens_before_it_is_on_disk(running: bool) -> None:
    record = TermRecord(term=1, leader="a", mark="launching", boot_id="boot-1")
    driver = Driver("a", record, spec=replace(SPEC, vip=None, health=None))
    assert (driver.state, driver.role.step) == ("launching", "order")
    driver.feed(OperatorStop(request=1))
    number = driver.role.order.number
    if running:
        driver.role = replace(driver.role, alive=True)
        driver.report(running=True, order_done=number)
    else:
        driver.report(running=False, order_failed=number, order_detail="it did not start")
    driver.after(0.1)
    assert (driver.state, driver.role.newest.mark) == ("launching", "stopped")
    driver.persisted()
    assert driver.state == "stopped"
    assert isinstance(_answer(driver, 1, Done), Done)


@pytest.mark.parametrize("running", [True, False])
def test_a_keeper_that_restarts_on_the_way_to_serve_does_not_have_its_agent_end_what_it_takes_back(
    running: bool,
) -> None:
    """A frozen workload that was taken back is the last copy there is."""
    record = TermRecord(term=100, leader="a", mark="taking_over", boot_id="boot-1")
    driver = Driver("a", record, running=running, frozen=running)
    assert (driver.state, driver.role.step) == ("taking_over", "hold")
    assert (driver.role.order.role, driver.role.order.action) == ("lead", "none")


def test_what_is_on_its_way_is_committed_until_the_restore_begins() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(FenceResult(node="a", attempt=1, outcome="confirmed", reason="off"))
    driver.persisted()
    assert (driver.role.step, driver.role.order.role) == ("hold", "follow")


@pytest.mark.parametrize("fenceable", [True, False])
def test_a_restarted_keeper_counts_with_a_fence_that_the_one_before_it_asked_for(fenceable: bool) -> None:
    """Its program runs on, and may end what is heard to run elsewhere: then this is the last copy."""
    record = TermRecord(term=1, leader="a", mark="yielded", boot_id="boot-1", heir="b")
    fences = frozenset("ab") if fenceable else frozenset()
    driver = Driver("a", record, running=True, frozen=True, fenceable=fences)
    driver.hear("leading", term=2, node="b")
    assert driver.state == ("handed_over" if fenceable else "deposed")
    for _ in range(101):
        driver.after(0.1)
        driver.hear("leading", term=2, node="b")
    assert (driver.state, KillWorkload() in driver.effects) == ("deposed", True)


FAILS_OVER = replace(SPEC, on_exit="failover")


@pytest.mark.parametrize(("late_s", "mark"), [(0.3, "yielded"), (5.0, "launching")])
def test_an_agent_that_reports_of_no_replica_any_more_does_not_cost_the_workload_its_memory(
    late_s: float, mark: str
) -> None:
    """The keeper hears of the exit a moment after the agent has stopped capturing."""
    driver = leader(spec=FAILS_OVER)
    driver.report(replicas=(ready_replica(),))
    driver.report(replicas=())
    driver.now_s += late_s
    driver.feed(Tick())
    driver.hear("stopped", term=0, node="b")
    driver.feed(WorkloadEnded(137))
    driver.after(0.05)
    for done in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    driver.after(1.1)
    assert driver.role.newest.mark == mark


@pytest.mark.parametrize("able", [True, False])
def test_what_ended_while_its_keeper_was_away_goes_on_where_its_memory_is(able: bool) -> None:
    record = TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1")
    driver = Driver("a", record, spec=FAILS_OVER)
    driver.report(running=False, exit_code=1)
    driver.after(0.5)
    assert driver.role.newest.mark == "leads", "the successor was not heard yet"
    missing = () if able else ("nothing is stored here",)
    says = (Takeover(silence="host loss", missing=missing),)
    driver.feed(Heard(node="b", origin="keeper", boot_id="b", term=1, claim="following", takeovers=says))
    driver.feed(Tick())
    assert driver.state == ("yielding" if able else "launching")


def test_what_ended_while_its_keeper_was_away_is_started_afresh_if_nobody_speaks() -> None:
    driver = Driver("a", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1"), spec=FAILS_OVER)
    driver.after(1.9)
    assert driver.role.newest.mark == "leads"
    driver.after(0.2)
    assert driver.state == "launching"
