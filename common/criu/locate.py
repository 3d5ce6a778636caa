"""Where this machine's criu is. In: a configured path or none. Out: the path of an executable."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from common.errors import UnsupportedError

_SETUP_HINT = "run `make setup`, or name a CRIU 4.2 or newer in the configuration"


def locate_criu(configured: Path | None) -> Path:
    """Find criu: as configured, else $OUTLIVE_CRIU, else the one set up beside the venv, else in PATH.

    A path that was named explicitly is never passed over for another. Raises `UnsupportedError` if there is
    no executable. Whether it works on this kernel is not checked here.
    """
    from_environment = os.environ.get("OUTLIVE_CRIU")
    for named, source in (
        (configured, "the configuration"),
        (Path(from_environment) if from_environment else None, "$OUTLIVE_CRIU"),
    ):
        if named is not None:
            if not _is_executable(named):
                raise UnsupportedError(f"{named}, named by {source}, is no executable", hint=_SETUP_HINT)
            return named
    beside_venv = Path(sys.prefix).parent / ".criu" / "bin" / "criu"
    if _is_executable(beside_venv):
        return beside_venv
    if in_path := shutil.which("criu"):
        return Path(in_path)
    raise UnsupportedError("no criu was found on this machine", hint=_SETUP_HINT)


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
