"""Encryption of a directory by its file system: the kernel's fscrypt, for ext4, f2fs and ubifs.

In: an empty directory, a key of 64 bytes. Out: a directory whose files' content and names are encrypted on
disk, and can be used like any other by every program while the kernel has the key. No cryptography is done
here: the kernel derives, encrypts and names the key. Numbers and layouts are those of <linux/fscrypt.h>; what
they mean is in the kernel's Documentation/filesystems/fscrypt.rst. Policies are of version 2: AES-256-XTS for
content, AES-256-CTS for names, padded to 32 bytes.

Not protected: how many files there are and how large, their times and modes; and anything, while the kernel
has the key.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from common.errors import AuthError, ConfigError, StoreError, UnsupportedError

_SET_POLICY: Final = 0x800C6613
_GET_POLICY_EX: Final = 0xC0096616
_ADD_KEY: Final = 0xC0506617
_REMOVE_KEY: Final = 0xC0406618
_KEY_STATUS: Final = 0xC080661A

_POLICY: Final = struct.Struct("=BBBBB3x16s")
"""`fscrypt_policy_v2`: version, content's and names' cipher, flags, size of data units, key identifier."""
_VERSION_2, _AES_256_XTS, _AES_256_CTS, _PAD_32 = 2, 1, 4, 3
_KEY_SPEC: Final = struct.Struct("=I4x32s")
"""`fscrypt_key_specifier`: type, identifier with padding."""
_BY_IDENTIFIER, _IDENTIFIER_BYTES = 2, 16
_KEY_PRESENT: Final = 2


def policy_of(directory: Path) -> bytes | None:
    """Return the identifier of the key that a directory is encrypted with; None if it is not.

    Raises UnsupportedError for a policy that is not ours, StoreError if the directory cannot be asked.
    """
    asked = bytearray(struct.pack("=Q", _POLICY.size) + bytes(_POLICY.size))
    try:
        _ioctl(directory, _GET_POLICY_EX, asked)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP):
            return None
        raise StoreError(f"cannot ask how {directory} is encrypted: {error.strerror}") from error
    version, content, names, _flags, _unit, identifier = _POLICY.unpack_from(asked, 8)
    if (version, content, names) != (_VERSION_2, _AES_256_XTS, _AES_256_CTS):
        raise UnsupportedError(
            f"{directory} is encrypted in another way than Outlive does it",
            hint='let another empty directory be the store, or set store.encryption to "none"',
        )
    return bytes(identifier)


def unlock(directory: Path, key: bytes) -> None:
    """Give the kernel the key of a directory; an empty one that is in the clear becomes encrypted by it.

    Raises AuthError if the directory is encrypted with another key, ConfigError if it holds something in the
    clear, UnsupportedError if the file system does not encrypt. Nothing is lost by any of them.
    """
    wanted = policy_of(directory)
    identifier = _add_key(directory, key)
    if wanted is None:
        _encrypt(directory, identifier)
    elif wanted != identifier:
        _remove_key(directory, identifier)
        raise AuthError(
            f"{directory} is encrypted with the key {wanted.hex()}, and the one given is {identifier.hex()}",
            hint="put the right key into store.encryption_key_file; what is stored is untouched",
        )


def lock(directory: Path) -> bool:
    """Take the key of a directory from the kernel; return whether none of its files is in use any more.

    Those in use stay readable for who has them open, until this is called again after that. Raises
    StoreError if the directory is not encrypted or the kernel refuses.
    """
    identifier = policy_of(directory)
    if identifier is None:
        raise StoreError(f"{directory} is not encrypted", hint="docs/threat-model.md says how a store can be")
    return _remove_key(directory, identifier)


def is_unlocked(directory: Path, identifier: bytes) -> bool:
    """Tell whether the kernel has the key. Raises StoreError."""
    asked = bytearray(128)
    _KEY_SPEC.pack_into(asked, 0, _BY_IDENTIFIER, identifier)
    try:
        _ioctl(directory, _KEY_STATUS, asked)
    except OSError as error:
        raise StoreError(f"cannot ask for the key of {directory}: {error.strerror}") from error
    (status,) = struct.unpack_from("=I", asked, 64)
    return bool(status == _KEY_PRESENT)


def _add_key(directory: Path, key: bytes) -> bytes:
    asked = bytearray(struct.pack("=40xII32x", len(key), 0) + key)
    struct.pack_into("=I", asked, 0, _BY_IDENTIFIER)
    try:
        _ioctl(directory, _ADD_KEY, asked)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise UnsupportedError(
                f"the file system of {directory} does not encrypt",
                hint="ext4: tune2fs -O encrypt DEVICE; or put the store on LUKS and set store.encryption to "
                '"none"',
            ) from error
        raise StoreError(f"the kernel refuses the key of {directory}: {error.strerror}") from error
    finally:
        asked[80:] = bytes(len(key))
    return bytes(asked[8 : 8 + _IDENTIFIER_BYTES])


def _encrypt(directory: Path, identifier: bytes) -> None:
    policy = _POLICY.pack(_VERSION_2, _AES_256_XTS, _AES_256_CTS, _PAD_32, 0, identifier)
    try:
        _ioctl(directory, _SET_POLICY, bytearray(policy))
    except OSError as error:
        _remove_key(directory, identifier)
        if error.errno == errno.ENOTEMPTY:
            raise ConfigError(
                f"{directory} holds epochs in the clear, and only an empty directory can become encrypted",
                hint=f"move {directory} away: the leader sends everything anew; then destroy what was moved",
            ) from error
        raise StoreError(f"cannot encrypt {directory}: {error.strerror}") from error


def _remove_key(directory: Path, identifier: bytes) -> bool:
    asked = bytearray(64)
    _KEY_SPEC.pack_into(asked, 0, _BY_IDENTIFIER, identifier)
    beside = directory.parent if directory.parent.stat().st_dev == directory.stat().st_dev else directory
    try:
        _ioctl(beside, _REMOVE_KEY, asked)  # asked through the directory itself, that would be in use
    except OSError as error:
        if error.errno == errno.ENOKEY:
            return True
        raise StoreError(f"the kernel keeps the key of {directory}: {error.strerror}") from error
    (flags,) = struct.unpack_from("=I", asked, 40)
    return bool(flags == 0)  # else files are in use, or another user added the key too


def _ioctl(directory: Path, request: int, argument: bytearray) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, argument, True)
    finally:
        os.close(descriptor)
