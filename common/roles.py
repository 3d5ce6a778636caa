"""What one node knows of one workload: the state of the role machine.

In and out of `common.role_table.step`: a `Role`, an `Event`, an `Instant`; a new `Role` and `Effect`s
(`common.role_events`). Nothing there touches a socket, a clock, a file or a process. What always holds:

- A node leads a term only after it has recorded the term durably with itself as the leader. `Role.record`
  is what the disk holds; it changes by `TermPersisted` alone.
- The right to create the next term belongs to one node at a time: the leader, or, once the leader has
  *yielded* (recorded, before it is said), its successor. Everybody else needs the leader fenced, or an
  operator who vouches that it is off.
- A fence voids the right of the fenced node to every term up to the one that it names: by power, because the
  host boots anew before it runs anything; by SSH, because the refusal is on its disk before anything else is
  done. So a leader that finds its term file under the same boot id and no refusal of that term still has its
  right; else it has to hear its peers first (`common.succession.right_stands`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

from common.control import Order, TimelineEntry, WorkloadReport
from common.model import WorkloadSpec
from common.pauses import Pauses

StateName = Literal[
    "starting",
    "stopped",
    "launching",
    "leading",
    "handing_over",
    "handed_over",
    "yielding",
    "yielded",
    "following",
    "suspecting",
    "acquiring",
    "waiting",
    "taking_over",
    "deposed",
    "failed",
]

MEANING: dict[StateName, str] = {
    "starting": "The keeper has just begun, or its host booted anew or was fenced: others may lead by now.",
    "stopped": "Not to run: never started, stopped by an operator, or ended by itself. Nobody takes over.",
    "launching": "This node leads and starts the workload afresh.",
    "leading": "This node leads; the workload is to run here.",
    "handing_over": "The workload stands still while its last epoch is committed where it is to run next.",
    "handed_over": "This node has durably given its term to another one, and keeps the frozen workload "
    "until it runs there.",
    "yielding": "The workload ended or cannot go on here: what is left of it is removed before that is said.",
    "yielded": "This node has durably given up its term in favour of its successor.",
    "following": "Another node leads; its epochs are received and stored here.",
    "suspecting": "Both the leader's keeper and its agent have been silent for too long.",
    "acquiring": "The leader is being fenced, or the new term is being recorded.",
    "waiting": "The leader is silent or gone, and this node may not or cannot lead: the reason says why.",
    "taking_over": "This node leads a new term and restores the newest committed epoch.",
    "deposed": "A newer term is known, or the workload runs here without a right: it is being killed.",
    "failed": "This node leads the term but could not bring the workload up.",
}
"""What each state means; `docs/concepts/roles.md` shows it."""

LEADING: frozenset[StateName] = frozenset({"launching", "leading", "taking_over", "handing_over", "yielding"})
"""States in which this node leads and the workload runs here, is being brought up, or is being removed."""

PURSUING: frozenset[StateName] = frozenset({"following", "suspecting", "waiting", "acquiring"})
"""States of a node that another one leads."""

Claim = Literal["starting", "taking_over", "leading", "stopped", "yielded", "following", "acquiring"]
"""What a node's heartbeats say of a workload; less than a state, so that states may change."""

RUNS: frozenset[Claim] = frozenset({"leading", "taking_over"})
"""Claims of a leader that runs the workload or is about to."""

OWNING: frozenset[Claim] = RUNS | {"starting", "stopped", "yielded"}
"""Claims that only the leader of the named term makes."""

Mark = Literal["launching", "taking_over", "leads", "stopped", "failed", "yielded"]
"""How far the leader of a term is, as far as it was recorded."""

Step = Literal["hold", "add_vip", "order", "health", "lift", "announce"]
PIPELINE: tuple[Step, ...] = ("hold", "add_vip", "order", "health", "lift", "announce")
"""From a recorded term to a served workload. Clients reach nothing between the first and the fifth step."""

Silence = Literal["host loss", "partition", "process failure"]
"""Why a leader may fall silent: the words of a fence method's `covers`."""

SILENCES: tuple[Silence, ...] = ("process failure", "host loss", "partition")

