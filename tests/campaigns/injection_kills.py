"""SIGKILL and SIGSTOP of the injector at random moments of an injection: what becomes of the target.

    python -m tests.campaigns.injection_kills --rounds 240 --seed 1

Each round starts an injector on a target and sends it a signal. In a third of the rounds that comes at a
random moment of its whole life (most of which it spends starting and looking things up), in the others a
random time after it reached a random stage, since the stages in which it holds the target on borrowed
registers last only some 50 µs together. SIGSTOP is followed by SIGCONT 20 ms later. The injector is
`native/inject.c`, built so that it shows its stage in a shared page; a killed one's last stage is *where* it
was killed.

Then the target must, within two seconds: count on, with every check that it makes of itself passing (all
registers, flags, red zone, return values and durations of system calls); have its signal mask; have no
tracer; and have no userfaultfd open. If not, it is *lost* and replaced.

A second series kills the plain way (no code that heals in the target), which machines other than x86_64 use,
to tell what it would cost. Losses there, in the stages from BORROWED up to before RETURNED, are the
documented price, and so is one of the target with a seccomp filter at AIMED (native/inject.c says why); any
other loss, in either series, fails the run.

The targets are here as well: tests/system/test_injection.py uses them.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from primary.injection import Answer, Stage, Status, parse

_INJECTOR = Path(__file__).resolve().parents[2] / "native" / "inject.c"
_VICTIM = Path(__file__).with_name("injection_victim.c")
_LIFE_S = 0.002
"""About how long an injection takes from its program's start to its end."""
_WINDOW_S = 0.00004
"""About how long the target is on borrowed registers, less what we take to see that and to send a signal."""

Way = Literal["healing", "plain"]

PYTHON_VICTIM: Final = """
import mmap, os, sys, threading, time
page = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
def churn():
    while True:
        if sum(len(str(number)) for number in range(200)) != 490:
            page[8:16] = (1).to_bytes(8, "little")
        time.sleep(0.0005)
for _ in range(2):
    threading.Thread(target=churn, daemon=True).start()
count = 0
while True:
    count += 1
    page[0:8] = count.to_bytes(8, "little")
    time.sleep(0.001)
"""

TARGETS: Final = ("sleep", "epoll", "futex", "read", "compute", "threads", "seccomp", "python")


class Programs:
    """What is compiled for the tests, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.victim = self._compile("victim", _VICTIM, "-pthread")
        self.by_way: dict[Way, Path] = {
            "healing": self._compile("healing", _INJECTOR, "-DOUTLIVE_INJECT_STAGES"),
            "plain": self._compile("plain", _INJECTOR, "-DOUTLIVE_INJECT_STAGES", "-DOUTLIVE_INJECT_PLAIN"),
        }

    def _compile(self, name: str, source: Path, *options: str) -> Path:
        target = self.directory / name
        subprocess.run(
            ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *options, source, "-o", target],
            check=True,
        )
        return target


class Victim:
    """A process that counts in a shared page and checks itself."""

    def __init__(self, programs: Programs, mode: str, *, call: int = 0) -> None:
        self.mode = mode
        with tempfile.NamedTemporaryFile(dir=programs.directory) as file:
            file.write(bytes(4096))
            file.flush()
            self._page = mmap.mmap(file.fileno(), 4096)
            self.set(6, call)
            python = [sys.executable, "-c", PYTHON_VICTIM, file.name]
            self.process = subprocess.Popen(
                python if mode == "python" else [str(programs.victim), mode, file.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            deadline_s = time.monotonic() + 10
            while not self.word(0) and time.monotonic() < deadline_s:
                time.sleep(0.001)
        self.mask = self.status("SigBlk")
        self.descriptors = self._descriptors()

    @property
    def pid(self) -> int:
        return self.process.pid

    def word(self, index: int) -> int:
        """One of the page's words: ticks, wrong, interrupted, aborts, signals."""
        return int.from_bytes(self._page[8 * index : 8 * index + 8], "little", signed=True)

    def set(self, index: int, value: int) -> None:
        self._page[8 * index : 8 * index + 8] = value.to_bytes(8, "little")

    def status(self, field: str) -> str:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return line.partition(":")[2].strip()
        raise LookupError(field)

    def runs_within(self, seconds: float) -> bool:
        before, until_s = self.word(0), time.monotonic() + seconds
        while time.monotonic() < until_s:
            if self.word(0) > before + 2:
                return True
            time.sleep(0.0005)
        return False

    def trouble(self) -> str:
        """Say what is wrong with it, if anything."""
        if not self.runs_within(2):
            code = self.process.poll()
            return "does not run" if code is None else f"died of {signal.Signals(-code).name}"
        if self.word(1):
            return "a check of its own failed"
        if self.status("TracerPid") != "0":
            return "is traced"
        if self.status("SigBlk") != self.mask:
            return "has another signal mask"
        if self._descriptors() != self.descriptors:
            return "has other descriptors"
        return ""

    def _descriptors(self) -> dict[str, str]:
        found = {}
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[each.name] = os.readlink(each)
        return found

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._page.close()


