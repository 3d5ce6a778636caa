"""What is captured of files is what was there at the instant: by scans, and by what is reported."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.errors import CaptureError, NoSpaceError, UnsupportedError
from common.excludes import Excludes
from common.file_records import CONTENTS, MOST_LIST_BYTES, MOST_PAGES, RECORDS, ROOTS, Record, unpack_page
from common.identity import PageHasher
from common.model import PAGE_BYTES, EpochId
from primary.file_book import FileBook, Node, Seen
from primary.file_capture import FileCapture, TooMuchWrittenError
from primary.file_epoch import EpochFiles
from primary.file_places import Places, RecordPages
from primary.file_reader import FileReader, Found, UnreadableError
from primary.file_watch import FileWatch
from primary.page_set import NO_PAGES
from tests.unit.file_trees import Changes, Tree, rebuild, walk

Make = Callable[..., FileCapture]


@pytest.fixture(params=["ext4", "tmpfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data"
    directory.mkdir()
    mounted = request.param == "tmpfs"
    libc = ctypes.CDLL(None, use_errno=True)
    if mounted and libc.mount(b"test", os.fsencode(directory), b"tmpfs", 0, b"size=64m"):
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield directory
    finally:
        if mounted:
            libc.umount2(os.fsencode(directory), 2)


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Iterator[Make]:
    made: list[FileCapture] = []

    def capture(*, watched: bool) -> FileCapture:
        try:
            watch = FileWatch([root]) if watched else None
        except UnsupportedError as error:
            pytest.skip(error.message)
        files = FileCapture(
            {b"/data": root}, hasher=PageHasher(), layers=tmp_path, pids=lambda: [os.getpid()], watch=watch
        )
        made.append(files)
        return files

    yield capture
    for files in made:
        files.close()


_READERS: list[EpochFiles] = []


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    """Give the layers of all epochs back: they are open files."""
    yield
    while _READERS:
        _READERS.pop().release()


def sealed(files: FileCapture, number: int) -> EpochFiles:
    _READERS.append(files.seal(EpochId(1, number))[1])
    return _READERS[-1]


def epoch(files: FileCapture, number: int, changes: Callable[[], None] = lambda: None) -> EpochFiles:
    """Take an epoch; `changes` happen just before the freeze."""
    files.ahead(EpochId(1, number - 2) if number > 2 else None)
    changes()
    files.take(patient=False)
    files.settle()
    return sealed(files, number)


def told(reader: EpochFiles) -> Tree:
    return rebuild(reader.spaces, reader)


@pytest.mark.parametrize("watched", [False, True])
def test_epochs_are_what_the_tree_was_at_their_freezes(root: Path, make: Make, watched: bool) -> None:
    files, changes = make(watched=watched), Changes(root, seed=7 + watched)
    for number in range(1, 60):
        changes.some(6)
        reader = epoch(files, number, lambda: changes.some(6))
        assert told(reader) == walk(root)
        reader.release()


@pytest.mark.parametrize("watched", [False, True])
def test_what_criu_names_after_most_was_taken_is_in_the_epoch(root: Path, make: Make, watched: bool) -> None:
    files, changes = make(watched=watched), Changes(root, seed=9 + watched)
    for number in range(1, 30):
        files.ahead(EpochId(1, number - 2) if number > 2 else None)
        changes.some(6)
        files.begin(patient=False)
        changes.some(3)
        files.take(patient=False)
        files.settle()
        assert told(sealed(files, number)) == walk(root)


def test_a_file_that_cannot_be_opened_fails_the_epoch_and_is_in_the_next_one(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "one").write_bytes(b"x" * 5000)
    os.setxattr(root / "one", "trusted.mark", b"so that it is no ordinary case")
    files = make(watched=True)
    epoch(files, 1)
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "_open", _refuse)
        with pytest.raises(CaptureError):
            epoch(files, 2, lambda: (root / "one").write_bytes(b"new" * 2000) and None)
    files.settle()
    assert told(epoch(files, 3)) == walk(root)


def _refuse(reader: FileReader, node: object) -> int | None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_long_scan_says_how_far_it_has_come(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("primary.file_capture._SAY_EVERY_S", 0.0)
    for number in range(20):
        (root / str(number)).write_bytes(b"x")
    said: list[int] = []
    monkeypatch.setattr(
        "primary.file_capture.log", SimpleNamespace(info=lambda event, **fields: said.append(fields["files"]))
    )
    epoch(make(watched=True), 1)
    assert said == sorted(said)
    assert max(said) == 21


def test_a_full_image_directory_costs_epochs_and_no_more(root: Path, tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    layers.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"test", os.fsencode(layers), b"tmpfs", 0, b"size=1m"):
        pytest.skip("no tmpfs can be mounted here")
    files = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=layers,
        pids=lambda: [os.getpid()],
        watch=FileWatch([root]),
    )
    try:
        (root / "small").write_bytes(b"x" * 5000)
        epoch(files, 1)
        (root / "large").write_bytes(os.urandom(3 << 20))
        with pytest.raises(NoSpaceError, match="No space left"):
            epoch(files, 2)
        files.settle()
        os.truncate(root / "large", 1000)
        (root / "small").write_bytes(b"y" * 6000)
        assert told(epoch(files, 3)) == walk(root)
    finally:
        while _READERS:
            _READERS.pop().release()
        files.close()
        libc.umount2(os.fsencode(layers), 2)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("lost", [b"one", b"two"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_file_that_changes_and_loses_a_name_is_found_by_the_other_one(
    root: Path, make: Make, watched: bool, lost: bytes, frozen: bool
) -> None:
    (root / "one").write_bytes(b"x" * 5000)
    os.setxattr(root / "one", "trusted.mark", b"so that it is no ordinary case")
    os.link(root / "one", root / "two")
    files = make(watched=watched)
    epoch(files, 1)

    def change() -> None:
        with open(root / "one", "r+b") as file:
            file.write(b"new")
        os.unlink(os.fsencode(root) + b"/" + lost)

    if not frozen:
        change()
    assert told(epoch(files, 2, change if frozen else lambda: None)) == walk(root)


@pytest.mark.parametrize("watched", [False, True])
def test_a_freeze_that_came_to_nothing_costs_nothing(root: Path, make: Make, watched: bool) -> None:
    files, changes = make(watched=watched), Changes(root, seed=8)
    for number in range(1, 20):
        files.ahead(None)
        changes.some(6)
        files.take(patient=False)
        files.settle()
        changes.some(3)
        assert told(epoch(files, number)) == walk(root)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("closed", ["kept mapped", "unmapped", "closed"])
def test_stores_through_a_mapping_are_found(root: Path, make: Make, watched: bool, closed: str) -> None:
    path = root / "mapped"
    path.write_bytes(bytes(20_000))
    files = make(watched=watched)
    for number in range(1, 4):
        epoch(files, number)
    descriptor = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(descriptor, 20_000)
    epoch(files, 4)
    mapped[5000] = 1
    for number in (5, 6):  # until its times are old enough to be believed
        assert told(epoch(files, number)) == walk(root)
        time.sleep(0.03)
    epoch(files, 7)
    mapped[5001] = 2  # on a page that is dirty still: on disks, too, no time moves
    if closed != "kept mapped":
        mapped.close()
    if closed == "closed":
        os.close(descriptor)
    try:
        assert told(epoch(files, 8)) == walk(root)
    finally:
        if closed != "closed":
            os.close(descriptor)


@pytest.mark.parametrize("closed", ["unmapped", "closed"])
def test_a_mapping_between_two_epochs_is_found(root: Path, make: Make, closed: str) -> None:
    path = root / "mapped"
    path.write_bytes(bytes(20_000))
    files = make(watched=True)
    for number in range(1, 4):
        epoch(files, number)
    descriptor = os.open(path, os.O_RDWR)
    epoch(files, 4)
    mapped = mmap.mmap(descriptor, 20_000)
    mapped[5000] = 1
    mapped.close()
    if closed == "closed":
        os.close(descriptor)
    try:
        assert told(epoch(files, 5)) == walk(root)
    finally:
        if closed != "closed":
            os.close(descriptor)


def test_what_changed_by_a_name_elsewhere_is_found(root: Path, make: Make) -> None:
    outside, inside = root / "outside", root / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "file").write_bytes(b"before")
    os.link(outside / "file", inside / "link")
    files = FileCapture(
        {b"/data": inside},
        hasher=PageHasher(),
        layers=Path("/dev/shm"),
        pids=lambda: [os.getpid()],
        watch=FileWatch([inside]),
    )
    try:
        epoch(files, 1)
        (outside / "file").write_bytes(b"after")
        reader = epoch(files, 2)
        content = {path: each[5] for path, each in told(reader).items()}
        assert content[b"/data/link"] == b"after"
    finally:
        files.close()


def test_too_much_to_read_while_frozen_is_read_while_running(root: Path, make: Make, monkeypatch) -> None:
    monkeypatch.setattr("primary.file_capture._MOST_FROZEN_BYTES", 100_000)
    files = make(watched=True)
    epoch(files, 1)
    files.ahead(None)
    (root / "large").write_bytes(os.urandom(300_000))
    with pytest.raises(TooMuchWrittenError):
        files.take(patient=False)
    files.settle()
    assert told(epoch(files, 2)) == walk(root)
    files.ahead(None)
    (root / "large").write_bytes(os.urandom(400_000))
    files.take(patient=True)
    files.settle()
    assert told(sealed(files, 3)) == walk(root)


def test_content_that_is_not_there_any_more_is_never_made_up(root: Path, make: Make) -> None:
    """The first epoch's content is read when it is sent: what was overwritten since cannot be."""
    path = root / "file"
    path.write_bytes(b"a" * 9000)
    files = make(watched=True)
    first = epoch(files, 1)
    (space,) = (each for each in first.spaces if each.key == CONTENTS)
    content = bytearray(3 * 4096)
    first.read(CONTENTS, np.arange(3), memoryview(content))
    assert bytes(content[:9000]) == b"a" * 9000
    assert not any(content[9000:])
    path.write_bytes(b"b" * 9000)
    with pytest.raises(CaptureError, match="changed before"):
        first.read(CONTENTS, np.arange(len(space.pages)), memoryview(content))
    second = epoch(files, 2)
    path.write_bytes(b"c" * 9000)
    second.read(CONTENTS, np.arange(3), memoryview(content))  # it changed since the first: it is kept
    assert bytes(content[:9000]) == b"b" * 9000


