"""`outlive store`: the epochs that this node holds, read from the disk, whether the agent runs or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from common.config import NodeConfig
from common.errors import StoreError
from common.model import EpochId
from outlive.cli.call import Call, Verbs, examples
from outlive.cli.compare import compare_files
from outlive.cli.output import Answer, Rows, wall_time, yes_no
from outlive.cli.running import configure_logs

if TYPE_CHECKING:  # the store needs numpy: loaded by the verbs that need it, not by every call
    from replica.store_reader import EpochRecord, Problem, StoreReader

_VERIFY_ATTEMPTS = 10


class StoredEpoch(msgspec.Struct, frozen=True, kw_only=True):
    """One committed epoch as programs read it; see `replica.store_reader.EpochRecord`."""

    workload: str
    epoch: EpochId
    stands_on: EpochId | None
    incarnation: str
    frozen_wall_s: float
    committed_wall_s: float
    bytes_on_disk: int
    pages: int
    pages_present: int
    levels: int
    folded: bool
    path: str


class StoreListAnswer(Answer, frozen=True, kw_only=True):
    """All epochs of the workloads asked about, oldest first for each."""

    epochs: tuple[StoredEpoch, ...]


class FoundProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong with a committed epoch."""

    epoch: EpochId
    path: str
    what: str


class StoreVerifyAnswer(Answer, frozen=True, kw_only=True):
    """Which epoch was read to the last byte, and what was wrong."""

    workload: str
    epoch: EpochId
    sound: bool
    problems: tuple[FoundProblem, ...]


class StoreShowAnswer(Answer, frozen=True, kw_only=True):
    """One epoch, the epochs that a restore of it reads, and the command that restores it by hand."""

    workload: str
    epoch: StoredEpoch
    chain: tuple[EpochId, ...]
    files: dict[str, int]
    """Size in bytes of each file of its own directory."""
    restore_command: str


