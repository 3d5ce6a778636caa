"""Keyed identities of page contents: what decides which pages are sent.

In: an open image of pages, 4096 bytes each. Out: an array of 128-bit identities, zeros for pages of
zeros. Workloads hold data that an attacker may have chosen, so an unkeyed hash must not decide what is
skipped: xxh3-128 with a secret seed that is drawn anew by each agent. It is told, encrypted, to those
replicas alone that hold the same pages anyway, so that they can say what they hold.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.errors import CaptureError
from common.model import PAGE_BYTES

BLOCK_PAGES = 512
"""Pages read at once (2 MiB): large enough for the disk, small enough for the cache."""


_FRESH = np.uint64(0xF1E5_4F1E_54F1_E54F)
"""Second word of identities that were drawn; of those that were computed, one in 2^64 has it."""


def fresh_identity() -> NDArray[np.uint64]:
    """Draw an identity that no page has or had: what gets it counts as changed in its epoch; shape (2,)."""
    return np.array([secrets.randbits(64), _FRESH], dtype=np.uint64)


def is_fresh(identity: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mark identities (shape (n, 2)) that were drawn, so that they say nothing of the content; shape (n,)."""
    marks: NDArray[np.bool_] = identity[:, 1] == _FRESH
    return marks


class PageHasher:
    """Identifies pages under one secret; identities of different hashers cannot be compared.

    Holds nothing but the secret, so that captures of several workloads may use one side by side.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed
        self._zero_digest = xxhash.xxh3_128_digest(bytes(PAGE_BYTES), self._seed)

    @property
    def secret(self) -> int:
        """What a replica needs to come to the same identities."""
        return self._seed

    def identify_image(self, descriptor: int, pages: int) -> NDArray[np.uint64]:
        """Identify the first `pages` pages of an open file; shape (pages, 2).

        Raises CaptureError if the file is shorter than that.
        """
        return np.concatenate([np.empty((0, 2), dtype=np.uint64), *self.identify_blocks(descriptor, pages)])

    def identify_blocks(self, descriptor: int, pages: int) -> Iterator[NDArray[np.uint64]]:
        """Do so for `BLOCK_PAGES` pages at a time, the last ones excepted."""
        view = memoryview(bytearray(min(pages, BLOCK_PAGES) * PAGE_BYTES))
        for start in range(0, pages, BLOCK_PAGES):
            wanted = min(BLOCK_PAGES, pages - start) * PAGE_BYTES
            read = os.preadv(descriptor, [view[:wanted]], start * PAGE_BYTES)
            if read != wanted:
                raise CaptureError(f"an image of {pages} pages ends after {start + read // PAGE_BYTES}")
            yield self.identify(view[:wanted])

    def identify(self, content: memoryview) -> NDArray[np.uint64]:
        """Identify whole pages one after the other; shape (pages, 2)."""
        digest, seed = xxhash.xxh3_128_digest, self._seed
        digests = [digest(content[at : at + PAGE_BYTES], seed) for at in range(0, len(content), PAGE_BYTES)]
        identity = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2).copy()
        identity[(identity == np.frombuffer(self._zero_digest, dtype=np.uint64)).all(axis=1)] = 0
        return identity