def test_only_what_changed_is_new(root: Path, make: Make) -> None:
    for number in range(50):
        (root / f"f{number}").write_bytes(os.urandom(20_000))
    files = make(watched=True)
    first = epoch(files, 1)
    with open(root / "f7", "r+b") as file:
        file.seek(8192)
        file.write(b"x")
    second = epoch(files, 2)
    before, after = ({each.key: each for each in reader.spaces} for reader in (first, second))
    changed = {key: len(after[key].identities.differing(before[key].identities)) for key in after}
    assert changed[CONTENTS] == 1
    assert sum(changed.values()) == 2


def test_another_process_goes_on_with_the_places_of_an_epoch(root: Path, make: Make, tmp_path: Path) -> None:
    changes = Changes(root, seed=9)
    hasher = PageHasher()

    def capture(records: list[Record]) -> FileCapture:
        return FileCapture(
            {b"/data": root},
            hasher=hasher,
            layers=tmp_path,
            pids=lambda: [os.getpid()],
            watch=None,
            adopt=lambda: records,
        )

    for _ in range(30):
        changes.some(8)
    first = capture([])
    before = epoch(first, 1)
    count = len(before.spaces[0].pages)
    content = bytearray(count * PAGE_BYTES)
    before.read(RECORDS, np.arange(count), memoryview(content))
    records = [
        each for at in range(0, len(content), PAGE_BYTES) for each in unpack_page(content[at:][:PAGE_BYTES])
    ]
    changes.some(6)
    second = capture(records)
    try:
        after = epoch(second, 2)
        assert told(after) == walk(root)
        total = len(after.spaces[1].pages)
        new = len(after.spaces[1].identities.differing(before.spaces[1].identities))
        assert new < total // 3
        for number in range(3, 12):
            changes.some(6)
            assert told(epoch(second, number)) == walk(root)
    finally:
        first.close()
        second.close()


