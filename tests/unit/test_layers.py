"""Layers of page contents against a plain model: what each page held at each epoch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.errors import CaptureError, NoSpaceError
from common.model import PAGE_BYTES, EpochId
from primary.layers import Layer, LayerChain, LayeredPages, LayerWriter
from primary.page_set import NO_PAGES, PageSet

TASK, SHARED = SpaceKey("task", 1), SpaceKey("shmem", 7)
MOST_LAYERS = 3

Contents = dict[SpaceKey, dict[int, int]]
"""What pages hold, as a number from which a page is made."""
Added = list[tuple[SpaceKey, dict[int, int]]]

ADDED: st.SearchStrategy[Added] = st.lists(
    st.tuples(
        st.sampled_from([TASK, SHARED]),
        st.dictionaries(st.integers(0, 12), st.integers(1, 250), max_size=8),
    ),
    max_size=4,
)


def page(seed: int) -> bytes:
    return seed.to_bytes(2, "little") * (PAGE_BYTES // 2)


def array(numbers: set[int] | list[int]) -> NDArray[np.uint64]:
    return np.array(sorted(numbers), dtype=np.uint64)


def every_row(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.arange(len(numbers), dtype=np.int64)


def add(writer: LayerWriter, key: SpaceKey, pages: dict[int, int], *, skipped: tuple[int, ...] = ()) -> None:
    """Add pages out of a buffer in which others, at the rows `skipped`, stand between them."""
    rows = [row for row in range(len(pages) + len(skipped)) if row not in skipped][: len(pages)]
    content = bytearray(b"\xee" * (PAGE_BYTES * (len(pages) + len(skipped))))
    for row, number in zip(rows, sorted(pages), strict=True):
        content[row * PAGE_BYTES : (row + 1) * PAGE_BYTES] = page(pages[number])
    writer.add(key, array(list(pages)), memoryview(content), np.array(rows, dtype=np.intp))


def written(directory: Path, number: int, added: Added) -> Layer:
    writer = LayerWriter(directory)
    for at, (key, pages) in enumerate(added):
        add(writer, key, pages, skipped=(1, 4)[: at % 3])
    return writer.seal(EpochId(1, number))


def read(pages: LayeredPages, key: SpaceKey, numbers: NDArray[np.uint64], wanted: list[int]) -> list[bytes]:
    rows = np.flatnonzero(np.isin(numbers, array(wanted)))
    into = memoryview(bytearray(len(rows) * PAGE_BYTES))
    pages.read(key, rows, into)
    return [bytes(into[at : at + PAGE_BYTES]) for at in range(0, len(into), PAGE_BYTES)]


def open_files(directory: Path) -> int:
    """How many nameless files of `directory` this process holds."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith(f"{directory}/")
    return count


