"""Paused, no node takes over by itself: what the machine does with pauses in every state."""

from __future__ import annotations

from msgspec.structs import replace

from common.control import Done, Refused, ReplicaProgress, WorkloadReport
from common.model import EpochId
from common.pauses import Pause, Pauses
from common.role_events import (
    Answer,
    FenceResult,
    Heard,
    Note,
    OperatorFailover,
    OperatorPause,
    OperatorResume,
    PausesPersisted,
    PersistPauses,
    PersistTerm,
    RunFence,
    SaveHistory,
    StepFailed,
    WorkloadEnded,
)
from common.role_guards import unwanted_meanwhile
from common.role_view import workload_status
from common.roles import Claim, Instant, PeerView, TermRecord
from tests.unit.test_roles import SPEC, Driver, follower, leader, ready_replica

BY_A = Pause(node="a", number=1, by="root", since_wall_s=1e9)
LIFTED = Pause(node="a", number=1, by="root", since_wall_s=1e9, lifted_by="root on a")
OFF = FenceResult(node="a", attempt=1, outcome="confirmed", reason="off")


def heard(pauses: Pauses, claim: Claim = "leading", *, node: str = "a", term: int = 1) -> Heard:
    return Heard(
        node=node, origin="keeper", boot_id="boot-a", term=term, claim=claim, alive=True, pauses=pauses
    )


def paused(driver: Driver) -> Driver:
    """Have the machine know, and have on its disk, that `a` was asked for a pause."""
    driver.feed(heard((BY_A,)))
    driver.pauses_persisted()
    return driver


def answers(driver: Driver) -> list[object]:
    return [effect.answer for effect in driver.effects if isinstance(effect, Answer)]


def asked_for(driver: Driver, kind: type) -> bool:
    return any(isinstance(effect, kind) for effect in driver.effects)


def test_a_paused_successor_waits_and_names_who_paused_since_when() -> None:
    driver = paused(follower())
    driver.after(1.0)
    assert driver.state == "waiting"
    assert "takeover is paused by root on a since 2001-09-09 01:46:40 UTC" in driver.role.reason
    assert "outlive resume w" in driver.role.reason
    assert not asked_for(driver, RunFence)


def test_a_pause_counts_before_it_is_on_disk_and_a_resume_only_afterwards() -> None:
    driver = follower()
    driver.feed(heard((BY_A,)))
    assert driver.role.pauses == ()
    driver.after(1.0)
    assert driver.state == "waiting"
    driver.pauses_persisted()
    driver.feed(OperatorResume(request=1, by="root"))
    driver.after(1.0)
    driver.report(stored=EpochId(1, 9), restorable=True)
    assert (driver.state, answers(driver)) == ("waiting", [])
    driver.pauses_persisted()
    driver.after(0.1)
    assert driver.state == "acquiring"
    assert isinstance(answers(driver)[0], Done)


def test_an_operator_is_answered_once_the_pause_is_on_disk_and_heartbeats_say_no_more_than_that() -> None:
    driver = follower()
    driver.feed(OperatorPause(request=1, by="root"))
    assert (answers(driver), driver.role.pauses) == ([], ())
    driver.pauses_persisted()
    (answer,) = answers(driver)
    assert isinstance(answer, Done)
    assert "no node takes it over by itself" in answer.detail
    assert [(pause.node, pause.by) for pause in driver.role.pauses] == [("b", "root")]


def test_asking_again_changes_nothing_and_is_answered_at_once() -> None:
    driver = follower()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.pauses_persisted()
    effects = driver.feed(OperatorPause(request=2, by="eve"))
    assert [type(effect) for effect in effects] == [Answer]
    assert [pause.by for pause in driver.role.pauses] == ["root"]


def test_two_operators_at_once_are_both_answered_by_what_is_on_disk_last() -> None:
    driver = follower()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.pauses_persisted()
    driver.effects.clear()
    driver.feed(OperatorResume(request=2, by="root"))
    first = driver.role.pauses_wanted
    driver.feed(OperatorPause(request=3, by="root"))
    assert first is not None
    driver.feed(PausesPersisted(first))
    assert answers(driver) == []
    driver.pauses_persisted()
    assert [type(answer) for answer in answers(driver)] == [Done, Done]
    assert [pause.number for pause in workload_status(driver.role, driver.instant()).pauses] == [2]


