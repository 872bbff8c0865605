"""Where chips come from: the registry of source kinds."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

__all__ = ["SOURCES", "Kind", "rows"]


class Kind(NamedTuple):
    """One kind of source: what it holds, and the modules it needs (its reader first)."""

    description: str
    modules: tuple[str, ...]


SOURCES: dict[str, Kind] = {
    "folder": Kind("a folder or .tar of images, parent folder = class", ("shards.sources.folder", "PIL")),
    "synthetic": Kind("made-up speckled scenes and targets, with labels", ("shards.synthetic",)),
}


def rows() -> list[tuple[str, str, str]]:
    """(name, description, why it cannot run here or "") of every kind."""
    missing = {name: [m for m in kind.modules if find_spec(m) is None] for name, kind in SOURCES.items()}
    return [(n, k.description, f"needs {', '.join(missing[n])}" if missing[n] else "") for n, k in SOURCES.items()]
