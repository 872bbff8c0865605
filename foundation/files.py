"""Small files of a run, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from foundation.errors import StorageError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` under a temporary name, then rename: a full disk leaves the old file. Text becomes UTF-8.

    Of several writers the last one wins, whole. Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path.name} cannot be written: {error.strerror or error}",
            where=str(path.parent),
            do="free space, correct the permissions, or change run_root or name",
        ) from error
    return path


def check_new(folder: Path, what: str) -> None:
    """Raise StorageError for a place that is neither free nor an empty folder; `what` is to be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{what} is written into a new folder", where=str(folder), do="name another or remove it")


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises StorageError when it cannot be read or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path.name} cannot be read: {error}", where=str(path), do="delete it") from error
