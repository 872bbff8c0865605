"""Drift: how much of a target is speckle, that is, changes when the same scene is seen with new speckle.

SARATR-X v2 (arXiv 2607.23238) reports that the drift of a target under re-speckling predicts the accuracy of what is
learnt from it (Spearman -0.93 over its scales) and gives no formula that could be read. Here: every image x gets two
independent realisations x', x'' of L-look speckle (corruptions.speckle), and for a target t of M maps

    drift = sum_m E[(t_m(x') - t_m(x''))²] / (2 sum_m Var[t_m]),

E over images and positions, Var of one map over images, positions and both realisations. It is 0 for a target that does
not see speckle and 1 for one whose two values are as different as those of two places drawn at random: 1 less the
correlation of the two realisations. Multiplying or shifting a target changes nothing; maps weigh as in a squared error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foundation.config import Config, from_dict, load
from foundation.errors import ConfigError, DataError
from foundation.evaluation.corruptions import corrupted
from foundation.evaluation.figures import COLOURS, grid, plain, save
from foundation.evaluation.metrics import resamples
from foundation.files import write_whole
from foundation.objectives.histograms import HOG, SARHOG
from foundation.objectives.registry import OBJECTIVES, build
from foundation.objectives.targets import (
    FixedTarget,
    GaussianRatio,
    GradientRatio,
    LowPass,
    MeanScale,
    NormalisedPixels,
    Pixels,
    RatioTarget,
    StructuralScales,
)
from shards.augment import resize_center
from shards.catalog import Catalog
from shards.reader import Reader, Sample
from shards.schema import content_hash
from shards.stream import Batch

FILE, BATCH, RESAMPLES = "drift.json", 16, 1000
WHOLE = "all"
NAMES: dict[type, str] = {
    Pixels: "pixels",
    NormalisedPixels: "normalised pixels",
    LowPass: "low-pass pixels",
    HOG: "HOG",
    SARHOG: "SAR-HOG",
    GradientRatio: "gradient ratio",
    GaussianRatio: "Gaussian ratio",
    StructuralScales: "v2 scales",
    MeanScale: "v2 fused",
}
# Where configs/objectives/NAME.yaml departs from the defaults of a target; v2 with its scales apart, and their mean.
_V2 = {"radii": [3, 5, 9, 13, 17], "offset": 1e-6, "centre": "exclude"}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "fg-mae": ({"gaussian_window": 16},),
    "sar-hog": ({"radii": [9]},),
    "sar-jepa-gaussian": ({"centre": "exclude"},),
    "saratr-x-v2-target": ({**_V2, "fusion": "separate"}, {**_V2, "fusion": "equal"}),
}


@dataclass(frozen=True)
class Chip:
    """A sample and the hash of its pixels, by which its speckle is looked up."""

    sample: Sample
    name: str


class Shared(NamedTuple):
    """A target, and the objectives that have it."""

    objectives: tuple[str, ...]
    target: FixedTarget


@dataclass(frozen=True)
class Row:
    """Drift of a target (`map` «all») or of one of its maps under speckle of `looks`, 95 % bootstrap over images."""

    target: str
    map: str
    objectives: tuple[str, ...]
    looks: float
    drift: float
    low: float
    high: float
    images: int


def targets(objectives: Sequence[str] | None = None, channels: int = 1) -> tuple[list[Shared], list[str]]:
    """The different targets of objectives: names or YAML files, None: all.

    Also returned: a line for every objective that was left out, because its target is learnt. Raises ConfigError for
    an unknown name.
    """
    if unknown := [n for n in objectives or () if n not in OBJECTIVES and not n.endswith((".yaml", ".yml"))]:
        do = f"choose of {', '.join(OBJECTIVES)}, or name a YAML file"
        raise ConfigError(f"{', '.join(unknown)} is no objective", where="--objectives", do=do)
    found: dict[str, tuple[FixedTarget, list[str]]] = {}
    skipped = []
    for name in objectives or OBJECTIVES:
        for config in _configs(name, channels):
            target = getattr(build(config), "fixed", None)
            if not isinstance(target, FixedTarget):
                skipped.append(f"{name}: left out, its target is learnt")
                continue
            facts = {key: value for key, value in vars(target).items() if not isinstance(value, FixedTarget)}
            shared = found.setdefault(f"{type(target).__name__} {facts}", (target, []))[1]
            shared.append(name if name in OBJECTIVES else config.name)
    return [Shared(tuple(names), target) for target, names in found.values()], skipped


def _configs(name: str, channels: int) -> Iterator[Config]:
    """The configurations of an objective: the file, or its published values."""
    if name not in OBJECTIVES:
        yield load(Path(name))
        return
    for variant in VARIANTS.get(name, ({},)):
        objective = {"name": name, **variant}
        try:
            yield from_dict({"objective": objective, "model": {"channels": channels}})
        except ConfigError:  # frames that know the place of a patch
            yield from_dict({"objective": objective, "model": {"channels": channels, "positions": "sincos"}})


def pick(catalog: Catalog, count: int) -> list[Chip]:
    """`count` samples spread over the catalog, or all there are. Raises DataError for fewer than two."""
    reader = Reader(catalog)
    ids = torch.linspace(0, len(reader) - 1, min(count, len(reader)), dtype=torch.float64).round().long().tolist()
    if len(ids) < 2:
        raise DataError("drift needs at least two images", where=catalog.root, do="choose other sources")
    samples = [reader.valid(i) for i in ids]
    return [Chip(sample, content_hash(sample.pixels)) for sample in samples]


def drift(
    targets: Sequence[Shared],
    chips: Sequence[Chip],
    size: int,
    crop: int | None,
    looks: Sequence[float],
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows of every target, and of each of its maps where these are scales, for every number of looks."""
    rows: list[Row] = []
    for level in looks:
        moments: list[list[Tensor]] = [[] for _ in targets]
        for start in range(0, len(chips), BATCH):
            note(f"{level:g} looks: {start:,} of {len(chips):,} images")
            first, second = (respeckled(chips[start : start + BATCH], level, 2 * seed + i, size, crop) for i in (0, 1))
            for shared, parts in zip(targets, moments, strict=True):
                parts.append(_moments(shared.target.maps(first), shared.target.maps(second)))
        for shared, parts in zip(targets, moments, strict=True):
            rows += _rows(shared, torch.cat(parts), level, seed)
    return rows


