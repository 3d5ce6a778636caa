"""Every failure that an operator can meet, and what the process exits with because of it.

One class for each thing an operator does about it. A class's docstring says when it is raised;
the instance carries what happened and, where there is one, the next command to try. The exit codes
are a promise: `docs/reference/exit-codes.md` lists them and a test compares the two.
"""

from __future__ import annotations

from typing import ClassVar


class OutliveError(Exception):
    """Root of all errors that are shown to an operator; raised itself only for what has no better class.

    `message` says what failed and why in one sentence; `hint` what to do about it (may be empty).
    `retryable` tells a caller whether the same call may succeed later without anybody's help.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(OutliveError):
    """The configuration file is missing, unreadable, or says something that cannot be."""

    exit_code = 3


class UnreachableError(OutliveError):
    """No answer from an agent, a keeper or a peer."""

    exit_code = 4
    retryable = True


class WorkloadError(OutliveError):
    """A workload cannot be started, stopped or found."""

    exit_code = 5


class CaptureError(OutliveError):
    """An epoch could not be captured. The workload runs on; the next epoch is tried."""

    exit_code = 6
    retryable = True


class StoreError(OutliveError):
    """The epoch store refuses: damaged, of another version, or asked for what it does not hold."""

    exit_code = 7


class ProtocolError(OutliveError):
    """A peer said something that this version does not understand or does not accept."""

    exit_code = 8


class RestoreError(OutliveError):
    """A committed epoch could not be brought to life here."""

    exit_code = 9


class NoRightToLeadError(OutliveError):
    """A takeover or start was refused because another primary cannot be excluded."""

    exit_code = 10


class NoSpaceError(OutliveError):
    """A disk or memory limit stands in the way. Nothing that was committed is touched."""

    exit_code = 11
    retryable = True


class UnsupportedError(OutliveError):
    """This kernel, CRIU, or workload lacks or uses something that rules protection out."""

    exit_code = 12


class StaleTermError(OutliveError):
    """A message or order of an older term arrived after a newer one is known."""

    exit_code = 13


class AuthError(OutliveError):
    """Keys are missing, unreadable, too widely readable, or not those of a configured peer."""

    exit_code = 14


class LabError(OutliveError):
    """The lab of test hosts could not be built, driven or torn down."""

    exit_code = 15


class UnprotectedError(OutliveError):
    """A workload is down, or no standby could bring it to life if its host were lost now."""

    exit_code = 16


class ObjectiveMissedError(OutliveError):
    """A workload is protected, but more of its past could be lost than its `rpo_ms` allows."""

    exit_code = 17
    retryable = True


class MismatchError(OutliveError):
    """Verification found pages that were not what they should have been; they are being sent anew."""

    exit_code = 18


class UnsettledError(OutliveError):
    """A pause or resume is recorded here, but not all nodes of the workload are known to agree on it."""

    exit_code = 19
    retryable = True


class NoFailoverError(OutliveError):
    """If the primary's host were lost now, no other node would take a workload over by itself."""

    exit_code = 20


class HandoverError(OutliveError):
    """A workload was to be moved to another node, and runs on where it ran; nothing is lost."""

    exit_code = 21
    retryable = True


class FenceRefusedError(OutliveError):
    """A fence refused: the node is not off, or knows a newer term than who fenced it."""

    exit_code = 22


class FenceUnknownError(OutliveError):
    """Whether a node is off is not known: no fence method confirmed it."""

    exit_code = 23
    retryable = True
