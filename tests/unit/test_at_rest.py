"""How a store is kept at rest, told from what the kernel shows of the devices below it."""

import os
from pathlib import Path

import pytest

from outlive.doctor.at_rest import kept_at_rest


def device(blocks: Path, name: str, uuid: str = "", slaves: tuple[Path, ...] = ()) -> Path:
    made = blocks / name
    (made / "slaves").mkdir(parents=True)
    if uuid:
        (made / "dm").mkdir()
        (made / "dm" / "uuid").write_text(f"{uuid}\n")
    for slave in slaves:
        (made / "slaves" / slave.name).symlink_to(slave)
    return made


@pytest.mark.parametrize(
    ("below", "protected"),
    [((), False), (("CRYPT-LUKS2-1",), True), (("",), False), (("CRYPT-LUKS2-1", ""), False)],
)
def test_a_volume_is_as_protected_as_all_devices_below_it(
    tmp_path: Path, below: tuple[str, ...], protected: bool
) -> None:
    number = tmp_path.stat().st_dev
    blocks = tmp_path / "blocks"
    slaves = tuple(device(blocks, f"sd{at}", uuid) for at, uuid in enumerate(below))
    device(blocks, f"{os.major(number)}:{os.minor(number)}", "LVM-1" if below else "", slaves)
    assert kept_at_rest(tmp_path / "not" / "made" / "yet", blocks)[0] is protected


def test_a_luks_device_itself_is_told(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    device(tmp_path, f"{os.major(number)}:{os.minor(number)}", "CRYPT-LUKS2-abc")
    assert kept_at_rest(tmp_path, tmp_path) == (True, "on an encrypted device (dm-crypt)")
