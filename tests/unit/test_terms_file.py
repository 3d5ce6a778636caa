"""Term files: what is recorded stays, is never lowered, and damage is never taken for emptiness."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.config import Node, NodeConfig
from common.control import TermHistory, TimelineEntry
from common.durable import RealDisk
from common.errors import StaleTermError, StoreError
from common.model import EpochId, WorkloadSpec
from common.pauses import with_pause, without_pauses
from common.roles import Mark, Refusal, TermRecord
from common.terms_file import HISTORY_TERMS, TermFiles, known_workloads, look_up

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",))


class FullDisk(RealDisk):
    """Nothing can be renamed on it."""

    def rename(self, source: Path, target: Path, *, op: str) -> None:
        raise StoreError(f"{op}: no")


class HalfWritten(RealDisk):
    """Names change on it, and whether that lasts is not known: once, or from then on."""

    def __init__(self, failures: int = 1) -> None:
        self.failures = failures

    def sync_dir(self, path: Path, *, op: str) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError(f"{op}: input/output error")
        super().sync_dir(path, op=op)


def test_a_record_that_failed_is_not_found_by_the_next_keeper(tmp_path: Path) -> None:
    known = TermRecord(term=1, leader="a", mark="yielded", heir="b")
    TermFiles(tmp_path, "a").record("w", known)
    files = TermFiles(tmp_path, "a", HalfWritten())
    with pytest.raises(StoreError):
        files.record("w", TermRecord(term=2, leader="a", mark="taking_over"))
    assert TermFiles(tmp_path, "a").load("w") == known, "it would take up a term that was given up"
    files = TermFiles(tmp_path, "a", HalfWritten())
    with pytest.raises(StoreError):
        files.record("v", TermRecord(term=1, leader="a", mark="launching"))
    assert TermFiles(tmp_path, "a").load("v") == TermRecord()


def test_a_record_that_failed_on_a_disk_that_is_gone_is_one_error(tmp_path: Path) -> None:
    TermFiles(tmp_path, "a").record("w", TermRecord(term=1, leader="a", mark="leads"))
    with pytest.raises(StoreError, match=r"term\.record"):
        TermFiles(tmp_path, "a", HalfWritten(9)).record("w", TermRecord(term=2, leader="a", mark="leads"))


def test_a_record_is_read_back_by_the_next_keeper(tmp_path: Path) -> None:
    record = TermRecord(term=4, leader="b", mark="leads", boot_id="x", cause="takeover", began_wall_s=1.5)
    TermFiles(tmp_path, "b").record("w", record)
    assert TermFiles(tmp_path, "b").load("w") == record


def test_without_a_file_the_term_is_0(tmp_path: Path) -> None:
    assert TermFiles(tmp_path, "a").load("w") == TermRecord()


@pytest.mark.parametrize("content", [b"", b"{", b'{"term": -', b'{"term": "4"}'])
def test_a_damaged_file_is_an_error_and_not_term_0(tmp_path: Path, content: bytes) -> None:
    files = TermFiles(tmp_path, "a")
    files.record("w", TermRecord(term=4, leader="a"))
    (tmp_path / "terms/w/term.json").write_bytes(content)
    with pytest.raises(StoreError):
        files.load("w")
    with pytest.raises(StoreError):
        files.record("w", TermRecord(term=5, leader="a"))


PAUSED = with_pause((), "a", "root", 1e9)
RESUMED = without_pauses(PAUSED, "b", "root")


def test_pauses_are_read_back_by_the_next_keeper_and_an_older_word_does_not_undo_them(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    assert files.load_pauses("w") == ()
    files.record_pauses("w", PAUSED)
    assert TermFiles(tmp_path, "a").load_pauses("w") == PAUSED
    files.record_pauses("w", RESUMED)
    files.record_pauses("w", PAUSED)
    assert TermFiles(tmp_path, "a").load_pauses("w") == RESUMED


def test_pauses_outlast_the_declaration(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.save_spec(SPEC)
    files.record_pauses("w", PAUSED)
    files.forget_spec("w")
    assert files.load_pauses("w") == PAUSED


def test_damaged_pauses_are_an_error_that_sets_the_workload_aside(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.save_spec(SPEC)
    files.record_pauses("w", PAUSED)
    (tmp_path / "terms/w/pauses.json").write_bytes(b"[{")
    with pytest.raises(StoreError) as raised:
        files.load_pauses("w")
    assert "pause again" in raised.value.hint
    with pytest.raises(StoreError):
        files.record_pauses("w", RESUMED)
    config = NodeConfig(node=Node(name="a", address="127.0.0.1", state_dir=str(tmp_path)))
    assert set(look_up(config, files).damaged) == {"w"}


def test_a_failed_write_leaves_the_old_record(tmp_path: Path) -> None:
    TermFiles(tmp_path, "a").record("w", TermRecord(term=4, leader="a"))
    with pytest.raises(StoreError):
        TermFiles(tmp_path, "a", FullDisk()).record("w", TermRecord(term=5, leader="a"))
    assert TermFiles(tmp_path, "a").load("w").term == 4
    assert [path.name for path in (tmp_path / "terms/w").iterdir()] == ["term.json"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "a", "b", "c"])), max_size=12))
def test_no_sequence_lowers_a_term_or_gives_one_two_leaders(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, str]]
) -> None:
    files = TermFiles(tmp_path_factory.mktemp("t"), "a")
    for term, leader in records:
        before = files.load("w")
        try:
            files.record("w", TermRecord(term=term, leader=leader))
        except StaleTermError:
            assert files.load("w") == before
            assert term < before.term or leader != before.leader
            continue
        after = files.load("w")
        assert after.term >= before.term
        if after.term == before.term > 0 and before.leader not in ("", after.leader):
            gives_way = before.leader == "a" or "a" != after.leader < before.leader
            assert gives_way, "only this node itself may give way in a term, or to the first by name"


def test_a_forgotten_workload_keeps_its_term(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.save_spec(SPEC)
    files.record("w", TermRecord(term=4, leader="a"))
    assert files.workloads() == ("w",)
    assert files.load_spec("w") == SPEC
    files.forget_spec("w")
    assert files.workloads() == ()
    assert files.load("w").term == 4


def test_history_keeps_the_newest_terms_once_each(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    for term in (*range(1, HISTORY_TERMS + 6), 20):
        files.save_history(TermHistory(workload="w", term=term, leader="a", cause=f"c{term}", began_wall_s=0))
    terms = [each.term for each in files.history("w")]
    assert terms == list(range(6, HISTORY_TERMS + 6))


def test_how_a_term_began_is_kept_when_it_is_told_how_it_was_handed_over(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    begun, given = (
        TimelineEntry(at_ms=1.0, wall_s=2.0, event=event, reason="") for event in ("led", "given")
    )
    story = TermHistory(workload="w", term=1, leader="a", cause="c", began_wall_s=0)
    files.save_history(replace(story, timeline=(begun,), restored=EpochId(1, 2)))
    files.save_history(replace(story, handover=(given,)))
    (kept,) = files.history("w")
    assert (kept.timeline, kept.handover, kept.restored) == ((begun,), (given,), EpochId(1, 2))
    files.save_history(replace(story, timeline=(given,)))
    (again,) = files.history("w")
    assert (again.timeline, again.handover, again.restored) == ((given,), (given,), None)


@pytest.mark.parametrize("file", ["term.json", "spec.json"])
def test_a_damaged_file_costs_the_other_workloads_nothing(tmp_path: Path, file: str) -> None:
    node = Node(name="a", address="127.0.0.1", state_dir=str(tmp_path))
    config = NodeConfig(node=node, workloads=(SPEC,))
    files = TermFiles(tmp_path, "a")
    for name in ("w", "sent", "whole"):
        files.save_spec(replace(SPEC, name=name))
        files.record(name, TermRecord(term=4, leader="b"))
    for name in ("w", "sent"):
        (tmp_path / "terms" / name / file).write_bytes(b"{")
    (tmp_path / "terms" / "Not ours").mkdir()
    (tmp_path / "terms" / "Not ours" / "spec.json").write_bytes(b"{")
    known = look_up(config, files)
    assert set(known.damaged) == {"w", "sent"}
    assert set(known.specs) == {"w", "whole"}, "what is declared stays so"
    assert known_workloads(config) == known.specs


LINE = replace(SPEC, nodes=("a", "b", "c"), right_to_lead="manual")
MOVED = replace(SPEC, nodes=("a", "c", "b"), right_to_lead="etcd", epoch_interval_ms=700)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize(
    ("mark", "in_force"),
    [
        ("stopped", replace(MOVED, nodes=LINE.nodes, right_to_lead="manual")),
        ("leads", replace(MOVED, nodes=LINE.nodes)),
    ],
)
def test_the_line_of_succession_is_that_of_the_term_and_not_what_is_declared_meanwhile(
    tmp_path: Path, mark: Mark, in_force: WorkloadSpec, forgotten: bool
) -> None:
    """A start asks who could still take over by the old one; a keeper that is started again asks nobody."""
    files = TermFiles(tmp_path, "a")
    files.save_spec(LINE)
    assert files.in_force(MOVED) == MOVED, "nobody ever led it"
    files.record("w", TermRecord(term=2, leader="a", mark=mark))
    if forgotten:
        files.forget_spec("w")
        files.forget_spec("w")
        assert (files.load_spec("w"), files.workloads()) == (None, ())
    assert files.in_force(MOVED) == in_force
    config = NodeConfig(node=Node(name="a", address="127.0.0.1", state_dir=str(tmp_path)), workloads=(MOVED,))
    assert known_workloads(config)["w"] == MOVED, "what a start declares"


def test_first_files_may_be_written_by_two_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TermFiles(tmp_path, "a")
    both_look = threading.Barrier(2)
    is_dir = Path.is_dir

    def look(path: Path) -> bool:
        there = is_dir(path)
        if path.name == "w" and not there:
            both_look.wait(5)  # neither makes it before the other has found that it is missing
        return there

    monkeypatch.setattr(Path, "is_dir", look)
    with ThreadPoolExecutor(2) as threads:
        spec = threads.submit(files.save_spec, SPEC)
        record = threads.submit(files.record, "w", TermRecord(term=4, leader="a"))
        spec.result(10)
        record.result(10)
    assert files.load("w").term == 4
    assert files.load_spec("w") == SPEC


def test_a_name_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        TermFiles(tmp_path, "a").load("../../etc")


def test_a_third_node_follows_the_leader_of_a_term_whom_the_other_one_follows(tmp_path: Path) -> None:
    files = TermFiles(tmp_path, "a")
    files.record("w", TermRecord(term=6, leader="c", mark="leads"))
    files.record("w", TermRecord(term=6, leader="b", mark="leads"))
    with pytest.raises(StaleTermError):
        files.record("w", TermRecord(term=6, leader="c", mark="leads"))
    assert files.load("w").leader == "b"


def test_a_fenced_node_records_nothing_more_that_it_does_in_that_term_but_that_it_does_nothing(
    tmp_path: Path,
) -> None:
    """Its keeper may have outlived the fence, if that was by another configuration than the keeper's."""
    files = TermFiles(tmp_path, "a")
    led = TermRecord(term=3, leader="a", mark="leads", boot_id="x")
    files.record("w", led)
    files.record_refusal("w", Refusal(term=4, by="b", at_wall_s=1.0))
    for mark in ("launching", "taking_over", "leads"):
        with pytest.raises(StaleTermError, match="b fenced this node"):
            files.record("w", replace(led, mark=mark))
    with pytest.raises(StaleTermError, match="b fenced this node"):
        files.record("w", replace(led, term=4))
    files.record("w", replace(led, mark="stopped"))
    files.record("w", replace(led, mark="yielded"))
    files.record("w", replace(led, term=5, mark="launching"))
