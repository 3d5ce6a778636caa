"""What runs beside criu has ended when a dump has, however that ended: its buffers are used again."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from common.config import Node, NodeConfig
from common.criu.rpc import DumpOptions, DumpResult
from common.errors import CaptureError
from primary import dumping
from primary.dumping import Dumper
from tests.unit.test_stock import SPEC, STATS, Guard


class Channel:
    """No shim."""

    environment = None
    descriptor = 0

    def close(self) -> None:
        """Do nothing."""


class Criu:
    """Calls hooks, and then fails or not."""

    pid = 4711

    def __init__(self, hooks: tuple[str, ...], failure: Exception | None) -> None:
        self._hooks, self._failure = hooks, failure

    async def dump(
        self, options: DumpOptions, on_notify: Callable[[str, int | None], Awaitable[bool]]
    ) -> DumpResult:
        for hook in self._hooks:
            await on_notify(hook, None)
        if self._failure is not None:
            raise self._failure
        return DumpResult(STATS, ())

    async def abandon(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("hooks", "failure"),
    [
        (("pre-dump", "query-ext-files", "post-dump"), None),
        (("pre-dump", "query-ext-files"), CaptureError("no parasite")),
    ],
    ids=["done", "failed"],
)
async def test_it_is_waited_for(
    hooks: tuple[str, ...], failure: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spawn(criu: Path, **_: object) -> Criu:
        return Criu(hooks, failure)

    monkeypatch.setattr(dumping, "spawn", spawn)
    monkeypatch.setattr(dumping, "ShimChannel", Channel)
    node = Node(name="a", address="127.0.0.1", image_dir=str(tmp_path), state_dir=str(tmp_path))
    guard = Guard()
    abandoned_ms: list[float] = []
    dumper = Dumper(
        NodeConfig(node=node),
        SPEC,
        init_pid=os.getpid(),
        criu=Path("/criu"),
        guard=guard,
        with_shim=True,
        on_abandoned=abandoned_ms.append,
    )
    ended = threading.Event()
    seen: list[bool] = []

    def beside() -> None:
        time.sleep(0.3)
        ended.set()
        raise MemoryError("what it raises is only logged")

    expected = (
        contextlib.nullcontext() if failure is None else pytest.raises(CaptureError, match="no parasite")
    )
    with expected:
        await dumper.dump(tmp_path, lambda channel: seen.append(ended.is_set()), beside)
    assert seen == ([] if failure else [True])
    assert ended.is_set()
    assert guard.ended == [4711]
    assert [0 <= each < 10_000 for each in abandoned_ms] == ([True] if failure else [])
    await dumper.close()
