"""The file oracle: what an epoch has of a workload's files is what they were when its memory was.

    python -m tests.campaigns.file_oracle --epochs 1000 [--seeds 1] [--seed 1] [--every 4] [--on ext4,xfs,…]
                                         [--unwatched]

A program that changes its files in every way there is (`tests/oracle/files.c`) runs in a container and is
captured epoch after epoch, memory and files, as the agent does it. Epochs are committed to a real store, as
by a replica that misses every third one, and laid out in a second directory on the same file system. In a
sample of epochs the container's cgroup is frozen before the dump, and stays so until the epoch is laid out,
and until:

- the program's own model, as frozen, has judged the second directory;
- both directories were walked, by other code than captures them, and compared: content and all that is told.

What CRIU needs to restore files without a name, and removes when it has dumped them (`link_remap.N`), is in
the second directory only; it is set aside for that.

After every 50th epoch memory and files are restored together, in a network namespace of their own, and the
program is asked whether it finds itself intact.

A run counts only if every path of the program was taken. What goes wrong is told with the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.container import workload_pids
from common.errors import CaptureError
from common.model import EpochId, FilePath
from outlive.cli.running import configure_logs
from primary.capture import CapturedEpoch
from primary.file_backend import WithFiles
from primary.file_capture import FileCapture
from primary.file_watch import FileWatch
from replica.file_tree import FileTree
from tests.campaigns.twins import Replica, Subject, restored_elsewhere, running_subject
from tests.oracle.build import ask, build_files
from tests.oracle.files import Judge
from tests.unit.file_trees import walk

SEEN_AS = "/data"
SYSTEMS = ("ext4", "xfs", "btrfs", "overlay", "tmpfs")
_SIZE_MIB = 600
_REMAP = re.compile(rb"link_remap\.[0-9]+")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One seed on one file system."""

    file_system: str
    seed: int
    epochs: int
    compared: int
    restored: int
    full: int
    """Epochs for which the whole second directory was looked at."""
    refused: int
    reasons: dict[str, int]
    steps: int
    files: int
    ran_on: int
    """Epochs that were to be compared, but the workload ran on for a moment: CRIU had thawed the cgroup."""
    unjudged: tuple[str, ...]
    """Epochs in which the model finds fault with the first directory too, at that instant: both are then only
    compared with each other."""
    wrong: tuple[str, ...]
    untouched: tuple[str, ...]
    freeze_p50_ms: float
    files_p50_ms: float
    """The files' part of it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole campaign."""

    schema_version: int
    watched: bool
    seconds: float
    runs: tuple[Run, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong and every path was taken."""
        return not any(
            run.wrong or run.untouched or len(run.unjudged) + run.ran_on > run.compared // 4
            for run in self.runs
        )


class TimedFiles(FileCapture):
    """Tells how long it takes within freezes."""

    last_ms = 0.0

    def take(self, *, patient: bool) -> None:
        """See `FileCapture.take`."""
        begun_s = time.perf_counter()
        try:
            super().take(patient=patient)
        finally:
            self.last_ms = (time.perf_counter() - begun_s) * 1000


@contextlib.contextmanager
def mounted(system: str) -> Iterator[Path]:
    """Make a file system in a file and mount it; nothing of it is left afterwards."""
    place = Path(tempfile.mkdtemp(prefix="outlive-files-", dir="/var/tmp"))
    point, image = place / "mounted", place / "image"
    point.mkdir()
    try:
        if system == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE_MIB}m", "outlive-test", point)
        elif system == "overlay":
            for name in ("lower", "upper", "work"):
                (place / name).mkdir()
            layers = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
            _run("mount", "-t", "overlay", "-o", f"{layers},index=on,nfs_export=on", "outlive-test", point)
        else:
            with image.open("wb") as file:
                file.truncate(_SIZE_MIB << 20)
            _run(f"mkfs.{system}", "-q", image)
            _run("mount", "-o", "loop", image, point)
        yield point
    finally:
        subprocess.run(["umount", point], check=False, capture_output=True)
        if os.path.ismount(point):
            ctypes.CDLL(None).umount2(os.fsencode(point), 2)
        shutil.rmtree(place, ignore_errors=True)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


async def run_seed(
    system: str,
    seed: int,
    epochs: int,
    every: int,
    *,
    restore_every: int = 50,
    watched: bool = True,
    talk: bool = False,
) -> Run:
    """Capture so many epochs of one program on one file system."""
    chance = random.Random(seed)
    wrong: list[str] = []
    unjudged: list[str] = []
    ran_on = compared = restored = full = refused = steps = number = files_seen = 0
    freezes: list[float] = []
    parts: list[float] = []
    reasons: Counter[str] = Counter()
    missing: list[str] = []
    with mounted(system) as point:
        source, copy = point / "source", point / "copy"
        source.mkdir(mode=0o755)
        async with running(seed, source) as (subject, port, model):
            files = TimedFiles(
                {SEEN_AS.encode(): source},
                hasher=subject.fast._hasher,
                layers=Path(subject.config.node.image_dir) / subject.spec.name,
                pids=lambda: workload_pids(subject.config, subject.spec.name),
                watch=FileWatch([source]) if watched else None,
                on_missed=lambda what: wrong.append(f"nothing was reported of it: {what}"),
            )
            backend = WithFiles(subject.fast, files, subject.hook)
            store = Path(subject.config.node.image_dir) / "store"
            replica = Replica(store, subject.config, subject.spec)
            tree = FileTree({SEEN_AS.encode(): copy}, subject.directory / "files.state")
            try:
                while number < epochs and refused < 5 * epochs and not wrong:
                    if ending := subject.ending():
                        wrong.append(f"after epoch {number} the program ended with {ending}")
                        break
                    epoch = EpochId(1, number + refused + 1)
                    compares = chance.randrange(every) == 0 or (number + 1) % restore_every == 0
                    try:
                        async with frozen(subject) if compares else contextlib.AsyncExitStack():
                            captured = await backend.capture(epoch, replica.holds)
                            # A freeze that came to nothing has CRIU thaw it.
                            compares = compares and subject.freezer.frozen
                            if compares:
                                before = await asyncio.to_thread(walk, source)
                                moved = _moved_since(source, captured.frozen_wall_s)
                                frozen_model = subject.directory / "model"
                                await asyncio.to_thread(shutil.copyfile, model, frozen_model)
                                own = await asyncio.to_thread(_verdict, subject, frozen_model, source)
                                full += await asyncio.to_thread(_lay_out, replica, tree, captured, wrong)
                                compares = subject.freezer.frozen
                    except CaptureError as error:
                        refused += 1
                        reasons[re.sub(r"[0-9]+", "#", ascii(error.message))] += 1
                        if talk:
                            print(f"{system}, epoch {number + 1}: {error}", file=sys.stderr)
                        await asyncio.sleep(0.05)
                        continue
                    number += 1
                    files_seen = files.files
                    freezes.append(captured.freeze.total_ms)
                    parts.append(files.last_ms)
                    if chance.randrange(3) and not compares:
                        full += await asyncio.to_thread(_lay_out, replica, tree, captured, wrong)
                    captured.release()
                    if compares and not wrong:
                        after = await asyncio.to_thread(walk, copy)
                        found_wrong = dict(_differences(before, after))
                        if moved - _linked_by_criu(after):
                            ran_on += 1
                            continue
                        compared += 1
                        wrong += [f"epoch {number}: {each}" for each in found_wrong.values()]
                        verdict = await asyncio.to_thread(_judged, subject, frozen_model, copy)
                        if own["ok"] and not verdict["ok"]:
                            wrong.append(f"epoch {number}: by the program's model: {verdict['error']}")
                        if not own["ok"]:
                            unjudged.append(f"epoch {number}: {own['error']}")
                        wrong += [f"epoch {number}: {each}" for each in tree.check()]
                    if talk and number % 10 == 0:
                        print(f"{system}: {number}/{epochs}, {compared} compared", file=sys.stderr)
                    if number % restore_every == 0 and not wrong:
                        answer = await asyncio.to_thread(ask, port, "check")
                        steps, missing = answer["steps"], answer["missing"]
                        if not answer["ok"]:
                            wrong.append(f"epoch {number}: it finds itself damaged: {answer['error']}")
                        newest = replica.store.records()[-1]
                        tree.forget()
                        there = (FilePath(path=SEEN_AS, source=str(copy)),)
                        found = await restored_elsewhere(
                            subject, newest.path, newest.id, port=port, files=there
                        )
                        restored += 1
                        wrong += [f"epoch {number}, restored: {found}"] if found else []
                    await asyncio.sleep(chance.uniform(0.0, 0.05))
            finally:
                replica.store.close()
                await backend.close()
    if number < epochs and not wrong:
        wrong.append(f"no more than {number} of {epochs} epochs could be captured: {dict(reasons)}")
    for each in wrong if talk else ():
        print(f"{system}, seed {seed}: WRONG: {each}", file=sys.stderr)
    return Run(
        file_system=system,
        seed=seed,
        epochs=number,
        compared=compared,
        restored=restored,
        full=full,
        refused=refused,
        reasons=dict(reasons),
        steps=steps,
        files=files_seen,
        ran_on=ran_on,
        unjudged=tuple(each.encode(errors="backslashreplace").decode() for each in unjudged),
        wrong=tuple(each.encode(errors="backslashreplace").decode() for each in wrong),
        untouched=tuple(sorted(missing)),
        freeze_p50_ms=round(float(np.median(freezes)), 2) if freezes else 0.0,
        files_p50_ms=round(float(np.median(parts)), 2) if parts else 0.0,
    )


def _lay_out(replica: Replica, tree: FileTree, captured: CapturedEpoch, wrong: list[str]) -> bool:
    """Commit an epoch and lay its files out; whether all of them were looked at."""
    try:
        replica.take(captured)
        with replica.store.files_of(captured.id) as files:
            return tree.apply(files).full
    except (CaptureError, AssertionError) as error:
        if "changed before its content was sent" not in str(error):
            wrong.append(f"epoch {captured.id}: {error}")
        return False


def _judged(subject: Subject, model: Path, directory: Path) -> dict[str, Any]:
    """Have the program's model judge a copy without CRIU's own names."""
    copy = directory.with_name("judged")
    _run("cp", "-a", "--sparse=always", directory, copy)
    try:
        times: dict[bytes, tuple[int, int]] = {}
        for here, _, names in os.walk(os.fsencode(copy)):
            for name in filter(_REMAP.fullmatch, names):
                status = os.stat(here)
                times.setdefault(here, (status.st_atime_ns, status.st_mtime_ns))
                os.unlink(os.path.join(here, name))
        for here, both in times.items():
            os.utime(here, ns=both)
        return _verdict(subject, model, copy)
    finally:
        shutil.rmtree(copy)


def _verdict(subject: Subject, model: Path, directory: Path) -> dict[str, Any]:
    with Judge(build_files(subject.directory / "program"), model, directory, dead=True) as judge:
        return judge.verdict()


def _moved_since(source: Path, frozen_wall_s: float) -> set[bytes]:
    """Return what was changed after the workload was frozen: it did not stand still.

    Directories do not count: CRIU makes names in them, and removes them.
    """
    moved = set()
    for here, _, names in os.walk(os.fsencode(source)):
        below = here.removeprefix(os.fsencode(source))
        for name in names:
            if os.lstat(os.path.join(here, name)).st_ctime_ns > frozen_wall_s * 1e9:
                moved.add(SEEN_AS.encode() + below + b"/" + name)
    return moved


def _linked_by_criu(tree: dict[bytes, Any]) -> set[bytes]:
    """Return the names of files that CRIU gave one more, and took it away."""
    linked = set()
    for path, told in tree.items():
        if _REMAP.fullmatch(path.rpartition(b"/")[2]):
            linked |= set(told[6])
    return linked


def _differences(before: dict[bytes, Any], after: dict[bytes, Any]) -> Iterator[tuple[bytes, str]]:
    names = ("mode", "owner", "group", "time", "attributes", "content", "links")
    remaps = {path for path in after if _REMAP.fullmatch(path.rpartition(b"/")[2])}
    touched = {path.rpartition(b"/")[0] for path in remaps}
    for path in sorted((before.keys() | after.keys()) - remaps):
        one, other = before.get(path), after.get(path)
        if one is None or other is None:
            yield path, f"{path!r} is only {'at the primary' if other is None else 'at the replica'}"
            continue
        for name, left, right in zip(names, one, other, strict=False):
            if name == "links":
                right = tuple(each for each in right if each not in remaps)
            if left != right and not (name == "time" and path in touched):
                yield path, f"{path!r} has another {name}: {str(left)[:200]} became {str(right)[:200]}"


@contextlib.asynccontextmanager
async def frozen(subject: Subject) -> AsyncIterator[None]:
    """Have the next dump freeze the cgroup, after what is done ahead of it, and keep it so until the end."""
    subject._fast_dumper.freezer = subject.freezer
    subject._fast_dumper.freeze_cgroup = subject.freezer.directory
    try:
        yield
    finally:
        subject._fast_dumper.freezer = None
        subject._fast_dumper.freeze_cgroup = None
        subject.freezer.thaw()


@contextlib.asynccontextmanager
async def running(seed: int, source: Path) -> AsyncIterator[tuple[Subject, int, Path]]:
    """Run the program in a container, and wait until it answers; its port, and the file with its model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    status = Path()

    def command(directory: Path) -> tuple[str, ...]:
        nonlocal status
        status = directory / "status"
        program = build_files(directory / "program")
        words = ("--directory", SEEN_AS, "--seed", str(seed), "--port", str(port), "--bind", "127.0.0.1")
        return (str(program), *words, "--status", str(status))

    files = (FilePath(path=SEEN_AS, source=str(source)),)
    async with running_subject(command, files=files) as subject:
        for _ in range(200):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(ask, port, "counters")
                break
            await asyncio.sleep(0.05)
        descriptor = json.loads(status.read_text())["model"]
        yield subject, port, Path(f"/proc/{subject._init_pid}/fd/{descriptor}")


async def run_campaign(
    systems: tuple[str, ...],
    first_seed: int,
    seeds: int,
    epochs: int,
    every: int,
    *,
    watched: bool,
    talk: bool,
) -> Report:
    """Run seed after seed on one file system after the other."""
    started_s = time.monotonic()
    runs = [
        await run_seed(system, first_seed + each, epochs, every, watched=watched, talk=talk)
        for system in systems
        for each in range(seeds)
    ]
    seconds = round(time.monotonic() - started_s, 1)
    return Report(schema_version=1, watched=watched, seconds=seconds, runs=tuple(runs))


def main() -> int:
    """Read the command line, run, print one JSON object; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--every", type=int, default=4, help="one epoch of so many is compared")
    parser.add_argument("--on", default="ext4,xfs", help=f"file systems: {','.join(SYSTEMS)}")
    parser.add_argument(
        "--unwatched", action="store_true", help="without reports of changes: scan everything"
    )
    options = parser.parse_args()
    configure_logs("warning")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what runs is cleaned up
    print(f"seed {options.seed}", file=sys.stderr)
    report = asyncio.run(
        run_campaign(
            tuple(options.on.split(",")),
            options.seed,
            options.seeds,
            options.epochs,
            options.every,
            watched=not options.unwatched,
            talk=True,
        )
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
