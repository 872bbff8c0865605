"""What every command prints with: one console, tables, and lines that can be copied."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# A pipe or a log file has no width of its own; 80 columns would break every table.
console = Console(width=None if sys.stdout.isatty() else 140)


def show(what: str, path: Path | str) -> None:
    """A line that says where something is; never wrapped, so that it can be copied."""
    console.print(f"{what:<14}{path}", soft_wrap=True, markup=False, highlight=False)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table of plain text."""
    table = Table(*header)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)
