"""Says what somebody who has the store's disk could read of it.

In: the store's directory. Out: a sentence, and whether it is protected at rest. Nothing is changed.
"""

from __future__ import annotations

import os
from pathlib import Path

from common import fscrypt
from common.errors import OutliveError

_BLOCK_DEVICES = Path("/sys/dev/block")


def kept_at_rest(store: Path, blocks: Path = _BLOCK_DEVICES) -> tuple[bool, str]:
    """Look at the directory, or the one above it that exists, and at the devices below its file system."""
    store = next(path for path in (store, *store.parents) if path.exists())
    try:
        identifier = fscrypt.policy_of(store)
        if identifier is not None:
            state = "unlocked" if fscrypt.is_unlocked(store, identifier) else "locked"
            return True, f"encrypted by its file system (key {identifier.hex()[:8]}…, {state})"
    except OutliveError as error:
        return False, f"not known to be encrypted: {error.message}"
    device = store.stat().st_dev
    if _on_dm_crypt(blocks / f"{os.major(device)}:{os.minor(device)}"):
        return True, "on an encrypted device (dm-crypt)"
    return False, "in the clear"


def _on_dm_crypt(block: Path) -> bool:
    """Whether all of a block device's data passes dm-crypt; of several devices below it, each must."""
    try:
        if (block / "dm" / "uuid").read_text().startswith("CRYPT-"):
            return True
    except OSError:
        pass  # no device of the device mapper
    slaves = list((block / "slaves").glob("*"))
    return bool(slaves) and all(_on_dm_crypt(slave) for slave in slaves)
