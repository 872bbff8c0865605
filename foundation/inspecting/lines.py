"""Records of JSON lines that a kill may have cut: what can be read is read, what cannot is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from foundation.errors import StorageError

LATEST = 1e11  # seconds since 1970 or samples; more is a damaged number


class Lines(NamedTuple):
    """The rows of a file in its order, and how many lines were no rows."""

    rows: list[dict[str, Any]]
    damaged: int


def read_lines(path: Path, numbers: Sequence[str] = ("position", "time")) -> Lines:
    """The JSON objects of a file that hold these numbers; nothing where there is no file. Raises StorageError."""
    try:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise StorageError(what, where=str(path), do="correct the permissions") from error
    lines = [line for line in text.split("\n") if line.strip()]
    found = (row for row in map(_row, lines) if row is not None)
    rows = [row for row in found if all(sound(row.get(key)) and row[key] >= 0 for key in numbers)]
    return Lines(rows, len(lines) - len(rows))


def sound(value: Any) -> TypeGuard[float]:
    """Whether this is a number that a position, a time or a measurement may have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LATEST < value < LATEST


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
