"""Bugs planted into the fast backend, each of which the memory oracle must find.

    python -m tests.campaigns.oracle_planted [--seed 1] [--epochs 60] [--only WORDS] [--output json]

Each is a patch of this process, or a library compiled from altered sources into a directory of its own; the
product's code is not touched. The program under test takes the paths that the bug has to do with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import msgspec

from outlive.cli.running import configure_logs
from primary import pages
from primary.book import PageBook
from primary.page_set import PageSet
from primary.process import TrackedProcess
from primary.tracking import TrackerName, choose
from primary.userfault import Userfault
from setup import native
from tests.campaigns.oracle import run_seed

_SLOW_BYTES_PER_S = 8_000_000
_IO_LIMITS = (
    ("blkio/outlive/outlive-oracle-*/*/blkio.throttle.read_bps_device", ""),
    ("outlive/outlive-oracle-*/*/io.max", "rbps="),
)
"""Version 1 and version 2: which file of the cgroup, and how it wants the limit."""

Plant = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Bug:
    """What is planted, and which paths of the program lead to it."""

    plant: Plant
    paths: str
    tracker: TrackerName = "userfaultfd"
    """With which it is; only where that works can it be hunted."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one bug."""

    bug: str
    found: bool
    epochs: int
    by: str


@contextlib.contextmanager
def altered(*changes: tuple[str, str, str]) -> Iterator[None]:
    """Compile the parts in C from altered sources, and have this process use them."""
    with tempfile.TemporaryDirectory(prefix="outlive-planted-") as directory:
        sources = Path(directory)
        for path in native.SOURCES.glob("*.[ch]"):
            text = path.read_text()
            for name, old, new in changes:
                if path.name == name:
                    if text.count(old) != 1:
                        raise AssertionError(
                            f"{name} has {text.count(old)} times what is to be altered: {old}"
                        )
                    text = text.replace(old, new)
            (sources / path.name).write_text(text)
        with patch.object(native, "SOURCES", sources):
            native.build(sources / "build")
        pages._library.cache_clear()
        try:
            with patch.dict(os.environ, {"OUTLIVE_NATIVE": str(sources / "build")}):
                pages.load()
                yield
        finally:
            pages._library.cache_clear()
            pages.load()


@contextlib.contextmanager
def vanished_pages_stay() -> Iterator[None]:
    """Have the book go on with pages that are not there any more, as long as it knew them."""
    restrict = PageBook.restrict

    def keeping(book: PageBook, present: PageSet) -> None:
        restrict(book, present | book.known)

    with patch.object(PageBook, "restrict", keeping):
        yield


