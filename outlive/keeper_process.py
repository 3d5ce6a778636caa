"""What makes the keeper's process fit for its purpose: memory that stays in RAM, plain log lines.

In: nothing. Out: warnings, one sentence each, about what the kernel refused.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
"""<sys/mman.h>. On fault: only what was touched is locked, not every mapped page of every library."""


def lock_memory() -> str:
    """Keep this process out of swap; return why that was refused, or nothing. Never raises."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0:
        return ""
    return f"the keeper's memory is not locked ({os.strerror(ctypes.get_errno())}): swapping may delay it"


def rss_bytes() -> int:
    """Return how much memory of this process is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Logfmt(logging.Formatter):
    """`timestamp=… level=… event=NAME key=value…`; what a line says already as key=value stays."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        when = f"{stamp}.{record.msecs:03.0f}"
        line = f"timestamp={when} level={record.levelname.lower()} event={record.getMessage()}"
        if record.exc_info:
            line += f" exception={self.formatException(record.exc_info)!r}"
        return line


def log_to_stderr() -> None:
    """Send the log to stderr, one line an event, unless somebody has set up logging already."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Logfmt())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
