"""Robustness: what a classifier that learnt on clean images is worth on images of another quality."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foundation.errors import ConfigError
from foundation.evaluation import probe
from foundation.evaluation.controls import PIXELS, PixelComponents, pixel_features
from foundation.evaluation.corruptions import CORRUPTIONS, Corrupted
from foundation.evaluation.features import Listing, check_disjoint, extract
from foundation.evaluation.leaks import reason
from foundation.evaluation.metrics import resamples
from foundation.evaluation.protocols import RANDOM, Task
from foundation.evaluation.report import FIGURES
from foundation.evaluation.robustness_figure import robustness_figure
from foundation.evaluation.runs import bring_up_to_date, provenance, refuse_foreign, run_folder, training_data
from foundation.evaluation.scores import Score
from foundation.evaluation.sides import choose
from foundation.files import write_whole
from foundation.interchange import load_encoder, random_encoder
from foundation.models.vit import ViT
from foundation.training import checkpoint

if TYPE_CHECKING:
    from rich.table import Table

FILE, FIGURE = "robustness.json", "robustness.png"


@dataclass(frozen=True)
class Row:
    """Accuracy of an encoder's classifier under a corruption, with its 95 % bootstrap interval over test images.

    `level` None: no speckle was added.
    """

    encoder: str
    corruption: str
    level: float | None
    accuracy: float
    low: float
    high: float
    n_test: int
    seed: int

    def score(self, settings: dict[str, Any]) -> Score:
        """The same as a score, so that what is said of scores is said of it."""
        values = (self.accuracy, self.low, self.high, (self.seed,), (self.accuracy,), self.n_test)
        return Score(self.encoder, f"linear, {self.corruption} {self.level}", "accuracy", *values, settings)


def robustness(
    encoder_by_name: Mapping[str, ViT],
    task: Task,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows of every encoder and of the pixel control, under every level of the corruptions `kinds`.

    The linear probe of an encoder is fitted once, on the clean training samples. Raises ConfigError for an unknown
    corruption, DataError when a training sample is among the test samples.
    """
    if unknown := [kind for kind in kinds if kind not in CORRUPTIONS]:
        known = ", ".join(CORRUPTIONS)
        raise ConfigError(f"{', '.join(unknown)} is no corruption", where="--corruptions", do=f"choose of {known}")
    check_disjoint(task.train, task.test)
    cases = [(kind, level) for kind in kinds for level in CORRUPTIONS[kind].levels]
    tests = [case for case in cases if not _clean(*case)]
    listings = {"clean": task.test}
    listings |= {f"{kind} {level:g}": Corrupted.of(task.test, kind, level, seed) for kind, level in tests}
    rows: list[Row] = []
    for name, encoder in [*encoder_by_name.items(), (PIXELS, None)]:
        train, see = _eyes(encoder, task)
        features = []
        for number, (what, samples) in enumerate(listings.items(), start=1):
            tell(f"{name}: {what} ({number} of {len(listings)})")
            features.append(see(samples))
        predicted = probe.predict(train, task.train.y, torch.cat(features))[0].split(len(task.test))
        right = torch.stack(predicted).eq(task.test.y).double()
        values = zip(right.mean(1).tolist(), *intervals(right), strict=True)
        at = dict(zip([None, *tests], values, strict=True))
        for kind, level in cases:
            value, low, high = at.get((kind, level), at[None])
            shown = None if math.isinf(level) else level
            rows.append(Row(name, kind, shown, value, low, high, len(task.test), seed))
    return rows


def _clean(kind: str, level: float) -> bool:
    return level == CORRUPTIONS[kind].levels[0]


def _eyes(encoder: ViT | None, task: Task) -> tuple[Tensor, Callable[[Listing], Tensor]]:
    """Features of the training samples, and what gives those of others."""
    if encoder is None:
        train = pixel_features(task.train, task.crop)
        basis = PixelComponents.fit(train)
        return basis.project(train), lambda samples: basis.project(pixel_features(samples, task.crop))
    see = partial(extract, encoder, image_size=task.image_size, crop=task.crop, batch=task.batch, device=task.device)
    return see(task.train).x, lambda samples: see(samples).x


def intervals(right: Tensor) -> tuple[list[float], list[float]]:
    """Ends of the 95 % intervals of accuracies, fp64 [R, N] of right answers: `scores.bootstrap` of R rows at once."""
    count = right.shape[1]
    parts = [right @ counts.T / count for counts in resamples(0, "evaluation/bootstrap", 1000, count)]
    edges = torch.cat(parts, 1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return edges[0].tolist(), edges[1].tolist()


def robustness_run(
    path: Path,
    data: str,
    *,
    test: str | None = None,
    split: Path | None = None,
    allow_shared_groups: bool = False,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    crop: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    averaged: bool = False,
    report: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], dict[str, Any]]:
    """Robustness of the encoder at `path` (run folder or checkpoint), beside the same network untrained.

    Images are chosen as in `runs.judge_run`, and the settings, which are returned with the rows, say of them what those
    of a score say. Both are kept in the run's `robustness.json`, drawn in its figures, shown in its report (if
    `report`), and handed to MLflow.
    """
    refuse_foreign(path)
    place, run = checkpoint.resolve(path), run_folder(path)
    encoder, config = load_encoder(place, device, averaged)
    state = checkpoint.load(place, None)
    chosen = choose(data, test, config.data, split, allow_shared_groups=allow_shared_groups)
    task = Task(chosen.train, chosen.test, config.data.image_size, crop, device=device)
    encoders = {"pretrained": encoder, RANDOM: random_encoder(config, config.seed, device)}
    rows = robustness(encoders, task, kinds, seed, tell)
    chosen.keep(run)
    pictures = training_data(config)
    settings = {
        **provenance(run, state, chosen, data, split, pictures, averaged=averaged, allowed=allow_shared_groups),
        "crop": crop,
        "image_size": config.data.image_size,
    }
    content = {"settings": settings, "rows": [asdict(row) for row in rows]}
    file = write_whole(run / FILE, json.dumps(content, indent=1, allow_nan=False))
    robustness_figure(rows, run / FIGURES / FIGURE, reason(rows[0].score(settings)))
    bring_up_to_date(run, config, state.get("run_id"), [file], report=(pictures, chosen.tested) if report else None)
    return rows, settings


def to_table(rows: Sequence[Row], settings: dict[str, Any] | None = None) -> Table:
    """A `rich` table: one row per corruption and level, one column per encoder, under what `settings` say of all."""
    from rich.markup import escape
    from rich.table import Table

    encoders = list(dict.fromkeys(row.encoder for row in rows))
    parts = [f"accuracy on {rows[0].n_test:,} test images, 95 % interval", rows[0].score(settings or {}).origin]
    table = Table("corruption", "level", *encoders, title=escape("\n".join(filter(None, parts))))
    cases = dict.fromkeys((row.corruption, row.level) for row in rows)
    by_case = {(row.corruption, row.level, row.encoder): row for row in rows}
    for kind, level in cases:
        found = [by_case[kind, level, encoder] for encoder in encoders]
        cells = [f"{100 * r.accuracy:.1f} ({100 * r.low:.1f} – {100 * r.high:.1f})" for r in found]
        table.add_row(kind, "none" if level is None else f"{level:g}", *cells)
    return table
