"""Numbers and moments as words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from foundation.planning.figures import BARS

COLUMNS = 32  # characters of a curve


def facts(event: Mapping[str, Any]) -> str:
    """What an event says beside its kind, position and time."""
    said = {key: value for key, value in event.items() if key not in ("kind", "position", "time")}
    words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in said.items())
    return ", ".join(words)


def bars(values: Sequence[float]) -> str:
    """A curve in one line of text: means of equal parts, from the lowest to the highest of them."""
    width = min(COLUMNS, len(values))
    cuts = [len(values) * n // width for n in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / ((high - low) or 1) * (len(BARS) - 1))] for mean in means)


def when(seconds: float) -> str:
    """A moment, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """A length of time."""
    return f"{seconds:.2f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
