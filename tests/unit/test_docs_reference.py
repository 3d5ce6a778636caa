"""The reference pages say what the code says: keys, defaults, exit codes, states, verbs, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from common import config, control, errors, model, pauses
from common.config import parse_config
from common.control import Verdict
from common.roles import MEANING
from outlive.cli.explain import ExplainAnswer
from outlive.cli.node import example_config
from outlive.cli.reference import reference
from outlive.cli.status import ALL, COLUMNS, DOWN, NEVER_HEARD, REFUSED, StatusAnswer
from outlive.declare import toml_value

DOCS = Path(__file__).parents[2] / "docs"

SECTIONS: dict[str, type[msgspec.Struct]] = {
    "[node]": config.Node,
    "[store]": config.Store,
    "[capture]": config.Capture,
    "[heartbeat]": config.Heartbeat,
    "[[peers]]": config.Peer,
    "[[fences]]": config.Fence,
    "[[freeze_hooks]]": config.FreezeHook,
    "[fences.ssh]": config.SshFence,
    "[etcd]": config.Etcd,
    "[[workloads]]": model.WorkloadSpec,
    "[[workloads.files]]": model.FilePath,
    "[workloads.health]": model.HealthCheck,
}


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row whose first cell is a code word."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def section(text: str, heading: str) -> str:
    """Return what stands between a heading and the next one."""
    after = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert len(after) == 2, f"one heading {heading!r} is expected"
    return re.split(r"^#+ ", after[1], maxsplit=1, flags=re.MULTILINE)[0]


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{toml_value(field.default_factory())}`"
    if field.default is msgspec.NODEFAULT:
        return "required"
    return "none" if field.default is None else f"`{toml_value(field.default)}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_documented_with_its_default(heading: str) -> None:
    documented = [(row[0], row[2]) for row in rows(section(read("reference/config.md"), f"`{heading}`"))]
    fields = msgspec.structs.fields(SECTIONS[heading])
    assert documented == [(f"`{field.name}`", default_of(field)) for field in fields]


def test_every_section_of_the_file_is_documented() -> None:
    names = {heading.strip("[]") for heading in SECTIONS if "." not in heading}
    assert names == {field.name for field in msgspec.structs.fields(config.NodeConfig)}


def test_the_example_is_the_one_that_the_command_prints_and_is_good() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", read("reference/config.md"), re.MULTILINE | re.DOTALL)
    assert example == example_config()
    assert parse_config(example, origin="the example").workloads


def test_the_exit_codes_are_those_of_the_errors() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    ours = [kind for kind in classes if issubclass(kind, errors.OutliveError)]
    expected = {(kind.exit_code, kind.__name__, "yes" if kind.retryable else "no") for kind in ours}
    assert len({code for code, _, _ in expected}) == len(expected)
    lines = re.findall(r"^\| (\d+) \| `(\w+)` \| (yes|no) \|", read("reference/exit-codes.md"), re.MULTILINE)
    assert {(int(code), kind, again) for code, kind, again in lines} == expected


def test_the_command_line_page_is_what_the_verbs_say() -> None:
    assert read("reference/cli.md") == reference(), "python -m outlive.cli.reference > docs/reference/cli.md"


def test_the_status_page_has_the_columns_and_the_states() -> None:
    page = read("reference/status.md")
    assert [row[0] for row in rows(section(page, "The columns"))] == [f"`{column}`" for column in COLUMNS]
    assert {row[0].strip("`"): row[1].rstrip(" |") for row in rows(section(page, "States"))} == dict(MEANING)


def test_the_status_page_has_the_fixed_words() -> None:
    page = read("reference/status.md")
    words = (ALL, NEVER_HEARD, REFUSED, *DOWN, *get_args(Verdict))
    assert [word for word in words if f"`{word}`" not in page] == []
    assert set(MEANING) >= DOWN


def test_the_status_page_has_every_json_key() -> None:
    text = section(read("reference/status.md"), "JSON")
    top, *tables = re.split(r"^(?:Each of )?`(?:\w+)`:$", text, flags=re.MULTILINE)
    kinds = [
        control.PeerStatus,
        control.WorkloadStatus,
        control.LeaseStatus,
        control.CaptureStatus,
        pauses.Pause,
        control.ReplicaProgress,
        control.SendingProgress,
        control.VerificationProgress,
    ]
    assert len(tables) == len(kinds)
    for kind, table in zip(kinds, tables, strict=True):
        assert [row[0].strip("`") for row in rows(table)] == list(kind.__struct_fields__)
    for key in StatusAnswer.__struct_fields__:
        assert f"`{key}`" in top


def test_the_page_on_explain_has_every_word_and_key() -> None:
    page = read("reference/explain.md")
    assert [row[0].strip("`") for row in rows(section(page, "The failures"))] == list(
        get_args(control.Failure)
    )
    assert [row[0].strip("`") for row in rows(section(page, "The outcomes"))] == list(
        get_args(control.TakeoverOutcome)
    )
    top, *tables = re.split(r"^Each of `(?:\w+)`:$", section(page, "JSON"), flags=re.MULTILINE)
    for kind, table in zip((control.Explanation, control.Prospect), tables, strict=True):
        assert [row[0].strip("`") for row in rows(table)] == list(kind.__struct_fields__)
    for key in ExplainAnswer.__struct_fields__:
        assert f"`{key}`" in top


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [DOCS / "index.md", *(DOCS / "reference").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []
