from hypothesis import given
from hypothesis import strategies as st

from common.rate import BURST_S, RateLimit


def test_no_bound_never_waits() -> None:
    limit = RateLimit(0)
    assert [limit.take(1 << 40, float(n)) for n in range(3)] == [0.0, 0.0, 0.0]


@given(
    st.integers(1, 1 << 30),
    st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 5)), min_size=1, max_size=50),
)
def test_who_waits_as_told_never_moves_more_than_allowed(rate: int, moves: list[tuple[int, float]]) -> None:
    """Over any stretch: at most what the rate allows, one burst, and the piece that is being moved."""
    limit = RateLimit(rate)
    now_s, sent = 100.0, []
    for size_bytes, pause_s in moves:
        sent.append((now_s, size_bytes))
        now_s += limit.take(size_bytes, now_s) + pause_s
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            moved = sum(size for _, size in sent[first:last])
            allowed = rate * (sent[last][0] - sent[first][0] + BURST_S)
            assert moved <= allowed * 1.000001 + 1


def test_the_rate_is_used_when_there_is_enough_to_move() -> None:
    limit, now_s = RateLimit(1000), 0.0
    for _ in range(100):
        now_s += limit.take(100, now_s)
    assert 9.8 <= now_s <= 10.0
