"""The trial passes with the CRIU that setup chose, fails with what is none, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
CRIU = ROOT / ".criu/bin/criu"

SUBJECT = "listener = socket.socket(fileno=int(sys.argv[1]))"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where a trial keeps its files."""
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def try_criu(criu: str, scratch: Path, step_limit_s: float = 20) -> subprocess.CompletedProcess[str]:
    """Run the trial in a process of its own, as setup does."""
    program = (
        f"from setup import criu_trial as t; t.STEP_LIMIT_S = {step_limit_s}; raise SystemExit(t.main())"
    )
    return subprocess.run(
        [sys.executable, "-c", program, criu],
        cwd=ROOT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def processes_with(*words: str) -> list[str]:
    """Return the command lines of the machine's processes that hold one of `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if any(word in command for word in words):
            found.append(command)
    return found


def test_the_criu_that_setup_chose_passes(scratch: Path) -> None:
    trial = try_criu(str(CRIU), scratch)
    assert trial.returncode == 0, trial.stdout + trial.stderr
    assert trial.stdout.startswith("passed in ")
    assert list(scratch.iterdir()) == []
    assert processes_with(SUBJECT) == []


@pytest.mark.parametrize(
    ("criu", "reason"),
    [
        ("/bin/false", "dump failed: exit 1"),
        ("/bin/true", "dump failed: it did not end the program"),
        ("/nowhere/criu", "dump could not be started"),
    ],
)
def test_what_is_no_criu_fails_and_no_process_stays(criu: str, reason: str, scratch: Path) -> None:
    trial = try_criu(criu, scratch, step_limit_s=2)
    assert trial.returncode == 1, trial.stdout + trial.stderr
    assert reason in trial.stdout
    assert list(scratch.iterdir()) == []
    assert processes_with(SUBJECT) == []


@pytest.mark.parametrize("action", ["dump", "restore"])
def test_a_criu_that_hangs_is_ended_with_what_it_started(action: str, scratch: Path, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging-criu"
    hanging.write_text(f'#!/bin/sh\n[ "$1" = {action} ] || exec {CRIU} "$@"\nsetsid sleep 4321.5 &\nwait\n')
    hanging.chmod(0o755)
    trial = try_criu(str(hanging), scratch, step_limit_s=2)
    assert trial.returncode == 1, trial.stdout + trial.stderr
    assert f"{action} took longer than 2 s" in trial.stdout
    assert processes_with(SUBJECT, str(hanging), "sleep 4321.5") == []
