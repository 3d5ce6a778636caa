"""What is said to etcd about the right to lead, said to a real one of one member on the loopback."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.config import Etcd
from common.etcd import EtcdClient
from common.lease_calls import (
    Answer,
    Claim,
    Denied,
    Granted,
    LeaseKeys,
    Look,
    Question,
    Reclaim,
    Renew,
    Revoke,
    Seen,
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed: make setup"),
]

_READY_WITHIN_S = 30.0


@asynccontextmanager
async def etcd(directory: Path) -> AsyncIterator[EtcdClient]:
    """Run one for as long as the block lasts."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        client, peer = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in (one, two))
    words = {
        "data-dir": str(directory / "etcd"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
    }
    with (directory / "etcd.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "etcd", *(f"--{key}={value}" for key, value in words.items()), stdout=log, stderr=log
        )
    try:
        asked = EtcdClient(Etcd(endpoints=(client,), ttl_s=5), 2.0)
        until_s = time.monotonic() + _READY_WITHIN_S
        while not isinstance(await asked.ask(keys("a"), Look()), Seen):
            assert time.monotonic() < until_s, (directory / "etcd.log").read_text()
            await asyncio.sleep(0.1)
        yield asked
    finally:
        process.kill()
        await process.wait()


def keys(node: str) -> LeaseKeys:
    return LeaseKeys("w", node=node, boot_id="boot", ttl_s=5, clock=time.monotonic)


async def test_what_is_had_again_is_bound_to_a_new_lease_and_outlives_the_end_of_the_first(
    tmp_path: Path,
) -> None:
    async with etcd(tmp_path) as client:

        async def ask(question: Question, node: str = "a") -> Answer:
            return await client.ask(keys(node), question)

        assert await client.version() >= (3, 0, 0)
        first = await ask(Claim(term=1, known=0, over=False, blank=True))
        assert isinstance(first, Granted), first
        again = await ask(Reclaim(term=1))
        assert isinstance(again, Granted), again
        assert again.held.lease_id != first.held.lease_id
        assert isinstance(await ask(Renew(held=first.held)), Denied), (
            "the key is not bound to that one any more"
        )
        await ask(Revoke(lease_id=first.held.lease_id))
        seen = await ask(Look())
        assert isinstance(seen, Seen)
        assert seen.standing.leader is not None
        assert (seen.standing.leader.node, seen.standing.leader.term) == ("a", 1)
        assert isinstance(await ask(Renew(held=again.held)), Granted)
        assert isinstance(await ask(Claim(term=2, known=1, over=True), node="b"), Denied)
        await ask(Revoke(lease_id=again.held.lease_id))
        taken = await ask(Claim(term=2, known=1, over=False), node="b")
        assert isinstance(taken, Granted), taken
        assert await ask(Reclaim(term=1)) == Denied(reason="b has claimed term 2", claimed_by="b")
