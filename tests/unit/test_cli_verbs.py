"""Verbs that ask a keeper, against a control server that answers as told: views, JSON, exit codes."""

from __future__ import annotations

import asyncio
import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq.asyncio
from msgspec.structs import replace

from common.config import load_config
from common.control import (
    AgentMetrics,
    AskExplanation,
    AskHistory,
    AskStatus,
    CancelSwitchover,
    CaptureStatus,
    CompareFiles,
    Done,
    Explanation,
    Failover,
    FilesComparison,
    ForgetWorkload,
    History,
    KeeperAnswer,
    KeeperRequest,
    NodeStatus,
    PauseTakeover,
    PeerStatus,
    PlannedSwitchover,
    PlanSwitchover,
    Prospect,
    Refused,
    ReplicaProgress,
    ResumeTakeover,
    SendingProgress,
    StartWorkload,
    StopWorkload,
    Switchover,
    TermHistory,
    TimelineEntry,
    VerificationProgress,
    Verify,
    Verifying,
    WorkloadMetrics,
    WorkloadStatus,
)
from common.control_channel import ControlServer
from common.model import EpochId
from common.pauses import Pause
from outlive.cli import follow
from outlive.cli import verify as verify_module
from outlive.cli.app import run
from outlive.cli.status import COLUMNS

NODE = """\
[node]
name = "a"
address = "127.0.0.1"
run_dir = "{directory}/run"
state_dir = "{directory}/state"

[[peers]]
name = "b"
address = "127.0.0.2"
public_key = "rq:rM>}}U?@Lns47E1%kR.o@n%FcmmsL/@{{H8]yf7"

[[workloads]]
name = "redis"
nodes = ["a", "b"]
command = ["redis-server"]
"""

LEADING = WorkloadStatus(
    name="redis",
    role="primary",
    state="leading",
    reason="nobody else leads",
    term=3,
    leader="a",
    running=True,
    restorable=True,
    data_at_risk_s=0.42,
    captured=EpochId(3, 1042),
    replicas=(ReplicaProgress(node="b", connected=True, acknowledged=EpochId(3, 1041), restorable=True),),
)
WAITING = replace(
    LEADING,
    role="replica",
    state="waiting",
    reason="b is silent and the right to lead is manual",
    leader="b",
    running=False,
    captured=None,
    stored=EpochId(3, 1041),
    replicas=(),
)
STOPPED = replace(
    LEADING, state="stopped", running=False, stopped=True, restorable=False, data_at_risk_s=None, replicas=()
)
TERM = TermHistory(
    workload="redis",
    term=4,
    leader="a",
    cause="an operator said so",
    began_wall_s=1_764_000_000.5,
    restored=EpochId(3, 1041),
    timeline=(
        TimelineEntry(at_ms=1.25, wall_s=1_764_000_000.5, event="fence", reason="b is off, an operator says"),
        TimelineEntry(at_ms=99.0, wall_s=1_764_000_000.6, event="announce", reason="healthy"),
    ),
)


def node_status(*workloads: WorkloadStatus, **changes: object) -> NodeStatus:
    status = NodeStatus(
        node="a",
        boot_id="boot-1",
        agent="alive",
        peers=(PeerStatus(node="b", keeper_silence_ms=31, agent_silence_ms=None),),
        workloads=workloads,
    )
    return replace(status, **changes)


class FakeNode:
    """A node whose processes answer from a table: request type to answer, or to a function that makes one."""

    def __init__(self, directory: Path) -> None:
        self.config_path = directory / "node.toml"
        self.config_path.write_text(NODE.format(directory=directory))
        self.config = load_config(self.config_path)
        self.answers: dict[type, KeeperAnswer | Callable[[], KeeperAnswer]] = {AskHistory: History(terms=())}
        self.asked: list[KeeperRequest] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._context = zmq.asyncio.Context()
        self._servers: list[tuple[ControlServer, asyncio.Task[None]]] = []
        self._thread.start()

    def listen(self, endpoint: str) -> None:
        asyncio.run_coroutine_threadsafe(self._serve(endpoint), self._loop).result(5)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
        self._context.destroy(linger=0)

    def run(self, *words: str) -> int:
        return run(["--config", str(self.config_path), *words])

    async def _serve(self, endpoint: str) -> None:
        server = ControlServer(self._context, endpoint, self._answer)
        self._servers.append((server, asyncio.create_task(server.serve())))

    async def _stop(self) -> None:
        for server, task in self._servers:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            server.close()

    async def _answer(self, request: KeeperRequest) -> KeeperAnswer:
        if not isinstance(request, AskStatus | AskHistory):
            self.asked.append(request)
        answer = self.answers[type(request)]
        return answer() if callable(answer) else answer


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[FakeNode]:
    """A node on which nothing answers."""
    node = FakeNode(tmp_path)
    yield node
    node.close()


