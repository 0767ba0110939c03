"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of a report, before it becomes Markdown or HTML.

    title: a line above it; empty if there is none. notes: paragraphs below it. left_out: a line for each run that is in
    no row, which says why.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The head and the rows as a Markdown table."""
    lines = [head, *rows]
    first, *others = ("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def markdown(tables: Sequence[Table]) -> str:
    """The tables with their titles, notes and left-out runs, a blank line between each two blocks."""
    blocks = []
    for table in tables:
        blocks += [table.title] if table.title else []
        blocks += [markdown_table(table.head, table.rows), *table.notes]
        if table.left_out:
            blocks += ["Left out:", "\n".join(f"- {line}" for line in table.left_out)]
    return "\n\n".join(blocks)
