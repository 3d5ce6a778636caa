"""The line of succession with three nodes: how it is changed, and who takes the right for whom."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from common.control import Done, Refused
from common.model import EpochId, WorkloadSpec
from common.role_events import (
    Answer,
    ClaimTerm,
    FenceResult,
    Heard,
    OperatorFailover,
    OperatorStart,
    PersistTerm,
    RunFence,
    SaveSpec,
    StepDone,
)
from common.role_explain import Covers, explain, takeovers
from common.roles import SILENCES, Claim, Mark, Takeover, TermRecord, claim_of, heir_of
from common.succession import gave_up, kept_by_giver, unheard_leader
from tests.unit.test_roles import SPEC, Driver

LINE = replace(SPEC, nodes=("a", "b", "c"))
MOVED = replace(SPEC, nodes=("a", "c", "b"))
ALL: Covers = {name: frozenset(SILENCES) for name in LINE.nodes}
WOULD = (Takeover(silence="host loss", missing=()),)
NOT_FIRST = (Takeover(silence="host loss", missing=("a is the successor of b, not this node",)),)


def stopped_leader(**values: object) -> Driver:
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("a", record, spec=LINE, **values)  # type: ignore[arg-type]
    driver.feed(StepDone(step="kill"))
    return driver


def says(
    driver: Driver, node: str, claim: Claim | None, term: int = 2, would: tuple[Takeover, ...] = ()
) -> None:
    driver.feed(
        Heard(node=node, origin="keeper", boot_id=f"boot-{node}", term=term, claim=claim, takeovers=would)
    )


def answer(driver: Driver, request: int) -> Done | Refused:
    return next(
        each.answer for each in driver.effects if isinstance(each, Answer) and each.request == request
    )


def start(driver: Driver, request: int = 1, *, off: tuple[str, ...] = (), spec: WorkloadSpec = MOVED) -> None:
    driver.feed(OperatorStart(request=request, spec=spec, peers_are_off=off))


# --- another line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "term", "would"),
    [("following", 2, WOULD), ("following", 1, ()), ("acquiring", 2, ()), ("starting", 2, ())],
)
def test_a_start_that_passes_over_the_successor_waits_until_that_one_knows_of_the_stop(
    claim: Claim, term: int, would: tuple[Takeover, ...]
) -> None:
    driver = stopped_leader()
    says(driver, "b", claim, term, would)
    says(driver, "c", "following")
    start(driver)
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert driver.role.wanted is None
    says(driver, "b", "following")
    start(driver, 2)
    assert driver.role.wanted is not None


def test_a_successor_that_is_silent_is_passed_over_only_by_an_operators_word() -> None:
    driver = stopped_leader()
    says(driver, "b", "following")
    driver.after(3.0)
    start(driver)
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert "b could take over until now" in refused.message
    assert "--off b" in refused.hint
    start(driver, 2, off=("b",))
    assert driver.role.newest.term == 100


def test_a_node_that_is_taken_off_the_line_can_be_vouched_for() -> None:
    driver = stopped_leader()
    driver.after(3.0)
    start(driver, off=("b",), spec=replace(SPEC, nodes=("a", "c")))
    assert driver.role.newest.term == 100


@pytest.mark.parametrize("claim", ["stopped", "yielded", None])
def test_who_has_a_term_of_its_own_or_knows_nothing_of_it_takes_nothing_over(claim: Claim | None) -> None:
    driver = stopped_leader()
    says(driver, "b", claim, 2 if claim else 0)
    start(driver)
    assert driver.role.wanted is not None


def written(driver: Driver) -> list[type]:
    return [type(each) for each in driver.effects if isinstance(each, PersistTerm | SaveSpec)]


def test_a_moved_line_begins_a_new_term_that_is_on_disk_before_the_line_is() -> None:
    """The term leaps: an operator may have the old successor take over the next one, unheard."""
    driver = stopped_leader()
    says(driver, "b", "following")
    start(driver)
    assert (driver.role.newest.term, driver.role.newest.mark) == (100, "launching")
    assert written(driver) == [PersistTerm]
    driver.persisted()
    assert written(driver) == [PersistTerm, SaveSpec]


def test_the_same_line_goes_on_in_the_same_term_whoever_is_away() -> None:
    driver = stopped_leader()
    start(driver, spec=replace(LINE, epoch_interval_ms=700))
    assert (driver.role.newest.term, driver.role.newest.mark) == (2, "launching")


LEASED = replace(LINE, right_to_lead="etcd")


@pytest.mark.parametrize(("before", "after"), [(LINE, LEASED), (LEASED, LINE)])
def test_another_right_to_lead_is_another_line_and_is_asked_for_alike(
    before: WorkloadSpec, after: WorkloadSpec
) -> None:
    """Who was away still knows the old one: a fence there, and a lease here, would make two primaries."""
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("a", record, spec=before)
    driver.feed(StepDone(step="kill"))
    driver.after(3.0)
    start(driver, spec=after)
    assert "b could take over" in answer(driver, 1).message  # type: ignore[union-attr]
    says(driver, "b", "following")
    start(driver, 2, spec=after)
    assert "c could take over" in answer(driver, 2).message  # type: ignore[union-attr]
    says(driver, "c", "following")
    start(driver, 3, spec=after)
    assert driver.state == "acquiring"
    assert SaveSpec not in written(driver), "only with the term"


def test_with_a_lease_before_and_after_the_line_decides_nothing_and_is_not_asked() -> None:
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("a", record, spec=LEASED)
    driver.feed(StepDone(step="kill"))
    start(driver, spec=replace(MOVED, right_to_lead="etcd"))
    assert any(isinstance(each, ClaimTerm) for each in driver.effects)


def test_a_start_that_etcd_refuses_leaves_the_line_as_it_was() -> None:
    driver = stopped_leader()
    for node in "bc":
        says(driver, node, "following")
    start(driver, spec=LEASED)
    (claim,) = (each for each in driver.effects if isinstance(each, ClaimTerm))
    driver.feed(FenceResult(node="etcd", attempt=claim.attempt, outcome="refused", reason="so"))
    assert (driver.state, driver.role.spec) == ("stopped", LINE)


@pytest.mark.parametrize("spec", [MOVED, LEASED])
def test_a_start_that_a_newer_term_forestalls_leaves_the_line_as_it_was(spec: WorkloadSpec) -> None:
    driver = stopped_leader()
    for node in "bc":
        says(driver, node, "following")
    start(driver, spec=spec)
    assert driver.role.spec == spec
    driver.hear("leading", term=200, node="b")
    assert driver.role.spec == LINE


@pytest.mark.parametrize("heard", [True, False])
def test_a_stopped_workload_is_not_failed_over_past_a_third_node_that_may_lead_it_by_another_line(
    heard: bool,
) -> None:
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("b", record, spec=LINE, fenceable=frozenset("abc"))
    driver.after(3.0)
    driver.report(stored=EpochId(2, 9), restorable=True)
    if heard:
        says(driver, "c", "following")
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    asked = any(isinstance(each, RunFence) for each in driver.effects)
    assert asked == heard
    if not heard:
        assert answer(driver, 1).hint.endswith("say --off c")  # type: ignore[union-attr]
        word = OperatorFailover(
            request=2, accept_data_loss=True, old_primary_is_off="", others_are_off=("c",)
        )
        driver.feed(word)
        (fence,) = (each for each in driver.effects if isinstance(each, RunFence))
        assert fence.up_to == 109
        driver.feed(FenceResult(node="a", attempt=fence.attempt, outcome="confirmed", reason="off"))
        assert driver.role.newest.term == 110


def heard_of_a_start(mark: Claim = "leading", spec: WorkloadSpec = LINE, **values: object) -> Driver:
    """B, which knows of A's stop, then of its next term by heartbeat only: it has no epoch of that."""
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("b", record, **{"spec": spec, "fenceable": frozenset("abc"), **values})  # type: ignore[arg-type]
    for step in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=step))
    driver.hear("leading", term=100)
    driver.persisted()
    if mark != "leading":
        driver.hear(mark, term=100)
        driver.persisted()
    driver.after(3.0)
    driver.report(stored=EpochId(2, 9), restorable=True)
    return driver


@pytest.mark.parametrize("mark", ["leading", "yielded"])
@pytest.mark.parametrize(
    ("third", "why"),
    [((), "not heard"), (WOULD, "may take over by itself"), (NOT_FIRST, "")],
    ids=["unheard", "the new successor", "at rest"],
)
def test_who_has_no_epoch_of_a_term_takes_nothing_over_beside_a_third_node(
    mark: Claim, third: tuple[Takeover, ...], why: str
) -> None:
    driver = heard_of_a_start(mark)
    if third:
        says(driver, "c", "following", 100, third)
    before = len(driver.effects)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    asked = driver.effects[before:]
    acts = any(isinstance(each, RunFence | PersistTerm) for each in asked)
    assert acts == (not why)
    if why:
        refused = answer(driver, 1)
        assert isinstance(refused, Refused)
        assert why in refused.message


def test_who_has_an_epoch_of_the_term_knows_its_line() -> None:
    driver = heard_of_a_start()
    driver.report(stored=EpochId(100, 1), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert any(isinstance(each, RunFence) for each in driver.effects)


def test_what_was_given_up_is_not_started_afresh_beside_a_third_node_that_may_lead_by_another_line() -> None:
    driver = heard_of_a_start("yielded")
    start(driver, spec=LINE)
    assert isinstance(answer(driver, 1), Refused)
    start(driver, 2, spec=LINE, off=("c",))
    driver.persisted()
    assert driver.state == "launching"


@pytest.mark.parametrize("known", [True, False], ids=["the holder is known", "the number only"])
def test_a_start_asks_for_whom_it_takes_off_the_list(known: bool) -> None:
    if known:
        driver = Driver("a", TermRecord(term=2, leader="b", mark="stopped", boot_id="boot-1"), spec=LINE)
        driver.after(3.0)
        word, off = ("b",), ("b", "c")
    else:
        driver = Driver("a", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-0"), spec=LINE)
        driver.after(2.1)
        says(driver, "b", "following", would=NOT_FIRST)
        driver.persisted()
        for step in ("kill", "drop_vip", "lift"):
            driver.feed(StepDone(step=step))
        says(driver, "b", "following", would=NOT_FIRST)
        word, off = (), ("c",)
    pair = replace(LINE, nodes=("a", "b"))
    start(driver, spec=pair, off=word)
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert refused.message.startswith("c is not heard")
    start(driver, 2, spec=pair, off=off)
    driver.persisted()
    assert driver.state == "launching"


def test_a_node_that_keeps_nothing_of_it_need_not_know_who_leads() -> None:
    driver = Driver("a", TermRecord(), spec=LINE)
    driver.after(2.1)
    says(driver, "c", "following")
    driver.persisted()
    says(driver, "c", "following")
    says(driver, "b", None, 0)
    start(driver, spec=LINE)
    driver.persisted()
    assert driver.state == "launching"


def test_with_leases_a_stop_is_not_passed_over_while_another_may_have_started_it_by_another_right() -> None:
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    driver = Driver("b", record, spec=replace(SPEC, right_to_lead="etcd"))
    driver.after(3.0)
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert isinstance(answer(driver, 1), Refused)
    driver.feed(OperatorFailover(request=2, accept_data_loss=True, old_primary_is_off="a"))
    assert any(isinstance(each, ClaimTerm) for each in driver.effects)


def test_with_leases_a_stop_is_not_followed_by_a_start_beside_one_by_another_right() -> None:
    record = TermRecord(term=2, leader="a", mark="stopped", boot_id="boot-1")
    pair = replace(SPEC, right_to_lead="etcd")
    driver = Driver("b", record, spec=pair)
    for step in ("kill", "drop_vip", "lift"):
        driver.feed(StepDone(step=step))
    driver.after(3.0)
    start(driver, spec=pair)
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert refused.message.startswith("a is not heard")
    start(driver, 2, spec=pair, off=("a",))
    assert any(isinstance(each, ClaimTerm) for each in driver.effects)


def test_with_leases_who_vouches_for_the_leader_answers_for_a_third_node_too() -> None:
    driver = heard_of_a_start(spec=LEASED)
    word = OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="a")
    driver.feed(word)
    assert isinstance(answer(driver, 1), Refused)
    driver.feed(replace(word, request=2, others_are_off=("c",)))
    (claim,) = (each for each in driver.effects if isinstance(each, ClaimTerm))
    assert claim.blank
    plain = heard_of_a_start(spec=LEASED)
    plain.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    (claim,) = (each for each in plain.effects if isinstance(each, ClaimTerm))
    assert not claim.blank, "then etcd knows who led, or gives nothing"


def test_with_leases_whom_a_start_takes_off_the_list_is_accounted_for_as_well() -> None:
    for nodes in (LEASED.nodes, ("a", "b")):
        driver = heard_of_a_start(spec=LEASED)
        driver.report(stored=EpochId(100, 1), restorable=True)
        start(driver, spec=replace(LEASED, nodes=nodes), off=("a",))
        (claim,) = (each for each in driver.effects if isinstance(each, ClaimTerm))
        assert not claim.blank, "nobody answers for c"


def test_a_start_on_the_successor_waits_for_a_third_node_that_would_take_over() -> None:
    driver = heard_of_a_start()
    says(driver, "c", "following", 100, WOULD)
    start(driver, spec=LINE, off=("a",))
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert "may take over by itself" in refused.message


def test_who_knows_that_it_was_stopped_says_that_it_takes_nothing_over() -> None:
    record = TermRecord(term=2, leader="a", mark="leads", boot_id="boot-1")
    driver = Driver("b", record, spec=LINE)
    assert takeovers(driver.role, driver.instant(), ALL)
    driver.hear("stopped", term=2)
    assert takeovers(driver.role, driver.instant(), ALL), "it is not on disk yet"
    driver.persisted()
    assert takeovers(driver.role, driver.instant(), ALL) == ()


def test_who_still_kills_what_it_has_of_a_running_term_does_not_say_that_there_is_nothing() -> None:
    record = TermRecord(term=2, leader="a", mark="leads", boot_id="boot-1")
    driver = Driver("b", record, spec=LINE, running=True)
    assert (driver.state, claim_of(driver.role)) == ("deposed", "following")
    assert takeovers(driver.role, driver.instant(), ALL)[0].missing == (driver.role.reason,)


# --- the right for another node -----------------------------------------------------------------------


def returned(**values: object) -> Driver:
    """A, back from a loss: B led meanwhile and is lost, C has its epochs and is heard."""
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1")
    driver = Driver("a", record, **{"spec": LINE, "fenceable": frozenset("abc"), **values})  # type: ignore[arg-type]
    driver.report()
    driver.after(2.5)
    says(driver, "c", "following", would=NOT_FIRST)
    driver.report()
    driver.after(0.05)
    assert driver.state == "waiting"
    return driver


def cede(driver: Driver, request: int = 1, to: str = "c", off: str = "", *, accepted: bool = True) -> None:
    driver.feed(OperatorFailover(request=request, accept_data_loss=accepted, old_primary_is_off=off, to=to))


def test_the_successor_takes_the_right_for_another_node_and_gives_it_up_in_the_same_record() -> None:
    driver = returned()
    cede(driver)
    assert any(isinstance(each, RunFence) for each in driver.effects)
    driver.feed(FenceResult(node="b", attempt=1, outcome="confirmed", reason="off"))
    assert driver.role.record.term == 2, "nothing is said before it is on disk"
    driver.persisted()
    record = driver.role.record
    assert (record.term, record.leader, record.mark, record.heir) == (3, "a", "yielded", "c")
    assert (driver.state, claim_of(driver.role), heir_of(driver.role)) == ("yielded", "yielded", "c")
    done = answer(driver, 1)
    assert isinstance(done, Done)
    assert done.detail.endswith("on c: outlive failover w --accept-data-loss")
    driver.after(40.0)
    assert driver.state == "yielded"


def test_the_heir_restores_what_it_has_once_it_is_asked() -> None:
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1")
    heir = Driver("c", record, spec=LINE, fenceable=frozenset("abc"))
    heir.report(stored=EpochId(2, 9), restorable=True)
    heir.feed(Heard(node="a", origin="keeper", boot_id="boot-a", term=3, claim="yielded", heir="c"))
    heir.persisted()
    heir.after(0.05)
    assert heir.state == "waiting"
    assert heir.role.reason.endswith("older than term 3: outlive failover w --accept-data-loss")
    heir.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    heir.persisted()
    assert (heir.state, heir.role.record.term, heir.role.order.newest_only) == ("taking_over", 4, False)


def test_a_fence_that_does_not_confirm_gives_nothing_up_and_is_not_forgotten_into_the_next_attempt() -> None:
    driver = returned()
    cede(driver)
    driver.feed(FenceResult(node="b", attempt=1, outcome="unknown", reason="?"))
    assert isinstance(answer(driver, 1), Refused)
    assert driver.role.wanted is None
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.after(1.5)
    driver.feed(FenceResult(node="b", attempt=2, outcome="confirmed", reason="off"))
    assert (driver.role.newest.mark, driver.role.newest.heir) == ("taking_over", "")


def test_without_a_fence_an_operator_vouches_for_the_lost_leader() -> None:
    driver = returned(spec=replace(LINE, right_to_lead="manual"), fenceable=frozenset())
    cede(driver)
    assert "no fence confirmed that it is off" in answer(driver, 1).message  # type: ignore[union-attr]
    cede(driver, 2, off="b")
    assert (driver.role.newest.term, driver.role.newest.heir) == (100, "c")


def gave_up_unnamed(**values: object) -> Driver:
    """A gave its term up to its successor b, which is lost before it leads; c has epochs of it."""
    record = TermRecord(term=2, leader="a", mark="yielded", boot_id="boot-1")
    driver = Driver("a", record, **{"spec": LINE, "fenceable": frozenset("abc"), **values})  # type: ignore[arg-type]
    driver.report()
    driver.after(2.5)
    says(driver, "c", "following", would=NOT_FIRST)
    driver.feed(StepDone(step="kill"))
    assert driver.state == "yielded"
    return driver


def test_who_gave_its_term_up_gives_the_right_to_the_third_node_once_its_successor_is_off() -> None:
    driver = gave_up_unnamed()
    cede(driver)
    (fence,) = [each for each in driver.effects if isinstance(each, RunFence)]
    assert (fence.node, fence.up_to >= 99) == ("b", True), "b may have led terms that nobody heard of"
    driver.feed(FenceResult(node="b", attempt=1, outcome="unknown", reason="?"))
    assert (driver.state, driver.role.wanted) == ("yielded", None)
    assert isinstance(answer(driver, 1), Refused)
    says(driver, "c", "following", would=NOT_FIRST)
    cede(driver, 2)
    driver.feed(FenceResult(node="b", attempt=2, outcome="confirmed", reason="off"))
    driver.persisted()
    record = driver.role.record
    assert (record.term, record.mark, record.heir, driver.state) == (100, "yielded", "c", "yielded")


def test_nothing_is_given_up_while_something_runs_here() -> None:
    role = gave_up_unnamed().role
    assert gave_up(role)
    assert not gave_up(replace(role, alive=True))


def test_who_gave_its_term_up_gives_nothing_away_while_its_successor_speaks_or_something_runs_here() -> None:
    driver = gave_up_unnamed()
    says(driver, "b", "following")
    cede(driver)
    assert isinstance(answer(driver, 1), Refused)
    driver = Driver("a", driver.role.record, spec=LINE, fenceable=frozenset("abc"))
    driver.after(2.5)
    says(driver, "c", "following", would=NOT_FIRST)
    cede(driver, 2)
    assert "still being ended" in answer(driver, 2).message  # type: ignore[union-attr]
    driver = Driver("a", driver.role.record, spec=LINE, fenceable=frozenset("abc"), running=True)
    driver.after(2.5)
    says(driver, "c", "following", would=NOT_FIRST)
    cede(driver, 3)
    assert isinstance(answer(driver, 3), Refused)
    assert not any(isinstance(each, RunFence) for each in driver.effects)


def test_who_gave_its_term_up_gives_the_right_to_nobody_who_may_take_over_by_a_newer_line() -> None:
    driver = gave_up_unnamed()
    says(driver, "c", "following", would=WOULD)
    cede(driver)
    assert "c may take over by itself" in answer(driver, 1).message  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "to", "accepted", "word"),
    [
        ({}, "b", True, "cannot take it over from b"),
        ({}, "d", True, "one of: c"),
        ({}, "c", False, "--accept-data-loss"),
        ({"spec": replace(LINE, right_to_lead="etcd")}, "c", True, "on c: outlive failover w"),
        ({"spec": replace(LINE, nodes=("b", "c", "a"))}, "c", True, "c is the successor of b, not a"),
    ],
)
def test_the_right_is_not_taken_for_another_node(
    values: dict[str, object], to: str, accepted: bool, word: str
) -> None:
    driver = returned(**values)
    cede(driver, to=to, accepted=accepted)
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert word in f"{refused.message} {refused.hint}"
    assert driver.state == "waiting"


