"""From a declaration to the bundle: all that was declared is in it, and nothing that CRIU stumbles over."""

from __future__ import annotations

import resource
import shlex
from pathlib import Path

import pytest

from common.bundle import WorkloadPaths, bind_mounts, restore_command, runtime_config
from common.config import Node, NodeConfig
from common.model import FilePath, WorkloadSpec

RICH = WorkloadSpec(
    name="shop",
    nodes=("a", "b"),
    command=("/srv/shop", "--port", "80 80"),
    environment={"LANG": "C.UTF-8", "PATH": "/opt/bin"},
    user="1000:100",
    working_directory="/srv",
    root="/srv/image",
    private_ipc=False,
    files=(
        FilePath(path="/var/lib/shop"),
        FilePath(path="/srv/common", source="/mnt/nfs/it's shared", shared=True),
        FilePath(path="/var/cache/shop"),
    ),
    memory_limit_bytes=1 << 30,
    cpu_limit=1.5,
    open_files_limit=4096,
)
PLAIN = WorkloadSpec(name="shop", nodes=("a",), command=("/srv/shop",))


def paths_of(node: str, parent: str = "/outlive") -> WorkloadPaths:
    config = NodeConfig(
        node=Node(
            name=node,
            address="127.0.0.1",
            state_dir=f"/var/lib/{node}",
            run_dir=f"/run/{node}",
            cgroup_parent=parent,
        )
    )
    return WorkloadPaths(config, "shop")


PATHS = paths_of("a")


def test_the_process_is_what_was_declared() -> None:
    process = runtime_config(RICH, PATHS)["process"]
    assert process["args"] == ["/srv/shop", "--port", "80 80"]
    assert process["user"] == {"uid": 1000, "gid": 100}
    assert process["cwd"] == "/srv"
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096}]
    assert process["terminal"] is False
    assert sorted(process["env"]) == ["LANG=C.UTF-8", "PATH=/opt/bin"]


def test_what_is_not_declared_has_harmless_defaults() -> None:
    config = runtime_config(PLAIN, PATHS)
    (path,) = config["process"]["env"]
    assert path.startswith("PATH=/")
    assert config["process"]["user"] == {"uid": 0, "gid": 0}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert config["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": hard, "soft": min(1024, hard)}]
    assert "memory" not in config["linux"]["resources"]
    assert "cpu" not in config["linux"]["resources"]


@pytest.mark.parametrize(("user", "uid", "gid"), [("7", 7, 7), ("7:8", 7, 8), ("0:0", 0, 0)])
def test_a_user_without_a_group_has_the_group_of_the_same_number(user: str, uid: int, gid: int) -> None:
    spec = WorkloadSpec(name="shop", nodes=("a",), command=("x",), user=user)
    assert runtime_config(spec, PATHS)["process"]["user"] == {"uid": uid, "gid": gid}


def test_limits_become_resources_of_the_nodes_own_cgroup() -> None:
    linux = runtime_config(RICH, paths_of("a", parent="/outlive/rack1/"))["linux"]
    assert linux["cgroupsPath"] == "/outlive/rack1/shop/run"
    assert linux["resources"]["memory"] == {"limit": 1 << 30}
    cpu = linux["resources"]["cpu"]
    assert cpu["quota"] / cpu["period"] == 1.5


def test_pids_and_mounts_are_always_private_and_ipc_unless_switched_off() -> None:
    def kinds(spec: WorkloadSpec) -> list[str]:
        namespaces = runtime_config(spec, PATHS)["linux"]["namespaces"]
        assert all(set(each) == {"type"} for each in namespaces)  # new ones, none joined
        return sorted(each["type"] for each in namespaces)

    assert kinds(PLAIN) == ["ipc", "mount", "pid"]
    assert kinds(RICH) == ["mount", "pid"]


