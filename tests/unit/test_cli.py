"""The command line itself: errors, output, the keeper's light way, and the verbs that need no keeper."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from store_disks import commit

from common.criu.images import SpaceKey
from common.errors import OutliveError
from common.events import Event, EventLog
from common.model import EpochId
from outlive.cli import keeper_config
from outlive.cli.app import outlive, run
from outlive.cli.output import plain
from outlive.declare import toml_value
from replica.store import EpochStore

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    keys = {"name": "a", "address": "127.0.0.1"}
    keys |= {
        "run_dir": f"{tmp_path}/run",
        "state_dir": f"{tmp_path}/state",
        "key_file": f"{tmp_path}/node.key",
    }
    path.write_text("[node]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items()))
    return path


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


# --- errors and output ------------------------------------------------------------------------------


def test_an_error_is_one_line_and_a_hint_on_stderr(tmp_path: Path, capsys: Captured) -> None:
    assert run(["config", "check", "--config", str(tmp_path / "none.toml")]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    first, second = told.err.splitlines()
    assert first == f"outlive: there is no configuration at {tmp_path}/none.toml"
    assert second.startswith("   hint: ")


def test_an_error_in_json_is_an_object_on_stdout(tmp_path: Path, capsys: Captured) -> None:
    assert run(["config", "check", "--output", "json", "--config", str(tmp_path / "none.toml")]) == 3
    error = json.loads(capsys.readouterr().out)
    assert list(error) == ["schema_version", "error"]
    assert list(error["error"]) == ["kind", "message", "hint", "exit_code", "retryable"]
    assert (error["error"]["kind"], error["error"]["exit_code"]) == ("ConfigError", 3)


@pytest.mark.parametrize(
    "words", [["stauts"], ["status", "--nonsense"], ["failover"], ["store", "show", "web", "not-an-epoch"]]
)
def test_a_wrong_command_line_exits_with_2(words: list[str], capsys: Captured) -> None:
    assert run(words) == 2
    assert capsys.readouterr().out == ""
    assert run([*words, "--output", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_a_defect_is_no_traceback_unless_asked_for(
    config_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("outlive.declare.config_text", fail)
    words = ["config", "show", "--config", str(config_path)]
    assert run(words) == OutliveError.exit_code
    assert "outlive: a defect in Outlive: ZeroDivisionError: by accident" in capsys.readouterr().err
    monkeypatch.setenv("OUTLIVE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(words)


def test_the_environment_names_the_file_and_the_option_wins(
    config_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTLIVE_CONFIG", str(config_path))
    assert run(["config", "check"]) == 0
    assert run(["--config", "/none", "config", "check"]) == 3
    assert run(["--config", "/none", "config", "check", "--config", str(config_path)]) == 0
    assert "is good: node a; peers: none; workloads: none" in capsys.readouterr().out


def test_every_verb_takes_the_common_options_and_teaches_by_example() -> None:
    def check(command: object, path: str) -> None:
        names = {option for parameter in command.params for option in parameter.opts}
        assert command.help, path
        assert "Examples:" in (command.epilog or ""), path
        children = getattr(command, "commands", {})
        if not children:
            assert {"--config", "--output"} <= names, path
        for name, child in children.items():
            check(child, f"{path} {name}")

    check(outlive, "outlive")


def test_an_epoch_is_an_object_in_json() -> None:
    assert plain((EpochId(3, 1042), None, {"x": (1,)})) == [{"term": 3, "epoch": 1042}, None, {"x": [1]}]


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    command = f"{sys.executable} -m outlive.cli config example | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- the keeper's own way ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["keeper"], "/etc/outlive/node.toml"),
        (["--config", "x.toml", "keeper"], "x.toml"),
        (["keeper", "--config", "x.toml"], "x.toml"),
        (["keeper", "--help"], None),
        (["agent"], None),
        ([], None),
    ],
)
def test_only_the_bare_keeper_takes_the_light_way(
    arguments: list[str], path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTLIVE_CONFIG", raising=False)
    assert keeper_config(arguments) == (Path(path) if path else None)


def test_the_keeper_loads_nothing_that_it_can_do_without(config_path: Path) -> None:
    program = (
        "import atexit, sys\n"
        "loaded = lambda: {name for name, module in sys.modules.items() if module}\n"
        "atexit.register(lambda: print(*sorted({'click', 'rich', 'numpy', '_ssl'} & loaded())))\n"
        "sys.argv = ['outlive', 'keeper', '--config', '/none']\n"
        "from outlive.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "\n")
    assert done.stderr.startswith("outlive: there is no configuration at /none\n")


# --- verbs that need no keeper ----------------------------------------------------------------------


def test_the_example_is_printed_and_is_good(config_path: Path, capsys: Captured) -> None:
    assert run(["config", "example"]) == 0
    config_path.write_text(capsys.readouterr().out)
    assert run(["config", "check", "--config", str(config_path)]) == 0


def test_keys_are_made_once_and_shown(config_path: Path, capsys: Captured) -> None:
    assert run(["keys", "generate", "--config", str(config_path)]) == 0
    public = capsys.readouterr().out.strip()
    assert len(public) == 40
    assert run(["keys", "generate", "--config", str(config_path)]) == 14
    capsys.readouterr()
    assert run(["keys", "show", "--config", str(config_path), "--output", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (list(shown), shown["public_key"]) == (["schema_version", "path", "public_key"], public)


def test_events_are_shown_newest_last_and_by_workload(config_path: Path, capsys: Captured) -> None:
    log = EventLog(config_path.parent / "state/events.jsonl", "keeper")
    log.append(Event.KEEPER_STARTED)
    log.append(Event.ROLE_CHANGED, workload="redis", reason="an operator said so", state="leading")
    log.append(Event.ROLE_CHANGED, workload="web")
    log.close()
    assert run(["events", "--config", str(config_path), "--workload", "redis"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "  keeper  role.changed " in line
    assert line.endswith("  redis         an operator said so   state=leading")
    assert run(["events", "--config", str(config_path), "--last", "1", "--output", "json"]) == 0
    (event,) = json.loads(capsys.readouterr().out)["events"]
    assert list(event) == ["wall_s", "source", "event", "workload", "reason", "fields"]
    assert event["workload"] == "web"


@pytest.mark.parametrize(
    ("words", "said"), [((), "no events yet"), (("--workload", "redis"), "no events of redis yet")]
)
def test_a_node_without_events_says_so(
    config_path: Path, capsys: Captured, words: tuple[str, ...], said: str
) -> None:
    assert run(["events", "--config", str(config_path), *words]) == 0
    assert capsys.readouterr() == ("", f"{said}\n")


def test_followed_events_come_as_one_object_a_line(config_path: Path) -> None:
    command = [sys.executable, "-m", "outlive.cli", "--config", str(config_path), "events", "--follow"]
    with subprocess.Popen([*command, "--output", "json"], stdout=subprocess.PIPE, text=True) as process:
        stop = threading.Event()
        log = EventLog(config_path.parent / "state/events.jsonl", "agent")

        def write() -> None:
            while not stop.wait(0.1):
                log.append(Event.AGENT_STARTED)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["event"]["event"] == "agent.started"
        finally:
            stop.set()
            writer.join()
            log.close()
            process.terminate()


@pytest.fixture
def stored(config_path: Path) -> Path:
    """The configuration of a node that holds two epochs of `web`, the second on top of the first."""
    key = SpaceKey("task", 1)
    first, second = {key: {1: 7, 2: 8, 3: 0}}, {key: {1: 7, 2: 9, 3: 0}}
    with EpochStore.open(config_path.parent / "state/store", "web", min_free_bytes=0, max_levels=8) as store:
        commit(store, EpochId(1, 1), first)
        commit(store, EpochId(1, 2), second, EpochId(1, 1), first)
    return config_path


def test_stored_epochs_are_listed(stored: Path, capsys: Captured) -> None:
    assert run(["store", "list", "--config", str(stored)]) == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "WORKLOAD"
    assert [line.split()[:3] for line in (one, two)] == [["web", "t1-e1", "-"], ["web", "t1-e2", "t1-e1"]]
    assert run(["store", "list", "web", "--config", str(stored), "--output", "json"]) == 0
    epochs = json.loads(capsys.readouterr().out)["epochs"]
    assert [epoch["epoch"]["epoch"] for epoch in epochs] == [1, 2]
    assert epochs[1]["stands_on"] == {"term": 1, "epoch": 1}


def test_an_epoch_is_shown_with_the_command_that_restores_it(stored: Path, capsys: Captured) -> None:
    assert run(["store", "show", "web", "--config", str(stored), "--output", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["chain"] == [{"term": 1, "epoch": 2}, {"term": 1, "epoch": 1}]
    assert "restore" in shown["restore_command"]
    assert run(["store", "show", "web", "t1-e1", "--config", str(stored)]) == 0
    told = capsys.readouterr().out
    assert "restore reads t1-e1\n" in told
    assert shown["restore_command"].replace("t1-e2", "t1-e1") in told
    assert run(["store", "show", "web", "t9-e9", "--config", str(stored)]) == 7


def test_verifying_finds_a_byte_that_changed(stored: Path, capsys: Captured) -> None:
    assert run(["store", "verify", "web", "--config", str(stored)]) == 0
    pages = next((stored.parent / "state/store/web").glob("epochs/*1-*1/pages-*.img"))
    content = bytearray(pages.read_bytes())
    content[5] ^= 1
    os.chmod(pages, 0o600)
    pages.write_bytes(content)
    capsys.readouterr()
    assert run(["store", "verify", "web", "--config", str(stored), "--output", "json"]) == 7
    answer = json.loads(capsys.readouterr().out)
    assert answer["sound"] is False
    assert [Path(problem["path"]).name for problem in answer["problems"]] == [pages.name]


def test_what_lies_aside_is_listed_with_what_it_needs(stored: Path, capsys: Captured) -> None:
    assert run(["store", "aside", "--config", str(stored)]) == 0
    assert "nothing lies aside in" in capsys.readouterr().out
    state = stored.parent / "state"
    for name, number in (("web", 1), ("web", 2), ("other", 2)):
        aside = state / f"store/_aside/{name}-t1-e{number}-unacknowledged"
        shutil.copytree(state / "store/web", aside, symlinks=True)
    (state / "store/_aside/web-t1-e2-unacknowledged/views/t1-e1").unlink()
    assert run(["store", "aside", "web", "--config", str(stored)]) == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert [word.strip() for word in head.split("  ") if word] == [
        *("WORKLOAD", "EPOCH", "FROZEN AT", "SIZE", "NEEDS", "DIRECTORY")
    ]
    assert (one.split()[1], one.split()[-2]) == ("t1-e1", "-")
    assert (two.split()[1], two.split()[-2]) == ("t1-e2", "t1-e1")
    assert run(["store", "aside", "--config", str(stored), "--output", "json"]) == 0
    told = json.loads(capsys.readouterr().out)["epochs"]
    assert [(each["workload"], each["needs"]) for each in told] == [
        ("other", None),
        ("web", None),
        ("web", {"term": 1, "epoch": 1}),
    ]
    assert run(["store", "list", "--config", str(stored)]) == 0
    assert "_aside" not in capsys.readouterr().out


def test_folding_a_short_chain_does_nothing_and_says_so(stored: Path, capsys: Captured) -> None:
    assert run(["store", "fold", "web", "--config", str(stored)]) == 0
    assert capsys.readouterr().out == "web t1-e2: nothing was due\n"


def test_an_unknown_workload_is_a_store_error(stored: Path, capsys: Captured) -> None:
    assert run(["store", "verify", "nothing", "--config", str(stored)]) == 7
    assert "hint: stored: web" in capsys.readouterr().err


def test_the_doctor_without_a_file_of_this_node_says_so_and_goes_by_what_it_finds(
    tmp_path: Path, capsys: Captured
) -> None:
    missing = tmp_path / "none.toml"
    assert run(["doctor", "--config", str(missing), "--output", "json"]) == 12
    answer = json.loads(capsys.readouterr().out)
    assert answer["fit"] is False
    first, *others = answer["checks"]
    assert (first["name"], first["status"]) == ("config", "fail")
    assert f"no file at {missing}, so no config was read" in first["detail"]
    assert "kernel" in {check["name"] for check in others}
    assert run(["doctor", "redis", "--config", str(missing)]) == 3
