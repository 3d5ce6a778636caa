"""Our end of criu's RPC against criu processes that misbehave as no real one does on demand."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.criu.locate import locate_criu
from common.criu.options import request_for_dump
from common.criu.rpc import DumpOptions, spawn
from common.errors import CaptureError, UnsupportedError

_PRELUDE = """#!{python}
import os, signal, socket, sys, time
sys.path.insert(0, {root!r})
from common.criu.proto import rpc_pb2 as rpc
peer = socket.socket(fileno=int(sys.argv[2]))
request = rpc.criu_req.FromString(peer.recv(65536))
def say(**fields): peer.send(rpc.criu_resp(**fields).SerializeToString())
def hook(name):
    say(type=rpc.NOTIFY, success=True, notify=rpc.criu_notify(script=name))
    return rpc.criu_req.FromString(peer.recv(65536)).notify_success
"""


def fake_criu(directory: Path, behaviour: str) -> Path:
    path = directory / "criu"
    prelude = _PRELUDE.format(python=sys.executable, root=str(Path(__file__).parents[2]))
    path.write_text(prelude + behaviour)
    path.chmod(0o755)
    return path


async def agree(hook: str, pid: int | None) -> bool:
    return True


async def failing_dump(criu: Path, directory: Path, deadline_s: float = 10) -> CaptureError:
    swrk = await spawn(criu)
    options = DumpOptions(pid=1, images_dir=directory, deadline_s=deadline_s)
    with pytest.raises(CaptureError) as caught:
        await swrk.dump(options, agree)
    assert not Path(f"/proc/{swrk.pid}").exists()
    return caught.value


async def test_its_error_is_ours_if_it_fails(tmp_path: Path) -> None:
    criu = fake_criu(
        tmp_path, "say(type=rpc.DUMP, success=False, cr_errmsg='Error (x.c:1): too many threads')"
    )
    assert "too many threads" in (await failing_dump(criu, tmp_path)).message


async def test_its_last_words_are_ours_if_it_dies_before_it_has_a_log(tmp_path: Path) -> None:
    criu = fake_criu(tmp_path, "print('libnl.so: not found', file=sys.stderr); sys.exit(127)")
    message = (await failing_dump(criu, tmp_path)).message
    assert "exited with 127" in message
    assert "libnl.so: not found" in message


async def test_only_the_last_errors_of_its_log_are_told(tmp_path: Path) -> None:
    (tmp_path / "dump.log").write_text(
        "(00.1) Error (a.c:1): RLIMIT_NOFILE\n"
        + "".join(f"(00.2) Error (b.c:{n}): reason {n}\n(00.3) note\n" for n in range(5))
        + "(00.4) Error (c.c:1): Dumping FAILED.\n"
    )
    criu = fake_criu(tmp_path, "say(type=rpc.DUMP, success=False)")
    message = (await failing_dump(criu, tmp_path)).message
    assert message.endswith("1: Error (b.c:2): reason 2; Error (b.c:3): reason 3; Error (b.c:4): reason 4")


async def test_nonsense_from_it_is_a_failed_capture(tmp_path: Path) -> None:
    criu = fake_criu(tmp_path, "peer.send(b'\\xff\\xff'); time.sleep(60)")
    assert "Error parsing message" in (await failing_dump(criu, tmp_path)).message


@pytest.mark.parametrize(
    ("on_alarm", "ending"), [("SIG_DFL", "after an interrupt"), ("SIG_IGN", "after a kill")]
)
async def test_one_that_never_answers_is_ended_as_gently_as_it_allows(
    tmp_path: Path, on_alarm: str, ending: str
) -> None:
    criu = fake_criu(tmp_path, f"signal.signal(signal.SIGALRM, signal.{on_alarm}); time.sleep(60)")
    error = await failing_dump(criu, tmp_path, deadline_s=0.5)
    assert f"longer than 0.5 s and ended {ending}" in error.message


async def test_after_a_hook_raised_all_others_are_answered_no_unasked(tmp_path: Path) -> None:
    criu = fake_criu(
        tmp_path,
        "answers = [hook('pre-dump'), hook('post-dump'), hook('network-unlock')]\n"
        f"open({str(tmp_path / 'answers')!r}, 'w').write(repr(answers))\n"
        "say(type=rpc.DUMP, success=False)",
    )
    asked = []

    async def on_notify(hook: str, pid: int | None) -> bool:
        asked.append(hook)
        if hook == "post-dump":
            raise LookupError("no snapshot")
        return True

    swrk = await spawn(criu)
    with pytest.raises(LookupError):
        await swrk.dump(DumpOptions(pid=1, images_dir=tmp_path), on_notify)
    assert asked == ["pre-dump", "post-dump"]
    assert (tmp_path / "answers").read_text() == "[True, False, False]"


async def test_a_criu_serves_one_request(tmp_path: Path) -> None:
    swrk = await spawn(fake_criu(tmp_path, "say(type=rpc.CHECK, success=True)"))
    await swrk.check()
    with pytest.raises(RuntimeError, match="one request"):
        await swrk.check()


async def test_a_criu_that_cannot_be_started_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be started"):
        await spawn(tmp_path / "criu")


async def test_a_criu_whose_start_is_cancelled_leaves_neither_a_process_nor_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criu = fake_criu(tmp_path, "")
    made: list[subprocess.Popen[bytes]] = []
    started = threading.Event()
    popen = subprocess.Popen

    def slowly(*words: object, **options: object) -> subprocess.Popen[bytes]:
        made.append(popen(*words, **options))  # type: ignore[call-overload]
        started.set()
        time.sleep(0.2)
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", slowly)
    await asyncio.to_thread(lambda: None)  # its thread and the loop's own descriptors are there
    before = os.listdir("/proc/self/fd")
    start = asyncio.create_task(spawn(criu))
    assert await asyncio.to_thread(started.wait, 10)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert made[0].returncode == -signal.SIGKILL
    assert os.listdir("/proc/self/fd") == before


class TestLocate:
    def test_a_configured_path_is_taken_or_refused_but_never_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OUTLIVE_CRIU", str(fake_criu(tmp_path, "")))
        assert locate_criu(tmp_path / "criu") == tmp_path / "criu"
        with pytest.raises(UnsupportedError, match="named by the configuration, is no executable"):
            locate_criu(tmp_path / "other")

    def test_the_environment_comes_before_the_checkout_and_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        criu = fake_criu(tmp_path, "")
        monkeypatch.setenv("OUTLIVE_CRIU", str(criu))
        assert locate_criu(None) == criu
        monkeypatch.setenv("OUTLIVE_CRIU", str(tmp_path))
        with pytest.raises(UnsupportedError, match=r"\$OUTLIVE_CRIU"):
            locate_criu(None)

    def test_the_checkout_comes_before_path_and_none_is_unsupported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OUTLIVE_CRIU", raising=False)
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "checkout" / ".venv"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UnsupportedError, match="no criu was found"):
            locate_criu(None)
        in_path = fake_criu(tmp_path, "")
        assert locate_criu(None) == in_path
        (tmp_path / "checkout" / ".criu" / "bin").mkdir(parents=True)
        beside = fake_criu(tmp_path / "checkout" / ".criu" / "bin", "")
        assert locate_criu(None) == beside


@pytest.mark.parametrize("closes", [True, False])
def test_connections_that_wait_to_be_accepted_are_no_obstacle_where_all_are_closed(
    tmp_path: Path, closes: bool
) -> None:
    with request_for_dump(DumpOptions(pid=1, images_dir=tmp_path, tcp_close=closes)) as request:
        assert request.opts.tcp_skip_in_flight is closes
