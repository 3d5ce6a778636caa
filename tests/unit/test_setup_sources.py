"""The machine's own mirror is read out of both formats of apt's sources, and told from third parties'."""

from __future__ import annotations

from pathlib import Path

import pytest

from setup.install import suites_to_try
from setup.sources import Entry, main_archive, parse_deb822, parse_one_line, read_entries

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

DEB822 = f"""\
# the archive
Types: deb deb-src
# a comment within the stanza
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: {KEYRING}
"""


def test_deb822_stanzas_become_entries_with_continued_lines_joined() -> None:
    first, second = parse_deb822(DEB822)
    assert first == Entry(
        "http://mirror.example/debian", ("bookworm", "bookworm-updates"), ("main", "contrib"), KEYRING
    )
    assert second.uri == "http://mirror.example/debian-security"


@pytest.mark.parametrize("line", ["Enabled: no", "Types: deb-src"])
def test_deb822_stanzas_that_are_off_or_hold_sources_only_are_passed_over(line: str) -> None:
    assert not list(parse_deb822(f"Types: deb\nURIs: http://a/debian\nSuites: x\nComponents: main\n{line}\n"))


def test_deb822_keys_written_out_are_no_path_of_a_keyring() -> None:
    stanza = "Types: deb\nURIs: http://a/debian\nSuites: x\nSigned-By:\n -----BEGIN PGP-----\n .\n mQINBF\n"
    (entry,) = parse_deb822(stanza)
    assert entry.signed_by == ""


def test_one_line_format_with_and_without_options() -> None:
    text = f"""\
# deb http://off.example/debian bookworm main
deb http://mirror.example/debian/ bookworm main contrib # the archive
deb [ arch=amd64 signed-by={KEYRING} ] http://other.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
nonsense
"""
    assert list(parse_one_line(text)) == [
        Entry("http://mirror.example/debian/", ("bookworm",), ("main", "contrib")),
        Entry("http://other.example/debian", ("bookworm",), ("main",), KEYRING),
    ]


def test_both_formats_are_read_from_the_directory(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("deb http://one/debian bookworm main\n")
    (parts / "b.sources").write_text(DEB822)
    (parts / "a.list").write_text("deb http://two/debian bookworm main\n")
    (parts / "c.list.save").write_text("deb http://no/debian bookworm main\n")
    assert [entry.uri for entry in read_entries(tmp_path)] == [
        "http://one/debian",
        "http://two/debian",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]


def test_a_machine_without_sources_has_no_archive(tmp_path: Path) -> None:
    assert main_archive(read_entries(tmp_path), "debian", "bookworm") is None


@pytest.mark.parametrize(
    "uri",
    [
        "http://mirror.example/debian",
        "https://mirror.example/pub/linux/debian/",
        "http://snapshot.example/archive/debian/20250520T000000Z",
        "mirror+file:/etc/apt/mirrors/debian.list",
    ],
)
def test_every_usual_address_of_the_archive_is_known(uri: str) -> None:
    entry = Entry(uri, ("bookworm", "bookworm-updates"), ("main",))
    assert main_archive([entry], "debian", "bookworm") == entry


@pytest.mark.parametrize(
    "entry",
    [
        Entry("http://vendor.example/apt", ("bookworm",), ("main",)),
        Entry("http://mirror.example/debian-security", ("bookworm-security",), ("main",)),
        Entry("http://mirror.example/debian", ("bookworm-updates",), ("main",)),
        Entry("http://vendor.example/linux/debian", ("bookworm",), ("stable",)),
        Entry("cdrom:[Debian]/debian", ("bookworm",), ("main",)),
        Entry("http://mirror.example/ubuntu", ("bookworm",), ("main",)),
    ],
)
def test_what_is_not_the_main_archive_is_not_taken_for_it(entry: Entry) -> None:
    assert main_archive([entry], "debian", "bookworm") is None


def test_the_entry_signed_by_the_distribution_goes_first() -> None:
    vendor = Entry("http://vendor.example/debian", ("bookworm",), ("main",), "/etc/apt/keyrings/vendor.gpg")
    archive = Entry("http://mirror.example/debian", ("bookworm",), ("main",), KEYRING)
    assert main_archive([vendor, archive], "debian", "bookworm") == archive


def test_own_suite_first_then_only_newer_ones() -> None:
    assert suites_to_try("debian", "bookworm") == ("bookworm", "trixie", "forky", "sid")
    assert suites_to_try("debian", "forky") == ("forky", "sid")
    assert suites_to_try("ubuntu", "noble") == ("noble",)
