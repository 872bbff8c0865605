"""Scores: a number never stands without its interval, its seeds and the size of its test set."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foundation.evaluation.metrics import METRICS, certain, interval, resampled, resamples

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("encoder", "protocol", "metric", "score", "95 % interval", "seeds", "test images")


@dataclass(frozen=True)
class Score:
    """One metric of one encoder: `mean` with its 95 % interval [`low`, `high`], all in [0, 1].

    `per_seed` holds the value of each of `seeds`. With one value the interval is a bootstrap over the `n_test` test
    images, with several a t-interval over the seeds. `settings` records the protocol (and its draws, by sample key).
    """

    encoder: str
    protocol: str
    metric: str
    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    n_test: int
    settings: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The row of the table, as `HEADER` names it."""
        interval = f"{100 * self.low:.1f} – {100 * self.high:.1f}"
        seeds = str(len(self.seeds)) if len(self.seeds) > 1 else "bootstrap"
        number = f"{100 * self.mean:.1f} %"
        return self.encoder, self.protocol, self.metric, number, interval, seeds, str(self.n_test)

    @property
    def paired(self) -> str:
        """What the paired test against another encoder found, if it was made: difference in points and p."""
        found = self.settings.get("paired")
        return f"{100 * found['difference']:+.1f} ({p_value(found['p'])})" if found else ""

    @property
    def origin(self) -> str:
        """Which weights on which data, as far as recorded; and loudly, whether they have seen the test images."""
        parts = [f"{key} {self.settings[key]}" for key in ("weights", "data", "crop") if self.settings.get(key)]
        if isinstance(seen := self.settings.get("pretrained_on_test_images"), int) and seen:
            parts.append(f"PRETRAINED ON {seen} OF THE TEST IMAGES")
        verdict = self.settings.get("leakage")
        if isinstance(verdict, dict) and "sentence" in verdict:
            clean = verdict.get("verdict") == "clean"
            parts.append("no test image learnt" if clean else str(verdict["sentence"]))
        if shared := self.settings.get("shared_groups"):
            parts.append(f"TRAIN AND TEST SHARE {shared} GROUPS")
        return ", ".join(parts)


def p_value(p: float) -> str:
    """A p value as it is printed."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def t_interval(values: Sequence[float], within: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float, float]:
    """Mean and the ends of its two-sided 95 % t-interval, cut to `within`; the mean alone is its own interval."""
    from scipy.stats import t  # comes with scikit-learn

    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, mean, mean
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean, max(within[0], mean - half), min(within[1], mean + half)


def bootstrap(y: Tensor, probabilities: Tensor, metric: str, seed: int = 0, count: int = 1000) -> tuple[float, float]:
    """Ends of the 95 % interval of `metric` over resampled test sets; addressed by `seed`."""
    probabilities = certain(y, probabilities)
    parts = resamples(seed, "evaluation/bootstrap", count, len(y))
    values = torch.cat([resampled(metric, y, probabilities, counts) for counts in parts])
    return interval(metric, METRICS[metric](y, probabilities), values)


def score(
    encoder: str,
    protocol: str,
    metric: str,
    y: Tensor,
    probabilities: Sequence[Tensor],
    seeds: Sequence[int],
    settings: dict[str, Any] | None = None,
) -> Score:
    """The score of the class probabilities (fp32 [N, C] for each seed, or classes int64 [N]) against `y` int64 [N]."""
    probabilities = [certain(y, p) for p in probabilities]
    values = tuple(METRICS[metric](y, p) for p in probabilities)
    mean, low, high = t_interval(values)
    if len(values) == 1:
        low, high = bootstrap(y, probabilities[0], metric, seeds[0])
    return Score(encoder, protocol, metric, mean, low, high, tuple(seeds), values, len(y), settings or {})


def to_json(scores: Sequence[Score]) -> str:
    """All fields of the scores as a JSON array."""
    return json.dumps([asdict(s) for s in scores], indent=1)


def from_rows(rows: Sequence[dict[str, Any]]) -> list[Score]:
    """The scores that `to_json` wrote, parsed."""
    return [Score(**{**row, "seeds": tuple(row["seeds"]), "per_seed": tuple(row["per_seed"])}) for row in rows]


def to_rows(scores: Sequence[Score]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, header and rows of a table; what all scores come from is the title, else it is a column.

    A column tells how the scores differ from those of the untrained encoder on the same images, where that was tested.
    """
    header: tuple[str, ...] = HEADER
    rows = [s.cells() for s in scores]
    if any(s.paired for s in scores):
        header = (*header, "against random-init, paired")
        rows = [(*row, s.paired) for row, s in zip(rows, scores, strict=True)]
    origins = {s.origin for s in scores}
    if len(origins) <= 1:
        return "".join(origins), header, rows
    return "", (*header, "weights, data"), [(*row, s.origin) for row, s in zip(rows, scores, strict=True)]


def to_markdown(scores: Sequence[Score]) -> str:
    """A markdown table with one row per score, under a line that says what it is of."""
    title, header, cells = to_rows(scores)
    rows = [header, tuple("---" for _ in header), *(tuple(c.replace("|", "\\|") for c in row) for row in cells)]
    return (f"{title}\n\n" if title else "") + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def to_table(scores: Sequence[Score]) -> Table:
    """A `rich` table; print it with a rich console."""
    from rich.markup import escape
    from rich.table import Table

    title, header, cells = to_rows(scores)
    table = Table(*header, title=escape(title) or None)
    for row in cells:
        table.add_row(*map(escape, row))
    return table
