"""What the processes of one node say to each other, over a socket in the node's run directory.

The agent reports and receives orders; the command line asks. Every exchange is one request and one
answer. Orders describe what *should be* (level-triggered): a lost, repeated or late exchange changes
nothing, and a restarted agent learns at its first report what it is to do.

Trust: the socket lies in a directory of mode 0700; who can open it is root already.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.model import EpochId, WorkloadSpec
from common.pauses import Pause

Verdict = Literal["none", "met", "missed"]
"""On a recovery point objective. `none`: the workload is not led here, or no other node may run it."""


class PlannedSwitchover(msgspec.Struct, frozen=True, kw_only=True):
    """A switchover that an operator asked for ahead of time, as it is on the disk of the node that leads."""

    to: str
    at_wall_s: float
    """When it is due, by this node's wall clock."""
    by: str
    """The user who asked."""
    term: int
    """Only while this node leads that term: with the next one it is forgotten."""


class SendingProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far an epoch on its way to a replica is."""

    epoch: EpochId
    for_s: float
    """Since when, in seconds."""
    done_bytes: int
    """Of its pages: sent, or there already, ..."""
    due_bytes: int
    """... of so many."""


class ReplicaProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one replica is, as its primary's agent knows."""

    node: str
    connected: bool
    acknowledged: EpochId | None = None
    acknowledged_wall_s: float | None = None
    """When the *capture* of the acknowledged epoch froze the workload; its age is the data at risk."""
    restorable: bool = False
    reasons: tuple[str, ...] = ()
    """Why not restorable there, one sentence each."""
    sending: SendingProgress | None = None
    """What is on its way there."""


class VerificationProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the comparison of one replica's store, or of memory, is; counted since the agent leads."""

    replica: str
    """Empty: the workload's memory is compared with what is believed of it."""
    pages_done: int
    """Pages of the round under way that were looked at, ..."""
    pages_due: int
    """... of so many. 0: no round is under way."""
    epochs: int
    """... at so many epochs."""
    rounds: int
    """Whole rounds."""
    ended_wall_s: float | None = None
    """When the last of them ended."""
    pages_compared: int = 0
    pages_different: int = 0
    problem: str = ""
    """Why nothing could be compared at the last epoch; empty if it could."""


class CaptureStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What captures a workload, as its agent has chosen."""

    backend: str
    """`fast` or `stock`."""
    tracker: str
    """How the fast one finds what is written, as `capture.tracker` has it; empty for the stock one."""
    reason: str
    """Why these, in a sentence."""
    files_scanned: int = 0
    """Files that were looked through so far, while all are; 0: they are not."""


class WorkloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent knows of one workload, told to its keeper at every report."""

    name: str
    spec: WorkloadSpec
    learned: bool = False
    """A leader sent it since the keeper last named it: the keeper is to take it up."""
    running: bool
    """A container of it runs on this node."""
    incarnation: str = ""
    init_pid: int = 0
    """Host PID of the container's first process while it runs, else 0."""
    exit_code: int | None = None
    """How the last incarnation ended by itself, until the next one starts."""
    stored: EpochId | None = None
    """Newest committed epoch in this node's store."""
    stored_wall_s: float | None = None
    """When that epoch froze the workload, by its leader's clock."""
    restorable: bool = False
    """The stored epoch passed this node's readiness checks."""
    reasons: tuple[str, ...] = ()
    """Why not, one sentence each; and why newer epochs cannot be stored, whether it is restorable or not."""
    captured: EpochId | None = None
    """Newest epoch captured here (primary)."""
    capture: CaptureStatus | None = None
    """What captures it (primary)."""
    capture_failures: int = 0
    """Captures that failed in a row."""
    replicas: tuple[ReplicaProgress, ...] = ()
    verification: tuple[VerificationProgress, ...] = ()
    doubt: str = ""
    """Why what is stored here is not what its leader captured; empty: nobody says so.

    Nobody takes over with it unasked. It can be restored all the same, if an operator wants that.
    """
    order_done: int = 0
    """Number of the newest order that is carried out; 0 for none."""
    order_failed: int = 0
    """Number of the newest order that could not be carried out; 0 for none."""
    handed_over: EpochId | None = None
    """The last epoch of a workload that stands still since then, committed by the heir: what the order
    `order_done` came to, if that was to hand it over."""
    order_detail: str = ""
    """What came of it, in a sentence: which epoch was restored, or why it failed."""
    restored: EpochId | None = None
    """The epoch that the running incarnation came from; None for a fresh start."""
    volatile: bool = False
    """The store is on tmpfs: it survives process crashes, not power loss."""
    aside: tuple[str, ...] = ()
    """Directories with epochs that were captured here, acknowledged by nobody and superseded."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper wants of the agent for one workload, from now on.

    - `lead`: the workload is to run here in `term`. If it doesn't: `action` says whether to start it
      afresh, restore the newest committed epoch, or (`none`) only to look after it if it runs. With
      `hand_over` it runs, and is to stand still from its last epoch on, which `heir` is to commit.
    - `keep`: it stands still here, and is neither to run nor to be ended; nothing is captured or received.
    - `follow`: it must not run here; receive and store epochs of `term` or newer.
    - `idle`: it must not run here, nothing is received.
    """

    workload: str
    number: int
    """Grows with every change; the agent names it when the order is carried out."""
    role: Literal["lead", "keep", "follow", "idle"]
    term: int
    action: Literal["none", "start", "restore", "hand_over"] = "none"
    newest_only: bool = False
    """No epoch but the newest may be restored, and only if it is the one of the hand-over: somebody keeps the
    workload, and takes it back otherwise."""
    heir: str = ""
    """To whom it is handed over."""
    leader: str = ""
    spec: WorkloadSpec | None = None
    """What the keeper knows the workload to be; always sent, so that an agent needs no file of its own."""


