"""Verification of one led workload: what of it is compared, how far that is, and what is told of a mismatch.

In: the configuration, and what the comparisons find (`primary.verification`). Out: one `Verification` for the
memory and one for each replica's store; progress for `status`; an event and a log line for each mismatch. It
is mended where it was found: by the backend, which reads everything again, and by the stream, which sends
everything anew.
"""

from __future__ import annotations

import structlog

from common.control import VerificationProgress
from common.events import Event, EventLog
from common.model import PAGE_BYTES
from primary.verification import Mismatch, Verification

log = structlog.get_logger(__name__)


class Verifier:
    """All that is compared of one workload while this node leads it."""

    def __init__(self, workload: str, epochs: int, events: EventLog) -> None:
        """A round takes `epochs`; 0: nothing is compared unless somebody asks for it."""
        self._workload = workload
        self._epochs = epochs
        self._events = events
        self.memory = Verification(epochs, self._tell)
        """Memory with what is believed of it, for the fast backend: the stock one believes nothing."""
        self._stores: dict[str, Verification] = {}

    def store_of(self, replica: str) -> Verification:
        """Return what is compared with a replica's store."""
        return self._stores.setdefault(replica, Verification(self._epochs, self._tell))

    def progress(self, *, with_memory: bool) -> tuple[VerificationProgress, ...]:
        """Say how far everything is; memory, if it is compared at all, first."""
        all_of_them = {"": self.memory} if with_memory else {}
        return tuple(_progress(replica, each) for replica, each in (all_of_them | self._stores).items())

    def hurry(self) -> None:
        """Begin everything anew, in large slices."""
        for each in (self.memory, *self._stores.values()):
            each.hurry()

    def _tell(self, mismatch: Mismatch) -> None:
        mended = (
            f"{mismatch.replica} is sent everything anew"
            if mismatch.replica
            else "the epoch is not used, and all memory of the process is read again"
        )
        log.error(
            "verify.mismatch",
            workload=self._workload,
            replica=mismatch.replica,
            epoch=str(mismatch.epoch),
            space=mismatch.key.pagemap_name,
            pid=mismatch.pid,
            pages=len(mismatch.numbers),
            addresses=mismatch.addresses,
        )
        self._events.append(
            Event.VERIFY_MISMATCH,
            workload=self._workload,
            reason=f"{mismatch.sentence}: {mended}",
            replica=mismatch.replica,
            epoch=str(mismatch.epoch),
            kind=mismatch.key.kind,
            ident=mismatch.key.ident,
            pid=mismatch.pid,
            pages=len(mismatch.numbers),
            address=f"{int(mismatch.numbers[0]) * PAGE_BYTES:#x}",
        )


def _progress(replica: str, verification: Verification) -> VerificationProgress:
    return VerificationProgress(
        replica=replica,
        pages_done=verification.pages_done if verification.pages_due else 0,
        pages_due=verification.pages_due,
        epochs=verification.epochs if verification.pages_due else 0,
        rounds=verification.rounds,
        ended_wall_s=verification.ended_wall_s,
        pages_compared=verification.pages_compared,
        pages_different=verification.pages_different,
        problem=verification.problem,
    )
