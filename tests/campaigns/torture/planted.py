"""Bugs put into the product on purpose: each must be found by a part, or the campaign is worth nothing.

A bug is a context manager that alters the product from the outside while it is open. Most leave out or delay
one operation of the disk, by its label, which is what leaving out or moving that line of the product does.
Another half of the campaign adds its own: a tuple of `Planted` with the cases that should find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

import replica.incoming
import replica.recovery
import replica.store
from common.durable import Disk
from common.errors import StoreError
from common.model import EpochId
from replica.level_writer import LevelWriter
from replica.levels import MANIFEST_NAME, DamagedLevelError, Manifest
from replica.store import EpochStore
from tests.campaigns.torture import crashes
from tests.campaigns.torture.cases import Case, Part, Scale, run_case, say

Cases = Callable[[int, Scale], Iterable[Case]]

_HISTORIES = 3
"""A bug does not show in every history: so many seeds are tried, one after the other."""


@dataclass(frozen=True)
class Planted:
    """A bug, and where it should show."""

    name: str
    plant: Callable[[], AbstractContextManager[Any]]
    cases: Cases = crashes.cases


def planted(seed: int, scale: Scale, bugs: Sequence[Planted] | None = None) -> list[Part]:
    """Look for each bug until a case finds it."""
    return [_look_for(bug, seed, scale) for bug in (BUGS if bugs is None else bugs)]


def _look_for(bug: Planted, seed: int, scale: Scale) -> Part:
    tried = 0
    with bug.plant():
        try:
            for history in range(_HISTORIES):
                for case in _spread(bug.cases(seed + history, scale)):
                    tried += 1
                    if (outcome := run_case(case)).wrong:
                        say(f"planted bug found: {bug.name} ({tried} cases)")
                        return _row(
                            bug, tried, f"found by “{case.part}” after {tried} cases: {outcome.wrong}"
                        )
        except AssertionError as error:
            # Cases are made from an undisturbed run, which is the first to tell.
            return _row(bug, 1, f"found by a run in which nothing failed: {error}")
    say(f"planted bug NOT FOUND: {bug.name}")
    return _row(bug, tried, "NOT FOUND", missed=1)


def _row(bug: Planted, tried: int, note: str, missed: int = 0) -> Part:
    return Part(name=f"planted: {bug.name}", cases=tried, missed=missed, notes=(note,))


def _spread(cases: Iterable[Case]) -> list[Case]:
    """Take turns among the parts, each from places all over the history."""
    by_part: dict[str, list[Case]] = {}
    for case in cases:
        by_part.setdefault(case.part, []).append(case)
    turns = [
        (place * 0.6180339887 % 1, part, case)
        for part, of_part in by_part.items()
        for place, case in enumerate(of_part)
    ]
    return [case for _, _, case in sorted(turns, key=lambda turn: turn[:2])]


# --- bugs in what is done, and when -------------------------------------------------------------


class _Altered:
    """Passes a disk's operations on, but for those of some labels: never, or after the first of `until`."""

    def __init__(self, disk: Disk, labels: frozenset[str], until: str = "") -> None:
        self._disk = disk
        self._labels = labels
        self._until = until
        self._late: list[tuple[Callable[..., Any], list[Path], str]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._disk, name)

        def call(*arguments: Any, op: str = "", **options: Any) -> Any:
            if op in self._labels:
                paths = [arguments[0]] if isinstance(arguments[0], Path) else list(arguments[0])
                self._late.append((real, paths, op))
                return None
            result = real(*arguments, **({"op": op} if op else {}), **options)
            if name == "rename":
                self._late = [(late, _renamed(paths, *arguments), op) for late, paths, op in self._late]
            if op and op == self._until:
                for late, paths, label in self._late:
                    late(paths[0] if late.__name__ == "sync_dir" else paths, op=label)
                self._late.clear()
            return result

        return call


def _renamed(paths: Sequence[Path], source: Path, target: Path) -> list[Path]:
    return [target / path.relative_to(source) if path.is_relative_to(source) else path for path in paths]


@contextmanager
def _on_disks(alter: Callable[[Disk], Any]) -> Iterator[None]:
    real = EpochStore.open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, *arguments: Any, disk: Disk, **options: Any) -> EpochStore:
        store: EpochStore = real(cls, *arguments, disk=alter(disk), **options)
        return store

    with patch.object(EpochStore, "open", classmethod(opened)):
        yield


