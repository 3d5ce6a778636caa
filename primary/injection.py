"""One userfaultfd out of a running process: what `native/inject.c` does, as a coroutine.

In: a PID. Out: a descriptor that belongs to the address space of that process, on which nothing was called
yet, and for how long one of its threads was stopped. UFFDIO_API and what follows are the caller's; the
kernel's features are in the answer to that, not known here.

The work is done by a program of its own, in a thread of ours: whoever holds a task on borrowed registers
must not wait for an event loop, and must outlive us. If this process dies, or the caller is cancelled, the
program finishes and the descriptor is closed. Only after `_DEADLINE_S` it is killed. On x86_64 the target
survives that at any moment; elsewhere, and where the vDSO has no room, it may not (native/inject.c has the
reasons, tests/campaigns/injection_kills.py prints the numbers).

Not guaranteed: two injections at once into one address space, by PIDs that share it, are the caller's to
avoid. A fork by another thread of the target, while the descriptor is open in it (some 50 µs), hands it to
the child, which cannot be dumped then.
"""

from __future__ import annotations

import array
import asyncio
import enum
import errno
import os
import platform
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from common.errors import CaptureError, OutliveError, UnsupportedError
from common.scheduling import leave

_PROGRAM: Final = Path(__file__).resolve().parent.parent / "native" / "build" / "outlive-inject"
_DEADLINE_S: Final = 2.0
"""For the whole of it. The program's own come first: 0.2 s to stop the target, 0.6 s for all after that."""
_ANSWER_DESCRIPTOR: Final = 3
_ANSWER: Final = struct.Struct("=IiiiIiQQ")
"""`struct answer` of native/inject.c: magic, status, errno, stage, flags, thread, stopped and borrowed ns."""
_MAGIC: Final = 0x314A4E49
_HEALING: Final = 1
_USER_MODE_ONLY: Final = 2


class Status(enum.IntEnum):
    """How it ended: `enum status` of native/inject.c, and the program's exit code."""

    OK = 0
    BAD_USAGE = 2
    GONE = 20
    TRACED = 21
    REFUSED = 22
    COMPAT = 23
    NO_CODE = 24
    SECCOMP_KEPT = 25
    DISPATCHED = 26
    NOT_STOPPED = 27
    CALL_FAILED = 28
    NOT_TAKEN = 29
    LEFT_OPEN = 30
    STUCK = 31
    NOT_RETURNED = 32
    BROKEN = 33


class Stage(enum.IntEnum):
    """How far it came: `enum stage` of native/inject.c. From BORROWED on, until RETURNED, it is on ours."""

    LOOKING = 1
    SEIZED = 2
    STOPPED = 3
    PREPARED = 4
    BORROWED = 5
    MASKED = 6
    ENTERED = 7
    AIMED = 8
    OPENED = 9
    TAKEN = 10
    CLOSING = 11
    CLOSED = 12
    UNMASKED = 13
    RETURNED = 14
    CLEARED = 15
    DETACHED = 16


@dataclass(frozen=True, slots=True)
class Injection:
    """A descriptor, and what taking it cost."""

    descriptor: int
    """The caller's to close. Close-on-exec and non-blocking."""
    stopped_us: int
    """From asking one thread to stop until it was let go."""
    borrowed_us: int
    """The part of it that the thread spent on borrowed registers."""
    user_mode_only: bool
    """Opened with UFFD_USER_MODE_ONLY: no faults of the kernel's are reported. In async mode none are."""
    healed_if_killed: bool
    """The target would have survived the injector's death at any moment."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The program's packet."""

    status: Status
    error: int
    """An errno, or 0."""
    stage: Stage
    flags: int
    thread: int
    stopped_ns: int
    borrowed_ns: int


class InjectionError(CaptureError):
    """A process did not yield a userfaultfd this time. It runs on."""

    def __init__(self, message: str, *, status: Status | None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status: Final = status


class DescriptorLeftError(InjectionError):
    """A userfaultfd was left open in the process: no dump of it can succeed until it ends or closes it."""

    retryable: ClassVar[bool] = False


def program(at: Path = _PROGRAM) -> Path:
    """Return where the injector is. Raises `UnsupportedError` if it was not built."""
    if not (at.is_file() and os.access(at, os.X_OK)):
        raise UnsupportedError(
            f"{at}, which takes a userfaultfd out of a process, is not there", hint="run `make setup`"
        )
    return at


async def take_userfaultfd(pid: int) -> Injection:
    """Take one userfaultfd for the address space of `pid`; its main thread stops for some 100 µs.

    The process is unharmed whether this works or not. A system call that it waits in goes on, except for
    those that any stop ends with EINTR (epoll_wait, sigtimedwait, semop: signal(7)); each freeze of criu's
    ends them the same way. Needs root, or CAP_SYS_PTRACE and, for targets with a seccomp filter,
    CAP_SYS_ADMIN.

    Raises `UnsupportedError` if this process can never yield one, `InjectionError` if it did not this time
    (it has ended, executes another program, is traced, does not stop), `DescriptorLeftError` if it kept one.
    """
    work = asyncio.ensure_future(asyncio.to_thread(inject, program(), pid))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_discard)
        raise