class AsideEpochTold(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch that this node captured, nobody acknowledged, and another node's term superseded."""

    workload: str
    epoch: EpochId
    frozen_wall_s: float | None
    """None: what lies there cannot be read."""
    bytes_on_disk: int
    needs: EpochId | None
    """The epoch that has to be copied into `path` before it can be restored; None: it is whole."""
    path: str


class StoreAsideAnswer(Answer, frozen=True, kw_only=True):
    """All that lies aside, in the order of names."""

    epochs: tuple[AsideEpochTold, ...]


class StoreFoldAnswer(Answer, frozen=True, kw_only=True):
    """What a fold did; `levels_after` equals `levels_before` if nothing was due."""

    workload: str
    epoch: EpochId | None
    levels_before: int
    levels_after: int


class EpochType(click.ParamType[EpochId]):
    """An epoch as `outlive store list` names it."""

    name = "epoch"

    def convert(
        self, value: str | EpochId, param: click.Parameter | None, context: click.Context | None
    ) -> EpochId:
        """Read `t3-e1042`; a usage error for anything else."""
        try:
            return value if isinstance(value, EpochId) else EpochId.parse(value)
        except ValueError as error:
            self.fail(str(error), param, context)


@click.group(cls=Verbs, epilog=examples("outlive store list", "outlive store verify redis"))
def store() -> None:
    """Look at the epochs that this node holds. Works whether the agent runs or not."""


@store.command(
    "list",
    epilog=examples("outlive store list", "outlive store list redis --output json | jq '.epochs[-1]'"),
)
@click.argument("workload", required=False)
@click.pass_obj
def list_epochs(call: Call, workload: str | None) -> None:
    """List the committed epochs, oldest first. Each can be restored."""
    from replica.store_reader import stored_workloads

    config = call.config()
    names = [workload] if workload else stored_workloads(config.store_dir)
    found = tuple(_told(name, each) for name in names for each in _open(config, name).records())
    rows = [
        (
            each.workload,
            str(each.epoch),
            str(each.stands_on or "-"),
            wall_time(each.frozen_wall_s),
            _mebibytes(each.bytes_on_disk),
            f"{each.pages_present} of {each.pages}",
            str(each.levels),
            yes_no(each.folded),
        )
        for each in found
    ]
    columns = ("WORKLOAD", "EPOCH", "STANDS ON", "FROZEN AT", "SIZE", "PAGES", "LEVELS", "FOLDED")
    right = frozenset({"SIZE", "PAGES", "LEVELS"})
    view = Rows(columns, rows, right) if rows else f"no epoch is stored in {config.store_dir}"
    call.show(StoreListAnswer(epochs=found), view)


@store.command(epilog=examples("outlive store show redis", "outlive store show redis t3-e1042"))
@click.argument("workload")
@click.argument("epoch", type=EpochType(), required=False)
@click.pass_obj
def show(call: Call, workload: str, epoch: EpochId | None) -> None:
    """Show one epoch (default: the newest) and the command that restores it with nothing but criu."""
    reader = _open(call.config(), workload)
    details = reader.show(epoch or _newest(reader, workload))
    record = details.record
    answer = StoreShowAnswer(
        workload=workload,
        epoch=_told(workload, record),
        chain=tuple(each.id for each in details.chain),
        files={file.name: file.size_bytes for file in details.files},
        restore_command=details.command,
    )
    lines = [
        f"workload     {workload}",
        f"epoch        {record.id}",
        f"frozen at    {wall_time(record.frozen_wall_s)}",
        f"committed    {wall_time(record.committed_wall_s)}",
        f"directory    {record.path}",
        f"size         {_mebibytes(record.bytes_on_disk)} in {len(details.files)} files",
        f"pages        {record.pages}, of which {record.pages_present} lie here and the rest below",
        f"restore reads {', '.join(map(str, answer.chain))}",
        "by hand, as root:",
        f"  {details.command}",
    ]
    call.show(answer, *lines)


@store.command(
    epilog=examples(
        "outlive store verify redis",
        "outlive store verify redis t3-e1042",
        "outlive store verify redis --files",
    )
)
@click.argument("workload")
@click.argument("epoch", type=EpochType(), required=False)
@click.option(
    "--files",
    is_flag=True,
    help="Instead: compare the workload's directories on this standby with what is stored, and mend them.",
)
@click.option("--timeout", "timeout_s", default=86400.0, show_default=True, help="Of --files, in seconds.")
@click.pass_context
def verify(
    context: click.Context, workload: str, epoch: EpochId | None, files: bool, timeout_s: float
) -> None:
    """Read every byte that a restore of an epoch (default: the newest) would read, and check it.

    With --files the agent, which must run, compares every file that it has laid out here. Epochs go on
    meanwhile, and a takeover does not wait for it. Exits with 7 if something is wrong, mended or not.
    """
    call = context.ensure_object(Call)
    if files:
        if epoch is not None:
            raise click.UsageError("--files compares with the newest epoch that is laid out: name none")
        if compare_files(call, workload, timeout_s).different:
            context.exit(StoreError.exit_code)
        return
    chosen, found = _verified(call.config(), workload, epoch)
    problems = tuple(FoundProblem(epoch=each.epoch, path=str(each.path), what=each.what) for each in found)
    answer = StoreVerifyAnswer(workload=workload, epoch=chosen, sound=not problems, problems=problems)
    if problems:
        rows = [(str(found.epoch), found.path, found.what) for found in problems]
        call.show(answer, Rows(("EPOCH", "FILE", "PROBLEM"), rows))
        context.exit(StoreError.exit_code)
    call.show(answer, f"{workload} {chosen}: every byte that a restore would read is as it was committed")


@store.command(epilog=examples("outlive store fold redis"))
@click.argument("workload")
@click.pass_obj
def fold(call: Call, workload: str) -> None:
    """Shorten the newest epoch's chain now, while the agent is stopped; running, it does so by itself."""
    from replica.store import EpochStore

    configure_logs("warning")
    config = call.config()
    before = _open(config, workload).newest
    levels = before.levels if before else 0
    limits = config.store
    with EpochStore.open(
        config.store_dir,
        workload,
        min_free_bytes=limits.min_free_bytes,
        max_levels=limits.max_levels,
    ) as opened:
        report = opened.fold()
        newest = opened.newest
    answer = StoreFoldAnswer(
        workload=workload,
        epoch=newest.id if newest else None,
        levels_before=report.levels_before if report else levels,
        levels_after=report.levels_after if report else levels,
    )
    done = f"{answer.levels_before} levels are now {answer.levels_after}" if report else "nothing was due"
    call.show(answer, f"{workload} {answer.epoch or '-'}: {done}")


@store.command(epilog=examples("outlive store aside", "outlive store aside redis --output json"))
@click.argument("workload", required=False)
@click.pass_obj
def aside(call: Call, workload: str | None) -> None:
    """List epochs that this node captured as the primary, and that nobody acknowledged.

    They were kept when another node had taken over: none is ever restored by Outlive, and none is removed.
    NEEDS names the epoch that the directory lacks before it can be restored. Remove one with rm -r.
    """
    from outlive.aside import aside_directory, kept_aside
    from replica.store_reader import aside_level

    directory = aside_directory(call.config())
    found: list[AsideEpochTold] = []
    for each in kept_aside(directory):
        if workload in (None, each.workload):
            level, needs = aside_level(each.path, each.epoch)
            found.append(
                AsideEpochTold(
                    workload=each.workload,
                    epoch=each.epoch,
                    frozen_wall_s=level.header.frozen_wall_s if level else None,
                    bytes_on_disk=sum(file.size_bytes for file in level.files) if level else 0,
                    needs=needs,
                    path=str(each.path),
                )
            )
    rows = [
        (
            each.workload,
            str(each.epoch),
            "-" if each.frozen_wall_s is None else wall_time(each.frozen_wall_s),
            _mebibytes(each.bytes_on_disk),
            str(each.needs or "-"),
            each.path,
        )
        for each in found
    ]
    columns = ("WORKLOAD", "EPOCH", "FROZEN AT", "SIZE", "NEEDS", "DIRECTORY")
    view = Rows(columns, rows, frozenset({"SIZE"})) if rows else f"nothing lies aside in {directory}"
    call.show(StoreAsideAnswer(epochs=tuple(found)), view)


def _open(config: NodeConfig, workload: str) -> StoreReader:
    from replica.store_reader import StoreReader, stored_workloads

    if workload not in (held := stored_workloads(config.store_dir)):
        raise StoreError(
            f"nothing is stored of a workload {workload!r} in {config.store_dir}",
            hint=f"stored: {', '.join(held) or 'nothing'}",
        )
    return StoreReader.inspect(config.store_dir, workload)


def _verified(config: NodeConfig, workload: str, epoch: EpochId | None) -> tuple[EpochId, list[Problem]]:
    """Check an epoch; again if newer ones replaced what was being read, as they do while the agent runs."""
    from replica.store_reader import ReplacedError

    attempt = 1
    while True:
        reader = _open(config, workload)
        chosen = epoch or _newest(reader, workload)
        try:
            return chosen, reader.verify(chosen)
        except ReplacedError:
            if attempt == _VERIFY_ATTEMPTS:
                raise
        attempt += 1


def _newest(reader: StoreReader, workload: str) -> EpochId:
    if reader.newest is None:
        raise StoreError(f"no epoch of {workload} is committed here yet", hint="outlive status")
    return reader.newest.id


def _told(workload: str, record: EpochRecord) -> StoredEpoch:
    return StoredEpoch(
        workload=workload,
        epoch=record.id,
        stands_on=record.base,
        incarnation=record.incarnation,
        frozen_wall_s=record.frozen_wall_s,
        committed_wall_s=record.committed_wall_s,
        bytes_on_disk=record.bytes_on_disk,
        pages=record.pages,
        pages_present=record.pages_present,
        levels=record.levels,
        folded=record.folded,
        path=str(record.path),
    )


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
