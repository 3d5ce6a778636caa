"""The role machine as a diagram: Mermaid text made from the table, for `docs/concepts/roles.md`.

Run `python -m common.role_diagram` to print it. A test compares it with what stands in the page.
"""

from __future__ import annotations

from common.role_table import TABLE
from common.roles import MEANING


def edges() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return every change of state with the labels of the rows that make it."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in TABLE:
        for source in row.sources:
            if row.target is not None and row.target != source:
                labels = found.get((source, row.target), ())
                found[(source, row.target)] = tuple(dict.fromkeys((*labels, row.label)))
    return found


def mermaid() -> str:
    """Return the diagram. What every state does on hearing of a newer term is left out: it says so itself."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> starting"]
    for (source, target), labels in edges().items():
        shown = [label for label in labels if not label.startswith("newer term")]
        if shown:
            lines.append(f"    {source} --> {target}: {', '.join(shown).replace(':', ',')}")
    return "\n".join([*lines, "```"])


def table() -> str:
    """Return the states and what they mean, as a Markdown table."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in MEANING.items()]
    return "\n".join(["| state | meaning |", "|---|---|", *rows])


if __name__ == "__main__":
    print(mermaid())
    print()
    print(table())
