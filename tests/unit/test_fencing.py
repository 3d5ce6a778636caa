"""Fence methods: only exit status 0 confirms; everything in doubt is unknown."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from common import children, fencing
from common.config import Fence, Node, NodeConfig, Peer, SshFence
from common.fence_request import FenceAnswer, FenceRequest
from common.fencing import ask_methods, coverage, fence_node, fenceable
from common.model import WorkloadSpec

REQUEST = FenceRequest(node="a", by="b", terms={"w": 1})


def fence(script: str, *, timeout_ms: int = 5000, node: str = "a") -> Fence:
    return Fence(node=node, command=("sh", "-c", script), timeout_ms=timeout_ms)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("exit 0", "confirmed"),
        ("exit 1", "refused"),
        ("exit 2", "unknown"),
        ("exit 127", "unknown"),
        ("kill -9 $$", "unknown"),
    ],
)
async def test_the_exit_status_is_the_answer(script: str, outcome: str) -> None:
    assert (await fence_node(REQUEST, [fence(script)])).outcome == outcome


async def test_what_does_not_answer_in_time_is_unknown_and_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    began_s = time.monotonic()
    verdict = await fence_node(REQUEST, [fence(f"(sleep 0.6; touch {mark}) & wait", timeout_ms=200)])
    assert verdict.outcome == "unknown"
    assert time.monotonic() - began_s < 0.5
    time.sleep(0.7)  # noqa: ASYNC251 - nothing else runs
    assert not mark.exists()


async def test_a_program_that_is_missing_is_unknown() -> None:
    verdict = await fence_node(REQUEST, [Fence(node="a", command=("/no/such/fence",))])
    assert (verdict.outcome, "could not be run" in verdict.reason) == ("unknown", True)


async def test_methods_are_asked_in_order_until_one_confirms(tmp_path: Path) -> None:
    log = tmp_path / "log"
    methods = [
        fence(f"echo 1 >> {log}; exit 2"),
        fence(f"echo other >> {log}", node="b"),
        fence(f"echo 2 >> {log}; exit 0"),
        fence(f"echo 3 >> {log}; exit 0"),
    ]
    assert (await fence_node(REQUEST, methods)).outcome == "confirmed"
    assert log.read_text().split() == ["1", "2"]


async def test_if_none_confirms_a_refusal_is_told_with_every_reason() -> None:
    verdict = await fence_node(REQUEST, [fence("echo dunno; exit 3"), fence("echo no; exit 1")])
    assert verdict.outcome == "refused"
    assert "dunno" in verdict.reason
    assert "no" in verdict.reason


async def test_without_a_method_nothing_is_confirmed() -> None:
    assert (await fence_node(REQUEST, [fence("exit 0", node="b")])).outcome == "unknown"


def config(*fences: Fence) -> NodeConfig:
    peer = Peer(name="a", address="10.0.0.1", public_key="x" * 40)
    return NodeConfig(node=Node(name="b", address="10.0.0.2"), peers=(peer,), fences=fences)


def test_coverage_says_beforehand_what_would_happen() -> None:
    spec = WorkloadSpec(name="w", nodes=("a", "b"), command=("x",), right_to_lead="fence")
    none = coverage(config(), spec)
    assert "host loss of a: no automatic takeover: no fence method is configured for a" in none
    some = coverage(config(Fence(node="a", command=("x",), covers=("process failure",))), spec)
    assert "process failure of a: automatic takeover, once the fence confirms" in some
    assert "host loss of a: no automatic takeover: no fence method for a covers it" in some
    manual = WorkloadSpec(name="w", nodes=("a", "b"), command=("x",))
    assert all("manual" in sentence for sentence in coverage(config(fence("exit 0")), manual))
    assert fenceable(config(fence("exit 0"))) == {"a"}


async def test_a_node_that_knows_a_newer_term_is_not_turned_off_by_the_next_method(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who asks is of the past: the other one leads by now. An operator may go on."""

    async def refuses(*_: object) -> FenceAnswer:
        reason = "a leads w in term 100, and b knows of 1 only"
        return FenceAnswer(node="a", by="b", terms={"w": 1}, outcome="refused", reason=reason, newer=True)

    monkeypatch.setattr(fencing, "ask_in_child", refuses)
    ssh = Fence(node="a", ssh=SshFence(host="127.0.0.1", key_file="/k", host_key="ssh-ed25519 AAAA"))
    methods = [ssh, fence(f"touch {tmp_path}/off")]
    verdict = await fence_node(REQUEST, methods)
    assert verdict.outcome == "refused"
    assert "a leads w in term 100" in verdict.reason
    assert not (tmp_path / "off").exists()
    assert (await ask_methods(REQUEST, methods))[-1].outcome == "confirmed"


class Stuck:
    """A child that waits for a disk in the kernel, and cannot be killed."""

    pid, returncode = 0, None

    async def communicate(self, _: bytes = b"") -> tuple[bytes, bytes]:
        await asyncio.sleep(60)
        raise AssertionError

    async def wait(self) -> int:
        await asyncio.sleep(60)
        raise AssertionError


async def test_a_method_that_cannot_be_killed_is_unknown_and_the_next_one_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, stuck = asyncio.create_subprocess_exec, [Stuck()]

    async def start(*argv: str, **options: Any) -> Any:
        return stuck.pop() if stuck else await real(*argv, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr("os.killpg", lambda *_: None)
    monkeypatch.setattr(children, "REAP_WITHIN_S", 0.05)
    monkeypatch.setattr(children, "_hanging", {})
    first, second = await ask_methods(REQUEST, [fence("", timeout_ms=50), fence("exit 0")])
    assert (first.outcome, second.outcome) == ("unknown", "confirmed")
    (again,) = await ask_methods(REQUEST, [fence("", timeout_ms=50)])
    assert again.outcome == "unknown"
    assert "has not ended yet" in again.reason, "and no second one is started beside it"
