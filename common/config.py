"""One TOML file a node: read, checked, and turned into values. Unknown keys are errors.

In: a path. Out: `NodeConfig`, or a ConfigError that names the key, what is wrong and what to write.
`docs/reference/config.md` documents every key; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
import tomllib
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from common import excludes
from common.errors import ConfigError
from common.host_key import parse_host_key
from common.model import NAME_PATTERN, HealthCheck, WorkloadSpec

DEFAULT_PATH = Path("/etc/outlive/node.toml")

_RELATIVE = "a relative one depends on where a process was started"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; a key that it does not know is refused."""


class Node(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[node]`: who this node is and where it keeps things."""

    name: str
    address: str
    """IP address that agent and keeper listen on and that peers connect to."""
    agent_port: int = 7701
    keeper_port: int = 7702
    key_file: str = "/etc/outlive/node.key"
    """CURVE secret key as `outlive keys generate` writes it; mode 0600."""
    state_dir: str = "/var/lib/outlive"
    """Terms, roles, bundles, history. Always a disk."""
    run_dir: str = "/run/outlive"
    """Sockets, pid files."""
    image_dir: str = "/dev/shm/outlive"  # noqa: S108 - a tmpfs on purpose; made with mode 0700
    """Where checkpoints are written before they are sent; a tmpfs."""
    vip_interface: str = ""
    """The interface that virtual addresses are added to; needed if a workload has one."""
    criu: str = ""
    """Path of the criu program; empty: found by itself."""
    runc: str = "runc"
    conmon: str = "conmon"
    cgroup_parent: str = "/outlive"
    agent_cpu: Literal["spare", "fair"] = "spare"
    """`spare`: the agent leaves the processors to others, but for freezes and epochs that are overdue."""
    boot_id_file: str = "/proc/sys/kernel/random/boot_id"


class Store(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[store]`: where received epochs are kept."""

    directory: str = ""
    """Empty: `store` below `state_dir`."""
    encryption: Literal["none", "fscrypt"] = "none"
    """Whether the file system encrypts the directory."""
    encryption_key_file: str = ""
    """64 bytes as `outlive keys generate-store-key` makes them; mode 0600, not on the store's file system."""
    min_free_bytes: int = 512 * 1024 * 1024
    """An epoch that would leave less than this free is refused before it begins."""
    max_bytes: int = 0
    """So is one that would let all stores together take more than this; 0: no bound."""
    max_levels: int = 8
    """Longest chain of images that a restore may have to read."""
    fold_mib_per_s: float = 256.0
    """How fast chains are shortened in the background at most; 0: as fast as it goes."""


class Capture(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[capture]`: how this node takes epochs of the workloads that it runs."""

    backend: Literal["auto", "stock"] = "auto"
    """`auto`: memory is copied while the workload runs, where kernel and CRIU allow it."""
    verify_epochs: int = 500
    """In how many epochs all pages are compared with what is believed, and stored, of them; 0: never."""
    tracker: Literal["auto", "userfaultfd", "soft-dirty", "none"] = "auto"
    """How `auto` finds out what is written meanwhile; `auto` again: the first of them that the kernel has."""


class Heartbeat(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[heartbeat]`: how often keepers speak and how long silence may last."""

    interval_ms: int = 50
    suspect_after_ms: int = 300


class Peer(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[peers]]`: another node that may connect, and nobody else may."""

    name: str
    address: str
    public_key: str
    """Z85 text, 40 characters, as `outlive keys show` prints it."""
    also_public_keys: tuple[str, ...] = ()
    """Keys that count too, while the peer changes from one to the next."""
    agent_port: int = 7701
    keeper_port: int = 7702
    max_mib_per_s: float = 0.0
    """Most that epochs may take of the line to this peer; 0: as much as it gives."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All public keys by which the peer may be known."""
        return (self.public_key, *self.also_public_keys)


class SshFence(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[fences.ssh]`: where the node is asked by SSH to let itself be fenced."""

    host: str
    """Its IP address."""
    port: int = 22
    user: str = "root"
    key_file: str
    """Private key without a passphrase; mode 0600."""
    host_key: str
    """The only public key that the host may have, as its `/etc/ssh/ssh_host_*_key.pub` has it."""
    command: tuple[str, ...] = ("outlive",)
    """The program there, and what stands before its verb."""


class Fence(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[fences]]`: one way to make sure that a peer is off. Tried in the order of the file.

    Either `command`, which exits 0 when the node is confirmed off, 1 when it refuses, anything else (or the
    time-out) when it does not know; or `ssh`.
    """

    node: str
    command: tuple[str, ...] = ()
    ssh: SshFence | None = None
    name: str = ""
    """What reasons and timelines call it; empty: the program's name, or the SSH address."""
    timeout_ms: int = 10_000
    covers: tuple[str, ...] | None = None
    """In which failures of the node the method can confirm; for `doctor` to say. It decides nothing.

    None: all of them for a command; by SSH only those in which the host lives.
    """

    @property
    def covered(self) -> tuple[str, ...]:
        """The failures in which the method can confirm."""
        if self.covers is not None:
            return self.covers
        every = ("process failure", "host loss", "partition")
        return every if self.ssh is None else ("process failure",)

    @property
    def label(self) -> str:
        """What reasons and timelines call the method."""
        if self.name:
            return self.name
        return self.command[0].rsplit("/", 1)[-1] if self.ssh is None else f"ssh to {self.ssh.host}"


class FreezeHook(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[freeze_hooks]]`: commands that this node runs around each epoch of a workload, as it leads it.

    Exit status 0 is success; anything else, or the time-out, costs the epoch.
    """

    workload: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Called as well if `before` or the epoch failed."""
    timeout_ms: int = 1000
    """Of each."""


class Etcd(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[etcd]`: who gives the right to lead workloads with `right_to_lead = "etcd"`."""

    endpoints: tuple[str, ...] = ()
    """Client URLs of its members, by IP address: `https://10.0.0.5:2379`."""
    ca_file: str = ""
    """Who signs the certificates of its members (PEM); needed with https, and nobody else is believed."""
    cert_file: str = ""
    key_file: str = ""
    """This node's own certificate and its key (PEM), if etcd asks for one."""
    user: str = ""
    password_file: str = ""
    """As whom this node logs in, if etcd's authentication is on; a file with the password alone."""
    ttl_s: int = 3
    """Time to live of a lease: how long a leader that is lost keeps the right, at least. Whole seconds, 2 or
    more."""
    margin_ms: int = 500
    """How long before a lease can be over the workload stands still."""
    clock_drift_ppm: int = 1000
    """How much slower than etcd's this node's clock may run."""
    watchdog: str = ""
    """A watchdog device, which resets the host if nothing could freeze the workload; empty: none."""


class NodeConfig(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    node: Node
    store: Store = Store()
    capture: Capture = Capture()
    heartbeat: Heartbeat = Heartbeat()
    peers: tuple[Peer, ...] = ()
    fences: tuple[Fence, ...] = ()
    freeze_hooks: tuple[FreezeHook, ...] = ()
    etcd: Etcd = Etcd()
    workloads: tuple[WorkloadSpec, ...] = ()

    @property
    def store_dir(self) -> Path:
        """Where received epochs lie."""
        return Path(self.store.directory) if self.store.directory else Path(self.node.state_dir) / "store"

    @property
    def runc_root(self) -> Path:
        """Runc's own state; below the run directory, gone after a boot as it should be."""
        return Path(self.node.run_dir) / "runc"

    @property
    def agent_endpoint(self) -> str:
        """The local socket of the agent."""
        return f"ipc://{self.node.run_dir}/agent.sock"

    @property
    def keeper_endpoint(self) -> str:
        """The local socket of the keeper."""
        return f"ipc://{self.node.run_dir}/keeper.sock"

    def peer(self, name: str) -> Peer | None:
        """Return the peer of that name, if it is configured."""
        return next((peer for peer in self.peers if peer.name == name), None)


def load_config(path: Path) -> NodeConfig:
    """Read and check the file at `path`. Raises ConfigError and nothing else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration at {path}",
            hint="give --config PATH, or write one: docs/reference/config.md has a whole example",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse_config(text, origin=str(path))


def parse_config(text: str, *, origin: str) -> NodeConfig:
    """Turn TOML into a checked configuration. `origin` names the source in errors (ConfigError)."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not TOML: {error}") from error
    try:
        config = msgspec.convert(tables, NodeConfig)
    except msgspec.ValidationError as error:
        from common.config_keys import unknown_key  # the keeper stays small while its file is good

        problem = unknown_key(tables, NodeConfig) or error
        raise ConfigError(f"{origin}: {problem}", hint="docs/reference/config.md lists every key") from error
    for problem in _problems(config):
        raise ConfigError(f"{origin}: {problem}", hint="docs/reference/config.md lists every key")
    return config


def _problems(config: NodeConfig) -> list[str]:
    """What the types alone do not catch, one sentence each."""
    found: list[str] = []
    node_names = [config.node.name, *(peer.name for peer in config.peers)]
    for name in node_names:
        if not NAME_PATTERN.match(name):
            found.append(f"node name {name!r}: use a-z, 0-9 and '-', at most 32 characters")
    found += [
        f"node name {name!r} is used twice: nodes are told apart by it, so give each its own"
        for name in sorted(_repeated(node_names))
    ]
    keys = [key for peer in config.peers for key in peer.keys]
    found += [
        f"public key {key!r} stands there twice: write for each peer what `outlive keys show` prints there"
        for key in sorted(_repeated(keys))
    ]
    for peer in config.peers:
        if any(len(key) != 40 for key in peer.keys):
            found.append(f"peer {peer.name!r}: public_key and also_public_keys: 40 characters of Z85 each")
    for owner, node in _nodes(config):
        if not _is_address(node.address):
            found.append(f"{owner}: address {node.address!r} is not an IP address")
    found += _port_problems(config)
    found += _path_problems(config)
    if config.capture.backend == "stock" and config.capture.tracker != "auto":
        found.append(
            f'capture.tracker = "{config.capture.tracker}": the stock backend tracks nothing, so write '
            'backend = "auto" too, or leave it out'
        )
    if config.heartbeat.interval_ms < 5:
        found.append("heartbeat.interval_ms: at least 5")
    if config.heartbeat.suspect_after_ms < 3 * config.heartbeat.interval_ms:
        found.append(
            "heartbeat.suspect_after_ms: at least three times interval_ms, or one lost beat is a failure"
        )
    if config.capture.verify_epochs < 0:
        found.append("capture.verify_epochs: 0 for no verification, or more")
    if config.store.max_bytes < 0:
        found.append("store.max_bytes: 0 for no bound, or more")
    if config.store.max_levels < 2:
        found.append("store.max_levels: at least 2")
    if config.store.fold_mib_per_s < 0:
        found.append("store.fold_mib_per_s: 0 for no bound, or more")
    found += [
        f"peer {peer.name!r}: max_mib_per_s is 0 for no bound, or more"
        for peer in config.peers
        if peer.max_mib_per_s < 0
    ]
    if (config.store.encryption == "none") == bool(config.store.encryption_key_file):
        found.append('store.encryption_key_file: it belongs to store.encryption = "fscrypt", and that to it')
    found += [f"etcd.{text}" for text in _etcd_problems(config.etcd)]
    found += [
        f"workload {workload.name!r}: its right_to_lead is etcd, so etcd.endpoints is needed"
        for workload in config.workloads
        if workload.right_to_lead == "etcd" and not config.etcd.endpoints
    ]
    known = set(node_names)
    for fence in config.fences:
        if fence.node not in known:
            found.append(f"fences: no node is called {fence.node!r}")
        found += [f"fences, node {fence.node!r}: {text}" for text in _fence_problems(fence)]
    hooked = [hook.workload for hook in config.freeze_hooks]
    found += [f"freeze_hooks: {name!r} has several: give it one" for name in sorted(_repeated(hooked))]
    for hook in config.freeze_hooks:
        found += [f"freeze_hooks, workload {hook.workload!r}: {text}" for text in _hook_problems(hook)]
    names = [workload.name for workload in config.workloads]
    found += [f"workload {name!r} is declared twice" for name in sorted(_repeated(names))]
    vips = [workload.vip.partition("/")[0] for workload in config.workloads if workload.vip]
    found += [f"vip {vip} belongs to two workloads: give each its own" for vip in sorted(_repeated(vips))]
    for workload in config.workloads:
        about = [*workload_problems(workload, known), *_vip_problems(config, workload)]
        found += [f"workload {workload.name!r}: {text}" for text in about]
    return found


def _etcd_problems(etcd: Etcd) -> Iterator[str]:
    for endpoint in etcd.endpoints:
        if not _is_endpoint(endpoint):
            yield (
                f"endpoints: {endpoint!r} is not a URL of the form https://ADDRESS:PORT, with an IP address: "
                "looking up a name may take longer than a lease lives"
            )
    if repeated := sorted(_repeated(list(etcd.endpoints))):
        yield f"endpoints: {repeated[0]!r} stands there twice"
    if len({endpoint.partition(":")[0] for endpoint in etcd.endpoints}) > 1:
        yield "endpoints: some are http and some https: whoever reads one of them reads the password"
    if (tls := any(each.startswith("https:") for each in etcd.endpoints)) != bool(etcd.ca_file):
        yield "ca_file: it belongs to endpoints with https, and those to it"
    if bool(etcd.cert_file) != bool(etcd.key_file) or (etcd.cert_file and not tls):
        yield "cert_file and key_file: they belong together, and to endpoints with https"
    if bool(etcd.user) != bool(etcd.password_file):
        yield "user and password_file: they belong together"
    for key in ("ca_file", "cert_file", "key_file", "password_file"):
        path = getattr(etcd, key)
        if path and not path.startswith("/"):
            yield f"{key} {path!r} must be an absolute path: {_RELATIVE}"
    if etcd.ttl_s < 2:
        yield f"ttl_s {etcd.ttl_s}: at least 2, etcd grants no shorter lease"
    if etcd.margin_ms < 200:
        yield f"margin_ms {etcd.margin_ms}: at least 200, to notice and to freeze within"
    if not 0 <= etcd.clock_drift_ppm <= 50_000:
        yield f"clock_drift_ppm {etcd.clock_drift_ppm}: between 0 and 50000 (5 %)"
    if etcd.margin_ms > etcd.ttl_s * 400:
        yield (
            f"margin_ms {etcd.margin_ms} is more than two fifths of ttl_s ({etcd.ttl_s} s), which leaves no "
            "time for a renewal that takes long: lower it or raise ttl_s"
        )
    if etcd.watchdog and not etcd.watchdog.startswith("/"):
        yield f"watchdog {etcd.watchdog!r} must be an absolute path: {_RELATIVE}"
    if etcd.watchdog and etcd.ttl_s < 4:
        yield f"watchdog: it counts whole seconds, so ttl_s must be at least 4 (it is {etcd.ttl_s})"


def _is_endpoint(text: str) -> bool:
    try:
        url = urlsplit(text)
        well = url.scheme in ("http", "https") and url.port is not None and _is_port(url.port)
    except ValueError:
        return False
    rest = url.path.rstrip("/") + url.query + url.fragment + (url.username or "")
    return well and not rest and _is_address(url.hostname or "")


def _fence_problems(fence: Fence) -> Iterator[str]:
    if fence.timeout_ms < 1:
        yield "timeout_ms: at least 1"
    ssh = fence.ssh
    if ssh is None:
        yield from _command_problems("command", fence.command, on_node=True)
        return
    if fence.command:
        yield "give command or ssh, not both: each method is a [[fences]] block of its own"
    if "host loss" in fence.covered:
        yield 'covers: not "host loss": a host that is lost answers no ssh, so that stays unknown'
    if not _is_address(ssh.host):
        yield f"ssh.host {ssh.host!r} is not an IP address"
    if not _is_port(ssh.port):
        yield f"ssh.port {ssh.port} is not a TCP port: between 1 and 65535"
    if not ssh.key_file.startswith("/"):
        yield f"ssh.key_file {ssh.key_file!r} must be an absolute path: {_RELATIVE}"
    try:
        parse_host_key(ssh.host_key)
    except ValueError as error:
        yield f"ssh.host_key {error}: write what /etc/ssh/ssh_host_ed25519_key.pub on {fence.node} holds"
    yield from _command_problems("ssh.command", ssh.command, on_node=True)


def _hook_problems(hook: FreezeHook) -> Iterator[str]:
    if not hook.before and not hook.after:
        yield "neither before nor after is given: name at least one command"
    for label in ("before", "after"):
        if command := getattr(hook, label):
            yield from _command_problems(label, command, on_node=True)
    if hook.timeout_ms < 1:
        yield "timeout_ms: at least 1"


def _nodes(config: NodeConfig) -> list[tuple[str, Node | Peer]]:
    """Return this node and its peers, each with what it is called in a sentence."""
    return [("node", config.node), *((f"peer {peer.name!r}", peer) for peer in config.peers)]


def _port_problems(config: NodeConfig) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for owner, node in _nodes(config):
        for key, port in (("agent_port", node.agent_port), ("keeper_port", node.keeper_port)):
            mine = f"{owner}: {key}"
            if not _is_port(port):
                yield f"{mine} {port} is not a TCP port: between 1 and 65535"
            other = taken.setdefault((_canonical(node.address), port), mine)
            if other != mine:
                where = f"{node.address} port {port}"
                yield f"{mine} is {where}, which {other} is too, and one process listens there: change one"


def _path_problems(config: NodeConfig) -> Iterator[str]:
    node = config.node
    paths = {
        "node.key_file": node.key_file,
        "node.state_dir": node.state_dir,
        "node.run_dir": node.run_dir,
        "node.image_dir": node.image_dir,
        "node.cgroup_parent": node.cgroup_parent,
        "node.boot_id_file": node.boot_id_file,
    }
    optional = {
        "node.criu": node.criu,
        "store.directory": config.store.directory,
        "store.encryption_key_file": config.store.encryption_key_file,
    }
    for key, path in (paths | {key: path for key, path in optional.items() if path}).items():
        if not path.startswith("/"):
            yield f"{key} {path!r} must be an absolute path: {_RELATIVE}"
    for key, program in (("node.runc", node.runc), ("node.conmon", node.conmon)):
        if not program or _is_relative_program(program):
            yield f"{key} {program!r} must be a program's name or its absolute path: {_RELATIVE}"


def _vip_problems(config: NodeConfig, workload: WorkloadSpec) -> Iterator[str]:
    """Say what is wrong between a workload's virtual address and the nodes."""
    if workload.vip is None:
        return
    if not config.node.vip_interface:
        yield "it has a vip, so node.vip_interface is needed"
    for owner, node in _nodes(config):
        if _canonical(workload.vip.partition("/")[0]) == _canonical(node.address):
            yield (
                f"vip {workload.vip!r} is the address of {owner}, which would move away with the workload: "
                "choose one that no node has"
            )


def workload_problems(spec: WorkloadSpec, known_nodes: set[str]) -> list[str]:
    """Return what is wrong with a workload, one sentence each; empty if nothing is."""
    found: list[str] = []
    if not NAME_PATTERN.match(spec.name):
        found.append("name: use a-z, 0-9 and '-', at most 32 characters")
    found += _command_problems("command", spec.command, on_node=False)
    if not spec.nodes:
        found.append("nodes is empty: name at least the node that runs it")
    found += [
        f"nodes: {name!r} is neither this node nor a peer" for name in spec.nodes if name not in known_nodes
    ]
    found += [f"nodes: {name!r} stands there twice" for name in sorted(_repeated(list(spec.nodes)))]
    for label, path in [("root", spec.root), ("working_directory", spec.working_directory)]:
        if not path.startswith("/"):
            found.append(f"{label} must be an absolute path")
    found += _file_problems(spec)
    parts = spec.user.split(":")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        found.append("user must be numeric: 'uid' or 'uid:gid'")
    if spec.vip is not None:
        try:
            if "/" not in spec.vip:
                raise ValueError
            ipaddress.ip_interface(spec.vip)
        except ValueError:
            found.append(f"vip {spec.vip!r} must be an address with its prefix length, e.g. 10.0.0.100/24")
    if spec.health is not None:
        found += _health_problems(spec.health)
    if spec.epoch_interval_ms and not 20 <= spec.epoch_interval_ms <= 3_600_000:
        found.append("epoch_interval_ms: between 20 and 3600000, or 0")
    if spec.freeze_deadline_ms < 100:
        found.append("freeze_deadline_ms: at least 100")
    if 0 < spec.rpo_ms < spec.epoch_interval_ms:
        found.append(
            f"rpo_ms {spec.rpo_ms} is less than epoch_interval_ms ({spec.epoch_interval_ms}), so it would "
            "never be met: raise it, or lower the interval"
        )
    if spec.rpo_ms < 0 or spec.max_takeover_lag_ms < 0:
        found.append("rpo_ms, max_takeover_lag_ms: 0 or more")
    return found


def _file_problems(spec: WorkloadSpec) -> Iterator[str]:
    for item in spec.files:
        if not item.path.startswith("/") or item.path == "/" or ".." in item.path.split("/"):
            yield f"files: {item.path!r} must be an absolute path below /"
        if item.source and not item.source.startswith("/"):
            yield f"files: source {item.source!r} must be an absolute path: {_RELATIVE}"
    yield from excludes.problems(spec)
    paths = [PurePosixPath(item.path) for item in spec.files]
    yield from (f"files: {path!r} stands there twice" for path in sorted(_repeated(list(map(str, paths)))))
    replicated = [path for path, item in zip(paths, spec.files, strict=True) if not item.shared]
    for inner, outer in permutations(replicated, 2):
        if outer in inner.parents:
            yield (
                f"files: {str(inner)!r} lies in {str(outer)!r}, and two replicated directories must not "
                "overlap: declare the outer one only"
            )


def _health_problems(health: HealthCheck) -> Iterator[str]:
    chosen = [health.tcp, health.http, health.command]
    if sum(choice is not None for choice in chosen) != 1:
        yield "health: give exactly one of tcp, http and command"
    if health.tcp is not None and not _is_port(health.tcp):
        yield f"health.tcp {health.tcp} is not a TCP port: between 1 and 65535"
    if health.http is not None:
        try:
            health.http_target()
        except ValueError as error:
            yield f"health.http: {error}: `:8080/health`, asked for at the workload's own address"
    if health.command is not None:
        yield from _command_problems("health.command", health.command, on_node=True)
    if not 1 <= health.timeout_ms <= health.grace_ms:
        yield (
            f"health.timeout_ms {health.timeout_ms} must be at least 1 and at most grace_ms "
            f"({health.grace_ms}), or the grace is over before one attempt is: lower it or raise grace_ms"
        )


def _command_problems(label: str, command: tuple[str, ...], *, on_node: bool) -> Iterator[str]:
    """Say what is wrong with a program and its arguments; in a container it may be a relative path."""
    if not command or not command[0]:
        yield f"{label} is empty: name at least a program"
    elif len(command[0].split()) > 1:
        try:
            first = shlex.split(command[0])
        except ValueError:  # a quote that is never closed
            first = command[0].split()
        words = json.dumps([*first, *command[1:]], ensure_ascii=False)
        yield f"{label} begins with {command[0]!r}, which no shell takes apart: split it, {words}"
    elif on_node and _is_relative_program(command[0]):
        yield f"{label} {command[0]!r} must be a program's name or its absolute path: {_RELATIVE}"


def _repeated(items: list[str]) -> set[str]:
    return {item for item in items if items.count(item) > 1}


def _is_relative_program(program: str) -> bool:
    """Whether it is a path that depends on the working directory; a bare name is looked up in PATH."""
    return "/" in program and not program.startswith("/")


def _is_port(number: int) -> bool:
    return 1 <= number <= 65535


def _canonical(address: str) -> str:
    """Return an IP address in its one usual spelling; what is none as it is."""
    return str(ipaddress.ip_address(address)) if _is_address(address) else address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
