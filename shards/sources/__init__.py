"""Where chips come from. A file in this folder that defines a Corpus is a kind of source; nothing else registers it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from shards.errors import DataError
from shards.sources.base import Corpus

__all__ = ["Row", "corpora", "corpus", "rows"]


@cache
def corpora() -> dict[str, type[Corpus]]:
    """Every kind of source by name."""
    found: dict[str, type[Corpus]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Corpus))
        found |= {c.kind: c for c in classes if c.__module__ == module.__name__ and hasattr(c, "kind")}
    return dict(sorted(found.items()))


def corpus(kind: str) -> type[Corpus]:
    """The kind of source with this name; raises DataError that names the nearest one, or what must be installed."""
    if kind not in corpora():
        near = difflib.get_close_matches(kind, corpora(), n=1)
        raise DataError(
            f"no kind of source is named {kind!r}" + (f" (did you mean {near[0]}?)" if near else ""),
            do="list them: foundation shards sources",
        )
    found = corpora()[kind]
    if missing := missing_modules(found):
        raise DataError(f"{kind} needs {', '.join(missing)}", do=f"pip install {' '.join(missing)}")
    return found


def missing_modules(found: type[Corpus]) -> list[str]:
    """The packages a kind of source needs that are not installed."""
    return [name for name in found.modules if find_spec(name) is None]


class Row(NamedTuple):
    """One line of `foundation shards sources`."""

    kind: str
    description: str
    url: str
    licence: str
    reason: str  # why it cannot be read here, or ""


def rows() -> list[Row]:
    """Every kind of source, and why it cannot be read here."""
    missing = {kind: missing_modules(found) for kind, found in corpora().items()}
    return [
        Row(kind, c.description, c.url, c.licence, f"needs {', '.join(missing[kind])}" if missing[kind] else "")
        for kind, c in corpora().items()
    ]
