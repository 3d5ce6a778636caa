"""The child that beats for the agent: silent until it is told, gone with it, and never another process."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import time
from pathlib import Path

import pytest

from common.config import Node, NodeConfig
from outlive import agent_beats
from outlive.agent_beats import AgentBeats, hangs

CONFIG = NodeConfig(node=Node(name="a", address="127.0.0.1"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the file that the child makes when it begins, in place of beating."""
    path = tmp_path / "told"

    async def beat(config: NodeConfig, reread: object, sign: object) -> None:
        path.write_text(str(os.getpid()))
        await asyncio.sleep(60)

    monkeypatch.setattr(agent_beats, "_run", beat)
    return path


def wait_for(path: Path) -> int:
    until_s = time.monotonic() + 10
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    return int(path.read_text())


def test_it_is_silent_until_it_is_told(told: Path) -> None:
    beats = AgentBeats.fork(CONFIG, lambda: CONFIG)
    time.sleep(0.2)
    assert not told.exists()
    beats.begin()
    pid = wait_for(told)
    beats.end()
    assert not Path(f"/proc/{pid}").exists()
    beats.end()
    beats.reload_keys()
    beats.begin()


def test_an_agent_that_gives_no_sign_hangs(told: Path) -> None:
    sign = mmap.mmap(-1, mmap.PAGESIZE)
    assert hangs(sign), "no sign yet"
    beats = AgentBeats(os.getpid(), -1, sign)
    beats.gets_on()
    assert not hangs(sign)


async def test_its_end_is_noticed(told: Path) -> None:
    beats = AgentBeats.fork(CONFIG, lambda: CONFIG)
    beats.begin()
    os.kill(wait_for(told), signal.SIGKILL)
    async with asyncio.timeout(5):
        await beats.ended()


def test_an_agent_that_ends_before_it_began_leaves_no_child(told: Path) -> None:
    parent = os.fork()
    if parent == 0:
        beats = AgentBeats.fork(CONFIG, lambda: CONFIG)
        told.with_name("pid").write_text(str(beats.pid))
        os._exit(0)
    os.waitpid(parent, 0)
    pid = int(told.with_name("pid").read_text())
    until_s = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not told.exists()
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
