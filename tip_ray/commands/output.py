"""Text for people: on a terminal it fits the width, in a pipe it is plain and whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

_GAP = 2  # spaces between columns


def write(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(f"{text}\n")


def warn(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"warning: {printable(text)}\n")


def printable(text: str) -> str:
    """`text` without control characters: a model's output may not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n " else repr(c)[1:-1] for c in text)


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], more: str = "") -> None:
    """On a terminal, the first columns that fit its width; aligned plain columns in a pipe.

    Args:
        more: what to do to see columns that were left out.
    """
    console = Console(highlight=False)
    cells = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for line in aligned([header, *cells]):
            write(line)
        return
    shown = _fitting([header, *cells], console.width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in range(shown):
        numbers = all(row[column][:1].isdigit() or row[column] == "-" for row in cells)
        justify: JustifyMethod = "right" if numbers and cells else "left"
        table.add_column(Text(header[column]), justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row[:shown]))
    console.print(table)
    if shown < len(header):
        console.print(f"not shown: {', '.join(header[shown:])}{more}", style="dim")


def write_pairs(rows: Sequence[tuple[str, str]], styles: dict[str, str] | None = None) -> None:
    """(what, value) rows; on a terminal long values fold under themselves."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for line in aligned(rows):
            write(printable(line))
        return
    console.print(pairs_table(rows, styles or {}))


def pairs_table(rows: Sequence[tuple[str, str]], styles: dict[str, str]) -> Table:
    """The same as a rich table; `styles` by what a row is."""
    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(Text(what), Text(printable(value), style=styles.get(what, "")))
    return table


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, cells padded to their column's width, two spaces between."""
    widths = _widths(rows)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _fitting(rows: Sequence[Sequence[str]], width: int) -> int:
    """How many of the first columns fit; at least two, which then fold."""
    used = 0
    for count, column in enumerate(_widths(rows)):
        used += column + (_GAP if count else 0)
        if used > width:
            return max(2, count)
    return len(rows[0])
