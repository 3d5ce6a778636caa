"""The service address (VIP) of a workload: who has it, who may hear it, and telling the neighbours.

In: a `Vip` and the name of the workload that owns it. Out: the kernel's addresses, nft tables of our own
and a few Ethernet frames. A takeover runs `hold`, `add_vip`, restore and health check, `lift`, `announce`:
from the first to the fourth step no client can reach the address, so nobody sees a workload half there.

The keeper uses this, and the keeper stays small: no netlink library, only the `ip` and `nft` programs, one
short process a step, each with a deadline. Every function acts on the network namespace of the calling
process, needs CAP_NET_ADMIN (`announce`: CAP_NET_RAW), and may be repeated: what is already so stays so.
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
)
from pathlib import Path

import structlog

from common.children import end_child, hangs
from common.errors import UnsupportedError, WorkloadError

log = structlog.get_logger(__name__)

COMMAND_DEADLINE_S = 5.0
"""`ip` and `nft` answer within milliseconds; one that takes this long hangs."""
_KIND = "ip or nft"

ANNOUNCE_REPEATS = 3
ANNOUNCE_PAUSE_S = 0.05
"""A single frame may be lost; switches and neighbours have learned the address after three, 100 ms later."""

_TABLE_PREFIX = "outlive_hold_"
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_BEFORE_CONNTRACK = -400
"""Hook priority: ahead of raw (-300), so that a held packet leaves no trace in connection tracking either."""

_ARPHRD_ETHER = 1
_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD


@dataclass(frozen=True, slots=True)
class Vip:
    """A service address with its prefix length, and the interface that carries it."""

    address: IPv4Interface | IPv6Interface
    interface: str

    @classmethod
    def parse(cls, address: str, interface: str) -> Vip:
        """Read `10.0.0.9/24` or `fd00::9/64`; no prefix length means one address. Raises ValueError."""
        return cls(ip_interface(address), interface)

    def __str__(self) -> str:
        return f"{self.address} on {self.interface}"


@dataclass(frozen=True, slots=True)
class Hold:
    """A packet hold that stands: packets of `address` are dropped on behalf of `owner`."""

    owner: str
    address: IPv4Address | IPv6Address

    @property
    def table(self) -> str:
        """Name of its nft tables; whoever comes later finds the hold by it. nft allows no colon in a name."""
        return f"{_TABLE_PREFIX}{self.owner}_{str(self.address).replace(':', '-')}"

    @classmethod
    def from_table(cls, table: str) -> Hold | None:
        """Read a table's name back; None if it is not one of ours."""
        owner, _, address = table.removeprefix(_TABLE_PREFIX).rpartition("_")
        if not table.startswith(_TABLE_PREFIX) or not _OWNER.fullmatch(owner):
            return None
        try:
            return cls(owner, ip_address(address.replace("-", ":")))
        except ValueError:
            return None


async def add_vip(vip: Vip) -> None:
    """Give this host the address. It is usable at once (IPv6: no duplicate address detection).

    Neighbours are not told (see `announce`), and nobody is asked whether another host has the address: that
    is for whoever decides about the right to lead. IPv6: never the source of outgoing connections.
    """
    _promote_secondaries(vip)
    ipv6 = ("nodad", "preferred_lft", "0") if vip.address.version == 6 else ()
    await _run("ip", "address", "replace", str(vip.address), "dev", vip.interface, *ipv6)
    log.info("vip.added", vip=str(vip))


async def drop_vip(vip: Vip) -> None:
    """Take the address from this host, whatever the prefix length it was added with, and no other one."""
    _promote_secondaries(vip)
    for prefix_length in await _prefix_lengths(vip):
        held = f"{vip.address.ip}/{prefix_length}"
        await _run("ip", "address", "delete", held, "dev", vip.interface)
        log.info("vip.dropped", vip=str(vip))


async def holds_vip(vip: Vip) -> bool:
    """Tell whether this host has the address on that interface."""
    return bool(await _prefix_lengths(vip))


def is_local(address: str) -> bool | None:
    """Tell whether this host has an address, on any interface; cheap. None if that cannot be told.

    It cannot where `ip_nonlocal_bind` lets anybody bind to any address, nor without a socket to try with.
    """
    family, version = (socket.AF_INET6, "ipv6") if ":" in address else (socket.AF_INET, "ipv4")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
        nonlocal_bind = Path(f"/proc/sys/net/{version}/ip_nonlocal_bind").read_text().strip() != "0"
    except OSError as error:
        return False if error.errno == errno.EADDRNOTAVAIL else None
    return None if nonlocal_bind else True


