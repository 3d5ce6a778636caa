"""The benchmarks' own programs in C: compiled when they are needed, into a directory of the benchmark."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import LabError
from outlive.lab_state import run

_SOURCES = Path(__file__).resolve().parent


def compile_program(name: str, directory: Path) -> Path:
    """Compile `bench/NAME.c` into `directory`; return the program. Blocking. Raises LabError."""
    program = directory / name
    try:
        run(
            *(os.environ.get("CC", "cc"), "-O2", "-pthread", "-o", program, _SOURCES / f"{name}.c"),
            timeout_s=60.0,
        )
    except LabError as error:
        raise LabError(f"bench/{name}.c cannot be compiled: {error.message}") from error
    program.chmod(0o755)
    return program