def test_a_node_that_is_not_heard_is_given_no_right() -> None:
    driver = returned()
    driver.after(3.0)
    cede(driver)
    assert "c is not heard" in answer(driver, 1).message  # type: ignore[union-attr]


def test_what_was_handed_over_is_given_to_no_third_node() -> None:
    record = TermRecord(term=2, leader="b", mark="yielded", boot_id="boot-1", heir="a")
    driver = Driver("a", record, spec=LINE, fenceable=frozenset("abc"))
    says(driver, "c", "following")
    cede(driver)
    assert isinstance(answer(driver, 1), Refused)


def test_with_leases_a_third_node_needs_nobodys_leave() -> None:
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1")
    driver = Driver("c", record, spec=replace(LINE, right_to_lead="etcd"), fenceable=frozenset())
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.after(2.5)
    says(driver, "a", "following", would=WOULD)
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    assert any(isinstance(each, ClaimTerm) for each in driver.effects)


def test_to_give_the_right_to_oneself_is_to_take_over() -> None:
    driver = returned()
    driver.report(stored=EpochId(2, 9), restorable=True)
    cede(driver, to="a")
    attempt = driver.role.fence_attempt
    driver.feed(FenceResult(node="b", attempt=attempt, outcome="confirmed", reason="off"))
    assert (driver.role.newest.mark, driver.role.newest.heir) == ("taking_over", "")


