"""A service address stays where its workload is led, whoever changes addresses by hand.

In: a workload's role, and whether this host has its address, every half second. Out: what is wrong with that,
once it was seen twice in a row: an address on its way to or from here is nobody's mistake.
"""

from __future__ import annotations

from ipaddress import ip_interface
from typing import Final, Literal

from common.roles import Role, StateName

LOOK_EVERY_S: Final = 0.5
_LED_ELSEWHERE: Final[frozenset[StateName]] = frozenset(
    {"following", "suspecting", "waiting", "handed_over", "yielded", "stopped"}
)

Misplaced = Literal["", "missing", "not ours"]


class AddressWatch:
    """Remembers the last look at one workload's address."""

    def __init__(self) -> None:
        self._last: tuple[Misplaced, int] = ("", 0)

    def look(self, role: Role, here: bool | None) -> Misplaced:
        """Say what is wrong, if it was at the last look, in the same term, as well; then forget it."""
        now = (misplaced(role, here), role.record.term)
        before, self._last = self._last, now
        if not now[0] or now != before:
            return ""
        self._last = ("", 0)
        return now[0]


def misplaced(role: Role, here: bool | None) -> Misplaced:
    """Say what is wrong with an address that this host has or has not, by the role alone. Pure.

    None: nobody knows whether it is here, and so nothing is wrong.
    """
    if here is None or role.undo or role.wanted is not None or role.record.term == 0:
        return ""
    if role.in_doubt:  # what is frozen here may soon run elsewhere
        return "not ours" if here else ""
    if role.name == "leading":
        return "missing" if role.alive and not role.vip_problem and not here else ""
    return "not ours" if here and role.name in _LED_ELSEWHERE else ""


def address_of(role: Role) -> str:
    """Return the address without its prefix length; empty if the workload has none."""
    return str(ip_interface(role.spec.vip).ip) if role.spec.vip is not None else ""
