"""Every message that one node sends to another, and the one place that turns them into bytes and back.

In: a message (a frozen struct) and its bulk data, or the frames of a multipart message off a socket. Out: the
other. A message is one header frame, `[protocol, type, fields, [size of each bulk frame]]` in msgpack, and
the bulk frames themselves, raw. What `decode` returns has been checked: types, ranges, names, sizes. Anything
else is a ProtocolError. Whether a message may come *now* is the receiver's business, not this module's.

The keeper imports this module, so it costs little: what bulk frames contain is in `common.bulk`. The format
is described in `docs/wire.md`; golden vectors in the tests keep it from changing unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgpack  # type: ignore[import-untyped]
import msgspec
from msgspec import Meta

from common.errors import ProtocolError
from common.model import NAME_PATTERN, EpochId, SpaceKind, WorkloadSpec

PROTOCOL: Final = 8
"""Version of the wire format. It grows with every change of a message, of `WorkloadSpec` included."""

OLDEST: Final = PROTOCOL - 1
"""The oldest one that is spoken as well, so that nodes can be upgraded one after the other."""

REPEATS_SINCE: Final = 8
"""The version since which a page that holds what another one of its epoch does may be said to (`Repeats`)."""

BEAT_VERSION: Final = 5
"""The version in which heartbeats changed last, and as which they are sent: nobody is asked beforehand what
he reads. Whoever reads one of a newer version passes over the fields that he does not know."""


class Versions(NamedTuple):
    """A range of versions of the wire format, as a node speaks it."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        """Return it for a sentence."""
        if self.oldest == self.newest:
            return f"version {self.newest}"
        return f"versions {self.oldest} to {self.newest}"


SPOKEN: Final = Versions(OLDEST, PROTOCOL)

BULK_BYTES: Final = 1 << 20
"""Most bytes that a bulk frame may hold before compression: 256 pages."""

BULK_FRAME_BYTES: Final = BULK_BYTES + BULK_BYTES // 255 + 16
"""Most bytes of a bulk frame: lz4's own bound for a block that does not compress (`LZ4_compressBound`)."""

HEADER_BYTES: Final = 1 << 19
"""Most bytes of a header frame: a command line and an environment fit in easily."""

MESSAGE_BYTES: Final = HEADER_BYTES + BULK_FRAME_BYTES
"""Most bytes of a message."""

FRAME_COST_BYTES: Final = 512
"""What a frame costs of the credit beside its length: about what it takes in memory, however short it is."""

MIN_CREDIT_BYTES: Final = 2 * MESSAGE_BYTES
"""Least credit that a receiver may grant: a sender with less could wait for ever."""

Buffer = bytes | bytearray | memoryview
"""What frames are taken from; nothing here writes to one."""

_NAME = NAME_PATTERN.pattern
# What CRIU calls its images, but not those that the store writes itself, and nothing with a path in it.
_FILE = r"^(?!pages-|pagemap-|parent\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,126}\Z"

