"""Large files: what is not held for doubtful is what it was, however the file is changed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import CaptureError, UnsupportedError
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from primary import file_writes
from primary.file_book import FileBook
from primary.file_capture import FileCapture, TooMuchWrittenError
from primary.file_reader import Content, FileReader, _data_in
from primary.file_watch import FileWatch
from primary.file_writes import FileWrites, check_support
from primary.page_set import NO_PAGES, PageSet
from tests.unit.file_trees import rebuild, walk
from tests.unit.file_writers import Writer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root traces the kernel")


@pytest.fixture(autouse=True)
def _supported() -> None:
    try:
        check_support()
    except UnsupportedError as error:
        pytest.skip(error.message)


class Known:
    """What a reader knows of a file who reads only what it is told to."""

    def __init__(self, path: Path) -> None:
        self.writes = FileWrites()
        self.fd = os.open(path, os.O_RDONLY)
        status = os.fstat(self.fd)
        self.file = status.st_dev, status.st_ino
        self.content = bytearray()
        self.read_pages = 0

    def close(self) -> None:
        self.writes.close()
        os.close(self.fd)

    def look(self) -> PageSet:
        """Read what is in doubt."""
        status = os.fstat(self.fd)
        doubtful = self.writes.doubtful(self.file, self.fd, status.st_size, touched=True)
        assert doubtful is not None
        self.content = self.content[: status.st_size].ljust(status.st_size, b"\0")
        for numbers in doubtful.pieces(100):
            read = self.writes.read(self.file, self.fd, numbers).reshape(-1, PAGE_BYTES)
            self.read_pages += int(read.any(axis=1).sum())  # the others are holes, mostly
            for number, page in zip(numbers.tolist(), read, strict=True):
                at = number * PAGE_BYTES
                self.content[at : at + PAGE_BYTES] = page.tobytes()
        del self.content[status.st_size :]
        self.writes.all_read(self.file, status.st_size)
        return doubtful


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path / "large", seed=5)
    yield made
    made.close()


@pytest.fixture
def known(writer: Writer) -> Iterator[Known]:
    made = Known(writer.path)
    if not made.writes.follow(made.fd):
        pytest.skip("this file system is not followed")
    yield made
    made.close()


def test_what_is_not_in_doubt_is_what_it_was(writer: Writer, known: Known) -> None:
    looked_at = 0
    for _ in range(400):
        writer.some(6)
        known.look()
        looked_at += -(-writer.size // PAGE_BYTES)
        actual = writer.path.read_bytes()
        if known.content != actual:
            wrong = [
                at // PAGE_BYTES
                for at in range(0, len(actual), PAGE_BYTES)
                if known.content[at : at + PAGE_BYTES] != actual[at : at + PAGE_BYTES]
            ]
            pytest.fail(f"pages {wrong[:9]} of {len(wrong)} changed unnoticed: {writer.done}")
    assert sum(count > 0 for count in writer.done.values()) > len(writer.ways) - 4, writer.done
    assert known.read_pages < looked_at // 2


def test_of_a_large_file_that_does_not_change_nothing_is_read(writer: Writer, known: Known) -> None:
    os.sync()
    known.look()
    assert not known.look()
    assert known.writes.in_doubt() == []


def test_what_is_dirty_when_it_is_read_is_read_again_until_it_is_clean(writer: Writer, known: Known) -> None:
    os.sync()
    known.look()
    fd = os.open(writer.path, os.O_RDWR)
    os.pwrite(fd, b"new", 40960)
    assert 10 in known.look().numbers
    assert known.writes.in_doubt() == [known.file]
    os.pwrite(fd, b"and again", 40960)  # the page is dirty already: that is not told
    assert 10 in known.look().numbers
    os.fsync(fd)
    known.look()
    assert not known.look()
    os.close(fd)


def test_what_is_appended_while_it_is_looked_at_is_read_the_next_time(writer: Writer, known: Known) -> None:
    os.sync()
    known.look()
    size = writer.size
    with open(writer.path, "ab") as file:
        file.write(b"more" * 5000)
    assert known.writes.doubtful(known.file, known.fd, size, touched=True) is not None  # as if it came later
    known.writes.all_read(known.file, size)
    known.look()
    assert bytes(known.content) == writer.path.read_bytes()


def test_many_pages_in_doubt_are_written_back_ahead(
    writer: Writer, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_writes, "_FLUSHED_PAGES", 10)
    os.sync()
    known.look()
    fd = os.open(writer.path, os.O_RDWR)
    os.pwrite(fd, b"x" * (11 * PAGE_BYTES), 0)
    known.writes.hear()
    known.writes.flush(known.file, known.fd)
    known.look()
    assert known.writes.in_doubt() == []
    os.close(fd)


def test_blocks_that_are_zeroed_in_place_are_looked_at(writer: Writer, known: Known) -> None:
    """As when a page is read after it was sent to the disk, and before it is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fd = os.open(writer.path, os.O_RDWR)
    zeroed = 16, writer.size - 65536, 65536
    if libc.fallocate(fd, *zeroed):
        pytest.skip("this file system has no such call")
    os.sync()
    known.look()
    os.pwrite(fd, b"x" * 65536, zeroed[1])
    known.look()
    known.writes._files[known.file].doubtful = NO_PAGES
    os.fsync(fd)
    assert libc.fallocate(fd, *zeroed) == 0
    known.look()
    assert bytes(known.content) == writer.path.read_bytes()
    os.close(fd)


