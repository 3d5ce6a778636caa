"""A generated memory, about half of which compresses, in a file as CRIU would have written its pages.

Half of the pages are random bytes, three eighths text-like (words of eight letters, some far more frequent
than others), one eighth zeros. Kinds come in runs of 16 pages; changed pages are single ones, anywhere, drawn
from the same mix. The same seed makes the same memory and the same changes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.model import PAGE_BYTES

_RANDOM, _TEXT = range(2)
SHARES = {"random": 0.5, "text": 0.375, "zero": 0.125}
"""Of the pages; in the order of their numbers here."""
_RUN_PAGES = 16
_WORDS = 1024
_WORD_BYTES = 8
_BLOCK_PAGES = 4096


class Payload:
    """The file and the generator of its changes."""

    def __init__(self, path: Path, mib: int, seed: int) -> None:
        """Write the file."""
        self.path = path
        self.pages = (mib << 20) // PAGE_BYTES
        self._generator = np.random.default_rng(seed)
        letters = self._generator.integers(ord("a"), ord("z") + 1, (_WORDS, _WORD_BYTES), dtype=np.uint8)
        letters[:, -1] = ord(" ")
        self._words = letters
        with path.open("wb") as file:
            for at in range(0, self.pages, _BLOCK_PAGES):
                file.write(self._content(min(_BLOCK_PAGES, self.pages - at), _RUN_PAGES).tobytes())

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.pages * PAGE_BYTES

    def change(self, count: int) -> tuple[NDArray[np.int64], bytes]:
        """Change that many pages in the file; return which (ascending) and what they are now."""
        rows = np.sort(self._generator.choice(self.pages, count, replace=False))
        content = self._content(count, 1).tobytes()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for place, row in enumerate(rows.tolist()):
                at = place * PAGE_BYTES
                os.pwrite(descriptor, content[at : at + PAGE_BYTES], row * PAGE_BYTES)
        finally:
            os.close(descriptor)
        return rows, content

    def _content(self, count: int, run_pages: int) -> NDArray[np.uint8]:
        draw = self._generator
        kinds = draw.choice(len(SHARES), -(-count // run_pages), p=list(SHARES.values()))
        kinds = np.repeat(kinds, run_pages)[:count]
        content = np.zeros((count, PAGE_BYTES), dtype=np.uint8)
        pages = int(np.count_nonzero(kinds == _RANDOM))
        content[kinds == _RANDOM] = np.frombuffer(draw.bytes(pages * PAGE_BYTES), np.uint8).reshape(pages, -1)
        pages = int(np.count_nonzero(kinds == _TEXT))
        # The third power makes the first words frequent ones.
        words = (draw.random((pages, PAGE_BYTES // _WORD_BYTES)) ** 3 * _WORDS).astype(np.intp)
        content[kinds == _TEXT] = self._words[words].reshape(pages, PAGE_BYTES)
        return content
