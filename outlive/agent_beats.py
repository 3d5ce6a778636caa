"""The agent's heartbeats, from a process of their own: its child, which ends with it.

In: the configuration, before the agent has threads, an event loop or a cgroup of its own; from then on, that
the agent gets on. Out: beats to every peer, whatever the agent has to do, as long as it lives and does not
hang.

Why not in the agent: it takes what others leave of the processors (`common.scheduling`), and a beat that
waits for its turn is a beat that was not sent. When a keeper has died, its agent's beats are all that keeps a
peer from having the host turned off, some 300 ms later. The child stays where it was born, on a par with
workloads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import zmq.asyncio

from common.config import NodeConfig
from common.errors import OutliveError
from common.heartbeat import AgentBeater
from common.keyring import Keyring, read_keyring
from common.keys import load

log = logging.getLogger(__name__)

HANGS_AFTER_S = 2.0
"""Without a sign from the agent: several times as long as it may wait for a processor (`Agent`), and no
longer than a keeper waits for its reports."""

_PR_SET_PDEATHSIG = 1
"""<sys/prctl.h>"""
_LOOK_EVERY_S = 0.1
_SIGN = struct.Struct("d")


class AgentBeats:
    """The child; made by `fork`."""

    def __init__(self, pid: int, start: int, sign: mmap.mmap) -> None:
        """`start` is the end of a pipe: the child waits for a byte from it, and then looks at `sign`."""
        self._sign = sign
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)  # its PID may be another's one day
        self._start = start

    @classmethod
    def fork(cls, config: NodeConfig, reread: Callable[[], NodeConfig]) -> AgentBeats:
        """Make the child, silent until `begin`. `reread` returns the file when keys are to be read again.

        Raises OSError if there can be no child; what the keys lack is for the agent itself to say.
        """
        parent = os.getpid()
        wait, start = os.pipe()
        sign = mmap.mmap(-1, mmap.PAGESIZE)  # shared
        pid = os.fork()
        if pid == 0:
            os.close(start)
            _beat(config, reread, parent, wait, sign)
        os.close(wait)
        return cls(pid, start, sign)

    def begin(self) -> None:
        """Have it beat: this is the agent of this node, and not a second one by mistake.

        The beats of a second one would be newer than those of the first, which nobody would believe any more.
        """
        self.gets_on()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._start, b"!")

    def gets_on(self) -> None:
        """Say that the agent does not hang, much more often than every `HANGS_AFTER_S`."""
        _SIGN.pack_into(self._sign, 0, time.monotonic())

    def reload_keys(self) -> None:
        """Have it read the keys again."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGHUP)

    async def ended(self) -> None:
        """Return when it has ended, which it does not by itself while the agent lives."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pidfd, over.set)
        try:
            await over.wait()
            self.end()
        finally:
            loop.remove_reader(self._pidfd)

    def end(self) -> None:
        """End it. Idempotent."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)


def _beat(
    config: NodeConfig, reread: Callable[[], NodeConfig], parent: int, wait: int, sign: mmap.mmap
) -> NoReturn:
    """Be the child."""
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can be heard
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the agent, which ends this
        if os.getppid() == parent and os.read(wait, 1):
            gc.freeze()
            asyncio.run(_run(config, reread, sign))
    except Exception as error:  # nobody else would say it
        log.error("beats.ended reason=%r", str(error))
    finally:
        os._exit(1)


async def _run(config: NodeConfig, reread: Callable[[], NodeConfig], sign: mmap.mmap) -> None:
    keys = read_keyring(config)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _reload, keys, reread)
    context = zmq.asyncio.Context()
    while True:
        beating = asyncio.create_task(AgentBeater(config, keys, context).run())
        while not hangs(sign) and not beating.done():  # noqa: ASYNC110 - shared memory
            await asyncio.sleep(_LOOK_EVERY_S)
        if beating.done():
            beating.result()
        beating.cancel()
        log.error("agent.hangs reason=%r", f"no sign of it for {HANGS_AFTER_S:g} s: no beats until there is")
        while hangs(sign):  # noqa: ASYNC110 - shared memory
            await asyncio.sleep(_LOOK_EVERY_S)


def hangs(sign: mmap.mmap) -> bool:
    """Tell whether the agent's last sign is too old."""
    (at_s,) = _SIGN.unpack_from(sign, 0)
    return bool(time.monotonic() - at_s > HANGS_AFTER_S)


def _reload(keys: Keyring, reread: Callable[[], NodeConfig]) -> None:
    with contextlib.suppress(OutliveError):  # the agent reads the same, and says so
        config = reread()
        keys.replace(load(Path(config.node.key_file)), config.peers)
