"""Service addresses on real hosts: the neighbours follow, a hold holds, a health check passes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from outlive.lab import Host, Lab

pytestmark = pytest.mark.system

PORT = 7000
SERVER = f"""
import socket
server = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    server.accept()[0].close()
"""


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with Lab() as built:
        for name in "abc":
            host = await built.add_host(name)
            await host.spawn([sys.executable, "-c", SERVER], log=host.log_dir / "server.log")
        for host in built.hosts.values():
            while not await connects(host, "127.0.0.1"):
                pass
        yield built


async def connects(host: Host, address: str, within_s: float = 0.5) -> bool:
    """Whether a connection from the host to the server's port is accepted."""
    code = f"import socket; socket.create_connection(({address!r}, {PORT}), {within_s}).close()"
    return (await host.run([sys.executable, "-c", code], check=False)).returncode == 0


async def on(host: Host, vip: object, *calls: str, check: bool = True) -> list[str]:
    """Await functions of common.addresses in the host; return what they answered, as text."""
    code = f"""
import asyncio, structlog
from common.addresses import *
structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(__import__("sys").stderr))
vip = Vip.parse("{vip}", "eth0")
async def main():
    for answer in [{", ".join(f"await {call}" for call in calls)}]:
        print(answer)
asyncio.run(main())
"""
    done = await host.run([sys.executable, "-c", code], check=check)
    return (done.stdout + ("" if check else done.stderr)).splitlines()


async def neighbour(host: Host, address: object) -> str:
    """Return the MAC that the host knows for an address."""
    shown = (await host.run(["ip", "neigh", "show", str(address)])).stdout.split()
    return shown[shown.index("lladdr") + 1] if "lladdr" in shown else ""


async def mac_of(host: Host) -> str:
    shown = (await host.run(["ip", "-br", "link", "show", "eth0"])).stdout.split()
    return shown[2]


@pytest.mark.parametrize("vip", [Lab.vip(), Lab.vip6()], ids=["ipv4", "ipv6"])
async def test_the_neighbours_follow_an_announced_address(lab: Lab, vip: object) -> None:
    a, b, c = lab.hosts.values()
    address = str(vip).split("/")[0]
    await on(a, vip, "add_vip(vip)")
    assert await connects(c, address)
    first_mac = await mac_of(a)
    assert await neighbour(c, address) == first_mac

    await lab.power_off("a")
    await on(b, vip, "add_vip(vip)")
    assert await neighbour(c, address) == first_mac, "nobody has told c yet"
    await on(b, vip, "announce(vip)")
    assert await neighbour(c, address) == await mac_of(b)
    assert await connects(c, address)


@pytest.mark.parametrize("vip", [Lab.vip(), Lab.vip6()], ids=["ipv4", "ipv6"])
async def test_a_hold_keeps_clients_out_and_lets_the_health_check_in(lab: Lab, vip: object) -> None:
    _, b, c = lab.hosts.values()
    address = str(vip).split("/")[0]
    await on(b, vip, "hold(vip, 'redis')", "add_vip(vip)")
    assert not await connects(c, address)
    assert await neighbour(c, address) == "", "even ARP and neighbour discovery are held"
    assert await connects(b, address)
    assert await connects(c, str(b.address.ip)), "only the service address is held"

    await on(b, vip, "lift(vip, 'redis')", "announce(vip)")
    assert await connects(c, address)


async def test_a_hold_stops_connections_that_are_established(lab: Lab) -> None:
    _, b, c = lab.hosts.values()
    vip = Lab.vip()
    await on(b, vip, "add_vip(vip)")
    assert await connects(c, str(vip.ip))
    await on(b, vip, "hold(vip, 'redis')")
    assert not await connects(c, str(vip.ip)), "though c knows the neighbour"


async def test_a_hold_left_behind_is_found_by_a_later_process_and_lifted(lab: Lab) -> None:
    b, vip = lab.hosts["b"], Lab.vip()
    await on(b, vip, "hold(vip, 'redis')")
    assert await on(b, vip, "list_holds()") == ["(Hold(owner='redis', address=IPv4Address('10.99.0.101')),)"]
    await on(b, vip, "lift_hold(Hold('redis', vip.address.ip))")
    assert await on(b, vip, "list_holds()") == ["()"]
    assert (await b.run(["nft", "list", "ruleset"])).stdout == ""


@pytest.mark.parametrize("vip", [Lab.vip(), Lab.vip6()], ids=["ipv4", "ipv6"])
async def test_every_step_may_be_repeated(lab: Lab, vip: object) -> None:
    answers = await on(
        lab.hosts["b"],
        vip,
        *["holds_vip(vip)", "hold(vip, 'r')", "hold(vip, 'r')", "add_vip(vip)", "add_vip(vip)"],
        *["holds_vip(vip)", "lift(vip, 'r')", "lift(vip, 'r')", "drop_vip(vip)", "drop_vip(vip)"],
        "holds_vip(vip)",
    )
    assert [answer for answer in answers if answer != "None"] == ["False", "True", "False"]


async def test_an_address_is_dropped_whatever_its_prefix_length(lab: Lab) -> None:
    b, vip = lab.hosts["b"], Lab.vip()
    await b.run(["ip", "address", "add", f"{vip.ip}/32", "dev", "eth0"])
    assert await on(b, vip, "holds_vip(vip)", "drop_vip(vip)", "holds_vip(vip)") == ["True", "None", "False"]
    shown = (await b.run(["ip", "-br", "address", "show", "eth0"])).stdout
    assert str(b.address) in shown, "the host's own address stays"


async def test_a_wrong_interface_is_named_with_what_to_do(lab: Lab) -> None:
    bad = "Vip.parse('10.99.0.101', 'nope')"
    assert await on(lab.hosts["b"], Lab.vip(), f"holds_vip({bad})") == ["False"]
    for call in (f"add_vip({bad})", f"announce({bad})"):
        said = await on(lab.hosts["b"], Lab.vip(), call, check=False)
        assert "WorkloadError" in said[-1]
        assert "interface" in said[-1]


async def test_no_other_address_goes_with_the_one_that_is_dropped(lab: Lab) -> None:
    b = lab.hosts["b"]
    first, second = "10.98.0.1/24", "10.98.0.2/24"  # a subnet in which the host has no address of its own
    await b.run(["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=0"])
    await b.run(["ip", "address", "add", first, "dev", "eth0"])
    await b.run(["ip", "address", "add", second, "dev", "eth0"])
    await on(b, first, "drop_vip(vip)")
    shown = (await b.run(["ip", "-br", "address", "show", "eth0"])).stdout
    assert second in shown
    assert first not in shown
