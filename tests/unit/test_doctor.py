"""The doctor's judgement: what a tree uses in, checks out. And the machine's checks on a machine made up."""

import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import keys
from common.config import DEFAULT_PATH, Fence, Node, NodeConfig, Peer
from common.errors import ConfigError
from common.inspection import MappedFile, OpenDescriptor, ProcessUse, TreeUse
from common.model import FilePath, WorkloadSpec
from outlive.doctor import Check, DoctorReport, run_doctor, run_doctor_without_config
from outlive.doctor.named import judge_etcd
from outlive.doctor.workload import judge_fencing, judge_nodes, judge_tree

SPEC = WorkloadSpec(
    name="redis", nodes=("a",), command=("redis-server",), files=(FilePath(path="/srv/shared", shared=True),)
)


def descriptor(**changes: Any) -> OpenDescriptor:
    base = OpenDescriptor(number=7, kind="regular", name="/etc/app.conf", flags=os.O_RDONLY, inode=70)
    return msgspec.structs.replace(base, **changes)


def mapping(**changes: Any) -> MappedFile:
    base = MappedFile(name="/usr/lib/x.so", shared=False, writable=False, deleted=False, inode=1, bytes=4096)
    return msgspec.structs.replace(base, **changes)


def process(
    *descriptors: OpenDescriptor, mappings: tuple[MappedFile, ...] = (), **changes: Any
) -> ProcessUse:
    base = ProcessUse(
        pid=100,
        name="app",
        root="/",
        descriptors=descriptors,
        mappings=mappings,
        namespaces={"net": "net:[1]", "pid_for_children": "pid:[1]"},
    )
    return msgspec.structs.replace(base, **changes)


def problems(*processes: ProcessUse, outside_peers: frozenset[int] = frozenset()) -> dict[str, str]:
    tree = TreeUse(processes=processes, outside_peers=outside_peers)
    return {check.name: check.status for check in judge_tree(SPEC, tree)[1:]}


@pytest.mark.parametrize(
    ("used", "name", "status"),
    [
        (descriptor(kind="anonymous", name="[io_uring]"), "io_uring", "fail"),
        (descriptor(kind="anonymous", name="[userfaultfd]"), "userfaultfd", "fail"),
        (descriptor(kind="anonymous", name="[perf_event]"), "kernel objects", "fail"),
        (descriptor(kind="socket", name="socket:[1]", protocol="SCTP"), "sockets", "fail"),
        (descriptor(kind="socket", name="socket:[1]", protocol="MPTCP"), "sockets", "fail"),
        (descriptor(kind="socket", name="socket:[1]", protocol=""), "sockets", "fail"),
        (descriptor(kind="character", name="/dev/kvm", device=(10, 232)), "devices", "fail"),
        (descriptor(kind="character", name="/dev/mem", device=(1, 1)), "devices", "fail"),
        (descriptor(kind="block", name="/dev/vda", device=(254, 0)), "devices", "fail"),
        (descriptor(locks=("1: FLOCK  ADVISORY  WRITE 1 fe:00:1 0 EOF",)), "file locks", "fail"),
        (descriptor(deleted=True, links=0, size_bytes=2 << 20), "deleted files", "fail"),
        (descriptor(deleted=True, links=1, size_bytes=1), "deleted files", "fail"),
        (descriptor(name="/var/log/x", flags=os.O_WRONLY | os.O_APPEND), "local files", "fail"),
        (descriptor(flags=os.O_RDONLY | os.O_DIRECT), "direct I/O", "warn"),
    ],
)
def test_a_descriptor_that_stands_in_the_way(used: OpenDescriptor, name: str, status: str) -> None:
    assert problems(process(used)) == {name: status}


def test_locks_are_no_trouble_where_files_are_replicated() -> None:
    used = descriptor(locks=("1: FLOCK  ADVISORY  WRITE 1 fe:00:1 0 EOF",))
    spec = msgspec.structs.replace(SPEC, files=(FilePath(path="/data"),))
    tree = TreeUse(processes=(process(used),), outside_peers=frozenset())
    assert "file locks" not in {check.name for check in judge_tree(spec, tree)}


