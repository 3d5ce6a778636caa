"""What is said to etcd about the right to lead one workload: each question as a sequence of calls. Sans IO.

    leader   who leads: node, term and boot id, bound to a lease; it is gone when the lease is
    term     the newest term that was ever claimed, and by whom; never bound to a lease, never lowered

A question is a generator: it yields `Call`s, is sent their answers, may have an OutliveError thrown in where
a call had no answer, and returns what came of it. The keeper sends the calls over HTTP (`common.etcd`), the
simulator to an etcd of its own. Invariants:

- `leader` is written only in a transaction that compares that `term` is as it was read, and that `leader` is
  absent, or still what was read there: this node's own claim to that very term.
- A lease that this node may have asked to be ended is never relied on again: etcd may carry that out at any
  time, also long after nobody waits for its answer. So what is held again is bound to a new lease.
- Whoever gains a term writes it to `term` in that same transaction, and it is greater than what stood there.
- The moment from which a lease counts is read *before* the call that grants or renews it is made.

The format is that of etcd's JSON gateway (etcd API reference, `/v3`): keys and values are base64, 64-bit
numbers are strings.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Generator
from typing import Any, Literal

import msgspec

from common.errors import OutliveError

PREFIX = "/outlive"

_BLANK = "etcd knows of no term of it: it has lost what it knew, or never gave the right to lead it"

Clock = Callable[[], float]


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request to etcd."""

    path: str
    body: bytes
    answer: type
    """What its JSON is to be decoded to."""
    repeatable: bool
    """It may be made again, at another endpoint, though the first may have been carried out."""


class Claimant(msgspec.Struct, frozen=True, kw_only=True):
    """Who leads or led: the value of both keys."""

    node: str
    term: int
    boot_id: str


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A lease with the key that is bound to it."""

    lease_id: int
    revision: int
    """At which the key was written; another one is another key."""
    term: int


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What both keys said at one revision."""

    leader: Claimant | None = None
    newest: Claimant | None = None


# --- questions and answers --------------------------------------------------------------------------


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Give this node the right to lead a new term."""

    term: int
    """The least that it may be."""
    known: int
    """The newest term that this node has heard of."""
    unused: tuple[str, ...] = ()
    """Nodes that have led no later one, though they may have claimed it."""
    blank: bool = False
    """Also if no term was ever claimed there, or only older ones than the one that is known."""
    over: bool
    """Also if another node has led a later one: an operator gives up what was done in it."""


class Renew(msgspec.Struct, frozen=True, kw_only=True):
    """Let the lease live on, and see that its key is untouched."""

    held: Held


class Reclaim(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the term again that this node claimed under this boot, if nobody has claimed one since."""

    term: int


class Revoke(msgspec.Struct, frozen=True, kw_only=True):
    """Let the lease end now, so that nobody has to wait for it."""

    lease_id: int


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Only look."""


Question = Claim | Renew | Reclaim | Revoke | Look


class Granted(msgspec.Struct, frozen=True, kw_only=True):
    """The key is this node's, and its lease lives for `ttl_s` from `sent_s` on, by the asker's clock."""

    held: Held
    sent_s: float
    ttl_s: float


class Denied(msgspec.Struct, frozen=True, kw_only=True):
    """Etcd answered, and the key is not this node's."""

    reason: str
    claimed_by: str = ""
    """The node that has claimed a newer term; empty: that is not why."""