class Injector:
    """One running injector of those that show their stage."""

    def __init__(self, executable: Path, pid: int, *, stop_at: Stage | None = None) -> None:
        shown = os.memfd_create("stage")
        os.ftruncate(shown, 4096)
        self._page = mmap.mmap(shown, 4096)
        self._page[4:8] = (stop_at or 0).to_bytes(4, "little")
        self._answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Neither may lie on the other's number in the child.
        moved = [os.dup(theirs.fileno()), os.dup(shown)]
        self.pid = os.posix_spawn(
            executable,
            [str(executable), str(pid)],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, moved[0], 100),
                (os.POSIX_SPAWN_DUP2, moved[1], 4),
                (os.POSIX_SPAWN_DUP2, 100, 3),
                (os.POSIX_SPAWN_CLOSE, 100),
            ],
        )
        for each in (*moved, shown):
            os.close(each)
        theirs.close()
        self.code: int | None = None

    @property
    def stage(self) -> int:
        return int.from_bytes(self._page[:4], "little")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_until_stopped(self) -> None:
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.code = os.waitstatus_to_exitcode(status)
            raise RuntimeError(f"the injector ended with {self.code} before it stopped")

    def end(self) -> Answer | None:
        """Wait for its end; its answer, if it gave one. The descriptor is closed."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        packet, descriptors, _, _ = socket.recv_fds(self._answer, 64, 1)
        for each in descriptors:
            os.close(each)
        self._answer.close()
        return parse(packet) if packet else None

    def close(self) -> None:
        self._page.close()


@dataclass(frozen=True, slots=True)
class Round:
    """One signal and what came of it."""

    way: Way
    target: str
    signal: str
    where: Stage
    answered: bool
    """It had done its work: the signal came too late."""
    trouble: str


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of one way and signal that met the injector at one stage."""

    way: str
    signal: str
    where: str
    rounds: int
    target_lives: int
    lost_by: dict[str, int]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole series."""

    schema_version: int
    seed: int
    rounds: int
    by_target: dict[str, dict[str, int]]
    places: tuple[Place, ...]
    too_late: int
    """Rounds in which the injector had done its work before the signal."""
    lost: dict[str, int]
    """By way."""
    undocumented: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing happened but what is documented."""
        return not self.undocumented


def _spin(seconds: float) -> None:
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass


def play(
    programs: Programs,
    victim: Victim,
    way: Way,
    number: signal.Signals,
    chance: random.Random,
    *,
    aimed: bool,
) -> Round:
    """Start one injector, send it one signal, and look at the target."""
    stage = chance.choice(list(Stage)[Stage.SEIZED - 1 : Stage.RETURNED])
    delay_s = chance.uniform(0, _WINDOW_S if aimed else _LIFE_S)
    injector = Injector(programs.by_way[way], victim.pid)
    if aimed:
        until_s = time.perf_counter() + 1
        while injector.stage < stage and time.perf_counter() < until_s:
            pass
    _spin(delay_s)
    injector.send(number)
    if number == signal.SIGSTOP:
        time.sleep(0.02)
        where = injector.stage
        injector.send(signal.SIGCONT)
        answer = injector.end()
        kept = answer is not None and answer.status is Status.OK
        trouble = victim.trouble() or ("" if kept else f"the injector ended with {injector.code}")
    else:
        answer = injector.end()
        where = injector.stage
        trouble = victim.trouble()
    injector.close()
    return Round(
        way=way,
        target=victim.mode,
        signal=number.name,
        where=Stage(where or Stage.LOOKING),
        answered=answer is not None,
        trouble=trouble,
    )