def test_when_reports_are_lost_everything_is_in_doubt(
    writer: Writer, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.sync()
    known.look()
    tracing = known.writes._tracing
    assert tracing is not None
    none = np.empty(0, dtype=file_writes._WRITTEN)
    monkeypatch.setattr(tracing, "drain", lambda: (none, False))
    assert len(known.look()) == -(-writer.size // PAGE_BYTES)


def test_more_reports_than_fit_are_noticed(writer: Writer, known: Known) -> None:
    os.sync()
    known.look()
    fd = os.open(writer.path, os.O_RDWR | os.O_DIRECT)
    buffer = np.zeros(3 * PAGE_BYTES, dtype=np.uint8)
    aligned = buffer[-buffer.ctypes.data % PAGE_BYTES :][:PAGE_BYTES]
    # Each direct read is told as well: the ring has room for 262,144 reports.
    tracing = known.writes._tracing
    assert tracing is not None
    assert not known.look()
    tracing._lost -= 1  # as if one had not fitted
    os.preadv(fd, [aligned.data], 0)
    assert len(known.look()) == -(-writer.size // PAGE_BYTES)
    assert not known.look()
    tracing._missed -= 1  # as if one had interrupted another one
    assert len(known.look()) == -(-writer.size // PAGE_BYTES)
    os.close(fd)


def test_reports_are_heard_while_a_large_file_is_read(
    writer: Writer, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.sync()
    known.look()
    tracing = known.writes._tracing
    assert tracing is not None
    fd = os.open(writer.path, os.O_RDWR)
    for limit, left in ((1 << 20, True), (0, False)):
        monkeypatch.setattr(file_writes, "_UNHEARD_BYTES", limit)
        os.pwrite(fd, b"new", 40960)
        assert tracing.unheard_bytes > 0
        known.writes.read(known.file, known.fd, np.array([1], dtype=np.uint64))
        assert (tracing.unheard_bytes > 0) == left
        assert 10 in known.look().numbers
        os.fsync(fd)
        known.look()
    os.close(fd)


def test_a_file_with_journalled_data_is_not_followed(
    writer: Writer, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_writes, "_system_of", lambda fd: 0)
    assert known.writes.doubtful(known.file, known.fd, 5000, touched=True) is None
    assert known.file not in known.writes
    assert not known.writes.follow(known.fd)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_no_hole_is_found_in_any_runs(tmp_path: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    path = tmp_path / "sparse"
    there = np.repeat(chance.random(60) < 0.5, chance.integers(1, 20, 60))
    with path.open("wb") as file:
        for number in np.flatnonzero(there).tolist():
            file.seek(number * PAGE_BYTES)
            file.write(b"x" * PAGE_BYTES)
        file.truncate(len(there) * PAGE_BYTES)
        os.fsync(file.fileno())
        wanted = PageSet.of(np.flatnonzero(chance.random(len(there) + 9) < 0.4).astype(np.uint64))
        with path.open("rb") as reader:
            found = list(_data_in(reader.fileno(), wanted.bounds.reshape(-1, 2).tolist()))
    numbers = [number for first, end in found for number in range(first, end)]
    assert numbers == [number for number in wanted.numbers.tolist() if there[number : number + 1].any()]


def test_without_support_nothing_is_followed(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise UnsupportedError(f"{name} was not built", hint="run `make setup`")

    monkeypatch.setattr(file_writes, "built", missing)
    writes = FileWrites()
    fd = os.open(writer.path, os.O_RDONLY)
    assert not writes.follow(fd)
    assert writes.followed == []
    writes.hear()
    writes.close()
    os.close(fd)


def test_a_folio_of_unknown_size_is_as_large_as_it_can_be(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.sync()
    known.look()
    tracing = known.writes._tracing
    assert tracing is not None
    written = np.array([(known.file[1], 8, 0), (known.file[1], 64, 65)], dtype=file_writes._WRITTEN)
    monkeypatch.setattr(tracing, "drain", lambda: (written, True))
    doubtful = known.writes.doubtful(known.file, known.fd, len(known.content), touched=False)
    assert doubtful is not None
    assert doubtful.numbers.tolist() == [*range(8, 16), 64]


def test_a_file_that_moves_to_another_place_while_it_is_looked_at_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "large").write_bytes(os.urandom(17 << 20))
    os.link(root / "large", root / "other")
    files = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=tmp_path,
        pids=lambda: [os.getpid()],
        watch=FileWatch([root]),
    )
    files.ahead(None)
    os.sync()
    os.truncate(root / "large", (17 << 20) - 5)
    os.link(root / "large", root / "third")  # it is looked at by that name, and once more by itself
    written = FileReader._written

    def shortened(self: FileReader, *looked_at: Any) -> Content | None:
        content = written(self, *looked_at)
        if (root / "large").stat().st_size > 3 << 20:
            os.truncate(root / "large", 3 << 20)
        return content

    monkeypatch.setattr(FileReader, "_written", shortened)
    files.ahead(None)
    files.take(patient=True)
    files.settle()
    reader = files.seal(EpochId(1, 1))[1]
    assert rebuild(reader.spaces, reader) == walk(root)
    reader.release()
    files.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileCapture]:
    root = tmp_path / "data"
    root.mkdir()
    (root / "large").write_bytes(os.urandom(5 << 20))
    made = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=tmp_path,
        pids=lambda: [os.getpid()],
        watch=FileWatch([root]),
    )
    yield made
    made.close()


def _is_told(files: FileCapture, root: Path, number: int) -> bool:
    files.ahead(None)
    files.take(patient=True)
    files.settle()
    reader = files.seal(EpochId(1, number))[1]
    try:
        return rebuild(reader.spaces, reader) == walk(root)
    except CaptureError:  # what the file holds by now is not what is known
        return False
    finally:
        reader.release()


def test_what_was_read_before_an_error_is_read_again(
    tmp_path: Path, files: FileCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_told(files, tmp_path / "data", 1)
    os.sync()
    (tmp_path / "data/large").open("r+b").write(os.urandom(4 << 20))
    read, count = FileWrites.read, 0

    def failing(self: FileWrites, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, *arguments)

    monkeypatch.setattr(FileWrites, "read", failing)
    files.ahead(None)
    assert count == 2
    assert _is_told(files, tmp_path / "data", 2)


def test_a_freeze_that_is_given_up_has_no_more_read_than_was_written(
    tmp_path: Path, files: FileCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    assert _is_told(files, root, 1)
    os.sync()
    assert _is_told(files, root, 2)
    (root / "large").open("r+b").write(b"new" * PAGE_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr("primary.file_capture._MOST_FROZEN_BYTES", 100)
        with pytest.raises(TooMuchWrittenError):
            files.take(patient=False)
    files.settle()
    assert files._writes.in_doubt(0) == files._writes.followed
    assert files._writes.in_doubt(1 << 20) == []  # as all would be: no end is known
    assert _is_told(files, root, 3)


def test_what_a_freeze_found_and_could_not_be_taken_in_is_looked_for_again(
    tmp_path: Path, files: FileCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    assert _is_told(files, root, 1)
    files.ahead(None)
    (root / "new").write_bytes(b"new")
    (root / "large").open("r+b").write(os.urandom(2 << 20))
    files.take(patient=True)
    with monkeypatch.context() as patch:
        patch.setattr(FileBook, "see", lambda *_: (_ for _ in ()).throw(CaptureError("no room")))
        with pytest.raises(CaptureError):
            files.settle()
    assert _is_told(files, root, 2)


@pytest.mark.parametrize("watched", [True, False])
def test_epochs_have_large_files_as_they_were_at_their_freezes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    monkeypatch.setattr("primary.file_reader.LARGE_BYTES", 1 << 16)
    monkeypatch.setattr("primary.file_look._MOST_BYTES", 1 << 16)
    monkeypatch.setattr("primary.file_scrub._REPORTED_WITHIN_S", 0.0)
    root = tmp_path / "data"
    root.mkdir()
    missed: list[str] = []
    writer = Writer(root / "large", seed=11 + watched)
    try:
        watch = FileWatch([root]) if watched else None
    except UnsupportedError as error:
        pytest.skip(error.message)
    files = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=tmp_path,
        pids=lambda: [os.getpid()],
        watch=watch,
        on_missed=missed.append,
    )
    partial = 0
    for number in range(1, 60):
        writer.some(5)
        files.ahead(EpochId(1, number - 2) if number > 2 else None)
        writer.some(5)
        files.take(patient=True)
        files.settle()
        reader = files.seal(EpochId(1, number))[1]
        assert rebuild(reader.spaces, reader) == walk(root), writer.done
        reader.release()
        partial += sum(node.followed for node in files._book.nodes)
    assert partial > 50
    assert missed == []
    files.close()
    writer.close()


def test_a_write_that_was_not_told_is_found_by_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("primary.file_scrub._REPORTED_WITHIN_S", 0.0)
    root = tmp_path / "data"
    root.mkdir()
    path = root / "large"
    path.write_bytes(os.urandom(5 << 20))
    os.sync()
    missed: list[str] = []
    files = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=tmp_path,
        pids=lambda: [],
        watch=FileWatch([root]),
        on_missed=missed.append,
    )
    for number in range(1, 12):
        assert _is_told(files, root, number)
    os.sync()
    tracing = files._writes._tracing
    if tracing is None:
        pytest.skip("large files are not followed here")
    drain = tracing.drain
    monkeypatch.setattr(tracing, "drain", lambda: (drain()[0][:0], True))
    with path.open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"not told")
    number, wrong = 12, 0
    while not _is_told(files, root, number):
        number, wrong = number + 1, wrong + 1
        assert wrong < 15
    assert wrong > 0
    assert missed == [f"1 pages of {path} hold something else, from page {(3 << 20) // PAGE_BYTES} on"]
    files.close()
