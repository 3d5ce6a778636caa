"""What the demonstration says and what it rests on: no lab, no CRIU; values, a log file, two consoles."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from rich.console import Console

from common.bundle import WorkloadPaths
from common.config import Node as NodeTable
from common.config import NodeConfig
from common.control import WorkloadStatus
from common.criu.images import VMA_FILE_PRIVATE, MemoryMap, Vma
from common.model import EpochId
from outlive import demo, demo_screen, demo_witness
from outlive.cli.app import run
from outlive.cluster import Node
from outlive.demo_report import ByteSummary, DemoReport, EpochName, FreezeSummary, IntervalSummary
from outlive.demo_screen import DemoScreen
from outlive.probe import Acknowledged

NAME = "demo"
REPORT = DemoReport(
    schema_version=1,
    workload=("prog", "x"),
    rss_bytes=1 << 20,
    epochs_committed=3,
    epoch_interval_ms=IntervalSummary(configured=100.0, p50=100.0, max=120.0),
    freeze_ms=FreezeSummary(p50=1.0, p99=2.0, max=2.0),
    restored=EpochName(1, 3),
    survived=True,
    reason="it runs",
    checked=("it stays",),
    not_checked=("what it answers",),
    writes=None,
    outage_ms=None,
    timeline=(),
    bytes=ByteSummary(sent=1, full_equivalent=2),
)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    table = NodeTable(name="a", address="127.0.0.1", state_dir=f"{tmp_path}/s", run_dir=f"{tmp_path}/r")
    return cast(Node, SimpleNamespace(name="a", config=NodeConfig(node=table)))


def says(node: Node, *lines: str) -> None:
    log = WorkloadPaths(node.config, NAME).log
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"2026-01-01T00:00:00Z stdout F {line}\n" for line in lines))


def status(**fields: Any) -> WorkloadStatus:
    given = {"running": False, "state": "leading", "exit_code": None} | fields
    return WorkloadStatus(
        name=NAME, role="primary", reason="", term=1, leader="a", restorable=False, **cast(Any, given)
    )


class TestWhyItDoesNotRun:
    def test_the_end_of_what_it_said_is_told(self, node: Node) -> None:
        assert demo_witness.last_words(node, NAME) == ""
        says(node, *(f"line {number}" for number in range(9)), "  two  spaces")
        words = demo_witness.last_words(node, NAME).splitlines()
        assert words == ["; it said last:", *(f"   | line {n}" for n in range(5, 9)), "   |   two  spaces"]

    def test_how_it_ended_is_told(self, node: Node) -> None:
        says(node, "out of luck")
        exits = WorkloadPaths(node.config, NAME).exit_dir
        exits.mkdir(parents=True)
        (exits / NAME).write_text("7")
        error = demo_witness.ended_early(node, NAME)
        assert error.message.startswith("the workload ended by itself on host A with code 7; it said last:")
        assert "out of luck" in error.message
        assert error.hint

    @pytest.mark.parametrize(
        ("reason", "told"),
        [
            (
                r'runc: time="now" level=error msg="container process: exec: \"x\": no" (hint)',
                'exec: "x": no',
            ),
            ('runc: msg="something else"', "something else"),
            (r'runc: msg="bad \x escape"', r'runc: msg="bad \x escape"'),
            ("no program x", "no program x"),
        ],
    )
    def test_of_what_runc_says_the_cause_is_told(self, node: Node, reason: str, told: str) -> None:
        assert demo_witness.never_ran(node, NAME, reason).message == f"host A: {told}"

    @pytest.mark.parametrize(
        ("fields", "ended"),
        [
            ({"running": True}, False),
            ({"running": True, "exit_code": 1}, False),
            ({}, False),
            ({"exit_code": 0}, True),
            ({"state": "failed"}, True),
        ],
    )
    def test_one_that_is_starting_has_not_ended(self, fields: dict[str, Any], ended: bool) -> None:
        assert demo_witness.has_ended(status(**fields)) is ended


class TestVerdict:
    def test_code_must_lie_where_the_epoch_has_it(self) -> None:
        epoch = MemoryMap(
            (
                Vma(0x1000, 0x2000, 5, 2, VMA_FILE_PRIVATE, 1),
                Vma(0x2000, 0x3000, 3, 2, VMA_FILE_PRIVATE, 1),  # data
                Vma(0x5000, 0x6000, 5, 2, 0, 1),  # vdso
            ),
            0,
        )
        line = "{:x}-9000 {} 00000000 08:01 7 /bin/prog\n"
        assert demo_witness.moved_code(epoch, line.format(0x1000, "r-xp")) == []
        assert demo_witness.moved_code(epoch, line.format(0x1000, "r--p")) == [0x1000]
        assert demo_witness.moved_code(epoch, line.format(0x4000, "r-xp")) == [0x1000]

    async def test_nothing_that_runs_is_a_problem(self, node: Node, tmp_path: Path) -> None:
        seen = await demo_witness.watch(node, NAME, EpochId(1, 3), tmp_path)
        assert not seen.checked
        assert "ended by itself on host A" in seen.problems[0]

    @pytest.mark.parametrize(("held", "survived"), [({1, 2}, True), ({1, 2, 3}, True), ({2, 3}, False)])
    def test_writes_before_the_restored_epoch_must_be_there(self, held: set[int], survived: bool) -> None:
        writes = [Acknowledged(number, float(number)) for number in (1, 2, 3)]
        seen = demo._early_writes(writes, held, 2.5)
        assert (not seen.problems) is survived
        assert bool(seen.checked) is survived


class TestScreen:
    def test_elsewhere_than_on_a_terminal_lines_say_how_it_goes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(demo_screen.time, "monotonic", lambda: clock.now)
        talk, out = io.StringIO(), io.StringIO()
        screen = DemoScreen(Console(file=talk), Console(file=out, width=100))
        screen.step("Building")
        clock.now += 2
        screen.step("Streaming")
        for second in range(12):
            clock.now += 1
            screen.progress(f"{second} epochs")
        assert not out.getvalue()
        screen.report(REPORT)
        assert talk.getvalue().splitlines() == [
            "   0.0 s  Building",
            "   2.0 s  Streaming",
            "   7.0 s    4 epochs",
            "  12.0 s    9 epochs",
            "  14.0 s    11 epochs",
        ]
        for part in ("prog outlived", "Checked: it stays", "Not checked: what it answers"):
            assert part in out.getvalue()

    def test_with_json_stdout_has_the_one_object_and_stderr_the_steps(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def run_demo(options: demo.DemoOptions, screen: demo.Screen) -> DemoReport:
            screen.step("Building")
            screen.progress("one epoch")
            screen.note("the lab stays up")
            screen.report(REPORT)
            return REPORT

        monkeypatch.setattr(demo, "run_demo", run_demo)
        assert run(["demo", "--output", "json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out) == json.loads(msgspec.json.encode(REPORT))
        for part in ("Building", "one epoch", "the lab stays up"):
            assert part in said.err

    def test_a_command_with_an_open_quote_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["demo", "--workload", "prog 'x"]) == 2
        assert "No closing quotation" in capsys.readouterr().err