class Unanswered(msgspec.Struct, frozen=True, kw_only=True):
    """Whether it was done is not known."""

    reason: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What stands there."""

    standing: Standing


Answer = Granted | Denied | Unanswered | Seen
Calls = Generator[Call, Any, Answer]


# --- what etcd answers ------------------------------------------------------------------------------


class _Header(msgspec.Struct, frozen=True):
    revision: int = 0
    raft_term: int = 0


class _Pair(msgspec.Struct, frozen=True):
    key: str
    value: str = ""
    mod_revision: int = 0
    lease: int = 0


class _Range(msgspec.Struct, frozen=True):
    kvs: tuple[_Pair, ...] = ()


class _Response(msgspec.Struct, frozen=True):
    response_range: _Range | None = None


class TxnAnswer(msgspec.Struct, frozen=True):
    """Of `/v3/kv/txn`."""

    header: _Header = _Header()
    succeeded: bool = False
    responses: tuple[_Response, ...] = ()


class LeaseAnswer(msgspec.Struct, frozen=True):
    """Of `/v3/lease/grant`, and within that of `/v3/lease/keepalive`."""

    ID: int = 0
    TTL: int = 0
    header: _Header = _Header()


class KeepaliveAnswer(msgspec.Struct, frozen=True):
    """Of `/v3/lease/keepalive`."""

    result: LeaseAnswer = LeaseAnswer()


class RevokeAnswer(msgspec.Struct, frozen=True):
    """Of `/v3/lease/revoke`."""


class _Read(msgspec.Struct, frozen=True, kw_only=True):
    """Both keys, with what a comparison needs."""

    standing: Standing
    leader: _Pair | None
    term_revision: int
    raft_term: int


# --- the calls --------------------------------------------------------------------------------------


class LeaseKeys:
    """Asks for one workload on behalf of one node under one boot."""

    def __init__(self, workload: str, *, node: str, boot_id: str, ttl_s: int, clock: Clock) -> None:
        self._workload = workload
        self._leader = f"{PREFIX}/{workload}/leader"
        self._term = f"{PREFIX}/{workload}/term"
        self._node = node
        self._boot_id = boot_id
        self._ttl_s = ttl_s
        self._clock = clock

    def ask(self, question: Question) -> Calls:
        """Begin a question; whatever keeps etcd from answering ends it in `Unanswered`."""
        try:
            match question:
                case Claim():
                    return (yield from self._claim(question))
                case Renew(held=held):
                    return (yield from self._renew(held))
                case Reclaim(term=term):
                    return (yield from self._reclaim(term))
                case Revoke(lease_id=lease_id):
                    return (yield from self._revoke(lease_id))
                case Look():
                    return Seen(standing=(yield from self._read()).standing)
        except (OutliveError, msgspec.MsgspecError, ValueError) as error:
            return Unanswered(reason=str(error))

    def _claim(self, asked: Claim) -> Calls:
        read = yield from self._read()
        leader, newest = read.standing.leader, read.standing.newest
        if (newest is None or newest.term < asked.known) and not asked.blank:
            return Denied(reason=_BLANK if newest is None else _unknown(asked.known, newest))
        if leader is not None and leader.node != self._node:
            return Denied(reason=f"{leader.node} holds the lease of term {leader.term}")
        passed_over = asked.over or newest is None or newest.node in (self._node, *asked.unused)
        if newest is not None and newest.term > asked.known and not passed_over:
            return Denied(
                reason=f"{newest.node} has claimed term {newest.term}, of which nothing was heard here: "
                f"what was done in it is not here either; outlive failover {self._workload} "
                "--accept-data-loss passes over it"
            )
        if read.leader is not None:  # of an attempt whose answer was lost, or of a keeper before a boot
            yield from self._revoke(read.leader.lease)
            read = yield from self._read()
            if read.leader is not None:
                return Denied(reason="another node was faster")
            newest = read.standing.newest
        term = max(asked.term, newest.term + 1 if newest is not None else 0)
        mine = Claimant(node=self._node, term=term, boot_id=self._boot_id)
        return (yield from self._take(mine, read.term_revision, write_term=True))

    def _renew(self, held: Held) -> Calls:
        sent_s = self._clock()
        alive = yield _call("lease/keepalive", {"ID": str(held.lease_id)}, KeepaliveAnswer)
        if alive.result.TTL <= 0:
            return Denied(reason="the lease is over")
        read = yield from self._read()
        if 0 < alive.result.header.raft_term < read.raft_term:
            return Unanswered(reason="etcd has a new leader, which may not know of the renewal")
        pair = read.leader
        if pair is None or (pair.lease, pair.mod_revision) != (held.lease_id, held.revision):
            return Denied(reason="the key is not the one that was written with this lease")
        return Granted(held=held, sent_s=sent_s, ttl_s=min(self._ttl_s, alive.result.TTL))

    def _reclaim(self, term: int) -> Calls:
        read = yield from self._read()
        leader, newest = read.standing.leader, read.standing.newest
        mine = Claimant(node=self._node, term=term, boot_id=self._boot_id)
        if newest is None:
            return Denied(reason=_BLANK)
        if newest != mine:
            reason = f"{newest.node} has claimed term {newest.term}"
            return Denied(reason=reason, claimed_by=newest.node)
        ours = read.leader.mod_revision if read.leader is not None and leader == mine else 0
        return (yield from self._take(mine, read.term_revision, ours, write_term=False))

    def _take(self, mine: Claimant, term_revision: int, ours: int = 0, *, write_term: bool) -> Calls:
        """Write the key with a new lease; `ours` is the revision at which this node wrote it, 0 if absent."""
        sent_s = self._clock()
        granted = yield _call("lease/grant", {"TTL": str(self._ttl_s)}, LeaseAnswer)
        if granted.ID == 0:
            return Unanswered(reason="etcd granted no lease")
        value = _base64(msgspec.json.encode(mine))
        puts = [{"request_put": {"key": _key(self._leader), "value": value, "lease": str(granted.ID)}}]
        if write_term:
            puts.append({"request_put": {"key": _key(self._term), "value": value}})
        compare = [_unchanged(self._leader, ours), _unchanged(self._term, term_revision)]
        answer = yield _call(
            "kv/txn", {"compare": compare, "success": puts, "failure": []}, TxnAnswer, repeatable=False
        )
        if not succeeded(answer):
            yield from self._revoke(granted.ID)
            return Denied(reason="another node was faster")
        held = Held(lease_id=granted.ID, revision=answer.header.revision, term=mine.term)
        return Granted(held=held, sent_s=sent_s, ttl_s=min(self._ttl_s, granted.TTL))

    def _revoke(self, lease_id: int) -> Calls:
        yield _call("lease/revoke", {"ID": str(lease_id)}, RevokeAnswer, repeatable=False)
        return Seen(standing=Standing())

    def _read(self) -> Generator[Call, Any, _Read]:
        ranges = [{"request_range": {"key": _key(key)}} for key in (self._leader, self._term)]
        answer = yield _call("kv/txn", {"compare": [], "success": ranges, "failure": []}, TxnAnswer)
        found = {
            pair.key: pair
            for each in answer.responses
            if each.response_range
            for pair in each.response_range.kvs
        }
        leader, term = found.get(_key(self._leader)), found.get(_key(self._term))
        return _Read(
            standing=Standing(leader=_claimant(leader), newest=_claimant(term)),
            leader=leader,
            term_revision=term.mod_revision if term is not None else 0,
            raft_term=answer.header.raft_term,
        )


def _unknown(known: int, newest: Claimant) -> str:
    return (
        f"etcd knows of term {newest.term} only, and term {known} was led: "
        "it has lost what it knew, or the right to lead comes from elsewhere by now"
    )


def succeeded(answer: TxnAnswer) -> bool:
    """Tell whether what a transaction compared was so, and its writes were done."""
    return answer.succeeded


def _call(
    path: Literal["kv/txn", "lease/grant", "lease/keepalive", "lease/revoke"],
    body: dict[str, Any],
    answer: type,
    *,
    repeatable: bool = True,
) -> Call:
    return Call(path=f"/v3/{path}", body=msgspec.json.encode(body), answer=answer, repeatable=repeatable)


def _unchanged(key: str, revision: int) -> dict[str, str]:
    """Compare that a key was last written at that revision; 0: that there is none."""
    return {"key": _key(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def _claimant(pair: _Pair | None) -> Claimant | None:
    return None if pair is None else msgspec.json.decode(base64.b64decode(pair.value), type=Claimant)


def _key(key: str) -> str:
    return _base64(key.encode())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
