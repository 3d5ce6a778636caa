"""A real process with known memory that can be dumped into a store and restored; shared by tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.criu.images import PE_LAZY, PE_PARENT, PE_PRESENT, SpaceKey, expand, page_images, read_pagemap
from common.criu.locate import locate_criu
from common.model import EpochId
from replica.store import ZERO, EpochHeader, EpochRecord, EpochStore

# Each USR1 changes some pages, zeroes one, and once lets some vanish and others come; USR2 asks for a digest
# of all. Two processes that share a segment, so that there are three address spaces.
_TARGET = """
import hashlib, mmap, os, signal, sys
answer = sys.argv[1]
private = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
shared = mmap.mmap(-1, 1 << 20, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
for page in range(1024): private[page * 4096] = 1 + page % 250
for page in range(0, 256, 5): shared[page * 4096] = 7
child = os.fork()
name = answer + ("" if child else ".child")
generation = 1
wanted = {signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
def step():
    global generation
    generation += 1
    for page in range(generation, 1024, 97): private[page * 4096 + 5] = generation
    private[(500 + generation) * 4096 : (501 + generation) * 4096] = bytes(4096)
    shared[(10 * generation) * 4096] = generation
    if generation == 3: private.madvise(mmap.MADV_DONTNEED, 800 * 4096, 20 * 4096)
    if generation == 4: private[805 * 4096] = 44
def tell():
    digest = hashlib.blake2b(private[:]); digest.update(shared[:])
    with open(name + ".new", "w") as file: file.write(f"{generation} {digest.hexdigest()}")
    os.rename(name + ".new", name)
tell()
while True: step() if signal.sigwait(wanted) == signal.SIGUSR1 else tell()
"""

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)


class Target:
    """Two processes with known content; can be stepped, asked, dumped and killed."""

    def __init__(self, directory: Path) -> None:
        self._answers = [directory / "answer", directory / "answer.child"]
        process = subprocess.Popen(
            [sys.executable, "-c", _TARGET, str(self._answers[0])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self.pid = process.pid
        process.returncode = 0  # from now on waited for by `kill`, as what is restored is
        self._wait()
        self._pids = [self.pid, self._child()]

    def _child(self) -> int:
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])

    def _wait(self) -> list[str]:
        until = time.monotonic() + 20
        while not all(path.exists() for path in self._answers):
            assert time.monotonic() < until, "no answer from the process"
            time.sleep(0.005)
        return [path.read_text() for path in self._answers]

    def step(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR1)

    def ask(self) -> list[str]:
        for path in self._answers:
            path.unlink(missing_ok=True)
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR2)
        return self._wait()

    def dump(self, directory: Path) -> None:
        directory.mkdir()
        subprocess.run(
            [
                *(str(locate_criu(None)), "dump", "--tree", str(self.pid), "--images-dir", str(directory)),
                *("--leave-running", "--manage-cgroups=ignore", "--network-lock", "skip"),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )

    def kill(self) -> None:
        for pid in self._pids[::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in self._pids):
            assert time.monotonic() < until, "the process does not go"
            time.sleep(0.005)


@contextlib.contextmanager
def running_target(directory: Path) -> Iterator[Target]:
    """A running target, whose orphans come to us."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        target = Target(directory)
        try:
            yield target
        finally:
            target.kill()
    finally:
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)


Pages = dict[SpaceKey, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Of each space: page numbers, flags, and content, one row of 4096 bytes a page."""


def pages_of(dump: Path) -> Pages:
    pages: Pages = {}
    for image in page_images(dump):
        numbers, flags = expand(read_pagemap(dump / image.key.pagemap_name).entries)
        assert ((flags & PE_PRESENT) != 0).all()
        file = dump / image.pages_name
        data = np.frombuffer(file.read_bytes() if file.exists() else b"", dtype=np.uint8)
        pages[image.key] = (numbers, flags, data.reshape(-1, 4096))
    return pages


def commit_dump(
    store: EpochStore, workload: str, epoch: EpochId, dump: Path, base: EpochId | None, held: Pages | None
) -> EpochRecord:
    """Commit a dump; with `held`, what `base` holds, as what changed since."""
    header = EpochHeader(
        workload=workload,
        id=epoch,
        base=base,
        incarnation="one",
        frozen_wall_s=time.time(),
    )
    command = ("criu", "restore", "--manage-cgroups=ignore", "--network-lock", "skip")
    with store.begin(header, restore_command=command) as arriving:
        for file in sorted(dump.iterdir()):
            if not file.name.startswith(("pagemap-", "pages-", "stats-")):
                arriving.metadata(file.name, file.read_bytes())
        for key, (numbers, flags, data) in pages_of(dump).items():
            before = held.get(key) if held else None
            same = np.zeros(len(numbers), dtype=bool)
            if before is not None:
                _, mine, theirs = np.intersect1d(numbers, before[0], return_indices=True)
                same[mine] = (data[mine] == before[2][theirs]).all(axis=1)
            zero = ~same & ~data.any(axis=1)
            sent = np.where(same, PE_PARENT, np.where(zero, ZERO, PE_PRESENT)).astype(np.uint8)
            arriving.space(key, numbers, sent | (flags & PE_LAZY))
            arriving.pages(key, data[~same & ~zero].tobytes())
        return arriving.commit()


def restore(record: EpochRecord, directory: Path) -> None:
    """Run the command that stands beside the images, with nothing of ours in between."""
    directory.mkdir()
    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "criu").symlink_to(locate_criu(None))
    done = subprocess.run(
        ["sh", str(record.path / "RESTORE")],
        cwd=directory,
        env={"PATH": f"{binaries}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
