"""What the injector answers and what its caller makes of it; no process is touched."""

import errno
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import CaptureError, UnsupportedError
from primary.injection import (
    Answer,
    DescriptorLeftError,
    InjectionError,
    Stage,
    Status,
    inject,
    judge,
    parse,
    program,
)

SOURCE = Path(__file__).resolve().parents[2] / "native" / "inject.c"
DONE = Answer(
    Status.OK, error=0, stage=Stage.DETACHED, flags=3, thread=7, stopped_ns=123_456, borrowed_ns=45_678
)
PACKET = struct.pack("=IiiiIiQQ", 0x314A4E49, 0, 0, 16, 3, 7, 123_456, 45_678)


def failed(status: Status, error: int = 0) -> Answer:
    return replace(DONE, status=status, error=error, stage=Stage.STOPPED)


class TestAnswer:
    def test_is_read_as_it_was_packed(self) -> None:
        assert parse(PACKET) == DONE

    @pytest.mark.parametrize("length", [0, 1, 39, 41])
    def test_of_another_length_is_of_another_version(self, length: int) -> None:
        with pytest.raises(UnsupportedError, match="not of this version"):
            parse((PACKET + b"\0")[:length])

    def test_with_another_magic_number_is_of_another_version(self) -> None:
        with pytest.raises(UnsupportedError, match="another magic number"):
            parse(b"\0\0\0\0" + PACKET[4:])

    @pytest.mark.parametrize("offset", [4, 12])
    def test_with_an_unknown_status_or_stage_is_of_another_version(self, offset: int) -> None:
        with pytest.raises(UnsupportedError, match="99"):
            parse(PACKET[:offset] + struct.pack("=i", 99) + PACKET[offset + 4 :])

    @pytest.mark.parametrize("kind", [Status, Stage])
    def test_has_the_numbers_of_the_c_source(self, kind: type[Status] | type[Stage]) -> None:
        body = re.search(rf"enum {kind.__name__.lower()} {{(.*?)}};", SOURCE.read_text(), re.DOTALL)
        assert body
        numbers: dict[str, int] = {}
        for name, number in re.findall(r"^\s*(\w+)(?: = (\d+))?,", body[1], re.MULTILINE):
            numbers[name] = int(number) if number else max(numbers.values()) + 1
        assert numbers == {each.name: each.value for each in kind}


class TestJudgement:
    def test_of_success_holds_the_descriptor_and_what_it_cost(self) -> None:
        injection = judge(1, DONE, [9])
        assert (injection.descriptor, injection.stopped_us, injection.borrowed_us) == (9, 123, 45)
        assert injection.user_mode_only
        assert injection.healed_if_killed

    def test_of_success_without_a_descriptor_is_an_error(self) -> None:
        with pytest.raises(InjectionError, match="0 descriptors") as caught:
            judge(1, DONE, [])
        assert "RLIMIT_NOFILE" in caught.value.hint

    @pytest.mark.parametrize("status", [each for each in Status if each is not Status.OK])
    def test_of_every_failure_says_what_and_where(self, status: Status) -> None:
        with pytest.raises(
            (UnsupportedError, CaptureError), match=r"no userfaultfd of process 41: .* STOPPED"
        ):
            judge(41, failed(status), [])

    def test_names_the_kernels_reason(self) -> None:
        with pytest.raises(InjectionError, match="could not open one: Too many open files") as caught:
            judge(1, failed(Status.CALL_FAILED, errno.EMFILE), [])
        assert caught.value.status is Status.CALL_FAILED

    @pytest.mark.parametrize(
        "status", [Status.COMPAT, Status.NO_CODE, Status.SECCOMP_KEPT, Status.DISPATCHED]
    )
    def test_of_what_will_never_work_is_not_tried_again(self, status: Status) -> None:
        with pytest.raises(UnsupportedError) as caught:
            judge(1, failed(status), [])
        assert not caught.value.retryable
        assert caught.value.hint

    def test_of_a_descriptor_that_was_left_is_an_error_of_its_own(self) -> None:
        with pytest.raises(DescriptorLeftError) as caught:
            judge(1, failed(Status.LEFT_OPEN), [])
        assert not caught.value.retryable

    def test_of_any_other_failure_may_be_tried_again(self) -> None:
        with pytest.raises(InjectionError) as caught:
            judge(1, failed(Status.TRACED), [])
        assert caught.value.retryable


class TestProgram:
    def test_that_was_not_built_is_missed_with_a_hint(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="is not there") as caught:
            program(tmp_path / "outlive-inject")
        assert "make setup" in caught.value.hint

    def test_that_cannot_be_executed_is_missed_too(self, tmp_path: Path) -> None:
        (tmp_path / "outlive-inject").write_text("")
        with pytest.raises(UnsupportedError, match="is not there"):
            program(tmp_path / "outlive-inject")

    def test_that_is_there_is_found(self, tmp_path: Path) -> None:
        path = script(tmp_path, "exit 0")
        assert program(path) == path

    def test_that_cannot_be_started_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="cannot be started"):
            inject(tmp_path / "nothing", 1)

    def test_that_ends_without_an_answer_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InjectionError, match="injector ended with") as caught:
            inject(script(tmp_path, "exit 5"), 1)
        assert caught.value.status is None

    def test_that_does_not_answer_is_killed_at_the_deadline(self, tmp_path: Path) -> None:
        with pytest.raises(InjectionError, match=r"did not answer within 0\.1 s and was killed"):
            inject(script(tmp_path, "exec /bin/sleep 60"), 1, deadline_s=0.1)

    def test_that_says_something_else_is_of_another_version(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="not of this version"):
            inject(script(tmp_path, "printf hello >&3"), 1)


def script(directory: Path, command: str) -> Path:
    path = directory / "injector"
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path
