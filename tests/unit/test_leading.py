"""The capture loop of a led workload, with a backend and streams that live in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from common.config import Node, NodeConfig, Peer
from common.control import ReplicaProgress
from common.errors import CaptureError
from common.events import Event, EventLog, EventRecord, read_events
from common.model import EpochId, WorkloadSpec
from outlive import leading
from outlive.leading import Leading, clear_images
from outlive.verifying import Verifier
from primary.backlog import Backlog, SharedEpoch
from primary.capture import CapturedEpoch
from primary.numbering import EpochNumbers
from primary.page_set import PageSet
from primary.stream import StreamCounters, Unacknowledged
from primary.verification import HURRIED_PAGES
from tests.unit.wire_fakes import TASK, captured, page, until

TERM = 4


class BackendInMemory:
    """Yields an epoch of one page at every call, or what `outcomes` says for the next ones."""

    name = "stock"

    def __init__(self) -> None:
        self.epochs: list[CapturedEpoch] = []
        self.calls = 0
        self.since: list[EpochId | None] = []
        self.outcomes: list[Exception] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.closed = False

    async def capture(self, epoch: EpochId, since: EpochId | None = None) -> CapturedEpoch:
        self.calls += 1
        self.since.append(since)
        await self.may_end.wait()
        if self.outcomes:
            raise self.outcomes.pop(0)
        taken = captured(epoch.epoch, {TASK: {1: page(epoch.epoch)}}, term=epoch.term)
        self.epochs.append(taken)
        return taken

    async def close(self) -> None:
        self.closed = True

    @property
    def unreleased(self) -> list[EpochId]:
        return [epoch.id for epoch in self.epochs if epoch.pages.released != 1]  # type: ignore[attr-defined]


class StreamInMemory:
    """A replica that acknowledges as soon as it is let to; keeps offers as the real one does."""

    def __init__(
        self,
        node: str,
        on_acknowledged: Callable[[EpochId], None],
        on_left: Callable[[Unacknowledged], None],
    ) -> None:
        self.node = node
        self.problem = ""
        self._on_acknowledged = on_acknowledged
        self._on_left = on_left
        self._backlog = Backlog()
        self.connected = True
        self.offered: list[EpochId] = []
        self.acknowledged: list[EpochId] = []
        self.restorable = True
        self.may_acknowledge = asyncio.Event()
        self.may_acknowledge.set()

    def offer(self, shared: SharedEpoch) -> None:
        self.offered.append(shared.epoch.id)
        self._backlog.put(shared, 0.0)

    @property
    def wants_epoch(self) -> bool:
        return self.connected and self._backlog.empty

    @property
    def held(self) -> EpochId | None:
        return self.acknowledged[-1] if self.acknowledged else None

    @property
    def progress(self) -> ReplicaProgress:
        return ReplicaProgress(
            node=self.node,
            connected=self.connected,
            acknowledged=self.held,
            restorable=self.restorable,
            reasons=() if self.restorable else ("port 6379 is taken",),
        )

    @property
    def counters(self) -> StreamCounters:
        sent_bytes = 10 if self.connected and self.offered else 0
        return StreamCounters(sent_bytes, 100, len(self.acknowledged), (1.5,) * len(self.acknowledged))

    async def run(self) -> None:
        try:
            while True:
                offer = await self._backlog.take()
                try:
                    await self.may_acknowledge.wait()
                except BaseException:
                    self._backlog.put_back(offer)
                    raise
                self.acknowledged.append(offer.epoch.id)
                self._on_acknowledged(offer.epoch.id)
                offer.shared.drop()
        finally:
            if (left := self._backlog.close()) is not None:
                self._on_left(Unacknowledged(left.shared, None))


class FreezerInMemory:
    """A cgroup that obeys."""

    def __init__(self) -> None:
        self.is_kept = False
        self.left = False
        self.at_keep: Callable[[], object] = lambda: None

    def keep(self, within_s: float) -> None:
        self.is_kept = True
        self.at_keep()

    def leave(self) -> None:
        self.left = True

    def thaw(self) -> None:
        self.is_kept = False


class Scene:
    """One `Leading` on node a with replicas b and c."""

    def __init__(self, directory: Path, **fields: object) -> None:
        self.backend = BackendInMemory()
        self.streams: dict[str, StreamInMemory] = {}
        self.freezer = FreezerInMemory()
        self.left: dict[str, CapturedEpoch] = {}
        self.kept: list[EpochId] = []
        self.file = directory / "events.jsonl"
        self.log = EventLog(self.file, "agent")
        self.verifier = Verifier("redis", 500, self.log)
        declared = {"nodes": ("a", "b", "c"), "epoch_interval_ms": 20} | fields
        spec = WorkloadSpec(name="redis", command=("x",), **declared)  # type: ignore[arg-type]
        self.leading = Leading(
            NodeConfig(
                node=Node(name="a", address="127.0.0.1"),
                peers=tuple(Peer(name=name, address="127.0.0.1", public_key=name * 40) for name in "bc"),
            ),
            spec,
            term=TERM,
            incarnation="first",
            backend=self.backend,
            numbers=EpochNumbers(directory / "mark"),
            make_stream=self._make_stream,  # type: ignore[arg-type]
            events=self.log,
            verifier=self.verifier,
            freezer=self.freezer,  # type: ignore[arg-type]
        )

    def _make_stream(
        self,
        peer: Peer,
        on_acknowledged: Callable[[EpochId], None],
        on_left: Callable[[Unacknowledged], None],
    ) -> StreamInMemory:
        self.streams[peer.name] = StreamInMemory(peer.name, on_acknowledged, on_left)
        return self.streams[peer.name]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.leading.run())
        try:
            yield
        finally:
            assert not task.done(), task.exception()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.left = {node: each.shared.epoch for node, each in self.leading.take_unacknowledged().items()}
            self.kept = self.backend.unreleased
            for each in self.left.values():
                each.release()

    def events(self, kind: str = "capture.") -> list[EventRecord]:
        self.log.close()
        return [each for each in read_events(self.file) if each.event.startswith(kind)]


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "_FIRST_BACKOFF_S", 0.002)


async def test_there_is_a_stream_to_every_node_but_this_one(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert sorted(scene.streams) == ["b", "c"]


async def test_epochs_of_the_term_go_to_every_replica_with_growing_numbers(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with scene.running():
        await until(lambda: len(scene.streams["c"].acknowledged) >= 3)
    for stream in scene.streams.values():
        assert {epoch.term for epoch in stream.offered} == {TERM}
        assert stream.offered == sorted(set(stream.offered))
        assert stream.offered == [epoch.id for epoch in scene.backend.epochs]
    assert scene.leading.captured == scene.backend.epochs[-1].id


async def test_nothing_is_captured_while_nobody_is_connected(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for stream in scene.streams.values():
        stream.connected = False
    async with scene.running():
        await asyncio.sleep(0.15)
        assert scene.backend.calls == 0
        assert scene.leading.captured is None
        scene.streams["c"].connected = True
        await until(lambda: scene.backend.calls >= 2)


async def test_nothing_is_captured_while_every_replica_has_an_epoch_waiting(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for stream in scene.streams.values():
        stream.may_acknowledge.clear()
    async with scene.running():
        await until(lambda: scene.backend.calls == 2)  # one in flight, one waiting
        await asyncio.sleep(0.15)
        assert scene.backend.calls == 2
        scene.streams["b"].may_acknowledge.set()
        await until(lambda: scene.backend.calls >= 5)


async def test_a_replica_that_hangs_slows_no_other_and_holds_two_epochs_at_most(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.streams["c"].may_acknowledge.clear()
    async with scene.running():
        await until(lambda: len(scene.streams["b"].acknowledged) >= 6)
        assert len(scene.backend.unreleased) <= 4  # of c: in flight, waiting; of b: the same
        assert scene.streams["c"].acknowledged == []


async def test_the_first_capture_is_told_that_nobody_holds_anything(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with scene.running():
        await until(lambda: scene.backend.calls)
    assert scene.backend.since[0] is None


async def test_a_capture_is_told_the_oldest_epoch_that_a_connected_replica_holds(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    b, c = scene.streams["b"], scene.streams["c"]
    async with scene.running():
        await until(lambda: b.acknowledged and c.acknowledged)
        c.may_acknowledge.clear()
        await until(lambda: len(b.acknowledged) > len(c.acknowledged) + 1)
        calls = scene.backend.calls
        await until(lambda: scene.backend.calls >= calls + 2)
        assert c.held is not None
        assert scene.backend.since[-1] == c.held
        assert c.held < b.acknowledged[-2]
    told = [each for each in scene.backend.since if each is not None]
    assert told == sorted(told)
    taken = zip(scene.backend.since, scene.backend.epochs, strict=False)  # the last may have been cut short
    assert all(since is None or since < epoch.id for since, epoch in taken)


async def test_a_capture_is_told_of_no_epoch_while_a_connected_replica_holds_none(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.streams["c"].may_acknowledge.clear()
    async with scene.running():
        await until(lambda: len(scene.streams["b"].acknowledged) >= 3)
    assert set(scene.backend.since) == {None}


async def test_what_a_replica_holds_that_is_not_connected_holds_up_no_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.streams["c"].connected = False
    scene.streams["c"].may_acknowledge.clear()
    async with scene.running():
        b = scene.streams["b"]
        await until(lambda: len(b.acknowledged) >= 3)
        calls = scene.backend.calls
        await until(lambda: scene.backend.calls > calls)
        assert scene.backend.since[-1] is not None
        assert scene.backend.since[-1] >= b.acknowledged[1]
        scene.streams["c"].connected = True  # it has nothing yet
        calls = scene.backend.calls
        await until(lambda: scene.backend.calls > calls)
        assert scene.backend.since[-1] is None


async def test_epochs_keep_their_distance(tmp_path: Path) -> None:
    scene = Scene(tmp_path, epoch_interval_ms=100)
    async with scene.running():
        await until(lambda: scene.leading.metrics().epochs_acknowledged >= 4)
    assert min(scene.leading.metrics().interval_ms) > 50


async def test_a_failed_capture_is_tried_again_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "_FIRST_BACKOFF_S", 0.05)
    scene = Scene(tmp_path)
    scene.backend.outcomes = [CaptureError("no") for _ in range(100)]
    async with scene.running():
        await asyncio.sleep(0.5)
        assert 2 <= scene.backend.calls <= 5  # after 0, 50, 150, 350 ms
        assert scene.leading.failures == scene.backend.calls
    assert scene.leading.captured is None


@pytest.mark.usefixtures("quick_backoff")
async def test_the_third_failure_in_a_row_is_an_event_and_so_is_the_recovery(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.backend.outcomes = [CaptureError(f"failure {number}") for number in range(1, 6)]
    async with scene.running():
        await until(lambda: len(scene.backend.epochs) >= 2)
        assert scene.leading.failures == 0
    failed, recovered = scene.events()
    assert (failed.event, recovered.event) == (Event.CAPTURE_FAILED, Event.CAPTURE_RECOVERED)
    assert "failure 3" in failed.reason
    assert failed.workload == "redis"
    assert "5 failures" in recovered.reason


@pytest.mark.usefixtures("quick_backoff")
async def test_two_failures_in_a_row_are_no_event(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.backend.outcomes = [CaptureError("no"), CaptureError("no")]
    async with scene.running():
        await until(lambda: scene.backend.epochs)
    assert scene.events() == []


async def test_metrics_count_what_was_captured_and_acknowledged(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with scene.running():
        await until(lambda: scene.leading.metrics().epochs_acknowledged >= 3)
    metrics = scene.leading.metrics()
    assert metrics.name == "redis"
    assert metrics.backend == "stock"
    assert metrics.epochs_captured == len(scene.backend.epochs) == len(metrics.freeze_ms)
    assert metrics.epochs_acknowledged <= metrics.epochs_captured  # each once, though two replicas did
    assert metrics.freeze_ms[0] == pytest.approx(0.3)
    assert metrics.memory_bytes == 4096
    assert metrics.bytes_sent == 20
    assert metrics.bytes_full == 200
    assert {each.node for each in scene.leading.progress()} == {"b", "c"}


async def test_intervals_are_those_between_epochs_acknowledged_one_after_the_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path, epoch_interval_ms=30)
    b, c = scene.streams["b"], scene.streams["c"]
    c.connected = False
    c.may_acknowledge.clear()
    b.may_acknowledge.clear()
    async with scene.running():
        await until(lambda: scene.backend.calls == 2)
        assert scene.leading.metrics().interval_ms == ()
        b.may_acknowledge.set()
        await until(lambda: scene.leading.metrics().epochs_acknowledged >= 5)
        metrics = scene.leading.metrics()
        assert len(metrics.interval_ms) == metrics.epochs_acknowledged - 1
        assert all(value > 0 for value in metrics.interval_ms)


async def test_it_is_told_when_a_replica_comes_goes_and_has_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "_TELL_EVERY_S", 0.005)
    scene = Scene(tmp_path)
    scene.streams["c"].connected = False
    scene.streams["c"].may_acknowledge.clear()
    scene.streams["c"].problem = "c does not answer"
    async with scene.running():
        await until(lambda: len(scene.streams["b"].acknowledged) >= 2)
        await asyncio.sleep(0.05)
        (b, c) = scene.leading.progress()
        assert b.reasons == ()
        assert c.reasons == ("c does not answer",)
        scene.streams["b"].connected = False
        await asyncio.sleep(0.05)
    told = [*scene.events("replica."), *scene.events("base.")]
    assert [each.event for each in told] == [
        Event.REPLICA_CONNECTED,
        Event.REPLICA_DISCONNECTED,
        Event.BASE_STARTED,
        Event.BASE_FINISHED,
    ]
    assert all(each.fields == {"peer": "b"} and each.reason for each in told)


async def test_an_acknowledgement_of_an_older_epoch_counts_no_more(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    b, c = scene.streams["b"], scene.streams["c"]
    c.may_acknowledge.clear()
    async with scene.running():
        await until(lambda: len(b.acknowledged) >= 4)
        b.may_acknowledge.clear()
        await asyncio.sleep(0.05)
        before = scene.leading.metrics()
        c.connected = b.connected = False
        c.may_acknowledge.set()
        await until(lambda: c.acknowledged)
        assert c.acknowledged[0] < b.acknowledged[-1]
        after = scene.leading.metrics()
        newer = sum(epoch > b.acknowledged[-1] for epoch in c.acknowledged)
        assert after.epochs_acknowledged == before.epochs_acknowledged + newer


async def test_every_captured_epoch_is_released_in_the_end(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.streams["c"].may_acknowledge.clear()  # holds one in flight, one waiting
    async with scene.running():
        await until(lambda: len(scene.streams["b"].acknowledged) >= 3)
        assert scene.backend.unreleased
    assert scene.backend.unreleased == []
    assert scene.backend.closed


async def test_at_its_end_it_hands_over_the_newest_epoch_that_nobody_acknowledged(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    b, c = scene.streams["b"], scene.streams["c"]
    async with scene.running():
        await until(lambda: len(b.acknowledged) >= 2)
        b.may_acknowledge.clear()
        c.may_acknowledge.clear()
        await until(lambda: not b.wants_epoch and not c.wants_epoch)
    assert scene.left["b"].id == scene.backend.epochs[-1].id
    assert scene.kept == sorted({each.id for each in scene.left.values()})


async def test_what_one_replica_acknowledged_is_not_handed_over_though_another_lacks_it(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path)
    scene.streams["c"].may_acknowledge.clear()
    async with scene.running():
        await until(lambda: len(scene.streams["b"].acknowledged) >= 3)
        scene.streams["b"].connected = scene.streams["c"].connected = False
        await until(lambda: scene.streams["b"].acknowledged[-1] == scene.backend.epochs[-1].id)
    assert scene.left == {}
    assert scene.kept == []


async def test_an_end_in_the_midst_of_a_capture_leaves_no_epoch_behind(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with scene.running():
        await until(lambda: len(scene.backend.epochs) >= 2)
        scene.backend.may_end.clear()
        calls = scene.backend.calls
        await until(lambda: scene.backend.calls > calls)
    assert scene.backend.unreleased == []
    assert scene.backend.closed
    assert scene.backend.calls == len(scene.backend.epochs) + 1


def test_what_an_earlier_agent_captured_is_removed(tmp_path: Path) -> None:
    (tmp_path / "redis" / "t1-e1").mkdir(parents=True)
    (tmp_path / "redis" / "t1-e1" / "pages-1.img").write_bytes(b"x")
    (tmp_path / "redis" / "letters").mkdir()
    (tmp_path / "Photos" / "t1-e1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"x")
    (tmp_path / "redis" / "t1-e2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "redis" / "t1-e3").write_bytes(b"no directory")
    clear_images(tmp_path)
    assert (tmp_path / "elsewhere" / "kept").exists(), "links are not followed"
    assert (tmp_path / "redis" / "t1-e3").exists()
    assert not (tmp_path / "redis" / "t1-e1").exists()
    assert (tmp_path / "redis" / "letters").exists(), "what is not an epoch is somebody else's"
    assert (tmp_path / "Photos" / "t1-e1").exists()
    clear_images(tmp_path)


async def test_a_node_that_is_no_peer_is_told_of_and_hinders_no_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path, nodes=("a", "b", "z"))
    async with scene.running():
        await until(lambda: scene.streams["b"].acknowledged)
        stranger = scene.leading.progress()[-1]
        assert (stranger.node, stranger.connected) == ("z", False)
        assert "[[peers]]" in stranger.reasons[0]


async def test_everything_is_compared_at_once_if_a_replica_is_there(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.verifier.store_of("b")
    scene.verifier.store_of("c")
    scene.streams["c"].connected = False
    assert [each.replica for each in scene.leading.verify()] == ["b"], "stock: memory is not compared"
    scene.backend.name = "fast"
    assert [each.replica for each in scene.leading.verify()] == ["", "b"]
    assert [each.replica for each in scene.leading.metrics().verification] == ["", "b", "c"]
    pages = {TASK: PageSet(np.array([0, 9000], dtype=np.uint64))}
    assert scene.verifier.memory.plan(lambda: pages)[0].pages == HURRIED_PAGES
    scene.streams["b"].connected = False
    assert scene.leading.verify() == (), "no epoch would come"


class TestHandingOver:
    async def test_the_last_epoch_is_taken_of_what_stands_still_and_nothing_after_it(
        self, tmp_path: Path
    ) -> None:
        scene = Scene(tmp_path)
        async with scene.running():
            await until(lambda: scene.backend.calls >= 2)
            epoch = await scene.leading.hand_over("b")
            assert scene.freezer.is_kept
            assert scene.leading.handed_over
            assert scene.streams["b"].held == epoch == scene.backend.epochs[-1].id
            assert [each.id for each in scene.backend.epochs if each.last] == [epoch]
            calls = scene.backend.calls
            await asyncio.sleep(0.1)
            assert scene.backend.calls == calls
        assert scene.freezer.is_kept
        assert scene.freezer.left

    @pytest.mark.parametrize(
        ("trouble", "says"), [("silent", "did not commit"), ("gone", "disconnected"), ("unready", "6379")]
    )
    async def test_what_is_not_committed_and_restorable_there_runs_on_and_is_captured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, says: str
    ) -> None:
        monkeypatch.setattr(leading, "_COMMIT_S", 0.05)
        scene = Scene(tmp_path)
        async with scene.running():
            await until(lambda: scene.backend.calls >= 2)
            if trouble == "unready":
                scene.streams["b"].restorable = False
            else:

                def cut_off() -> None:
                    scene.streams["b"].may_acknowledge.clear()
                    scene.streams["b"].connected = trouble != "gone"

                scene.freezer.at_keep = cut_off
            with pytest.raises(CaptureError, match=says):
                await scene.leading.hand_over("b")
            assert not scene.freezer.is_kept
            scene.streams["b"].may_acknowledge.set()
            calls = scene.backend.calls
            await until(lambda: scene.backend.calls > calls + 2)

    async def test_what_was_thawed_meanwhile_is_not_handed_over(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path)
        async with scene.running():
            await until(lambda: scene.backend.calls >= 2)
            scene.freezer.at_keep = scene.streams["b"].may_acknowledge.clear
            move = asyncio.create_task(scene.leading.hand_over("b"))
            await until(lambda: scene.freezer.is_kept)
            scene.freezer.thaw()
            scene.streams["b"].may_acknowledge.set()
            with pytest.raises(CaptureError, match="was thawed"):
                await move

    async def test_one_that_is_given_up_runs_on(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path)
        async with scene.running():
            await until(lambda: scene.backend.calls >= 2)
            scene.freezer.at_keep = scene.streams["b"].may_acknowledge.clear
            move = asyncio.create_task(scene.leading.hand_over("b"))
            await until(lambda: scene.freezer.is_kept)
            move.cancel()
            await asyncio.gather(move, return_exceptions=True)
            assert not scene.freezer.is_kept
            scene.streams["b"].may_acknowledge.set()
            calls = scene.backend.calls
            await until(lambda: scene.backend.calls > calls)

    async def test_a_capture_that_fails_hands_nothing_over(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path)
        async with scene.running():
            await until(lambda: scene.backend.calls >= 2)
            scene.backend.outcomes = [CaptureError("no")] * 2  # the loop's may come first
            with pytest.raises(CaptureError, match="no"):
                await scene.leading.hand_over("b")
            assert not scene.freezer.is_kept
