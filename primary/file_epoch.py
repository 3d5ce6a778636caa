"""The contents of one epoch's files, for whoever sends or compares them.

In: what was written to layers when it changed, and the files themselves for all else. Out: pages, each only
if it is what it was at the freeze.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from common.criu.images import SpaceKey
from common.errors import CaptureError
from common.file_records import CONTENTS, RECORDS
from common.model import PAGE_BYTES
from primary.capture import SpacePages
from primary.file_intake import FileIntake
from primary.layers import LayeredPages


class EpochFiles:
    """The contents of an epoch's files; a `PageReader` of its two spaces."""

    def __init__(
        self,
        files: FileIntake,
        spaces: Iterable[SpacePages],
        layered: LayeredPages,
        records: Mapping[int, bytes],
        extras: Mapping[int, bytes],
    ) -> None:
        """`records` and `extras` are pages that are in memory."""
        self._files = files
        self.spaces = tuple(spaces)
        self._spaces = {space.key: space for space in self.spaces}
        self._layered = layered
        self._in_memory = {RECORDS: records, CONTENTS: extras}

    def read(self, key: SpaceKey, rows: NDArray[np.int64], into: memoryview) -> None:
        """See `PageReader.read`. What a file does not hold any more cannot be read."""
        space = self._spaces[key]
        numbers = space.pages.at(rows)
        expected = space.identities.get(numbers)
        held = self._in_memory[key]
        for slot in self._lacking(key, numbers, expected, into):
            number = int(numbers[slot])
            content = held.get(number) or self._files.read_now(number)
            if content is None or not (self._files.identify(memoryview(content)) == expected[slot]).all():
                self._files.want(number)
                raise CaptureError("a file was changed before its content was sent; the next epoch has it")
            into[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = content

    def _lacking(
        self, key: SpaceKey, numbers: NDArray[np.uint64], expected: NDArray[np.uint64], into: memoryview
    ) -> list[int]:
        """Copy what the layers have; return which pages have to come from elsewhere.

        What they have of a page may be of a file that had its place before.
        """
        if key != CONTENTS:
            return list(range(len(numbers)))
        left = self._layered.read_some(key, numbers, into)
        content = into[: len(numbers) * PAGE_BYTES]
        wrong = (self._files.identify(content) != expected).any(axis=1)
        wrong[left] = True
        rows: list[int] = np.flatnonzero(wrong).tolist()
        return rows

    def release(self) -> None:
        """Let go of the layers. Harmless when repeated."""
        self._layered.release()