@contextlib.contextmanager
def early_copies_are_dropped() -> Iterator[None]:
    """Have nobody take note of what was protected and copied while CRIU was at work."""
    with (
        patch.object(TrackedProcess, "doubt_early", lambda _: None),
        patch.object(TrackedProcess, "keep_early", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def protection_stays() -> Iterator[None]:
    """Have tracking begin with pages that are protected already, as the kernel leaves them."""

    def lift(userfault: Userfault, pagemap: int) -> bool:
        userfault._unlifted.clear()
        return True

    with patch.object(Userfault, "lift", lift):
        yield


@contextlib.contextmanager
def devices_write_unheeded() -> Iterator[None]:
    """Have nobody look for direct I/O, with a disk that is slow enough for it to matter.

    The limit is the workload's cgroup's own: its requests wait with their pages handed over.
    """
    device = os.stat(tempfile.gettempdir()).st_dev
    limit = f"{os.major(device)}:{os.minor(device)} {{}}{_SLOW_BYTES_PER_S}"
    ended = threading.Event()

    def slow_down() -> None:
        while not ended.wait(0.1):
            for pattern, form in _IO_LIMITS:
                for file in Path("/sys/fs/cgroup").glob(pattern):
                    with contextlib.suppress(OSError):  # it is being removed, or has no such limit
                        file.write_text(limit.format(form))

    watcher = threading.Thread(target=slow_down)
    watcher.start()
    try:
        with altered(
            (
                "pages.c",
                "\tclosedir(directory);\n\treturn found;",
                "\tclosedir(directory);\n\treturn found * 0;",
            )
        ):
            yield
    finally:
        ended.set()
        watcher.join()


BUGS: dict[str, Bug] = {
    "a device's writes may come after the protection": Bug(devices_write_unheeded, "direct_read"),
    "pages that vanished stay": Bug(vanished_pages_stay, "dontneed,munmap,mmap,store_page"),
    "what was copied early is not taken note of": Bug(early_copies_are_dropped, "store_word,store_page"),
    "tracking begins with what is protected already": Bug(
        protection_stays,
        "mmap,munmap,mremap_beside,store_word,store_page",
    ),
    "a marker in a file mapping counts as clean": Bug(
        lambda: altered(
            (
                "scan.c",
                "failure = append_marked(space, fd, memory, regions[each].start, regions[each].end,\n"
                "\t\t\t\t\t\t\tbase);",
                "(void)memory, failure = append_clean(space, pair, regions[each].start,\n"
                "regions[each].end, base);",
            ),
            ("scan.c", "static int append_marked(", "__attribute__((unused)) static int append_marked("),
            # Or the markers are gone before a freeze meets them.
            (
                "pages.c",
                "if (pread(memory, &byte, 1, (off_t)page) != 1)\n\t\t\t\t\tbreak;",
                "(void)byte, (void)memory;",
            ),
        ),
        "file_cow,file_dontneed,file_truncate,file_extend,file_pwrite,file_new,store_page",
    ),
    "what is written counts as clean": Bug(
        lambda: altered(
            ("scan.c", "else if (!(is & PAGE_IS_WPALLOWED) || is & PAGE_IS_WRITTEN)", "else if (0)")
        ),
        "store_word,store_page",
    ),
    "closed mappings are not read": Bug(
        lambda: altered(
            (
                "copy.c",
                "failure = read_unreadable(pid, run->start, run->end - run->start, into);",
                "failure = 0 * read_unreadable(pid, run->start, 0, into);",
            )
        ),
        "mprotect_none,mprotect_back,store_page",
    ),
    "smaps are served unchecked": Bug(
        lambda: altered(
            ("shim.c", "if (plan->maps_bytes != size || !within", "if (size == 0 || !within"),
            (
                "shim.c",
                "return memcmp((const char *)shared + plan->maps_offset, text, size) ? NULL : plan;",
                "return plan;",
            ),
        ),
        "mprotect_none,mprotect_back,mprotect_read,mmap,munmap,mmap_fixed,mremap_move,store_page",
    ),
    "what soft-dirty tells is not heeded": Bug(
        lambda: altered(
            ("soft_dirty.c", "\tif (entry & ENTRY_SOFT_DIRTY)\n", "\tif (0 & ENTRY_SOFT_DIRTY)\n"),
        ),
        "store_word,store_page",
        "soft-dirty",
    ),
}


async def hunt(name: str, seed: int, epochs: int, *, options: tuple[str, ...] = ()) -> Found:
    """Run the oracle with one bug planted."""
    bug = BUGS[name]
    with bug.plant():
        try:
            run = await run_seed(
                seed, epochs, 3, options=("--only", bug.paths, *options), tracker=bug.tracker
            )
        except Exception as error:  # whatever breaks, the bug showed
            return Found(bug=name, found=True, epochs=0, by=f"{type(error).__name__}: {error}"[:200])
    return Found(bug=name, found=bool(run.wrong), epochs=run.epochs, by="; ".join(run.wrong)[:200])


def main() -> int:
    """Hunt every bug, print one JSON list; exit 1 if one was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    configure_logs("warning")
    print(f"seed {options.seed}", file=sys.stderr)
    found = []
    for name, bug in BUGS.items():
        if options.only in name and choose(bug.tracker).name is not None:
            found.append(asyncio.run(hunt(name, options.seed, options.epochs)))
            print(found[-1], file=sys.stderr)
    print(msgspec.json.format(msgspec.json.encode(found)).decode())
    return 0 if all(each.found for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
