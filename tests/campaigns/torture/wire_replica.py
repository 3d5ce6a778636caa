"""Replicas that answer what no sound one does, and keys that do not count: a stream gives up that session.

It says why, tries again, and neither its process's memory nor the other streams notice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import zmq.asyncio

from common.bulk import HELD_PAGES, pack, pack_held
from common.config import Peer
from common.keyring import Keyring
from common.messages import (
    PROTOCOL,
    Ack,
    AskHeld,
    Buffer,
    Commit,
    Credit,
    HeldPages,
    Hello,
    Message,
    Nack,
    Readiness,
    Refused,
    Welcome,
    decode,
    encode,
)
from common.model import EpochId
from common.transport import Server
from primary.session import StreamTiming
from tests.campaigns.torture.cases import Case, Scale, chance_of
from tests.campaigns.torture.wire_ends import Ends, Resident
from tests.unit.store_histories import WrongCommitError
from tests.unit.wire_fakes import QUICK_LINK, new_keys, offer, until

_TALKS = "goes on talking"
_IMPATIENT = StreamTiming(greeting_s=0.3, credit_s=0.3, acknowledge_s=0.3, retry_s=0.02, retry_max_s=0.05)
_PATIENT = replace(_IMPATIENT, acknowledge_s=5.0, credit_s=5.0)
"""For who is given up for what it says: a busy machine takes its time to say it."""
_MOST_MIB = 150.0
_TAKEN_WITHIN = 50
"""Milliseconds."""

Say = Callable[..., Awaitable[bool]]
Answer = Callable[[Message, Say], Awaitable[None]]

_WELCOME = Welcome(
    protocol=PROTOCOL, node="b", newest=None, newest_frozen_wall_s=None, seed=0, credit_bytes=4 << 20
)
_HOLDS = msgspec.structs.replace(_WELCOME, newest=EpochId(1, 0), newest_frozen_wall_s=1.0)
_ACK = Ack(epoch=EpochId(1, 77), restorable=True, reasons=(), volatile=False, committed_wall_s=1.0)


def _to_hello(*answers: tuple[Message, tuple[Buffer, ...]] | list[Buffer]) -> Answer:
    async def answer(message: Message, say: Say) -> None:
        if isinstance(message, Hello):
            for each in answers:
                await (say(each) if isinstance(each, list) else say(each[0], *each[1]))

    return answer


def _after_welcome(kind: type, *answers: Message, times: int = 1) -> Answer:
    async def answer(message: Message, say: Say) -> None:
        if isinstance(message, Hello):
            await say(_WELCOME)
        elif isinstance(message, kind):
            for _ in range(times):
                for each in answers:
                    if not await _heard(say, each):
                        return

    return answer


async def _heard(say: Say, what: Message) -> bool:
    """Say it as soon as the stream takes it; False if it does not any more.

    Who talked to nobody would not read meanwhile: its own queue would grow, in the memory that is measured.
    """
    for _ in range(_TAKEN_WITHIN):
        if await say(what):
            return True
        await asyncio.sleep(0.001)
    return False


def _holding(
    numbers_of: Callable[[int], np.ndarray[tuple[int], np.dtype[np.uint64]]],
    *,
    pages: int | None = None,
    kind: str = "",
    bulk: bytes | None = None,
) -> Answer:
    """Claim to hold an epoch, and tell of pages that cannot be so, for ever."""

    async def answer(message: Message, say: Say) -> None:
        if isinstance(message, Hello):
            await say(_HOLDS)
        elif isinstance(message, AskHeld):
            numbers = numbers_of(message.first_row)
            frame = bulk or pack_held(numbers, np.zeros((len(numbers), 2), np.uint64))
            told = len(numbers) if pages is None else pages
            kinds = {"task": "task", "shmem": "shmem"}
            held = HeldPages(
                kind=kind or kinds[message.kind],  # type: ignore[arg-type]
                ident=message.ident + (1 if kind else 0),
                pages=told,
                more=True,
            )
            await say(held, frame)

    return answer


def _ascending(first: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.arange(first, first + HELD_PAGES, dtype=np.uint64)


REPLICAS: dict[str, tuple[Answer, str]] = {
    "never answers": (_to_hello(), "did not answer"),
    "answers garbage": (_to_hello([b"\xc1garbage"]), "not msgpack"),
    "answers a thousand frames": (_to_hello([b"\x00"] * 1001), ""),
    "is somebody else": (_to_hello((msgspec.structs.replace(_WELCOME, node="x"), ())), "greeting"),
    "greets with an Ack": (_to_hello((_ACK, ())), "greeting"),
    "refuses at length": (_to_hello((Refused(code="x" * 4096, reason="y" * 4096), ())), "refuses"),
    "acknowledges what is not in flight": (_after_welcome(Commit, _ACK), "not in flight"),
    "acknowledges before anything was sent": (_to_hello((_WELCOME, ()), (_ACK, ())), "not in flight"),
    "refuses what is not in flight": (
        _after_welcome(Commit, Nack(epoch=EpochId(1, 78), reason="no", code="store", retry_with_base=True)),
        "not in flight",
    ),
    "grants too much": (_to_hello((_WELCOME, ()), (Credit(bytes=1 << 53), ())), "more credit"),
    "grants nothing, very often": (_after_welcome(Commit, Credit(bytes=0), times=30_000), _TALKS),
    "never acknowledges": (_after_welcome(Commit), "has not acknowledged"),
    "tells its readiness for ever": (
        _after_welcome(Commit, Readiness(restorable=False, reasons=("r" * 4096,) * 20), times=3000),
        _TALKS,
    ),
    "greets like a primary": (
        _to_hello((_WELCOME, ()), (Commit(digest=bytes(32)), ())),
        "not a receiver's",
    ),
    "tells without being asked": (
        _to_hello((_WELCOME, ()), (HeldPages(kind="task", ident=1, pages=0, more=False), (pack(b""),))),
        "without being asked",
    ),
    "holds pages in no order": (_holding(lambda row: np.array([5, 3], dtype=np.uint64)), "out of order"),
    "holds the same pages again and again": (
        _holding(lambda row: np.array([2, 3], dtype=np.uint64)),
        "twice",
    ),
    "holds more than it says": (_holding(_ascending, pages=3), "uncompress"),
    "holds what does not uncompress": (_holding(_ascending, bulk=b"\xff" * 99), "uncompress"),
    "speaks of other spaces": (_holding(_ascending, kind="task"), "another"),
    "holds pages for ever, one by one": (
        _holding(lambda row: np.array([row * 1], dtype=np.uint64)),
        "",
    ),
    "holds every page there is": (_holding(_ascending), ""),
}
"""What each does, and what the stream says of it (empty: nothing need be wrong)."""


def cases(seed: int, scale: Scale) -> list[Case]:
    """One case for each."""
    seconds = scale.of(0.3, 0.7, 1.5)
    return [
        Case(
            "hostile replicas",
            label,
            lambda directory, label=label: asyncio.run(_stream_to(directory, seed, label, seconds)),
        )
        for label in chance_of("replicas", seed).sample(
            list(REPLICAS), scale.of(8, len(REPLICAS), len(REPLICAS))
        )
    ] + [
        Case("keys that do not count", label, lambda directory, run=run: asyncio.run(run(directory, seed)))
        for label, run in KEYS.items()
    ]


async def _stream_to(directory: Path, seed: int, label: str, seconds: float) -> None:
    answer, words = REPLICAS[label]
    with Ends(directory, chance_of("replica", seed, label)) as ends:
        context = zmq.asyncio.Context()
        peers = [Peer(name="a", address="127.0.0.1", public_key=ends.a.public)]
        server = Server(
            context, address="127.0.0.1", port=0, keys=Keyring(ends.b, peers), timing=QUICK_LINK, most_per_s=0
        )

        async def receive() -> None:
            while True:
                incoming = await server.receive()
                message, _ = decode(incoming.frames)

                async def say(what: Message | list[Buffer], *bulk: Buffer) -> bool:
                    frames = what if isinstance(what, list) else encode(what, bulk)
                    return await server.send(incoming.connection, frames)  # noqa: B023

                await answer(message, say)

        tasks = [asyncio.create_task(server.serve()), asyncio.create_task(receive())]
        timing = _PATIENT if words == _TALKS else _IMPATIENT
        try:
            async with (
                ends.living(),
                ends.leading("web") as web,
                ends.leading("redis", port=server.port, timing=timing) as stream,
            ):
                with Resident() as resident:
                    offer(stream, ends.epoch())
                    said = ""
                    until_s = time.monotonic() + seconds
                    # Whoever never answers is waited for a while.
                    while time.monotonic() < until_s or (
                        words not in said and time.monotonic() < until_s + 5
                    ):
                        await asyncio.sleep(0.02)
                        said += stream.problem
                        await ends.gets_through(web, "web")
                if words not in said:
                    raise WrongCommitError(f"the stream says: {said[:200]}")
                if stream.progress.acknowledged not in (None, EpochId(1, 0)):
                    raise WrongCommitError(f"{stream.progress.acknowledged} counts as acknowledged")
                if resident.grown_mib > _MOST_MIB:
                    raise WrongCommitError(f"memory grew by {resident.grown_mib:.0f} MiB")
            ends.check()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            server.close()
            context.destroy(linger=0)


async def _unknown_key(directory: Path, seed: int) -> None:
    with Ends(directory, chance_of("unknown", seed)) as ends:
        async with ends.living() as receiver, ends.leading("web") as web:
            async with ends.leading("redis", keys=new_keys(), timing=_IMPATIENT) as stream:
                offer(stream, ends.epoch())
                await until(lambda: "key" in stream.problem)
                await ends.gets_through(web, "web")
            if receiver._sessions.keys() - {receiver._active["web"].connection}:
                raise WrongCommitError("a key that is nobody's has a session")
        ends.check()


async def _revoked_key(directory: Path, seed: int) -> None:
    """A key is revoked while an epoch under it is on its way, all but its last message."""
    with Ends(directory, chance_of("revoked", seed)) as ends:
        async with ends.living() as receiver:
            with ends.speaking(ends.c, "c") as thief, ends.speaking() as sound:
                await sound.greet(workload="web")
                await thief.greet()
                messages = ends.messages(ends.epoch(), None)
                for frames in messages[:-1]:
                    await thief.send(frames)
                await asyncio.sleep(0.05)
                peers = [peer for peer in ends.config().peers if peer.name != "c"]
                receiver._keys.replace(ends.b, peers)
                await thief.send(messages[-1])
                if isinstance(answer := await thief.hear(0.3), Ack) or ends.stores["redis"].newest:
                    raise WrongCommitError(f"a revoked key's epoch was answered by {answer}")
                web = ends.epoch("web")
                await sound.sends_whole(ends.messages(web, None))
            with ends.speaking(ends.c, "c") as again:
                await again.send(again.greeting())
                if await again.hear(0.3):
                    raise WrongCommitError("a revoked key was let in again")
            async with ends.leading("redis") as stream:
                await ends.gets_through(stream, "redis")
        ends.check()


KEYS: dict[str, Callable[[Path, int], Awaitable[None]]] = {
    "a key that is nobody's": _unknown_key,
    "a key that is revoked in the middle of an epoch": _revoked_key,
}
