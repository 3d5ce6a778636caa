"""Peers with a valid key that say what no sound primary says: refused or harmless, and nobody else notices.

A genuine epoch's messages are altered, one way after the other, before their digest is made or after. Between
these a sound epoch must get through, to the same workload and to another one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np

from common.bulk import EpochDigest, pack, unpack
from common.criu.images import SpaceKey
from common.messages import (
    PROTOCOL,
    Ack,
    AskHeld,
    AskStored,
    Commit,
    Doubt,
    HeldPages,
    Nack,
    Refused,
    Welcome,
    decode,
    encode,
)
from common.model import EpochId
from primary.capture import PageTable
from primary.outgoing import Seed
from replica.receive import Receiver
from tests.campaigns.torture.cases import Case, Scale, chance_of
from tests.campaigns.torture.wire_ends import SPACES, Ends, Messages, Speaker
from tests.unit.store_histories import WrongCommitError

Alter = Callable[[random.Random, Messages], Messages]

_SILENCE_S = 0.15
"""How long no answer means that there is none."""


def _some(chance: random.Random, messages: Messages, bulk: bool = False) -> int:
    """Choose a message: not always one of the many blocks of pages."""
    kinds: dict[str, list[int]] = {}
    for place, frames in enumerate(messages):
        if not bulk or len(frames) > 1:
            kinds.setdefault(msgpack.unpackb(frames[0])[1], []).append(place)
    return chance.choice(kinds[chance.choice(sorted(kinds))])


def _flipped(chance: random.Random, frame: Any) -> bytes:
    data = bytearray(frame)
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _flip_header(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages)
    return [*messages[:at], [_flipped(chance, messages[at][0]), *messages[at][1:]], *messages[at + 1 :]]


def _flip_bulk(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages, bulk=True)
    return [*messages[:at], [messages[at][0], _flipped(chance, messages[at][1])], *messages[at + 1 :]]


def _flip_content(chance: random.Random, messages: Messages) -> Messages:
    """Alter what a block unpacks to: the block itself stays sound."""
    for at in chance.sample(range(len(messages)), len(messages)):
        message, bulk = decode(messages[at])
        if type(message).__name__ == "Pages":
            raw = _flipped(chance, unpack(bulk[0], message.raw_bytes))
            return [*messages[:at], encode(message, [pack(raw)]), *messages[at + 1 :]]
    return _flip_bulk(chance, messages)


def _drop(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages)
    return messages[:at] + messages[at + 1 :]


def _repeat(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages)
    return messages[: at + 1] + messages[at:]


def _swap(chance: random.Random, messages: Messages) -> Messages:
    one, other = _some(chance, messages), _some(chance, messages)
    swapped = list(messages)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return swapped


def _cut_short(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages, bulk=True)
    frames = messages[at]
    short = frames[:1] if chance.random() < 0.5 else [frames[0], bytes(frames[1])[:-1]]
    return [*messages[:at], short, *messages[at + 1 :]]


def _more_frames(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages)
    more = [b""] * chance.choice((1, 3, 2000))
    return [*messages[:at], [*messages[at], *more], *messages[at + 1 :]]


_NUMBERS = (0, 1, 2, 3, 255, 4096, 8192, 65_536, 1 << 20, (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 63, -1)


def _lie(chance: random.Random, messages: Messages) -> Messages:
    """Put another number, or something else, into a field of a header."""
    at = _some(chance, messages)
    header = msgpack.unpackb(messages[at][0])
    fields = header[2]
    name = chance.choice(sorted(fields))
    was = fields[name]
    if isinstance(was, int) and not isinstance(was, bool):
        fields[name] = chance.choice((*_NUMBERS, was + 1, max(was - 1, 0), was + 4096, was * 2))
    elif isinstance(was, list):
        fields[name] = [
            chance.choice((was[0], 1, 2, 1 << 53)),
            # Not the last number that there is: no sound epoch could come after it.
            chance.choice((was[1], 1, was[1] + 7, (1 << 53) - 1000, (1 << 53) + 1)),
        ]
    else:
        fields[name] = chance.choice((None, not was, "../../etc", "x" * 5000, 1.5, [], float("nan")))
    return [*messages[:at], [msgpack.packb(header), *messages[at][1:]], *messages[at + 1 :]]


def _other_version(chance: random.Random, messages: Messages) -> Messages:
    at = _some(chance, messages)
    header = msgpack.unpackb(messages[at][0])
    header[0] = chance.choice((PROTOCOL - 1, PROTOCOL + 1, 1 << 60))
    return [*messages[:at], [msgpack.packb(header), *messages[at][1:]], *messages[at + 1 :]]


def _nested(chance: random.Random, messages: Messages) -> Messages:
    """A header that is nested as deep as msgpack allows, or deeper."""
    at = _some(chance, messages)
    depth = chance.choice((100, 900, 1000, 1015, 1022, 1024, 200_000))
    sound = msgpack.packb(msgpack.unpackb(messages[at][0])[:3])
    deep = b"\x94" + sound[1:] + b"\x91" * depth + b"\x90"
    return [*messages[:at], [deep, *messages[at][1:]], *messages[at + 1 :]]


def _inflated(chance: random.Random, messages: Messages) -> Messages:
    """A block that unpacks to more than it may."""
    at = _some(chance, messages, bulk=True)
    size = msgpack.unpackb(messages[at][0])[3]
    bomb = pack(bytes(chance.choice(((1 << 20) + 1, 64 << 20))))
    header = msgpack.unpackb(messages[at][0])
    header[3] = [len(bomb)] if chance.random() < 0.8 else size
    return [*messages[:at], [msgpack.packb(header), bomb], *messages[at + 1 :]]


def _flags(chance: random.Random, messages: Messages) -> Messages:
    """Runs with other flags, starts or counts, as they stand in their frame."""
    spaces = [at for at, frames in enumerate(messages) if msgpack.unpackb(frames[0])[1] == "space"]
    at = chance.choice(spaces)
    message, bulk = decode(messages[at])
    runs = np.frombuffer(unpack(bulk[0]), dtype=[("start", "<u8"), ("count", "<u4"), ("flags", "<u4")]).copy()
    if len(runs):
        run = chance.randrange(len(runs))
        field = chance.choice(("start", "count", "flags", "flags", "flags"))
        values = {
            "start": (0, 1, 1 << 52, (1 << 64) - 1),
            "count": (0, 1, 2, (1 << 32) - 1),
            "flags": (0, 1, 3, 4, 5, 0x10, 0x14, 0x21, 0x24, 0x29, 0x40, 0x44, 0x84, 0xC4, 0x104, 0xFFFFFFFF),
        }[field]
        runs[field][run] = chance.choice(values)
    return [*messages[:at], encode(message, [pack(runs.tobytes())]), *messages[at + 1 :]]


def _abandoned(chance: random.Random, messages: Messages) -> Messages:
    return messages[: _some(chance, messages)]


def _begun_again(chance: random.Random, messages: Messages) -> Messages:
    return messages[: _some(chance, messages)] + messages


ALTERATIONS: dict[str, Alter] = {
    "bits of a header": _flip_header,
    "bits of a bulk frame": _flip_bulk,
    "bits of a page": _flip_content,
    "a message left out": _drop,
    "a message repeated": _repeat,
    "messages swapped": _swap,
    "a message cut short": _cut_short,
    "more frames": _more_frames,
    "a field that lies": _lie,
    "other runs of pages": _flags,
    "another version": _other_version,
    "a nested header": _nested,
    "an inflated block": _inflated,
    "an abandoned epoch": _abandoned,
    "an epoch begun twice": _begun_again,
}


def with_digest(messages: Messages) -> Messages:
    """Give altered messages the digest that fits them."""
    digest = EpochDigest()
    made: Messages = []
    for frames in messages:
        is_commit = len(frames) == 1 and b"\xa6commit" in bytes(frames[0])[:9]
        made.append(encode(Commit(digest=digest.value())) if is_commit else frames)
        if not is_commit:
            digest.add(frames)
    return made


def cases(seed: int, scale: Scale) -> list[Case]:
    """Alterations, a dozen to a case; and each special peer."""
    return [*altered(seed, scale), *peers(seed, scale)]


def altered(seed: int, scale: Scale, only: str = "") -> list[Case]:
    """Alterations, a dozen to a case: all kinds, or `only` one."""
    found = []
    for number in range(scale.of(6, 60, 400)):
        name = f"{seed}-{number}"
        found.append(
            Case(
                "altered messages under a valid key",
                f"peer {name}",
                lambda directory, name=name: asyncio.run(_altered_sessions(directory, name, scale, only)),
            )
        )
    return found


def peers(seed: int, scale: Scale) -> list[Case]:
    """Each special peer."""
    found = []
    for label, peer in PEERS.items():
        found.append(
            Case(
                "hostile peers with a valid key",
                label,
                lambda directory, label=label, peer=peer: asyncio.run(
                    _beside(directory, f"{seed}-{label}", peer)
                ),
            )
        )
    return found


async def _altered_sessions(directory: Path, name: str, scale: Scale, only: str) -> None:
    chance = chance_of("altered", name)
    with Ends(directory, chance) as ends, ends.log.counting():
        async with ends.living() as receiver, ends.leading("web") as web:
            with ends.speaking() as speaker:
                await speaker.greet()
                base = ends.epoch()
                await speaker.sends_whole(ends.messages(base, None))
            for _ in range(scale.of(8, 12, 12)):
                label = only or chance.choice(sorted(ALTERATIONS))
                before = receiver.refusals.total()
                with ends.speaking() as speaker:
                    await speaker.greet()
                    epoch = ends.epoch()
                    sound = ends.messages(epoch, base if chance.random() < 0.8 else None)
                    messages = ALTERATIONS[label](chance, sound)
                    if chance.random() < 0.5:
                        messages = with_digest(messages)
                        ends.forged.add(epoch.id)
                    answer = await _answer_to(speaker, messages)
                newest = ends.stores["redis"].newest
                if newest is None:
                    raise WrongCommitError(f"{base.id} was acknowledged and is not held")
                if isinstance(answer, Ack) and answer.epoch != newest.id:
                    raise WrongCommitError(f"{label}: {answer.epoch} was acknowledged, not committed")
                if newest.id not in ends.captured["redis"]:
                    ends.forged.add(newest.id)  # under a number that lies
                if isinstance(answer, Refused) and receiver.refusals.total() == before:
                    raise WrongCommitError(f"{label}: a refusal was not counted")
                ends.check()
                if newest.id != base.id:
                    # Whatever it was, it is held: the next one is a whole epoch again.
                    ends.number = max(ends.number, newest.id.epoch)
                    if ends.number > 1 << 52:
                        break  # nothing is newer than that
                    base = ends.epoch()
                    with ends.speaking() as speaker:
                        await speaker.greet()
                        await speaker.sends_whole(ends.messages(base, None))
            await ends.gets_through(web, "web")
        ends.check()


async def _answer_to(speaker: Speaker, messages: Messages) -> object:
    for frames in messages:
        await speaker.send(frames)
    answer = await speaker.hear(_SILENCE_S)
    return answer


Peer = Callable[[Ends, Receiver], Any]


async def _beside(directory: Path, seed: str, peer: Peer) -> None:
    """Let a hostile peer do what it does, while and after which sound streams go on."""
    chance = chance_of(seed)
    with Ends(directory, chance) as ends, ends.log.counting():
        async with ends.living() as receiver, ends.leading("web") as web:
            await ends.gets_through(web, "web")
            hostile = asyncio.create_task(peer(ends, receiver))
            try:
                while not hostile.done():
                    await ends.gets_through(web, "web")
                    await asyncio.sleep(0.02)
                await hostile
            finally:
                hostile.cancel()
            ends.check()
            known = receiver._guard.newest("redis")
            term = known.term if known else 1
            async with ends.leading("redis", term=term) as stream:
                await ends.gets_through(stream, "redis", term)
        ends.check()


async def _older_term(ends: Ends, receiver: Receiver) -> None:
    receiver._guard.advance("redis", 3, "a")
    with ends.speaking() as speaker:
        _must_be_refused(await speaker.greet(2), "stale-term")
        await speaker.greet(3)
        messages = ends.messages(ends.epoch(term=3), None, term=3)
        for frames in messages[:-1]:
            await speaker.send(frames)
        await asyncio.sleep(0.05)
        receiver._guard.advance("redis", 4, "c")
        await speaker.send(messages[-1])
        _must_be_refused(await speaker.hear(), "stale-term")
    receiver._guard.advance("redis", 5, "a")


async def _second_leader(ends: Ends, receiver: Receiver) -> None:
    with ends.speaking() as first, ends.speaking(ends.c, "c") as second:
        await first.greet()
        _must_be_refused(await second.greet(), "stale-term")
        await first.sends_whole(ends.messages(ends.epoch(), None))
    with ends.speaking(ends.c, "a") as liar:
        _must_be_refused(await liar.greet(), "identity")


async def _replays(ends: Ends, receiver: Receiver) -> None:
    first = ends.epoch()
    messages = ends.messages(first, None)
    with ends.speaking() as speaker:
        await speaker.greet()
        await speaker.sends_whole(messages)
        await speaker.sends_whole(ends.messages(ends.epoch(), first))
    with ends.speaking() as again:
        await again.greet()
        answer = await _answer_to(again, messages)
        if not isinstance(answer, Nack) or answer.code != "not-newer":
            raise WrongCommitError(f"a replayed epoch was answered by {answer}")


async def _greets_and_nothing_else(ends: Ends, receiver: Receiver) -> None:
    with ends.speaking() as silent:
        await silent.greet()
        await asyncio.sleep(0.3)


async def _greets_300_times(ends: Ends, receiver: Receiver) -> None:
    with ends.speaking() as speaker:
        for number in range(300):
            await speaker.send(speaker.greeting(workload="redis" if number % 2 else "web-not"))
        await speaker.hear(0.5)


async def _trickles(ends: Ends, receiver: Receiver) -> None:
    patient = receiver._limits
    receiver._limits = replace(patient, patience_s=0.5)
    with ends.speaking() as speaker:
        await speaker.greet()
        begin, metadata, *_ = ends.messages(ends.epoch(), None)
        await speaker.send(begin)
        piece = encode(msgspec.structs.replace(decode(metadata)[0], size=1, more=True), [pack(b"x")])
        for _ in range(100):
            await speaker.send(piece)
            if answer := await speaker.hear(0.1):
                break
        _must_be_refused(answer, "no-session")
    receiver._limits = patient


async def _asks_nonsense(ends: Ends, receiver: Receiver) -> None:
    with ends.speaking() as speaker:
        await speaker.greet()
        epoch = ends.epoch()
        await speaker.sends_whole(ends.messages(epoch, None))
        for asked, row in ((epoch.id, 0), (epoch.id, 1 << 53), (EpochId(9, 9), 0), (None, 5)):
            for key in (*SPACES, SpaceKey("task", 1 << 53)):
                await speaker.send(
                    encode(
                        AskHeld(
                            epoch=asked,
                            seed=0 if asked else 1 << 52,
                            secret=bytes(8),
                            kind=key.kind,
                            ident=key.ident,
                            first_row=row,
                        )
                    )
                )
                answer = await speaker.hear()
                if not isinstance(answer, HeldPages) or (row and answer.pages) or answer.more:
                    raise WrongCommitError(f"a question was answered by {answer}")


async def _verifies_nonsense(ends: Ends, receiver: Receiver) -> None:
    """It asks for pages that cannot be, and doubts what is stored, before and after it is sent anew."""
    most = 1 << 53
    with ends.speaking() as speaker:
        await speaker.greet()
        epoch = ends.epoch()
        await speaker.sends_whole(ends.messages(epoch, None))
        for asked in (epoch.id, EpochId(9, 9)):
            for first, end in ((most, most), (5, 1), (most - 1, most), (0, 0)):
                for key in (*SPACES, SpaceKey("task", most)):
                    ask = AskStored(
                        epoch=asked,
                        secret=bytes(8),
                        kind=key.kind,
                        ident=key.ident,
                        first_page=first,
                        end_page=end,
                    )
                    await speaker.send(encode(ask))
                    answer = await speaker.hear()
                    if not isinstance(answer, HeldPages) or answer.pages or answer.more:
                        raise WrongCommitError(f"a question was answered by {answer}")
        for named in (EpochId(1 << 53, 1 << 53), epoch.id):
            await speaker.send(encode(Doubt(epoch=named, reason="of it")))
        for frames in ends.messages(following := ends.epoch(), epoch):
            await speaker.send(frames)
        if not isinstance(answer := await speaker.hear(), Nack) or answer.code != "base":
            raise WrongCommitError(f"{following.id} stands on what is in doubt and was answered by {answer}")
        await speaker.sends_whole(ends.messages(whole := ends.epoch(), None))
        await speaker.sends_whole(ends.messages(ends.epoch(), whole))


async def _takes_from_a_seed_that_is_gone(ends: Ends, receiver: Receiver) -> None:
    """Two epochs break off; the next one takes pages from what was kept of the first under its name."""
    ends.pages = 150
    names, kept = [], []
    for pieces in (6, -1):
        epoch = ends.epoch()
        with ends.speaking() as speaker:
            await speaker.greet()
            for frames in ends.messages(epoch, None)[:pieces]:
                await speaker.send(frames)
            await asyncio.sleep(0.1)
        with ends.speaking() as speaker:
            welcome = await speaker.greet()
            if not isinstance(welcome, Welcome) or not welcome.seed:
                raise AssertionError(f"nothing was kept: {welcome}")
        names.append(welcome.seed)
        kept.append(epoch)
    last = ends.epoch(memory=ends.captured["redis"][kept[0].id].memory)
    # What came of the first are two of its spaces.
    table = PageTable(kept[0].spaces[:2])
    with ends.speaking() as speaker:
        await speaker.greet()
        answer = await _answer_to(speaker, ends.messages(last, None, seed=Seed(names[0], table)))
        if not isinstance(answer, Nack):
            raise WrongCommitError(f"pages of a seed that is gone were taken: {answer}")


async def _loses_its_base(ends: Ends, receiver: Receiver) -> None:
    """The replica finds its newest epoch unusable while its primary counts on it."""
    async with ends.leading("redis") as stream:
        await ends.gets_through(stream, "redis")
        await ends.gets_through(stream, "redis")
        ends.stores["redis"].discard(ends.acknowledged["redis"], "found wanting")
        await ends.gets_through(stream, "redis")


def _must_be_refused(answer: object, code: str) -> None:
    if not isinstance(answer, Refused) or answer.code != code:
        raise WrongCommitError(f"not refused as {code}, but answered by {answer}")


PEERS: dict[str, Peer] = {
    "an older term, before and in the middle of an epoch": _older_term,
    "a second leader of the term, and another's name": _second_leader,
    "an old session again": _replays,
    "a greeting and nothing else": _greets_and_nothing_else,
    "300 greetings": _greets_300_times,
    "an epoch that trickles": _trickles,
    "questions without sense": _asks_nonsense,
    "a verification without sense": _verifies_nonsense,
    "pages of a seed that is gone": _takes_from_a_seed_that_is_gone,
    "a base that is gone": _loses_its_base,
}
