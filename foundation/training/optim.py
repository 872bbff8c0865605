"""Parameter groups as a rule table, and the learning rate as a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foundation.config import Config, OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside the number of updates
EPS = 1e-8
SLICE = 1 << 24  # numbers that are copied at a time
FEW = 16  # tensors


class Rule(NamedTuple):
    """A parameter group: the parameters its rule takes, and their weight decay, at first."""

    name: str
    names: tuple[str, ...]
    weight_decay: float
    decays: bool
    """whether a schedule of the weight decay means it"""


def rules(model: nn.Module, weight_decay: float) -> list[Rule]:
    """Vectors (biases, norms) do not decay; everything else does, as published."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = tuple(name for name, p in trained.items() if p.ndim <= 1)
    rest = tuple(name for name in trained if name not in set(plain))
    return [Rule("bias and norm", plain, 0.0, False), Rule("weights, tokens, tables", rest, weight_decay, True)]


def rule_table(model: nn.Module, optim: OptimConfig) -> list[tuple[str, ...]]:
    """Rows (rule, tensors, parameters, weight decay) to print once."""
    parameters = dict(model.named_parameters())
    return [
        (r.name, str(len(r.names)), f"{sum(parameters[n].numel() for n in r.names):,}", f"{r.weight_decay:g}")
        for r in rules(model, optim.weight_decay)
    ]


def build_optimizer(model: nn.Module, table: Sequence[Rule], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the rule table; the learning rate is set before every step."""
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in r.names], "weight_decay": r.weight_decay, "decays": r.decays}
        for r in table
        if r.names
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=EPS, fused=True)


def direction_square(moments: Sequence[Sequence[Tensor]]) -> Tensor:
    """Square of the norm of m / (sqrt(v) + eps) over pairs (m, v) of Adam's moments: fp32 [], on their device.

    The step itself but for learning rate, decay and bias corrections. A few tensors at a time: copies take memory.
    """
    total = torch.zeros((), device=moments[0][0].device) if moments else torch.zeros(())
    pairs = [pair for m, v in moments for pair in zip(m.view(-1).split(SLICE), v.view(-1).split(SLICE), strict=True)]
    for first in range(0, len(pairs), FEW):
        m, v = zip(*pairs[first : first + FEW], strict=True)
        divisors = torch._foreach_sqrt(v)
        torch._foreach_add_(divisors, EPS)
        norms = torch._foreach_norm(torch._foreach_div(m, divisors))
        total += torch.stack([norm.float() for norm in norms]).square().sum()
    return total


def schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None) -> None:
    """Set the learning rate of every group, and the weight decay of those that decay, unless it stays (None)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


def peak_lr(optim: OptimConfig, global_batch: int) -> float:
    """Linear scaling rule: base rate · global batch / reference batch. The cluster does not enter."""
    return optim.lr * global_batch / optim.reference_batch


def learning_rate(
    position: float, total: float, warmup: float, peak: float, floor: float = 0.0, start: float = 0.0
) -> float:
    """Linear warm-up from `start`, then half a cosine to `floor`; all clocks in samples seen."""
    if position < warmup:
        return start + (peak - start) * position / warmup
    progress = min(1.0, (position - warmup) / max(1.0, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_at(config: Config, position: float) -> float:
    """The learning rate of the update that follows `position` samples."""
    optim, train = config.optim, config.train
    peak, scale = peak_lr(optim, train.global_batch), train.global_batch / optim.reference_batch
    ends = optim.min_lr * scale, optim.warmup_lr * scale
    return learning_rate(position, train.samples, optim.warmup_samples, peak, *ends)


def weight_decay_at(config: Config, position: float) -> float | None:
    """The weight decay of that update: half a cosine over the whole run. None where it does not change."""
    first, last = config.optim.weight_decay, config.optim.final_weight_decay
    return None if last is None else learning_rate(position, config.train.samples, 0, first, last)
