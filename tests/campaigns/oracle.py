"""The memory oracle: what the fast backend captures is, page for page, what stock CRIU dumps at that instant.

    python -m tests.campaigns.oracle --epochs 2000 --seeds 3 [--seed 1] [--every 4] [--tracker soft-dirty]
                                    [--troubled]

A program that changes its memory in every way there is (`tests/oracle/mutator.c`) runs in a container and
is captured by the fast backend, epoch after epoch, as the agent does it. In a sample of epochs the
container's cgroup is frozen between pre-copy and dump; the fast backend takes its epoch, and then, still
frozen, the stock backend takes an independent one. Both must have the same pages with the same content. In
every fourth one of the other epochs, all that is held for unchanged is read again within the freeze, which is
one like any other. Before every second one on average, what was written is copied ahead, be it little or hot.
Epochs are committed to a real store, as by a replica that misses every third one. After every 50th the
program is asked whether it finds itself intact; every other seed also has what the store holds brought to
life beside it, in a network namespace of its own, and asked the same (its files must not change then: those
paths are left out).

A run counts only if every path of the program was taken. What goes wrong is told with the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import msgspec
import numpy as np

from common.errors import CaptureError
from common.model import EpochId
from outlive.cli.running import configure_logs
from primary import userfault_tracker
from primary.tracking import TrackerName, choose
from primary.userfault import Userfault
from tests.campaigns.twins import Replica, Subject, restored_elsewhere, running_subject
from tests.oracle.build import ask, build

_FEW_PAGES = 64
"""More than that is copied ahead, where it always is."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One seed."""

    seed: int
    epochs: int
    compared: int
    pages_compared: int
    reread: int
    """Epochs in which all that was held for unchanged was read once more."""
    refused: int
    """Captures that failed and were tried again: a vfork, too many dirty pages."""
    reasons: dict[str, int]
    """Of those, how many for which reason; numbers in it are left out."""
    checks: int
    restored: int
    steps: int
    wrong: tuple[str, ...]
    untouched: tuple[str, ...]
    """Paths of the program that were never taken."""
    freeze_p50_ms: float
    stops: int
    """Epochs for which it stood still once more, ahead of the freeze."""
    troubles: dict[str, int]
    """What was made to happen before so many attempts."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole campaign."""

    schema_version: int
    backend: str
    tracker: str
    seconds: float
    runs: tuple[Run, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong and every path was taken."""
        return not any(run.wrong or run.untouched for run in self.runs)


@contextlib.contextmanager
def copying_ahead(*, always: bool) -> Iterator[None]:
    """Have pre-copy done whether it pays or not."""
    if not always:
        yield
        return
    with patch.multiple(userfault_tracker, _FEW_PAGES=_FEW_PAGES, _MOST_HOT_PAGES=_FEW_PAGES):
        yield


async def run_seed(
    seed: int,
    epochs: int,
    every: int,
    *,
    options: tuple[str, ...] = (),
    restores: bool = False,
    tracker: TrackerName | None = None,
    check_every: int = 50,
    troubled: bool = False,
    talk: bool = False,
    on_disk: bool = False,
) -> Run:
    """Capture so many epochs of one program; `troubled`: with what can happen to a tracker and an agent.

    The store is in memory, for what a disk makes of it is another campaign's subject; `on_disk` if there is
    too little of that.
    """
    if restores:
        options = (*options, "--no-file-changes")
    chance = random.Random(seed)
    wrong: list[str] = []
    compared = pages = reread = refused = checks = steps = restored = stops = 0
    freezes: list[float] = []
    reasons: Counter[str] = Counter()
    troubles: Counter[str] = Counter()
    missing: list[str] = []
    async with running(seed, options, tracker) as (subject, port):
        node = subject.config.node
        store = Path(node.state_dir if on_disk else node.image_dir) / "store"
        replica = Replica(store, subject.config, subject.spec)
        number = 0
        while number < epochs and refused < 5 * epochs and not wrong:
            if ending := subject.ending():
                wrong.append(f"after epoch {number} the program ended with {ending}")
                break
            epoch = EpochId(1, number + refused + 1)
            trouble: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
            if troubled:
                kind, trouble = await _trouble(subject, replica, chance)
                troubles[kind] += 1
            try:
                with trouble, copying_ahead(always=chance.randrange(2) == 0):
                    if chance.randrange(every) == 0:
                        captured, found, size = await subject.compare(epoch, replica.holds)
                        compared, pages = compared + 1, pages + size
                        wrong += [f"epoch {number + 1}: {each}" for each in found]
                    else:
                        rereads = chance.randrange(4) == 0
                        reread += rereads
                        with subject.fast.rereading(wrong if rereads else None):
                            captured = await subject.fast.capture(epoch, replica.holds)
            except CaptureError as error:
                refused += 1
                reasons[re.sub(r"[0-9]+", "#", error.message)] += 1
                if talk:
                    print(f"seed {seed}, epoch {number + 1}: {error}", file=sys.stderr)
                await asyncio.sleep(0.05)
                continue
            number += 1
            freezes.append(captured.freeze.total_ms)
            stops += captured.freeze.ahead_ms > 0
            # A slow replica takes only some of them.
            if chance.randrange(3) or number % check_every == 0:
                try:
                    await asyncio.to_thread(replica.take, captured)
                except (CaptureError, AssertionError) as error:
                    wrong.append(f"epoch {number}: {error}")
            captured.release()
            if talk and number % 10 == 0:
                print(f"seed {seed}: {number}/{epochs}, {compared} compared", file=sys.stderr)
            if number % check_every == 0:
                answer = await asyncio.to_thread(ask, port, "check")
                checks += 1
                steps, missing = answer["steps"], answer["missing"]
                if not answer["ok"]:
                    wrong.append(f"epoch {number}: it finds itself damaged: {answer['error']}")
                if restores and not wrong:
                    newest = replica.store.records()[-1]
                    found = await restored_elsewhere(subject, newest.path, newest.id, port=port)
                    restored += 1
                    wrong += [f"epoch {number}, restored: {found}"] if found else []
            await asyncio.sleep(chance.uniform(0.0, 0.1))
        replica.store.close()
    if number < epochs and not wrong:
        wrong.append(f"no more than {number} of {epochs} epochs could be captured: {dict(reasons)}")
    for each in wrong if talk else ():
        print(f"seed {seed}: WRONG: {each}", file=sys.stderr)
    return Run(
        seed=seed,
        epochs=number,
        compared=compared,
        pages_compared=pages,
        reread=reread,
        refused=refused,
        reasons=dict(reasons),
        checks=checks,
        restored=restored,
        steps=steps,
        wrong=tuple(wrong),
        untouched=tuple(sorted(missing)),
        freeze_p50_ms=float(np.median(freezes)) if freezes else 0.0,
        stops=stops,
        troubles=dict(troubles),
    )


async def _trouble(
    subject: Subject, replica: Replica, chance: random.Random
) -> tuple[str, contextlib.AbstractContextManager[object]]:
    """Make trouble, mostly none; return which, and what holds while an epoch is captured."""
    kind = chance.choice(("none",) * 6 + ("tracker killed", "agent killed", "registrations refused"))
    if kind == "tracker killed":
        subject.lose_track(chance)
    elif kind == "agent killed":
        await subject.start_over()
        replica.distrust()
    elif kind == "registrations refused":
        # All of an epoch's: the kernel refuses what it cannot track, never a part of what it could.
        return kind, patch.object(Userfault, "_register", lambda self, start, end: False)
    return kind, contextlib.nullcontext()


@contextlib.asynccontextmanager
async def running(
    seed: int, options: tuple[str, ...], tracker: TrackerName | None
) -> AsyncIterator[tuple[Subject, int]]:
    """Run the program in a container, and wait until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]

    def command(directory: Path) -> tuple[str, ...]:
        scratch = directory / "scratch"
        scratch.mkdir()
        words = ("--seed", str(seed), "--scratch", str(scratch), "--port", str(port), "--memory-mib", "48")
        return (str(build(directory / "program")), *words, *options)

    async with running_subject(command, tracker) as subject:
        for _ in range(200):
            try:
                await asyncio.to_thread(ask, port, "counters")
                break
            except OSError:
                await asyncio.sleep(0.05)
        yield subject, port