def without(*labels: str) -> Callable[[], AbstractContextManager[None]]:
    """Leave out the operations of these labels."""
    return lambda: _on_disks(lambda disk: _Altered(disk, frozenset(labels)))


def late(*labels: str, until: str) -> Callable[[], AbstractContextManager[None]]:
    """Hold the syncs of these labels back until the first operation of another one was done."""
    return lambda: _on_disks(lambda disk: _Altered(disk, frozenset(labels), until))


# --- bugs in what is decided --------------------------------------------------------------------


def _complete(writer: LevelWriter) -> None:
    """Take the pages that came for all."""
    if writer._open_pages and writer._open_pages[1].missing_bytes:
        _, file = writer._open_pages
        entry = file.end()
        if entry is not None:
            writer._files[entry.name] = entry
        writer._open_pages = None
        return
    _finish_pages(writer)


_finish_pages = LevelWriter._finish_pages


def _stale_known(store: EpochStore, epoch: EpochId, key: Any) -> Any:
    """Answer from the pages of the newest epoch, whichever was asked for."""
    return store._known[1].get(key) if store._known else _pages_held(store, epoch, key)


def _all_there(haystack: Any, needles: Any) -> Any:
    return np.zeros(needles.shape, dtype=np.int64)


_pages_held = EpochStore.pages_held
_recover = replica.recovery.recover
_read_level = replica.recovery._read_level


def _forget_newest(layout: Any, disk: Disk) -> Any:
    """Remove the newest epoch when something was under way, as if it were half-made too."""
    interrupted = bool(disk.names(layout.incoming, op="recover.list"))
    levels = _recover(layout, disk)
    if interrupted and levels:
        newest = levels.pop(max(levels))
        disk.unlink(layout.view(newest.id), op="recover.view")
        disk.remove_tree(newest.path, op="recover.remove")
    return levels


def _read_any_size(path: Path, disk: Disk) -> Any:
    """Believe in every level that has a manifest."""

    class Believing:
        def __getattr__(self, name: str) -> Any:
            return getattr(disk, name)

        def size_bytes(self, file: Path, *, op: str) -> int:
            return sizes[file.name]

    try:
        manifest = msgspec.json.decode((path / MANIFEST_NAME).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return _read_level(path, disk)
    sizes = {file.name: file.size_bytes for file in manifest.files}
    return _read_level(path, Believing())


def _read_or_damaged(path: Path, disk: Disk) -> Any:
    """Call damaged whatever cannot be read at this moment."""
    try:
        return _read_level(path, disk)
    except StoreError as error:
        raise DamagedLevelError(error.message) from error


def _replaced(owner: Any, name: str, value: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(owner, name, value)


BUGS = (
    Planted("an epoch's files are not synced", without("commit.sync"), crashes.stops),
    Planted(
        "a level's directory is not synced before it is named", without("commit.sync-level"), crashes.stops
    ),
    Planted(
        "an epoch is named before its files are synced",
        late("commit.sync", "commit.sync-level", until="commit.rename"),
        crashes.stops,
    ),
    Planted("an epoch is named without its view", without("commit.view"), crashes.stops),
    Planted("a commit does not sync its name", without("commit.sync-epochs"), crashes.stops),
    Planted("a commit does not look for missing pages", _replaced(LevelWriter, "_finish_pages", _complete)),
    Planted(
        "a commit does not look whether the base has what is unchanged",
        _replaced(replica.incoming, "rows_in", _all_there),
    ),
    Planted("the pages known are those of another epoch", _replaced(EpochStore, "pages_held", _stale_known)),
    Planted("recovery removes the newest epoch", _replaced(replica.store, "recover", _forget_newest)),
    Planted("recovery ignores sizes", _replaced(replica.recovery, "_read_level", _read_any_size)),
    Planted(
        "recovery calls damaged what it cannot read now",
        _replaced(replica.recovery, "_read_level", _read_or_damaged),
    ),
    Planted(
        "a fold's view leads to it before it is synced",
        late("fold.sync", "fold.sync-level", "fold.sync-folds", until="fold.view"),
        crashes.stops,
    ),
    Planted(
        "what a fold replaced goes before its view is synced", without("collect.sync-views"), crashes.stops
    ),
    Planted("what is thrown away is removed before that is synced", without("collect.sync"), crashes.stops),
    Planted("only the newest epoch is kept", _replaced(replica.store, "KEPT_EPOCHS", 1)),
)
"""Those of the crash half."""
