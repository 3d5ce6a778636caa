"""Signals at random moments of capture: SIGKILL and SIGSTOP to criu and to the agent, under load.

    python -m tests.campaigns.kill_series --rounds 120 --seed 1 [--output json]

A redis in the lab is captured without pause, while a client writes numbered values. Each round waits
until a dump is under way (a task of redis has a tracer), lets a random part of it pass, sends one signal,
and then asks: does redis answer, is no task of it traced or stopped, within the thaw deadline? Every value
that was acknowledged must still be there. After a round the agent is continued, or started again.

A redis that died is counted as *lost*. That can only follow a SIGKILL of criu, in the windows that
docs/concepts/freeze.md names; any other loss, a freeze past the deadline, or a wrong value fails the run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from bench.summary import Summary, summarize
from common.container import running_init_pid, workload_pids
from outlive.cli.running import configure_logs
from outlive.cluster import eventually
from outlive.probe import KEY_PREFIX
from tests.system.clusters import NAME, Protected, protected_redis

_FREEZE_DEADLINE_MS = 2000
_INTERVAL_MS = 50
_GENERATION = f"{KEY_PREFIX}generation"

Target = Literal["criu", "agent"]
KINDS: tuple[tuple[Target, signal.Signals], ...] = (
    ("criu", signal.SIGKILL),
    ("criu", signal.SIGSTOP),
    ("agent", signal.SIGKILL),
    ("agent", signal.SIGSTOP),
)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One signal and what came of it."""

    target: Target
    signal: str
    into_dump_ms: float
    traced: bool
    """A task of redis had a tracer just before the signal."""
    free_after_ms: float
    """Until redis answered and no task of it was traced or stopped."""
    lost: bool


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of one target and signal."""

    target: str
    signal: str
    rounds: int
    while_traced: int
    free_after_ms: Summary
    lost: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole series."""

    schema_version: int
    seed: int
    backend: str
    rounds: int
    thaw_deadline_ms: int
    fill_mib: int
    kinds: tuple[Kind, ...]
    late: int
    """Rounds in which redis was not free within the thaw deadline."""
    lost_unexpectedly: int
    wrong_values: int

    @property
    def passed(self) -> bool:
        """Whether nothing happened but what is documented."""
        return not (self.late or self.lost_unexpectedly or self.wrong_values)


class Series:
    """Runs rounds against one cluster."""

    def __init__(self, cluster: Protected, chance: random.Random) -> None:
        self._cluster = cluster
        self._node = cluster.nodes["a"]
        self._chance = chance
        self._written = 0
        self.wrong_values = 0

    async def round(self, target: Target, number: signal.Signals) -> Round:
        """Send one signal in the middle of a dump, and see."""
        await self._cluster.wait_for_epochs(1, timeout_s=60.0)
        await self._write()
        dump_ms = self._dump_ms(await self._node.metrics())
        started_s = await asyncio.to_thread(self._wait_for_dump)
        time.sleep(self._chance.uniform(0.0, dump_ms / 1000))  # noqa: ASYNC251 - to the millisecond
        pid = self._pid_of(target)
        incarnation = running_init_pid(self._node.config, NAME)
        traced = self._traced()
        sent_s = time.monotonic()
        if pid is not None:
            os.kill(pid, number)
        lost = not await self._wait_until_free(sent_s, incarnation)
        result = Round(
            target=target,
            signal=number.name,
            into_dump_ms=(sent_s - started_s) * 1000,
            traced=traced,
            free_after_ms=(time.monotonic() - sent_s) * 1000,
            lost=lost,
        )
        await self._mend(target, number, pid)
        if lost:
            self._written = 0
            await eventually(self._cluster.answers, what="redis was started again")
        await self._check_values()
        return result

    async def _write(self) -> None:
        """Write a few numbered values; what is acknowledged must stay."""
        for _ in range(5):
            number = self._written + 1
            await self._cluster.redis("set", f"{KEY_PREFIX}{number}", str(number))
            self._written = number

    async def _check_values(self) -> None:
        if self._written:
            held = await self._cluster.present(self._written)
            self.wrong_values += self._written - len(held)

    def _wait_for_dump(self) -> float:
        """Spin until a task of redis is traced; blocking."""
        deadline_s = time.monotonic() + 30
        while not self._traced():
            if time.monotonic() > deadline_s:
                raise TimeoutError("no dump began within 30 s")
            time.sleep(0.0005)
        return time.monotonic()

    def _tasks(self) -> list[Path]:
        return [
            task
            for pid in workload_pids(self._node.config, NAME)
            for task in Path(f"/proc/{pid}/task").glob("*")
        ]

    def _traced(self) -> bool:
        return any("TracerPid:\t0\n" not in _status(task) for task in self._tasks())

    def _stopped(self) -> bool:
        return any("State:\tT" in text or "State:\tt" in text for text in map(_status, self._tasks()))

    def _dump_ms(self, metrics: object) -> float:
        recent = metrics.workloads[0].freeze_ms[-5:] if metrics.workloads else ()  # type: ignore[attr-defined]
        return statistics.median(recent) if recent else 50.0

    def _pid_of(self, target: Target) -> int | None:
        agent = self._node.processes["agent"].pid
        if target == "agent":
            return agent
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        dumping = [int(child) for child in children if "swrk" in _command(int(child))]
        return max(dumping, default=None)

    async def _wait_until_free(self, sent_s: float, incarnation: int | None) -> bool:
        """Wait until redis answers and no task is held; False if it is gone."""
        limit_s = sent_s + (_FREEZE_DEADLINE_MS + 1000) / 1000 + 5.0
        while time.monotonic() < limit_s:
            if running_init_pid(self._node.config, NAME) != incarnation:
                return False
            if not self._traced() and not self._stopped():
                return await self._cluster.redis("ping", check=False) == "PONG"
            await asyncio.sleep(0.002)
        return True  # late: the time says so

    async def _mend(self, target: Target, number: signal.Signals, pid: int | None) -> None:
        """Let the agent go on, or start a new one."""
        if target == "agent" and number == signal.SIGSTOP and pid is not None:
            os.kill(pid, signal.SIGCONT)
        if target == "agent" and number == signal.SIGKILL:
            await self._node.processes.pop("agent").wait()
            await self._node.start("agent")


