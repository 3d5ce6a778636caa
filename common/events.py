"""What happened on this node, one JSON line an event, written by agent and keeper into one file.

In: an event of the fixed vocabulary, the workload it is about, a reason in a sentence. Out: a line in
`STATE_DIR/events.jsonl`, and a reader for it. `docs/reference/events.md` says what each event means.

Writing never waits for a disk: a thread of its own writes and syncs, so neither an epoch nor a heartbeat
is late because of an event. The price: the last few events may be lost with power. Both processes append
to one file (O_APPEND, one write for each batch); past `LIMIT_BYTES` it becomes `events.jsonl.1`, which
replaces the one before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Literal

import msgspec

from common.config import NodeConfig

LIMIT_BYTES = 8 * 1024 * 1024
"""Size at which the file is put aside; twice that is what events take at most on disk."""

_QUEUE_EVENTS = 10_000
"""Waiting events while the disk hangs; what comes on top is counted, and told by the next line."""
_CLOSE_TIMEOUT_S = 2.0


class Event(StrEnum):
    """The whole vocabulary. `docs/reference/events.md` gives the meanings; a test compares the two."""

    AGENT_STARTED = "agent.started"
    AGENT_STOPPED = "agent.stopped"
    AGENT_SILENT = "agent.silent"
    AGENT_HEARD = "agent.heard"
    KEEPER_STARTED = "keeper.started"
    KEEPER_STOPPED = "keeper.stopped"

    WORKLOAD_STARTED = "workload.started"
    WORKLOAD_RESTORED = "workload.restored"
    WORKLOAD_FOUND = "workload.found"
    WORKLOAD_ENDED = "workload.ended"
    WORKLOAD_KILLED = "workload.killed"
    WORKLOAD_FENCED = "workload.fenced"
    WORKLOAD_FORGOTTEN = "workload.forgotten"
    WORKLOAD_FAILED = "workload.failed"

    CAPTURE_FAILED = "capture.failed"
    CAPTURE_RECOVERED = "capture.recovered"
    CAPTURE_BACKEND = "capture.backend"
    FREEZE_RELEASED_BY_FORCE = "freeze.released-by-force"

    EPOCH_SET_ASIDE = "epoch.set-aside"
    EPOCH_NOT_SET_ASIDE = "epoch.not-set-aside"

    REPLICA_CONNECTED = "replica.connected"
    REPLICA_DISCONNECTED = "replica.disconnected"
    REPLICA_RESTORABLE = "replica.restorable"
    REPLICA_NOT_RESTORABLE = "replica.not-restorable"
    BASE_STARTED = "base.started"
    BASE_FINISHED = "base.finished"
    RESYNC_STARTED = "resync.started"

    VERIFY_MISMATCH = "verify.mismatch"
    VERIFY_DOUBTED = "verify.doubted"
    VERIFY_MENDED = "verify.mended"
    FILES_ALTERED = "files.altered"
    FILES_NOT_REPORTED = "files.not-reported"

    RPO_EXCEEDED = "rpo.exceeded"
    RPO_MET = "rpo.met"

    ROLE_CHANGED = "role.changed"
    TAKEOVER_STARTED = "takeover.started"
    TAKEOVER_STEP = "takeover.step"
    TAKEOVER_FINISHED = "takeover.finished"
    TAKEOVER_FAILED = "takeover.failed"
    TAKEOVER_REFUSED = "takeover.refused"
    TAKEOVER_PAUSED = "takeover.paused"
    TAKEOVER_RESUMED = "takeover.resumed"
    SWITCHOVER_PLANNED = "switchover.planned"
    SWITCHOVER_CANCELLED = "switchover.cancelled"
    SWITCHOVER_BEGUN = "switchover.begun"
    SWITCHOVER_DROPPED = "switchover.dropped"
    ADDRESS_MISPLACED = "address.misplaced"
    FENCE_ASKED = "fence.asked"
    FENCE_ANSWERED = "fence.answered"
    LEASE_IN_DOUBT = "lease.in-doubt"
    LEASE_STANDS = "lease.stands"

    PEER_SILENT = "peer.silent"
    PEER_HEARD = "peer.heard"
    PEER_REFUSED = "peer.refused"

    KEYS_RELOADED = "keys.reloaded"
    KEYS_NOT_RELOADED = "keys.not-reloaded"

    STORE_LOW_SPACE = "store.low-space"
    STORE_RECOVERED = "store.recovered"
    EVENTS_LOST = "events.lost"


Source = Literal["agent", "keeper", "fence"]
Value = str | int | float | bool | None


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the file. `event` is text, so that a newer version's events can still be shown."""

    wall_s: float
    source: Source
    event: str
    workload: str = ""
    reason: str = ""
    fields: dict[str, Value] = {}


