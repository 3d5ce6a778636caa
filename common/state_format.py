"""Which version of Outlive's files a state directory holds: refused, untouched, if it is not this one.

    STATE_DIR/format    one line; without it, the directory is of version 1 or new

In: the directory. Out: nothing, or a StoreError. Keeper, agent and `accept-fence` ask before they read
anything else: a term that is misread could be led twice, and a file that is written back by who does not know
all of it has lost what he did not know. Fields may be added to the files within a version, where it does no
harm to pass over them; whatever else changes raises it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from common.durable import atomic_write
from common.errors import NoSpaceError, StoreError

STATE_FORMAT: Final = b"outlive state 1\n"


def check_state_format(state_dir: Path) -> None:
    """Raise StoreError unless the directory is of this version, or says nothing and is taken for it.

    Then that is noted; on a full disk, at the next start.
    """
    path = state_dir / "format"
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        if state_dir.is_dir():
            with contextlib.suppress(NoSpaceError):
                atomic_write(path, STATE_FORMAT, op="state.format")
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if found != STATE_FORMAT:
        raise StoreError(
            f"{state_dir} is `{shown(found)}`, and this version of Outlive knows `{shown(STATE_FORMAT)}`",
            hint="run the version that wrote it; nothing there was touched",
        )


def shown(line: bytes) -> str:
    """Return the line of a format file as a sentence can have it."""
    return line[:80].decode(errors="replace").strip()
