"""A guest with Debian 12's kernel (6.1: soft-dirty bits, no PAGEMAP_SCAN), under qemu without hardware help.

In: this machine's package archive, the checkout with what `make setup` made in it. Out: what the guest's
tests reported. The image is made once, in `.kernels`, and never written to afterwards.

    base.ext4   debootstrap's minimal system, with what the tests start       once
    payload     the checkout, .venv, .criu, native/build: a squashfs          each time
    boot        kernel and initramfs of the base, tests/kernels/init.sh as its first process
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setup import sources

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / ".kernels"

_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "mksquashfs": "squashfs-tools",
    "mke2fs": "e2fsprogs",
}
_SUITE = "bookworm"
_PYTHON = (3, 11)
"""That suite's; the checkout's .venv is used with it."""
_PACKAGES = (
    "linux-image-cloud-amd64",
    "kmod",
    "python3",
    "gcc",
    "libc6-dev",
    "runc",
    "conmon",
    "iproute2",
    "procps",
    "iptables",
    "nftables",
)
_INITRAMFS_MODULES = ("virtio_pci", "virtio_blk")
_IMAGE_MIB = 32_768
"""Most of it is a hole. With huge pages, a store of epochs, each dirty as a whole, takes more than 12 GiB."""
_MEMORY_MIB = 6144
"""With huge pages, what is captured and compared, all in memory, takes more than 3 GiB."""
_LAUNCHER = """\
#!/bin/sh
# The first process: finds the checkout on the second disk, and goes on with what stands there.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mountpoint -q /proc || mount -t proc proc /proc
root=$(sed 's/.*outlive.root=\\([^ ]*\\).*/\\1/' /proc/cmdline)
modprobe squashfs
mount -t squashfs -o ro /dev/vdb /mnt
exec sh "/mnt$root/tests/kernels/init.sh"
"""
_PAYLOAD = (
    *(".venv", ".criu", "pyproject.toml", "common", "primary", "replica", "outlive", "native", "setup"),
    *("tests", "bench"),
)
_REPORT_BYTES = 4 << 20
_BUILD_LIMIT_S = 1200


class GuestError(Exception):
    """The guest cannot be made or did not answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Guest:
    """An image that can be booted."""

    base: Path
    kernel: Path
    initrd: Path


def prepare(directory: Path = DIRECTORY) -> Guest:
    """Make the image, unless it is there already. As root; takes two minutes, and 2 GB of disk.

    Raises GuestError.
    """
    if platform.machine() != "x86_64":
        raise GuestError(f"the guest is x86_64, this machine is {platform.machine()}: not tried")
    guest = Guest(directory / "base.ext4", directory / "vmlinuz", directory / "initrd.img")
    stamp = directory / "stamp"
    if stamp.is_file() and stamp.read_text() == _recipe():
        return guest
    _install_programs()
    directory.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    archive = sources.main_archive(
        sources.read_entries(), "debian", platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    )
    if archive is None:
        raise GuestError("no archive of Debian is known to this machine's package sources")
    with tempfile.TemporaryDirectory(prefix="root-", dir=directory) as work:
        root = Path(work)
        say(f"making {guest.base}, once: debootstrap {_SUITE} ...")
        included = f"--include={','.join(_PACKAGES)}"
        _run("debootstrap", "--variant=minbase", included, _SUITE, str(root), archive.uri)
        with (root / "etc/initramfs-tools/modules").open("a") as modules:
            modules.writelines(f"{name}\n" for name in _INITRAMFS_MODULES)
        _run("chroot", str(root), "update-initramfs", "-u")
        (root / "run-tests").write_text(_LAUNCHER)
        (root / "run-tests").chmod(0o755)
        shutil.copyfile(next((root / "boot").glob("vmlinuz-*")), guest.kernel)
        shutil.copyfile(next((root / "boot").glob("initrd.img-*")), guest.initrd)
        for path in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("boot/*")):
            path.unlink()
        guest.base.unlink(missing_ok=True)
        size = f"{_IMAGE_MIB}M"
        _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", work, str(guest.base), size)
    stamp.write_text(_recipe())
    return guest


def boot(guest: Guest, plan: str, *, huge_pages: str, limit_s: float, log: Path) -> str:
    """Boot once, run `tests.kernels.inside` with `plan` (no spaces), return what it printed.

    `huge_pages` is what transparent_hugepage is set to. The console goes to `log`. Raises GuestError.
    """
    if sys.version_info[:2] != _PYTHON:
        wanted = ".".join(map(str, _PYTHON))
        raise GuestError(f".venv is of Python {platform.python_version()}; the guest has {wanted}")
    base_python = Path(getattr(sys, "_base_executable", sys.executable)).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="boot-", dir=guest.base.parent) as work:
        payload, report = Path(work, "payload"), Path(work, "report")
        paths = [str(ROOT / name) for name in _PAYLOAD]
        plain = ("-noI", "-noD", "-noF", "-noX")  # to compress takes longer than it saves
        _run("mksquashfs", *paths, str(payload), "-no-strip", "-quiet", "-no-progress", *plain)
        report.write_bytes(bytes(_REPORT_BYTES))
        # On a busy machine its timer may tick too late for the kernel to believe in it.
        command_line = (
            f"root=/dev/vda rw console=ttyS0 panic=-1 quiet no_timer_check mitigations=off init=/run-tests "
            f"transparent_hugepage={huge_pages} outlive.root={ROOT} outlive.python={base_python} "
            f"outlive.plan={plan}"
        )
        drives = [
            f"file={guest.base},format=raw,if=virtio,snapshot=on",
            f"file={payload},format=raw,if=virtio,readonly=on",
            f"file={report},format=raw,if=virtio,cache=unsafe",
        ]
        command = ["qemu-system-x86_64", "-M", "q35", "-smp", "2", "-cpu", "max"]
        command += ["-accel", "tcg,thread=multi", "-m", str(_MEMORY_MIB), "-no-reboot"]
        command += ["-display", "none", "-monitor", "none", "-serial", f"file:{log}", "-nic", "none"]
        command += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", command_line]
        for drive in drives:
            command += ["-drive", drive]
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=True,
                preexec_fn=lambda: os.nice(5),
            )
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"the guest did not end within {limit_s:.0f} s; its console: {log}") from error
        except subprocess.CalledProcessError as error:
            raise GuestError(f"qemu: {error.stderr.strip()[-500:]}") from error
        text = report.read_bytes().rstrip(b"\0").decode()
    if not text:
        raise GuestError(f"the guest ended without a report; its console: {log}")
    return text


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def _recipe() -> str:
    words = (_SUITE, *_PACKAGES, *_INITRAMFS_MODULES, str(_IMAGE_MIB), _LAUNCHER)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def _install_programs() -> None:
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        say(f"installing {' '.join(missing)} ...")
        apt_get = ("apt-get", "-qq", "--yes", "-oDPkg::Lock::Timeout=300")
        _run(*apt_get, "update")
        _run(*apt_get, "install", "--no-install-recommends", *missing)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_LIMIT_S,
            check=False,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise GuestError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
