"""How old what others could restore may be: when the objective is missed, and when it is met again."""

from __future__ import annotations

import msgspec
import pytest

from common.control import ReplicaProgress, WorkloadReport
from common.model import EpochId, WorkloadSpec
from common.objective import Objective, judged
from common.roles import Instant, Role, StateName, TermRecord, Timing, new_role

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",), epoch_interval_ms=1000, rpo_ms=3000)
WALL_S = 1e9


class Leader:
    """A leading node's view of the objective, tick by tick."""

    def __init__(self, spec: WorkloadSpec = SPEC, name: StateName = "leading") -> None:
        self.now_s = 100.0
        self.wall_s = WALL_S
        self.epoch = 0
        self.verdicts: list[str] = []
        self.objective = Objective()
        role = new_role(
            me="a",
            boot_id="boot",
            spec=spec,
            timing=Timing(),
            fenceable=frozenset(),
            record=TermRecord(term=1, leader="a", mark="leads", boot_id="boot"),
            first_order=1,
            now=Instant(self.now_s, self.wall_s),
        )
        self.role: Role = msgspec.structs.replace(role, name=name)

    def acknowledge(self, *, age_s: float = 0.1, restorable: bool = True, term: int = 1) -> None:
        self.epoch += 1
        replica = ReplicaProgress(
            node="b",
            connected=True,
            acknowledged=EpochId(term, self.epoch),
            acknowledged_wall_s=self.wall_s - age_s,
            restorable=restorable,
        )
        report = WorkloadReport(name="w", spec=SPEC, running=True, replicas=(replica,))
        self.role = msgspec.structs.replace(self.role, report=report)

    def after(self, seconds: float) -> str:
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            self.wall_s += 0.1
            self.objective = judged(self.objective, self.role, Instant(self.now_s, self.wall_s))
            if self.objective.verdict not in self.verdicts[-1:]:
                self.verdicts.append(self.objective.verdict)
        return self.objective.verdict


def test_it_is_met_while_epochs_are_young_enough() -> None:
    leader = Leader()
    for _ in range(20):
        leader.acknowledge()
        leader.after(1.0)
    assert leader.verdicts == ["met"]


def test_it_is_missed_when_the_newest_epoch_is_too_old_and_met_again_after_as_long_without() -> None:
    leader = Leader()
    leader.acknowledge()
    assert leader.after(2.5) == "met"
    assert leader.after(0.6) == "missed"
    leader.acknowledge()
    assert leader.after(2.5) == "missed"
    leader.acknowledge()
    assert leader.after(1.0) == "met"
    assert leader.verdicts == ["met", "missed", "met"]


@pytest.mark.parametrize("period_s", [3.2, 4.0, 5.9])
def test_epochs_that_are_a_little_late_each_time_are_one_miss(period_s: float) -> None:
    leader = Leader()
    for _ in range(30):
        leader.acknowledge()
        leader.after(period_s)
    assert leader.verdicts == ["met", "missed"]


def test_no_replica_at_all_is_a_miss_after_that_time() -> None:
    leader = Leader()
    assert leader.after(2.9) == "met"
    assert leader.after(0.3) == "missed"


@pytest.mark.parametrize("worthless", [{"restorable": False}, {"term": 0}])
def test_what_could_not_be_restored_does_not_count(worthless: dict[str, int]) -> None:
    leader = Leader()
    for _ in range(5):
        leader.acknowledge(**worthless)  # type: ignore[arg-type]
        leader.after(1.0)
    assert leader.objective.verdict == "missed"


def test_a_check_that_fails_for_a_moment_is_no_miss() -> None:
    leader = Leader()
    leader.acknowledge()
    leader.after(0.5)
    leader.acknowledge(restorable=False)
    leader.after(1.0)
    leader.acknowledge()
    leader.after(0.5)
    assert leader.verdicts == ["met"]


def test_an_epoch_counts_from_its_freeze_not_from_its_acknowledgement() -> None:
    leader = Leader()
    leader.acknowledge(age_s=2.5)
    assert leader.after(0.4) == "met"
    assert leader.after(0.3) == "missed"


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_changes_nothing(step_s: float) -> None:
    leader = Leader()
    leader.acknowledge()
    leader.after(1.0)
    leader.wall_s += step_s
    assert leader.after(1.5) == "met"
    assert leader.after(1.0) == "missed"


@pytest.mark.parametrize("name", ["following", "stopped", "launching", "waiting"])
def test_who_does_not_lead_has_no_objective(name: StateName) -> None:
    leader = Leader(name=name)
    assert leader.after(10.0) == "none"


def test_a_workload_of_one_node_has_no_objective() -> None:
    leader = Leader(msgspec.structs.replace(SPEC, nodes=("a",)))
    assert leader.after(10.0) == "none"


def test_a_new_lead_begins_with_a_clean_slate() -> None:
    leader = Leader()
    leader.after(4.0)
    leader.role = msgspec.structs.replace(leader.role, name="launching")
    leader.after(0.1)
    leader.role = msgspec.structs.replace(leader.role, name="leading")
    leader.after(1.0)
    assert leader.verdicts == ["met", "missed", "none", "met"]