def ceded(*, alive: bool = False) -> Driver:
    """C, to which A, which keeps nothing, has given the right."""
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1")
    heir = Driver("c", record, spec=LINE, fenceable=frozenset("abc"))
    heir.feed(
        Heard(node="a", origin="keeper", boot_id="boot-a", term=3, claim="yielded", heir="c", alive=alive)
    )
    heir.persisted()
    return heir


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
def test_the_heir_needs_the_giver_no_more_though_keeper_or_host_were_started_again(boot: str) -> None:
    heir = Driver("c", ceded().role.record, spec=LINE, fenceable=frozenset("abc"), boot=boot)
    heir.after(3.0)
    heir.report(stored=EpochId(2, 9), restorable=True)
    heir.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    if boot == "boot-2":  # others may have been told that this node is off
        attempt = heir.role.fence_attempt
        heir.feed(FenceResult(node="a", attempt=attempt, outcome="confirmed", reason="off"))
    heir.persisted()
    assert (heir.state, heir.role.record.handed_by) == ("taking_over", "")
    assert heir.role.order.newest_only is False


def test_the_heir_of_a_kept_workload_does_not_believe_that_nothing_is_kept() -> None:
    record = ceded(alive=True).role.record
    assert not record.nothing_kept
    heir = Driver("c", record, spec=LINE, fenceable=frozenset("abc"))
    assert kept_by_giver(heir.role) == "a"


