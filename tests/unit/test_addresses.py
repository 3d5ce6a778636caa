"""Service addresses: the names of holds, the rules and frames that are sent, without a kernel."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Interface, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import addresses
from common.addresses import Hold, Vip, internet_checksum
from common.errors import UnsupportedError, WorkloadError

MAC = bytes.fromhex("02fc00000001")


@given(
    owner=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True),
    address=st.ip_addresses(),
)
def test_a_hold_is_known_again_by_the_name_of_its_table(
    owner: str, address: IPv4Address | IPv6Address
) -> None:
    hold = Hold(owner, ip_address(str(address)))
    assert ":" not in hold.table
    assert Hold.from_table(hold.table) == hold


@pytest.mark.parametrize(
    "table",
    ["filter", "outlive_hold_", "outlive_hold_redis", "outlive_hold__10.0.0.1", "x_redis_10.0.0.1"],
)
def test_a_table_of_somebody_else_is_no_hold(table: str) -> None:
    assert Hold.from_table(table) is None


@pytest.mark.parametrize("owner", ["", "re dis", "redis;", "-redis", "ré", "a" * 64])
async def test_an_owner_that_cannot_be_part_of_a_table_name_is_refused(owner: str) -> None:
    with pytest.raises(WorkloadError, match="named after"):
        await addresses.hold(Vip.parse("10.0.0.9/24", "eth0"), owner)


def test_a_hold_replaces_a_leftover_in_the_same_transaction() -> None:
    script = addresses._hold_script(Hold("redis", IPv4Address("10.0.0.9")))
    table = "outlive_hold_redis_10.0.0.9"
    assert script.index(f"delete table inet {table}") < script.index(f"table inet {table} {{")
    assert script.index(f"delete table arp {table}") < script.index(f"table arp {table} {{")


def test_gratuitous_arp_comes_as_request_and_as_reply_with_the_address_on_both_sides() -> None:
    request, reply = addresses._announcements(IPv4Address("10.0.0.9"), MAC)
    head = "ffffffffffff02fc000000010806000108000604"
    assert request.hex() == head + "000102fc000000010a0000090000000000000a000009"
    assert reply.hex() == head + "000202fc000000010a00000902fc000000010a000009"


def test_an_unsolicited_advertisement_overrides_and_carries_a_valid_checksum() -> None:
    address = IPv6Interface("fd00::9/64").ip
    (frame,) = addresses._announcements(address, MAC)
    ethernet, ipv6, icmp = frame[:14], frame[14:54], frame[54:]
    assert ethernet.hex() == "33330000000102fc0000000186dd"
    assert ipv6[7] == 255  # a hop limit below 255 is ignored by every neighbour
    assert ipv6[8:24] == icmp[8:24] == address.packed
    assert (icmp[0], icmp[4]) == (136, 0x20)
    assert icmp[24:] == bytes((2, 1)) + MAC
    pseudo = ipv6[8:40] + len(icmp).to_bytes(4, "big") + (58).to_bytes(4, "big")
    assert internet_checksum(pseudo + icmp) == 0


def test_the_checksum_is_that_of_the_rfc_example() -> None:
    # RFC 1071, section 3: the sum of these words is ddf2.
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF


async def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnsupportedError, match="'ip' is missing"):
        await addresses.add_vip(Vip.parse("10.0.0.9/24", "eth0"))


async def test_a_program_that_hangs_is_killed_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "COMMAND_DEADLINE_S", 0.05)
    with pytest.raises(WorkloadError, match=r"`sleep 60` did not answer within 0\.05 s"):
        await addresses._run("sleep", "60")


async def test_a_failing_program_is_quoted() -> None:
    with pytest.raises(WorkloadError, match=r"`ls /nonexistent-directory` failed: .*No such file"):
        await addresses._run("ls", "/nonexistent-directory")


async def test_an_interface_that_is_gone_has_taken_its_addresses_with_it() -> None:
    gone = Vip.parse("198.51.100.77/32", "no-such-link")
    assert not await addresses.holds_vip(gone)
    await addresses.drop_vip(gone)


async def test_an_address_that_is_here_on_another_interface_is_not_taken_for_dropped() -> None:
    with pytest.raises(WorkloadError, match="no-such-link"):
        await addresses.drop_vip(Vip.parse("127.0.0.1/8", "no-such-link"))
