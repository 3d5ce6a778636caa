"""What must stay secret on a node, looked at while it works: changing keys, modes of everything it writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from common.events import Event, event_file, read_events
from common.keys import former_key_path, load
from outlive.cluster import Node, eventually
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

OF_THE_WORKLOAD = ("rootfs", "shm", "files", "runc", "exit")
"""Directories with modes of the workload, of runc, and of conmon (an exit code); nobody may enter above."""

PIDS_AND_PIPES = {"conmon.pid", "init.pid", "ctl", "winsz", "stats-restore"}
"""What conmon and runc's CRIU make under their own umask; none of it holds content."""


def told(node: Node, *events: Event) -> list[str]:
    return [each.reason for each in read_events(event_file(node.config)) if each.event in events]


async def reload(node: Node) -> None:
    """Send SIGHUP to both processes and wait until both say that they have read the keys."""
    before = len(told(node, Event.KEYS_RELOADED))
    for process in node.processes.values():
        process.send_signal(signal.SIGHUP)

    async def both() -> bool:
        return len(told(node, Event.KEYS_RELOADED)) == before + 2

    await eventually(both, what=f"{node.name} has read its keys again")
    assert not told(node, Event.KEYS_NOT_RELOADED)


def rewrite(node: Node, old: str, new: str) -> None:
    text = node.config_path.read_text()
    assert old in text
    node.config_path.write_text(text.replace(old, new))


async def rotate(cluster: Protected, name: str) -> None:
    """Change a node's key as docs/threat-model.md says."""
    node = cluster.nodes[name]
    (peer,) = (other for other in cluster.nodes.values() if other is not node)
    former = load(Path(node.config.node.key_file))
    refused = await node.cli("keys", "rotate", "activate", check=False)
    assert "no key" in refused.stderr
    new = (await node.cli("keys", "rotate", "prepare")).stdout.strip()
    too_early = await node.cli("keys", "rotate", "activate", check=False)
    assert "refuses" in too_early.stderr
    rewrite(
        peer,
        f'public_key = "{former.public}"',
        f'public_key = "{former.public}"\nalso_public_keys = ["{new}"]',
    )
    await reload(peer)
    await node.cli("keys", "rotate", "activate")
    await reload(node)
    await cluster.wait_for_epochs(4)
    rewrite(peer, f'public_key = "{former.public}"\nalso_public_keys = ["{new}"]', f'public_key = "{new}"')
    await reload(peer)
    await cluster.wait_for_epochs(4)


async def probe(node: Node, key_file: Path) -> dict[str, str]:
    """Ask a node's peers, from its host, whether they let in the key in a file."""
    code = (
        "import asyncio, json, sys; from pathlib import Path; from common.config import load_config;"
        "from common.keys import load; from outlive.key_probe import probe_peers;"
        "config = load_config(Path(sys.argv[1]));"
        "print(json.dumps(asyncio.run(probe_peers(config, load(Path(sys.argv[2]))))))"
    )
    command = [sys.executable, "-c", code, str(node.config_path), str(key_file)]
    return dict(json.loads((await node.host.run(command, timeout_s=30.0)).stdout))


@contextlib.asynccontextmanager
async def never_unprotected(cluster: Protected) -> AsyncIterator[None]:
    """Watch that redis answers, that nobody suspects anybody, and how often the stream was made again."""
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    connected = len(told(a, Event.REPLICA_CONNECTED))
    wrong: list[str] = []

    async def watch() -> None:
        while True:
            led, followed = await a.workload(NAME), await b.workload(NAME)
            if led is None or led.role != "primary" or not led.running:
                wrong.append(f"a: {led}")
            if followed is None or followed.role != "replica" or not followed.restorable:
                wrong.append(f"b: {followed}")
            await asyncio.sleep(0.02)

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not wrong
    assert not told(a, Event.PEER_SILENT) + told(b, Event.PEER_SILENT)
    for node in (a, b):
        assert not told(node, Event.TAKEOVER_STARTED, Event.FENCE_ASKED)
    # One when b listens with a new key, one when b drops the key that a's stream was made with.
    assert len(told(a, Event.REPLICA_CONNECTED)) - connected <= 2


async def test_both_nodes_get_new_keys_while_epochs_go_on_and_the_old_ones_are_refused() -> None:
    async with protected_redis() as cluster:
        async with never_unprotected(cluster):
            for name in ("b", "a"):
                await rotate(cluster, name)
        assert await cluster.answers()
        for name, other in (("a", "b"), ("b", "a")):
            path = Path(cluster.nodes[name].config.node.key_file)
            assert await probe(cluster.nodes[name], former_key_path(path)) == {other: "refuses"}
            assert await probe(cluster.nodes[name], path) == {other: "accepts"}


def readable_by_others(node: Node, allowed: Sequence[str]) -> dict[str, str]:
    """Return what of a node's secrets somebody else may touch, by the mode of the thing itself."""
    config = node.config
    found: dict[str, str] = {}
    for top in {config.node.state_dir, config.node.run_dir, config.node.image_dir, str(config.store_dir)}:
        for directory, names, files in os.walk(top):
            names[:] = [name for name in names if name not in allowed]
            for path in (directory, *(os.path.join(directory, name) for name in {*files} - PIDS_AND_PIPES)):
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(path)
                    if stat.S_IMODE(status.st_mode) & 0o077 and not stat.S_ISLNK(status.st_mode):
                        found[re.sub(r"\d+", "N", path)] = stat.filemode(status.st_mode)
    return found


async def test_nothing_is_readable_by_others_at_any_moment_whatever_umask_is_inherited() -> None:
    before = os.umask(0)
    try:
        async with protected_redis() as cluster:
            found: dict[str, str] = {}
            done = threading.Event()

            def scan() -> None:
                while not done.is_set():
                    for node in cluster.nodes.values():
                        found.update(readable_by_others(node, OF_THE_WORKLOAD))

            scanner = asyncio.create_task(asyncio.to_thread(scan))
            await cluster.wait_for_epochs(10)
            await cluster.lab.power_off("a")
            await cluster.nodes["b"].wait_for(NAME, lambda w: w.role == "primary" and w.running, what="led")
            await eventually(cluster.answers, what="redis answers")
            done.set()
            await scanner
            assert not found, "\n".join(f"{mode} {path}" for path, mode in sorted(found.items()))
    finally:
        os.umask(before)