def test_who_gave_the_right_to_a_node_that_is_lost_can_give_it_to_another_one() -> None:
    record = TermRecord(term=3, leader="a", mark="yielded", boot_id="boot-1", heir="c")
    driver = Driver("a", record, spec=LINE, fenceable=frozenset("abc"))
    driver.feed(StepDone(step="kill"))
    says(driver, "b", "following", 3)
    says(driver, "c", "following", 3)
    cede(driver, to="b")
    assert isinstance(answer(driver, 1), Refused), "c is heard"
    driver.after(1.0)
    says(driver, "b", "following", 3)
    cede(driver, 2, to="b")
    attempt = driver.role.fence_attempt
    driver.feed(FenceResult(node="c", attempt=attempt, outcome="confirmed", reason="off"))
    driver.persisted()
    assert (driver.role.record.heir, driver.state) == ("b", "yielded")


@pytest.mark.parametrize("stored", [True, False])
def test_who_gave_the_right_to_a_node_that_is_lost_can_use_it_itself(stored: bool) -> None:
    """With what it has stored, or afresh: nobody else can any more."""
    record = TermRecord(term=3, leader="b", mark="yielded", boot_id="boot-1", heir="c")
    driver = Driver("b", record, spec=LINE, fenceable=frozenset("abc"))
    driver.feed(StepDone(step="kill"))
    driver.after(3.0)
    if stored:
        driver.report(stored=EpochId(1, 9), restorable=True)
        word = OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off="")
        driver.feed(word)
        assert "a is not heard" in answer(driver, 1).message  # type: ignore[union-attr]
        driver.feed(replace(word, request=2, others_are_off=("a",)))
        attempt = driver.role.fence_attempt
        driver.feed(FenceResult(node="c", attempt=attempt, outcome="confirmed", reason="off"))
        assert (driver.role.newest.mark, driver.role.newest.term) == ("taking_over", 110)
        return
    start(driver, off=("a",), spec=LINE)
    assert "c holds the right" in answer(driver, 1).message  # type: ignore[union-attr]
    start(driver, 2, off=("a", "c"), spec=LINE)
    assert driver.role.newest.mark == "launching"


