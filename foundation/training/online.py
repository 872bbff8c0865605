"""Online probe: what labelled images say of the features while they are learnt.

Only the TRAIN split of a catalog is read, and divided once more: one part to learn from, another to be judged by. The
score chooses a checkpoint; chosen by the test split, that checkpoint's test score would be too good.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foundation.config import Config
from foundation.errors import DataError
from foundation.evaluation import knn, probe
from foundation.training.chosen import Chosen
from shards.addressed import bits, stream_key
from shards.catalog import Catalog


class Split(NamedTuple):
    """Sample ids to learn from and to be judged by, in equal shares of every class."""

    bank: list[int]
    held_out: list[int]


def split(classes: list[str | None], hashes: list[str], count: int, seed: int) -> Split:
    """Divide the labelled samples (class and content hash by sample id): up to `count` to learn from, and to be judged.

    Of each class the samples are put in an order that is a function of seed and content hash; of equal images one is
    taken; they go to the two parts in turn. Raises DataError when fewer than two classes have two images.
    """
    members: dict[str, list[int]] = {}
    for number in {h: i for i, (c, h) in reversed([*enumerate(zip(classes, hashes, strict=True))]) if c}.values():
        members.setdefault(str(classes[number]), []).append(number)
    usable = {name: ids for name, ids in sorted(members.items()) if len(ids) > 1}
    if len(usable) < 2:
        raise DataError(
            f"the online probe needs two classes of two different images, and found {len(usable)}",
            where="monitor.probe",
            do="name a catalog with a labelled train split, or monitor.probe=null",
        )
    keys = torch.tensor([stream_key(seed, h) for h in hashes])
    order = bits(seed, "monitor/probe", keys, 1)[:, 0].tolist()
    ranked = [sorted(ids, key=lambda i: (order[i], hashes[i])) for ids in usable.values()]
    bank, held = (_in_turn([ids[part::2] for ids in ranked], count) for part in (0, 1))
    return Split(bank, held)


def _in_turn(groups: list[list[int]], count: int) -> list[int]:
    """Up to `count` members, one of each group after another."""
    turns = max(map(len, groups))
    return [group[turn] for turn in range(turns) for group in groups if turn < len(group)][:count]


class Probe:
    """The labelled images of a run's probe; `name` is that of the measurement: scores of the same name compare."""

    def __init__(self, catalog: Catalog, config: Config, batch: int) -> None:
        """Reads metadata. Raises DataError without a labelled train split."""
        m, train = config.monitor, catalog.select("train")
        table = train.table(["class", "sha256"])
        parts = split(table["class"].to_pylist(), table["sha256"].to_pylist(), m.probe_images, config.seed)
        self.known = len(parts.bank)
        self.chosen = Chosen(train, [*parts.bank, *parts.held_out], config.data.image_size, batch)
        self.name = f"probe_knn {train.fingerprint[:12]} {self.known} {len(parts.held_out)}"
        self.linear = m.probe_linear

    def scores(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracies on the part that is held out, by features [N, D] and labels int64 [N] of the chosen images."""
        names = ("probe_knn", *(["probe_linear"] if self.linear else []))
        if not features.isfinite().all():
            return dict.fromkeys(names, float("nan"))
        y = torch.from_numpy(np.unique(labels.numpy(), return_inverse=True)[1])
        (x, z), (y, truth) = (value.tensor_split([self.known]) for value in (features, y))
        guesses = [knn.predict(x, y, z), *([probe.predict(x, y, z)[0]] if self.linear else [])]
        return {name: float((guess == truth).double().mean()) for name, guess in zip(names, guesses, strict=True)}