def test_places_are_dense_and_have_room() -> None:
    places = Places()
    for pages in (1, 2, 16, 17, 256, 5000, MOST_PAGES):
        place = places.take(pages)
        assert Places.fits(place, pages)
        assert Places.start_of(place + pages - 1) == place
    small = [places.take(1) for _ in range(100)]
    assert small == list(range(small[0], small[0] + 100))
    places.give_back(small[50])
    assert places.take(1) == small[50]
    with pytest.raises(CaptureError, match="1 TiB"):
        places.take(MOST_PAGES + 1)


def test_a_record_that_changes_changes_one_page() -> None:
    records = RecordPages()
    for number in range(1000):
        records.put(number, b"x" * 30)
    assert len(records.changes()) <= 1000 * 30 * 4 // (3 * MOST_LIST_BYTES) + 1
    records.put(5, b"y" * 31)
    assert len(records.changes()) in (1, 2)
    records.put(5, b"y" * 31)
    assert records.changes() == {}
    records.remove(7)
    records.put(5000, b"z")
    assert len(records.changes()) == 1


def test_a_place_that_another_file_had_lends_nothing_of_that(root: Path, make: Make) -> None:
    """What is too large for a record is in memory; what stood in its place before is in a layer."""
    files = make(watched=True)
    place = 0
    for number, change in enumerate(
        (
            lambda: (root / "old").write_bytes(b"o" * 4096),
            lambda: (root / "old").write_bytes(b"p" * 4096),
            lambda: (root / "old").unlink(),
            lambda: (root / "new").touch(),
            lambda: os.setxattr(root / "new", b"user.large", bytes(range(256)) * 8),
        ),
        start=1,
    ):
        change()
        files.ahead(None)  # no replica has anything: all layers are kept
        files.take(patient=False)
        files.settle()
        reader = sealed(files, number)
        numbers = next(each for each in reader.spaces if each.key == CONTENTS).numbers
        place = int(numbers[0]) if number == 1 else place
    assert numbers.tolist() == [place]
    assert told(reader) == walk(root)