def test_a_pause_that_is_not_on_disk_yet_is_not_lifted() -> None:
    """Until the resume is on disk, nothing would be left to pause by: neither disk nor memory says so."""
    driver = follower()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.feed(StepFailed(step="pauses", reason="the disk is full"))
    driver.effects.clear()
    driver.feed(OperatorResume(request=2, by="root"))
    (answer,) = answers(driver)
    assert isinstance(answer, Refused)
    assert "still being recorded" in answer.message
    driver.after(1.2)
    assert driver.state == "waiting"


def test_a_leader_that_led_for_longer_than_was_known_is_not_taken_over_from() -> None:
    spec = replace(SPEC, max_takeover_lag_ms=1000)
    view = PeerView(term=1, claim="leading", led_wall_s=1000.5)
    report = WorkloadReport(
        name="w", running=False, spec=spec, stored=EpochId(1, 9), stored_wall_s=1000.0, restorable=True
    )
    role = replace(follower().role, spec=spec, name="acquiring", report=report, peers={"a": view})
    confirmed = FenceResult(node="a", attempt=role.fence_attempt, outcome="confirmed", reason="off")
    now = Instant(100.0, 2000.0)
    assert unwanted_meanwhile(role, confirmed, now) == ""
    later = replace(role, peers={"a": replace(view, led_wall_s=1008.0)})
    assert "8.0 s behind" in unwanted_meanwhile(later, confirmed, now)
    assert unwanted_meanwhile(replace(later, by_operator=True), confirmed, now) == ""


def test_what_cannot_be_recorded_is_refused_still_counts_and_is_tried_again() -> None:
    driver = follower()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.feed(StepFailed(step="pauses", reason="the disk is full"))
    (answer,) = answers(driver)
    assert isinstance(answer, Refused)
    assert (answer.error, "the disk is full" in answer.message) == ("StoreError", True)
    driver.effects.clear()
    driver.after(1.2)
    assert driver.state == "waiting"
    assert asked_for(driver, PersistPauses)


def test_an_operators_failover_works_while_paused() -> None:
    driver = paused(follower())
    driver.after(1.0)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert driver.state == "acquiring"
    driver.feed(OFF)
    driver.persisted()
    assert driver.state == "taking_over"
    assert workload_status(driver.role, driver.instant()).pauses == (BY_A,), "the pause outlasts it"


def test_a_takeover_whose_fence_runs_when_the_pause_arrives_goes_no_further_and_on_after_a_resume() -> None:
    driver = follower()
    driver.after(0.4)
    assert driver.state == "acquiring"
    driver.feed(OperatorPause(request=1, by="root"))
    driver.feed(OFF)
    assert driver.state == "waiting"
    notes = [effect.reason for effect in driver.effects if isinstance(effect, Note)]
    assert any(note.startswith("a is off: off; but takeover is paused by root on b") for note in notes)
    assert "takeover is paused by root on b" in driver.role.reason
    assert not asked_for(driver, PersistTerm)
    driver.pauses_persisted()
    driver.after(0.5)
    assert driver.state == "waiting"
    driver.feed(OperatorResume(request=2, by="root"))
    driver.pauses_persisted()
    driver.after(0.1)
    assert driver.state == "acquiring"


def test_a_term_that_is_on_its_way_to_the_disk_when_the_pause_arrives_is_led() -> None:
    driver = follower()
    driver.after(0.4)
    driver.feed(OFF)
    driver.feed(OperatorPause(request=1, by="root"))
    driver.persisted()
    assert driver.state == "taking_over"


