"""Children that are to end: killed and reaped, and no other of their kind while the kernel keeps one."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from common import addresses, children, health
from common.children import end_child, hangs
from common.errors import WorkloadError

KIND = "a kind"


class Held:
    """A child that the kernel does not let go of, whatever it is sent."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.returncode: int | None = None
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    async def wait(self) -> int:
        return await asyncio.Future()


@pytest.fixture(autouse=True)
def nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_hanging", {})
    monkeypatch.setattr(children, "REAP_WITHIN_S", 0.01)


async def held(kind: str) -> Held:
    child = Held(kind)
    await end_child(child, kind)  # type: ignore[arg-type]
    assert child.killed
    return child


async def test_a_child_that_ends_is_reaped_and_hangs_not() -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60")
    await end_child(child, KIND)
    assert child.returncode == -signal.SIGKILL
    assert not hangs(KIND)


async def test_a_whole_group_ends_where_that_is_asked_for() -> None:
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", "sleep 60 & echo $!; wait", stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None
    grandchild = int(await child.stdout.readline())
    await end_child(child, KIND, group=True)
    async with asyncio.timeout(10):
        while _runs(grandchild):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def test_one_that_the_kernel_keeps_is_waited_for_a_moment_only_and_hangs_until_it_is_gone() -> None:
    child = await held(KIND)
    assert hangs(KIND)
    assert not hangs("another kind")
    child.returncode = -9
    assert not hangs(KIND)


async def test_no_second_ip_is_run_while_one_hangs() -> None:
    child = await held(addresses._KIND)
    with pytest.raises(WorkloadError, match="an earlier ip or nft was killed, and has not ended yet"):
        await addresses._run("ip", "-V")
    child.returncode = -9
    assert "iproute2" in await addresses._run("ip", "-V")


async def test_no_second_health_check_is_run_while_the_same_hangs(tmp_path: os.PathLike[str]) -> None:
    mark = f"{tmp_path}/ran"
    command = ("touch", mark)
    child = await held(f"health touch {mark}")
    assert "has not ended yet" in await health._command(command)
    assert not os.path.exists(mark)
    assert await health._command(("true",)) == "", "another one is"
    child.returncode = -9
    assert await health._command(command) == ""
    assert os.path.exists(mark)
