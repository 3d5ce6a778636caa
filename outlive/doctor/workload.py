"""Judges what a workload uses: what CRIU cannot carry, what makes it not restorable, what makes it slower.

In: its declaration and a `TreeUse`. Out: checks. Pure.
What CRIU can't do is as read in CRIU 4.2's source (`files.c`, `sockets.c`, `file-lock.c`, `aio.c`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common.config import NodeConfig
from common.fencing import coverage
from common.inspection import OpenDescriptor, ProcessUse, TreeUse
from common.model import WorkloadSpec
from outlive.doctor.report import Check
from replica.readiness import closest, is_below, stays_on_node

_SOCKETS = {
    *("TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITE", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6"),
    *("UNIX", "UNIX-STREAM", "NETLINK", "PACKET"),
}
"""Protocols that CRIU dumps, as /proc/net/protocols names them."""

_ANONYMOUS_INODES = {
    "[eventfd]",
    "[eventpoll]",
    "[signalfd]",
    "[timerfd]",
    "inotify",
    "[fanotify]",
    "[pidfd]",
}
"""Types that CRIU dumps. BPF maps are in part; none is taken here."""

_MEMORY_DEVICES = {(1, minor) for minor in (3, 5, 7, 8, 9)}  # null, zero, full, random, urandom
_TERMINAL_MAJORS = {3, 4, 5, 136, 137, 138, 139, 140, 141, 142, 143}
_GHOST_LIMIT_BYTES = 1 << 20
"""CRIU's own default (`--ghost-limit`), which captures use: larger deleted files fail the dump."""

_SHOWN = 3


def judge_tree(spec: WorkloadSpec, tree: TreeUse) -> list[Check]:
    """Judge a live tree; the first check says how much was looked at, each other one is a problem."""
    found = [
        *_judge_each_descriptor(spec, tree),
        *_judge_mappings(spec, tree),
        *_judge_processes(tree),
    ]
    descriptors = sum(len(process.descriptors) for process in tree.processes)
    verdict = f"{len(tree.processes)} processes with {descriptors} open files"
    if not any(check.status == "fail" for check in found):
        verdict += "; nothing that rules out protection is in use now"
    return [
        Check(spec.name, "processes", "ok", verdict),
        *(Check(spec.name, check.name, check.status, check.detail, check.hint) for check in found),
    ]


def judge_fencing(config: NodeConfig, spec: WorkloadSpec) -> list[Check]:
    """Say for each way in which another node can fail whether a takeover would follow by itself."""
    sentences = coverage(config, spec)
    if spec.right_to_lead == "etcd":
        return [_judge_lease(config, spec, sentences)]
    if spec.right_to_lead == "manual" or not sentences:
        detail = "takeovers are manual: after a failure, `outlive failover` is needed"
        return [Check(spec.name, "fencing", "ok", detail)]
    covered = not any("no automatic takeover" in sentence for sentence in sentences)
    hint = "" if covered else "configure a power or cloud fence for the node: [[fences]]"
    return [Check(spec.name, "fencing", "ok" if covered else "warn", "; ".join(sentences), hint)]


def _judge_lease(config: NodeConfig, spec: WorkloadSpec, sentences: list[str]) -> Check:
    """Say what a lease in etcd covers, and what it costs."""
    etcd = config.etcd
    if not etcd.endpoints:
        detail = "its right to lead is a lease in etcd, and no etcd is configured here: this node never leads"
        return Check(spec.name, "lease", "warn", detail, "give etcd.endpoints in this node's file")
    frozen_s = etcd.ttl_s * (1 - etcd.clock_drift_ppm / 1e6) - etcd.margin_ms / 1000
    detail = (
        f"{'; '.join(sentences)}; a leader that does not reach etcd freezes the workload after "
        f"{frozen_s:.1f} s; a keeper that hangs is covered by the guard beside it"
    )
    if not etcd.watchdog:
        detail += "; both at once are not: no etcd.watchdog"
    if len(etcd.endpoints) < 3:
        hint = "name all members of an etcd of three: one alone is a single point of failure"
        return Check(spec.name, "lease", "warn", detail, hint)
    return Check(spec.name, "lease", "ok", detail)


