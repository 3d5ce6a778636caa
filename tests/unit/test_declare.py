"""Writing workloads into the node's file and taking them out: comments stay, doubt leaves all as it is."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import load_config, parse_config
from common.errors import ConfigError
from common.model import FilePath, HealthCheck, WorkloadSpec
from outlive.declare import config_text, declare_workload, toml_value, withdraw_workload, workload_block

NODE = """\
# node a, by hand
[node]
name = "a"          # us
address = "10.0.0.1"
vip_interface = "eth0"
"""

FULL = WorkloadSpec(
    name="redis",
    nodes=("a",),
    command=("redis-server", "--save", "", 'it\'s "quoted"\\ \n\t\x7f\x01 é'),
    environment={"PATH": "/bin", "dotted.key": "x = 'y'"},
    user="1000:1000",
    files=(FilePath(path="/var/lib/redis"), FilePath(path="/srv", source="/mnt/srv", shared=True)),
    memory_limit_bytes=1 << 30,
    cpu_limit=1.5,
    vip="10.0.0.100/24",
    health=HealthCheck(tcp=6379),
    private_ipc=False,
    right_to_lead="fence",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    path.chmod(0o640)
    return path


def test_what_is_declared_is_read_back_and_comments_stay(path: Path) -> None:
    declare_workload(path, FULL)
    assert load_config(path).workloads == (FULL,)
    assert path.read_text().startswith(NODE)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["node.toml"]


def test_declaring_and_withdrawing_leaves_the_file_as_it_was(path: Path) -> None:
    declare_workload(path, FULL)
    withdraw_workload(path, "redis")
    assert path.read_text() == NODE


def test_a_symbolic_link_stays_one(path: Path) -> None:
    link = path.with_name("link.toml")
    link.symlink_to(path.name)
    declare_workload(link, FULL)
    assert link.is_symlink()
    assert load_config(path).workloads == (FULL,)


def test_a_second_declaration_of_a_name_is_refused(path: Path) -> None:
    declare_workload(path, FULL)
    before = path.read_text()
    with pytest.raises(ConfigError, match="declared already"):
        declare_workload(path, FULL)
    assert path.read_text() == before


def test_a_declaration_that_cannot_be_is_refused_and_the_file_untouched(path: Path) -> None:
    wrong = WorkloadSpec(name="x", nodes=("nowhere",), command=("true",))
    with pytest.raises(ConfigError, match="nowhere"):
        declare_workload(path, wrong)
    assert path.read_text() == NODE


def test_text_that_toml_cannot_hold_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="not Unicode"):
        declare_workload(path, WorkloadSpec(name="x", nodes=("a",), command=("\udcff",)))
    assert path.read_text() == NODE


HAND_WRITTEN = (
    NODE
    + """
# the first
[[workloads]]
name = "one"
nodes = ["a"]
command = ["true"]
[workloads.health]  # its own table
tcp = 1
[[workloads.files]]
path = "/data"

# the second
[[ workloads ]]
name = "two"
nodes = ["a"]
command = ["true"]

# kept together with its header
[heartbeat]
interval_ms = 50
"""
)


@pytest.mark.parametrize(("name", "left"), [("one", "two"), ("two", "one")])
def test_a_hand_written_block_goes_with_its_tables_and_its_neighbours_stay(
    path: Path, name: str, left: str
) -> None:
    path.write_text(HAND_WRITTEN)
    config = withdraw_workload(path, name)
    assert [workload.name for workload in config.workloads] == [left]
    assert load_config(path) == config
    assert "# kept together with its header\n[heartbeat]" in path.read_text()
    assert ("# the second\n[[ workloads ]]" in path.read_text()) == (left == "two")
    assert ("[[workloads.files]]" in path.read_text()) == (left == "one")


def test_a_header_inside_a_string_is_not_cut_at(path: Path) -> None:
    path.write_text(
        NODE
        + '[[workloads]]\nname = "one"\nnodes = ["a"]\ncommand = ["sh", "-c", """\n[[workloads]]\n"""]\n'
        + '[[workloads]]\nname = "two"\nnodes = ["a"]\ncommand = ["true"]\n'
    )
    before = path.read_text()
    with pytest.raises(ConfigError, match="by hand"):
        withdraw_workload(path, "one")
    assert path.read_text() == before


def test_an_inline_array_is_left_to_its_owner(path: Path) -> None:
    path.write_text('workloads = [{name = "one", nodes = ["a"], command = ["true"]}]\n' + NODE)
    before = path.read_text()
    with pytest.raises(ConfigError, match="by hand"):
        withdraw_workload(path, "one")
    with pytest.raises(ConfigError):
        declare_workload(path, FULL)
    assert path.read_text() == before


def test_withdrawing_what_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="no workload 'redis'"):
        withdraw_workload(path, "redis")


def test_the_whole_configuration_is_written_so_that_it_reads_back() -> None:
    config = parse_config(NODE + workload_block(FULL) + "[heartbeat]\ninterval_ms = 10\n", origin="x")
    assert parse_config(config_text(config), origin="y") == config


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text: str) -> None:
    assert tomllib.loads(f"x = {toml_value(text)}")["x"] == text


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("a.\"'\\=\n")))
def test_any_environment_survives(environment: dict[str, str]) -> None:
    assert tomllib.loads(f"x = {toml_value(environment)}")["x"] == environment
