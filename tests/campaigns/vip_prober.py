"""Who answers for a service address: asks host identity and workload incarnation every 10 ms.

    python -m tests.campaigns.vip_prober INTERFACE ADDRESS PORT LOG

Two questions at a time. By ARP, to every host at once: whose hardware address answers for it. By UDP, to
whoever the network takes for it: the network namespace and the PID namespace in which the workload runs
(`WORKLOAD`). The first is the host, the second is another one after each start and restore. One line an
answer is written to LOG: wall clock, "arp" and a hardware address, or "udp" and what the workload said.

A workload's answer may come late: the kernel of a host whose cable was pulled keeps what it cannot send for
up to three seconds (arp(7), retrans_time times mcast_solicit), and sends it once the cable is back, even if
another host leads by then. So the workload says when it answered; all hosts of a lab have one clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import selectors
import socket
import struct
import sys
import time

EVERY_S = 0.01
_ARP = 0x0806
_REQUEST, _REPLY = 1, 2
_SIOCGIFADDR = 0x8915

WORKLOAD = """
import os, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", int(sys.argv[1])))
number = 0
while True:
    _, who = s.recvfrom(64)
    number += 1
    net, pid = (os.stat("/proc/self/ns/" + each).st_ino for each in ("net", "pid"))
    s.sendto(b"%d %d %d %.4f" % (net, pid, number, time.time()), who)
"""
"""Says where it is, which life it has, its count and the time; the count is its memory."""


def main() -> None:
    """Ask for ever."""
    interface, address, port, path = sys.argv[1:5]
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ARP))
    raw.bind((interface, _ARP))
    own = raw.getsockname()[4]
    asked = fcntl.ioctl(raw, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
    wanted = socket.inet_aton(address)
    request = (
        b"\xff" * 6
        + own
        + struct.pack("!HHHBBH", _ARP, 1, 0x0800, 6, 4, _REQUEST)
        + (own + asked[20:24] + bytes(6) + wanted)
    )
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with selectors.DefaultSelector() as both, open(path, "w", buffering=1) as log:
        for each in (raw, datagram):
            each.setblocking(False)
            both.register(each, selectors.EVENT_READ)
        due_s = time.monotonic()
        while True:
            if (left_s := due_s - time.monotonic()) <= 0:
                due_s = max(due_s + EVERY_S, time.monotonic())
                for ask in (lambda: raw.send(request), lambda: datagram.sendto(b"?", (address, int(port)))):
                    with contextlib.suppress(OSError):  # no route, no neighbour: nobody answers just now
                        ask()
                continue
            for key, _ in both.select(left_s):
                try:
                    data = key.fileobj.recv(2048)  # type: ignore[union-attr]
                except OSError:
                    continue  # nobody listens at the port
                if key.fileobj is datagram:
                    log.write(f"{time.time():.4f} udp {data.decode()}\n")
                elif len(data) >= 42 and data[20:22] == b"\0\2" and data[28:32] == wanted:
                    log.write(f"{time.time():.4f} arp {data[22:28].hex(':')}\n")


if __name__ == "__main__":
    main()