def judge_nodes(config: NodeConfig, spec: WorkloadSpec) -> list[Check]:
    """Warn of nodes of the workload that this node does not know: its declaration may be a peer's."""
    unknown = [name for name in spec.nodes if name != config.node.name and config.peer(name) is None]
    if not unknown:
        return []
    detail = (
        f"{', '.join(unknown)}: no peer of {config.node.name} is called so, so nothing reaches it from here"
    )
    return [Check(spec.name, "nodes", "warn", detail, "add a [[peers]] block, or correct `nodes`")]


def _judge_each_descriptor(spec: WorkloadSpec, tree: TreeUse) -> Iterable[Check]:
    def every(matches: Callable[[OpenDescriptor], bool]) -> str:
        return _list(
            f"{process.name} ({process.pid}) {_shown(descriptor)}"
            for process in tree.processes
            for descriptor in process.descriptors
            if matches(descriptor)
        )

    if using := every(lambda d: d.name == "[io_uring]"):
        yield _fail(
            "io_uring", f"CRIU cannot dump io_uring: {using}", "switch the program to epoll or threads"
        )
    if using := every(lambda d: d.name == "[userfaultfd]"):
        yield _fail("userfaultfd", f"CRIU cannot dump userfaultfd: {using}", "switch this feature off")
    others = {*_ANONYMOUS_INODES, "[io_uring]", "[userfaultfd]"}
    if using := every(lambda d: d.kind == "anonymous" and d.name not in others):
        yield _fail("kernel objects", f"CRIU cannot dump {using}", "switch off what uses them")
    if using := every(lambda d: d.kind == "socket" and d.protocol not in _SOCKETS):
        yield _fail(
            "sockets", f"CRIU cannot dump sockets of this kind: {using}", "use TCP, UDP or unix sockets"
        )
    if using := every(lambda d: d.kind == "socket" and d.inode in tree.outside_peers):
        yield _fail(
            "unix sockets",
            f"connected with a process outside the workload, which CRIU refuses: {using}",
            "talk over TCP, or move the other process into the workload (syslog: log to standard output)",
        )
    if using := every(lambda d: d.kind == "block" or (d.kind == "character" and not _is_known_device(d))):
        yield _fail(
            "devices", f"a device's state cannot be carried to another node: {using}", "do without it"
        )
    # Where files are replicated their locks are dumped; which of them a restore would lose, each epoch tells.
    locks_travel = any(not item.shared for item in spec.files)
    if not locks_travel and (using := every(lambda d: bool(d.locks))):
        yield _fail(
            "file locks",
            f"CRIU refuses to dump a process that holds a file lock: {using}",
            "declare the directory of its files in `files` of the workload, or let it lock by other means",
        )
    if using := every(lambda d: d.kind == "regular" and d.deleted and _is_lost(spec, d)):
        yield _fail(
            "deleted files",
            f"open, deleted, and above {_GHOST_LIMIT_BYTES >> 20} MiB, or known by another name (where files "
            f"are not replicated): {using}",
            "close them, or use memfd",
        )
    if using := every(
        lambda d: d.writable and d.kind == "regular" and _is_local_data(spec, d.name, d.deleted)
    ):
        yield _not_restorable("open for writing", using)
    if using := every(lambda d: d.direct and d.kind in {"regular", "block"}):
        yield Check(
            "",
            "direct I/O",
            "warn",
            f"O_DIRECT works and makes captures slower: {using}",
            "buffered I/O, if any",
        )
    for process in tree.processes:
        if any(descriptor.watched_devices & process.overlay_devices for descriptor in process.descriptors):
            yield Check(
                "",
                "inotify",
                "warn",
                f"{process.name} ({process.pid}) watches files on overlayfs; CRIU before 4.3 may not dump it",
                "let it poll, or watch a bind mount",
            )