@pytest.mark.parametrize(
    "used",
    [
        descriptor(),
        descriptor(name="/srv/shared/log", flags=os.O_RDWR),
        descriptor(name="/proc/self/oom_score_adj", flags=os.O_WRONLY),
        descriptor(name="/tmp/x", flags=os.O_RDWR, deleted=True, links=0, size_bytes=4096),
        descriptor(name="/memfd:x", flags=os.O_RDWR, deleted=True, links=0, size_bytes=1 << 30),
        descriptor(kind="fifo", name="pipe:[1]", flags=os.O_WRONLY),
        descriptor(kind="directory", name="/"),
        descriptor(kind="anonymous", name="[eventpoll]"),
        descriptor(kind="anonymous", name="[timerfd]"),
        descriptor(kind="socket", protocol="TCP"),
        descriptor(kind="socket", protocol="UNIX-STREAM"),
        descriptor(kind="character", name="/dev/null", device=(1, 3), flags=os.O_RDWR),
        descriptor(kind="character", name="/dev/urandom", device=(1, 9)),
        descriptor(kind="character", name="/dev/ptmx", device=(5, 2), flags=os.O_RDWR),
        descriptor(kind="character", name="/dev/pts/3", device=(136, 3), flags=os.O_RDWR),
    ],
)
def test_a_descriptor_that_does_not(used: OpenDescriptor) -> None:
    assert problems(process(used)) == {}


@pytest.mark.parametrize(
    ("used", "found"),
    [
        (mapping(), {}),
        (mapping(writable=True), {}),
        (mapping(name="/var/db/x", shared=True), {}),
        (mapping(name="/var/db/x", shared=True, writable=True), {"local files": "fail"}),
        (mapping(name="/srv/shared/x", shared=True, writable=True), {}),
        (mapping(name="/dev/shm/x", shared=True, writable=True), {"local files": "fail"}),
        (mapping(name="/dev/zero", shared=True, writable=True, deleted=True), {}),
        (mapping(name="/memfd:x", shared=True, writable=True, deleted=True), {}),
        (mapping(name="/[aio]", shared=True, writable=True, deleted=True), {"kernel AIO": "fail"}),
        (mapping(name="/dev/nvidia0", shared=True, writable=False), {"device memory": "fail"}),
        (mapping(name="/SYSV00000000", shared=True, writable=True, deleted=True), {"System V memory": "ok"}),
        (mapping(name="/anon_hugepage", writable=True, deleted=True), {"huge pages": "warn"}),
    ],
)
def test_mappings(used: MappedFile, found: dict[str, str]) -> None:
    assert problems(process(mappings=(used,))) == found


def test_what_is_excluded_stays_on_this_node() -> None:
    spec = msgspec.structs.replace(SPEC, files=(FilePath(path="/data"),), exclude=("/data/cache", "*.tmp"))
    for name, found in [("x", ""), ("cache/x", "fail"), ("deep/x.tmp", "fail"), ("deep/cache/x", "")]:
        used = process(descriptor(name=f"/data/{name}", flags=os.O_RDWR))
        told = {
            check.name: check
            for check in judge_tree(spec, TreeUse(processes=(used,), outside_peers=frozenset()))
        }
        assert (told["local files"].status if "local files" in told else "") == found
        assert not found or "without `exclude`" in told["local files"].hint


def test_a_unix_socket_to_the_outside_stands_in_the_way() -> None:
    used = process(descriptor(kind="socket", protocol="UNIX", inode=70))
    assert problems(used, outside_peers=frozenset({70})) == {"unix sockets": "fail"}


def test_a_debugger_stands_in_the_way() -> None:
    assert problems(process(tracer_pid=5)) == {"debugger": "fail"}


def test_namespaces_of_its_own_are_worth_a_warning() -> None:
    same = process(namespaces={"net": "net:[1]", "pid_for_children": "pid:[2]"})
    other = process(namespaces={"net": "net:[2]"})
    assert problems(process(), same) == {}
    assert problems(process(), other) == {"nested namespaces": "warn"}


def test_inotify_on_overlayfs_is_worth_a_warning() -> None:
    watching = descriptor(kind="anonymous", name="inotify", watched_devices=frozenset({(0, 50)}))
    assert problems(process(watching)) == {}
    assert problems(process(watching, overlay_devices=frozenset({(0, 50)}))) == {"inotify": "warn"}


def test_many_of_a_kind_are_one_check_with_the_first_few_named() -> None:
    used = process(*(descriptor(number=n, name=f"/var/{n}", flags=os.O_RDWR) for n in range(10)))
    (check,) = judge_tree(SPEC, TreeUse(processes=(used,)))[1:]
    assert "descriptor 0: /var/0" in check.detail
    assert check.detail.endswith("and 7 more")
    assert check.hint


def test_manual_takeovers_need_no_fence() -> None:
    (check,) = judge_fencing(NodeConfig(node=Node(name="a", address="::1")), SPEC)
    assert (check.name, check.status) == ("fencing", "ok")