def respeckled(chips: Sequence[Chip], looks: float, seed: int, size: int, crop: int | None) -> Tensor:
    """Chips with new speckle, speckled at native resolution, then cropped and resized: fp32 [B, C, size, size]."""
    batch = Batch.of([chip.sample for chip in chips])
    return resize_center(corrupted(batch, [chip.name for chip in chips], "speckle", looks, seed), size, crop)


def _moments(first: Tensor, second: Tensor) -> Tensor:
    """Mean over positions of (a - b)², (a + b) / 2 and (a² + b²) / 2: maps [B, M, h, w] twice → fp64 [B, M, 3]."""
    a, b = first.double().flatten(2), second.double().flatten(2)
    return torch.stack([(a - b).square().mean(2), (a + b).mean(2) / 2, (a.square() + b.square()).mean(2) / 2], dim=2)


def _ratio(moments: Tensor) -> Tensor:
    """Drift [...] of the maps of fp64 [..., M, 3] together; one that never changes has none."""
    difference, mean, square = moments.unbind(-1)
    spread = (2 * (square - mean.square())).sum(-1)
    difference = difference.sum(-1)
    return torch.where(difference == 0, 0.0, difference / spread)


def _rows(shared: Shared, moments: Tensor, looks: float, seed: int) -> Iterator[Row]:
    target, count = shared.target, len(moments)
    weights = torch.cat([*resamples(seed, "evaluation/drift", RESAMPLES, count)]) / count
    resampled = torch.einsum("rn,nmk->rmk", weights, moments)
    parts: dict[str, slice] = {WHOLE: slice(None)}
    if isinstance(target, RatioTarget) and not isinstance(target, SARHOG) and len(target.names) > 1:
        parts |= {name: slice(i, i + 1) for i, name in enumerate(target.names)}
    label = NAMES.get(type(target), type(target).__name__)
    label += f", window {target.window}" if isinstance(target, HOG) and target.window else ""
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for name, part in parts.items():
        low, high = _ratio(resampled[:, part]).quantile(edges).tolist()
        value = _ratio(moments.mean(0)[part]).item()
        yield Row(label, name, shared.objectives, looks, value, low, high, count)


def to_rows(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table: one row per target and map, one column per number of looks."""
    looks = list(dict.fromkeys(row.looks for row in rows))
    by_case = {(row.target, row.map, row.looks): row for row in rows}
    cells = []
    for target, name, objectives in dict.fromkeys((row.target, row.map, row.objectives) for row in rows):
        found = [by_case[target, name, number] for number in looks]
        texts = [f"{r.drift:.3f} ({r.low:.3f} – {r.high:.3f})" for r in found]
        cells.append((target, name, *texts, ", ".join(dict.fromkeys(objectives))))
    return ("target", "map", *(f"drift, L = {number:g}" for number in looks), "objectives"), cells


def write(out: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> Path:
    """Write `drift.json` into a folder: `settings` and `rows`."""
    content = {"settings": dict(settings), "rows": [asdict(row) for row in rows]}
    return write_whole(out / FILE, json.dumps(content, indent=1, allow_nan=False))


def drift_figure(rows: Sequence[Row], path: Path) -> Path:
    """A bar per target (dark) and per scale (light) with its 95 % interval, a panel per number of looks → PNG."""
    looks = list(dict.fromkeys(row.looks for row in rows))
    cases = list(dict.fromkeys((row.target, row.map) for row in rows))
    figure, axes = grid(1, len(looks), 2.0 + 4.0 * len(looks), 1.0 + 0.26 * len(cases))
    for column, (ax, number) in enumerate(zip(axes[0], looks, strict=True)):
        for at, case in enumerate(cases):
            row = next(r for r in rows if (r.target, r.map, r.looks) == (*case, number))
            ax.barh(at, row.drift, color=COLOURS[0], alpha=1.0 if row.map == WHOLE else 0.45, height=0.72)
            ax.plot([row.low, row.high], [at, at], color="0.15", linewidth=1.2)
            ax.annotate(f"{row.drift:.3f}", (row.high, at), (4, 0), textcoords="offset points", va="center",
                        fontsize=8, color="0.3")  # fmt: skip
        plain(ax).grid(axis="y", visible=False)
        labels = [target if name == WHOLE else f"{name}  " for target, name in cases]
        ax.set_yticks(range(len(cases)), labels if column == 0 else [""] * len(cases), fontsize=9)
        widest = max(row.high for row in rows if row.looks == number)
        ax.set(ylim=(len(cases) - 0.4, -0.6), xlim=(0, 1.15 * widest or 1))
        ax.set_title(f"new speckle of {number:g} look{'s' * (number > 1)}")
        ax.set_xlabel("drift: 0 same, 1 unrelated; 95 % interval over images")
    return save(figure, path)
