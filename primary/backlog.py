"""Epochs on their way out: shared by several replicas, and never more than one waiting for each.

In: captured epochs. Out: the newest one that a replica has not been sent. Older ones are given back at once,
so a slow replica costs the memory of two epochs at most: the one in flight and the one that waits.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from primary.capture import CapturedEpoch


class SharedEpoch:
    """A captured epoch with a count of its holders; the last `drop` releases it.

    Whoever makes one holds it. Not for several threads: holders count in the event loop.
    """

    def __init__(self, epoch: CapturedEpoch) -> None:
        self.epoch = epoch
        self._holders = 1

    def hold(self) -> SharedEpoch:
        """Become one more holder."""
        if self._holders < 1:
            raise ValueError(f"epoch {self.epoch.id} was released already")
        self._holders += 1
        return self

    def drop(self) -> None:
        """Hold it no longer; once a holder."""
        if self._holders < 1:
            raise ValueError(f"epoch {self.epoch.id} was released already")
        self._holders -= 1
        if self._holders == 0:
            self.epoch.release()


@dataclass(frozen=True, slots=True)
class Offer:
    """An epoch that waits, and since when (monotonic seconds)."""

    shared: SharedEpoch
    offered_s: float

    @property
    def epoch(self) -> CapturedEpoch:
        """The epoch itself."""
        return self.shared.epoch


class Backlog:
    """Room for one unsent epoch: a newer one takes the place of an older one."""

    def __init__(self) -> None:
        self._waiting: Offer | None = None
        self._arrived = asyncio.Event()
        self._closed = False

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._waiting is None

    def put(self, shared: SharedEpoch, now_s: float) -> None:
        """Hold the epoch and let it wait, instead of what waited. Nothing is kept once closed."""
        if self._closed:
            return
        self._drop()
        self._waiting = Offer(shared.hold(), now_s)
        self._arrived.set()

    def put_back(self, offer: Offer) -> None:
        """Let an epoch wait again that was taken but not sent, unless a newer one has come."""
        if self._closed or self._waiting is not None:
            offer.shared.drop()
            return
        self._waiting = offer
        self._arrived.set()

    async def take(self) -> Offer:
        """Wait for an epoch; the caller holds it from now on."""
        while self._waiting is None:
            self._arrived.clear()
            await self._arrived.wait()
        offer, self._waiting = self._waiting, None
        return offer

    def close(self) -> Offer | None:
        """Accept no more, and return what waits: the caller holds it from now on."""
        self._closed = True
        waiting, self._waiting = self._waiting, None
        return waiting

    def _drop(self) -> None:
        if self._waiting is not None:
            self._waiting.shared.drop()
            self._waiting = None
