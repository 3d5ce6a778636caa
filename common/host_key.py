"""A host's public SSH key as a line of text, `ssh-ed25519 AAAA… comment`, as OpenSSH writes it.

In: the line. Out: its type and its bytes, or a ValueError that says what is wrong. What the base64 holds:
RFC 4253, 6.6. Pure, and without an SSH library: the node's file is checked by processes that never speak SSH.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import NamedTuple

_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")


class HostKey(NamedTuple):
    """A public key."""

    kind: str
    blob: bytes
    """As it travels; the kind stands in it once more."""


def parse_host_key(line: str) -> HostKey:
    """Read the line. Raises ValueError with the rest of a sentence about the line."""
    kind, _, rest = line.strip().partition(" ")
    text = rest.split(" ")[0]
    if kind not in _KINDS or not text:
        raise ValueError(f'is not a public key: "KIND BASE64", KIND one of {", ".join(_KINDS)}')
    try:
        blob = base64.b64decode(text, validate=True)
        (length,) = struct.unpack_from("!I", blob)
    except (binascii.Error, struct.error):
        raise ValueError(f"is cut off or altered: what follows {kind} is not a key") from None
    if blob[4 : 4 + length] != kind.encode() or len(blob) <= 4 + length:
        raise ValueError(f"is cut off or altered: what follows {kind} is a key of another kind, or none")
    return HostKey(kind, blob)
