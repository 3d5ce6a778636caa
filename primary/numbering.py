"""Epoch numbers that are never used twice, whatever crashes in between.

A number is handed out only below a mark that is on disk already; the mark moves on by blocks, so the
disk is written once in `_BLOCK` epochs. A restarted agent goes on above the old mark: numbers may be
skipped, never repeated.
"""

from __future__ import annotations

from pathlib import Path

from common.durable import atomic_write
from common.errors import StoreError

_BLOCK = 1000
_WIDTH = 20


class EpochNumbers:
    """Numbers of one workload on one node. Not safe for use by several processes at once."""

    def __init__(self, path: Path, *, at_least: int = 0) -> None:
        """Start above what `path` promised and above `at_least` (the newest epoch that is stored here).

        Raises StoreError if the file is there but holds something else.
        """
        self._path = path
        try:
            mark = int(path.read_text())
        except FileNotFoundError:
            mark = 0
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} does not hold an epoch number: {error}",
                hint="write a number into it above every epoch in a replica's `outlive store list`",
            ) from error
        self._last = max(mark, at_least)
        self._mark = mark

    def next(self) -> int:
        """Return a number greater than any before. Raises StoreError, NoSpaceError if the disk refuses."""
        number = self._last + 1
        if number > self._mark:
            mark = number + _BLOCK
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic_write(self._path, str(mark).rjust(_WIDTH).encode(), op="numbers.mark")
            self._mark = mark
        self._last = number
        return number
