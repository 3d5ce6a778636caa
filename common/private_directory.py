"""Directories that are this node's alone: for sockets, images, terms, epochs.

In: a path, and the key of the configuration that names it. Out: a directory of mode 0700 that belongs to
the user this process runs as, or a ConfigError. Memory of workloads lies in them, and what lies in them is
run, so a directory that somebody else could read, or has prepared, is not used.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from common.errors import ConfigError


def prepare_private_directory(path: Path, key: str) -> None:
    """Make the directory if it isn't there. Raises ConfigError if others own it or may enter it.

    A symlink to it is followed only if it is ours or root's: in a place where all may write, as /dev/shm is,
    anybody can lay one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        laid_by = path.lstat().st_uid
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{key}: cannot make {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    ours = status.st_uid == os.geteuid() and laid_by in (0, os.geteuid())
    if not stat.S_ISDIR(status.st_mode) or mode & 0o077 or not ours:
        raise ConfigError(
            f"{key}: {path} is open to others (mode {mode:04o}, owner {status.st_uid})",
            hint=f"use a directory that is Outlive's alone, or: chown root {path} && chmod 0700 {path}",
        )
