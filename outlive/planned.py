"""The planned switchover of one workload: on disk before it is promised, carried out when it is due.

In: an operator's request; the role at every tick. Out: the very request to the role machine that
`outlive switchover` makes, when it is due (`common.role_plan`); events; and lines in the history of the term
for which it was planned. The machine itself knows nothing of plans: it decides at that moment, as ever.

Not guaranteed: that it is begun once only, if the keeper dies in the moment after it was begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from common.control import Done, PlannedSwitchover, Refused
from common.errors import NoSpaceError, StoreError
from common.events import Event, EventLog
from common.role_plan import due
from common.roles import Instant, Role
from common.terms_file import TermFiles
from common.threads import in_thread

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""How soon one that is due is asked for again if it is refused."""


class Planned:
    """What is planned for one workload on this node; all methods belong to the event loop."""

    def __init__(
        self,
        workload: str,
        files: TermFiles,
        events: EventLog,
        tasks: asyncio.TaskGroup,
        *,
        plan: PlannedSwitchover | None,
        ask: Callable[[PlannedSwitchover], Awaitable[Done | Refused]],
        remember: Callable[[PlannedSwitchover, str], Awaitable[None]],
    ) -> None:
        """`ask` puts a plan that is due to the role machine; `remember` adds a line to its term's history."""
        self.plan = plan
        self._workload = workload
        self._files = files
        self._events = events
        self._tasks = tasks
        self._ask = ask
        self._remember = remember
        self._changing = asyncio.Lock()
        self._carrying: asyncio.Task[None] | None = None
        self._again_at_s = 0.0
        self._refused = ""

    async def make(self, plan: PlannedSwitchover) -> None:
        """Plan a switchover, durably, in the place of what was planned. Raises StoreError, NoSpaceError."""
        async with self._changing:
            await in_thread(self._files.record_plan, self._workload, plan)
            self.plan, self._refused = plan, ""
        self._events.append(
            Event.SWITCHOVER_PLANNED,
            workload=self._workload,
            reason=f"to {plan.to}: asked for by {plan.by}",
            peer=plan.to,
            at_wall_s=plan.at_wall_s,
        )

    async def cancel(self, by: str) -> bool:
        """Forget what is planned, durably; False if nothing is. Raises StoreError."""
        plan = self.plan
        if plan is None:
            return False
        await self._forget(plan, Event.SWITCHOVER_CANCELLED, f"to {plan.to}: cancelled by {by}")
        return True

    def tick(self, role: Role, now: Instant) -> None:
        """Carry it out if it is due, or forget it if it never will be."""
        plan = self.plan
        if plan is None or now.monotonic_s < self._again_at_s or self._busy:
            return
        what, why = due(plan, role, now)
        if what == "begin":
            self._carrying = self._tasks.create_task(self._begin(plan, now))
        elif what == "forget":
            refused = f"; it was refused: {self._refused}" if self._refused else ""
            self._carrying = self._tasks.create_task(self._let_go(plan, f"{why}{refused}", now))

    @property
    def _busy(self) -> bool:
        return self._carrying is not None and not self._carrying.done()

    async def _begin(self, plan: PlannedSwitchover, now: Instant) -> None:
        answer = await self._ask(plan)
        if isinstance(answer, Done):
            await self._let_go(plan, "", now)
        else:
            self._again_at_s, self._refused = now.monotonic_s + _AGAIN_S, answer.message

    async def _let_go(self, plan: PlannedSwitchover, why: str, now: Instant) -> None:
        """Forget a plan that was begun (empty `why`) or never will be; if the disk fails, once more."""
        event = Event.SWITCHOVER_DROPPED if why else Event.SWITCHOVER_BEGUN
        reason = f"to {plan.to}, planned by {plan.by}: {why or 'it is due, and begins'}"
        try:
            await self._forget(plan, event, reason)
        except (StoreError, NoSpaceError) as error:
            self._again_at_s = now.monotonic_s + _AGAIN_S
            log.error("plan.not-forgotten workload=%s reason=%r", self._workload, str(error))

    async def _forget(self, plan: PlannedSwitchover, event: Event, reason: str) -> None:
        async with self._changing:
            if self.plan is not plan:
                return  # another one has taken its place
            await in_thread(self._files.forget_plan, self._workload)
            self.plan = None
        self._events.append(event, workload=self._workload, reason=reason, peer=plan.to)
        await self._remember(plan, reason)
