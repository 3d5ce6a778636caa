"""Puts workloads into the node's TOML file and takes them out again, leaving the rest as it is written.

In: the file's path and a `WorkloadSpec` or a name. Out: the file, replaced at once and only after the whole
new text was read and found good, with every comment of its owner. A `[[workloads]]` table is appended as
text; taking one out removes its lines. Both are proved by parsing the result: where text and meaning could
differ (a header inside a multi-line string, say), the file is left alone and its owner asked to edit it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from common.config import NodeConfig, parse_config
from common.durable import atomic_write
from common.errors import ConfigError
from common.model import WorkloadSpec

_HEADER = re.compile(r"^\s*\[")
_WORKLOAD_HEADER = re.compile(r"^\s*\[\[\s*workloads\s*\]\]")
_WORKLOAD_PART = re.compile(r"^\s*\[\[?\s*workloads\s*\.")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def declare_workload(path: Path, spec: WorkloadSpec) -> NodeConfig:
    """Append `spec` to the file at `path`; return the configuration as it is now.

    Raises ConfigError, the file untouched, if the workload is declared already or the file would be bad.
    """
    with _locked(path):
        text = _read(path)
        if any(workload.name == spec.name for workload in parse_config(text, origin=str(path)).workloads):
            raise ConfigError(
                f"workload {spec.name!r} is declared already in {path}",
                hint=f"outlive start {spec.name}, or first: outlive unprotect {spec.name}",
            )
        separator = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        new = f"{text}{separator}{workload_block(spec)}"
        config = parse_config(new, origin=str(path))
        if spec not in config.workloads:
            raise ConfigError(f"{path}: workload {spec.name!r} would not be read back as it was meant")
        _replace(path, new)
    return config


def withdraw_workload(path: Path, name: str) -> NodeConfig:
    """Remove the declaration of `name` from the file at `path`; return the configuration as it is now.

    Raises ConfigError, the file untouched, if it is not declared or cannot be told from its surroundings.
    """
    with _locked(path):
        text = _read(path)
        old = parse_config(text, origin=str(path))
        names = [workload.name for workload in old.workloads]
        if name not in names:
            raise ConfigError(f"no workload {name!r} is declared in {path}", hint="outlive config show")
        new = _without_block(text, names.index(name))
        rest = tuple(workload for workload in old.workloads if workload.name != name)
        try:
            config = parse_config(new, origin=str(path))
        except ConfigError:
            config = None
        if config != msgspec.structs.replace(old, workloads=rest):
            raise ConfigError(
                f"cannot tell where the block of workload {name!r} begins and ends in {path}",
                hint="remove it by hand, then: outlive config check",
            )
        _replace(path, new)
    return config


def workload_block(spec: WorkloadSpec) -> str:
    """Return the `[[workloads]]` table that reads back as `spec`; what has its default is left out."""
    return "[[workloads]]\n" + "".join(f"{key} = {toml_value(item)}\n" for key, item in _said(spec).items())


def config_text(config: NodeConfig) -> str:
    """Return a whole file that reads back as `config`, with every default written out."""
    parts: list[str] = []
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        header = f"[[{field.name}]]" if isinstance(value, tuple) else f"[{field.name}]"
        for table in value if isinstance(value, tuple) else (value,):
            keys = [(key, item) for key, item in msgspec.structs.asdict(table).items() if item is not None]
            parts.append("\n".join([header, *(f"{key} = {toml_value(item)}" for key, item in keys)]) + "\n")
    return "\n".join(parts)


def toml_value(value: object) -> str:
    """Return `value` as TOML writes it on one line. Raises ConfigError for text that is not Unicode."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _toml_text(value)
        case tuple() | list():
            return f"[{', '.join(map(toml_value, value))}]"
        case msgspec.Struct():
            return toml_value(_said(value))
        case Mapping():
            pairs = [f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items()]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    raise TypeError(f"TOML has no way to write {type(value).__name__}")


def _said(struct: msgspec.Struct) -> dict[str, object]:
    """Return the keys whose value is not the default, in the order of the declaration."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    said = msgspec.structs.asdict(struct).items()
    return {key: item for key, item in said if item != defaults[key] and item != {}}


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_text(key)


def _toml_text(text: str) -> str:
    """JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not Unicode text, and TOML holds nothing else") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _without_block(text: str, index: int) -> str:
    """Return the text without the lines of its `index`-th `[[workloads]]` table and of the tables in it."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if _WORKLOAD_HEADER.match(line)]
    if index >= len(starts):
        return text  # written another way; the caller sees that nothing changed
    start = starts[index]
    end = start + 1
    while end < len(lines) and (not _HEADER.match(lines[end]) or _WORKLOAD_PART.match(lines[end])):
        end += 1
    if end < len(lines):  # comments right above the next header belong to that one
        while end > start and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
            end -= 1
    kept = "".join(lines[:start]).rstrip("\n") + "\n" + "".join(lines[end:])
    return kept.rstrip("\n") + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="outlive config check") from error


def _replace(path: Path, text: str) -> None:
    """Replace the file that `path` names, through symbolic links, keeping owner and mode."""
    target = path.resolve()
    status = target.stat()
    atomic_write(target, text.encode(), op="config.replace")
    try:
        os.chown(target, status.st_uid, status.st_gid)
        target.chmod(status.st_mode & 0o7777)
    except OSError as error:
        raise ConfigError(f"{path} is written, but its owner or mode changed: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other commands from replacing the file in between: what they add would be lost."""
    try:
        descriptor = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open the directory of {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
