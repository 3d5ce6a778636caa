"""The agent's own durable memory of terms, for its `TermGuard`: one small file a workload.

The keeper's term file says who *may* lead; this one says whose epochs were accepted here, so that an
agent that restarts while its keeper is away still refuses what it refused before.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from common.durable import atomic_write
from common.errors import StoreError
from common.terms import Leadership


class HeardTerms:
    """Files named after workloads in one directory, each the newest leadership that was accepted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def record(self, workload: str, leadership: Leadership) -> None:
        """Make it durable before returning. Raises StoreError, NoSpaceError."""
        self._make()
        atomic_write(self._directory / f"{workload}.json", msgspec.json.encode(leadership), op="heard-term")

    def _make(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {self._directory}: {error.strerror}") from error

    def record_run(self, workload: str, incarnation: str) -> None:
        """Make durable which run of the workload its leader greeted with; does nothing if it is known."""
        if incarnation == self.read_run(workload):
            return
        self._make()
        atomic_write(self._directory / f"{workload}.run", incarnation.encode(), op="heard-run")

    def read_run(self, workload: str) -> str:
        """Return which run the leader greeted with last; empty if none did. Raises StoreError."""
        try:
            return (self._directory / f"{workload}.run").read_text()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._directory / workload}.run cannot be read: {error}") from error

    def read_all(self) -> dict[str, Leadership]:
        """Return what was recorded. Raises StoreError if a file is damaged: it is never guessed."""
        found: dict[str, Leadership] = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=Leadership)
            except (OSError, msgspec.DecodeError) as error:
                raise StoreError(
                    f"{path} cannot be read: {error}",
                    hint='write {"term": N, "leader": "NODE"} into it, as the leader\'s status says',
                ) from error
        return found