def _judge_mappings(spec: WorkloadSpec, tree: TreeUse) -> Iterable[Check]:
    mapped = [(process, mapping) for process in tree.processes for mapping in process.mappings]

    def those(matching: Iterable[tuple[ProcessUse, str]]) -> str:
        return _list(f"{process.name} ({process.pid}) {name}" for process, name in matching)

    if using := those((p, m.name) for p, m in mapped if m.name == "/[aio]"):
        yield _fail(
            "kernel AIO",
            f"a request in flight at a capture would never complete after a restore: {using}",
            "switch it to another way of doing I/O (MySQL: innodb_use_native_aio=OFF)",
        )
    devices = ("/dev/zero", "/dev/shm")  # noqa: S108 - names seen in mappings, nothing is written
    if using := those(
        (p, m.name)
        for p, m in mapped
        if m.name.startswith("/dev/") and not any(is_below(m.name, known) for known in devices)
    ):
        yield _fail(
            "device memory", f"mapped devices cannot be carried to another node: {using}", "do without"
        )
    if using := those(
        (p, m.name)
        for p, m in mapped
        if m.shared and m.writable and not m.deleted and _is_local_data(spec, m.name, m.deleted)
    ):
        yield _not_restorable("mapped as writable shared memory", using)
    if using := those((p, m.name) for p, m in mapped if m.name.startswith("/SYSV")):
        detail = f"System V shared memory works and is dumped whole each time: {using}"
        yield Check("", "System V memory", "ok", detail)
    if using := those((p, m.name) for p, m in mapped if "anon_hugepage" in m.name or "hugetlb" in m.name):
        detail = f"huge pages are used: {using}"
        yield Check("", "huge pages", "warn", detail, "reserve as many on every node (vm.nr_hugepages)")


def _judge_processes(tree: TreeUse) -> Iterable[Check]:
    for process in tree.processes:
        if process.tracer_pid:
            yield _fail(
                "debugger",
                f"{process.name} ({process.pid}) is traced by process {process.tracer_pid}, so CRIU cannot",
                "end the debugger",
            )
    first = tree.processes[0].namespaces if tree.processes else {}
    for process in tree.processes[1:]:
        own = sorted(
            kind
            for kind, identity in process.namespaces.items()
            if identity != first.get(kind) and not kind.endswith("_for_children")
        )
        if own:
            yield Check(
                "",
                "nested namespaces",
                "warn",
                f"{process.name} ({process.pid}) has its own {', '.join(own)}; CRIU supports this in part",
                "try it: outlive protect, then look at `status` for captures that fail",
            )
    if filtered := _list(f"{p.name} ({p.pid})" for p in tree.processes if p.seccomp_mode):
        yield Check("", "seccomp", "ok", f"seccomp is in use and CRIU carries it: {filtered}")


def _is_known_device(descriptor: OpenDescriptor) -> bool:
    return descriptor.device in _MEMORY_DEVICES or descriptor.device[0] in _TERMINAL_MAJORS


def _is_lost(spec: WorkloadSpec, descriptor: OpenDescriptor) -> bool:
    """Tell whether a file without its name is more than CRIU carries in its images.

    If it has another name, CRIU makes one more beside the lost one, which an epoch has if that is replicated.
    """
    if descriptor.name.startswith(("/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage")):
        return False
    if descriptor.links > 0:
        name = descriptor.name.removesuffix(" (deleted)")
        declared = closest(spec, name)
        return declared is None or declared.shared or stays_on_node(spec, name)
    return descriptor.size_bytes > _GHOST_LIMIT_BYTES


def _is_local_data(spec: WorkloadSpec, name: str, deleted: bool) -> bool:
    """Tell whether what is written there stays on this node; what is deleted travels with the epochs."""
    if deleted or any(is_below(name, directory) for directory in ("/proc", "/sys")):
        return False
    return stays_on_node(spec, name)


def _not_restorable(how: str, using: str) -> Check:
    return _fail(
        "local files",
        f"not restorable: {how}, outside of the directories that are replicated: {using}",
        "declare their directory in `files` of the workload, without `exclude` for them; or (a log) write to "
        "standard output",
    )


def _fail(name: str, detail: str, hint: str) -> Check:
    return Check("", name, "fail", detail, hint)


def _shown(descriptor: OpenDescriptor) -> str:
    what = descriptor.protocol if descriptor.kind == "socket" else descriptor.name
    return f"descriptor {descriptor.number}: {what or 'of an unknown kind'}"


def _list(items: Iterable[str]) -> str:
    """Name the first few, and how many more there are; empty for none."""
    found = list(dict.fromkeys(items))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
