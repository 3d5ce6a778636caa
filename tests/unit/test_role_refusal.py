"""A node that was fenced by SSH leads nothing up to the fenced term, whatever it finds in its term file."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import Node, NodeConfig
from common.control import Done, Refused
from common.errors import StaleTermError, StoreError
from common.model import EpochId, WorkloadSpec
from common.role_events import (
    Answer,
    FenceResult,
    KillWorkload,
    OperatorFailover,
    OperatorStart,
    RunFence,
    StepDone,
)
from common.roles import LEADING, Mark, Refusal, TermRecord
from common.succession import contender
from common.terms_file import TermFiles, look_up
from tests.unit.test_roles import SPEC, Driver

FENCED = Refusal(term=4, by="b")


def mine(term: int = 4, mark: Mark = "leads") -> TermRecord:
    return TermRecord(term=term, leader="a", mark=mark, boot_id="boot-1")


def cleaned(driver: Driver) -> Driver:
    for done in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=done))  # type: ignore[arg-type]
    return driver


def answer(driver: Driver, request: int) -> Done | Refused:
    (found,) = [each for each in driver.effects if isinstance(each, Answer) and each.request == request]
    return found.answer


@pytest.mark.parametrize("mark", ["leads", "launching", "taking_over", "failed"])
def test_a_keeper_that_starts_again_in_the_same_boot_kills_and_listens(mark: Mark) -> None:
    driver = Driver("a", mine(mark=mark), running=True, refusal=FENCED)
    assert driver.state == "starting"
    assert "b fenced this node since it led term 4" in driver.role.reason
    assert KillWorkload() in driver.effects
    assert driver.role.order.role == "idle"
    driver.after(10.0)
    assert driver.state == "starting"


def test_a_fence_of_an_earlier_term_says_nothing_of_a_later_one() -> None:
    assert Driver("a", mine(term=5), running=True, refusal=FENCED).state == "leading"


def test_it_follows_whoever_leads_the_next_term() -> None:
    driver = cleaned(Driver("a", mine(), running=True, refusal=FENCED))
    driver.hear("leading", term=5, node="b")
    driver.persisted()
    assert (driver.state, driver.role.record.leader) == ("following", "b")


def test_it_yields_to_a_successor_that_did_not_take_over() -> None:
    driver = cleaned(Driver("a", mine(), refusal=FENCED))
    for _ in range(100):
        driver.hear("following", term=4, node="b")
        driver.after(0.025)
    assert driver.role.wanted is not None
    driver.persisted()
    assert driver.state == "yielded"
    assert driver.role.record.mark == "yielded"


@pytest.mark.parametrize("mark", ["leads", "stopped"])
def test_an_operator_cannot_start_it_while_who_fenced_it_is_not_heard(mark: Mark) -> None:
    driver = cleaned(Driver("a", mine(mark=mark), refusal=FENCED))
    driver.after(10.0)
    driver.feed(OperatorStart(request=1, spec=SPEC))
    found = answer(driver, 1)
    assert isinstance(found, Refused)
    assert "b was not heard and may lead it by now" in found.message


def test_an_operator_who_vouches_begins_a_term_above_the_fenced_one() -> None:
    driver = cleaned(Driver("a", mine(), refusal=Refusal(term=230, by="b")))
    driver.after(10.0)
    driver.feed(OperatorStart(request=1, spec=SPEC, peers_are_off=("b",)))
    assert driver.role.wanted is not None
    assert driver.role.wanted.term == 300


def test_the_heir_of_a_yield_that_was_fenced_in_that_term_does_not_take_it_unasked() -> None:
    spec = WorkloadSpec(name="w", nodes=("a", "b", "c"), command=("x",), right_to_lead="fence")
    record = TermRecord(term=4, leader="c", mark="yielded", boot_id="boot-1")
    free = Driver("a", record, spec=spec)
    refused = Driver("a", record, spec=spec, refusal=FENCED)
    for driver in (free, refused):
        driver.hear("yielded", term=4, node="c")
    assert contender(free.role, free.instant()) == ""
    assert contender(refused.role, refused.instant()) == "b"


def test_a_failover_fences_in_the_newest_term_known() -> None:
    record = TermRecord(term=7, leader="a", mark="leads", boot_id="boot-1")
    driver = Driver("b", record)
    driver.report(stored=EpochId(7, 9), restorable=True)
    driver.after(3.0)
    driver.report(stored=EpochId(7, 9), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    (asked, *_) = [effect for effect in driver.effects if isinstance(effect, RunFence)]
    assert (asked.node, asked.term) == ("a", 7)
    driver.feed(FenceResult(node="a", attempt=driver.role.fence_attempt, outcome="confirmed", reason="so"))
    assert driver.role.wanted is not None
    assert driver.role.wanted.term == 8
    assert driver.role.name not in LEADING


# --- on disk ----------------------------------------------------------------------------------------


def test_a_refusal_is_read_back_and_never_lowered(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    assert files.load_refusal("w") is None
    files.record_refusal("w", FENCED)
    files.record_refusal("w", Refusal(term=3, by="c"))
    assert TermFiles(tmp_path, "a").load_refusal("w") == FENCED


def test_what_a_keeper_writes_after_the_fence_does_not_undo_it(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.record("w", mine())
    files.record_refusal("w", FENCED)
    with pytest.raises(StaleTermError, match="b fenced this node"):  # it hung while the node was fenced
        files.record("w", mine())
    driver = Driver("a", files.load("w"), running=True, refusal=files.load_refusal("w"))
    assert driver.state == "starting"


def test_no_right_to_a_term_up_to_the_fenced_one_is_recorded(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.record("w", TermRecord(term=2, leader="b"))
    files.record_refusal("w", FENCED)
    for term in (3, 4):
        with pytest.raises(StaleTermError, match="b fenced this node"):
            files.record("w", mine(term=term))
    files.record("w", TermRecord(term=4, leader="b"))
    files.record("w", mine(term=5))
    assert files.load("w").term == 5


def test_a_damaged_refusal_is_an_error_and_sets_the_workload_aside(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.save_spec(SPEC)
    files.record_refusal(SPEC.name, FENCED)
    (tmp_path / "terms" / SPEC.name / "fenced.json").write_bytes(b"{")
    with pytest.raises(StoreError):
        files.load_refusal(SPEC.name)
    config = NodeConfig(node=Node(name="a", address="127.0.0.1", state_dir=str(tmp_path)))
    assert set(look_up(config, files).damaged) == {SPEC.name}


# --- with a term that was handed over by name -------------------------------------------------------


def handed_over(*, refusal: Refusal | None = None) -> Driver:
    """Node a, which handed term 4 to b and keeps the workload frozen."""
    record = TermRecord(term=4, leader="a", mark="yielded", boot_id="boot-1", heir="b")
    return Driver("a", record, running=True, frozen=True, refusal=refusal)


def test_who_keeps_it_frozen_fences_the_heir_in_a_next_term_that_began_unheard_too() -> None:
    driver = handed_over()
    assert driver.state == "handed_over"
    driver.after(3.0)
    (asked, *_) = [effect for effect in driver.effects if isinstance(effect, RunFence)]
    assert (asked.node, asked.term, asked.up_to) == ("b", 4, 99)
    driver.feed(FenceResult(node="b", attempt=asked.attempt, outcome="confirmed", reason="so"))
    assert driver.role.wanted is not None
    assert driver.role.wanted.term == 100, "the first that the fence did not name"


def test_what_was_kept_frozen_is_kept_no_more_by_a_node_that_was_fenced() -> None:
    driver = handed_over(refusal=Refusal(term=4, by="b"))
    assert driver.state == "yielded"
    assert KillWorkload() in driver.effects


def test_an_heir_that_was_fenced_by_who_handed_over_waits_until_that_one_is_sure_to_mean_it() -> None:
    record = TermRecord(term=4, leader="a", mark="yielded", boot_id="boot-1", heir="b")
    driver = Driver("b", record, refusal=Refusal(term=4, by="a"))
    driver.hear("yielded", term=4)
    assert contender(driver.role, driver.instant()) == "a", "what is heard first may be an old word"
    for _ in range(100):
        driver.after(0.025)
        driver.hear("yielded", term=4)
    assert contender(driver.role, driver.instant()) == ""
    driver.hear("acquiring", term=4)
    assert contender(driver.role, driver.instant()) == "a"
