"""Name → complete objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from foundation.config import Config
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
    """The objective a configuration names; configurations with an unknown name do not exist."""
    return OBJECTIVES[config.objective.name].build(config)
