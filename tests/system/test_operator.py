"""What an operator does and sees, by the command line alone: from the keys to the last `unprotect`."""

from __future__ import annotations

import asyncio
import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Lab
from tests.system.clusters import NAME, PORT, REDIS

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


async def ask(node: Node, *words: str, code: int = 0, command: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a verb with `--output json`; return its answer, or (`code` not 0) the answer beside that code."""
    after = ("--", *command) if command else ()
    done = await node.cli(*words, "--output", "json", *after, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    return answer


async def refused(node: Node, *words: str, code: int) -> str:
    """Run a verb that is to exit with `code`; return what it says and advises."""
    error = (await ask(node, *words, code=code))["error"]
    assert error["exit_code"] == code
    return f"{error['message']} ({error['hint']})"


async def seen(node: Node, name: str = NAME) -> dict[str, Any] | None:
    """How `status` shows a workload, whatever it exits with."""
    done = await node.cli("status", "--output", "json", check=False)
    assert done.returncode in (0, 16), done.stderr
    workloads = json.loads(done.stdout)["workloads"]
    return next((each for each in workloads if each["name"] == name), None)


def make_stranger(nodes: dict[str, Node], stranger: str) -> None:
    """Take a node out of the others' files; it still names them as its peers."""
    for name, node in nodes.items():
        if name != stranger:
            blocks = node.config_path.read_text().split("\n\n")
            others = [
                block for block in blocks if not re.search(rf'^(name|node) = "{stranger}"', block, re.M)
            ]
            node.config_path.write_text("\n\n".join(others))
            nodes[name] = Node(node.host, node.config_path)


async def test_keys_and_configuration_are_made_and_checked_before_anything_runs() -> None:
    async with Lab() as lab:
        node = (await build_cluster(lab, ("a", "b")))["a"]
        path = node.host.etc_dir / "new.key"
        made = await ask(node, "keys", "generate", "--path", str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(made["public_key"]) == 40
        assert (await ask(node, "keys", "show", "--path", str(path)))["public_key"] == made["public_key"]
        secret = path.read_text()
        assert "already" in await refused(node, "keys", "generate", "--path", str(path), code=14)
        assert path.read_text() == secret
        path.chmod(0o644)
        assert str(path) in await refused(node, "keys", "show", "--path", str(path), code=14)

        good = await ask(node, "config", "check")
        assert (good["node"], good["peers"], good["workloads"]) == ("a", ["b"], [])
        text = node.config_path.read_text()
        node.config_path.write_text(text.replace("[node]\n", "[node]\nadress = 1\n", 1))
        assert "adress" in await refused(node, "config", "check", code=3)
        node.config_path.write_text(text)
        assert "keeper" in await refused(node, "status", code=4)


async def test_a_workload_from_protect_to_unprotect_and_a_node_that_nobody_knows() -> None:
    async with Lab() as lab:
        nodes = await build_cluster(lab, ("a", "b", "x"))
        make_stranger(nodes, "x")
        first, second, stranger = nodes["a"], nodes["b"], nodes["x"]
        comment = "# the database team's node: call before you touch it\n"
        first.config_path.write_text(comment + first.config_path.read_text())
        await start_all(nodes)

        options = ("--vip", str(lab.vip()), "--health-tcp", str(PORT), "--interval-ms", "200")
        words = ("protect", NAME, "--node", "a", "--node", "b", "--right-to-lead", "fence", *options)
        started = await ask(first, *words, command=REDIS)
        assert started["outcome"]["state"] == "leading"
        assert first.config_path.read_text().startswith(comment)
        assert (await ask(first, "config", "check"))["workloads"] == [NAME]
        intruder = ("protect", "intruder", "--no-start", "--node", "x", "--node", "b")
        await ask(stranger, *intruder, command=("sleep", "1000"))
        assert "--off b" in await refused(stranger, "start", "intruder", code=10)
        await ask(stranger, "start", "intruder", "--off", "b")

        await second.wait_for(NAME, lambda w: w.role == "replica" and w.restorable, what="restorable")
        await first.wait_for(NAME, lambda w: w.restorable, what="restorable elsewhere")
        answer = await ask(first, "status")
        (led,) = answer["workloads"]
        assert (led["role"], led["state"], led["restorable"]) == ("primary", "leading", True)
        assert 0 <= led["data_at_risk_s"] < 30
        assert [each["node"] for each in led["replicas"]] == ["b"]
        (kept,) = (await ask(second, "status"))["workloads"]
        assert (kept["role"], kept["leader"], kept["running"]) == ("replica", "a", False)

        assert f"outlive stop {NAME}" in await refused(first, "unprotect", NAME, code=5)
        assert "a" in await refused(second, "start", NAME, code=10)
        assert (await seen(second) or {})["role"] == "replica"
        assert "declared already" in await refused(first, "protect", NAME, "sleep", "1", code=3)

        (term,) = (await ask(first, "history", NAME))["terms"]
        assert (term["term"], term["leader"]) == (1, "a")
        told = (await ask(first, "events", "--workload", NAME, "--last", "0"))["events"]
        assert "workload.started" in [event["event"] for event in told]
        assert all(event["reason"] for event in told)

        epochs = (await ask(second, "store", "list"))["epochs"]
        assert {epoch["workload"] for epoch in epochs} == {NAME}
        assert (await ask(first, "store", "list"))["epochs"] == []
        shown = await ask(second, "store", "show", NAME)
        assert "criu" in shown["restore_command"]
        assert shown["files"]["inventory.img"] > 0
        for _ in range(4):  # epochs are committed and folded meanwhile
            assert (await ask(second, "store", "verify", NAME))["sound"] is True
        assert "intruder" in await refused(second, "store", "verify", "intruder", code=7)

        for node, where in ((first, "processes with"), (second, "does not run on this node")):
            done = await node.cli("doctor", NAME, "--output", "json", check=False)
            checks = {c["name"]: c for c in json.loads(done.stdout)["checks"] if c["area"] == NAME}
            assert where in checks["processes"]["detail"]
            assert [check for check in checks.values() if check["status"] == "fail"] == []

        await nobody_lets_in(stranger, second)

        stopped = await ask(first, "stop", NAME)
        assert stopped["outcome"]["state"] == "stopped"
        await ask(first, "unprotect", NAME)
        assert first.config_path.read_text().startswith(comment)
        assert (await ask(first, "config", "check"))["workloads"] == []
        await asyncio.sleep(0.5)  # the agent reports several times
        assert await seen(first) is None
        assert (await ask(second, "store", "list"))["epochs"]  # kept

        for _ in range(2):  # what was taken out can be put in again, and is started each time
            await ask(first, *words, command=REDIS)
            await ask(first, "stop", NAME)
            await ask(first, "unprotect", NAME)


async def nobody_lets_in(stranger: Node, target: Node) -> None:
    """What the stranger sends is refused and named, and its own operator sees that nothing arrives."""
    key = (await ask(stranger, "keys", "show"))["public_key"]

    async def named() -> bool:
        log = (target.host.log_dir / "agent.log").read_text()
        return any("transport.refused" in line and key in line for line in log.splitlines())

    await eventually(named, what="the target's agent names the key that it refuses")
    status = await ask(stranger, "status", code=16)
    assert status["unprotected"] == ["intruder"]
    assert all("refuses this node's key" in peer["refused"] for peer in status["peers"])
    (led,) = status["workloads"]
    assert (led["running"], led["restorable"]) == (True, False)
    assert [each["connected"] for each in led["replicas"]] == [False]
    assert await seen(target, "intruder") is None
    assert [path.name for path in target.config.store_dir.iterdir() if path.is_dir()] == [NAME]


async def test_a_workload_that_writes_a_local_file_is_told_to_be_not_restorable_and_is_not() -> None:
    async with Lab() as lab:
        nodes = await build_cluster(lab, ("a", "b"))
        first, second = nodes["a"], nodes["b"]
        await start_all(nodes)
        file = first.host.dir / "written"
        script = f"exec 3>{file}; while :; do echo >&3; sleep 0.1; done"
        options = ("--node", "a", "--node", "b", "--right-to-lead", "fence", "--interval-ms", "200")
        await ask(first, "protect", "writer", *options, command=("/bin/sh", "-c", script))
        unfit = await second.wait_for(
            "writer", lambda w: w.stored is not None and not w.restorable, what="stored and judged"
        )
        await first.wait_for("writer", lambda w: any(str(file) in why for why in w.reasons), what="told")
        for node in (first, second):
            (shown,) = (await ask(node, "status", code=16))["workloads"]
            assert shown["restorable"] is False
            assert any(str(file) in why and "open for writing" in why for why in shown["reasons"])
            lines = (await node.cli("status", check=False)).stdout.splitlines()
            assert any("not restorable" in line and str(file) in line for line in lines)
        checks = (await ask(first, "doctor", "writer", code=12))["checks"]
        assert [c["name"] for c in checks if c["area"] == "writer" and c["status"] == "fail"] == [
            "local files"
        ]
        assert unfit.term == 1

        await lab.power_off("a")
        await second.wait_for("writer", lambda w: w.state == "waiting", what="waiting")
        await asyncio.sleep(2.0)
        after = await seen(second, "writer")
        assert after is not None
        assert (after["state"], after["running"], after["term"]) == ("waiting", False, 1)
        assert "restor" in after["reason"] or str(file) in after["reason"]


def test_the_demonstration_takes_any_command() -> None:
    words = ["demo", "--workload", "python3 -m http.server 8000", "--epochs", "3", "--interval-ms", "300"]
    done = subprocess.run(
        [sys.executable, "-m", "outlive.cli", *words, "--output", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["survived"] is True
    assert report["workload"] == ["python3", "-m", "http.server", "8000"]
    assert report["writes"] is None
    assert report["epochs_committed"] >= 3
    assert report["restored"]["term"] == 1
    assert any("ran on for" in seen for seen in report["checked"])
    assert report["not_checked"]
    assert "epochs committed" in done.stderr


def test_a_demonstrated_command_that_ends_is_told_with_what_it_said() -> None:
    words = ["demo", "--workload", "sh -c 'echo out of luck; exit 7'", "--output", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "outlive.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] != 0
    assert "code 7" in error["message"]
    assert "out of luck" in error["message"]
    assert error["hint"]
