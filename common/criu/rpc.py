"""Our end of `criu swrk`: requests go in, hooks come out while it works, a result or an error at the end.

The wire is a SOCK_SEQPACKET pair with one protobuf message a packet (`proto/rpc.proto`). One process serves
one request, so the next epoch's process is spawned ahead. A dump runs in that process itself (no child). It
calls its hooks through the same socket: `pre-dump` (the workload runs), `network-lock`, `query-ext-files`,
`post-dump` (frozen, the parasite is gone) and `network-unlock`, and waits for our yes or no to each.

**Deadlines on both ends.** criu's own receive has no time limit, so a client that hangs inside `post-dump`
would leave the workload frozen for ever. Therefore criu's end of the pair gets SO_RCVTIMEO and SO_SNDTIMEO
before the request is sent (later receives pick it up; the first one, of a process spawned ahead, waits
without limit): if we hang, criu fails, thaws and ends on its own. And if criu takes longer than our deadline,
`Swrk.abandon` ends it, gently first:

1. SIGCONT (somebody may have stopped it), and every hook is answered no. criu then undoes what it did and
   lets the workload run on.
2. The socket is closed, and SIGALRM: criu's handler for its seize timeout makes the system call that it is in
   fail with EINTR, which takes criu through its error path, and that removes the parasite. (Before criu has
   seized anything, SIGALRM has no handler and ends it, which is harmless.)
3. SIGKILL. The kernel detaches and resumes the tasks, and a parasite whose command socket closes returns by
   itself to where the task was.

Steps 2 and 3 are not free of harm: a task that is executing a single system call for criu ends that with a
trap, and if criu is dead or gave up waiting, the trap (SIGTRAP) ends the process. Signals at random moments
of a 9 ms dump of a small process: SIGKILL lost it in 14 of 300 dumps, SIGALRM in none of 300 (in a longer
run, in 3 of 1,200), SIGSTOP in none of 300; none was left frozen, and the survivors could be dumped again
(`OUTLIVE_SIGNAL_ROUNDS=300 pytest -s tests/system/test_criu_signals.py`). Inside `post-dump` no signal does
harm. So nobody should kill a criu who can wait, and a test of crashes must expect this loss.

Not for this module: what a hook does, where images go afterwards, and the keeper's own thaw deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog
from google.protobuf.message import DecodeError

from common.criu.errand import Errand
from common.criu.images import DumpStats, read_dump_stats
from common.criu.options import (
    DumpOptions,
    RestoreOptions,
    request_for_dump,
    request_for_restore,
    request_in,
)
from common.criu.proto import rpc_pb2
from common.errors import CaptureError, RestoreError, UnsupportedError
from common.threads import in_thread

log = structlog.get_logger(__name__)

__all__ = [
    "CriuVersion",
    "DumpOptions",
    "DumpResult",
    "Ending",
    "Features",
    "OnNotify",
    "RestoreOptions",
    "Swrk",
    "spawn",
]

OnNotify = Callable[[str, int | None], Awaitable[bool]]
"""Called for each hook with its name and, for some of a restore's, a PID. False makes criu fail and undo."""

Ending = Literal["by itself", "after a no", "after an interrupt", "after a kill"]
"""How an abandoned criu came to its end, from the gentlest to the roughest."""

_PACKET_BYTES: Final = 65536
"""More than any answer: the largest part is an error message of at most 1 KiB."""

_UNDO_S: Final = 0.5
"""How long `abandon` lets criu undo what it did: the only step without harm, so a slow machine gets time."""
_GRACE_S: Final = 0.3
"""How long `abandon` waits at other steps. All stay within the second between freeze and thaw deadline."""


@dataclass(frozen=True, slots=True)
class DumpResult:
    """A dump that succeeded: criu's statistics, and the hooks in the order in which they were called."""

    stats: DumpStats
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CriuVersion:
    """criu's version; `sublevel` is 0 where it says none."""

    major: int
    minor: int
    sublevel: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + (f".{self.sublevel}" if self.sublevel else "")


@dataclass(frozen=True, slots=True)
class Features:
    """What this kernel lets this criu do: track dirty memory (soft-dirty), restore lazily, keep pidfds."""

    mem_track: bool
    lazy_pages: bool
    pidfd_store: bool