# --- requests to the keeper -------------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Agent to keeper, several times a second; also the sign that the agent lives."""

    agent_pid: int
    workloads: tuple[WorkloadReport, ...]


class AnnounceFreeze(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Agent to keeper, before a freeze: the answer must be awaited.

    The keeper opens a pidfd of `criu_pid` (the agent keeps criu unreaped until the answer is here).
    From then on, unless `EndFreeze` arrives within `deadline_ms`, it releases what is frozen: criu is
    continued if stopped, then killed; the cgroup is thawed.
    """

    workload: str
    criu_pid: int
    deadline_ms: int


class EndFreeze(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Agent to keeper: criu has ended and the workload runs."""

    workload: str
    criu_pid: int


class Failover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: lead this workload from here on."""

    workload: str
    accept_data_loss: bool = False
    old_primary_is_off: str = ""
    """Name of the node that the operator vouches for; empty for none."""
    to: str = ""
    """The node that is to lead in the place of the one that is asked; empty: that one itself."""
    others_are_off: tuple[str, ...] = ()


class Switchover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: hand this workload over to another node. Done: that has begun."""

    workload: str
    to: str


class PlanSwitchover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: hand this workload over at a time. Done: that is on this node's disk."""

    workload: str
    to: str
    at_wall_s: float
    by: str
    """Name of the user who asks."""


class CancelSwitchover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: forget the switchover that is planned. Done: it is not on this node's disk."""

    workload: str
    by: str


class StartWorkload(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: start the workload here (refused where it may run elsewhere)."""

    spec: WorkloadSpec
    peers_are_off: tuple[str, ...] = ()
    """Nodes that the operator vouches for, because they cannot say themselves that they do not lead."""


class StopWorkload(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: end the workload and keep it ended."""

    workload: str


class ForgetWorkload(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: this (stopped) workload is no longer protected here."""

    workload: str


class PauseTakeover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: no node is to take this workload over by itself. Done: that is on this node's disk.

    Which other nodes know is shown by their heartbeats, in `WorkloadStatus.pauses_unconfirmed_by`.
    """

    workload: str
    by: str
    """Name of the user who asks."""


class ResumeTakeover(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Operator to keeper: every pause of this workload that this node knows ends. Otherwise as the pause."""

    workload: str
    by: str


class AskStatus(msgspec.Struct, frozen=True, tag=True):
    """Anybody to keeper or agent: say how things stand."""


class AskExplanation(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Anybody to keeper: say what would follow if something failed now; nothing is done."""

    workload: str


class AskHistory(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Anybody to keeper: the kept terms of a workload with their timelines."""

    workload: str


class Resync(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a leader's agent: take nothing for granted any more of what a replica holds."""

    node: str
    workload: str = ""
    """Empty: all that this node leads and that replica receives."""
    full: bool = False
    """Send everything anew. False: the replica reads all that it holds, and gets what differs."""


class Verify(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a leader's agent: compare everything now, over the next epochs."""

    workload: str = ""
    """Empty: all that this node leads."""


class CompareFiles(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a follower's agent: compare a workload's directories with the epoch that they should be.

    Answered at once with how far that is: ask again until it is not `running` any more.
    """

    workload: str
    begin: bool
    """Begin, unless it is under way. False: only say how it stands."""


KeeperRequest = (
    Report
    | AnnounceFreeze
    | EndFreeze
    | Failover
    | Switchover
    | PlanSwitchover
    | CancelSwitchover
    | StartWorkload
    | StopWorkload
    | ForgetWorkload
    | PauseTakeover
    | ResumeTakeover
    | AskStatus
    | AskExplanation
    | AskHistory
    | Resync
    | Verify
    | CompareFiles
)

# --- answers ----------------------------------------------------------------------------------------


class Done(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """It is done, or under way; `detail` says what happens now."""

    detail: str = ""


class Refused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """It is not done. `error` names a class of `common.errors`."""

    error: str
    message: str
    hint: str = ""


class Resyncing(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `Resync`: it is under way for these workloads, from the next epoch on."""

    since: dict[str, EpochId | None]
    """The newest epoch captured so far of each: the replica is in sync again with a newer one."""


class Verifying(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `Verify`: rounds begin with the next epoch; how things stood before, for each workload.

    Only what is compared at present is named: no replica that is not connected.
    """

    before: dict[str, tuple[VerificationProgress, ...]]


class FilesComparison(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `CompareFiles`: how far the last comparison is, and what it has found."""

    running: bool
    epoch: EpochId | None = None
    """The epoch that was compared with last: they go on meanwhile."""
    pages_done: int = 0
    pages_due: int = 0
    """Of contents, which come after all names. 0: these are not done."""
    different: int = 0
    examples: tuple[str, ...] = ()
    """The first of what differed, one sentence each."""
    repaired: bool = False
    """All was looked at, and made equal."""
    problem: str = ""
    """Why it could not be compared to the end, or not be repaired."""


class Orders(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to a `Report`: all that the keeper wants, whether it changed or not."""

    orders: tuple[Order, ...]


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a peer looks from here."""

    node: str
    keeper_silence_ms: int | None
    """None: never heard since this keeper started."""
    agent_silence_ms: int | None
    boot_id: str = ""
    refused: str = ""
    """Why a key was refused, in a sentence, while nothing is heard of the peer; empty: none was lately."""


class TimelineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a takeover or of any other change of role."""

    at_ms: float
    """Milliseconds since the timeline began (monotonic)."""
    wall_s: float
    event: str
    reason: str


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What this node knows of a workload's lease in etcd."""

    holder: str
    """Who holds it, as etcd said last; empty: nobody."""
    term: int
    good_for_s: float | None
    """This node holds it, and the workload may run for so long without another renewal; None: it may not."""
    ttl_s: int
    """How long this node's lease lives at etcd without a renewal, at least."""
    frozen: str = ""
    """Why the workload is frozen here for the lack of a lease; empty: it isn't."""
    problem: str = ""
    """Why the last question to etcd has no good answer; empty: it has."""
    etcd_silence_s: float | None = None
    """Since etcd answered last; None: not since this keeper began."""


class WorkloadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One workload as this node sees it; what `outlive status` shows."""

    name: str
    role: Literal["primary", "replica", "none"]
    state: str
    """A state of the role machine."""
    reason: str
    """Why it is in that state, in a sentence."""
    term: int
    leader: str
    running: bool
    stopped: bool = False
    """It is to run nowhere: never started, stopped by an operator, or ended by itself. Nothing is at risk."""
    restorable: bool
    """Primary: at least one replica could restore it. Replica: this node could."""
    reasons: tuple[str, ...] = ()
    data_at_risk_s: float | None = None
    """Age of the newest epoch that could be restored elsewhere (or here).

    None: there is none, and all is at risk; or it is `stopped`, and nothing is.
    """
    rpo: Verdict = "none"
    """Whether less is at risk than the workload's objective allows."""
    rpo_ms: int = 0
    """That objective."""
    capture: CaptureStatus | None = None
    """What captures it; None: nothing does, it is not led here."""
    captured: EpochId | None = None
    stored: EpochId | None = None
    replicas: tuple[ReplicaProgress, ...] = ()
    verification: tuple[VerificationProgress, ...] = ()
    exit_code: int | None = None
    volatile: bool = False
    aside: tuple[str, ...] = ()
    """Directories on this node with epochs that it captured and nobody acknowledged, for a human."""
    pauses: tuple[Pause, ...] = ()
    """Pauses of automatic takeover that are in force."""
    pauses_unconfirmed_by: tuple[str, ...] = ()
    """Other nodes of it that were not heard to know what this one has recorded of pauses and resumes."""
    planned: PlannedSwitchover | None = None
    """The switchover that is planned on this node."""
    lease: LeaseStatus | None = None
    """None: its right to lead does not come from etcd."""


class NodeStatus(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `AskStatus`."""

    node: str
    boot_id: str
    agent: Literal["alive", "silent", "never seen"]
    peers: tuple[PeerStatus, ...]
    workloads: tuple[WorkloadStatus, ...]
    warnings: tuple[str, ...] = ()
    """What is wrong with this keeper itself, one sentence each."""


TakeoverOutcome = Literal["failover", "no failover", "restart", "runs on", "stays down", "not known here"]


Failure = Literal["process failure", "host loss", "partition", "agent dead", "workload ended"]
"""The first three are the leader's: its agent and keeper are dead; its host is lost; it is cut off from its
successor."""


class Prospect(msgspec.Struct, frozen=True, kw_only=True):
    """What would follow from one failure, if it happened now."""

    failure: Failure
    outcome: TakeoverOutcome
    node: str
    """Where it would run then; empty: nowhere, or it is not known."""
    reason: str


class Explanation(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `AskExplanation`."""

    workload: str
    node: str
    """Which node answers."""
    term: int
    leader: str
    stopped: bool
    would_fail_over: bool
    """If the leader's host were lost now, another node would take over by itself."""
    successor: str
    """The only node that could; empty: there is none."""
    epoch: EpochId | None
    """What it would restore, as this node knows."""
    loss_s: float | None
    """The age of that epoch, which is what would be lost; None: all would be, or it is not known here."""
    missing: tuple[str, ...]
    """Why it would not take over, one sentence each; empty if it would."""
    cases: tuple[Prospect, ...]
    planned: PlannedSwitchover | None = None
    """The switchover that is planned on this node."""


class TermHistory(msgspec.Struct, frozen=True, kw_only=True):
    """One term of a workload: who led it, why it began, and how."""

    workload: str
    term: int
    leader: str
    cause: str
    began_wall_s: float
    restored: EpochId | None = None
    timeline: tuple[TimelineEntry, ...] = ()
    """How it began, on the node that led it."""
    handover: tuple[TimelineEntry, ...] = ()
    """Of the newest attempt to hand it over."""

    def after(self, older: TermHistory | None) -> TermHistory:
        """Return this story of a term, completed by what an older one tells and this one does not."""
        if older is None or older.term != self.term:
            return self
        began = self if self.timeline else older
        return msgspec.structs.replace(
            self,
            restored=began.restored,
            timeline=began.timeline,
            handover=self.handover or older.handover,
        )


class History(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to `AskHistory`, oldest term first."""

    terms: tuple[TermHistory, ...]


class StreamMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent measured of one workload's stream to one replica."""

    node: str
    epochs_acknowledged: int
    commit_ms: tuple[float, ...]
    """From the offer of an epoch until its acknowledgement; the newest 1,000."""
    bytes_sent: int
    bytes_full: int
    """What the acknowledged epochs would have been, sent whole."""


class WorkloadMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent measured of one workload that it captures; the newest 1,000 of each series."""

    name: str
    backend: str
    epochs_captured: int
    epochs_acknowledged: int
    """By at least one replica, each counted once."""
    freeze_ms: tuple[float, ...]
    """From the first task seized to the last one running again, as CRIU measured."""
    abandoned_ms: tuple[float, ...] = ()
    """Of freezes that came to nothing (too much was dirty, for one): for how long each lasted at most."""
    epoch_ms: tuple[float, ...]
    """From the request to criu until the epoch could be offered to the streams."""
    interval_ms: tuple[float, ...]
    """Between the freezes of epochs acknowledged one after the other."""
    memory_bytes: int
    """Present pages of the newest epoch."""
    streams: tuple[StreamMetrics, ...]
    verification: tuple[VerificationProgress, ...] = ()

    @property
    def commit_ms(self) -> tuple[float, ...]:
        """Those of all streams, one after the other."""
        return tuple(value for stream in self.streams for value in stream.commit_ms)

    @property
    def bytes_sent(self) -> int:
        """On all streams."""
        return sum(stream.bytes_sent for stream in self.streams)

    @property
    def bytes_full(self) -> int:
        """On all streams."""
        return sum(stream.bytes_full for stream in self.streams)


class AgentMetrics(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The agent's answer to `AskStatus`."""

    node: str
    pid: int
    rss_bytes: int
    cpu_s: float
    """CPU time of the agent and of the criu processes that it has waited for."""
    workloads: tuple[WorkloadMetrics, ...]


KeeperAnswer = (
    Done
    | Refused
    | Resyncing
    | Verifying
    | FilesComparison
    | Orders
    | NodeStatus
    | Explanation
    | History
    | AgentMetrics
)
"""Every answer on a node's control sockets."""