class ChainAgainstHistory(RuleBasedStateMachine):
    """Epochs come, replicas move on, layers are merged: an epoch that is held reads as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.directory = Path(self._temporary.name).resolve()
        self.chain = LayerChain(self.directory, MOST_LAYERS)
        self.epoch = 0
        self.now: Contents = {TASK: {}, SHARED: {}}
        self.changed: list[tuple[int, Contents]] = []
        """Of the chain's layers: the epoch of each, and its pages."""
        self.readers: list[tuple[LayeredPages, Contents, Contents]] = []
        """An epoch, all that it has, and the part of it whose content is in its layers."""
        self.stands_on: int | None = None

    @rule(added=ADDED, gone=st.sets(st.integers(0, 12), max_size=3))
    def capture(self, added: Added, gone: set[int]) -> None:
        self.epoch += 1
        changes: Contents = {}
        for key in self.now:
            for number in gone & self.now[key].keys():
                del self.now[key][number]
        for key, pages in added:
            self.now[key] |= pages
            if pages:
                changes.setdefault(key, {}).update(pages)
        self.chain.append(written(self.directory, self.epoch, added))
        self.changed.append((self.epoch, changes))

    @rule()
    def hold(self) -> None:
        numbers = {key: PageSet.of(array(list(pages))) for key, pages in self.now.items()}
        has = {key: dict(pages) for key, pages in self.now.items()}
        self.readers.append((LayeredPages(self.chain.layers, numbers), has, self.content()))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.readers:
            at = data.draw(st.integers(0, len(self.readers) - 1))
            reader, has, _ = self.readers.pop(at)
            reader.release()
            reader.release()
            with pytest.raises(CaptureError, match="released"):
                read(reader, TASK, array(list(has[TASK])), [])

    @rule(back=st.integers(0, 4))
    def a_replica_moves_on(self, back: int) -> None:
        through = self.epoch - back
        self.chain.drop_through(EpochId(1, max(through, 0)))
        dropped = [epoch for epoch, _ in self.changed if epoch <= through]
        self.changed = [each for each in self.changed if each[0] > through]
        if dropped:
            self.stands_on = through

    @rule()
    def merge(self) -> None:
        self.chain.merge({key: PageSet.of(array(list(pages))) for key, pages in self.now.items()})
        if len(self.changed) > MOST_LAYERS:
            self.changed = [(self.changed[-1][0], self.content())]
        assert len(self.chain.layers) <= MOST_LAYERS

    def content(self) -> Contents:
        """What is present and whose content the chain has: the newest."""
        found: Contents = {key: {} for key in self.now}
        for _, changes in self.changed:
            for key, pages in changes.items():
                found[key] |= pages
        return {
            key: {number: seed for number, seed in pages.items() if number in self.now[key]}
            for key, pages in found.items()
        }

    @invariant()
    def the_chain_has_what_changed(self) -> None:
        assert [layer.epoch.epoch for layer in self.chain.layers] == [epoch for epoch, _ in self.changed]
        assert self.chain.stands_on == (None if self.stands_on is None else EpochId(1, self.stands_on))
        for key, pages in self.content().items():
            numbers = array(list(self.now[key]))
            marks = self.chain.covered(key, numbers)
            assert set(numbers[marks].tolist()) == pages.keys()
            assert pages.keys() <= set(self.chain.of(key).numbers.tolist()) <= set(range(13))

    @invariant()
    def what_is_held_reads_as_it_was(self) -> None:
        for reader, has, content in self.readers:
            for key, pages in content.items():
                numbers = array(list(has[key]))
                found = read(reader, key, numbers, list(pages))
                assert found == [page(pages[number]) for number in sorted(pages)]
                if missing := has[key].keys() - pages.keys():
                    with pytest.raises(CaptureError, match="not among what changed"):
                        read(reader, key, numbers, [*pages, *missing])

    def teardown(self) -> None:
        for reader, _, _ in self.readers:
            reader.release()
        self.chain.close()
        try:
            assert open_files(self.directory) == 0
        finally:
            self._temporary.cleanup()


TestChainAgainstHistory = ChainAgainstHistory.TestCase
TestChainAgainstHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert open_files(tmp_path) == 0, "a layer's file was left open"


@pytest.fixture
def chain(directory: Path) -> Iterator[LayerChain]:
    chain = LayerChain(directory)
    yield chain
    chain.close()


Layered = Callable[..., Layer]


@pytest.fixture
def layer(directory: Path, chain: LayerChain) -> Layered:
    """Make a layer of a task's pages and append it."""

    def made(number: int, pages: dict[int, int]) -> Layer:
        chain.append(written(directory, number, [(TASK, pages)]))
        return chain.layers[-1]

    return made


