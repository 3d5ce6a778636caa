"""The freezer of a workload's cgroup, version 1 or 2: everything stands still, without a tracer.

In: the cgroup. Out: a time in which none of its tasks runs, nor is in a system call that reads from a device
into its memory: the kernel reports a cgroup as frozen when each task has come to rest.

What is not in that cgroup runs on: who is in it is told while all of it stands still. Not guaranteed: that
all threads of those do, where somebody has moved single ones into another cgroup of version 1.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from common.container import cgroup_directories, frozen_by
from common.errors import CaptureError

_LOOK_AGAIN_S: Final = 0.0002


class NotFrozenError(CaptureError):
    """The cgroup was not frozen, so nothing was done; the workload runs on."""


Work = Callable[[frozenset[int]], object]
"""What is done while processes stand still: those with these PIDs, and no others."""


class StandStill(Protocol):
    """Has a workload stand still."""

    def __call__(self, work: Work) -> Awaitable[None]:
        """Do `work` while all stands still. Raises as `Dumper.stand_still` does."""
        ...


class _Kept(NamedTuple):
    """What `Freezer.keep` has frozen."""

    file: Path
    switch: int
    """The file, open."""
    thawed: str
    """What to write there in the end."""


class Freezer:
    """Freezes one cgroup, for short, or until it is told to thaw it."""

    def __init__(self, cgroup: str) -> None:
        """`cgroup` is its path below the mount, as the configuration has it. It need not exist yet."""
        self._cgroup = cgroup
        self._kept: _Kept | None = None

    @contextlib.contextmanager
    def held(self, within_s: float) -> Iterator[frozenset[int]]:
        """Freeze, tell whom (PIDs), and thaw at the end whatever happens.

        Blocking, for `within_s` at most until it is frozen.

        Raises NotFrozenError if it does not freeze or somebody else has frozen it already, and CaptureError
        at the end if it was thawed meanwhile: then it did not stand still for all of that time.
        """
        file, frozen, thawed = self._file()
        members = list(file.parent.rglob("cgroup.procs"))
        switch = _open(file, thawed)
        try:
            _freeze(file, switch, frozen, within_s)
            yield _pids_in(members)
            if not frozen_by(file):
                raise CaptureError(f"{file.parent} was thawed by somebody else")
        finally:
            _let_go(switch, thawed)

    def keep(self, within_s: float) -> None:
        """Freeze, and leave it so until `thaw`. Blocking, for `within_s` at most; raises NotFrozenError."""
        file, frozen, thawed = self._file()
        switch = _open(file, thawed)
        try:
            _freeze(file, switch, frozen, within_s)
        except BaseException:
            _let_go(switch, thawed)
            raise
        self._kept = _Kept(file, switch, thawed)

    @property
    def kept(self) -> Path | None:
        """The cgroup's directory from `keep` to `thaw`: whoever dumps it has to leave it frozen."""
        return self._kept.file.parent if self._kept is not None else None

    @property
    def is_kept(self) -> bool:
        """Whether it stands still since `keep`. Not noticed: that it was thawed and frozen again."""
        return self._kept is not None and frozen_by(self._kept.file)

    def leave(self) -> None:
        """Let go of what `keep` began, and leave it frozen: thawing it is for others from now on."""
        kept, self._kept = self._kept, None
        if kept is not None:
            os.close(kept.switch)

    def thaw(self) -> None:
        """End what `keep` began. Idempotent."""
        kept, self._kept = self._kept, None
        if kept is not None:
            _let_go(kept.switch, kept.thawed)

    def _file(self) -> tuple[Path, str, str]:
        """Return the file that freezes, and what to write into it."""
        for directory in cgroup_directories(self._cgroup):
            for name, frozen, thawed in (("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")):
                if (directory / name).exists():
                    return directory / name, frozen, thawed
        raise NotFrozenError(f"{self._cgroup} has no freezer")


def _open(file: Path, thawed: str) -> int:
    """Open what freezes, before it does: thawing must not fail for want of a descriptor.

    Not if somebody else has frozen it, or has begun to: what they began would end with ours.
    """
    try:
        if frozen_by(file) or file.read_text().strip() != thawed:
            raise NotFrozenError(f"{file.parent} is frozen already, by somebody else")
        return os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFrozenError(f"{file.parent} cannot be frozen: {error.strerror}") from error


def _let_go(switch: int, thawed: str) -> None:
    with contextlib.suppress(OSError):  # it is gone, and its tasks with it
        _write(switch, thawed)
    os.close(switch)


def _freeze(file: Path, switch: int, word: str, within_s: float) -> None:
    until_s = time.monotonic() + within_s
    try:
        _write(switch, word)
    except OSError as error:
        raise NotFrozenError(f"{file.parent} cannot be frozen: {error.strerror}") from error
    while not frozen_by(file):
        if time.monotonic() > until_s:
            raise NotFrozenError(f"{file.parent} did not freeze within {within_s * 1000:.0f} ms")
        time.sleep(_LOOK_AGAIN_S)


def _pids_in(members: Iterable[Path]) -> frozenset[int]:
    pids: set[int] = set()
    for file in members:
        with contextlib.suppress(OSError):  # it is gone, or has only threads of processes of other cgroups
            pids.update(map(int, file.read_text().split()))
    return frozenset(pids)


def _write(switch: int, word: str) -> None:
    os.pwrite(switch, word.encode(), 0)
