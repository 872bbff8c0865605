"""Name → complete objective."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from foundation.config import Config
from foundation.errors import ConfigError
from foundation.objectives.reconstruction import MaskedReconstruction, sar_jepa

Objective = MaskedReconstruction


class Row(NamedTuple):
    """How an objective is built, and what it is."""

    build: Callable[[Config], Objective]
    description: str


OBJECTIVES = {
    "sar-jepa": Row(sar_jepa, "multi-scale gradient-ratio features of masked local windows (arXiv 2311.15153)"),
}


def build(config: Config) -> Objective:
    """The objective a configuration names. Raises ConfigError for an unknown name."""
    name = config.objective.name
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown objective {name!r}", where="objective.name", do=f"{hint}choose one of: {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[name].build(config)
