"""What every command prints with: one console, tables, and lines that can be copied."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# A pipe or a log file has no width of its own; 80 columns would break every table.
console = Console(width=None if sys.stdout.isatty() else 140)
EVERY = 30.0  # seconds before each line of a command that goes on, in a log


def show(what: str, path: Path | str) -> None:
    """A line that says where something is; never wrapped, so that it can be copied."""
    console.print(f"{what:<14}{path}", soft_wrap=True, markup=False, highlight=False)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table of plain text."""
    table = Table(*header)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr that a command goes on, and where it is: gives what takes the news.

    A line that renews itself on a terminal; elsewhere a line every `EVERY` seconds, so none of what is short.
    """
    messages = Console(stderr=True)
    if messages.is_terminal and not messages.is_dumb_terminal:
        with messages.status(escape(what)) as status:
            yield lambda text: status.update(escape(text))
        return
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            messages.print(text, markup=False, highlight=False, soft_wrap=True)

    yield tell
