"""Scores of cells → what rows are worth: means over pretraining seeds, and differences from the first row, paired."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from foundation.comparing.cells import MARK, finished
from foundation.comparing.plan import Cell, Comparison
from foundation.config import config_hash
from foundation.evaluation.leakage import verdicts
from foundation.evaluation.panels import read_metrics
from foundation.evaluation.protocols import RANDOM
from foundation.evaluation.scores import Score, from_rows, t_interval
from foundation.files import read_json
from shards.errors import DataError

PRETRAINED = "pretrained"
METRIC = "accuracy"


@dataclass(frozen=True)
class Value:
    """A row (or control) under one protocol, all in [0, 1]: mean over seeds and its 95 % t-interval.

    `values` by pretraining seed; of each, few-shot scores are means over draws. `difference` from the first row: mean
    and 95 % interval of the differences seed by seed; None for the first row, and where there is one seed.
    """

    row: str
    protocol: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    difference: tuple[float, float, float] | None = None
    untrained: float = math.nan
    """of the same network without training, mean over the same seeds"""


@dataclass(frozen=True)
class Results:
    """What a comparison found; `missing` names cells without scores, `health` the last monitors of each row."""

    protocols: tuple[str, ...]
    rows: dict[str, list[Value]]
    controls: dict[str, list[Value]]
    health: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]
    clean: tuple[str, ...]
    """what was compared and found to be apart"""
    facts: dict[str, Any]


def collect(comparison: Comparison) -> Results:
    """Read the scores of every finished cell. Rows without any are left out; controls are those of the first row.

    Rows whose networks differ have untrained encoders of their own, which stand as further controls.

    Raises DataError when cells were judged on different images: their data has changed on the way.
    """
    scores = {(c.row, c.seed): _scores(c) for c in comparison.cells if finished(comparison, c)}
    missing = tuple(c.config.name for c in comparison.cells if (c.row, c.seed) not in scores)
    names = [row.name for row in comparison.spec.rows]
    protocols = tuple(dict.fromkeys(s.protocol for found in scores.values() for s in found))
    rows: dict[str, list[Value]] = {}
    base: dict[str, dict[int, float]] = {}
    for name in names:
        by_seed = {seed: found for (row, seed), found in scores.items() if row == name}
        for protocol in protocols if by_seed else ():
            values = _values(by_seed, PRETRAINED, protocol)
            value = _value(name, protocol, values, base.get(protocol) if base else None)
            own = _values(by_seed, RANDOM, protocol).values()
            value = replace(value, untrained=math.fsum(own) / len(own) if own else math.nan)
            rows.setdefault(name, []).append(value)
            if name == names[0]:
                base[protocol] = values
    first = next(iter(rows), "")
    by_seed = {seed: found for (row, seed), found in scores.items() if row == first}
    controls = {
        name: [_value(name, protocol, _values(by_seed, name, protocol), None) for protocol in protocols]
        for name in dict.fromkeys(s.encoder for found in by_seed.values() for s in found if s.encoder != PRETRAINED)
    }
    for same in _networks(rows)[1:]:
        by_seed = {seed: found for (row, seed), found in scores.items() if row == same[0]}
        name = f"{RANDOM} of {', '.join(same)}"
        controls[name] = [_value(name, p, _values(by_seed, RANDOM, p), None) for p in protocols]
    health = {name: h for name in rows if (h := _health(comparison.of(name)))}
    every = [s for found in scores.values() for s in found]
    if len(tests := {(s.settings.get("data"), s.settings.get("train_data")) for s in every}) > 1:
        told = "; ".join(sorted(f"{data}, train {str(train)[:8]}" for data, train in tests))
        do = "delete judged.json of the cells with the older ones, and run the comparison again"
        raise DataError(f"cells were judged on different images: {told}", where=str(comparison.folder), do=do)
    return Results(protocols, rows, controls, health, missing, *leakage(every), facts(comparison))


def _networks(rows: Mapping[str, list[Value]]) -> list[list[str]]:
    """The rows in groups that have the same untrained encoder, by its scores."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, values in rows.items():
        groups.setdefault(tuple(value.untrained for value in values), []).append(name)
    return list(groups.values())


def _scores(cell: Cell) -> list[Score]:
    """The scores of this cell as the comparison asked for them; others of the run are somebody else's."""
    mark = read_json(cell.config.run_folder / MARK)
    return [s for s in from_rows(mark["scores"]) if s.metric == METRIC]


def leakage(scores: Sequence[Score]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the leakage reports say, and groups on both sides of the split: why scores may be too good, and why not."""
    found = verdicts(scores)
    shared = {int(s.settings.get("shared_groups") or 0) for s in scores} - {0}
    bad = [*(s for s, word in found.items() if word != "clean"), *(f"train and test share {n} groups" for n in shared)]
    return tuple(bad), tuple(s for s, word in found.items() if word == "clean")


def _values(by_seed: dict[int, list[Score]], encoder: str, protocol: str) -> dict[int, float]:
    """The score of each seed; of a control that does not depend on seeds, one."""
    found = {
        seed: s.mean
        for seed, scores in by_seed.items()
        for s in scores
        if (s.encoder, s.protocol) == (encoder, protocol)
    }
    if encoder not in (PRETRAINED, RANDOM) and len(set(found.values())) == 1:
        return dict(list(found.items())[:1])
    return found


def _value(row: str, protocol: str, values: dict[int, float], base: dict[int, float] | None) -> Value:
    if not values:
        return Value(row, protocol, math.nan, math.nan, math.nan, ())
    mean, low, high = t_interval(list(values.values()))
    paired = [values[seed] - base[seed] for seed in values if seed in base] if base else []
    difference = t_interval(paired, (-1.0, 1.0)) if len(set(paired)) > 1 else None  # equal ones: no spread to go by
    return Value(row, protocol, mean, low, high, tuple(values.values()), difference)


def _health(cells: Sequence[Cell]) -> dict[str, float]:
    """The last monitors of a row's runs, means over seeds."""
    last = [metrics[-1] for c in cells if (metrics := read_metrics(c.config.run_folder))]
    keys = [k for k in ("feature_std", "rankme", "target_variance") if any(k in row for row in last)]
    return {k: math.fsum(row[k] for row in last if k in row) / sum(k in row for row in last) for k in keys}


def facts(comparison: Comparison) -> dict[str, Any]:
    """What all rows share, what they differ in, and the hashes of their configurations."""
    config, spec = comparison.cells[0].config, comparison.spec
    return {
        "encoder": f"{config.model.size}/{config.model.patch} at {config.data.image_size} px",
        "samples": config.train.samples,
        "global_batch": config.train.global_batch,
        "seeds": list(spec.seeds),
        "differing": list(comparison.differing),
        "evaluate": spec.evaluate.model_dump(mode="json"),
        "configurations": {c.config.name: config_hash(c.config) for c in comparison.cells},
    }


def rank_correlation(comparison: Comparison, results: Results, protocol: str) -> tuple[float, int] | None:
    """Spearman's correlation of our scores with the published ones of the rows that have any, and how many: or None."""
    from scipy.stats import spearmanr

    published = {row.name: row.published for row in comparison.spec.rows if row.published is not None}
    pairs = [
        (published[name], value.mean)
        for name, values in results.rows.items()
        for value in values
        if name in published and value.protocol == protocol and value.values
    ]
    if len(pairs) < 4:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def to_json(results: Results) -> str:
    """All of it."""
    return json.dumps(asdict(results), indent=1)
