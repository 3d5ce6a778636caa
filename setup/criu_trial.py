"""The trial that a CRIU must pass before it is trusted on this kernel: a real dump and a real restore.

In: the path of a criu. Out: an answer in a sentence, and nothing left behind. The subject is a program
with four threads, a listening and an established TCP socket and counters in memory; it is dumped with
the options that the project itself uses, ended by the dump, restored, and asked over TCP whether it is
still itself and counts on. Every step has a time limit.

As a program, `python3 -m setup.criu_trial CRIU` prints the answer and exits 0 if it passed, else 1. It
must be a process of its own: it becomes the reaper of all that CRIU starts and ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

STEP_LIMIT_S = 20.0
# Between two questions to the subject, whose threads count every millisecond.
_COUNTING_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36

_SUBJECT = """
import json, os, socket, sys, threading, time

listener = socket.socket(fileno=int(sys.argv[1]))
token = os.urandom(16).hex()
counts = [0, 0, 0]

def count(i):
    while True:
        counts[i] += 1
        time.sleep(0.001)

for i in range(len(counts)):
    threading.Thread(target=count, args=(i,), daemon=True).start()
established = []
while True:
    peer, _ = listener.accept()
    peer.sendall(json.dumps({"token": token, "counts": counts}).encode() + b"\\n")
    established.append(peer)
"""


class TrialError(Exception):
    """The CRIU under trial did not do what it must; the message says at which step and why."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the subject says of itself."""

    token: str
    counts: tuple[int, ...]

    def counted_since(self, earlier: _Answer, at_least: int) -> bool:
        """Tell whether this is the memory of `earlier`, each thread's count being that much higher."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return self.token == earlier.token and all(now >= before + at_least for now, before in pairs)


def run_trial(criu: str) -> float:
    """Dump and restore a threaded program with TCP sockets; return how many seconds it took.

    Turns the calling process into a child subreaper and kills and reaps *all* its children at the end.

    Raises:
        TrialError: a step failed or overran its limit.
    """
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise TrialError("cannot become the reaper of what CRIU restores")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="criu-trial-") as directory, contextlib.ExitStack() as peers:
        try:
            subject, address = _start_subject()
            before = _ask(address, peers)
            time.sleep(_COUNTING_S)
            before_dump = _ask(address, peers)
            if not before_dump.counted_since(before, at_least=1):
                raise TrialError("the trial's own program does not run")
            _run_criu(criu, "dump", directory, "--tree", str(subject.pid))
            _await_end(subject)
            peers.close()
            _run_criu(criu, "restore", directory, "--restore-detached")
            restored = _ask(address, peers)
            time.sleep(_COUNTING_S)
            counted_on = _ask(address, peers)
            if not restored.counted_since(before_dump, at_least=0):
                raise TrialError("the restored program has another memory")
            if not counted_on.counted_since(restored, at_least=1):
                raise TrialError("not every thread of the restored program runs")
        finally:
            _end_all_children()
    return time.monotonic() - started


def _start_subject() -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
    """Start the program to dump in a session of its own; return it and its TCP address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SUBJECT, str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.defpath},
            start_new_session=True,
            pass_fds=[listener.fileno()],
        )
        host, port = listener.getsockname()
        return process, (host, port)


def _await_end(subject: subprocess.Popen[bytes]) -> None:
    """Reap what the dump ended: its process id must be free for the restore."""
    try:
        subject.wait(STEP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise TrialError("dump failed: it did not end the program") from error


def _ask(address: tuple[str, int], peers: contextlib.ExitStack) -> _Answer:
    """Connect, read the subject's answer and leave the connection established until `peers` is closed."""
    try:
        peer = peers.enter_context(socket.create_connection(address, timeout=STEP_LIMIT_S))
        answer = json.loads(peer.makefile("rb").readline())
    except (OSError, ValueError) as error:
        raise TrialError(f"the program does not answer over TCP: {error}") from error
    return _Answer(answer["token"], tuple(answer["counts"]))


def _run_criu(criu: str, action: str, directory: str, *arguments: str) -> None:
    log = Path(directory, f"{action}.log")
    command = [criu, action, "--images-dir", directory, "--log-file", log.name, "-v1", *arguments]
    command += ["--tcp-close", "--network-lock", "skip", "--manage-cgroups=ignore"]
    try:
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=STEP_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TrialError(f"{action} took longer than {STEP_LIMIT_S:g} s") from error
    except OSError as error:
        raise TrialError(f"{action} could not be started: {error}") from error
    if finished.returncode != 0:
        said = log.read_text(errors="replace") if log.exists() else finished.stderr.decode(errors="replace")
        # The first error is the cause, except for the limit that needs a capability and does not matter.
        errors = [line for line in said.splitlines() if line.strip() and "RLIMIT_NOFILE" not in line]
        raise TrialError(f"{action} failed: {errors[0].strip() if errors else f'exit {finished.returncode}'}")


def _end_all_children() -> None:
    """Kill and reap until this process has no child, adopted ones included."""
    children = Path("/proc/thread-self/children")
    while pids := children.read_text().split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(pid), 0)


def main() -> int:
    """Try the criu that the command line names; print what came of it; return the exit code."""
    if len(sys.argv) != 2:
        print("usage: python3 -m setup.criu_trial CRIU", file=sys.stderr)
        return 2
    try:
        print(f"passed in {run_trial(sys.argv[1]):.1f} s")
    except TrialError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
