"""One process as the fast backend follows it: whose writes it learns of, and whose it must leave alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.identity import PageHasher
from primary import userfault
from primary.layers import LayerWriter
from primary.process import TrackedProcess
from primary.userfault import UserfaultTracker
from tests.system.test_pages import Child

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
    pytest.mark.skipif(bool(userfault.problem()), reason="userfaultfd cannot track writes here"),
]

_PAGES = 2048
_SHARE_MEMORY = 0x100
_BORROWER = "libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), ctypes.c_void_p({stack}), {flags}, None)"


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LayerWriter]:
    writer = LayerWriter(tmp_path)
    yield writer
    writer.drop()


async def copied(
    tracker: UserfaultTracker, process: TrackedProcess, hasher: PageHasher, writer: LayerWriter
) -> None:
    await tracker.copy_ahead([process], hasher, writer)


async def test_a_child_in_its_parents_memory_takes_nothing_from_the_parents_book(
    child: Child, writer: LayerWriter
) -> None:
    hasher, tracker = PageHasher(), UserfaultTracker()
    pages = child.map(_PAGES)
    child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
    stack = child.map(16)
    parent = TrackedProcess(child.pid, tracker.space(child.pid))
    assert not parent.borrows_from([])
    await tracker.take_up(parent)
    await copied(tracker, parent, hasher, writer)
    assert parent.book.known[np.isin(parent.book.numbers, pages.numbers)].sum() == _PAGES

    borrower_pid = child.do(_BORROWER.format(stack=stack.end, flags=_SHARE_MEMORY | signal.SIGCHLD))
    try:
        borrower = TrackedProcess(borrower_pid, tracker.space(borrower_pid))
        assert borrower.borrows_from([parent])
        pages.write(7, value=9)
        for _ in range(2):  # small ones are not taken up at once
            await tracker.take_up(borrower)
        await copied(tracker, borrower, hasher, writer)
        assert not len(borrower.book.numbers)
        before = parent.book.identity_of(pages.numbers[7:8]).copy()
        await copied(tracker, parent, hasher, writer)
        assert (parent.book.identity_of(pages.numbers[7:8]) != before).any(), "the write went unnoticed"
        assert parent.book.known[np.isin(parent.book.numbers, pages.numbers)].all()
    finally:
        os.kill(borrower_pid, signal.SIGKILL)
        tracker.let_go(parent)


async def test_a_process_with_memory_of_its_own_borrows_none(child: Child) -> None:
    forked = child.do("fork()")
    try:
        parent, other = (TrackedProcess(pid, UserfaultTracker().space(pid)) for pid in (child.pid, forked))
        assert not other.borrows_from([parent])
        assert not other.borrows
    finally:
        os.kill(forked, signal.SIGKILL)


async def test_a_process_that_ended_is_no_lender(child: Child) -> None:
    other = Child()
    lender = TrackedProcess(other.pid, UserfaultTracker().space(other.pid))
    other.end()
    assert not TrackedProcess(child.pid, UserfaultTracker().space(child.pid)).borrows_from([lender])
