"""One update: micro-batches → clip → AdamW → teacher, average of the weights. Nothing in it waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foundation.config import Config
from foundation.objectives.registry import Objective
from foundation.training.average import Average
from foundation.training.engine import Engine
from foundation.training.optim import lr_at, weight_decay_at
from shards.augment import Augment
from shards.stream import Batch


class Learner(NamedTuple):
    """What an update needs, built once per run."""

    config: Config
    engine: Engine
    objective: Objective
    model: nn.Module
    optimizer: torch.optim.Optimizer
    augment: Augment
    average: Average | None = None

    def lr(self, position: int) -> float:
        """The learning rate after `position` samples."""
        return lr_at(self.config, position)


def train_step(learner: Learner, batches: Sequence[Batch], position: int, limit: float = math.inf) -> dict[str, Tensor]:
    """Update the model with one global batch, given as this rank's micro-batches of equal size.

    When the loss of the global batch is above `limit` or not finite, gradients become NaN, and weights and moments stay
    as they are. Returns detached scalars on the device: means over this rank's micro-batches; of the global batch loss,
    gradient norm and norm of Adam's step, which `Guard` looks at.
    """
    config, engine, objective, model, optimizer, augment, average = learner
    totals: dict[str, Tensor] = {}
    for index, cpu_batch in enumerate(batches):
        batch = cpu_batch.to(engine.device)
        images = augment(batch, config.seed)
        inputs = objective.prepare(images, batch.position, position)
        with engine.accumulate(model, last=index == len(batches) - 1):
            with engine.autocast():
                prediction = model(*inputs.model_args)
            loss, parts = objective.loss(prediction, inputs)
            for name, value in {"loss": loss.detach(), **parts}.items():
                totals[name] = totals.get(name, 0.0) + value / len(batches)
            if index == len(batches) - 1:
                totals["loss"] = engine.mean(totals["loss"])
                loss = loss * sound(totals["loss"], limit)
            engine.backward(model, loss / len(batches))
    norm = engine.update(model, optimizer, learner.lr(position), weight_decay_at(config, position))
    if (kept := objective.momentum(position)) is not None:
        engine.follow(model, kept)
    if average:
        average.update()
    return {**totals, "grad_norm": norm, "update_norm": engine.update_norm(optimizer)}


def sound(loss: Tensor, limit: float) -> Tensor:
    """1 for a loss that may be learnt from, else NaN, without waiting for the device."""
    return torch.where(loss.isfinite() & (loss <= limit), 1.0, math.nan)
