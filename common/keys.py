"""A node's secrets, in files that nobody else can read: the key pair by which it is known, its store's key.

In: a path. Out: a `KeyPair` in Z85 text, as peers' configuration names it. The secret file holds the secret
key alone (the public one follows from it); `PATH.pub` beside it is for copying to the peers.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from common.errors import AuthError

_KEY_CHARACTERS = 40
STORE_KEY_BYTES = 64
"""What AES-256-XTS takes, and the most that the kernel's fscrypt does."""
_FILE_BYTES = 4096
"""A key file is far smaller; more is not read."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE25519 key pair, each half 40 characters of Z85. The secret half is never printed."""

    public: str
    secret: str = field(repr=False)


def next_key_path(path: Path) -> Path:
    """Where the key stands that is to follow the one at `path`."""
    return path.with_name(path.name + ".next")


def former_key_path(path: Path) -> Path:
    """Where the key stands that the one at `path` has replaced, until the operator deletes it."""
    return path.with_name(path.name + ".former")


def public_key_path(path: Path) -> Path:
    """Where the public half of the key at `path` stands."""
    return path.with_name(path.name + ".pub")


def generate(path: Path) -> KeyPair:
    """Make a new key pair at `path` (mode 0600 from its first moment) and `path`.pub (0644), durably.

    Raises AuthError if there is a key already (it is never replaced) or the files cannot be written.
    """
    public, secret = (half.decode("ascii") for half in zmq.curve_keypair())
    try:
        _write_new(path, 0o600, f"{secret}\n".encode("ascii"))
    except FileExistsError:
        raise AuthError(
            f"there is a key at {path} already",
            hint="peers know this node by it; move it away first if you really want a new one",
        ) from None
    except OSError as error:
        raise AuthError(f"cannot write a key to {path}: {error.strerror}") from error
    beside = public_key_path(path)
    try:
        beside.unlink(missing_ok=True)
        _write_new(beside, 0o644, f"{public}\n".encode("ascii"))
    except OSError as error:
        raise AuthError(f"cannot write the public key to {beside}: {error.strerror}") from error
    return KeyPair(public, secret)


def load(path: Path) -> KeyPair:
    """Read the key pair whose secret half is at `path`.

    Raises AuthError: missing, readable by others, belonging to another user, or not a key.
    """
    content = _read_secret(path, "outlive keys generate")
    secret = content.strip()
    if len(secret) != _KEY_CHARACTERS:
        raise AuthError(f"{path} does not hold a key: {_KEY_CHARACTERS} characters of Z85 are expected")
    try:
        return KeyPair(zmq.curve_public(secret).decode("ascii"), secret.decode("ascii"))
    except (zmq.ZMQError, ValueError) as error:
        raise AuthError(f"{path} does not hold a key: {error}") from error


def prepare_next(path: Path) -> KeyPair:
    """Return the key that is to follow the one at `path`; made if there is none yet.

    Raises AuthError as `generate` and `load` do.
    """
    load(path)
    following = next_key_path(path)
    return load(following) if following.exists() else generate(following)


def activate_next(path: Path) -> KeyPair:
    """Put the next key in the place of the one at `path`, which stays beside it; durably.

    At any moment there is a key at `path`: the present one or the next. Raises AuthError.
    """
    following, former, beside = next_key_path(path), former_key_path(path), public_key_path(path)
    pair = load(following)
    try:
        former.unlink(missing_ok=True)
        os.link(path, former, follow_symlinks=False)
        following.rename(path)
        public_key_path(following).replace(beside)
        _sync_directory(path.parent)
    except OSError as error:
        raise AuthError(f"cannot put the next key in the place of {path}: {error}") from error
    return pair


def generate_store_key(path: Path) -> None:
    """Make the key of a store at `path`, mode 0600 from its first moment, durably. Raises AuthError."""
    try:
        _write_new(path, 0o600, secrets.token_bytes(STORE_KEY_BYTES))
    except FileExistsError:
        raise AuthError(
            f"there is a key at {path} already",
            hint="what is encrypted with it could never be read again; move it away first if nothing is",
        ) from None
    except OSError as error:
        raise AuthError(f"cannot write a key to {path}: {error.strerror}") from error


def load_store_key(path: Path) -> bytes:
    """Read the key of a store. Raises AuthError: as `load` does."""
    key = _read_secret(path, "outlive keys generate-store-key")
    if len(key) != STORE_KEY_BYTES:
        raise AuthError(f"{path} does not hold a store's key: {STORE_KEY_BYTES} bytes are expected")
    return key


def load_ssh_key(path: Path) -> str:
    """Read a private SSH key, as text. Raises AuthError: missing, readable by others, of another user."""
    content = _read_secret(path, f"ssh-keygen -t ed25519 -N '' -f {path}")
    return content.decode("ascii", errors="replace")


def load_password(path: Path) -> str:
    """Read a password, the first line of a file. Raises AuthError: none there, or others can read it."""
    lines = _read_secret(path, f"(umask 077; cat > {path})").decode("utf-8", errors="replace").splitlines()
    if not lines or not lines[0].strip():
        raise AuthError(f"{path} holds no password", hint="one line, with nothing else")
    return lines[0].strip()


def check_secret(path: Path) -> None:
    """See that a file is there, and for its owner alone. Raises AuthError."""
    _read_secret(path, "see who made the one before")


def _read_secret(path: Path, maker: str) -> bytes:
    """Read a file that must be for its owner alone; `maker` is the command that makes such."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_FILE_BYTES)
    except FileNotFoundError:
        raise AuthError(f"there is no key at {path}", hint=f"make one: {maker}") from None
    except OSError as error:
        raise AuthError(f"cannot read the key at {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or mode & 0o077:
        raise AuthError(
            f"the key at {path} can be read by others (mode {mode:04o})",
            hint=f"chmod 0600 {path}; if others may have read it, make a new one",
        )
    if status.st_uid not in (0, os.geteuid()):
        raise AuthError(f"the key at {path} belongs to user {status.st_uid}", hint=f"chown root {path}")
    return content


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_new(path: Path, mode: int, content: bytes) -> None:
    """Write a file that does not exist yet; after a failure there is none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask took away
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
