"""A fence by SSH: only a whole answer to this request, by the pinned host, confirms. All else is unknown."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import paramiko
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common import ssh_child
from common.config import Fence, Node, NodeConfig, SshFence
from common.errors import ProtocolError
from common.fence_request import FenceAnswer, FenceRequest, read_words, words_of
from common.fencing import Verdict, fence_node
from common.ssh_fence import ask_by_ssh
from outlive.doctor.named import check_named
from tests.unit.ssh_server import Answers, Step, ssh_server

REQUEST = FenceRequest(node="a", by="b", terms={"redis": 4})
CONFIRMED = FenceAnswer(node="a", by="b", terms={"redis": 4}, outcome="confirmed", reason="nothing is left")
STATUS = {"confirmed": 0, "refused": 22, "unknown": 23, "ready": 0}


def encoded(**changes: object) -> bytes:
    return msgspec.json.encode(replace(CONFIRMED, **changes))  # type: ignore[arg-type]


async def verdict(ssh: SshFence, *, timeout_ms: int = 5000, request: FenceRequest = REQUEST) -> Verdict:
    return await fence_node(request, [Fence(node="a", ssh=ssh, timeout_ms=timeout_ms)])


@pytest.mark.parametrize("outcome", ["confirmed", "refused", "unknown"])
async def test_the_nodes_own_word_is_the_answer(tmp_path: Path, outcome: str) -> None:
    answers = Answers(encoded(outcome=outcome), STATUS[outcome])
    with ssh_server(tmp_path, answers) as ssh:
        found = await verdict(ssh)
    assert found.outcome == outcome
    assert "nothing is left" in found.reason
    assert answers.asked == ["outlive accept-fence --node a --by b --workload redis=4 --output json"]


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (b"", 0),
        (b"confirmed", 0),
        (encoded()[:-1], 0),
        (encoded(), 1),
        (encoded(), 23),
        (encoded(), 22),
        (encoded(outcome="refused"), 0),
        (encoded(outcome="ready"), 0),
        (encoded(node="c"), 0),
        (encoded(by="c"), 0),
        (encoded(terms={"redis": 3}), 0),
        (encoded(terms={}), 0),
        (b'{"schema_version": 1, "error": {"kind": "ConfigError", "message": "none"}}', 3),
    ],
)
async def test_what_is_no_whole_answer_to_this_request_is_unknown(
    tmp_path: Path, output: bytes, status: int
) -> None:
    with ssh_server(tmp_path, Answers(output, status)) as ssh:
        assert (await verdict(ssh)).outcome == "unknown"


async def test_another_host_key_is_told_loudly_and_nothing_is_asked_of_it(tmp_path: Path) -> None:
    answers = Answers(encoded())
    other = paramiko.ECDSAKey.generate()
    with ssh_server(tmp_path, answers) as ssh:
        pinned = replace(ssh, host_key=f"{other.get_name()} {other.get_base64()}")
        found = await verdict(pinned)
    assert found.outcome == "unknown"
    assert "WRONG HOST KEY" in found.reason
    assert answers.asked == []


async def test_another_kind_of_host_key_is_as_wrong(tmp_path: Path) -> None:
    answers = Answers(encoded())
    other = paramiko.RSAKey.generate(2048)
    with ssh_server(tmp_path, answers) as ssh:
        found = await verdict(replace(ssh, host_key=f"{other.get_name()} {other.get_base64()}"))
    assert found.outcome == "unknown"
    assert answers.asked == []


async def test_a_key_that_is_not_accepted_is_unknown(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    paramiko.ECDSAKey.generate().write_private_key_file(str(stranger))
    stranger.chmod(0o600)
    with ssh_server(tmp_path, Answers(encoded())) as ssh:
        found = await verdict(replace(ssh, key_file=str(stranger)))
    assert found.outcome == "unknown"
    assert "does not accept" in found.reason


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
async def test_a_key_that_others_may_read_is_not_used(tmp_path: Path, mode: int) -> None:
    answers = Answers(encoded())
    with ssh_server(tmp_path, answers) as ssh:
        Path(ssh.key_file).chmod(mode)
        found = await verdict(ssh)
    assert found.outcome == "unknown"
    assert "can be read by others" in found.reason
    assert answers.asked == []


async def test_what_is_no_key_is_unknown(tmp_path: Path) -> None:
    with ssh_server(tmp_path, Answers(encoded())) as ssh:
        Path(ssh.key_file).write_text("-----BEGIN NOTHING-----\n")
        found = await verdict(ssh)
    assert found.outcome == "unknown"
    assert "no private SSH key" in found.reason


@pytest.mark.parametrize("step", ["accepted", "started", "asked", "answered"])
async def test_a_connection_that_is_cut_half_way_is_unknown(tmp_path: Path, step: Step) -> None:
    with ssh_server(tmp_path, Answers(encoded(), cut_at=step)) as ssh:
        assert (await verdict(ssh)).outcome == "unknown"


@pytest.mark.parametrize("step", ["accepted", "started", "asked", "answered"])
async def test_a_host_that_hangs_is_unknown_in_time_and_the_loop_runs_on(tmp_path: Path, step: Step) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    began_s = time.monotonic()
    with ssh_server(tmp_path, Answers(encoded(), hang_at=step)) as ssh:
        found = await verdict(ssh, timeout_ms=600)
        took_s = time.monotonic() - began_s
    ticking.cancel()
    assert found.outcome == "unknown"
    assert took_s < 2.5
    assert ticks > 15


async def test_nobody_at_the_port_is_unknown(tmp_path: Path) -> None:
    with ssh_server(tmp_path, Answers()) as ssh:
        pass
    found = await verdict(ssh)
    assert found.outcome == "unknown"
    assert "refused" in found.reason  # the connection, not the fence


async def test_without_a_workload_nobody_is_asked(tmp_path: Path) -> None:
    answers = Answers(encoded(terms={}))
    with ssh_server(tmp_path, answers) as ssh:
        found = await verdict(ssh, request=FenceRequest(node="a", by="b"))
    assert found.outcome == "unknown"
    assert answers.asked == []


async def test_a_dry_run_is_ready_and_is_never_taken_for_a_fence(tmp_path: Path) -> None:
    with ssh_server(tmp_path, Answers(encoded(outcome="ready"))) as ssh:
        assert (await ask_by_ssh(ssh, REQUEST, 5.0, dry_run=True)).outcome == "ready"
    with ssh_server(tmp_path, Answers(encoded())) as ssh, pytest.raises(ProtocolError):
        await ask_by_ssh(ssh, REQUEST, 5.0, dry_run=True)


async def test_after_a_method_that_cannot_tell_the_next_one_is_asked(tmp_path: Path) -> None:
    with ssh_server(tmp_path, Answers(b"?")) as ssh:
        methods = [Fence(node="a", ssh=ssh), Fence(node="a", command=("true",))]
        assert (await fence_node(REQUEST, methods)).outcome == "confirmed"


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        ("good", "ok", "would be carried out"),
        ("refusing", "fail", "would be carried out"),
        ("wrong host key", "fail", "WRONG HOST KEY"),
        ("readable key", "fail", "can be read by others"),
        ("nobody there", "warn", "it cannot confirm now"),
    ],
)
async def test_the_doctor_tells_what_can_never_confirm_from_what_cannot_now(
    tmp_path: Path, case: str, status: str, words: str
) -> None:
    outcome = "refused" if case == "refusing" else "ready"
    answers = Answers(encoded(outcome=outcome, terms={}, reason="would be carried out"), STATUS[outcome])
    other = paramiko.ECDSAKey.generate()
    with ssh_server(tmp_path, answers) as ssh:
        if case == "wrong host key":
            ssh = replace(ssh, host_key=f"{other.get_name()} {other.get_base64()}")
        if case == "readable key":
            Path(ssh.key_file).chmod(0o644)
        if case == "nobody there":
            ssh = replace(ssh, port=1)
        config = NodeConfig(
            node=Node(name="b", address="127.0.0.1", run_dir=str(tmp_path)),
            fences=(Fence(node="a", ssh=ssh),),
        )
        checks = {check.name: check for check in await check_named(config)}
    found = checks["fence ssh to 127.0.0.1 of a"]
    assert (found.status, words in found.detail) == (status, True), found
    assert all("--dry-run" in asked for asked in answers.asked)


# --- the words --------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


TERMS = st.integers(0, 10**12)


@given(NAMES, NAMES, st.dictionaries(NAMES, TERMS, max_size=4), TERMS, st.booleans())
def test_the_node_reads_what_was_asked(
    node: str, by: str, terms: dict[str, int], up_to: int, dry_run: bool
) -> None:
    request = FenceRequest(node=node, by=by, terms=terms, up_to=up_to)
    assert read_words(["/opt/outlive", *words_of(request, dry_run=dry_run)]) == (request, dry_run)


GOOD = list(words_of(REQUEST))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sh", "-c", "reboot"],
        ["accept-fence"],
        GOOD[:-2],
        [*GOOD, "--config", "/tmp/evil.toml"],
        [*GOOD, "--output", "json"],
        [*GOOD, "--workload", "redis=5"],
        [*GOOD, "--workload", "redis"],
        [*GOOD, "--workload", "../x=1"],
        [*GOOD, "--workload", "x=-1"],
        [*GOOD, "--workload", "x=1e3"],
        [*GOOD, "--workload"],
        [*GOOD, "--up-to", "-1"],
        [*GOOD, "; reboot"],
        ["accept-fence", "--node", "a", "--by", "b\n", "--output", "json"],
    ],
)
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ProtocolError):
        read_words(words)


class TestTheChild:
    async def test_that_ends_without_an_answer_is_unknown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ssh_child, "_CHILD", ("sh", "-c", "cat >/dev/null; kill -9 $$"))
        with ssh_server(tmp_path, Answers(encoded())) as ssh:
            found = await verdict(ssh)
        assert found.outcome == "unknown"
        assert "without an answer" in found.reason

    async def test_that_does_not_end_is_killed_in_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ssh_child, "_CHILD", ("sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 1000"))
        monkeypatch.setattr(ssh_child, "_CHILD_GRACE_S", 0.1)
        with ssh_server(tmp_path, Answers(encoded())) as ssh:
            found = await verdict(ssh, timeout_ms=200)
        assert found.outcome == "unknown"
        assert "no answer within 200 ms" in found.reason
        assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()

    async def test_that_cannot_be_run_is_unknown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ssh_child, "_CHILD", ("/no/such/python",))
        with ssh_server(tmp_path, Answers(encoded())) as ssh:
            assert "could not be run" in (await verdict(ssh)).reason
