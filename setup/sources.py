"""Where this machine gets its packages from: the text of apt's source files in, the main archive out.

Both formats are read: one-line (`*.list`) and deb822 (`*.sources`), as sources.list(5) describes them.
Pure except for `read_entries`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

APT_DIRECTORY = Path("/etc/apt")

# A source may follow a suite by its role instead of its name.
_ROLES = ("stable", "testing", "unstable", "sid")


@dataclass(frozen=True, slots=True)
class Entry:
    """One archive of binary packages. `signed_by` is a keyring's path, or empty if it names none."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


_ONE_LINE = re.compile(r"\s*deb\s+(?:\[(?P<options>[^]]*)]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)")


def parse_one_line(text: str) -> Iterator[Entry]:
    """Yield the `deb` lines of a `.list` file; comments, `deb-src` and broken lines are passed over."""
    for line in text.splitlines():
        match = _ONE_LINE.match(line.partition("#")[0])
        if match is None:
            continue
        options = dict(option.partition("=")[::2] for option in (match["options"] or "").split())
        yield Entry(
            uri=match["uri"],
            suites=(match["suite"],),
            components=tuple(match["rest"].split()),
            signed_by=_keyring(options.get("signed-by", "")),
        )


def parse_deb822(text: str) -> Iterator[Entry]:
    """Yield the enabled `deb` stanzas of a `.sources` file, one entry for each of their URIs."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                if name:
                    fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            yield Entry(
                uri=uri,
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
                signed_by=_keyring(fields.get("signed-by", "")),
            )


def read_entries(directory: Path = APT_DIRECTORY) -> list[Entry]:
    """Return what all source files under apt's configuration `directory` name, in apt's order."""
    parts = directory / "sources.list.d"
    entries: list[Entry] = []
    for path in [directory / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]:
        if path.is_file():
            parse = parse_deb822 if path.suffix == ".sources" else parse_one_line
            entries.extend(parse(path.read_text(encoding="utf-8", errors="replace")))
    return entries


def main_archive(entries: Iterable[Entry], distribution: str, codename: str) -> Entry | None:
    """Return the entry that is the distribution's own main archive, or None if the machine has none.

    Third parties name their suites after the distribution's too, so the address must carry the
    distribution's name (".../debian", a snapshot of it, or a mirror list "debian.list"), as all
    mirrors of it do. One that names the distribution's keyring goes first.
    """
    found = [
        entry
        for entry in entries
        if "main" in entry.components
        and any(suite in (codename, *_ROLES) for suite in entry.suites)
        and not entry.uri.startswith("cdrom:")
        and distribution in (PurePosixPath(part).stem for part in entry.uri.split("/")[1:])
    ]
    return min(
        found, key=lambda entry: f"{distribution}-archive-keyring" not in entry.signed_by, default=None
    )


def _keyring(value: str) -> str:
    """Return the first path that a Signed-By names; empty for key ids and keys written out."""
    first = re.split(r"[\s,]+", value.strip())[0]
    return first if first.startswith("/") else ""
