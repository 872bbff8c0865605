"""What exists, and why what cannot run here cannot."""

from __future__ import annotations

from collections.abc import Callable

from foundation.config import describe
from foundation.models.families import FAMILY
from foundation.objectives.registry import OBJECTIVES
from foundation.training.engines import ENGINES
from kernels.rpe_attention import BACKENDS
from shards.sources import rows as source_rows

READY = "ready"


def _models() -> list[tuple[str, ...]]:
    return [(name, str(r.dim), str(r.depth), str(r.heads)) for name, r in FAMILY.items()]


def _objectives() -> list[tuple[str, ...]]:
    return [(name, row.description) for name, row in OBJECTIVES.items()]


def _engines() -> list[tuple[str, ...]]:
    return [(name, row.description, row.unavailable or READY) for name, row in ENGINES.items()]


def _attention() -> list[tuple[str, ...]]:
    return [(name, b.description, b.unavailable or READY) for name, b in BACKENDS.items()]


def _sources() -> list[tuple[str, ...]]:
    return [(row.kind, row.description, row.reason or READY) for row in source_rows()]


def _config() -> list[tuple[str, ...]]:
    return [(row.path, row.type, str(row.default), row.description) for row in describe()]


TABLES: dict[str, tuple[tuple[str, ...], Callable[[], list[tuple[str, ...]]]]] = {
    "models": (("size", "width", "blocks", "heads"), _models),
    "objectives": (("objective", "what it is"), _objectives),
    "engines": (("engine", "what it is", "here"), _engines),
    "attention": (("backend", "what it is", "here"), _attention),
    "config": (("key", "allowed", "default", "what it is"), _config),
    "sources": (("source", "what it is", "here"), _sources),
}


def rows(what: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of one table."""
    header, make = TABLES[what]
    return header, make()