async def spawn(
    criu: Path, *, environment: Mapping[str, str] | None = None, descriptors: Sequence[int] = ()
) -> Swrk:
    """Start a criu that waits for one request.

    It is a session leader, so that a terminal's signals don't reach it, and it ends by itself if we do. It
    gets `environment` beside ours, and inherits `descriptors`.
    Raises `UnsupportedError` if it cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stderr = os.memfd_create("criu-stderr")
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(
            subprocess.Popen(
                [str(criu), "swrk", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *descriptors],
                env={**os.environ, **environment} if environment else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        )

    try:
        await in_thread(start)
    except BaseException as error:
        ours.close()
        theirs.close()
        os.close(stderr)
        for process in started:  # we were cancelled meanwhile; it has done nothing yet
            process.kill()
            process.wait()
        if isinstance(error, OSError):
            raise UnsupportedError(
                f"{criu} cannot be started: {error.strerror}", hint="run `make setup`"
            ) from error
        raise
    ours.setblocking(False)
    return Swrk(started[0], ours, theirs, stderr)


class Swrk:
    """One `criu swrk` process. Serves exactly one request; made by `spawn`.

    While a request runs, cancelling its task abandons it. Whoever drops an unused one calls `abandon`.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], ours: socket.socket, theirs: socket.socket, stderr: int
    ) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._ours = ours
        self._theirs = theirs
        self._stderr = stderr
        self._hooks: list[str] = []
        self._refused = ""
        self._last_words = ""
        self._asked = False
        self._owes_answer = False

    @property
    def pid(self) -> int:
        """Criu's PID, valid until the request has ended."""
        return self._process.pid

    async def dump(self, options: DumpOptions, on_notify: OnNotify) -> DumpResult:
        """Dump a process tree.

        `on_notify` is called for each hook; if it says no or raises, criu fails and the tree runs on; what it
        raised is raised here once criu has ended. Raises `CaptureError`, whose message carries criu's own
        errors and names its log, if criu fails, dies or exceeds the deadline. Afterwards criu is gone.
        """
        work_dir = options.work_dir or options.images_dir
        errand = Errand(f"dump process {options.pid}", CaptureError, work_dir / options.log_file)
        with request_for_dump(options) as request:
            await self._request(request, errand, on_notify, options.deadline_s, options.answer_timeout_s)
        return DumpResult(read_dump_stats(work_dir), tuple(self._hooks))

    async def restore(self, options: RestoreOptions, on_notify: OnNotify) -> int:
        """Restore a process tree and give the PID of its root, as seen from here.

        Hooks as for `dump`. Raises `RestoreError` with criu's own errors. The tree outlives criu.
        """
        log_path = (options.work_dir or options.images_dir) / options.log_file
        errand = Errand(f"restore {options.images_dir}", RestoreError, log_path)
        with request_for_restore(options) as request:
            response = await self._request(
                request, errand, on_notify, options.deadline_s, options.answer_timeout_s
            )
        return response.restore.pid

    async def version(self) -> CriuVersion:
        """Ask for criu's version; raises `UnsupportedError` if it doesn't work here at all."""
        version = (await self._ask("say its version", rpc_pb2.criu_req(type=rpc_pb2.VERSION))).version
        return CriuVersion(version.major_number, version.minor_number, version.sublevel)

    async def features(self) -> Features:
        """Ask what this kernel lets criu do; raises `UnsupportedError` if it cannot tell."""
        wanted = rpc_pb2.criu_features(mem_track=True, lazy_pages=True, pidfd_store=True)
        request = rpc_pb2.criu_req(type=rpc_pb2.FEATURE_CHECK, features=wanted)
        found = (await self._ask("say its features", request)).features
        return Features(found.mem_track, found.lazy_pages, found.pidfd_store)

    async def check(self) -> None:
        """Let criu check this kernel; raises `UnsupportedError` with what is missing."""
        await self._ask("work with this kernel", rpc_pb2.criu_req(type=rpc_pb2.CHECK))

    async def cpuinfo_dump(self, images_dir: Path) -> None:
        """Write this CPU's features into `images_dir`/cpuinfo.img; raises `UnsupportedError` if it fails."""
        await self._cpuinfo(rpc_pb2.CPUINFO_DUMP, "record this CPU", images_dir)

    async def cpuinfo_check(self, images_dir: Path) -> None:
        """Raise `UnsupportedError` unless this CPU has what `images_dir`/cpuinfo.img says."""
        await self._cpuinfo(rpc_pb2.CPUINFO_CHECK, "run on this CPU", images_dir)

    async def abandon(self) -> Ending:
        """End this criu by the ladder that the module's docstring describes, and say how far it went.

        Returns when the process is gone and reaped, about 0.85 s after the call at the latest, unless the
        process is in a system call that cannot be interrupted. Calling it again is harmless.
        """
        started = time.monotonic()
        ending = await self._end()
        self._release()
        if self._asked:
            took_ms = round((time.monotonic() - started) * 1000)
            log.warning("criu.abandoned", pid=self.pid, ending=ending, took_ms=took_ms)
        return ending

    async def _end(self) -> Ending:
        if self._process.poll() is not None:
            return "by itself"
        if self._asked:
            self._process.send_signal(signal.SIGCONT)
            with contextlib.suppress(TimeoutError, OSError, EOFError, DecodeError):
                async with asyncio.timeout(_UNDO_S):
                    await self._converse(_say_no)
            if await self._ended_within(_GRACE_S / 10):
                return "after a no"
        self._ours.close()
        self._theirs.close()
        if not self._asked and await self._ended_within(_GRACE_S):
            return "by itself"
        self._process.send_signal(signal.SIGALRM)
        if await self._ended_within(_GRACE_S):
            return "after an interrupt"
        self._process.kill()
        await self._ended()
        return "after a kill"

    async def _cpuinfo(self, kind: rpc_pb2.criu_req_type, what: str, images_dir: Path) -> None:
        with request_in(kind, images_dir) as request:
            await self._ask(what, request)

    async def _ask(self, what: str, request: rpc_pb2.criu_req) -> rpc_pb2.criu_resp:
        """Make a request that has no hooks and no log of its own."""
        return await self._request(request, Errand(what, UnsupportedError), _say_no, 10.0, 10.0)

    async def _request(
        self,
        request: rpc_pb2.criu_req,
        errand: Errand,
        on_notify: OnNotify,
        deadline_s: float,
        answer_timeout_s: float,
    ) -> rpc_pb2.criu_resp:
        """Send the one request, serve its hooks, and see criu end, well or badly."""
        if self._asked:
            raise RuntimeError("a criu serves one request")
        self._asked = True
        limit = struct.pack("@ll", int(answer_timeout_s), int(answer_timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._theirs.setsockopt(socket.SOL_SOCKET, option, limit)
        # criu has its own copy; with ours closed, its death reads as the end of the stream.
        self._theirs.close()
        try:
            async with asyncio.timeout(deadline_s):
                await self._send(request)
                response, failure = await self._converse(on_notify)
                await self._ended()
        except TimeoutError as error:
            ending = await self._abandon_undisturbed()
            raise errand.failed(
                f"it took longer than {deadline_s:g} s and ended {ending}", self._last_words
            ) from error
        except (OSError, EOFError, DecodeError) as error:
            ending = await self._abandon_undisturbed()
            raise errand.failed(f"{_status(self._process.returncode)} ({error})", self._last_words) from error
        except BaseException:
            await self._abandon_undisturbed()
            raise
        self._release()
        if failure is not None:
            raise failure
        if not response.success:
            refused = f"the hook {self._refused} was answered no" if self._refused else ""
            raise errand.failed(refused, self._last_words or response.cr_errmsg)
        return response

    async def _converse(self, on_notify: OnNotify) -> tuple[rpc_pb2.criu_resp, Exception | None]:
        """Answer hooks until criu gives its result; after a failing hook, all others get a no unasked."""
        failure: Exception | None = None
        if self._owes_answer:
            await self._answer(False)
        while True:
            response = await self._receive()
            if response.type != rpc_pb2.NOTIFY:
                return response, failure
            self._owes_answer = True
            notify = response.notify
            self._hooks.append(notify.script)
            agreed = False
            if failure is None:
                try:
                    agreed = await on_notify(notify.script, notify.pid if notify.HasField("pid") else None)
                except Exception as error:
                    failure = error
            if not agreed:
                self._refused = self._refused or notify.script
            await self._answer(agreed)

    async def _answer(self, agreed: bool) -> None:
        self._owes_answer = False
        await self._send(rpc_pb2.criu_req(type=rpc_pb2.NOTIFY, notify_success=agreed))

    async def _send(self, request: rpc_pb2.criu_req) -> None:
        await asyncio.get_running_loop().sock_sendall(self._ours, request.SerializeToString())

    async def _receive(self) -> rpc_pb2.criu_resp:
        packet = await asyncio.get_running_loop().sock_recv(self._ours, _PACKET_BYTES)
        if not packet:
            await self._ended()
            raise EOFError("it closed the connection")
        return rpc_pb2.criu_resp.FromString(packet)

    async def _abandon_undisturbed(self) -> Ending:
        """Abandon to the end even if we are cancelled meanwhile: a half-ended criu holds a workload."""
        return await asyncio.shield(asyncio.ensure_future(self.abandon()))

    async def _ended(self) -> None:
        """Wait for the process to end, and reap it."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            while self._process.poll() is None:
                await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)

    async def _ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended()
        return self._process.poll() is not None

    def _release(self) -> None:
        """Give back all descriptors, once the process is gone, and keep what it wrote to its standard error.

        That matters if it never came to open its log.
        """
        self._ours.close()
        self._theirs.close()
        if self._stderr >= 0:
            size = os.fstat(self._stderr).st_size
            self._last_words = os.pread(self._stderr, size, max(0, size - 4096)).decode(errors="replace")
            os.close(self._stderr)
            os.close(self._pidfd)
            self._stderr = -1


def _status(returncode: int | None) -> str:
    """Say how the process ended."""
    if returncode is None:
        return "the connection to it failed"
    return f"it was killed by signal {-returncode}" if returncode < 0 else f"it exited with {returncode}"


async def _say_no(hook: str, pid: int | None) -> bool:
    return False
