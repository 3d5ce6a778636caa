"""Makes the directory of the store ready: for its owner alone, and encrypted if the configuration says so.

In: the configuration. Out: a directory that can be read and written, or an error that says what to do; what
is stored is untouched by any of them.
"""

from __future__ import annotations

from pathlib import Path

from common import fscrypt
from common.config import NodeConfig
from common.errors import ConfigError
from common.keys import load_store_key
from common.private_directory import prepare_private_directory


def prepare_store_room(config: NodeConfig) -> None:
    """Call it before a store is opened. Raises ConfigError, AuthError, StoreError, UnsupportedError."""
    directory = config.store_dir
    prepare_private_directory(directory, "store.directory")
    if config.store.encryption == "none":
        return
    path = Path(config.store.encryption_key_file)
    key = load_store_key(path)
    if path.stat().st_dev == directory.stat().st_dev:
        raise ConfigError(
            f"store.encryption_key_file: {path} lies on the file system of the store that it locks",
            hint="whoever has the disk would have both: let a key service put it below /run",
        )
    fscrypt.unlock(directory, key)
