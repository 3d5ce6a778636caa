"""Builds what is written in C into `native/build`, with the system's compiler.

In: `native/`. Out: the shim, the readers of pages and of files, the injector, and what the kernel runs for
us. They are built anew when a source or this file changes. Without them Outlive works too, with the stock
memory backend; without what the kernel runs, large files are read as a whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "native"
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
_SHARED = ("-fPIC", "-shared")
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "outlive-shim.so": (("shim.c",), _SHARED),
    "outlive-pages.so": (
        ("pages.c", "scan.c", "copy.c", "soft_dirty.c"),
        (*_SHARED, "-fvisibility=hidden"),
    ),
    "outlive-files.so": (("files.c", "writes.c"), (*_SHARED, "-fvisibility=hidden", "-pthread")),
    "outlive-inject": (("inject.c",), ()),
}


_KERNEL_PARTS = {"outlive-writes.bpf.o": "writes.bpf.c"}
_KERNEL_FLAGS = ("-target", "bpf", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")


class BuildError(Exception):
    """A part could not be built; the message is what the compiler said first."""


def is_built(directory: Path = SOURCES / "build") -> bool:
    """Tell whether all parts are there, built from these sources."""
    stamp = directory / ".stamp"
    return (
        stamp.is_file()
        and stamp.read_text() == _fingerprint()
        and all((directory / part).is_file() for part in (*_PARTS, *_KERNEL_PARTS))
    )


def build(directory: Path = SOURCES / "build", compiler: str = "cc") -> None:
    """Build all parts. Raises BuildError; parts that were there stay then."""
    directory.mkdir(exist_ok=True)
    (directory / ".stamp").unlink(missing_ok=True)
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no C compiler ({compiler})")
    for part, (sources, flags) in _PARTS.items():
        _compile([compiler, *_FLAGS, *flags], sources, directory / part)
    (directory / ".stamp").write_text(_fingerprint())


def build_for_kernel(directory: Path = SOURCES / "build", compiler: str = "clang") -> None:
    """Build what the kernel runs. Raises BuildError."""
    directory.mkdir(exist_ok=True)
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no {compiler}")
    architecture = sysconfig.get_config_var("MULTIARCH")
    headers = [f"-I/usr/include/{architecture}"] if architecture else []
    for part, source in _KERNEL_PARTS.items():
        _compile([compiler, *_KERNEL_FLAGS, *headers, "-c"], (source,), directory / part)


def _compile(command: list[str], sources: tuple[str, ...], part: Path) -> None:
    made = part.with_name(f"{part.name}.new")
    finished = subprocess.run(
        [*command, "-o", str(made), *(str(SOURCES / source) for source in sources)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        errors = [line for line in finished.stderr.splitlines() if "error" in line]
        raise BuildError((errors or finished.stderr.splitlines() or ["the compiler failed"])[0])
    os.replace(made, part)


def _fingerprint() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
