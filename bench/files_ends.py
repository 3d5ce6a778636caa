"""What brings changed files to another directory: an epoch as a replica takes it, and rsync.

In: captured epochs; a directory. Out: the same files elsewhere, and what that took.

The replica is the product's own parts one after the other in this process, without a network and without
encryption: messages as `ReplicaStream` draws them, taken in by `Assembly` into an `EpochStore`, whose commit
is durable, and laid out by `FileTree` as `FollowedFiles` does it. rsync talks to a second rsync through a
pipe, as it would through ssh, so that it compares blocks and sends what differs; it syncs nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.target import WORKLOAD
from common.errors import LabError
from common.messages import BULK_BYTES, Message, Pages, Space, decode
from common.model import EpochId
from common.terms import TermGuard
from primary.capture import CapturedEpoch
from primary.outgoing import Frames, Held, epoch_messages
from replica.assembly import Assembly, Committed
from replica.file_tree import FileTree
from replica.store import EpochStore

_TERM: Final = 1
_MAX_LEVELS: Final = 8
"""As nodes have it by default."""
_RSYNC_DEADLINE_S: Final = 1200.0
_SHELL: Final = '#!/bin/sh\nshift\nexec "$@"\n'
"""What rsync takes for ssh: it forgets the host and runs the command."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What it took to bring an epoch's files."""

    sent_bytes: int
    """Of the files' part."""
    send_ms: float
    """Of the whole epoch, memory included, until it is committed."""
    lay_out_ms: float
    ended_s: float
    """When it was done, on the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What it took rsync."""

    bytes: int
    """In both directions, as it says."""
    wall_ms: float


class Replica:
    """A store and a tree in a directory. All its methods block."""

    def __init__(self, directory: Path, declared: bytes) -> None:
        """`declared` is the workload's one directory, as declared."""
        self.tree = directory / "tree"
        self._store = EpochStore.open(directory / "store", WORKLOAD, min_free_bytes=0, max_levels=_MAX_LEVELS)
        self._assembly = Assembly(
            WORKLOAD,
            "a",
            _TERM,
            self._store,
            TermGuard(lambda workload, leadership: None),
            most_memory_bytes=1 << 50,
        )
        self._files = FileTree({declared: self.tree}, directory / "files.state")
        self._held: Held | None = None
        self._buffer = bytearray(BULK_BYTES)

    @property
    def newest(self) -> EpochId | None:
        """The epoch that it has."""
        return self._held.id if self._held else None

    def bring(self, epoch: CapturedEpoch) -> Brought:
        """Send an epoch, whose base is the one before, and lay its files out. Raises LabError."""
        begun_s = time.monotonic()
        sent_bytes, of_files, outcome = 0, False, None
        for frames in epoch_messages(epoch, _TERM, self._held, None, self._buffer):
            message, bulk = decode(frames)
            of_files = _of_files(message, of_files)
            sent_bytes += _size(frames) * of_files
            outcome = self._assembly.take(message, bulk, frames)
        if not isinstance(outcome, Committed):
            raise LabError(f"epoch {epoch.id} was not committed: {outcome}")
        committed_s = time.monotonic()
        self._held = Held.of(epoch)
        with self._store.files_of(epoch.id) as files:
            self._files.apply(files)
        ended_s = time.monotonic()
        return Brought(sent_bytes, (committed_s - begun_s) * 1000, (ended_s - committed_s) * 1000, ended_s)

    def tidy(self) -> None:
        """Fold, if that is due: agents do it beside what they do else."""
        if self._store.fold_due():
            self._store.fold()

    def check(self) -> None:
        """Raise LabError unless the tree is the epoch that was brought last, contents included."""
        if (newest := self.newest) is None:
            raise LabError("no epoch was brought")
        with self._store.files_of(newest) as files:
            wrong = self._files.check(files, quick=False)
        if wrong:
            raise LabError(f"the replica's files are not those of {newest}: {wrong[0]}")

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()


class Rsync:
    """A directory that rsync keeps like another one."""

    def __init__(self, directory: Path, *, large: bool) -> None:
        """`large`: large files are changed in place, and only their blocks that differ are sent."""
        self.tree = directory / "rsync"
        self._shell = directory / "shell"
        self._shell.write_text(_SHELL)
        self._shell.chmod(0o755)
        self._options = ("--inplace", "--no-whole-file") if large else ()

    def bring(self, source: Path) -> Synced:
        """Make the directory like `source`. Raises LabError."""
        # Else a second change within a second would be overlooked.
        command = ["rsync", "-a", "--delete", "--modify-window=-1", *self._options, "--stats"]
        command += ["--rsh", str(self._shell)]
        begun_s = time.monotonic()
        try:
            done = subprocess.run(
                [*command, f"{source}/", f"pipe:{self.tree}/"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=_RSYNC_DEADLINE_S,
                env={**os.environ, "LC_ALL": "C"},
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or "nothing on stderr"
            raise LabError(f"rsync failed: {error}: {said}") from error
        wall_ms = (time.monotonic() - begun_s) * 1000
        told = re.findall(r"^Total bytes (?:sent|received): ([\d,]+)", done.stdout, re.MULTILINE)
        if len(told) != 2:
            raise LabError("rsync does not say how many bytes it sent and received")
        return Synced(sum(int(each.replace(",", "")) for each in told), wall_ms)


def compare(source: Path, copy: Path) -> None:
    """Raise LabError unless two directories have the same names and contents. Blocking."""
    done = subprocess.run(
        ["diff", "--recursive", "--brief", "--no-dereference", str(source), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(f"{copy} is not {source}: {(done.stdout or done.stderr).splitlines()[:1]}")


def rsync_version() -> str:
    """Say which rsync it is. Raises LabError if there is none."""
    try:
        said = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LabError(f"rsync cannot be run: {error}", hint="apt-get install rsync") from error
    return " ".join(said.split()[:3])


def _of_files(message: Message, before: bool) -> bool:
    """Tell whether a message is about files; pages are those of the space that came before."""
    if isinstance(message, Space):
        return message.kind == "file"
    return before and isinstance(message, Pages)


def _size(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