def inject(executable: Path, pid: int, deadline_s: float = _DEADLINE_S) -> Injection:
    """Do what `take_userfaultfd` does; blocking, for at most `deadline_s` and the time to start a process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            try:
                child = os.posix_spawn(
                    executable,
                    [str(executable), str(pid)],
                    {},
                    file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _ANSWER_DESCRIPTOR)],
                    setpgroup=0,
                )
            except OSError as error:
                raise UnsupportedError(
                    f"{executable} cannot be started: {error.strerror}", hint="run `make setup`"
                ) from error
        leave(child)  # a thread of the workload is stopped until it is done
        late = False
        packet, descriptors = b"", list[int]()
        try:
            ours.settimeout(deadline_s)
            packet, descriptors = _receive(ours)
        except TimeoutError:
            late = True
        finally:
            if not packet:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not packet:
        raise _unanswered(pid, code, deadline_s if late else None)
    try:
        return judge(pid, parse(packet), descriptors)
    except OutliveError:
        for each in descriptors:
            os.close(each)
        raise


def parse(packet: bytes) -> Answer:
    """Read the program's packet. Raises `UnsupportedError` if it is of another version."""
    try:
        magic, status, error, stage, flags, thread, stopped_ns, borrowed_ns = _ANSWER.unpack(packet)
        if magic != _MAGIC:
            raise ValueError("another magic number")
        return Answer(Status(status), error, Stage(stage), flags, thread, stopped_ns, borrowed_ns)
    except (struct.error, ValueError) as error:
        raise UnsupportedError(
            f"the injector's answer is not of this version: {error}", hint="build native/ again: `make setup`"
        ) from error


def judge(pid: int, answer: Answer, descriptors: list[int]) -> Injection:
    """Turn an answer and what came with it into the result, or raise the error that says what happened."""
    if answer.status is Status.OK:
        if len(descriptors) != 1:
            raise InjectionError(
                f"the injector sent {len(descriptors)} descriptors for process {pid}, not one",
                status=answer.status,
                hint="are open files of this process at their limit (RLIMIT_NOFILE)?",
            )
        return Injection(
            descriptor=descriptors[0],
            stopped_us=answer.stopped_ns // 1000,
            borrowed_us=answer.borrowed_ns // 1000,
            user_mode_only=bool(answer.flags & _USER_MODE_ONLY),
            healed_if_killed=bool(answer.flags & _HEALING),
        )
    why, hint = _WORDS[answer.status]
    cause = f": {os.strerror(answer.error)}" if answer.error else ""
    if answer.status is Status.GONE and answer.error == errno.ENOEXEC:
        why, cause = "it executes another program", ""
    message = f"no userfaultfd of process {pid}: {why}{cause} (at {answer.stage.name})"
    if answer.status in _NEVER:
        raise UnsupportedError(message, hint=hint)
    if answer.status is Status.LEFT_OPEN:
        raise DescriptorLeftError(message, status=answer.status, hint=hint)
    raise InjectionError(message, status=answer.status, hint=hint)


_NEVER: Final = frozenset({Status.COMPAT, Status.NO_CODE, Status.SECCOMP_KEPT, Status.DISPATCHED})

_WORDS: Final[dict[Status, tuple[str, str]]] = {
    Status.BAD_USAGE: ("the injector was called wrongly", ""),
    Status.GONE: ("it has ended", ""),
    Status.TRACED: ("another process traces it", "detach the debugger or strace"),
    Status.REFUSED: ("the kernel does not let us trace it", "the agent needs CAP_SYS_PTRACE here"),
    Status.COMPAT: ("it runs 32-bit code", "it can only be captured whole"),
    Status.NO_CODE: ("no system call instruction was found in it", "it can only be captured whole"),
    Status.SECCOMP_KEPT: (
        "its seccomp filter could not be suspended",
        "the agent needs CAP_SYS_ADMIN, no seccomp filter of its own, and CONFIG_CHECKPOINT_RESTORE",
    ),
    Status.DISPATCHED: ("its system calls are redirected to itself", "it can only be captured whole"),
    Status.NOT_STOPPED: (
        "it did not stop in time and was left alone",
        "is it frozen, or waiting for a disk?",
    ),
    Status.CALL_FAILED: ("it could not open one", ""),
    Status.NOT_TAKEN: ("the one that it opened could not be taken, and is closed again", ""),
    Status.LEFT_OPEN: ("the one that it opened could not be closed in it", "restart the workload"),
    Status.STUCK: ("it did not go on when it should, and got its registers back", "is it being frozen?"),
    Status.NOT_RETURNED: ("it could not be given its registers back", "look whether it still runs"),
    Status.BROKEN: ("a system call of the injector's failed, before anything was changed", ""),
}


def _receive(answer: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors; nothing if the program ended without."""
    room = array.array("i")
    packet, beside, _, _ = answer.recvmsg(
        _ANSWER.size + 1, socket.CMSG_SPACE(room.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in beside:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            room.frombytes(content[: len(content) - len(content) % room.itemsize])
    return packet, room.tolist()


def _unanswered(pid: int, code: int, deadline_s: float | None) -> InjectionError:
    """Return the error for a program that said nothing: ended by itself, or killed at our deadline."""
    did = (
        f"ended with {code}"
        if deadline_s is None
        else f"did not answer within {deadline_s:g} s and was killed"
    )
    return InjectionError(
        f"no userfaultfd of process {pid}: the injector {did}",
        status=None,
        hint="" if platform.machine() == "x86_64" else "look whether the process still runs",
    )


def _discard(work: asyncio.Future[Injection]) -> None:
    """Close what arrived for a caller that had been cancelled."""
    if not work.cancelled() and work.exception() is None:
        os.close(work.result().descriptor)