def test_what_no_fence_covers_is_worth_a_warning() -> None:
    spec = msgspec.structs.replace(SPEC, nodes=("a", "b"), right_to_lead="fence")
    config = NodeConfig(node=Node(name="a", address="::1"))
    (check,) = judge_fencing(config, spec)
    assert check.status == "warn"
    assert "host loss of b: no automatic takeover" in check.detail
    every = ("host loss", "process failure", "partition")
    fence = Fence(node="b", command=("true",), covers=every)
    (check,) = judge_fencing(msgspec.structs.replace(config, fences=(fence,)), spec)
    assert check.status == "ok"


def test_nodes_that_are_no_peers_are_worth_a_warning() -> None:
    config = NodeConfig(
        node=Node(name="a", address="::1"), peers=(Peer(name="b", address="::2", public_key="k" * 40),)
    )
    assert judge_nodes(config, msgspec.structs.replace(SPEC, nodes=("a", "b"))) == []
    (check,) = judge_nodes(config, msgspec.structs.replace(SPEC, nodes=("a", "b", "c", "d")))
    assert (check.status, check.area) == ("warn", "redis")
    assert check.detail.startswith("c, d: ")
    assert check.hint


class TestNode:
    @pytest.fixture
    def config(self, tmp_path: Path) -> NodeConfig:
        (tmp_path / "run").mkdir(mode=0o700)
        keys.generate(tmp_path / "node.key")
        node = Node(
            name="a",
            address="127.0.0.1",
            key_file=str(tmp_path / "node.key"),
            state_dir=str(tmp_path / "state"),
            run_dir=str(tmp_path / "run"),
            criu="/nonexistent/criu",
        )
        return NodeConfig(node=node)

    async def status(self, config: NodeConfig) -> dict[str, Check]:
        return {check.name: check for check in (await run_doctor(config, None)).checks}

    async def test_a_missing_criu_fails_and_says_what_to_do(self, config: NodeConfig) -> None:
        check = (await self.status(config))["criu"]
        assert check.status == "fail"
        assert check.hint

    async def test_a_key_that_others_can_read_fails(self, config: NodeConfig) -> None:
        assert (await self.status(config))["key"].status == "ok"
        Path(config.node.key_file).chmod(0o644)
        assert (await self.status(config))["key"].status == "fail"

    async def test_a_run_directory_that_others_can_enter_fails(self, config: NodeConfig) -> None:
        assert (await self.status(config))["run_dir"].status == "ok"
        Path(config.node.run_dir).chmod(0o755)
        assert (await self.status(config))["run_dir"].status == "fail"

    async def test_terms_on_tmpfs_fail_and_a_volatile_store_warns(self, config: NodeConfig) -> None:
        node = msgspec.structs.replace(config.node, state_dir="/dev/shm/outlive-test")
        found = await self.status(msgspec.structs.replace(config, node=node))
        assert (found["state_dir"].status, found["store"].status) == ("fail", "warn")

    async def test_a_program_that_is_not_there_fails(self, config: NodeConfig) -> None:
        node = msgspec.structs.replace(config.node, runc="no-such-runc")
        found = await self.status(msgspec.structs.replace(config, node=node))
        assert found["no-such-runc"].status == "fail"

    async def test_peers_are_connected_to(self, config: NodeConfig) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            peer = Peer(name="b", address="127.0.0.1", public_key="k" * 40, agent_port=port)
            config = msgspec.structs.replace(config, peers=(peer,))
            assert (await self.status(config))["peer b"].status == "ok"
        assert (await self.status(config))["peer b"].status == "warn"

    @pytest.mark.parametrize(
        ("address", "status"),
        [("127.0.0.1", "ok"), ("::1", "ok"), ("192.0.2.1", "warn"), ("2001:db8::1", "warn")],
    )
    async def test_the_address_is_one_of_this_machine(
        self, config: NodeConfig, address: str, status: str
    ) -> None:
        node = msgspec.structs.replace(config.node, address=address)
        check = (await self.status(msgspec.structs.replace(config, node=node)))["address"]
        assert (check.status, bool(check.hint)) == (status, status == "warn")

    @pytest.mark.parametrize(("interface", "status"), [("lo", "ok"), ("nosuch0", "warn"), ("", None)])
    async def test_the_interface_is_one_of_this_machine(
        self, config: NodeConfig, interface: str, status: str | None
    ) -> None:
        node = msgspec.structs.replace(config.node, vip_interface=interface)
        check = (await self.status(msgspec.structs.replace(config, node=node))).get("vip_interface")
        assert (check.status if check else None) == status

    async def test_every_fence_is_there_and_executable_and_none_is_run(
        self, config: NodeConfig, tmp_path: Path
    ) -> None:
        good, plain, mark = tmp_path / "good", tmp_path / "plain", tmp_path / "mark"
        for path in (good, plain):
            path.write_text(f"#!/bin/sh\ntouch {mark}\n")
        good.chmod(0o755)
        programs = {
            "good": good,
            "plain": plain,
            "gone": tmp_path / "gone",
            "bare": "no-such-fence",
            "sh": "sh",
        }
        fences = tuple(
            Fence(node="b", name=name, command=(str(program), "off")) for name, program in programs.items()
        )
        found = await self.status(msgspec.structs.replace(config, fences=fences))
        checks = {name: found[f"fence {name} of b"] for name in programs}
        assert {name: check.status for name, check in checks.items()} == {
            **{"good": "ok", "sh": "ok", "plain": "fail", "gone": "fail", "bare": "fail"}
        }
        assert "not an executable file" in checks["plain"].detail
        assert "does not exist" in checks["gone"].detail
        assert "not in PATH" in checks["bare"].detail
        assert all(check.hint for check in checks.values() if check.status == "fail")
        assert not mark.exists()

    async def test_a_program_that_is_not_in_the_root_fails_before_a_start_does(
        self, config: NodeConfig, tmp_path: Path
    ) -> None:
        root, program = tmp_path / "root", tmp_path / "root/opt/run"
        program.parent.mkdir(parents=True)
        (root / "bin").symlink_to("/opt")  # seen from inside it leads to the root's own /opt
        spec = WorkloadSpec(name="w", nodes=("a",), command=("run",), root=str(root))

        async def check(changed: WorkloadSpec) -> str:
            report = await run_doctor(msgspec.structs.replace(config, workloads=(changed,)), "w")
            found = [each.status for each in report.checks if (each.area, each.name) == ("w", "program")]
            return " ".join(found)

        assert await check(spec) == "fail"
        program.touch(mode=0o644)
        assert await check(spec) == "fail"
        program.chmod(0o755)
        assert await check(spec) == "ok"
        assert await check(msgspec.structs.replace(spec, command=("/opt/run",))) == "ok"
        assert (
            await check(msgspec.structs.replace(spec, command=("./run",), working_directory="/opt")) == "ok"
        )
        assert await check(msgspec.structs.replace(spec, command=("/opt",))) == "fail"
        assert await check(msgspec.structs.replace(spec, environment={"PATH": "/usr/bin"})) == "fail"
        assert await check(msgspec.structs.replace(spec, root=str(tmp_path / "gone"))) == "fail"
        assert await check(msgspec.structs.replace(spec, nodes=("b",))) == ""

    async def test_without_a_file_the_machine_is_checked_all_the_same(self, tmp_path: Path) -> None:
        report = await run_doctor_without_config(tmp_path / "node.toml")
        named = {check.name: check for check in report.checks}
        assert named["config"].status == "fail"
        assert {"kernel", "capabilities", "criu", "image_dir", "memory"} <= named.keys()
        assert {"key", "address", "keeper"}.isdisjoint(named)
        usual = (await run_doctor_without_config(DEFAULT_PATH)).checks[0]
        assert (usual.name, usual.status, bool(usual.hint)) == ("config", "warn", True)

    async def test_no_keeper_is_worth_a_warning(self, config: NodeConfig) -> None:
        assert (await self.status(config))["keeper"].status == "warn"

    async def test_a_workload_that_is_not_configured_is_refused(self, config: NodeConfig) -> None:
        with pytest.raises(ConfigError):
            await run_doctor(config, "nonesuch")

    async def test_a_report_is_json(self, config: NodeConfig) -> None:
        report = await run_doctor(msgspec.structs.replace(config, workloads=(SPEC,)), "redis")
        assert not report.fit
        assert msgspec.json.decode(msgspec.json.encode(report), type=DoctorReport) == report
        assert {check.area for check in report.checks} == {"node", "redis"}


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((3, 4, 23), "warn"),
        ((3, 4, 31), "ok"),
        ((3, 5, 0), "warn"),
        ((3, 5, 12), "warn"),
        ((3, 5, 13), "ok"),
        ((3, 6, 0), "ok"),
        ((), "warn"),
    ],
)
def test_an_etcd_that_may_end_a_renewed_lease_is_told(version: tuple[int, ...], status: str) -> None:
    check = judge_etcd("http://10.0.0.5:2379", version)
    assert (check.status, bool(check.hint)) == (status, status == "warn")
