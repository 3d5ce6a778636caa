"""How a failed request to criu reads. In: its purpose, criu's log and last words. Out: an error of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import OutliveError

_ERROR_LINES: Final = 3
_LOG_TAIL_BYTES: Final = 16384
_NOISE: Final = ("RLIMIT_NOFILE", "Dumping FAILED")
"""What criu logs as an error though it is harmless (it runs without CAP_SYS_RESOURCE) or says nothing new."""


@dataclass(frozen=True, slots=True)
class Errand:
    """What a request is for, as it reads in an error, and where criu logs it (None: nowhere)."""

    what: str
    error: type[OutliveError]
    log_path: Path | None = None

    def failed(self, reason: str, stderr: str) -> OutliveError:
        """Make the error: criu's own error lines if it logged any, else the reason and what it said."""
        lines = _error_lines(self.log_path) or stderr.strip().splitlines()[-_ERROR_LINES:]
        said = "; ".join(dict.fromkeys(line for line in (reason, *lines) if line))
        hint = f"criu's log is {self.log_path}" if self.log_path else ""
        return self.error(f"criu could not {self.what}: {said or 'it does not say why'}", hint=hint)


def _error_lines(path: Path | None) -> list[str]:
    """Give the last errors of a log, without time stamps, or nothing if there is no log."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    errors = [line[line.index("Error (") :].strip() for line in lines if "Error (" in line]
    return [line for line in errors if not any(noise in line for noise in _NOISE)][-_ERROR_LINES:]