def run_series(rounds: int, seed: int, *, plain_rounds: int = 0, talk: bool = False) -> Report:
    """Run `rounds` rounds that must lose nothing, then `plain_rounds` of the plain way; blocking."""
    chance = random.Random(seed)
    done: list[Round] = []
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as ends:
        programs = Programs(Path(directory))
        victims: dict[str, Victim] = {}
        used: Counter[str] = Counter()
        for index in range(rounds + plain_rounds):
            way: Way = "healing" if index < rounds else "plain"
            mode = TARGETS[index % len(TARGETS)]
            # A killed injector leaves its slot in the target for ever, and a vDSO has room for about seven.
            if mode in victims and used[mode] >= 4:
                victims.pop(mode).end()
            if mode not in victims:
                victims[mode] = Victim(programs, mode)
                ends.callback(victims[mode].process.kill)
                used[mode] = 0
            number = signal.SIGKILL if chance.random() < 0.75 else signal.SIGSTOP
            result = play(programs, victims[mode], way, number, chance, aimed=chance.random() < 0.65)
            used[mode] += number == signal.SIGKILL
            done.append(result)
            if talk:
                print(f"{index + 1}/{rounds + plain_rounds} {result}", file=sys.stderr)
            if result.trouble:
                victims.pop(mode).end()
        for victim in victims.values():
            victim.end()
    return _report(done, seed)


def _report(done: list[Round], seed: int) -> Report:
    places = sorted({(each.way, each.signal, each.where) for each in done if _early(each) or each.trouble})
    by_target: dict[str, dict[str, int]] = {}
    for each in done:
        counts = by_target.setdefault(f"{each.way} {each.target}", {"rounds": 0, "lives": 0})
        counts["rounds"] += 1
        counts["lives"] += not each.trouble
    return Report(
        schema_version=1,
        seed=seed,
        rounds=len(done),
        by_target=by_target,
        places=tuple(_place(done, *place) for place in places),
        too_late=sum(not _early(each) for each in done),
        lost={
            way: sum(bool(each.trouble) for each in done if each.way == way) for way in ("healing", "plain")
        },
        undocumented=tuple(str(each) for each in done if each.trouble and not _documented(each)),
    )


def _place(done: list[Round], way: Way, number: str, where: Stage) -> Place:
    ours = [each for each in done if (each.way, each.signal, each.where) == (way, number, where)]
    return Place(
        way=way,
        signal=number,
        where=where.name,
        rounds=len(ours),
        target_lives=sum(not each.trouble for each in ours),
        lost_by=dict(Counter(each.trouble for each in ours if each.trouble)),
    )


def _early(each: Round) -> bool:
    """Tell whether the signal met the injector before its work was done."""
    return each.where < Stage.DETACHED if each.signal == "SIGSTOP" else not each.answered


def _documented(lost: Round) -> bool:
    """Tell whether the known price of the plain way, or of a seccomp filter, explains a loss."""
    in_window = Stage.PREPARED <= lost.where < Stage.RETURNED
    filtered = lost.target == "seccomp" and lost.where is Stage.AIMED
    return lost.signal == "SIGKILL" and (filtered or (lost.way == "plain" and in_window))


def main() -> int:
    """Read the command line, run, print one JSON object; exit 1 if something undocumented happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=240)
    parser.add_argument("--plain-rounds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    report = run_series(options.rounds, options.seed, plain_rounds=options.plain_rounds, talk=True)
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