def test_the_root_is_a_mount_point_of_the_bundle_whatever_root_is_declared() -> None:
    for spec in (PLAIN, RICH):
        assert runtime_config(spec, PATHS)["root"] == {"path": str(PATHS.rootfs), "readonly": False}
    assert PATHS.rootfs.is_relative_to(PATHS.bundle)


@pytest.mark.parametrize("spec", [PLAIN, RICH], ids=["plain", "rich"])
def test_nothing_is_mounted_but_proc_and_binds_so_criu_has_no_tmpfs_to_archive(spec: WorkloadSpec) -> None:
    config = runtime_config(spec, PATHS)
    kinds = {mount["destination"]: mount["type"] for mount in config["mounts"]}
    assert len(kinds) == len(config["mounts"])
    assert kinds.pop("/proc") == "proc"
    assert set(kinds.values()) == {"bind"}
    assert config["linux"]["maskedPaths"] == []  # masks are tmpfs or /dev/null mounts
    assert config["linux"]["readonlyPaths"] == []


@pytest.mark.parametrize("spec", [PLAIN, RICH], ids=["plain", "rich"])
def test_every_bind_is_private_and_external_by_where_the_workload_sees_it(spec: WorkloadSpec) -> None:
    config = runtime_config(spec, PATHS)
    binds = {m["destination"]: m for m in config["mounts"] if m["type"] == "bind"}
    externals = {mount.destination: mount.external for mount in bind_mounts(spec, PATHS)}
    assert binds.keys() == externals.keys()
    for destination, external in externals.items():
        assert external == f"mnt[{destination}]:{destination}"
        assert set(binds[destination]["options"]) == {"bind", "rprivate"}


def test_declared_files_are_separate_binds_in_the_order_declared() -> None:
    *_, shop, common, cache = bind_mounts(RICH, PATHS)
    assert (shop.destination, common.destination, cache.destination) == (
        "/var/lib/shop",
        "/srv/common",
        "/var/cache/shop",
    )
    assert common.source == "/mnt/nfs/it's shared"
    own = [Path(shop.source), Path(cache.source)]
    assert len(set(own)) == 2
    assert all(path.is_relative_to(PATHS.state) for path in own)


def test_what_criu_sees_is_the_same_on_nodes_that_keep_things_elsewhere() -> None:
    here, there = (bind_mounts(RICH, paths_of(node)) for node in ("a", "b"))
    assert [mount.external for mount in here] == [mount.external for mount in there]
    assert [mount.source for mount in here] != [mount.source for mount in there]


def test_a_restore_by_runc_is_told_where_criu_finds_its_settings() -> None:
    assert runtime_config(RICH, PATHS)["annotations"]["org.criu.config"] == str(PATHS.criu_settings)


def test_the_command_for_stock_criu_mounts_the_root_and_names_every_bind() -> None:
    words = restore_command(RICH, PATHS, "/opt/criu")
    at = words.index("/opt/criu")
    root, rootfs = words[at - 2 : at]
    assert (root, rootfs) == ("/srv/image", str(PATHS.rootfs))
    assert words[at + 1 : at + 4] == ("restore", "--root", str(PATHS.rootfs))
    externals = [words[n + 1] for n, word in enumerate(words) if word == "--external"]
    assert externals == [f"mnt[{m.destination}]:{m.source}" for m in bind_mounts(RICH, PATHS)]
    assert "--tcp-close" in words
    assert "--manage-cgroups=ignore" in words
    assert words[words.index("--network-lock") + 1] == "skip"
    assert words[: words.index("--")] == ("unshare", "--mount", "--propagation", "private")


def test_the_command_for_stock_criu_makes_sources_whose_names_need_quoting() -> None:
    words = restore_command(RICH, PATHS, "criu")
    script = words[words.index("-c") + 1]
    first = script.split(" && ")[0]
    assert shlex.split(first) == ["mkdir", "-p", *(m.source for m in bind_mounts(RICH, PATHS)), "$2"]
