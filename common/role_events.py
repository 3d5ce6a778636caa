"""What may happen to the role machine, and what it wants done about it.

Events go into `common.role_table.step`, effects come out of it, in the order in which they have to be done.
The keeper does the real ones, the simulator (`tests/sim`) those of a simulated cluster.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.control import Done, Order, Refused, TermHistory, WorkloadReport
from common.model import WorkloadSpec
from common.pauses import Pauses
from common.roles import Claim, Clean, StateName, Step, Takeover, TermRecord

# --- what may happen --------------------------------------------------------------------------------


class KeeperStarted(msgspec.Struct, frozen=True):
    """The first event of every machine. `running`: a container of the workload is here.

    Said once more if what an agent was to restore is found to run, and that agent is dead.
    """

    running: bool
    frozen: bool = False
    """It stands still, all of it."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed; several times within `suspect_after_s`."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A heartbeat of a peer, authenticated, newer than all before. `term` and the rest: keeper's only."""

    node: str
    origin: Literal["keeper", "agent"]
    boot_id: str = ""
    wall_s: float = 0.0
    """When it was sent, by the peer's clock."""
    term: int = 0
    claim: Claim | None = None
    heir: str = ""
    """To whom it has handed that term over; empty: to nobody by name."""
    alive: bool = False
    pauses: Pauses = ()
    """Those that the peer has recorded."""
    takeovers: tuple[Takeover, ...] = ()
    """What it would do if its leader fell silent; empty: there is nothing that it might replace."""
    in_doubt: bool = False
    """It leads, and has frozen the workload because its lease in etcd may be over."""
    leader: str = ""
    """Whom it follows, if it does not hear that one; empty: nobody, or one that is heard."""


class AgentReport(msgspec.Struct, frozen=True):
    """The own agent's report about the workload."""

    report: WorkloadReport


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Something beside the machine belongs into the history of the term that this node leads."""

    event: str
    reason: str


class WorkloadEnded(msgspec.Struct, frozen=True):
    """The keeper saw the container's first process end (or it is gone and the agent says so)."""

    exit_code: int | None = None


class TermPersisted(msgspec.Struct, frozen=True):
    """The record is on disk."""

    record: TermRecord


class PausesPersisted(msgspec.Struct, frozen=True):
    """These pauses are on disk."""

    pauses: Pauses


class StepDone(msgspec.Struct, frozen=True, kw_only=True):
    """An effect of this machine succeeded."""

    step: Step | Clean | Literal["thaw"]
    detail: str = ""


class AddressLost(msgspec.Struct, frozen=True):
    """The workload's address was on this host, and is not any more, whoever took it."""

    reason: str


class StepFailed(msgspec.Struct, frozen=True, kw_only=True):
    """An effect of this machine failed."""

    step: Step | Clean | Literal["thaw", "persist", "history", "pauses"]
    reason: str


class FenceResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the fence methods for `node`, or etcd in their place, answered in that attempt."""

    node: str
    attempt: int
    outcome: Literal["confirmed", "refused", "unknown"]
    reason: str
    term: int = 0
    """The term that etcd gave this node; 0: it was not etcd, or it gave none."""


class LeaseInDoubt(msgspec.Struct, frozen=True):
    """The lease in etcd may be over before it is renewed, or is lost: the workload was frozen here."""

    reason: str
    claimed_by: str = ""
    """The node that has claimed a newer term meanwhile; empty: none is known."""


class LeaseStands(msgspec.Struct, frozen=True):
    """The workload is not frozen any more for the lack of a lease."""


class OperatorFailover(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive failover`. `request` comes back in the `Answer`."""

    request: int
    accept_data_loss: bool
    old_primary_is_off: str
    to: str = ""
    """The node that is to lead in the place of this one, its successor; empty: this one itself."""
    others_are_off: tuple[str, ...] = ()
    """Other nodes that the operator vouches for, beside the old primary."""