async def hold(vip: Vip, owner: str) -> None:
    """Drop every packet from or to the address, and ARP for it, until `lift`. Ready when this returns.

    Loopback passes: a health check on this host reaches the workload during the hold. A hold that an earlier
    run left behind is replaced in one transaction, with no gap. Packets forwarded for the address are held
    on their way in only.
    """
    held = _hold_of(vip, owner)
    await _run("nft", "-f", "-", script=_hold_script(held))
    log.info("hold.set", owner=owner, vip=str(vip))


async def lift(vip: Vip, owner: str) -> None:
    """Let the packets of the address pass again; nothing happens if there is no such hold."""
    await lift_hold(_hold_of(vip, owner))


async def lift_hold(held: Hold) -> None:
    """Do what `lift` does, for a hold that `list_holds` found."""
    await _run("nft", "-f", "-", script=_removal_script(held))
    log.info("hold.lifted", owner=held.owner, address=str(held.address))


async def list_holds() -> tuple[Hold, ...]:
    """Return every hold of ours that stands in this network namespace, those of earlier runs included."""
    answer = json.loads(await _run("nft", "-j", "list", "tables"))
    tables = (entry["table"] for entry in answer["nftables"] if "table" in entry)
    names = (table["name"] for table in tables if table["family"] == "inet")
    return tuple(held for held in map(Hold.from_table, names) if held is not None)


async def announce(vip: Vip, *, repeats: int = ANNOUNCE_REPEATS, pause_s: float = ANNOUNCE_PAUSE_S) -> None:
    """Tell the neighbours where the address is: gratuitous ARP (IPv4), unsolicited advertisements (IPv6).

    An interface without Ethernet addresses has no neighbours to tell. Nobody confirms an announcement: a host
    that missed all of them finds out when its old entry goes stale.
    """
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK) as link:
            link.bind((vip.interface, 0))
            _, _, _, hardware_type, mac = link.getsockname()
            if hardware_type != _ARPHRD_ETHER:
                return
            for turn in range(repeats):
                if turn:
                    await asyncio.sleep(pause_s)
                for frame in _announcements(vip.address.ip, mac):
                    link.send(frame)
    except OSError as error:
        raise WorkloadError(
            f"cannot announce {vip}: {error.strerror}",
            hint="the interface must exist and be up, and the keeper needs CAP_NET_RAW",
        ) from error
    log.info("vip.announced", vip=str(vip), frames=repeats)


async def _prefix_lengths(vip: Vip) -> tuple[int, ...]:
    """Return the prefix lengths with which the interface carries the address; none if it does not.

    An interface that is gone has taken its addresses with it: a host that has lost its network can give its
    workloads up all the same.
    """
    if not _exists(vip.interface) and is_local(str(vip.address.ip)) is False:
        return ()
    only = f"{vip.address.ip}/{vip.address.max_prefixlen}"
    links = json.loads(await _run("ip", "-j", "address", "show", "dev", vip.interface, "to", only) or "[]")
    # `ip` prints an empty object for each address that the filter left out.
    return tuple(found["prefixlen"] for link in links for found in link.get("addr_info", ()) if found)


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def _promote_secondaries(vip: Vip) -> None:
    """See that no other address of the interface goes with this one.

    Of the IPv4 addresses of one subnet the kernel takes the first for the primary one, and all others go with
    it unless the interface promotes them (Documentation/networking/ip-sysctl.rst).
    """
    setting = Path(f"/proc/sys/net/ipv4/conf/{vip.interface}/promote_secondaries")
    if vip.address.version == 6 or "/" in vip.interface or not _exists(vip.interface):
        return
    try:
        if setting.read_text().strip() == "0":
            setting.write_text("1")
            log.info("vip.secondaries_promoted", interface=vip.interface)
    except OSError as error:
        log.warning("vip.secondaries_not_promoted", interface=vip.interface, error=error.strerror)


def _hold_of(vip: Vip, owner: str) -> Hold:
    """Return the hold's name. Raises WorkloadError for an owner that cannot be part of one."""
    if not _OWNER.fullmatch(owner):
        raise WorkloadError(
            f"a packet hold cannot be named after {owner!r}",
            hint="letters, digits, dot, dash and underscore, 63 at most",
        )
    return Hold(owner, vip.address.ip)


def _removal_script(held: Hold) -> str:
    """Return an nft script that removes the hold's tables; it adds them first, for there may be none."""
    families = ("inet", "arp") if held.address.version == 4 else ("inet",)
    return "".join(f"add table {f} {held.table}\ndelete table {f} {held.table}\n" for f in families)


