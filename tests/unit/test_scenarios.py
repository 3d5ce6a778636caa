"""What the log of a prober says: who answered, how long nobody did, and whether two did."""

from __future__ import annotations

from tests.campaigns.scenarios import read_answers


def udp(at_s: float, host: int, life: int, count: int, *, said_s: float | None = None) -> str:
    return f"{at_s:.4f} udp {host} {life} {count} {at_s if said_s is None else said_s:.4f}\n"


def test_a_move_is_a_gap_another_host_and_another_life() -> None:
    log = udp(1.00, 1, 7, 100) + udp(1.01, 1, 7, 101) + udp(1.80, 2, 8, 90) + udp(1.81, 2, 8, 91)
    told = read_answers(log)
    assert (told.answered, told.lives, told.lost_count, told.two_answered) == (4, 2, 11, 0)
    assert told.outage_ms == 790.0


def test_two_hosts_that_answer_at_once_are_seen_in_either_way() -> None:
    arp = "1.0000 arp aa:00\n1.0004 arp bb:00\n1.0100 arp aa:00\n"
    assert read_answers(arp + udp(1.0, 1, 7, 1)).two_answered == 2
    assert read_answers(udp(1.00, 1, 7, 1) + udp(1.01, 2, 8, 1)).two_answered == 1
    assert read_answers("1.0 arp aa:00\n1.5 arp bb:00\n").two_answered == 0, "a move takes longer"


def test_an_answer_from_before_that_comes_late_is_no_second_one_that_answers() -> None:
    before = udp(1.00, 1, 7, 100) + udp(3.70, 2, 8, 90)
    log = before + udp(3.71, 1, 7, 101, said_s=1.01) + udp(3.72, 2, 8, 91)
    told = read_answers(log)
    assert (told.outage_ms, told.lost_count, told.two_answered) == (2700.0, 11, 0)
    assert read_answers(before + udp(3.71, 1, 7, 101) + udp(3.72, 2, 8, 91)).two_answered == 2


def test_only_what_came_after_it_broke_counts_and_a_torn_line_does_not() -> None:
    log = udp(1.0, 1, 7, 5) + udp(9.0, 1, 7, 6) + udp(9.01, 1, 7, 7) + "9.02 u"
    told = read_answers(log, since_s=9.5)
    assert (told.answered, told.outage_ms) == (2, 10.0)


def test_nobody_who_answers_is_an_endless_outage() -> None:
    assert read_answers("").outage_ms == float("inf")