class TestALayer:
    def test_has_no_name_in_its_directory(self, directory: Path, layer: Layered) -> None:
        layer(1, {1: 1})
        assert list(directory.iterdir()) == []
        assert open_files(directory) == 1

    def test_has_the_last_of_what_was_added_for_a_page(self, directory: Path, chain: LayerChain) -> None:
        writer = LayerWriter(directory)
        for seed in (1, 2, 3):
            add(writer, TASK, {4: seed, 9: 10 * seed} if seed != 2 else {4: seed})
        assert writer.size_bytes == 5 * PAGE_BYTES
        chain.append(writer.seal(EpochId(1, 1)))
        assert chain.layers[0].pages == 2
        assert chain.layers[0].keys == (TASK,)
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([4, 9]))})
        assert read(reader, TASK, array([4, 9]), [4, 9]) == [page(3), page(30)]
        reader.release()

    def test_takes_scattered_pages_out_of_a_buffer(self, directory: Path, chain: LayerChain) -> None:
        writer = LayerWriter(directory)
        add(writer, TASK, {1: 1, 2: 2, 5: 5, 6: 6}, skipped=(0, 2, 5))
        chain.append(writer.seal(EpochId(1, 1)))
        numbers = array([1, 2, 5, 6])
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(numbers)})
        assert read(reader, TASK, numbers, [1, 2, 5, 6]) == [page(1), page(2), page(5), page(6)]
        reader.release()

    def test_knows_no_page_of_a_space_that_it_lacks(self, layer: Layered) -> None:
        made = layer(1, {1: 1})
        assert made.places(SHARED, array([1])).tolist() == [-1]
        assert made.of(SHARED) == NO_PAGES

    def test_knows_no_page_beyond_its_last(self, layer: Layered) -> None:
        assert layer(1, {1: 1, 5: 5}).places(TASK, array([0, 1, 3, 5, 9])).tolist() == [-1, 0, -1, 1, -1]

    def test_to_which_nothing_is_added_is_empty(self, directory: Path, chain: LayerChain) -> None:
        writer = LayerWriter(directory)
        add(writer, TASK, {})
        chain.append(writer.seal(EpochId(1, 1)))
        assert chain.layers[0].pages == 0
        assert chain.covered(TASK, array([1])).tolist() == [False]

    def test_that_is_thrown_away_unsealed_leaves_nothing(self, directory: Path) -> None:
        writer = LayerWriter(directory)
        add(writer, TASK, {1: 1})
        writer.drop()
        assert open_files(directory) == 0

    def test_that_finds_no_room_says_what_to_do(self, directory: Path) -> None:
        writer = LayerWriter(directory)
        os.dup2(full := os.open("/dev/full", os.O_RDWR), writer._file)
        os.close(full)
        with pytest.raises(NoSpaceError, match="cannot be kept") as caught:
            add(writer, TASK, {1: 1})
        assert "tmpfs" in caught.value.hint
        writer.drop()

    def test_cannot_be_begun_where_no_directory_is(self, tmp_path: Path) -> None:
        with pytest.raises(CaptureError, match="no file for pages"):
            LayerWriter(tmp_path / "missing")


class TestAnEpochsPages:
    def test_come_out_of_the_newest_layer_that_has_them(self, chain: LayerChain, layer: Layered) -> None:
        layer(1, {1: 11, 2: 12, 3: 13})
        layer(2, {2: 22})
        layer(3, {1: 31})
        numbers = array([1, 2, 3])
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(numbers)})
        assert read(reader, TASK, numbers, [1, 2, 3]) == [page(31), page(22), page(13)]
        assert read(reader, TASK, numbers, [2]) == [page(22)]
        assert read(reader, TASK, numbers, []) == []
        reader.release()

    def test_are_not_those_of_epochs_that_came_later(self, chain: LayerChain, layer: Layered) -> None:
        layer(1, {1: 11})
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1]))})
        layer(2, {1: 22})
        assert read(reader, TASK, array([1]), [1]) == [page(11)]
        reader.release()

    def test_outlive_the_chain(self, directory: Path, chain: LayerChain, layer: Layered) -> None:
        layer(1, {1: 11})
        layer(2, {2: 22})
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1, 2]))})
        chain.drop_through(EpochId(1, 1))
        chain.close()
        chain.close()
        assert open_files(directory) == 2
        assert read(reader, TASK, array([1, 2]), [1, 2]) == [page(11), page(22)]
        reader.release()
        assert open_files(directory) == 0

    def test_are_gone_for_one_epoch_that_is_released_and_not_for_another(
        self, directory: Path, chain: LayerChain, layer: Layered
    ) -> None:
        layer(1, {1: 11})
        one, two = (LayeredPages(chain.layers, {TASK: PageSet.of(array([1]))}) for _ in range(2))
        chain.close()
        one.release()
        one.release()
        with pytest.raises(CaptureError, match="released"):
            read(one, TASK, array([1]), [1])
        assert read(two, TASK, array([1]), [1]) == [page(11)]
        two.release()
        assert open_files(directory) == 0

    def test_that_no_layer_has_cannot_be_read(self, chain: LayerChain, layer: Layered) -> None:
        layer(1, {1: 11})
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1, 2]))})
        with pytest.raises(CaptureError, match="0x2 is not among what changed"):
            read(reader, TASK, array([1, 2]), [1, 2])
        reader.release()

    def test_of_a_space_that_the_epoch_does_not_have_cannot_be_read(
        self, chain: LayerChain, layer: Layered
    ) -> None:
        layer(1, {1: 11})
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1]))})
        with pytest.raises(CaptureError):
            reader.read(SHARED, np.array([0]), memoryview(bytearray(PAGE_BYTES)))
        reader.release()

    def test_that_vanished_from_the_file_are_an_error(self, chain: LayerChain, layer: Layered) -> None:
        os.ftruncate(layer(1, {1: 11})._file, 100)
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1]))})
        with pytest.raises(CaptureError, match="gone"):
            read(reader, TASK, array([1]), [1])
        reader.release()


