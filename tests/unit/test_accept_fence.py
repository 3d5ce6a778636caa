"""The fenced node's side: refuse on disk first, confirm last, and never what was not read back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import Node, NodeConfig, Peer
from common.fence_request import FenceAnswer, FenceRequest
from common.roles import TermRecord
from common.terms_file import TermFiles
from outlive import accept_fence as module
from outlive.accept_fence import accept_fence
from tests.unit.test_processes import holder, lives

REQUEST = FenceRequest(node="a", by="b", terms={"w": 4})


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeConfig]:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    node = Node(
        name="a", address="127.0.0.1", state_dir=str(tmp_path), run_dir=str(tmp_path), cgroup_parent="/none"
    )
    yield NodeConfig(node=node, peers=(Peer(name="b", address="127.0.0.2", public_key="x" * 40),))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def files(config: NodeConfig) -> TermFiles:
    files = TermFiles(Path(config.node.state_dir), "a")
    files.record("w", TermRecord(term=4, leader="a", mark="leads", boot_id="x"))
    return files


async def test_the_refusal_is_on_disk_before_anything_is_ended(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look(path: str) -> list[int]:
        assert files.load_refusal("w") is not None
        asked.append(Path(path).name)
        return []

    monkeypatch.setattr(module, "holders", look)
    answer = await accept_fence(config, REQUEST)
    assert (answer.outcome, answer.node, answer.by, answer.terms) == ("confirmed", "a", "b", {"w": 4})
    assert asked == ["keeper.sock", "agent.sock"], "the keeper first: the agent acts on its orders"


async def test_a_keeper_that_hangs_is_ended_with_what_it_has_started(
    config: NodeConfig, files: TermFiles
) -> None:
    with holder(Path(config.node.run_dir) / "keeper.sock") as (keeper, _):
        keeper.send_signal(signal.SIGSTOP)
        assert (await accept_fence(config, REQUEST)).outcome == "confirmed"
        assert keeper.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("guards", [True, False])
async def test_a_guard_that_the_keeper_has_started_goes_on_for_other_workloads(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch, guards: bool
) -> None:
    """Nothing else freezes what they lead once their keeper is gone."""
    with holder(Path(config.node.run_dir) / "keeper.sock") as (keeper, child):
        word = Path(f"/proc/{child}/cmdline").read_text().split("\0")[-2]
        monkeypatch.setattr(module.lease_guard, "__file__", word if guards else "/none")
        found = {"keeper.sock": [keeper.pid]}
        monkeypatch.setattr(module, "holders", lambda path: found.get(Path(path).name, []))
        assert (await accept_fence(config, REQUEST)).outcome == "confirmed"
        assert keeper.wait(5) == -signal.SIGKILL
        assert lives(child) == guards


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (FenceRequest(node="c", by="b", terms={"w": 4}), "this is a, not c"),
        (FenceRequest(node="a", by="z", terms={"w": 4}), "z is no peer of a"),
        (FenceRequest(node="a", by="b", terms={"w": 3}), "a leads w in term 4"),
        (FenceRequest(node="a", by="b", terms={"other": 9, "w": 3}), "a leads w in term 4"),
    ],
)
async def test_what_is_not_for_this_node_or_of_the_past_is_refused_and_nothing_is_done(
    config: NodeConfig, files: TermFiles, request_: FenceRequest, words: str
) -> None:
    with holder(Path(config.node.run_dir) / "keeper.sock") as (keeper, _):
        answer = await accept_fence(config, request_)
        assert (answer.outcome, words in answer.reason) == ("refused", True), answer
        assert keeper.poll() is None
    assert files.load_refusal("w") is None
    assert files.load_refusal("other") is None


async def test_a_term_that_was_begun_unheard_is_fenced_too_up_to_the_one_of_who_fences(
    config: NodeConfig, files: TermFiles
) -> None:
    unheard = FenceRequest(node="a", by="b", terms={"w": 3}, up_to=99)
    assert (await accept_fence(config, unheard)).outcome == "confirmed"
    refusal = files.load_refusal("w")
    assert refusal is not None
    assert refusal.term == 4, "and none that this node may begin later"
    files.record("w", TermRecord(term=100, leader="a", mark="leads", boot_id="x"))
    assert (await accept_fence(config, unheard)).outcome == "refused"


@pytest.mark.parametrize("terms", [{}, {"w": 4}])
async def test_a_dry_run_is_ready_and_does_nothing(
    config: NodeConfig, files: TermFiles, terms: dict[str, int]
) -> None:
    request = FenceRequest(node="a", by="b", terms=terms)
    assert (await accept_fence(config, request, dry_run=True)).outcome == "ready"
    assert files.load_refusal("w") is None


async def test_without_a_workload_nothing_is_confirmed(config: NodeConfig) -> None:
    assert (await accept_fence(config, FenceRequest(node="a", by="b"))).outcome == "unknown"


async def test_a_term_that_began_before_its_keeper_was_ended_is_not_ended(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []

    async def kill(_: NodeConfig, name: str) -> None:
        killed.append(name)

    def look(path: str) -> list[int]:
        files.record("w", TermRecord(term=5, leader="a", mark="leads", boot_id="x"))
        return []

    monkeypatch.setattr(module, "holders", look)
    monkeypatch.setattr(module, "kill_workload", kill)
    assert (await accept_fence(config, REQUEST)).outcome == "refused"
    assert killed == []


@pytest.mark.parametrize("file", ["term.json", "fenced.json", "spec.json"])
async def test_what_cannot_be_read_is_unknown(config: NodeConfig, files: TermFiles, file: str) -> None:
    (Path(config.node.state_dir) / "terms/w" / file).write_bytes(b"{")
    assert (await accept_fence(config, REQUEST)).outcome == "unknown"


async def test_what_a_newer_version_wrote_is_not_touched(config: NodeConfig, files: TermFiles) -> None:
    (Path(config.node.state_dir) / "format").write_text("outlive state 2\n")
    answer = await accept_fence(config, REQUEST)
    assert answer.outcome == "unknown"
    assert "outlive state 2" in answer.reason
    assert files.load_refusal("w") is None


async def test_what_still_runs_when_it_is_read_back_is_unknown(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "workload_pids", lambda config, name: [1])
    answer: FenceAnswer = await accept_fence(config, REQUEST)
    assert (answer.outcome, "still there" in answer.reason) == ("unknown", True)


async def test_a_refusal_that_is_not_read_back_is_unknown(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TermFiles, "record_refusal", lambda *_: None)
    assert (await accept_fence(config, REQUEST)).outcome == "unknown"


async def test_what_serves_in_a_term_that_who_fences_has_not_heard_of_goes_on(
    config: NodeConfig, files: TermFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for terms up to 99: what this node has only begun unheard it may have back."""
    request = FenceRequest(node="a", by="b", terms={"w": 3}, up_to=99)
    monkeypatch.setattr(module, "workload_pids", lambda *_: [1])
    answer = await accept_fence(config, request)
    assert (answer.outcome, answer.newer) == ("refused", True)
    assert "w runs here in term 4, and b knows of 3 only" in answer.reason
    assert files.load_refusal("w") is None
    monkeypatch.setattr(module, "workload_pids", lambda *_: [])
    assert (await accept_fence(config, request)).outcome == "confirmed"
