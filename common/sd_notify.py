"""Telling systemd how a service is (sd_notify(3)): one datagram, no library.

In: assignments such as `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=text`. Out: nothing; without systemd
(no NOTIFY_SOCKET) nothing happens, and an error of the socket never disturbs the caller.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*assignments: str) -> bool:
    """Send the assignments in one message; True if there was somebody to send them to. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    target = f"\0{address[1:]}" if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto("\n".join(assignments).encode(), target)
        return True
    return False


def watchdog_interval_s() -> float | None:
    """Return how often systemd wants to hear `WATCHDOG=1`, halved as it advises; None if it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2_000_000 if text.isdigit() and int(text) > 0 else None
