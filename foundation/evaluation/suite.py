"""One protocol for several encoders, with the untrained encoder and the background-only control always beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foundation.errors import ConfigError
from foundation.evaluation import fewshot, knn, probe
from foundation.evaluation.controls import listing_background
from foundation.evaluation.features import Listing, Progress, check_disjoint, extract, image_batches, images, listing
from foundation.evaluation.scores import METRICS, Score, score
from foundation.models.vit import ViT
from shards.catalog import Catalog
from shards.stream import Reader

PROTOCOLS = ("knn", "linear", "fewshot")
RANDOM, BACKGROUND = "random-init", "background only"
Predict = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Task:
    """What every encoder of a suite is asked: train and test samples and how they are shown."""

    train: Listing
    test: Listing
    image_size: int
    crop: int | None = None
    batch: int = 64
    device: torch.device | str = "cpu"
    progress: Progress | None = None

    def features(self, encoder: ViT) -> tuple[Tensor, Tensor]:
        """Class tokens of the train and the test samples."""
        see = partial(extract, image_size=self.image_size, crop=self.crop, batch=self.batch, device=self.device,
                      progress=self.progress)  # fmt: skip
        return see(encoder, self.train).x, see(encoder, self.test).x

    def background(self) -> tuple[Tensor, Tensor]:
        """Texture numbers of the corners of the train and the test samples."""
        return listing_background(self.train, self.crop), listing_background(self.test, self.crop)


def evaluate(
    encoder_by_name: Mapping[str, ViT],
    catalog: Catalog,
    protocol: str,
    *,
    image_size: int,
    mode: str = "linear",
    shots: Sequence[int] = fewshot.SHOTS,
    seeds: Sequence[int] = fewshot.SEEDS,
    crop: int | None = None,
    test_catalog: Catalog | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Score]:
    """Scores of the encoders, then of the background-only control, on the train and test splits of the catalog.

    `protocol` is knn, linear or fewshot, `mode` linear or finetune. `test_catalog` gives the test split if it is
    another one. `mode`, `shots` and `seeds` are for «fewshot» alone.
    Raises ConfigError without a `random-init` encoder or with an unknown protocol, DataError when a training sample is
    among the test samples, the classes do not match or a class has too few samples.
    """
    train_catalog = catalog.select(("train",))
    test_source = (test_catalog or catalog).select(("test",))
    train = listing(Reader(train_catalog), train_catalog.classes)
    test = listing(Reader(test_source), test_source.classes, train.classes)
    task = Task(train, test, image_size, crop, batch, device, progress)
    return evaluate_task(encoder_by_name, task, protocol, mode=mode, shots=shots, seeds=seeds)


def evaluate_task(
    encoder_by_name: Mapping[str, ViT],
    task: Task,
    protocol: str,
    *,
    mode: str = "linear",
    shots: Sequence[int] = fewshot.SHOTS,
    seeds: Sequence[int] = fewshot.SEEDS,
) -> list[Score]:
    """`evaluate` on samples that are listed already."""
    problems = [] if protocol in PROTOCOLS else [f"protocol «{protocol}» is none of {', '.join(PROTOCOLS)}"]
    problems += [] if mode in ("linear", "finetune") else [f"mode «{mode}» is neither linear nor finetune"]
    problems += [] if RANDOM in encoder_by_name else [f"no «{RANDOM}» encoder stands beside the others"]
    if problems:
        raise ConfigError(
            "; ".join(problems), where="evaluate", do=f"pass {{'pretrained': ..., '{RANDOM}': random_encoder(...)}}"
        )
    check_disjoint(task.train, task.test)
    found: list[Score] = []
    for name, encoder in [*encoder_by_name.items(), (BACKGROUND, None)]:
        if protocol == "fewshot":
            found += _fewshot(name, encoder, task, mode, shots, seeds)
        else:
            found += _full(name, encoder, task, protocol)
    return found


def _full(name: str, encoder: ViT | None, task: Task, protocol: str) -> list[Score]:
    """Scores of a protocol that sees all training samples."""
    train, test = task.background() if encoder is None else task.features(encoder)
    settings: dict[str, Any] = {"n_train": len(task.train), "image_size": task.image_size, "crop": task.crop}
    if protocol == "knn":
        if encoder is None:  # ten numbers in ten units: cosines need them standardised
            mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
            train, test = (train - mean) / deviation, (test - mean) / deviation
        predicted = knn.predict(train, task.train.y, test)
        settings |= {"k": min(20, len(train)), "temperature": 0.07}
    else:
        predicted, chosen = probe.predict(train, task.train.y, test)
        settings |= chosen
    return [score(name, protocol, metric, task.test.y, [predicted], (0,), settings) for metric in METRICS]


def _fewshot(
    name: str, encoder: ViT | None, task: Task, mode: str, shots: Sequence[int], seeds: Sequence[int]
) -> list[Score]:
    """One accuracy for each number of shots; the background control has nothing to tune: its settings say «linear»."""
    train, classes = task.train, len(task.train.classes)
    if encoder is None or mode == "linear":
        x, z = task.background() if encoder is None else task.features(encoder)
        used, predict = "linear", _linear(x, train.y, z, classes)
    else:
        used, predict = "finetune", _finetune(encoder, task, classes)
    found = []
    for count in shots:
        draws = {seed: fewshot.draw(train.y, train.hashes, train.classes, count, seed) for seed in seeds}
        predicted = [predict(index, seed) for seed, index in draws.items()]
        settings = {"mode": used, "shots": count, "image_size": task.image_size, "crop": task.crop}
        settings |= asdict(fewshot.Recipe())
        settings["draws"] = {str(seed): [train.keys[i] for i in index.tolist()] for seed, index in draws.items()}
        title = f"{count}-shot {mode}"
        found.append(score(name, title, "accuracy", task.test.y, predicted, tuple(draws), settings))
    return found


def _linear(x: Tensor, y: Tensor, z: Tensor, classes: int) -> Predict:
    return lambda index, seed: fewshot.linear(x[index], y[index], z, classes, seed)


def _finetune(encoder: ViT, task: Task, classes: int) -> Predict:
    def predict(index: Tensor, seed: int) -> Tensor:
        shots = images(task.train.take(index), task.image_size, task.crop)
        test = image_batches(task.test, task.image_size, task.crop, task.batch, task.device)
        y = task.train.y[index]
        return fewshot.finetune(encoder, shots, y, test, classes, seed, device=task.device)

    return predict
