"""Names the key of a node's file that nothing knows, and the key that was probably meant.

In: the file's tables as TOML reads them, and the type that they should become. Out: a sentence. msgspec
refuses such keys too, but says neither which of several tables it means nor what would be right. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import msgspec
from msgspec.inspect import Field, StructType, Type, UnionType, VarTupleType

_NOT_BUILT = {
    "mode": "output-commit is not built yet, every workload is replicated asynchronously, and what clients "
    "were told after the epoch that is restored is lost: leave the key out",
    "min_in_sync": "it belongs to output-commit, which is not built yet: leave the key out",
}


def unknown_key(tables: object, kind: type[msgspec.Struct]) -> str | None:
    """Return a sentence about the first key in `tables` that `kind` does not have; None if there is none."""
    return next(_strangers(tables, msgspec.inspect.type_info(kind), ""), None)


def _strangers(value: object, kind: Type, where: str) -> Iterator[str]:
    if isinstance(kind, UnionType):
        for choice in kind.types:
            yield from _strangers(value, choice, where)
    elif isinstance(kind, VarTupleType) and isinstance(value, list):
        for number, item in enumerate(value, start=1):
            name = item.get("name") if isinstance(item, dict) else None
            yield from _strangers(
                item, kind.item_type, f"{where} {repr(name) if name else f'number {number}'}"
            )
    elif isinstance(kind, StructType) and isinstance(value, dict):
        fields = {field.encode_name: field for field in kind.fields}
        for key, item in value.items():
            if key in fields:
                yield from _strangers(item, fields[key].type, _table(where, fields[key]))
            else:
                yield _sentence(key, where, list(fields))


def _table(where: str, field: Field) -> str:
    """Name a table as its header stands in the file; one within another by its key."""
    if where:
        return f"{where}, {field.encode_name}"
    return f"[[{field.encode_name}]]" if isinstance(field.type, VarTupleType) else f"[{field.encode_name}]"


def _sentence(key: str, where: str, known: list[str]) -> str:
    if where.startswith("[[workloads]]") and key in _NOT_BUILT:
        return f"{where}, {key}: {_NOT_BUILT[key]}"
    near = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(known)}"
    return f"{where or 'the file'} has an unknown key {key!r}: {advice}"
