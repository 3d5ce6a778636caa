"""The lab on the real kernel: it is quick, its power switch is final, and nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from common.errors import LabError
from outlive import lab_reaper, lab_state
from outlive.lab import REAPER_DEADLINE_S, Host, Lab
from outlive.lab_power import processes_of

pytestmark = pytest.mark.system

FREEZER = Path("/sys/fs/cgroup/freezer")
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        time.sleep(600)
    os._exit(0)
os.wait()
"""


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with Lab() as built:
        for name in "abc":
            await built.add_host(name)
        yield built


async def reaches(source: Host, target: Host, within_s: float = 0.4) -> bool:
    """Whether packets pass both ways: a closed port answers with a refusal, a lost packet with nothing."""
    code = f"import socket; socket.create_connection(({str(target.address.ip)!r}, 9), {within_s})"
    done = await source.run([sys.executable, "-c", code], check=False)
    return "ConnectionRefusedError" in done.stderr


async def soon_reaches(source: Host, target: Host) -> bool:
    """Whether packets pass before long: a neighbour that did not answer once is asked again in a second."""
    for _ in range(20):
        if await reaches(source, target):
            return True
    return False


def inodes(lab: str) -> set[int]:
    paths = [lab_state.switch_netns(lab), *(lab_state.host_netns(lab, h) for h in lab_state.host_names(lab))]
    return {path.stat().st_ino for path in paths}


def traces(lab: str, namespaces: set[int]) -> list[str]:
    """Return everything of the lab that is still on this machine."""
    found = [str(path) for path in (lab_state.disk_dir(lab), lab_state.memory_dir(lab)) if path.exists()]
    found += [str(mount.point) for mount in lab_state.mounts() if f"/{lab}" in str(mount.point)]
    found += map(str, lab_state.cgroup_dirs(lab))
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            in_lab = Path(f"/proc/{pid}/ns/net").stat().st_ino in namespaces
        except OSError:  # ended meanwhile
            continue
        if in_lab or lab in words_of(pid):
            found.append(f"process {pid}")
    return found


