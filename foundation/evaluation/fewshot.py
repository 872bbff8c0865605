"""Classifiers learnt from a few chips per class: a linear layer on frozen features, or the whole encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from foundation.errors import ConfigError
from foundation.evaluation.features import Progress
from foundation.evaluation.tuning import Recipe, empty_linear, generator, learn
from foundation.models.vit import ViT
from shards.addressed import permutation
from shards.errors import DataError

SHOTS, SEEDS = (10, 20, 40), (0, 1, 2, 3, 4)
MODES = ("linear", "finetune")
# Chosen on shots held out of TRAIN (docs/evaluation.md), never on a test set.
_LINEAR = Recipe("improved", pool="patches", batch_norm=True, epochs=100, warmup_epochs=5, smoothing=0.1)
_FINETUNE = replace(_LINEAR, layer_decay=0.7, weight_decay=0.05, shift=1 / 16, flip=0.5, speckle=0.1)
RECIPES = {
    "published": {mode: Recipe(batch_norm=mode == "linear") for mode in MODES},
    "improved": {"linear": _LINEAR, "finetune": _FINETUNE},
}


def recipe_of(name: str, mode: str) -> Recipe:
    """The named recipe for a mode. Raises ConfigError for another name."""
    if name not in RECIPES or mode not in MODES:
        what = f"recipe «{name}» with mode «{mode}» is not known"
        raise ConfigError(what, where="evaluate", do=f"choose from {', '.join(RECIPES)} and from {', '.join(MODES)}")
    return RECIPES[name][mode]


def different(y: Tensor, hashes: tuple[str, ...], classes: tuple[str, ...]) -> list[list[int]]:
    """Of each class the indices of its different images, sorted by content hash; of equal images the first."""
    found: list[dict[str, int]] = [{} for _ in classes]
    for index, (label, name) in enumerate(zip(y.tolist(), hashes, strict=True)):
        found[label].setdefault(name, index)
    return [[of_class[name] for name in sorted(of_class)] for of_class in found]


def check_enough(images: list[list[int]], classes: tuple[str, ...], shots: int) -> None:
    """Raise DataError when a class has fewer than `shots` different images (as `different` gives them)."""
    if short := [f"{name} {len(of)}" for name, of in zip(classes, images, strict=True) if len(of) < shots]:
        least = min(map(len, images))
        raise DataError(
            f"{shots} shots per class were asked for, but these classes have fewer different training images: "
            f"{', '.join(short)}",
            do=f"ask for at most {least} shots, or add labelled training images",
        )


def draw(y: Tensor, hashes: tuple[str, ...], classes: tuple[str, ...], shots: int, seed: int) -> Tensor:
    """Indices of `shots` different images of each class, class by class: int64 [classes · shots].

    Looked up by (seed, class) among the class's sorted content hashes, so neither the packing order nor the other
    classes matter, and more shots contain fewer. Raises DataError when a class is too small.
    """
    images = different(y, hashes, classes)
    check_enough(images, classes, shots)
    picked = []
    for name, members in zip(classes, images, strict=True):
        order = permutation(seed, f"evaluation/shots/{name}", torch.tensor([0]), len(members))[0]
        picked += [members[i] for i in order[:shots].tolist()]
    return torch.tensor(picked, dtype=torch.int64)


def linear(train: Tensor, y: Tensor, test: Tensor, classes: int, seed: int, recipe: Recipe | None = None) -> Tensor:
    """Class probabilities fp32 [M, classes] of `test` [M, D], learnt from drawn features `train` [N, D], `y` int64 [N].

    BatchNorm without scale and shift, then Linear (normal, deviation .01). Features are not augmented, so cached ones
    give what running the frozen encoder each time would.
    """
    train, test = train.float().cpu(), test.float().cpu()
    layer = empty_linear(train.shape[1], classes)
    nn.init.normal_(layer.weight, std=0.01, generator=generator(seed, "evaluation/fewshot/linear"))
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(nn.BatchNorm1d(train.shape[1], affine=False), layer)
    learn(model, lambda pick: train[pick], y, seed, recipe or RECIPES["published"]["linear"])
    with torch.no_grad():
        return model(test).softmax(1)


class Classifier(nn.Module):
    """An encoder and a linear layer on the feature the recipe names: images [B, C, H, W] → logits [B, classes]."""

    def __init__(self, encoder: ViT, classes: int, seed: int, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, recipe.pool
        self.standard = nn.BatchNorm1d(encoder.dim, affine=False) if recipe.batch_norm else nn.Identity()
        self.head = empty_linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=generator(seed, "evaluation/fewshot/head"))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images."""
        tokens = self.encoder.forward_features(images)
        token = self.pool == "token"
        feature = self.encoder.pooled(tokens) if token else tokens[:, self.encoder.prefix :].mean(1)
        return self.head(self.standard(feature))


def finetune(
    encoder: ViT,
    train: Tensor | Callable[[Tensor], Tensor],
    y: Tensor,
    test: Iterable[Tensor],
    classes: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Class probabilities fp32 [M, classes] of the `test` batches [b, C, S, S] by a tuned copy of `encoder`.

    `train` are images [N, C, S, S], or a function that gives those of some indices; `y` int64 [N]. The encoder that was
    passed stays as it is.
    """
    recipe = recipe or RECIPES["published"]["finetune"]
    fetch = (lambda pick: train[pick]) if isinstance(train, Tensor) else train
    model = Classifier(copy.deepcopy(encoder), classes, seed, recipe).to(device)
    learn(model, fetch, y, seed, recipe, progress)
    with torch.no_grad():
        return torch.cat([model(part.to(device)).softmax(1).cpu() for part in test])
