"""The protocols: what one encoder, or a control that only has features, answers about the test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from foundation.evaluation import attentive, controls, fewshot, knn, probe
from foundation.evaluation.draws import Draws
from foundation.evaluation.features import Features, Listing, Progress, extract, image_batches, images
from foundation.evaluation.tuning import Recipe
from foundation.models.vit import ViT

PROTOCOLS = ("knn", "linear", "attentive", "fewshot", "finetune")
ALL = PROTOCOLS[:-1]
RANDOM, BACKGROUND, PIXELS = "random-init", "background only", controls.PIXELS
FULL = Recipe(
    "full", lr=1e-3, weight_decay=0.05, epochs=20, warmup_epochs=2, batch=64, pool="patches", batch_norm=True,
    layer_decay=0.7, smoothing=0.1, shift=1 / 16, flip=0.5, speckle=0.1,
)  # fmt: skip
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What is asked of the few-shot protocol (`mode`, `recipe`, `shots`, `seeds`) and of fine-tuning (`epochs`)."""

    mode: str = "linear"
    recipe: str = "published"
    shots: Sequence[int] = fewshot.SHOTS
    seeds: Sequence[int] = fewshot.SEEDS
    epochs: int = FULL.epochs


@dataclass(frozen=True)
class Task:
    """What every encoder of a suite is asked: train and test samples and how they are shown.

    `draws` are where few-shot draws are kept; `progress` is told (done, total) of features, `report` what is under way
    as well, (what, done, total).
    """

    train: Listing
    test: Listing
    image_size: int
    crop: int | None = None
    batch: int = 64
    device: torch.device | str = "cpu"
    progress: Progress | None = None
    report: Report | None = None
    draws: Draws = field(default_factory=Draws)

    def telling(self, what: str) -> Progress | None:
        """The progress of one thing."""
        return self.progress if self.report is None else partial(self.report, what)


@dataclass(frozen=True)
class Answer:
    """Class probabilities fp32 [S, M, C] for each of `seeds` under a protocol, and its settings."""

    protocol: str
    seeds: tuple[int, ...]
    probabilities: Tensor
    settings: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """An encoder, or a control by its name (`encoder` None); its features are computed once for all protocols."""

    name: str
    encoder: ViT | None
    task: Task
    keep_tokens: bool = False

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Features of the train and the test samples; a control's one kind stands for all."""
        task, sides = self.task, (self.task.train, self.task.test)
        if self.encoder is None:
            if self.name == BACKGROUND:
                numbers = [controls.listing_background(part, task.crop) for part in sides]
            else:
                numbers = [*controls.pca_features(*sides, task.crop)]
            found = [Features(x, x, p.y, p.classes, p.keys) for x, p in zip(numbers, sides, strict=True)]
            return found[0], found[1]
        see = partial(extract, self.encoder, image_size=task.image_size, crop=task.crop, batch=task.batch,
                      device=task.device, keep_tokens=self.keep_tokens)  # fmt: skip
        train = see(task.train, progress=task.telling(f"{self.name}: features of the training images"))
        return train, see(task.test, progress=task.telling(f"{self.name}: features of the test images"))

    def answers(self, protocol: str, options: Options) -> list[Answer]:
        """What it answers; one for each number of shots."""
        if protocol == "fewshot":
            return [_fewshot(self, options, count) for count in options.shots]
        if self.encoder is None and protocol in ("attentive", "finetune"):  # a control has numbers alone
            plain = _linear(self)
            return [replace(plain, protocol=protocol, settings={**plain.settings, "control": "linear probe"})]
        return [_BY_NAME[protocol](self, options)]


def _settings(task: Task) -> dict[str, Any]:
    return {"n_train": len(task.train), "image_size": task.image_size, "crop": task.crop}


def _one(protocol: str, subject: Subject, probabilities: Tensor, more: dict[str, Any]) -> Answer:
    return Answer(protocol, (0,), probabilities.float()[None], {**_settings(subject.task), **more})


def _knn(subject: Subject, options: Options) -> Answer:
    train, test = (part.x for part in subject.features)
    if subject.name == BACKGROUND:  # ten numbers in ten units: cosines need them standardised
        mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
        train, test = (train - mean) / deviation, (test - mean) / deviation
    y, classes = subject.task.train.y, len(subject.task.train.classes)
    found = knn.probabilities(train, y, test, classes)
    return _one("knn", subject, found, {"k": min(20, len(train)), "temperature": 0.07})


def _linear(subject: Subject, options: Options | None = None) -> Answer:
    train, test = subject.features
    return _one("linear", subject, *probe.probabilities(train.x, train.y, test.x, len(train.classes)))


def _attentive(subject: Subject, options: Options) -> Answer:
    (train, test), task = subject.features, subject.task
    assert train.tokens is not None
    assert test.tokens is not None
    told = task.telling(f"{subject.name}: attentive probes")
    found = attentive.predict(train.tokens, train.y, test.tokens, len(train.classes), device=task.device, progress=told)
    return _one("attentive", subject, *found)


def _tuned(subject: Subject, index: Tensor | None, seed: int, recipe: Recipe, told: Progress | None) -> Tensor:
    """Answers of a copy of the encoder tuned on all training images or on those at `index`."""
    task = subject.task
    assert subject.encoder is not None
    train = task.train if index is None else task.train.take(index)
    show = partial(images, image_size=task.image_size, crop=task.crop)
    held = None if index is None else show(train)  # a few shots are held, all images are read again and again
    return fewshot.finetune(
        subject.encoder,
        (lambda pick: show(train.take(pick))) if held is None else held,
        train.y,
        image_batches(task.test, task.image_size, task.crop, task.batch, task.device),
        len(task.train.classes),
        seed,
        device=task.device,
        recipe=recipe,
        progress=told,
    )


def _finetune(subject: Subject, options: Options) -> Answer:
    recipe = replace(FULL, epochs=options.epochs, warmup_epochs=min(FULL.warmup_epochs, options.epochs - 1))
    found = _tuned(subject, None, 0, recipe, subject.task.telling(f"{subject.name}: fine-tuning, steps"))
    return _one("finetune", subject, found, asdict(recipe))


def _fewshot(subject: Subject, options: Options, shots: int) -> Answer:
    """Answers for one number of shots; a control has nothing to tune: its settings say «linear»."""
    task, seeds = subject.task, options.seeds
    mode = "linear" if subject.encoder is None else options.mode
    recipe = fewshot.recipe_of(options.recipe, mode)
    title = f"{shots}-shot {options.mode}" + f", {options.recipe}" * (options.recipe != "published")
    draws = [task.draws.draw(task.train, task.test, shots, seed) for seed in seeds]
    found = []
    for seed, index in zip(seeds, draws, strict=True):
        if mode == "finetune":
            told = task.telling(f"{subject.name}: {title}, seed {seed}, steps")
            found.append(_tuned(subject, index, seed, recipe, told))
        else:
            x, z = (part.mean if recipe.pool == "patches" else part.x for part in subject.features)
            y, classes = task.train.y, len(task.train.classes)
            found.append(fewshot.linear(x[index], y[index], z, classes, seed, recipe))
    settings = {"mode": mode, "shots": shots, "image_size": task.image_size, "crop": task.crop, **asdict(recipe)}
    settings["draws"] = {str(seed): task.draws.digest(task.train, i) for seed, i in zip(seeds, draws, strict=True)}
    return Answer(title, tuple(seeds), torch.stack(found), settings)


_BY_NAME: dict[str, Callable[[Subject, Options], Answer]] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "finetune": _finetune,
}
