"""Robustness: what a classifier that learnt on clean images is worth on images of another quality."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foundation.errors import ConfigError
from foundation.evaluation import leakage, probe
from foundation.evaluation.controls import PIXELS, PixelComponents, pixel_features
from foundation.evaluation.corruptions import CORRUPTIONS, Corrupted
from foundation.evaluation.features import Listing, check_disjoint, extract, listing
from foundation.evaluation.metrics import resamples
from foundation.evaluation.protocols import RANDOM, Task
from foundation.evaluation.runs import run_folder, training_data
from foundation.files import write_whole
from foundation.interchange import load_encoder, random_encoder
from foundation.models.vit import ViT
from foundation.training import checkpoint
from foundation.training.data import cache, ruled
from shards.catalog import load as load_catalog
from shards.reader import Reader

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
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    crop: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    averaged: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], leakage.Leakage]:
    """Robustness of the encoder at `path` (run folder or checkpoint), beside the same network untrained.

    Learnt is the train split of the catalog `data`, tested its test split or that of `test`. Rows are kept in the run's
    `robustness.json` with the weights, the data and the verdict on leakage, which is returned too.
    """
    place = checkpoint.resolve(path)
    encoder, config = load_encoder(place, device, averaged)
    state = checkpoint.load(place, None)
    train, tested = (
        ruled(load_catalog(root, cache=cache(config.data)), config.data, known=True).select(split)
        for root, split in ((data, "train"), (test or data, "test"))
    )
    learnt = listing(Reader(train), train.classes)
    seen = listing(Reader(tested), tested.classes, learnt.classes)
    task = Task(learnt, seen, config.data.image_size, crop, device=device)
    encoders = {"pretrained": encoder, RANDOM: random_encoder(config, config.seed, device)}
    rows = robustness(encoders, task, kinds, seed, tell)
    verdict = leakage.find(training_data(config), tested, state.get("fingerprint"))
    settings = {
        "weights": f"{state['position']:,} samples" + ", averaged" * averaged,
        "data": f"{os.path.basename(os.path.abspath(data))} {tested.fingerprint[:8]}",
        "crop": crop,
        "image_size": config.data.image_size,
        **leakage.record(run_folder(path), verdict, tested),
    }
    content = {"settings": settings, "rows": [asdict(row) for row in rows]}
    write_whole(run_folder(path) / FILE, json.dumps(content, indent=1, allow_nan=False))
    return rows, verdict


def to_table(rows: Sequence[Row]) -> Table:
    """A `rich` table: one row per corruption and level, one column per encoder."""
    from rich.table import Table

    encoders = list(dict.fromkeys(row.encoder for row in rows))
    table = Table("corruption", "level", *encoders, title=f"accuracy on {rows[0].n_test:,} test images, 95 % interval")
    cases = dict.fromkeys((row.corruption, row.level) for row in rows)
    by_case = {(row.corruption, row.level, row.encoder): row for row in rows}
    for kind, level in cases:
        found = [by_case[kind, level, encoder] for encoder in encoders]
        cells = [f"{100 * r.accuracy:.1f} ({100 * r.low:.1f} – {100 * r.high:.1f})" for r in found]
        table.add_row(kind, "none" if level is None else f"{level:g}", *cells)
    return table
