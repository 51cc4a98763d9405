"""Tables for people: Rich on a terminal, plain aligned columns elsewhere; and human units, which live only here and in
`report.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print on stdout; the first column is text, the others are numbers."""
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join([title, *plain_lines(headers, rows)]) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def plain_lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces, at least two between them."""
    table = [headers, *rows]
    widths = [max(len(cell) for cell in column) for column in zip_longest(*table, fillvalue="")]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in table
    ]


def human_bytes(count: float) -> str:
    """Bytes in the largest unit that gives at least 1: 8.9 MB. Decimal units, as on disks."""
    return _human(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """A large number: 2.2 M."""
    return _human(count, 1000, ("", "k", "M", "G", "T")).strip()


def human_seconds(seconds: float) -> str:
    """A duration: 3.1 ms, 2.4 s."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _human(value: float, step: int, units: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= step and index < len(units) - 1:
        value /= step
        index += 1
    return f"{value:.0f} {units[index]}" if index == 0 else f"{value:.3g} {units[index]}"