Clean = Literal["kill", "drop_vip", "lift"]
"""What a node that may not lead has to undo; repeated until it succeeded."""


class Instant(NamedTuple):
    """Both clocks at one moment; only the monotonic one decides anything."""

    monotonic_s: float
    wall_s: float


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long each kind of silence may last."""

    suspect_after_s: float = 0.3
    listen_s: float = 2.0
    """How long a keeper listens after its start before it believes that a peer is not there."""
    agent_silent_after_s: float = 2.0
    """The own agent counts as dead then; it reports several times a second."""
    stop_grace_s: float = 15.0
    """How long the agent may take to end a workload before the keeper kills it."""
    handover_s: float = 30.0
    """How long a workload may stand still until its last epoch is committed and its address dropped."""
    order_s: float = 660.0
    """How long an order may take to bring it up: two restores of at most 300 s each, and cleaning up."""
    fence_s: float = 10.0
    """How long a fence may take, all methods of a node together."""
    retry_first_s: float = 1.0
    retry_most_s: float = 30.0
    claim_again_s: float = 0.5
    """Between two claims of the lease in etcd: it may be over at any moment."""
    restarts: int = 5
    """Restarts of a workload that ends by itself within `restart_window_s` of its start, in a row."""
    restart_window_s: float = 60.0


class TermRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is on disk about the newest term known: who leads it, how far it is, why it began."""

    term: int = 0
    leader: str = ""
    """Empty: a term was heard of, but not yet from its leader."""
    mark: Mark = "stopped"
    boot_id: str = ""
    """The boot of this node under which it recorded itself as the leader."""
    cause: str = "never started"
    began_wall_s: float = 0.0
    heir: str = ""
    """Marked yielded: the node to which the term was handed over; empty: its successor has the right."""
    handed_by: str = ""
    """The node that handed the term before this one over, and may still keep the frozen workload."""
    nothing_kept: bool = False
    """Marked yielded to a node by name: who gave it up had nothing of the workload, by its own word."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """What a fence left on the disk of the node that it fenced: it leads nothing up to that term."""

    term: int
    by: str
    """The node that fenced, and may lead the next term."""
    at_wall_s: float = 0.0


class Takeover(msgspec.Struct, frozen=True, kw_only=True):
    """What a node that another one leads would do if that one fell silent now."""

    silence: Silence
    missing: tuple[str, ...]
    """Why it would not take over, one sentence each; empty: it would."""


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """What was last heard of the workload from one peer. Times are monotonic seconds; None: never."""

    keeper_at_s: float | None = None
    agent_at_s: float | None = None
    boot_id: str = ""
    term: int = 0
    claim: Claim | None = None
    """None: its keeper does not know the workload."""
    heir: str = ""
    """To whom it has handed that term over; empty: to nobody by name."""
    alive: bool = False
    led_wall_s: float | None = None
    """When it was heard to lead that term last, by the clock that stamps its epochs; None: never was."""
    pauses: Pauses = ()
    """Those that it has recorded."""
    takeovers: tuple[Takeover, ...] = ()
    """What it would do if the leader fell silent; empty: it follows none, or one that has stopped it."""
    in_doubt: bool = False
    """It leads, and has frozen the workload because its lease in etcd may be over."""


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node knows of one workload. Made by `new_role`, changed by `step` only."""

    me: str
    boot_id: str
    spec: WorkloadSpec
    timing: Timing
    fenceable: frozenset[str]
    """Nodes for which a fence method is configured."""
    name: StateName = "starting"
    reason: str = "the keeper has just begun"
    record: TermRecord
    wanted: TermRecord | None = None
    """On its way to the disk."""
    refusal: Refusal | None = None
    """The newest fence of this node, as the disk held it when the keeper began: a fence ends the keeper."""
    peers: dict[str, PeerView] = {}
    """Never changed in place."""
    report: WorkloadReport | None = None
    agent_at_s: float | None = None
    heir_ready_at_s: float = -math.inf
    """When the agent reported last that the successor could restore what runs here."""
    alive: bool = False
    """The workload's first process lives here, by the keeper's own knowledge."""
    exit_code: int | None = None
    listening_since_s: float
    """Silence before this moment says nothing: this keeper was not there, or did not run."""
    ticked_at_s: float
    order: Order
    step: Step | None = None
    """The step that is being carried out, in `launching` and `taking_over`."""
    undo: frozenset[Clean] = frozenset()
    """What still has to be undone."""
    undo_at_s: float = 0.0
    """When it is tried again after a failure; before that it is being carried out."""
    vip_problem: str = ""
    unhealthy: str = ""
    fence_attempt: int = 0
    retries: int = 0
    retry_at_s: float = 0.0
    fencing_until_s: float = 0.0
    """Until then a fence that an earlier keeper of this node asked for may do its work."""
    restarts: int = 0
    restart_at_s: float = 0.0
    """When the workload, which ended, is started again."""
    launched_at_s: float = 0.0
    stop_deadline_s: float = 0.0
    request: int | None = None
    """The operator's request that waits for its answer."""
    vouched: str = ""
    """Name of the node that the operator's pending failover vouches for."""
    heir: str = ""
    """The node to which it is being handed over."""
    by_operator: bool = False
    """The pending attempt to lead was asked for by an operator who accepts the loss of data."""
    others_off: tuple[str, ...] = ()
    """With `by_operator`: nodes beside the old primary that the operator vouches for."""
    cedes_to: str = ""
    """With `by_operator`: the node to which the right to lead is given once it is had; empty: none."""
    in_doubt: str = ""
    """Why the workload is frozen here for the lack of a lease in etcd; empty: it isn't."""
    lost_to: str = ""
    """The node that has claimed a newer term while this one's lease was in doubt; empty: none is known."""
    starts_from: StateName | None = None
    """The state in which an operator's start asked etcd for a term; where it goes if there is none."""
    spec_before: WorkloadSpec | None = None
    """During an operator's start: the declaration that counts again if nothing comes of it."""
    timeline: tuple[TimelineEntry, ...] = ()
    timeline_from_s: float = 0.0
    pauses: Pauses = ()
    """Pauses of automatic takeover, lifted ones too, as the disk holds them."""
    pauses_wanted: Pauses | None = None
    """On their way to the disk."""
    pauses_retry_at_s: float = 0.0
    pause_requests: tuple[int, ...] = ()
    """Operators' requests that wait for that."""

    @property
    def newest(self) -> TermRecord:
        """The newest term known, whether it is on disk already or not."""
        return self.record if self.wanted is None else self.wanted


