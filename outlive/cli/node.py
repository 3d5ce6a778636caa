"""The verbs about this node itself: agent, keeper, config, keys, doctor."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.config import Node, NodeConfig
from common.errors import AuthError, ConfigError, StoreError, UnsupportedError
from outlive.cli.call import Call, Verb, Verbs, examples
from outlive.cli.output import Answer, Rows
from outlive.cli.running import run_agent, run_keeper

if TYPE_CHECKING:  # the doctor loads what it examines: only when it is called
    from outlive.doctor import Check


class ConfigCheckAnswer(Answer, frozen=True, kw_only=True):
    """What a good file says, in short."""

    path: str
    node: str
    peers: tuple[str, ...]
    workloads: tuple[str, ...]


class ConfigShowAnswer(Answer, frozen=True, kw_only=True):
    """The whole configuration, defaults included."""

    path: str
    config: NodeConfig


class ConfigExampleAnswer(Answer, frozen=True, kw_only=True):
    """The example file."""

    toml: str


class KeyAnswer(Answer, frozen=True, kw_only=True):
    """A node's public key, and where its secret one is."""

    path: str
    public_key: str


class StoreKeyAnswer(Answer, frozen=True, kw_only=True):
    """Where a new key of the store is."""

    path: str


class LockAnswer(Answer, frozen=True, kw_only=True):
    """Which store is locked."""

    directory: str


class DoctorAnswer(Answer, frozen=True, kw_only=True):
    """All checks; `fit` if none failed."""

    fit: bool
    checks: tuple[Check, ...]


@click.command(cls=Verb, epilog=examples("outlive agent", "outlive --config ./node.toml agent"))
@click.pass_obj
def agent(call: Call) -> None:
    """Run this node's agent in the foreground until SIGTERM. Workloads outlive it."""
    run_agent(call.config_path)


@click.command(cls=Verb, epilog=examples("outlive keeper", "outlive --config ./node.toml keeper"))
@click.pass_obj
def keeper(call: Call) -> None:
    """Run this node's keeper in the foreground until SIGTERM. Start it first, stop it last."""
    run_keeper(call.config_path)


@click.group(cls=Verbs, epilog=examples("outlive config check", "outlive config example > node.toml"))
def config() -> None:
    """Check, show, or begin this node's file. docs/reference/config.md explains every key."""


@config.command(epilog=examples("outlive config check", "outlive config check --config ./new.toml"))
@click.pass_obj
def check(call: Call) -> None:
    """Say whether the file is good; if not, what is wrong and with which key (exit code 3)."""
    found = call.config()
    answer = ConfigCheckAnswer(
        path=str(call.config_path),
        node=found.node.name,
        peers=tuple(peer.name for peer in found.peers),
        workloads=tuple(workload.name for workload in found.workloads),
    )
    peers, workloads = (", ".join(names) or "none" for names in (answer.peers, answer.workloads))
    call.show(answer, f"{answer.path} is good: node {answer.node}; peers: {peers}; workloads: {workloads}")


@config.command(epilog=examples("outlive config show", "outlive config show --output json"))
@click.pass_obj
def show(call: Call) -> None:
    """Print the whole configuration, with the defaults that the file leaves out."""
    from outlive.declare import config_text

    found = call.config()
    call.show(ConfigShowAnswer(path=str(call.config_path), config=found), config_text(found).rstrip("\n"))


@config.command(epilog=examples("outlive config example > /etc/outlive/node.toml"))
@click.pass_obj
def example(call: Call) -> None:
    """Print a whole file to start from, with a comment for every key that it has."""
    text = example_config()
    call.show(ConfigExampleAnswer(toml=text), text.rstrip("\n"))


def example_config() -> str:
    """Return the example file's text."""
    return files("outlive").joinpath("example_node.toml").read_text(encoding="utf-8")


@click.group(cls=Verbs, epilog=examples("outlive keys generate", "outlive keys show"))
def keys() -> None:
    """Make, show or change the keys: those by which peers know this node, and that of its store."""


_DEFAULT_KEY = Path(Node(name="", address="").key_file)
_KEY_PATH = click.option(
    "--path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The secret key's file; by default what the configuration says.",
)


@keys.command(epilog=examples("outlive keys generate", "outlive keys generate --path /etc/outlive/node.key"))
@_KEY_PATH
@click.pass_obj
def generate(call: Call, path: Path | None) -> None:
    """Make this node's key pair, and print the public key for its peers' files. Never replaces one."""
    from common import keys as key_files

    chosen = path or _key_path(call)
    if chosen == _DEFAULT_KEY:
        chosen.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    pair = key_files.generate(chosen)
    call.talk(f"the secret key is in {chosen}; peers need this, as public_key:")
    call.show(KeyAnswer(path=str(chosen), public_key=pair.public), pair.public)


