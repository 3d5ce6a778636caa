"""CRIU out of another suite of the distribution, in a folder of its own.

In: the machine's main archive, a suite, an empty directory. Out: `DIRECTORY/bin/criu`, which starts the
suite's criu with the suite's own libc, so that neither has to fit this machine's, wherever the directory
is moved. apt does the choosing, fetching and verifying, with lists, state and cache of its own below the
directory: the machine's package sources and state are neither read nor changed.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

from setup.sources import Entry

FETCH_LIMIT_S = 600

# By the kernel's name of the machine: Debian's name of it, and the dynamic loader that libc6 brings.
_ARCHITECTURES = {
    "x86_64": ("amd64", "ld-linux-x86-64.so.2"),
    "aarch64": ("arm64", "ld-linux-aarch64.so.1"),
}

_WRAPPER = """\
#!/bin/sh
# Starts the CRIU of the prefix beside this script with the prefix's own libc, wherever that was moved.
root=$(readlink -f "$0")
root=${{root%/bin/criu}}/root
exec "$root/{loader}" --library-path "$root/usr/{libraries}:$root/{libraries}" "$root/usr/sbin/criu" "$@"
"""


class UnpackError(Exception):
    """The suite has no CRIU for this machine, or it could not be fetched; the message says which."""


def is_supported(machine: str) -> bool:
    """Tell whether CRIU can be unpacked for this kind of machine (as `uname -m` names it)."""
    return machine in _ARCHITECTURES


def unpack(archive: Entry, suite: str, keyring: Path, directory: Path) -> Path:
    """Fetch and unpack `suite`'s criu and all it needs; return the path of its wrapper.

    `directory` must not exist; it is left half filled if this fails.

    Raises:
        UnpackError: the archive, the suite or its criu cannot be had.
    """
    machine = platform.machine()
    architecture, loader = _ARCHITECTURES[machine]
    root, apt = directory / "root", directory / "apt"
    root.mkdir(parents=True)
    for name in ("state/lists/partial", "cache/archives/partial", "none"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    source = f"deb [arch={architecture} signed-by={keyring}] {archive.uri} {suite}"
    (apt / "sources.list").write_text(f"{source} {' '.join(archive.components)}\n")

    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "none",
        "Dir::Etc::preferences": apt / "none/preferences",
        "Dir::Etc::preferencesparts": apt / "none",
        "APT::Architecture": architecture,
        "APT::Default-Release": "",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
    }
    apt_get = ["apt-get", "-qq", "--yes", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt_get, "update"])
    _run([*apt_get, "install", "--download-only", "--no-install-recommends", "criu"])
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    shutil.rmtree(apt)
    shutil.rmtree(root / "usr/share", ignore_errors=True)

    libraries = f"lib/{machine}-linux-gnu"
    # Older suites keep libc outside /usr.
    loaders = [
        path for path in (f"usr/{libraries}/{loader}", f"{libraries}/{loader}") if (root / path).is_file()
    ]
    if not loaders or not (root / "usr/sbin/criu").is_file():
        raise UnpackError("its packages do not hold what they should")
    wrapper = directory / "bin/criu"
    wrapper.parent.mkdir()
    wrapper.write_text(_WRAPPER.format(libraries=libraries, loader=loaders[0]))
    wrapper.chmod(0o755)
    return wrapper


def _run(command: list[str]) -> None:
    try:
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnpackError(f"{command[0]} took longer than {FETCH_LIMIT_S} s") from error
    if finished.returncode != 0:
        said = [line for line in finished.stderr.splitlines() if line.startswith("E:")] or [
            finished.stderr.strip()
        ]
        raise UnpackError(f"{command[0]}: {said[0]}")