def words_of(pid: int) -> list[str]:
    """Return a process's command line; empty if it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


async def until(happens: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not happens():  # noqa: ASYNC110 — it is another process that makes it happen
            await asyncio.sleep(0.02)


async def test_three_hosts_stand_within_a_second_and_go_within_one() -> None:
    started = time.monotonic()
    async with Lab() as lab:
        for name in "abc":
            await lab.add_host(name)
        built = time.monotonic()
        namespaces = inodes(lab.name)
    ended = time.monotonic()
    assert built - started < 1
    assert ended - built < 1
    assert traces(lab.name, namespaces) == []


async def test_hosts_reach_each_other_and_keep_out_of_the_machine_s_network(lab: Lab) -> None:
    links = Path("/proc/net/dev").read_text()
    a, b, c = lab.hosts.values()
    assert await soon_reaches(a, b)
    assert await soon_reaches(c, a)
    assert "p-a" not in links
    assert "br0" not in links


async def test_the_tmpfs_is_one_and_the_disk_is_not(lab: Lab) -> None:
    a = lab.hosts["a"]
    kinds = await asyncio.to_thread(lab_state.run, "stat", "-fc", "%T", a.run_dir, a.state_dir)
    memory, disk = kinds.stdout.split()
    assert memory == "tmpfs"
    assert disk != "tmpfs"


async def test_labs_stand_side_by_side_and_no_name_is_taken_twice(lab: Lab) -> None:
    async with Lab() as other:
        host = await other.add_host("a")
        await lab.power_off("a")
        assert not await other.is_off("a")
        assert await host.run(["true"])
    with pytest.raises(LabError, match="already"):
        async with Lab(lab.name):
            pass
    assert await lab.hosts["b"].run(["true"]), "the refused lab left this one alone"


async def test_a_command_that_fails_in_a_host_is_quoted(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"/nonexistent-directory.*No such file"):
        await lab.hosts["a"].run(["ls", "/nonexistent-directory"])
    with pytest.raises(LabError, match=r"did not end within 0\.1 s"):
        await lab.hosts["a"].run(["sleep", "60"], timeout_s=0.1)


async def test_power_off_kills_daemons_and_cuts_the_link(lab: Lab) -> None:
    a, b, _ = lab.hosts.values()
    log = a.log_dir / "log"
    process = await a.spawn(["sleep", "600"], log=log)
    await a.run([sys.executable, "-c", DAEMON])
    assert len(processes_of(a.lab, a.name)) == 2

    before = time.monotonic()
    instant = await lab.power_off("a")
    assert before <= instant <= time.monotonic()
    assert await process.wait() == -signal.SIGKILL
    assert processes_of(a.lab, a.name) == frozenset()
    assert await lab.is_off("a")
    assert not await reaches(b, a)
    with pytest.raises(LabError, match="power of host a is off"):
        await a.spawn(["true"], log=log)
    with pytest.raises(LabError, match="power of host a is off"):
        await lab.mend("a")


@pytest.mark.skipif(not (FREEZER / "cgroup.procs").exists(), reason="no version 1 freezer here")
async def test_power_off_kills_what_is_frozen_and_what_has_a_network_of_its_own(lab: Lab) -> None:
    a = lab.hosts["a"]
    cgroup = FREEZER / a.cgroup_parent.lstrip("/") / "redis"
    cgroup.mkdir(parents=True)
    frozen = await a.spawn(["sleep", "600"], log=a.log_dir / "log")
    apart = await a.spawn(["unshare", "--net", "sleep", "600"], log=a.log_dir / "log")
    await until(lambda: b"sleep" in Path(f"/proc/{apart.pid}/cmdline").read_bytes()[:6])
    for process in (frozen, apart):
        (cgroup / "cgroup.procs").write_text(str(process.pid))
    (cgroup / "freezer.state").write_text("FROZEN")
    await until(lambda: (cgroup / "freezer.state").read_text().strip() == "FROZEN")

    await lab.power_off("a")
    assert await frozen.wait() == await apart.wait() == -signal.SIGKILL


async def test_a_boot_forgets_what_was_in_memory_and_keeps_the_disk(lab: Lab) -> None:
    a, b, _ = lab.hosts.values()
    boot_id = a.boot_id_file.read_text()
    (a.state_dir / "term").write_text("7")
    (a.run_dir / "socket").write_text("")
    await a.run(["ip", "address", "add", str(Lab.vip()), "dev", "eth0"])
    await a.run(["nft", "add", "table", "inet", "outlive_hold_x"])
    with pytest.raises(LabError, match="not off"):
        await lab.power_on("a")

    await lab.power_off("a")
    await lab.power_on("a")
    assert await soon_reaches(b, a)
    assert (a.state_dir / "term").read_text() == "7"
    assert [entry.name for entry in a.run_dir.iterdir()] == ["boot_id"]
    assert a.boot_id_file.read_text() != boot_id
    assert str(Lab.vip().ip) not in (await a.run(["ip", "address"])).stdout
    assert (await a.run(["nft", "list", "ruleset"])).stdout == ""


async def test_the_fence_command_run_by_another_host_confirms(lab: Lab) -> None:
    a, b, _ = lab.hosts.values()
    await a.run([sys.executable, "-c", DAEMON])
    status = (*a.fence_command[:-1], "status")
    assert (await b.run(status, check=False)).returncode == 1
    assert (await b.run(a.fence_command, check=False)).returncode == 0
    assert (await b.run(status, check=False)).returncode == 0
    assert await lab.is_off("a")
    assert (await b.run(a.fence_command, check=False)).returncode == 0, "off is confirmed again"


async def test_the_fence_command_refuses_suicide_and_does_not_know_strangers(lab: Lab) -> None:
    a, b, _ = lab.hosts.values()
    refused = await a.run(a.fence_command, check=False)
    assert (refused.returncode, "its own power" in refused.stderr) == (1, True)
    unknown = await b.run((*a.fence_command[:-2], "nobody", "off"), check=False)
    assert (unknown.returncode, "no host nobody" in unknown.stderr) == (2, True)
    assert (await b.run((*a.fence_command[:-1], "explode"), check=False)).returncode == 2
    assert not await lab.is_off("a")


async def test_a_cut_cable_is_mended(lab: Lab) -> None:
    a, b, c = lab.hosts.values()
    await lab.cut("a")
    assert not await reaches(a, b)
    assert not await reaches(c, a)
    assert await soon_reaches(b, c)
    await lab.mend("a")
    assert await soon_reaches(a, b)


async def test_a_one_way_cut_loses_frames_of_that_direction_only(lab: Lab) -> None:
    a, b, c = lab.hosts.values()
    sender = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ({!r}, 9))"
    receiver = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 9)); print('up', flush=True);"
        "print(s.recvfrom(9)[1][0], flush=True)"
    )
    assert await soon_reaches(a, b)  # both know their neighbours: no need for ARP, which needs both ways
    await lab.cut_one_way("a", "b")
    assert not await reaches(a, b)
    assert await soon_reaches(a, c)
    log = a.log_dir / "received"
    await a.spawn([sys.executable, "-c", receiver], log=log)
    await until(lambda: "up" in log.read_text())
    await b.run([sys.executable, "-c", sender.format(str(a.address.ip))])
    await until(lambda: str(b.address.ip) in log.read_text())
    await lab.mend("b")
    assert await soon_reaches(a, b)


async def test_tear_down_removes_binds_without_touching_what_is_bound(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("here")
    async with Lab() as lab:
        host = await lab.add_host("a")
        namespaces = inodes(lab.name)
        for parent in (host.state_dir, host.run_dir):
            root = parent / "bundle" / "root fs"
            root.mkdir(parents=True)
            for _ in range(2):
                lab_state.run("mount", "--bind", tmp_path, root)
            (root / "below").mkdir(exist_ok=True)
            lab_state.run("mount", "-t", "tmpfs", "tmpfs", root / "below")
    assert precious.read_text() == "here"
    assert traces(lab.name, namespaces) == []


async def test_clearing_a_directory_never_enters_a_mount(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("here")
    root = lab.hosts["a"].state_dir / "rootfs"
    root.mkdir()
    lab_state.run("mount", "--bind", tmp_path, root)
    with pytest.raises(LabError, match="busy"):
        lab_reaper.clear_directory(lab.hosts["a"].dir)
    assert (tmp_path / "precious").read_text() == "here"


OWNER = """
import asyncio, signal, sys
from pathlib import Path
from outlive.lab import Lab
# Whoever runs the tests in the background of a shell ignores it, and all that they start would.
signal.signal(signal.SIGINT, signal.default_int_handler)
async def main():
    async with Lab() as lab:
        for name in "ab":
            host = await lab.add_host(name)
            await host.spawn(["sleep", "600"], log=host.log_dir / "log")
            await host.run([sys.executable, "-c", {daemon!r}])
            (Path("/sys/fs/cgroup/freezer") / host.cgroup_parent[1:] / "redis").mkdir(parents=True)
            (host.dir / "root").mkdir()
            await host.run(["mount", "--bind", "/", host.dir / "root"])
        {then}
        print(lab.name, file=sys.stderr, flush=True)
        await asyncio.sleep({stay_s})
