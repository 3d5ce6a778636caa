"""The agent's weight among all processes, on cgroup trees made of plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.scheduling import CpuShare, Need, agent_group, cpu_home


def group_at(directory: Path, weight: str, fair: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("cpu.idle", "0"), (weight, str(fair)), ("cgroup.procs", "")):
        (directory / name).write_text(content)
    return directory


def read(group: Path, weight: str) -> tuple[str, str]:
    return (group / "cpu.idle").read_text(), (group / weight).read_text()


def needing(share: CpuShare, need: Need, group: Path, weight: str) -> tuple[str, tuple[str, str]]:
    """Return the state and what the files say then."""
    (group / weight).write_text("")  # unlike the kernel's, these keep the end of longer words
    share.need(need)
    return share.state, read(group, weight)


@pytest.mark.parametrize(("weight", "fair"), [("cpu.weight", 100), ("cpu.shares", 1024)])
def test_spare_unless_claimed_or_overdue(tmp_path: Path, weight: str, fair: int) -> None:
    group = group_at(tmp_path / "g", weight, fair)
    share = CpuShare(group)
    assert (share.state, read(group, weight)[0]) == ("spare", "1")
    share.claim()
    assert (share.state, read(group, weight)) == ("first", ("0", str(10 * fair)))
    with share.claimed():  # claims overlap
        share.release()
        assert share.state == "first"
    assert (share.state, read(group, weight)[0]) == ("spare", "1")
    assert needing(share, "quarter", group, weight) == ("quarter", ("0", str(fair // 4)))
    assert needing(share, "fair", group, weight) == ("fair", ("0", str(fair)))
    assert needing(share, "quarter", group, weight) == ("quarter", ("0", str(fair // 4)))
    with share.claimed():
        share.need("spare")
        assert share.state == "first"
    assert share.state == "spare"


def test_what_a_claimed_block_raises_ends_the_claim(tmp_path: Path) -> None:
    share = CpuShare(group_at(tmp_path / "g", "cpu.weight", 100))
    with pytest.raises(RuntimeError), share.claimed():
        raise RuntimeError
    assert share.state == "spare"


def test_without_a_group_nothing_changes() -> None:
    share = CpuShare(None)
    with share.claimed():
        share.need("spare")
        assert share.state == "fair"
    assert share.state == "fair"


def tree(tmp_path: Path, line: str, top: str, group: str, weight: str) -> tuple[Path, Path, Path]:
    """Return a mount, a `/proc/self/cgroup` and a group in it."""
    own = tmp_path / "own"
    own.write_text(f"12:memory:/elsewhere\n{line}\n")
    mount = tmp_path / "mount"
    for directory in (mount / top, mount / top / group.lstrip("/")):
        group_at(directory, weight, 1024)
    return mount, own, mount / top / group.lstrip("/")


def test_one_at_the_top_is_made_in_version_1(tmp_path: Path) -> None:
    mount, own, group = tree(tmp_path, "4:cpu,cpuacct:/", "cpu,cpuacct", "/outlive-x.agent", "cpu.shares")
    share = CpuShare.take("/outlive/x", mount=mount, own=own)
    assert share.group == group
    assert share.state == "spare"
    assert (group / "cgroup.procs").read_text() == "0"  # the kernel's name for whoever writes it


def test_that_of_an_earlier_agent_is_used_by_its_children(tmp_path: Path) -> None:
    mount, own, group = tree(tmp_path, "4:cpu:/outlive.agent", "cpu", "/outlive.agent", "cpu.shares")
    assert CpuShare.take("/outlive", mount=mount, own=own).group == group
    assert cpu_home(mount, own) == mount / "cpu" / "cgroup.procs"


def test_one_is_made_at_the_top_from_within_a_unit_too(tmp_path: Path) -> None:
    mount, own, unit = tree(tmp_path, "0::/system.slice/agent.service", ".", "/outlive.agent", "cpu.weight")
    share = CpuShare.take("/outlive", mount=mount, own=own)
    assert share.group == unit
    assert (mount / "cgroup.subtree_control").read_text() == "+cpu"
    assert cpu_home(mount, own) == Path("/dev/null"), "this one is not in it"


def test_no_hierarchy_no_group_and_none_if_it_is_not_wanted(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for text in ("", "7:freezer:/\n", "nonsense\n"):
        own.write_text(text)
        assert CpuShare.take("/outlive", mount=tmp_path, own=own).group is None
        assert cpu_home(tmp_path, own) == Path("/dev/null")
    assert CpuShare.take("/outlive", mount=tmp_path, own=tmp_path / "missing").group is None
    mount, own, group = tree(tmp_path, "4:cpu:/", "cpu", "/outlive.agent", "cpu.shares")
    assert CpuShare.take("/outlive", spare=False, mount=mount, own=own).group is None
    assert (group / "cgroup.procs").read_text() == ""


def test_the_group_is_named_after_the_parent_of_the_workloads() -> None:
    assert agent_group("/outlive") == "outlive.agent"
    assert agent_group("/outlive/lab-a/") == "outlive-lab-a.agent"
