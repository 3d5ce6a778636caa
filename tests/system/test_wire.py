"""Streams between two network namespaces with a real store: a link that dies, and how soon it is back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.model import EpochId

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

_SUFFIX = f"{os.getpid() % 10_000}"
_NAMES = (f"owa{_SUFFIX}", f"owb{_SUFFIX}")
_ADDRESSES = ("192.0.2.1", "192.0.2.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair."""
    with contextlib.ExitStack() as stack:
        for name in _NAMES:
            _ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        _ip("link", "add", "w0", "netns", _NAMES[0], "type", "veth", "peer", "name", "w0", "netns", _NAMES[1])
        for name, address in zip(_NAMES, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "w0")
            _ip("-n", name, "link", "set", "w0", "up")
        yield _NAMES


@contextlib.asynccontextmanager
async def _node(host: str, role: str, directory: Path):
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", host, sys.executable, str(Path(__file__).with_name("wire_node.py")), role,
        str(directory), *_ADDRESSES,
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line(process: asyncio.subprocess.Process, beginning: str, deadline_s: float = 20) -> str:
    async with asyncio.timeout(deadline_s):
        while line := (await process.stdout.readline()).decode():
            if line.startswith(beginning):
                return line.strip()
    raise AssertionError(f"the node ended before it said {beginning!r}")


async def test_a_cut_link_is_noticed_and_the_stream_goes_on_where_it_was(hosts, tmp_path: Path) -> None:
    async with _node(hosts[1], "b", tmp_path) as replica:
        await _line(replica, "key")
        async with _node(hosts[0], "a", tmp_path) as primary:
            for _ in range(3):
                await _line(primary, "acknowledged")
            _ip("-n", hosts[0], "link", "set", "w0", "down")
            began_s = time.monotonic()
            await _line(primary, "lost", 10)
            assert time.monotonic() - began_s < 5
            _ip("-n", hosts[0], "link", "set", "w0", "up")
            began_s = time.monotonic()
            after = await _line(primary, "acknowledged", 10)
            assert time.monotonic() - began_s < 5
            assert after.endswith("base")  # what the replica had was not sent again
            replica.kill()
            await replica.wait()
            await _line(primary, "lost", 10)
        async with _node(hosts[1], "b", tmp_path) as replica:
            newest = await _line(replica, "newest")
            assert EpochId.parse(newest.split()[1]) >= EpochId.parse(after.split()[1])
            async with _node(hosts[0], "a", tmp_path) as primary:
                assert (await _line(primary, "acknowledged")).endswith("full")
