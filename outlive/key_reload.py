"""Reads the keys again when the operator says so: SIGHUP to agent or keeper.

In: the signal. Out: other keys in the ring, and an event that says what changed. Nothing else of the file is
read again. What cannot be read changes nothing: a node that forgot its keys by a typing error would be
unprotected, and one that kept a revoked key without a word would be open, so the event is told either way.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path

from common.config import NodeConfig
from common.errors import OutliveError
from common.events import Event, EventLog
from common.keyring import Keyring
from common.keys import load

log = logging.getLogger(__name__)


def reload_on_hangup(
    keys: Keyring,
    reread: Callable[[], NodeConfig],
    events: EventLog,
    *,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Have SIGHUP read the keys again, in the running loop, while the process lives; `then` follows."""

    def reload() -> None:
        reload_keys(keys, reread, events)
        then()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def reload_keys(keys: Keyring, reread: Callable[[], NodeConfig], events: EventLog) -> None:
    """Read the file and the node's own key again; on any error all keys stay what they were."""
    try:
        config = reread()
        own = load(Path(config.node.key_file))
    except OutliveError as error:
        log.error("keys.not-reloaded reason=%r", str(error))
        events.append(Event.KEYS_NOT_RELOADED, reason=f"the keys from before still count: {error}")
        return
    change = keys.replace(own, config.peers)
    log.info("keys.reloaded reason=%r", str(change))
    events.append(Event.KEYS_RELOADED, reason=str(change))