class OperatorSwitchover(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive switchover`: hand it over to the node `to`, without loss."""

    request: int
    to: str


class OperatorStart(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive start`: a fresh start, without what was in memory."""

    request: int
    spec: WorkloadSpec
    peers_are_off: tuple[str, ...] = ()


class OperatorStop(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive stop`."""

    request: int


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive unprotect`, after a stop."""

    request: int


class OperatorPause(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive pause`: from now on no node takes it over by itself."""

    request: int
    by: str


class OperatorResume(msgspec.Struct, frozen=True, kw_only=True):
    """`outlive resume`: every pause that is known here ends."""

    request: int
    by: str


Event = (
    KeeperStarted
    | Tick
    | Heard
    | AgentReport
    | Told
    | WorkloadEnded
    | TermPersisted
    | PausesPersisted
    | StepDone
    | StepFailed
    | AddressLost
    | FenceResult
    | LeaseInDoubt
    | LeaseStands
    | OperatorFailover
    | OperatorSwitchover
    | OperatorStart
    | OperatorStop
    | Forget
    | OperatorPause
    | OperatorResume
)

# --- what is to be done -----------------------------------------------------------------------------


class PersistTerm(msgspec.Struct, frozen=True):
    """Make the record durable, then say `TermPersisted`; else `StepFailed("persist")`. In order.

    That is said of the newest record only: one that failed while a later one waits is not worth a word.
    """

    record: TermRecord


class PersistPauses(msgspec.Struct, frozen=True):
    """Make the pauses durable, then say `PausesPersisted`; else `StepFailed("pauses")`. In order."""

    pauses: Pauses


class SaveSpec(msgspec.Struct, frozen=True):
    """Keep the workload's declaration beside its term."""

    spec: WorkloadSpec


class RunFence(msgspec.Struct, frozen=True):
    """Ask the node's fence methods in order, then say `FenceResult` with this attempt.

    The number tells one attempt from another and no more: some are passed over.
    """

    node: str
    attempt: int
    term: int
    """The newest term known here: the node is to lead nothing up to it."""
    up_to: int
    """Nor in a later one up to this, if it has begun that unheard: the last before this node's own."""


class ClaimTerm(msgspec.Struct, frozen=True, kw_only=True):
    """Ask etcd for the right to lead a new term, then say `FenceResult` with this attempt."""

    attempt: int
    term: int
    """The least that it may be."""
    known: int
    """The newest term known here; another node's that is newer is not passed over …"""
    unused: tuple[str, ...]
    """… unless it was claimed by one of these, which are heard, and lead nothing that is newer …"""
    over: bool
    """… or an operator accepts the loss of what was done in it."""
    blank: bool
    """Also if etcd does not know of the term known here: every other node was heard, or is vouched for."""


class HoldVip(msgspec.Struct, frozen=True):
    """Drop the packets of the virtual address (step `hold`)."""


class AddVip(msgspec.Struct, frozen=True):
    """Give this node the virtual address (step `add_vip`)."""


class DropVip(msgspec.Struct, frozen=True):
    """Take the virtual address from this node (step `drop_vip`)."""


class LiftHold(msgspec.Struct, frozen=True):
    """Let the packets of the virtual address pass (step `lift`)."""


class Announce(msgspec.Struct, frozen=True):
    """Tell the neighbours where the address is (step `announce`)."""


class OrderAgent(msgspec.Struct, frozen=True):
    """From now on the agent's reports are answered with this order."""

    order: Order


class CheckHealth(msgspec.Struct, frozen=True):
    """Check until the workload is healthy or its grace is over (step `health`)."""


class KillWorkload(msgspec.Struct, frozen=True):
    """Kill every process of the workload at once, whatever the agent does (step `kill`)."""


class ThawWorkload(msgspec.Struct, frozen=True):
    """Let the workload run that was frozen to be handed over (step `thaw`)."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something changed and why; for the log."""

    state: StateName
    event: str
    reason: str


class SaveHistory(msgspec.Struct, frozen=True):
    """Keep this term's story; replaces what is kept of the same term."""

    history: TermHistory


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the operator's request of that number."""

    request: int
    answer: Done | Refused


class ForgetFiles(msgspec.Struct, frozen=True):
    """Remove the declaration and this machine; the term stays on disk, for terms are never reused."""


Effect = (
    PersistTerm
    | PersistPauses
    | SaveSpec
    | RunFence
    | ClaimTerm
    | HoldVip
    | AddVip
    | DropVip
    | LiftHold
    | Announce
    | OrderAgent
    | CheckHealth
    | KillWorkload
    | ThawWorkload
    | Note
    | SaveHistory
    | Answer
    | ForgetFiles
)
