"""The file oracle as a plain process: started, asked, stopped at any moment, and judged from outside.

In: a program of `build_files`, an empty directory for it to work in. Out: its answers and verdicts, as dicts
(`files.c` says what is in them). In a container it is started as any workload is, and asked by `ask`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.oracle.build import ask

NEEDS_CRIU_OPTIONS: Final = ("unlink_remap", "flock", "fcntl_lock", "ofd_lock", "unlock")
"""Paths that CRIU dumps only with `link_remap` and `file_locks`; `--without` these it needs neither."""

MAY_BE_UNAVAILABLE: Final = frozenset(
    {"clone", "zero_range", "collapse_range", "insert_range", "direct_write"}
)
"""Paths that a file system may lack, and that a run without them is complete without."""

_START_S: Final = 20.0
_STOP_S: Final = 10.0


def model_of(pid: int) -> Path:
    """Return where the model is, of a program that was not started here. Raises FileNotFoundError."""
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(each).startswith("/memfd:files-model"):
            return each
    raise FileNotFoundError(f"process {pid} has no model: it is no file oracle")


class FileOracle:
    """The program, running below `directory`; `status` is a file beside it. Ends with `end`."""

    def __init__(self, program: Path, directory: Path, status: Path, *options: str) -> None:
        """Start it and wait until it answers. Raises TimeoutError, or RuntimeError if it ends at once."""
        self.directory = directory
        words = ("--directory", str(directory), "--status", str(status), "--bind", "127.0.0.1")
        self.process = subprocess.Popen(
            [str(program), *words, *options], stdin=subprocess.DEVNULL, start_new_session=True
        )
        until_s = time.monotonic() + _START_S
        while not status.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the file oracle ended with {self.process.returncode}")
            if time.monotonic() > until_s:
                self.end()
                raise TimeoutError("the file oracle does not start")
            time.sleep(0.01)
        self.port: int = json.loads(status.read_text())["port"]
        self.model = model_of(self.process.pid)
        """What it expects, as bytes that a `Judge` can read: now, or copied away at a frozen instant."""

    def ask(self, word: str) -> dict[str, Any]:
        """See `ask`."""
        return ask(self.port, word)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Have all of its processes stand still, wherever they are. Raises TimeoutError."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            until_s = time.monotonic() + _STOP_S
            while any(state != "T" for state in self._states()):
                if time.monotonic() > until_s:
                    raise TimeoutError("the file oracle does not stop")
                time.sleep(0.0002)
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def _states(self) -> Iterator[str]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (str(self.process.pid), *children):
            for task in Path(f"/proc/{pid}/task").iterdir():
                yield (task / "stat").read_text().rpartition(")")[2].split()[0]

    def end(self) -> None:
        """End it, if it runs, and all of its processes."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Judge:
    """A verdict on a directory from outside: of a program that stands still, or from a copy of its model."""

    def __init__(self, program: Path, model: Path, directory: Path, *, dead: bool = False) -> None:
        """`dead`: the directory is not the one that the program works in, so locks are not looked at."""
        words = ("--judge", str(model), "--directory", str(directory), *(("--dead",) if dead else ()))
        self._process = subprocess.Popen(
            [str(program), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def verdict(self) -> dict[str, Any]:
        """Compare all of it, now. Raises EOFError if the judge has ended: it cannot read that model."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("the judge has ended")
        decoded: dict[str, Any] = json.loads(line)
        return decoded

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        self._process.wait()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
