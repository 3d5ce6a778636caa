"""Compiles the oracles and speaks to them. In: a directory. Out: the program's path; answers as dicts.

A program is named after a hash of its sources and of how it is compiled: the same text is compiled once,
and a program that a restored process has mapped is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
_MEMORY = ("mutator.c", "family.c", "paths.c", "ledger.c")
_FILES = (
    "files.c",
    "files_port.c",
    "files_workers.c",
    "files_judge.c",
    "files_held_check.c",
    "files_held.c",
    "files_contents.c",
    "files_attributes.c",
    "files_names.c",
    "files_blocks.c",
    "files_model.c",
)
_COMPILE = ("gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def build(directory: Path) -> Path:
    """Return the memory oracle, compiled into `directory` unless it is there. Raises CalledProcessError."""
    return _build(directory, "oracle", "oracle.h", _MEMORY)


def build_files(directory: Path) -> Path:
    """Return the file oracle, compiled into `directory` unless it is there. Raises CalledProcessError."""
    return _build(directory, "files", "files.h", _FILES)


def _build(directory: Path, name: str, header: str, parts: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for part in (header, *parts):
        digest.update((SOURCES / part).read_bytes())
    program = directory / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    directory.mkdir(parents=True, exist_ok=True)
    new = program.with_name(f"{program.name}.{os.getpid()}")
    subprocess.run([*_COMPILE, "-o", new, *(SOURCES / part for part in parts)], check=True)
    new.rename(program)
    return program


def ask(port: int, word: str, host: str = "127.0.0.1", timeout_s: float = 60.0) -> dict[str, Any]:
    """Send one word (see the programs' heads); return the answer. Raises OSError, EOFError if none comes."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(f"{word}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            part = connection.recv(65536)
            if not part:
                raise EOFError(f"the oracle ended in the middle of its answer to {word}")
            answer += part
    decoded: dict[str, Any] = json.loads(answer)
    return decoded