def claim_of(role: Role) -> Claim:
    """Return what heartbeats say of it."""
    name = role.name
    if name == "taking_over" or (name == "failed" and role.record.handed_by):
        return "taking_over"  # not there yet; what failed is given back to whoever keeps it
    if name in LEADING:
        return "leading"
    if name == "handed_over":
        return "yielded" if role.record.leader == role.me else "acquiring"  # given back, and about to lead
    if name in ("stopped", "failed"):
        return "stopped"
    if name in ("starting", "yielded", "acquiring"):
        return name
    return "following"


def heir_of(role: Role) -> str:
    """Return to whom heartbeats say that it was handed over; empty: to nobody by name."""
    return role.record.heir if claim_of(role) == "yielded" else ""


def new_role(
    *,
    me: str,
    boot_id: str,
    spec: WorkloadSpec,
    timing: Timing,
    fenceable: frozenset[str],
    record: TermRecord,
    first_order: int,
    now: Instant,
    pauses: Pauses = (),
    refusal: Refusal | None = None,
) -> Role:
    """Return the machine as the keeper finds it; `first_order` is greater than every order number before.

    The next event must be `KeeperStarted`.
    """
    order = Order(
        workload=spec.name, number=first_order, role="idle", term=record.term, leader=record.leader, spec=spec
    )
    return Role(
        me=me,
        boot_id=boot_id,
        spec=spec,
        timing=timing,
        fenceable=fenceable,
        record=record,
        listening_since_s=now.monotonic_s,
        ticked_at_s=now.monotonic_s,
        order=order,
        pauses=pauses,
        refusal=refusal,
    )
