"""Which pages count as changed: identities, tables of what a holder has, numbers that never repeat."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.criu.images import SpaceKey
from common.errors import CaptureError, StoreError
from common.identity import PageHasher, fresh_identity
from primary.capture import PageTable, SpacePages
from primary.numbering import EpochNumbers

KEY = SpaceKey("task", 1)


def space(pages: dict[int, int]) -> SpacePages:
    """Make a space whose pages (number to content) stand for themselves."""
    numbers = np.array(sorted(pages), dtype=np.uint64)
    identity = np.array([[pages[int(n)], 7] for n in numbers], dtype=np.uint64).reshape(-1, 2)
    return SpacePages.of(KEY, numbers, np.full(len(numbers), 4, dtype=np.uint8), identity)


contents = st.dictionaries(st.integers(0, 60), st.integers(1, 3), max_size=40)


@given(contents, contents)
def test_changed_is_what_the_holder_lacks_or_has_otherwise(held: dict[int, int], now: dict[int, int]) -> None:
    changed = PageTable([space(held)]).changed(space(now))
    assert changed.numbers.tolist() == [n for n, content in sorted(now.items()) if held.get(n) != content]


@given(contents)
def test_all_is_changed_for_a_holder_that_knows_nothing_of_the_space(now: dict[int, int]) -> None:
    assert PageTable([]).changed(space(now)).numbers.tolist() == sorted(now)


def image(tmp_path: Path, pages: list[bytes]) -> int:
    path = tmp_path / "pages"
    path.write_bytes(b"".join(pages))
    return os.open(path, os.O_RDONLY)


def test_equal_pages_are_identical_zeros_are_zero_and_the_secret_matters(tmp_path: Path) -> None:
    a, b, zero = b"a" * 4096, b"b" * 4096, bytes(4096)
    many = [a, b, zero, a] + [os.urandom(4096) for _ in range(1100)] + [zero, b]
    descriptor = image(tmp_path, many)
    identity = PageHasher(seed=1).identify_image(descriptor, len(many))
    assert identity[0].tolist() == identity[3].tolist()
    assert identity[0].tolist() != identity[1].tolist()
    assert identity[1].tolist() == identity[-1].tolist()
    assert identity[2].tolist() == identity[-2].tolist() == [0, 0]
    assert len({tuple(row) for row in identity.tolist()}) == 1103
    other = PageHasher(seed=2).identify_image(descriptor, len(many))
    assert (other[2] == 0).all()
    assert other[0].tolist() != identity[0].tolist()
    os.close(descriptor)


def test_what_gets_a_fresh_identity_is_sent_again_zeros_included() -> None:
    epochs = []
    for _ in range(2):
        made = space({1: 5, 2: 5, 3: 0})
        identity = made.identity.copy()
        identity[1:] = fresh_identity()
        epochs.append(SpacePages.of(KEY, made.numbers, made.flags, identity))
        assert not len(
            epochs[-1].identities.zeros(made.pages)
        )  # never taken for zeros: nothing is sent of them
    assert PageTable(epochs[:1]).changed(epochs[1]).numbers.tolist() == [2, 3]


def test_two_captures_may_hash_side_by_side(tmp_path: Path) -> None:
    first = image(tmp_path, [os.urandom(4096) for _ in range(3000)])
    (tmp_path / "other").mkdir()
    second = image(tmp_path / "other", [bytes(4096)] * 3000)
    hasher = PageHasher()
    alone = hasher.identify_image(first, 3000)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            one, two = (pool.submit(hasher.identify_image, each, 3000) for each in (first, second))
            assert np.array_equal(one.result(), alone)
            assert not two.result().any()
    os.close(first)
    os.close(second)


def test_an_image_that_ends_too_early_fails_the_epoch(tmp_path: Path) -> None:
    descriptor = image(tmp_path, [bytes(4096)] * 3)
    with pytest.raises(CaptureError, match="ends after 3"):
        PageHasher().identify_image(descriptor, 4)
    os.close(descriptor)


def test_numbers_grow_across_restarts_and_never_repeat(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        numbers = EpochNumbers(tmp_path / "state" / "mark")
        seen += [numbers.next() for _ in range(5)]
    assert seen == sorted(set(seen))


def test_numbers_begin_above_what_is_stored(tmp_path: Path) -> None:
    assert EpochNumbers(tmp_path / "mark", at_least=41).next() == 42


def test_a_damaged_mark_is_refused_and_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "mark").write_text("many")
    with pytest.raises(StoreError, match="does not hold an epoch number"):
        EpochNumbers(tmp_path / "mark")