async def run_campaign(
    first_seed: int, seeds: int, epochs: int, every: int, tracker: TrackerName, *, troubled: bool, talk: bool
) -> Report:
    """Run seed after seed; of every two, one has its images restored."""
    started_s = time.monotonic()
    runs = [
        await run_seed(
            first_seed + each,
            epochs,
            every,
            restores=each % 2 == 0,
            tracker=tracker,
            troubled=troubled,
            talk=talk,
        )
        for each in range(seeds)
    ]
    return Report(
        schema_version=1,
        backend="fast",
        tracker=tracker,
        seconds=round(time.monotonic() - started_s, 1),
        runs=tuple(runs),
    )


def main() -> int:
    """Read the command line, run, print one JSON object; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=700, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--every", type=int, default=4, help="one epoch of so many is compared")
    parser.add_argument("--tracker", choices=get_args(TrackerName), help="else the best that works here")
    parser.add_argument(
        "--troubled", action="store_true", help="kill trackers and agents, refuse registrations"
    )
    options = parser.parse_args()
    configure_logs("warning")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what runs is cleaned up
    print(f"seed {options.seed}", file=sys.stderr)
    tracker = options.tracker or choose("auto").name
    if tracker is None:
        parser.error(choose("auto").reason)
    report = asyncio.run(
        run_campaign(
            options.seed,
            options.seeds,
            options.epochs,
            options.every,
            tracker,
            troubled=options.troubled,
            talk=True,
        )
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
