"""What one machine captured and another may or may not continue."""

import msgspec
import pytest

from common.errors import StoreError
from common.origin import Origin, decode_origin, encode_origin, obstacles, read_origin

HERE = Origin(
    arch="x86_64", kernel="6.1.0-25-amd64", criu="4.2.1", cpu_flags=("avx2", "sse2", "smep"), page_bytes=4096
)


def test_a_machine_continues_its_own_epochs() -> None:
    origin = read_origin("4.2.1")
    assert origin.cpu_flags
    assert obstacles(origin, origin) == []
    assert decode_origin(encode_origin(origin)) == origin


@pytest.mark.parametrize("damaged", [b"", b"{}", b'{"arch": 1}', b"\xff"])
def test_a_damaged_origin_is_refused(damaged: bytes) -> None:
    with pytest.raises(StoreError):
        decode_origin(damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "aarch64"}, "architecture"),
        ({"page_bytes": 65536}, "architecture"),
        ({"cpu_flags": ("avx2", "avx512f", "sse2")}, "avx512f"),
        ({"cpu_flags": ("sse2", "a_flag_of_2040")}, "a_flag_of_2040"),
        ({"kernel": "6.12.3"}, "older"),
        ({"criu": "4.3"}, "older"),
        ({"criu": "4.2.2"}, "older"),
    ],
)
def test_what_the_origin_had_more_of_is_an_obstacle(change: dict[str, object], words: str) -> None:
    (reason,) = obstacles(msgspec.structs.replace(HERE, **change), HERE)
    assert words in reason


@pytest.mark.parametrize(
    "change",
    [
        {"cpu_flags": ("sse2", "vmx", "smap", "hypervisor", "ibrs")},
        {"kernel": "6.1.77"},
        {"kernel": "5.10.0"},
        {"criu": "4.2"},
        {"criu": "4.1.1"},
    ],
)
def test_what_programs_cannot_see_or_is_newer_here_is_none(change: dict[str, object]) -> None:
    assert obstacles(msgspec.structs.replace(HERE, **change), HERE) == []
