"""The role machine where etcd gives the right to lead: it asks where it would ask a fence."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from common.control import Done, Refused
from common.lease import need_of
from common.model import EpochId
from common.role_events import (
    Answer,
    ClaimTerm,
    DropVip,
    Effect,
    FenceResult,
    Heard,
    KillWorkload,
    LeaseInDoubt,
    LeaseStands,
    LiftHold,
    OperatorFailover,
    OperatorStart,
    OperatorSwitchover,
    PersistTerm,
    RunFence,
    StepDone,
    StepFailed,
    TermPersisted,
    Tick,
    WorkloadEnded,
)
from common.role_explain import ETCD, explain
from common.role_view import workload_status
from common.roles import Claim, TermRecord
from tests.unit.test_roles import SPEC, Driver, follower, leader, ready_replica

LEASED = replace(SPEC, right_to_lead="etcd")
NO_FENCE: frozenset[str] = frozenset()


def claims(effects: list[Effect]) -> list[ClaimTerm]:
    return [effect for effect in effects if isinstance(effect, ClaimTerm)]


def answers(effects: list[Effect]) -> list[Done | Refused]:
    return [effect.answer for effect in effects if isinstance(effect, Answer)]


def result(attempt: int, outcome: str = "confirmed", term: int = 2) -> FenceResult:
    term = term if outcome == "confirmed" else 0
    return FenceResult(node="etcd", attempt=attempt, outcome=outcome, reason="so", term=term)  # type: ignore[arg-type]


def standby() -> Driver:
    return follower(spec=LEASED, fenceable=NO_FENCE)


def primary() -> Driver:
    return leader(spec=LEASED, fenceable=NO_FENCE)


def test_silence_leads_to_a_claim_and_no_fence_and_to_the_term_that_etcd_gave() -> None:
    driver = standby()
    asked = driver.after(0.4)
    assert claims(asked) == [ClaimTerm(attempt=1, term=2, known=1, unused=(), over=False, blank=False)]
    assert not any(isinstance(effect, RunFence) for effect in asked)
    driver.feed(result(1, term=7))
    assert driver.role.wanted is not None
    assert (driver.role.wanted.term, driver.role.wanted.leader) == (7, "b")
    driver.persisted()
    assert driver.state == "taking_over"


@pytest.mark.parametrize("outcome", ["refused", "unknown"])
def test_a_claim_that_is_not_granted_means_waiting_and_asking_again_soon(outcome: str) -> None:
    driver = standby()
    driver.after(0.4)
    driver.feed(result(1, outcome))
    assert driver.state == "waiting"
    assert outcome in driver.role.reason
    driver.report(stored=driver.role.report.stored, restorable=True)  # type: ignore[union-attr]
    assert len(claims(driver.after(0.6))) == 1


def test_an_operators_word_does_not_pass_over_a_lease() -> None:
    driver = standby()
    driver.after(0.4)
    driver.feed(result(1, "refused"))
    request = OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="a")
    (claim,) = claims(driver.feed(request))
    assert claim.over
    effects = driver.feed(result(claim.attempt, "refused"))
    assert driver.state == "waiting"
    (answer,) = answers(effects)
    assert isinstance(answer, Refused)
    assert driver.role.wanted is None


def test_a_leader_that_says_that_it_is_frozen_is_no_better_than_a_silent_one() -> None:
    driver = standby()
    beat = Heard(node="a", origin="keeper", boot_id="boot-a", term=1, claim="leading", alive=True)
    for _ in range(10):
        driver.after(0.05)
        driver.feed(replace(beat, in_doubt=True))
    assert driver.state == "acquiring"
    driver.feed(result(1, "refused"))
    driver.feed(beat)
    assert driver.state == "following"


@pytest.mark.parametrize("mark", ["stopped", "failed"])
def test_a_start_that_etcd_refuses_leaves_everything_as_it_was(mark: str) -> None:
    record = TermRecord(term=3, leader="a", mark=mark, boot_id="boot-1")  # type: ignore[arg-type]
    driver = Driver("a", record, spec=LEASED)
    driver.feed(StepDone(step="kill"))
    driver.hear("following", term=3, node="b")
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=LEASED)))
    assert driver.state == "acquiring"
    (answer,) = answers(driver.feed(result(claim.attempt, "refused")))
    assert isinstance(answer, Refused)
    assert driver.state == mark
    assert driver.role.record == record


def test_a_start_takes_the_term_that_etcd_gives_and_needs_no_word_about_the_others() -> None:
    driver = Driver("a", spec=LEASED)
    driver.after(3.0)
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=LEASED)))
    assert (claim.term, claim.over, claim.blank) == (1, True, False), "b was not heard"
    driver.feed(result(claim.attempt, term=4))
    driver.persisted()
    assert (driver.state, driver.role.record.term, driver.role.record.mark) == ("launching", 4, "launching")


FULL = StepFailed(step="persist", reason="the disk is full")


def test_a_term_that_cannot_be_recorded_is_let_go_and_never_begun() -> None:
    driver = standby()
    driver.after(0.4)
    driver.feed(result(1, term=2))
    assert need_of(driver.role).held
    late = driver.role.wanted
    assert late is not None
    driver.feed(FULL)
    assert (driver.state, driver.role.wanted, driver.role.record.term) == ("waiting", None, 1)
    assert "the disk is full" in driver.role.reason
    assert not need_of(driver.role).held, "another node may lead the next one"
    driver.feed(TermPersisted(late))
    effects = driver.feed(Tick())
    assert driver.role.record.term == 1
    assert not any(isinstance(effect, PersistTerm) for effect in effects)
    driver.report(stored=driver.role.report.stored, restorable=True)  # type: ignore[union-attr]
    assert len(claims(driver.after(0.6))) == 1, "it is asked for again"


def test_who_keeps_a_workload_frozen_takes_it_back_after_a_term_that_could_not_be_recorded() -> None:
    record = TermRecord(term=1, leader="b", mark="yielded", boot_id="boot-1", heir="a")
    driver = Driver("b", record, spec=LEASED, running=True, frozen=True)
    assert driver.state == "handed_over"
    (claim,) = claims(driver.after(5.0))
    driver.feed(result(claim.attempt, term=2))
    driver.feed(FULL)
    assert (driver.state, driver.role.alive) == ("handed_over", True)
    given_back = Heard(
        node="a", origin="keeper", boot_id="boot-a", term=3, claim="yielded", alive=False, heir="b"
    )
    driver.feed(given_back)
    effects = driver.persisted()
    assert not any(isinstance(effect, KillWorkload) for effect in (*driver.effects, *effects))
    assert driver.role.alive


def test_a_start_whose_term_cannot_be_recorded_leaves_everything_as_it_was() -> None:
    record = TermRecord(term=3, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("a", record, spec=LEASED)
    driver.feed(StepDone(step="kill"))
    driver.hear("following", term=3, node="b")
    other = replace(LEASED, command=("other",))
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=other)))
    driver.feed(result(claim.attempt, term=4))
    (answer,) = answers(driver.feed(FULL))
    assert isinstance(answer, Refused)
    assert (answer.error, "the disk is full" in answer.message) == ("StoreError", True)
    assert (driver.state, driver.role.record, driver.role.spec) == ("stopped", record, LEASED)
    assert not driver.after(5.0), "it is not tried again behind the operator's back"


def test_a_start_that_has_begun_is_forgotten_so_that_no_later_term_is_taken_for_one() -> None:
    driver = Driver("a", spec=LEASED)
    driver.after(3.0)
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=LEASED)))
    driver.feed(result(claim.attempt, term=4))
    assert driver.role.starts_from == "stopped", "it goes back there if that cannot be recorded"
    driver.persisted()
    assert driver.role.starts_from is None, "the next term would be started afresh, without its memory"


def test_where_etcd_may_have_forgotten_who_led_a_start_needs_the_others_heard_or_vouched_for() -> None:
    driver = Driver("a", spec=LEASED)
    driver.after(3.0)
    asked = OperatorStart(request=1, spec=LEASED, peers_are_off=("b",))
    (claim,) = claims(driver.feed(asked))
    assert claim.blank
    driver = Driver("a", spec=LEASED)
    driver.hear("following", node="b", term=0)
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=LEASED)))
    assert claim.blank


def test_a_lease_in_doubt_takes_the_address_away_until_it_stands_again() -> None:
    driver = primary()
    assert DropVip() in driver.feed(LeaseInDoubt("etcd does not answer"))
    driver.feed(StepDone(step="drop_vip"))
    driver.after(1.0)
    assert driver.state == "leading"
    status = workload_status(driver.role, driver.instant())
    assert status.reason.startswith("frozen, nothing of it runs: etcd does not answer")
    driver.feed(LeaseStands())
    assert LiftHold() in driver.after(0.1), "the address is brought back at once"
    assert not driver.role.in_doubt


def test_what_is_frozen_is_not_switched_over() -> None:
    driver = primary()
    driver.report(running=True, replicas=(ready_replica(),))
    driver.hear("following", node="b")
    driver.feed(LeaseInDoubt("etcd does not answer"))
    (answer,) = answers(driver.feed(OperatorSwitchover(request=1, to="b")))
    assert isinstance(answer, Refused)
    assert "frozen" in answer.message


@pytest.mark.parametrize("says", ["following", "acquiring", "yielded", "stopped"])
def test_a_claim_of_another_that_came_to_nothing_is_passed_over_and_one_that_may_not_have_is_not(
    says: Claim,
) -> None:
    driver = primary()
    driver.feed(LeaseInDoubt("the lease is lost: b has claimed term 2", "b"))
    assert claims(driver.after(2.0)) == []
    driver.hear(says, node="b", term=1)
    (claim,) = claims(driver.after(0.05))
    assert claim.unused == ("b",)
    driver.feed(result(claim.attempt, "refused"))
    assert driver.state == "leading"
    driver.hear("starting", node="b", term=1)
    assert claims(driver.after(0.05)) == [], "it does not know yet"
    driver.after(1.0)
    found: list[ClaimTerm] = []
    for _ in range(12):
        driver.hear(says, node="b", term=1)
        found += claims(driver.after(0.05))
    (claim,) = found
    driver.feed(result(claim.attempt, term=3))
    driver.persisted()
    assert (driver.state, driver.role.record.term) == ("taking_over", 3)


def test_a_workload_that_ends_while_its_lease_is_in_doubt_is_given_up_though_its_packets_stay_held() -> None:
    """The hold is lifted once this node leads no more, and nobody else can lead before it says so."""
    driver = leader(spec=replace(LEASED, on_exit="failover"), fenceable=NO_FENCE)
    driver.report(running=True, replicas=(ready_replica(),))
    driver.hear("following", node="b")
    driver.feed(LeaseInDoubt("the lease is lost: b has claimed term 2", "b"))
    driver.feed(WorkloadEnded(137))
    driver.after(0.05)
    assert driver.state == "yielding"
    driver.feed(StepFailed(step="lift", reason="not while the lease is in doubt"))
    driver.feed(StepDone(step="kill"))
    driver.after(0.05)
    assert driver.role.wanted is None, "the address may still be here"
    driver.feed(StepDone(step="drop_vip"))
    driver.after(0.05)
    driver.persisted()
    assert driver.state == "yielded"
    driver.feed(LeaseStands())
    assert LiftHold() in driver.after(5.0)


@pytest.mark.parametrize(("claim", "state"), [("taking_over", "handed_over"), ("leading", "deposed")])
def test_what_is_about_to_be_recorded_as_handed_over_is_kept_until_it_runs_in_the_newer_term(
    claim: Claim, state: str
) -> None:
    """The heir had the lease first, and has the last epoch: if it fails, this is the last copy."""
    driver = primary()
    driver.hear("following", node="b")
    driver.report(running=True, replicas=(ready_replica(),))
    driver.feed(OperatorSwitchover(request=1, to="b"))
    done = driver.role.order.number
    driver.report(running=True, order_done=done, handed_over=EpochId(1, 9), replicas=(ready_replica(),))
    driver.feed(StepDone(step="drop_vip"))
    driver.after(0.05)
    assert driver.role.newest.mark == "yielded"
    driver.hear("taking_over", term=2, node="b")
    assert driver.state == "handing_over"
    driver.persisted()
    driver.hear(claim, term=2, node="b")
    assert driver.state == state


def test_an_operator_may_have_a_frozen_leader_go_on_in_a_new_term() -> None:
    driver = primary()
    request = OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="")
    (answer,) = answers(driver.feed(request))
    assert isinstance(answer, Refused), "it leads, and runs"
    driver.feed(LeaseInDoubt("the lease is lost: b has claimed term 2", "b"))
    (claim,) = claims(driver.feed(replace(request, request=2)))
    assert claim.over
    effects = driver.feed(result(claim.attempt, term=3))
    assert any(isinstance(effect, PersistTerm) for effect in effects)


def test_what_stands_still_for_the_lack_of_a_lease_is_kept_while_the_next_one_is_asked_for() -> None:
    """It is the last copy: who ends it gets nothing but an older epoch by that lease."""
    driver = primary()
    driver.feed(LeaseInDoubt("the lease is lost: b has claimed term 2", "b"))
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert (driver.state, driver.role.order.role) == ("acquiring", "keep")
    driver.feed(result(1, term=3))
    driver.persisted()
    assert (driver.state, driver.role.order.role) == ("taking_over", "keep")
    while driver.role.step in ("hold", "add_vip"):
        driver.feed(StepDone(step=driver.role.step))
    assert (driver.role.order.role, driver.role.order.action) == ("lead", "restore")


@pytest.mark.parametrize(("leader", "state"), [("a", "stopped"), ("b", "following")])
def test_a_restarted_keeper_leaves_nothing_half_brought_up_behind_a_gate(leader: str, state: str) -> None:
    record = TermRecord(term=2, leader=leader, mark="stopped", boot_id="boot-1")
    driver = Driver("a", record, spec=LEASED, fenceable=NO_FENCE)
    assert (driver.state, KillWorkload() in driver.effects) == (state, True)


def test_explain_knows_whether_etcd_answers() -> None:
    driver = standby()
    assert explain(driver.role, driver.instant(), {}).would_fail_over
    without = explain(driver.role, driver.instant(), {ETCD: frozenset()})
    assert not without.would_fail_over
    assert "does not answer" in without.missing[0]


def test_a_claim_of_its_own_that_came_to_nothing_is_made_again() -> None:
    driver = primary()
    driver.feed(LeaseInDoubt("the lease is lost: a has claimed term 2", "a"))
    (claim,) = claims(driver.after(2.0))
    assert claim.term == 2
    driver.feed(result(claim.attempt, term=3))
    assert driver.role.wanted is not None
    assert driver.role.wanted.term == 3


def test_what_an_operator_starts_by_a_lease_is_not_what_the_agent_had_before() -> None:
    driver = Driver("a", spec=SPEC)
    driver.hear("following", node="b", term=0)
    (claim,) = claims(driver.feed(OperatorStart(request=1, spec=LEASED)))
    driver.report(running=False, spec=SPEC)
    assert driver.role.spec == LEASED
    driver.feed(result(claim.attempt, term=1))
    assert driver.role.wanted is not None


def test_who_keeps_it_frozen_says_why_etcd_does_not_give_the_term_and_an_operator_passes_over_it() -> None:
    """Its heir was stopped and started afresh unheard, and lost that when its host booted anew."""
    record = TermRecord(term=2, leader="b", mark="yielded", boot_id="boot-1", heir="a")
    driver = Driver("b", record, spec=LEASED, running=True, frozen=True, fenceable=NO_FENCE)

    def heir_starts() -> None:
        driver.feed(Heard(node="a", origin="keeper", boot_id="boot-a", term=4, claim="starting"))

    heir_starts()
    asked: list[ClaimTerm] = []
    while not asked:
        driver.now_s += 0.1
        heir_starts()
        asked = claims(driver.after(0.025))
        assert driver.now_s < 200.0
    driver.feed(result(asked[-1].attempt, "refused"))
    driver.after(0.05)
    assert (driver.state, driver.role.alive) == ("handed_over", True)
    assert driver.role.reason == "etcd does not give the lease: refused: so; it is kept here, frozen"
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    (claim,) = claims(driver.effects)[-1:]
    assert claim.over
    heir_starts()
    assert (driver.state, answers(driver.effects)) == ("acquiring", [])
    driver.feed(result(claim.attempt, term=5))
    driver.persisted()
    assert (driver.state, driver.role.record.term) == ("taking_over", 5)
