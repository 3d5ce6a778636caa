"""Databases outlive their hosts: what they know in memory and what they wrote to files is of one instant."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.model import FilePath, WorkloadSpec
from outlive.cluster import build_cluster, eventually, start_all
from outlive.lab import Lab
from tests.system import postgres_server
from tests.system.database_clusters import Pair, database_pair
from tests.system.postgres_server import program

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

_LONG = pytest.mark.skipif(
    os.environ.get("DATABASES") != "all", reason="`make databases` runs all of them: two minutes more"
)

# --- SQLite -------------------------------------------------------------------------------------------

SQLITE_PORT = 7700
_WRITER = Path(__file__).with_name("sqlite_writer.py")
_LOOK = """
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
print(json.dumps({
    "integrity": [text for (text,) in database.execute("PRAGMA integrity_check")],
    "numbers": [number for (number,) in database.execute("SELECT number FROM rows")],
    "total": database.execute("SELECT sum(balance) FROM accounts").fetchone()[0],
}))
"""


def sqlite_command(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-I", str(_WRITER), str(SQLITE_PORT), "/data/rows.db", *words)


async def sqlite_answers(pair: Pair) -> bool:
    asked = await pair.client.run(pair.client_command("--ask", "check"), check=False, timeout_s=60.0)
    return asked.returncode == 0


async def judge_sqlite(pair: Pair) -> None:
    """Have the workload compare its files with its memory, and with what the client was promised."""
    promised = pair.promised()
    asked = await pair.client.run(pair.client_command("--ask", "check"), timeout_s=60.0)
    found: dict[str, Any] = json.loads(asked.stdout)
    held = set(found.pop("numbers"))
    assert found == {
        "integrity": ["ok"],
        "only_in_memory": [],
        "only_in_files": [],
        "differ": [],
        "balances_differ": False,
        "problems": [],
    }
    gone = sorted(promised - held)
    assert gone == [], "acknowledged before the freeze of what was restored, or after it was, and gone"


async def look_afresh(files: Path) -> set[int]:
    """Open a copy of the files in a process that knows nothing else; return the numbers that are there."""
    command = [sys.executable, "-I", "-c", _LOOK, str(files / "rows.db")]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["integrity"], found["total"]) == (["ok"], 0)
    return set(found["numbers"])


@pytest.mark.parametrize(
    ("synchronous", "mmap_bytes"),
    [pytest.param("FULL", 0, id="full"), pytest.param("NORMAL", 16 << 20, id="normal-mapped", marks=_LONG)],
)
async def test_sqlite_in_wal_mode_outlives_its_host_to_and_fro(
    synchronous: str, mmap_bytes: int, tmp_path: Path
) -> None:
    """One process with two connections: what excludes them from each other is memory, not file locks."""
    command = sqlite_command("--synchronous", synchronous, "--mmap-bytes", str(mmap_bytes))
    async with database_pair("sqlite", SQLITE_PORT, command, answers=sqlite_answers) as pair:
        await pair.begin_inserting()
        for _ in range(4):
            await pair.wait_for_epochs(4)
            await pair.lose_leader()
            await judge_sqlite(pair)
            await pair.wait_for_more(50)
            await pair.bring_back()
        await look_afresh(
            await pair.copy_of_the_standby(lambda files: shutil.copytree(files, tmp_path / "standby"))
        )
        await pair.end_inserting()
        await judge_sqlite(pair)
        promised = pair.promised()
        await pair.stop()
        numbers = await look_afresh(shutil.copytree(pair.data_of(pair.leader), tmp_path / "stopped"))
        assert promised <= numbers
        await pair.start()
        await judge_sqlite(pair)


async def test_processes_that_share_an_sqlite_database_are_told_to_be_not_restorable() -> None:
    """CRIU would lose their locks: one would reset the log while the other one commits."""
    async with Lab() as lab:
        spec = WorkloadSpec(
            name="sqlite",
            nodes=("a", "b"),
            command=sqlite_command("--beside", "process"),
            files=(FilePath(path="/data"),),
            epoch_interval_ms=200,
        )
        nodes = await build_cluster(lab, ("a", "b"), workloads=[spec])
        await start_all(nodes)
        await nodes["a"].cli("start", spec.name)
        told = await nodes["b"].wait_for(
            spec.name, lambda w: any("criu loses" in each for each in w.reasons), what="told"
        )
        assert not told.restorable
        assert any("rows.db-shm is used by several processes" in each for each in told.reasons)


# --- PostgreSQL ---------------------------------------------------------------------------------------

ACCOUNTS = 100_000
_SUMS = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
       (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)
"""
_CHECKPOINTS = r"""printf '%s\n' 'CHECKPOINT \watch 0.5' | "$@" """


def server_options(pair: Pair) -> list[str]:
    return ["-h", pair.address, "-p", str(postgres_server.PORT), "-U", postgres_server.USER]


async def ask_postgres(pair: Pair, query: str) -> str:
    """Ask the server that leads, from the client's host."""
    words = [str(program("psql")), *server_options(pair), "-XqAtc", query, "postgres"]
    return (await pair.client.run(words, timeout_s=60.0)).stdout.strip()


async def postgres_answers(pair: Pair) -> bool:
    where = f"host={pair.address} port={postgres_server.PORT} user={postgres_server.USER} connect_timeout=2"
    words = [str(program("psql")), "-XqAtc", "SELECT 1", f"{where} dbname=postgres"]
    return (await pair.client.run(words, check=False, timeout_s=60.0)).returncode == 0


