"""Which epoch a tree of files is: a small file beside it, which never says more than is true.

In: that a change begins, that it is done, that all is synced. Out: the epoch, also after a crash; none if the
tree may be anything. After a power loss only what was synced counts, which the id of the boot tells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from common.durable import TEMPORARY_PREFIX, RealDisk, atomic_write, temporary_name
from common.errors import StoreError
from common.model import EpochId
from replica.file_ops import Step

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

RootIds = tuple[tuple[bytes, int], ...]
"""The declared directories, sorted, each with its inode number."""


class TreeState(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    epoch: EpochId | None = None
    """None: it was being changed."""
    synced: bool = False
    """Whether it is that after a power loss, too."""
    boot_id: str = ""
    """In which boot of the machine it became so."""
    roots: RootIds = ()
    """Which directories it is about."""


def read_boot_id() -> str:
    """Return the kernel's id of this boot. Raises OSError."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


class StateFile:
    """Keeps a `TreeState`. Raises StoreError, NoSpaceError; either state may be in the file then."""

    def __init__(self, path: Path, boot_id: Callable[[], str], step: Step) -> None:
        self._path = path
        self._boot_id = boot_id()
        self._step = step
        self._disk = RealDisk()
        self._state = self._read()
        self._unsure = False
        """Whether the file may say something else, because it could not be written."""

    def epoch(self, roots: RootIds) -> EpochId | None:
        """Return which epoch these directories are; None: that is not known."""
        lasting = self._state.synced or self._state.boot_id == self._boot_id
        return self._state.epoch if lasting and self._state.roots == roots else None

    @property
    def synced(self) -> bool:
        """Whether the epoch would be there after a power loss, too."""
        return self._state.synced

    def begin(self) -> None:
        """Write down that the tree is no epoch from now on.

        Durable if what is on the disk would be believed after a power loss. If it would not, that does not
        need to be prevented: one sync for each `sync`, not one for each epoch.
        """
        self._keep(TreeState(boot_id=self._boot_id), durable=self._state.synced)

    def finish(self, epoch: EpochId, roots: RootIds) -> None:
        """Write down that the tree is that epoch, as long as there is no power loss."""
        self._keep(TreeState(epoch=epoch, boot_id=self._boot_id, roots=roots), durable=False)

    def follow(self, epoch: EpochId) -> None:
        """Write down that the tree is that epoch as well as the one that it was: nothing was changed."""
        self._keep(msgspec.structs.replace(self._state, epoch=epoch), durable=False)

    def confirm(self) -> None:
        """Write down that the tree is its epoch after a power loss, too."""
        self._keep(msgspec.structs.replace(self._state, synced=True), durable=True)

    def _keep(self, state: TreeState, *, durable: bool) -> None:
        if state == self._state and not self._unsure:
            return
        durable, self._unsure = durable or self._unsure, True
        self._step("state")
        content = msgspec.json.encode(state)
        if durable:
            atomic_write(self._path, content, op="files.state", disk=self._disk)
        else:
            temporary = temporary_name(self._path)
            self._disk.write_file(temporary, content, op="files.state")
            self._disk.rename(temporary, self._path, op="files.state")
        self._state, self._unsure = state, False

    def _read(self) -> TreeState:
        """Read it, and remove what was not finished. What a power loss has torn says nothing."""
        for name in self._disk.names(self._path.parent, op="files.state"):
            if name.startswith(f"{TEMPORARY_PREFIX}{self._path.name}-"):
                self._disk.unlink(self._path.with_name(name), op="files.state")
        try:
            return msgspec.json.decode(self._disk.read_file(self._path, op="files.state"), type=TreeState)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return TreeState()
            raise
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return TreeState()