def event_file(config: NodeConfig) -> Path:
    """Return where this node's events stand."""
    return Path(config.node.state_dir) / "events.jsonl"


class EventLog:
    """Appends events. May be used from any thread; `append` neither blocks nor raises.

    Not guaranteed: that an event survives a power loss in the moments after it, and that any is written
    while the disk is full (how many were not is told as `events.lost` by the next line that is).
    """

    def __init__(self, path: Path, source: Source, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._source: Source = source
        self._limit_bytes = limit_bytes
        self._lost = 0
        self._waiting: queue.Queue[EventRecord | None] = queue.Queue(_QUEUE_EVENTS)
        self._thread = threading.Thread(target=self._write_all, name="events", daemon=True)
        self._thread.start()

    def append(self, event: Event, *, workload: str = "", reason: str = "", **fields: Value) -> None:
        """Hand one event over to be written, with the time of now."""
        record = EventRecord(
            wall_s=round(time.time(), 3),
            source=self._source,
            event=event.value,
            workload=workload,
            reason=reason,
            fields=fields,
        )
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what waits, for two seconds at most. Later events are not written."""
        try:
            self._waiting.put(None, timeout=_CLOSE_TIMEOUT_S)
        except queue.Full:
            return  # the disk hangs; the thread ends with the process
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _write_all(self) -> None:
        """Write batch after batch until the closing None."""
        while (batch := self._next_batch())[0] is not None:
            records = [record for record in batch if record is not None]
            if lost := self._lost:
                records.append(self._lost_record(lost))
            try:
                self._write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
            except (OSError, ValueError):  # a disk, or words that are no text
                self._lost += len(records) - bool(lost)
            else:
                self._lost -= lost
            if batch[-1] is None:
                return

    def _next_batch(self) -> list[EventRecord | None]:
        """Wait for an event; return it with all that wait behind it, a closing None last."""
        batch = [self._waiting.get()]
        while batch[-1] is not None:
            try:
                batch.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return batch

    def _lost_record(self, count: int) -> EventRecord:
        return EventRecord(
            wall_s=round(time.time(), 3),
            source=self._source,
            event=Event.EVENTS_LOST.value,
            reason=f"{count} events could not be written to {self._path.parent}",
            fields={"count": count},
        )

    def _write(self, lines: bytes) -> None:
        """Append whole lines and sync them. Raises OSError; part of the lines may stand there then."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # a line that a crash or a full disk tore: it must not spoil ours
            if os.write(descriptor, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(descriptor)
            if size + len(lines) > self._limit_bytes:
                self._put_aside(descriptor)
        finally:
            os.close(descriptor)

    def _put_aside(self, descriptor: int) -> None:
        """Rename the full file, unless the other process has done it since we opened it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            ours = os.fstat(descriptor).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return
        if ours:
            self._path.rename(_previous(self._path))


def read_events(path: Path) -> Iterator[EventRecord]:
    """Yield the kept events, oldest first. Lines that are torn or not ours are passed over."""
    for file in (_previous(path), path):
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            continue
        yield from _decode(content.split(b"\n"))


def follow_events(path: Path, *, poll_s: float = 0.2) -> Iterator[EventRecord]:
    """Yield events as they are written, from now on, for ever; waits by sleeping."""
    descriptor, rest = _open(path), b""
    if descriptor is not None:
        os.lseek(descriptor, 0, os.SEEK_END)
    try:
        while True:
            moved = descriptor is None or _is_put_aside(descriptor, path)
            # Asked before reading: what was appended before it was put aside is read before it is left.
            while descriptor is not None and (block := os.read(descriptor, 65536)):
                *lines, rest = (rest + block).split(b"\n")
                yield from _decode(lines)
            if moved and (newer := _open(path)) is not None:
                if descriptor is not None:
                    os.close(descriptor)
                descriptor, rest = newer, b""
                continue
            time.sleep(poll_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _decode(lines: list[bytes]) -> Iterator[EventRecord]:
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=EventRecord)
        except msgspec.DecodeError:
            continue


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _is_put_aside(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino != path.stat().st_ino
    except FileNotFoundError:
        return True
