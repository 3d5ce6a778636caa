"""What the primary found: that what is stored up to some epoch is not what it captured.

In: that epoch, and why. Out: a file in the store, so that it holds after a restart, and the answer whether an
epoch is touched by it: every one that was, or stands on one that was, stored until then. It ends by itself,
when no such epoch is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from common.durable import Disk, atomic_write
from common.errors import StoreError
from common.model import EpochId
from replica.levels import Layout, Level


class StoredDoubt(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    epoch: EpochId
    """The newest that was stored then."""
    reason: str

    def touches(self, chain: Sequence[Level]) -> bool:
        """Whether an epoch (with all that it stands on) is in doubt."""
        return any(level.id <= self.epoch for level in chain)


def read_doubt(layout: Layout, disk: Disk) -> StoredDoubt | None:
    """Return the doubt that was kept; None if there is none.

    Raises StoreError if it cannot be read: a store whose epochs may be in doubt is not opened as a sound one.
    """
    if layout.doubt.name not in disk.names(layout.root, op="open.list"):
        return None
    content = disk.read_file(layout.doubt, op="open.read-doubt")
    try:
        return msgspec.json.decode(content, type=StoredDoubt)
    except msgspec.MsgspecError as error:
        raise StoreError(f"{layout.doubt} makes no sense: {error}") from error


def keep_doubt(layout: Layout, disk: Disk, doubt: StoredDoubt) -> None:
    """Write it down, durably."""
    atomic_write(layout.doubt, msgspec.json.encode(doubt), op="doubt", disk=disk)


def end_doubt(layout: Layout, disk: Disk) -> None:
    """Remove it. A power loss may bring it back: no epoch that is left is touched by it then."""
    disk.unlink(layout.doubt, op="doubt.end")
