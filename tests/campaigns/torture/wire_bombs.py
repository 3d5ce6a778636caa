"""Peers with a valid key that send what takes more memory than it costs to send, from processes of their own.

What the receiver's process grows by is measured; meanwhile another workload's epochs must get through.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import zmq

from common.bulk import BLOCK_PAGES, ZERO, EpochDigest, pack, pack_runs
from common.criu.images import PE_PRESENT
from common.keys import KeyPair
from common.messages import (
    PROTOCOL,
    AskHeld,
    Begin,
    Buffer,
    Commit,
    Hello,
    Metadata,
    Pages,
    Space,
    encode,
)
from common.model import PAGE_BYTES, EpochId
from common.transport import ZAP_DOMAIN
from tests.campaigns.torture.cases import Case, Part, Scale, chance_of, rows
from tests.campaigns.torture.wire_ends import SPECS, Ends, Resident
from tests.unit.store_histories import WrongCommitError

Bomb = Callable[[], Iterator[list[Buffer]]]

_MOST_MIB = 200.0
"""What one hostile peer may make the receiver's process grow by, queues of both sockets included."""
_MOST_S = 0.5
"""For which others may wait: a keeper waits a second and more for its agent."""
_HELD = 40_000

_grown_mib: dict[str, float] = {}
_stopped_s: dict[str, float] = {}