asyncio.run(main())
"""


def start_owner(then: str = "", stay_s: float = 600) -> tuple[subprocess.Popen[str], str]:
    """Start a process that builds a lab with all sorts of things in it; return it and the lab's name."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(daemon=DAEMON, then=then, stay_s=stay_s)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stderr is not None
    name = owner.stderr.readline().strip()
    assert lab_state.read_state(name) is not None, name + owner.stderr.read()
    return owner, name


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_nothing_is_left_when_the_owner_is_struck(blow: signal.Signals) -> None:
    owner, name = start_owner()
    namespaces = inodes(name)
    assert len(namespaces) == 3
    assert len(traces(name, namespaces)) > 10
    os.killpg(owner.pid, blow)
    owner.communicate(timeout=REAPER_DEADLINE_S)
    await until(lambda: traces(name, namespaces) == [])
    assert Path("/etc/passwd").exists(), "the root that was bound into the lab is untouched"


async def test_a_lab_that_is_killed_while_it_is_built_leaves_nothing() -> None:
    code = "import asyncio\nfrom outlive.lab import Lab\nasync def main():\n async with Lab({!r}) as lab:\n"
    code += "  for n in range(40): await lab.add_host(f'h{{n}}')\nasyncio.run(main())"
    for turn in range(6):
        name = f"zz{turn}{os.getpid() % 100}"
        owner = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", code.format(name)], stdout=subprocess.DEVNULL, start_new_session=True
        )
        await until(lambda name=name: lab_state.disk_dir(name).exists())  # type: ignore[misc]
        await asyncio.sleep(0.04 * turn)
        owner.kill()
        await owner.wait()
        await until(lambda name=name: traces(name, set()) == [])  # type: ignore[misc]


async def test_a_kept_lab_stays_until_it_is_torn_down_by_name() -> None:
    owner, name = start_owner("lab.keep()", stay_s=0)
    namespaces = inodes(name)
    owner.communicate(timeout=10)
    assert owner.returncode == 0
    assert name not in lab_reaper.reap_leftovers()
    assert lab_state.host_names(name) != ()
    assert name in [state.name for state in lab_state.list_labs() if state.kept]
    await lab_reaper.tear_down(name)
    assert traces(name, namespaces) == []
    await lab_reaper.tear_down(name)


async def test_a_lab_whose_reaper_died_too_is_a_leftover() -> None:
    owner, name = start_owner()
    namespaces = inodes(name)
    reaper = next(
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and {"watch", name} <= set(words_of(int(entry)))
    )
    with pytest.raises(LabError, match="in use by process"):
        await lab_reaper.tear_down(name)
    os.kill(reaper, signal.SIGKILL)
    owner.kill()
    owner.communicate(timeout=10)
    assert name in await asyncio.to_thread(lab_reaper.reap_leftovers)
    assert traces(name, namespaces) == []