def test_a_workload_that_ends_is_restarted_and_not_handed_over_while_paused() -> None:
    driver = leader(spec=replace(SPEC, on_exit="failover"))
    driver.report(replicas=(ready_replica(),), running=True)
    driver.feed(OperatorPause(request=1, by="root"))
    driver.feed(WorkloadEnded(1))
    driver.after(0.1)
    assert driver.role.newest.mark == "launching"
    assert "restarted here, takeover is paused by root on a" in driver.role.reason


def test_a_term_that_was_given_up_is_not_led_while_paused() -> None:
    driver = paused(follower(spec=replace(SPEC, on_exit="failover")))
    driver.feed(heard((BY_A,), "yielded"))
    driver.persisted()
    driver.after(0.2)
    assert (driver.state, "paused by root" in driver.role.reason) == ("waiting", True)


def test_a_keeper_that_starts_again_finds_itself_paused() -> None:
    record = TermRecord(term=1, leader="a", mark="leads", boot_id="boot-1")
    driver = Driver("b", record, pauses=(BY_A,))
    driver.report(stored=EpochId(1, 9), restorable=True)
    driver.after(3.0)
    assert (driver.state, "paused by root on a" in driver.role.reason) == ("waiting", True)
    assert not asked_for(driver, PersistPauses)


def test_the_pause_and_its_end_stand_in_the_leaders_history() -> None:
    driver = leader()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.pauses_persisted()
    driver.feed(OperatorResume(request=2, by="eve"))
    effects = driver.pauses_persisted()
    (story,) = [effect.history for effect in effects if isinstance(effect, SaveHistory)]
    assert [step.event for step in story.timeline][-2:] == ["paused", "resumed"]
    assert story.timeline[-1].reason == "resumed by eve on a"


def test_status_names_the_nodes_that_were_not_heard_to_know() -> None:
    driver = leader()
    driver.hear("following", node="b")

    def unconfirmed() -> tuple[str, ...]:
        return workload_status(driver.role, driver.instant()).pauses_unconfirmed_by

    assert unconfirmed() == ()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.pauses_persisted()
    assert unconfirmed() == ("b",)
    driver.feed(heard(driver.role.pauses, "following", node="b"))
    assert unconfirmed() == ()
    driver.after(5.0)
    assert unconfirmed() == (), "what b has on its disk it does not lose by falling silent"
    driver.feed(OperatorResume(request=2, by="root"))
    driver.pauses_persisted()
    assert unconfirmed() == ("b",)


def test_entries_of_nodes_that_have_no_part_in_it_are_not_taken_in() -> None:
    driver = follower()
    driver.feed(heard((Pause(node="x", number=1, by="root", since_wall_s=1e9),)))
    assert driver.role.pauses_wanted is None
    stranger = Driver("x", TermRecord())
    stranger.feed(OperatorPause(request=1, by="root"))
    (answer,) = answers(stranger)
    assert isinstance(answer, Refused)


def test_a_replica_that_hears_of_a_resume_goes_on() -> None:
    driver = paused(follower())
    driver.feed(heard((LIFTED,)))
    driver.pauses_persisted()
    driver.after(1.0)
    assert driver.state == "acquiring"


def test_a_dead_agent_of_the_leader_is_still_no_reason_and_replicas_are_still_judged() -> None:
    driver = leader()
    driver.feed(OperatorPause(request=1, by="root"))
    driver.pauses_persisted()
    driver.report(replicas=(ReplicaProgress(node="b", connected=True),), running=True)
    status = workload_status(driver.role, driver.instant())
    assert (status.state, status.restorable) == ("leading", False)


def test_a_pause_holds_where_what_was_kept_frozen_has_ended() -> None:
    driver = paused(follower())
    record = TermRecord(term=1, leader="b", mark="yielded", boot_id="boot-1", heir="a")
    role = replace(driver.role, name="acquiring", record=record, fence_attempt=1, alive=True)
    off = FenceResult(node="a", attempt=1, outcome="confirmed", reason="by SSH")
    assert unwanted_meanwhile(role, off, driver.instant()) == "", "it runs on here: no takeover"
    assert "is paused" in unwanted_meanwhile(replace(role, alive=False), off, driver.instant())