def test_a_directory_that_could_not_be_looked_through_is_looked_through_again(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(watched=True)
    epoch(files, 1)
    (root / "new").mkdir()
    for number in range(20):
        (root / "new" / f"f{number}").write_bytes(b"%d" % number * 3000)
    look = FileReader.look

    def fails(self: FileReader, parent, directory, name, how):
        if name == b"f7":
            raise UnreadableError("f7: Input/output error")
        yield from look(self, parent, directory, name, how)

    with monkeypatch.context() as patched:
        patched.setattr(FileReader, "look", fails)
        files.ahead(None)
    files.take(patient=False)
    files.settle()
    assert told(sealed(files, 2)) == walk(root)


def test_what_cannot_be_read_while_frozen_is_no_epoch(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(watched=True)
    epoch(files, 1)
    files.ahead(None)
    (root / "new").mkdir()
    (root / "new" / "f").write_bytes(b"x" * 5000)
    with monkeypatch.context() as patched:
        patched.setattr("primary.file_reader.FileReader._regular", _cannot)
        with pytest.raises(UnreadableError):
            files.take(patient=False)
    files.settle()
    with pytest.raises(CaptureError):
        files.seal(EpochId(1, 2))
    assert told(epoch(files, 2)) == walk(root)


def _cannot(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_what_changes_before_it_is_sent_is_kept_for_the_next_epoch(root: Path, make: Make) -> None:
    path = root / "hot"
    path.write_bytes(os.urandom(40 * PAGE_BYTES))
    files = make(watched=True)
    reader = epoch(files, 1)
    for number in range(2, 4):
        with path.open("r+b") as file:  # always the same pages: all others are in the file alone
            file.write(os.urandom(PAGE_BYTES))
        before = path.read_bytes()
        if number == 2:
            content = bytearray(40 * PAGE_BYTES)
            with pytest.raises(CaptureError, match="changed before"):
                reader.read(CONTENTS, np.arange(40), memoryview(content))
        reader = epoch(files, number)
    path.write_bytes(os.urandom(40 * PAGE_BYTES))  # nothing of it is in the file any more
    content = bytearray(40 * PAGE_BYTES)
    reader.read(CONTENTS, np.arange(40), memoryview(content))
    assert bytes(content) == before


def test_what_is_written_by_a_name_that_is_gone_is_found(root: Path, make: Make) -> None:
    kept, other = root / "kept", root / "other"
    kept.write_bytes(b"before")
    files = make(watched=True)
    epoch(files, 1)
    epoch(files, 2)

    def changes() -> None:
        os.link(kept, other)
        descriptor = os.open(other, os.O_WRONLY)
        other.unlink()
        os.write(descriptor, b"after!")
        os.close(descriptor)

    assert told(epoch(files, 3, changes)) == walk(root)


def test_what_is_overwritten_with_zeros_holds_nothing_any_more(root: Path, make: Make) -> None:
    path = root / "file"
    path.write_bytes(os.urandom(4 * PAGE_BYTES))
    files = make(watched=True)
    assert len(epoch(files, 1).spaces[1].pages) == 4
    with path.open("r+b") as file:
        file.write(bytes(3 * PAGE_BYTES))
    reader = epoch(files, 2)
    assert len(reader.spaces[1].pages) == 1
    assert told(reader) == walk(root)


def test_places_are_used_again(root: Path, make: Make) -> None:
    files = make(watched=True)
    for number in range(1, 30):
        for path in root.iterdir():
            path.unlink()
        (root / f"f{number}").write_bytes(b"%d" % number * 100)
        reader = epoch(files, number)
        assert reader.spaces[1].numbers.max() < 4
    assert told(reader) == walk(root)


def test_a_file_whose_content_was_not_read_is_in_no_epoch(tmp_path: Path) -> None:
    book = FileBook(PageHasher())
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    directory = book.see(Seen(tmp_path.stat()), b"", (ROOTS, b"/data"))
    book.link(ROOTS, b"/data", directory)
    node = book.see(Seen(path.stat()), b"", (directory.number, b"file"))
    book.link(directory.number, b"file", node)
    with pytest.raises(CaptureError, match="file could not be read"):
        book.seal()
    book.put_content([(node, np.arange(2, dtype=np.uint64), np.ones((2, 2), dtype=np.uint64), None)])
    book.read(node, path.stat(), 0)
    assert len(book.seal()[0][1].pages) == 2


def test_who_had_a_file_mapped_in_a_freeze_that_failed_is_not_forgotten(root: Path, make: Make) -> None:
    files = make(watched=True)
    path = root / "mapped"
    path.write_bytes(b"x" * 8192)
    time.sleep(0.05)
    epoch(files, 1)
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 8192)
        mapping[0:3] = b"one"
        time.sleep(0.05)
        files.ahead(None)
        files.take(patient=False)
        files.settle()  # and something else kept it from being an epoch
        mapping[0:3] = b"two"  # the page is dirty already: no time moves
        mapping.close()
    time.sleep(0.05)
    assert told(epoch(files, 2)) == walk(root)


def test_a_file_that_is_too_large_ends_no_later_epoch(root: Path, make: Make) -> None:
    files = make(watched=True)
    (root / "kept").write_bytes(b"y" * 9000)
    path = root / "large"
    path.write_bytes(b"x" * 9000)
    epoch(files, 1)
    with contextlib.suppress(OSError):  # tmpfs of 64 MiB has such files, ext4 up to 16 TiB
        os.truncate(path, PAGE_BYTES * (MOST_PAGES + 1))
    for number in (2, 3):
        with pytest.raises(CaptureError, match="larger than 1 TiB"):
            epoch(files, number)
    os.truncate(path, 5000)
    (root / "another").write_bytes(b"z" * 5000)
    assert told(epoch(files, 4)) == walk(root)
    assert told(epoch(files, 5)) == walk(root)


def test_not_all_of_a_large_new_file_is_kept_in_memory(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("primary.file_reader._MOST_KEPT_BYTES", 2 << 20)
    kept: list[int] = []
    real = FileReader._opened

    def opened(self: FileReader, *arguments: Any, **options: Any) -> Found:
        found = real(self, *arguments, **options)
        if found.content is not None:
            kept.append(sum(len(data) for _, data in found.content.kept or ()))
        return found

    monkeypatch.setattr(FileReader, "_opened", opened)
    files = make(watched=True)
    epoch(files, 1)
    (root / "large").write_bytes(os.urandom(6 << 20))
    assert told(epoch(files, 2)) == walk(root)
    assert 2 << 20 <= max(kept) <= 3 << 20


def test_when_reports_were_lost_nothing_is_looked_through_in_a_freeze(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(watched=True)
    changes = Changes(root, seed=4)
    changes.some(20)
    epoch(files, 1)
    files._scan_due = True
    for patient in (False, True):
        with pytest.raises(TooMuchWrittenError, match="while it runs"):
            files.take(patient=patient)
        files.settle()
    assert told(epoch(files, 2)) == walk(root)


def test_what_is_reported_while_all_is_looked_through_is_looked_at(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("primary.file_capture._HEARD_EACH", 1)
    files = make(watched=True)
    for number in range(30):
        (root / f"f{number:02}").write_bytes(b"%d" % number * 100)
    changed: list[bytes] = []
    real = files._reader.look

    def look(*arguments: Any) -> Iterator[Found]:
        for found in real(*arguments):
            yield found
            if found.seen is not None and found.seen.is_regular and len(changed) < 5:
                changed.append(found.name)
                (root / os.fsdecode(found.name)).write_bytes(b"changed since")

    monkeypatch.setattr(files._reader, "look", look)
    reader = epoch(files, 1)
    assert len(changed) == 5
    assert told(reader) == walk(root)


def test_directories_that_are_known_to_be_in_each_other_lead_nowhere(tmp_path: Path) -> None:
    book = FileBook(PageHasher())
    top = book.see(Seen(tmp_path.stat()), b"", (ROOTS, b"/data"))
    book.link(ROOTS, b"/data", top)
    nodes = []
    for name in (b"a", b"b"):
        path = tmp_path / name.decode()
        path.mkdir()
        nodes.append(book.see(Seen(path.stat()), b"", (top.number, name)))
    a, b = nodes
    book.link(top.number, b"a", a)
    book.link(a.number, b"b", b)
    assert book.path_of(b.number) == [b"/data", b"a", b"b"]
    book.link(b.number, b"a", a)  # b was moved out of a, which is seen later, and a into it
    book.unlink(top.number, b"a")
    assert book.path_of(a.number) is book.path_of(b.number) is None
    book.sweep()
    assert list(book.nodes) == [top]
    assert book.seal()[0][1].pages == NO_PAGES


def test_directories_that_went_while_they_were_looked_at_are_in_no_epoch(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(watched=True)
    (root / "b" / "a").mkdir(parents=True)
    epoch(files, 1)
    real, moved = files._entries, (root / "b" / "a").stat().st_ino

    def gone_then(directory: Node, *rest: Any) -> Iterator[Found]:
        yield from real(directory, *rest)
        if directory.id[1] == moved and (root / "a").exists():
            (root / "a" / "b").rmdir()
            (root / "a").rmdir()

    monkeypatch.setattr(files, "_entries", gone_then)
    (root / "b" / "a").rename(root / "a")
    (root / "b").rename(root / "a" / "b")
    files._hear()
    found = sorted(files._left.items(), key=lambda hint: files._book.by_key(hint[0]).id[1] != moved)  # type: ignore[union-attr]
    files._left.clear()
    files._left.update(found)
    reader = epoch(files, 2)
    assert told(reader) == walk(root) == {b"/data": walk(root)[b"/data"]}


LEFT_OUT = Excludes(["n*1\udcff\n", "/data/n2\udcff\n"])


def kept(tree: Tree) -> Tree:
    """Leave out what is excluded."""
    here = {
        path: what
        for path, what in tree.items()
        if not LEFT_OUT.has_path("/data", os.fsdecode(path)) or path == b"/data"
    }
    return {
        path: (
            *what[:6],
            *(tuple(name for name in names if name in here) for names in what[6:]),
        )
        for path, what in here.items()
    }


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_excluded_is_in_no_epoch_wherever_it_is_moved(
    root: Path, tmp_path: Path, watched: bool
) -> None:
    watch = FileWatch([root]) if watched else None
    files = FileCapture(
        {b"/data": root},
        hasher=PageHasher(),
        layers=tmp_path,
        pids=lambda: [],
        watch=watch,
        excludes=LEFT_OUT,
    )
    changes, left_out = Changes(root, seed=3), 0
    try:
        for number in range(1, 60):
            changes.some(6)
            reader = epoch(files, number, lambda: changes.some(6))
            there = walk(root)
            assert told(reader) == kept(there)
            left_out += len(there) - len(kept(there))
            reader.release()
    finally:
        files.close()
    assert left_out > 50


def test_a_store_after_a_look_is_seen_though_it_moved_no_time_and_the_mapping_is_gone(
    root: Path, make: Make
) -> None:
    path = root / "mapped"
    path.write_bytes(b"x" * PAGE_BYTES)
    files = make(watched=True)
    assert told(epoch(files, 1)) == walk(root)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), PAGE_BYTES) as mapping:
            mapping[0] = 1  # this moves the file's times
            os.pwrite(file.fileno(), b"y", 100)  # and this is reported
            time.sleep(0.05)
            files.ahead(None)
            before = os.fstat(file.fileno())
            mapping[0] = 2
            after = os.fstat(file.fileno())
        files.take(patient=False)
        files.settle()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    assert told(sealed(files, 2)) == walk(root)