async def run_series(
    rounds: int, seed: int, fill_mib: int, *, backend: str = "stock", talk: bool = False
) -> Report:
    """Run `rounds` rounds, the kinds taking turns in random order."""
    chance = random.Random(seed)
    done: list[Round] = []
    async with protected_redis(
        ("a", "b"),
        fill_mib=fill_mib,
        on_exit="restart",
        epoch_interval_ms=_INTERVAL_MS,
        freeze_deadline_ms=_FREEZE_DEADLINE_MS,
        settings={"capture": {"backend": backend}},
    ) as cluster:
        series = Series(cluster, chance)
        while len(done) < rounds:
            kinds = list(KINDS)
            chance.shuffle(kinds)
            for target, number in kinds[: rounds - len(done)]:
                done.append(await series.round(target, number))
                if talk:
                    print(f"{len(done)}/{rounds} {done[-1]}", file=sys.stderr)
    deadline_ms = _FREEZE_DEADLINE_MS + 1000
    unexpected = [each for each in done if each.lost and (each.target, each.signal) != ("criu", "SIGKILL")]
    return Report(
        schema_version=1,
        seed=seed,
        backend=backend,
        rounds=rounds,
        thaw_deadline_ms=deadline_ms,
        fill_mib=fill_mib,
        kinds=tuple(_of_kind(done, target, number.name) for target, number in KINDS),
        late=sum(each.free_after_ms > deadline_ms + 500 for each in done if not each.lost),
        lost_unexpectedly=len(unexpected),
        wrong_values=series.wrong_values,
    )


def _of_kind(rounds: list[Round], target: str, name: str) -> Kind:
    ours = [each for each in rounds if (each.target, each.signal) == (target, name)]
    return Kind(
        target=target,
        signal=name,
        rounds=len(ours),
        while_traced=sum(each.traced for each in ours),
        free_after_ms=summarize([each.free_after_ms for each in ours if not each.lost]),
        lost=sum(each.lost for each in ours),
    )


def _status(task: Path) -> str:
    try:
        return (task / "status").read_text()
    except OSError:
        return "TracerPid:\t0\n"  # it has ended


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main() -> int:
    """Read the command line, run, print one JSON object; exit 1 if something undocumented happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--fill-mib", type=int, default=32)
    parser.add_argument("--backend", choices=("stock", "auto"), default="stock")
    options = parser.parse_args()
    configure_logs("warning")
    print(f"seed {options.seed}", file=sys.stderr)
    report = asyncio.run(
        run_series(options.rounds, options.seed, options.fill_mib, backend=options.backend, talk=True)
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
