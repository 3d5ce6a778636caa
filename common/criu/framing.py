"""CRIU's image files as frames: bytes in, protobuf messages out, and back byte for byte.

An image is: a magic that says "an image" or "a service file" (stats), a magic that says which kind, then
frames, each a little-endian u32 size and one protobuf message. `inventory.img` has the second magic only.
Some kinds have a head message of a type of its own, and one (a ghost file) carries raw bytes behind its
first message. Raw images (pages, archives) and the kinds that interleave messages and data (pipes' and
sockets' queues) are not for this module: nobody here looks inside them.

Source of the format: CRIU 4.2, `criu/include/magic.h`, `criu/image-desc.c`, `criu/protobuf.c`.

What is damaged, cut short or of an unknown kind is refused with a `StoreError` that names the file.
A size field is never trusted beyond the bytes that are there. Fields of a newer CRIU inside a known message
survive the round trip; who must not tolerate them (the pagemap) says so itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from google.protobuf.message import DecodeError, EncodeError, Message

from common.criu.proto import (
    core_pb2,
    cpuinfo_pb2,
    fdinfo_pb2,
    file_lock_pb2,
    ghost_file_pb2,
    inventory_pb2,
    mm_pb2,
    pagemap_pb2,
    pstree_pb2,
    remap_file_path_pb2,
    stats_pb2,
)
from common.errors import StoreError

_IMAGE_MAGIC = 0x54564319
_SERVICE_MAGIC = 0x55105940
_U32 = struct.Struct("<I")

DAMAGED_HINT = "the image is damaged or was cut short; take a new checkpoint"
NEWER_HINT = "it may come from a newer CRIU; use the version that Outlive was tested with"


class ImageKind(Enum):
    """The kinds of image that are read or written here.

    `magic` is the kind's own; `leading` what stands before it (0: nothing); `head` the message type of the
    first frame and `entry` that of the others; `single` whether there is exactly one frame; `tail` whether
    raw bytes follow it.
    """

    INVENTORY = (0x58313116, 0, inventory_pb2.inventory_entry, True, False)
    PSTREE = (0x50273030, _IMAGE_MAGIC, pstree_pb2.pstree_entry, False, False)
    PAGEMAP = (0x56084025, _IMAGE_MAGIC, pagemap_pb2.pagemap_entry, False, False)
    MM = (0x57492820, _IMAGE_MAGIC, mm_pb2.mm_entry, True, False)
    CORE = (0x55053847, _IMAGE_MAGIC, core_pb2.core_entry, True, False)
    FILES = (0x56303138, _IMAGE_MAGIC, fdinfo_pb2.file_entry, False, False)
    FDINFO = (0x56213732, _IMAGE_MAGIC, fdinfo_pb2.fdinfo_entry, False, False)
    IDS = (0x54432030, _IMAGE_MAGIC, core_pb2.task_kobj_ids_entry, True, False)
    FILE_LOCKS = (0x54323616, _IMAGE_MAGIC, file_lock_pb2.file_lock_entry, False, False)
    REMAP_PATHS = (0x59133954, _IMAGE_MAGIC, remap_file_path_pb2.remap_file_path_entry, False, False)
    GHOST_FILE = (0x52583605, _IMAGE_MAGIC, ghost_file_pb2.ghost_file_entry, True, True)
    CPUINFO = (0x61404013, _IMAGE_MAGIC, cpuinfo_pb2.cpuinfo_entry, True, False)
    STATS = (0x57093306, _SERVICE_MAGIC, stats_pb2.stats_entry, True, False)

    def __init__(self, magic: int, leading: int, entry: type[Message], single: bool, tail: bool) -> None:
        self.magic = magic
        self.leading = leading
        self.entry = entry
        self.head: type[Message] = pagemap_pb2.pagemap_head if magic == 0x56084025 else entry
        self.single = single
        self.tail = tail


_BY_MAGIC = {kind.magic: kind for kind in ImageKind}


@dataclass(frozen=True, slots=True)
class Image:
    """One parsed image: its kind, its messages in order, and the raw bytes behind them.

    The messages are protobuf's own mutable objects: treat them as read-only.
    """

    kind: ImageKind
    messages: tuple[Message, ...]
    tail: bytes = b""


def parse_image(data: bytes, name: str, expected: ImageKind | None = None) -> Image:
    """Parse the bytes of a whole image; `name` is for messages only.

    Raises `StoreError` if the kind is unknown or not the expected one, a frame is cut short or does not
    parse, or the number of frames cannot be right. Raises nothing else, whatever the bytes.
    """
    kind, offset = _kind_of(data, name)
    if expected is not None and kind is not expected:
        raise StoreError(
            f"{name} is a CRIU image of kind {kind.name.lower()}, not {expected.name.lower()}",
            hint=DAMAGED_HINT,
        )
    messages: list[Message] = []
    while offset < len(data) and not (kind.tail and messages):
        if len(data) - offset < _U32.size:
            raise _cut_short(name, offset)
        (size,) = _U32.unpack_from(data, offset)
        offset += _U32.size
        if size > len(data) - offset:
            raise _cut_short(name, offset)
        message = (kind.entry if messages else kind.head)()
        try:
            message.MergeFromString(data[offset : offset + size])
        except DecodeError as error:
            raise StoreError(
                f"{name}: the message at byte {offset} does not parse", hint=DAMAGED_HINT
            ) from error
        if not message.IsInitialized():
            raise StoreError(f"{name}: the message at byte {offset} lacks required fields", hint=NEWER_HINT)
        messages.append(message)
        offset += size
    has_head = kind.single or kind.head is not kind.entry
    if (has_head and not messages) or (kind.single and len(messages) > 1):
        raise StoreError(f"{name} has {len(messages)} messages, which cannot be", hint=DAMAGED_HINT)
    return Image(kind, tuple(messages), data[offset:])


def serialize_image(image: Image) -> bytes:
    """Give the bytes of an image, as CRIU itself writes them.

    Raises `StoreError` if a message lacks a required field.
    """
    parts = [_U32.pack(image.kind.leading)] if image.kind.leading else []
    parts.append(_U32.pack(image.kind.magic))
    try:
        for message in image.messages:
            body = message.SerializeToString()
            parts += (_U32.pack(len(body)), body)
    except EncodeError as error:
        raise StoreError(f"a {image.kind.name.lower()} image cannot be written: {error}") from error
    parts.append(image.tail)
    return b"".join(parts)


def read_image(path: Path, expected: ImageKind | None = None) -> Image:
    """Read and parse one image file; raises `StoreError` as `parse_image` does, or if it cannot be read."""
    return parse_image(read_bytes(path), path.name, expected)


def write_image(path: Path, image: Image) -> None:
    """Write one image file. Not durable and not atomic: that is the store's business."""
    path.write_bytes(serialize_image(image))


def read_bytes(path: Path) -> bytes:
    """Read a file whole; raises `StoreError` that names it if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"the image {path} cannot be read: {error.strerror}") from error


def _kind_of(data: bytes, name: str) -> tuple[ImageKind, int]:
    """Say the kind that the magics stand for, and where the frames begin."""
    for leading in (_IMAGE_MAGIC, _SERVICE_MAGIC, 0):
        prefix = _U32.pack(leading) if leading else b""
        end = len(prefix) + _U32.size
        if data.startswith(prefix) and len(data) >= end:
            kind = _BY_MAGIC.get(_U32.unpack_from(data, len(prefix))[0])
            if kind is not None and kind.leading == leading:
                return kind, end
    raise StoreError(f"{name} is no CRIU image of a known kind (it begins {data[:8].hex()})", hint=NEWER_HINT)


def _cut_short(name: str, offset: int) -> StoreError:
    return StoreError(f"{name} ends inside the frame at byte {offset}", hint=DAMAGED_HINT)
