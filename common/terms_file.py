"""What a node's keeper must never forget, a directory of small files a workload, each replaced atomically.

    STATE_DIR/terms/WORKLOAD/term.json      the newest term known: who leads it, how far it is
                             spec.json      the workload's declaration
                             fenced.json    the newest fence by SSH of this node
                             pauses.json    pauses of automatic takeover, lifted ones too
                             planned.json    the switchover that is planned, while there is one
                             history.json   the last 50 terms with their timelines

In: records. Out: the same, after any crash. Invariants: a term on disk is never lowered, and its leader
changes only from nobody, or from this node to another (when it gives way); a fence on disk is never lowered
either, and no right to a term up to it is recorded any more, nor anything that is done in one. A fence stands
in a file of its own, so that a keeper that hangs while the node is fenced cannot write over it. Blocking:
call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from common.config import NodeConfig
from common.control import PlannedSwitchover, TermHistory, TimelineEntry
from common.durable import Disk, atomic_write
from common.errors import NoSpaceError, StaleTermError, StoreError
from common.model import NAME_PATTERN, WorkloadSpec
from common.pauses import Pauses, joined
from common.roles import Mark, Refusal, TermRecord

HISTORY_TERMS = 50
"""Terms that history keeps for each workload."""

_LEADS: frozenset[Mark] = frozenset({"launching", "taking_over", "leads"})

_T = TypeVar("_T")


class TermFiles:
    """All term files of one node. One keeper at a time: it holds the control socket. Fences need no keeper.

    Every method raises StoreError or NoSpaceError, with operation, path and cause.
    """

    def __init__(self, state_dir: Path, node: str, disk: Disk | None = None) -> None:
        self._directory = state_dir / "terms"
        self._node = node
        self._disk = disk

    def workloads(self) -> tuple[str, ...]:
        """Return the names of all workloads with a declaration on disk; other directories are not ours."""
        names = (path.parent.name for path in self._directory.glob("*/spec.json"))
        return tuple(sorted(name for name in names if NAME_PATTERN.match(name)))

    def load(self, workload: str) -> TermRecord:
        """Return the newest term recorded; term 0 if none ever was.

        A damaged file is an error and never taken for none: a forgotten term could be led twice.
        """
        return _read(self._path(workload) / "term.json", TermRecord) or TermRecord()

    def record(self, workload: str, record: TermRecord) -> None:
        """Make a record durable before returning. Raises StaleTermError for what the invariant forbids.

        When it raises, the file holds what it held before, unless that cannot be written either: this keeper
        goes on by the old record, and so does the next one.
        """
        known = self.load(workload)
        if record.term < known.term:
            raise StaleTermError(f"term {record.term} of {workload} is older than {known.term} on disk")
        same_leader = known.leader in ("", record.leader) or known.leader == self._node != record.leader
        # Of two leaders of one term the first by name stays; a third node follows whom the other one follows.
        named = record.leader not in ("", self._node)
        same_leader = same_leader or (named and record.leader < known.leader)
        if record.term == known.term and known.term > 0 and not same_leader:
            raise StaleTermError(f"term {record.term} of {workload} is led by {known.leader}")
        refusal = self.load_refusal(workload)
        leads = record.leader == self._node and (known.term < record.term or record.mark in _LEADS)
        if refusal is not None and leads and record.term <= refusal.term:
            raise StaleTermError(f"{refusal.by} fenced this node: it leads no term up to {refusal.term}")
        path = self._path(workload) / "term.json"
        self._make(path.parent)
        try:
            self._write(path, record, "term.record")
        except (StoreError, NoSpaceError):
            with contextlib.suppress(StoreError, NoSpaceError):
                self._put_back(path, known, record)
            raise

    def _put_back(self, path: Path, known: TermRecord, record: TermRecord) -> None:
        """Undo a write of which it is not known whether it will last."""
        if known == record or _read(path, TermRecord) != record:
            return
        if known.term:
            self._write(path, known, "term.put-back")
        else:
            path.unlink(missing_ok=True)
            _sync_directory(path.parent)

    def try_to_write(self, workload: str) -> None:
        """Write and sync a file of no meaning where terms are recorded: who cannot should go for no term."""
        self._make(self._path(workload))
        self._write(self._path(workload) / "writable.json", True, "term.try")

    def load_refusal(self, workload: str) -> Refusal | None:
        """Return the newest fence of this node. A damaged file is an error: it is never taken for none."""
        hint = "move it away once you know that no other node runs the workload"
        return _read(self._path(workload) / "fenced.json", Refusal, hint=hint)

    def record_refusal(self, workload: str, refusal: Refusal) -> None:
        """Make a fence durable before returning; one of a later term that is on disk stays."""
        known = self.load_refusal(workload)
        if known is not None and known.term > refusal.term:
            return
        self._make(self._path(workload))
        self._write(self._path(workload) / "fenced.json", refusal, "term.fenced")

    def load_pauses(self, workload: str) -> Pauses:
        """Return the pauses recorded. A damaged file is an error: a forgotten pause could be a takeover."""
        hint = "move it away, then pause again what is to be paused"
        return _read(self._path(workload) / "pauses.json", Pauses, hint=hint) or ()

    def record_pauses(self, workload: str, pauses: Pauses) -> None:
        """Make pauses durable before returning; what is on disk and newer stays."""
        path = self._path(workload)
        self._make(path)
        self._write(path / "pauses.json", joined(self.load_pauses(workload), pauses), "term.pauses")

    def load_plan(self, workload: str) -> PlannedSwitchover | None:
        """Return the switchover that is planned, if there is one."""
        path = self._path(workload) / "planned.json"
        return _read(path, PlannedSwitchover, hint="remove it, and plan anew")

    def record_plan(self, workload: str, plan: PlannedSwitchover) -> None:
        """Make a planned switchover durable before returning, in the place of another one."""
        self._make(self._path(workload))
        self._write(self._path(workload) / "planned.json", plan, "term.plan")

    def forget_plan(self, workload: str) -> None:
        """Remove the planned switchover, durably."""
        path = self._path(workload) / "planned.json"
        try:
            path.unlink(missing_ok=True)
            _sync_directory(path.parent)
        except OSError as error:
            raise StoreError(f"{path} cannot be removed: {error.strerror}") from error

    def load_spec(self, workload: str) -> WorkloadSpec | None:
        """Return the declaration on disk, if there is one."""
        return _read(self._path(workload) / "spec.json", WorkloadSpec)

    def save_spec(self, spec: WorkloadSpec) -> None:
        """Keep a declaration, durably."""
        self._make(self._path(spec.name))
        self._write(self._path(spec.name) / "spec.json", spec, "term.spec")

    def forget_spec(self, workload: str) -> None:
        """Forget the declaration and what is planned; all else stays, for a term is never used twice.

        Who could take over by that declaration stays known: nodes that are away have not forgotten it.
        """
        path = self._path(workload)
        (path / "planned.json").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (path / "spec.json").rename(path / "forgotten.json")

    def in_force(self, declared: WorkloadSpec) -> WorkloadSpec:
        """Return a declaration with that line of succession which counts until a start changes it.

        Such a start asks who could still take over by the old one, so nothing else may change it: `nodes`,
        and the right to lead of what does not run. (That of what runs, or is kept frozen, may have to become
        an operator's, once etcd is gone for good.)
        Raises StoreError.
        """
        record, path = self.load(declared.name), self._path(declared.name)
        kept = self.load_spec(declared.name) or _read(path / "forgotten.json", WorkloadSpec)
        if kept is None or not record.term:
            return declared
        rests = record.mark in ("stopped", "failed", "yielded")
        by_hand = declared.right_to_lead == "manual" and record.mark != "stopped"
        right = kept.right_to_lead if rests and not by_hand else declared.right_to_lead
        return msgspec.structs.replace(declared, nodes=kept.nodes, right_to_lead=right)

    def history(self, workload: str) -> tuple[TermHistory, ...]:
        """Return what is kept of past terms, oldest first."""
        return _read(self._path(workload) / "history.json", tuple[TermHistory, ...]) or ()

    def save_history(self, entry: TermHistory) -> None:
        """Add a term's story, or complete what is kept of the same term."""
        stories = {each.term: each for each in self.history(entry.workload)}
        stories[entry.term] = entry.after(stories.get(entry.term))
        terms = [stories[term] for term in sorted(stories)][-HISTORY_TERMS:]
        self._make(self._path(entry.workload))
        self._write(self._path(entry.workload) / "history.json", terms, "term.history")

    def add_to_history(self, workload: str, term: int, event: str, reason: str, wall_s: float) -> None:
        """Add a line to the story of a term that is over; nothing if none is kept of it."""
        for story in self.history(workload):
            if story.term == term:
                at_ms = round((wall_s - story.began_wall_s) * 1000, 3)
                entry = TimelineEntry(at_ms=at_ms, wall_s=wall_s, event=event, reason=reason)
                self.save_history(msgspec.structs.replace(story, timeline=(*story.timeline, entry)))

    def _path(self, workload: str) -> Path:
        if not NAME_PATTERN.match(workload):
            raise StoreError(f"{workload!r} cannot be the name of a workload")
        return self._directory / workload

    def _make(self, path: Path) -> None:
        """Make a directory that survives a power loss with what is written into it."""
        if path.is_dir():
            return
        if path != self._directory:
            self._make(self._directory)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # two threads may write first files
        except OSError as error:
            raise StoreError(f"cannot make {path}: {error.strerror}") from error
        _sync_directory(path.parent)

    def _write(self, path: Path, value: object, op: str) -> None:
        atomic_write(path, msgspec.json.format(msgspec.json.encode(value)), op=op, disk=self._disk)


class Known(NamedTuple):
    """The workloads of one node, by name."""

    specs: dict[str, WorkloadSpec]
    damaged: dict[str, StoreError]
    """Those with a file that cannot be read; in `specs` too if the configuration declares them."""


def look_up(config: NodeConfig, files: TermFiles) -> Known:
    """Return every workload that this node knows: what it declares and what peers sent.

    The configuration wins where this node led last, or nobody did; else the leader's declaration, which
    came with the stream.
    """
    known = Known({spec.name: spec for spec in config.workloads}, {})
    for name in sorted({*known.specs, *files.workloads()}):
        try:
            kept = files.load_spec(name)
            leader = files.load(name).leader
            files.load_pauses(name)
            files.load_refusal(name)
        except StoreError as error:
            known.damaged[name] = error
            continue
        if kept is not None and (name not in known.specs or leader not in ("", config.node.name)):
            known.specs[name] = kept
    return known


def known_workloads(config: NodeConfig) -> dict[str, WorkloadSpec]:
    """Return the declarations that `look_up` finds; the keeper tells of damaged files."""
    return look_up(config, TermFiles(Path(config.node.state_dir), config.node.name)).specs


_TERM_HINT = "restore it, or move it away once you know that no node runs the workload"


def _read(path: Path, kind: type[_T], *, hint: str = _TERM_HINT) -> _T | None:
    """Return what a file holds; None if there is none. Raises StoreError if it cannot be read or decoded."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}",
            hint=hint,
        ) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
