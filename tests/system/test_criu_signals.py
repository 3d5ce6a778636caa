"""criu is killed, stopped or interrupted at random moments of a dump: what becomes of the process.

Each test prints its counts (`pytest -s`); OUTLIVE_SIGNAL_ROUNDS sets how many dumps each makes.
"""

import asyncio
import collections
import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_criu_dump import Target

from common.criu.locate import locate_criu
from common.criu.rpc import DumpOptions, spawn
from common.errors import CaptureError

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="criu needs root"),
    pytest.mark.timeout(600),
]

ROUNDS = int(os.environ.get("OUTLIVE_SIGNAL_ROUNDS", "40"))
DUMP_S = 0.009
"""About how long a dump of the target takes from the hook `pre-dump` on."""


class Victims:
    """A target at a time; a new one when the last was lost."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.current = Target(directory)

    def replace(self) -> None:
        self.end()
        self.current = Target(self._directory)

    def end(self) -> None:
        self.current.process.kill()
        self.current.process.wait()


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Victims]:
    victims = Victims(tmp_path)
    yield victims
    victims.end()


async def dump(
    target: Target, images: Path, disturb: signal.Signals | None, after_s: float, deadline_s: float
) -> bool:
    """Dump afresh, sending criu a signal some time after `pre-dump`; say whether it worked."""
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    swrk = await spawn(locate_criu(None))

    async def hook(name: str, pid: int | None) -> bool:
        if name == "pre-dump" and disturb is not None:
            asyncio.get_running_loop().call_later(after_s, send)
        return True

    def send() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(swrk.pid, disturb or signal.SIGCONT)

    try:
        await swrk.dump(DumpOptions(pid=target.pid, images_dir=images, deadline_s=deadline_s), hook)
    except CaptureError:
        return False
    return True


@pytest.mark.parametrize("disturb", [signal.SIGKILL, signal.SIGSTOP, signal.SIGALRM], ids=lambda s: s.name)
async def test_a_signal_to_criu_never_leaves_the_process_frozen(
    victims: Victims, tmp_path: Path, disturb: signal.Signals
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    for _ in range(ROUNDS):
        target = victims.current
        deadline_s = 0.1 if disturb is signal.SIGSTOP else 10
        worked = await dump(target, tmp_path / "images", disturb, moments.uniform(0, DUMP_S), deadline_s)
        ended = time.monotonic()
        runs = target.runs_within(1)
        counts["dumped" if worked else "failed"] += 1
        if not runs:
            # The one known harm: criu's death (or an interrupted wait) while the process executes a single
            # system call for it, whose end is a trap that then nobody catches.
            assert target.process.poll() == -signal.SIGTRAP, "it is frozen"
            assert disturb is not signal.SIGSTOP
            counts["lost to SIGTRAP"] += 1
            victims.replace()
            continue
        assert time.monotonic() - ended < 0.5
        assert not target.is_traced()
        assert await dump(target, tmp_path / "images", None, 0, 10), "it cannot be dumped any more"
    print(disturb.name, dict(counts))
    assert counts["failed"] > 0 or disturb is signal.SIGALRM
