"""The store against a model: whatever is committed, folded, torn and re-opened, what it holds is right."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_disks import Content, UnsyncedDisk, commit, composed

from common.criu.images import SpaceKey
from common.model import EpochId
from replica.store import EpochStore

MAX_LEVELS = 4
KEYS = [SpaceKey("task", 1), SpaceKey("task", 2), SpaceKey("shmem", 9)]
FILLS = st.integers(0, 255) | st.just(0)
CHANGES = st.dictionaries(
    st.sampled_from(KEYS),
    st.none() | st.dictionaries(st.integers(0, 12), st.none() | FILLS, max_size=8),
    max_size=3,
)
"""For each space: gone (None), or for each page: gone (None) or what fills it now."""


def changed(content: Content, changes: dict[SpaceKey, dict[int, int | None] | None]) -> Content:
    after = {key: dict(pages) for key, pages in content.items()}
    for key, pages in changes.items():
        if pages is None:
            after.pop(key, None)
            continue
        space = after.setdefault(key, {})
        for number, fill in pages.items():
            if fill is None:
                space.pop(number, None)
            else:
                space[number] = fill
    return after


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="outlive-store-"))
        self.number = 0
        self.committed: dict[EpochId, Content] = {}
        self.store = self.opened()

    def opened(self) -> EpochStore:
        return EpochStore.open(
            self.directory, "web", min_free_bytes=0, max_levels=MAX_LEVELS, disk=UnsyncedDisk()
        )

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    def next_id(self) -> EpochId:
        self.number += 1
        return EpochId(1 + self.number // 7, self.number)

    @rule(changes=CHANGES, lazy=st.booleans())
    def commit_full(self, changes: dict[SpaceKey, dict[int, int | None] | None], lazy: bool) -> None:
        epoch = self.next_id()
        content = changed({}, changes)
        commit(self.store, epoch, content, lazy=lazy)
        self.committed[epoch] = content

    @precondition(lambda self: self.committed)
    @rule(
        changes=CHANGES,
        chunk_bytes=st.integers(1, 50_000).map(lambda n: max(n, 777)),
        resend=st.integers(0, 3),
        older=st.booleans(),
    )
    def commit_delta(
        self,
        changes: dict[SpaceKey, dict[int, int | None] | None],
        chunk_bytes: int,
        resend: int,
        older: bool,
    ) -> None:
        held = self.store.records()
        base = held[max(-2 if older else -1, -len(held))]
        if base.levels >= 2 * MAX_LEVELS:
            self.store.fold()
            return
        epoch = self.next_id()
        before = self.committed[base.id]
        content = changed(before, changes)
        commit(self.store, epoch, content, base.id, before, chunk_bytes=chunk_bytes, resend=resend)
        self.committed[epoch] = content

    @rule(changes=CHANGES)
    def tear(self, changes: dict[SpaceKey, dict[int, int | None] | None]) -> None:
        """An epoch that never ends."""
        commit(self.store, self.next_id(), changed({}, changes), finish=False)

    @rule()
    def fold(self) -> None:
        due = self.store.fold_due()
        report = self.store.fold()
        assert due or report is None
        assert not self.store.fold_due()
        newest = self.store.newest
        assert newest is None or newest.levels <= MAX_LEVELS // 2 or report is None

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.opened()
        assert not list((self.directory / "web" / "incoming").iterdir())
        assert not list((self.directory / "web" / "damaged").iterdir())

    @invariant()
    def the_newest_is_what_was_committed_last(self) -> None:
        newest = self.store.newest
        assert (newest.id if newest else None) == max(self.committed, default=None)

    @invariant()
    def the_two_newest_can_be_restored(self) -> None:
        held = [record.id for record in self.store.records()]
        assert held[-2:] == sorted(self.committed)[-2:]

    @invariant()
    def all_that_is_held_has_its_content_and_a_short_chain(self) -> None:
        for record in self.store.records():
            assert composed(record.path) == self.committed[record.id]
            assert record.levels <= 2 * MAX_LEVELS

    @invariant()
    def nothing_is_damaged(self) -> None:
        assert self.store.verify() == []


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