def test_explain_names_the_heir_of_a_term_that_was_given_up_by_name() -> None:
    record = TermRecord(term=3, leader="a", mark="yielded", boot_id="boot-1", heir="c")
    driver = Driver("a", record, spec=LINE, fenceable=frozenset("abc"))
    assert explain(driver.role, driver.instant(), ALL).successor == "c"


def test_a_third_node_is_told_whom_to_ask() -> None:
    record = TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1")
    driver = Driver("c", record, spec=LINE, fenceable=frozenset("abc"))
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.after(2.5)
    driver.report(stored=EpochId(2, 9), restorable=True)
    driver.feed(OperatorFailover(request=1, accept_data_loss=True, old_primary_is_off=""))
    refused = answer(driver, 1)
    assert isinstance(refused, Refused)
    assert refused.hint == "run it on a, or if nothing is stored there, with: --to c"


# --- who led, by the word of a third node -----------------------------------------------------------


def hearsay(leader: str, term: int = 2, would: tuple[Takeover, ...] = WOULD) -> Heard:
    return Heard(
        node="c",
        origin="keeper",
        boot_id="boot-c",
        term=term,
        claim="following",
        leader=leader,
        takeovers=would,
    )


@pytest.mark.parametrize(("would", "mark"), [(WOULD, "leads"), ((), "stopped")])
def test_who_returns_learns_from_a_third_node_who_led_and_whether_that_one_stopped_it(
    would: tuple[Takeover, ...], mark: str
) -> None:
    driver = Driver("a", TermRecord(term=1, leader="a", mark="leads", boot_id="boot-0"), spec=LINE)
    driver.feed(hearsay("", would=would))
    driver.persisted()
    assert (driver.role.record.term, driver.role.record.leader) == (2, ""), "c still hears it"
    driver.feed(hearsay("b", would=would))
    driver.persisted()
    record = driver.role.record
    assert (record.term, record.leader, record.mark) == (2, "b", mark)


