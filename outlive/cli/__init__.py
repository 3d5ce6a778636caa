"""The command line: `outlive VERB`. Data on stdout, talk on stderr, exit codes as `common.errors` has them.

`outlive keeper` takes a way of its own that loads neither click nor rich: the keeper's memory is locked and
counted, and none of that is needed to run it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG_VARIABLE = "OUTLIVE_CONFIG"
DEBUG_VARIABLE = "OUTLIVE_DEBUG"

_NOT_FOR_THE_KEEPER = ("rich", "ssl", "_hashlib")
"""What structlog, asyncio and hashlib load where they find it and do without where not: 8 of 34 MiB.

`ssl` is loaded where an etcd is spoken to by https.
"""


def main() -> None:
    """Run the command line of this process and exit."""
    arguments = sys.argv[1:]
    config_path = keeper_config(arguments)
    if config_path is not None:
        for name in _NOT_FOR_THE_KEEPER:
            if name != "ssl" or not _speaks_https(config_path):
                sys.modules[name] = None  # type: ignore[assignment]  # its import fails as if not installed
        from outlive.cli.running import run_keeper_process

        sys.exit(run_keeper_process(config_path))
    from outlive.cli.app import run

    sys.exit(run(arguments))


def _speaks_https(config_path: Path) -> bool:
    """Tell whether the configuration names an etcd by https; not if it cannot be read: that is told later."""
    from common.config import load_config
    from common.errors import OutliveError

    try:
        endpoints = load_config(config_path).etcd.endpoints
    except OutliveError:
        return False
    return any(endpoint.startswith("https:") for endpoint in endpoints)


def keeper_config(arguments: Sequence[str]) -> Path | None:
    """Return the configuration's path if the arguments do nothing but run the keeper, else None."""
    from common.config import DEFAULT_PATH

    match list(arguments):
        case ["keeper"]:
            return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_PATH)
        case ["--config", path, "keeper"] | ["keeper", "--config", path]:
            return Path(path)
    return None