@keys.command("show", epilog=examples("outlive keys show"))
@_KEY_PATH
@click.pass_obj
def show_key(call: Call, path: Path | None) -> None:
    """Print this node's public key. The secret one is never printed."""
    from common import keys as key_files

    chosen = path or _key_path(call)
    public = key_files.load(chosen).public
    call.show(KeyAnswer(path=str(chosen), public_key=public), public)


@keys.command("generate-store-key", epilog=examples("outlive keys generate-store-key"))
@click.option(
    "--path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The key's file; by default what store.encryption_key_file says.",
)
@click.pass_obj
def generate_store_key(call: Call, path: Path | None) -> None:
    """Make the key that this node's store is encrypted with. Keep a copy: nothing else opens the store."""
    from common import keys as key_files

    chosen = path or Path(call.config().store.encryption_key_file)
    if chosen == Path():
        raise ConfigError("no place for the key is known", hint="--path, or store.encryption_key_file")
    key_files.generate_store_key(chosen)
    call.show(StoreKeyAnswer(path=str(chosen)), f"the store's key is in {chosen}")


@keys.command("lock-store", epilog=examples("outlive keys lock-store"))
@click.pass_obj
def lock_store(call: Call) -> None:
    """Take the store's key from the kernel: nobody reads the store until the agent starts again."""
    from common import fscrypt

    directory = call.config().store_dir
    if not fscrypt.lock(directory):
        raise StoreError(
            f"files in {directory} are in use: they can be read by who has them open, and nothing else can",
            hint="stop the agent, then lock the store again",
        )
    call.show(LockAnswer(directory=str(directory)), f"{directory} is locked")


@keys.group(cls=Verbs, epilog=examples("outlive keys rotate prepare", "outlive keys rotate activate"))
def rotate() -> None:
    """Change this node's key without an unprotected moment; docs/threat-model.md has all steps."""


@rotate.command(epilog=examples("outlive keys rotate prepare"))
@_KEY_PATH
@click.pass_obj
def prepare(call: Call, path: Path | None) -> None:
    """Make the next key, if there is none yet, and print its public half. Nothing uses it yet."""
    from common import keys as key_files

    chosen = path or _key_path(call)
    pair = key_files.prepare_next(chosen)
    call.talk("every peer must accept this before it is activated: add it to also_public_keys there, reload:")
    call.show(KeyAnswer(path=str(key_files.next_key_path(chosen)), public_key=pair.public), pair.public)


@rotate.command(
    epilog=examples("outlive keys rotate activate", "outlive keys rotate activate --without node-c")
)
@click.option("--without", multiple=True, metavar="NODE", help="Go on though this peer does not accept it.")
@click.pass_obj
def activate(call: Call, without: tuple[str, ...]) -> None:
    """Put the next key in this node's key file, once every peer lets it in. Reload to use it."""
    from common import keys as key_files
    from outlive.key_probe import probe_peers

    config = call.config()
    path = Path(config.node.key_file)
    answers = asyncio.run(probe_peers(config, key_files.load(key_files.next_key_path(path))))
    for peer, answer in answers.items():
        if answer != "accepts" and peer not in without:
            raise AuthError(
                f"{peer} {answer}: with the next key this node would be a stranger to it",
                hint=f"add the key to also_public_keys on {peer} and reload there, or: --without {peer}",
            )
    pair = key_files.activate_next(path)
    call.talk(f"the next key is in {path}, the former one in {key_files.former_key_path(path)};")
    call.talk("send SIGHUP to keeper and agent of this node, then let the peers drop the former key:")
    call.show(KeyAnswer(path=str(path), public_key=pair.public), pair.public)


@click.command(cls=Verb, epilog=examples("outlive doctor", "outlive doctor redis"))
@click.argument("workload", required=False)
@click.pass_context
def doctor(context: click.Context, workload: str | None) -> None:
    """Say whether this machine, or a workload, can be protected, and what is missing.

    Without a file of this node, the machine alone is checked. Exits with 12 if a check failed; warnings do
    not count.
    """
    from outlive.doctor import run_doctor, run_doctor_without_config

    call = context.ensure_object(Call)
    if workload is None and not call.config_path.exists():
        report = asyncio.run(run_doctor_without_config(call.config_path))
    else:
        report = asyncio.run(run_doctor(call.config(), workload))
    checks = report.checks
    answer = DoctorAnswer(fit=report.fit, checks=checks)
    rows = [(each.area, each.name, each.status, each.detail) for each in checks]
    hints = [f"{each.area} {each.name}: {each.hint}" for each in checks if each.hint and each.status != "ok"]
    call.show(answer, Rows(("AREA", "CHECK", "STATUS", "DETAIL"), rows), *(["", *hints] if hints else []))
    if not answer.fit:
        context.exit(UnsupportedError.exit_code)


def _key_path(call: Call) -> Path:
    """Where the configuration keeps the key; the default place while there is no configuration yet."""
    if call.config_path.exists():
        return Path(call.config().node.key_file)
    return _DEFAULT_KEY
