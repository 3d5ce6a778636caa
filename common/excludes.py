"""What of a workload's files is left out: caches, scratch files, whatever a standby need not have.

In: the patterns of a declaration. Out: whether an entry of a directory is one of them, told by its name and
by nothing that a rename further up could change: so a whole tree need not be looked at for a rename.

    "*.tmp"                  whatever has such a name, at any depth, with all that is below it
    "/var/lib/app/cache"     that name directly in a declared directory; its last part may be a pattern
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from pathlib import PurePosixPath
from typing import Final

from common.model import WorkloadSpec


class Excludes:
    """The patterns of one workload, in the shell's notation (`*`, `?`, `[…]`); case counts."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """All must be sound: see `problems`."""
        anywhere: list[str] = []
        directly: dict[bytes, list[str]] = {}
        for pattern in patterns:
            path = PurePosixPath(pattern)
            if path.is_absolute():
                directly.setdefault(os.path.normpath(os.fsencode(path.parent)), []).append(path.name)
            else:
                anywhere.append(pattern)
        self._anywhere = _any_of(anywhere)
        self._directly = {root: _any_of(names) for root, names in directly.items()}

    def __bool__(self) -> bool:
        """Tell whether anything is left out."""
        return self._anywhere is not None or bool(self._directly)

    def has(self, name: bytes, root: bytes | None) -> bool:
        """Tell whether an entry is left out. `root`: the declared directory that it is directly in."""
        if self._anywhere is not None and self._anywhere.match(os.fsdecode(name)):
            return True
        if root is None or not self._directly:
            return False
        pattern = self._directly.get(os.path.normpath(root))
        return pattern is not None and pattern.match(os.fsdecode(name)) is not None

    def has_path(self, root: str, path: str) -> bool:
        """Tell whether a path that is below a declared directory is left out, by one of its parts."""
        declared, *names = os.fsencode(root), *PurePosixPath(path).relative_to(root).parts
        return any(
            self.has(os.fsencode(name), None if depth else declared) for depth, name in enumerate(names)
        )


def problems(spec: WorkloadSpec) -> Iterator[str]:
    """Say of each pattern that is none what is wrong with it."""
    declared = {PurePosixPath(item.path) for item in spec.files if not item.shared}
    for pattern in spec.exclude:
        path = PurePosixPath(pattern)
        if path.is_absolute():
            if path.parent not in declared or path.name == "..":
                yield (
                    f"exclude: {pattern!r} is not directly in one of the replicated `files`: give a name "
                    f"({path.name!r} leaves it out wherever it is), or declare {str(path.parent)!r} itself"
                )
        elif "/" in pattern or pattern in ("", ".", ".."):
            yield f"exclude: {pattern!r} must be a name without '/' (like '*.tmp'), or an absolute path"


def _any_of(patterns: list[str]) -> re.Pattern[str] | None:
    """Return what matches a name if one of the patterns does; None for no patterns."""
    return re.compile("|".join(map(translate, patterns))) if patterns else None


NOTHING: Final = Excludes(())
"""Leaves nothing out."""
