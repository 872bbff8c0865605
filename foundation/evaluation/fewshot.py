"""Few-shot classification: a linear layer on frozen features, or the whole encoder, learnt from a few chips per class.

The recipe is the published one: AdamW, 40 epochs of which 2 warm up, cosine per epoch, the last step is tested.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foundation.errors import NumericsError
from foundation.models.vit import ViT
from shards.addressed import permutation, stream_key
from shards.errors import DataError

SHOTS, SEEDS = (10, 20, 40), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Recipe:
    """How few shots are learnt; learning rates are per step of AdamW, epochs pass over the drawn samples."""

    lr: float = 1e-3
    warmup_lr: float = 1e-5
    weight_decay: float = 5e-4
    epochs: int = 40
    warmup_epochs: int = 2
    batch: int = 50

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch: constant warm-up, then a cosine of period `epochs` counted from its end."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs))


def draw(y: Tensor, hashes: tuple[str, ...], classes: tuple[str, ...], shots: int, seed: int) -> Tensor:
    """Indices of `shots` samples of each class, class by class: int64 [classes · shots].

    Looked up by (seed, class) among the class's sorted content hashes, so neither the packing order nor the other
    classes matter, and more shots contain fewer. Raises DataError when a class is too small.
    """
    counts = torch.bincount(y, minlength=len(classes)).tolist()
    if short := [f"{name} {n}" for name, n in zip(classes, counts, strict=True) if n < shots]:
        raise DataError(
            f"{shots} shots per class were asked for, but these classes have fewer training images: {', '.join(short)}",
            do=f"ask for at most {min(counts)} shots, or add labelled training images",
        )
    picked = []
    for label, name in enumerate(classes):
        members = sorted((y == label).nonzero()[:, 0].tolist(), key=lambda i: hashes[i])
        order = permutation(seed, f"evaluation/shots/{name}", torch.tensor([0]), len(members))[0]
        picked += [members[i] for i in order[:shots].tolist()]
    return torch.tensor(picked, dtype=torch.int64)


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_key(seed, purpose) & (2**63 - 1))


def _head(dim: int, classes: int) -> nn.Linear:
    """A linear layer without weights yet: the usual initialisation would draw from the global generator."""
    return nn.Linear(dim, classes, device="meta").to_empty(device="cpu")


def _train(model: nn.Module, x: Tensor, y: Tensor, seed: int, recipe: Recipe) -> None:
    """Learn `model` on `x` [N, ...], `y` int64 [N]; batches are drawn by (seed, epoch), a last partial one is left."""
    device = next(model.parameters()).device
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    size = min(recipe.batch, len(x))
    model.train()
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.rate(epoch)
        order = permutation(seed, "evaluation/fewshot/order", torch.tensor([epoch]), len(x))[0]
        for start in range(0, len(x) - size + 1, size):
            pick = order[start : start + size]
            loss = cross_entropy(model(x[pick].to(device)), y[pick].to(device))
            if not loss.isfinite():
                raise NumericsError(
                    f"the few-shot loss is {loss.item()}",
                    where=f"seed {seed}, epoch {epoch}",
                    do="check the encoder's weights; lower evaluation's learning rate",
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
    model.eval()


def linear(train: Tensor, y: Tensor, test: Tensor, classes: int, seed: int, recipe: Recipe | None = None) -> Tensor:
    """Classes of `test` [M, D] by a layer learnt on the drawn features `train` [N, D], `y` int64 [N]: int64 [M].

    BatchNorm without scale and shift, then Linear (normal, deviation .01). Nothing is augmented, so cached features
    give what running the frozen encoder each time would.
    """
    train, test = train.float().cpu(), test.float().cpu()
    layer = _head(train.shape[1], classes)
    nn.init.normal_(layer.weight, std=0.01, generator=_generator(seed, "evaluation/fewshot/linear"))
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(nn.BatchNorm1d(train.shape[1], affine=False), layer)
    _train(model, train, y, seed, recipe or Recipe())
    with torch.no_grad():
        return model(test).argmax(1)


class Classifier(nn.Module):
    """An encoder and a linear layer on its pooled tokens: images [B, C, H, W] → logits [B, classes]."""

    def __init__(self, encoder: ViT, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, _head(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=_generator(seed, "evaluation/fewshot/head"))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images."""
        return self.head(self.encoder(images))


def finetune(
    encoder: ViT,
    train: Tensor,
    y: Tensor,
    test: Iterable[Tensor],
    classes: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
) -> Tensor:
    """Classes of the `test` batches [b, C, S, S] by a copy of `encoder` tuned on `train` [N, C, S, S]: int64 [M].

    All layers share one learning rate; the encoder that was passed stays as it is.
    """
    model = Classifier(copy.deepcopy(encoder), classes, seed).to(device)
    _train(model, train, y, seed, recipe or Recipe())
    with torch.no_grad():
        return torch.cat([model(part.to(device)).argmax(1).cpu() for part in test])
