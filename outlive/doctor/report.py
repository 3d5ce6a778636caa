"""What the doctor says: one `Check` for each thing looked at, all of them in a `DoctorReport`."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """One finding. `area` is `node` or a workload's name; `hint` says what to do, empty if nothing."""

    area: str
    name: str
    status: Status
    detail: str
    hint: str = ""


def node_check(name: str, status: Status, detail: str, hint: str = "") -> Check:
    """Return a finding about the node."""
    return Check("node", name, status, detail, hint)


class DoctorReport(msgspec.Struct, frozen=True):
    """All findings in the order in which they were made. Encodes to JSON as it is."""

    checks: tuple[Check, ...]

    @property
    def fit(self) -> bool:
        """Whether nothing failed; if not, the command exits with `UnsupportedError`'s code."""
        return all(check.status != "fail" for check in self.checks)
