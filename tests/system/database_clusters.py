"""What tests of databases share: a pair of nodes with one, a client that inserts, and what became of it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import LabError, UnreachableError
from common.model import FilePath, HealthCheck, WorkloadSpec
from outlive.cluster import Node, build_cluster, eventually, start_all
from outlive.lab import Host, Lab
from outlive.probe import Acknowledged, read_log
from replica.store_reader import StoreReader

DATA = FilePath(path="/data")
_CLIENT = Path(__file__).with_name("database_client.py")


@dataclass(frozen=True, slots=True)
class Takeover:
    """What a takeover cost the client that inserted."""

    epoch: str
    lost: int
    """How many acknowledged numbers are not older than the freeze of what was restored."""
    window_ms: float
    """From that freeze to the last of them."""

    def __str__(self) -> str:
        return f"{self.epoch}: {self.lost} acknowledged within {self.window_ms:.0f} ms after its freeze"


@dataclass
class Pair:
    """A database on two nodes, one of which leads."""

    lab: Lab
    nodes: dict[str, Node]
    client: Host
    spec: WorkloadSpec
    port: int
    kind: str
    answers: Callable[[Pair], Awaitable[bool]]
    leader: str = "a"
    replica: str = "b"
    takeovers: list[Takeover] = field(default_factory=list)
    forgotten: set[int] = field(default_factory=set)
    """Numbers that were acknowledged between the freeze of what was restored and the loss of power."""
    _inserting: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return str(self.lab.vip().ip)

    def data_of(self, node: str) -> Path:
        """Return where the directory of the database is on a node."""
        return Path(self.nodes[node].config.node.state_dir) / "workloads" / self.spec.name / "files" / "0"

    # --- the client -------------------------------------------------------------------------------

    def client_command(self, *words: str) -> list[str]:
        return [sys.executable, str(_CLIENT), self.kind, self.address, str(self.port), *words]

    async def begin_inserting(self, rate_per_s: float = 200.0) -> None:
        command = self.client_command("--log", str(self._log), "--rate", str(rate_per_s))
        self._inserting = await self.client.spawn(command, log=self.client.log_dir / "client.log")
        await self.wait_for_more(10)

    async def end_inserting(self) -> None:
        if self._inserting is not None:
            self._inserting.kill()
            await self._inserting.wait()
            self._inserting = None

    @property
    def _log(self) -> Path:
        return self.client.dir / "acknowledged"

    def acknowledged(self) -> list[Acknowledged]:
        return read_log(self._log) if self._log.exists() else []

    def promised(self) -> set[int]:
        """Return the numbers that have to be there."""
        return {each.number for each in self.acknowledged()} - self.forgotten

    async def wait_for_more(self, numbers: int, timeout_s: float = 60.0) -> None:
        """Wait until that many more numbers were acknowledged."""
        start = len(self.acknowledged())

        async def enough() -> bool:
            return len(self.acknowledged()) >= start + numbers

        await eventually(enough, what=f"{numbers} more insertions", timeout_s=timeout_s)

    # --- what happens to its hosts ------------------------------------------------------------------

    async def wait_until_protected(self) -> None:
        name = self.spec.name
        await self.nodes[self.leader].wait_for(name, lambda w: w.role == "primary" and w.running, what="led")
        await self.nodes[self.replica].wait_for(
            name, lambda w: w.role == "replica" and w.restorable, what="restorable", timeout_s=120.0
        )

    async def wait_for_epochs(self, more: int) -> None:
        """Wait until the leader has had that many more acknowledged."""

        async def epochs() -> int | None:
            try:
                workloads = (await self.nodes[self.leader].metrics()).workloads
            except UnreachableError:  # it is busy
                return None
            return workloads[0].epochs_acknowledged if workloads else None

        start: int | None = None

        async def enough() -> bool:
            nonlocal start
            now = await epochs()
            if start is None:
                start = now
            return now is not None and start is not None and now >= start + more

        await eventually(enough, what=f"{more} more epochs of {self.leader}", timeout_s=60.0)

    async def lose_leader(self) -> Takeover:
        """Take the leader's power while the client inserts; return when what was restored answers."""
        await self.lab.power_off(self.leader)
        off_wall_s = time.time()
        self.leader, self.replica = self.replica, self.leader
        leader = self.nodes[self.leader]
        status = await leader.wait_for(
            self.spec.name,
            lambda w: w.role == "primary" and (w.running or w.state == "failed"),
            what="taken over",
        )
        assert status.running, status.reason

        async def told() -> bool:
            terms = (await leader.history(self.spec.name)).terms
            return terms[-1].term == status.term and terms[-1].restored is not None

        await eventually(told, what="it is told what was restored")
        restored = (await leader.history(self.spec.name)).terms[-1].restored
        records = StoreReader.inspect(leader.config.store_dir, self.spec.name).records()
        frozen_wall_s = next(each.frozen_wall_s for each in records if each.id == restored)
        before = [each for each in self.acknowledged() if each.wall_s <= off_wall_s]
        lost = [each for each in before if each.wall_s >= frozen_wall_s]
        self.forgotten |= {each.number for each in lost}
        takeover = Takeover(
            str(restored), len(lost), (lost[-1].wall_s - frozen_wall_s) * 1000 if lost else 0.0
        )
        print(takeover)
        self.takeovers.append(takeover)
        await self.wait_until_it_answers()
        return takeover

    async def bring_back(self) -> None:
        """Start again the host that lost its power, and wait until it is the standby."""
        await self.lab.power_on(self.replica)
        await self.nodes[self.replica].start()
        await self.wait_until_protected()

    async def copy_of_the_standby(self, copy: Callable[[Path], Path]) -> Path:
        """Copy what lies on the standby, which is then some epoch's files, without its memory."""
        standby = self.nodes[self.replica]
        await standby.stop("agent")
        copied = await asyncio.to_thread(copy, self.data_of(self.replica))
        await standby.start("agent")
        return copied

    async def stop(self) -> None:
        await self.nodes[self.leader].cli("stop", self.spec.name)

    async def start(self) -> None:
        await self.nodes[self.leader].cli("start", self.spec.name)
        await self.wait_until_it_answers()

    async def wait_until_it_answers(self) -> None:
        async def answering() -> bool:
            return await self.answers(self)

        try:
            await eventually(answering, what=f"{self.spec.name} answers", timeout_s=60.0)
        except LabError as error:
            log = self.data_of(self.leader).parents[1] / "log"
            raise LabError(f"{error}; it said last: {log.read_text(errors='replace')[-2000:]}") from error


@asynccontextmanager
async def database_pair(
    name: str,
    port: int,
    command: tuple[str, ...],
    *,
    prepare: Callable[[Pair], Awaitable[None]] | None = None,
    answers: Callable[[Pair], Awaitable[bool]],
    more_files: tuple[FilePath, ...] = (),
    settings: dict[str, dict[str, Any]] | None = None,
    **fields: Any,
) -> AsyncIterator[Pair]:
    """Build a lab with a database in /data on node a; wait until it answers and is protected by b.

    `prepare` is called before anything is started.
    """
    async with Lab() as lab:
        spec = WorkloadSpec(
            name=name,
            nodes=("a", "b"),
            command=command,
            files=(DATA, *more_files),
            vip=str(lab.vip()),
            health=HealthCheck(tcp=port),
            right_to_lead="fence",
            epoch_interval_ms=200,
            **fields,
        )
        nodes = await build_cluster(lab, spec.nodes, workloads=[spec], settings=settings)
        pair = Pair(lab, nodes, await lab.add_host("client"), spec, port, name, answers)
        if prepare is not None:
            await prepare(pair)
        await start_all(nodes)
        await pair.start()
        await pair.wait_until_protected()
        yield pair
