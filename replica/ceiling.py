"""What all stores of a node may take of its disk together (`store.max_bytes`), whatever else is free there.

In: the directory of the stores. Out: whether an epoch may begin. What is on disk counts, every file once:
levels, seeds, what arrives, what is being folded, what was set aside as damaged.

Not guaranteed: that the stores stay below it at every moment. It is asked before an epoch begins; what is
under way may pass it, each by the memory of its workload at most, and so may a fold, by what it shortens.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

from common.clock import Clock, SystemClock
from common.errors import StoreError

_MEASURE_EVERY_S = 1.0
_MEASURE_SHARE = 20
"""Measuring may take this part of the time at most."""
_BLOCK_BYTES = 512
"""Of `st_blocks`, whatever the file system's own blocks are (stat(2))."""


class Ceiling:
    """One for all stores below a directory. May be asked from several threads."""

    def __init__(self, directory: Path, max_bytes: int, *, clock: Clock | None = None) -> None:
        """`max_bytes` 0 stands for no ceiling."""
        self._directory = directory
        self.max_bytes = max_bytes
        self._clock = clock or SystemClock()
        self._mutex = threading.Lock()
        self._used_bytes = 0
        self._due_s = self._clock.monotonic_s()

    def admits(self, expected_bytes: int, *, anew: bool = False) -> bool:
        """Tell whether `expected_bytes` more may come; they count as there until the next look at the disk.

        `anew`: look now, because something was removed. Raises StoreError if the disk cannot be looked at.
        """
        if not self.max_bytes:
            return True
        with self._mutex:
            began_s = self._clock.monotonic_s()
            if anew or began_s >= self._due_s:
                try:
                    self._used_bytes = used_bytes(self._directory)
                except OSError as error:
                    raise StoreError(f"what the stores take cannot be measured: {error}") from error
                ended_s = self._clock.monotonic_s()
                self._due_s = ended_s + max(_MEASURE_EVERY_S, _MEASURE_SHARE * (ended_s - began_s))
            if self._used_bytes + expected_bytes > self.max_bytes:
                return False
            self._used_bytes += expected_bytes
            return True


def used_bytes(directory: Path) -> int:
    """Return what the files below a directory take on disk; what is removed meanwhile does not count."""
    sizes = {(status.st_dev, status.st_ino): status.st_blocks for status in _files_below(directory)}
    return sum(sizes.values()) * _BLOCK_BYTES


def _files_below(directory: Path) -> Iterator[os.stat_result]:
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        try:
            yield entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
