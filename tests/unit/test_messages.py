"""The bytes on the wire: golden vectors, round trips, and what must never be taken for a message.

`golden/7` and `golden/8` hold the vectors of the previous and of the present version.
`OUTLIVE_WRITE_GOLDEN=1 pytest tests/unit/test_messages.py` writes those of the present version anew. If those
of a version change that was ever run, nodes no longer understand each other: raise `PROTOCOL` instead. The
previous vectors are never written again; they go when `OLDEST` is raised.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages
from common.bulk import ZERO, EpochDigest, pack, pack_runs, unpack, unpack_held, unpack_runs, with_content
from common.criu.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from common.errors import ProtocolError
from common.messages import (
    BEAT_VERSION,
    BULK_BYTES,
    BULK_FRAME_BYTES,
    FRAME_COST_BYTES,
    HEADER_BYTES,
    MESSAGE_BYTES,
    MIN_CREDIT_BYTES,
    OLDEST,
    PROTOCOL,
    SPOKEN,
    Ack,
    AskHeld,
    AskStored,
    Beat,
    BeatPause,
    BeatTakeover,
    BeatWorkload,
    Begin,
    Commit,
    Credit,
    Doubt,
    HeldPages,
    Hello,
    Message,
    Metadata,
    Nack,
    Pages,
    Readiness,
    Refused,
    Repeats,
    Space,
    VersionError,
    Versions,
    Welcome,
    decode,
    encode,
    version_of,
)
from common.model import EpochId, FilePath, HealthCheck, WorkloadSpec

GOLDEN = Path(__file__).parent / "golden"


def vector(version: int, name: str) -> list[bytes]:
    """Return the frames of a golden vector."""
    lines = (GOLDEN / str(version) / f"{name}.hex").read_text().split()
    return [b"" if line == "-" else bytes.fromhex(line) for line in lines]


SPEC = WorkloadSpec(
    name="redis",
    nodes=("a", "b"),
    command=("redis-server", "--save", ""),
    environment={"LANG": "C"},
    files=(FilePath(path="/data"),),
    cpu_limit=1.5,
    vip="10.0.0.100/24",
    health=HealthCheck(tcp=6379),
    right_to_lead="fence",
    exclude=("*.tmp",),
)

NEW = {"repeats"}
"""Messages that the previous version has not."""

VECTORS: dict[str, tuple[Message, tuple[bytes, ...]]] = {
    "hello": (
        Hello(
            protocol=PROTOCOL,
            software="0.1",
            node="a",
            workload="redis",
            term=3,
            incarnation="i",
            spec=SPEC,
            oldest=OLDEST,
        ),
        (),
    ),
    "welcome": (
        Welcome(
            protocol=PROTOCOL,
            node="b",
            newest=EpochId(3, 41),
            newest_frozen_wall_s=1700000000.25,
            seed=0,
            credit_bytes=4 << 20,
        ),
        (),
    ),
    "welcome-new": (
        Welcome(
            protocol=PROTOCOL,
            node="b",
            newest=None,
            newest_frozen_wall_s=None,
            seed=4711,
            credit_bytes=MIN_CREDIT_BYTES,
        ),
        (),
    ),
    "refused": (Refused(code="stale-term", reason="c leads redis in term 4", term=4), ()),
    "begin": (
        Begin(
            term=3,
            epoch=EpochId(3, 42),
            base=EpochId(3, 41),
            seed=4711,
            incarnation="f3a1",
            frozen_wall_s=1700000001.5,
            memory_bytes=3 * 4096,
            spaces=1,
            metadata_files=1,
            last=False,
            file_bytes=2 * 4096,
        ),
        (),
    ),
    "ask": (
        AskHeld(epoch=EpochId(3, 41), seed=0, secret=bytes(range(8)), kind="task", ident=1, first_row=43690),
        (),
    ),
    "ask-seed": (
        AskHeld(epoch=None, seed=4711, secret=bytes(range(8)), kind="shmem", ident=1, first_row=0),
        (),
    ),
    "ask-stored": (
        AskStored(
            epoch=EpochId(3, 42), secret=bytes(range(8)), kind="task", ident=1, first_page=16, end_page=1065
        ),
        (),
    ),
    "doubt": (Doubt(epoch=EpochId(3, 42), reason="b has stored 1 page otherwise"), ()),
    "held": (HeldPages(kind="task", ident=1, pages=1, more=True), (b"\x00\x01\x02",)),
    "metadata": (Metadata(name="core-1.img", size=5), (b"\x50hello",)),
    "space": (Space(kind="task", ident=1, pages=3, changed=1), (b"\x00\x01\x02",)),
    "space-more": (Space(kind="shmem", ident=65536, pages=3, changed=0, more=True), (b"",)),
    "repeats": (Repeats(pages=2), (b"\x00\x01\x02",)),
    "pages": (Pages(raw_bytes=4096), (b"\x1f\x00\x01\x00",)),
    "commit": (Commit(digest=bytes(range(32))), ()),
    "ack": (
        Ack(
            epoch=EpochId(3, 42),
            restorable=False,
            reasons=("port 6379 is taken",),
            volatile=True,
            committed_wall_s=1700000001.75,
        ),
        (),
    ),
    "nack": (Nack(epoch=EpochId(3, 42), reason="t3-e41 is not held", code="base", retry_with_base=True), ()),
    "credit": (Credit(bytes=1 << 20), ()),
    "readiness": (Readiness(restorable=True, reasons=()), ()),
    "beat": (
        Beat(
            node="a",
            boot_id="0b5f",
            sequence=7,
            origin="keeper",
            wall_s=1700000000.5,
            workloads=(
                BeatWorkload(
                    name="redis",
                    term=3,
                    state="yielded",
                    heir="b",
                    alive=True,
                    agent_alive=False,
                    in_doubt=True,
                    takeovers=(
                        BeatTakeover(
                            silences=("process failure", "host loss"), missing=("no epoch is stored here",)
                        ),
                    ),
                    pauses=(
                        BeatPause(
                            node="a", number=2, by="root", since_wall_s=1700000000.0, lifted_by="root on b"
                        ),
                    ),
                ),
            ),
        ),
        (),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_message_has_exactly_the_bytes_of_its_golden_vector(name: str) -> None:
    message, bulk = VECTORS[name]
    frames = encode(message, bulk)
    if os.environ.get("OUTLIVE_WRITE_GOLDEN"):
        path = GOLDEN / str(PROTOCOL) / f"{name}.hex"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{bytes(frame).hex() or '-'}\n" for frame in frames))
    golden = vector(PROTOCOL, name)
    assert frames == golden
    assert decode(golden) == (message, golden[1:])


def as_before(message: Message) -> Message:
    """Return what is left of a message that is said in the previous version."""
    match message:
        case Hello():
            spec = msgspec.structs.replace(SPEC, exclude=())
            return msgspec.structs.replace(message, protocol=OLDEST, oldest=OLDEST - 1, spec=spec)
        case Welcome():
            return msgspec.structs.replace(message, protocol=OLDEST)
    return message


@pytest.mark.parametrize("name", [name for name in VECTORS if name not in NEW])
def test_a_node_of_the_previous_version_is_spoken_to_in_exactly_its_bytes(name: str) -> None:
    message, bulk = VECTORS[name]
    golden = vector(OLDEST, name)
    assert encode(as_before(message), bulk, version=OLDEST) == golden
    assert decode(golden) == (as_before(message), golden[1:])
    assert version_of(golden) == (BEAT_VERSION if isinstance(message, Beat) else OLDEST)


@pytest.mark.parametrize("version", SPOKEN)
def test_every_message_and_every_vector_has_its_counterpart(version: int) -> None:
    assert {type(message) for message, _ in VECTORS.values()} == set(Message.__args__)
    said = set(VECTORS) if version == PROTOCOL else set(VECTORS) - NEW
    assert {path.stem for path in (GOLDEN / str(version)).glob("*.hex")} == said
    assert {path.name for path in GOLDEN.iterdir()} == {str(each) for each in SPOKEN}


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_is_a_protocol_error_and_nothing_else(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(VECTORS)), st.data())
@settings(max_examples=400)
def test_a_field_of_another_kind_is_a_protocol_error_or_reads_back_the_same(name: str, data) -> None:
    message, bulk = VECTORS[name]
    header = msgpack.unpackb(encode(message, bulk)[0])
    field = data.draw(st.sampled_from([*header[2], "unknown"]))
    header[2][field] = data.draw(_VALUES)
    try:
        packed = msgpack.packb(header)
        read, _ = decode([packed, *bulk])
    except ProtocolError:
        return
    assert decode(encode(read, bulk)) == (read, list(bulk))


@given(st.sampled_from(sorted(VECTORS)), st.integers(0, 400), st.integers(1, 255))
@settings(max_examples=400)
def test_a_damaged_header_never_raises_anything_else(name: str, place: int, flip: int) -> None:
    message, bulk = VECTORS[name]
    frames = encode(message, bulk)
    header = bytearray(frames[0])
    header[place % len(header)] ^= flip
    with contextlib.suppress(ProtocolError):
        decode([bytes(header), *frames[1:]])


_GOLDEN_FRAMES = [vector(int(path.parent.name), path.stem) for path in sorted(GOLDEN.glob("*/*.hex"))]


@st.composite
def damaged_frames(draw) -> list[bytes]:
    """A golden vector, or two of them mixed, with some bytes altered, cut out or repeated."""
    frames = [*draw(st.sampled_from(_GOLDEN_FRAMES)), *draw(st.just([]) | st.sampled_from(_GOLDEN_FRAMES))]
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(frames) - 1))
        frame = frames[number]
        at, end = sorted((draw(st.integers(0, len(frame))), draw(st.integers(0, len(frame)))))
        middle = draw(st.binary(max_size=12) | st.just(frame[at:end] * 3))
        frames[number] = frame[:at] + middle + frame[end:]
    return frames


@given(damaged_frames())
@settings(max_examples=400)
def test_a_damaged_message_is_a_protocol_error_or_another_message(frames: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        message, bulk = decode(frames)
        assert decode(encode(message, bulk)) == (message, list(bulk))


@given(st.binary(max_size=200), st.integers(0, 70), st.data())
@settings(max_examples=400)
def test_damaged_bulk_is_a_protocol_error_or_what_it_says(garbage: bytes, pages: int, data) -> None:
    runs = np.array([(7, 3, PE_PRESENT), (10, 5, PE_PARENT)], dtype="<u8, <u4, <u4").tobytes()
    raw = data.draw(st.sampled_from([garbage, runs, runs * 2]))
    frame = data.draw(st.sampled_from([garbage, pack(raw)]))
    at = data.draw(st.integers(0, len(frame)))
    frame = frame[:at] + garbage[:3] + frame[at:]
    with contextlib.suppress(ProtocolError):
        numbers, flags = unpack_runs(frame, pages)
        assert len(numbers) == len(flags) == pages
    with contextlib.suppress(ProtocolError):
        numbers, identity = unpack_held(frame, pages)
        assert (len(numbers), identity.shape) == (pages, (pages, 2))
    with contextlib.suppress(ProtocolError):
        assert len(unpack(frame, pages)) == pages


@given(
    st.builds(
        Ack,
        epoch=st.builds(EpochId, st.integers(1, 2**53), st.integers(0, 2**53)),
        restorable=st.booleans(),
        reasons=st.lists(st.text(max_size=100), max_size=3).map(tuple),
        volatile=st.booleans(),
        committed_wall_s=st.floats(0, 1e12),
    )
)
def test_what_is_encoded_is_decoded(message: Ack) -> None:
    assert decode([memoryview(frame) for frame in encode(message)]) == (message, [])


@pytest.mark.parametrize(
    ("message", "bulk"),
    [
        (Metadata(name="core-1.img", size=5), ()),
        (Metadata(name="core-1.img", size=5), (b"a", b"b")),
        (Pages(raw_bytes=4096), (bytes(BULK_FRAME_BYTES + 1),)),
        (Credit(bytes=1), (b"",)),
        (Refused(code="x", reason="r" * HEADER_BYTES), ()),
    ],
)
def test_bulk_that_does_not_fit_its_message_is_not_even_encoded(message: Message, bulk) -> None:
    with pytest.raises(ProtocolError):
        encode(message, bulk)


def test_bulk_frames_must_be_those_that_the_header_declares() -> None:
    header, bulk = encode(Metadata(name="core-1.img", size=5), [b"hello"])
    for frames in ([header], [header, b"hell"], [header, bulk, b""], [bulk]):
        with pytest.raises(ProtocolError):
            decode(frames)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "x\n",
        "pages-1.img",
        "pagemap-1.img",
        "parent",
        "ü",
        "a" * 200,
    ],
)
def test_a_metadata_file_cannot_be_named_like_anything_but_an_image(name: str) -> None:
    with pytest.raises(ProtocolError):
        decode(encode(Metadata(name=name, size=0), [b""]))


@pytest.mark.parametrize("epoch", [EpochId(0, 1), EpochId(-1, 1), EpochId(1, -1), EpochId(1, 2**60)])
def test_impossible_epochs_are_refused(epoch: EpochId) -> None:
    message, _ = VECTORS["begin"]
    for changed in (
        msgspec.structs.replace(message, epoch=epoch),
        msgspec.structs.replace(message, base=epoch),
    ):
        with pytest.raises(ProtocolError):
            decode(encode(changed))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_times_are_finite(value: float) -> None:
    with pytest.raises(ProtocolError):
        decode(encode(msgspec.structs.replace(VECTORS["begin"][0], frozen_wall_s=value)))


def test_another_versions_message_is_told_apart_from_nonsense_and_its_refusal_is_read() -> None:
    fields = {"code": "version", "reason": "too old", "term": 0, "hint": "of a newer version"}
    with pytest.raises(VersionError) as caught:
        decode([msgpack.packb([9, "hello", {"anything": 1}, []])])
    assert caught.value.theirs == Versions(9, 9)
    assert f"speaks version 9 of the wire format, this node versions {OLDEST} to {PROTOCOL}" in str(
        caught.value
    )
    message, _ = decode([msgpack.packb([9, "refused", fields, []])])
    assert message == Refused(code="version", reason="too old")


@pytest.mark.parametrize(
    ("oldest", "offered"), [(7, 7), (9, 9), (10, 9), (0, 9), ("7", 9), (None, 9), (True, 9)]
)
def test_of_a_newer_greeting_so_much_is_read_as_says_what_could_be_spoken(oldest, offered: int) -> None:
    with pytest.raises(VersionError) as caught:
        decode([msgpack.packb([9, "hello", {"oldest": oldest, "new": 1}, [], "more"])])
    assert caught.value.theirs == Versions(offered, 9)


def test_a_heartbeat_of_a_newer_version_is_read_without_what_is_new_in_it() -> None:
    beat, _ = VECTORS["beat"]
    header = msgpack.unpackb(encode(beat)[0])
    assert header[0] == BEAT_VERSION
    header[0] = PROTOCOL + 3
    for fields in (
        header[2],
        header[2]["workloads"][0],
        header[2]["workloads"][0]["pauses"][0],
        header[2]["workloads"][0]["takeovers"][0],
    ):
        fields["new"] = {"anything": [1]}
    assert decode([msgpack.packb(header)]) == (beat, [])
    header[2]["workloads"][0]["state"] = "a state that is new"
    with pytest.raises(VersionError):
        decode([msgpack.packb(header)])
    header[0] = BEAT_VERSION - 1
    with pytest.raises(VersionError):
        decode([msgpack.packb(header)])


def test_what_repeats_is_not_said_to_who_does_not_know_it() -> None:
    message, bulk = VECTORS["repeats"]
    with pytest.raises(ProtocolError, match=r"version 7 .* knows nothing of repeated pages"):
        encode(message, bulk, version=OLDEST)


def test_only_what_an_older_version_knows_of_a_declaration_is_said_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "_SPEC_SINCE", {"cpu_limit": PROTOCOL, "exclude": PROTOCOL})
    hello = VECTORS["hello"][0]
    assert isinstance(hello, Hello)
    with pytest.raises(ProtocolError, match="`cpu_limit` of redis is not known to version") as caught:
        encode(hello, version=OLDEST)
    assert "upgrade the other nodes" in str(caught.value)
    excluding = msgspec.structs.replace(SPEC, cpu_limit=None)
    with pytest.raises(ProtocolError, match="`exclude` of redis is not known to version"):
        encode(msgspec.structs.replace(hello, spec=excluding), version=OLDEST)
    plain = msgspec.structs.replace(hello, spec=msgspec.structs.replace(SPEC, cpu_limit=None, exclude=()))
    assert "cpu_limit" not in msgpack.unpackb(encode(plain, version=OLDEST)[0])[2]["spec"]
    assert "cpu_limit" in msgpack.unpackb(encode(plain)[0])[2]["spec"]


@pytest.mark.parametrize("depth", [10, 500, 1000, 1020, 100_000])
def test_bulk_sizes_that_are_nested_however_deep_are_refused(depth: int) -> None:
    header, *_ = encode(Commit(digest=bytes(32)))
    with pytest.raises(ProtocolError) as raised:
        decode([bytes(header[:-1]) + b"\x91" * depth + b"\x90"])
    assert len(raised.value.message) < 200


def test_deeply_nested_headers_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode([b"\x91" * 100_000 + b"\xc0"])
    with pytest.raises(ProtocolError):
        decode([b"\xdd\xff\xff\xff\xff"])


# --- bulk -------------------------------------------------------------------------------------------

_FLAGS = [PE_PRESENT, PE_PRESENT | PE_LAZY, PE_PRESENT | ZERO, PE_PARENT, PE_PARENT | PE_LAZY]


@given(st.dictionaries(st.integers(0, 2**52 - 1) | st.integers(0, 40), st.sampled_from(_FLAGS), max_size=60))
def test_runs_of_pages_read_back_the_same(pages: dict[int, int]) -> None:
    numbers = np.array(sorted(pages), dtype=np.uint64)
    flags = np.array([pages[n] for n in sorted(pages)], dtype=np.uint8)
    first = np.append(True, (np.diff(numbers) != 1) | (np.diff(flags) != 0))[: len(numbers)]
    counts = np.diff(np.flatnonzero(first), append=len(numbers)).astype(np.uint64)
    (packed,) = pack_runs(numbers[first], counts, flags[first])
    assert packed.pages == len(pages)
    assert packed.changed == with_content(flags).sum()
    read_numbers, read_flags = unpack_runs(packed.frame, packed.pages)
    assert np.array_equal(read_numbers, numbers)
    assert np.array_equal(read_flags, flags)
    assert read_numbers.dtype == np.uint64
    assert read_flags.dtype == np.uint8


def test_more_runs_than_a_frame_holds_go_into_several() -> None:
    numbers = np.arange(0, 400_000, 2, dtype=np.uint64)
    flags = np.full(len(numbers), PE_PRESENT, dtype=np.uint8)
    parts = list(pack_runs(numbers, np.ones(len(numbers), dtype=np.uint64), flags))
    assert len(parts) == 4
    read = np.concatenate([unpack_runs(part.frame, part.pages)[0] for part in parts])
    assert np.array_equal(read, numbers)
    assert sum(part.changed for part in parts) == len(numbers)


def _runs(*runs: tuple[int, int, int]) -> bytes:
    return pack(np.array(list(runs), dtype=[("s", "<u8"), ("c", "<u4"), ("f", "<u4")]).tobytes())


@pytest.mark.parametrize(
    ("frame", "pages"),
    [
        (_runs((5, 2, PE_PRESENT)), 3),
        (_runs((5, 0, PE_PRESENT)), 0),
        (_runs((5, 2, PE_PRESENT), (6, 1, PE_PRESENT)), 3),
        (_runs((9, 1, PE_PRESENT), (5, 1, PE_PRESENT)), 2),
        (_runs((2**64 - 1, 2, PE_PRESENT)), 2),
        (_runs((2**52 - 1, 2, PE_PRESENT)), 2),
        (_runs((5, 1, 0)), 1),
        (_runs((5, 1, 0x40)), 1),
        (_runs((5, 1, PE_PARENT | PE_PRESENT)), 1),
        (_runs((5, 1, PE_PARENT | ZERO)), 1),
        (_runs((5, 1, 1 << 16 | PE_PRESENT)), 1),
        (pack(b"123"), 0),
        (b"\xff\xff\xff", 1),
    ],
)
def test_runs_that_cannot_be_are_refused(frame: bytes, pages: int) -> None:
    with pytest.raises(ProtocolError):
        unpack_runs(frame, pages)


def test_a_block_that_unpacks_to_more_or_less_than_declared_is_refused() -> None:
    block = pack(bytes(8192))
    assert unpack(block, 8192) == bytes(8192)
    assert unpack(pack(b""), 0) == b""
    for size in (4096, 12288):
        with pytest.raises(ProtocolError):
            unpack(block, size)
    bomb = pack(bytes(BULK_BYTES))
    with pytest.raises(ProtocolError):
        unpack(bomb, 4096)


def test_the_largest_block_that_does_not_compress_fits_a_frame() -> None:
    raw = os.urandom(BULK_BYTES)
    assert len(pack(raw)) <= BULK_FRAME_BYTES
    assert decode(encode(Pages(raw_bytes=BULK_BYTES), [pack(raw)]))


def test_the_digest_is_blake3_of_the_frames_in_order() -> None:
    digest = EpochDigest()
    digest.add([b"", b"abc"])
    assert digest.value().hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_the_page_on_the_wire_format_names_every_message_field_and_limit() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    for name, (message, _) in VECTORS.items():
        assert f"`{name.partition('-')[0]}`" in text
        for field in msgspec.structs.fields(message):
            assert f"`{field.encode_name}`" in text, (name, field.encode_name)
    for number in (MESSAGE_BYTES, HEADER_BYTES, BULK_BYTES, BULK_FRAME_BYTES, MIN_CREDIT_BYTES):
        assert f"{number:,}" in text
    assert f"{FRAME_COST_BYTES} more (`FRAME_COST_BYTES`" in text
    assert f"**protocol\n{PROTOCOL}**" in text
    assert f"reads **{OLDEST}** as well" in text


def test_a_value_that_the_previous_version_does_not_know_is_not_said_in_it(monkeypatch) -> None:
    monkeypatch.setattr(messages, "_SPEC_VALUES_SINCE", {("right_to_lead", "etcd"): PROTOCOL})
    hello = VECTORS["hello"][0]
    assert isinstance(hello, Hello)
    spec = msgspec.structs.replace(SPEC, right_to_lead="etcd", exclude=())
    leased = msgspec.structs.replace(hello, spec=spec)
    assert encode(leased)
    with pytest.raises(ProtocolError, match="right_to_lead"):
        encode(leased, version=OLDEST)
