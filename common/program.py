"""Where a workload's program is looked for, and what an operator is told if it is not there.

In: a declaration. Out: paths as the workload sees them, and the error. The rules are runc's: a name with a
slash is a path from the working directory, any other is looked up in the workload's own PATH.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from common.bundle import process_environment
from common.errors import WorkloadError
from common.model import WorkloadSpec


def program_candidates(spec: WorkloadSpec) -> tuple[str, ...]:
    """Return where the program may lie, in the order in which it is looked for."""
    program = spec.command[0]
    if "/" in program:
        return (str(PurePosixPath(spec.working_directory, program)),)
    directories = process_environment(spec)["PATH"].split(":")
    return tuple(str(PurePosixPath(each, program)) for each in directories if each.startswith("/"))


def surely_missing(spec: WorkloadSpec) -> bool:
    """Tell cheaply whether the program cannot be there; False where only a look from inside would tell.

    Below another root a symbolic link may lead elsewhere, and declared files hide what the node has there.
    """
    candidates = program_candidates(spec)
    hidden = any(PurePosixPath(path).is_relative_to(item.path) for path in candidates for item in spec.files)
    if spec.root != "/" or hidden:
        return False
    return not any(os.path.isfile(path) and os.access(path, os.X_OK) for path in candidates)


def runc_misses_program(spec: WorkloadSpec, words: str) -> bool:
    """Tell whether runc's error is about the program itself; in its log the quotes are escaped."""
    return f'exec: "{spec.command[0]}": ' in words.replace('\\"', '"')


def missing_program(spec: WorkloadSpec) -> WorkloadError:
    """Return the error for a program that is not there, or not executable."""
    looked = ", ".join(program_candidates(spec)) or "nowhere, for its PATH names no directory"
    return WorkloadError(
        f"{spec.name} cannot start: its program {spec.command[0]} is no executable file below its root "
        f"{spec.root} (looked for: {looked})",
        hint="install it there on every node, or correct `command`; mounts below the root are not seen",
    )