Name = Annotated[str, Meta(pattern=_NAME)]
NameOrNone = Annotated[str, Meta(pattern=rf"\A\Z|{_NAME}")]
FileName = Annotated[str, Meta(pattern=_FILE)]
Text = Annotated[str, Meta(max_length=4096)]
ShortText = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Term = Annotated[int, Meta(ge=1, le=1 << 53)]
WallSeconds = Annotated[float, Meta(ge=0, le=1e12)]
Secret = Annotated[bytes, Meta(min_length=8, max_length=8)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all messages have in common: no field is unknown, none is missing but those with a default.

    But for heartbeats and refusals, which newer versions send too: what is unknown there is passed over.
    """


# --- greeting ---------------------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """Primary to replica, first of all: I lead `workload` in `term`; will you follow?"""

    protocol: Count
    """The version that is to be spoken."""
    software: Text
    node: Name
    workload: Name
    term: Term
    incarnation: Annotated[str, Meta(min_length=1, max_length=128)]
    """Which run of the workload is led: epochs of another one are not its."""
    spec: WorkloadSpec
    oldest: Count = 0
    """The oldest version that could be spoken instead (0: it was not said)."""


class Welcome(_Message, frozen=True):
    """Replica to primary: I follow. `newest` is what the next epoch may stand on."""

    protocol: Count
    node: Name
    newest: EpochId | None
    newest_frozen_wall_s: WallSeconds | None
    """The instant that it would go back to."""
    seed: Count
    """Names what is kept of an interrupted epoch, for the next one to take pages of; 0: nothing is."""
    credit_bytes: Annotated[int, Meta(ge=MIN_CREDIT_BYTES, le=1 << 32)]


RefusalCode = Literal["version", "identity", "stale-term", "not-followed", "no-session", "nonsense", "busy"]
"""Why a receiver refuses: see `docs/wire.md`. Newer versions may use others; they are text on the wire."""


class Refused(_Message, frozen=True, forbid_unknown_fields=False):
    """Receiver to sender: no, and this session is over. The same in every version of the protocol."""

    code: Text
    """One of `RefusalCode`, or what a newer version says."""
    reason: Text
    term: Count = 0
    """With `stale-term`: the newest term that the receiver knows; else 0."""


# --- what the replica holds ---------------------------------------------------------------------------


class AskHeld(_Message, frozen=True):
    """Primary to replica, between epochs: which pages of a space do you hold, from the `first_row`-th on?"""

    epoch: EpochId | None
    """In which committed epoch; None: in the seed that `seed` names."""
    seed: Count
    secret: Secret
    """Under which pages are identified: the seed of xxh3, little-endian."""
    kind: SpaceKind
    ident: Count
    first_row: Count


class AskStored(_Message, frozen=True):
    """Primary to replica, between epochs: what is on your disk of these pages of a committed epoch?

    The answer is `HeldPages`. Unlike `AskHeld` this is no question about what to send: it verifies.
    """

    epoch: EpochId
    secret: Secret
    kind: SpaceKind
    ident: Count
    first_page: Count
    end_page: Count
    """Behind the last one."""


class HeldPages(_Message, frozen=True):
    """Replica to primary: these, in one bulk frame (`common.bulk.pack_held`); none if it cannot say."""

    kind: SpaceKind
    ident: Count
    pages: Annotated[int, Meta(ge=0, le=BULK_BYTES // 24)]
    more: bool
    problem: Text = ""
    """To `AskStored`: why it cannot say just now. Empty: pages that are missing are not there, or damaged."""


class Doubt(_Message, frozen=True):
    """Primary to replica, between epochs: what you have stored up to this epoch is not what was captured.

    Nothing of it may lend pages to a later epoch; everything is sent anew.
    """

    epoch: EpochId
    reason: Text


# --- one epoch --------------------------------------------------------------------------------------


class Begin(_Message, frozen=True):
    """An epoch begins. `base`: what its unchanged pages are taken from; None if it has none."""

    term: Term
    epoch: EpochId
    base: EpochId | None
    seed: Count
    """Of which seed `SEEDED` pages are taken; 0 if there are none."""
    incarnation: Annotated[str, Meta(min_length=1, max_length=128)]
    frozen_wall_s: WallSeconds
    memory_bytes: Count
    """Size of all present pages of memory, whether they are sent or not."""
    spaces: Annotated[int, Meta(ge=0, le=1 << 20)]
    metadata_files: Annotated[int, Meta(ge=0, le=1 << 20)]
    last: bool | None = None
    """The workload stands still since then, to be handed over: nothing follows."""
    file_bytes: Count = 0
    """Size of all present pages of files (`common.file_records`)."""


class Metadata(_Message, frozen=True):
    """A piece of one metadata file, in one lz4 block of `size` bytes unpacked; `more` follow or not."""

    name: FileName
    size: Annotated[int, Meta(ge=0, le=BULK_BYTES)]
    more: bool = False


class Space(_Message, frozen=True):
    """Which pages an address space has, in one bulk frame of runs (`common.bulk.pack_runs`).

    `pages` and `changed` count the pages of these runs, and those of them whose content follows in `Pages`.
    With `more` the same space goes on in the next message.
    """

    kind: SpaceKind
    ident: Count
    pages: Count
    changed: Count
    more: bool = False


class Repeats(_Message, frozen=True):
    """What the next pages of the space named last that are `REPEATED` hold: what these earlier ones do.

    Their numbers, in one bulk frame (`common.bulk.pack_numbers`). Comes behind the runs of a space, ahead of
    its content, until it is said of all. Since version 8.
    """

    pages: Annotated[int, Meta(ge=1, le=BULK_BYTES // 8)]


class Pages(_Message, frozen=True):
    """The next pages of the space that was named last, in one lz4 block of `raw_bytes` unpacked."""

    raw_bytes: Annotated[int, Meta(ge=4096, le=BULK_BYTES, multiple_of=4096)]


class Commit(_Message, frozen=True):
    """That was all of it. `digest`: blake3 over all frames from `Begin` on, this message excluded."""

    digest: Digest


class Ack(_Message, frozen=True):
    """The epoch is committed, durably unless `volatile`, and was checked for readiness."""

    epoch: EpochId
    restorable: bool
    reasons: tuple[Text, ...]
    volatile: bool
    committed_wall_s: WallSeconds


class Nack(_Message, frozen=True):
    """The epoch is not committed and nothing of it is kept; the session goes on."""

    epoch: EpochId
    reason: Text
    code: Literal["base", "not-newer", "no-space", "store", "digest"]
    retry_with_base: bool
    """True: send it again, whole, with nothing to stand on."""


class Credit(_Message, frozen=True):
    """That many more bytes of messages may be sent."""

    bytes: Count


class Readiness(_Message, frozen=True):
    """Whether the newest committed epoch could be restored changed, or is said for the first time."""

    restorable: bool
    reasons: tuple[Text, ...]


# --- heartbeats -------------------------------------------------------------------------------------


class BeatPause(msgspec.Struct, frozen=True, kw_only=True):
    """The newest pause that was asked for at one node, as the node that beats has it on its disk."""

    node: Name
    number: Term
    by: ShortText
    since_wall_s: WallSeconds
    lifted_by: ShortText
    """Empty: it is in force."""


class BeatTakeover(msgspec.Struct, frozen=True, kw_only=True):
    """What the node that beats would do if the leader that it follows fell silent now."""

    silences: Annotated[
        tuple[Literal["host loss", "partition", "process failure"], ...], Meta(min_length=1, max_length=3)
    ]
    """Why the leader falls silent."""
    missing: Annotated[tuple[ShortText, ...], Meta(max_length=4)]
    """Why it would not take over; empty: it would."""


class BeatWorkload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one workload stands on the node that beats. What has a default is not said unless it differs."""

    name: Name
    term: Count
    state: Literal["starting", "taking_over", "leading", "stopped", "yielded", "following", "acquiring"]
    heir: NameOrNone
    """Yielded: to whom the term is handed over; empty: to nobody by name. Following: since version 6 the
    leader, if it does not hear that one; older ones say nothing here, and do nothing with what they hear.
    """
    alive: bool
    """A process of it runs there."""
    agent_alive: bool
    pauses: Annotated[tuple[BeatPause, ...], Meta(max_length=64)]
    takeovers: Annotated[tuple[BeatTakeover, ...], Meta(max_length=3)]
    """Empty: it follows no leader, or one that, as is recorded there, has stopped the workload."""
    in_doubt: bool = False
    """It leads, and has frozen the workload because its lease in etcd may be over. Since version 6."""


class Beat(_Message, frozen=True, forbid_unknown_fields=False):
    """A node's sign of life, to each peer's keeper. `sequence` grows by one; `origin` says which process."""

    node: Name
    boot_id: Annotated[str, Meta(min_length=1, max_length=64)]
    sequence: Count
    origin: Literal["keeper", "agent"] = msgspec.field(name="from")
    wall_s: WallSeconds
    """When it was sent, by the clock that also stamps this node's epochs; to be compared with those only."""
    workloads: tuple[BeatWorkload, ...]


Message = (
    Hello
    | Welcome
    | Refused
    | AskHeld
    | AskStored
    | HeldPages
    | Doubt
    | Begin
    | Metadata
    | Space
    | Repeats
    | Pages
    | Commit
    | Ack
    | Nack
    | Credit
    | Readiness
    | Beat
)

_TYPES: Final[dict[str, type[_Message]]] = {
    "hello": Hello,
    "welcome": Welcome,
    "refused": Refused,
    "ask": AskHeld,
    "ask-stored": AskStored,
    "held": HeldPages,
    "doubt": Doubt,
    "begin": Begin,
    "metadata": Metadata,
    "space": Space,
    "repeats": Repeats,
    "pages": Pages,
    "commit": Commit,
    "ack": Ack,
    "nack": Nack,
    "credit": Credit,
    "readiness": Readiness,
    "beat": Beat,
}
_TAGS: Final = {kind: tag for tag, kind in _TYPES.items()}
_WITH_BULK: Final = (HeldPages, Metadata, Space, Repeats, Pages)


_SINCE: Final[dict[type[Message], dict[str, int]]] = {}
"""Fields that are not said in a version before that one."""
_SPEC_SINCE: Final[dict[str, int]] = {"exclude": 8}
"""Fields of `WorkloadSpec` that did not exist before that version: who sets one can only greet in a newer."""
_SPEC_VALUES_SINCE: Final[dict[tuple[str, str], int]] = {}
"""Values of such fields, likewise."""


class VersionError(ProtocolError):
    """The peer speaks other versions of the wire format than this node: `theirs`, as far as it is known."""

    def __init__(self, theirs: Versions, ours: Versions) -> None:
        super().__init__(
            f"the peer speaks {theirs} of the wire format, this node {ours}",
            hint="upgrade the older one, one version at a time: versions next to each other work together",
        )
        self.theirs = theirs


def encode(message: Message, bulk: Sequence[Buffer] = (), *, version: int = PROTOCOL) -> list[Buffer]:
    """Return the frames of a message as that version has it; of a heartbeat, as `BEAT_VERSION` has it.

    Raises ProtocolError if its bulk frames do not fit it, or if the version cannot say what it says.
    """
    sizes = [len(frame) for frame in bulk]
    _check_bulk(message, sizes)
    if version < REPEATS_SINCE and isinstance(message, Repeats):
        raise ProtocolError(f"version {version} of the wire format knows nothing of repeated pages")
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    if isinstance(message, Beat):
        version = BEAT_VERSION
    if isinstance(message, Hello):
        fields["spec"] = _spec_as_of(version, message.spec, fields["spec"])
    for name in [name for name, since in _SINCE.get(type(message), {}).items() if since > version]:
        del fields[name]
    header: bytes = msgpack.packb([version, _TAGS[type(message)], fields, sizes])
    if len(header) > HEADER_BYTES:
        raise ProtocolError(f"the header of a {_TAGS[type(message)]} has {len(header)} bytes: too many")
    return [header, *bulk]


def _spec_as_of(version: int, spec: WorkloadSpec, fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a version does not know; raise ProtocolError if that would say something else."""
    known = dict(fields)
    for name in [name for name, since in _SPEC_SINCE.items() if since > version]:
        default = next(each.default for each in msgspec.structs.fields(WorkloadSpec) if each.name == name)
        if getattr(spec, name) != default:
            raise ProtocolError(
                f"`{name}` of {spec.name} is not known to version {version} of the wire format",
                hint="upgrade the other nodes of the workload, or leave it at its default until then",
            )
        del known[name]
    for (name, value), since in _SPEC_VALUES_SINCE.items():
        if since > version and getattr(spec, name) == value:
            raise ProtocolError(
                f"`{name} = {value!r}` of {spec.name} is not known to version {version} of the wire format",
                hint="upgrade the other nodes of the workload",
            )
    return known


def cost_bytes(frames: Sequence[Buffer]) -> int:
    """Return what a message costs of the credit."""
    return sum(len(frame) + FRAME_COST_BYTES for frame in frames)


def decode(frames: Sequence[Buffer], versions: Versions = SPOKEN) -> tuple[Message, Sequence[Buffer]]:
    """Read what `encode` wrote: the message and its bulk frames, as they came (nothing is copied).

    Raises VersionError for a message of none of these versions (but reads a `Refused`, and a `Beat` of a
    newer one), else ProtocolError for all that is not exactly a message of its version.
    """
    if not frames or len(frames[0]) > HEADER_BYTES:
        raise ProtocolError("a message has no header, or one that is too long")
    version, tag, fields, declared = _unpack_header(frames[0], versions)
    try:
        message: Any = msgspec.convert(fields, _TYPES[tag], builtin_types=(bytes,))
    except (msgspec.ValidationError, OverflowError) as error:
        if version > versions.newest:
            raise VersionError(Versions(version, version), versions) from error
        raise ProtocolError(f"a {tag} message is not valid: {error}") from error
    for name in ("epoch", "base", "newest"):
        epoch = getattr(message, name, None)
        if epoch is not None and not (1 <= epoch.term <= 1 << 53 and 0 <= epoch.epoch <= 1 << 53):
            raise ProtocolError(f"a {tag} message names an impossible epoch {epoch}")
    bulk = frames[1:]
    sizes = [len(frame) for frame in bulk]
    _check_bulk(message, sizes)
    if declared != sizes:
        # What is declared may be anything, of any depth: not to be written down.
        raise ProtocolError(f"a {tag} message declares other bulk frames than those of {sizes} bytes")
    return message, bulk


def version_of(frames: Sequence[Buffer]) -> int:
    """Return the version of a message that `decode` has read."""
    version: int = _unpack(frames[0])[0]
    return version


def _unpack_header(frame: Buffer, versions: Versions) -> tuple[int, str, object, object]:
    """Return version, type, fields and bulk sizes. Raises VersionError, ProtocolError."""
    header = _unpack(frame)
    version, tag = header[:2]
    readable = (
        versions.oldest <= version <= versions.newest
        or tag == "refused"
        or (tag == "beat" and version >= BEAT_VERSION)
    )
    if not readable or (len(header) != 4 and version > versions.newest):
        raise VersionError(_offered(header), versions)
    if len(header) != 4 or tag not in _TYPES:
        raise ProtocolError(f"no message of {versions} is called {tag[:40]!r}")
    return version, tag, header[2], header[3]


def _offered(header: list[Any]) -> Versions:
    """Return the versions that the sender of a greeting says that it speaks; of other messages, their own."""
    fields = header[2] if len(header) > 2 and isinstance(header[2], dict) else {}
    oldest = fields.get("oldest") if header[1] == "hello" else None
    return Versions(oldest if type(oldest) is int and 0 < oldest < header[0] else header[0], header[0])


def _unpack(frame: Buffer) -> list[Any]:
    """Return what a header holds, version and type first. No limit of msgpack's is left at its default."""
    try:
        header = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=HEADER_BYTES,
            max_bin_len=64,
            max_array_len=4096,
            max_map_len=4096,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a message's header is not msgpack: {error}") from error
    if not isinstance(header, list) or len(header) < 2:
        raise ProtocolError("a message's header is not a list of version, type, fields and sizes")
    if type(header[0]) is not int or type(header[1]) is not str:
        raise ProtocolError("a message's header does not begin with a version and a type")
    return header


def _check_bulk(message: _Message, sizes: list[int]) -> None:
    """A message has as many bulk frames as its type says, and none larger than the format allows."""
    expected = 1 if isinstance(message, _WITH_BULK) else 0
    tag = _TAGS[type(message)]
    if len(sizes) != expected:
        raise ProtocolError(f"a {tag} message has {len(sizes)} bulk frames instead of {expected}")
    if any(size > BULK_FRAME_BYTES for size in sizes):
        raise ProtocolError(f"a bulk frame of {max(sizes)} bytes is larger than {BULK_FRAME_BYTES}")
