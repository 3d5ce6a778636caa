"""Where a keeper puts its leases: for the guard beside it, and for the keeper after it.

In: `LeaseRecord`s. Out: one file a workload in `RUN_DIR/leases`, a tmpfs in production, replaced at once:
nothing is synced, for after a boot nothing runs because of a lease. Blocking, but only for some system calls.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from common.config import NodeConfig
from common.gate import Gate
from common.lease import LeaseRecord
from common.private_directory import prepare_private_directory


class _Filed(msgspec.Struct, frozen=True, kw_only=True):
    """A file's content. The guard reads `until_s`, `margin_s`, `gate`, `word` and `drop`."""

    boot_id: str
    until_s: float
    """On CLOCK_BOOTTIME."""
    margin_s: float
    gate: str
    word: str
    """What closes the gate."""
    drop: tuple[str, ...]
    """The command that takes the address from the host; empty: there is none."""
    record: LeaseRecord


class LeaseRecords:
    """The files of this node."""

    def __init__(self, config: NodeConfig, boot_id: str) -> None:
        """Make the directory. Raises ConfigError if it cannot be made or is open to others."""
        self.directory = Path(config.node.run_dir) / "leases"
        self._boot_id = boot_id
        self._margin_s = config.etcd.margin_ms / 1000
        self._interface = config.node.vip_interface
        prepare_private_directory(self.directory, "node.run_dir")

    def keep(self, name: str, record: LeaseRecord, gate: Gate, vip: str | None) -> None:
        """Write it down. Raises OSError: then nothing may run because of it."""
        drop = ("ip", "address", "delete", vip, "dev", self._interface) if vip is not None else ()
        filed = _Filed(
            boot_id=self._boot_id,
            until_s=record.until_s,
            margin_s=self._margin_s,
            gate=str(gate.file),
            word=gate.close,
            drop=drop,
            record=record,
        )
        new = self.directory / f"{name}.new"
        new.write_bytes(msgspec.json.encode(filed))
        new.rename(self._path(name))

    def drop(self, name: str) -> None:
        """Forget it. One that cannot be forgotten closes a gate that is closed already."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def left(self, name: str) -> LeaseRecord | None:
        """Return what an earlier keeper of this boot left; None if nothing that can be read."""
        try:
            filed = msgspec.json.decode(self._path(name).read_bytes(), type=_Filed)
        except (OSError, msgspec.MsgspecError):
            return None
        return filed.record if filed.boot_id == self._boot_id else None

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"
