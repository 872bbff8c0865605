"""Protocols for several encoders, with the untrained encoder and the controls always beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from foundation.errors import ConfigError, DataError
from foundation.evaluation import fewshot, paired
from foundation.evaluation.features import check_disjoint
from foundation.evaluation.metrics import METRICS
from foundation.evaluation.predictions import Predictions
from foundation.evaluation.protocols import (
    ALL,
    BACKGROUND,
    PIXELS,
    PROTOCOLS,
    RANDOM,
    Answer,
    Options,
    Subject,
    Task,
)
from foundation.evaluation.scores import Score, score
from foundation.models.vit import ViT


@dataclass(frozen=True)
class Measured:
    """One encoder under one protocol: its answers, image by image, and the scores they make."""

    predictions: Predictions
    scores: tuple[Score, ...]


def measure(
    encoder_by_name: Mapping[str, ViT],
    task: Task,
    protocol: str,
    options: Options | None = None,
    *,
    controls: bool = True,
) -> list[Measured]:
    """Answers and scores, protocol by protocol; the features of an encoder are computed once for all of them.

    `protocol` is one, several with commas between, or «all», which leaves out numbers of shots that a class does not
    have. The accuracy of every other encoder is tested against that of `random-init` on the same images and seeds.
    Without `controls` background and pixels, which are the same for all encoders, are left to another call. Raises
    ConfigError without a `random-init` encoder or with an unknown word, DataError when a training sample is among the
    test samples, there are fewer than two classes, or too few shots.
    """
    options = options or Options()
    protocols = ALL if protocol == "all" else tuple(protocol.split(","))
    if protocol == "all":
        least = min(map(len, _different(task)))
        options = replace(options, shots=tuple(shots for shots in options.shots if shots <= least))
    _check(encoder_by_name, task, protocols, options)
    found: list[tuple[str, Answer, bool]] = []
    for name, encoder in [*encoder_by_name.items(), *([(BACKGROUND, None), (PIXELS, None)] if controls else [])]:
        subject = Subject(name, encoder, task, keep_tokens="attentive" in protocols)
        for one in protocols:
            if task.report is not None:
                task.report(f"{name}: {one}", 0, 1)
            found += [(name, answer, encoder is not None) for answer in subject.answers(one, options)]
    titles = list(dict.fromkeys(answer.protocol for _, answer, _ in found))
    found.sort(key=lambda part: titles.index(part[1].protocol))
    random = {answer.protocol: answer for name, answer, _ in found if name == RANDOM}
    return [
        _measured(name, answer, task, random[answer.protocol] if learnt and name != RANDOM else None)
        for name, answer, learnt in found
    ]


def _measured(name: str, answer: Answer, task: Task, random: Answer | None) -> Measured:
    predictions = _predictions(name, answer, task)
    made = [
        score(name, answer.protocol, metric, task.test.y, [*answer.probabilities], answer.seeds, answer.settings)
        for metric in METRICS
    ]
    if random is not None:
        test = asdict(paired.compare(_predictions(RANDOM, random, task), predictions))
        facts = {key: test[key] for key in ("difference", "low", "high", "p", "test")}
        made[0] = replace(made[0], settings={**made[0].settings, "paired": {"against": RANDOM, **facts}})
    return Measured(predictions, tuple(made))


def _predictions(name: str, answer: Answer, task: Task) -> Predictions:
    test = task.test
    return Predictions(name, answer.protocol, "", test.classes, test.hashes, answer.seeds, test.y, answer.probabilities)


def _different(task: Task) -> list[list[int]]:
    return fewshot.different(task.train.y, task.train.hashes, task.train.classes)


def _check(encoders: Mapping[str, ViT], task: Task, protocols: Sequence[str], options: Options) -> None:
    """Refuse wrong words, fewer than two classes and shared images before anything is computed."""
    known = (*PROTOCOLS, "all")
    problems = [f"protocol «{one}» is none of {', '.join(known)}" for one in protocols if one not in PROTOCOLS]
    if options.mode not in fewshot.MODES:
        problems.append(f"mode «{options.mode}» is neither linear nor finetune")
    if options.recipe not in fewshot.RECIPES:
        problems.append(f"recipe «{options.recipe}» is neither published nor improved")
    problems += [] if RANDOM in encoders else [f"no «{RANDOM}» encoder stands beside the others"]
    if problems:
        raise ConfigError(
            "; ".join(problems), where="evaluate", do=f"pass {{'pretrained': ..., '{RANDOM}': random_encoder(...)}}"
        )
    if len(present := torch.unique(task.train.y)) < 2:
        raise DataError(
            f"the {len(task.train)} training samples have one class only: {task.train.classes[int(present[0])]}",
            where="evaluate",
            do="a score needs at least two classes: pack labelled images of another class into the train split",
        )
    if "fewshot" in protocols and options.shots:
        fewshot.check_enough(_different(task), task.train.classes, max(options.shots))
    found = task.train.reader[task.train.ids[0]].pixels.shape[0]
    for name, encoder in encoders.items():
        if (takes := getattr(encoder, "channels", found)) != found:
            raise DataError(
                f"the images have {found} channels, the encoder «{name}» takes {takes}",
                where="evaluate",
                do="evaluate on images packed with the channels of the pretraining data",
            )
    check_disjoint(task.train, task.test)
