"""A tree becomes exactly the epoch that is applied: whatever it was before, and whatever came in between."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_worlds import (
    BLK,
    CHR,
    DIR,
    FIFO,
    LNK,
    REG,
    SOCK,
    Chance,
    Epochs,
    World,
    acl,
    walk,
    without_holes,
)

from common.errors import ConfigError, NoSpaceError, StoreError
from common.excludes import Excludes
from common.file_records import CONTENTS, RECORDS, Entry, Inode, pack_page, pack_record
from common.model import PAGE_BYTES, EpochId
from replica.file_site import limbo_name
from replica.file_tree import Applied, FileTree
from replica.file_tree import _sync_file_system as sync_file_system

ROOT = 1
"""Number of the declared directory."""
SAMPLE = {
    b"user.a": b"1",
    b"trusted.b": b"2",
    b"security.capability": bytes.fromhex("0100000200040000000000000000000000000000"),
    b"system.posix_acl_access": acl(0),
    b"system.posix_acl_default": acl(0),
}


class KilledError(BaseException):
    """The process ends here."""


class Steps:
    """Counts operations, and fails them from the `at`-th on; `once`: only that one."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.at = -1
        self.once = False
        self.error: BaseException = KilledError()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        count = len(self.names) - 1
        if 0 <= self.at <= count and (count == self.at or not self.once):
            raise self.error

    def fail(self, at: int, error: BaseException, *, once: bool = False) -> None:
        """Fail the operation that comes after `at` more."""
        self.names.clear()
        self.at, self.error, self.once = at, error, once


class Place:
    """A declared directory on disk, and what keeps it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "data"
        self.state = directory / "tree.json"
        self.boot = "boot one"
        self.steps = Steps()
        directory.mkdir(exist_ok=True)

    def open(self, *excluded: str) -> FileTree:
        return FileTree(
            {b"/data": self.root},
            self.state,
            excludes=Excludes(excluded),
            boot_id=lambda: self.boot,
            step=self.steps,
        )

    def walk(self, *, holes: bool = True) -> object:
        return walk({b"/data": self.root}, holes=holes)


@pytest.fixture(autouse=True)
def quick_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let syncs take no time: a real one waits for what other programs write."""
    monkeypatch.setattr("replica.file_tree._sync_file_system", lambda descriptor: None)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "one")


