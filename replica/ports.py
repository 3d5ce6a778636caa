"""Could the epoch's sockets be bound here? The kernel is asked: a socket is bound for a moment and closed.

That is the one answer that counts: it knows of addresses, of `ip_nonlocal_bind`, of sockets in TIME_WAIT
and of outgoing connections that happen to use the port. Nothing listens meanwhile, and no packet leaves.
In: a socket of the images. Out: None, or why it cannot be, in a sentence.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from common.criu.images import InetSocket

_IP_FREEBIND = 15


def obstacle_to_socket(wanted: InetSocket, vip: IPv4Address | IPv6Address | None) -> str | None:
    """Say why this socket could not be bound (and, UDP, connected) on this node, if so.

    The workload's own virtual address need not be here yet. Must not run while the workload does, here.
    """
    if wanted.protocol in {socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6} and wanted.type == socket.SOCK_DGRAM:
        return None
    name = _name(wanted)
    address = (wanted.source, wanted.source_port)
    try:
        with socket.socket(wanted.family, wanted.type, wanted.protocol) as probe:
            if wanted.type == socket.SOCK_STREAM:
                # As CRIU does. Not so for UDP, where it would let us share a port with a stranger.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if wanted.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wanted.v6only)
            if vip is not None and ip_address(wanted.source) == vip:
                probe.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
            probe.bind(address)
            if wanted.destination_port and wanted.type == socket.SOCK_DGRAM:
                probe.connect((wanted.destination, wanted.destination_port))
    except OSError as error:
        return _explain(error, name, wanted)
    return None


def obstacle_to_name(name: bytes) -> str | None:
    """Say why a unix socket could not get this abstract name on this node, if so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(name)
        except OSError as error:
            shown = "@" + name[1:].decode(errors="replace")
            return (
                f"the abstract unix socket {shown} cannot be bound here ({os.strerror(error.errno or 0)}): "
                f"end what holds it (ss -xlp src '{shown}')"
            )
    return None


def _name(wanted: InetSocket) -> str:
    kind = {socket.SOCK_STREAM: "TCP", socket.SOCK_DGRAM: "UDP"}.get(socket.SocketKind(wanted.type), "raw")
    host = f"[{wanted.source}]" if ":" in wanted.source else wanted.source
    return f"{kind} {host}:{wanted.source_port}"


def _explain(error: OSError, name: str, wanted: InetSocket) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{name} is taken by something else on this node, and the workload needs it: stop that, or move "
            f"it to another port (ss -anp sport = :{wanted.source_port})"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{name} is bound to an address that this node does not have and that is not the workload's vip: "
            "let it listen on the vip or on all addresses, or set net.ipv4.ip_nonlocal_bind (IPv6: "
            "net.ipv6.ip_nonlocal_bind)"
        )
    if error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        return f"{name} is connected to {wanted.destination}, to which this node has no route: add one"
    return f"{name} cannot be bound on this node: {os.strerror(error.errno or 0)}"
