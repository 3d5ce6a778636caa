"""A tree of processes of every kind that a capture may meet. Runs by itself, with any Python.

    family.py steady PROCESSES THREADS    so many processes, of which one has so many threads; none ends
    family.py restless PROCESSES THREADS  the same, and others that come, execute a program, and go; and one
                                          that becomes another program again and again

Each of them writes to its memory all the time. Some lead sessions of their own; one has ended and was never
waited for.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time

_PAGES = 256


def scribble(pause_s: float, for_s: float = float("inf")) -> None:
    """Write to pages of its own, for ever or for some time."""
    memory = mmap.mmap(-1, _PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        memory[random.randrange(len(memory))] = random.randrange(256)
        time.sleep(pause_s)


def child(number: int) -> None:
    """Fork one that stays; every eighth leads a session, and has a child itself."""
    if os.fork():
        return
    if number % 8 == 7:
        os.setsid()
        if not os.fork():
            scribble(0.05)
    scribble(0.05)


def renew() -> None:
    """Execute this program anew in the same process."""
    os.execv(sys.executable, [sys.executable, __file__, "renewed", "0", "0"])  # noqa: S606


def come_and_go() -> None:
    """Have short-lived processes: some fork, some are spawned (by vfork) and execute something."""
    while True:
        if random.random() < 0.5:
            if not os.fork():
                memory = bytearray(random.randrange(1, 64) * mmap.PAGESIZE)
                time.sleep(random.uniform(0, 0.2))
                os._exit(memory[0])
            os.wait()
        else:
            os.waitpid(os.posix_spawn("/bin/sleep", ["sleep", "0.05"], os.environ), 0)


def main() -> None:
    """Be the first of the family."""
    kind, processes, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if kind == "renewed":
        scribble(0.001, random.uniform(0.1, 0.6))
        renew()
    if not os.fork():
        os._exit(0)  # never waited for
    leaders = (processes - 1) // 9
    for number in range(processes - 1 - leaders):
        child(number)
    for _ in range(threads - 1):
        threading.Thread(target=scribble, args=(0.5,), daemon=True).start()
    if kind == "restless":
        if not os.fork():
            renew()
        come_and_go()
    scribble(0.02)


if __name__ == "__main__":
    main()
