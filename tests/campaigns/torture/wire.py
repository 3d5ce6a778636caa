"""The wire: lines that alter bytes, and hostile peers on either side of it, with a valid key and without.

Nothing wrong is ever committed or counts as acknowledged, nobody else notices, and a sound stream works at
once afterwards. A wrong commit of a row here is any of these that was not so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import common.bulk
import replica.assembly
import replica.level_writer
import replica.receive
from common.bulk import EpochDigest
from common.keyring import Keyring
from common.messages import Commit, Nack
from primary.stream import ReplicaStream
from replica.assembly import Assembly, Committed, Outcome
from replica.holdings import Holdings
from replica.store import EpochStore
from tests.campaigns.torture import wire_bombs, wire_line, wire_primary, wire_replica
from tests.campaigns.torture.cases import Case, Part, Scale, rows
from tests.campaigns.torture.planted import Planted, planted


def wire(seed: int, scale: Scale) -> list[Part]:
    """Run this part."""
    parts = rows([*wire_line.cases(seed, scale), *wire_primary.cases(seed, scale)])
    return [*parts, *rows(wire_replica.cases(seed, scale)), *wire_bombs.bombs(seed, scale)]


def planted_wire(seed: int, scale: Scale) -> list[Part]:
    """Look for the bugs of this half."""
    return planted(seed, scale, BUGS)


# --- bugs -------------------------------------------------------------------------------------


class _Any(bytes):
    """Is no other than whatever it is compared with."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


class _NoDigest(EpochDigest):
    def value(self) -> bytes:
        return _Any()


_commit = Assembly._commit
_take = Assembly.take
_not_acknowledged = ReplicaStream._not_acknowledged


def _commit_whatever_the_term(assembly: Assembly, epoch: Any, message: Commit) -> Outcome:
    guard, assembly._guard = assembly._guard, SimpleNamespace(check=lambda *_: None)  # type: ignore[assignment]
    try:
        return _commit(assembly, epoch, message)
    finally:
        assembly._guard = guard


def _acknowledge_first(assembly: Assembly, message: Any, bulk: Any, frames: Any) -> Outcome | None:
    """Commit what was acknowledged when the next message comes."""
    if late := assembly.__dict__.pop("late", None):
        late()
    return _take(assembly, message, bulk, frames)


def _commit_later(assembly: Assembly, epoch: Any, message: Commit) -> Outcome:
    if epoch.files_left or epoch.spaces_left or epoch.pages_left or epoch.digest.value() != message.digest:
        return _commit(assembly, epoch, message)
    assembly.__dict__["late"] = epoch.incoming.commit
    assembly._epoch, assembly._phase = None, replica.assembly.Phase.IDLE
    record: Any = SimpleNamespace(id=epoch.begin.epoch, committed_wall_s=1.0, frozen_wall_s=1.0)
    return Committed(record)


def _remember_after_all(stream: ReplicaStream, nack: Nack) -> bool:
    held = stream._held
    again = _not_acknowledged(stream, nack)
    stream._held = held
    return again


def _lend_whatever_is_kept(store: EpochStore, seed: int) -> Holdings:
    assert store._seed
    return Holdings((store._seed,), store._disk)


def _patched(*patches: tuple[object, str, object]) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def plant() -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, value in patches:
                stack.enter_context(patch.object(owner, name, value))
            yield

    return plant


def _altered(kind: str) -> Callable[[int, Scale], list[Case]]:
    """Enough of the alterations that show it, at every scale: a bug must not be missed by chance."""
    return lambda seed, scale: wire_primary.altered(seed, Scale.MIDDLE, kind)


def _only(cases: Callable[[int, Scale], Sequence[Case]], *labels: str) -> Callable[[int, Scale], list[Case]]:
    """Only the cases that are about it: the others have nothing to find."""
    return lambda seed, scale: [case for case in cases(seed, scale) if case.label.startswith(labels)]


BUGS = (
    Planted(
        "the digest is not looked at",
        _patched((replica.assembly, "EpochDigest", _NoDigest)),
        _altered("bits of a page"),
    ),
    Planted(
        "the term is not looked at before the commit",
        _patched((Assembly, "_commit", _commit_whatever_the_term)),
        _only(wire_primary.peers, "an older term"),
    ),
    Planted(
        "an epoch is acknowledged before it is committed",
        _patched((Assembly, "take", _acknowledge_first), (Assembly, "_commit", _commit_later)),
        _altered("a message repeated"),
    ),
    Planted(
        "page flags that nobody knows are taken",
        _patched(
            (common.bulk, "_KNOWN_FLAGS", np.arange(256, dtype=np.uint32)),
            (replica.level_writer, "_KNOWN_FLAGS", 255),
        ),
        _altered("other runs of pages"),
    ),
    Planted(
        "a stream counts on a base that its replica denies",
        _patched((ReplicaStream, "_not_acknowledged", _remember_after_all)),
        _only(wire_primary.peers, "a base that is gone"),
    ),
    Planted(
        "pages of one seed are lent under another's name",
        _patched((EpochStore, "_lender", _lend_whatever_is_kept)),
        _only(wire_primary.peers, "pages of a seed"),
    ),
    Planted(
        "a key that is revoked goes on counting",
        _patched((Keyring, "replace", lambda keyring, own, peers: None)),
        _only(wire_replica.cases, "a key that is revoked"),
    ),
    Planted(
        "every refusal is logged",
        _patched((replica.receive, "_LOG_INTERVAL_S", -1.0)),
        _altered("a message left out"),
    ),
)