@pytest.mark.parametrize("leader", ["", "a"])
def test_nobody_is_told_by_others_that_he_leads(leader: str) -> None:
    driver = Driver("a", spec=LINE)
    driver.feed(hearsay(leader))
    driver.persisted()
    assert (driver.role.record.term, driver.role.record.leader) == (2, "")
    driver.feed(hearsay(leader))
    assert driver.role.wanted is None


def test_who_knows_the_leader_of_a_term_believes_nobody_else_about_that() -> None:
    driver = Driver("a", TermRecord(term=2, leader="b", mark="leads", boot_id="boot-1"), spec=LINE)
    driver.feed(hearsay("c"))
    assert driver.role.wanted is None


@pytest.mark.parametrize(("mark", "said"), [("leads", "b"), ("stopped", "b"), ("yielded", "")])
def test_a_leader_is_named_for_others_once_it_is_not_heard_and_unless_it_gave_its_term_up(
    mark: Mark, said: str
) -> None:
    driver = Driver("c", TermRecord(term=2, leader="b", mark=mark, boot_id="boot-1"), spec=LINE)
    says(driver, "b", "leading")
    assert unheard_leader(driver.role, driver.instant()) == ""
    driver.after(1.0)
    assert unheard_leader(driver.role, driver.instant()) == said
