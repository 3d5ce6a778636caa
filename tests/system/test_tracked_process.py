"""One process as the fast backend follows it: whose writes it learns of, and whose it must leave alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.identity import PageHasher
from primary import tracking
from primary.layers import LayerWriter
from primary.process import TrackedProcess
from tests.system.test_pages import Child

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="memory of other processes needs root"),
    pytest.mark.skipif(bool(tracking.problem()), reason="userfaultfd cannot track writes here"),
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


async def test_a_child_in_its_parents_memory_takes_nothing_from_the_parents_book(
    child: Child, writer: LayerWriter
) -> None:
    hasher = PageHasher()
    pages = child.map(_PAGES)
    child.do(f"ctypes.memset({pages.start}, 1, {_PAGES << 12}) and 0")
    stack = child.map(16)
    parent = TrackedProcess(child.pid)
    assert not parent.borrows_from([])
    await parent.track()
    assert not parent.problem
    parent.copy_written(hasher, writer)

    borrower_pid = child.do(_BORROWER.format(stack=stack.end, flags=_SHARE_MEMORY | signal.SIGCHLD))
    try:
        borrower = TrackedProcess(borrower_pid)
        assert borrower.borrows_from([parent])
        pages.write(7, value=9)
        await borrower.track()
        assert borrower.copy_written(hasher, writer) == 0
        before = parent.book.identity_of(pages.numbers[7:8]).copy()
        parent.copy_written(hasher, writer)
        assert (parent.book.identity_of(pages.numbers[7:8]) != before).any(), "the write went unnoticed"
        assert parent.book.known[np.isin(parent.book.numbers, pages.numbers)].all()
    finally:
        os.kill(borrower_pid, signal.SIGKILL)
        parent.close()


async def test_a_process_with_memory_of_its_own_borrows_none(child: Child) -> None:
    forked = child.do("fork()")
    try:
        parent, other = TrackedProcess(child.pid), TrackedProcess(forked)
        assert not other.borrows_from([parent])
        assert not other.borrows
    finally:
        os.kill(forked, signal.SIGKILL)


async def test_a_process_that_ended_is_no_lender(child: Child) -> None:
    other = Child()
    lender = TrackedProcess(other.pid)
    other.end()
    assert not TrackedProcess(child.pid).borrows_from([lender])
