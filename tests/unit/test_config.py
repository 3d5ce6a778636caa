"""The node's file: what is refused, and in which words."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import load_config, parse_config
from common.errors import ConfigError
from common.model import WorkloadSpec

NODE = '[node]\nname = "a"\naddress = "10.0.0.1"\n'
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
PEER = f'[[peers]]\nname = "b"\naddress = "10.0.0.2"\npublic_key = "{KEY}"\n'
OTHER = PEER.replace('"b"', '"c"').replace("10.0.0.2", "10.0.0.3").replace("rq:", "xq:")
NODE_PATHS = ("key_file", "state_dir", "run_dir", "image_dir", "cgroup_parent", "boot_id_file")
NODE_PATHS += ("criu", "runc", "conmon")
FENCE = '[[fences]]\nnode = "a"\ncommand = {}\n'
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGk3b1+Yz0aMX1FzPpNf2qZb1Hn2bCqVpTtWQnq0Z3wL"
SSH = f'[fences.ssh]\nhost = "127.0.0.1"\nkey_file = "/k"\nhost_key = "{HOST_KEY}"\n'
SSH_FENCE = '[[fences]]\nnode = "a"\n' + SSH
VIP = 'vip_interface = "eth0"\n'
WORKLOAD = '[[workloads]]\nname = "w"\nnodes = ["a"]\ncommand = ["true"]\n'


def test_two_lines_are_a_node() -> None:
    config = parse_config(NODE, origin="x")
    assert config.store_dir == Path("/var/lib/outlive/store")
    assert config.agent_endpoint == "ipc:///run/outlive/agent.sock"
    assert config.keeper_endpoint == "ipc:///run/outlive/keeper.sock"
    assert config.runc_root == Path("/run/outlive/runc")


def test_a_fence_by_ssh_covers_what_leaves_the_host_alive_and_a_command_covers_all() -> None:
    (by_ssh,) = parse_config(NODE + SSH_FENCE, origin="x").fences
    assert by_ssh.covered == ("process failure",)
    assert by_ssh.label == "ssh to 127.0.0.1"
    (command,) = parse_config(NODE + FENCE.format('["/usr/sbin/off"]'), origin="x").fences
    assert command.covered == ("process failure", "host loss", "partition")
    assert command.label == "off"
    wider = SSH_FENCE.replace("\n[", '\ncovers = ["process failure", "partition"]\n[')
    (chosen,) = parse_config(NODE + wider, origin="x").fences
    assert chosen.covered == ("process failure", "partition")


def test_peers_are_found_by_name() -> None:
    config = parse_config(NODE + PEER, origin="x")
    found = config.peer("b")
    assert found is not None
    assert found.address == "10.0.0.2"
    assert config.peer("c") is None


def test_a_missing_file_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "none.toml")
    assert "there is no configuration" in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[node"])
def test_what_cannot_be_read_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "node"),
        (NODE + "colour = 1\n", "colour"),
        (NODE + "[color]\n", "color"),
        (NODE + WORKLOAD + "[workloads.health]\ntpc = 1\n", "tpc"),
        (NODE + 'agent_port = "7701"\n', r"\$.node.agent_port"),
        ('[node]\nname = "A b"\naddress = "10.0.0.1"\n', "node name 'A b'"),
        ('[node]\nname = "a"\naddress = "localhost"\n', "'localhost' is not an IP address"),
        (NODE + PEER.replace('"b"', '"a"'), "'a' is used twice"),
        (NODE + PEER + PEER.replace('"b"', '"c"'), "stands there twice"),
        (NODE + PEER.replace(KEY, "short"), "40 characters"),
        (NODE + "[heartbeat]\ninterval_ms = 1\n", "heartbeat.interval_ms"),
        (NODE + "[heartbeat]\ninterval_ms = 200\n", "three times"),
        (NODE + "[store]\nmax_levels = 1\n", "store.max_levels"),
        (NODE + "[etcd]\nttl_s = 1\n", "etcd.ttl_s 1: at least 2"),
        (NODE + "[etcd]\nttl_s = 2.5\n", "int"),
        (NODE + "[etcd]\nmargin_ms = 100\n", "etcd.margin_ms 100: at least 200"),
        (NODE + "[etcd]\nttl_s = 2\nmargin_ms = 900\n", "more than two fifths of ttl_s"),
        (NODE + "[etcd]\nclock_drift_ppm = 60000\n", "etcd.clock_drift_ppm 60000: between"),
        (NODE + '[etcd]\nwatchdog = "watchdog"\n', "etcd.watchdog 'watchdog' must be an absolute"),
        (NODE + '[etcd]\nwatchdog = "/dev/watchdog"\n', "ttl_s must be at least 4"),
        *(
            (NODE + f'[etcd]\nendpoints = ["{url}"]\n', "is not a URL of the form")
            for url in (
                "10.0.0.5:2379",
                "ftp://10.0.0.5:2379",
                "http://etcd:2379",
                "https://10.0.0.5",
                "http://[f0::5:2",
            )
        ),
        (NODE + '[etcd]\nendpoints = ["https://10.0.0.5:2379"]\n', "etcd.ca_file: it belongs to"),
        (
            NODE + '[etcd]\nendpoints = ["http://10.0.0.5:2379"]\nca_file = "/ca"\n',
            "etcd.ca_file: it belongs",
        ),
        (
            NODE + '[etcd]\nendpoints = ["https://10.0.0.5:1", "http://10.0.0.6:1"]\nca_file = "/ca"\n',
            "some are http and some https",
        ),
        (
            NODE + '[etcd]\nendpoints = ["https://10.0.0.5:1"]\nca_file = "/ca"\ncert_file = "/c"\n',
            "cert_file and key_file: they belong together",
        ),
        (NODE + '[etcd]\nuser = "outlive"\n', "user and password_file: they belong together"),
        (NODE + '[etcd]\nuser = "u"\npassword_file = "p"\n', "password_file 'p' must be an absolute path"),
        (
            NODE + '[etcd]\nendpoints = ["http://10.0.0.5:2379", "http://10.0.0.5:2379"]\n',
            "stands there twice",
        ),
        (
            NODE + '[[workloads]]\nname = "w"\nnodes = ["a"]\ncommand = ["x"]\nright_to_lead = "etcd"\n',
            "so etcd.endpoints is needed",
        ),
        (NODE + '[capture]\nbackend = "auto"\ntracker = "dirty"\n', "tracker"),
        (NODE + '[capture]\nbackend = "stock"\ntracker = "soft-dirty"\n', "capture.tracker"),
        (NODE + "[store]\nfold_mib_per_s = -1\n", "store.fold_mib_per_s"),
        (NODE + PEER + "max_mib_per_s = -0.5\n", "peer 'b': max_mib_per_s"),
        (NODE + '[[fences]]\nnode = "z"\ncommand = ["true"]\n', "no node is called 'z'"),
        (NODE + '[[fences]]\nnode = "a"\ncommand = []\n', "command is empty"),
        (NODE + '[[freeze_hooks]]\nworkload = "x"\n', "neither before nor after"),
        (NODE + '[[freeze_hooks]]\nworkload = "x"\nafter = ["./y"]\n', "after './y' must be"),
        (NODE + '[[freeze_hooks]]\nworkload = "x"\nafter = ["y"]\ntimeout_ms = 0\n', "at least 1"),
        (NODE + '[[freeze_hooks]]\nworkload = "x"\nafter = ["y"]\n' * 2, "has several"),
        *((NODE + f'{key} = "x/y"\n', f"node.{key} 'x/y' must be") for key in NODE_PATHS),
        (NODE + 'cgroup_parent = ""\n', "node.cgroup_parent '' must be an absolute path"),
        (NODE + 'runc = ""\n', "node.runc '' must be a program's name"),
        (NODE + '[store]\ndirectory = "x"\n', "store.directory 'x' must be an absolute path"),
        (NODE + FENCE.format('["./off"]'), "'./off' must be a program's name or its absolute path"),
        (NODE + FENCE.format('["off -f b"]'), r'split it, \["off", "-f", "b"\]'),
        (NODE + FENCE.format("""["off 'b c'"]"""), r'split it, \["off", "b c"\]'),
        (NODE + FENCE.format("""["off 'b c"]"""), "split it"),
        (NODE + FENCE.format('["off"]') + "timeout_ms = 0\n", "timeout_ms: at least 1"),
        (NODE + '[[fences]]\nnode = "a"\n', "command is empty"),
        (NODE + FENCE.format('["off"]') + SSH, "give command or ssh, not both"),
        (NODE + SSH_FENCE.replace("127.0.0.1", "host-a"), "ssh.host 'host-a' is not an IP address"),
        (NODE + SSH_FENCE + "port = 0\n", "ssh.port 0 is not a TCP port"),
        (NODE + SSH_FENCE.replace("/k", "k"), "ssh.key_file 'k' must be an absolute path"),
        (NODE + SSH_FENCE.replace(f'host_key = "{HOST_KEY}"\n', ""), "host_key"),
        (NODE + SSH_FENCE.replace(HOST_KEY, ""), "ssh.host_key is not a public key"),
        (NODE + SSH_FENCE.replace("ed25519", "dss"), "ssh.host_key is not a public key"),
        (NODE + SSH_FENCE.replace("ssh-ed25519", "ssh-rsa"), "ssh.host_key is cut off or altered"),
        (NODE + SSH_FENCE.replace(HOST_KEY, HOST_KEY[:30]), "ssh.host_key is cut off or altered"),
        (NODE + SSH_FENCE + "command = []\n", "ssh.command is empty"),
        (NODE + SSH_FENCE + "strict = false\n", "strict"),
        (
            NODE + SSH_FENCE.replace("\n[", '\ncovers = ["host loss"]\n['),
            "a host that is lost answers no ssh",
        ),
        (
            NODE + PEER.replace(".2", ".1"),
            "peer 'b': agent_port is 10.0.0.1 port 7701, which node: agent_port",
        ),
        (NODE + PEER + OTHER.replace(".3", ".2"), "peer 'c': agent_port .* peer 'b': agent_port is too"),
        (NODE + "agent_port = 7702\n", "keeper_port is 10.0.0.1 port 7702, which node: agent_port is too"),
        (NODE + PEER + "keeper_port = 7701\n", "peer 'b': keeper_port is 10.0.0.2 port 7701"),
        (NODE + "agent_port = 0\n", "agent_port 0 is not a TCP port"),
        (NODE + PEER + "keeper_port = 65536\n", "keeper_port 65536 is not a TCP port"),
        (NODE.replace("10.0.0.1", "fd00::1") + PEER.replace("10.0.0.2", "fd00:0::1"), "port 7701, which"),
        (NODE + WORKLOAD + WORKLOAD, "'w' is declared twice"),
        (NODE + WORKLOAD + 'vip = "10.0.0.9/24"\n', "vip_interface"),
        (
            NODE
            + VIP
            + WORKLOAD
            + 'vip = "10.0.0.9/24"\n'
            + WORKLOAD.replace('"w"', '"v"')
            + 'vip = "10.0.0.9/32"\n',
            "10.0.0.9 belongs to two workloads",
        ),
        (NODE + WORKLOAD.replace('["a"]', '["a", "q"]'), "'q' is neither this node nor a peer"),
        (NODE + WORKLOAD.replace('["a"]', '["a", "a"]'), "twice"),
        (NODE + WORKLOAD.replace('["a"]', "[]"), "nodes is empty"),
        (NODE + WORKLOAD.replace('["true"]', "[]"), "command is empty"),
        (NODE + WORKLOAD.replace('"w"', '"-w"'), "name: use"),
        (NODE + WORKLOAD + 'root = "x"\n', "root must be an absolute path"),
        (NODE + WORKLOAD + 'working_directory = "x"\n', "working_directory must be an absolute path"),
        (NODE + WORKLOAD + 'files = [{ path = "/a/../b" }]\n', "absolute path below /"),
        (
            NODE + WORKLOAD + 'files = [{ path = "/a", source = "b" }]\n',
            "source 'b' must be an absolute path",
        ),
        (NODE + WORKLOAD + 'files = [{ path = "/a/b/" }, { path = "/a" }]\n', "'/a/b' lies in '/a'"),
        (
            NODE + WORKLOAD + 'files = [{ path = "/a" }, { path = "/a/", shared = true }]\n',
            "'/a' stands there twice",
        ),
        (
            NODE + WORKLOAD.replace('"true"', '"redis-server --port 1", "x"'),
            r'split it, \["redis-server", "--port", "1", "x"\]',
        ),
        (NODE + WORKLOAD.replace('"true"', '""'), "command is empty"),
        (NODE + WORKLOAD + 'health = { command = ["ping x"] }\n', "health.command begins with 'ping x'"),
        (NODE + WORKLOAD + "health = { tcp = 0 }\n", "health.tcp 0 is not a TCP port"),
        (NODE + WORKLOAD + "health = { tcp = 1, timeout_ms = 0 }\n", "health.timeout_ms 0"),
        (NODE + WORKLOAD + "health = { tcp = 1, timeout_ms = 9, grace_ms = 8 }\n", "health.timeout_ms 9"),
        (NODE + VIP + WORKLOAD + 'vip = "10.0.0.1/24"\n', "is the address of node, which would move away"),
        (NODE + VIP + PEER + WORKLOAD + 'vip = "10.0.0.2/24"\n', "is the address of peer 'b'"),
        (NODE + WORKLOAD + 'user = "root"\n', "user must be numeric"),
        (NODE + WORKLOAD + 'vip = "10.0.0.9"\n', "prefix length"),
        (NODE + WORKLOAD + "health = {}\n", "exactly one"),
        (
            NODE + WORKLOAD + 'health = { http = "localhost:80/" }\n',
            "'localhost:80/' is not of the form :PORT",
        ),
        (NODE + WORKLOAD + 'health = { http = ":99999/" }\n', "':99999/' is not of the form :PORT"),
        (NODE + WORKLOAD + 'health = { http = ":80/a b" }\n', "is not of the form :PORT/PATH"),
        (NODE + WORKLOAD + 'health = { tcp = 1, http = ":1/" }\n', "exactly one"),
        (NODE + WORKLOAD + "epoch_interval_ms = 1\n", "epoch_interval_ms"),
        (NODE + WORKLOAD + "freeze_deadline_ms = 1\n", "freeze_deadline_ms"),
        (NODE + "[store]\nmax_bytes = -1\n", "store.max_bytes"),
        (NODE + "[capture]\nverify_epochs = -1\n", "capture.verify_epochs"),
        (NODE + WORKLOAD + "epoch_interval_ms = 1000\nrpo_ms = 999\n", "rpo_ms"),
        (NODE + WORKLOAD + "max_takeover_lag_ms = -1\n", "max_takeover_lag_ms"),
        (NODE + WORKLOAD + 'on_exit = "explode"\n', "explode"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        parse_config(text, origin="node.toml")
    assert raised.value.message.startswith("node.toml")
    assert raised.value.hint


@pytest.mark.parametrize(
    "text",
    [
        NODE + PEER + OTHER,
        NODE + PEER.replace(".2", ".1") + "agent_port = 1\nkeeper_port = 2\n",
        NODE + PEER + OTHER.replace(".3", ".2") + "agent_port = 1\nkeeper_port = 2\n",
        NODE + '[capture]\nbackend = "auto"\ntracker = "soft-dirty"\n',
        NODE + '[capture]\ntracker = "auto"\n',
        NODE + 'runc = "crun"\nconmon = "/opt/conmon"\n',
        NODE + FENCE.format('["fence_ipmilan", "two words"]'),
        NODE + WORKLOAD.replace('["true"]', '["./run", "two words"]'),
        NODE + WORKLOAD + 'files = [{ path = "/a" }, { path = "/a/b", shared = true }, { path = "/ab" }]\n',
        NODE + VIP + PEER + WORKLOAD + 'vip = "10.0.0.9/24"\n',
    ],
)
def test_what_is_unusual_but_can_be_is_accepted(text: str) -> None:
    parse_config(text, origin="node.toml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (NODE + 'adress = "10.0.0.1"\n', "[node] has an unknown key 'adress': did you mean 'address'?"),
        (NODE + "[heartbeet]\n", "the file has an unknown key 'heartbeet': did you mean 'heartbeat'?"),
        (
            NODE + PEER + "agent_prt = 1\n",
            "[[peers]] 'b' has an unknown key 'agent_prt': did you mean 'agent_port'?",
        ),
        (
            NODE + WORKLOAD + "[workloads.health]\ntimout_ms = 1\n",
            "[[workloads]] 'w', health has an unknown key 'timout_ms': did you mean 'timeout_ms'?",
        ),
        (
            NODE + WORKLOAD + 'files = [{ path = "/a" }, { paht = "/b" }]\n',
            "[[workloads]] 'w', files number 2 has an unknown key 'paht': did you mean 'path'?",
        ),
        (
            NODE + WORKLOAD + "min_in_sync = 1\n",
            "[[workloads]] 'w', min_in_sync: it belongs to output-commit, which is not built yet: "
            "leave the key out",
        ),
        (
            NODE + "[heartbeat]\nfoo = 1\n",
            "[heartbeat] has an unknown key 'foo': it may have interval_ms, suspect_after_ms",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_table_and_what_was_meant(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, origin="node.toml")
    assert raised.value.message == f"node.toml: {sentence}"


def test_output_commit_is_refused_until_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"'w', mode: output-commit is not built yet, .* asynchronously"):
        parse_config(NODE + WORKLOAD + 'mode = "output-commit"\n', origin="node.toml")


def test_the_thaw_deadline_leaves_a_second_for_the_agent() -> None:
    spec = WorkloadSpec(name="w", nodes=("a",), command=("true",), freeze_deadline_ms=500)
    assert spec.thaw_deadline_ms == 1500


@pytest.mark.parametrize(
    ("rpo_ms", "interval_ms", "objective_ms"), [(0, 200, 5000), (0, 2000, 10_000), (1500, 1000, 1500)]
)
def test_the_objective_is_five_epochs_and_at_least_5_s_unless_it_is_given(
    rpo_ms: int, interval_ms: int, objective_ms: int
) -> None:
    spec = WorkloadSpec(
        name="w", nodes=("a",), command=("true",), rpo_ms=rpo_ms, epoch_interval_ms=interval_ms
    )
    assert spec.objective_ms == objective_ms


_WHOLE = (
    NODE
    + VIP
    + "[store]\nmax_levels = 5\n"
    + PEER
    + OTHER
    + FENCE.replace('"a"', '"b"').format('["/bin/true"]')
    + WORKLOAD
    + 'environment = { LANG = "C" }\nvip = "10.0.0.9/24"\nhealth = { tcp = 80 }\n'
)
_VALUES = (
    "-1",
    "0",
    "1e400",
    "nan",
    "9" * 30,
    '""',
    '"\\u0000"',
    '"../x"',
    "[]",
    "[[]]",
    "{}",
    "true",
    "1979-05-27",
)


@st.composite
def _altered(draw: st.DrawFn) -> str:
    """The file of a whole node with lines left out, repeated, swapped, or with other values."""
    lines = _WHOLE.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        name, equals, _ = lines[at].partition(" = ")
        value = draw(st.sampled_from(_VALUES) | st.text(max_size=8))
        garbage = lines[at][: draw(st.integers(0, len(lines[at])))] + draw(st.text(max_size=4))
        changes = [[], [lines[at]] * 2, [lines[other]], [name + equals + value], [garbage]]
        lines[at : at + 1] = draw(st.sampled_from(changes))
        if not lines:
            return ""
    return "\n".join(lines) + "\n"


@given(_altered())
@settings(max_examples=300, deadline=None)
def test_an_altered_file_is_a_config_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_config(text, origin="x").node.name