def bombs(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    _grown_mib.clear()
    parts = rows(cases(seed, scale))
    notes = tuple(
        f"{name}: memory grew by {grown:.0f} MiB, others waited at most {_stopped_s[name]:.2f} s"
        for name, grown in _grown_mib.items()
    )
    return [msgspec.structs.replace(part, notes=part.notes + notes) for part in parts]


def cases(seed: int, scale: Scale) -> list[Case]:
    """One case for each bomb."""

    def case(name: str) -> Case:
        return Case(
            "message bombs under a valid key",
            name,
            lambda directory: asyncio.run(_bombed(directory, seed, name, scale.of(0.7, 2.0, 5.0))),
        )

    return [
        case(name)
        for name in chance_of("bombs", seed).sample(list(BOMBS), scale.of(4, len(BOMBS), len(BOMBS)))
    ]


async def _bombed(directory: Path, seed: int, name: str, seconds: float) -> None:
    with Ends(directory, chance_of("bombs", seed, name)) as ends, ends.log.counting():
        async with ends.living(), ends.leading("web") as web:
            await ends.gets_through(web, "web")
            process = get_context("spawn").Process(
                target=_send, args=(name, ends.port, ends.a, ends.b.public, seconds), daemon=True
            )
            process.start()
            with Resident() as resident:
                while process.is_alive():
                    await ends.gets_through(web, "web")
                    await asyncio.sleep(0.02)
                # What came is still being looked at.
                await ends.gets_through(web, "web")
            _grown_mib[name] = resident.grown_mib
            _stopped_s[name] = ends.stopped_s
            if process.exitcode != 0:
                raise AssertionError(f"the peer itself failed: {process.exitcode}")
            if ends.stopped_s > _MOST_S:
                raise WrongCommitError(f"nothing else had its turn for {ends.stopped_s:.1f} s")
            if resident.grown_mib > _MOST_MIB:
                raise WrongCommitError(f"memory grew by {resident.grown_mib:.0f} MiB")
        store = ends.stores["redis"]
        for record in store.records():
            if problems := store.verify(record.id):
                raise WrongCommitError(f"verify says: {problems}")


def _send(name: str, port: int, keys: KeyPair, server_key: str, seconds: float) -> None:
    """Greet and send for a while, and read nothing."""
    context = zmq.Context()

    def connected() -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        socket.curve_serverkey = server_key.encode()
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.rcvhwm, socket.sndhwm, socket.sndtimeo, socket.linger = 1, 100, 200, 0
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send_multipart(_greeting())
        return socket

    deadline_s = time.monotonic() + seconds
    socket = connected()
    for frames in BOMBS[name]():
        if not frames:
            socket = connected()
        with suppress(zmq.Again):
            socket.send_multipart(frames or _greeting())
        if time.monotonic() > deadline_s:
            break
    time.sleep(0.2)
    context.destroy(linger=0)


def _greeting() -> list[Buffer]:
    return encode(
        Hello(
            protocol=PROTOCOL,
            software="torture",
            node="a",
            workload="redis",
            term=1,
            incarnation="i",
            spec=SPECS["redis"],
        )
    )


def _begin(memory_bytes: int, files: int = 0) -> list[Buffer]:
    return encode(
        Begin(
            term=1,
            epoch=EpochId(1, 1),
            base=None,
            seed=0,
            incarnation="i",
            frozen_wall_s=1.0,
            memory_bytes=memory_bytes,
            spaces=1,
            metadata_files=files,
        )
    )


def _frames_of_nothing() -> Iterator[list[Buffer]]:
    yield _begin(PAGE_BYTES)
    while True:
        yield [b""]


def _messages_of_many_frames() -> Iterator[list[Buffer]]:
    while True:
        yield [b""] * 100_000


def _more_than_granted() -> Iterator[list[Buffer]]:
    yield _begin(1 << 30)
    block = encode(Pages(raw_bytes=BLOCK_PAGES * PAGE_BYTES), [bytes(1 << 20)])
    while True:
        yield block


def _inflated_files() -> Iterator[list[Buffer]]:
    """A file that the receiver reads whole, of zeros that cost nothing to send."""
    yield _begin(PAGE_BYTES, files=2)
    zeros = pack(bytes(1 << 20))
    for _ in range(700):
        yield encode(Metadata(name="descriptors.json", size=1 << 20, more=True), [zeros])


def _runs_without_end() -> Iterator[list[Buffer]]:
    for memory_bytes in (1 << 53, 1 << 44):
        yield _begin(memory_bytes)
        runs = np.array(
            [(n << 32, (1 << 32) - 1, PE_PRESENT | ZERO) for n in range(16)], dtype="<u8, <u4, <u4"
        )
        yield encode(
            Space(kind="task", ident=1, pages=16 * ((1 << 32) - 1), changed=0), [pack(runs.tobytes())]
        )


def _questions() -> Iterator[list[Buffer]]:
    """Long answers to short questions, none of them read."""
    begin = _begin(_HELD * PAGE_BYTES)
    digest = EpochDigest()
    start, count = np.array([[0], [_HELD]], dtype=np.uint64)
    (runs,) = pack_runs(start, count, np.array([PE_PRESENT | ZERO], dtype=np.uint8))
    space = encode(Space(kind="task", ident=1, pages=_HELD, changed=0), [runs.frame])
    for frames in (begin, space):
        digest.add(frames)
        yield frames
    yield encode(Commit(digest=digest.value()))
    ask = AskHeld(epoch=EpochId(1, 1), seed=0, secret=bytes(8), kind="task", ident=1, first_row=0)
    while True:
        yield encode(ask)
        time.sleep(0.005)  # within credit


def _connections() -> Iterator[list[Buffer]]:
    for _ in range(300):
        yield []
    yield _begin(PAGE_BYTES)


def _nested() -> Iterator[list[Buffer]]:
    """Headers of half a megabyte of empty maps."""
    bomb = b"\x94\x02\xa5begin" + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 3 + b"\x90"
    wide = b"\x94\x02\xa5begin" + b"\x9f" * 900 + b"\x80" * 500_000
    while True:
        yield [bomb]
        yield [wide]


BOMBS: dict[str, Bomb] = {
    "frames of nothing": _frames_of_nothing,
    "messages of 100,000 frames": _messages_of_many_frames,
    "more than was granted": _more_than_granted,
    "inflated files": _inflated_files,
    "runs of any number of pages": _runs_without_end,
    "questions, answers unread": _questions,
    "300 connections": _connections,
    "headers of empty maps": _nested,
}
