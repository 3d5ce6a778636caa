"""The guard beside the keeper: closes a gate at its moment, and feeds a watchdog only while it may."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import Etcd, Node, NodeConfig
from common.gate import Gate
from common.lease import LeaseRecord
from common.lease_calls import Held
from outlive import lease_guard
from outlive.lease_records import LeaseRecords

HELD = Held(lease_id=7, revision=3, term=1)


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.fixture
def records(tmp_path: Path) -> LeaseRecords:
    node = Node(name="a", address="127.0.0.1", run_dir=str(tmp_path / "run"), vip_interface="eth0")
    return LeaseRecords(NodeConfig(node=node, etcd=Etcd(margin_ms=500)), "boot-1")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    file = tmp_path / "freezer.state"
    file.write_text("THAWED")
    return Gate(file, "FROZEN", "THAWED")


def keep(records: LeaseRecords, gate: Gate, for_s: float) -> None:
    records.keep("w", LeaseRecord(held=HELD, until_s=now_s() + for_s), gate, None)


class Fed(lease_guard.Watchdog):
    """A watchdog that counts."""

    def __init__(self, timeout_s: int) -> None:
        super().__init__("/none", timeout_s)
        self.fed = self.rested = 0

    def feed(self) -> None:
        self.fed += 1

    def rest(self) -> None:
        self.rested += 1


def test_a_gate_is_closed_when_the_recorded_moment_has_come_and_not_before(
    records: LeaseRecords, gate: Gate
) -> None:
    keep(records, gate, 5.0)
    assert 0 < lease_guard.look(str(records.directory), set(), None) < 0.25
    assert gate.file.read_text() == "THAWED"
    keep(records, gate, -0.06)
    lease_guard.look(str(records.directory), set(), None)
    assert gate.file.read_text() == "FROZEN"


def test_it_stays_closed_until_a_newer_lease_is_on_record(
    records: LeaseRecords, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: set[str] = set()
    asked: list[object] = []
    monkeypatch.setattr(lease_guard, "drop_address", asked.append)
    keep(records, gate, -0.06)
    lease_guard.look(str(records.directory), done, None)
    gate.file.write_text("THAWED")  # by a kill that was to close it again, and was killed itself
    lease_guard.look(str(records.directory), done, None)
    assert gate.file.read_text() == "FROZEN"
    assert len(asked) == 1, "the address goes once"
    keep(records, gate, 5.0)
    gate.file.write_text("THAWED")
    lease_guard.look(str(records.directory), done, None)
    assert gate.file.read_text() == "THAWED"


def test_a_record_that_is_half_written_is_passed_over(records: LeaseRecords, gate: Gate) -> None:
    (records.directory / "x.json").write_text('{"until_s": 0')
    keep(records, gate, -1.0)
    lease_guard.look(str(records.directory), set(), None)
    assert gate.file.read_text() == "FROZEN"


def test_a_watchdog_is_fed_only_while_it_would_act_in_time_or_the_gate_is_closed(
    records: LeaseRecords, gate: Gate
) -> None:
    watchdog, directory = Fed(timeout_s=2), str(records.directory)
    lease_guard.look(directory, set(), watchdog)
    assert (watchdog.fed, watchdog.rested) == (0, 1), "nothing is led: it is not armed"
    keep(records, gate, 3.0)
    lease_guard.look(directory, set(), watchdog)
    assert watchdog.fed == 1
    keep(records, gate, 1.0)  # it would act after two seconds, and half the margin later is too late
    lease_guard.look(directory, set(), watchdog)
    assert watchdog.fed == 1
    keep(records, gate, -0.06)
    lease_guard.look(directory, set(), watchdog)
    assert watchdog.fed == 2


def test_a_gate_that_cannot_be_closed_lets_the_watchdog_act(records: LeaseRecords, tmp_path: Path) -> None:
    (tmp_path / "freezer.state").mkdir()  # a file that cannot be written
    watchdog = Fed(timeout_s=1)
    keep(records, Gate(tmp_path / "freezer.state", "FROZEN", "THAWED"), -0.06)
    lease_guard.look(str(records.directory), set(), watchdog)
    assert watchdog.fed == 0


@pytest.fixture
def guard(records: LeaseRecords) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-S", lease_guard.__file__, str(records.directory)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_process_closes_in_time_and_is_alone(
    records: LeaseRecords, gate: Gate, guard: subprocess.Popen[bytes]
) -> None:
    keep(records, gate, 0.6)
    time.sleep(0.3)
    assert gate.file.read_text() == "THAWED"
    second = subprocess.run(guard.args, timeout=10, check=False)  # type: ignore[arg-type]
    assert second.returncode == 3
    deadline_s = time.monotonic() + 5
    while gate.file.read_text() != "FROZEN" and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert gate.file.read_text() == "FROZEN"
    assert guard.poll() is None


def test_what_is_on_record_is_found_by_the_next_keeper_of_the_same_boot(
    records: LeaseRecords, gate: Gate, tmp_path: Path
) -> None:
    record = LeaseRecord(held=HELD, until_s=12.5)
    records.keep("w", record, gate, "10.0.0.9/24")
    filed = json.loads((records.directory / "w.json").read_text())
    assert filed["drop"] == ["ip", "address", "delete", "10.0.0.9/24", "dev", "eth0"]
    assert records.left("w") == record
    node = Node(name="a", address="127.0.0.1", run_dir=str(tmp_path / "run"))
    assert LeaseRecords(NodeConfig(node=node), "boot-2").left("w") is None
    records.drop("w")
    assert records.left("w") is None


def test_who_takes_an_address_away_is_not_waited_for_and_keeps_no_lock(
    records: LeaseRecords, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = LeaseRecord(held=HELD, until_s=now_s() - 1.0)
    records.keep("w", record, gate, "10.0.0.9/24")
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(lease_guard.os, "execvp", lambda *_: time.sleep(1.0))  # read from a disk that hangs
    began_s = time.monotonic()
    lease_guard.look(str(records.directory), set(), None)
    assert time.monotonic() - began_s < 0.5
    lock.close()
    time.sleep(0.1)
    with (tmp_path / "lock").open("w") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.wait()


def test_the_address_is_taken_away_by_what_is_on_record(tmp_path: Path) -> None:
    lease_guard.drop_address({"drop": ["touch", str(tmp_path / "dropped")]})
    os.wait()
    assert (tmp_path / "dropped").exists()
    lease_guard.drop_address({"drop": []})
