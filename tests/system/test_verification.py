"""Verification on real CRIU: what is sound is found sound; a page that is not, is found and mended."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from bench.target import WORKLOAD, Target, running_target
from common.control import VerificationProgress
from common.criu.images import SpaceKey
from common.criu.locate import locate_criu
from common.durable import RealDisk
from common.events import Event, EventRecord, event_file, read_events
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from outlive.cluster import Node, eventually
from primary.capture import CapturedEpoch
from primary.dumping import Dumper
from primary.fast import FastBackend
from primary.pages import pages_in, runs_of
from primary.userfault import problem
from primary.verification import Mismatch, Verification
from replica.holdings import Holdings
from replica.levels import MANIFEST_NAME, Manifest, encode_manifest
from replica.store_reader import StoreReader
from tests.campaigns.twins import Unwatched
from tests.system.clusters import NAME, Protected, protected_redis

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


# --- whole clusters -----------------------------------------------------------------------------------


def settings(backend: str, epochs: int) -> dict[str, dict[str, object]]:
    # Long chains, so that no fold looks at what is tampered with before verification does.
    return {"capture": {"backend": backend, "verify_epochs": epochs}, "store": {"max_levels": 500}}


async def progress(cluster: Protected, replica: str) -> VerificationProgress:
    (workload,) = (await cluster.nodes["a"].metrics()).workloads
    return next(each for each in workload.verification if each.replica == replica)


def events(node: Node, kind: Event) -> list[EventRecord]:
    return [each for each in read_events(event_file(node.config)) if each.event == kind]


async def happened(node: Node, kind: Event) -> None:
    async def told() -> bool:
        return bool(events(node, kind))

    await eventually(told, what=f"{kind} on {node.name}", timeout_s=60)


@pytest.mark.parametrize("backend", ["stock", "auto"])
async def test_a_sound_workload_goes_through_round_after_round_without_a_mismatch(backend: str) -> None:
    async with protected_redis(("a", "b"), settings=settings(backend, 20), fill_mib=32) as cluster:
        compared = ["b"] if backend == "stock" else ["", "b"]

        async def two_rounds() -> bool:
            await cluster.redis("set", "changing", os.urandom(8).hex())
            return all([(await progress(cluster, each)).rounds >= 2 for each in compared])

        await eventually(two_rounds, what="two rounds of everything", timeout_s=120)
        for each in compared:
            found = await progress(cluster, each)
            assert found.pages_different == 0
            assert found.pages_compared > 32 * 256, "what redis was filled with, at least once"
            assert found.problem == ""
        done = await cluster.nodes["a"].cli("verify", "--now", "--output", "json")
        answer = json.loads(done.stdout)
        assert [each["replica"] for each in answer["verified"]] == compared
        assert all(each["pages_verified"] > 32 * 256 for each in answer["verified"])
        assert answer["pages_different"] == 0
        assert answer["took_s"] < 60
        lines = (await cluster.nodes["a"].cli("status")).stdout.splitlines()
        assert any(
            "verification of replica b: " in line and "the last whole one ended" in line for line in lines
        )
        for node in cluster.nodes.values():
            assert events(node, Event.VERIFY_MISMATCH) == events(node, Event.VERIFY_DOUBTED) == []
        refused = await cluster.nodes["b"].cli("verify", "--now", check=False)
        assert refused.returncode == 5


def tamper(node: Node) -> int:
    """Alter a page of what a node holds, and what its store says of it; return the page's number.

    No agent runs there. The store's own check then finds nothing.
    """
    reader = StoreReader.inspect(node.config.store_dir, NAME)
    assert reader.newest is not None
    chain = reader._chain(reader.newest.id)
    space = max(chain[0].manifest.spaces, key=lambda each: each.pages)
    numbers, origin = Holdings(chain, RealDisk())._pages(space.key)
    base = np.flatnonzero(origin.level == len(chain) - 1)
    run = max(np.split(base, np.flatnonzero(np.diff(base) != 1) + 1), key=len)
    row = int(run[len(run) // 2])  # in the middle of what redis was filled with
    level = chain[int(origin.level[row])]
    entry = level.space(space.key)
    assert entry is not None
    path = level.path / entry.pages_name
    with path.open("r+b") as file:
        file.seek(int(origin.row[row]) * PAGE_BYTES + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    text = (level.path / MANIFEST_NAME).read_bytes()
    manifest = msgspec.json.decode(text, type=Manifest)
    digest = blake3(path.read_bytes()).hexdigest()
    files = tuple(
        msgspec.structs.replace(each, blake3=digest) if each.name == path.name else each
        for each in manifest.files
    )
    (level.path / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    assert StoreReader.inspect(node.config.store_dir, NAME).verify() == [], "its own checksums reveal nothing"
    return int(numbers[row])


@pytest.mark.parametrize("backend", ["stock", "auto"])
async def test_a_page_that_is_another_on_a_replicas_disk_is_found_and_everything_sent_anew(
    backend: str,
) -> None:
    async with protected_redis(("a", "b"), settings=settings(backend, 20), fill_mib=16) as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(5)
        await b.stop("agent")
        page = tamper(b)
        before = (await a.metrics()).workloads[0]
        await b.start("agent")
        await happened(a, Event.VERIFY_MISMATCH)
        (found,) = events(a, Event.VERIFY_MISMATCH)
        assert found.workload == NAME
        assert (found.fields["replica"], found.fields["pages"]) == ("b", 1)
        assert found.fields["address"] == f"{page * PAGE_BYTES:#x}"
        assert str(found.fields["epoch"]).startswith("t1-e")
        await happened(b, Event.VERIFY_DOUBTED)
        await happened(b, Event.VERIFY_MENDED)
        after = (await a.metrics()).workloads[0]
        assert after.bytes_sent - before.bytes_sent > 4 << 20, "the filling compresses"

        await b.wait_for(NAME, lambda w: w.restorable, what="restorable again")
        done = await a.cli("verify", "--now", "--output", "json", check=False)
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["pages_different"] == 0
        assert (await progress(cluster, "b")).pages_different == 1

        async def gone() -> bool:
            return not (Path(b.config.store_dir) / NAME / "doubt").exists()

        await eventually(gone, what="nothing that was in doubt is held any more")
        await cluster.lab.power_off("a")
        await b.wait_for(NAME, lambda w: w.role == "primary" and w.running, what="taken over")
        await eventually(cluster.answers, what="redis answers at b")
        assert await cluster.redis("get", "kept") == "yes"


async def test_a_replica_in_doubt_waits_for_an_operator_who_gets_what_there_is() -> None:
    """The primary is lost after the mismatch was found and before everything was sent anew."""
    async with protected_redis(("a", "b"), settings=settings("stock", 20), fill_mib=16) as cluster:
        b = cluster.nodes["b"]
        await cluster.redis("set", "kept", "yes")
        await cluster.wait_for_epochs(5)
        await b.stop("agent")
        store = Path(b.config.store_dir) / NAME
        newest = StoreReader.inspect(b.config.store_dir, NAME).newest
        assert newest is not None
        doubt = {"epoch": [newest.id.term, newest.id.epoch], "reason": "b has stored 1 page otherwise"}
        (store / "doubt").write_text(json.dumps(doubt))

        async def silent() -> bool:
            return (await b.status()).agent == "silent"

        await eventually(silent, what="b's keeper goes by no old report")
        await cluster.lab.power_off("a")
        await b.start("agent")
        waiting = await b.wait_for(NAME, lambda w: "in doubt" in w.reason, what="waiting for an operator")
        assert (waiting.state, waiting.running, waiting.restorable) == ("waiting", False, False)
        assert "1 page otherwise" in waiting.reason
        await asyncio.sleep(2)
        assert not (await b.workload(NAME)).running  # type: ignore[union-attr]
        await b.cli("failover", NAME, "--accept-data-loss")
        await eventually(cluster.answers, what="redis answers at b")
        assert await cluster.redis("get", "kept") == "yes"


# --- what tracking misses -------------------------------------------------------------------------------


class Captured:
    """A process of which the fast backend takes epochs, one after the other."""

    def __init__(self, target: Target, length: int) -> None:
        self.target = target
        self.found: list[Mismatch] = []
        self.hasher = PageHasher()
        self.verification = Verification(length, self.found.append)
        dumper = Dumper(
            target.config,
            target.spec,
            init_pid=target.pid,
            criu=locate_criu(None),
            guard=Unwatched(),
            with_shim=True,
        )
        self.backend = FastBackend(
            target.config,
            dumper,
            workload=WORKLOAD,
            incarnation="first",
            hasher=self.hasher,
            verification=self.verification,
        )
        self._number = 0

    async def epoch(self) -> CapturedEpoch:
        since = EpochId(1, self._number) if self._number else None
        self._number += 1
        captured = await self.backend.capture(EpochId(1, self._number), since)
        captured.release()
        return captured

    @property
    def process(self):  # type: ignore[no-untyped-def]
        return self.backend._processes[self.target.pid]

    def identity_in(self, captured: CapturedEpoch, page: int) -> list[int]:
        space = next(each for each in captured.spaces if each.key == self.process.key)
        return list(space.identity[int(np.searchsorted(space.numbers, page))].tolist())

    def identity_now(self, page: int) -> list[int]:
        with Path(f"/proc/{self.target.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(page * PAGE_BYTES)
            return list(self.hasher.identify(memoryview(memory.read(PAGE_BYTES)))[0].tolist())


@asynccontextmanager
async def captured_target(length: int) -> AsyncIterator[Captured]:
    if why := problem():
        pytest.skip(why)
    async with running_target(rss_mib=32) as target:
        captured = Captured(target, length)
        try:
            for _ in range(3):
                await captured.epoch()
            yield captured
        finally:
            await captured.backend.close()


async def test_memory_that_is_what_it_is_believed_to_be_is_found_so() -> None:
    async with captured_target(10) as captured:
        compared = captured.verification.pages_compared
        rounds = captured.verification.rounds
        for _ in range(25):
            await captured.target.write_pages(200)
            await captured.epoch()
        assert captured.found == []
        assert captured.verification.rounds >= rounds + 2
        assert captured.verification.pages_compared - compared > 32 * 256, "most of it is clean"


async def test_a_write_that_tracking_misses_is_found_within_a_round_and_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with captured_target(10) as captured:
        await captured.target.touch_probe()
        await captured.epoch()
        await captured.epoch()
        process = captured.process
        written = process.space.written
        missed: list[int] = []

        def missing(pagemap: int, vmas: np.ndarray) -> np.ndarray:
            """Lose one page: the kernel has protected it again, and nobody hears that it was written."""
            numbers = pages_in(written(pagemap, vmas)).numbers
            probe = max(np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1), key=len)
            if len(probe) > 100:
                missed.append(int(probe[50]))
                numbers = numbers[numbers != missed[-1]]
            return runs_of(numbers)

        await captured.target.touch_probe()
        monkeypatch.setattr(process.space, "written", missing)
        stale = await captured.epoch()
        monkeypatch.setattr(process.space, "written", written)
        (page,) = missed[:1]
        if not captured.found:  # else the slice that was due had it
            assert captured.identity_in(stale, page) != captured.identity_now(page), "the write was missed"
        for _ in range(22):
            mended = await captured.epoch()
            if captured.found:
                break
        (mismatch,) = captured.found
        assert (mismatch.replica, mismatch.key, mismatch.pid) == ("", process.key, captured.target.pid)
        assert mismatch.numbers.tolist() == [page]
        assert mismatch.epoch == mended.id, "that epoch was captured anew"
        assert captured.identity_in(mended, page) == captured.identity_now(page)
        for _ in range(25):
            await captured.epoch()
        assert len(captured.found) == 1


async def test_a_book_that_is_wrong_of_many_pages_is_found_and_all_of_the_process_is_read_again() -> None:
    async with captured_target(10) as captured:
        book = captured.process.book
        pages = book.known.numbers[1000:6000:7]
        good = book.identity_of(pages).copy()
        book.put(pages, good ^ np.uint64(1))
        mended = await captured.epoch()
        while not captured.found:
            mended = await captured.epoch()
        space = next(each for each in mended.spaces if each.key == captured.process.key)
        rows = np.searchsorted(space.numbers, pages)
        assert (space.identity[rows] == good).all(axis=1).mean() > 0.9, "not only those that were compared"
        assert captured.process.key == SpaceKey("task", captured.process.key.ident)
