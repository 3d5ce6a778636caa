"""What the stock backend leaves on its tmpfs when a capture does not come to its end: nothing."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.config import Node, NodeConfig
from common.criu.images import PE_PRESENT, DumpStats, Pagemap, PagemapEntry, SpaceKey, write_pagemap
from common.criu.rpc import DumpOptions, DumpResult
from common.errors import CaptureError
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId, WorkloadSpec
from primary import dumping, stock
from primary.capture import PageTable
from primary.dumping import Dumper
from primary.stock import ImagePages, StockBackend
from tests.unit.wire_fakes import until

EPOCH = EpochId(1, 1)
SEGMENT = SpaceKey("shmem", 7)
SPEC = WorkloadSpec(name="redis", nodes=("a", "b"), command=("redis-server",))
STATS = DumpStats(*[0] * len(DumpStats.__struct_fields__))


class CriuInMemory:
    """Writes an image, then does what it is told to."""

    pid = 4711

    def __init__(self, then: Callable[[], Awaitable[None]]) -> None:
        self._then = then
        self.abandoned = False

    async def dump(self, options: DumpOptions, on_notify: object) -> DumpResult:
        (options.images_dir / "core-1.img").write_bytes(b"x")
        await self._then()
        return DumpResult(STATS, ())

    async def abandon(self) -> None:
        self.abandoned = True


class Guard:
    """A keeper that watches, unless it is told not to."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.refusal: CaptureError | None = None

    async def announce(self, criu_pid: int, deadline_ms: int) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def end(self, criu_pid: int) -> None:
        self.ended.append(criu_pid)


class Scene:
    """A backend over this process's own standard streams, with a criu in memory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = directory / "images"
        self.guard = Guard()
        self.criu = CriuInMemory(self._nothing)

        async def spawn(criu: Path, **_: object) -> CriuInMemory:
            return self.criu

        monkeypatch.setattr(dumping, "spawn", spawn)
        node = Node(name="a", address="127.0.0.1", image_dir=str(self.images), state_dir=str(directory))
        self.backend = StockBackend(
            Dumper(
                NodeConfig(node=node),
                SPEC,
                init_pid=os.getpid(),
                criu=Path("/criu"),
                guard=self.guard,
            ),
            workload=SPEC.name,
            incarnation="first",
            hasher=PageHasher(),
        )

    async def _nothing(self) -> None:
        return

    @property
    def directory(self) -> Path:
        return self.images / "redis" / str(EPOCH)

    def capture(self) -> asyncio.Task[object]:
        return asyncio.create_task(self.backend.capture(EPOCH))

    async def cancelled(self, capture: asyncio.Task[object]) -> None:
        capture.cancel()
        with pytest.raises(asyncio.CancelledError):
            await capture
        await self.is_given_back()

    async def is_given_back(self) -> None:
        await until(lambda: not self.directory.exists())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


async def test_images_are_there_until_the_epoch_is_released(scene: Scene) -> None:
    epoch = await scene.backend.capture(EPOCH)
    assert {file.name for file in epoch.metadata} == {"core-1.img", "descriptors.json"}
    assert scene.guard.ended == [CriuInMemory.pid]
    epoch.release()
    await scene.is_given_back()


async def test_a_capture_that_is_cancelled_while_criu_dumps_leaves_no_images(scene: Scene) -> None:
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    scene.criu = CriuInMemory(hang)
    capture = scene.capture()
    await begun.wait()
    assert (scene.directory / "core-1.img").exists()
    await scene.cancelled(capture)
    assert scene.guard.ended == [CriuInMemory.pid], "the keeper is told in any case"


async def test_a_capture_that_is_cancelled_while_it_makes_room_leaves_no_directory(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, go_on = threading.Event(), threading.Event()
    mkdir = Path.mkdir

    def slowly(path: Path, *arguments: Any, **options: Any) -> None:
        if path == scene.directory:
            making.set()
            go_on.wait(5)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", slowly)
    capture = scene.capture()
    await asyncio.to_thread(making.wait, 5)
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    await scene.cancelled(capture)
    await asyncio.sleep(0.2)
    assert not scene.directory.exists(), "it was made after all, when nobody would remove it any more"


async def test_a_capture_that_is_cancelled_while_it_hashes_leaves_no_images(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing, go_on = threading.Event(), threading.Event()

    def slowly(directory: Path) -> list[object]:
        hashing.set()
        go_on.wait(5)
        return []

    monkeypatch.setattr(stock, "page_images", slowly)
    capture = scene.capture()
    await asyncio.to_thread(hashing.wait, 5)
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    await scene.cancelled(capture)


@pytest.mark.parametrize(
    ("module", "broken"),
    [(dumping, "standard_streams"), (stock, "page_images"), (stock, "metadata_in")],
    ids=lambda each: getattr(each, "__name__", each),
)
async def test_a_capture_that_fails_leaves_no_images_and_says_why(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, module: ModuleType, broken: str
) -> None:
    def fail(*arguments: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(CaptureError, match="No space left"):
        await scene.backend.capture(EPOCH)
    await scene.is_given_back()


async def test_without_a_keeper_that_watches_nothing_is_dumped_and_nothing_left(scene: Scene) -> None:
    scene.guard.refusal = CaptureError("no keeper answers")
    with pytest.raises(CaptureError, match="no keeper"):
        await scene.backend.capture(EPOCH)
    assert scene.criu.abandoned
    await scene.is_given_back()


def test_epochs_share_what_did_not_change_and_tell_what_did(scene: Scene, tmp_path: Path) -> None:
    """CRIU's images of a shared segment, whole each time."""
    tables = []
    for number, present in enumerate(
        ({1: 1, 2: 2, 3: 0, 70: 4}, {1: 1, 2: 9, 70: 4}, {1: 1, 2: 9, 3: 0, 70: 4})
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        entries = [PagemapEntry(page * PAGE_BYTES, 1, PE_PRESENT) for page in present]
        write_pagemap(directory / SEGMENT.pagemap_name, Pagemap(pages_id=1, entries=tuple(entries)))
        (directory / "pages-1.img").write_bytes(
            b"".join(bytes([fill]) * PAGE_BYTES for fill in present.values())
        )
        reader = ImagePages(directory)
        (space,) = scene.backend._identify(directory, reader)
        reader.release()
        assert space.numbers.tolist() == list(present)
        assert (space.identity == 0).all(axis=1).tolist() == [fill == 0 for fill in present.values()]
        tables.append(space)
    one, two, three = tables
    assert PageTable([one]).changed(two).numbers.tolist() == [2]
    assert PageTable([two]).changed(three).numbers.tolist() == [3], "it was away"
    assert PageTable([one]).changed(three).numbers.tolist() == [2]
    assert one.identities._blocks[1] is three.identities._blocks[1]
