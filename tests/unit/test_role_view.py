"""How a role looks to a person: what could be restored, and what would be lost."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from common.control import ReplicaProgress, VerificationProgress, WorkloadReport, WorkloadStatus
from common.model import EpochId, WorkloadSpec
from common.role_events import AgentReport, Heard, KeeperStarted, Tick
from common.role_table import step
from common.role_view import workload_status
from common.roles import Instant, Mark, Role, TermRecord, Timing, new_role

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",))
NOW = Instant(100.0, 1_000.0)
READY = ReplicaProgress(
    node="b", connected=True, acknowledged=EpochId(2, 9), acknowledged_wall_s=990.0, restorable=True
)


def role_of(me: str, mark: Mark = "leads", *, leader: str = "a") -> Role:
    record = TermRecord(term=2, leader=leader, mark=mark, boot_id="boot")
    role = new_role(
        me=me,
        boot_id="boot",
        spec=SPEC,
        timing=Timing(),
        fenceable=frozenset(),
        record=record,
        first_order=1,
        now=NOW,
    )
    role, _ = step(role, KeeperStarted(running=me == leader and mark == "leads"), NOW)
    return role


def seen(role: Role, *replicas: ReplicaProgress, **values: object) -> WorkloadStatus:
    """How the role looks after the agent's report."""
    report = WorkloadReport(name="w", spec=SPEC, running=role.alive, replicas=replicas)
    role, _ = step(role, AgentReport(replace(report, **values)), NOW)
    return workload_status(role, NOW)


def test_a_leader_with_a_ready_replica_risks_the_age_of_its_epoch() -> None:
    status = seen(role_of("a"), READY)
    assert (status.restorable, status.data_at_risk_s, status.stopped) == (True, 10.0, False)


@pytest.mark.parametrize(
    ("replica", "reason", "at_risk_s"),
    [
        (replace(READY, acknowledged=EpochId(1, 9)), "b: t1-e9 is of an earlier term", None),
        (replace(READY, connected=False), "b is not connected", 10.0),
    ],
    ids=["of an earlier term", "away"],
)
def test_a_replica_counts_as_restorable_only_if_the_workload_is(
    replica: ReplicaProgress, reason: str, at_risk_s: float | None
) -> None:
    status = seen(role_of("a"), replica)
    assert status.restorable is False
    assert [each.restorable for each in status.replicas] == [False]
    assert status.reasons == (reason,)
    assert status.data_at_risk_s == at_risk_s


def test_the_survivor_of_a_takeover_has_all_at_risk() -> None:
    status = seen(role_of("b", leader="b"), stored=EpochId(1, 9), stored_wall_s=990.0, restorable=True)
    assert (status.role, status.restorable, status.data_at_risk_s) == ("primary", False, None)


@pytest.mark.parametrize("me", ["a", "b"])
def test_nothing_is_at_risk_of_what_was_stopped(me: str) -> None:
    status = seen(role_of(me, "stopped"), stored=EpochId(2, 9), stored_wall_s=990.0, restorable=True)
    assert status.stopped is True
    assert status.data_at_risk_s is None


def test_nobody_is_missed_as_a_standby_of_what_was_stopped_or_never_started() -> None:
    assert seen(role_of("a", "stopped")).reasons == ()
    assert seen(role_of("a", "stopped", leader="")).reasons == ()


def test_the_data_at_risk_of_a_leader_that_is_gone_grows() -> None:
    role = role_of("b")
    role, _ = step(role, Heard(node="a", origin="keeper", term=2, claim="leading"), NOW)
    stored = {"stored": EpochId(2, 9), "stored_wall_s": 990.0, "restorable": True}
    assert seen(role, **stored).data_at_risk_s == 10.0
    later = Instant(101.0, 1_001.0)
    role, _ = step(role, AgentReport(WorkloadReport(name="w", spec=SPEC, running=False, **stored)), later)  # type: ignore[arg-type]
    role, _ = step(role, Tick(), later)
    assert workload_status(role, later).data_at_risk_s == 11.0


def test_what_is_in_doubt_counts_as_not_restorable_and_all_is_at_risk() -> None:
    role = role_of("b")
    sound = seen(role, stored=EpochId(2, 9), stored_wall_s=990.0, restorable=True)
    assert (sound.restorable, sound.data_at_risk_s) == (True, 10.0)
    status = seen(role, stored=EpochId(2, 9), stored_wall_s=990.0, restorable=True, doubt="of it")
    assert (status.restorable, status.data_at_risk_s) == (False, None)
    assert "of it" in status.reasons


def test_how_far_verification_is_shows_where_the_workload_is_led() -> None:
    progress = VerificationProgress(replica="b", pages_done=5, pages_due=9, epochs=1, rounds=2)
    assert seen(role_of("a"), READY, verification=(progress,)).verification == (progress,)