@pytest.fixture(scope="session")
def storable(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    """Which attributes the file system of the tests can store; others are left out of trees."""
    directory = tmp_path_factory.mktemp("attributes")
    found = []
    for name, value in SAMPLE.items():
        try:
            os.setxattr(directory if b"default" in name else _file_in(directory), name, value)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


def _file_in(directory: Path) -> Path:
    path = directory / "file"
    path.touch()
    return path


def small_world() -> World:
    """Return /data/a/{f,g}, /data/b/h, and a hard link to h in a."""
    world = World()
    a, b = world.make(ROOT, b"a", DIR | 0o755), world.make(ROOT, b"b", DIR | 0o700)
    world.make(a, b"f", REG | 0o644, b"f" * 10_000)
    world.make(a, b"g", REG | 0o600, b"g" * 5)
    world.entries[a, b"h2"] = world.make(b, b"h", REG | 0o640, b"h" * PAGE_BYTES)
    return world


def number_of(world: World, *names: bytes) -> int:
    number = ROOT
    for name in names:
        number = world.entries[number, name]
    return number


def rename(world: World, old: tuple[bytes, ...], new: tuple[bytes, ...]) -> None:
    number = world.entries.pop((number_of(world, *old[:-1]), old[-1]))
    world.entries[number_of(world, *new[:-1]), new[-1]] = number


# Any epoch after any other


@pytest.mark.parametrize("seed", range(12))
def test_what_changed_and_the_whole_make_the_same_tree(
    tmp_path: Path, storable: tuple[bytes, ...], seed: int
) -> None:
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    step_by_step, at_once = one.open(), two.open()
    world, epochs = World(), Epochs()
    chance = Chance(world, seed, storable)
    for step in range(12):
        chance.some(30 if step == 0 else 12)
        files = epochs.tell(world)
        applied = step_by_step.apply(files)
        assert applied.full == (step == 0)
        assert one.walk() == world.found()
        if step % 4 == 3:
            assert at_once.apply(files, full=True).full
            assert two.walk() == world.found()
            assert step_by_step.check(files, quick=False) == at_once.check(files, quick=False) == []
        assert sorted(path.name for path in one.root.parent.iterdir()) == ["data", "tree.json"]


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_is_made_of_a_tree_that_somebody_else_altered(
    tmp_path: Path, place: Place, storable: tuple[bytes, ...], seed: int
) -> None:
    world, other = World(), World()
    Chance(world, seed, storable).some(60)
    Chance(other, seed + 100, storable).some(60)
    files = Epochs().tell(world)
    Place(place.root.parent).open().apply(Epochs().tell(other))
    tree = place.open()
    tree.apply(files, full=True)
    assert place.walk() == world.found()
    place.steps.names.clear()
    again = tree.apply(files, full=True)
    assert (again.made, again.removed, again.written_bytes) == (0, 0, 0)
    assert place.steps.names == ["state", "state"]


def test_what_is_excluded_stays_as_long_as_its_directory_does(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open("*.tmp", "/data/cache")
    tree.apply(epochs.tell(world))
    (place.root / "cache").mkdir()
    left_out = [place.root / "cache" / "x", place.root / "a" / "y.tmp", place.root / "b" / "z.tmp"]
    for path in left_out:
        path.write_bytes(b"of this node")
    (place.root / "a" / "cache").write_bytes(b"excluded in /data alone")
    files = epochs.tell(world)
    assert tree.apply(files, full=True).removed == 1
    assert [path.read_bytes() for path in left_out] == [b"of this node"] * 3
    assert tree.check(files, quick=False) == []
    rename(world, (b"a",), (b"b", b"moved"))
    assert not tree.apply(epochs.tell(world)).full
    assert (place.root / "b" / "moved" / "y.tmp").read_bytes() == b"of this node"
    world.remove(number_of(world, b"b"), b"moved")
    applied = tree.apply(epochs.tell(world))
    assert "has something that is in no epoch" in applied.full_because
    assert not (place.root / "b" / "moved").exists()
    assert (place.root / "b" / "z.tmp").exists()
    assert tree.check() == []


def test_a_file_that_has_an_excluded_name_as_well_is_not_altered(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open("*.tmp")
    tree.apply(epochs.tell(world))
    times = (place.root / "a").stat()
    os.link(place.root / "a" / "f", place.root / "a" / "f.tmp")
    os.utime(place.root / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert tree.check() == []
    (place.root / "b" / "h").unlink()
    os.link(place.root / "a" / "f", place.root / "b" / "h")
    assert tree.check() != []


def test_what_is_excluded_no_more_is_made_what_the_epoch_says(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    files = epochs.tell(world)
    place.open("x").apply(files)
    (place.root / "a" / "x").mkdir()
    (place.root / "a" / "x" / "file").write_bytes(b"of this node")
    tree = place.open()
    tree.apply(files)
    world.make(number_of(world, b"a"), b"x", REG | 0o600, b"of the epoch")
    applied = tree.apply(epochs.tell(world))
    assert "has the name of what comes" in applied.full_because
    assert place.walk() == world.found()


def test_what_the_epoch_has_is_not_left_out_whatever_is_excluded_here(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open("f", "h*")
    tree.apply(epochs.tell(world))
    (place.root / "a" / "f").write_bytes(b"altered")
    tree.apply(epochs.tell(world), full=True)
    assert place.walk() == world.found()


def test_an_epoch_in_which_nothing_changed_costs_nothing(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    tree.sync()
    place.steps.names.clear()
    second = epochs.tell(world)
    assert tree.apply(second) == Applied(second.epoch)
    assert place.steps.names == ["state"]
    assert tree.epoch == tree.synced == second.epoch
    assert second.read_pages == []


def test_only_changed_pages_are_read_and_written(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    for each in range(300):
        world.make(ROOT, b"%d" % each, REG | 0o600, b"x" * 100)
    tree = place.open()
    first = tree.apply(epochs.tell(world))
    assert first.written_bytes == sum(thing.size for thing in world.things.values())
    thing = world.things[number_of(world, b"a", b"f")]
    thing.pages[1] = b"F" * PAGE_BYTES
    files = epochs.tell(world)
    assert tree.apply(files) == Applied(files.epoch, written_bytes=PAGE_BYTES)
    assert files.read_pages == [(CONTENTS, thing.place + 1)]
    thing.mtime_ns += 1
    files = epochs.tell(world)
    assert tree.apply(files) == Applied(files.epoch)
    assert [key for key, _ in files.read_pages] == [RECORDS]
    assert place.walk() == world.found()


# Names that move


MOVES: dict[str, Callable[[World], None]] = {
    "rename": lambda world: rename(world, (b"a", b"f"), (b"a", b"new")),
    "into another directory": lambda world: rename(world, (b"a", b"f"), (b"b", b"f")),
    "a directory": lambda world: rename(world, (b"a",), (b"b", b"a")),
    "one of two links": lambda world: rename(world, (b"a", b"h2"), (b"h3",)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_what_moves_is_not_copied(place: Place, move: Callable[[World], None]) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    before = inodes_below(place.root)
    move(world)
    applied = tree.apply(epochs.tell(world))
    assert (applied.written_bytes, applied.made, applied.removed, applied.full) == (0, 1, 1, False)
    assert inodes_below(place.root) == before
    assert place.walk() == world.found()


def inodes_below(root: Path) -> set[int]:
    return {path.lstat().st_ino for path in root.rglob("*")}


def test_moves_do_not_stand_in_each_others_way(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    c = world.make(number_of(world, b"a"), b"c", DIR | 0o711)
    world.make(c, b"deep", REG | 0o600, b"deep")
    tree = place.open()
    tree.apply(epochs.tell(world))
    before = inodes_below(place.root)
    a, b = number_of(world, b"a"), number_of(world, b"b")
    # a and c change places, though c was in a; b becomes a's name; f and g change names.
    del world.entries[ROOT, b"a"], world.entries[a, b"c"], world.entries[ROOT, b"b"]
    world.entries |= {(ROOT, b"c"): c, (c, b"a"): a, (ROOT, b"a"): b}
    f, g = world.entries[a, b"f"], world.entries[a, b"g"]
    world.entries |= {(a, b"f"): g, (a, b"g"): f}
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert inodes_below(place.root) == before
    assert place.walk() == world.found()


def test_what_goes_on_moves_out_of_what_is_removed_and_into_what_is_new(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    new = world.make(world.make(ROOT, b"new", DIR | 0o755), b"newer", DIR | 0o755)
    world.entries[new, b"f"] = world.entries.pop((number_of(world, b"a"), b"f"))
    world.remove(ROOT, b"a")
    rename(world, (b"b",), (b"new", b"newer", b"b"))
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert place.walk() == world.found()


def test_a_file_that_takes_the_place_of_another_one_is_a_new_file(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    a = number_of(world, b"a")
    with (place.root / "a/f").open("rb") as open_file:
        world.remove(a, b"f")
        world.make(a, b"f", REG | 0o644, b"new")
        tree.apply(epochs.tell(world))
        assert open_file.read() == b"f" * 10_000
    assert place.walk() == world.found()


# Contents


def test_holes_are_holes(place: Place) -> None:
    world, epochs = World(), Epochs()
    number = world.make(ROOT, b"f", REG | 0o600, b"1" * PAGE_BYTES * 4)
    tree = place.open()
    tree.apply(epochs.tell(world))
    thing = world.things[number]

    thing.pages[1] = bytes(PAGE_BYTES)
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert place.walk() == world.found()

    del thing.pages[2]
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert place.walk() == world.found()

    thing.size = 1 << 40
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert (place.root / "f").stat().st_size == 1 << 40
    assert (place.root / "f").stat().st_blocks * 512 == 2 * PAGE_BYTES
    assert tree.apply(epochs.tell(world), full=True).written_bytes == 0

    thing.size = PAGE_BYTES + 1
    thing.pages = {0: thing.pages[0], 1: b"x".ljust(PAGE_BYTES, b"\0")}
    assert tree.apply(epochs.tell(world)).written_bytes == 1
    assert place.walk() == world.found()


def test_without_holes_zeros_are_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.file_ops._punch", lambda *_: False)
    world, epochs = World(), Epochs()
    thing = world.things[world.make(ROOT, b"f", REG | 0o600, b"1" * PAGE_BYTES * 2)]
    tree = place.open()
    tree.apply(epochs.tell(world))
    thing.pages[1] = bytes(PAGE_BYTES)
    assert tree.apply(epochs.tell(world)).written_bytes == PAGE_BYTES
    assert place.walk(holes=False) == without_holes(world.found())


def test_a_content_that_only_stands_elsewhere_is_not_written(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    world.things[number_of(world, b"a", b"f")].place = -1
    assert tree.apply(epochs.tell(world)).written_bytes == 0
    assert place.walk() == world.found()


def test_a_content_within_which_a_block_ends_is_whole(place: Place) -> None:
    world = World()
    for each in range(1, 8):
        world.make(ROOT, b"%d" % each, REG | 0o600, bytes([each]) * (each * PAGE_BYTES - each))
    files = Epochs().tell(world)
    files.block_pages = 5
    place.open().apply(files)
    assert place.walk() == world.found()


# Attributes, kinds, names


@pytest.mark.parametrize("name", SAMPLE, ids=bytes.decode)
def test_an_attribute_is_set_changed_and_removed(
    place: Place, storable: tuple[bytes, ...], name: bytes
) -> None:
    if name not in storable:
        pytest.skip(f"the file system of {place.root} cannot store {name.decode()}")
    world, epochs = World(), Epochs()
    kind = DIR if name.endswith(b"default") else REG
    number = world.make(ROOT, b"f", kind | 0o4664, b"x" if kind == REG else b"", uid=5)
    thing = world.things[number]
    tree = place.open()
    tree.apply(epochs.tell(world))
    thing.attributes[name] = SAMPLE[name]
    tree.apply(epochs.tell(world))
    assert place.walk() == world.found()
    # A new owner and a write take capabilities and set-user-ID away: they have to come back.
    thing.uid, thing.gid = 7, 8
    if kind == REG:
        thing.hold(b"y")
    if not name.startswith(b"security."):
        thing.attributes[name] = acl(1) if name.startswith(b"system.") else b"x" * 2000
    tree.apply(epochs.tell(world))
    assert place.walk() == world.found()
    thing.attributes = {}
    tree.apply(epochs.tell(world))
    assert place.walk() == world.found()


def test_what_directories_pass_on_to_new_files_is_not_kept(place: Place, storable: tuple[bytes, ...]) -> None:
    world = World()
    directory = world.make(ROOT, b"d", DIR | 0o2775, gid=5)
    if b"system.posix_acl_default" in storable:
        world.things[directory].attributes[b"system.posix_acl_default"] = acl(0)
    epochs, tree = Epochs(), place.open()
    tree.apply(epochs.tell(world))
    world.make(directory, b"f", REG | 0o600, b"x")
    world.make(directory, b"d", DIR | 0o700)
    tree.apply(epochs.tell(world))
    assert place.walk() == world.found()


def test_attributes_too_large_for_a_record_are_followed(place: Place, storable: tuple[bytes, ...]) -> None:
    if b"user.a" not in storable:
        pytest.skip(f"the file system of {place.root} cannot store user attributes")
    world, epochs = World(), Epochs()
    file = world.things[world.make(ROOT, b"f", REG | 0o600, b"x", attributes={b"user.a": b"1" * 3000})]
    link = world.things[world.make(ROOT, b"l", LNK | 0o777, target=b"x" * 2000)]
    tree = place.open()
    tree.apply(epochs.tell(world))
    # Neither record changes: only the page where the rest of it stands.
    file.attributes[b"user.a"], link.target = b"2" * 3000, b"y" * 2000
    files = epochs.tell(world)
    tree.apply(files)
    assert not [number for key, number in files.read_pages if key == RECORDS]
    assert place.walk() == world.found()


def test_an_attribute_that_cannot_be_stored_is_named(place: Place) -> None:
    world = World()
    world.make(ROOT, b"f", REG | 0o600, attributes={b"strange.name": b"1"})
    tree = place.open()
    with pytest.raises(StoreError, match=r"data/f: its attribute strange\.name of 1 bytes"):
        tree.apply(Epochs().tell(world))
    assert tree.epoch is None


def test_files_of_all_kinds_with_any_name(place: Place) -> None:
    world = World()
    world.make(ROOT, b"\xff\xfe\n", REG | 0o4755, b"\0x", uid=3)
    world.make(ROOT, b"n" * 255, DIR | 0o1777)
    world.make(ROOT, "ä".encode(), FIFO | 0o622)
    world.make(ROOT, b"s", SOCK | 0o777, gid=9)
    world.make(ROOT, b"c", CHR | 0o660, device=os.makedev(1, 3))
    world.make(ROOT, b"-b", BLK | 0o660, device=os.makedev(259, 70_000))
    world.make(ROOT, b"l", LNK | 0o777, target=b"/etc/passwd", uid=1, gid=2)
    files = Epochs().tell(world)
    place.open().apply(files)
    assert place.walk() == world.found()
    world.things[number_of(world, b"c")].device = os.makedev(1, 5)


def test_paths_may_be_longer_than_the_kernel_takes_at_once(place: Place) -> None:
    world, epochs = World(), Epochs()
    number = ROOT
    for _ in range(30):
        number = world.make(number, b"d" * 200, DIR | 0o755)
    world.make(number, b"f", REG | 0o600, b"deep")
    other = world.make(number, b"sub", DIR | 0o700)
    tree = place.open()
    try:
        tree.apply(epochs.tell(world))
        assert place.walk() == world.found()
        world.things[world.entries[number, b"f"]].hold(b"deeper")
        world.entries[other, b"g"] = world.entries.pop((number, b"f"))
        world.entries[ROOT, b"sub"] = world.entries.pop((number, b"sub"))
        files = epochs.tell(world)
        tree.apply(files)
        assert place.walk() == world.found()
        assert tree.check(files, quick=False) == []
    finally:
        world.remove(ROOT, b"d" * 200)
        tree.apply(epochs.tell(world), full=True)
    assert place.walk() == world.found()


# Crashes and failures


def before_and_after(storable: tuple[bytes, ...]) -> tuple[World, World]:
    """Return two worlds; what makes the second of the first has every kind of operation."""
    before = small_world()
    a, b = number_of(before, b"a"), number_of(before, b"b")
    before.make(b, b"gone", REG | 0o600, b"gone")
    before.make(before.make(ROOT, b"doomed", DIR | 0o755), b"x", FIFO | 0o600)
    after = before.copy()
    rename(after, (b"a",), (b"b", b"a"))
    rename(after, (b"b", b"h"), (b"h",))
    after.entries[b, b"link"] = number_of(after, b"h")
    after.remove(b, b"gone")
    after.remove(ROOT, b"doomed")
    after.make(after.make(ROOT, b"d", DIR | 0o755), b"l", LNK | 0o777, target=b"x")
    f = after.things[after.entries[a, b"f"]]
    f.hold(bytes(PAGE_BYTES) + b"F" * 10_000)
    f.uid, f.mode = 7, REG | 0o4711
    if b"user.a" in storable:
        before.things[after.entries[a, b"g"]].attributes = {b"user.a": b"1"}
        f.attributes = {b"user.a": b"1"}
    return before, after


@pytest.mark.parametrize("full", [False, True])
def test_an_apply_that_is_killed_anywhere_is_made_good(
    tmp_path: Path, storable: tuple[bytes, ...], full: bool
) -> None:
    before, after = before_and_after(storable)
    epochs = Epochs()
    first, second = epochs.tell(before), epochs.tell(after)
    seen: set[str] = set()
    for at in range(1000):
        place = Place(tmp_path / f"{at}")
        tree = place.open()
        tree.apply(first)
        place.steps.fail(at, KilledError())
        try:
            tree.apply(second, full=full)
        except KilledError:
            seen.add(place.steps.names[-1])
        else:
            break
        place.steps.fail(-1, KilledError())
        tree = place.open()
        assert tree.epoch == (first.epoch if at == 0 else None)
        wanted = (second, after) if at % 2 else (first, before)
        assert tree.apply(wanted[0]).full == (at > 0 or wanted[0] is second)
        assert place.walk() == wanted[1].found()
        assert sorted(path.name for path in place.root.parent.iterdir()) == ["data", "tree.json"]
        shutil.rmtree(place.root.parent)
    expected = {"chmod", "chown", "link", "make", "remove", "remove-directory", "resize"}
    expected |= {"state", "utime", "write"} | (set() if full else {"clear", "make-directory", "move"})
    assert seen - {"set-attribute", "remove-attribute"} == expected


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StoreError), (errno.ENOSPC, NoSpaceError)])
def test_an_operation_that_fails_says_so_and_is_made_good(
    place: Place, storable: tuple[bytes, ...], number: int, kind: type[Exception]
) -> None:
    worlds, epochs = before_and_after(storable), Epochs()
    told = [epochs.tell(world) for world in worlds]
    tree = place.open()
    tree.apply(told[0])
    for at in range(1, 30, 3):
        which = at % 2
        place.steps.fail(at, OSError(number, "it fails"), once=True)
        with pytest.raises(kind, match="it fails"):
            tree.apply(told[which], full=True)
        assert tree.epoch is None
        assert tree.check() == ["it is not known which epoch the files are"]
        tree.apply(told[which])
        assert place.walk() == worlds[which].found()


def test_an_epoch_that_cannot_be_read_leaves_no_doubt(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    first = epochs.tell(world)
    tree.apply(first)
    thing = world.things[number_of(world, b"a", b"f")]
    thing.pages[0] = b"F" * PAGE_BYTES
    thing.mtime_ns += 1
    second = epochs.tell(world)
    second.unreadable = {(RECORDS, number) for number in second.pages(RECORDS).tolist()}
    before = place.walk()
    with pytest.raises(StoreError):
        tree.apply(second)
    assert tree.epoch == first.epoch
    assert place.walk() == before
    second.unreadable = {(CONTENTS, thing.place)}
    for _ in range(2):
        with pytest.raises(StoreError):
            tree.apply(second)
        assert tree.epoch is None
    second.unreadable = set()
    assert tree.apply(second).full_because == "it was not known which epoch the files were"
    assert place.walk() == world.found()


# What is known of a tree


def test_records_are_known_again_once_the_epoch_is_applied_once_more(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    first = epochs.tell(world)
    place.open().apply(first)
    world.things[ROOT].uid = 5
    second = epochs.tell(world)
    assert "not in memory" in place.open().apply(second).full_because
    tree = place.open()
    place.steps.names.clear()
    assert tree.apply(second) == Applied(second.epoch)
    assert place.steps.names == []
    world.things[ROOT].uid = 6
    assert not tree.apply(epochs.tell(world)).full


def test_a_tree_that_was_not_synced_is_unknown_after_a_restart_of_the_machine(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    first = epochs.tell(world)
    tree = place.open()
    tree.apply(first)
    assert tree.epoch == first.epoch
    assert tree.synced is None
    place.boot = "boot two"
    assert place.open().epoch is None
    place.boot = "boot one"
    tree = place.open()
    assert tree.sync() == tree.synced == first.epoch
    place.boot = "boot two"
    tree = place.open()
    assert tree.epoch == tree.synced == first.epoch
    tree.apply(first)
    world.things[ROOT].uid = 5
    second = epochs.tell(world)
    assert not tree.apply(second).full
    assert tree.epoch == second.epoch
    assert tree.synced is None
    place.boot = "boot three"
    assert place.open().sync() is None


def test_a_tree_that_the_workload_changes_is_no_epoch(place: Place) -> None:
    files = Epochs().tell(small_world())
    tree = place.open()
    tree.apply(files)
    tree.sync()
    tree.forget()
    assert tree.epoch is tree.synced is None
    assert place.open().epoch is None
    assert tree.apply(files).full


def test_a_change_is_written_down_durably_if_the_state_before_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: list[bytes] = []
    monkeypatch.setattr("replica.file_state.atomic_write", lambda path, data, **_: durable.append(data))
    world, epochs = small_world(), Epochs()
    tree = place.open()
    for uid in range(3):
        world.things[ROOT].uid = uid
        tree.apply(epochs.tell(world))
    assert durable == []
    tree.sync()
    world.things[ROOT].uid = 9
    tree.apply(epochs.tell(world))
    assert [b'"epoch":null' in each for each in durable] == [False, True]


def test_a_state_that_could_not_be_written_is_not_believed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    place.steps.fail(1, OSError(errno.EIO, "it fails"), once=True)
    with pytest.raises(OSError, match="it fails"):
        tree.sync()
    assert tree.synced is None
    durable: list[bytes] = []
    monkeypatch.setattr("replica.file_state.atomic_write", lambda path, data, **_: durable.append(data))
    world.things[ROOT].uid = 9
    tree.apply(epochs.tell(world))
    assert len(durable) == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"epoch":[1,1],"roots":[]}', b"\xff"])
def test_a_state_that_makes_no_sense_says_nothing(place: Place, content: bytes) -> None:
    files = Epochs().tell(small_world())
    place.open().apply(files)
    place.state.write_bytes(content)
    tree = place.open()
    assert tree.epoch is None
    assert tree.apply(files).full


def test_a_directory_that_was_replaced_is_not_the_epoch(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    files = epochs.tell(world)
    tree.apply(files)
    tree.sync()
    place.root.rename(place.root.with_name("aside"))
    assert place.open().epoch is None
    assert tree.apply(files).full
    assert place.walk() == world.found()


def test_what_changed_is_not_known_of_an_epoch_that_is_not_there(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    first = epochs.tell(world)
    tree.apply(first)
    world.things[ROOT].uid = 5
    second = epochs.tell(world)
    epochs.pages[EpochId(9, 9)] = epochs.pages.pop(first.epoch)
    assert "could not be told" in tree.apply(second).full_because
    assert place.walk() == world.found()


# What is refused


def inode(number: int, mode: int = REG | 0o600, **options: object) -> Inode:
    plain = {"uid": 0, "gid": 0, "mtime_ns": 0, "size": 0}
    return Inode(number=number, mode=mode, **(plain | options))  # type: ignore[arg-type]


GOOD = (
    inode(1, DIR | 0o755),
    Entry(0, b"/data", 1),
    inode(2, DIR | 0o755),
    Entry(1, b"d", 2),
    inode(3, size=5, place=100),
    Entry(2, b"f", 3),
)

HOSTILE: dict[str, list[Inode | Entry]] = {
    "an empty name": [Entry(1, b"", 3)],
    "a name that stays": [Entry(1, b".", 3)],
    "a name that leads up": [Entry(1, b"..", 3)],
    "a name with a slash": [Entry(1, b"a/b", 3)],
    "an absolute name": [Entry(1, b"/etc", 3)],
    "a name with a zero byte": [Entry(1, b"a\0", 3)],
    "a name that is too long": [Entry(1, b"n" * 256, 3)],
    "a name of ours": [Entry(1, limbo_name(Path("/x/data")), 3)],
    "a name twice": [inode(4), Entry(2, b"f", 4)],
    "a record twice": [Entry(2, b"f", 3)],
    "a directory with two names": [Entry(1, b"e", 2)],
    "a directory in itself": [inode(4, DIR | 0o755), Entry(4, b"x", 4)],
    "directories in each other": [
        inode(4, DIR | 0o755), inode(5, DIR | 0o755), Entry(4, b"x", 5), Entry(5, b"x", 4),
    ],
    "a parent that is a file": [inode(4), Entry(3, b"x", 4)],
    "a parent that is not there": [inode(4), Entry(77, b"x", 4)],
    "a parent below zero": [inode(4), Entry(-1, b"x", 4)],
    "an inode that is not there": [Entry(1, b"x", 77)],
    "an inode twice": [inode(3)],
    "an inode without a name": [inode(4)],
    "the number zero": [inode(0), Entry(1, b"x", 0)],
    "a huge number": [inode(1 << 63), Entry(1, b"x", 1 << 63)],
    "no kind": [inode(4, 0o644), Entry(1, b"x", 4)],
    "a huge mode": [inode(4, 1 << 40), Entry(1, b"x", 4)],
    "a negative mode": [inode(4, -1), Entry(1, b"x", 4)],
    "an owner that cannot be": [inode(4, uid=-1), Entry(1, b"x", 4)],
    "a time that cannot be": [inode(4, mtime_ns=1 << 63), Entry(1, b"x", 4)],
    "a negative size": [inode(4, size=-1), Entry(1, b"x", 4)],
    "a huge size": [inode(4, size=1 << 60, place=500), Entry(1, b"x", 4)],
    "a size without a place": [inode(4, size=1), Entry(1, b"x", 4)],
    "a FIFO with a size": [inode(4, FIFO, size=1, place=500), Entry(1, b"x", 4)],
    "a file that is a device": [inode(4, device=5), Entry(1, b"x", 4)],
    "a link to nothing": [inode(4, LNK), Entry(1, b"x", 4)],
    "a link with a zero byte": [inode(4, LNK, target=b"a\0b"), Entry(1, b"x", 4)],
    "a file with a target": [inode(4, target=b"a"), Entry(1, b"x", 4)],
    "contents that overlap": [inode(4, size=5, place=100), Entry(1, b"x", 4)],
    "an attribute twice": [
        inode(4, attributes=((b"user.a", b""), (b"user.a", b""))), Entry(1, b"x", 4),
    ],
    "an attribute without a name": [inode(4, attributes=((b"", b""),)), Entry(1, b"x", 4)],
    "a huge extra": [inode(4, extra=(200, 1 << 40)), Entry(1, b"x", 4)],
    "an extra of zeros": [inode(4, extra=(100, 5)), Entry(1, b"x", 4)],
    "an extra that is not there": [inode(4, extra=(300, 5)), Entry(1, b"x", 4)],
    "a declared file": [inode(4), Entry(0, b"/data2", 4)],
    "a directory that is not declared": [inode(4, DIR), Entry(0, b"/data2", 4)],
}  # fmt: skip


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("records", HOSTILE.values(), ids=HOSTILE.keys())
def test_records_that_make_no_sense_are_refused(
    place: Place, records: list[Inode | Entry], incremental: bool
) -> None:
    epochs, tree = Epochs(), place.open()
    good = {0: pack_page(map(pack_record, GOOD))}
    contents = {100: b"12345".ljust(PAGE_BYTES, b"\0")}
    first = epochs.add(good, contents)
    tree.apply(first)
    before = place.walk()
    hostile = epochs.add(good | {1: pack_page(map(pack_record, records))}, contents)
    if not incremental:
        tree = place.open()
    place.steps.names.clear()
    with pytest.raises(StoreError):
        tree.apply(hostile)
    assert place.steps.names == []
    assert place.walk() == before
    assert tree.epoch == first.epoch
    assert tree.apply(epochs.add(good, contents), full=True).removed == 0


@pytest.mark.parametrize(
    "records",
    [
        [inode(1, DIR | 0o755), Entry(0, b"/data", 1), inode(3), Entry(2, b"f", 3)],
        [
            inode(1, DIR | 0o755),
            Entry(0, b"/data", 1),
            inode(2),
            Entry(1, b"d", 2),
            inode(3),
            Entry(2, b"f", 3),
        ],
        [inode(1, DIR | 0o755), Entry(0, b"/data", 1), Entry(1, b"d", 2)],
        [inode(2, DIR | 0o755), Entry(0, b"/data", 2), inode(1, DIR | 0o755), Entry(1, b"d", 1)],
        [],
    ],
)
def test_an_epoch_in_which_something_is_left_behind_is_refused(
    place: Place, records: list[Inode | Entry]
) -> None:
    epochs, tree = Epochs(), place.open()
    tree.apply(epochs.add({0: pack_page(map(pack_record, GOOD))}, {}))
    before = place.walk()
    with pytest.raises(StoreError):
        tree.apply(epochs.add({0: pack_page(map(pack_record, records))}, {}))
    assert place.walk() == before


def test_a_page_that_is_no_page_of_records_is_refused(place: Place) -> None:
    with pytest.raises(StoreError, match="page 3"):
        place.open().apply(Epochs().add({3: b"\x05\x00hello".ljust(PAGE_BYTES, b"\0")}, {}))


def test_directories_within_each_other_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for roots in ({b"/a": tmp_path / "a", b"/b": tmp_path / "a/b"}, {b"/a": Path("/")}, {b"/a": tmp_path}):
        with pytest.raises(ConfigError):
            FileTree(roots, state)
    assert list(tmp_path.iterdir()) == []


# What somebody else does to a tree


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (lambda root: (root / "a/f").unlink(), "data/a/f is missing"),
    "added": (lambda root: (root / "a/new\n").touch(), r"data/a/new\\n is not in the epoch"),
    "size": (lambda root: os.truncate(root / "a/f", 3), "data/a/f has 3 bytes, not 10000"),
    "mode": (lambda root: (root / "a/f").chmod(0o4755), "data/a/f has the mode 4755, not 0644"),
    "owner": (lambda root: os.chown(root / "b", 4, 5), "data/b belongs to 4:5, not 0:0"),
    "time": (lambda root: os.utime(root / "b/h", ns=(0, 5)), "data/a/h2 was modified at 5 ns"),
    "kind": (lambda root: _replace_by_link(root / "b"), "data/b is a symbolic link, not a directory"),
    "link": (lambda root: os.link(root / "a/f", root / "a/f2"), "data/a/f has 2 names, not 1"),
    "no link": (lambda root: shutil.copy2(_unlinked(root / "a/h2"), root / "a/h2"), "not the same file"),
    "root": (lambda root: root.chmod(0o711), "data has the mode 0711, not 0755"),
}


def _replace_by_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/etc")


def _unlinked(path: Path) -> Path:
    path.unlink()
    return path.parent.parent / "b/h"


@pytest.mark.parametrize(("tamper", "sentence"), TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_a_look_finds_what_was_altered(place: Place, tamper: Callable[[Path], object], sentence: str) -> None:
    world, epochs = small_world(), Epochs()
    files = epochs.tell(world)
    tree = place.open()
    tree.apply(files)
    assert tree.check() == []
    tamper(place.root)
    found = "\n".join(tree.check())
    assert re.search(sentence, found), found
    assert tree.check(files, quick=False)
    tree.apply(files, full=True)
    assert tree.check(files, quick=False) == []
    assert place.walk() == world.found()


def test_a_thorough_look_finds_contents_and_attributes(place: Place, storable: tuple[bytes, ...]) -> None:
    world = small_world()
    world.make(ROOT, b"sparse", REG | 0o600, b"s" * PAGE_BYTES + bytes(PAGE_BYTES * 400) + b"s")
    world.make(ROOT, b"l", LNK | 0o777, target=b"one")
    files = Epochs().tell(world)
    tree = place.open()
    tree.apply(files)
    for name, at in (("a/f", 9_999), ("sparse", PAGE_BYTES * 300)):
        path = place.root / name
        times = path.stat().st_mtime_ns
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"X")
        os.utime(path, ns=(0, times))
    link = place.root / "l"
    times = link.lstat().st_mtime_ns
    link.unlink()
    link.symlink_to("two")
    os.utime(link, ns=(0, times), follow_symlinks=False)
    os.utime(place.root, ns=(0, place_time := world.things[ROOT].mtime_ns))
    assert place_time == place.root.stat().st_mtime_ns
    assert tree.check() == []
    wanted = ["data/l leads to 'two', not 'one'", "data/a/f holds something else"]
    wanted += ["data/sparse holds something else"]
    if b"user.a" in storable:
        os.setxattr(place.root / "a/g", b"user.a", b"1")
        wanted.append("data/a/g has another attribute user.a")
    found = tree.check(files, quick=False)
    assert sorted(found) == sorted(f"{place.root.parent}/{sentence}" for sentence in wanted)


def test_a_look_needs_the_records_and_says_at_most_a_hundred_things(place: Place) -> None:
    world, epochs = World(), Epochs()
    for each in range(300):
        world.make(ROOT, b"%d" % each, FIFO | 0o600)
    files = epochs.tell(world)
    place.open().apply(files)
    tree = place.open()
    with pytest.raises(StoreError, match="not in memory"):
        tree.check()
    for each in range(300):
        (place.root / str(each)).unlink()
    assert len(tree.check(files)) == 100
    assert len(tree.check()) == 100
    with pytest.raises(StoreError, match="cannot be compared"):
        tree.check(epochs.tell(world))


def test_no_link_leads_out_of_the_tree(tmp_path: Path, place: Place) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("f", "g", "h"):
        (outside / name).write_text("untouched")
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    shutil.rmtree(place.root / "a")
    (place.root / "a").symlink_to(outside)
    (place.root / "b/h").unlink()
    (place.root / "b/h").symlink_to(outside / "h")
    for number in (number_of(world, b"a", b"f"), number_of(world, b"b", b"h")):
        world.things[number].hold(b"changed")
    world.remove(number_of(world, b"a"), b"g")
    files = epochs.tell(world)
    with pytest.raises(StoreError):
        tree.apply(files)
    tree.apply(files)
    assert place.walk() == world.found()
    assert [(outside / name).read_text() for name in ("f", "g", "h")] == ["untouched"] * 3


# File systems


@pytest.fixture
def mount() -> Iterator[Callable[[Path], None]]:
    libc = ctypes.CDLL(None, use_errno=True)
    mounted: list[Path] = []

    def tmpfs(path: Path) -> None:
        path.mkdir(exist_ok=True)
        if libc.mount(b"test", os.fsencode(path), b"tmpfs", 0, b"size=8m"):
            pytest.skip("no tmpfs can be mounted here")
        mounted.append(path)

    yield tmpfs
    for path in reversed(mounted):
        libc.umount2(os.fsencode(path), 2)


def test_a_declared_directory_may_be_a_mount_point(place: Place, mount: Callable[[Path], None]) -> None:
    mount(place.root)
    world, epochs = small_world(), Epochs()
    tree = place.open()
    first = epochs.tell(world)
    rename(world, (b"a", b"f"), (b"b", b"f"))
    second = epochs.tell(world)
    left: set[bool] = set()
    for at in range(8):
        tree.apply(first)
        place.steps.fail(at, OSError(errno.EIO, "it fails"))
        with contextlib.suppress(StoreError, OSError):
            tree.apply(second)
        place.steps.fail(-1, KilledError())
        left.add(any("limbo" in path.name for path in place.root.iterdir()))
        tree.apply(second)
        assert place.walk() == world.found()
    assert left == {False, True}
    assert [path.name for path in place.root.parent.iterdir() if "limbo" in path.name] == []


def test_what_is_mounted_in_the_tree_is_left_alone(place: Place, mount: Callable[[Path], None]) -> None:
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    mount(place.root / "a")
    (place.root / "a/kept").touch()
    mount(place.root / "b/unknown")
    place.steps.names.clear()
    with pytest.raises(StoreError, match="mounted"):
        tree.apply(epochs.tell(world), full=True)
    assert place.steps.names == []
    assert (place.root / "a/kept").exists()


def test_files_move_between_declared_directories(tmp_path: Path, mount: Callable[[Path], None]) -> None:
    other = tmp_path / "other"
    mount(other)
    roots = {b"/data": tmp_path / "data", b"/more": tmp_path / "more", b"/other": other / "data"}
    tree = FileTree(roots, tmp_path / "tree.json")
    world, epochs = World((b"/data", b"/more", b"/other")), Epochs()
    number = world.make(1, b"f", REG | 0o600, b"f" * 5000)
    tree.apply(epochs.tell(world))

    world.entries[2, b"f"] = world.entries.pop((1, b"f"))
    applied = tree.apply(epochs.tell(world))
    assert (applied.written_bytes, applied.full) == (0, False)
    assert walk(roots) == world.found()

    world.entries[3, b"f"] = world.entries.pop((2, b"f"))
    applied = tree.apply(epochs.tell(world))
    assert (applied.written_bytes, applied.full_because) == (
        5000,
        "something moved from one file system to another",
    )
    assert walk(roots) == world.found()

    world.entries[1, b"g"] = number
    with pytest.raises(StoreError, match=r"g: .*link"):
        tree.apply(epochs.tell(world))
    assert tree.epoch is None
    del world.entries[1, b"g"]
    tree.apply(epochs.tell(world))
    assert walk(roots) == world.found()
    tree.sync()
    assert tree.synced == tree.epoch


def test_names_are_not_lost_where_limbo_is_taken(place: Place) -> None:
    limbo = place.root.parent / os.fsdecode(limbo_name(place.root))
    world, epochs = small_world(), Epochs()
    tree = place.open()
    tree.apply(epochs.tell(world))
    limbo.mkdir()
    (limbo / "left").mkdir()
    (limbo / "left/over").touch()
    rename(world, (b"a", b"f"), (b"b", b"f"))
    files = epochs.tell(world)
    assert "has the name of what comes" in tree.apply(files).full_because
    assert place.walk() == world.found()
    assert not limbo.exists()


def test_a_sync_is_one_of_the_file_system(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.file_tree._sync_file_system", sync_file_system)
    tree = place.open()
    tree.apply(Epochs().tell(small_world()))
    assert tree.sync() == tree.epoch
    monkeypatch.setattr("replica.file_tree._sync_file_system", lambda descriptor: sync_file_system(-1))
    tree.forget()
    tree.apply(Epochs().tell(small_world()))
    with pytest.raises(StoreError, match=r"sync: .*data: Bad file descriptor"):
        tree.sync()
    assert tree.synced is None


def test_no_descriptor_stays_open(place: Place) -> None:
    world, epochs = small_world(), Epochs()
    for each in range(200):
        world.make(world.make(ROOT, b"%d" % each, DIR | 0o755), b"f", REG | 0o600, b"x")
    tree = place.open()
    before = len(os.listdir("/proc/self/fd"))
    files = epochs.tell(world)
    tree.apply(files)
    tree.check(files, quick=False)
    tree.sync()
    place.steps.fail(5, OSError(errno.EIO, "it fails"))
    with pytest.raises(StoreError):
        tree.apply(epochs.tell(small_world()))
    assert len(os.listdir("/proc/self/fd")) == before
