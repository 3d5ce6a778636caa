"""Where the parts written in C are: built by setup into `native/build`, beside these packages.

In: a name. Out: the path of a file that is there. Only criu's shim, the injector and the readers of pages and
files are C; `native/README.md` says why.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UnsupportedError


def built(name: str) -> Path:
    """Find a built part, in $OUTLIVE_NATIVE if that is set. Raises UnsupportedError if it is not there."""
    named = os.environ.get("OUTLIVE_NATIVE")
    directory = Path(named) if named else Path(__file__).resolve().parent.parent / "native" / "build"
    path = directory / name
    if not path.is_file():
        raise UnsupportedError(f"{path} was not built", hint="run `make setup`: it needs a C compiler")
    return path
