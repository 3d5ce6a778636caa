"""What one part of CRIU's freeze takes on this host: asking the kernel for all TCP sockets.

CRIU asks for those of IPv4 and those of IPv6, while all stands still (criu/sockets.c). The kernel walks the
host's table of connections each time, whose size goes by the host's memory, not by how many there are.
"""

from __future__ import annotations

import socket
import struct
import time

_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST_AND_DUMP = 0x301
_ALL_STATES = 0xFFFFFFFF
_ROOM_BYTES = 1 << 16
_DONE, _ERROR = 3, 2
_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBBxI48x")


def tcp_walk_ms() -> float:
    """Ask for both families, as CRIU does, in the network namespace of this process; return ms. Blocking."""
    begun_s = time.perf_counter()
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, _ALL_STATES)
            size = _HEADER.size + len(question)
            kernel.send(_HEADER.pack(size, _BY_FAMILY, _REQUEST_AND_DUMP, 1, 0) + question)
            while not _ends(kernel.recv(_ROOM_BYTES)):
                pass
    return (time.perf_counter() - begun_s) * 1000


def _ends(answer: bytes) -> bool:
    at = 0
    while at + _HEADER.size <= len(answer):
        size, kind, *_ = _HEADER.unpack_from(answer, at)
        if kind in (_DONE, _ERROR):
            return True
        at += max(size + 3 & ~3, _HEADER.size)
    return False
