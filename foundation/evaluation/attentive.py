"""Attentive probe: one learnt query looks over the patch tokens of a frozen encoder, then a linear layer.

The probe of I-JEPA's and V-JEPA's evaluations (Chen et al., arXiv 2202.03026): where a class is written in some patches
and not in the class token, a linear probe on the latter misses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.evaluation.features import Progress
from foundation.evaluation.probe import held_out
from foundation.evaluation.tuning import descend, empty_linear, generator
from shards.addressed import bits, permutation

RATES, DECAYS = (1e-3, 3e-3), (1e-2, 0.3)
STEPS = 150  # at least so many are made: an epoch of few images is one step
SAMPLED = 100_000  # patch tokens that their mean and deviation are taken from


@dataclass(frozen=True)
class Setting:
    """How a probe is learnt: AdamW, cosine to zero by step; learning rate and weight decay are chosen.

    With few images there are more epochs, so that there are STEPS steps.
    """

    lr: float
    weight_decay: float
    epochs: int = 20
    batch: int = 128

    def made(self, images: int) -> int:
        """Epochs that are made over so many images."""
        return max(self.epochs, math.ceil(STEPS / (images // min(self.batch, images))))


class Probe(nn.Module):
    """Patch tokens [B, n, D] → logits [B, classes]: multi-head attention of one query, values, a linear layer.

    With one query the keys need not be computed: q·(W x) = (Wᵀ q)·x. Likewise values are projected after the
    weighted mean. `mean` and `deviation` [D] standardise the tokens.
    """

    def __init__(self, dim: int, classes: int, seed: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.heads = next(heads for heads in (max(1, dim // 64), 1) if dim % heads == 0)
        draw = generator(seed, "evaluation/attentive")
        self.mean, self.deviation = nn.Buffer(mean), nn.Buffer(deviation)
        self.query = nn.Parameter(0.02 * torch.randn(dim, generator=draw))
        self.key, self.value, self.head = (empty_linear(dim, size) for size in (dim, dim, classes))
        for layer in (self.key, self.value, self.head):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5, generator=draw)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)

    def attend(self, tokens: Tensor) -> Tensor:
        """What the query gathers: standardised tokens [B, n, D] → [B, D]."""
        part = self.query.numel() // self.heads
        query = torch.einsum("hp,hpd->hd", self.query.view(self.heads, part), self.key.weight.unflatten(0, (-1, part)))
        weight = (torch.einsum("bnd,hd->bhn", tokens, query) / math.sqrt(part)).softmax(-1)
        gathered = torch.einsum("bhn,bnd->bhd", weight, tokens)
        values = torch.einsum("bhd,hpd->bhp", gathered, self.value.weight.unflatten(0, (-1, part)))
        return values.flatten(1) + self.value.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.attend((tokens.float() - self.mean) / self.deviation))


def _sample(rows: Tensor, seed: int) -> Tensor:
    """Rows [M, D] to standardise by: all, or SAMPLED at random, because every n-th may always be of the same column."""
    if len(rows) <= SAMPLED:
        return rows
    return rows[bits(seed, "evaluation/attentive/sample", torch.tensor([0]), SAMPLED)[0] % len(rows)]


def _learn(tokens: Tensor, y: Tensor, classes: int, seed: int, setting: Setting, device: Any) -> Probe:
    """A probe learnt on tokens fp16 [N, n, D], moved to `device` batch by batch."""
    sample = _sample(tokens.flatten(0, 1), seed).float()
    probe = Probe(tokens.shape[-1], classes, seed, sample.mean(0), sample.std(0).clamp_min(1e-4)).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=setting.lr, weight_decay=setting.weight_decay)
    size = min(setting.batch, len(y))
    steps = len(y) // size
    epochs = setting.made(len(y))
    for epoch in range(epochs):
        order = permutation(seed, "evaluation/attentive/order", torch.tensor([epoch]), len(y))[0]
        for step in range(steps):
            at = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = setting.lr * 0.5 * (1 + math.cos(math.pi * at))
            pick = order[step * size : (step + 1) * size]
            loss = F.cross_entropy(probe(tokens[pick].to(device)), y[pick].to(device))
            descend(optimizer, loss, "attentive probe", f"tokens in fp16, learning rate {setting.lr:g}, epoch {epoch}")
    return probe.eval()


@torch.no_grad()
def _probabilities(probe: Probe, tokens: Tensor, device: Any) -> Tensor:
    return torch.cat([probe(part.to(device)).softmax(1).cpu() for part in tokens.split(256)])


def predict(
    train: Tensor,
    y: Tensor,
    test: Tensor,
    classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Class probabilities fp32 [M, classes] of patch tokens `test` [M, n, D], and the settings that were chosen.

    Learnt from the patch tokens `train` [N, n, D] of a frozen encoder, any float dtype, and `y` int64 [N].

    Learning rate and weight decay are those with the least cross-entropy on a held-out fifth of TRAIN (the first of
    equals, and if no class has two samples); the probe is then learnt on all of TRAIN. `progress` counts probes.
    """
    out = held_out(y, seed)
    choices = [Setting(*pair) for pair in product(RATES, DECAYS)]
    tried: dict[Setting, tuple[float, float]] = {}
    for number, setting in enumerate(choices if out.any() else ()):
        guess = _probabilities(_learn(train[~out], y[~out], classes, seed, setting, device), train[out], device)
        right = (guess.argmax(1) == y[out]).double().mean().item()
        tried[setting] = F.nll_loss(guess.clamp_min(1e-12).log(), y[out]).item(), right
        if progress is not None:
            progress(number + 1, len(choices) + 1)
    best = min(tried, key=lambda s: tried[s][0], default=choices[0])
    found = _probabilities(_learn(train, y, classes, seed, best, device), test, device)
    if progress is not None:
        progress(len(choices) + 1, len(choices) + 1)
    settings = {"lr": best.lr, "weight_decay": best.weight_decay, "epochs": best.made(len(y)), "batch": best.batch}
    return found, {**settings, "held_out_accuracy": tried[best][1] if best in tried else None}
