"""Compares what a replica has stored of an epoch with what was captured, a slice after each acknowledgement.

In: a session whose epoch was just acknowledged, and that epoch's table. Out: questions to the replica, which
reads its disk to answer them; and, where the answer is another than it should be, the `Doubt` that it is to
be told. What was sent does not count here, nor what the replica remembers: only what it would restore.
"""

from __future__ import annotations

import structlog

from common.identity import is_fresh
from common.messages import Doubt
from primary.capture import CapturedEpoch
from primary.inquiry import ask_stored
from primary.session import Session
from primary.verification import Mismatch, Verification

log = structlog.get_logger(__name__)


class StoreVerifier:
    """The rounds over one replica's store."""

    def __init__(self, replica: str, secret: int, verification: Verification) -> None:
        """`secret` is that under which the epochs' pages are identified."""
        self._replica = replica
        self._secret = secret
        self._verification = verification

    async def compare(self, session: Session, epoch: CapturedEpoch) -> Doubt | None:
        """Compare the slice that is due with what is stored of `epoch`, which is the replica's newest.

        Returns what the replica must be told if they differ. Raises UnreachableError, ProtocolError.
        """
        spaces = {space.key: space for space in epoch.spaces}
        compared, mismatch = 0, None
        for due in self._verification.plan(lambda: {key: each.pages for key, each in spaces.items()}):
            space = spaces.get(due.key)
            if space is None:
                continue
            numbers = due.within(space.pages)
            # What goes with every epoch whatever it holds has no identity that could be compared.
            numbers = numbers[~is_fresh(space.identities.get(numbers))]
            if not len(numbers):
                continue
            marks, problem = await ask_stored(session, epoch.id, space, numbers, self._secret)
            if problem:
                if problem != self._verification.problem:
                    log.warning("verify.cannot_tell", replica=self._replica, reason=problem)
                self._verification.problem = problem
                return None
            compared += len(numbers)
            if marks.any():
                mismatch = Mismatch(self._replica, epoch.id, due.key, numbers[marks])
                self._verification.found(mismatch)
        self._verification.looked_at(compared)
        return Doubt(epoch=epoch.id, reason=mismatch.sentence[:4096]) if mismatch is not None else None