class TestTheChain:
    def test_stands_on_nothing_until_a_layer_is_dropped(self, chain: LayerChain, layer: Layered) -> None:
        assert chain.stands_on is None
        layer(3, {1: 1})
        chain.drop_through(EpochId(1, 2))
        assert chain.stands_on is None
        chain.drop_through(EpochId(1, 3))
        assert chain.stands_on == EpochId(1, 3)
        assert chain.layers == ()

    def test_never_moves_back(self, chain: LayerChain, layer: Layered) -> None:
        for number in (1, 2, 3):
            layer(number, {1: number})
        chain.drop_through(EpochId(1, 2))
        chain.drop_through(EpochId(1, 1))
        assert chain.stands_on == EpochId(1, 2)
        assert [each.epoch.epoch for each in chain.layers] == [3]

    def test_keeps_a_merged_layer_until_its_newest_change_is_held(
        self, directory: Path, layer: Layered
    ) -> None:
        chain = LayerChain(directory, most_layers=1)
        chain.append(written(directory, 1, [(TASK, {1: 11})]))
        chain.append(written(directory, 2, [(TASK, {2: 22})]))
        chain.merge({TASK: PageSet.of(array([1, 2]))})
        chain.drop_through(EpochId(1, 1))
        assert chain.covered(TASK, array([1, 2])).all()
        chain.drop_through(EpochId(1, 2))
        assert not chain.covered(TASK, array([1, 2])).any()
        chain.close()

    def test_merges_the_newest_of_what_is_present_and_gives_the_rest_back(self, directory: Path) -> None:
        chain = LayerChain(directory, most_layers=2)
        for number in (1, 2, 3):
            pages = {number: number, 8: 10 * number, 9: number}
            chain.append(written(directory, number, [(TASK, pages), (SHARED, {1: number})]))
        chain.merge({TASK: PageSet.of(array([1, 2, 3, 4, 8])), SpaceKey("task", 2): PageSet.of(array([1]))})
        (merged,) = chain.layers
        assert open_files(directory) == 1
        assert merged.epoch == EpochId(1, 3)
        assert merged.keys == (TASK,), "nobody has the other space any more"
        assert merged.of(TASK).numbers.tolist() == [1, 2, 3, 8]
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1, 2, 3, 8]))})
        assert read(reader, TASK, array([1, 2, 3, 8]), [1, 2, 3, 8]) == [page(n) for n in (1, 2, 3, 30)]
        reader.release()
        chain.close()

    def test_merges_more_pages_than_are_copied_at_once(self, directory: Path) -> None:
        chain = LayerChain(directory, most_layers=1)
        even, odd = {n: n + 1 for n in range(0, 600, 2)}, {n: n + 1 for n in range(1, 600, 2)}
        for number, pages in enumerate((even, odd), 1):
            chain.append(written(directory, number, [(TASK, pages)]))
        numbers = array(list(range(600)))
        chain.merge({TASK: PageSet.of(numbers)})
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(numbers)})
        assert read(reader, TASK, numbers, list(range(600))) == [page(n + 1) for n in range(600)]
        reader.release()
        chain.close()

    def test_that_cannot_be_merged_is_as_it_was(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chain = LayerChain(directory, most_layers=1)
        for number in (1, 2):
            chain.append(written(directory, number, [(TASK, {number: number})]))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *_: 0)
            with pytest.raises(NoSpaceError):
                chain.merge({TASK: PageSet.of(array([1, 2]))})
        assert [each.epoch.epoch for each in chain.layers] == [1, 2]
        reader = LayeredPages(chain.layers, {TASK: PageSet.of(array([1, 2]))})
        assert read(reader, TASK, array([1, 2]), [1, 2]) == [page(1), page(2)]
        reader.release()
        chain.close()
        assert open_files(directory) == 0

    def test_of_a_later_term_goes_beyond_an_earlier_one(self, directory: Path, chain: LayerChain) -> None:
        chain.append(written(directory, 9, [(TASK, {1: 1})]))
        chain.drop_through(EpochId(2, 1))
        assert chain.layers == ()
