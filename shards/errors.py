"""Errors that say what happened, where, and what to do."""

from __future__ import annotations

from shards.redaction import redact


class ExplainedError(Exception):
    """Base of every error meant for a user: `what` happened, `where`, and what to `do`; secrets are taken out."""

    def __init__(self, what: str, *, where: str = "", do: str) -> None:
        self.what, self.where, self.do = what, where, do = redact(what), redact(where), redact(do)
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        super().__init__("\n".join([*lines, f"  do:    {do}"]))


class DataError(ExplainedError):
    """An input file, shard, index or catalog cannot be used."""
