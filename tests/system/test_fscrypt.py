"""A store that its file system encrypts: on a real ext4, with the kernel's own keys."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import fscrypt
from common.config import Node, NodeConfig, Store
from common.errors import AuthError, ConfigError, OutliveError, UnsupportedError
from common.keys import generate_store_key, load_store_key
from outlive.store_room import prepare_store_room
from replica.store import EpochStore

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MARKER = b"the password of the workload is 4711 " * 1000
IMAGE_MIB = 32


@dataclass
class Disk:
    image: Path
    mount: Path
    """An ext4 in a file, mounted."""
    key_file: Path
    """A store's key on another file system."""

    @property
    def store(self) -> Path:
        return self.mount / "store"

    def config(self, key_file: Path | None = None) -> NodeConfig:
        return NodeConfig(
            node=Node(name="a", address="127.0.0.1"),
            store=Store(
                directory=str(self.store),
                encryption="fscrypt",
                encryption_key_file=str(key_file or self.key_file),
            ),
        )


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    features = getattr(request, "param", "encrypt")
    made = Disk(tmp_path / "disk.img", tmp_path / "mount", tmp_path / "store.key")
    with made.image.open("wb") as file:
        file.truncate(IMAGE_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", features, made.image], check=True)
    made.mount.mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", made.image, made.mount], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no loop device, or no encryption in this kernel: {mounted.stderr}")
    generate_store_key(made.key_file)
    try:
        yield made
    finally:
        subprocess.run(["umount", made.mount], check=True)


def raw(disk: Disk) -> bytes:
    os.sync()
    return disk.image.read_bytes()


def test_what_is_stored_cannot_be_read_without_the_key_and_can_with_it(disk: Disk) -> None:
    prepare_store_room(disk.config())
    plain = disk.mount / "in-the-clear"
    plain.write_bytes(MARKER[:64])
    store = EpochStore.open(disk.store, "redis", min_free_bytes=0, max_levels=8)
    store.close()
    (disk.store / "redis" / "pages-1.img").write_bytes(MARKER)
    assert MARKER[:64] in raw(disk), "the test would see it"
    plain.unlink()
    subprocess.run(["fstrim", disk.mount], check=False, capture_output=True)
    names = set(os.listdir(disk.store))
    assert fscrypt.lock(disk.store)
    assert not names & set(os.listdir(disk.store)), "names are garbled"
    with pytest.raises(OutliveError):
        EpochStore.open(disk.store, "redis", min_free_bytes=0, max_levels=8)
    for found in disk.store.rglob("*"):
        if found.is_file():
            with pytest.raises(OSError, match="key not available"):
                found.read_bytes()
    prepare_store_room(disk.config())
    assert set(os.listdir(disk.store)) == names
    assert (disk.store / "redis" / "pages-1.img").read_bytes() == MARKER
    EpochStore.open(disk.store, "redis", min_free_bytes=0, max_levels=8).close()


def test_the_disk_itself_never_holds_what_was_written(disk: Disk) -> None:
    prepare_store_room(disk.config())
    (disk.store / "pages-1.img").write_bytes(MARKER)
    on_disk = raw(disk)
    assert MARKER[:37] not in on_disk
    assert b"pages-1.img" not in on_disk
    assert load_store_key(disk.key_file)[:16] not in on_disk


def test_a_wrong_key_is_one_clear_error_and_loses_nothing(disk: Disk, tmp_path: Path) -> None:
    prepare_store_room(disk.config())
    (disk.store / "pages-1.img").write_bytes(MARKER)
    assert fscrypt.lock(disk.store)
    wrong = tmp_path / "wrong.key"
    generate_store_key(wrong)
    with pytest.raises(AuthError, match="is encrypted with the key"):
        prepare_store_room(disk.config(wrong))
    prepare_store_room(disk.config())
    with pytest.raises(AuthError, match="is encrypted with the key"):
        prepare_store_room(disk.config(wrong))
    assert (disk.store / "pages-1.img").read_bytes() == MARKER


def test_a_store_in_the_clear_is_not_taken_for_an_encrypted_one(disk: Disk) -> None:
    disk.store.mkdir(mode=0o700)
    (disk.store / "pages-1.img").write_bytes(MARKER)
    with pytest.raises(ConfigError, match="holds epochs in the clear"):
        prepare_store_room(disk.config())
    assert (disk.store / "pages-1.img").read_bytes() == MARKER
    assert fscrypt.policy_of(disk.store) is None


def test_files_in_use_are_said_when_the_store_is_locked(disk: Disk) -> None:
    prepare_store_room(disk.config())
    (disk.store / "pages-1.img").write_bytes(MARKER)
    with (disk.store / "pages-1.img").open("rb") as file:
        assert not fscrypt.lock(disk.store)
        assert file.read(37) == MARKER[:37]
    assert fscrypt.lock(disk.store)


def test_a_key_beside_what_it_locks_is_refused(disk: Disk) -> None:
    beside = disk.mount / "store.key"
    generate_store_key(beside)
    with pytest.raises(ConfigError, match="lies on the file system of the store"):
        prepare_store_room(disk.config(beside))
    assert fscrypt.policy_of(disk.store) is None


@pytest.mark.parametrize("disk", ["^encrypt"], indirect=True)
def test_a_file_system_that_does_not_encrypt_says_so(disk: Disk) -> None:
    with pytest.raises(UnsupportedError, match="does not encrypt") as caught:
        prepare_store_room(disk.config())
    assert "tune2fs" in caught.value.hint
