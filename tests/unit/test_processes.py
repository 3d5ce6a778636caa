"""Processes are found by what they hold and ended for certain, also those that were stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.processes import end, holders, matching

HOLDER = """
import socket, subprocess, sys
held = socket.socket(socket.AF_UNIX)
held.bind(sys.argv[1])
held.listen()
child = subprocess.Popen(["sleep", "61"])
while "sleep" not in open(f"/proc/{child.pid}/cmdline").read():  # it is just becoming that
    pass
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def holder(path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a socket, and the PID of its child."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if lives(child):
                os.kill(child, signal.SIGKILL)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_whoever_holds_a_socket_is_found_also_when_stopped_and_nobody_else(tmp_path: Path) -> None:
    with holder(tmp_path / "x.sock") as (process, _):
        process.send_signal(signal.SIGSTOP)
        assert holders(str(tmp_path / "x.sock")) == [process.pid]
        assert holders(str(tmp_path / "y.sock")) == []
    assert holders(str(tmp_path / "x.sock")) == []


def test_a_stopped_process_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    with holder(tmp_path / "x.sock") as (process, child):
        process.send_signal(signal.SIGSTOP)
        end(process.pid, 5.0, with_children=True)
        assert process.wait(5) == -signal.SIGKILL
        assert not lives(child)


def test_what_it_has_started_is_left_unless_asked_for(tmp_path: Path) -> None:
    with holder(tmp_path / "x.sock") as (process, child):
        end(process.pid, 5.0)
        assert process.wait(5) == -signal.SIGKILL
        assert lives(child)


def test_what_is_gone_already_is_ended() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    end(gone.pid, 1.0)


def test_command_lines_are_compared_word_by_word(tmp_path: Path) -> None:
    mark = str(tmp_path)
    with subprocess.Popen(["cat", "-", mark], stdin=subprocess.PIPE) as process:
        until_s = time.monotonic() + 5
        while not (found := matching(lambda words: mark in words)) and time.monotonic() < until_s:
            time.sleep(0.01)  # in the middle of becoming another program it has no words
        assert found == [process.pid]
        assert matching(lambda words: mark[:-1] in words) == []
        process.kill()


def test_what_is_to_be_spared_is_left(tmp_path: Path) -> None:
    with holder(tmp_path / "x.sock") as (process, child):
        end(process.pid, 5.0, with_children=True, spare=[child])
        assert process.wait(5) == -signal.SIGKILL
        assert lives(child)
