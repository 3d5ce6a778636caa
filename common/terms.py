"""The one place that refuses what belongs to an older term, or to a second leader of the same one.

In: who claims to lead which workload in which term. Out: nothing, or a StaleTermError. Whoever takes orders,
epochs or messages in the name of a leader asks here first. What is known grows only after it was recorded
durably: a node that restarts never accepts what it refused before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.errors import StaleTermError

RecordTerm = Callable[[str, "Leadership"], None]
"""Makes a workload's newest term durable before it returns; raises if it cannot."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """Who leads a workload since when; terms are never reused, so a term has one leader for ever."""

    term: int
    leader: str


class TermGuard:
    """Knows the newest term of each workload.

    Invariants: a workload's term never falls; a term never has two leaders; both hold across restarts as far
    as `record` is durable and `known` is what it recorded. Not guaranteed: that the newest term known here is
    the newest one there is.
    """

    def __init__(self, record: RecordTerm, known: Mapping[str, Leadership] | None = None) -> None:
        self._record = record
        self._newest = dict(known or {})

    def newest(self, workload: str) -> Leadership | None:
        """Return the newest leadership known of a workload; None if none is."""
        return self._newest.get(workload)

    def check(self, workload: str, term: int, leader: str) -> None:
        """Raise StaleTermError unless `leader` may speak for `workload` in `term`. Changes nothing."""
        known = self._newest.get(workload)
        if known is None or term > known.term:
            return
        if term < known.term:
            raise StaleTermError(
                f"{leader} speaks for {workload} in term {term}, but {known.leader} leads it in {known.term}"
            )
        if leader != known.leader:
            raise StaleTermError(
                f"{leader} claims term {term} of {workload}, but it is {known.leader}'s: it has one leader",
                hint="two nodes believe that they lead; stop the workload on one: outlive status on both",
            )

    def advance(self, workload: str, term: int, leader: str) -> None:
        """Know a newer term, recorded first; harmless when repeated. Raises what `check` raises."""
        if term < 1 or not leader:
            raise ValueError("a term is at least 1 and has a leader")
        self.check(workload, term, leader)
        leadership = Leadership(term, leader)
        if self._newest.get(workload) != leadership:
            self._record(workload, leadership)
            self._newest[workload] = leadership
