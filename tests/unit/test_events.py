"""The event file: lines of two writers, torn lines, putting aside, following, and the documented words."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

from common.events import Event, EventLog, EventRecord, follow_events, read_events

DOCUMENT = Path(__file__).parents[2] / "docs/reference/events.md"


def test_events_come_back_with_all_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "state" / "events.jsonl"
    log = EventLog(path, "keeper")
    log.append(Event.ROLE_CHANGED, workload="redis", reason="a is silent", state="leading", term=3)
    log.close()
    (record,) = read_events(path)
    assert (record.source, record.event, record.workload) == ("keeper", "role.changed", "redis")
    assert record.reason == "a is silent"
    assert record.fields == {"state": "leading", "term": 3}
    assert abs(record.wall_s - time.time()) < 60
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "events.jsonl")) == []


def test_two_writers_share_the_file_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    logs = [EventLog(path, "agent"), EventLog(path, "keeper")]
    threads = [
        threading.Thread(target=lambda log=log: [log.append(Event.PEER_HEARD, n=n) for n in range(500)])
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    records = list(read_events(path))
    for source in ("agent", "keeper"):
        assert [r.fields["n"] for r in records if r.source == source] == list(range(500))


def test_a_torn_line_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"wall_s":1.0,"source":"agent","event":"agent.started"}\n{"wall_s":2.0,"sou')
    log = EventLog(path, "agent")
    log.append(Event.AGENT_STOPPED)
    log.close()
    assert [record.event for record in read_events(path)] == ["agent.started", "agent.stopped"]


def test_events_of_a_newer_version_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"wall_s":1.0,"source":"agent","event":"moon.rose","later":[1]}\n')
    assert [record.event for record in read_events(path)] == ["moon.rose"]


def test_the_full_file_is_put_aside_once_and_the_older_one_goes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "agent", limit_bytes=2000)
    for number in range(300):
        log.append(Event.PEER_HEARD, n=number)
        while log._waiting.qsize():
            time.sleep(0.0005)
    log.close()
    numbers = [record.fields["n"] for record in read_events(path)]
    assert numbers == list(range(numbers[0], 300))  # the newest, without a gap
    assert 0 < numbers[0] < 290
    assert sorted(entry.name for entry in tmp_path.iterdir()) in (
        ["events.jsonl", "events.jsonl.1"],
        ["events.jsonl.1"],
    )


def test_a_writer_that_opened_before_the_other_put_aside_does_not_do_it_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("full\n")
    log = EventLog(path, "agent")
    descriptor = os.open(path, os.O_RDWR)
    path.rename(tmp_path / "events.jsonl.1")
    path.write_text("fresh\n")
    log._put_aside(descriptor)
    os.close(descriptor)
    log.close()
    assert path.read_text() == "fresh\n"
    assert (tmp_path / "events.jsonl.1").read_text() == "full\n"


def test_appending_survives_a_disk_that_refuses_and_tells_how_much_was_lost(tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where a directory should be")
    path = blocked / "events.jsonl"
    log = EventLog(path, "agent")
    for _ in range(3):
        log.append(Event.CAPTURE_FAILED)
    deadline_s = time.monotonic() + 5
    while log._lost < 3 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    blocked.unlink()
    log.append(Event.CAPTURE_RECOVERED)
    log.close()
    first, second = read_events(path)
    assert first.event == "capture.recovered"
    assert (second.event, second.fields) == ("events.lost", {"count": 3})


def test_following_yields_what_is_new_across_putting_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"wall_s":1.0,"source":"agent","event":"agent.started"}\n')
    seen: list[EventRecord] = []
    enough, following = threading.Event(), threading.Event()

    def follow() -> None:
        events = follow_events(path, poll_s=0.005)
        following.set()
        for record in events:
            seen.append(record)
            if len(seen) == 40:
                enough.set()
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert following.wait(5)
    time.sleep(0.05)  # the generator opens the file at its first step
    log = EventLog(path, "keeper", limit_bytes=1500)
    for number in range(40):
        log.append(Event.PEER_SILENT, n=number)
        time.sleep(0.012)  # slower than it polls: nobody follows two files put aside within one look
    log.close()
    assert enough.wait(10)
    assert [record.fields["n"] for record in seen] == list(range(40))


def test_the_reference_names_every_event_and_no_other() -> None:
    documented = re.findall(r"^\| `([a-z]+\.[a-z-]+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert sorted(documented) == sorted(event.value for event in Event)


def test_an_event_whose_words_are_no_text_is_lost_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "agent")
    log.append(Event.CAPTURE_FAILED, reason="/srv/\udce9")
    deadline_s = time.monotonic() + 5
    while log._lost < 1 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    log.append(Event.CAPTURE_RECOVERED)
    log.close()
    assert [each.event for each in read_events(path)] == ["capture.recovered", "events.lost"]
