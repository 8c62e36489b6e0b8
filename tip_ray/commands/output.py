"""Text for people: on a terminal it fits the width, in a pipe it is plain and whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def write(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(f"{text}\n")


def warn(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"warning: {printable(text)}\n")


def printable(text: str) -> str:
    """`text` without control characters: a model's output may not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n " else repr(c)[1:-1] for c in text)


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that folds its cells on a narrow terminal; aligned plain columns in a pipe."""
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(*header, box=None, pad_edge=False, header_style="bold")
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            table.add_row(*(_escape(cell) for cell in row))
        console.print(table)
        return
    for line in aligned([header, *rows]):
        write(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, cells padded to their column's width, two spaces between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _escape(cell: str) -> str:
    from rich.markup import escape

    return escape(printable(cell))
