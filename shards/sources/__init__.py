"""Where chips come from. A file in this folder that defines a Corpus is a kind of source; nothing else registers it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from shards.errors import DataError
from shards.sources.base import Corpus, Part

__all__ = ["Row", "corpora", "corpus", "facts", "rows"]


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
    found = _named(kind)
    if missing := missing_modules(found):
        raise DataError(f"{kind} needs {', '.join(missing)}", do=f"pip install {' '.join(missing)}")
    return found


def _named(kind: str) -> type[Corpus]:
    if kind not in corpora():
        near = difflib.get_close_matches(kind, corpora(), n=1)
        raise DataError(
            f"no kind of source is named {kind!r}" + (f" (did you mean {near[0]}?)" if near else ""),
            do="list them: foundation shards sources",
        )
    return corpora()[kind]


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


def facts(kind: str) -> list[tuple[str, str]]:
    """What a user may want to know of a kind before packing: (what, text). Raises DataError for an unknown kind."""
    found = _named(kind)
    missing = missing_modules(found)
    listed = [
        ("kind", kind),
        ("what it is", found.description),
        ("layout", inspect.getdoc(found) or ""),
        ("obtain it", found.url),
        ("licence", found.licence),
        ("here", f"needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else "ready"),
    ]
    listed += [(f"--option {name}=", text) for name, text in found.extra.items()]
    listed += [(f"part {name}", f"split {part.split}{_counted(part)}") for name, part in found.parts.items()]
    return [(what, text) for what, text in listed if text]


def _counted(part: Part) -> str:
    """The published counts of a part, in words."""
    if isinstance(part.counts, Mapping):
        classes = ", ".join(f"{label} {count:,}" for label, count in part.counts.items())
        return f": {sum(part.counts.values()):,} files ({classes})"
    totals = part.counts if isinstance(part.counts, tuple) else (part.counts,) if part.counts else ()
    return f": {' or '.join(f'{total:,}' for total in totals)} files" if totals else ""