@pytest.fixture
def node(silent: FakeNode, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """A node whose keeper answers."""
    monkeypatch.setattr(follow, "SETTLED_S", 0.15)
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    silent.listen(silent.config.keeper_endpoint)
    return silent


Captured = pytest.CaptureFixture[str]


def read_json(capsys: Captured) -> dict[str, object]:
    """Return the one object on stdout."""
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    assert value["schema_version"] == 1
    return value


# --- status -----------------------------------------------------------------------------------------


def test_status_shows_small_words_in_columns(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(LEADING)
    assert node.run("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "node a   keeper alive   agent alive"
    assert lines[3].split() == ["b", "31", "ms", "ago", "never", "heard"]
    assert lines[5].split("  ")[0] == "WORKLOAD"
    row = ["redis", "primary", "leading", "3", "t3-e1042", "yes"]
    assert lines[6].split() == [*row, "0.4", "s", "-", "1", "of", "1"]
    assert "redis: nobody else leads" in lines


def test_status_as_json_keeps_its_keys(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(LEADING)
    assert node.run("status", "--output", "json") == 0
    status = read_json(capsys)
    assert list(status) == [
        *("schema_version", "node", "boot_id", "agent", "peers", "workloads"),
        *("unprotected", "rpo_missed", "warnings"),
    ]
    (workload,) = status["workloads"]
    assert workload["captured"] == {"term": 3, "epoch": 1042}
    assert workload["replicas"][0]["acknowledged"] == {"term": 3, "epoch": 1041}
    assert workload["data_at_risk_s"] == 0.42
    assert status["peers"] == [
        {"node": "b", "keeper_silence_ms": 31, "agent_silence_ms": None, "boot_id": "", "refused": ""}
    ]


def test_status_of_an_unprotected_workload_says_why_and_has_its_own_exit_code(
    node: FakeNode, capsys: Captured
) -> None:
    reason = "b: 1 GiB of memory is free, 2 are needed"
    replica = ReplicaProgress(node="b", connected=True, reasons=(reason,))
    node.answers[AskStatus] = node_status(
        replace(LEADING, restorable=False, reasons=(reason,), replicas=(replica,))
    )
    assert node.run("status") == 16
    shown = capsys.readouterr().out
    assert shown.count(reason) == 1
    assert f"redis: not restorable: {reason}" in shown
    assert "0 of 1" in shown
    assert node.run("status", "--output", "json") == 16
    assert read_json(capsys)["unprotected"] == ["redis"]


def test_a_replica_that_is_not_ready_is_named_though_another_is(node: FakeNode, capsys: Captured) -> None:
    others = (
        ReplicaProgress(node="c", connected=False),
        ReplicaProgress(node="d", connected=True, reasons=("port 6379 is taken",)),
    )
    node.answers[AskStatus] = node_status(replace(LEADING, replicas=(*LEADING.replicas, *others)))
    assert node.run("status") == 0
    shown = capsys.readouterr().out
    assert "1 of 3" in shown
    assert "redis: replica c is not connected" in shown
    assert "redis: replica d could not restore it: port 6379 is taken" in shown


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (node_status(LEADING, agent="silent"), 16),
        (node_status(replace(WAITING, state="following")), 0),
        (node_status(replace(WAITING, state="following", restorable=False)), 16),
        (node_status(replace(WAITING, state="following", restorable=False, stopped=True)), 0),
        (node_status(WAITING), 16),
        (node_status(replace(LEADING, state="failed", running=False)), 16),
        (node_status(STOPPED), 0),
        (node_status(replace(WAITING, role="none", state="following", restorable=False)), 0),
        (node_status(replace(WAITING, role="none", state="failed", restorable=False)), 16),
        (node_status(), 0),
        (node_status(replace(LEADING, rpo="met")), 0),
        (node_status(replace(LEADING, rpo="missed")), 17),
        (node_status(replace(LEADING, rpo="missed", restorable=False)), 16),
    ],
    ids=[
        "agent dead",
        "ready replica",
        "replica that is not ready",
        "stopped by its leader",
        "waiting",
        "failed",
        "stopped",
        "not this node's",
        "of an unknown term",
        "none",
        "objective met",
        "objective missed",
        "objective missed, and worse",
    ],
)
def test_the_exit_code_says_what_is_down_could_be_lost_or_misses_its_objective(
    node: FakeNode, status: NodeStatus, code: int
) -> None:
    node.answers[AskStatus] = status
    assert node.run("status") == code


def row_of(node: FakeNode, capsys: Captured, workload: WorkloadStatus) -> dict[str, str]:
    """How a workload's row looks, by column."""
    node.answers[AskStatus] = node_status(workload)
    node.run("status")
    header, row = capsys.readouterr().out.splitlines()[5:7]
    starts = [header.index(column) for column in COLUMNS]
    ends = [*starts[1:], None]
    return {column: row[at:end].strip() for column, at, end in zip(COLUMNS, starts, ends, strict=True)}


@pytest.mark.parametrize(
    ("workload", "restorable", "at_risk"),
    [
        (replace(LEADING, restorable=False, data_at_risk_s=None), "no", "all"),
        (replace(LEADING, data_at_risk_s=200.0), "yes", "3 min"),
        (STOPPED, "-", "-"),
        (replace(WAITING, state="following", stopped=True, data_at_risk_s=None), "yes", "-"),
        (replace(WAITING, role="none", restorable=False, data_at_risk_s=None), "-", "-"),
    ],
    ids=["unprotected", "long ago", "stopped here", "stopped elsewhere", "not this node's"],
)
def test_what_is_at_risk_is_said_in_fixed_words(
    node: FakeNode, capsys: Captured, workload: WorkloadStatus, restorable: str, at_risk: str
) -> None:
    row = row_of(node, capsys, workload)
    assert (row["RESTORABLE"], row["DATA AT RISK"]) == (restorable, at_risk)


@pytest.mark.parametrize(("rpo", "word"), [("none", "-"), ("met", "met"), ("missed", "missed")])
def test_whether_the_objective_is_met_is_one_word(
    node: FakeNode, capsys: Captured, rpo: str, word: str
) -> None:
    assert row_of(node, capsys, replace(LEADING, rpo=rpo))["RPO"] == word


def test_what_captures_is_said_in_a_sentence_and_in_json(node: FakeNode, capsys: Captured) -> None:
    how = CaptureStatus(backend="fast", tracker="soft-dirty", reason="this kernel has soft-dirty")
    node.answers[AskStatus] = node_status(replace(LEADING, capture=how))
    node.run("status")
    sentence = "redis: captured by the fast backend, tracker soft-dirty: this kernel has soft-dirty"
    assert sentence in capsys.readouterr().out.splitlines()
    node.run("status", "--output", "json")
    assert read_json(capsys)["workloads"][0]["capture"]["tracker"] == "soft-dirty"


def test_what_captures_is_said_without_a_tracker_where_there_is_none(
    node: FakeNode, capsys: Captured
) -> None:
    how = CaptureStatus(backend="stock", tracker="", reason="the configuration says so")
    node.answers[AskStatus] = node_status(replace(LEADING, capture=how))
    node.run("status")
    sentence = "redis: captured by the stock backend: the configuration says so"
    assert sentence in capsys.readouterr().out.splitlines()


def test_what_lies_aside_is_named_until_somebody_removes_it(node: FakeNode, capsys: Captured) -> None:
    kept = "/var/lib/outlive/store/_aside/redis-t3-e9-unacknowledged"
    node.answers[AskStatus] = node_status(replace(LEADING, aside=(kept,)))
    assert node.run("status") == 0
    sentence = f"redis: an epoch that nobody acknowledged is kept in {kept}"
    assert sentence in capsys.readouterr().out.splitlines()


def test_a_missed_objective_is_said_in_a_sentence_and_in_json(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(replace(LEADING, rpo="missed", rpo_ms=5000))
    assert node.run("status") == 17
    sentence = "redis: more is, or was a moment ago, at risk than rpo_ms allows (5 s)"
    assert sentence in capsys.readouterr().out.splitlines()
    assert node.run("status", "--output", "json") == 17
    assert read_json(capsys)["rpo_missed"] == ["redis"]


def test_nothing_is_said_against_the_standby_of_a_workload_that_was_stopped(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[AskStatus] = node_status(STOPPED)
    node.run("status")
    assert "not restorable" not in capsys.readouterr().out


def test_a_standby_says_why_it_takes_no_newer_epochs_though_it_could_restore(
    node: FakeNode, capsys: Captured
) -> None:
    reason = "epoch t3-e1042 could not be stored here: the disk is full"
    node.answers[AskStatus] = node_status(replace(WAITING, state="following", reasons=(reason,)))
    assert node.run("status") == 0
    assert f"redis: {reason}" in capsys.readouterr().out


def test_silences_are_told_in_units_for_people(node: FakeNode, capsys: Captured) -> None:
    peer = PeerStatus(node="b", keeper_silence_ms=7_300_000, agent_silence_ms=4_210)
    node.answers[AskStatus] = node_status(LEADING, peers=(peer,))
    node.run("status")
    assert capsys.readouterr().out.splitlines()[3].split() == ["b", "2", "h", "ago", "4.2", "s", "ago"]


def test_a_refused_key_and_a_warning_are_shown_though_nothing_runs(node: FakeNode, capsys: Captured) -> None:
    reason = "b refuses this node's key (is it in a [[peers]] block on b?)"
    peer = PeerStatus(node="b", keeper_silence_ms=None, agent_silence_ms=None, refused=reason)
    node.answers[AskStatus] = node_status(peers=(peer,), warnings=("its memory is not locked",))
    assert node.run("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split("  ")[-2].strip() == "refused"
    assert lines[-2:] == ["the keeper: its memory is not locked", f"peer b: {reason}"]


def test_status_without_any_process_says_so(silent: FakeNode, capsys: Captured) -> None:
    assert silent.run("status") == 4
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("outlive: neither keeper nor agent of node a answers")
    assert "hint: systemctl start outlive-keeper outlive-agent" in told.err


def test_status_with_the_agent_alone_says_what_that_means(silent: FakeNode, capsys: Captured) -> None:
    silent.listen(silent.config.agent_endpoint)
    silent.answers[AskStatus] = AgentMetrics(node="a", pid=7, rss_bytes=0, cpu_s=0.0, workloads=())
    assert silent.run("status", "--output", "json") == 4
    error = read_json(capsys)["error"]
    assert error["kind"] == "UnreachableError"
    assert error["retryable"] is True
    assert "the agent of node a answers, its keeper does not" in error["message"]


# --- failover ---------------------------------------------------------------------------------------


def in_turn(*answers: KeeperAnswer) -> Callable[[], KeeperAnswer]:
    """Answer each in turn, the last one for ever."""
    left = list(answers)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_failover_is_followed_until_it_leads(node: FakeNode, capsys: Captured) -> None:
    taking_over = replace(WAITING, role="primary", state="taking_over", term=4, leader="a")
    node.answers[AskStatus] = in_turn(
        node_status(WAITING),
        node_status(WAITING),
        node_status(taking_over),
        node_status(replace(taking_over, state="leading", running=True)),
    )
    began_s = time.time()
    old = TimelineEntry(at_ms=0.0, wall_s=began_s - 60.0, event="suspected", reason="b is silent")
    new = tuple(replace(entry, wall_s=began_s + 60.0) for entry in TERM.timeline)
    node.answers[AskHistory] = History(terms=(replace(TERM, timeline=(old, *new)),))
    node.answers[Failover] = Done(detail="taking over")
    words = ("failover", "redis", "--accept-data-loss", "--old-primary-is-off", "b")
    assert node.run(*words, "--output", "json") == 0
    told = capsys.readouterr()
    assert node.asked == [Failover(workload="redis", accept_data_loss=True, old_primary_is_off="b")]
    answer = json.loads(told.out)
    assert list(answer) == ["schema_version", "workload", "detail", "outcome"]
    assert (answer["outcome"]["state"], answer["outcome"]["term"]) == ("leading", 4)
    assert [step["event"] for step in answer["outcome"]["timeline"]] == ["fence", "announce"]
    assert told.err.count("b is off, an operator says") == 1  # each step is told once
    assert "b is silent" not in told.err  # that was before it was asked for


def test_a_term_that_led_before_is_not_taken_for_the_failover(node: FakeNode) -> None:
    node.answers[AskStatus] = node_status(LEADING)
    node.answers[Failover] = Done()
    assert node.run("failover", "redis", "--accept-data-loss") == 5


def test_a_refused_failover_exits_with_the_code_of_its_reason(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(WAITING)
    node.answers[Failover] = Refused(
        error="NoRightToLeadError", message="b may still run it", hint="--old-primary-is-off b"
    )
    assert node.run("failover", "redis") == 10
    assert capsys.readouterr().err == "outlive: b may still run it\n   hint: --old-primary-is-off b\n"


def test_a_failover_that_comes_to_rest_waiting_had_no_right(node: FakeNode, capsys: Captured) -> None:
    acquiring = replace(WAITING, state="acquiring")
    node.answers[AskStatus] = in_turn(node_status(WAITING), node_status(acquiring), node_status(WAITING))
    node.answers[Failover] = Done()
    assert node.run("failover", "redis", "--accept-data-loss") == 10
    told = capsys.readouterr().err
    assert "redis is waiting, not leading" in told
    assert "hint: to end it: outlive stop redis on b; to move it here: a fence" in told  # b is heard
    assert "--old-primary-is-off" not in told


@pytest.mark.parametrize(
    ("leader", "hint"),
    [
        ("b", "make sure that b is off, then: --old-primary-is-off b"),
        ("", "outlive status on the other nodes"),
    ],
)
def test_the_hint_after_a_failover_without_right_is_about_the_leader(
    node: FakeNode, capsys: Captured, leader: str, hint: str
) -> None:
    silent_peer = PeerStatus(node="b", keeper_silence_ms=60_000, agent_silence_ms=None)
    node.answers[AskStatus] = node_status(replace(WAITING, leader=leader), peers=(silent_peer,))
    node.answers[Failover] = Done()
    assert node.run("failover", "redis", "--accept-data-loss") == 10
    assert f"hint: {hint}\n" in capsys.readouterr().err


def test_a_failover_whose_restore_fails_says_so(node: FakeNode) -> None:
    failed = replace(WAITING, role="primary", state="failed", term=4)
    node.answers[AskStatus] = in_turn(node_status(WAITING), node_status(failed))
    node.answers[Failover] = Done()
    assert node.run("failover", "redis", "--accept-data-loss") == 9


@pytest.mark.parametrize("name", ["NoSuchError", "Exception", "ClassVar", ""])
def test_a_refusal_of_an_unknown_kind_is_still_an_error(node: FakeNode, name: str) -> None:
    node.answers[AskStatus] = node_status(WAITING)
    node.answers[Failover] = Refused(error=name, message="no")
    assert node.run("failover", "redis") == 1


# --- start, stop, protect, unprotect, history -------------------------------------------------------


def test_start_hands_the_declaration_to_the_keeper(node: FakeNode) -> None:
    node.answers[AskStatus] = in_turn(node_status(), node_status(LEADING))
    node.answers[StartWorkload] = Done()
    assert node.run("start", "redis") == 0
    assert node.asked == [StartWorkload(spec=node.config.workloads[0])]


def test_start_of_what_runs_here_says_so_and_tells_no_old_steps(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(LEADING)
    node.answers[AskHistory] = History(terms=(replace(TERM, term=3),))
    node.answers[StartWorkload] = Done(detail="it is led here already: protected by b")
    assert node.run("start", "redis") == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == "redis runs here already: nothing was changed"
    assert told.err == ""


def test_stop_of_what_is_stopped_says_so(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(STOPPED)
    node.answers[StopWorkload] = Done()
    assert node.run("stop", "redis") == 0
    assert capsys.readouterr().out.splitlines()[0] == "redis is stopped already: nothing was changed"


def test_start_of_what_is_not_declared_is_an_error_with_the_next_command(
    node: FakeNode, capsys: Captured
) -> None:
    assert node.run("start", "nothing") == 5
    assert "hint: declare it: outlive protect nothing -- COMMAND" in capsys.readouterr().err


def test_stop_waits_until_it_is_ended(node: FakeNode, capsys: Captured) -> None:
    stopped = replace(STOPPED, reason="an operator stopped it")
    node.answers[AskStatus] = in_turn(node_status(LEADING), node_status(stopped))
    node.answers[StopWorkload] = Done()
    assert node.run("stop", "redis", "--timeout", "5") == 0
    assert "an operator stopped it" in capsys.readouterr().out


def test_protect_declares_and_starts(node: FakeNode) -> None:
    web = replace(LEADING, name="web", term=1)
    node.answers[AskStatus] = in_turn(node_status(), node_status(web))
    node.answers[StartWorkload] = Done()
    options = ("--health-tcp", "8080", "--env", "LANG=C=D", "--files", "/data", "--on-exit", "restart")
    assert node.run("protect", "web", *options, "--", "python3", "-m", "http.server", "--bind", "::") == 0
    spec = load_config(node.config_path).workloads[1]
    assert node.asked == [StartWorkload(spec=spec)]
    assert spec.command == ("python3", "-m", "http.server", "--bind", "::")
    assert spec.nodes == ("a", "b")
    assert spec.environment == {"LANG": "C=D"}
    assert spec.health is not None
    assert spec.health.tcp == 8080
    assert [item.path for item in spec.files] == ["/data"]
    assert spec.on_exit == "restart"


def test_protect_without_a_keeper_declares_and_says_that_it_is_not_started(
    silent: FakeNode, capsys: Captured
) -> None:
    assert silent.run("protect", "web", "--", "true") == 4
    assert len(load_config(silent.config_path).workloads) == 2
    assert "web is declared, but not started" in capsys.readouterr().err
    assert silent.run("protect", "idle", "--no-start", "--", "true") == 0


def test_unprotect_forgets_and_removes_the_block(node: FakeNode) -> None:
    stopped = replace(LEADING, role="none", state="stopped", running=False)
    node.answers[AskStatus] = node_status(stopped)
    node.answers[ForgetWorkload] = Done()
    assert node.run("unprotect", "redis") == 0
    assert node.asked == [ForgetWorkload(workload="redis")]
    assert load_config(node.config_path).workloads == ()


def test_unprotect_of_what_the_keeper_will_not_forget_changes_nothing(node: FakeNode) -> None:
    before = node.config_path.read_text()
    node.answers[AskStatus] = node_status(LEADING)
    node.answers[ForgetWorkload] = Refused(error="WorkloadError", message="it runs")
    assert node.run("unprotect", "redis") == 5
    assert node.config_path.read_text() == before


def test_history_shows_each_term_with_its_steps(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskHistory] = History(terms=(replace(TERM, term=3, timeline=(), restored=None), TERM))
    assert node.run("history", "redis") == 0
    shown = capsys.readouterr().out
    assert "term 4: a led from 20" in shown
    assert ", restored t3-e1041" in shown
    assert "an operator said so" in shown
    assert [line.split()[:2] for line in shown.splitlines()[-2:]] == [["1.2", "fence"], ["99.0", "announce"]]
    assert node.run("history", "redis", "--output", "json") == 0
    terms = read_json(capsys)["terms"]
    assert [term["term"] for term in terms] == [3, 4]
    assert terms[1]["restored"] == {"term": 3, "epoch": 1041}


def test_history_without_a_name_is_that_of_all(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(LEADING, replace(LEADING, name="web"))
    web = replace(TERM, workload="web")
    node.answers[AskHistory] = in_turn(History(terms=(TERM,)), History(terms=(web,)))
    assert node.run("history") == 0
    shown = capsys.readouterr().out
    assert "redis, term 4: a led" in shown
    assert "web, term 4: a led" in shown
    assert node.run("history", "--output", "json") == 0
    assert read_json(capsys)["workload"] is None


def test_history_of_a_node_without_workloads_says_that_there_is_none(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[AskStatus] = node_status()
    assert node.run("history") == 0
    assert capsys.readouterr() == ("", "no terms yet\n")


def test_history_of_the_unknown_is_an_error(node: FakeNode) -> None:
    assert node.run("history", "nothing") == 5


# --- verify -----------------------------------------------------------------------------------------


def comparing(replica: str, rounds: int, done: int = 0, different: int = 0) -> VerificationProgress:
    """How far a comparison of 1,000 pages is that had 3 rounds before."""
    return VerificationProgress(
        replica=replica,
        pages_done=done,
        pages_due=1000 if done else 0,
        epochs=1,
        rounds=rounds,
        pages_compared=1000 * rounds + done,
        pages_different=different,
    )


def led(epochs: int, *verification: VerificationProgress) -> AgentMetrics:
    """What an agent answers that leads redis."""
    workload = WorkloadMetrics(
        name="redis",
        backend="fast",
        epochs_captured=epochs,
        epochs_acknowledged=epochs,
        freeze_ms=(),
        epoch_ms=(),
        interval_ms=(),
        memory_bytes=1,
        streams=(),
        verification=verification,
    )
    return AgentMetrics(node="a", pid=7, rss_bytes=0, cpu_s=0.0, workloads=(workload,))


@pytest.fixture
def verifying(silent: FakeNode, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """A node whose agent has 3 rounds behind it."""
    monkeypatch.setattr(verify_module, "_POLL_S", 0.01)
    silent.listen(silent.config.agent_endpoint)
    silent.answers[Verify] = Verifying(before={"redis": (comparing("", 3), comparing("b", 3))})
    return silent


def test_verify_is_followed_until_everything_was_compared(verifying: FakeNode, capsys: Captured) -> None:
    verifying.answers[AskStatus] = in_turn(
        led(10),
        led(11, comparing("", 3, 500), comparing("b", 3, 250)),
        led(12, comparing("", 4), comparing("b", 3, 750)),
        led(13, comparing("", 4), comparing("b", 4)),
    )
    assert verifying.run("verify", "--now", "--workload", "redis") == 0
    told = capsys.readouterr()
    assert verifying.asked == [Verify(workload="redis")]
    assert told.err.splitlines() == ["redis memory 50 %, redis b 25 %", "redis b 75 %"]
    assert [line.split() for line in told.out.splitlines()[1:3]] == [
        ["redis", "memory", "1000", "0", "3"],
        ["redis", "b", "1000", "0", "3"],
    ]


def test_verify_exits_with_its_own_code_if_anything_was_different(
    verifying: FakeNode, capsys: Captured
) -> None:
    verifying.answers[AskStatus] = in_turn(led(10), led(12, comparing("", 4), comparing("b", 4, different=2)))
    assert verifying.run("verify", "--now", "--output", "json") == 18
    answer = read_json(capsys)
    assert (answer["pages_verified"], answer["pages_different"]) == (2000, 2)
    assert [each["replica"] for each in answer["verified"]] == ["", "b"]  # type: ignore[attr-defined]
    assert answer["took_s"] >= 0  # type: ignore[operator]


def test_verify_says_when_the_agent_began_anew(verifying: FakeNode) -> None:
    verifying.answers[AskStatus] = in_turn(led(10), led(1, comparing("", 0), comparing("b", 0)))
    assert verifying.run("verify", "--now") == 4
    verifying.answers[AskStatus] = in_turn(led(10), led(1))
    assert verifying.run("verify", "--now") == 4


def test_verify_is_given_up_after_its_time(verifying: FakeNode, capsys: Captured) -> None:
    stuck = replace(comparing("b", 3, 250), problem="no descriptor left")
    verifying.answers[AskStatus] = led(10, comparing("", 4), stuck)
    assert verifying.run("verify", "--now", "--timeout", "0.1") == 4
    assert "redis b 25 % (no descriptor left)" in capsys.readouterr().err


def test_verify_without_now_is_a_wrong_command_line(silent: FakeNode) -> None:
    assert silent.run("verify") == 2


def test_status_says_how_far_verification_is(node: FakeNode, capsys: Captured) -> None:
    memory = comparing("", 0, 340)
    store = replace(comparing("b", 1, different=3), ended_wall_s=1_764_000_000.5)
    node.answers[AskStatus] = node_status(replace(LEADING, verification=(memory, store)))
    assert node.run("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "redis: verification of memory: 34 % of a round" in lines
    (line,) = [line for line in lines if "verification of replica b" in line]
    assert "the last whole one ended 20" in line
    assert line.endswith("3 pages were different: outlive events")
    assert node.run("status", "--output", "json") == 0
    workload = read_json(capsys)["workloads"][0]  # type: ignore[index]
    assert [each["pages_done"] for each in workload["verification"]] == [340, 0]


def test_status_says_how_far_the_first_sync_is(node: FakeNode, capsys: Captured) -> None:
    capture = CaptureStatus(backend="fast", tracker="none", reason="chosen", files_scanned=345_000)
    sending = SendingProgress(epoch=EpochId(3, 1), for_s=75.0, done_bytes=3 << 30, due_bytes=4 << 30)
    replica = ReplicaProgress(node="b", connected=True, sending=sending)
    node.answers[AskStatus] = node_status(replace(LEADING, capture=capture, replicas=(replica,)))
    node.run("status")
    lines = capsys.readouterr().out.splitlines()
    assert "redis: all its files are looked through: 345000 so far" in lines
    (line,) = [line for line in lines if "on its way" in line]
    assert line.startswith("redis: t3-e1 is on its way to b since 75.0 s: 3072 of 4096 MiB (75 %) are there")
    soon = replace(replica, sending=replace(sending, for_s=1.0))
    node.answers[AskStatus] = node_status(replace(LEADING, replicas=(soon,)))
    node.run("status")
    assert "on its way" not in capsys.readouterr().out


# --- store verify --files ---------------------------------------------------------------------------


@pytest.fixture
def compared(silent: FakeNode, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """A node whose agent compares files, in three answers."""
    monkeypatch.setattr("outlive.cli.compare._POLL_S", 0.01)
    silent.listen(silent.config.agent_endpoint)
    running = FilesComparison(running=True, epoch=EpochId(3, 7))
    silent.answers[CompareFiles] = in_turn(
        running,
        replace(running, pages_done=256, pages_due=512),
        FilesComparison(running=False, epoch=EpochId(3, 9), pages_done=512, pages_due=512),
    )
    return silent


def test_files_that_are_as_they_should_be(compared: FakeNode, capsys: Captured) -> None:
    assert compared.run("store", "verify", "redis", "--files") == 0
    assert [each.begin for each in compared.asked] == [True, False, False]  # type: ignore[union-attr]
    shown = capsys.readouterr()
    assert shown.out.startswith("redis: every file is what t3-e9 says (2.0 MiB compared in ")
    assert shown.err.splitlines() == ["redis: names are compared", "redis: contents are compared: 50 %"]


def test_files_that_are_not_are_shown_and_the_exit_code_says_so(compared: FakeNode, capsys: Captured) -> None:
    examples = tuple(f"/srv/{n} is missing" for n in range(30))
    found = FilesComparison(running=False, different=30, examples=examples, repaired=True)
    compared.answers[CompareFiles] = found
    assert compared.run("store", "verify", "redis", "--files", "--output", "json") == 7
    answer = read_json(capsys)
    assert (answer["different"], answer["repaired"], len(answer["examples"])) == (30, True, 30)  # type: ignore[arg-type]
    assert compared.run("store", "verify", "redis", "--files") == 7
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "/srv/0 is missing"
    assert lines[20] == "... and 10 more"
    assert "all was made equal again" in lines[21]


def test_files_that_cannot_be_compared_to_the_end(compared: FakeNode, capsys: Captured) -> None:
    compared.answers[CompareFiles] = FilesComparison(running=False, problem="it was broken off")
    assert compared.run("store", "verify", "redis", "--files") == 7
    assert "not compared to the end: it was broken off" in capsys.readouterr().err
    compared.answers[CompareFiles] = FilesComparison(running=True)
    assert compared.run("store", "verify", "redis", "--files", "--timeout", "0.1") == 4
    assert compared.run("store", "verify", "redis", "t3-e9", "--files") == 2


# --- pause and resume -------------------------------------------------------------------------------

PAUSE = Pause(node="a", number=1, by="root", since_wall_s=1e9)
PAUSED = replace(LEADING, pauses=(PAUSE,))


def test_pause_ends_well_once_every_node_has_confirmed(
    node: FakeNode, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "eve")
    states = iter([LEADING, replace(PAUSED, pauses_unconfirmed_by=("b",))])
    node.answers[PauseTakeover] = Done(detail="it is paused")
    node.answers[AskStatus] = lambda: node_status(next(states, PAUSED))
    assert node.run("pause", "redis") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split()[:3] == ["redis", "paused", "-"]
    assert "paused by root on a since 2001-09-09 01:46:40 UTC" in shown.out
    assert shown.err == ""
    assert node.asked == [PauseTakeover(workload="redis", by="eve")]


def test_a_pause_that_a_node_did_not_confirm_says_what_may_come_of_it_and_has_its_own_exit_code(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[PauseTakeover] = Done(detail="it is paused")
    node.answers[AskStatus] = node_status(replace(PAUSED, pauses_unconfirmed_by=("b", "c")))
    assert node.run("pause", "redis", "--timeout", "0.1") == 19
    assert "redis is paused here, but b, c did not confirm it and may still take it over" in (
        capsys.readouterr().err
    )
    assert node.run("pause", "redis", "--timeout", "0", "--output", "json") == 19
    answer = read_json(capsys)
    assert answer["settled"] is False
    assert answer["workloads"] == [
        {
            "workload": "redis",
            "paused": True,
            "pauses": [{"node": "a", "number": 1, "by": "root", "since_wall_s": 1e9, "lifted_by": ""}],
            "not_known_to": ["b", "c"],
            "unaware": "b, c did not confirm it and may still take it over",
            "detail": "it is paused",
        }
    ]


def test_of_a_leader_that_did_not_confirm_nobody_says_that_it_may_take_over(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[PauseTakeover] = Done()
    waiting = replace(WAITING, state="following", pauses=(PAUSE,), pauses_unconfirmed_by=("b",))
    node.answers[AskStatus] = node_status(waiting)
    assert node.run("pause", "redis", "--timeout", "0") == 19
    error = capsys.readouterr().err
    assert "b, which leads it, did not confirm it" in error
    assert "may still take it over" not in error


def test_a_pause_that_was_ended_elsewhere_meanwhile_is_told_and_so_is_the_other_way_round(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[PauseTakeover] = node.answers[ResumeTakeover] = Done()
    node.answers[AskStatus] = node_status(LEADING)
    assert node.run("pause", "redis", "--timeout", "0") == 19
    assert "redis is not paused: it was resumed elsewhere" in capsys.readouterr().err
    node.answers[AskStatus] = node_status(PAUSED)
    assert node.run("resume", "redis", "--timeout", "0") == 19
    assert "redis is still paused by root on a" in capsys.readouterr().err


def test_resume_without_a_name_is_for_all_and_one_that_is_refused_spoils_no_other(
    node: FakeNode, capsys: Captured
) -> None:
    answers = iter([Refused(error="WorkloadError", message="it is set aside"), Done(detail="resumed")])
    node.answers[ResumeTakeover] = lambda: next(answers)
    node.answers[AskStatus] = node_status(replace(LEADING, name="broken"), LEADING)
    assert node.run("resume") == 5
    shown = capsys.readouterr()
    assert "broken: it is set aside" in shown.err
    assert shown.out.splitlines()[1].split()[:2] == ["redis", "automatic"]
    assert [request.workload for request in node.asked] == ["broken", "redis"]


def test_a_pause_that_is_refused_is_an_error(node: FakeNode, capsys: Captured) -> None:
    node.answers[PauseTakeover] = Refused(error="StoreError", message="it could not be recorded")
    assert node.run("pause", "redis") == 7
    assert "it could not be recorded" in capsys.readouterr().err
    node.answers[AskStatus] = node_status()
    assert node.run("pause") == 5


def test_status_says_who_paused_and_who_does_not_know(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(replace(PAUSED, pauses_unconfirmed_by=("b",)))
    assert node.run("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "redis: takeover is paused by root on a since 2001-09-09 01:46:40 UTC: outlive resume redis" in lines
    )
    assert "redis: paused here, but b did not confirm it and may still take it over" in lines
    node.answers[AskStatus] = node_status(replace(LEADING, pauses_unconfirmed_by=("b",)))
    assert node.run("status") == 0
    assert "redis: resumed here; b was not heard to know that" in capsys.readouterr().out


# --- switchover -------------------------------------------------------------------------------------


def test_a_switchover_that_came_back_says_what_the_other_node_had_against_it(
    node: FakeNode, capsys: Captured
) -> None:
    def replica(**fields: object) -> ReplicaProgress:
        return ReplicaProgress(node="b", **{"connected": True, "acknowledged": EpochId(5, 7), **fields})  # type: ignore[arg-type]

    back = replace(LEADING, term=5, reason="b gave term 4 back")
    failure = "a restore failed here: port 6379 is taken"
    node.answers[Switchover] = Done()
    node.answers[AskStatus] = in_turn(
        node_status(LEADING),
        node_status(replace(back, replicas=(replica(connected=False, reasons=("not yet",)),))),
        node_status(replace(back, replicas=(replica(acknowledged=None),))),
        node_status(replace(back, replicas=(replica(restorable=True, reasons=(failure,)),))),
    )
    assert node.run("switchover", "redis", "--to", "b") == 21
    told = capsys.readouterr().err
    assert f"redis runs on here: b gave term 4 back; b says: {failure}" in told
    assert "outlive history redis, here and on b" in told


# --- planned switchovers ----------------------------------------------------------------------------

PLANNED = PlannedSwitchover(to="b", at_wall_s=1_764_000_000.0, by="eve", term=3)


def test_a_switchover_is_planned_and_the_verb_ends(
    node: FakeNode, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "eve")
    node.answers[PlanSwitchover] = Done(detail="it takes the place of the one that was planned")
    node.answers[AskStatus] = node_status(replace(LEADING, planned=PLANNED))
    assert node.run("switchover", "redis", "--to", "b", "--at", "2100-01-31T03:30", "--output", "json") == 0
    (asked,) = [each for each in node.asked if isinstance(each, PlanSwitchover)]
    expected = datetime.datetime(2100, 1, 31, 3, 30).astimezone().timestamp()
    assert asked.at_wall_s == pytest.approx(expected, abs=1)
    assert (asked.workload, asked.to, asked.by) == ("redis", "b", "eve")
    assert read_json(capsys)["planned"]["to"] == "b"  # type: ignore[index]
    assert node.run("switchover", "redis", "--to", "b", "--at", "23:59:59") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("redis: planned to move to b at 20")
    assert shown[1] == "it takes the place of the one that was planned"


def test_a_plan_that_is_refused_is_an_error(node: FakeNode, capsys: Captured) -> None:
    node.answers[PlanSwitchover] = Refused(error="NoRightToLeadError", message="b leads it")
    assert node.run("switchover", "redis", "--to", "b", "--at", "03:30") == 10
    assert "b leads it" in capsys.readouterr().err


def test_a_planned_switchover_is_cancelled(node: FakeNode, capsys: Captured) -> None:
    node.answers[CancelSwitchover] = Done()
    assert node.run("switchover", "redis", "--cancel") == 0
    assert capsys.readouterr().out == "redis: nothing is planned any more\n"
    node.answers[CancelSwitchover] = Refused(error="WorkloadError", message="no switchover is planned here")
    assert node.run("switchover", "redis", "--cancel") == 5


@pytest.mark.parametrize("words", [(), ("--to", "b", "--cancel"), ("--cancel", "--at", "03:30")])
def test_a_switchover_without_one_clear_order_is_a_wrong_command_line(
    silent: FakeNode, words: tuple[str, ...]
) -> None:
    assert silent.run("switchover", "redis", *words) == 2


def test_status_and_explain_show_what_is_planned(node: FakeNode, capsys: Captured) -> None:
    node.answers[AskStatus] = node_status(replace(LEADING, planned=PLANNED))
    node.answers[AskExplanation] = replace(COVERED, planned=PLANNED)
    for verb in ("status", "explain"):
        assert node.run(verb) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "planned" in line]
        assert line.startswith("redis: eve has planned its switchover to b at 20")
        assert line.endswith(": outlive switchover redis --cancel")


# --- explain ----------------------------------------------------------------------------------------

COVERED = Explanation(
    workload="redis",
    node="a",
    term=3,
    leader="a",
    stopped=False,
    would_fail_over=True,
    successor="b",
    epoch=EpochId(3, 1041),
    loss_s=0.42,
    missing=(),
    cases=(Prospect(failure="host loss", outcome="failover", node="b", reason="b takes over"),),
)
UNCOVERED = replace(
    COVERED,
    would_fail_over=False,
    missing=("takeover is paused by root on a", "no epoch is stored here"),
    cases=(Prospect(failure="host loss", outcome="no failover", node="", reason="paused"),),
)


def test_explain_names_who_would_take_over_with_what_and_what_would_be_lost(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[AskExplanation] = COVERED
    assert node.run("explain", "redis") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "redis: if a's host were lost now, b would take over with t3-e1041; the last 0.4 s would be lost"
    )
    assert lines[2].split()[0] == "WORKLOAD"
    assert lines[3].split() == ["redis", "host", "loss", "failover", "b", "b", "takes", "over"]
    assert node.asked == [AskExplanation(workload="redis")]
    node.answers[AskExplanation] = replace(COVERED, epoch=None, loss_s=None)
    assert node.run("explain", "redis") == 0
    assert "what would be lost is not known here" in capsys.readouterr().out


def test_explain_names_all_that_is_missing_and_has_its_own_exit_code(
    node: FakeNode, capsys: Captured
) -> None:
    node.answers[AskExplanation] = UNCOVERED
    assert node.run("explain", "redis") == 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "redis: if a's host were lost now, nobody would take over",
        "redis: missing: takeover is paused by root on a",
        "redis: missing: no epoch is stored here",
    ]
    assert node.run("explain", "redis", "--output", "json") == 20
    answer = read_json(capsys)
    assert answer["no_failover"] == ["redis"]
    assert answer["workloads"][0]["epoch"] == {"term": 3, "epoch": 1041}
    assert answer["workloads"][0]["cases"][0]["outcome"] == "no failover"


@pytest.mark.parametrize(("words", "code"), [(("explain",), 0), (("explain", "redis"), 20)])
def test_what_is_stopped_counts_only_if_it_is_named(
    node: FakeNode, words: tuple[str, ...], code: int
) -> None:
    node.answers[AskStatus] = node_status(STOPPED)
    node.answers[AskExplanation] = replace(UNCOVERED, stopped=True)
    assert node.run(*words) == code


def test_explain_of_what_is_not_known_is_an_error(node: FakeNode) -> None:
    node.answers[AskStatus] = node_status()
    assert node.run("explain") == 5
    node.answers[AskExplanation] = Refused(error="WorkloadError", message="this node knows no workload 'x'")
    assert node.run("explain", "x") == 5