def _hold_script(held: Hold) -> str:
    """Return an nft script, one transaction, after which the hold stands.

    IPv6 needs no table for its neighbour discovery: an advertisement for the address comes from the address.
    """
    family, address, priority = ("ip", "ip6")[held.address.version == 6], held.address, _BEFORE_CONNTRACK
    script = (
        _removal_script(held)
        + f"""
table inet {held.table} {{
    chain incoming {{
        type filter hook prerouting priority {priority}; policy accept;
        iifname != "lo" {family} daddr {address} drop
    }}
    chain outgoing {{
        type filter hook output priority {priority}; policy accept;
        oifname != "lo" {family} saddr {address} drop
    }}
}}
"""
    )
    if held.address.version == 4:
        script += f"""
table arp {held.table} {{
    chain incoming {{ type filter hook input priority 0; policy accept; arp daddr ip {address} drop; }}
    chain outgoing {{ type filter hook output priority 0; policy accept; arp saddr ip {address} drop; }}
}}
"""
    return script


def _announcements(address: IPv4Address | IPv6Address, mac: bytes) -> Iterator[bytes]:
    """Yield the Ethernet frames that say "this address is at that MAC" once."""
    if isinstance(address, IPv6Address):
        yield _neighbour_advertisement(address, mac)
    else:
        # Some neighbours learn from requests only and some from replies only (RFC 5227, section 3), so: both.
        # Linux takes a reply for gratuitous only if its target hardware address is the sender's.
        yield _gratuitous_arp(address, mac, operation=1, target_mac=bytes(6))
        yield _gratuitous_arp(address, mac, operation=2, target_mac=mac)


def _gratuitous_arp(address: IPv4Address, mac: bytes, *, operation: int, target_mac: bytes) -> bytes:
    """Return a broadcast ARP frame (RFC 826) whose sender and target are the same address."""
    ethernet = b"\xff" * 6 + mac + struct.pack("!H", _ETH_P_ARP)
    header = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return ethernet + header + mac + address.packed + target_mac + address.packed


def _neighbour_advertisement(address: IPv6Address, mac: bytes) -> bytes:
    """Return an unsolicited neighbour advertisement (RFC 4861, 4.4) to all nodes, with the override flag."""
    all_nodes = IPv6Address("ff02::1").packed
    override, target_link_layer_option = 0x20000000, bytes((2, 1)) + mac
    body = struct.pack("!I", override) + address.packed + target_link_layer_option
    length = 4 + len(body)
    pseudo_header = address.packed + all_nodes + struct.pack("!II", length, socket.IPPROTO_ICMPV6)
    checksum = internet_checksum(pseudo_header + struct.pack("!BBH", 136, 0, 0) + body)
    icmp = struct.pack("!BBH", 136, 0, checksum) + body
    ipv6 = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_ICMPV6, 255) + address.packed + all_nodes
    return b"\x33\x33\x00\x00\x00\x01" + mac + struct.pack("!H", _ETH_P_IPV6) + ipv6 + icmp


def internet_checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071 of an even number of bytes: 0 over data that carries its own."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


async def _run(*argv: str, script: str = "") -> str:
    """Run a program to its end, `script` on its stdin, and return its stdout.

    Raises WorkloadError with the program's own words if it fails or hangs, UnsupportedError if it is missing.
    """
    shown = " ".join(argv)
    if hangs(_KIND):
        raise WorkloadError(
            f"`{shown}` was not run: an earlier ip or nft was killed, and has not ended yet",
            hint="is the kernel's netlink stuck?",
        )
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"the program {argv[0]!r} is missing", hint="install iproute2 and nftables"
        ) from error
    try:
        async with asyncio.timeout(COMMAND_DEADLINE_S):
            out, err = await process.communicate(script.encode())
    except TimeoutError as error:
        raise WorkloadError(
            f"`{shown}` did not answer within {COMMAND_DEADLINE_S:g} s", hint="is the kernel's netlink stuck?"
        ) from error
    finally:
        await end_child(process, _KIND)
    if process.returncode:
        words = err.decode(errors="replace").strip()
        raise WorkloadError(f"`{shown}` failed: {words}", hint=_hint_for(words))
    return out.decode()


def _hint_for(words: str) -> str:
    """Return what an operator can do about the words that `ip` or `nft` failed with; may be empty."""
    if "not permitted" in words:
        return "needs root or CAP_NET_ADMIN"
    if "does not exist" in words or "Cannot find device" in words:
        return "check the `interface` of the workload's vip"
    if "not supported" in words or "No such file" in words:
        return "the kernel needs nf_tables with the inet and arp families"
    return ""
