"""What one node asks of another that it fences by SSH, and what that one answers.

In and out: the words of a command line (`outlive accept-fence …`), and one JSON object on its stdout. Both
ends are made here, so that they agree. Words are checked strictly: a forced command hands them over as
whoever has the key wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from common.errors import ProtocolError
from common.model import NAME_PATTERN

VERB = "accept-fence"

Outcome = Literal["confirmed", "refused", "unknown"]
"""What came of a fence. Only the first is a right to lead."""

_TERM = re.compile(r"(0|[1-9][0-9]{0,17})")
_MOST_WORKLOADS = 1000


class FenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Who is to be off for whom, and in which terms."""

    node: str
    by: str
    """The node that fences, and may lead the next term of these workloads."""
    terms: dict[str, int] = {}
    """For each workload the newest term that `by` knows: the node is to lead nothing up to it. May be
    empty for a fence that turns the whole node off."""
    up_to: int = 0
    """A later term that the node has begun unheard is fenced too, up to this one."""


class FenceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the fenced node says. It names what it was asked, so that no answer is taken for another's."""

    schema_version: int = 1
    node: str
    by: str
    terms: dict[str, int]
    outcome: Literal["confirmed", "refused", "unknown", "ready"]
    """`ready`: nothing was done, as was asked for, and a fence would be carried out."""
    reason: str
    newer: bool = False
    """It refused because a newer term is led: who asked is of the past."""


def words_of(request: FenceRequest, *, dry_run: bool = False) -> tuple[str, ...]:
    """Return the command line after the program's name."""
    workloads = [word for name, term in request.terms.items() for word in ("--workload", f"{name}={term}")]
    up_to = ("--up-to", str(request.up_to)) if request.up_to else ()
    dry = ("--dry-run",) if dry_run else ()
    return (VERB, "--node", request.node, "--by", request.by, *workloads, *up_to, *dry, "--output", "json")


def read_words(words: Sequence[str]) -> tuple[FenceRequest, bool]:
    """Return the request that `words_of` made, and whether nothing is to be done. Raises ProtocolError.

    Whatever stands before the verb is the other end's name for this program, and is passed over.
    """
    given = list(words)
    if VERB not in given:
        raise ProtocolError(f"{' '.join(given)!r} does not ask for {VERB}")
    rest = given[given.index(VERB) + 1 :]
    dry_run = False
    single: dict[str, str] = {}
    terms: dict[str, int] = {}
    while rest:
        option = rest.pop(0)
        if option == "--dry-run":
            dry_run = True
            continue
        value = rest.pop(0) if rest else ""
        if option == "--workload":
            name, term = read_term(value)
            if terms.setdefault(name, term) != term or len(terms) > _MOST_WORKLOADS:
                raise ProtocolError(f"{VERB}: {name} is named twice, or too much is named")
        elif option not in ("--node", "--by", "--up-to", "--output") or option in single:
            raise ProtocolError(f"{VERB} takes no {option!r} here")
        else:
            single[option] = value
    if single.get("--output") != "json":
        raise ProtocolError(f"{VERB}: --output json is needed")
    up_to = single.get("--up-to", "0")
    if not _TERM.fullmatch(up_to):
        raise ProtocolError(f"{VERB}: --up-to {up_to!r} is not a term")
    node, by = single.get("--node", ""), single.get("--by", "")
    return checked(FenceRequest(node=node, by=by, terms=terms, up_to=int(up_to))), dry_run


def read_term(text: str) -> tuple[str, int]:
    """Return workload and term of `NAME=TERM`. Raises ProtocolError."""
    name, separator, term = text.partition("=")
    if not separator or not NAME_PATTERN.fullmatch(name) or not _TERM.fullmatch(term):
        raise ProtocolError(f"--workload {text!r} is not NAME=TERM", hint="e.g. --workload redis=4")
    return name, int(term)


def checked(request: FenceRequest) -> FenceRequest:
    """Return the request. Raises ProtocolError if a node's name cannot be one."""
    for option, name in (("--node", request.node), ("--by", request.by)):
        if not NAME_PATTERN.fullmatch(name):
            raise ProtocolError(f"{VERB}: {option} {name!r} is not the name of a node")
    return request


def read_answer(output: bytes) -> FenceAnswer:
    """Return what the fenced node said. Raises ProtocolError."""
    try:
        return msgspec.json.decode(output, type=FenceAnswer)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not the answer of {VERB}: {error}") from error
