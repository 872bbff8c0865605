"""Parameter groups as a rule table, and the learning rate as a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from foundation.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside the number of updates


class Rule(NamedTuple):
    """A parameter group: the parameters its rule takes, and their weight decay."""

    name: str
    names: tuple[str, ...]
    weight_decay: float


def rules(model: nn.Module, weight_decay: float) -> list[Rule]:
    """Vectors (biases, norms) do not decay; everything else does, as published."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = tuple(name for name, p in trained.items() if p.ndim <= 1)
    rest = tuple(name for name in trained if name not in set(plain))
    return [Rule("bias and norm", plain, 0.0), Rule("weights, tokens, tables", rest, weight_decay)]


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
    groups = [{"params": [parameters[n] for n in r.names], "weight_decay": r.weight_decay} for r in table if r.names]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)


def peak_lr(optim: OptimConfig, global_batch: int) -> float:
    """Linear scaling rule: base rate · global batch / reference batch. The cluster does not enter."""
    return optim.lr * global_batch / optim.reference_batch


def learning_rate(position: float, total: float, warmup: float, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine to `floor`; all clocks in samples seen."""
    if position < warmup:
        return peak * position / warmup
    progress = min(1.0, (position - warmup) / max(1.0, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
