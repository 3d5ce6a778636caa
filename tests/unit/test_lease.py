"""A lease: until when it counts, when the gate is closed and opened, what is asked of etcd."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from common.errors import UnreachableError
from common.lease import (
    Answered,
    Ask,
    Drop,
    Effect,
    Event,
    Freeze,
    Keep,
    Lease,
    LeaseRecord,
    LeaseTerms,
    Need,
    Passed,
    Tell,
    Thaw,
    Wanted,
    advance,
    found,
    unrecorded,
)
from common.lease_calls import (
    Answer,
    Claim,
    Claimant,
    Denied,
    Granted,
    Held,
    KeepaliveAnswer,
    LeaseKeys,
    Look,
    Question,
    Reclaim,
    Renew,
    Revoke,
    Seen,
    TxnAnswer,
    Unanswered,
)
from common.role_events import ClaimTerm, FenceResult, LeaseInDoubt, LeaseStands
from tests.sim.etcd import Etcd

TERMS = LeaseTerms(ttl_s=2, margin_s=0.3, drift=0.01)
GOOD_FOR_S = 2 * 0.99 - 0.3
HELD = Held(lease_id=7, revision=3, term=1)
IDLE = Need(held=False, guarded=False, term=0)
CLAIMING = Need(held=True, guarded=False, term=0)
LEADING = Need(held=True, guarded=True, term=1)
CLAIM = ClaimTerm(attempt=1, term=1, known=0, unused=(), over=False, blank=True)


@dataclass
class Driver:
    """A lease machine with what came out of it."""

    lease: Lease = field(default_factory=lambda: found(TERMS, None))
    need: Need = IDLE
    effects: list[Effect] = field(default_factory=list)

    def feed(self, event: Event, at_s: float, need: Need | None = None) -> list[Effect]:
        self.need = need or self.need
        self.lease, effects = advance(self.lease, self.need, event, at_s)
        self.effects = list(effects)
        return self.effects

    def answer(self, answer: Answer, at_s: float, need: Need | None = None) -> list[Effect]:
        return self.feed(Answered(self.lease.asked, answer), at_s, need)

    @property
    def question(self) -> Question | None:
        return self.lease.question


def leading(at_s: float = 100.0) -> Driver:
    """Return a machine whose lease was granted at that moment."""
    driver = Driver()
    driver.feed(Passed(), at_s - 3)
    driver.answer(Seen(standing=driver.lease.standing), at_s - 3)
    driver.feed(Wanted(CLAIM), at_s, CLAIMING)
    driver.answer(Granted(held=HELD, sent_s=at_s, ttl_s=2), at_s + 0.1)
    driver.feed(Passed(), at_s + 0.1, LEADING)
    return driver


def told(effects: list[Effect]) -> list[object]:
    return [effect.event for effect in effects if isinstance(effect, Tell)]


def test_the_gate_is_closed_from_the_first_moment_on() -> None:
    assert Freeze() in Driver().feed(Passed(), 0.0)


def test_a_claim_that_etcd_grants_is_confirmed_with_its_term_and_put_on_record_first() -> None:
    driver = Driver()
    driver.feed(Passed(), 97.0)
    driver.answer(Seen(standing=driver.lease.standing), 97.0)
    driver.feed(Wanted(CLAIM), 100.0, CLAIMING)
    assert driver.question == Claim(term=1, known=0, over=False, blank=True)
    effects = driver.answer(Granted(held=HELD, sent_s=100.0, ttl_s=2), 100.5)
    kept = [effect for effect in effects if isinstance(effect, Keep)]
    assert kept == [Keep(LeaseRecord(held=HELD, until_s=pytest.approx(100.0 + GOOD_FOR_S)))]
    (answer,) = told(effects)
    assert isinstance(answer, FenceResult)
    assert (answer.outcome, answer.attempt, answer.term) == ("confirmed", 1, 1)
    assert Thaw() not in effects, "nothing is led yet"
    assert Thaw() in driver.feed(Passed(), 100.6, LEADING)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(Denied(reason="b has it"), "refused"), (Unanswered(reason="no answer"), "unknown")],
)
def test_a_claim_that_is_not_granted_says_why(answer: Answer, outcome: str) -> None:
    driver = Driver()
    driver.feed(Wanted(CLAIM), 100.0, CLAIMING)
    (result,) = told(driver.answer(answer, 100.5))
    assert isinstance(result, FenceResult)
    assert (result.outcome, result.term) == (outcome, 0)


def test_a_grant_that_took_longer_than_it_counts_is_no_right_to_lead() -> None:
    driver = Driver()
    driver.feed(Wanted(CLAIM), 100.0, CLAIMING)
    (result,) = told(driver.answer(Granted(held=HELD, sent_s=100.0, ttl_s=2), 100.0 + GOOD_FOR_S))
    assert isinstance(result, FenceResult)
    assert result.outcome == "unknown"
    assert driver.question == Revoke(lease_id=7)


def test_what_is_led_is_frozen_when_the_lease_counts_no_more_and_not_before() -> None:
    driver = leading()
    assert Freeze() not in driver.feed(Passed(), 100.0 + GOOD_FOR_S - 0.001)
    effects = driver.feed(Passed(), 100.0 + GOOD_FOR_S)
    assert Freeze() in effects
    assert isinstance(told(effects)[0], LeaseInDoubt)


def test_a_renewal_counts_from_before_it_was_sent() -> None:
    driver = leading()
    driver.feed(Passed(), 100.5)
    assert driver.question == Renew(held=HELD)
    driver.answer(Granted(held=HELD, sent_s=100.5, ttl_s=2), 101.4)
    assert driver.lease.until_s == pytest.approx(100.5 + GOOD_FOR_S)


def test_it_runs_on_once_the_same_lease_was_renewed() -> None:
    driver = leading()
    driver.feed(Passed(), 100.5)
    driver.feed(Passed(), 102.0)
    assert driver.lease.closed
    effects = driver.answer(Granted(held=HELD, sent_s=102.0, ttl_s=2), 102.1)
    assert Thaw() in effects
    assert told(effects) == [LeaseStands()]
    assert effects.index(Thaw()) > next(n for n, each in enumerate(effects) if isinstance(each, Keep))


def test_an_etcd_that_does_not_answer_opens_nothing_and_is_asked_again() -> None:
    driver = leading()
    driver.feed(Passed(), 102.0)
    assert Thaw() not in driver.answer(Unanswered(reason="no answer"), 102.5)
    driver.feed(Passed(), 103.0)
    assert driver.question == Renew(held=HELD)


def test_a_lost_lease_freezes_at_once_and_the_term_is_asked_for_again() -> None:
    driver = leading()
    driver.feed(Passed(), 100.5)
    effects = driver.answer(Denied(reason="the lease is over"), 100.6)
    assert Freeze() in effects
    assert driver.question == Reclaim(term=1)
    effects = driver.answer(Denied(reason="b has claimed term 2", claimed_by="b"), 100.7)
    assert Thaw() not in effects
    assert told(effects) == [LeaseInDoubt("the lease is lost: b has claimed term 2", "b")]


def test_a_lease_that_nobody_needs_any_more_is_ended_and_the_gate_closed() -> None:
    driver = leading()
    effects = driver.feed(Passed(), 100.2, IDLE)
    assert {Drop(), Freeze()} <= set(effects)
    assert driver.question == Revoke(lease_id=7)


def test_of_a_lost_lease_the_guard_is_told_and_no_keeper_goes_on_with_it() -> None:
    driver = leading()
    driver.feed(Passed(), 100.5)
    effects = driver.answer(Denied(reason="the lease is over"), 100.6)
    over = Keep(LeaseRecord(until_s=100.6))
    assert effects.index(Freeze()) < effects.index(over) < len(effects) - 1
    assert not {Drop(), over} & set(driver.feed(Passed(), 100.7)), "once"
    begins = Driver(found(TERMS, over.record))
    assert Thaw() not in begins.feed(Passed(), 100.65, LEADING)
    assert begins.question == Reclaim(term=1)
    assert Drop() in driver.feed(Passed(), 100.8, IDLE), "once nothing runs here because of it"


def test_a_renewal_of_a_lease_that_was_let_go_of_meanwhile_opens_nothing() -> None:
    """The need comes back before the renewal is answered; the lease is to be ended."""
    driver = leading()
    driver.feed(Passed(), 100.5)
    assert driver.question == Renew(held=HELD)
    assert Drop() in driver.feed(Passed(), 100.6, IDLE)
    assert driver.question == Renew(held=HELD)
    driver.feed(Passed(), 100.7, LEADING)
    effects = driver.answer(Granted(held=HELD, sent_s=100.5, ttl_s=2), 100.8)
    assert {type(each) for each in effects}.isdisjoint({Thaw, Keep})
    assert driver.question == Revoke(lease_id=7)
    driver.answer(Seen(standing=driver.lease.standing), 100.9)
    assert driver.question == Reclaim(term=1)


def test_a_keeper_that_finds_a_good_lease_on_record_goes_on_with_it_and_renews_at_once() -> None:
    driver = Driver(found(TERMS, LeaseRecord(held=HELD, until_s=101.0)))
    effects = driver.feed(Passed(), 100.0, LEADING)
    assert effects[0] == Thaw()
    assert driver.question == Renew(held=HELD)


def test_a_keeper_that_finds_nothing_on_record_freezes_and_asks_whether_its_term_stands() -> None:
    driver = Driver()
    effects = driver.feed(Passed(), 100.0, LEADING)
    assert effects[0] == Freeze()
    assert driver.question == Reclaim(term=1)


def test_who_does_not_lead_looks_every_now_and_then() -> None:
    driver = Driver()
    driver.feed(Passed(), 100.0)
    assert driver.question == Look()
    driver.answer(Seen(standing=driver.lease.standing), 100.1)
    driver.feed(Passed(), 101.0)
    assert driver.question is None
    driver.feed(Passed(), 102.5)
    assert driver.question == Look()


def test_a_claim_that_earlier_questions_held_up_is_not_asked_for_any_more() -> None:
    driver = Driver()
    driver.feed(Passed(), 97.0)
    assert driver.question == Look()
    assert told(driver.feed(Wanted(CLAIM), 100.0, CLAIMING)) == []
    assert told(driver.feed(Passed(), 100.9)) == []
    (answer,) = told(driver.feed(Passed(), 101.0))
    assert isinstance(answer, FenceResult)
    assert (answer.outcome, answer.attempt) == ("unknown", 1)
    driver.answer(Seen(standing=driver.lease.standing), 101.1)
    assert not isinstance(driver.question, Claim)


def test_a_claim_that_is_being_asked_for_is_waited_for() -> None:
    driver = Driver()
    driver.feed(Passed(), 97.0)
    driver.answer(Seen(standing=driver.lease.standing), 97.0)
    driver.feed(Wanted(CLAIM), 100.0, CLAIMING)
    assert told(driver.feed(Passed(), 102.0)) == []
    assert driver.lease.claim == CLAIM


def test_who_claims_anew_after_it_lost_its_lease_is_told_nothing_until_it_has_one() -> None:
    driver = leading()
    assert [type(each) for each in told(driver.feed(Passed(), 100.0 + GOOD_FOR_S))] == [LeaseInDoubt]
    assert told(driver.feed(Passed(), 102.0, CLAIMING)) == [], "it still stands still for the lack of one"
    assert LeaseStands() in told(driver.feed(Passed(), 102.1, IDLE))


def test_only_one_question_is_asked_at_a_time() -> None:
    driver = leading()
    first = [
        each for at in (100.5, 100.6, 101.0) for each in driver.feed(Passed(), at) if isinstance(each, Ask)
    ]
    assert len(first) == 1


# --- what is said to etcd -----------------------------------------------------------------------------


class Talk:
    """Puts questions to an etcd of the simulator, at a moment of its choice."""

    def __init__(self, etcd: Etcd, node: str, boot_id: str = "boot") -> None:
        self.etcd, self.at_s = etcd, 0.0
        self.keys = LeaseKeys("w", node=node, boot_id=boot_id, ttl_s=2, clock=lambda: self.at_s)

    def ask(self, question: Question, *, fails: Sequence[bool] = ()) -> Answer:
        """Put a question; the calls that `fails` says are carried out, and their answers lost."""
        asking, lost = self.keys.ask(question), iter(fails)
        try:
            call = next(asking)
            while True:
                answered = self.etcd.handle(call, self.at_s)
                if next(lost, False):
                    call = asking.throw(UnreachableError("no answer"))
                else:
                    call = asking.send(answered)
        except StopIteration as ended:
            answer: Answer = ended.value
            return answer


def pair() -> tuple[Talk, Talk]:
    etcd = Etcd()
    return Talk(etcd, "a"), Talk(etcd, "b")


def claimed(talk: Talk, *, term: int, known: int, over: bool = False) -> Granted:
    answer = talk.ask(Claim(term=term, known=known, over=over, blank=True))
    assert isinstance(answer, Granted), answer
    return answer


def test_of_two_that_claim_one_is_denied_until_the_lease_is_over() -> None:
    a, b = pair()
    claimed(a, term=1, known=0)
    assert isinstance(b.ask(Claim(term=2, known=1, over=False, blank=True)), Denied)
    b.at_s = 2.0
    assert claimed(b, term=2, known=1).held.term == 2


def test_a_revoked_lease_is_over_at_once() -> None:
    a, b = pair()
    a.ask(Revoke(lease_id=claimed(a, term=1, known=0).held.lease_id))
    assert claimed(b, term=2, known=1).held.term == 2


def test_an_operator_passes_over_no_lease() -> None:
    a, b = pair()
    claimed(a, term=1, known=0)
    assert isinstance(b.ask(Claim(term=2, known=1, over=True, blank=True)), Denied)


def test_a_node_that_lost_its_disk_uses_no_term_twice() -> None:
    a, _ = pair()
    claimed(a, term=5, known=4)
    assert claimed(a, term=1, known=0).held.term == 6


def test_a_term_of_which_nothing_was_heard_is_passed_over_by_an_operator_only() -> None:
    a, b = pair()
    claimed(a, term=2, known=1)
    b.at_s = 2.0
    answer = b.ask(Claim(term=2, known=1, over=False, blank=True))
    assert isinstance(answer, Denied)
    assert "a has claimed term 2" in answer.reason
    assert isinstance(b.ask(Claim(term=2, known=1, unused=("a",), over=False)), Granted)
    a.at_s = 5.0
    assert claimed(a, term=2, known=1, over=True).held.term == 4


def test_a_renewal_sees_that_the_key_is_another_one() -> None:
    a, _ = pair()
    held = claimed(a, term=1, known=0).held
    assert isinstance(a.ask(Renew(held=held)), Granted)
    a.etcd.pairs = {key: value for key, value in a.etcd.pairs.items() if not value.lease}
    assert isinstance(a.ask(Renew(held=held)), Denied)


def test_a_lease_that_ran_out_is_not_renewed_and_the_term_is_had_again_if_nobody_claimed() -> None:
    a, b = pair()
    held = claimed(a, term=1, known=0).held
    a.at_s = b.at_s = 3.0
    assert isinstance(a.ask(Renew(held=held)), Denied)
    again = a.ask(Reclaim(term=1))
    assert isinstance(again, Granted)
    assert again.held.lease_id != held.lease_id
    a.at_s = b.at_s = 6.0
    claimed(b, term=2, known=1)
    answer = a.ask(Reclaim(term=1))
    assert answer == Denied(reason="b has claimed term 2", claimed_by="b")


def test_a_term_that_still_stands_is_had_again_with_another_lease_which_no_late_revocation_ends() -> None:
    """The claim that ended the first lease was given up here, and etcd has not carried that out yet."""
    a, _ = pair()
    first = claimed(a, term=1, known=0).held
    again = a.ask(Reclaim(term=1))
    assert isinstance(again, Granted)
    assert (again.held.term, again.held.lease_id != first.lease_id) == (1, True)
    a.ask(Revoke(lease_id=first.lease_id))
    assert a.etcd.leader("w", 0.0) == "a"
    assert isinstance(a.ask(Renew(held=again.held)), Granted)


def test_who_has_it_again_while_an_earlier_question_moves_the_key_is_denied_and_loses_nothing() -> None:
    a, _ = pair()
    claimed(a, term=1, known=0)
    slow = a.keys.ask(Reclaim(term=1))
    call = slow.send(a.etcd.handle(next(slow), 0.0))
    call = slow.send(a.etcd.handle(call, 0.0))  # its transaction is under way
    again = a.ask(Reclaim(term=1))
    assert isinstance(again, Granted)
    call = slow.send(a.etcd.handle(call, 0.0))
    with pytest.raises(StopIteration) as ended:
        slow.send(a.etcd.handle(call, 0.0))
    assert isinstance(ended.value.value, Denied)
    assert isinstance(a.ask(Renew(held=again.held)), Granted)


def test_a_term_of_an_earlier_boot_is_not_had_again() -> None:
    a, _ = pair()
    claimed(a, term=1, known=0)
    assert isinstance(Talk(a.etcd, "a", "another boot").ask(Reclaim(term=1)), Denied)


def test_a_term_after_one_that_etcd_did_not_give_is_given_only_if_all_are_accounted_for() -> None:
    a, b = pair()
    held = claimed(a, term=2, known=0)
    a.ask(Revoke(lease_id=held.held.lease_id))
    answer = b.ask(Claim(term=101, known=100, over=True, blank=False))
    assert isinstance(answer, Denied)
    assert "term 100 was led" in answer.reason
    assert isinstance(b.ask(Claim(term=101, known=100, over=True, blank=True)), Granted)


def test_an_etcd_that_has_lost_what_it_knew_gives_nobody_his_term_back() -> None:
    a, _ = pair()
    answer = a.ask(Reclaim(term=4))
    assert isinstance(answer, Denied)
    assert "lost what it knew" in answer.reason
    assert isinstance(a.ask(Claim(term=5, known=4, over=False, blank=False)), Denied)
    assert claimed(a, term=5, known=4).held.term == 5


def test_a_claim_whose_answer_was_lost_is_unanswered_and_the_next_one_ends_it_first() -> None:
    a, _ = pair()
    assert isinstance(
        a.ask(Claim(term=1, known=0, over=False, blank=True), fails=(False, False, True)), Unanswered
    )
    assert a.etcd.leader("w", 0.0) == "a"
    assert claimed(a, term=1, known=0).held.term == 2
    assert len(a.etcd.leases) == 1


def test_what_stands_there_can_be_looked_at() -> None:
    a, b = pair()
    claimed(a, term=1, known=0)
    answer = b.ask(Look())
    assert isinstance(answer, Seen)
    assert answer.standing.leader == Claimant(node="a", term=1, boot_id="boot")


def test_a_grant_that_counts_no_more_is_given_back_and_not_kept() -> None:
    driver = Driver()
    driver.feed(Passed(), 97.0)
    driver.answer(Seen(standing=driver.lease.standing), 97.0)
    driver.feed(Wanted(CLAIM), 100.0, CLAIMING)
    effects = driver.answer(Granted(held=HELD, sent_s=100.0, ttl_s=2), 101.9)
    (answer,) = told(effects)
    assert isinstance(answer, FenceResult)
    assert (answer.outcome, answer.term) == ("unknown", 0)
    assert not [effect for effect in effects if isinstance(effect, Keep)]
    assert driver.question == Revoke(lease_id=HELD.lease_id)


def test_a_lease_of_a_term_that_was_never_recorded_lets_nothing_run() -> None:
    claimed = LeaseRecord(held=Held(lease_id=9, revision=8, term=2), until_s=105.0)
    driver = Driver(found(TERMS, claimed))
    effects = driver.feed(Passed(), 100.0, LEADING)
    assert Thaw() not in effects
    assert Keep(LeaseRecord(until_s=100.0)) in effects, (
        "the guard keeps it closed, and so does the next keeper"
    )
    assert driver.question == Revoke(lease_id=9)
    driver.answer(Seen(standing=driver.lease.standing), 100.1)
    assert driver.question == Reclaim(term=1)


def test_a_lease_that_cannot_be_put_on_record_does_not_count() -> None:
    driver = leading()
    driver.lease = unrecorded(driver.lease, "the disk is full")
    effects = driver.feed(Passed(), 100.2)
    assert Freeze() in effects
    (doubt,) = told(effects)
    assert isinstance(doubt, LeaseInDoubt)
    assert "the disk is full" in doubt.reason


def test_a_renewal_that_the_leader_of_etcd_may_not_know_of_does_not_count() -> None:
    def renewed(by: int, seen_by: int) -> Answer:
        asking = LeaseKeys("w", node="a", boot_id="boot", ttl_s=2, clock=lambda: 100.0).ask(Renew(held=HELD))
        next(asking)
        alive = {"result": {"ID": 7, "TTL": 2, "header": {"raft_term": by}}}
        pair = {"key": base64.b64encode(b"/outlive/w/leader").decode(), "mod_revision": 3, "lease": 7}
        mine = Claimant(node="a", term=1, boot_id="boot")
        pair["value"] = base64.b64encode(msgspec.json.encode(mine)).decode()
        read = {"header": {"raft_term": seen_by}, "responses": [{"response_range": {"kvs": [pair]}}]}
        asking.send(msgspec.convert(alive, KeepaliveAnswer))
        with pytest.raises(StopIteration) as ended:
            asking.send(msgspec.convert(read, TxnAnswer))
        answer: Answer = ended.value.value
        return answer

    assert isinstance(renewed(4, 4), Granted)
    assert isinstance(renewed(4, 5), Unanswered)


@pytest.mark.parametrize("answer", [Unanswered(reason="no answer"), Denied(reason="another node was faster")])
def test_nothing_runs_on_a_lease_that_a_claim_which_failed_may_have_revoked(answer: Answer) -> None:
    """A leader in doubt claims anew: that ends its own lease first, whatever a renewal granted meanwhile."""
    driver = leading()
    driver.feed(Passed(), 100.0 + GOOD_FOR_S)
    driver.feed(Wanted(CLAIM), 102.0, CLAIMING)
    effects = driver.answer(Granted(held=HELD, sent_s=102.0, ttl_s=2), 102.1, CLAIMING)
    assert isinstance(driver.question, Claim)
    assert [type(each) for each in effects][-2:] == [Drop, Ask], "off the record before it may be revoked"
    assert driver.lease.held is None
    assert Thaw() not in driver.feed(Passed(), 102.15, LEADING), "its answer is not there yet"
    effects = driver.answer(answer, 102.2, LEADING)
    assert Thaw() not in effects
    assert (driver.lease.held, driver.lease.closed) == (None, True)
    assert isinstance(driver.question, Reclaim), "if it still stands, it is had again"
