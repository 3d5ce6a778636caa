"""What becomes of the epochs of one workload that this node captured, and nobody acknowledged.

In: what was left when capturing ended, and who leads now. Out: the newest of them in `outlive.aside`, if
another node leads a newer term; an event that says so, or why not. They are held until that is known, for a
while: this node may just as well go on leading, which makes them worthless.

Nothing waits for it: what is written aside is written in a thread, beside whatever the keeper orders.

Not guaranteed: that an epoch survives the agent. Its pages have no name on disk before they are aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from common.errors import CaptureError, NoSpaceError, StoreError
from common.events import Event, EventLog
from common.model import WorkloadSpec
from common.threads import in_thread
from outlive.aside import Aside, kept_aside
from primary.stream import Unacknowledged

log = structlog.get_logger(__name__)

HELD_S = 60.0
"""How long they are held while it is not known who leads: they take memory."""


class UnacknowledgedEpochs:
    """Those of one workload; all methods belong to the event loop."""

    def __init__(self, aside: Aside, spec: Callable[[], WorkloadSpec], events: EventLog) -> None:
        self._aside = aside
        self._spec = spec
        self._events = events
        self.kept: tuple[str, ...] = ()
        """Directories in which epochs of the workload lie aside, when that was looked at last."""
        self._term = 0
        self._left: dict[str, Unacknowledged] = {}
        self._forgetting: asyncio.TimerHandle | None = None
        self._keeping: set[asyncio.Task[None]] = set()

    def hold(self, term: int, left: Mapping[str, Unacknowledged]) -> None:
        """Hold what was left by the streams to these nodes when capturing ended in that term."""
        self.forget()
        self._term, self._left = term, dict(left)
        if left:
            self._forgetting = asyncio.get_running_loop().call_later(HELD_S, self.forget)

    def forget(self) -> None:
        """Give back what is held."""
        for each in self._take().values():
            each.shared.drop()

    def superseded(self, term: int, leader: str) -> None:
        """Have the newest one kept aside if that term is newer than the one that captured it."""
        if not self._left or term <= self._term:
            return
        left = self._take()
        # What the new leader is known to have is there to be put together with it.
        newest = max(left, key=lambda node: (left[node].shared.epoch.id, node == leader))
        kept = left.pop(newest)
        for each in left.values():
            each.shared.drop()
        keeping = asyncio.create_task(self._keep(kept, term, leader))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)

    async def look(self) -> None:
        """See again what lies aside: a human may have removed some. Raises StoreError."""
        found = await in_thread(kept_aside, self._aside.directory)
        self.kept = tuple(str(each.path) for each in found if each.workload == self._spec().name)

    async def close(self) -> None:
        """Give back what is held, once what is being written is."""
        self.forget()
        if self._keeping:
            await asyncio.wait(self._keeping)

    def _take(self) -> dict[str, Unacknowledged]:
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        left, self._left = self._left, {}
        return left

    async def _keep(self, left: Unacknowledged, term: int, leader: str) -> None:
        epoch, spec = left.shared.epoch, self._spec()
        what = f"{epoch.id} was captured here and never acknowledged, and {leader} leads term {term}"
        try:
            kept = await in_thread(self._aside.keep, epoch, spec, left.base)
            await self.look()
        except (CaptureError, NoSpaceError, StoreError) as error:
            self._tell(Event.EPOCH_NOT_SET_ASIDE, spec, f"{what}; it could not be kept: {error}")
        except Exception as error:  # whatever it is, resync goes on
            log.exception("aside.failed", workload=spec.name, epoch=str(epoch.id))
            self._tell(
                Event.EPOCH_NOT_SET_ASIDE, spec, f"{what}; a defect in Outlive, or its host: {error!r}"
            )
        else:
            needs = "" if epoch.stands_on is None or left.base is None else f", on top of {left.base.id}"
            self._tell(Event.EPOCH_SET_ASIDE, spec, f"{what}; it is kept in {kept.path}{needs}")
        finally:
            left.shared.drop()

    def _tell(self, event: Event, spec: WorkloadSpec, reason: str) -> None:
        self._events.append(event, workload=spec.name, reason=reason)