async def make_tables(pair: Pair) -> None:
    words = [str(program("pgbench")), *server_options(pair), "-i", "-q", "-s", "1", "postgres"]
    await pair.client.run(words, timeout_s=60.0)
    await ask_postgres(pair, "CREATE TABLE acknowledged (number int PRIMARY KEY)")


@asynccontextmanager
async def pgbench(pair: Pair) -> AsyncIterator[None]:
    """Have four clients change balances meanwhile, and checkpoints write pages to files all the time.

    Each of them connects once: a capture fails that finds a connection which waits to be accepted.
    """
    where = server_options(pair)
    load = [
        [str(program("pgbench")), *where, "-n", "-c", "4", "-T", "600", "postgres"],
        ["sh", "-c", _CHECKPOINTS, "sh", str(program("psql")), *where, "-X", "postgres"],
    ]
    before = await transactions(pair)
    running = [await pair.client.spawn(words, log=pair.client.log_dir / "pgbench.log") for words in load]

    async def busy() -> bool:
        return await transactions(pair) > before + 20

    try:
        await eventually(busy, what="pgbench runs", timeout_s=60.0)
        yield
    finally:
        for process in running:
            with suppress(ProcessLookupError):  # one whose connection broke has ended
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def transactions(pair: Pair) -> int:
    return int(await ask_postgres(pair, "SELECT count(*) FROM pgbench_history"))


async def judge_postgres(pair: Pair) -> None:
    """See that what the client was promised is there, that balances add up, and indexes fit tables."""
    promised = pair.promised()
    adds_up(await ask_postgres(pair, _SUMS))
    assert await ask_postgres(pair, "SELECT count(*) FROM pgbench_accounts") == str(ACCOUNTS)
    numbers = await ask_postgres(pair, "SELECT number FROM acknowledged")
    gone = sorted(promised - set(map(int, numbers.split())))
    assert gone == [], "acknowledged before the freeze of what was restored, or after it was, and gone"
    failures = await ask_postgres(pair, "SELECT coalesce(sum(checksum_failures), 0) FROM pg_stat_database")
    assert failures == "0"
    if checker := program("pg_amcheck"):
        words = [checker, *server_options(pair), "--install-missing", "--heapallindexed", "postgres"]
        checked = await pair.client.run(words, check=False, timeout_s=60.0)
        assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr


def adds_up(row: str) -> None:
    """See that the four sums of pgbench are one number."""
    sums = row.split("|")
    assert len(sums) == 4
    assert len(set(sums)) == 1, f"accounts, tellers, branches, history: {row}"


def judge_files(data: Path, *, stopped: bool) -> None:
    """Begin with nothing but a copy of the files; if the server was stopped, it has left no work."""
    control = postgres_server.run_as_owner("pg_controldata", "-D", str(data)).stdout
    state = next(line.split(":")[1].strip() for line in control.splitlines() if "cluster state" in line)
    if stopped:
        assert state == "shut down"
        postgres_server.run_as_owner("pg_checksums", "--check", "-D", str(data))
    with postgres_server.server_on(data) as where:
        adds_up(on_copy("psql", [*where, "-XqAtc", _SUMS, "postgres"]))
        if program("pg_amcheck"):
            on_copy("pg_amcheck", [*where, "--install-missing", "--heapallindexed", "postgres"])


def on_copy(name: str, words: Sequence[str]) -> str:
    return postgres_server.run_as_owner(name, *words).stdout.strip()


@pytest.mark.skipif(bool(postgres_server.missing()), reason=postgres_server.missing())
@pytest.mark.parametrize("dynamic_memory", ["mmap", pytest.param("posix", marks=_LONG)])
async def test_postgres_under_pgbench_outlives_its_host_to_and_fro(
    dynamic_memory: str, tmp_path: Path
) -> None:
    """Its dynamic shared memory is files: in its data directory, or (its default) in /dev/shm, declared too.

    At a takeover the files have to fit what the server has in memory, where it knows what it has written.
    Afterwards files have to do alone: those of an epoch on the standby, which are what a crash leaves, and
    those that a server leaves which is asked to stop.
    """

    async def prepare(pair: Pair) -> None:
        await asyncio.to_thread(postgres_server.make_data, pair.data_of("a"))

    command = postgres_server.command("/data", dynamic_shared_memory_type=dynamic_memory)
    async with database_pair(
        "postgres",
        postgres_server.PORT,
        command,
        prepare=prepare,
        answers=postgres_answers,
        more_files=(FilePath(path="/dev/shm"),) if dynamic_memory == "posix" else (),
        **postgres_server.user_of_workload(tmp_path),
    ) as pair:
        await make_tables(pair)
        await pair.begin_inserting()
        for _ in range(2):
            async with pgbench(pair):
                await pair.wait_for_epochs(5)
                await pair.lose_leader()
            await judge_postgres(pair)
            await pair.wait_for_more(50)
            async with pgbench(pair):
                await pair.bring_back()
        with postgres_server.owned_directory() as directory:
            async with pgbench(pair):
                await pair.wait_for_epochs(4)
                data = await pair.copy_of_the_standby(
                    lambda files: postgres_server.copy_data(files, directory)
                )
            await asyncio.to_thread(judge_files, data, stopped=False)
        await pair.end_inserting()
        await judge_postgres(pair)
        await pair.stop()
        with postgres_server.owned_directory() as directory:
            data = postgres_server.copy_data(pair.data_of(pair.leader), directory)
            await asyncio.to_thread(judge_files, data, stopped=True)
        await pair.start()
        await judge_postgres(pair)
