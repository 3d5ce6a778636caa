"""Workloads whose files or cgroup on this node are not in order: the keeper cannot know how they stand.

In: a name and what is wrong. Out: status, what heartbeats say, a refusal for every request. A term is never
guessed: such a workload has no role machine, so nothing here starts it, restores it, takes it over or ends
it, until somebody has mended that; the keeper looks every now and then. What runs, runs on, unprotected.
"""

from __future__ import annotations

from collections.abc import Callable

from common.control import WorkloadStatus
from common.errors import StoreError, WorkloadError
from common.messages import BeatWorkload

AGAIN_S = 10.0


class SetAside:
    """By name, with the reason. `runs` tells whether a container of that name is here."""

    def __init__(self, runs: Callable[[str], bool]) -> None:
        self._runs = runs
        self._errors: dict[str, StoreError | WorkloadError] = {}

    def add(self, name: str, error: StoreError | WorkloadError) -> str:
        """Set a workload aside; return why, in a sentence."""
        self._errors[name] = error
        return self._reason(name)

    def remove(self, name: str) -> None:
        """Take a workload back: it is in order."""
        del self._errors[name]

    def names(self) -> tuple[str, ...]:
        """Return those that are set aside."""
        return tuple(self._errors)

    def __contains__(self, name: str) -> bool:
        return name in self._errors

    def refuse(self, name: str) -> None:
        """Raise WorkloadError if that workload is set aside."""
        if name in self._errors:
            raise WorkloadError(self._reason(name), hint=self._hint(name))

    def beats(self, *, agent_alive: bool) -> tuple[BeatWorkload, ...]:
        """Say that this node exists and does not know: peers must not take it for one that follows."""
        return tuple(
            BeatWorkload(
                name=name,
                term=0,
                state="starting",
                heir="",
                alive=self._runs(name),
                agent_alive=agent_alive,
                pauses=(),
                takeovers=(),
                in_doubt=False,
            )
            for name in self._errors
        )

    def statuses(self) -> tuple[WorkloadStatus, ...]:
        """Return how they stand."""
        return tuple(
            WorkloadStatus(
                name=name,
                role="none",
                state="failed",
                reason=f"{self._reason(name)} ({self._hint(name)})",
                term=0,
                leader="",
                running=self._runs(name),
                restorable=False,
                reasons=("this node does not know its term",),
            )
            for name in self._errors
        )

    def _reason(self, name: str) -> str:
        return (
            f"{self._errors[name].message}: whether this node may lead {name} cannot be known, "
            "so it does nothing with it"
        )

    def _hint(self, name: str) -> str:
        return (
            f"{self._errors[name].hint}; it is looked at again every {AGAIN_S:.0f} s, "
            "and without a term.json at the next systemctl restart outlive-keeper"
        )
